//! A target's memory, read and written without ever waiting for its pages.
//!
//! `/proc/PID/mem` answers a userfault page with EIO instead of raising a fault, so the thread that
//! serves faults may use it. A missing page that *no* userfaultfd serves is populated by the kernel,
//! as if the process had touched it: look at the pagemap before reading such memory.

use std::fs::{File, OpenOptions};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use holo_proto::Addr;

use super::errno;
use super::errors::MemError;
use super::pagemap::Pagemap;

/// One address space's memory. Bound to the address space at the time of opening: after an exec it says
/// [`MemError::Gone`].
#[derive(Debug)]
pub struct TargetMem(File);

impl TargetMem {
    /// Opens the memory of `pid`.
    ///
    /// # Errors
    /// [`MemError::Gone`] without such a process, [`MemError::Denied`] without ptrace access to it.
    pub fn open(pid: i32) -> Result<Self, MemError> {
        OpenOptions::new()
            .read(true)
            .write(true)
            .open(format!("/proc/{pid}/mem"))
            .map(Self)
            .map_err(|e| MemError::of(e.raw_os_error().unwrap_or(0), "open of /proc/PID/mem"))
    }

    /// Takes over an open `/proc/PID/mem`.
    #[must_use]
    pub fn from_owned(fd: OwnedFd) -> Self {
        Self(File::from(fd))
    }

    /// Reads from `at` until `out` is full or a byte is not resident; returns how many.
    ///
    /// # Errors
    /// [`MemError::NotResident`] when the first byte is not.
    pub fn read(&self, at: Addr, out: &mut [u8]) -> Result<usize, MemError> {
        self.transfer(at, out.len(), "read of /proc/PID/mem", |fd, offset| {
            // SAFETY: `out` is valid for writes of its length during the call.
            unsafe { libc::pread(fd, out.as_mut_ptr().cast(), out.len(), offset) }
        })
    }

    /// Writes `bytes` at `at` until a byte is not resident or protected by userfaultfd; returns how many.
    /// Page protections of the mapping do not count.
    ///
    /// # Errors
    /// [`MemError::NotResident`] when the first byte cannot be written.
    pub fn write(&self, at: Addr, bytes: &[u8]) -> Result<usize, MemError> {
        self.transfer(at, bytes.len(), "write of /proc/PID/mem", |fd, offset| {
            // SAFETY: `bytes` is valid for reads of its length during the call.
            unsafe { libc::pwrite(fd, bytes.as_ptr().cast(), bytes.len(), offset) }
        })
    }

    /// Makes a page dirty by writing back the byte at `at`. What somebody else writes there in between is undone.
    ///
    /// Only where there is a page, in memory or in swap: without one a zero would be read that is nobody's, and written over whatever comes to the
    /// place meanwhile (a page that the process moves there).
    ///
    /// # Errors
    /// [`MemError::NotResident`] where there is no page, or it cannot be written.
    pub fn write_back(&self, pagemap: &Pagemap, at: Addr) -> Result<(), MemError> {
        let subpage = at.subpage();
        let look = pagemap
            .look_page(subpage.page())
            .map_err(|_| MemError::Gone)?;
        if !look.present.or(look.swapped).has(subpage.in_page()) {
            return Err(MemError::NotResident);
        }
        let mut byte = [0];
        self.read(at, &mut byte)?;
        self.write(at, &byte).map(drop)
    }

    fn transfer(
        &self,
        at: Addr,
        wanted: usize,
        op: &'static str,
        mut call: impl FnMut(i32, i64) -> isize,
    ) -> Result<usize, MemError> {
        if wanted == 0 {
            return Ok(0);
        }
        let Ok(offset) = i64::try_from(at.0) else {
            return Err(MemError::NotResident);
        };
        loop {
            match usize::try_from(call(self.0.as_raw_fd(), offset)) {
                // The kernel says "end of file" for an address space that is gone.
                Ok(0) => return Err(MemError::Gone),
                Ok(bytes) => return Ok(bytes),
                Err(_) => match errno() {
                    libc::EINTR => {}
                    other => return Err(MemError::of(other, op)),
                },
            }
        }
    }
}

impl AsFd for TargetMem {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

#[cfg(test)]
mod tests;
