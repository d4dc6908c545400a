//! The pager's core: every decision about every page, and no I/O.
//!
//! No clock, no randomness, no system call, no thread. Whoever drives it (the serving thread, or the
//! simulation) passes [`Input`]s in, takes one [`Op`] at a time from [`Core::next`], performs it and
//! returns its [`Outcome`] through [`Core::complete`].
//!
//! # One page's life
//!
//! ```text
//!  Nothing --touch--> resident --protect, read--> Staged --FREE, un-protect, put--> Stored
//!    ^                   ^                          |                                 | PAGEOUT, look
//!    | the process       | installed: the entry is  | a fault: served from the frame  | still there: stays
//!    | dropped it        | forgotten                v                                 v
//!  Dropping <------------+----------------------- fault <------------------------- missing
//! ```
//!
//! # Invariants
//!
//! 1. *If the kernel has no page at a subpage of a registered mapping, the [`map`] says its content.* An
//!    entry is written before the kernel may drop the page (before `MADV_FREE` is queued), and forgotten
//!    only after the bytes were installed, or the process dropped them.
//! 2. *A decision is made on a state in which every message that the kernel had is applied.* Each ioctl
//!    that would act on an older state fails with `EAGAIN`; then all messages are read, and the fault or
//!    step is decided again from the new state, not merely repeated.
//! 3. *A removal message comes before the act.* Until every thread was seen outside the kernel after it, a
//!    subpage may still be dropped, whatever was written to it meanwhile: `Dropping` entries are not
//!    evicted. (That the subpage is missing tells nothing: it may have been missing before.)
//! 4. *Our own `MADV_FREE` sends removal messages too.* One covers each offered subpage, and any more count
//!    as the process's ([`note`]). (More can be ours where another thread splits the mapping while ours waits: then a page
//!    of the program's counts as dropped by it, a known fault.)
//! 5. *A request on the ring may hit what the process put there meanwhile.* An unmap or move of a page
//!    between queueing and un-protecting is noticed (its message must be read before the un-protect
//!    succeeds), and the hit is undone by `MADV_POPULATE_WRITE`, which makes the pages dirty again.
//! 6. *Every step can be the last.* A successor opens [`Memory`], applies the journal again, waits for
//!    the ring, and goes on; [`CrashPoint`] names the steps.
//!
//! Faults come before eviction, except that a fault which needs memory beyond the budget waits while a
//! batch can make room.

#![forbid(unsafe_code)]
#![allow(
    clippy::wildcard_enum_match_arm,
    reason = "an outcome that an operation cannot have is answered like the refusal beside it"
)]

mod adopt;
mod batch;
mod budget;
mod crash;
mod event;
mod events;
mod fault;
mod fork;
mod frames;
mod input;
mod journal;
mod map;
mod note;
mod op;
mod orphans;
mod policy;
mod ranges;
mod recover;
mod restore;
mod schedule;
#[cfg(test)]
mod scripted;
mod space;
mod stats;
mod unsettled;
mod words;

use std::collections::VecDeque;

use holo_proto::{AddrRange, PAGE_BYTES, SUBPAGE_BYTES, SpaceId, SubpageIndex};

use crate::store::api::{PageStore, Ticket};
use batch::Batch;
use fault::{Fault, Install};
use frames::Frames;
use note::Notes;
use space::{Life, Space};

pub use crash::CrashPoint;
pub use event::{EVENT_WORDS, Event};
pub use journal::{JOURNAL_WORDS, Journal, SLOTS as JOURNAL_SLOTS};
pub use map::{BLOCK_WORDS, Entry, FrameId, Map, MapError, SPACES, SlotState, VERSION};
pub use note::{BATCH_PAGES, NOTE_WORDS};
pub use op::{
    Advice, HEADS, HOLES, Heads, Input, NEVER_RAN, NOT_WRITABLE, Nanos, Next, Op, Outcome,
    PageLook, Source, StopReason,
};
pub use policy::{PageSet, Policy};
pub use stats::{Histogram, STATS_WORDS, Stats};
pub use words::Words;

