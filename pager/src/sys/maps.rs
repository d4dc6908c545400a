//! A target's mappings, parsed from `/proc/PID/maps` and `/proc/PID/smaps` without allocating a line.
//!
//! The text is read in several system calls, so a process that maps meanwhile may show a mapping twice
//! or not at all: it is a claim to be checked by the next call, not a fact. [`ProcMaps::plain_around`] is
//! that check: it asks about one place, and the kernel answers as of now.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

use holo_proto::{Addr, AddrRange};

use super::errno;
use super::errors::MapsError;

/// Mappings that [`ProcMaps::plain_around`] looks at before it gives up, which bounds its time.
const LOOKED_AT: usize = 64;

/// What a mapping is called.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MapName<'a> {
    /// No name: anonymous memory.
    Anonymous,
    /// Anonymous memory that the process named (`[anon:…]`, the part after the colon).
    AnonymousNamed(&'a [u8]),
    /// `[heap]`.
    Heap,
    /// `[stack]`, of the first thread.
    Stack,
    /// `[vdso]`.
    Vdso,
    /// Anything else, as the kernel prints it: a path (newlines as `\012`), or a kernel's own name.
    Other(&'a [u8]),
}

/// One line of the maps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mapping<'a> {
    /// Where.
    pub range: AddrRange,
    /// PROT_READ.
    pub read: bool,
    /// PROT_WRITE.
    pub write: bool,
    /// PROT_EXEC.
    pub exec: bool,
    /// MAP_SHARED.
    pub shared: bool,
    /// Offset in the file, bytes.
    pub offset: u64,
    /// The file's inode; zero without a file.
    pub inode: u64,
    /// Its name.
    pub name: MapName<'a>,
}

impl Mapping<'_> {
    /// Private memory without a file behind it: all that holo ever takes. The main stack is not in.
    #[must_use]
    pub fn is_private_anonymous(&self) -> bool {
        let plain = match self.name {
            MapName::Anonymous | MapName::AnonymousNamed(_) | MapName::Heap => true,
            MapName::Stack | MapName::Vdso | MapName::Other(_) => false,
        };
        plain && !self.shared && self.inode == 0
    }
}

/// The flags of a mapping that matter here, as smaps' `VmFlags` line prints them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct VmFlags(u16);

impl VmFlags {
    /// `um`: missing pages go to a userfaultfd.
    pub const UFFD_MISSING: Self = Self(1 << 0);
    /// `uw`: writes to protected pages go to a userfaultfd.
    pub const UFFD_WP: Self = Self(1 << 1);
    /// `lo`: locked.
    pub const LOCKED: Self = Self(1 << 2);
    /// `ht`: huge pages of hugetlbfs.
    pub const HUGETLB: Self = Self(1 << 3);
    /// `wf`: zero in a fork's child.
    pub const WIPE_ON_FORK: Self = Self(1 << 4);
    /// `dc`: absent in a fork's child.
    pub const DONT_COPY: Self = Self(1 << 5);
    /// `mg`: KSM may merge.
    pub const MERGEABLE: Self = Self(1 << 6);
    /// `nh`: no transparent huge pages.
    pub const NO_HUGE: Self = Self(1 << 7);
    /// `io`: memory of a device.
    pub const IO: Self = Self(1 << 8);
    /// `pf`: bare page frames.
    pub const PFN_MAP: Self = Self(1 << 9);
    /// `sd`: soft-dirty.
    pub const SOFT_DIRTY: Self = Self(1 << 10);
    /// `gd`: grows down, a stack.
    pub const GROWS_DOWN: Self = Self(1 << 11);
    /// `sh`: shared.
    pub const SHARED: Self = Self(1 << 12);
    /// `hg`: huge pages advised.
    pub const HUGE_ADVISED: Self = Self(1 << 13);
    /// `ui`: minor faults go to a userfaultfd.
    pub const UFFD_MINOR: Self = Self(1 << 14);

    /// Whether all of `other` are set.
    #[must_use]
    pub const fn has(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }

