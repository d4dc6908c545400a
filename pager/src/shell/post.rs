//! Who starts whom again: pager, guardian and warden, of which any one that is left brings back the others.
//!
//! ```text
//!   pager dies                the guardian starts a successor
//!   guardian dies             the warden starts another guardian
//!   warden dies               the guardian starts another warden
//!   guardian and warden die   the pager starts a guardian, and that one a warden
//! ```
//! All share one table of descriptors, so nothing is lost while one of them lives. Two of them may come to
//! the same conclusion, or die half-way; so whoever is started first puts its process id in the place of
//! the dead one's, and leaves again when another was there before.
//!
//! A pager that takes over closes what its predecessors left in the table. It can tell that from what others
//! have just opened only while nobody opens anything: guardian and warden keep their hands off until it is
//! done ([`Post::leave_table_to_pager`]).

use std::os::fd::AsRawFd as _;

use super::console;
use super::control::{Control, Scalar};
use super::guardian;
use super::killing::give_up;
use super::{Settings, pager_main};
use crate::sys::advise::PidFd;
use crate::sys::spawn::{self, Ended};
use crate::sys::table;

/// How often guardian and warden look after each other though nothing was heard, nanoseconds: for the case
/// that the table was full and one could not be waited for.
const LOOK_AGAIN_NS: u64 = 1_000_000_000;
/// Between two looks at something that takes a moment, nanoseconds.
const MOMENT_NS: u64 = 200_000;
/// Pagers of a session that may end because of a fault of their own: one that comes again ends each of them.
const PANICS_MOST: u64 = 5;
/// Signals that a process gets for what it does itself. (SIGBUS: memory that was promised is not to be had.)
const OWN_FAULTS: [i32; 6] = [
    libc::SIGBUS,
    libc::SIGSEGV,
    libc::SIGABRT,
    libc::SIGILL,
    libc::SIGFPE,
    libc::SIGSYS,
];
/// How often a process that is needed is tried to be started, while there is no room for it.
pub(super) const STARTS: u32 = 100;
/// Between two tries.
pub(super) const START_AGAIN_NS: u64 = 50_000_000;

/// A process that another one waits for, which need not be its parent.
struct Watched {
    pid: i32,
    /// Number of its pidfd; -1 for none.
    fd: i32,
}

/// No room for a process or thread, of the user's, the cgroup's or the machine's: others may end.
pub(super) fn may_pass(e: &std::io::Error) -> bool {
    matches!(e.raw_os_error(), Some(libc::EAGAIN | libc::ENOMEM))
}

impl Watched {
    fn new(pid: i32) -> Self {
        let fd = PidFd::open(pid).map_or(-1, |p| table::leave(p.into_owned()));
        Self { pid, fd }
    }

    /// All of its threads have ended.
    fn has_ended(&self) -> bool {
        table::has_left(self.pid) && (self.fd < 0 || spawn::poll_readable(&[self.fd], Some(0)) != 0)
    }

    fn forget(self) {
        if self.fd >= 0 {
            table::close(self.fd);
        }
    }
}

/// What each of them knows, so that it can start the others.
#[derive(Clone)]
pub(crate) struct Post {
    pub(crate) control: Control,
    pub(crate) settings: Settings,
    /// Number of the pager's end of the line to the guardian.
    pub(crate) line: i32,
}

impl Post {
    /// The first guardian: starts a warden and a pager, and guards them until it is all over. The exit code.
    pub(crate) fn begin(&self) -> i32 {
        let Some(warden) = self.start_warden() else {
            return 1;
        };
        if self.start_pager(0).is_err() {
            return 1;
        }
        self.guard(Some(warden))
    }

    /// Another guardian, after `dead`.
    fn next_guardian(&self, dead: i32, warden: Option<i32>) -> i32 {
        let me = spawn::own_pid();
        if !self.control.replace_pid(Scalar::GuardianPid, dead, me) {
            return 0;
        }
        self.control.inherit_cpu(Scalar::CpuOfGuardian);
        spawn::set_name(c"holo-guardian");
        spawn::lock_memory();
        self.guard(warden)
    }