/// Most faults that wait at once; more are woken to come again.
const FAULTS: usize = 16384;
/// Most graves; the oldest go first.
const GRAVES: usize = 32768;
/// Where the addresses of processes end (the map has as many again, see `unsettled::shadow`).
const USER_END: holo_proto::Addr = holo_proto::Addr(1 << 47);
/// All addresses that a process of x86-64 can map and the kernel takes for a wake (from the usual
/// `vm.mmap_min_addr` on).
const EVERYWHERE: AddrRange = AddrRange::new(65536, (1 << 47) - SUBPAGE_BYTES);
/// A place to un-protect for the sake of what that tells: it fails in one way while a change of mappings is under
/// way, and in another one or not at all when none is.
const ANYWHERE: AddrRange = AddrRange::new(65536, 65536 + SUBPAGE_BYTES);
/// How often waiting faults are decided again though nothing was heard, nanoseconds.
const RECHECK_NS: u64 = 2_000_000;

/// The state that a successor takes over.
#[derive(Clone, Copy)]
pub struct Memory<'m> {
    /// The map ([`Map`]).
    pub map: Words<'m>,
    /// The journal, at least [`JOURNAL_WORDS`] words.
    pub journal: Words<'m>,
    /// The notes of batches, at least [`NOTE_WORDS`] words.
    pub notes: Words<'m>,
}

/// Settings of a core.
#[derive(Clone, Copy, Debug)]
pub struct Config {
    /// Bytes that all spaces together may keep in RAM.
    pub budget_bytes: u64,
    /// Page buffers; at least 2 x [`BATCH_PAGES`] + 2.
    pub frames: u16,
    /// Resident pages that one space keeps in order of replacement; others are found by search.
    pub tracked_pages: usize,
    /// When a fork's child is left alone.
    pub childhood: Childhood,
    /// What the process drops at once beyond this many bytes (64 KiB at least) is remembered as a range, not by
    /// subpage.
    pub large_drop_bytes: u64,
    /// Nanoseconds that a process may change its mappings without a pause while pages have to go, faults wait, or it is to
    /// be let go.
    pub restless_ns: u64,
    /// Called at each [`CrashPoint`]; dies there or returns.
    pub crash: fn(CrashPoint),
}

/// When a fork's child is left alone: it gets no ring then.
#[derive(Clone, Copy, Debug)]
pub struct Childhood {
    /// For so many nanoseconds, whatever it has.
    pub new_ns: u64,
    /// For so many, while it has less than [`Self::small_bytes`] of its own.
    pub young_ns: u64,
    /// Bytes in RAM that it shares with nobody.
    pub small_bytes: u64,
}

/// What the map said of a subpage that was unmapped, moved or dropped, for a child of a fork that came
/// before that, though its message comes after it (see [`Core::forked`]).
#[derive(Clone, Copy, Debug)]
struct Grave {
    space: SpaceId,
    at: SubpageIndex,
    entry: Entry,
    /// A child that has something registered here was forked before.
    witness: SubpageIndex,
    /// And here, if something else has come to the first witness since.
    witness_too: Option<SubpageIndex>,
    /// Only for forks whose message was read together with the removal's.
    dropped: bool,
}

/// What the operation in progress is for.
#[derive(Clone, Copy, Debug)]
enum Doing {
    Nothing,
    Errand(Option<SpaceId>),
    Events(SpaceId),
    Unprotect(Fault),
    Zero { fault: Fault, subpages: usize },
    Install,
    Batch(SpaceId),
    Restore(SpaceId),
    Adopt(SpaceId, AddrRange),
    Suspect(SpaceId),
    Prove(SpaceId, AddrRange),
    Settle(SpaceId),
    Orphan,
}

