//! The real world behind the core: its operations as kernel calls on live processes.
//!
//! Runs on the serving thread. It opens nothing, writes no stream, waits for nothing but the kernel calls
//! themselves; what takes longer is passed to the control thread as an [`Errand`].

use std::collections::VecDeque;
use std::os::fd::{AsFd, AsRawFd};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Barrier, Mutex};

use holo_proto::{
    AddrRange, PAGE_LEN, PageIndex, SUBPAGE_BYTES, SUBPAGE_LEN, SpaceId, SubpageMask,
};

use crate::core::{
    Advice, EVENT_WORDS, Event, FrameId, HEADS, Heads, Input, NEVER_RAN, Nanos, Op, Outcome,
    PageLook, PageSet, SPACES, Source, StopReason, Words,
};
use crate::drive::World;
use crate::store::api::{PageBytes, Ticket};
use crate::sys::advise::{PidFd, pageout};
use crate::sys::arena::SharedBytes;
use crate::sys::errors::{MemError, UffdError};
use crate::sys::maps::ProcMaps;
use crate::sys::mem::TargetMem;
use crate::sys::notify::Bell;
use crate::sys::pagemap::{Pagemap, PresentRun};
use crate::sys::procfs::{self, PinCount, Tasks};
use crate::sys::ring::{self, AdviceRing};
use crate::sys::spawn::PollSet;
use crate::sys::uffd::{CopyMode, Uffd};
use crate::sys::{clock, spawn, table};

/// Robust-list heads remembered a process.
const HEADS_SEEN: usize = 65536;
/// Between two looks at the descriptors while operations go on, nanoseconds.
const LOOK_EVERY_NS: u64 = 20_000;
/// Descriptors in one look.
const AT_ONCE: usize = 64;
/// Room of the queues between the threads.
const QUEUE: usize = 4096;

static ZEROS: PageBytes = [0; PAGE_LEN];

/// What the serving thread passes to the control thread.
pub(crate) enum Errand {
    /// A space was taken on.
    Added {
        space: SpaceId,
        pid: i32,
    },
    /// No space could be made.
    Refused {
        pid: i32,
        target: Box<Target>,
    },
    NeedRing(SpaceId),
    /// What was opened by a process id is about a thread that has ended.
    PartsLost(SpaceId),
    NeedQuiesce {
        space: SpaceId,
        count: u64,
        for_calm: bool,
    },
    /// With the numbers of its memory and its pagemap: what closes them comes to the control thread later than this.
    NeedRedirty {
        space: SpaceId,
        mem: i32,
        pagemap: i32,
        page: PageIndex,
        mask: SubpageMask,
        ticket: Ticket,
    },
    Child {
        parent: SpaceId,
        space: SpaceId,
        uffd: i32,
    },
    /// A thread of a process that is not known waits for a page.
    Waits {
        space: SpaceId,
        thread: u32,
    },
    Stop {
        space: SpaceId,
        why: StopReason,
    },
    /// A space is over; its things are to be closed by this thread, not by the serving one.
    Closed {
        space: SpaceId,
        detached: bool,
        target: Box<Target>,
    },
    /// Replaced parts, to be dropped.
    Drop(Parts),
    /// A lost ring is done with: it is to be closed.
    RingGone {
        space: SpaceId,
        ring: Option<Box<AdviceRing>>,
    },
}

/// What the control thread passes to the serving thread.
#[expect(
    clippy::large_enum_variant,
    reason = "boxing an input would free memory on the serving thread"
)]
pub(crate) enum Command {
    Input(Input),
    /// Serve a new process.
    Add {
        pid: i32,
        target: Box<Target>,
    },
    /// A fork's child is known.
    Parts {
        space: SpaceId,
        parts: Parts,
    },
    Ring {
        space: SpaceId,
        ring: Box<AdviceRing>,
    },
    /// The process in which the space's ring was made, if any, has ended, and its threads with it.
    RingLost(SpaceId),
    /// Do nothing, hold nothing: from one wait there to the next.
    Rest(Arc<Barrier>),
    /// End the loop.
    Finish,
}

/// A bounded queue between the two threads, with a bell. Its lock is held for a push or pop only.
pub(crate) struct Queue<T> {
    items: Mutex<VecDeque<T>>,
    pub(crate) bell: Bell,
}

