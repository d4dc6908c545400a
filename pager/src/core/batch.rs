//! Eviction, a batch of pages at a time.
//!
//! ```text
//! Select -> Threads -> Protect -> Read -> Queue -> Wait -> Reread -> Unprotect -> Repair -> Put -> Pageout -> Look
//!                      |<------------- a write to these pages waits ----------->|
//! ```
//!
//! - *Threads* comes right before *Protect*, and again if the process has done something meanwhile: what the kernel
//!   writes when a thread ends must be neither gone nor protected, and a new thread may live for some 50 us only.
//! - *Read* stages the bytes in the map before *Queue* lets the kernel drop anything: from then on a
//!   missing fault has its answer, also from a successor.
//! - *Reread* reads once more after `MADV_FREE`: a device may have written (and marked the page dirty)
//!   between the first read and the FREE, which forgot that mark. What it writes later marks the page
//!   again, and the kernel keeps it.
//! - *Repair* undoes a FREE that hit what the process had put in the page's place meanwhile.
//! - *Put* happens while the page may still be in memory; `MADV_PAGEOUT` only after it is durable.
//! - *Look* learns what the kernel decided. A page that stayed is made dirty and its stored bytes are
//!   forgotten ([`restore`](super::restore)): if it stayed clean, since something held it, the kernel could
//!   drop it at any later time, and a write that marks nothing (io_uring into a registered buffer) with it.

use holo_proto::{
    Addr, AddrRange, PAGE_BYTES, PageIndex, SUBPAGE_BYTES, SpaceId, SubpageIndex, SubpageMask,
};

use super::note::{Heard, Notes};
use super::op::Heads;
use super::restore::TAG;
use super::space::{Life, Ring, Space};
use super::{
    ANYWHERE, Advice, BATCH_PAGES, Core, CrashPoint, Entry, FrameId, HOLES, NEVER_RAN,
    NOT_WRITABLE, Nanos, Op, Outcome, StopReason,
};
use crate::store::api::{Locations, PageStore, StoreError, Ticket};

/// A ring that has not answered for so long belongs to a stopped target: others do not wait for it.
const STUCK_NS: u64 = 50_000_000;
/// The same for a fault of the very process, which is not stopped: its ring has only to be scheduled.
const STUCK_RUNNING_NS: u64 = 2_000_000_000;
/// After so many batches that freed nothing, faults no longer wait for room.
const FRUITLESS: u32 = 1;
/// Least time between two full searches for resident pages, nanoseconds; doubled while fruitless.
const SWEEP_NS: u64 = 10_000_000;
/// Rest after a batch that freed nothing, nanoseconds; doubled while fruitless.
const REST_NS: u64 = 2_000_000;
/// So long a list of the threads is good: less than a thread needs to begin, run and end.
const THREADS_NS: u64 = 30_000;
/// On a machine where even the next operation always comes later than that, eviction must go on all the same.
const LATE_LISTS: u32 = 16;
/// Frames without which no batch begins.
pub(super) const FRAMES_LEAST: usize = 4;
/// So often in one page's repair may something be gone again before it is made dirty.
const REFUSALS: u32 = 64;
/// Around an address that the kernel writes with faults forbidden: the rest of the thread's control block.
const CONTROL_BLOCK_BYTES: u64 = 4096;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Select,
    Threads,
    Protect,
    Pins,
    Read,
    Queue,
    Wait,
    /// A successor waits for a predecessor's requests.
    Recover,
    Reread,
    Unprotect,
    Repair,
    RepairWait,
    Put,
    Pageout,
    Look,
}

#[derive(Clone, Debug)]
struct BatchPage {
    page: PageIndex,
    /// The subpages that the batch is about; shrinks as the process drops some.
    mask: SubpageMask,
    /// From the first to the last of the mask as it was at first.
    span: AddrRange,
    frame: Option<FrameId>,
    /// A predecessor's, which the map's entries alone hold now.
    noted: Option<FrameId>,
    /// Unmapped or moved away meanwhile, wholly or in part.
    lost: bool,
    /// The subpages that were.
    left: SubpageMask,
    /// Those that are not there any more, and how many messages said so.
    gone: SubpageMask,
    told: u8,
    /// What else is to be told apart when all messages are read.
    heard: Heard,
    /// A request may have hit what is there now, or it is not certain whose removal was heard.
    repair: bool,
    /// A writer waited for it.
    waiter: bool,
    /// Writes no longer wait.
    open: bool,
    /// The content differed on the second read.
    changed: bool,
    /// Its bytes are in the store.
    durable: bool,
}

/// What a step in progress was, for its completion.
#[derive(Clone, Copy, Debug)]
enum Step {
    None,
    Heads,
    Sweep(AddrRange),
    Look(PageIndex),
    Protect,
    Pins,
    Read { first: usize, count: usize },
    Queue { first: usize, count: usize },
    Kick,
    Reread { first: usize, count: usize },
    Compare,
    Confirm(SubpageMask),
    Unprotect,
    RepairLook,
    RepairQueue { first: usize, count: usize },
    RepairKick,
    RepairLift(SubpageIndex),
    RepairRedirty(SubpageIndex),
    Put,
    Pageout,
    FinalLook,
}

/// The repair of one page: what the process has put in the place of an offered page, or what it is not
/// certain of whether it was dropped, becomes dirty again.
#[derive(Clone, Copy, Debug, Default)]
struct Repair {
    looked: bool,
    /// The ring had no room: nothing more before all requests have ended.
    full: bool,
    /// To be populated.
    left: SubpageMask,
    /// A request over several failed: one by one.
    single: SubpageMask,
    /// Populate does not do it (not writable): through `/proc/PID/mem`, where nobody else can write.
    redirty: SubpageMask,
    /// Of these, the one that a protection was lifted from, which came there with what moved.
    lifted: Option<SubpageIndex>,
    /// How often that was refused: where the page is not there any more, or always.
    refused: u32,
}

/// A batch of pages on their way out of one space.
#[derive(Debug)]
pub(crate) struct Batch {
    phase: Phase,
    step: Step,
    pages: Vec<BatchPage>,
    /// Page of the batch, and subpage of it, that comes next.
    at: usize,
    sub: usize,
    single_steps: bool,
    /// When the threads were listed, unless the process has said something since.
    listed: Option<Nanos>,
    /// Lists in a row that were too old when they could be used.
    late_lists: u32,
    spare: Option<FrameId>,
    reread: SubpageMask,
    /// What was read again differs: is it of the same mapping?
    differs: bool,
    repair: Repair,
    outstanding: usize,
    started: Nanos,
    waiting_since: Nanos,
    ticket: Option<Ticket>,
    freed: u32,
    planned_bytes: u64,
}

impl Batch {
    fn new(now: Nanos) -> Self {
        Self {
            phase: Phase::Select,
            step: Step::None,
            pages: Vec::with_capacity(BATCH_PAGES),
            at: 0,
            sub: 0,
            single_steps: false,
            listed: None,
            late_lists: 0,
            spare: None,
            reread: SubpageMask::NONE,
            differs: false,
            repair: Repair::default(),
            outstanding: 0,
            started: now,
            waiting_since: now,
            ticket: None,
            freed: 0,
            planned_bytes: 0,
        }
    }

