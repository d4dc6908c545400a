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
        // A step may have released faults: they come before sleep.
        if !self.ready.is_empty() {
            return self.next(now);
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
            }
        }
        if count > 0 {
            self.crash(CrashPoint::EventsRead);
            self.apply_journal();
            self.unhold();
        }
    }
}
