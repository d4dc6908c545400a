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

use holo_proto::{AddrRange, PageIndex, SUBPAGE_BYTES, SpaceId, SubpageIndex, SubpageMask};

use super::note::{Heard, Notes};
use super::space::{Life, Ring, Space};
use super::{BATCH_PAGES, Childhood, Core, CrashPoint, FrameId, Nanos, Op, Outcome};
use crate::store::api::{PageStore, Ticket};
use repair::Repair;

mod choose;
mod repair;
mod ship;
mod whose;
mod window;

/// A ring that has not answered for so long belongs to a stopped target: others do not wait for it.
const STUCK_NS: u64 = 50_000_000;
/// The same for a fault of the very process, which is not stopped: its ring has only to be scheduled.
const STUCK_RUNNING_NS: u64 = 2_000_000_000;
/// After so many batches that freed nothing, faults no longer wait for room.
const FRUITLESS: u32 = 1;
/// Frames without which no batch begins.
pub(super) const FRAMES_LEAST: usize = 4;

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
    /// The last of them ([`super::note::told_by`]).
    told_by: u16,
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
    RepairRedirty,
    RepairProof,
    Put,
    Pageout,
    FinalLook,
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
    /// Of a page that is protected the list was old: who has come meanwhile is asked right after it.
    list_after_all: bool,
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
    /// Forked since requests were queued: what these have hit they share. Of a predecessor's batch nobody knows who was.
    children: Vec<SpaceId>,
    recovered: bool,
    /// They have been told of what is to be repaired.
    told_children: bool,
    /// Who did not wait for that.
    told_early: Vec<SpaceId>,
    /// After the last repair, no fork's message is left unread of a child that shares what was hit.
    proved: bool,
    /// It offers nothing, and puts right what another one's requests have hit.
    only_repairs: bool,
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
            list_after_all: false,
            late_lists: 0,
            spare: None,
            reread: SubpageMask::NONE,
            differs: false,
            repair: Repair::default(),
            outstanding: 0,
            started: now,
            waiting_since: now,
            ticket: None,
            children: Vec::new(),
            recovered: false,
            told_children: false,
            told_early: Vec::new(),
            proved: false,
            only_repairs: false,
            freed: 0,
            planned_bytes: 0,
        }
    }

    /// A predecessor's batch, as far as its note says.
    pub(crate) fn recovered(notes: &Notes<'_>, id: SpaceId) -> Self {
        let mut b = Self::new(Nanos(0));
        b.phase = Phase::Recover;
        b.recovered = true;
        // Else each death would have everybody tell everybody anew what they have been told.
        b.only_repairs = (0..notes.pages(id)).all(|i| notes.page(id, i).1.is_empty());
        for i in 0..notes.pages(id) {
            let (page, mask) = notes.page(id, i);
            let mut p = BatchPage::new(page, mask, None);
            p.noted = notes.frame(id, i);
            (p.gone, (p.told, p.told_by)) = notes.gone(id, i);
            p.left = p.gone;
            p.heard = notes.heard(id, i);
            p.mask = notes.queued(id, i).minus(notes.counted(id, i, 2));
            // Whether something else has come to its place is not known any more.
            p.repair = true;
            // Faults wait only for requests that could still hit what answers them; a repair that is on
            // the ring may itself wait for a fault.
            p.open = notes.is_settled(id) && p.heard == Heard::default();
            b.pages.push(p);
        }
        for page in notes.hits(id) {
            b.repair_also(page);
        }
        b
    }

    /// One that makes pages dirty that are shared with a relative, in which a request has hit them.
    fn of_hits(pages: impl Iterator<Item = PageIndex>, now: Nanos) -> Self {
        let mut b = Self::new(now);
        b.only_repairs = true;
        for page in pages {
            b.repair_also(page);
        }
        b.goto(Phase::Repair);
        b
    }

    /// A page that it only makes dirty.
    fn repair_also(&mut self, page: PageIndex) {
        // A tag counts pages in eight bits; that many moves do not fit into one window.
        if self.pages.len() < 256 {
            let mut p = BatchPage::new(page, SubpageMask::NONE, None);
            p.lost = true;
            p.repair = true;
            p.open = true;
            self.pages.push(p);
        }
    }

    /// Pages that a request may have hit, beside the first `noted`.
    pub(crate) fn hits_beside(&self, noted: usize) -> impl Iterator<Item = PageIndex> + '_ {
        let beside = self.pages.iter().skip(noted).filter(|p| p.repair);
        beside.filter(|_| self.repairs()).map(|p| p.page)
    }

    /// Requests may be on the ring, and what they hit is not repaired.
    fn repairs(&self) -> bool {
        matches!(
            self.phase,
            Phase::Queue
                | Phase::Wait
                | Phase::Recover
                | Phase::Reread
                | Phase::Unprotect
                | Phase::Repair
                | Phase::RepairWait
        )
    }

    /// Pages that a request may have hit, as far as is known.
    pub(crate) fn hits(&self) -> impl Iterator<Item = PageIndex> + '_ {
        self.pages.iter().filter(|p| p.repair).map(|p| p.page)
    }

    /// Whether this child, or a child of it, is yet to be told of what was hit.
    pub(crate) fn will_tell(&self, child: SpaceId) -> bool {
        !self.told_children && self.children.contains(&child)
    }

    /// The same, and of whom nobody knows whose child it is.
    pub(crate) fn may_tell(&self, child: SpaceId) -> bool {
        let anybody = self.recovered && !self.told_children;
        !self.only_repairs && (anybody || self.will_tell(child))
    }

    /// A child was forked: what requests have hit by now, or will be known to have, it shares.
    pub(crate) fn has_child(&mut self, child: SpaceId) {
        let nothing_queued = matches!(
            self.phase,
            Phase::Select | Phase::Threads | Phase::Protect | Phase::Pins | Phase::Read
        );
        // Its slot may have been another one's.
        self.told_early.retain(|&c| c != child);
        if !nothing_queued && !self.told_children {
            self.children.push(child);
        }
    }

    /// All that requests may have hit which `child` shares, for a child that does not wait until that is known: its
    /// parent may be stopped for ever. What they hit after the fork is not the child's.
    fn tell_early(&mut self, child: SpaceId) -> Vec<PageIndex> {
        if !self.may_tell(child) || self.told_early.contains(&child) {
            return Vec::new();
        }
        self.told_early.push(child);
        self.pages.iter().map(|p| p.page).collect()
    }

    /// Frames that the batch holds.
    pub(crate) fn frames(&self) -> impl Iterator<Item = FrameId> + '_ {
        self.pages.iter().filter_map(|p| p.frame).chain(self.spare)
    }

    /// Requests of ours may be on the ring.
    fn submitted(&self) -> bool {
        matches!(self.phase, Phase::Queue | Phase::Wait | Phase::Recover)
    }

    /// The window ends before anything is read: what is protected is un-protected.
    fn evict_nothing(&mut self) {
        self.pages
            .iter_mut()
            .for_each(|p| p.mask = SubpageMask::NONE);
        self.goto(Phase::Pins);
    }

    /// The process has said something, so it may have made threads.
    pub(crate) fn list_again(&mut self) {
        self.listed = None;
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
            told_by: 0,
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
pub(super) fn can_make_room(s: &Space, by: SpaceId, childhood: &Childhood, now: Nanos) -> bool {
    // Whoever faults is not stopped, so its ring only wants a CPU.
    let patience = if s.id == by {
        STUCK_RUNNING_NS
    } else {
        STUCK_NS
    };
    s.life == Life::Serving
        && s.known
        && !s.is_spared(childhood, now)
        && match s.ring {
            Ring::Refused | Ring::Inherited => false,
            // A stopped target makes none, and a predecessor's may wait for just this fault.
            Ring::Asked(since) => now < since.after(STUCK_NS),
            Ring::Absent | Ring::Ready => true,
        }
        // It goes on when what stayed is dirty again; that takes the ring, and the ring a CPU.
        && (s.restore.is_idle()
            || now < s.restore.went_on.after(patience)
                && !(s.redirties_failed > 0 && s.restore.awaits_stop()))
        && s.fruitless < FRUITLESS
        && s.usage_bytes > 0
        && !s.regions.is_empty()
        && match &s.batch {
            Some(b) if b.phase == Phase::RepairWait => now < b.waiting_since.after(patience),
            // What keeps it from being stopped may be a fault that waits for just this.
            Some(b) if b.repair.asked => {
                s.redirties_failed == 0 && now < b.waiting_since.after(patience)
            }
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
            && !s.is_spared(&self.childhood, self.now)
            && s.restore.is_idle()
            && self.now >= s.rest_until
            && (!s.policy.is_empty() || (self.now >= s.sweep_after && !s.regions.is_empty()))
            && self.usage_bytes() > self.high_bytes()
            && s.usage_bytes > 0
            && self.frames.free() >= FRAMES_LEAST
    }

    /// Begins to make dirty what requests in a relative have hit here, if there is any.
    fn begin_repairs(&mut self, id: SpaceId) -> bool {
        let now = self.now;
        // The note of the last batch is needed for as long as what stayed is not dirty again.
        let may = |s: &&mut Space| s.known && !s.hits.is_empty() && s.restore.is_idle();
        let Some(s) = self.space(id).filter(may) else {
            return false;
        };
        let some = s.hits.len().min(BATCH_PAGES);
        let b = Batch::of_hits(s.hits.drain(..some), now);
        let pages: Vec<_> = b.hits().map(|p| (p, SubpageMask::NONE, None)).collect();
        s.batch = Some(b);
        self.notes.write(id, pages.into_iter());
        self.notes.settle(id);
        self.note_hits(id);
        true
    }

    /// Writes down which pages are to be made dirty here, beside those that are noted of the batch.
    pub(super) fn note_hits(&self, id: SpaceId) {
        if let Some(s) = self.space_ref(id) {
            let noted = self.notes.pages(id);
            let beside = s.batch.iter().flat_map(|b| b.hits_beside(noted));
            self.notes
                .set_hits(id, s.hits.iter().copied().chain(beside));
        }
    }

    /// The next step of a space's batch; begins one if there is pressure.
    pub(super) fn step_batch(&mut self, id: SpaceId) -> Option<Op> {
        if self.space_ref(id)?.batch.is_none() && !self.begin_repairs(id) {
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
                Ring::Asked(_) | Ring::Refused | Ring::Inherited => return None,
                Ring::Ready => {}
            }
            let now = self.now;
            self.space(id)?.batch = Some(Batch::new(now));
        }
        let mut b = self.space(id)?.batch.take()?;
        let op = self.advance(id, &mut b);
        if op.is_none() && b.phase == Phase::Look && b.at >= b.pages.len() {
            self.finish(id, b);
            // More was hit than one batch has room for, or it was heard of meanwhile.
            let more = self.space_ref(id).is_some_and(|s| !s.hits.is_empty());
            return if more { self.step_batch(id) } else { None };
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
                Phase::Repair if self.awaits_stop(b, id) => return None,
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

    // --- completions ----------------------------------------------------------------------------

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
                    // Threads unknown.
                    b.evict_nothing();
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
            Step::RepairKick
            | Step::RepairLook
            | Step::RepairQueue { .. }
            | Step::RepairLift(_)
            | Step::RepairRedirty
            | Step::RepairProof => self.repair_step_done(id, b, step, outcome),
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
}
