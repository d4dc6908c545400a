//! One userfaultfd descriptor, usually created in another process, and the events read from it.
//!
//! Constants and structures are our own: Debian 12's headers lack some. Addresses are the target's;
//! nothing here looks at what is mapped there.

use std::marker::PhantomData;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, IntoRawFd, OwnedFd, RawFd};
use std::sync::atomic::AtomicU64;

use holo_proto::{Addr, AddrRange};

use super::errno;
use super::errors::UffdError;

/// 64-bit words of one event message.
pub const EVENT_WORDS: usize = 4;
/// Where hardly any process has memory: a change of protection there says only how things are. Not lower, for some kernels
/// refuse what is below `vm.mmap_min_addr` (65536 as a rule) before they look at anything.
pub const NOWHERE: AddrRange = AddrRange::new(65536, 65536 + 4096);

/// Faults on write-protected pages are reported as such.
const FEATURE_PAGEFAULT_FLAG_WP: u64 = 1 << 0;
const FEATURE_EVENT_FORK: u64 = 1 << 1;
const FEATURE_EVENT_REMAP: u64 = 1 << 2;
const FEATURE_EVENT_REMOVE: u64 = 1 << 3;
const FEATURE_EVENT_UNMAP: u64 = 1 << 6;
const FEATURE_THREAD_ID: u64 = 1 << 8;
/// Empty page table entries are protected as well (since Linux 6.4).
pub const FEATURE_WP_UNPOPULATED: u64 = 1 << 13;
const FEATURES_WANTED: u64 = FEATURE_PAGEFAULT_FLAG_WP
    | FEATURE_EVENT_FORK
    | FEATURE_EVENT_REMAP
    | FEATURE_EVENT_REMOVE
    | FEATURE_EVENT_UNMAP
    | FEATURE_THREAD_ID;

const API_VERSION: u64 = 0xAA;
const REGISTER_MODE_MISSING: u64 = 1 << 0;
const REGISTER_MODE_WP: u64 = 1 << 1;
const COPY_MODE_DONTWAKE: u64 = 1 << 0;
const COPY_MODE_WP: u64 = 1 << 1;
const ZEROPAGE_MODE_DONTWAKE: u64 = 1 << 0;
const WRITEPROTECT_MODE_WP: u64 = 1 << 0;
const WRITEPROTECT_MODE_DONTWAKE: u64 = 1 << 1;
const CONTINUE_MODE_DONTWAKE: u64 = 1 << 0;

#[repr(C)]
struct ApiArg {
    api: u64,
    features: u64,
    ioctls: u64,
}

#[repr(C)]
struct RangeArg {
    start: u64,
    len: u64,
}

#[repr(C)]
struct RegisterArg {
    range: RangeArg,
    mode: u64,
    ioctls: u64,
}

#[repr(C)]
struct CopyArg {
    dst: u64,
    src: u64,
    len: u64,
    mode: u64,
    /// Out: bytes done, or a negative errno.
    copied: i64,
}

/// Of ZEROPAGE and CONTINUE, which have the same layout.
#[repr(C)]
struct FillArg {
    range: RangeArg,
    mode: u64,
    /// Out: bytes done, or a negative errno.
    filled: i64,
}

#[repr(C)]
struct WriteProtectArg {
    range: RangeArg,
    mode: u64,
}

/// An ioctl's number, bound to the structure that the kernel reads and writes for it.
struct Request<T> {
    number: libc::c_ulong,
    name: &'static str,
    arg: PhantomData<fn(&mut T)>,
}

impl<T> Request<T> {
    /// `direction`: 2 for _IOR, 3 for _IOWR, as `linux/userfaultfd.h` declares each of them.
    const fn new(direction: libc::c_ulong, nr: libc::c_ulong, name: &'static str) -> Self {
        Self {
            number: direction << 30 | (size_of::<T>() as libc::c_ulong) << 16 | 0xAA << 8 | nr,
            name,
            arg: PhantomData,
        }
    }
}

