//! The first process, and the command line that started the session for it: when there is something to watch, when the
//! first process is done with, and who wakes a command line that stopped together with its command.

use super::Watch;
use crate::shell::control::Scalar;
use crate::sys::{procfs, spawn};

impl Watch {
    /// The first process is watched.
    pub(super) fn has_started(&self) -> bool {
        self.control.get(Scalar::Started) != 0
    }

    /// The command that the parent started, or the process that was named, once it is known.
    pub(super) fn find_root(&mut self) {
        let root = self.control.pid(Scalar::RootPid);
        if root > 0 && !self.has_started() {
            self.control.set(Scalar::Started, 1);
            self.add_member(root);
        }
    }

    /// Says when the first process has ended and everything of it is counted.
    pub(super) fn note_root(&self) {
        let root = self.control.pid(Scalar::RootPid);
        let known = self.has_started();
        let held = self.spaces.values().any(|&(pid, _)| pid == root);
        if known && !held && !self.members.contains_key(&root) {
            self.control.set(Scalar::RootGone, 1);
        }
    }

    /// A command line that stopped with its command has nobody else who tells it that the command alone
    /// was continued, or killed. Not at once: what continues a whole group reaches one after the other, and would be
    /// taken for another signal by a command line that runs already.
    pub(super) fn wake_starter(&mut self, now: u64) {
        let stopped = |pid| procfs::state_of(pid).is_ok_and(|s| matches!(s, b'T' | b't'));
        let starter = self.control.pid(Scalar::StarterPid);
        let is_left = self.control.get(Scalar::StarterStopped) != 0
            && stopped(starter)
            && !stopped(self.control.pid(Scalar::RootPid));
        if self.pace.is_left_for_long(is_left, now) {
            let _ = spawn::signal(starter, libc::SIGCONT);
        }
    }

    /// It may still have to be woken.
    pub(super) fn starter_is_stopped(&self) -> bool {
        self.control.get(Scalar::StarterStopped) != 0 && self.starter_lives()
    }

    /// It has not ended; whether anybody has waited for it or not.
    pub(super) fn starter_lives(&self) -> bool {
        let starter = self.control.pid(Scalar::StarterPid);
        procfs::state_of(starter).is_ok_and(|s| !matches!(s, b'Z' | b'X'))
    }
}
