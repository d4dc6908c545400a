//! Precedence over busy programs for the moment of a stop.
//!
//! A stop is a dozen hand-overs between two threads. On a machine whose CPUs are all busy each of them would
//! wait for a time slice of somebody else, milliseconds at a time.

use super::errno;

/// The lowest real-time priority: before every ordinary thread, behind every real-time one.
const PRIORITY: libc::c_int = 1;

/// A stopped thread of another process that has precedence until this is dropped. It must be dropped before
/// the thread is let go: no instruction of the program may run with it.
#[derive(Debug)]
pub(super) struct Boost {
    tid: i32,
    policy: libc::c_int,
}

impl Boost {
    /// Gives precedence to a stopped thread, if it is an ordinary one and the rights are there.
    pub(super) fn stopped_thread(tid: i32) -> Option<Self> {
        // SAFETY: touches no memory of ours.
        let policy = unsafe { libc::sched_getscheduler(tid) };
        let ordinary = [libc::SCHED_OTHER, libc::SCHED_BATCH, libc::SCHED_IDLE];
        let inherited = policy & libc::SCHED_RESET_ON_FORK;
        if policy < 0 || !ordinary.contains(&(policy & !libc::SCHED_RESET_ON_FORK)) {
            return None;
        }
        set(tid, libc::SCHED_FIFO | inherited, PRIORITY).then_some(Self { tid, policy })
    }
}

impl Drop for Boost {
    fn drop(&mut self) {
        // The older call on purpose: it leaves nice value and slice as they are. It cannot be refused to
        // somebody who could raise the priority; a thread that was killed does not mind.
        if !set(self.tid, self.policy, 0) {
            debug_assert_eq!(errno(), libc::ESRCH);
        }
    }
}

/// Gives precedence to the calling thread for the rest of its life, if the rights are there, and short
/// sleeps in any case.
pub(super) fn this_thread() {
    if !set(0, libc::SCHED_FIFO | libc::SCHED_RESET_ON_FORK, PRIORITY) {
        // At least sleeps as short as they are asked for: real-time threads have such.
        // SAFETY: touches no memory of ours.
        unsafe { libc::prctl(libc::PR_SET_TIMERSLACK, 1) };
    }
}

fn set(tid: i32, policy: libc::c_int, sched_priority: libc::c_int) -> bool {
    let parameters = libc::sched_param { sched_priority };
    // SAFETY: the parameters are valid for reads during the call.
    unsafe { libc::sched_setscheduler(tid, policy, &raw const parameters) == 0 }
}
