//! What becomes of a system call that a stop cut short.
//!
//! The kernel leaves such a call with one of its own restart codes in `rax`, never seen by a program, and acts
//! on it when it looks for signals: with none it goes back to the call, with one whose handler runs it makes
//! EINTR of most of them. So the registers are put back as they were, and the kernel decides. Going back to
//! the instruction from outside instead would start a `pause` anew although the signal that it waits for has
//! just run its handler.
//!
//! Some calls say EINTR themselves, after any stop (signal(7) lists them under SIGCONT). A program without
//! signal handlers need not expect that, so their EINTR is turned into the code that means "again, unless a
//! handler runs". A relative timeout of theirs starts anew: the call may last longer, never shorter.

use super::ptrace::{Registers, register, signed};

/// A restart code: again, or EINTR if a handler runs.
const ERESTARTNOHAND: i64 = 514;

/// Missing in the crate for this architecture.
const SYS_IO_PGETEVENTS: i64 = 333;

/// Calls that say EINTR after any stop and have then done nothing at all. The socket calls do so when the
/// socket has a time limit.
const STATES_EINTR: [i64; 22] = [
    libc::SYS_epoll_wait,
    libc::SYS_epoll_pwait,
    libc::SYS_epoll_pwait2,
    libc::SYS_semop,
    libc::SYS_semtimedop,
    libc::SYS_io_getevents,
    SYS_IO_PGETEVENTS,
    libc::SYS_rt_sigtimedwait,
    libc::SYS_io_uring_enter,
    libc::SYS_read,
    libc::SYS_readv,
    libc::SYS_recvfrom,
    libc::SYS_recvmsg,
    libc::SYS_recvmmsg,
    libc::SYS_accept,
    libc::SYS_accept4,
    libc::SYS_connect,
    libc::SYS_write,
    libc::SYS_writev,
    libc::SYS_sendto,
    libc::SYS_sendmsg,
    libc::SYS_sendmmsg,
];

/// Calls that a stop never hurts: the kernel restarts them by itself, with the time that is left.
const UNHURT: [i64; 14] = [
    libc::SYS_futex,
    libc::SYS_futex_waitv,
    libc::SYS_nanosleep,
    libc::SYS_clock_nanosleep,
    libc::SYS_poll,
    libc::SYS_ppoll,
    libc::SYS_select,
    libc::SYS_pselect6,
    libc::SYS_pause,
    libc::SYS_rt_sigsuspend,
    libc::SYS_wait4,
    libc::SYS_waitid,
    libc::SYS_restart_syscall,
    libc::SYS_msgrcv,
];

/// Calls that return what they have done so far when a stop comes, short of what was asked.
const RETURNS_SHORT: [i64; 16] = [
    libc::SYS_write,
    libc::SYS_writev,
    libc::SYS_pwrite64,
    libc::SYS_pwritev,
    libc::SYS_pwritev2,
    libc::SYS_sendto,
    libc::SYS_sendmsg,
    libc::SYS_sendmmsg,
    libc::SYS_sendfile,
    libc::SYS_splice,
    libc::SYS_tee,
    libc::SYS_vmsplice,
    libc::SYS_copy_file_range,
    libc::SYS_getrandom,
    libc::SYS_recvmmsg,
    libc::SYS_io_uring_enter,
];

/// How much a thread that waits in a system call minds being stopped, least first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Disturbance {
    /// Not at all: it waits on, with the time that is left.
    None,
    /// It loses the time of the stop.
    Time,
    /// A timeout starts anew.
    Timeout,
    /// Unknown.
    Unknown,
    /// The call may return short.
    Short,
}

/// What stopping a thread in the call with this number does to it.
pub(super) fn disturbance(call: i64) -> Disturbance {
    if UNHURT.contains(&call) {
        Disturbance::None
    } else if RETURNS_SHORT.contains(&call) {
        Disturbance::Short
    } else if STATES_EINTR.contains(&call) {
        Disturbance::Timeout
    } else {
        Disturbance::Unknown
    }
}

/// Makes a call that says EINTR because of our stop one that the kernel takes up again. Returns whether it
/// was one.
pub(super) fn make_restartable(regs: &mut Registers) -> bool {
    let says_eintr = signed(regs.rax) == -i64::from(libc::EINTR)
        && STATES_EINTR.contains(&signed(regs.orig_rax));
    if says_eintr {
        regs.rax = register(-ERESTARTNOHAND);
    }
    says_eintr
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stopped_in(call: i64, result: i64) -> Registers {
        // SAFETY: registers may hold any bits.
        let mut regs: Registers = unsafe { std::mem::zeroed() };
        regs.orig_rax = register(call);
        regs.rax = register(result);
        regs
    }

    #[test]
    fn only_calls_that_have_done_nothing_are_made_restartable() {
        let eintr = -i64::from(libc::EINTR);
        for (call, result, changed) in [
            (libc::SYS_epoll_wait, eintr, true),
            (libc::SYS_epoll_wait, 0, false),
            (libc::SYS_epoll_wait, -i64::from(libc::EBADF), false),
            // Whether the descriptor is closed is not known: never again.
            (libc::SYS_close, eintr, false),
            (libc::SYS_nanosleep, eintr, false),
            (-1, eintr, false),
        ] {
            let mut regs = stopped_in(call, result);
            assert_eq!(make_restartable(&mut regs), changed, "{call} {result}");
            let expected = if changed { -ERESTARTNOHAND } else { result };
            assert_eq!(signed(regs.rax), expected);
        }
    }

    #[test]
    fn a_thread_that_waits_minds_less_than_one_that_writes() {
        assert!(disturbance(libc::SYS_futex) < Disturbance::Time);
        assert!(Disturbance::Time < disturbance(libc::SYS_epoll_wait));
        assert!(disturbance(libc::SYS_epoll_wait) < disturbance(libc::SYS_close));
        assert!(disturbance(libc::SYS_close) < disturbance(libc::SYS_write));
    }
}