    fn guard(&self, warden: Option<i32>) -> i32 {
        let control = self.control;
        table::forget_claims();
        self.leave_table_to_pager();
        let Some(line) = guardian::line(control) else {
            return 1;
        };
        let mut warden = Watched::new(warden.or_else(|| self.start_warden()).unwrap_or(-1));
        control.set_fd(Scalar::GuardianWardenFd, warden.fd);
        let mut pager = Watched::new(control.pid(Scalar::PagerPid));
        control.set_fd(Scalar::GuardianWatchFd, pager.fd);
        loop {
            control.note_cpu(Scalar::CpuOfGuardian);
            // A dead guardian may have started one that has just taken its place.
            self.leave_table_to_pager();
            if pager.pid != control.pid(Scalar::PagerPid) {
                let next = Watched::new(control.pid(Scalar::PagerPid));
                control.set_fd(Scalar::GuardianWatchFd, next.fd);
                std::mem::replace(&mut pager, next).forget();
            } else if pager.has_ended() {
                if control.get(Scalar::Done) != 0 {
                    guardian::give_back_the_rest(control);
                    return 0;
                }
                if !self.replace_pager(pager.pid) {
                    return 1;
                }
                continue;
            } else if warden.has_ended() {
                let _ = spawn::wait(warden.pid, false);
                // Without one everything goes on as long as the guardian lives.
                let next = Watched::new(self.start_warden().unwrap_or(-1));
                control.set_fd(Scalar::GuardianWardenFd, next.fd);
                std::mem::replace(&mut warden, next).forget();
            }
            let fds = [pager.fd, warden.fd, line.as_raw_fd()];
            if spawn::poll_readable(&fds, Some(LOOK_AGAIN_NS)) & 4 != 0 {
                guardian::answer(control, &line);
            }
        }
    }

    /// Waits while a pager closes what its predecessors left.
    fn leave_table_to_pager(&self) {
        let control = self.control;
        loop {
            let pager = control.pid(Scalar::PagerPid);
            if control.pid(Scalar::TableCleanedBy) == pager || table::has_left(pager) {
                return;
            }
            control.set_pid(Scalar::TableLeftTo, pager);
            spawn::poll_readable(&[], Some(MOMENT_NS));
        }
    }

    /// In a pager that takes over: waits until nobody but itself opens or closes anything.
    pub(crate) fn take_table(&self) {
        let me = spawn::own_pid();
        while self.control.pid(Scalar::TableLeftTo) != me {
            self.replace_guardian();
            spawn::poll_readable(&[], Some(MOMENT_NS));
        }
    }

    /// Starts a successor of a pager that died. False when none is wanted, or possible.
    fn replace_pager(&self, dead: i32) -> bool {
        let control = self.control;
        // It may be another guardian's child: then nobody knows how it ended.
        if let Ok(Some(Ended::Signal(signal))) = spawn::wait(dead, false) {
            if OWN_FAULTS.contains(&signal) {
                control.add(Scalar::Panics, 1);
                console::message(
                    control,
                    &format!("the pager ended because of a fault of its own: signal {signal}"),
                );
            }
        }
        if control.get(Scalar::Ready) == 0 {
            return false; // it died before there was anything to take over
        }
        if control.get(Scalar::Panics) >= PANICS_MOST {
            give_up(
                control,
                "the pager ended again and again because of a fault of its own; its messages are above",
            );
            control.set(Scalar::Done, 1);
            return false;
        }
        match self.start_pager(dead) {
            Ok(()) => true,
            Err(e) => {
                give_up(
                    control,
                    &format!("the pager died, and no other could be started: {e}"),
                );
                control.set(Scalar::Done, 1);
                false
            }
        }
    }

    /// Starts a pager in the place of `dead` and waits until there is one there.
    fn start_pager(&self, dead: i32) -> std::io::Result<()> {
        while self.control.pid(Scalar::PagerPid) == dead {
            let pid = self.start("pager", || pager_main(self, dead))?;
            self.await_other(Scalar::PagerPid, dead, pid);
        }
        Ok(())
    }

    /// Starts one that is needed: where there is no room for another process it waits for some.
    fn start(&self, name: &str, mut body: impl FnMut() -> i32) -> std::io::Result<i32> {
        let mut tries = 0;
        loop {
            match spawn::spawn_sharing_descriptors(&mut body) {
                Err(e) if may_pass(&e) && tries < STARTS && self.has_begun() => {
                    if tries == 0 {
                        console::message(
                            self.control,
                            &format!(
                                "the {name} died, and no other can be started now: {e}; trying again for 5 s"
                            ),
                        );
                    }
                    tries += 1;
                    spawn::poll_readable(&[], Some(START_AGAIN_NS));
                }
                other => return other,
            }
        }
    }

