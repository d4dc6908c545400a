//! Finds the process of an orphan, among the members and, if it is none of them, among all processes; then the space is
//! served in that one.

use std::collections::BTreeSet;

use super::Watch;
use super::orphans::{Orphan, duplicate};
use super::taking::parts;
use crate::core::Input;
use crate::shell::control::{Record, Scalar};
use crate::shell::family::{self, Match};
use crate::shell::live::{Command, Parts};
use crate::sys::advise::PidFd;
use crate::sys::uffd::Uffd;
use crate::sys::{clock, procfs, table};

impl Watch {
    /// Finds the processes of fork children, and those in which the memory of an ended process lives on.
    pub(super) fn match_orphans(&mut self) {
        if self.orphans.is_empty() {
            return;
        }
        self.find_children();
        let mut left = Vec::new();
        let only = self.orphans.len() == 1;
        for o in std::mem::take(&mut self.orphans) {
            let Some(uffd) = duplicate(o.uffd) else {
                // No room in the table; or it is closed.
                if table::is_open(o.uffd) {
                    left.push(o);
                }
                continue;
            };
            if family::is_gone(&uffd) {
                self.input(Input::Exited(o.space));
                continue;
            }
            if !o.ring_gone {
                left.push(o);
                continue;
            }
            let found = self
                .find_waiting(&uffd, &o)
                .or_else(|| self.find_match(&uffd, &o, only))
                .or_else(|| self.find_elsewhere(&uffd, &o));
            let served = match found {
                Some(pid) if o.bereaved => self.lives_on(&o, pid),
                Some(pid) => self.known(&o, pid),
                None => false,
            };
            if !served {
                left.push(o);
            }
        }
        self.orphans = left;
    }

    /// The process of the thread that waits for a page of it, where that is certain: in memory of which nothing is
    /// present there is nothing to try on.
    fn find_waiting(&mut self, uffd: &Uffd, o: &Orphan) -> Option<i32> {
        let pid = family::waits_in_own_memory(o.waiting?)?;
        if !procfs::image(pid).is_ok_and(|i| self.images(o).contains(&i)) {
            return None;
        }
        self.add_member(pid);
        let may_be = self.members.get(&pid).is_some_and(|m| !m.is_held());
        let fits = || matches!(family::compare(uffd, pid), Match::Same | Match::Unsure);
        (may_be && fits()).then_some(pid)
    }

    /// What may run in the process of a space: an ended process's memory has its image; a fork's child has its parent's,
    /// or, where that is not known, that of a process that is held.
    fn images(&self, o: &Orphan) -> BTreeSet<u64> {
        if o.image != 0 {
            return BTreeSet::from([o.image]);
        }
        self.control
            .records()
            .filter(|r| !o.bereaved || r.uffd == o.uffd)
            .map(|r| r.image)
            .collect()
    }

    /// Searches among the members. `only`: no other space looks for its process.
    fn find_match(&self, uffd: &Uffd, o: &Orphan, only: bool) -> Option<i32> {
        let mut unsure = Vec::new();
        for (&pid, m) in &self.members {
            if m.is_held() {
                continue;
            }
            match family::compare(uffd, pid) {
                Match::Same => return Some(pid),
                Match::Unsure => unsure.push(pid),
                Match::Other | Match::Gone => {}
            }
        }
        // Nothing present to try on: the only one that it can be, it is. Not one that serves its memory itself and runs
        // something else.
        if o.image != 0 {
            unsure.retain(|&pid| procfs::image(pid).is_ok_and(|i| i == o.image));
        }
        match unsure.as_slice() {
            [pid] if only => Some(*pid),
            _ => None,
        }
    }

    /// Searches among all processes: whoever starts one may end at once, which leaves it to init.
    fn find_elsewhere(&mut self, uffd: &Uffd, o: &Orphan) -> Option<i32> {
        let started = clock::monotonic_ns();
        if !self.pace.wide_is_due(started) {
            return None;
        }
        let images = self.images(o);
        let everyone = procfs::everyone().unwrap_or_default();
        let found = everyone.into_iter().find(|&pid| {
            !self.members.contains_key(&pid)
                && procfs::image(pid).is_ok_and(|i| images.contains(&i))
                && matches!(family::compare(uffd, pid), Match::Same)
        });
        if let Some(pid) = found {
            self.add_member(pid);
        }
        let now = clock::monotonic_ns();
        self.pace.wide_took(now, now - started);
        found
    }

    /// A space whose process ended is served on in the process that shares its memory.
    /// False if that one has ended meanwhile.
    fn lives_on(&mut self, o: &Orphan, pid: i32) -> bool {
        let (Some(p), Ok(pidfd)) = (parts(pid), PidFd::open(pid)) else {
            return false;
        };
        let Some(old) = self.control.record(o.uffd) else {
            return self.known(o, pid);
        };
        self.control.put_record(&Record {
            pid,
            pidfd: table::leave(pidfd.into_owned()),
            ring: -1,
            ..old
        });
        table::close(old.pidfd);
        if let Some(m) = self.members.get_mut(&pid) {
            m.shares = false;
        }
        self.serve_in(o, pid, p);
        true
    }

    /// A fork's child is known; false if it has ended meanwhile.
    fn known(&mut self, o: &Orphan, pid: i32) -> bool {
        let (Some(p), Ok(pidfd)) = (parts(pid), PidFd::open(pid)) else {
            return false;
        };
        let record = Record {
            uffd: o.uffd,
            pid,
            pidfd: table::leave(pidfd.into_owned()),
            keeper: -1,
            // What the parent keeps is open in a child as well.
            inherited: o.kept,
            ring: -1,
            params: [0; 15],
            clear_tid: 0,
            image: procfs::image(pid).unwrap_or(0),
        };
        self.control.put_record(&record);
        self.control.add(Scalar::Processes, 1);
        self.serve_in(o, pid, p);
        true
    }

    /// The process of a space is known and recorded: what was asked for before that is done now.
    fn serve_in(&mut self, o: &Orphan, pid: i32, parts: Parts) {
        let space = o.space;
        self.spaces.insert(space, (pid, o.uffd));
        if let Some(m) = self.members.get_mut(&pid) {
            m.space = Some(space);
        }
        self.tell(Command::Parts { space, parts });
        self.introduce(space, pid, false);
        if o.wants_ring {
            self.make_ring(space);
        }
        if let Some(why) = o.stopped {
            self.stopped(space, why);
        }
        if self.is_detaching() {
            self.input(Input::Detach(space));
        }
    }
}