    /// A predecessor's batch, as far as its note says.
    pub(crate) fn recovered(notes: &Notes<'_>, id: SpaceId) -> Self {
        let mut b = Self::new(Nanos(0));
        b.phase = Phase::Recover;
        for i in 0..notes.pages(id) {
            let (page, mask) = notes.page(id, i);
            let mut p = BatchPage::new(page, mask, None);
            p.noted = notes.frame(id, i);
            (p.gone, p.told) = notes.gone(id, i);
            p.left = p.gone;
            p.heard = notes.heard(id, i);
            p.mask = notes.queued(id, i).minus(notes.counted(id, i, 2));
            // Whether something else has come to its place is not known any more.
            p.repair = true;
            // Faults wait only for requests that could still hit what answers them; a repair that is on
            // the ring may itself wait for a fault.
            p.open = notes.is_settled(id);
            b.pages.push(p);
        }
        b
    }

    /// Frames that the batch holds.
    pub(crate) fn frames(&self) -> impl Iterator<Item = FrameId> + '_ {
        self.pages.iter().filter_map(|p| p.frame).chain(self.spare)
    }

    /// Requests of ours may be on the ring.
    fn submitted(&self) -> bool {
        matches!(self.phase, Phase::Queue | Phase::Wait | Phase::Recover)
    }

    /// A removal message came. `count` gets each page of the batch with the subpages that our own requests
    /// may explain; of the others the batch forgets those that were dropped. `noted` says of which
    /// subpages of a page a request is on the ring, and what was heard of. A message of ours is about no more than
    /// one request, which goes upwards.
    pub(crate) fn note_removal(
        &mut self,
        range: AddrRange,
        noted: impl Fn(usize) -> (SubpageMask, SubpageMask),
        mut count: impl FnMut(usize, SubpageMask, Heard),
    ) {
        let submitted = self.submitted();
        for (i, p) in self.pages.iter_mut().enumerate() {
            let named = SubpageMask::of_page_in(p.page, range);
            let covered = named.and(p.mask);
            let (queued, heard) = noted(i);
            let within = p.page.range().intersect(range) == range && named.minus(queued).is_empty();
            let ours = if submitted && within {
                covered
            } else {
                SubpageMask::NONE
            };
            p.mask = p.mask.minus(covered.minus(ours));
            if let Some(first) = ours.iter().next() {
                let request = queued.runs().find(|&(at, n)| (at..at + n).contains(&first));
                let before = request.map_or(SubpageMask::NONE, |(at, _)| run_mask(at, first - at));
                let skipped = before.minus(heard);
                // What is told of later was there, for nobody drops what he unmaps at the same time.
                p.heard.skipped = p.heard.skipped.minus(ours);
                if !skipped.is_empty() {
                    p.heard.early = p.heard.early.or(ours);
                    p.heard.skipped = p.heard.skipped.or(skipped);
                }
                count(i, ours, p.heard);
            }
        }
    }

    /// The process dropped these subpages of a page while a request of ours was under way.
    pub(crate) fn dropped(&mut self, i: usize, which: SubpageMask) {
        if let (Some(p), false) = (self.pages.get_mut(i), which.is_empty()) {
            p.mask = p.mask.minus(which);
            // A mapping that was split on the way makes two messages of ours of one: what is still there
            // must not be dropped then. (What is not there any more was dropped by the process, for the
            // kernel seldom reclaims within a window.)
            p.repair = true;
        }
    }

    /// The process has said something, so it may have made threads.
    pub(crate) fn list_again(&mut self) {
        self.listed = None;
    }

    /// The pages in `range` are no longer where they were; `came`: because others have come there.
    pub(crate) fn lose(&mut self, range: AddrRange, came: bool) {
        for p in &mut self.pages {
            let gone = range.intersect(p.span);
            if !gone.is_empty() {
                // As if it were several messages: what has come is no hole.
                p.told = p.told.saturating_add(if came { 2 } else { 1 });
                p.gone = p.gone.or(SubpageMask::of_page_in(p.page, gone));
            }
            if p.page.range().overlaps(range) {
                p.lost = true;
                p.left = p.left.or(SubpageMask::of_page_in(p.page, range));
                if !p.open {
                    p.repair = true;
                }
            }
        }
    }

    /// The process moved pages: what a request may have hit in another's place is repaired where it is now.
    pub(crate) fn chase(&mut self, from: AddrRange, to: Addr) {
        // Before a request is queued there is nothing to repair, and what is noted has room for a batch alone.
        let repairs = matches!(
            self.phase,
            Phase::Queue
                | Phase::Wait
                | Phase::Recover
                | Phase::Reread
                | Phase::Unprotect
                | Phase::Repair
                | Phase::RepairWait
        );
        if !repairs {
            return;
        }
        let repaired = if matches!(self.phase, Phase::Repair | Phase::RepairWait) {
            self.at + 1
        } else {
            0
        };
        let hit: Vec<_> = self
            .pages
            .iter()
            .filter(|p| p.repair)
            .map(|p| p.page.range().intersect(from))
            .filter(|r| !r.is_empty())
            .collect();
        for r in hit {
            let start = to.offset(r.start.0 - from.start.0);
            let end = start.offset(r.len());
            for page in (AddrRange { start, end }).pages() {
                let mut rest = self.pages.iter().skip(repaired);
                let known = rest.any(|p| p.page == page && p.repair);
                // A tag counts pages in eight bits; that many moves do not fit into one window.
                if !known && self.pages.len() < 256 {
                    let mut p = BatchPage::new(page, SubpageMask::NONE, None);
                    p.lost = true;
                    p.repair = true;
                    p.open = true;
                    self.pages.push(p);
                }
            }
        }
    }

    /// Nobody else may lift the protection of this page.
    pub(crate) fn protects(&self, page: PageIndex) -> bool {
        self.in_window() && self.pages.iter().any(|p| p.page == page && !p.open)
    }

    fn in_window(&self) -> bool {
        matches!(
            self.phase,
            Phase::Threads
                | Phase::Protect
                | Phase::Pins
                | Phase::Read
                | Phase::Queue
                | Phase::Wait
                | Phase::Recover
                | Phase::Reread
                | Phase::Unprotect
        )
    }

    fn goto(&mut self, phase: Phase) {
        self.phase = phase;
        self.at = 0;
        self.sub = 0;
        self.single_steps = false;
    }
}

impl BatchPage {
    fn new(page: PageIndex, mask: SubpageMask, frame: Option<FrameId>) -> Self {
        let first = mask.iter().next().unwrap_or(0);
        let last = mask.iter().last().unwrap_or(15);
        Self {
            page,
            mask,
            span: AddrRange {
                start: page.subpage(first).start(),
                end: page.subpage(last).start().offset(SUBPAGE_BYTES),
            },
            frame,
            noted: None,
            lost: false,
            left: SubpageMask::NONE,
            gone: SubpageMask::NONE,
            told: 0,
            heard: Heard::default(),
            repair: false,
            waiter: false,
            open: false,
            changed: false,
            durable: false,
        }
    }

    fn run(&self, first: usize, count: usize) -> AddrRange {
        run(self.page, first, count)
    }
}

/// `count` subpages of a page from its subpage `first` on.
fn run(page: PageIndex, first: usize, count: usize) -> AddrRange {
    let start = page.subpage(first).start();
    AddrRange {
        start,
        end: start.offset(count as u64 * SUBPAGE_BYTES),
    }
}

/// The tag of a request about a run of the batch's page `i`.
fn tag_of(i: usize, first: usize, count: usize) -> u64 {
    (i | first << 8 | count << 16) as u64
}

/// The subpages of a run.
pub(super) fn run_mask(first: usize, count: usize) -> SubpageMask {
    (first..(first + count).min(16)).fold(SubpageMask::NONE, SubpageMask::with)
}

