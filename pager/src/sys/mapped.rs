//! A shared mapping of a descriptor, seen as atomic words; the ground of the ring and the arenas.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, AtomicU64};

/// `len` bytes of a file, mapped shared, readable and writable, unmapped on drop.
///
/// Others (the kernel, a ring's process, a predecessor) may write it at any time, so it is reached
/// through atomics only, or raw through [`Mapped::as_ptr`] by a type that proves more.
#[derive(Debug)]
pub(super) struct Mapped {
    start: NonNull<u8>,
    len: usize,
}

// SAFETY: the mapping belongs to the process, not to a thread, and `start` is its only handle.
unsafe impl Send for Mapped {}
// SAFETY: shared access yields atomics only; the raw pointer is the user's to answer for.
unsafe impl Sync for Mapped {}

impl Mapped {
    /// Maps `len` bytes from `offset` on. The caller makes sure that the file stays that long: touching a
    /// page past its end raises SIGBUS.
    pub(super) fn shared(
        fd: BorrowedFd<'_>,
        offset: i64,
        len: usize,
        extra_flags: libc::c_int,
    ) -> io::Result<Self> {
        // SAFETY: a new mapping at a place that the kernel chooses touches no existing memory.
        let start = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                len,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED | extra_flags,
                fd.as_raw_fd(),
                offset,
            )
        };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let start = NonNull::new(start.cast()).ok_or(io::ErrorKind::AddrNotAvailable)?;
        Ok(Self { start, len })
    }

    /// A process that this one starts does not get the mapping.
    pub(super) fn keep_from_children(&self) -> io::Result<()> {
        // SAFETY: the range is one mapping of ours; the advice changes what a fork copies, nothing here.
        match unsafe { libc::madvise(self.start.as_ptr().cast(), self.len, libc::MADV_DONTFORK) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }

    pub(super) fn as_ptr(&self) -> *mut u8 {
        self.start.as_ptr()
    }

    pub(super) fn len(&self) -> usize {
        self.len
    }

    /// The 32-bit word at byte `offset`, if it lies inside and is aligned.
    pub(super) fn word32(&self, offset: usize) -> Option<&AtomicU32> {
        let end = offset.checked_add(size_of::<u32>())?;
        if end > self.len || !offset.is_multiple_of(align_of::<u32>()) {
            return None;
        }
        // SAFETY: `offset` is inside the mapping, whose start is page-aligned.
        let at = unsafe { self.start.as_ptr().add(offset) };
        // SAFETY: aligned and inside, mapped as long as `self` is borrowed, and this process reaches the
        // word through atomics only.
        Some(unsafe { AtomicU32::from_ptr(at.cast()) })
    }

    /// `count` 64-bit words from byte `offset` on, if they lie inside and are aligned.
    pub(super) fn words64(&self, offset: usize, count: usize) -> Option<&[AtomicU64]> {
        let end = count.checked_mul(size_of::<u64>())?.checked_add(offset)?;
        if end > self.len || !offset.is_multiple_of(align_of::<u64>()) {
            return None;
        }
        // SAFETY: `offset` is inside the mapping, whose start is page-aligned.
        let at = unsafe { self.start.as_ptr().add(offset) };
        // SAFETY: aligned and inside, mapped as long as `self` is borrowed; `AtomicU64` has the layout of a
        // u64, any bit pattern is valid, and this process reaches the words through atomics only.
        Some(unsafe { std::slice::from_raw_parts(at.cast::<AtomicU64>(), count) })
    }
}

impl Drop for Mapped {
    fn drop(&mut self) {
        // SAFETY: exactly the range that `mmap` returned; borrows of it ended before the drop.
        unsafe { libc::munmap(self.start.as_ptr().cast(), self.len) };
    }
}
