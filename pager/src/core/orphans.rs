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
        if self.orphan_ticket.is_some() || self.now < self.orphans_rest_until {
            return None;
        }
        let free = self.orphans.iter().position(|&f| !self.is_noted(f))?;
        self.orphans.swap(0, free);
        let frame = *self.orphans.front()?;
        let mask = self.staged_anywhere(frame);
        if mask.is_empty() {
            self.orphans.pop_front();
            self.frames.drop_hold(frame);
            return None;
        }
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
