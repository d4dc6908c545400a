//! What is resident in a target, subpage by subpage.
//!
//! A look is a snapshot: the process may change any of it before the call returns. Only what nobody but
//! us can bring back (a missing subpage of a served range) stays as it was seen.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};

use holo_proto::{Addr, AddrRange, PAGE_SUBPAGES, PageIndex, SUBPAGE_BYTES, SubpageMask};

use super::errno;

const ENTRY_BYTES: usize = 8;
/// Page frame number; zero without CAP_SYS_ADMIN.
const FRAME_MASK: u64 = (1 << 55) - 1;

/// Meaning of a raw pagemap entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry(pub u64);

impl Entry {
    /// A page is mapped.
    #[must_use]
    pub const fn present(self) -> bool {
        self.0 >> 63 & 1 == 1
    }

    /// In swap, or under migration.
    #[must_use]
    pub const fn swapped(self) -> bool {
        self.0 >> 62 & 1 == 1
    }

    /// Of a file, or shared anonymous.
    #[must_use]
    pub const fn file_or_shared(self) -> bool {
        self.0 >> 61 & 1 == 1
    }

    /// Write-protected by userfaultfd.
    #[must_use]
    pub const fn protected(self) -> bool {
        self.0 >> 57 & 1 == 1
    }

    /// Mapped by this address space alone.
    #[must_use]
    pub const fn exclusive(self) -> bool {
        self.0 >> 56 & 1 == 1
    }

    /// The shared zero page. Always false where the kernel hides frame numbers from us.
    #[must_use]
    pub fn zero(self) -> bool {
        self.present() && zero_frame().is_some_and(|zero| self.0 & FRAME_MASK == zero)
    }
}

/// One page's sixteen subpages.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PageLook {
    /// Mapped.
    pub present: SubpageMask,
    /// Mapped to the shared zero page; dropping those frees nothing.
    pub zero: SubpageMask,
    /// In swap, or under migration.
    pub swapped: SubpageMask,
    /// Of a file, or shared anonymous.
    pub file_or_shared: SubpageMask,
    /// Write-protected by userfaultfd; may be set on swapped and missing subpages.
    pub protected: SubpageMask,
    /// Mapped by this address space alone. Present, without this and not zero: shared with a fork relative.
    pub exclusive: SubpageMask,
}

/// A run of present subpages of one kind.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct PresentRun {
    // The kernel's `struct page_region`.
    start: u64,
    end: u64,
    categories: u64,
}

impl PresentRun {
    /// Where.
    #[must_use]
    pub const fn range(&self) -> AddrRange {
        AddrRange::new(self.start, self.end)
    }

    /// All of it is the shared zero page.
    #[must_use]
    pub const fn zero(&self) -> bool {
        self.categories & PAGE_IS_PFNZERO != 0
    }

    /// All of it is of a file or shared anonymous.
    #[must_use]
    pub const fn file_or_shared(&self) -> bool {
        self.categories & PAGE_IS_FILE != 0
    }
}

const PAGE_IS_FILE: u64 = 1 << 2;
const PAGE_IS_PRESENT: u64 = 1 << 3;
const PAGE_IS_PFNZERO: u64 = 1 << 5;

/// The kernel's `struct pm_scan_arg` (since Linux 6.7).
#[repr(C)]
struct ScanArg {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    vec: u64,
    vec_len: u64,
    max_pages: u64,
    category_inverted: u64,
    category_mask: u64,
    category_anyof_mask: u64,
    return_mask: u64,
}

/// _IOWR('f', 16, struct pm_scan_arg)
const PAGEMAP_SCAN: libc::c_ulong =
    3 << 30 | (size_of::<ScanArg>() as libc::c_ulong) << 16 | (b'f' as libc::c_ulong) << 8 | 16;

/// One address space's pagemap. Bound to the address space at the time of opening.
#[derive(Debug)]
pub struct Pagemap {
    file: File,
    /// Cleared when the kernel turns out not to know PAGEMAP_SCAN.
    scan_works: AtomicBool,
}

