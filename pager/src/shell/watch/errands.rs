//! What the serving thread passes on, because it would take too long there.

use holo_proto::{SpaceId, SubpageMask};

use super::Watch;
use super::taking::parts;
use crate::core::{Input, StopReason};
use crate::shell::guardian::{Ask, SHARERS_MAX};
use crate::shell::live::{Command, Errand, Target};
use crate::shell::refusals::Refusal;
use crate::shell::{family, report};
use crate::sys::{clock, procfs, table};

/// A process that could not be stopped for so many tries in a row (three seconds, with their rests) is told of.
const UNSTOPPED_TOLD: u32 = 9;

impl Watch {
    pub(super) fn carry_out(&mut self, errand: Errand) {
        match errand {
            Errand::Added { space, pid } => self.added(space, pid),
            Errand::Refused { pid, target } => self.refused(pid, &target),
            Errand::NeedRing(space) => self.make_ring(space),
            Errand::NeedQuiesce {
                space,
                count,
                for_calm,
            } => {
                let stopped = match for_calm {
                    true => self.hold_still(space),
                    false => self.quiesce(space),
                };
                // Not now: a count of zero changes nothing but lets the core ask again.
                let count = if stopped { count } else { 0 };
                self.input(Input::Quiesced { space, count });
            }
            Errand::NeedRedirty {
                space,
                mem,
                pagemap,
                page,
                mask,
                ticket,
            } => {
                let done = self.redirty(space, |pid, sharers| Ask::Redirty {
                    pid,
                    mem,
                    pagemap,
                    page,
                    mask,
                    sharers,
                });
                self.input(Input::Redirtied {
                    space,
                    ticket,
                    done,
                });
            }
            Errand::Child {
                parent,
                space,
                uffd,
            } => self.child_of(parent, space, uffd),
            Errand::Waits { space, thread } => {
                if let Some(o) = self.orphan(space) {
                    o.waiting = Some(thread);
                    self.pace.match_at_once();
                }
            }
            Errand::PartsLost(space) => {
                let pid = self.spaces.get(&space).map(|s| s.0);
                if let Some(parts) = pid.and_then(parts) {
                    self.tell(Command::Parts { space, parts });
                }
            }
            Errand::RingGone { space, ring } => self.ring_gone(space, ring),
            Errand::Stop { space, why } => self.stopped(space, why),
            Errand::Closed {
                space,
                detached,
                target,
            } => self.closed(space, detached, target),
            Errand::Drop(parts) => drop(parts),
        }
    }

    /// A process that was taken is served.
    fn added(&mut self, space: SpaceId, pid: i32) {
        let record = self.control.records().find(|r| r.pid == pid);
        let uffd = record.map_or(-1, |r| r.uffd);
        self.spaces.insert(space, (pid, uffd));
        if let Some(m) = self.members.get_mut(&pid) {
            m.space = Some(space);
            m.taking = false;
            let never = m.never.clone();
            for at in never {
                let range = at.page().range();
                self.input(Input::Never { space, range });
            }
        } else {
            // It ended meanwhile.
            self.bereaved(space);
        }
        if self.is_detaching() {
            // Asked for between the stop and now, when no space was there to be told.
            self.input(Input::Detach(space));
        } else {
            self.find_mappings(clock::monotonic_ns());
        }
    }

    /// A process that was taken is one too many.
    fn refused(&mut self, pid: i32, target: &Target) {
        if let Some(m) = self.members.get_mut(&pid) {
            m.taking = false;
        }
        let now = clock::monotonic_ns();
        self.not_taken(pid, now, &Refusal::too_many(pid));
        let number = target.uffd.as_raw_fd();
        table::unclaim(number);
        if let Some(r) = self.control.record(number) {
            // Nothing of it is registered yet.
            let keeper = r.keeper;
            let _ = self.line.ask(Ask::DropKeeper { pid, keeper });
            table::close(r.pidfd);
        }
        self.control.drop_record(number);
    }

