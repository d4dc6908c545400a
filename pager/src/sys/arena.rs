//! Memory that outlives the pager: words of the map and the journal, and the store's page bytes.
//!
//! Both live in a memfd, sealed against shrinking so that no access ever runs past its end, and are
//! mapped shared, so that a successor finds them as a killed pager left them.

use std::ffi::CString;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::sync::atomic::AtomicU64;

use super::advise::PidFd;
use super::mapped::Mapped;
use super::{procfs, usize_of};

const WORD_BYTES: u64 = 8;
/// At the end of a byte arena's file, one subpage for who owns it: pid and start time.
const OWNER_BYTES: u64 = 4096;

/// Atomic words in shared memory.
#[derive(Debug)]
pub struct SharedWords {
    fd: OwnedFd,
    map: Mapped,
    words: usize,
}

impl SharedWords {
    /// Creates `words` zero words; `name` shows in `/proc`.
    ///
    /// # Errors
    /// What the kernel says (ENOMEM, EMFILE); InvalidInput for no words or a name with a NUL.
    pub fn create(name: &str, words: u64) -> io::Result<Self> {
        let bytes = words
            .checked_mul(WORD_BYTES)
            .ok_or(io::ErrorKind::InvalidInput)?;
        Self::from_fd(sealed_memfd(name, bytes)?)
    }

    /// Maps what an earlier process created.
    ///
    /// # Errors
    /// InvalidInput for a descriptor that is not of a non-empty file sealed against shrinking.
    pub fn from_fd(fd: OwnedFd) -> io::Result<Self> {
        let words = usize_of(sealed_len(fd.as_fd())? / WORD_BYTES);
        if words == 0 {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let map = Mapped::shared(fd.as_fd(), 0, words * size_of::<u64>(), 0)?;
        Ok(Self { fd, map, words })
    }

    /// All words.
    #[must_use]
    pub fn words(&self) -> &[AtomicU64] {
        self.map.words64(0, self.words).unwrap_or_default()
    }

    /// Keeps the mapping for the rest of this process's life.
    #[must_use]
    pub fn leak(self) -> &'static [AtomicU64] {
        Box::leak(Box::new(self)).words()
    }

    /// Gives every word its memory now and locks it, so that no access waits; best effort, says whether
    /// both worked.
    pub fn populate_and_lock(&self) -> bool {
        populate_and_lock(&self.map)
    }
}

impl AsFd for SharedWords {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// Bytes in shared memory that one process owns at a time: memory is taken on first touch and given
/// back with [`SharedBytes::punch`].
///
/// Plain slices over shared memory are sound because nobody else maps it: the file records its owner's
/// pid and start time, taking it over is refused while that process lives, a fork's child does not
/// inherit the mapping, and sealed files cannot shrink under it.
#[derive(Debug)]
pub struct SharedBytes {
    fd: OwnedFd,
    map: Mapped,
    capacity: usize,
}

impl SharedBytes {
    /// Creates room for `capacity_bytes` (rounded up to whole subpages) without taking memory yet.
    ///
    /// # Errors
    /// What the kernel says; InvalidInput for zero or a name with a NUL.
    pub fn create(name: &str, capacity_bytes: u64) -> io::Result<Self> {
        let capacity = capacity_bytes
            .checked_next_multiple_of(OWNER_BYTES)
            .ok_or(io::ErrorKind::InvalidInput)?;
        let total = capacity
            .checked_add(OWNER_BYTES)
            .ok_or(io::ErrorKind::InvalidInput)?;
        Self::own(sealed_memfd(name, total)?)
    }

    /// Takes over what an earlier process created.
    ///
    /// # Errors
    /// ResourceBusy while that process lives, InvalidInput for a descriptor that is not such a file.
    pub fn from_fd(fd: OwnedFd) -> io::Result<Self> {
        Self::own(fd)
    }

