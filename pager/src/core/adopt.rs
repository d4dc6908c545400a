//! Registering what the shell found.

use holo_proto::{AddrRange, SpaceId};

use super::space::{Life, Suspect};
use super::{ANYWHERE, Core, CrashPoint, Doing, Nanos, Op, Outcome};
use crate::store::api::PageStore;

/// So long it is taken for granted that no change of mappings is under way: less than several of them need.
const CALM_NS: u64 = 30_000;
/// A program that changes its mappings all the time is taken on all the same.
const CALM_TRIES: u32 = 16;

impl<S: PageStore> Core<'_, S> {
    /// Registers what the shell found, best while no change of mappings is under way.
    pub(super) fn step_adopt(&mut self, id: SpaceId) -> Option<(Doing, Op)> {
        let now = self.now;
        let s = self.space(id)?;
        if s.life != Life::Serving {
            s.adopt.clear();
            return None;
        }
        // Whether something is registered where that is to be found out could not be told afterwards.
        if s.unproved.is_some() {
            return None;
        }
        let range = *s.adopt.front()?;
        let asked = |x: &Suspect| range.contains(x.witness.start());
        if s.suspects.iter().any(asked) {
            return None;
        }
        let calm = s.calm.is_some_and(|t| now < t.after(CALM_NS));
        if !calm && s.calm_tries < CALM_TRIES {
            s.calm_tries += 1;
            let check = Op::Unprotect {
                space: id,
                range: ANYWHERE,
            };
            return Some((Doing::Settle(id), check));
        }
        s.calm_tries = 0;
        s.adopt.pop_front();
        // A successor could not find out again either what is known by now.
        self.notes.set_doubts(id, &self.space_ref(id)?.suspects);
        Some((Doing::Adopt(id, range), Op::Register { space: id, range }))
    }

    /// A range was registered. It is not believed before no change of mappings is under way: the message that the last
    /// occupant has gone may be, and must not be taken for the new one's.
    pub(super) fn adopted(&mut self, id: SpaceId, range: AddrRange, outcome: Outcome) {
        match outcome {
            Outcome::Done => {
                self.crash(CrashPoint::Registered);
                // Whoever is forked from now on has this, and not what was here before.
                self.clear_graves(|g| g.space == id && range.contains(g.witness.start()));
                if let Some(s) = self.space(id) {
                    s.unsettled.reborn.add(range);
                    s.unsettled.adopted.push(range);
                }
            }
            Outcome::Gone => self.gone(id),
            // Another mapping by now, or another's: the next scan decides again. Not if it was registered already.
            _ => {
                if let Some(s) = self.space(id) {
                    if s.unsettled.reborn.without(range).is_empty() {
                        s.unsettled.torn.push(range);
                    }
                }
            }
        }
    }

    /// A registered range is what stands there.
    pub(super) fn believe(&mut self, id: SpaceId, range: AddrRange) {
        if let Some(s) = self.space(id) {
            s.regions.add(range);
            s.hearsay.remove(range);
            s.sweep_after = Nanos(0);
        }
    }
}
