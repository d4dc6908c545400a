//! To the store, and out of memory.

use holo_proto::{PageIndex, SUBPAGE_BYTES, SpaceId, SubpageMask};

use super::{Batch, BatchPage, Phase, Step};
use crate::core::{Core, CrashPoint, Entry, FrameId, Op, PageLook};
use crate::store::api::{Locations, PageStore, StoreError, Ticket};

/// Rest after a batch that freed nothing, nanoseconds; doubled while fruitless.
const REST_NS: u64 = 2_000_000;

impl<S: PageStore> Core<'_, S> {
    /// What of the page's frame the map still needs, here or (a fork's child) elsewhere.
    pub(super) fn put(&mut self, id: SpaceId, b: &mut Batch) -> Option<Op> {
        while let Some(p) = b.pages.get(b.at) {
            if let Some(frame) = p.frame {
                if self.frames.holds(frame) > 1 {
                    let mask = self.staged_mask(id, p.page, frame);
                    let ticket = self.new_ticket();
                    b.ticket = Some(ticket);
                    b.step = Step::Put;
                    return Some(Op::Put {
                        ticket,
                        frame,
                        mask,
                    });
                }
            }
            b.at += 1;
        }
        b.goto(Phase::Pageout);
        None
    }

    /// The subpages of a frame that the map refers to: usually all by the page itself, else by whoever.
    pub(super) fn staged_mask(&self, id: SpaceId, page: PageIndex, frame: FrameId) -> SubpageMask {
        let own = (0..16)
            .filter(|&i| self.map.entry(id, page.subpage(i)) == Entry::Staged(frame, i))
            .fold(SubpageMask::NONE, SubpageMask::with);
        if self.frames.holds(frame) == own.count() + 1 {
            own
        } else {
            self.staged_anywhere(frame)
        }
    }

    pub(in crate::core) fn batch_put_done(
        &mut self,
        ticket: Ticket,
        result: Result<Locations, StoreError>,
    ) {
        let found = self.find_space(|s| s.batch.as_ref().is_some_and(|b| b.ticket == Some(ticket)));
        let Some(id) = found else {
            // The space ended meanwhile: nobody refers to what was stored.
            if let Ok(locations) = result {
                for l in locations.iter().flatten() {
                    self.store.release(*l);
                }
            }
            return;
        };
        let Some(mut b) = self.space(id).and_then(|s| s.batch.take()) else {
            return;
        };
        b.ticket = None;
        let (at, now) = (b.at, self.now);
        b.at += 1;
        if let Some(p) = b.pages.get_mut(at) {
            match result {
                Ok(locations) => {
                    self.crash(CrashPoint::StorePut);
                    self.stored(id, p, &locations);
                    self.crash(CrashPoint::Stored);
                    p.durable = true;
                }
                Err(_) => {
                    // No room: the page must not go. It becomes dirty and resident again, and the frame
                    // is free when the map no longer needs it.
                    let range = p.page.range();
                    if let Some(s) = self.space(id) {
                        s.restore.push(range, now);
                    }
                }
            }
        }
        if let Some(s) = self.space(id) {
            s.batch = Some(b);
        }
    }

    pub(super) fn stored(&mut self, id: SpaceId, p: &BatchPage, locations: &Locations) {
        let Some(frame) = p.frame else { return };
        let mut spent = [false; 16];
        for i in 0..16 {
            let at = p.page.subpage(i);
            if self.map.entry(id, at) == Entry::Staged(frame, i) {
                let new = locations[i].map_or(Entry::Nothing, Entry::Stored);
                if self.map.replace(id, at, new).is_ok() {
                    spent[i] = true;
                    self.frames.drop_hold(frame);
                }
            }
        }
        let mut rest = *locations;
        for i in 0..16 {
            if spent[i] {
                rest[i] = None;
            }
        }
        if self.frames.holds(frame) > 1 {
            // A fork's child, or a page that moved, refers to the frame too.
            for l in (0..16).filter(|&i| spent[i]).filter_map(|i| locations[i]) {
                self.store.retain(l);
            }
            self.resolve_frame(frame, locations);
            return;
        }
        for l in rest.iter().flatten() {
            self.store.release(*l);
        }
    }

    pub(super) fn page_out(&mut self, id: SpaceId, b: &mut Batch) -> Option<Op> {
        self.pageout.clear();
        for p in &b.pages {
            if p.durable && !p.lost {
                for (first, count) in p.mask.runs() {
                    self.pageout.push(p.run(first, count));
                }
            }
        }
        b.goto(Phase::Look);
        if self.pageout.is_empty() {
            return None;
        }
        b.step = Step::Pageout;
        Some(Op::Pageout { space: id })
    }

    pub(super) fn final_look(&mut self, id: SpaceId, b: &mut Batch, look: PageLook) {
        let Some(p) = b.pages.get(b.at).cloned() else {
            return;
        };
        b.at += 1;
        let gone = p.mask.minus(look.present).minus(look.swapped);
        let stayed = p.mask.and(look.present);
        if !gone.is_empty() {
            self.stats.pages_evicted += 1;
            self.stats.subpages_evicted += u64::from(gone.count());
            // What the kernel has dropped though the store had no room for it comes back.
            b.freed += if p.durable { gone.count() } else { 0 };
        }
        if !stayed.is_empty() {
            if p.waiter || p.changed {
                self.stats.stayed_written += 1;
            } else {
                self.stats.stayed_other += 1;
            }
        }
        let bytes = u64::from(gone.count()) * SUBPAGE_BYTES;
        let now = self.now;
        if let Some(s) = self.space(id) {
            s.usage_bytes = s.usage_bytes.saturating_sub(bytes);
            if stayed.is_empty() {
                s.policy.evicted(p.page);
            } else {
                s.enqueue(p.page, true);
                for (first, count) in stayed.runs() {
                    s.restore.push(p.run(first, count), now);
                }
            }
        }
        self.crash(CrashPoint::Looked);
    }

    pub(super) fn finish(&mut self, id: SpaceId, b: Batch) {
        for f in b.frames() {
            self.leave_frame(f);
        }
        let now = self.now;
        self.stats.evict_ns += now.0.saturating_sub(b.started.0);
        if let Some(s) = self.space(id) {
            if b.freed > 0 {
                s.fruitless = 0;
            } else if !b.only_repairs {
                s.fruitless = s.fruitless.saturating_add(1);
                s.rest_until = now.after(REST_NS << s.fruitless.min(6));
            }
        }
        self.unhold();
    }
}
