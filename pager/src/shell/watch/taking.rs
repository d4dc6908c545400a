//! Takes processes: when there is pressure, or because the user named one; goes on where a predecessor died over it,
//! and undoes what cannot be finished.

use super::Watch;
use super::members::Member;
use crate::shell::control::{Record, Scalar};
use crate::shell::family;
use crate::shell::guardian::Ask;
use crate::shell::live::{Command, Parts, Target};
use crate::shell::refusals::Refusal;
use crate::sys::advise::PidFd;
use crate::sys::maps::ProcMaps;
use crate::sys::mem::TargetMem;
use crate::sys::pagemap::Pagemap;
use crate::sys::procfs::{self, PinCount, Statm, Tasks};
use crate::sys::uffd::Uffd;
use crate::sys::{clock, table};

/// A process with less private memory than this is not worth taking.
const TAKE_MIN_BYTES: u64 = 1 << 20;

impl Watch {
    pub(super) fn take(&mut self) {
        let now = clock::monotonic_ns();
        let wanted: Vec<i32> = self
            .members
            .iter()
            .filter(|(_, m)| {
                !m.is_held()
                    && !m.shares
                    && m.attempts.is_due(now)
                    && m.anon_bytes >= TAKE_MIN_BYTES
            })
            .map(|(&pid, _)| pid)
            .collect();
        for pid in wanted {
            // A fork's child that is served already, but not identified, must not be taken again.
            if !self.orphans.is_empty() {
                self.match_orphans();
                if self.members.get(&pid).is_some_and(|m| m.space.is_some()) {
                    continue;
                }
            }
            if self.is_held_by_another(pid) {
                continue;
            }
            let started = clock::monotonic_ns();
            if let Err(mut refusal) = self.take_one(pid) {
                // A child of which was heard only now, or that could not be told from another one.
                refusal.is_passing |= self.may_be_a_child(pid);
                self.not_taken(pid, started, &refusal);
            }
        }
    }

    /// Whether this may be a fork's child that is served already: it runs what a process that is held runs.
    fn may_be_a_child(&self, pid: i32) -> bool {
        let image = procfs::image(pid).ok().filter(|&i| i != 0);
        image.is_some_and(|image| self.control.records().any(|r| r.image == image))
    }

    /// Takes the process that the session was started for; a failure is the session's.
    pub(in crate::shell) fn attach_first(&mut self) {
        let pid = self.control.pid(Scalar::RootPid);
        self.find_root();
        if self.members.get(&pid).is_some_and(Member::is_held) {
            return; // by a predecessor
        }
        if let Err(refusal) = self.take_one(pid) {
            self.refusal = Some(refusal.why);
        }
    }

    /// Goes on with what a predecessor died over: takes and detaches.
    pub(in crate::shell) fn finish_what_was_begun(&mut self) {
        let detaching = self.is_detaching();
        // Watched, but too small to be taken as yet: no record tells of it.
        if self.has_started() && self.control.get(Scalar::RootGone) == 0 && !detaching {
            self.add_member(self.control.pid(Scalar::RootPid));
        }
        let all: Vec<Record> = self.held_for_nobody().collect();
        for r in all {
            let same = procfs::image(r.pid).is_ok_and(|image| image == r.image);
            if same && !detaching {
                self.add_member(r.pid);
                // Given back where it fails; then it is taken again when there is pressure.
                let _ = self.take_one(r.pid);
            } else {
                self.give_back(&r, same);
            }
        }
        if detaching {
            self.detach_all();
        }
    }

