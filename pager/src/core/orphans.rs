//! Frames that outlived their batch, and what becomes of them; the ends of transfers.

use holo_proto::{AddrRange, SubpageIndex, SubpageMask};

use super::{Core, Entry, FrameId, Op};
use crate::store::api::{Completion, PageStore};

/// After the store had no room for a frame, so long until the next try.
const ORPHANS_REST_NS: u64 = 100_000_000;
/// It doubles each time, up to this.
const ORPHANS_REST_MOST_NS: u64 = 10_000_000_000;

impl<S: PageStore> Core<'_, S> {
    pub(super) fn step_orphans(&mut self) -> Option<Op> {
        if self.orphan_ticket.is_some() {
            return None;
        }
        // Those to which nothing refers any more are free, also while the store rests.
        let frames = &mut self.frames;
        self.orphans.retain(|&f| {
            let referred = frames.holds(f) > 1;
            if !referred {
                frames.drop_hold(f);
            }
            referred
        });
        if self.now < self.orphans_rest_until {
            return None;
        }
        let (frame, mask) = loop {
            let free = self.orphans.iter().position(|&f| !self.is_of_a_batch(f))?;
            self.orphans.swap(0, free);
            let frame = *self.orphans.front()?;
            let mask = self.staged_anywhere(frame);
            if !mask.is_empty() {
                break (frame, mask);
            }
            self.orphans.pop_front();
            self.frames.drop_hold(frame);
        };
        let ticket = self.new_ticket();
        self.orphan_ticket = Some(ticket);
        Some(Op::Put {
            ticket,
            frame,
            mask,
        })
    }

    /// Entries refer to this frame, and no batch brings it to the store any more. It is held meanwhile: what is in
    /// it must not change while the store has it.
    pub(super) fn add_orphan(&mut self, frame: FrameId) {
        if !self.orphans.contains(&frame) {
            self.frames.hold(frame);
            self.orphans.push_back(frame);
        }
    }

    /// A batch is done with a frame. Entries may still refer to it: those of a fork's child or of a page that moved, where the
    /// space ended before the store had it, or the store had no room for it.
    pub(super) fn leave_frame(&mut self, frame: FrameId) {
        if self.frames.holds(frame) > 1 {
            self.add_orphan(frame);
        }
        self.frames.drop_hold(frame);
    }

    /// Frames that entries refer to and that nobody will bring to the store. There must be none: they would be lost to
    /// all processes for as long as the entries live.
    #[must_use]
    pub fn frames_forsaken(&self) -> usize {
        let batches = self
            .spaces
            .iter()
            .flatten()
            .filter_map(|s| s.batch.as_ref());
        let install = self.install.as_ref().and_then(|i| i.frame);
        // These end when no change of mappings is under way.
        let graves = self.graves.iter().filter_map(|g| match g.entry {
            Entry::Staged(f, _) => Some(f),
            Entry::Stored(_) | Entry::Nothing | Entry::Dropping(_) => None,
        });
        let cared_for: Vec<_> = batches
            .flat_map(super::batch::Batch::frames)
            .chain(self.orphans.iter().copied())
            .chain(install)
            .chain(graves)
            .collect();
        self.frames
            .held()
            .filter(|f| !cared_for.contains(f))
            .count()
    }

    /// The subpages of `frame` that any entry refers to.
    pub(super) fn staged_anywhere(&self, frame: FrameId) -> SubpageMask {
        let mut mask = SubpageMask::NONE;
        self.map.for_each_everywhere(|_, _, e| {
            if let Entry::Staged(f, i) = e {
                if f == frame {
                    mask = mask.with(i);
                }
            }
        });
        mask
    }

    /// Every entry that is staged in `frame` becomes stored at `locations`; each location's one reference
    /// is used up.
    pub(super) fn resolve_frame(
        &mut self,
        frame: FrameId,
        locations: &crate::store::api::Locations,
    ) {
        let everywhere = AddrRange::new(0, u64::MAX);
        let ids: Vec<_> = self.map.spaces().collect();
        for id in ids {
            let mut at = everywhere.start.subpage();
            while let Some((found, e)) = self.map.next_in(id, at, everywhere.end.subpage()) {
                at = SubpageIndex(found.0 + 1);
                if let Entry::Staged(f, i) = e {
                    if f == frame {
                        let new = match locations[i] {
                            Some(l) => {
                                self.store.retain(l);
                                Entry::Stored(l)
                            }
                            None => Entry::Nothing,
                        };
                        self.set_entry(id, found, new);
                    }
                }
            }
        }
        for l in locations.iter().flatten() {
            self.store.release(*l);
        }
    }

    pub(super) fn store_done(&mut self, done: Completion) {
        match done {
            Completion::Put { ticket, result } if self.orphan_ticket == Some(ticket) => {
                self.orphan_ticket = None;
                let Some(frame) = self.orphans.pop_front() else {
                    return;
                };
                if let Ok(locations) = result {
                    self.orphans_rest_ns = 0;
                    self.resolve_frame(frame, &locations);
                    self.frames.drop_hold(frame);
                } else {
                    // What it holds is served from where it is, until there is room.
                    self.orphans.push_back(frame);
                    let longer = 2 * self.orphans_rest_ns;
                    self.orphans_rest_ns = longer.clamp(ORPHANS_REST_NS, ORPHANS_REST_MOST_NS);
                    self.orphans_rest_until = self.now.after(self.orphans_rest_ns);
                }
            }
            Completion::Put { ticket, result } => self.batch_put_done(ticket, result),
            Completion::Get { ticket, result } => self.install_fetched(ticket, result),
        }
    }
}
