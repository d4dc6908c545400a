//! The processes of the tree, taken or not: which ones there are, which of them have ended or started another program,
//! and which run on another one's memory.

use std::collections::BTreeSet;
use std::io;

use holo_proto::{Addr, LeftAlone, SpaceId};

use super::Watch;
use super::orphans::memory_is_gone;
use crate::core::Input;
use crate::shell::control::{Record, Scalar};
use crate::shell::family;
use crate::shell::limits::Limits;
use crate::shell::refusals::Attempts;
use crate::sys::advise::PidFd;
use crate::sys::maps::ProcMaps;
use crate::sys::procfs::{self, Statm};

/// A process of the tree, taken or not.
pub(super) struct Member {
    pub(super) statm: Statm,
    pub(super) pidfd: PidFd,
    pub(super) space: Option<SpaceId>,
    pub(super) taking: bool,
    /// Its memory is another member's as well, and is counted there.
    pub(super) shares: bool,
    pub(super) attempts: Attempts,
    pub(super) anon_bytes: u64,
    /// Since when it goes on without its first thread, so that nothing of it can be measured; and whether that was told.
    pub(super) headless_since: Option<u64>,
    pub(super) headless: bool,
    pub(super) left_bytes: u64,
    /// Never taken, by the last survey.
    pub(super) left: LeftAlone,
    /// Shared with fork relatives, as last counted.
    pub(super) shared_bytes: u64,
    pub(super) next_count_ns: u64,
    /// After the end of a process that may have shared some of it.
    pub(super) recount_ns: u64,
    /// Mappings as last seen, to find new ones.
    pub(super) seen: BTreeSet<(u64, u64)>,
    pub(super) maps: ProcMaps,
    pub(super) never: Vec<Addr>,
    /// When it was surveyed last, and what that cost, nanoseconds.
    pub(super) surveyed: Option<(u64, u64)>,
}

impl Member {
    fn open(pid: i32) -> io::Result<Self> {
        let pidfd = PidFd::open(pid)?;
        // Nobody has waited for it yet, and its end has been seen: it would wake the control thread for ever.
        if pidfd.has_exited() {
            return Err(io::ErrorKind::NotFound.into());
        }
        Ok(Self {
            statm: Statm::open(pid)?,
            pidfd,
            space: None,
            taking: false,
            shares: false,
            attempts: Attempts::default(),
            anon_bytes: 0,
            headless_since: None,
            headless: false,
            left_bytes: 0,
            left: LeftAlone::default(),
            shared_bytes: 0,
            next_count_ns: 0,
            recount_ns: 0,
            seen: BTreeSet::new(),
            maps: ProcMaps::open(pid)?,
            never: Vec::new(),
            surveyed: None,
        })
    }

    /// Taken, or about to be.
    pub(super) fn is_held(&self) -> bool {
        self.space.is_some() || self.taking
    }

    /// What the kernel writes at the end of a thread is never taken.
    pub(super) fn spare_clear_tid(&mut self, r: &Record) {
        self.never
            .extend((r.clear_tid != 0).then_some(Addr(r.clear_tid)));
    }
}

impl Watch {
    pub(super) fn add_member(&mut self, pid: i32) {
        if self.members.contains_key(&pid) || self.is_ours(pid) {
            return;
        }
        if let Ok(m) = Member::open(pid) {
            if self.limits.is_none() {
                self.limits = Limits::of(pid);
            }
            self.members.insert(pid, m);
        }
    }

    /// Whether this is one of holo's own processes, which may descend from the one that was attached: a pager that
    /// waits for its own pages waits for ever.
    pub(super) fn is_ours(&self, pid: i32) -> bool {
        [
            Scalar::PagerPid,
            Scalar::GuardianPid,
            Scalar::WardenPid,
            Scalar::StarterPid,
        ]
        .iter()
        .any(|&s| self.control.pid(s) == pid)
    }