/// The core. See the module's documentation.
pub struct Core<'m, S> {
    map: Map<'m>,
    journal: Journal<'m>,
    notes: Notes<'m>,
    store: S,
    frames: Frames,
    spaces: Vec<Option<Box<Space>>>,
    ready: VecDeque<Fault>,
    held: VecDeque<Fault>,
    held_since: Nanos,
    install: Option<Install>,
    errands: VecDeque<Op>,
    /// Frames that a predecessor's map refers to, to be stored; the first may be in transfer.
    orphans: VecDeque<FrameId>,
    /// Of the messages in the journal: [`Outcome::Events`].
    gone: u64,
    /// A predecessor may have applied the next of them before it died. Numbers are looked up only then: they come round.
    replays: bool,
    orphan_ticket: Option<Ticket>,
    /// The store had no room for one: so long it rests, and how long that was.
    orphans_rest_until: Nanos,
    orphans_rest_ns: u64,
    pageout: Vec<AddrRange>,
    graves: VecDeque<Grave>,
    doing: Doing,
    /// The operation in progress puts a request into this space's ring.
    asking: Option<SpaceId>,
    tickets: u64,
    budget_bytes: u64,
    tracked_pages: usize,
    childhood: Childhood,
    large_drop_bytes: u64,
    restless_ns: u64,
    turn: usize,
    /// There is work for a space whose turn has passed.
    again: bool,
    crash: fn(CrashPoint),
    stats: Stats,
    now: Nanos,
}

impl<'m, S: PageStore> Core<'m, S> {
    /// A core with nothing to serve; the memory must be zero.
    ///
    /// # Errors
    /// [`MapError::Full`] if the map has no room at all.
    pub fn create(memory: Memory<'m>, store: S, config: Config) -> Result<Self, MapError> {
        let map = Map::create(memory.map)?;
        Ok(Self::with_map(map, memory, store, config))
    }

    fn with_map(map: Map<'m>, memory: Memory<'m>, store: S, config: Config) -> Self {
        assert!(
            usize::from(config.frames) >= 2 * BATCH_PAGES + 2,
            "frames for a batch, its second read and a fetch"
        );
        assert!(
            config.large_drop_bytes >= PAGE_BYTES,
            "a request of ours is within a page"
        );
        Self {
            map,
            journal: Journal::open(memory.journal),
            notes: Notes::open(memory.notes),
            store,
            frames: Frames::new(config.frames),
            spaces: (0..SPACES).map(|_| None).collect(),
            ready: VecDeque::with_capacity(FAULTS),
            held: VecDeque::with_capacity(FAULTS),
            held_since: Nanos(0),
            install: None,
            errands: VecDeque::with_capacity(1024),
            orphans: VecDeque::with_capacity(usize::from(config.frames)),
            gone: 0,
            replays: false,
            orphan_ticket: None,
            orphans_rest_until: Nanos(0),
            orphans_rest_ns: 0,
            pageout: Vec::with_capacity(BATCH_PAGES * 8),
            graves: VecDeque::with_capacity(GRAVES),
            doing: Doing::Nothing,
            asking: None,
            tickets: 0,
            budget_bytes: config.budget_bytes,
            tracked_pages: config.tracked_pages,
            childhood: config.childhood,
            large_drop_bytes: config.large_drop_bytes,
            restless_ns: config.restless_ns,
            turn: 0,
            again: false,
            crash: config.crash,
            stats: Stats::default(),
            now: Nanos(0),
        }
    }

    /// Takes on an address space; `owner_word` is kept in the map for a successor.
    ///
    /// # Errors
    /// No room for it.
    pub fn add_space(&mut self, owner_word: u64) -> Result<SpaceId, MapError> {
        let id = self.map.begin_space(None, owner_word)?;
        self.map.activate(id);
        self.spaces[usize::from(id.0)] = Some(Box::new(Space::new(id, true, self.tracked_pages)));
        self.stats.spaces += 1;
        Ok(id)
    }

    /// The counters.
    #[must_use]
    pub fn stats(&self) -> &Stats {
        &self.stats
    }

    /// Goes on counting where a predecessor stopped.
    pub fn set_stats(&mut self, stats: Stats) {
        self.stats = stats;
    }

