//! Signals as messages: signalfd(2).

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd, RawFd};
use std::os::unix::process::CommandExt as _;
use std::process::Command;

use super::{spawn, usize_of};

/// One signal that came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Came {
    /// Its number.
    pub signal: i32,
    /// The process that sent it (to this one); none if the kernel did, as a terminal does to a whole group.
    pub sender: Option<i32>,
    /// What was sent along (`sigqueue`).
    pub value: Option<u64>,
}

/// Signals that are read instead of acted on.
pub struct Signals {
    fd: OwnedFd,
    /// What was blocked before.
    before: libc::sigset_t,
}

impl Signals {
    /// Blocks these signals for this thread and reads them here.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn take(signals: &[i32]) -> io::Result<Self> {
        let mut set = MaybeUninit::<libc::sigset_t>::zeroed();
        let mut before = MaybeUninit::<libc::sigset_t>::zeroed();
        // SAFETY: initialises the set.
        unsafe { libc::sigemptyset(set.as_mut_ptr()) };
        for &s in signals {
            // SAFETY: an initialised set; a number out of range is refused.
            unsafe { libc::sigaddset(set.as_mut_ptr(), s) };
        }
        // SAFETY: an initialised set, and room for another one.
        let r =
            unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, set.as_ptr(), before.as_mut_ptr()) };
        if r != 0 {
            return Err(io::Error::from_raw_os_error(r));
        }
        // SAFETY: an initialised set.
        let fd =
            unsafe { libc::signalfd(-1, set.as_ptr(), libc::SFD_CLOEXEC | libc::SFD_NONBLOCK) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: just made, owned by nobody else.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        // SAFETY: filled by the kernel, and zeroed before.
        let before = unsafe { before.assume_init() };
        Ok(Self { fd, before })
    }

    /// Lets the command begin with what was blocked before: a blocked signal stays blocked over an exec,
    /// and a program that does not expect that would never see it.
    pub fn restore_in(&self, command: &mut Command) {
        let before = self.before;
        let restore = move || {
            // SAFETY: an initialised set, of which the closure has a copy.
            let r = unsafe {
                libc::pthread_sigmask(libc::SIG_SETMASK, &raw const before, std::ptr::null_mut())
            };
            match r {
                0 => Ok(()),
                error => Err(io::Error::from_raw_os_error(error)),
            }
        };
        // SAFETY: between fork and exec it makes one async-signal-safe call, and allocates nothing.
        unsafe { command.pre_exec(restore) };
    }

    /// The next signal that came, if any.
    pub fn next(&self) -> Option<Came> {
        let mut info = MaybeUninit::<libc::signalfd_siginfo>::zeroed();
        let size = size_of::<libc::signalfd_siginfo>();
        // SAFETY: the structure is valid for a write of its size.
        let n = unsafe { libc::read(self.fd.as_raw_fd(), info.as_mut_ptr().cast(), size) };
        if usize::try_from(n) != Ok(size) {
            return None;
        }
        // SAFETY: filled by the kernel, and zeroed before.
        let info = unsafe { info.assume_init() };
        Some(Came {
            signal: i32::try_from(info.ssi_signo).unwrap_or(0),
            sender: (info.ssi_code <= 0).then(|| i32::try_from(info.ssi_pid).unwrap_or(0)),
            value: (info.ssi_code == libc::SI_QUEUE).then_some(info.ssi_ptr),
        })
    }

    /// Its number, to poll.
    #[must_use]
    pub fn as_raw_fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }
}

/// Sends a process a signal that came here, with what was sent along.
///
/// # Errors
/// What the kernel says.
pub fn pass_on(pid: i32, came: Came) -> io::Result<()> {
    let Some(value) = came.value else {
        return spawn::signal(pid, came.signal);
    };
    let value = libc::sigval {
        sival_ptr: std::ptr::without_provenance_mut(usize_of(value)),
    };
    // SAFETY: a signal; the value is a number that is carried as a pointer, and is not followed here.
    if pid > 0 && unsafe { libc::sigqueue(pid, came.signal, value) } == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Stops this process by a signal that does, so that its parent sees the same as of a child that it stopped;
/// returns when it is continued. The signal may be blocked, and ignored.
pub fn stop_by(signal: i32) {
    let mut set = MaybeUninit::<libc::sigset_t>::zeroed();
    let mut before = MaybeUninit::<libc::sigset_t>::zeroed();
    // SAFETY: initialises the set.
    unsafe { libc::sigemptyset(set.as_mut_ptr()) };
    // SAFETY: an initialised set; a number out of range is refused.
    unsafe { libc::sigaddset(set.as_mut_ptr(), signal) };
    // SAFETY: the default disposition runs no code.
    let disposition = unsafe { libc::signal(signal, libc::SIG_DFL) };
    let _ = spawn::signal(spawn::own_pid(), signal);
    // SAFETY: an initialised set, and room for another one. Here it stops.
    unsafe { libc::pthread_sigmask(libc::SIG_UNBLOCK, set.as_ptr(), before.as_mut_ptr()) };
    // SAFETY: a set that the kernel filled, and zeroed before.
    unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, before.as_ptr(), std::ptr::null_mut()) };
    // SIGSTOP has none that could be changed.
    if disposition != libc::SIG_ERR {
        // SAFETY: what was there before.
        unsafe { libc::signal(signal, disposition) };
    }
}

/// Whether this process leads its session: then a terminal that goes away tells it alone.
#[must_use]
pub fn leads_session() -> bool {
    // SAFETY: returns a number.
    let leader = unsafe { libc::getsid(0) };
    leader == spawn::own_pid()
}

impl std::fmt::Debug for Signals {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Signals").field(&self.fd).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_begins_with_the_mask_of_before() {
        // Only this thread's mask changes.
        let blocked = |restore: bool| {
            let signals = Signals::take(&[libc::SIGUSR1, libc::SIGTSTP]).unwrap();
            let mut command = Command::new("grep");
            command.args(["SigBlk", "/proc/self/status"]);
            if restore {
                signals.restore_in(&mut command);
            }
            String::from_utf8(command.output().unwrap().stdout).unwrap()
        };
        assert!(
            std::thread::scope(|s| s.spawn(|| blocked(true)).join().unwrap())
                .ends_with("\t0000000000000000\n")
        );
        assert!(
            std::thread::scope(|s| s.spawn(|| blocked(false)).join().unwrap())
                .ends_with("\t0000000000080200\n")
        );
    }
}