impl Pagemap {
    /// Opens the pagemap of `pid`.
    ///
    /// # Errors
    /// ENOENT without such a process, EACCES without ptrace access to it.
    pub fn open(pid: i32) -> io::Result<Self> {
        Ok(Self::from_owned(
            File::open(format!("/proc/{pid}/pagemap"))?.into(),
        ))
    }

    /// Takes over an open `/proc/PID/pagemap`.
    #[must_use]
    pub fn from_owned(fd: OwnedFd) -> Self {
        // Learned now, because learning opens a file and a look must not.
        zero_frame();
        Self::from_file(fd.into())
    }

    fn from_file(file: File) -> Self {
        Self {
            file,
            scan_works: AtomicBool::new(true),
        }
    }

    /// The state of `page`'s subpages. One system call, no allocation.
    ///
    /// # Errors
    /// ESRCH when the address space is gone.
    pub fn look_page(&self, page: PageIndex) -> io::Result<PageLook> {
        let mut raw = [0; PAGE_SUBPAGES];
        self.look_range(page.range(), &mut raw)?;
        let mut look = PageLook::default();
        for (i, &entry) in raw.iter().enumerate() {
            let entry = Entry(entry);
            let set = |mask: &mut SubpageMask, on| {
                if on {
                    *mask = mask.with(i);
                }
            };
            set(&mut look.present, entry.present());
            set(&mut look.zero, entry.zero());
            set(&mut look.swapped, entry.swapped());
            set(&mut look.file_or_shared, entry.file_or_shared());
            set(&mut look.protected, entry.protected());
            set(&mut look.exclusive, entry.exclusive());
        }
        Ok(look)
    }

    /// Raw entries (see [`Entry`]) of the subpages of `range`, one word each, as many as `out` holds;
    /// returns how many. No allocation.
    ///
    /// # Errors
    /// ESRCH when the address space is gone.
    pub fn look_range(&self, range: AddrRange, out: &mut [u64]) -> io::Result<usize> {
        let first = range.start.0 / SUBPAGE_BYTES;
        let count = super::usize_of(range.end.0.div_ceil(SUBPAGE_BYTES).saturating_sub(first));
        let wanted = count.min(out.len());
        let mut done = 0;
        while done < wanted {
            let part = &mut out[done..wanted];
            let offset = i64::try_from((first + done as u64) * ENTRY_BYTES as u64)
                .map_err(|_| io::ErrorKind::InvalidInput)?;
            // SAFETY: `part` is valid for writes of its length during the call; any bits make a u64.
            let got = unsafe {
                libc::pread(
                    self.file.as_raw_fd(),
                    part.as_mut_ptr().cast(),
                    size_of_val(part),
                    offset,
                )
            };
            match usize::try_from(got) {
                Ok(0) => return Err(io::Error::from_raw_os_error(libc::ESRCH)),
                Ok(bytes) => done += bytes / ENTRY_BYTES,
                Err(_) if errno() == libc::EINTR => {}
                Err(_) => return Err(io::Error::last_os_error()),
            }
        }
        Ok(wanted)
    }

    /// Runs of present subpages in `range`, ascending, until `out` is full; returns how many, and up to
    /// where it looked.
    ///
    /// Without PAGEMAP_SCAN (before Linux 6.7) it reads the whole pagemap of `range`, 8 bytes a subpage,
    /// and zero pages are told apart only with CAP_SYS_ADMIN.
    ///
    /// # Errors
    /// ESRCH when the address space is gone.
    pub fn scan_present(
        &self,
        range: AddrRange,
        out: &mut [PresentRun],
    ) -> io::Result<(usize, Addr)> {
        if range.is_empty() || out.is_empty() {
            return Ok((0, range.start));
        }
        if self.scan_works.load(Ordering::Relaxed) {
            match self.scan_by_ioctl(range, out) {
                Err(e) if matches!(e.raw_os_error(), Some(libc::ENOTTY | libc::EINVAL)) => {
                    self.scan_works.store(false, Ordering::Relaxed);
                }
                Ok((0, walked_to)) => {
                    // It walks an address space that is gone as if nothing were there; reading does not.
                    self.look_range(range, &mut [0])?;
                    return Ok((0, walked_to));
                }
                result => return result,
            }
        }
        self.scan_by_reading(range, out)
    }