impl<T> Queue<T> {
    pub(crate) fn new() -> std::io::Result<Self> {
        Ok(Self {
            items: Mutex::new(VecDeque::with_capacity(QUEUE)),
            bell: Bell::new()?,
        })
    }

    /// Adds an item; gives it back when the queue is full.
    pub(crate) fn push(&self, item: T) -> Result<(), T> {
        match self.items.lock() {
            Ok(mut q) if q.len() < QUEUE => q.push_back(item),
            _ => return Err(item),
        }
        self.bell.ring();
        Ok(())
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.items.lock().is_ok_and(|q| q.is_empty())
    }

    pub(crate) fn pop(&self) -> Option<T> {
        self.items.lock().ok()?.pop_front()
    }
}

/// The parts of a target that need its process id.
pub(crate) struct Parts {
    pub(crate) pidfd: PidFd,
    pub(crate) mem: TargetMem,
    pub(crate) pagemap: Pagemap,
    pub(crate) maps: ProcMaps,
    pub(crate) tasks: Tasks,
    pub(crate) pins: PinCount,
}

/// One process as the serving thread holds it.
pub(crate) struct Target {
    pub(crate) uffd: Uffd,
    /// Absent while a fork's child is not identified.
    pub(crate) parts: Option<Parts>,
    ring: Option<Box<AdviceRing>>,
    told: Told,
    heads_seen: PageSet,
}

/// What of a ring the core was told last, which is still in it.
#[derive(Default)]
enum Told {
    #[default]
    Nothing,
    /// A request ended.
    Result,
    /// A request will never run.
    Stranded,
}

impl Target {
    pub(crate) fn new(uffd: Uffd, parts: Option<Parts>, ring: Option<Box<AdviceRing>>) -> Self {
        Self {
            uffd,
            parts,
            ring,
            told: Told::Nothing,
            heads_seen: PageSet::new(HEADS_SEEN),
        }
    }

    pub(crate) fn set_ring(&mut self, ring: Box<AdviceRing>) {
        (self.ring, self.told) = (Some(ring), Told::Nothing);
    }

    /// Of which messages just read nothing is mapped any more in the range that they are about: `gone` of
    /// [`Outcome::Events`]. Asked at once, before whoever waited for the reading can have come far.
    fn gone(&self, journal: Words<'_>, count: usize) -> u64 {
        let Some(parts) = &self.parts else { return 0 };
        let is_hole = |range: AddrRange| match parts.maps.find(range.start) {
            Ok(Some(next)) => next.range.start >= range.end,
            Ok(None) => true,
            Err(_) => false,
        };
        events(journal, count)
            .enumerate()
            .fold(0, |gone, (i, event)| {
                let left = event.and_then(Event::left);
                gone | u64::from(left.is_some_and(is_hole)) << i
            })
    }
}

/// The first messages of the journal; `None` for one that means nothing here.
fn events(journal: Words<'_>, count: usize) -> impl Iterator<Item = Option<Event>> {
    let messages = journal.chunks_exact(EVENT_WORDS).take(count);
    messages.map(|words| Event::decode([0, 1, 2, 3].map(|k| words[k].load(Ordering::Acquire))))
}

/// The world of the serving thread.
pub(crate) struct Live {
    pub(crate) targets: Vec<Option<Box<Target>>>,
    frames: SharedBytes,
    journal: Words<'static>,
    pub(crate) errands: Arc<Queue<Errand>>,
    /// Errands for which the queue had no room.
    backlog: VecDeque<Errand>,
    /// Number of the socket to who keeps descriptors (see `keepers.rs`).
    keepers: Option<i32>,
    looked_ns: u64,
    turn: usize,
    /// Rings that a predecessor left: nothing is taken from them until they are quiet.
    pub(crate) quiet_wait: [bool; SPACES],
    /// Rings that carry out nothing more.
    pub(crate) lost: [bool; SPACES],
}

impl Live {
    pub(crate) fn new(
        frames: SharedBytes,
        journal: Words<'static>,
        errands: Arc<Queue<Errand>>,
        keepers: Option<i32>,
    ) -> Self {
        Self {
            keepers,
            targets: (0..SPACES).map(|_| None).collect(),
            frames,
            journal,
            errands,
            backlog: VecDeque::with_capacity(QUEUE),
            looked_ns: 0,
            turn: 0,
            quiet_wait: [false; SPACES],
            lost: [false; SPACES],
        }
    }