    /// Stops every thread that runs on the memory of a space for an instant.
    fn quiesce(&mut self, space: SpaceId) -> bool {
        let Some(&(pid, _)) = self.spaces.get(&space) else {
            return false;
        };
        self.sharers(pid)
            .into_iter()
            .chain([pid])
            .all(|pid| self.line.ask(Ask::Quiesce { pid }).is_ok())
    }

    /// Keeps every thread that runs on the memory of a space from changing it, for some milliseconds.
    fn hold_still(&mut self, space: SpaceId) -> bool {
        let Some(&(pid, _)) = self.spaces.get(&space) else {
            return false;
        };
        let sharers = self.sharers(pid);
        sharers.len() <= SHARERS_MAX && self.line.ask(Ask::HoldStill { pid, sharers }).is_ok()
    }

    /// The other processes that run on the memory of this one.
    fn sharers(&mut self, pid: i32) -> Vec<i32> {
        self.find_children();
        let others = self.members.keys().copied().filter(|&other| other != pid);
        others.filter(|&o| procfs::share_memory(pid, o)).collect()
    }

    /// Makes pages of a space dirty while every thread that runs on its memory is stopped; `None`: they could not be.
    fn redirty(
        &mut self,
        space: SpaceId,
        ask: impl FnOnce(i32, Vec<i32>) -> Ask,
    ) -> Option<SubpageMask> {
        let &(pid, _) = self.spaces.get(&space)?;
        let sharers = self.sharers(pid);
        let answer = if sharers.len() > SHARERS_MAX {
            let count = sharers.len();
            let why = format!("{count} other processes run on its memory");
            Err(Refusal::lasting(why))
        } else {
            self.line.ask(ask(pid, sharers))
        };
        match answer {
            Ok(done) => {
                self.unstopped.remove(&space);
                u16::try_from(done).ok().map(SubpageMask)
            }
            Err(why) => {
                let failed = self.unstopped.entry(space).or_default();
                *failed += 1;
                if *failed == UNSTOPPED_TOLD {
                    self.message(&format!(
                        "process {pid}: holo waits until it can stop it for a moment, and takes nothing of it out of memory \
                         meanwhile: {why}",
                        why = why.why
                    ));
                }
                None
            }
        }
    }

    pub(super) fn stopped(&mut self, space: SpaceId, why: StopReason) {
        let Some(&(pid, _)) = self.spaces.get(&space) else {
            if let Some(o) = self.orphan(space) {
                o.stopped = Some(why);
            }
            return;
        };
        if let Some(m) = self.members.get(&pid) {
            let _ = m.pidfd.send_signal(libc::SIGKILL);
        }
        self.message(&format!("process {pid}: {}", report::explain(why)));
    }

    fn closed(&mut self, space: SpaceId, detached: bool, target: Box<Target>) {
        let uffd = target.uffd.as_raw_fd();
        // Its members, if it had more than one, are watched again.
        self.orphans.retain(|o| o.space != space);
        self.ringless.remove(&space);
        self.unstopped.remove(&space);
        let record = self.control.record(uffd);
        if let Some((pid, _)) = self.spaces.remove(&space) {
            if detached {
                family::let_go(&target.uffd, pid);
                let keeper = record.map_or(-1, |r| r.keeper.max(r.inherited));
                if keeper >= 0 {
                    let _ = self.line.ask(Ask::DropKeeper { pid, keeper });
                }
                self.members.remove(&pid);
            } else if let Some(m) = self.members.get_mut(&pid) {
                // It may have started another program: that one is watched again.
                m.space = None;
            }
        }
        self.control.drop_record(uffd);
        if let Some(r) = record {
            table::close(r.pidfd);
        }
        let ring = record.map_or(-1, |r| r.ring);
        table::unclaim(uffd);
        if ring >= 0 {
            table::unclaim(ring);
        }
        drop(target);
    }
}