    /// Records of processes that were taken for a pager that died before it served them.
    fn held_for_nobody(&self) -> impl Iterator<Item = Record> + '_ {
        self.control.records().filter(|r| {
            let taking = self.members.get(&r.pid).is_some_and(|m| m.taking);
            !taking
                && self.spaces.values().all(|&(_, uffd)| uffd != r.uffd)
                && self.orphans.iter().all(|o| o.uffd != r.uffd)
        })
    }

    fn take_one(&mut self, pid: i32) -> Result<(), Refusal> {
        let there = self.held_for_nobody().find(|r| r.pid == pid);
        let uffd = match there {
            Some(r) => r.uffd,
            None => i32::try_from(self.line.ask(Ask::TakeHold { pid })?).unwrap_or(-1),
        };
        let Some(r) = self.control.record(uffd) else {
            return Err(Refusal::passing(format!(
                "holo's guardian lost the record of process {pid}"
            )));
        };
        self.begin_to_serve(&r).inspect_err(|_| {
            // What was made in the process for it must not stay.
            let same = procfs::image(pid).is_ok_and(|image| image == r.image);
            self.give_back(&r, same);
        })
    }

    /// Hands a process that was taken to the serving thread.
    fn begin_to_serve(&mut self, r: &Record) -> Result<(), Refusal> {
        let pid = r.pid;
        let ended = || Refusal::passing(format!("process {pid} ended while it was taken"));
        let m = self.members.get_mut(&pid).ok_or_else(ended)?;
        // An exec since the member was found: what was opened then belongs to the old address space.
        m.statm = Statm::open(pid).map_err(|_| ended())?;
        m.maps = ProcMaps::open(pid).map_err(|_| ended())?;
        let target = Box::new(target(r).ok_or_else(ended)?);
        m.taking = true;
        m.spare_clear_tid(r);
        m.seen.clear();
        self.control.add(Scalar::Processes, 1);
        self.tell(Command::Add { pid, target });
        Ok(())
    }

    /// Undoes a hold of which no page is away. `same`: the process still has the memory.
    fn give_back(&mut self, r: &Record, same: bool) {
        if let Some(uffd) = table::claim(r.uffd).map(Uffd::from_owned) {
            if same {
                family::let_go(&uffd, r.pid);
                let (pid, keeper) = (r.pid, r.keeper.max(r.inherited));
                let _ = self.line.ask(Ask::DropKeeper { pid, keeper });
            }
            table::unclaim(r.uffd);
            drop(uffd);
        }
        self.control.drop_record(r.uffd);
        table::close(r.pidfd);
        if r.ring >= 0 {
            table::close(r.ring);
        }
    }

    /// An attempt to take a process has failed: it is tried again later.
    pub(super) fn not_taken(&mut self, pid: i32, started: u64, refusal: &Refusal) {
        let Some(m) = self.members.get_mut(&pid) else {
            return;
        };
        m.attempts.are_at(procfs::image(pid).unwrap_or(0));
        let now = clock::monotonic_ns();
        if m.attempts.fail(now, now - started, refusal.is_passing) {
            self.left_alone(&refusal.why);
        }
    }

    /// A process takes what memory it wants: counted, and told if it is the first one with this reason.
    pub(super) fn left_alone(&mut self, why: &str) {
        self.control.add(Scalar::LeftProcesses, 1);
        if self.told.is_new(why) {
            let text = format!(
                "the memory of a process is not limited: {why} (tried again later; others with this cause are counted \
                 in the report)"
            );
            self.message(&text);
        }
    }
}

/// What the serving thread needs of a process that was taken.
fn target(r: &Record) -> Option<Target> {
    let uffd = Uffd::from_owned(table::claim(r.uffd)?);
    Some(Target::new(uffd, parts(r.pid), None))
}

pub(in crate::shell) fn parts(pid: i32) -> Option<Parts> {
    Some(Parts {
        pidfd: PidFd::open(pid).ok()?,
        mem: TargetMem::open(pid).ok()?,
        pagemap: Pagemap::open(pid).ok()?,
        maps: ProcMaps::open(pid).ok()?,
        tasks: Tasks::open(pid).ok()?,
        pins: PinCount::open(pid).ok()?,
    })
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::shell::console::Console;
    use crate::shell::guardian::tests::{control, heard, line_of};
    use crate::shell::live::Queue;
    use crate::sys::testing;

    #[test]
    fn nothing_is_left_of_a_process_that_ends_while_it_is_taken() {
        let control = control();
        let (line, guardian) = line_of(control);
        let (commands, errands) = (Queue::new().unwrap(), Queue::new().unwrap());
        let mut target = testing::Target::start();
        let pid = target.pid;
        let console = Console::open(pid).unwrap();
        let mut watch = Watch::new(
            control,
            Arc::new(commands),
            Arc::new(errands),
            line,
            console,
        );
        watch.add_member(pid);
        // The guardian takes it, and it ends.
        let guardian = std::thread::spawn(move || {
            let (count, ask) = heard(&guardian);
            assert_eq!(ask, format!("hold {pid} 0"));
            let uffd = target.uffd().into_raw_fd();
            let image = procfs::image(pid).unwrap();
            control.put_record(&Record {
                uffd,
                pid,
                pidfd: -1,
                keeper: 9,
                inherited: -1,
                ring: -1,
                params: [0; 15],
                clear_tid: 0,
                image,
            });
            target.end();
            guardian
                .send(format!("{count} ok {uffd}").as_bytes())
                .unwrap();
        });
        let refusal = watch.take_one(pid).unwrap_err();
        guardian.join().unwrap();
        assert!(
            refusal.is_passing && refusal.why.contains("ended"),
            "{refusal:?}"
        );
        assert_eq!(control.records().count(), 0);
        assert!(!watch.members[&pid].taking);
    }
}
