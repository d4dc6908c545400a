//! Processes that share this one's descriptor table, and the small things that guardian and pager do to
//! themselves.

use std::io;
use std::os::fd::{OwnedFd, RawFd};

use super::errno;

const PR_GET_TID_ADDRESS: libc::c_int = 40;

/// Starts `body` in a new process that shares this one's descriptors (as `fork`, with `CLONE_FILES`);
/// `body`'s value is its exit code. Returns the new process's id.
///
/// The caller must be the only thread that allocates: the child has only this thread, and whatever
/// another one had locked stays locked there.
///
/// # Errors
/// What `clone` says.
pub fn spawn_sharing_descriptors(body: impl FnOnce() -> i32) -> io::Result<i32> {
    let mut tid_at: u64 = 0;
    // SAFETY: writes one word to `tid_at`.
    if unsafe { libc::prctl(PR_GET_TID_ADDRESS, &raw mut tid_at) } != 0 {
        return Err(io::Error::last_os_error());
    }
    let flags =
        libc::CLONE_FILES | libc::CLONE_CHILD_SETTID | libc::CLONE_CHILD_CLEARTID | libc::SIGCHLD;
    // SAFETY: as fork(2) does it: no new stack, own copy of the address space; the C library's record of
    // the thread id is set in the child at the place where the library keeps it.
    let pid = unsafe { libc::syscall(libc::SYS_clone, flags, 0, 0, tid_at, 0) };
    match i32::try_from(pid) {
        Ok(0) => {
            let code = std::panic::catch_unwind(std::panic::AssertUnwindSafe(body)).unwrap_or(70);
            exit_now(code)
        }
        Ok(pid) if pid > 0 => Ok(pid),
        _ => Err(io::Error::last_os_error()),
    }
}

/// An ordinary fork: `body` runs in the child.
///
/// # Errors
/// What `fork` says.
pub fn spawn(body: impl FnOnce() -> i32) -> io::Result<i32> {
    // SAFETY: the child runs on with a copy of this thread; callers have no other thread then.
    match unsafe { libc::fork() } {
        -1 => Err(io::Error::last_os_error()),
        0 => {
            let code = std::panic::catch_unwind(std::panic::AssertUnwindSafe(body)).unwrap_or(70);
            exit_now(code)
        }
        pid => Ok(pid),
    }
}

/// Ends this process at once, without running destructors.
pub fn exit_now(code: i32) -> ! {
    // SAFETY: ends the process.
    unsafe { libc::_exit(code) }
}

/// Kills this process as `kill -9` would.
pub fn die() -> ! {
    // SAFETY: a signal to this process.
    unsafe { libc::kill(own_pid(), libc::SIGKILL) };
    loop {
        std::thread::park();
    }
}

/// Sends a signal to a child or target by id.
///
/// # Errors
/// What `kill` says.
pub fn signal(pid: i32, signal: i32) -> io::Result<()> {
    // SAFETY: a signal; `pid` is positive, so it names one process.
    if pid > 0 && unsafe { libc::kill(pid, signal) } == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// How a child ended or stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// Exited with this code.
    Code(i32),
    /// Killed by this signal.
    Signal(i32),
    /// Stopped by this signal; it lives.
    Stopped(i32),
}

/// Waits for one child. With `block` false, `None` if it has nothing to tell.
///
/// # Errors
/// ECHILD and such.
pub fn wait(pid: i32, block: bool) -> io::Result<Option<Ended>> {
    let mut status = 0;
    let options = libc::WUNTRACED | if block { 0 } else { libc::WNOHANG };
    loop {
        // SAFETY: `status` is valid for the write.
        let r = unsafe { libc::waitpid(pid, &raw mut status, options) };
        if r < 0 && errno() == libc::EINTR {
            if block {
                return Ok(None);
            }
            continue;
        }
        if r < 0 {
            return Err(io::Error::last_os_error());
        }
        if r == 0 {
            return Ok(None);
        }
        return Ok(Some(if libc::WIFEXITED(status) {
            Ended::Code(libc::WEXITSTATUS(status))
        } else if libc::WIFSTOPPED(status) {
            Ended::Stopped(libc::WSTOPSIG(status))
        } else {
            Ended::Signal(libc::WTERMSIG(status))
        }));
    }
}

/// Becomes the leader of a session of its own, so that no terminal signal reaches it.
pub fn leave_session() {
    // SAFETY: fails harmlessly for a group leader.
    unsafe { libc::setsid() };
}

/// Ignores the signals that stop or end by terminal or broken pipe.
pub fn ignore_terminal_signals() {
    for s in [
        libc::SIGINT,
        libc::SIGQUIT,
        libc::SIGHUP,
        libc::SIGTSTP,
        libc::SIGPIPE,
        libc::SIGTTOU,
    ] {
        // SAFETY: the disposition "ignore" runs no code.
        unsafe { libc::signal(s, libc::SIG_IGN) };
    }
}

/// Locks what this process touches into RAM, as it touches it. Best effort: false without the right.
pub fn lock_memory() -> bool {
    let flags = libc::MCL_CURRENT | libc::MCL_FUTURE | libc::MCL_ONFAULT;
    // SAFETY: changes how this process's memory is kept, not what it holds.
    unsafe { libc::mlockall(flags) == 0 }
}

/// Names this process in `ps`.
pub fn set_name(name: &std::ffi::CStr) {
    // SAFETY: a NUL-terminated string, copied.
    unsafe { libc::prctl(libc::PR_SET_NAME, name.as_ptr()) };
}