    /// With those of `other` as well.
    #[must_use]
    pub const fn with(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    fn parse(tokens: &[u8]) -> Self {
        tokens
            .split(|&b| b == b' ')
            .fold(Self::default(), |flags, token| {
                flags.with(match token {
                    b"um" => Self::UFFD_MISSING,
                    b"uw" => Self::UFFD_WP,
                    b"lo" => Self::LOCKED,
                    b"ht" => Self::HUGETLB,
                    b"wf" => Self::WIPE_ON_FORK,
                    b"dc" => Self::DONT_COPY,
                    b"mg" => Self::MERGEABLE,
                    b"nh" => Self::NO_HUGE,
                    b"io" => Self::IO,
                    b"pf" => Self::PFN_MAP,
                    b"sd" => Self::SOFT_DIRTY,
                    b"gd" => Self::GROWS_DOWN,
                    b"sh" => Self::SHARED,
                    b"hg" => Self::HUGE_ADVISED,
                    b"ui" => Self::UFFD_MINOR,
                    _ => Self::default(),
                })
            })
    }
}

/// One mapping with what smaps says about it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MappingDetail<'a> {
    /// The mapping.
    pub mapping: Mapping<'a>,
    /// Its flags.
    pub flags: VmFlags,
    /// Resident bytes.
    pub rss_bytes: u64,
    /// Resident bytes that no file backs.
    pub anonymous_bytes: u64,
    /// Bytes locked.
    pub locked_bytes: u64,
    /// Resident bytes that another process maps as well.
    pub shared_bytes: u64,
}

/// A mapping that the kernel found for an address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Found {
    /// Where.
    pub range: AddrRange,
    /// Private memory without a file behind it that can be read and written, but not executed.
    pub plain: bool,
    /// The process may write there.
    pub writable: bool,
}

/// `struct procmap_query` of `linux/fs.h`.
#[repr(C)]
#[derive(Default)]
struct QueryArg {
    size: u64,
    flags: u64,
    addr: u64,
    /// From here on out, up to the sizes of name and build id; none is asked for.
    start: u64,
    end: u64,
    vma_flags: u64,
    page_size: u64,
    offset: u64,
    inode: u64,
    dev_major: u32,
    dev_minor: u32,
    name_size: u32,
    build_id_size: u32,
    name_at: u64,
    build_id_at: u64,
}

const QUERY_VMA_READABLE: u64 = 1 << 0;
const QUERY_VMA_WRITABLE: u64 = 1 << 1;
const QUERY_VMA_EXECUTABLE: u64 = 1 << 2;
const QUERY_VMA_SHARED: u64 = 1 << 3;
/// The mapping that holds the address, or else the next one above it.
const QUERY_COVERING_OR_NEXT: u64 = 1 << 4;
/// `_IOWR('f', 17, struct procmap_query)`, since Linux 6.11.
const PROCMAP_QUERY: libc::c_ulong =
    3 << 30 | (size_of::<QueryArg>() as libc::c_ulong) << 16 | (b'f' as libc::c_ulong) << 8 | 17;

/// An open maps or smaps file. Bound to the address space at the time of opening.
#[derive(Debug)]
pub struct ProcMaps(File);

/// Least room kept free in the buffer for one more read.
const READ_ROOM_BYTES: usize = 64 * 1024;

impl ProcMaps {
    /// Opens `/proc/PID/maps`.
    ///
    /// # Errors
    /// ENOENT without such a process, EACCES without ptrace access to it.
    pub fn open(pid: i32) -> io::Result<Self> {
        File::open(format!("/proc/{pid}/maps")).map(Self)
    }

    /// Opens `/proc/PID/smaps`. Reading it walks all page tables: milliseconds for each resident GiB.
    ///
    /// # Errors
    /// As [`ProcMaps::open`].
    pub fn open_smaps(pid: i32) -> io::Result<Self> {
        File::open(format!("/proc/{pid}/smaps")).map(Self)
    }