    fn own(fd: OwnedFd) -> io::Result<Self> {
        let capacity = sealed_len(fd.as_fd())?
            .checked_sub(OWNER_BYTES)
            .filter(|&bytes| bytes > 0)
            .ok_or(io::ErrorKind::InvalidInput)?;
        let file = File::from(fd);
        let mut owner = [0; 16];
        file.read_exact_at(&mut owner, capacity)?;
        let word = |at: usize| {
            let bytes = owner[at..at + 8].iter().rev();
            bytes.fold(0, |n, &byte| n << 8 | u64::from(byte))
        };
        if lives(word(0), word(8)) {
            return Err(io::ErrorKind::ResourceBusy.into());
        }
        let me = std::process::id();
        let pid = i32::try_from(me).map_err(|_| io::ErrorKind::InvalidData)?;
        owner[..8].copy_from_slice(&u64::from(me).to_le_bytes());
        owner[8..].copy_from_slice(&procfs::start_time(pid)?.to_le_bytes());
        file.write_all_at(&owner, capacity)?;
        let fd = OwnedFd::from(file);
        let map = Mapped::shared(fd.as_fd(), 0, usize_of(capacity), libc::MAP_NORESERVE)?;
        map.keep_from_children()?;
        Ok(Self {
            fd,
            map,
            capacity: usize_of(capacity),
        })
    }

    /// Bytes that fit.
    #[must_use]
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// `len` bytes from `offset` on. Bytes never written, or punched, are zero; reading them takes memory
    /// all the same.
    ///
    /// # Panics
    /// When they reach past the capacity.
    #[must_use]
    pub fn slice(&self, offset: usize, len: usize) -> &[u8] {
        self.check(offset, len);
        // SAFETY: `offset` is inside the mapping.
        let at = unsafe { self.map.as_ptr().add(offset) };
        // SAFETY: inside the mapping, which lives as long as `self`; this process alone maps the file (see
        // the type), writes need `&mut self`, and the file cannot shrink.
        unsafe { std::slice::from_raw_parts(at, len) }
    }

    /// As [`SharedBytes::slice`], to write.
    ///
    /// # Panics
    /// When they reach past the capacity.
    pub fn slice_mut(&mut self, offset: usize, len: usize) -> &mut [u8] {
        self.check(offset, len);
        // SAFETY: `offset` is inside the mapping.
        let at = unsafe { self.map.as_ptr().add(offset) };
        // SAFETY: as in `slice`, and `&mut self` makes this the only slice.
        unsafe { std::slice::from_raw_parts_mut(at, len) }
    }

    /// Takes memory for `offset..offset + len` now: on a page that cannot be had later the first write is a SIGBUS.
    ///
    /// # Errors
    /// ENOSPC or ENOMEM where there is none.
    ///
    /// # Panics
    /// When the range reaches past the capacity.
    pub fn reserve(&mut self, offset: usize, len: usize) -> io::Result<()> {
        self.check(offset, len);
        let signed = |n: usize| i64::try_from(n).map_err(|_| io::ErrorKind::InvalidInput);
        let (offset, len) = (signed(offset)?, signed(len)?);
        loop {
            // SAFETY: takes memory for a part of the file, and changes no byte of it.
            let r = unsafe {
                libc::fallocate(self.fd.as_raw_fd(), libc::FALLOC_FL_KEEP_SIZE, offset, len)
            };
            match io::Error::last_os_error() {
                _ if r == 0 => return Ok(()),
                e if e.kind() == io::ErrorKind::Interrupted => {}
                e => return Err(e),
            }
        }
    }