impl Space {
    /// Whether a fault on `page` waits for the batch; a writer is remembered.
    pub(crate) fn batch_holds(&mut self, page: PageIndex, write: bool) -> bool {
        let Some(b) = self.batch.as_mut() else {
            return false;
        };
        if !b.in_window() {
            return false;
        }
        match b.pages.iter_mut().find(|p| p.page == page) {
            Some(p) if !p.open => {
                p.waiter |= write;
                true
            }
            _ => false,
        }
    }
}

/// Whether a request of ours may be what touches this page: eviction waits for it, and so it for nothing.
pub(super) fn populates(s: &Space, page: PageIndex) -> bool {
    s.restore.covers(page)
        || s.batch
            .as_ref()
            .is_some_and(|b| b.phase == Phase::RepairWait && b.pages.iter().any(|p| p.page == page))
}

/// Whether waiting for this space's eviction can help a fault of `by` that needs memory.
pub(super) fn can_make_room(s: &Space, by: SpaceId, small_bytes: u64, now: Nanos) -> bool {
    // Whoever faults is not stopped, so its ring only wants a CPU.
    let patience = if s.id == by {
        STUCK_RUNNING_NS
    } else {
        STUCK_NS
    };
    s.life == Life::Serving
        && s.known
        && !s.is_small_child(small_bytes, now)
        && match s.ring {
            Ring::Refused => false,
            // A stopped target makes none, and a predecessor's may wait for just this fault.
            Ring::Asked(since) => now < since.after(STUCK_NS),
            Ring::Absent | Ring::Ready => true,
        }
        // It goes on when what stayed is dirty again; that takes the ring, and the ring a CPU.
        && (s.restore.is_idle() || now < s.restore.went_on.after(patience))
        && s.fruitless < FRUITLESS
        && s.usage_bytes > 0
        && !s.regions.is_empty()
        && match &s.batch {
            Some(b) if b.phase == Phase::RepairWait => now < b.waiting_since.after(patience),
            // A predecessor's repair may wait for just this fault.
            Some(b) if b.phase == Phase::Recover => now < b.waiting_since.after(STUCK_NS),
            Some(b) if b.phase == Phase::Wait => now < b.waiting_since.after(patience),
            Some(_) | None => true,
        }
}