    /// Replaces `text` with the whole file. Empty: the address space is gone. Allocates only when `text`
    /// has to grow.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn read_into(&self, text: &mut Vec<u8>) -> io::Result<()> {
        text.clear();
        loop {
            text.reserve(READ_ROOM_BYTES);
            let offset = i64::try_from(text.len()).map_err(|_| io::ErrorKind::InvalidData)?;
            let room = text.spare_capacity_mut();
            // SAFETY: the spare capacity is valid for writes of its length during the call.
            let got = unsafe {
                libc::pread(
                    self.0.as_raw_fd(),
                    room.as_mut_ptr().cast(),
                    room.len(),
                    offset,
                )
            };
            match usize::try_from(got) {
                Ok(0) => return Ok(()),
                Ok(bytes) => {
                    let len = text.len() + bytes;
                    // SAFETY: the kernel wrote `bytes` bytes behind the old length, within the capacity.
                    unsafe { text.set_len(len) };
                }
                Err(_) if errno() == libc::EINTR => {}
                Err(_) if errno() == libc::ESRCH => return Ok(()),
                Err(_) => return Err(io::Error::last_os_error()),
            }
        }
    }

    /// The mapping that holds `at` now, or else the next one above it; `None` where there is none. Of a maps
    /// file only. Allocates nothing.
    ///
    /// # Errors
    /// [`MapsError::Unsupported`] before Linux 6.11, and of an smaps file.
    pub fn find(&self, at: Addr) -> Result<Option<Found>, MapsError> {
        let mut arg = QueryArg {
            size: size_of::<QueryArg>() as u64,
            flags: QUERY_COVERING_OR_NEXT,
            addr: at.0,
            ..QueryArg::default()
        };
        loop {
            // SAFETY: the structure whose size is encoded in the number and named in its first field, valid
            // for reads and writes during the call. No buffer for a name or build id is named in it.
            let r = unsafe { libc::ioctl(self.0.as_raw_fd(), PROCMAP_QUERY, &raw mut arg) };
            if r == 0 {
                break;
            }
            match errno() {
                libc::EINTR => {}
                libc::ENOENT => return Ok(None),
                other => return Err(MapsError::of(other, "PROCMAP_QUERY")),
            }
        }
        let access = QUERY_VMA_READABLE | QUERY_VMA_WRITABLE;
        let all = access | QUERY_VMA_EXECUTABLE | QUERY_VMA_SHARED;
        let file = arg.inode != 0 || arg.dev_major != 0 || arg.dev_minor != 0;
        Ok(Some(Found {
            range: AddrRange::new(arg.start, arg.end),
            plain: arg.vma_flags & all == access && !file,
            writable: arg.vma_flags & QUERY_VMA_WRITABLE != 0,
        }))
    }

    /// The mappings that `range` lies in, from the start of the first to the end of the last, if all of it is
    /// mapped now, and by nothing but plain mappings (at most [`LOOKED_AT`]).
    ///
    /// # Errors
    /// As [`ProcMaps::find`].
    pub fn plain_around(&self, range: AddrRange) -> Result<Option<AddrRange>, MapsError> {
        let mut start = None;
        let mut at = range.start;
        for _ in 0..LOOKED_AT {
            let found = self.find(at)?;
            let Some(m) = found.filter(|m| m.plain && m.range.contains(at)) else {
                return Ok(None);
            };
            let start = *start.get_or_insert(m.range.start);
            at = m.range.end;
            if at >= range.end {
                return Ok(Some(AddrRange { start, end: at }));
            }
        }
        Ok(None)
    }
}

/// The mappings in the text of a maps file, in its order; lines that are none are skipped.
pub fn mappings(text: &[u8]) -> impl Iterator<Item = Mapping<'_>> {
    text.split(|&b| b == b'\n').filter_map(mapping)
}