    fn target(&mut self, id: SpaceId) -> Option<&mut Target> {
        self.targets.get_mut(usize::from(id.0))?.as_deref_mut()
    }

    /// Has a fork child's userfaultfd kept by `holo-exec`. Where that has no room, or has ended, we go on without.
    pub(crate) fn have_kept(&self, number: i32) {
        if let Some(socket) = self.keepers {
            let _ = table::send(socket, number);
        }
    }

    /// The same for each fork child among the messages that were read just now: it runs already. A successor does it for
    /// all that it takes over.
    fn have_children_kept(&self, count: usize) {
        for event in events(self.journal, count) {
            if let Some(Event::Fork { fd }) = event {
                if let Ok(number) = i32::try_from(fd) {
                    self.have_kept(number);
                }
            }
        }
    }

    pub(crate) fn errand(&mut self, errand: Errand) {
        self.backlog.push_back(errand);
        self.flush_errands();
    }

    /// Tries to pass on what the queue had no room for.
    pub(crate) fn flush_errands(&mut self) {
        while let Some(e) = self.backlog.pop_front() {
            if let Err(e) = self.errands.push(e) {
                self.backlog.push_front(e);
                return;
            }
        }
    }

    /// Descriptors that tell of something, with the space of each.
    pub(crate) fn descriptors(&self, fds: &mut PollSet, spaces: &mut Vec<SpaceId>) {
        for (i, t) in self.targets.iter().enumerate() {
            if let (Some(t), Ok(i)) = (t, u16::try_from(i)) {
                fds.push(t.uffd.as_raw_fd());
                spaces.push(SpaceId(i));
            }
        }
    }

    /// Some ring has requests that have not ended.
    pub(crate) fn rings_busy(&self) -> bool {
        self.targets
            .iter()
            .flatten()
            .filter_map(|t| t.ring.as_ref())
            .any(|r| r.outstanding() > 0)
    }

    fn poll_rings(&mut self) -> Option<Input> {
        (0..SPACES).find_map(|i| self.poll_ring(i))
    }

    fn poll_ring(&mut self, i: usize) -> Option<Input> {
        let space = SpaceId(u16::try_from(i).ok()?);
        let target = self.targets[i].as_mut()?;
        let (quiet_wait, lost) = (self.quiet_wait[i], self.lost[i]);
        let mut outstanding = 0;
        if let Some(ring) = target.ring.as_mut() {
            // What was told of last has been heard: until then a successor would find it again.
            match std::mem::take(&mut target.told) {
                Told::Nothing => {}
                Told::Result => ring.consume(),
                Told::Stranded => ring.take_back(),
            }
            while let Some(done) = ring.peek() {
                // Of what a predecessor asked for it wants to know what failed.
                if quiet_wait && done.result >= 0 {
                    ring.consume();
                } else {
                    target.told = Told::Result;
                    return Some(Input::RingDone {
                        space,
                        tag: done.tag,
                        result: done.result,
                    });
                }
            }
            // Its thread ended after it had seen every request that it had begun to its end.
            if let Some(tag) = lost.then(|| ring.stranded()).flatten() {
                let result = NEVER_RAN;
                target.told = Told::Stranded;
                return Some(Input::RingDone { space, tag, result });
            }
            outstanding = ring.outstanding();
        }
        if outstanding > 0 {
            return None;
        }
        if quiet_wait {
            self.quiet_wait[i] = false;
            // Without a ring there was nothing to wait for, and there is none to go on with.
            self.lost[i] |= target.ring.is_none();
            let requests = target.ring.as_ref().map(|r| r.submitted());
            return Some(Input::RingQuiet { space, requests });
        }
        if lost {
            self.lost[i] = false;
            let ring = target.ring.take();
            self.errand(Errand::RingGone { space, ring });
            return Some(Input::RingLost(space));
        }
        None
    }

