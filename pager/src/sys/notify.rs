//! A bell between threads and processes: eventfd(2).

use std::fs::File;
use std::io::{self, Read as _, Write as _};
use std::os::fd::{AsRawFd, FromRawFd as _, OwnedFd, RawFd};

/// One bell. Ringing it twice before it is heard is ringing it once.
#[derive(Debug)]
pub struct Bell(File);

impl Bell {
    /// A new bell, close-on-exec.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn new() -> io::Result<Self> {
        // SAFETY: makes a descriptor.
        let fd = unsafe { libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: just made, owned by nobody else.
        Ok(Self(File::from(unsafe { OwnedFd::from_raw_fd(fd) })))
    }

    /// Wraps one that another process made.
    #[must_use]
    pub fn from_owned(fd: OwnedFd) -> Self {
        Self(File::from(fd))
    }

    /// Rings it.
    pub fn ring(&self) {
        // Full means rung already.
        let _ = (&self.0).write(&1_u64.to_ne_bytes());
    }

    /// Whether it was rung since the last call.
    pub fn heard(&self) -> bool {
        (&self.0).read(&mut [0; 8]).is_ok()
    }

    /// Its number, to poll.
    #[must_use]
    pub fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}