const REGISTER: Request<RegisterArg> = Request::new(3, 0x00, "UFFDIO_REGISTER");
const UNREGISTER: Request<RangeArg> = Request::new(2, 0x01, "UFFDIO_UNREGISTER");
const WAKE: Request<RangeArg> = Request::new(2, 0x02, "UFFDIO_WAKE");
const COPY: Request<CopyArg> = Request::new(3, 0x03, "UFFDIO_COPY");
const ZEROPAGE: Request<FillArg> = Request::new(3, 0x04, "UFFDIO_ZEROPAGE");
const WRITEPROTECT: Request<WriteProtectArg> = Request::new(3, 0x06, "UFFDIO_WRITEPROTECT");
const CONTINUE: Request<FillArg> = Request::new(3, 0x07, "UFFDIO_CONTINUE");
const API: Request<ApiArg> = Request::new(3, 0x3F, "UFFDIO_API");

impl From<AddrRange> for RangeArg {
    fn from(range: AddrRange) -> Self {
        Self {
            start: range.start.0,
            len: range.len(),
        }
    }
}

/// What the kernel offers, as its answer to the handshake said.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Features {
    /// Every `UFFD_FEATURE_*` bit that this kernel knows.
    pub known: u64,
}

/// How installed pages are left.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CopyMode {
    /// Wake the threads that wait for these pages.
    pub wake: bool,
    /// Install them write-protected.
    pub protect: bool,
}

/// A userfaultfd of some address space. Dropping it closes this descriptor; when the last one goes, the
/// kernel forgets every registration and missing pages read as zero.
///
/// A descriptor in a table that outlives this process (shared with the guardian) is kept as a bare
/// number there; a successor wraps the number again with [`Uffd::from_raw`].
#[derive(Debug)]
pub struct Uffd(OwnedFd);

impl Uffd {
    /// Takes over a descriptor, handshake done or not.
    #[must_use]
    pub fn from_owned(fd: OwnedFd) -> Self {
        Self(fd)
    }

    /// Takes over the descriptor with this number.
    ///
    /// # Safety
    /// `fd` is open in this process's descriptor table, is a userfaultfd, and nothing else in this process
    /// owns it: no other wrapper will close it.
    #[must_use]
    pub unsafe fn from_raw(fd: RawFd) -> Self {
        // SAFETY: the caller promises an open descriptor without another owner.
        Self(unsafe { OwnedFd::from_raw_fd(fd) })
    }