    /// There is something to take over.
    fn has_begun(&self) -> bool {
        self.control.get(Scalar::Ready) != 0
    }

    /// Waits until a child has taken its place, or has ended.
    fn await_other(&self, place: Scalar, dead: i32, child: i32) {
        while self.control.pid(place) == dead && matches!(spawn::wait(child, false), Ok(None)) {
            spawn::poll_readable(&[], Some(MOMENT_NS));
        }
    }

    /// Starts a warden and waits until it watches: nobody may take its descriptors for a dead pager's.
    fn start_warden(&self) -> Option<i32> {
        self.control.set(Scalar::WardenWatchFd, 0);
        let me = spawn::own_pid();
        let pid = spawn::spawn_sharing_descriptors(|| self.watch_over(me)).ok()?;
        while self.control.get(Scalar::WardenWatchFd) == 0 {
            if !matches!(spawn::wait(pid, false), Ok(None)) {
                return None;
            }
            spawn::poll_readable(&[], Some(MOMENT_NS));
        }
        Some(pid)
    }

    /// The warden's process: when the guardian dies before its time it starts another one.
    fn watch_over(&self, guardian: i32) -> i32 {
        let control = self.control;
        let me = spawn::own_pid();
        spawn::set_name(c"holo-warden");
        spawn::lock_memory();
        control.set_pid(Scalar::WardenPid, me);
        control.inherit_cpu(Scalar::CpuOfWarden);
        let first = Watched::new(guardian);
        control.set_fd(Scalar::WardenWatchFd, first.fd);
        if first.fd < 0 {
            // There was no room for one: that is known as well, and somebody waits for it.
            control.set(Scalar::WardenWatchFd, u64::MAX);
        }
        while !first.has_ended() {
            control.note_cpu(Scalar::CpuOfWarden);
            spawn::poll_readable(&[first.fd], Some(LOOK_AGAIN_NS));
        }
        let mut dead = guardian;
        loop {
            // Before there was anything to take over nobody is to come after the dead: no pager either,
            // should one be about to begin.
            let over = control.get(Scalar::Done) != 0
                || control.get(Scalar::Ready) == 0
                    && (control.replace_pid(Scalar::PagerPid, 0, me)
                        || table::has_left(control.pid(Scalar::PagerPid)));
            if over {
                return 0;
            }
            let next = self.start("guardian", || self.next_guardian(dead, Some(me)));
            let next = match next {
                Ok(next) => next,
                Err(e) => {
                    give_up(
                        control,
                        &format!("its guardian died, and no other could be started: {e}"),
                    );
                    control.set(Scalar::Done, 1);
                    return 1;
                }
            };
            control.note_cpu(Scalar::CpuOfWarden);
            // From here on it needs no descriptor to watch with: it is the parent.
            while let Ok(None | Some(Ended::Stopped(_))) = spawn::wait(next, true) {}
            let now = control.pid(Scalar::GuardianPid);
            if now == next {
                dead = next;
            } else if now != dead {
                return 0; // another one was there first, and has a warden
            }
        }
    }

    /// Whether guardian and warden are both dead: then the pager has to start a guardian.
    pub(crate) fn is_alone(&self) -> bool {
        let guardian = self.control.pid(Scalar::GuardianPid);
        table::has_left(guardian)
            && table::has_left(self.control.pid(Scalar::WardenPid))
            && self.control.pid(Scalar::GuardianPid) == guardian
    }

    /// In the pager: starts a guardian if it is alone. The calling thread must be the only one at work.
    pub(crate) fn replace_guardian(&self) {
        if !self.is_alone() {
            return;
        }
        let dead = self.control.pid(Scalar::GuardianPid);
        let _ = spawn::wait(dead, false);
        // Where none can be started the next look tries again: until then the pager serves on.
        if let Ok(pid) = spawn::spawn_sharing_descriptors(|| self.next_guardian(dead, None)) {
            self.await_other(Scalar::GuardianPid, dead, pid);
        }
    }
}
