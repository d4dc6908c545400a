//! What comes from outside on its own time, and what it changes at once.

use holo_proto::{AddrRange, SUBPAGE_BYTES};

use super::space::Ring;
use super::{Core, EVERYWHERE, Input, Nanos, Op};
use crate::store::api::PageStore;

impl<S: PageStore> Core<'_, S> {
    /// Takes an input.
    pub fn handle(&mut self, now: Nanos, input: Input) {
        self.now = now;
        match input {
            Input::Readable(id) => {
                if let Some(s) = self.space(id) {
                    s.drain = true;
                }
            }
            Input::RingDone { space, tag, result } => self.ring_done(space, tag, result),
            Input::RingQuiet { space, requests } => self.ring_quiet(space, requests),
            Input::RingReady(id) => {
                if let Some(s) = self.space(id) {
                    s.ring = Ring::Ready;
                    s.requests = 0;
                }
                self.unhold();
            }
            Input::RingRefused(id) => {
                if let Some(s) = self.space(id) {
                    s.ring = Ring::Refused;
                }
                self.unhold();
            }
            Input::RingLost(id) => {
                self.notes.forget_last(id);
                if let Some(s) = self.space(id) {
                    // Asked for again when it is needed.
                    s.ring = Ring::Absent;
                    s.restore.ring_lost();
                }
                self.unhold();
            }
            Input::Store(done) => self.store_done(done),
            Input::Adopt { space, range } => {
                if let Some(s) = self.space(space) {
                    s.adopt_later(range);
                }
            }
            Input::Registered { space, range } => {
                if let Some(s) = self.space(space) {
                    if !s.known {
                        s.seen.add(range);
                    }
                    if s.regions.around(range.start) != Some(range) {
                        s.regions.add(range);
                        s.hearsay.add(range);
                        self.errands.push_back(Op::Wake { space, range });
                    }
                }
            }
            Input::Never { space, range } => self.never(space, range),
            Input::Known(id) => {
                if let Some(s) = self.space(id) {
                    s.told = true;
                }
            }
            Input::NothingRegistered(id) => {
                if let Some(s) = self.space(id).filter(|s| s.known) {
                    s.unregistered = true;
                }
            }
            Input::Wiped { space, range } => {
                if let Some(s) = self.space(space).filter(|s| !s.known) {
                    s.wiped.push(range);
                    s.seen.add(range);
                }
            }
            Input::Quiesced { space, count } => {
                if let Some(s) = self.space(space) {
                    s.quiesced(count, now);
                    let awaited = s.drops.quiesced(s.quiesce_count);
                    self.notes.set_large_drop(space, awaited);
                }
            }
            Input::Redirtied {
                space,
                ticket,
                done,
            } => {
                if let Some(s) = self.space(space) {
                    s.redirtied(done.is_some(), now);
                }
                if done.is_none() {
                    // What keeps it from being stopped may be a fault that waits for just this.
                    self.unhold();
                }
                self.repair_redirtied(space, ticket, done);
                self.restore_redirtied(space, ticket, done);
            }
            Input::Measured { space, bytes } => {
                let mut fell = false;
                if let Some(s) = self.space(space) {
                    fell = bytes < s.usage_bytes;
                    s.usage_bytes = bytes;
                }
                if fell {
                    self.unhold();
                }
                self.note_peak();
            }
            Input::Budget { bytes } => {
                self.budget_bytes = bytes;
                self.unhold();
            }
            Input::Detach(id) => self.begin_detach(id),
            // It may be late, and about another process that had this number: the descriptor tells.
            Input::Exited(id) => {
                if self.space_ref(id).is_some() {
                    let start = EVERYWHERE.start;
                    let end = start.offset(SUBPAGE_BYTES);
                    let range = AddrRange { start, end };
                    self.errands.push_back(Op::Unprotect { space: id, range });
                }
            }
        }
    }
}