    /// A descriptor that can be read, looked for at most every [`LOOK_EVERY_NS`].
    fn poll_descriptors(&mut self) -> Option<Input> {
        if clock::monotonic_ns() < self.looked_ns + LOOK_EVERY_NS {
            return None;
        }
        // In one call: one for each of many took longer than a list of threads is good for.
        let mut fds = [-1; AT_ONCE];
        let mut spaces = [0; AT_ONCE];
        let mut count = 0;
        let held = (0..SPACES)
            .map(|k| (self.turn + k) % SPACES)
            .filter_map(|i| Some((i, self.targets[i].as_ref()?)));
        for (i, target) in held.take(AT_ONCE) {
            fds[count] = target.uffd.as_raw_fd();
            spaces[count] = i;
            count += 1;
        }
        let ready = spawn::poll_readable(&fds[..count], Some(0));
        // From the end of the look on: one that took long must not be followed by another, and another.
        self.looked_ns = clock::monotonic_ns();
        let found = (0..count).find(|k| ready >> k & 1 == 1);
        // Where nothing is to be heard the next look begins behind this one's last.
        let last = found.or_else(|| count.checked_sub(1))?;
        self.turn = spaces[last] + 1;
        u16::try_from(spaces[found?])
            .ok()
            .map(|n| Input::Readable(SpaceId(n)))
    }

    fn copy(&mut self, op: &Op) -> Option<Outcome> {
        let Op::Copy {
            space,
            at,
            source,
            subpages,
        } = *op
        else {
            return None;
        };
        let len = subpages * SUBPAGE_LEN;
        let bytes = match source {
            Source::Zeros => &ZEROS[..len],
            Source::Frame(f, first) => {
                let offset = usize::from(f.0) * PAGE_LEN + first * SUBPAGE_LEN;
                self.frames.slice(offset, len)
            }
        };
        let target = self.targets.get(usize::from(space.0))?.as_ref()?;
        let mode = CopyMode {
            wake: false,
            protect: false,
        };
        Some(answer(target.uffd.copy(at.start(), bytes, mode)))
    }

    fn read(&mut self, op: &Op) -> Option<Outcome> {
        let Op::Read {
            space,
            at,
            subpages,
            frame,
            first,
        } = *op
        else {
            return None;
        };
        let offset = usize::from(frame.0) * PAGE_LEN + first * SUBPAGE_LEN;
        let target = self.targets.get(usize::from(space.0))?.as_ref()?;
        let out = self.frames.slice_mut(offset, subpages * SUBPAGE_LEN);
        Some(match target.parts.as_ref()?.mem.read(at.start(), out) {
            Ok(bytes) => Outcome::Subpages(bytes / SUBPAGE_LEN),
            Err(MemError::NotResident) => Outcome::Subpages(0),
            Err(MemError::Gone) => Outcome::Gone,
            Err(MemError::Denied) => Outcome::Refused(libc::EPERM),
            Err(MemError::Unexpected(errno, _)) => Outcome::Refused(errno),
        })
    }

    /// Registers the mappings that `range` lies in, whole.
    ///
    /// The range was read some time ago. What is there by now may be larger, or begin elsewhere; a
    /// registration of a part splits it, and an mremap of the whole, which is right without us, fails until the
    /// rest is registered. So the kernel is asked once more. What changes between that answer and the
    /// registration cannot be told afterwards: the other half of a split looks like a neighbour that was
    /// a mapping of its own. The next scan registers it.
    fn register(&mut self, space: SpaceId, range: AddrRange) -> Option<Outcome> {
        let target = self.target(space)?;
        let whole = match target.parts.as_ref().map(|p| p.maps.plain_around(range)) {
            Some(Ok(Some(whole))) => whole,
            // Gone, or something else by now, if only in part.
            Some(Ok(None)) => return Some(Outcome::Edge),
            // The process is not known yet, or the kernel cannot tell. Of an address space that is gone
            // the descriptor says so itself: the parts may be of the one that came after it.
            None | Some(Err(_)) => range,
        };
        Some(answer(target.uffd.register(whole)))
    }

    fn find_present(&mut self, space: SpaceId, range: AddrRange) -> Option<Outcome> {
        let pagemap = &self.target(space)?.parts.as_ref()?.pagemap;
        let mut at = range.start;
        while at < range.end {
            let mut runs = [PresentRun::default(); 16];
            let rest = AddrRange { start: at, ..range };
            let Ok((count, walked_to)) = pagemap.scan_present(rest, &mut runs) else {
                return Some(Outcome::Gone);
            };
            let wanted = |r: &&PresentRun| !r.zero() && !r.file_or_shared();
            if let Some(run) = runs[..count].iter().find(wanted) {
                return Some(Outcome::Found(Some(run.range())));
            }
            if walked_to <= at {
                break;
            }
            at = walked_to;
        }
        Some(Outcome::Found(None))
    }

