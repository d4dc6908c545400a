//! The pager's side of an io_uring that was created in a target, with a kernel thread that polls it.
//!
//! `madvise` requests put in here are carried out in the target's own address space, without running
//! any of its code. The target shares the ring's memory only if it maps it, which holo never makes it
//! do; still every index read here is masked or bounded, so a wrong one cannot reach outside.
//!
//! Who may use it: one thread of one process at a time. A successor maps it again from the descriptor
//! and the saved [`RingParams`] and finds in the shared indices what its predecessor left.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering, fence};

use holo_proto::AddrRange;

use super::errno;
use super::mapped::Mapped;

const OFF_SQ_RING: i64 = 0;
const OFF_CQ_RING: i64 = 0x0800_0000;
const OFF_SQES: i64 = 0x1000_0000;

const SETUP_SQPOLL: u32 = 1 << 1;
const SETUP_SQE128: u32 = 1 << 10;
const SETUP_CQE32: u32 = 1 << 11;
const SETUP_NO_SQARRAY: u32 = 1 << 16;
const SETUP_SQE_MIXED: u32 = 1 << 19;
const SETUP_CQE_MIXED: u32 = 1 << 18;

const SQ_NEED_WAKEUP: u32 = 1 << 0;
const ENTER_SQ_WAKEUP: libc::c_uint = 1 << 1;
const REGISTER_IOWQ_MAX_WORKERS: libc::c_uint = 19;
const OP_MADVISE: u8 = 25;

const SQE_WORDS: usize = 8;
const CQE_WORDS: usize = 2;

/// The kernel's `struct io_uring_params`, 120 bytes, as `io_uring_setup` filled it in the target.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(transparent)]
pub struct RingParams(pub [u64; 15]);

impl RingParams {
    /// What to hand to `io_uring_setup`: a polled ring whose thread sleeps after `idle_ms` without work.
    #[must_use]
    pub fn request(idle_ms: u32) -> Self {
        let mut words = [0; 15];
        words[1] = u64::from(SETUP_SQPOLL);
        words[2] = u64::from(idle_ms);
        Self(words)
    }

    /// The 32-bit field at byte `offset`.
    fn field(&self, offset: usize) -> u32 {
        let [a, b, c, d, e, f, g, h] = self.0[offset / 8].to_le_bytes();
        u32::from_le_bytes(if offset.is_multiple_of(8) {
            [a, b, c, d]
        } else {
            [e, f, g, h]
        })
    }

    fn sq_entries(&self) -> u32 {
        self.field(0)
    }

    fn cq_entries(&self) -> u32 {
        self.field(4)
    }

    fn flags(&self) -> u32 {
        self.field(8)
    }

    /// Field number `i` of `sq_off`: head, tail, mask, entries, flags, dropped, array.
    fn sq_offset(&self, i: usize) -> usize {
        self.field(40 + 4 * i) as usize
    }

    /// Field number `i` of `cq_off`: head, tail, mask, entries, overflow, cqes, flags.
    fn cq_offset(&self, i: usize) -> usize {
        self.field(80 + 4 * i) as usize
    }
}

/// What the target's kernel side is asked to do with a range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Advice {
    /// MADV_FREE: from now on the kernel may drop a subpage until it is written again.
    ///
    /// Does nothing, without saying so, to a subpage that waits on a per-CPU list of another CPU than the
    /// worker's (up to 31 that were touched, or given back by a PAGEOUT, last on each CPU), and to one that
    /// a fork shares. No later PAGEOUT makes up for that, a later FREE does: what stayed has to go through the
    /// whole round again.
    Free,
    /// MADV_DONTNEED: drop at once.
    DontNeed,
    /// MADV_COLD: to the end of the queue for reclaim.
    Cold,
    /// MADV_PAGEOUT, from inside.
    Pageout,
    /// MADV_POPULATE_READ: make readable now, as if touched.
    PopulateRead,
    /// MADV_POPULATE_WRITE: make writable now, as if written, without changing bytes.
    PopulateWrite,
}

impl Advice {
    const fn number(self) -> u32 {
        match self {
            Self::DontNeed => 4,
            Self::Free => 8,
            Self::Cold => 20,
            Self::Pageout => 21,
            Self::PopulateRead => 22,
            Self::PopulateWrite => 23,
        }
    }
}

/// No room for one more request: reap first. Nothing was submitted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the ring is full")]
pub struct RingFull;

/// A request that is done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Done {
    /// The tag of the request.
    pub tag: u64,
    /// Zero, or a negative errno. After an error part of the range may have been advised.
    pub result: i32,
}