    /// The number of the descriptor, which stays owned by this value.
    #[must_use]
    pub fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }

    /// Gives the number away without closing it.
    #[must_use]
    pub fn into_raw_fd(self) -> RawFd {
        self.0.into_raw_fd()
    }

    /// Agrees with the kernel on the interface; once in a descriptor's life.
    ///
    /// # Errors
    /// [`UffdError::Denied`] without CAP_SYS_PTRACE (fork events need it), [`UffdError::Unsupported`] when
    /// the kernel lacks a feature or the handshake was done before.
    pub fn handshake(&self) -> Result<Features, UffdError> {
        self.handshake_with(0)
    }

    /// The same with `more` features than those that we need.
    ///
    /// # Errors
    /// As [`Uffd::handshake`].
    pub fn handshake_with(&self, more: u64) -> Result<Features, UffdError> {
        let mut arg = ApiArg {
            api: API_VERSION,
            features: FEATURES_WANTED | more,
            ioctls: 0,
        };
        self.call(&API, &mut arg)?;
        Ok(Features {
            known: arg.features,
        })
    }

    /// Serves `range` from now on: missing pages and writes to protected ones come as events. Pages that
    /// are present stay. Splits mappings that reach over the range's ends.
    ///
    /// # Errors
    /// [`UffdError::Busy`] when another descriptor serves a part, [`UffdError::Unsupported`] where nothing
    /// or nothing suitable is mapped. Nothing is registered then.
    pub fn register(&self, range: AddrRange) -> Result<(), UffdError> {
        let mut arg = RegisterArg {
            range: range.into(),
            mode: REGISTER_MODE_MISSING | REGISTER_MODE_WP,
            ioctls: 0,
        };
        self.call(&REGISTER, &mut arg)
            .map_err(|e| self.no_memory_or_gone(e, range))
    }

    /// Stops serving `range`: protection is lifted, waiting threads are woken, missing pages read as zero.
    ///
    /// # Errors
    /// As [`Uffd::register`].
    pub fn unregister(&self, range: AddrRange) -> Result<(), UffdError> {
        self.call(&UNREGISTER, &mut RangeArg::from(range))
            .map_err(|e| self.no_memory_or_gone(e, range))
    }

    /// Installs `bytes` at `dst`, atomically for each subpage. Never overwrites a present one.
    ///
    /// # Errors
    /// [`UffdError::Partial`] when it stopped part-way. [`UffdError::AlreadyThere`],
    /// [`UffdError::EdgeOfMapping`], [`UffdError::EventsPending`], [`UffdError::NoMemory`],
    /// [`UffdError::Gone`]: nothing was installed.
    pub fn copy(&self, dst: Addr, bytes: &[u8], mode: CopyMode) -> Result<(), UffdError> {
        let mut arg = CopyArg {
            dst: dst.0,
            // The kernel reads through this number.
            src: bytes.as_ptr().expose_provenance() as u64,
            len: bytes.len() as u64,
            mode: if mode.wake { 0 } else { COPY_MODE_DONTWAKE }
                | if mode.protect { COPY_MODE_WP } else { 0 },
            copied: 0,
        };
        self.call(&COPY, &mut arg)
            .map_err(|e| progress_or(arg.copied, e))
    }

    /// Makes the missing subpages of `range` read as zero (the shared zero page; a write makes its own).
    ///
    /// # Errors
    /// As [`Uffd::copy`].
    pub fn zero(&self, range: AddrRange, wake: bool) -> Result<(), UffdError> {
        let mut arg = FillArg {
            range: range.into(),
            mode: if wake { 0 } else { ZEROPAGE_MODE_DONTWAKE },
            filled: 0,
        };
        self.call(&ZEROPAGE, &mut arg)
            .map_err(|e| progress_or(arg.filled, e))
    }

    /// Makes writes to present subpages of `range` wait for us. Missing ones are skipped; so are splits and
    /// holes on Linux 6.18, where earlier kernels stop with an error.
    ///
    /// # Errors
    /// [`UffdError::EdgeOfMapping`] may leave a part protected; [`UffdError::EventsPending`] none.
    pub fn protect(&self, range: AddrRange) -> Result<(), UffdError> {
        self.write_protect(range, WRITEPROTECT_MODE_WP)
    }

    /// Lifts the protection; with `wake`, threads that wait in `range` try again.
    ///
    /// # Errors
    /// As [`Uffd::protect`]; a failed call wakes nobody.
    pub fn unprotect(&self, range: AddrRange, wake: bool) -> Result<(), UffdError> {
        self.write_protect(range, if wake { 0 } else { WRITEPROTECT_MODE_DONTWAKE })
    }

    fn write_protect(&self, range: AddrRange, mode: u64) -> Result<(), UffdError> {
        let mut arg = WriteProtectArg {
            range: range.into(),
            mode,
        };
        self.call(&WRITEPROTECT, &mut arg)
    }

    /// Lets every thread that waits in `range` try its access again; a fault that still stands is raised
    /// anew. Works while events are pending.
    ///
    /// # Errors
    /// Only for a range that is empty or not aligned.
    pub fn wake(&self, range: AddrRange) -> Result<(), UffdError> {
        self.call(&WAKE, &mut RangeArg::from(range))
    }

    /// Reads waiting messages straight into `slots`, [`EVENT_WORDS`] words each, with one `read`; returns
    /// how many. None waiting is 0. A message is acknowledged by this call, not by handling it.
    ///
    /// # Errors
    /// [`UffdError::Unsupported`] when `slots` has no room for one message or the handshake is missing.
    pub fn read_events(&self, slots: &[AtomicU64]) -> Result<usize, UffdError> {
        let message_bytes = EVENT_WORDS * size_of::<u64>();
        let room = slots.len() / EVENT_WORDS * message_bytes;
        loop {
            // SAFETY: the pointer is valid for writes of `room` bytes while `slots` is borrowed, and the
            // words are atomics, so writing behind the shared reference is allowed.
            let got =
                unsafe { libc::read(self.as_raw_fd(), slots.as_ptr().cast_mut().cast(), room) };
            if let Ok(bytes) = usize::try_from(got) {
                return Ok(bytes / message_bytes);
            }
            match errno() {
                libc::EAGAIN => return Ok(0),
                libc::EINTR => {}
                other => return Err(UffdError::of(other, "read of a userfaultfd")),
            }
        }
    }

    /// Registering says ENOMEM for an address space that is gone as well; CONTINUE tells the two apart
    /// and does nothing to private memory.
    fn no_memory_or_gone(&self, error: UffdError, range: AddrRange) -> UffdError {
        if error != UffdError::NoMemory {
            return error;
        }
        let mut probe = FillArg {
            range: range.into(),
            mode: CONTINUE_MODE_DONTWAKE,
            filled: 0,
        };
        match self.call(&CONTINUE, &mut probe) {
            Err(UffdError::Gone) => UffdError::Gone,
            Ok(()) | Err(_) => UffdError::NoMemory,
        }
    }

    fn call<T>(&self, request: &Request<T>, arg: &mut T) -> Result<(), UffdError> {
        loop {
            // SAFETY: `arg` is the structure whose size is encoded in the number, valid for reads and
            // writes during the call. Pages of this process are only read (a copy's source, borrowed by
            // the caller); what changes is the other address space.
            let r = unsafe {
                libc::ioctl(
                    self.as_raw_fd(),
                    request.number,
                    std::ptr::from_mut(arg).cast::<libc::c_void>(),
                )
            };
            if r == 0 {
                return Ok(());
            }
            match errno() {
                libc::EINTR => {}
                other => return Err(UffdError::of(other, request.name)),
            }
        }
    }
}