impl<S: PageStore> Core<'_, S> {
    fn wants_batch(&self, s: &Space) -> bool {
        s.life == Life::Serving
            && s.known
            && !s.is_small_child(self.small_child_bytes, self.now)
            && s.restore.is_idle()
            && self.now >= s.rest_until
            && (!s.policy.is_empty() || (self.now >= s.sweep_after && !s.regions.is_empty()))
            && self.usage_bytes() > self.high_bytes()
            && s.usage_bytes > 0
            && self.frames.free() >= FRAMES_LEAST
    }

    /// The next step of a space's batch; begins one if there is pressure.
    pub(super) fn step_batch(&mut self, id: SpaceId) -> Option<Op> {
        if self.space_ref(id)?.batch.is_none() {
            if !self.wants_batch(self.space_ref(id)?) {
                return None;
            }
            match self.space_ref(id)?.ring {
                Ring::Absent => {
                    let now = self.now;
                    self.space(id)?.ring = Ring::Asked(now);
                    self.errands.push_back(Op::NeedRing { space: id });
                    return None;
                }
                Ring::Asked(_) | Ring::Refused => return None,
                Ring::Ready => {}
            }
            let now = self.now;
            self.space(id)?.batch = Some(Batch::new(now));
        }
        let mut b = self.space(id)?.batch.take()?;
        let op = self.advance(id, &mut b);
        if op.is_none() && b.phase == Phase::Look && b.at >= b.pages.len() {
            self.finish(id, b);
            return None;
        }
        if let Some(s) = self.space(id) {
            s.batch = Some(b);
        }
        op
    }

    fn advance(&mut self, id: SpaceId, b: &mut Batch) -> Option<Op> {
        loop {
            let op = match b.phase {
                Phase::Select => self.select(id, b),
                Phase::Threads => {
                    b.step = Step::Heads;
                    let anew = std::mem::take(&mut self.space(id)?.heads_forgotten);
                    return Some(Op::Threads { space: id, anew });
                }
                Phase::Protect => self.protect(id, b),
                Phase::Pins => self.pins(id, b),
                Phase::Read => self.read(id, b),
                Phase::Queue => self.queue(id, b),
                Phase::Wait | Phase::RepairWait if b.outstanding == 0 => {
                    self.waited(id, b);
                    None
                }
                Phase::Wait | Phase::Recover | Phase::RepairWait => return None,
                Phase::Reread => {
                    // The last one went with what others still need: it comes back when that is stored.
                    b.spare = b.spare.or_else(|| self.frames.take());
                    b.spare?;
                    self.reread(id, b)
                }
                Phase::Unprotect => self.unprotect(id, b),
                Phase::Repair if !b.repair.left.is_empty() && self.awaits_ring(id) => return None,
                Phase::Repair => self.repair(id, b),
                Phase::Put => {
                    if b.ticket.is_some() {
                        return None;
                    }
                    self.put(id, b)
                }
                Phase::Pageout => self.page_out(id, b),
                Phase::Look => {
                    while b
                        .pages
                        .get(b.at)
                        .is_some_and(|p| p.lost || p.mask.is_empty())
                    {
                        b.at += 1;
                    }
                    let page = b.pages.get(b.at)?.page;
                    b.step = Step::FinalLook;
                    return Some(Op::Look { space: id, page });
                }
            };
            if op.is_some() {
                return op;
            }
        }
    }

    // --- choosing -------------------------------------------------------------------------------

    fn select(&mut self, id: SpaceId, b: &mut Batch) -> Option<Op> {
        if b.spare.is_none() {
            b.spare = self.frames.take();
        }
        let enough = self.usage_bytes() <= self.low_bytes() + b.planned_bytes;
        if b.spare.is_none() || b.pages.len() >= BATCH_PAGES || enough || self.frames.free() < 2 {
            return self.selected(b);
        }
        let now = self.now;
        let s = self.space(id)?;
        while let Some(page) = s.policy.take_victim() {
            s.queued.remove(page);
            let kept_out = s.restore.covers(page) || b.pages.iter().any(|p| p.page == page);
            if kept_out || s.regions.overlapping(page.range()).is_none() {
                continue;
            }
            b.step = Step::Look(page);
            return Some(Op::Look { space: id, page });
        }
        // Nobody told us of more: search.
        if now < s.sweep_after {
            return self.selected(b);
        }
        match s.regions.at_or_after(s.sweep) {
            Some(r) => {
                let range = AddrRange {
                    start: r.start.max(s.sweep),
                    end: r.end,
                };
                b.step = Step::Sweep(range);
                Some(Op::FindPresent { space: id, range })
            }
            None => {
                s.sweep = holo_proto::Addr(0);
                s.sweep_after = now.after(SWEEP_NS << s.fruitless.min(5));
                self.selected(b)
            }
        }
    }

    fn selected(&mut self, b: &mut Batch) -> Option<Op> {
        if b.pages.is_empty() {
            b.goto(Phase::Look);
        } else {
            b.goto(Phase::Protect);
        }
        None
    }

    /// What of a page may be offered, from what pagemap says and what we know.
    fn eligible(&mut self, id: SpaceId, page: PageIndex, look: super::PageLook) -> SubpageMask {
        let in_memory = look
            .present
            .minus(look.zero)
            .minus(look.swapped)
            .minus(look.file);
        let Some(s) = self.space_ref(id) else {
            return SubpageMask::NONE;
        };
        let quiesced = s.quiesce_count;
        let mut mask = SubpageMask::NONE;
        let mut droppable = SubpageMask::NONE;
        let mut dropping = false;
        for i in 0..16 {
            let at = page.subpage(i);
            if s.drops.may_drop(at.start(), quiesced) {
                dropping |= in_memory.has(i);
                continue;
            }
            match self.map.entry(id, at) {
                Entry::Dropping(n) if n >= quiesced => {
                    dropping |= in_memory.has(i);
                    continue;
                }
                // Forked while the parent had offered it: clean, and the kernel may drop it at any time. What
                // the outcome of a request of ours means can be told only of pages that are dirty before it.
                Entry::Stored(_) | Entry::Staged(..) if in_memory.has(i) => {
                    droppable = droppable.with(i);
                    continue;
                }
                _ => {}
            }
            let start = at.start();
            if in_memory.has(i)
                && look.exclusive.has(i)
                && s.regions.around(start).is_some()
                && s.never.around(start).is_none()
            {
                mask = mask.with(i);
            }
        }
        let now = self.now;
        if let Some(s) = self.space(id) {
            for (first, count) in droppable.runs() {
                s.restore.push(run(page, first, count), now);
            }
        }
        if dropping {
            if let Some(s) = self.space(id) {
                if !s.quiesce_asked {
                    s.quiesce_asked = true;
                    let count = s.quiesce_count + 1;
                    self.errands.push_back(Op::NeedQuiesce { space: id, count });
                }
            }
        }
        mask
    }

    fn looked_at(&mut self, id: SpaceId, b: &mut Batch, page: PageIndex, look: super::PageLook) {
        let mask = self.eligible(id, page, look);
        if mask.is_empty() {
            let shared = look.present.minus(look.zero).minus(look.exclusive);
            if !shared.is_empty() {
                self.stats.stayed_shared += 1;
            }
            return; // found again by a sweep, if it is still there
        }
        let Some(frame) = self.frames.take() else {
            if let Some(s) = self.space(id) {
                s.enqueue(page, true);
            }
            return;
        };
        b.planned_bytes += u64::from(mask.count()) * SUBPAGE_BYTES;
        b.pages.push(BatchPage::new(page, mask, Some(frame)));
    }

    fn heads_known(&mut self, id: SpaceId, b: &mut Batch, heads: &Heads) {
        for at in heads.at.iter().take(heads.len) {
            let near = AddrRange::new(
                at.0.saturating_sub(CONTROL_BLOCK_BYTES) / PAGE_BYTES * PAGE_BYTES,
                (at.0 + CONTROL_BLOCK_BYTES).next_multiple_of(PAGE_BYTES),
            );
            self.never(id, near);
        }
        if heads.more {
            return;
        }
        if let Some(s) = self.space_ref(id) {
            let taken = |p: &&mut BatchPage| s.never.overlapping(p.page.range()).is_some();
            b.pages
                .iter_mut()
                .filter(taken)
                .for_each(|p| p.mask = SubpageMask::NONE);
        }
        b.listed = Some(self.now);
        b.phase = Phase::Protect;
        // Before other spaces' turns: the list grows old.
        self.turn = usize::from(id.0);
    }

    // --- the protected window -------------------------------------------------------------------

    fn protect(&mut self, id: SpaceId, b: &mut Batch) -> Option<Op> {
        let in_time = b.listed.is_some_and(|at| self.now < at.after(THREADS_NS));
        let patience_over = b.listed.is_some() && b.late_lists >= LATE_LISTS;
        if !in_time && !patience_over {
            b.late_lists += u32::from(b.listed.is_some());
            b.phase = Phase::Threads; // and back, to the same page
            return None;
        }
        b.late_lists = 0;
        while let Some(p) = b.pages.get_mut(b.at) {
            // What an install in progress brings would not be protected.
            let installing = self.install.as_ref().map(|i| (i.fault.space, i.page));
            if installing == Some((id, p.page)) {
                p.mask = SubpageMask::NONE;
            }
            if p.lost || p.mask.is_empty() {
                b.at += 1;
                b.single_steps = false;
                continue;
            }
            let range = if b.single_steps {
                match p.mask.iter().find(|&i| i >= b.sub) {
                    Some(i) => {
                        b.sub = i;
                        p.run(i, 1)
                    }
                    None => {
                        b.at += 1;
                        b.single_steps = false;
                        continue;
                    }
                }
            } else {
                p.span
            };
            b.step = Step::Protect;
            return Some(Op::Protect { space: id, range });
        }
        b.goto(Phase::Pins);
        None
    }

    /// Does a device have a hold on memory of the process for long? What such a one writes marks no page, and
    /// after it has let go nothing tells a page that it wrote. Whoever wants to take hold now waits: a page
    /// that is written by a device is made writable first, and those of the batch are protected.
    fn pins(&mut self, id: SpaceId, b: &mut Batch) -> Option<Op> {
        if b.pages.iter().all(|p| p.lost || p.mask.is_empty()) {
            b.goto(Phase::Read);
            return None;
        }
        b.step = Step::Pins;
        Some(Op::Pins { space: id })
    }

    fn pins_known(&mut self, b: &mut Batch, outcome: Outcome) {
        if let Outcome::Pinned(bytes @ ..=0x7fff_ffff_ffff) = outcome {
            self.stats.pinned_peak_bytes = self.stats.pinned_peak_bytes.max(bytes);
        }
        if outcome != Outcome::Pinned(0) {
            for p in &mut b.pages {
                self.stats.stayed_pinned += u64::from(!p.mask.is_empty());
                p.mask = SubpageMask::NONE;
            }
        }
        b.goto(Phase::Read);
    }

    fn read(&mut self, id: SpaceId, b: &mut Batch) -> Option<Op> {
        while let Some(p) = b.pages.get(b.at) {
            let next = p.mask.runs().find(|&(f, c)| f + c > b.sub);
            if let (false, Some((first, count)), Some(frame)) = (p.lost, next, p.frame) {
                b.step = Step::Read { first, count };
                return Some(Op::Read {
                    space: id,
                    at: p.page.subpage(first),
                    subpages: count,
                    frame,
                    first,
                });
            }
            self.stage(id, b);
            b.at += 1;
            b.sub = 0;
        }
        let pages: Vec<_> = b.pages.iter().map(|p| (p.page, p.mask, p.frame)).collect();
        self.notes.write(id, pages.into_iter());
        self.crash(CrashPoint::BatchNoted);
        b.goto(Phase::Queue);
        None
    }

    /// The bytes of the page that was read are in its frame: the map says so.
    fn stage(&mut self, id: SpaceId, b: &Batch) {
        let Some(p) = b.pages.get(b.at) else { return };
        let (false, Some(frame)) = (p.lost, p.frame) else {
            return;
        };
        self.crash(CrashPoint::PageRead);
        for i in p.mask.iter() {
            self.frames.hold(frame);
            self.set_entry(id, p.page.subpage(i), Entry::Staged(frame, i));
        }
        self.crash(CrashPoint::Staged);
    }

    fn queue(&mut self, id: SpaceId, b: &mut Batch) -> Option<Op> {
        while let Some(p) = b.pages.get(b.at) {
            let next = p.mask.runs().find(|&(f, _)| f >= b.sub);
            if let (false, Some((first, count))) = (p.lost, next) {
                b.sub = first + count;
                b.step = Step::Queue { first, count };
                // Before the request can run: a removal of the rest is the process's own.
                let total = self.space(id)?.requests.wrapping_add(1);
                self.notes.set_last(id, total, b.at, (first, count));
                self.notes
                    .set_queued(id, b.at, run_mask(first, count), true);
                return Some(Op::Advise {
                    space: id,
                    advice: Advice::Free,
                    range: p.run(first, count),
                    tag: tag_of(b.at, first, count),
                });
            }
            b.at += 1;
            b.sub = 0;
        }
        b.phase = Phase::Wait;
        b.waiting_since = self.now;
        if b.outstanding == 0 {
            return None;
        }
        b.step = Step::Kick;
        Some(Op::Kick { space: id })
    }

    /// All requests have ended: what did the process drop meanwhile, and what did we hit?
    fn waited(&mut self, id: SpaceId, b: &mut Batch) {
        if b.phase == Phase::RepairWait {
            b.phase = Phase::Repair;
            b.repair.full = false;
            return;
        }
        let recovered = b.phase == Phase::Recover;
        for (i, p) in b.pages.iter_mut().enumerate() {
            let unheard = p.mask.minus(self.notes.counted(id, i, 1));
            if !unheard.is_empty() {
                // The request found no mapping of ours there.
                p.repair = true;
            }
            p.repair |= p.lost;
        }
        self.crash(CrashPoint::FreeDone);
        self.notes.settle(id);
        b.goto(if recovered {
            Phase::Unprotect
        } else {
            Phase::Reread
        });
    }

    fn reread(&mut self, id: SpaceId, b: &mut Batch) -> Option<Op> {
        let spare = b.spare?;
        while let Some(p) = b.pages.get(b.at) {
            let next = p.mask.runs().find(|&(f, c)| f + c > b.sub);
            if p.lost || p.frame.is_none() {
                // Perhaps since its second read: that is not the next page's.
                b.reread = SubpageMask::NONE;
                b.differs = false;
                b.at += 1;
                b.sub = 0;
                continue;
            }
            if b.differs {
                // While a change of mappings is under way this fails: what was read may have come to the page's
                // place since, and is nothing to a child that was forked before.
                b.step = Step::Confirm(b.reread);
                return Some(Op::Unprotect {
                    space: id,
                    range: ANYWHERE,
                });
            }
            if let Some((first, count)) = next {
                let first = first.max(b.sub);
                let count = count.min(16 - first);
                b.step = Step::Reread { first, count };
                return Some(Op::Read {
                    space: id,
                    at: p.page.subpage(first),
                    subpages: count,
                    frame: spare,
                    first,
                });
            }
            if let (false, Some(frame)) = (b.reread.is_empty(), p.frame) {
                b.step = Step::Compare;
                return Some(Op::Compare {
                    a: frame,
                    b: spare,
                    mask: b.reread,
                });
            }
            b.at += 1;
            b.sub = 0;
        }
        b.goto(Phase::Unprotect);
        None
    }

    /// A child that was forked between the two reads has what the first one said, and may have what the second
    /// did: a page that a device still writes the fork itself copies for it.
    fn restage_children(&mut self, id: SpaceId, at: SubpageIndex, (old, new): (FrameId, FrameId)) {
        let staged = Entry::Staged(old, at.in_page());
        for child in self.all_spaces() {
            if child != id && self.map.entry(child, at) == staged {
                self.frames.hold(new);
                if self
                    .map
                    .replace(child, at, Entry::Staged(new, at.in_page()))
                    .is_ok()
                {
                    self.frames.drop_hold(old);
                }
            }
        }
    }

    /// The second read differs: what it says is the page's content now.
    fn restage(&mut self, id: SpaceId, b: &mut Batch, read: SubpageMask) {
        self.stats.reread_differed += 1;
        let (Some(spare), Some(p)) = (b.spare.take(), b.pages.get_mut(b.at)) else {
            return;
        };
        p.changed = true;
        for i in read.iter() {
            let at = p.page.subpage(i);
            if self.map.entry(id, at) == p.frame.map_or(Entry::Nothing, |f| Entry::Staged(f, i)) {
                self.frames.hold(spare);
                if let Ok(Entry::Staged(f, _)) = self.map.replace(id, at, Entry::Staged(spare, i)) {
                    self.frames.drop_hold(f);
                    self.restage_children(id, at, (f, spare));
                }
            }
        }
        self.crash(CrashPoint::Restaged);
        if let Some(old) = p.frame.replace(spare) {
            if self.frames.holds(old) > 1 {
                // Subpages that the kernel dropped between the two reads, or a child's, are only there.
                self.add_orphan(old);
                self.frames.drop_hold(old);
                b.spare = None;
            } else {
                b.spare = Some(old);
            }
        }
        if b.spare.is_none() {
            b.spare = self.frames.take();
        }
    }

    fn unprotect(&mut self, id: SpaceId, b: &mut Batch) -> Option<Op> {
        while let Some(p) = b.pages.get_mut(b.at) {
            if b.single_steps {
                let start = p.span.start.offset(b.sub as u64 * SUBPAGE_BYTES);
                if start < p.span.end {
                    let end = start.offset(SUBPAGE_BYTES);
                    b.step = Step::Unprotect;
                    return Some(Op::Unprotect {
                        space: id,
                        range: AddrRange { start, end },
                    });
                }
                self.opened(b);
                continue;
            }
            b.step = Step::Unprotect;
            return Some(Op::Unprotect {
                space: id,
                range: p.span,
            });
        }
        self.unhold();
        b.goto(Phase::Repair);
        None
    }

    fn opened(&mut self, b: &mut Batch) {
        if let Some(p) = b.pages.get_mut(b.at) {
            p.open = true;
        }
        b.at += 1;
        b.sub = 0;
        b.single_steps = false;
        self.crash(CrashPoint::Unprotected);
    }

    // --- after the window -----------------------------------------------------------------------

    fn repair(&mut self, id: SpaceId, b: &mut Batch) -> Option<Op> {
        while let Some(p) = b.pages.get(b.at) {
            if !p.repair {
                b.at += 1;
                continue;
            }
            if let Some(i) = b.repair.redirty.iter().next() {
                let at = p.page.subpage(i);
                if b.repair.lifted != Some(at) {
                    b.step = Step::RepairLift(at);
                    let range = p.run(i, 1);
                    return Some(Op::Unprotect { space: id, range });
                }
                b.repair.redirty = b.repair.redirty.without(i);
                b.step = Step::RepairRedirty(at);
                return Some(Op::Redirty { space: id, at });
            }
            let next = b.repair.left.runs().next();
            if let (false, Some((first, count))) = (b.repair.full, next) {
                let alone = b.repair.single.has(first);
                let count = if alone { 1 } else { count };
                b.repair.left = b.repair.left.minus(run_mask(first, count));
                b.step = Step::RepairQueue { first, count };
                return Some(Op::Advise {
                    space: id,
                    advice: Advice::Populate,
                    range: p.run(first, count),
                    tag: tag_of(b.at, first, count),
                });
            }
            if b.outstanding > 0 {
                return Some(self.await_repair(id, b));
            }
            if b.repair.looked {
                b.repair = Repair::default();
                b.at += 1;
                continue;
            }
            b.step = Step::RepairLook;
            return Some(Op::Look {
                space: id,
                page: p.page,
            });
        }
        self.notes.finish(id);
        b.goto(Phase::Put);
        None
    }

    fn await_repair(&mut self, id: SpaceId, b: &mut Batch) -> Op {
        b.phase = Phase::RepairWait;
        b.waiting_since = self.now;
        b.step = Step::RepairKick;
        Op::Kick { space: id }
    }

    /// What of the page's frame the map still needs, here or (a fork's child) elsewhere.
    fn put(&mut self, id: SpaceId, b: &mut Batch) -> Option<Op> {
        while let Some(p) = b.pages.get(b.at) {
            if let Some(frame) = p.frame {
                if self.frames.holds(frame) > 1 {
                    let mask = self.staged_mask(id, p.page, frame);
                    let ticket = self.new_ticket();
                    b.ticket = Some(ticket);
                    b.step = Step::Put;
                    return Some(Op::Put {
                        ticket,
                        frame,
                        mask,
                    });
                }
            }
            b.at += 1;
        }
        b.goto(Phase::Pageout);
        None
    }

    /// The subpages of a frame that the map refers to: usually all by the page itself, else by whoever.
    fn staged_mask(&self, id: SpaceId, page: PageIndex, frame: FrameId) -> SubpageMask {
        let own = (0..16)
            .filter(|&i| self.map.entry(id, page.subpage(i)) == Entry::Staged(frame, i))
            .fold(SubpageMask::NONE, SubpageMask::with);
        if self.frames.holds(frame) == own.count() + 1 {
            own
        } else {
            self.staged_anywhere(frame)
        }
    }

    pub(super) fn batch_put_done(&mut self, ticket: Ticket, result: Result<Locations, StoreError>) {
        let found = self.find_space(|s| s.batch.as_ref().is_some_and(|b| b.ticket == Some(ticket)));
        let Some(id) = found else {
            // The space ended meanwhile: nobody refers to what was stored.
            if let Ok(locations) = result {
                for l in locations.iter().flatten() {
                    self.store.release(*l);
                }
            }
            return;
        };
        let Some(mut b) = self.space(id).and_then(|s| s.batch.take()) else {
            return;
        };
        b.ticket = None;
        let (at, now) = (b.at, self.now);
        b.at += 1;
        if let Some(p) = b.pages.get_mut(at) {
            match result {
                Ok(locations) => {
                    self.crash(CrashPoint::StorePut);
                    self.stored(id, p, &locations);
                    self.crash(CrashPoint::Stored);
                    p.durable = true;
                }
                Err(_) => {
                    // No room: the page must not go. It becomes dirty and resident again, and the frame
                    // is free when the map no longer needs it.
                    let range = p.page.range();
                    if let Some(s) = self.space(id) {
                        s.restore.push(range, now);
                    }
                }
            }
        }
        if let Some(s) = self.space(id) {
            s.batch = Some(b);
        }
    }

    fn stored(&mut self, id: SpaceId, p: &BatchPage, locations: &Locations) {
        let Some(frame) = p.frame else { return };
        let mut spent = [false; 16];
        for i in 0..16 {
            let at = p.page.subpage(i);
            if self.map.entry(id, at) == Entry::Staged(frame, i) {
                let new = locations[i].map_or(Entry::Nothing, Entry::Stored);
                if self.map.replace(id, at, new).is_ok() {
                    spent[i] = true;
                    self.frames.drop_hold(frame);
                }
            }
        }
        let mut rest = *locations;
        for i in 0..16 {
            if spent[i] {
                rest[i] = None;
            }
        }
        if self.frames.holds(frame) > 1 {
            // A fork's child, or a page that moved, refers to the frame too.
            for l in (0..16).filter(|&i| spent[i]).filter_map(|i| locations[i]) {
                self.store.retain(l);
            }
            self.resolve_frame(frame, locations);
            return;
        }
        for l in rest.iter().flatten() {
            self.store.release(*l);
        }
    }

    fn page_out(&mut self, id: SpaceId, b: &mut Batch) -> Option<Op> {
        self.pageout.clear();
        for p in &b.pages {
            if p.durable && !p.lost {
                for (first, count) in p.mask.runs() {
                    self.pageout.push(p.run(first, count));
                }
            }
        }
        b.goto(Phase::Look);
        if self.pageout.is_empty() {
            return None;
        }
        b.step = Step::Pageout;
        Some(Op::Pageout { space: id })
    }

    fn final_look(&mut self, id: SpaceId, b: &mut Batch, look: super::PageLook) {
        let Some(p) = b.pages.get(b.at).cloned() else {
            return;
        };
        b.at += 1;
        let gone = p.mask.minus(look.present).minus(look.swapped);
        let stayed = p.mask.and(look.present);
        if !gone.is_empty() {
            self.stats.pages_evicted += 1;
            self.stats.subpages_evicted += u64::from(gone.count());
            b.freed += gone.count();
        }
        if !stayed.is_empty() {
            if p.waiter || p.changed {
                self.stats.stayed_written += 1;
            } else {
                self.stats.stayed_other += 1;
            }
        }
        let bytes = u64::from(gone.count()) * SUBPAGE_BYTES;
        let now = self.now;
        if let Some(s) = self.space(id) {
            s.usage_bytes = s.usage_bytes.saturating_sub(bytes);
            if stayed.is_empty() {
                s.policy.evicted(p.page);
            } else {
                s.enqueue(p.page, true);
                for (first, count) in stayed.runs() {
                    s.restore.push(p.run(first, count), now);
                }
            }
        }
        self.crash(CrashPoint::Looked);
    }

    fn finish(&mut self, id: SpaceId, b: Batch) {
        for f in b.frames() {
            self.frames.drop_hold(f);
        }
        let now = self.now;
        self.stats.evict_ns += now.0.saturating_sub(b.started.0);
        if let Some(s) = self.space(id) {
            if b.freed > 0 {
                s.fruitless = 0;
            } else {
                s.fruitless = s.fruitless.saturating_add(1);
                s.rest_until = now.after(REST_NS << s.fruitless.min(6));
            }
        }
        self.unhold();
    }

    // --- completions ----------------------------------------------------------------------------

    pub(super) fn ring_done(&mut self, id: SpaceId, tag: u64, result: i32) {
        if tag & TAG != 0 {
            return self.restored(id, PageIndex(tag & !TAG), result);
        }
        let Some(mut b) = self.space(id).and_then(|s| s.batch.take()) else {
            return;
        };
        b.outstanding = b.outstanding.saturating_sub(1);
        let field = |shift: u32| (tag >> shift & 0xff) as usize;
        let (i, run) = (field(0), run_mask(field(8), field(16)));
        if matches!(b.phase, Phase::Repair | Phase::RepairWait) && result < 0 {
            if result == NEVER_RAN {
                b.repair.left = b.repair.left.or(run);
            } else if run.count() > 1 {
                b.repair.single = b.repair.single.or(run);
                b.repair.left = b.repair.left.or(run);
            } else if NOT_WRITABLE.contains(&result) {
                b.repair.redirty = b.repair.redirty.or(run);
            } else {
                // The process changed the mapping meanwhile: what is there now?
                b.repair.looked = false;
            }
        }
        // A predecessor's that is settled was a repair.
        let offered = b.submitted() && !self.notes.is_settled(id);
        if result == NEVER_RAN && offered {
            self.offered_nothing(id, &mut b, i, run);
        } else if let (Some(p), true) = (b.pages.get_mut(i), result < 0 && offered) {
            // It stopped on the way, or found holes. Where no message of it was heard it has offered nothing of
            // ours, and what is heard from now on is the process's.
            let heard = self.notes.counted(id, i, 1);
            let unheard = p.mask.and(run).minus(heard);
            p.mask = p.mask.minus(unheard);
            p.repair = true;
            if result != HOLES {
                p.heard.quiet = p.heard.quiet.or(unheard);
                p.heard.doubtful = p.heard.doubtful.or(run.and(heard));
                self.notes.set_heard(id, i, p.heard);
                // Where it stopped, and behind that, it has done nothing.
                let last = run
                    .iter()
                    .last()
                    .map_or(SubpageMask::NONE, |i| run_mask(i, 1));
                self.offered_nothing(id, &mut b, i, last);
            } else if run.count() == 1 {
                // One that is all hole has done nothing.
                self.offered_nothing(id, &mut b, i, run);
            } else {
                p.heard.holed = p.heard.holed.or(run);
                self.notes.set_heard(id, i, p.heard);
            }
        }
        self.crash(CrashPoint::FreeDone);
        if b.outstanding == 0 && matches!(b.phase, Phase::Wait | Phase::RepairWait) {
            // Every removal message of our own was read before its request ended, but not necessarily
            // applied: they are read first.
            self.waited(id, &mut b);
        }
        if let Some(s) = self.space(id) {
            s.batch = Some(b);
        }
    }

    /// No request of the batch came to `run`, or to nothing of it: nothing of it was offered, and what was heard
    /// about it was of the process's doing.
    fn offered_nothing(&mut self, id: SpaceId, b: &mut Batch, i: usize, run: SubpageMask) {
        let Some(p) = b.pages.get_mut(i) else { return };
        let dropped = p.mask.and(run).and(self.notes.counted(id, i, 1));
        p.mask = p.mask.minus(run);
        // In this order: dying between them, a successor does both again.
        self.dropped_after_all(id, b, i, dropped);
        self.notes.set_queued(id, i, run, false);
    }

    /// All messages of the window are read. A request goes upwards and stops at the first mapping that it may not
    /// touch: at the first subpage of which nothing was heard, but for those that were gone. What was heard
    /// beyond was the process's doing.
    fn settle_stopped(&mut self, id: SpaceId, b: &mut Batch) {
        let Some(p) = b.pages.get_mut(b.at) else {
            return;
        };
        let Heard {
            quiet,
            doubtful,
            holed,
            early,
            skipped,
        } = std::mem::take(&mut p.heard);
        // If all that has gone went at once, that is the hole: it had gone before the request came there.
        let hole = holed.and(p.gone);
        let early = early.and(doubtful.or(holed));
        let was_there = skipped.and(p.gone.or(p.left)).is_empty();
        if p.told == 1 && !hole.is_empty() {
            self.offered_nothing(id, b, b.at, hole);
        }
        if was_there && !early.is_empty() {
            let twice = self.notes.counted(id, b.at, 2);
            self.offered_nothing(id, b, b.at, early.minus(twice));
        }
        let Some(p) = b.pages.get_mut(b.at) else {
            return;
        };
        let mut beyond = SubpageMask::NONE;
        for (first, count) in quiet.or(doubtful).runs() {
            let run = run_mask(first, count);
            let stop = run.and(quiet).minus(p.left).iter().next();
            beyond = stop.map_or(beyond, |s| beyond.or(run.minus(run_mask(0, s))));
        }
        let dropped = p.mask.and(doubtful).and(beyond).minus(p.left);
        p.mask = p.mask.minus(dropped);
        self.dropped_after_all(id, b, b.at, dropped);
        self.notes.set_heard(id, b.at, Heard::default());
    }

    /// [`Batch::lose`], and a successor will know it.
    pub(super) fn batch_loses(&mut self, id: SpaceId, range: AddrRange, came: bool) {
        let Some(s) = self.spaces.get_mut(usize::from(id.0)) else {
            return;
        };
        if let Some(b) = s.as_mut().and_then(|s| s.batch.as_mut()) {
            b.lose(range, came);
            for (i, p) in b.pages.iter().enumerate() {
                self.notes.set_gone(id, i, p.gone, p.told);
            }
        }
    }

    fn dropped_after_all(&mut self, id: SpaceId, b: &Batch, i: usize, which: SubpageMask) {
        let (Some(s), Some(p)) = (self.space_ref(id), b.pages.get(i)) else {
            return;
        };
        let quiesce = s.quiesce_count + u64::from(s.quiesce_asked);
        let (page, frame, left) = (p.page, p.frame.or(p.noted), p.left);
        for sub in which.iter() {
            let at = page.subpage(sub);
            // Not what has come to its place since; itself may be elsewhere.
            let now_at = match frame {
                Some(f) => self.staged_at(id, at, Entry::Staged(f, sub)),
                None => (!left.has(sub)).then_some(at),
            };
            if let Some(at) = now_at {
                self.set_entry(id, at, Entry::Dropping(quiesce));
                self.stats.dropped_in_batch += 1;
            }
        }
    }

    /// A removal of this was heard while a request for it is on the ring: ours, or the process's, which has moved
    /// the place away before the request came to it? Then what was read of it is no longer its content.
    /// That is known when the request has ended.
    pub(super) fn in_doubt(&self, id: SpaceId, entry: Entry) -> bool {
        let Entry::Staged(frame, sub) = entry else {
            return false;
        };
        let requests = |b: &&Batch| b.submitted() && !self.notes.is_settled(id);
        let batch = self.space_ref(id).and_then(|s| s.batch.as_ref());
        batch.filter(requests).is_some_and(|b| {
            b.pages.iter().enumerate().any(|(i, p)| {
                p.frame.or(p.noted) == Some(frame)
                    && self.notes.queued(id, i).has(sub)
                    && self.notes.counted(id, i, 1).has(sub)
            })
        })
    }

    /// A predecessor's batch whose requests have not ended needs the map to say what is in `frame`.
    pub(super) fn is_noted(&self, frame: FrameId) -> bool {
        self.spaces.iter().flatten().any(|s| {
            s.batch.as_ref().is_some_and(|b| {
                b.phase == Phase::Recover && b.pages.iter().any(|p| p.noted == Some(frame))
            })
        })
    }

    /// Where in a space a staged subpage is now: at `first`, or where the process has moved it.
    fn staged_at(&self, id: SpaceId, first: SubpageIndex, entry: Entry) -> Option<SubpageIndex> {
        if self.map.entry(id, first) == entry {
            return Some(first);
        }
        let (mut at, end) = (SubpageIndex(0), Addr(u64::MAX).subpage());
        loop {
            let (found, e) = self.map.next_in(id, at, end)?;
            if e == entry {
                return Some(found);
            }
            at = SubpageIndex(found.0 + 1);
        }
    }

    /// Whether what is to be asked of the ring has to wait for one; asks for it.
    fn awaits_ring(&mut self, id: SpaceId) -> bool {
        let now = self.now;
        let Some(s) = self.space(id) else {
            return false;
        };
        if s.ring == Ring::Absent {
            s.ring = Ring::Asked(now);
            self.errands.push_back(Op::NeedRing { space: id });
            return true;
        }
        matches!(s.ring, Ring::Asked(_))
    }

    /// Nothing of a predecessor is outstanding: its batch can be finished, and the ring is ours.
    pub(super) fn ring_quiet(&mut self, id: SpaceId, requests: Option<u32>) {
        if let Some(s) = self.space(id) {
            s.ring = Ring::Ready;
            s.requests = requests.unwrap_or(0);
        }
        let Some(mut b) = self.space(id).and_then(|s| s.batch.take()) else {
            return;
        };
        if b.phase == Phase::Recover {
            b.started = self.now;
            self.unqueued(id, &mut b, requests);
            self.notes.forget_last(id);
            self.waited(id, &mut b);
        }
        if let Some(s) = self.space(id) {
            s.batch = Some(b);
        }
        self.unhold();
    }

    /// A predecessor died after it had noted a request and before it had queued it: what was heard of its
    /// subpages is the process's.
    fn unqueued(&mut self, id: SpaceId, b: &mut Batch, requests: Option<u32>) {
        let Some((total, i, run)) = self.notes.last(id) else {
            return;
        };
        let (Some(p), true) = (
            b.pages.get_mut(i),
            requests.map(|n| n.wrapping_add(1)) == Some(total),
        ) else {
            return;
        };
        p.mask = p.mask.minus(run);
        let dropped = run
            .and(self.notes.queued(id, i))
            .and(self.notes.counted(id, i, 1));
        // In this order: dying between them, a successor does both again.
        self.dropped_after_all(id, b, i, dropped);
        self.notes.set_queued(id, i, run, false);
    }

    pub(super) fn batch_step_done(&mut self, id: SpaceId, outcome: Outcome) {
        if outcome == Outcome::Gone {
            return self.gone(id);
        }
        let Some(mut b) = self.space(id).and_then(|s| s.batch.take()) else {
            return;
        };
        if outcome == Outcome::EventsPending {
            // Decided again from the state after the events: the phase and its cursor stay.
            b.step = Step::None;
            self.events_pending(id);
        } else {
            let step = std::mem::replace(&mut b.step, Step::None);
            self.step_done(id, &mut b, step, outcome);
        }
        if let Some(s) = self.space(id) {
            s.batch = Some(b);
        }
    }

    fn step_done(&mut self, id: SpaceId, b: &mut Batch, step: Step, outcome: Outcome) {
        match step {
            Step::None => {}
            Step::Heads => {
                if let Outcome::Heads(heads) = outcome {
                    self.heads_known(id, b, &heads);
                } else {
                    // Threads unknown: evict nothing.
                    b.pages.iter_mut().for_each(|p| p.mask = SubpageMask::NONE);
                    b.goto(Phase::Pins);
                }
            }
            Step::Sweep(range) => self.swept(id, range, outcome),
            Step::Look(page) => {
                if let Outcome::Look(look) = outcome {
                    self.looked_at(id, b, page, look);
                }
            }
            Step::Protect => self.protect_done(id, b, outcome),
            Step::Pins => self.pins_known(b, outcome),
            Step::Read { first, count } => {
                let got = if let Outcome::Subpages(n) = outcome {
                    n
                } else {
                    0
                };
                if let Some(p) = b.pages.get_mut(b.at) {
                    if got < count {
                        // Missing: the kernel or the process dropped it. The map has its answer.
                        p.mask = p.mask.without(first + got);
                    }
                }
                b.sub = first + got + usize::from(got < count);
            }
            Step::Queue { first, count } => {
                if outcome == Outcome::Done {
                    b.outstanding += 1;
                } else if let Some(p) = b.pages.get_mut(b.at) {
                    let run = run_mask(first, count);
                    self.notes.set_queued(id, b.at, run, false);
                    p.mask = p.mask.minus(run);
                }
                self.crash(CrashPoint::FreeQueued);
            }
            Step::Kick => self.crash(CrashPoint::FreeKicked),
            Step::RepairKick => {}
            Step::Reread { first, count } => {
                let got = if let Outcome::Subpages(n) = outcome {
                    n
                } else {
                    0
                };
                for i in first..first + got {
                    b.reread = b.reread.with(i);
                }
                b.sub = first + got + usize::from(got < count);
            }
            Step::Compare => {
                b.differs = matches!(outcome, Outcome::Mask(differs) if !differs.is_empty());
                if !b.differs {
                    b.reread = SubpageMask::NONE;
                    b.at += 1;
                    b.sub = 0;
                }
            }
            Step::Confirm(read) => {
                b.reread = SubpageMask::NONE;
                b.differs = false;
                self.restage(id, b, read);
                b.at += 1;
                b.sub = 0;
            }
            Step::Unprotect => self.unprotect_done(id, b, outcome),
            Step::RepairLook => {
                let present = if let Outcome::Look(l) = outcome {
                    l.present.minus(l.zero).minus(l.file)
                } else {
                    SubpageMask::NONE
                };
                b.repair.looked = true;
                b.repair.left = present;
                self.stats.foreign_repaired += u64::from(!present.is_empty());
            }
            Step::RepairQueue { first, count } => match outcome {
                Outcome::Done => b.outstanding += 1,
                // No room: when some have ended.
                _ if b.outstanding > 0 => {
                    b.repair.left = b.repair.left.or(run_mask(first, count));
                    b.repair.full = true;
                }
                _ => b.repair.redirty = run_mask(first, count),
            },
            Step::RepairLift(at) => {
                b.repair.lifted = Some(at);
                self.progressed(id);
            }
            Step::RepairRedirty(at) => {
                b.repair.lifted = None;
                if outcome != Outcome::Done {
                    // Is it still there?
                    b.repair.looked = false;
                    b.repair.refused += 1;
                    if b.repair.refused == REFUSALS {
                        self.stop(id, StopReason::NotDirtied { at });
                    }
                }
            }
            Step::Put => {}
            Step::Pageout => self.crash(CrashPoint::PagedOut),
            Step::FinalLook => {
                if let Outcome::Look(look) = outcome {
                    self.final_look(id, b, look);
                } else {
                    b.at += 1;
                }
            }
        }
    }

    fn swept(&mut self, id: SpaceId, range: AddrRange, outcome: Outcome) {
        let found = if let Outcome::Found(f) = outcome {
            f
        } else {
            None
        };
        let Some(s) = self.space(id) else { return };
        match found {
            Some(run) => {
                let mut next = run.end;
                for page in run.pages() {
                    if s.queued.is_full() {
                        next = page.start();
                        break;
                    }
                    s.enqueue(page, false);
                }
                // At least one page on, or a full queue would find the same page for ever.
                s.sweep = next.max(range.start.offset(SUBPAGE_BYTES));
            }
            None => s.sweep = range.end,
        }
    }

    fn protect_done(&mut self, id: SpaceId, b: &mut Batch, outcome: Outcome) {
        let single = b.single_steps;
        let sub = b.sub;
        let Some(p) = b.pages.get_mut(b.at) else {
            return;
        };
        match outcome {
            Outcome::Done if single => b.sub += 1,
            Outcome::Done => {
                b.at += 1;
                b.sub = 0;
            }
            Outcome::Edge if single => {
                p.mask = p.mask.without(sub);
                b.sub += 1;
            }
            Outcome::Edge => {
                b.single_steps = true;
                b.sub = 0;
            }
            Outcome::Refused(errno) => {
                let at = p.page.subpage(0);
                self.stop(id, StopReason::Kernel { at, errno });
            }
            _ => p.mask = SubpageMask::NONE,
        }
        self.turn = usize::from(id.0); // the list of threads is still good
        self.progressed(id);
        self.crash(CrashPoint::Protected);
    }

    fn unprotect_done(&mut self, id: SpaceId, b: &mut Batch, outcome: Outcome) {
        let single = b.single_steps;
        let Some(p) = b.pages.get(b.at) else {
            return;
        };
        let page = p.page;
        self.settle_stopped(id, b);
        match outcome {
            Outcome::Edge if !single => {
                b.single_steps = true;
                b.sub = 0;
            }
            Outcome::Refused(errno) => {
                let at = page.subpage(0);
                self.stop(id, StopReason::Kernel { at, errno });
                self.opened(b);
            }
            _ if single => b.sub += 1,
            _ => self.opened(b),
        }
        self.progressed(id);
    }
}