/// A target's ring, mapped here. Dropping it unmaps and closes this descriptor; the ring lives until
/// the last one goes.
#[derive(Debug)]
pub struct AdviceRing {
    fd: OwnedFd,
    params: RingParams,
    sq: Mapped,
    cq: Mapped,
    sqes: Mapped,
}

impl AdviceRing {
    /// Maps the ring behind `fd`, which `io_uring_setup` made with these parameters.
    ///
    /// # Errors
    /// InvalidInput when the parameters don't describe a polled ring with plain entries, or what the
    /// kernel says to `mmap`.
    pub fn map(fd: OwnedFd, params: &RingParams) -> io::Result<Self> {
        let flags = params.flags();
        let odd = SETUP_SQE128 | SETUP_CQE32 | SETUP_SQE_MIXED | SETUP_CQE_MIXED | SETUP_NO_SQARRAY;
        let plausible = |n: u32| n.is_power_of_two() && n <= 65536;
        if flags & SETUP_SQPOLL == 0
            || flags & odd != 0
            || !plausible(params.sq_entries())
            || !plausible(params.cq_entries())
        {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let (sq_entries, cq_entries) = (params.sq_entries() as usize, params.cq_entries() as usize);
        let map = |offset, len| {
            let map = Mapped::shared(fd.as_fd(), offset, len, libc::MAP_POPULATE)?;
            // The ring lives as long as anybody maps it.
            map.keep_from_children()?;
            io::Result::Ok(map)
        };
        let sq = map(OFF_SQ_RING, params.sq_offset(6) + sq_entries * 4)?;
        let cq = map(
            OFF_CQ_RING,
            params.cq_offset(5) + cq_entries * CQE_WORDS * 8,
        )?;
        let sqes = map(OFF_SQES, sq_entries * SQE_WORDS * 8)?;
        let ring = Self {
            fd,
            params: *params,
            sq,
            cq,
            sqes,
        };
        if ring.words().is_none() {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        Ok(ring)
    }

    /// Puts one request in; `tag` comes back with its result. The polling thread may see it at once, or
    /// only after [`AdviceRing::wake_if_needed`]. What a successor needs to know about the request has to
    /// be journalled before this call.
    ///
    /// # Errors
    /// [`RingFull`] when as many are outstanding as the ring holds.
    ///
    /// # Panics
    /// When `range` has 4 GiB or more: a bug of the caller.
    pub fn submit(&mut self, range: AddrRange, advice: Advice, tag: u64) -> Result<(), RingFull> {
        let len = u32::try_from(range.len()).expect("one request advises less than 4 GiB");
        let entries = self.params.sq_entries();
        let Some(words) = self.words() else {
            return Err(RingFull);
        };
        let tail = words.sq_tail.load(Ordering::Relaxed);
        let taken = words.sq_head.load(Ordering::Acquire);
        let outstanding = tail.wrapping_sub(words.cq_head.load(Ordering::Relaxed));
        if tail.wrapping_sub(taken) >= entries || outstanding >= self.params.cq_entries() {
            return Err(RingFull);
        }
        let slot = tail & (entries - 1);
        let entry = [
            // No file: -1 in the upper half.
            u64::from(OP_MADVISE) | u64::from(u32::MAX) << 32,
            0,
            range.start.0,
            u64::from(len) | u64::from(advice.number()) << 32,
            tag,
            0,
            0,
            0,
        ];
        let at = slot as usize * SQE_WORDS;
        for (word, value) in words.sqes[at..at + SQE_WORDS].iter().zip(entry) {
            word.store(value, Ordering::Relaxed);
        }
        if let Some(index) = self.sq.word32(self.params.sq_offset(6) + slot as usize * 4) {
            index.store(slot, Ordering::Relaxed);
        }
        words.sq_tail.store(tail.wrapping_add(1), Ordering::Release);
        Ok(())
    }

    /// Wakes the polling thread if it sleeps; one system call then, none otherwise.
    ///
    /// # Errors
    /// EOWNERDEAD when the polling thread is gone: requests will not be carried out any more.
    pub fn wake_if_needed(&self) -> io::Result<()> {
        let Some(words) = self.words() else {
            return Ok(());
        };
        // The tail has to be visible before the flag is read: the other side does it the other way round.
        fence(Ordering::SeqCst);
        if words.sq_flags.load(Ordering::Relaxed) & SQ_NEED_WAKEUP == 0 {
            return Ok(());
        }
        loop {
            // SAFETY: no pointer is passed.
            let r = unsafe {
                libc::syscall(
                    libc::SYS_io_uring_enter,
                    self.fd.as_raw_fd(),
                    0,
                    0,
                    ENTER_SQ_WAKEUP,
                    std::ptr::null::<libc::sigset_t>(),
                    0,
                )
            };
            if r >= 0 {
                return Ok(());
            }
            if errno() != libc::EINTR {
                return Err(io::Error::last_os_error());
            }
        }
    }

    /// The oldest finished request, left in the ring: after a death before [`AdviceRing::consume`] the
    /// successor sees it again.
    #[must_use]
    pub fn peek(&self) -> Option<Done> {
        let words = self.words()?;
        let head = words.cq_head.load(Ordering::Relaxed);
        if words.cq_tail.load(Ordering::Acquire) == head {
            return None;
        }
        let at = (head & (self.params.cq_entries() - 1)) as usize * CQE_WORDS;
        let tag = words.cqes[at].load(Ordering::Relaxed);
        let [a, b, c, d, ..] = words.cqes[at + 1].load(Ordering::Relaxed).to_le_bytes();
        Some(Done {
            tag,
            result: i32::from_le_bytes([a, b, c, d]),
        })
    }

    /// Takes the request that [`AdviceRing::peek`] showed out of the ring.
    pub fn consume(&mut self) {
        if let Some(words) = self.words() {
            let head = words.cq_head.load(Ordering::Relaxed);
            if words.cq_tail.load(Ordering::Acquire) != head {
                words.cq_head.store(head.wrapping_add(1), Ordering::Release);
            }
        }
    }

    /// Takes the oldest finished request out: its tag, and zero or a negative errno.
    pub fn reap(&mut self) -> Option<Done> {
        let done = self.peek()?;
        self.consume();
        Some(done)
    }

    /// The tag of the last request that the polling thread has not begun. For a ring whose thread has ended, after
    /// its last results were taken out: then what is left never ran.
    #[must_use]
    pub fn stranded(&self) -> Option<u64> {
        let words = self.words()?;
        let last = words.sq_tail.load(Ordering::Relaxed).wrapping_sub(1);
        if words.sq_head.load(Ordering::Acquire) == last.wrapping_add(1) {
            return None;
        }
        let slot = last & (self.params.sq_entries() - 1);
        Some(words.sqes[slot as usize * SQE_WORDS + 4].load(Ordering::Relaxed))
    }

    /// Takes back the request that [`AdviceRing::stranded`] showed.
    pub fn take_back(&mut self) {
        if let (Some(words), Some(_)) = (self.words(), self.stranded()) {
            let tail = words.sq_tail.load(Ordering::Relaxed);
            words.sq_tail.store(tail.wrapping_sub(1), Ordering::Release);
        }
    }

    /// Requests put in and not yet taken out, by whichever process put them in.
    #[must_use]
    pub fn outstanding(&self) -> u32 {
        self.words().map_or(0, |words| {
            let tail = words.sq_tail.load(Ordering::Acquire);
            tail.wrapping_sub(words.cq_head.load(Ordering::Acquire))
        })
    }

    /// Requests ever put in, by whichever process, modulo 2^32.
    #[must_use]
    pub fn submitted(&self) -> u32 {
        self.words()
            .map_or(0, |words| words.sq_tail.load(Ordering::Acquire))
    }

    /// Lets the target have one worker thread of each kind for this ring, instead of hundreds.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn limit_workers(&self) -> io::Result<()> {
        let mut most = [1_u32, 1];
        // SAFETY: two 32-bit counts, valid for reads and writes during the call.
        let r = unsafe {
            libc::syscall(
                libc::SYS_io_uring_register,
                self.fd.as_raw_fd(),
                REGISTER_IOWQ_MAX_WORKERS,
                most.as_mut_ptr(),
                most.len(),
            )
        };
        if r < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(())
    }

    /// The parameters that map this ring again.
    #[must_use]
    pub fn params(&self) -> &RingParams {
        &self.params
    }

    fn words(&self) -> Option<Words<'_>> {
        let p = &self.params;
        Some(Words {
            sq_head: self.sq.word32(p.sq_offset(0))?,
            sq_tail: self.sq.word32(p.sq_offset(1))?,
            sq_flags: self.sq.word32(p.sq_offset(4))?,
            sqes: self.sqes.words64(0, p.sq_entries() as usize * SQE_WORDS)?,
            cq_head: self.cq.word32(p.cq_offset(0))?,
            cq_tail: self.cq.word32(p.cq_offset(1))?,
            cqes: self
                .cq
                .words64(p.cq_offset(5), p.cq_entries() as usize * CQE_WORDS)?,
        })
    }
}

impl AsFd for AdviceRing {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// The shared words, checked against the mappings.
struct Words<'a> {
    sq_head: &'a AtomicU32,
    sq_tail: &'a AtomicU32,
    sq_flags: &'a AtomicU32,
    sqes: &'a [AtomicU64],
    cq_head: &'a AtomicU32,
    cq_tail: &'a AtomicU32,
    cqes: &'a [AtomicU64],
}

#[cfg(test)]
mod tests;