impl AsFd for Uffd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// A copy that stopped part-way says EAGAIN and how far it came.
fn progress_or(done: i64, error: UffdError) -> UffdError {
    match u64::try_from(done) {
        Ok(bytes) if bytes > 0 => UffdError::Partial(bytes),
        Ok(_) | Err(_) => error,
    }
}

/// One message of a userfaultfd.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// A thread waits for a subpage.
    Fault {
        /// First byte of the subpage.
        at: Addr,
        /// It wants to write.
        write: bool,
        /// The subpage is present and write-protected.
        protect: bool,
        /// Its thread id, as the target's own pid namespace counts.
        thread: u32,
    },
    /// The process forked; the child's address space came as a descriptor of ours, open from the read on.
    Fork {
        /// The descriptor's number.
        fd: i32,
    },
    /// `len` bytes moved; the old place is unmapped or, with MREMAP_DONTUNMAP, empty.
    Remap {
        /// Old first byte.
        from: Addr,
        /// New first byte.
        to: Addr,
        /// Bytes moved.
        len: u64,
    },
    /// The range is about to lose its pages (MADV_DONTNEED, MADV_FREE, ours included).
    Remove(AddrRange),
    /// The range is about to go, or went.
    Unmap(AddrRange),
}

impl Event {
    /// The meaning of one message; `None` for a kind that was never asked for, or an empty slot.
    #[must_use]
    pub fn decode(message: &[u64; EVENT_WORDS]) -> Option<Self> {
        const FLAG_WRITE: u64 = 1 << 0;
        const FLAG_WP: u64 = 1 << 1;
        let [head, a, b, c] = *message;
        // Little-endian, as the architecture: the kind is the first byte, 32-bit fields are low halves.
        let [kind, ..] = head.to_le_bytes();
        let low = |word: u64| {
            let [b0, b1, b2, b3, ..] = word.to_le_bytes();
            [b0, b1, b2, b3]
        };
        match kind {
            0x12 => Some(Self::Fault {
                at: Addr(b & !0xfff),
                write: a & FLAG_WRITE != 0,
                protect: a & FLAG_WP != 0,
                thread: u32::from_le_bytes(low(c)),
            }),
            0x13 => Some(Self::Fork {
                fd: i32::from_le_bytes(low(a)),
            }),
            0x14 => Some(Self::Remap {
                from: Addr(a),
                to: Addr(b),
                len: c,
            }),
            0x15 => Some(Self::Remove(AddrRange::new(a, b))),
            0x16 => Some(Self::Unmap(AddrRange::new(a, b))),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests;
