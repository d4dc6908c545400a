//! Another process as a pidfd: advice about its memory, its descriptors, signals, its end.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use holo_proto::AddrRange;

use super::errno;
use super::errors::AdviseError;

/// Ranges in one `process_madvise`.
pub const RANGES_PER_CALL: usize = 64;

const MADV_PAGEOUT: libc::c_int = 21;

/// Asks the kernel to reclaim the pages of `ranges` that nobody wrote since MADV_FREE and nobody pins;
/// returns the bytes walked, which says nothing about what went: look at the pagemap.
///
/// A page on a per-CPU list of another CPU stays: the last 31 or so that a FREE marked on its worker's CPU.
/// Each call first empties the lists of the CPU that it runs on.
///
/// Goes in calls of [`RANGES_PER_CALL`]; stops at the first one that walks less than it was given.
///
/// # Errors
/// When the first call walked nothing whole. Needs ptrace access and CAP_SYS_NICE.
pub fn pageout(target: &PidFd, ranges: &[AddrRange]) -> Result<u64, AdviseError> {
    let mut walked = 0;
    for part in ranges.chunks(RANGES_PER_CALL) {
        let mut vectors = [const {
            libc::iovec {
                iov_base: std::ptr::null_mut(),
                iov_len: 0,
            }
        }; RANGES_PER_CALL];
        for (vector, range) in vectors.iter_mut().zip(part) {
            vector.iov_base = std::ptr::without_provenance_mut(super::usize_of(range.start.0));
            vector.iov_len = super::usize_of(range.len());
        }
        let wanted: u64 = part.iter().map(|range| range.len()).sum();
        // SAFETY: the kernel reads `part.len()` vectors, which the array holds; they describe another
        // process's memory, and this advice drops nothing that anybody could miss.
        let r = unsafe {
            libc::syscall(
                libc::SYS_process_madvise,
                target.0.as_raw_fd(),
                vectors.as_ptr(),
                part.len(),
                MADV_PAGEOUT,
                0,
            )
        };
        match u64::try_from(r) {
            Ok(done) => {
                walked += done;
                if done < wanted {
                    break;
                }
            }
            Err(_) if walked > 0 => break,
            Err(_) => return Err(AdviseError::of(errno(), "process_madvise(PAGEOUT)")),
        }
    }
    Ok(walked)
}

/// A process by descriptor: the number may be reused, this may not.
#[derive(Debug)]
pub struct PidFd(OwnedFd);

impl PidFd {
    /// The process with this id (a thread group's leader).
    ///
    /// # Errors
    /// ESRCH without one, EINVAL for another thread's id.
    pub fn open(pid: i32) -> io::Result<Self> {
        // SAFETY: touches no memory of ours.
        let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
        owned(fd).map(Self)
    }

    /// Its number, to poll: readable when the process has ended.
    #[must_use]
    pub fn as_raw_fd(&self) -> RawFd {
        std::os::fd::AsRawFd::as_raw_fd(&self.0)
    }

    /// Gives the descriptor out.
    #[must_use]
    pub fn into_owned(self) -> OwnedFd {
        self.0
    }

    /// Takes over a pidfd.
    #[must_use]
    pub fn from_owned(fd: OwnedFd) -> Self {
        Self(fd)
    }

    /// A descriptor of ours for the same open file as the process's descriptor `number`, close-on-exec.
    ///
    /// # Errors
    /// EBADF when it has none, EPERM without ptrace access, ESRCH when it is gone.
    pub fn get_fd(&self, number: RawFd) -> io::Result<OwnedFd> {
        // SAFETY: touches no memory of ours.
        let fd = unsafe { libc::syscall(libc::SYS_pidfd_getfd, self.0.as_raw_fd(), number, 0) };
        owned(fd)
    }

    /// Sends a signal to the process.
    ///
    /// # Errors
    /// ESRCH when it is gone, EPERM without the right.
    pub fn send_signal(&self, signal: i32) -> io::Result<()> {
        // SAFETY: a null siginfo is allowed; touches no memory of ours.
        let r = unsafe {
            libc::syscall(
                libc::SYS_pidfd_send_signal,
                self.0.as_raw_fd(),
                signal,
                std::ptr::null::<libc::siginfo_t>(),
                0,
            )
        };
        if r == 0 {
            Ok(())
        } else {
            Err(io::Error::last_os_error())
        }
    }

    /// Whether every thread of it has ended; reaped or not. Its memory may live on in a process that
    /// shares it (`CLONE_VM`).
    #[must_use]
    pub fn has_exited(&self) -> bool {
        let mut poll = libc::pollfd {
            fd: self.0.as_raw_fd(),
            events: libc::POLLIN,
            revents: 0,
        };
        loop {
            // SAFETY: one valid entry, and no waiting.
            match unsafe { libc::poll(&raw mut poll, 1, 0) } {
                -1 if errno() == libc::EINTR => {}
                n => return n > 0,
            }
        }
    }
}

impl AsFd for PidFd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

fn owned(fd: libc::c_long) -> io::Result<OwnedFd> {
    let fd = RawFd::try_from(fd).map_err(|_| io::ErrorKind::InvalidData)?;
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel just made this descriptor for us; nobody else knows its number.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

#[cfg(test)]
mod tests;