/// The mappings in the text of a smaps file, in its order.
pub fn smaps(text: &[u8]) -> impl Iterator<Item = MappingDetail<'_>> {
    let mut lines = text.split(|&b| b == b'\n');
    let mut next = None;
    std::iter::from_fn(move || {
        let mapping = next.take().or_else(|| lines.by_ref().find_map(mapping))?;
        let mut detail = MappingDetail {
            mapping,
            flags: VmFlags::default(),
            rss_bytes: 0,
            anonymous_bytes: 0,
            locked_bytes: 0,
            shared_bytes: 0,
        };
        for line in lines.by_ref() {
            // A mapping's line begins with a small hex digit, every other one with a capital.
            if line.first().is_some_and(|&b| is_hex(b)) {
                next = self::mapping(line);
                if next.is_some() {
                    break;
                }
            } else if let Some(rest) = line.strip_prefix(b"VmFlags:") {
                detail.flags = VmFlags::parse(rest);
            } else if let Some(rest) = line.strip_prefix(b"Rss:") {
                detail.rss_bytes = kib(rest);
            } else if let Some(rest) = line.strip_prefix(b"Anonymous:") {
                detail.anonymous_bytes = kib(rest);
            } else if let Some(rest) = line.strip_prefix(b"Locked:") {
                detail.locked_bytes = kib(rest);
            } else if let Some(rest) = line.strip_prefix(b"Shared_Clean:") {
                detail.shared_bytes += kib(rest);
            } else if let Some(rest) = line.strip_prefix(b"Shared_Dirty:") {
                detail.shared_bytes += kib(rest);
            }
        }
        Some(detail)
    })
}

const fn is_hex(b: u8) -> bool {
    matches!(b, b'0'..=b'9' | b'a'..=b'f')
}

/// `start-end perms offset dev inode   name`
fn mapping(line: &[u8]) -> Option<Mapping<'_>> {
    let (start, rest) = hex(line)?;
    let (end, rest) = hex(rest.strip_prefix(b"-")?)?;
    let (perms, rest) = rest.strip_prefix(b" ")?.split_at_checked(4)?;
    let (offset, rest) = hex(rest.strip_prefix(b" ")?)?;
    let (_major, rest) = hex(rest.strip_prefix(b" ")?)?;
    let (_minor, rest) = hex(rest.strip_prefix(b":")?)?;
    let (inode, rest) = decimal(rest.strip_prefix(b" ")?)?;
    // The name begins after padding to a fixed column, so it never begins with a space itself: a path
    // begins with a slash, a kernel's name with a letter or a bracket.
    let padding = rest.iter().take_while(|&&b| b == b' ').count();
    if padding == 0 && !rest.is_empty() {
        return None;
    }
    let name = match &rest[padding..] {
        b"" => MapName::Anonymous,
        b"[heap]" => MapName::Heap,
        b"[stack]" => MapName::Stack,
        b"[vdso]" => MapName::Vdso,
        other => match other
            .strip_prefix(b"[anon:")
            .and_then(|name| name.strip_suffix(b"]"))
        {
            Some(name) => MapName::AnonymousNamed(name),
            None => MapName::Other(other),
        },
    };
    let [r, w, x, s] = *perms else { return None };
    (start < end).then_some(Mapping {
        range: AddrRange::new(start, end),
        read: r == b'r',
        write: w == b'w',
        exec: x == b'x',
        shared: s == b's',
        offset,
        inode,
        name,
    })
}

/// A hexadecimal number of 1 to 16 digits, and what follows.
fn hex(text: &[u8]) -> Option<(u64, &[u8])> {
    let digits = text.iter().take_while(|&&b| is_hex(b)).count();
    if digits == 0 || digits > 16 {
        return None;
    }
    let (number, rest) = text.split_at(digits);
    let value = number.iter().fold(0, |n: u64, &b| {
        n << 4 | u64::from(if b <= b'9' { b - b'0' } else { b - b'a' + 10 })
    });
    Some((value, rest))
}

/// A decimal number that fits, and what follows.
pub(super) fn decimal(text: &[u8]) -> Option<(u64, &[u8])> {
    let digits = text.iter().take_while(|b| b.is_ascii_digit()).count();
    if digits == 0 {
        return None;
    }
    let (number, rest) = text.split_at(digits);
    let value = number.iter().try_fold(0_u64, |n, &b| {
        n.checked_mul(10)?.checked_add(u64::from(b - b'0'))
    })?;
    Some((value, rest))
}

/// `   123 kB`, in bytes.
pub(super) fn kib(text: &[u8]) -> u64 {
    decimal(text.trim_ascii_start()).map_or(0, |(n, _)| n.saturating_mul(1024))
}

#[cfg(test)]
mod tests;