    /// Gives the memory of the whole subpages in `offset..offset + len` back; they read as zero then.
    ///
    /// # Errors
    /// What the kernel says.
    ///
    /// # Panics
    /// When the range reaches past the capacity.
    pub fn punch(&mut self, offset: usize, len: usize) -> io::Result<()> {
        self.check(offset, len);
        let start = offset.next_multiple_of(4096);
        let end = (offset + len) / 4096 * 4096;
        if end <= start {
            return Ok(());
        }
        let signed = |n: usize| i64::try_from(n).map_err(|_| io::ErrorKind::InvalidInput);
        // SAFETY: `&mut self`: no slice of these bytes is alive while they become zero.
        let r = unsafe {
            libc::fallocate(
                self.fd.as_raw_fd(),
                libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE,
                signed(start)?,
                signed(end - start)?,
            )
        };
        if r == 0 {
            Ok(())
        } else {
            Err(io::Error::last_os_error())
        }
    }

    /// Bytes of memory that the arena takes now.
    #[cfg(test)]
    pub(crate) fn taken_bytes(&self) -> io::Result<u64> {
        let blocks = stat(self.fd.as_fd())?.st_blocks;
        Ok(u64::try_from(blocks).unwrap_or(0) * 512)
    }

    fn check(&self, offset: usize, len: usize) {
        let end = offset.checked_add(len);
        assert!(
            end.is_some_and(|end| end <= self.capacity),
            "bytes {offset}+{len} of an arena of {}",
            self.capacity
        );
    }
}

impl Drop for SharedBytes {
    /// Leaves the file without an owner, unless a fork's child drops its parent's arena.
    fn drop(&mut self) {
        let mut owner = [0; 8];
        let at = self.capacity as u64;
        let Ok(file) = self.fd.try_clone().map(File::from) else {
            return;
        };
        let mine = file.read_exact_at(&mut owner, at).is_ok()
            && u64::from_le_bytes(owner) == u64::from(std::process::id());
        if mine {
            // Failing leaves an owner that stops counting when this process ends.
            let _ = file.write_all_at(&[0; 16], at);
        }
    }
}

impl AsFd for SharedBytes {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// Whether the process that took the arena still runs. A fresh file says pid 0.
fn lives(pid: u64, started: u64) -> bool {
    let Ok(pid) = i32::try_from(pid) else {
        return false;
    };
    if pid == 0 {
        return false;
    }
    match PidFd::open(pid) {
        Ok(process) => {
            !process.has_exited() && procfs::start_time(pid).is_ok_and(|start| start == started)
        }
        // Nobody has the id, or it is a thread's by now. Whatever cannot be asked lives: two must never own the arena.
        Err(e) => !matches!(e.raw_os_error(), Some(libc::ESRCH | libc::EINVAL)),
    }
}

fn sealed_memfd(name: &str, bytes: u64) -> io::Result<OwnedFd> {
    let name = CString::new(name).map_err(|_| io::ErrorKind::InvalidInput)?;
    // SAFETY: a NUL-terminated name, read during the call.
    let fd =
        unsafe { libc::memfd_create(name.as_ptr(), libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel just made this descriptor; nobody else knows its number.
    let file = File::from(unsafe { OwnedFd::from_raw_fd(fd) });
    file.set_len(bytes)?;
    let seals = libc::F_SEAL_SHRINK | libc::F_SEAL_GROW | libc::F_SEAL_SEAL;
    // SAFETY: passes a number only.
    if unsafe { libc::fcntl(file.as_raw_fd(), libc::F_ADD_SEALS, seals) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(file.into())
}

/// Length of a file that can never shrink.
fn sealed_len(fd: BorrowedFd<'_>) -> io::Result<u64> {
    // SAFETY: passes no pointer.
    let seals = unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_GET_SEALS) };
    if seals < 0 || seals & libc::F_SEAL_SHRINK == 0 {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    u64::try_from(stat(fd)?.st_size).map_err(|_| io::ErrorKind::InvalidInput.into())
}

fn stat(fd: BorrowedFd<'_>) -> io::Result<libc::stat> {
    let mut stat = std::mem::MaybeUninit::<libc::stat>::uninit();
    // SAFETY: room for one `stat`, written during the call.
    if unsafe { libc::fstat(fd.as_raw_fd(), stat.as_mut_ptr()) } != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the call succeeded, so it filled all of it.
    Ok(unsafe { stat.assume_init() })
}

fn populate_and_lock(map: &Mapped) -> bool {
    let (at, len) = (map.as_ptr().cast(), map.len());
    // SAFETY: the range is one mapping of ours; populating changes no byte.
    let populated = unsafe { libc::madvise(at, len, libc::MADV_POPULATE_WRITE) } == 0;
    // SAFETY: the range is one mapping of ours; locking changes no byte.
    let locked = unsafe { libc::mlock(at, len) } == 0;
    populated && locked
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::Ordering;

    #[test]
    fn words_are_found_again_through_the_descriptor() {
        let first = SharedWords::create("test-words", 1000).unwrap();
        assert!(first.words().iter().all(|w| w.load(Ordering::Relaxed) == 0));
        first.words()[999].store(7, Ordering::Relaxed);
        let again = SharedWords::from_fd(first.as_fd().try_clone_to_owned().unwrap()).unwrap();
        drop(first);
        assert_eq!(again.words().len(), 1000);
        assert_eq!(again.words()[999].load(Ordering::Relaxed), 7);
    }

    #[test]
    fn a_file_that_could_shrink_is_refused() {
        let plain = File::open("/proc/self/exe").unwrap();
        assert!(SharedWords::from_fd(plain.into()).is_err());
    }

    #[test]
    fn reserved_bytes_have_their_memory_and_keep_their_content() {
        let mut bytes = SharedBytes::create("test", 1 << 20).unwrap();
        bytes.slice_mut(4096, 1)[0] = 7;
        let before = bytes.taken_bytes().unwrap();
        bytes.reserve(0, 512 << 10).unwrap();
        assert!(bytes.taken_bytes().unwrap() >= before + (500 << 10));
        assert_eq!((bytes.slice(0, 1)[0], bytes.slice(4096, 1)[0]), (0, 7));
    }

    #[test]
    fn punched_bytes_are_zero_and_their_memory_is_free() {
        let mut arena = SharedBytes::create("test-bytes", 1 << 30).unwrap();
        arena.slice_mut(100, 1 << 20).fill(9);
        let full = arena.taken_bytes().unwrap();
        assert!(full >= 1 << 20, "{full}");
        arena.punch(50, 1 << 20).unwrap();
        // The subpages that were punched in part only keep their bytes.
        assert_eq!(arena.slice(100, 3996), [9; 3996]);
        arena.punch(0, 1 << 20).unwrap();
        assert!(arena.taken_bytes().unwrap() < full - (1 << 19));
        assert!(arena.slice(100, (1 << 20) - 100).iter().all(|&b| b == 0));
        assert_eq!(arena.slice(1 << 20, 100), [9; 100]);
    }

    #[test]
    fn bytes_have_one_owner_at_a_time() {
        let mut arena = SharedBytes::create("test-owner", 8192).unwrap();
        arena.slice_mut(0, 3).copy_from_slice(b"abc");
        let second = arena.as_fd().try_clone_to_owned().unwrap();
        let refused = SharedBytes::from_fd(second.try_clone().unwrap()).unwrap_err();
        assert_eq!(refused.kind(), io::ErrorKind::ResourceBusy);
        // A dead owner: a process id that cannot be alive.
        let file = File::from(second);
        file.write_all_at(&u64::from(u32::MAX >> 1).to_le_bytes(), 8192)
            .unwrap();
        drop(arena);
        let taken = SharedBytes::from_fd(file.into()).unwrap();
        assert_eq!(taken.slice(0, 3), b"abc");
    }

    #[test]
    #[should_panic(expected = "of an arena")]
    fn bytes_past_the_end_are_not_handed_out() {
        let arena = SharedBytes::create("test-end", 4096).unwrap();
        let _ = arena.slice(4096, 1);
    }
}
