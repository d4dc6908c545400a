//! What comes next: errands, messages, faults, then the background work of one space after the other.

use holo_proto::SpaceId;

use super::space::{Life, Space};
use super::{
    Core, CrashPoint, Doing, FAULTS, JOURNAL_SLOTS, Nanos, Next, Op, Outcome, RECHECK_NS, SPACES,
};
use crate::store::api::PageStore;

impl<S: PageStore> Core<'_, S> {
    /// What to do next. Each [`Op`] must be completed before the next call.
    ///
    /// # Panics
    /// If the last operation was not completed.
    pub fn next(&mut self, now: Nanos) -> Next {
        assert!(
            matches!(self.doing, Doing::Nothing),
            "complete {:?} first",
            self.doing
        );
        self.now = now;
        if let Some(op) = self.errands.pop_front() {
            let space = match op {
                Op::Wake { space, .. } | Op::Kick { space } | Op::Unprotect { space, .. } => {
                    Some(space)
                }
                _ => None,
            };
            return self.begin(Doing::Errand(space), op);
        }
        if let Some(id) = self.find_space(|s| s.drain && s.life != Life::Over) {
            self.journal.begin(id);
            return self.begin(Doing::Events(id), Op::ReadEvents { space: id });
        }
        if self
            .spaces
            .iter()
            .flatten()
            .any(|s| s.retry_at.is_some_and(|t| t <= now))
        {
            for s in self.spaces.iter_mut().flatten() {
                if s.retry_at.is_some_and(|t| t <= now) {
                    s.retry_at = None;
                    s.awaits_calm = false;
                }
            }
            self.unhold();
        }
        if !self.held.is_empty() && now >= self.held_since.after(RECHECK_NS) {
            self.held_since = now;
            self.unhold();
        }
        if let Some(op) = self.step_install() {
            return self.begin(Doing::Install, op);
        }
        while let Some(fault) = self.ready.pop_front() {
            if let Some((doing, op)) = self.serve(fault) {
                return self.begin(doing, op);
            }
            if let Some(op) = self.step_install() {
                return self.begin(Doing::Install, op);
            }
        }
        if let Some(op) = self.step_orphans() {
            return self.begin(Doing::Orphan, op);
        }
        if let Some((doing, op)) = self.step_spaces() {
            return self.begin(doing, op);
        }
        if let Some(op) = self.errands.pop_front() {
            return self.begin(Doing::Errand(None), op);
        }
        // A step may have released faults, or frames: they come before sleep.
        if !self.ready.is_empty() {
            return self.next(now);
        }
        if let Some(op) = self.step_orphans() {
            return self.begin(Doing::Orphan, op);
        }
        Next::Idle(self.next_deadline())
    }

    fn begin(&mut self, doing: Doing, op: Op) -> Next {
        self.doing = doing;
        self.asking = match op {
            Op::Advise { space, .. } => Some(space),
            _ => None,
        };
        Next::Op(op)
    }

    pub(super) fn find_space(&self, want: impl Fn(&Space) -> bool) -> Option<SpaceId> {
        self.spaces.iter().flatten().find(|s| want(s)).map(|s| s.id)
    }

    fn next_deadline(&self) -> Option<Nanos> {
        let retry = self.spaces.iter().flatten().filter_map(|s| s.retry_at);
        let held = (!self.held.is_empty()).then(|| self.held_since.after(RECHECK_NS));
        let orphans = (!self.orphans.is_empty() && self.orphans_rest_until > self.now)
            .then_some(self.orphans_rest_until);
        let redirties = self.spaces.iter().flatten().map(|s| s.redirty_after);
        let redirties = redirties.filter(|&t| t > self.now);
        let rest = self
            .spaces
            .iter()
            .flatten()
            .filter(|_| self.usage_bytes() > self.high_bytes())
            .flat_map(|s| [s.rest_until, s.sweep_after])
            .filter(|&t| t > self.now);
        let rests = orphans.into_iter().chain(redirties).chain(rest);
        retry.chain(held).chain(rests).min()
    }

    /// One step of background work: registering, restoring, evicting; spaces take turns.
    fn step_spaces(&mut self) -> Option<(Doing, Op)> {
        self.again = false;
        let step = self.step_each_space();
        if step.is_none() && self.again {
            return self.step_each_space();
        }
        step
    }

    fn step_each_space(&mut self) -> Option<(Doing, Op)> {
        for k in 0..SPACES {
            let at = (self.turn + k) % SPACES;
            let Some(s) = self.spaces[at].as_deref_mut() else {
                continue;
            };
            if s.life == Life::Over || s.blocked(self.now) {
                continue;
            }
            let id = s.id;
            if s.overflowed && self.held.len() + self.ready.len() < FAULTS / 2 {
                s.overflowed = false;
                self.wake_all(id);
            }
            let step = self
                .step_suspects(id)
                .map(|op| (Doing::Suspect(id), op))
                .or_else(|| self.step_settle(id).map(|op| (Doing::Settle(id), op)))
                .or_else(|| self.step_prove(id))
                .or_else(|| self.step_adopt(id))
                .or_else(|| self.step_batch(id).map(|op| (Doing::Batch(id), op)))
                .or_else(|| self.step_restore(id).map(|op| (Doing::Restore(id), op)));
            if step.is_some() {
                self.turn = at + 1;
                return step;
            }
        }
        None
    }

    /// Takes the outcome of the operation that [`Core::next`] gave.
    ///
    /// # Panics
    /// If none was given.
    pub fn complete(&mut self, now: Nanos, outcome: Outcome) {
        self.now = now;
        let doing = std::mem::replace(&mut self.doing, Doing::Nothing);
        if let (Some(id), Outcome::Done) = (self.asking.take(), outcome) {
            if let Some(s) = self.space(id) {
                s.requests = s.requests.wrapping_add(1);
            }
        }
        match doing {
            Doing::Nothing => panic!("no operation is in progress"),
            Doing::Errand(space) => {
                if let (Some(id), Outcome::Gone) = (space, outcome) {
                    self.gone(id);
                }
            }
            Doing::Events(id) => self.events_read(id, outcome),
            Doing::Unprotect(fault) => self.unprotected(fault, outcome),
            Doing::Zero { fault, subpages } => self.zeroed(fault, subpages, outcome),
            Doing::Install => self.install_step_done(outcome),
            Doing::Batch(id) => self.batch_step_done(id, outcome),
            Doing::Restore(id) => self.restore_step_done(id, outcome),
            Doing::Settle(id) => match outcome {
                Outcome::Gone => self.gone(id),
                Outcome::EventsPending => self.events_pending(id),
                _ => {
                    self.progressed(id);
                    if let Some(s) = self.space(id) {
                        s.calm = Some(now);
                    }
                    // What needs calm comes at once.
                    self.turn = usize::from(id.0);
                }
            },
            Doing::Suspect(id) => self.suspect_tried(id, outcome),
            Doing::Prove(id, range) => self.proved(id, range, outcome),
            Doing::Adopt(id, range) => self.adopted(id, range, outcome),
            Doing::Orphan => {}
        }
    }

    fn events_read(&mut self, id: SpaceId, outcome: Outcome) {
        let now = self.now;
        let count = match outcome {
            Outcome::Events { count, gone } => {
                self.gone = gone;
                count
            }
            Outcome::Gone => return self.gone(id),
            _ => 0,
        };
        if let Some(s) = self.space(id) {
            s.drain = count == JOURNAL_SLOTS;
            if count == 0 && std::mem::take(&mut s.said_pending) {
                // Nothing to read, yet an ioctl said pending: the waiter was woken and must run first.
                s.backoff_ns = (s.backoff_ns * 2).clamp(10_000, 500_000);
                s.retry_at = Some(now.after(s.backoff_ns));
                s.awaits_calm = true;
            }
            // If ever, nothing changes right after the reading, when whoever has waited for that is yet to run. Threads that
            // change mappings all the time would seldom be caught in such a moment by the clock alone.
            if count > 0 && std::mem::take(&mut s.awaits_calm) {
                s.retry_at = None;
            }
        }
        if count > 0 {
            self.crash(CrashPoint::EventsRead);
            self.apply_journal();
            self.unhold();
        }
    }
}

