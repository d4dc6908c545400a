//! The control block: words that guardian, pager and successor share.
//!
//! It says which descriptors of the shared table are what, which process each userfaultfd belongs to, what
//! the pager asks of the guardian, and what the pager has counted. Whoever dies, the others read it here.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::core::{STATS_WORDS, Stats, Words};
use crate::sys::clock;

/// Words of a control block.
pub(crate) const CONTROL_WORDS: u64 = (STATS + STATS_WORDS) as u64;

const SCALARS: usize = 0;
const RECORDS: usize = 64;
const RECORD_WORDS: usize = 32;
/// Most processes that are held at once.
pub(crate) const RECORDS_MAX: usize = 256;
const STATS: usize = RECORDS + RECORDS_MAX * RECORD_WORDS;

macro_rules! scalars {
    ($($(#[$doc:meta])* $name:ident = $at:literal),* $(,)?) => {
        /// A single word of the control block.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub(crate) enum Scalar { $($(#[$doc])* $name = $at),* }
    };
}

scalars! {
    /// Descriptor number plus one of the map's memfd.
    MapFd = 0,
    /// ... of the journal's and notes' memfd.
    JournalFd = 1,
    /// ... of the frames' memfd.
    FramesFd = 2,
    /// ... of the store's memfd.
    StoreFd = 3,
    /// ... of the console's listening socket.
    ConsoleFd = 4,
    /// ... of the pager's end of the line to the guardian.
    LineFd = 5,
    /// ... of the guardian's end of it.
    GuardianLineFd = 6,
    /// ... of the pipe at whose other end `holo-exec` sees that nobody is left.
    AliveFd = 7,
    /// ... of the file or stream for messages to the user.
    MessagesFd = 8,
    /// All descriptors above are valid: a successor can take over.
    Ready = 9,
    /// Pagers that took over.
    Takeovers = 10,
    /// A crash that was asked for has happened.
    Crashed = 11,
    /// Process id of the pager.
    PagerPid = 12,
    /// Process id of the guardian.
    GuardianPid = 13,
    /// The pager is done: no successor is wanted.
    Done = 14,
    /// Longest stop of threads of a process, microseconds.
    StopMaxUs = 22,
    /// Budget, bytes.
    Budget = 23,
    /// Usage, bytes.
    Usage = 24,
    /// Spaces alive.
    Spaces = 25,
    /// Faults waiting.
    Waiting = 26,
    /// Most bytes in the store, before compression.
    StoreRaw = 27,
    /// Bytes that they took then.
    StoreStored = 28,
    /// Checksum failures.
    IntegrityFailures = 29,
    /// CPU nanoseconds of those of us that ended.
    CpuOfDead = 30,
    /// The process that was started or attached first.
    RootPid = 31,
    /// Pages left alone, the most at once: stacks.
    LeftStack = 32,
    /// Pages left alone: locked.
    LeftLocked = 33,
    /// Pages left alone: shared.
    LeftShared = 35,
    /// Pages left alone: files.
    LeftFile = 36,
    /// CPU nanoseconds of this pager.
    CpuOfPager = 37,
    /// Processes served so far.
    Processes = 38,
    /// The first process is watched.
    Started = 39,
    /// Moment of the start, monotonic nanoseconds.
    StartedNs = 40,
    /// The command line that started the session.
    StarterPid = 42,
    /// Descriptor number plus one of the file that the report goes to.
    ReportFd = 43,
    /// The first process has ended and all of it is counted.
    RootGone = 44,
    /// Descriptor number plus one of the guardian's pidfd of the pager.
    GuardianWatchFd = 45,
    /// ... of the guardian's pidfd of the warden.
    GuardianWardenFd = 47,
    /// ... of the warden's pidfd of the guardian that started it; 0 until it watches.
    WardenWatchFd = 48,
    /// Process id of the warden.
    WardenPid = 49,
    /// The pager for whose sake the guardian leaves the table of descriptors alone.
    TableLeftTo = 50,
    /// The pager that closed what its predecessors had left in the table.
    TableCleanedBy = 51,
    /// The pager's request that a guardian began last.
    AskBegun = 52,
    /// The guardian that began it.
    AskBegunBy = 53,
    /// Descriptor number plus one of the pipe to the command line that waits for the start.
    AnswerFd = 54,
    /// ... of the socket through which `holo-exec` gets fork children's userfaultfds to keep.
    KeepersFd = 55,
    /// Pagers that ended because of a fault of their own.
    Panics = 56,
    /// CPU nanoseconds of this guardian.
    CpuOfGuardian = 57,
    /// CPU nanoseconds of this warden.
    CpuOfWarden = 58,
    /// Pageable bytes resident, of all processes that are watched.
    Resident = 59,
    /// Processes that could not be taken, or not be evicted from.
    LeftProcesses = 60,
    /// Messages go to the system's log.
    MessagesLogged = 61,
    /// The most of [`Scalar::Resident`].
    ResidentPeak = 62,
    /// All that was attached was asked to be detached.
    Detaching = 41,
    /// The command line is stopped, or about to, because the command was.
    StarterStopped = 46,
}

/// What is known of one held process, found by the number of its userfaultfd.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Record {
    /// Number of our userfaultfd.
    pub(crate) uffd: i32,
    /// The process.
    pub(crate) pid: i32,
    /// Number of its pidfd.
    pub(crate) pidfd: i32,
    /// Number of the descriptor that it keeps, in its own table; -1 for none.
    pub(crate) keeper: i32,
    /// Of a fork's child: the number of the one that its parent kept, which it has as well; -1 for none.
    pub(crate) inherited: i32,
    /// Number of its ring's descriptor, -1 for none.
    pub(crate) ring: i32,
    /// The ring's parameters.
    pub(crate) params: [u64; 15],
    /// Address that the kernel clears at thread exit, 0 for none.
    pub(crate) clear_tid: u64,
    /// What the process runs ([`crate::sys::procfs::image`]).
    pub(crate) image: u64,
}

/// The control block.
#[derive(Clone, Copy)]
pub(crate) struct Control {
    words: &'static [AtomicU64],
}

impl Control {
    pub(crate) fn new(words: &'static [AtomicU64]) -> Self {
        assert!(words.len() as u64 >= CONTROL_WORDS, "control words");
        Self { words }
    }

    pub(crate) fn get(&self, s: Scalar) -> u64 {
        self.words[SCALARS + s as usize].load(Ordering::Acquire)
    }

    pub(crate) fn set(&self, s: Scalar, value: u64) {
        self.words[SCALARS + s as usize].store(value, Ordering::Release);
    }

    pub(crate) fn add(&self, s: Scalar, value: u64) {
        self.words[SCALARS + s as usize].fetch_add(value, Ordering::AcqRel);
    }

    /// Puts `to` in the place of `from`; false if that is not there.
    pub(crate) fn replace_pid(&self, s: Scalar, from: i32, to: i32) -> bool {
        let word = |pid| u64::try_from(pid).unwrap_or(0);
        self.words[SCALARS + s as usize]
            .compare_exchange(word(from), word(to), Ordering::AcqRel, Ordering::Acquire)
            .is_ok()
    }

    pub(crate) fn max(&self, s: Scalar, value: u64) {
        self.words[SCALARS + s as usize].fetch_max(value, Ordering::AcqRel);
    }

    /// Notes the CPU time of this process, which has this place.
    pub(crate) fn note_cpu(&self, place: Scalar) {
        self.set(place, clock::process_cpu_ns());
    }

    /// Another process has this place from now on.
    pub(crate) fn inherit_cpu(&self, place: Scalar) {
        self.add(Scalar::CpuOfDead, self.get(place));
        self.note_cpu(place);
    }

    /// A descriptor number, kept plus one so that zero is none.
    pub(crate) fn fd(&self, s: Scalar) -> Option<i32> {
        i32::try_from(self.get(s).checked_sub(1)?).ok()
    }

    pub(crate) fn set_fd(&self, s: Scalar, number: i32) {
        self.set(s, u64::try_from(number).map_or(0, |n| n + 1));
    }

    /// A process id.
    pub(crate) fn pid(&self, s: Scalar) -> i32 {
        i32::try_from(self.get(s)).unwrap_or(0)
    }

    pub(crate) fn set_pid(&self, s: Scalar, pid: i32) {
        self.set(s, u64::try_from(pid).unwrap_or(0));
    }

    pub(crate) fn stats_words(&self) -> Words<'static> {
        &self.words[STATS..STATS + STATS_WORDS]
    }

    pub(crate) fn stats(&self) -> Stats {
        Stats::load(self.stats_words())
    }

    fn record_word(&self, i: usize, field: usize) -> &'static AtomicU64 {
        &self.words[RECORDS + i * RECORD_WORDS + field]
    }

    fn read_record(&self, i: usize) -> Option<Record> {
        let word = |f| self.record_word(i, f).load(Ordering::Acquire);
        let number = |f| i32::try_from(word(f)).map_or(-1, |n| n - 1);
        if word(0) == 0 {
            return None;
        }
        let mut params = [0; 15];
        for (k, p) in params.iter_mut().enumerate() {
            *p = word(8 + k);
        }
        Some(Record {
            uffd: number(0),
            pid: number(1),
            pidfd: number(2),
            keeper: number(3),
            ring: number(4),
            clear_tid: word(5),
            image: word(6),
            inherited: number(7),
            params,
        })
    }

    /// Every record.
    pub(crate) fn records(&self) -> impl Iterator<Item = Record> + '_ {
        (0..RECORDS_MAX).filter_map(|i| self.read_record(i))
    }

    /// The record of a userfaultfd.
    pub(crate) fn record(&self, uffd: i32) -> Option<Record> {
        self.records().find(|r| r.uffd == uffd)
    }

    /// Adds or replaces the record of `r.uffd`; false if there is no room.
    pub(crate) fn put_record(&self, r: &Record) -> bool {
        let same = |i: &usize| self.read_record(*i).is_some_and(|x| x.uffd == r.uffd);
        let free = |i: &usize| self.read_record(*i).is_none();
        let Some(i) = (0..RECORDS_MAX)
            .find(same)
            .or_else(|| (0..RECORDS_MAX).find(free))
        else {
            return false;
        };
        let put = |f, v| self.record_word(i, f).store(v, Ordering::Release);
        let number = |n: i32| u64::try_from(n + 1).unwrap_or(0);
        for (k, &p) in r.params.iter().enumerate() {
            put(8 + k, p);
        }
        put(1, number(r.pid));
        put(2, number(r.pidfd));
        put(3, number(r.keeper));
        put(4, number(r.ring));
        put(5, r.clear_tid);
        put(6, r.image);
        put(7, number(r.inherited));
        put(0, number(r.uffd));
        true
    }

    /// Removes the record of a userfaultfd.
    pub(crate) fn drop_record(&self, uffd: i32) {
        for i in 0..RECORDS_MAX {
            if self.read_record(i).is_some_and(|r| r.uffd == uffd) {
                self.record_word(i, 0).store(0, Ordering::Release);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_are_found_replaced_and_dropped() {
        let words: Vec<AtomicU64> = (0..CONTROL_WORDS).map(|_| AtomicU64::new(0)).collect();
        let control = Control::new(words.leak());
        let r = Record {
            uffd: 0,
            pid: 77,
            pidfd: 5,
            keeper: -1,
            inherited: 4,
            ring: -1,
            params: [3; 15],
            clear_tid: 9,
            image: 8,
        };
        assert!(control.put_record(&r));
        assert_eq!(control.record(0), Some(r));
        let with_ring = Record { ring: 12, ..r };
        assert!(control.put_record(&with_ring));
        assert_eq!(control.records().count(), 1);
        assert_eq!(control.record(0), Some(with_ring));
        control.drop_record(0);
        assert_eq!(control.record(0), None);
    }
}