    /// Forgets members that ended.
    pub(super) fn bury(&mut self) {
        let dead: Vec<i32> = self
            .members
            .iter()
            .filter(|(_, m)| m.pidfd.has_exited())
            .map(|(&pid, _)| pid)
            .collect();
        if !dead.is_empty() {
            self.recount();
        }
        for pid in dead {
            if let Some(m) = self.members.remove(&pid) {
                // Children that are not found yet would be lost with their parent.
                self.pace.tree_at_once();
                if let Some(space) = m.space {
                    self.bereaved(space);
                }
            }
        }
    }

    /// A memory has ended, of which others may have shared some.
    fn recount(&mut self) {
        for m in self.members.values_mut() {
            m.next_count_ns = m.next_count_ns.min(m.recount_ns);
        }
    }

    pub(super) fn find_children(&mut self) {
        let mut roots: Vec<i32> = self.members.keys().copied().collect();
        // A member that ended left its children to whoever started it all.
        let parent = self.control.pid(Scalar::GuardianPid);
        roots.retain(|&p| p != parent);
        for pid in family::descendants(roots.into_iter()) {
            self.add_member(pid);
        }
        self.note_shared();
    }

    /// Finds members that run on another member's memory (`CLONE_VM`, vfork).
    fn note_shared(&mut self) {
        let held: Vec<i32> = self
            .members
            .iter()
            .filter(|(_, m)| m.is_held())
            .map(|(&pid, _)| pid)
            .collect();
        for (&pid, m) in &mut self.members {
            m.shares = !m.is_held() && held.iter().any(|&h| procfs::share_memory(h, pid));
        }
    }

    /// Whether `pid` runs on the memory of a process that is held already.
    pub(super) fn is_held_by_another(&self, pid: i32) -> bool {
        self.members
            .iter()
            .any(|(&other, m)| other != pid && m.is_held() && procfs::share_memory(other, pid))
    }

    /// The process runs another program than it did when its memory was taken.
    pub(super) fn runs_another(&self, pid: i32, uffd: i32) -> bool {
        let held = self.control.record(uffd).map_or(0, |r| r.image);
        let now = procfs::image(pid).unwrap_or(0);
        held != 0 && now != 0 && held != now
    }

    /// Notices processes that started another program: their address space ended, or lives on in another
    /// process.
    pub(super) fn find_ended(&mut self) {
        let mut bereaved = Vec::new();
        for (&space, &(pid, uffd)) in &self.spaces {
            if memory_is_gone(uffd) {
                self.input(Input::Exited(space));
                continue;
            }
            if self.runs_another(pid, uffd) {
                bereaved.push((space, pid));
            }
        }
        // What was refused starts another program as well, which may be taken at once.
        for (&pid, m) in &mut self.members {
            if m.attempts.have_failed() {
                m.attempts.are_at(procfs::image(pid).unwrap_or(0));
            }
        }
        if !bereaved.is_empty() {
            self.recount();
        }
        for (space, pid) in bereaved {
            if let Some(m) = self.members.get_mut(&pid) {
                m.space = None;
            }
            self.bereaved(space);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::process::Command;
    use std::sync::Arc;

    use super::*;
    use crate::shell::console::Console;
    use crate::shell::guardian::tests::{control, line_of};
    use crate::shell::live::Queue;
    use crate::sys::spawn;

    #[test]
    fn a_child_that_has_ended_and_was_not_waited_for_is_no_member() {
        let control = control();
        let (line, _guardian) = line_of(control);
        let (commands, errands) = (Queue::new().unwrap(), Queue::new().unwrap());
        let mut child = Command::new("cat")
            .stdin(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        let pid = i32::try_from(child.id()).unwrap();
        let console = Console::open(pid).unwrap();
        let mut watch = Watch::new(
            control,
            Arc::new(commands),
            Arc::new(errands),
            line,
            console,
        );
        watch.add_member(pid);
        assert!(watch.members.contains_key(&pid));
        drop(child.stdin.take());
        let end = PidFd::open(pid).unwrap();
        spawn::poll_readable(&[end.as_raw_fd()], None);
        watch.bury();
        assert!(!watch.members.contains_key(&pid));
        // The next search for children finds it again.
        watch.add_member(pid);
        assert!(!watch.members.contains_key(&pid));
        child.wait().unwrap();
    }
}