/// Lets this process, and those that it makes, open `most` descriptors, or as many as its hard limit allows where
/// that may not be raised.
pub fn raise_descriptor_limit(most: u64) {
    let mut limit = libc::rlimit {
        rlim_cur: 0,
        rlim_max: 0,
    };
    // SAFETY: the struct is valid for the write.
    if unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit) } != 0 {
        return;
    }
    let (cur, max) = (limit.rlim_cur, limit.rlim_max);
    for (soft, hard) in [
        (most.max(cur), most.max(max)),
        (most.min(max).max(cur), max),
    ] {
        let wanted = libc::rlimit {
            rlim_cur: soft,
            rlim_max: hard,
        };
        // SAFETY: the struct is valid for the read.
        if unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &raw const wanted) } == 0 {
            return;
        }
    }
}

/// Waits until one of `fds` can be read, at most `timeout_ns` (`None`: without limit). Returns which can,
/// as bits in order; the first 64 count.
pub fn poll_readable(fds: &[RawFd], timeout_ns: Option<u64>) -> u64 {
    const MOST: usize = 64;
    let mut list = [libc::pollfd {
        fd: -1,
        events: libc::POLLIN,
        revents: 0,
    }; MOST];
    let count = fds.len().min(MOST);
    for (p, &fd) in list.iter_mut().zip(fds) {
        p.fd = fd;
    }
    let timeout = timeout_ns.map(|ns| libc::timespec {
        tv_sec: i64::try_from(ns / 1_000_000_000).unwrap_or(i64::MAX),
        tv_nsec: i64::try_from(ns % 1_000_000_000).unwrap_or(0),
    });
    let at = timeout
        .as_ref()
        .map_or(std::ptr::null(), std::ptr::from_ref);
    // SAFETY: `count` entries of `list` are valid for reads and writes, the timeout for reads.
    let r = unsafe {
        libc::ppoll(
            list.as_mut_ptr(),
            count as libc::nfds_t,
            at,
            std::ptr::null(),
        )
    };
    if r <= 0 {
        return 0;
    }
    list[..count]
        .iter()
        .enumerate()
        .filter(|(_, p)| p.revents != 0)
        .fold(0, |bits, (i, _)| bits | 1 << i)
}

/// Any number of descriptors to wait for; the memory is used again.
#[derive(Default)]
pub struct PollSet(Vec<libc::pollfd>);

impl PollSet {
    /// None; room for `count`.
    #[must_use]
    pub fn with_capacity(count: usize) -> Self {
        Self(Vec::with_capacity(count))
    }

    /// Forgets all.
    pub fn clear(&mut self) {
        self.0.clear();
    }

    /// One more.
    pub fn push(&mut self, fd: RawFd) {
        self.0.push(libc::pollfd {
            fd,
            events: libc::POLLIN,
            revents: 0,
        });
    }

    /// Waits until one of them can be read, at most `timeout_ns`.
    pub fn wait(&mut self, timeout_ns: u64) {
        let timeout = libc::timespec {
            tv_sec: i64::try_from(timeout_ns / 1_000_000_000).unwrap_or(i64::MAX),
            tv_nsec: i64::try_from(timeout_ns % 1_000_000_000).unwrap_or(0),
        };
        // SAFETY: the entries are valid for reads and writes, the timeout for reads.
        let r = unsafe {
            libc::ppoll(
                self.0.as_mut_ptr(),
                self.0.len() as libc::nfds_t,
                &raw const timeout,
                std::ptr::null(),
            )
        };
        if r <= 0 {
            self.0.iter_mut().for_each(|p| p.revents = 0);
        }
    }

    /// Whether the `i`th can be read, as [`PollSet::wait`] found.
    #[must_use]
    pub fn is_ready(&self, i: usize) -> bool {
        self.0.get(i).is_some_and(|p| p.revents != 0)
    }
}

/// Whether a write to `fd` would not block now.
#[must_use]
pub fn poll_writable(fd: RawFd) -> bool {
    let mut p = libc::pollfd {
        fd,
        events: libc::POLLOUT,
        revents: 0,
    };
    // SAFETY: one entry, valid for reads and writes.
    unsafe { libc::poll(&raw mut p, 1, 0) == 1 && p.revents & libc::POLLOUT != 0 }
}

/// Writes once, whatever it takes.
pub fn write_at_once(fd: RawFd, bytes: &[u8]) {
    // SAFETY: the bytes are valid for reads; the descriptor stays whose it is.
    unsafe { libc::write(fd, bytes.as_ptr().cast(), bytes.len()) };
}

/// Writes all of it, however long that takes.
///
/// # Errors
/// What the kernel says; a part may have been written.
pub fn write_all(fd: RawFd, bytes: &[u8]) -> io::Result<()> {
    let mut left = bytes;
    while !left.is_empty() {
        // SAFETY: the bytes are valid for reads; the descriptor stays whose it is.
        let n = unsafe { libc::write(fd, left.as_ptr().cast(), left.len()) };
        match usize::try_from(n) {
            Ok(n) => left = &left[n..],
            Err(_) if errno() == libc::EINTR => {}
            Err(_) => return Err(io::Error::last_os_error()),
        }
    }
    Ok(())
}

/// This process's id.
#[must_use]
pub fn own_pid() -> i32 {
    // SAFETY: returns a number.
    unsafe { libc::getpid() }
}

/// A pipe, close-on-exec: reading end, writing end.
///
/// # Errors
/// What the kernel says.
pub fn pipe() -> io::Result<(OwnedFd, OwnedFd)> {
    let (reader, writer) = io::pipe()?;
    Ok((reader.into(), writer.into()))
}

/// Everything that comes out of a pipe until its other end is closed.
#[must_use]
pub fn read_to_end(from: OwnedFd) -> Vec<u8> {
    let mut bytes = Vec::new();
    // What came before an error is what there is.
    let _ = io::Read::read_to_end(&mut std::fs::File::from(from), &mut bytes);
    bytes
}