    fn heads(&mut self, space: SpaceId, anew: bool) -> Option<Outcome> {
        let target = self.target(space)?;
        let mut heads = Heads {
            at: [holo_proto::Addr(0); HEADS],
            len: 0,
            more: false,
        };
        let (parts, seen) = (target.parts.as_mut()?, &mut target.heads_seen);
        // Stacks that are mapped ever elsewhere fill it in the end.
        if anew || seen.is_full() {
            seen.clear();
        }
        let listed = parts.tasks.for_each(|tid| {
            if heads.len == HEADS {
                heads.more = true;
                return;
            }
            if let Ok(Some(head)) = procfs::robust_list_of(tid) {
                // Heads are 8-byte aligned words; the set's keys are page numbers by type only.
                if seen.insert(PageIndex(head.0 / 8)) {
                    heads.at[heads.len] = head;
                    heads.len += 1;
                }
            }
        });
        Some(match listed {
            Ok(()) if !seen.is_full() => Outcome::Heads(heads),
            Ok(()) => Outcome::Refused(libc::ENOSPC),
            // The process has ended; its address space may live on in another one.
            Err(_) => Outcome::Refused(libc::ESRCH),
        })
    }

    /// `None`: the target, or what is needed of it, is not there.
    fn try_perform(&mut self, op: &Op, pageout_ranges: &[AddrRange]) -> Option<Outcome> {
        Some(match *op {
            Op::ReadEvents { space } => {
                let journal = self.journal;
                let target = self.target(space)?;
                match target.uffd.read_events(journal) {
                    Ok(count) => {
                        let gone = target.gone(journal, count);
                        self.have_children_kept(count);
                        // Whoever was woken may have more to tell at once: first comes what is to be done of this.
                        self.looked_ns = clock::monotonic_ns();
                        Outcome::Events { count, gone }
                    }
                    Err(e) => answer(Err(e)),
                }
            }
            Op::Copy { .. } => return self.copy(op),
            Op::Read { .. } => return self.read(op),
            Op::Zero { space, range } => answer(self.target(space)?.uffd.zero(range, false)),
            Op::Protect { space, range } => answer(self.target(space)?.uffd.protect(range)),
            Op::Unprotect { space, range } => {
                answer(self.target(space)?.uffd.unprotect(range, true))
            }
            Op::Wake { space, range } => answer(self.target(space)?.uffd.wake(range)),
            Op::Register { space, range } => return self.register(space, range),
            Op::Unregister { space, range } => answer(self.target(space)?.uffd.unregister(range)),
            Op::Compare { a, b, mask } => {
                let offset = |f: FrameId, i| usize::from(f.0) * PAGE_LEN + i * 4096;
                let differs = |&i: &usize| {
                    self.frames.slice(offset(a, i), 4096) != self.frames.slice(offset(b, i), 4096)
                };
                Outcome::Mask(
                    mask.iter()
                        .filter(differs)
                        .fold(SubpageMask::NONE, |m, i| m.with(i)),
                )
            }
            Op::Advise {
                space,
                advice,
                range,
                tag,
            } => {
                let advice = match advice {
                    Advice::Free => ring::Advice::Free,
                    Advice::Populate => ring::Advice::PopulateWrite,
                };
                match self
                    .target(space)?
                    .ring
                    .as_mut()?
                    .submit(range, advice, tag)
                {
                    Ok(()) => Outcome::Done,
                    Err(_) => Outcome::Full,
                }
            }
            Op::Kick { space } => {
                // A dead poller means a dying process: its exit is heard of elsewhere.
                let _ = self.target(space)?.ring.as_ref()?.wake_if_needed();
                Outcome::Done
            }
            Op::Pageout { space } => {
                let pidfd = &self.target(space)?.parts.as_ref()?.pidfd;
                // Whatever it says, the pagemap is looked at next.
                for ranges in pageout_ranges.chunks(crate::sys::advise::RANGES_PER_CALL) {
                    let _ = pageout(pidfd, ranges);
                }
                Outcome::Done
            }
            Op::Look { space, page } => {
                let pagemap = &self.target(space)?.parts.as_ref()?.pagemap;
                match pagemap.look_page(page) {
                    Ok(l) => Outcome::Look(PageLook {
                        present: l.present,
                        zero: l.zero,
                        swapped: l.swapped,
                        file: l.file_or_shared,
                        exclusive: l.exclusive,
                    }),
                    Err(_) => Outcome::Gone,
                }
            }
            Op::FindPresent { space, range } => return self.find_present(space, range),
            Op::Threads { space, anew } => return self.heads(space, anew),
            Op::Pins { space } => {
                let pins = &self.target(space)?.parts.as_ref()?.pins;
                let Ok(bytes) = pins.bytes() else {
                    // The thread that we asked has ended; another one may live.
                    self.errand(Errand::PartsLost(space));
                    return Some(Outcome::Pinned(u64::MAX));
                };
                Outcome::Pinned(bytes)
            }
            Op::NeedRing { space } => {
                self.errand(Errand::NeedRing(space));
                Outcome::Done
            }
            Op::NeedQuiesce {
                space,
                count,
                for_calm,
            } => {
                self.errand(Errand::NeedQuiesce {
                    space,
                    count,
                    for_calm,
                });
                Outcome::Done
            }
            Op::NeedRedirty {
                space,
                page,
                mask,
                ticket,
            } => {
                let parts = self.target(space)?.parts.as_ref()?;
                let (mem, pagemap) = (parts.mem.as_fd(), parts.pagemap.as_fd());
                let (mem, pagemap) = (mem.as_raw_fd(), pagemap.as_raw_fd());
                self.errand(Errand::NeedRedirty {
                    space,
                    mem,
                    pagemap,
                    page,
                    mask,
                    ticket,
                });
                Outcome::Done
            }
            Op::Child { parent, space, fd } => {
                let uffd = i32::try_from(fd).ok()?;
                if self.target(space).is_none() {
                    let owned = table::claim(uffd)?;
                    let target = Target::new(Uffd::from_owned(owned), None, None);
                    self.targets[usize::from(space.0)] = Some(Box::new(target));
                }
                self.errand(Errand::Child {
                    parent,
                    space,
                    uffd,
                });
                Outcome::Done
            }
            Op::Waits { space, thread } => {
                self.errand(Errand::Waits { space, thread });
                Outcome::Done
            }
            Op::Closed { space, detached } => {
                let target = self.targets.get_mut(usize::from(space.0))?.take()?;
                self.errand(Errand::Closed {
                    space,
                    detached,
                    target,
                });
                Outcome::Done
            }
            Op::Stop { space, why } => {
                self.errand(Errand::Stop { space, why });
                Outcome::Done
            }
            Op::Put { .. } | Op::Get { .. } => Outcome::Done, // the driver's
        })
    }
}

