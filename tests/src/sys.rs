//! The few system calls that the test tools need and the standard library lacks.
//!
//! The only module of this crate's tools with unsafe code.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Command, ExitStatus};
use std::sync::atomic::{AtomicI32, Ordering};

static STOP_SIGNAL: AtomicI32 = AtomicI32::new(0);

/// Which of the signals of [`catch_stop_signals`] came first, if any did.
pub(crate) fn stop_signal() -> Option<i32> {
    match STOP_SIGNAL.load(Ordering::Relaxed) {
        0 => None,
        signal => Some(signal),
    }
}

extern "C" fn note_stop_signal(signal: libc::c_int) {
    // Only an atomic store: nothing else is safe in a handler.
    let _ = STOP_SIGNAL.compare_exchange(0, signal, Ordering::Relaxed, Ordering::Relaxed);
}

/// Makes SIGINT, SIGTERM and SIGHUP set [`stop_signal`] and do no more, so that a run's processes can be
/// ended before the runner ends.
pub(crate) fn catch_stop_signals() {
    let handler = note_stop_signal as extern "C" fn(libc::c_int) as libc::sighandler_t;
    for signal in [libc::SIGINT, libc::SIGTERM, libc::SIGHUP] {
        // SAFETY: the handler is async-signal-safe (one atomic operation) and lives as long as the program.
        unsafe { libc::signal(signal, handler) };
    }
}

/// Makes orphans among this process's descendants its own children, so that none gets out of sight.
///
/// # Errors
/// The kernel's; none is expected since Linux 3.4.
pub(crate) fn become_subreaper() -> io::Result<()> {
    // SAFETY: passes numbers only.
    match unsafe { libc::prctl(libc::PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Makes `command` start in a session of its own, without a controlling terminal.
pub(crate) fn start_session(command: &mut Command) {
    let hook = || {
        // SAFETY: no arguments; async-signal-safe.
        match unsafe { libc::setsid() } {
            -1 => Err(io::Error::last_os_error()),
            _ => Ok(()),
        }
    };
    // SAFETY: between fork and exec the hook does one async-signal-safe system call and allocates nothing.
    unsafe { command.pre_exec(hook) };
}

/// Collects a dead child, own or adopted, so that it leaves the process table; None where none is dead.
///
/// Takes exit statuses from under [`std::process::Child::wait`]: a caller waits for its children here only.
pub(crate) fn reap_any() -> Option<(i32, ExitStatus)> {
    let mut status = 0;
    // SAFETY: `status` is a live, writable int for the whole call; the rest are numbers.
    let pid = unsafe { libc::waitpid(-1, &raw mut status, libc::WNOHANG) };
    (pid > 0).then(|| (pid, ExitStatus::from_raw(status)))
}

/// A process that cannot be mistaken for a later one with the same number.
#[derive(Debug)]
pub(crate) struct PidFd(OwnedFd);

impl PidFd {
    /// # Errors
    /// ESRCH where there is no such process.
    pub(crate) fn open(pid: i32) -> io::Result<Self> {
        // SAFETY: passes numbers only.
        let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
        match i32::try_from(fd) {
            // SAFETY: just made, owned by nobody else.
            Ok(fd) if fd >= 0 => Ok(Self(unsafe { OwnedFd::from_raw_fd(fd) })),
            _ => Err(io::Error::last_os_error()),
        }
    }

    /// # Errors
    /// ESRCH where the process is gone, EPERM where it may not be signalled.
    pub(crate) fn signal(&self, signal: i32) -> io::Result<()> {
        let none = std::ptr::null::<libc::siginfo_t>();
        // SAFETY: a null siginfo is allowed; the descriptor is open while `self` lives.
        match unsafe {
            libc::syscall(
                libc::SYS_pidfd_send_signal,
                self.0.as_raw_fd(),
                signal,
                none,
                0,
            )
        } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }
}

/// Lets a thread run on these CPUs only.
///
/// # Errors
/// The thread is gone, or there is none of these CPUs.
pub(crate) fn set_cpus(tid: i32, cpus: &[usize]) -> io::Result<()> {
    const WORD_BITS: usize = 64;
    let mut mask = [0_u64; 16];
    for &cpu in cpus {
        if let Some(word) = mask.get_mut(cpu / WORD_BITS) {
            *word |= 1 << (cpu % WORD_BITS);
        }
    }
    // SAFETY: the mask is readable for the size that is given, during the call.
    match unsafe {
        libc::syscall(
            libc::SYS_sched_setaffinity,
            tid,
            size_of_val(&mask),
            mask.as_ptr(),
        )
    } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