    /// The map, to read.
    #[must_use]
    pub fn map(&self) -> &Map<'m> {
        &self.map
    }

    /// The store.
    pub fn store(&mut self) -> &mut S {
        &mut self.store
    }

    /// The words that [`Op::ReadEvents`] reads messages into.
    #[must_use]
    pub fn journal_slots(&self) -> Words<'m> {
        self.journal.slots()
    }

    /// The ranges of [`Op::Pageout`].
    #[must_use]
    pub fn pageout_ranges(&self) -> &[AddrRange] {
        &self.pageout
    }

    /// Pageable bytes in RAM now, all spaces together.
    #[must_use]
    pub fn usage_bytes(&self) -> u64 {
        self.spaces.iter().flatten().map(|s| s.usage_bytes).sum()
    }

    /// Faults that wait for something (a batch, a transfer, room).
    #[must_use]
    pub fn faults_waiting(&self) -> usize {
        self.ready.len() + self.held.len() + usize::from(self.install.is_some())
    }

    /// Spaces that are served.
    #[must_use]
    pub fn spaces_alive(&self) -> usize {
        self.spaces.iter().flatten().count()
    }

    /// Whether pages of a space are in the store alone.
    #[must_use]
    pub fn is_away(&self, space: SpaceId) -> bool {
        let (mut at, end) = (SubpageIndex(0), USER_END.subpage());
        while let Some((found, entry)) = self.map.next_in(space, at, end) {
            if matches!(entry, Entry::Stored(_)) {
                return true;
            }
            at = SubpageIndex(found.0 + 1);
        }
        false
    }

    /// The registered mappings of a space, as believed.
    pub fn regions(&self, space: SpaceId) -> impl Iterator<Item = AddrRange> + '_ {
        self.space_ref(space)
            .into_iter()
            .flat_map(|s| s.regions.iter())
    }

    fn space(&mut self, id: SpaceId) -> Option<&mut Space> {
        self.spaces.get_mut(usize::from(id.0))?.as_deref_mut()
    }

    fn space_ref(&self, id: SpaceId) -> Option<&Space> {
        self.spaces.get(usize::from(id.0))?.as_deref()
    }

    fn crash(&self, point: CrashPoint) {
        (self.crash)(point);
    }

    fn new_ticket(&mut self) -> Ticket {
        self.tickets += 1;
        Ticket(self.tickets)
    }

    /// Gives back what an entry held.
    fn release(&mut self, old: Entry) {
        match old {
            Entry::Stored(l) => self.store.release(l),
            Entry::Staged(f, _) => self.frames.drop_hold(f),
            Entry::Nothing | Entry::Dropping(_) => {}
        }
    }

    /// Replaces an entry and gives back what it held. If there is no room, what the new one holds is given back,
    /// and the process is stopped.
    fn set_entry(&mut self, space: SpaceId, at: SubpageIndex, new: Entry) {
        match self.map.replace(space, at, new) {
            Ok(old) => self.release(old),
            Err(_) => {
                self.release(new);
                self.no_room(space);
            }
        }
    }

    /// The map has no room for what belongs to this space. That is written down: a successor would take what
    /// there is for all.
    fn no_room(&mut self, id: SpaceId) {
        if self.map.state(id) == SlotState::Active {
            self.map.doom(id);
        }
        self.stop(id, StopReason::TooLarge);
    }

    fn stop(&mut self, id: SpaceId, why: StopReason) {
        if let Some(s) = self.space(id) {
            if s.life != Life::Over {
                s.life = Life::Over;
                self.errands.push_back(Op::Stop { space: id, why });
            }
        }
    }

    /// Decides waiting faults again.
    fn unhold(&mut self) {
        while let Some(f) = self.held.pop_front() {
            self.ready.push_back(f);
        }
    }

    fn hold(&mut self, fault: Fault) {
        if self.held.is_empty() {
            self.held_since = self.now;
        }
        self.held.push_back(fault);
    }

    /// An ioctl said that events are pending.
    fn events_pending(&mut self, id: SpaceId) {
        self.stats.decided_again += 1;
        let now = self.now;
        let Some(s) = self.space(id) else { return };
        s.drain = true;
        s.said_pending = true;
        let since = *s.restless_since.get_or_insert(now);
        let detaches = s.life == Life::Detaching;
        if now < since.after(self.restless_ns) {
            return;
        }
        let is_full = self.usage_bytes() > self.high_bytes();
        if detaches || is_full || self.held.iter().any(|fault| fault.space == id) {
            self.calm_down(id);
        }
    }

    /// Threads that change mappings without a pause leave no moment for anything else: they are made to pause.
    fn calm_down(&mut self, id: SpaceId) {
        let now = self.now;
        if let Some(count) = self.space(id).and_then(|s| s.ask_quiesce(now)) {
            self.errands.push_back(Op::NeedQuiesce {
                space: id,
                count,
                for_calm: true,
            });
        }
    }

    fn progressed(&mut self, id: SpaceId) {
        self.settled(id);
        self.child_settled(id);
        if let Some(s) = self.space(id) {
            s.backoff_ns = 0;
            s.restless_since = None;
        }
    }

    fn note_peak(&mut self) {
        self.stats.usage_peak_bytes = self.stats.usage_peak_bytes.max(self.usage_bytes());
    }

    /// Forgets what the map says of a range.
    fn forget_range(&mut self, space: SpaceId, range: AddrRange) {
        let end = range.end_subpage();
        let mut at = range.start.subpage();
        while let Some((found, _)) = self.map.next_in(space, at, end) {
            self.set_entry(space, found, Entry::Nothing);
            at = SubpageIndex(found.0 + 1);
        }
    }

    /// As [`forget_range`](Self::forget_range), but not that the process is dropping something.
    fn forget_bytes(&mut self, space: SpaceId, range: AddrRange) {
        let end = range.end_subpage();
        let mut at = range.start.subpage();
        while let Some((found, entry)) = self.map.next_in(space, at, end) {
            if entry.has_bytes() {
                self.set_entry(space, found, Entry::Nothing);
            }
            at = SubpageIndex(found.0 + 1);
        }
    }

    fn end_space(&mut self, id: SpaceId, detached: bool) {
        let Some(mut s) = self
            .spaces
            .get_mut(usize::from(id.0))
            .and_then(Option::take)
        else {
            return;
        };
        self.release_children(id);
        let mut batch = s.batch.take();
        if let Some(b) = batch.as_mut() {
            self.leave_hits(id, b);
        }
        if self.install.as_ref().is_some_and(|i| i.fault.space == id) {
            if let Some(f) = self.install.take().and_then(|i| i.frame) {
                self.frames.drop_hold(f);
            }
        }
        self.notes.clear(id);
        self.notes.set_left(id, &[]);
        self.notes.set_doubts(id, &[]);
        self.notes.set_hits(id, std::iter::empty());
        self.notes.set_large_drop(id, false);
        self.clear_graves(|g| g.space == id);
        let (store, frames) = (&mut self.store, &mut self.frames);
        self.map.end_space(id, |e| match e {
            Entry::Stored(l) => store.release(l),
            Entry::Staged(f, _) => frames.drop_hold(f),
            Entry::Nothing | Entry::Dropping(_) => {}
        });
        for f in batch.iter().flat_map(Batch::frames) {
            self.leave_frame(f);
        }
        self.ready.retain(|f| f.space != id);
        self.held.retain(|f| f.space != id);
        // What it shared is others' alone now, and can go.
        let now = self.now;
        for s in self.spaces.iter_mut().flatten() {
            s.end_rest(now);
        }
        self.errands.push_back(Op::Closed {
            space: id,
            detached,
        });
        self.unhold();
    }

    /// Asks every fault of a space to be raised again, also where nothing is mapped any more: an unmap
    /// or a move wakes nobody who waits there.
    fn wake_all(&mut self, id: SpaceId) {
        self.errands.push_back(Op::Wake {
            space: id,
            range: EVERYWHERE,
        });
    }

    /// The kernel says that the address space is gone.
    fn gone(&mut self, id: SpaceId) {
        self.end_space(id, false);
    }
}