/// What a userfaultfd call came to, in the core's words.
fn answer(result: Result<(), UffdError>) -> Outcome {
    match result {
        Ok(()) => Outcome::Done,
        Err(UffdError::Gone) => Outcome::Gone,
        Err(UffdError::EventsPending) => Outcome::EventsPending,
        Err(UffdError::EdgeOfMapping) => Outcome::Edge,
        Err(UffdError::AlreadyThere) => Outcome::AlreadyThere,
        Err(UffdError::Partial(bytes)) => {
            Outcome::Partial(usize::try_from(bytes / SUBPAGE_BYTES).unwrap_or(0))
        }
        Err(UffdError::NoMemory) => Outcome::NoMemory,
        Err(UffdError::Busy) => Outcome::Refused(libc::EBUSY),
        Err(UffdError::Denied) => Outcome::Refused(libc::EPERM),
        Err(UffdError::Unsupported) => Outcome::Refused(libc::EINVAL),
        Err(UffdError::Unexpected(errno, _)) => Outcome::Refused(errno),
    }
}

impl World for Live {
    fn now(&mut self) -> Nanos {
        Nanos(clock::monotonic_ns())
    }

    fn perform(&mut self, op: &Op, pageout: &[AddrRange]) -> Outcome {
        self.try_perform(op, pageout).unwrap_or(match op {
            Op::ReadEvents { .. } => Outcome::Events { count: 0, gone: 0 },
            // Whatever it was, there is nothing to do it to.
            _ => Outcome::Refused(libc::ENODEV),
        })
    }

    fn frame(&mut self, frame: FrameId) -> &mut PageBytes {
        let offset = usize::from(frame.0) * PAGE_LEN;
        self.frames
            .slice_mut(offset, PAGE_LEN)
            .try_into()
            .expect("a slice of a page's length")
    }

    fn poll(&mut self) -> Option<Input> {
        self.poll_rings().or_else(|| self.poll_descriptors())
    }
}
