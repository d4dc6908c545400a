//! The end of what nobody can serve any more: it is killed, with the reason.
//!
//! Without its pager a process waits for ever at the next page that left, and reads zeros there once the
//! last descriptor of its userfaultfd is closed. So it must not go on.

use std::collections::BTreeSet;

use super::control::Control;
use super::{console, family};
use crate::sys::advise::PidFd;
use crate::sys::procfs;

/// Kills every process that is held; says which.
///
/// Those are the recorded ones, and of their children those that a fork made and that are not recorded
/// yet. A recorded number that another program has by now is left alone.
pub(crate) fn kill_held(control: Control) -> Vec<i32> {
    let records: Vec<_> = control.records().collect();
    let mut pids: BTreeSet<i32> = records.iter().map(|r| r.pid).collect();
    pids.extend(family::descendants(pids.clone().into_iter()));
    // All are opened first: children of a process that is killed are found no more.
    let held: Vec<(i32, PidFd)> = pids
        .into_iter()
        .filter_map(|pid| Some((pid, PidFd::open(pid).ok()?)))
        .filter(|&(pid, _)| {
            procfs::image(pid).is_ok_and(|image| records.iter().any(|r| r.image == image))
        })
        .collect();
    held.into_iter()
        .filter(|(_, pidfd)| pidfd.send_signal(libc::SIGKILL).is_ok())
        .map(|(pid, _)| pid)
        .collect()
}

/// As [`kill_held`], in a process of the session; the reason goes to the user.
pub(crate) fn give_up(control: Control, why: &str) {
    for pid in kill_held(control) {
        console::message(control, &format!("process {pid} was killed: {why}"));
    }
}