#[cfg(test)]
mod tests {
    use holo_proto::{Addr, AddrRange};

    use super::super::scripted::core_of;
    use super::super::{ANYWHERE, Input, Op};
    use super::*;

    const RANGE: AddrRange = AddrRange {
        start: Addr(0x10000),
        end: Addr(0x20000),
    };

    /// How often it was tried in vain, at a process that changes its mappings for half a second, until that was to be
    /// kept still.
    fn tries(resident_bytes: u64, detach: bool) -> Option<u64> {
        let (mut core, space) = core_of(RANGE);
        core.handle(Nanos(0), Input::Budget { bytes: 1 << 20 });
        let bytes = resident_bytes;
        core.handle(Nanos(0), Input::Measured { space, bytes });
        core.space(space).unwrap().unsettled.changed.add(RANGE);
        if detach {
            core.handle(Nanos(0), Input::Detach(space));
        }
        let mut tried = 0;
        for ms in 0..500 {
            let now = Nanos(ms * 1_000_000);
            let outcome = match core.next(now) {
                Next::Idle(_) => continue,
                Next::Op(Op::NeedQuiesce { for_calm, .. }) => {
                    assert!(for_calm);
                    return Some(tried);
                }
                Next::Op(Op::Unprotect { .. }) => {
                    tried += 1;
                    Outcome::EventsPending
                }
                Next::Op(Op::ReadEvents { .. }) => Outcome::Events { count: 0, gone: 0 },
                Next::Op(_) => Outcome::Done,
            };
            core.complete(now, outcome);
        }
        assert!(tried > 100);
        None
    }

    #[test]
    fn a_process_that_never_pauses_is_kept_still_when_something_waits_for_it() {
        // Not before a tenth of a second; a try takes two or three milliseconds here.
        let in_time = |n: Option<u64>| n.is_some_and(|n| (30..=51).contains(&n));
        assert!(in_time(tries(2 << 20, false)));
        assert!(in_time(tries(1 << 19, true)));
        assert_eq!(tries(1 << 19, false), None);
    }

    #[test]
    fn what_waits_for_calm_is_tried_again_after_any_message() {
        let (mut core, space) = core_of(RANGE);
        core.space(space).unwrap().unsettled.changed.add(RANGE);
        let mut now = Nanos(0);
        let mut turn = |core: &mut Core<'_, _>, pending: bool, count| loop {
            let outcome = match core.next(now) {
                Next::Idle(_) => return false,
                Next::Op(Op::ReadEvents { .. }) => Outcome::Events { count, gone: 0 },
                Next::Op(Op::Unprotect { range, .. }) if range == ANYWHERE => {
                    if !pending {
                        return true;
                    }
                    Outcome::EventsPending
                }
                Next::Op(_) => Outcome::Done,
            };
            now = now.after(1);
            core.complete(now, outcome);
        };
        assert!(!turn(&mut core, true, 0));
        core.handle(Nanos(1), Input::Readable(space));
        assert!(!turn(&mut core, false, 0));
        core.handle(Nanos(1), Input::Readable(space));
        assert!(turn(&mut core, false, 1));
    }
}