    fn scan_by_ioctl(&self, range: AddrRange, out: &mut [PresentRun]) -> io::Result<(usize, Addr)> {
        let mut arg = ScanArg {
            size: size_of::<ScanArg>() as u64,
            flags: 0,
            start: range.start.0,
            end: range.end.0,
            walk_end: 0,
            vec: out.as_mut_ptr().expose_provenance() as u64,
            vec_len: out.len() as u64,
            max_pages: 0,
            category_inverted: 0,
            category_mask: PAGE_IS_PRESENT,
            category_anyof_mask: 0,
            return_mask: PAGE_IS_PRESENT | PAGE_IS_PFNZERO | PAGE_IS_FILE,
        };
        loop {
            // SAFETY: `arg` is the structure that the number names; its vector points to `out`, borrowed
            // mutably during the call, whose elements have the kernel's layout.
            let r = unsafe {
                libc::ioctl(
                    self.file.as_raw_fd(),
                    PAGEMAP_SCAN,
                    std::ptr::from_mut(&mut arg),
                )
            };
            match usize::try_from(r) {
                Ok(count) => return Ok((count, Addr(arg.walk_end))),
                Err(_) if errno() == libc::EINTR => {}
                Err(_) => return Err(io::Error::last_os_error()),
            }
        }
    }

    fn scan_by_reading(
        &self,
        range: AddrRange,
        out: &mut [PresentRun],
    ) -> io::Result<(usize, Addr)> {
        let mut raw = [0; 512];
        let (mut count, room) = (0, out.len());
        let mut at = range.start;
        while at < range.end {
            let read = self.look_range(AddrRange { start: at, ..range }, &mut raw)?;
            for &entry in &raw[..read] {
                let entry = Entry(entry);
                if entry.present() {
                    let categories = PAGE_IS_PRESENT
                        | if entry.zero() { PAGE_IS_PFNZERO } else { 0 }
                        | if entry.file_or_shared() {
                            PAGE_IS_FILE
                        } else {
                            0
                        };
                    let next = PresentRun {
                        start: at.0,
                        end: at.0 + SUBPAGE_BYTES,
                        categories,
                    };
                    match out[..count].last_mut() {
                        Some(run) if run.end == at.0 && run.categories == categories => {
                            run.end = next.end;
                        }
                        Some(_) | None if count < room => {
                            out[count] = next;
                            count += 1;
                        }
                        Some(_) | None => return Ok((count, at)),
                    }
                }
                at = at.offset(SUBPAGE_BYTES);
            }
        }
        Ok((count, range.end))
    }
}

impl AsFd for Pagemap {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

/// Frame number of the kernel's zero page, learned once by reading a fresh page of our own.
fn zero_frame() -> Option<u64> {
    static FRAME: OnceLock<Option<u64>> = OnceLock::new();
    *FRAME.get_or_init(learn_zero_frame)
}

fn learn_zero_frame() -> Option<u64> {
    const LEN: usize = super::usize_of(SUBPAGE_BYTES);
    // SAFETY: a new mapping at a place that the kernel chooses touches no existing memory.
    let page = unsafe {
        libc::mmap(
            std::ptr::null_mut(),
            LEN,
            libc::PROT_READ,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
            -1,
            0,
        )
    };
    if page == libc::MAP_FAILED {
        return None;
    }
    // SAFETY: just mapped readable, not yet unmapped.
    unsafe { std::ptr::read_volatile(page.cast::<u8>()) };
    let at = Addr(page.addr() as u64);
    let mut raw = [0];
    let mut looked = None;
    if let Ok(own) = File::open("/proc/self/pagemap") {
        let range = AddrRange {
            start: at,
            end: at.offset(SUBPAGE_BYTES),
        };
        looked = Pagemap::from_file(own).look_range(range, &mut raw).ok();
    }
    // SAFETY: exactly the range mapped above; nothing refers to it any more.
    unsafe { libc::munmap(page, LEN) };
    looked?;
    let frame = raw[0] & FRAME_MASK;
    (Entry(raw[0]).present() && frame != 0).then_some(frame)
}

#[cfg(test)]
mod tests;
