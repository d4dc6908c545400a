//! The world of a simulated core: its operations on the simulated kernel, and the shell's other duties
//! (scanning, measuring, rings, children, quiesces), each with delays.

use std::cell::Cell;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::Ordering;

use holo_pager::core::{
    Event, FrameId, HEADS, Heads, Input, NEVER_RAN, Nanos, Op, Outcome, PageLook, Source,
    StopReason, Words,
};
use holo_pager::drive::World;
use holo_pager::store::api::{PageBytes, Ticket};
use holo_proto::{Addr, AddrRange, PAGE_SUBPAGES, PageIndex, SUBPAGE_BYTES, SpaceId, SubpageMask};

use super::kernel::{Kernel, trace};
use super::knobs::MAP_BLOCKS;
use super::mm::{MmId, Prot, UffdId, Vma};
use super::oracle::{Content, ZERO};
use super::ring::Ring;
use super::store::{content_of, set_content};
use super::thread::{Thread, ThreadId};
use super::uffd::{addresses, subpages};

/// Deaths in one run: with too many, nothing else ever happens.
pub(crate) const DEATHS_MOST: u64 = 150;

/// What a death of the pager unwinds with.
pub(crate) struct Death;

thread_local! {
    /// Named points until the next death; 0: none comes.
    static POINTS_LEFT: Cell<u64> = const { Cell::new(0) };
}

/// The core's hook at its named points.
pub(crate) fn at_point(point: holo_pager::core::CrashPoint) {
    let left = POINTS_LEFT.get();
    if left == 1 {
        POINTS_LEFT.set(0);
        if std::env::var_os("HOLO_SIM_POINTS").is_some() {
            eprintln!("           death at {}", point.name());
        }
        std::panic::resume_unwind(Box::new(Death));
    }
    POINTS_LEFT.set(left.saturating_sub(1));
}

pub(crate) fn die_after_points(points: u64) {
    POINTS_LEFT.set(points);
}

/// A quiesce that was asked for: who is still in a system call that ran then.
struct Quiesce {
    space: SpaceId,
    count: u64,
    for_calm: bool,
    waits_for: BTreeSet<ThreadId>,
}

/// Pages that are to be made dirty in a stop of all threads, and when that comes about.
struct Redirty {
    due_ns: u64,
    space: SpaceId,
    mm: MmId,
    page: PageIndex,
    mask: SubpageMask,
    ticket: Ticket,
}

/// The simulated kernel with the shell's state around it.
pub(crate) struct Sim<'m> {
    pub(crate) kernel: Kernel,
    pub(crate) frames: &'m mut [Box<PageBytes>],
    pub(crate) journal: Words<'m>,
    /// Descriptor of each space that the pager serves.
    pub(crate) fds: BTreeMap<SpaceId, UffdId>,
    /// Spaces whose children's mappings are not known to the core yet, as the shell sees it.
    inputs: Vec<(u64, u64, Input)>,
    order: u64,
    quiesces: Vec<Quiesce>,
    redirties: Vec<Redirty>,
    heads_told: BTreeSet<(SpaceId, u64)>,
    /// Which rings were made, or refused.
    pub(crate) ring_made: BTreeMap<MmId, bool>,
    /// A predecessor's rings: nothing is taken from them until they are quiet.
    pub(crate) quiet_wait: BTreeSet<SpaceId>,
    /// Spaces that the shell has looked for mappings in, and what it saw.
    looked_at: BTreeMap<SpaceId, BTreeSet<(u64, u64)>>,
    /// Spaces that were told to let go.
    pub(crate) detaching: BTreeSet<MmId>,
    pub(crate) closed: u64,
    /// What the core was told of last and is still in the ring of this process: whether that will never run.
    told: Option<(MmId, bool)>,
    /// The kernel moved since the last operation.
    moved: bool,
    next_scan_ns: u64,
    pub(crate) deaths: u64,
    pub(crate) ops: u64,
}

impl<'m> Sim<'m> {
    pub(crate) fn new(
        kernel: Kernel,
        frames: &'m mut [Box<PageBytes>],
        journal: Words<'m>,
    ) -> Self {
        Self {
            kernel,
            frames,
            journal,
            fds: BTreeMap::new(),
            inputs: Vec::new(),
            order: 0,
            quiesces: Vec::new(),
            redirties: Vec::new(),
            heads_told: BTreeSet::new(),
            ring_made: BTreeMap::new(),
            quiet_wait: BTreeSet::new(),
            looked_at: BTreeMap::new(),
            detaching: BTreeSet::new(),
            closed: 0,
            told: None,
            moved: false,
            next_scan_ns: 0,
            deaths: 0,
            ops: 0,
        }
    }

    fn uffd(&self, space: SpaceId) -> Option<UffdId> {
        self.fds.get(&space).copied()
    }

    pub(crate) fn mm_of(&self, space: SpaceId) -> Option<MmId> {
        Some(self.kernel.uffds[self.uffd(space)?].mm)
    }

    /// Queues an input that comes after a while.
    pub(crate) fn send(&mut self, input: Input) {
        let delay = self.kernel.knobs.input_delay_ns;
        let due = self.kernel.now_ns + self.kernel.rng.below(delay + 1);
        self.send_at(due, input);
    }

    fn send_at(&mut self, due_ns: u64, input: Input) {
        self.order += 1;
        self.inputs.push((due_ns, self.order, input));
    }

    /// The pager is dead: what its shell knew is gone.
    pub(crate) fn forget_shell(&mut self) {
        self.inputs.clear();
        self.quiesces.clear();
        // The guardian, which lives, may be at it just now.
        for r in std::mem::take(&mut self.redirties) {
            if self.kernel.rng.one_in(2) {
                self.redirty(&r);
            }
        }
        self.heads_told.clear();
        self.fds.clear();
        self.quiet_wait.clear();
        self.looked_at.clear();
        self.told = None;
        self.moved = false;
    }

    // --- the shell ------------------------------------------------------------------------------

    /// A look of the shell at all processes: new mappings, sizes, ends.
    pub(crate) fn scan(&mut self) {
        let spaces: Vec<(SpaceId, UffdId)> = self.fds.iter().map(|(&s, &u)| (s, u)).collect();
        for (space, uffd) in spaces {
            let mm = self.kernel.uffds[uffd].mm;
            if !self.kernel.mms[mm].alive {
                self.send(Input::Exited(space));
                continue;
            }
            let bytes = self.kernel.resident_bytes(mm);
            self.send(Input::Measured { space, bytes });
            if self.detaching.contains(&mm) {
                continue;
            }
            // What is new to the shell (a mapping that grew is; after a take-over, everything is), and now and then,
            // when it reads the flags as well, what is not registered.
            let found: Vec<(u64, u64)> = self.kernel.mms[mm]
                .vmas
                .iter()
                .filter(|m| !m.locked && m.prot == Prot::Write)
                .filter(|m| {
                    !self.kernel.mms[mm]
                        .all_heads()
                        .any(|h| h >= m.start && h < m.end)
                })
                .map(|m| (m.start, m.end))
                .collect();
            let seen = self
                .looked_at
                .insert(space, found.iter().copied().collect());
            let unregistered = |start| {
                let vma = self.kernel.mms[mm].vma(start);
                vma.is_some_and(|m| m.uffd.is_none())
            };
            let fresh: Vec<AddrRange> = found
                .into_iter()
                .filter(|r| !seen.as_ref().is_some_and(|s| s.contains(r)) || unregistered(r.0))
                .map(|(start, end)| addresses(start, end))
                .collect();
            for range in fresh {
                self.send(Input::Adopt { space, range });
            }
        }
    }

    fn run_kernel(&mut self) {
        let pace = self.kernel.knobs.pace;
        let steps = self.kernel.rng.below(pace + 2);
        for _ in 0..steps {
            if !self.kernel.step() {
                break;
            }
        }
        self.after_steps();
    }

    pub(crate) fn after_steps(&mut self) {
        let threads = &self.kernel.threads;
        for q in &mut self.quiesces {
            q.waits_for.retain(|&t| threads[t].in_call());
        }
        let (quiet, left) = std::mem::take(&mut self.quiesces)
            .into_iter()
            .partition(|q: &Quiesce| q.waits_for.is_empty());
        self.quiesces = left;
        let quiet: Vec<Quiesce> = quiet;
        for q in quiet {
            if let (true, Some(mm)) = (q.for_calm, self.mm_of(q.space)) {
                self.kernel.hold_still(mm);
            }
            self.send(Input::Quiesced {
                space: q.space,
                count: q.count,
            });
        }
        self.redirty_due();
        let now = self.kernel.now_ns;
        if now >= self.next_scan_ns {
            self.next_scan_ns = now + self.kernel.knobs.scan_every_ns;
            self.scan();
            self.kernel.check_hangs();
        }
        let lost = self.kernel.knobs.ring_lost;
        if lost > 0 && self.kernel.acts_left > 0 && self.kernel.rng.one_in(lost) {
            let mm = self.kernel.rng.index(self.kernel.mms.len());
            // Mostly while something is on it.
            let idle = self.kernel.rings[mm].as_ref().is_none_or(Ring::is_quiet);
            if !idle || self.kernel.rng.one_in(20) {
                self.kernel.end_ring(mm);
            }
        }
        let early = self.kernel.knobs.early_detach;
        if early > 0 && self.kernel.acts_left > 0 && self.kernel.rng.one_in(early) {
            let spaces: Vec<SpaceId> = self.fds.keys().copied().collect();
            if !spaces.is_empty() {
                let space = spaces[self.kernel.rng.index(spaces.len())];
                self.detach(space);
            }
        }
    }

    fn redirty_due(&mut self) {
        let now = self.kernel.now_ns;
        while let Some(i) = self.redirties.iter().position(|r| r.due_ns <= now) {
            let r = self.redirties.swap_remove(i);
            let in_call = |t: &Thread| t.mm == r.mm && t.in_call();
            let busy = self.kernel.threads.iter().any(in_call);
            // By itself only while the programs do something: each failure has a longer rest.
            let fails = self.kernel.acts_left > 0 && self.kernel.rng.one_in(4);
            let stopped = self.kernel.mms[r.mm].alive && !busy && !fails;
            let done = stopped.then(|| self.redirty(&r));
            self.send(Input::Redirtied {
                space: r.space,
                ticket: r.ticket,
                done,
            });
        }
    }

    /// Reads a byte of each page and writes it back while no thread runs. (That a device writes in between, which is undone
    /// then, is a stated limit.)
    fn redirty(&mut self, r: &Redirty) -> SubpageMask {
        let (k, mm) = (&mut self.kernel, r.mm);
        let mut done = SubpageMask::NONE;
        if !k.mms[mm].alive {
            return done;
        }
        for i in r.mask.iter() {
            let at = r.page.subpage(i).0;
            let Some(vma) = k.mms[mm].vma(at) else {
                continue;
            };
            let refused = k.knobs.no_forced_writes && vma.prot != Prot::Write;
            let served = vma.uffd.is_some();
            let wp = k.mms[mm].ptes.get(&at).is_some_and(|p| p.wp);
            if served && wp || refused || k.content(mm, at).is_none() {
                continue;
            }
            k.make_writable(mm, at);
            done = done.with(i);
        }
        trace!(k, "mm{mm} {:x?} {:?} made dirty: {done:?}", r.page, r.mask);
        done
    }

    pub(crate) fn detach(&mut self, space: SpaceId) {
        if let Some(mm) = self.mm_of(space) {
            if self.detaching.insert(mm) {
                trace!(self.kernel, "mm{mm} is to be let go");
                self.send(Input::Detach(space));
            }
        }
    }

    fn due_input(&mut self) -> Option<Input> {
        let now = self.kernel.now_ns;
        let (i, _) = self
            .inputs
            .iter()
            .enumerate()
            .filter(|(_, (due, _, _))| *due <= now)
            .min_by_key(|(_, (due, order, _))| (*due, *order))?;
        Some(self.inputs.swap_remove(i).2)
    }

    fn ring_input(&mut self) -> Option<Input> {
        // What was told of last has been heard: a successor would have found it again.
        if let Some((mm, stranded)) = self.told.take() {
            match self.kernel.rings[mm].as_mut() {
                Some(ring) if stranded => drop(ring.queue.pop_front()),
                Some(ring) => drop(ring.done.pop_front()),
                None => {}
            }
        }
        let spaces: Vec<SpaceId> = self.fds.keys().copied().collect();
        for space in spaces {
            let mm = self.mm_of(space)?;
            let quiet_wait = self.quiet_wait.contains(&space);
            let Some(ring) = self.kernel.rings[mm].as_mut() else {
                if quiet_wait {
                    self.quiet_wait.remove(&space);
                    self.send_at(0, Input::RingLost(space));
                    return Some(Input::RingQuiet {
                        space,
                        requests: None,
                    });
                }
                continue;
            };
            if let Some(tag) = ring.stranded() {
                let result = NEVER_RAN;
                self.told = Some((mm, true));
                return Some(Input::RingDone { space, tag, result });
            }
            if quiet_wait {
                // Of what a predecessor asked for only failures are told.
                while let Some(&(tag, result)) = ring.done.front() {
                    if result < 0 {
                        self.told = Some((mm, false));
                        return Some(Input::RingDone { space, tag, result });
                    }
                    ring.done.pop_front();
                }
                if ring.is_quiet() {
                    self.quiet_wait.remove(&space);
                    let requests = Some(ring.requests);
                    return Some(Input::RingQuiet { space, requests });
                }
                continue;
            }
            if ring.lost && ring.is_quiet() && ring.done.is_empty() {
                self.kernel.rings[mm] = None;
                // The two come by the same way, in order.
                self.inputs
                    .retain(|(_, _, input)| !matches!(input, Input::RingReady(s) if *s == space));
                return Some(Input::RingLost(space));
            }
            if !ring.done.is_empty() && self.kernel.rng.percent(60) {
                let (tag, result) = *ring.done.front()?;
                self.told = Some((mm, false));
                return Some(Input::RingDone { space, tag, result });
            }
        }
        None
    }

    fn readable(&mut self, percent: u64) -> Option<Input> {
        let ready: Vec<SpaceId> = self
            .fds
            .iter()
            .filter(|&(_, &u)| self.kernel.is_readable(u))
            .map(|(&s, _)| s)
            .collect();
        if ready.is_empty() || !self.kernel.rng.percent(percent) {
            return None;
        }
        Some(Input::Readable(ready[self.kernel.rng.index(ready.len())]))
    }

    /// Nothing to do for the pager: the machine goes on until something is to be said to it, or
    /// `deadline`. False if nothing will ever happen.
    pub(crate) fn idle(&mut self, deadline: Option<u64>) -> bool {
        loop {
            self.redirty_due();
            let now = self.kernel.now_ns;
            if self.kernel.failure.is_some()
                || deadline.is_some_and(|d| d <= now)
                || self.has_news()
            {
                return true;
            }
            if self.kernel.step() {
                self.after_steps();
                continue;
            }
            let next = [
                deadline,
                self.inputs.iter().map(|i| i.0).min(),
                self.redirties.iter().map(|r| r.due_ns).min(),
                self.kernel.next_continue_ns(),
            ]
            .into_iter()
            .flatten()
            .min();
            match next {
                Some(t) => self.kernel.now_ns = self.kernel.now_ns.max(t),
                None => return false,
            }
        }
    }

    fn has_news(&self) -> bool {
        let now = self.kernel.now_ns;
        self.inputs.iter().any(|i| i.0 <= now)
            || self.fds.iter().any(|(s, &u)| {
                let mm = self.kernel.uffds[u].mm;
                let quiet_wait = self.quiet_wait.contains(s);
                let ring = self.kernel.rings[mm].as_ref();
                self.kernel.is_readable(u)
                    || ring.is_some_and(|r| !quiet_wait && !r.done.is_empty())
                    || ring.is_some_and(|r| r.lost && r.running == 0)
                    || (quiet_wait && ring.is_none_or(|r| r.is_quiet()))
            })
    }

    fn maybe_die(&mut self) {
        let deaths = self.kernel.knobs.deaths;
        let alive = self.kernel.acts_left > 0 && self.deaths < DEATHS_MOST;
        if deaths > 0 && alive && self.kernel.rng.one_in(deaths) {
            std::panic::resume_unwind(Box::new(Death));
        }
    }

    // --- operations -----------------------------------------------------------------------------

    fn content(&self, frame: FrameId, i: usize) -> Content {
        content_of(&self.frames[usize::from(frame.0)], i)
    }

    fn read_events(&mut self, uffd: UffdId) -> Outcome {
        let room = self.journal.len() / 4;
        let mut n = 0;
        while n < room {
            let Some(event) = self.kernel.read_message(uffd) else {
                break;
            };
            trace!(self.kernel, "   read {event:?}");
            for (k, word) in event.encode().iter().enumerate() {
                self.journal[n * 4 + k].store(*word, Ordering::Release);
            }
            n += 1;
            // Whoever was woken may run on, and its next message come with the same read.
            if self.kernel.rng.one_in(4) {
                self.kernel.step();
            }
        }
        let gone = (0..n).filter(|&i| self.is_gone(uffd, i));
        let gone = gone.fold(0, |gone, i| gone | 1 << i);
        self.kernel.looked_who_left(self.kernel.uffds[uffd].mm);
        Outcome::Events { count: n, gone }
    }

    /// Nothing is mapped now where message `i` says that something has left.
    fn is_gone(&self, uffd: UffdId, i: usize) -> bool {
        let words = [0, 1, 2, 3].map(|k| self.journal[i * 4 + k].load(Ordering::Acquire));
        let Some(left) = Event::decode(words).and_then(Event::left) else {
            return false;
        };
        let (start, end) = subpages(left);
        self.kernel.mms[self.kernel.uffds[uffd].mm].is_hole(start, end)
    }

    fn read(&mut self, mm: MmId, at: u64, n: usize, frame: FrameId, first: usize) -> Outcome {
        for i in 0..n {
            if !self.kernel.mms[mm].alive {
                return Outcome::Gone;
            }
            let v = at + i as u64;
            let content = match self.kernel.content(mm, v) {
                Some(c) => c,
                None => match self.kernel.mms[mm].vma(v) {
                    Some(m) if m.uffd.is_none() && m.prot != Prot::None => {
                        self.kernel.install_zero_page(mm, v);
                        ZERO
                    }
                    _ => return Outcome::Subpages(i),
                },
            };
            set_content(&mut self.frames[usize::from(frame.0)], first + i, content);
            // What came there by a move that is not told yet is not what the pager took it for.
            let told = !self.kernel.is_telling(mm, |child| child.is_none());
            let target = &mut self.kernel.mms[mm];
            let folio = target.ptes.get(&v).and_then(|p| p.folio);
            if let Some(folio) = folio.filter(|_| told) {
                target.read.insert(v, folio);
            }
            if self.kernel.rng.one_in(20) {
                self.kernel.step();
            }
        }
        Outcome::Subpages(n)
    }

    fn look(&self, mm: MmId, page: holo_proto::PageIndex) -> Outcome {
        let mut look = PageLook::default();
        for i in 0..PAGE_SUBPAGES {
            let v = page.subpage(i).0;
            if let Some(pte) = self.kernel.mms[mm].ptes.get(&v) {
                look.present = look.present.with(i);
                match pte.folio {
                    None => look.zero = look.zero.with(i),
                    Some(f) if self.kernel.folios[f].maps.len() == 1 => {
                        look.exclusive = look.exclusive.with(i);
                    }
                    Some(_) => {}
                }
            }
        }
        Outcome::Look(look)
    }

    fn find_present(&self, mm: MmId, range: AddrRange) -> Outcome {
        let (start, end) = subpages(range);
        let found: Vec<u64> = self.kernel.mms[mm]
            .ptes
            .range(start..end)
            .filter(|(_, p)| p.folio.is_some())
            .map(|(&v, _)| v)
            .collect();
        let Some(&first) = found.first() else {
            return Outcome::Found(None);
        };
        let len = found
            .iter()
            .zip(first..)
            .take_while(|&(&a, b)| a == b)
            .count();
        Outcome::Found(Some(addresses(first, first + len as u64)))
    }

    fn page_out(&mut self, mm: MmId, ranges: &[AddrRange]) -> Outcome {
        for &range in ranges {
            let (start, end) = subpages(range);
            for v in start..end {
                match self.kernel.mms[mm].vma(v) {
                    None => continue,
                    Some(m) if m.locked => return Outcome::Done,
                    Some(_) => {}
                }
                let folio = self.kernel.mms[mm].ptes.get(&v).and_then(|p| p.folio);
                let leaves = self.kernel.knobs.leaves;
                if let Some(f) = folio {
                    if self.kernel.folios[f].maps.len() == 1 && !self.kernel.rng.percent(leaves) {
                        self.kernel.reclaim(f);
                    }
                }
            }
        }
        Outcome::Done
    }

    fn heads(&mut self, space: SpaceId, mm: MmId) -> Outcome {
        let mut heads = Heads {
            at: [Addr(0); HEADS],
            len: 0,
            more: false,
        };
        for h in self.kernel.mms[mm].all_heads() {
            if self.heads_told.insert((space, h)) {
                heads.at[heads.len] = Addr(h * 4096 + 0x9d0);
                heads.len += 1;
            }
        }
        Outcome::Heads(heads)
    }

    fn need_ring(&mut self, space: SpaceId, mm: MmId) {
        if self.quiet_wait.contains(&space) {
            // A predecessor's is the core's when it is quiet, and no other can be made.
            let why = format!("a ring is asked for in mm{mm}, where a predecessor's is not quiet");
            return self.kernel.fail(why);
        }
        if !self.ring_made.contains_key(&mm) {
            let refused = self.kernel.knobs.ring_refused;
            let made = !self.kernel.rng.percent(refused);
            self.ring_made.insert(mm, made);
        }
        if self.ring_made[&mm] {
            self.kernel.add_ring(mm);
            self.send(Input::RingReady(space));
        } else {
            self.send(Input::RingRefused(space));
        }
    }

    /// The shell has found the process of a space that it did not make: what it sees and the core does not.
    pub(crate) fn introduce(&mut self, space: SpaceId) {
        let Some(mm) = self.mm_of(space) else { return };
        let delay = 20 * self.kernel.knobs.input_delay_ns;
        let due = self.kernel.now_ns + self.kernel.rng.below(delay + 1);
        let vmas = &self.kernel.mms[mm].vmas;
        let ranges = |which: fn(&Vma) -> bool| -> Vec<AddrRange> {
            let found = vmas.iter().filter(|m| which(m));
            found.map(|m| addresses(m.start, m.end)).collect()
        };
        let (wiped, registered) = (ranges(|m| m.wipe_on_fork), ranges(|m| m.uffd.is_some()));
        for range in wiped {
            self.send_at(due, Input::Wiped { space, range });
        }
        for range in registered {
            self.send_at(due, Input::Registered { space, range });
        }
        self.send_at(due, Input::Known(space));
    }

    fn close(&mut self, space: SpaceId, uffd: UffdId, detached: bool) {
        let mm = self.kernel.uffds[uffd].mm;
        trace!(self.kernel, "mm{mm} is closed, detached {detached}");
        self.closed += 1;
        self.fds.remove(&space);
        self.looked_at.remove(&space);
        if self.kernel.mms[mm].alive && !detached {
            self.kernel
                .fail(format!("the core gave up mm{mm}, which lives"));
        }
        self.kernel.uffd_close(uffd);
        if self.kernel.mms[mm].alive {
            self.kernel.mms[mm].uffd = None;
        }
        self.inputs.retain(|(_, _, input)| !is_about(input, space));
        self.quiesces.retain(|q| q.space != space);
        self.redirties.retain(|r| r.space != space);
        self.heads_told.retain(|&(s, _)| s != space);
        self.quiet_wait.remove(&space);
    }

    /// Whether this world gives a reason for that.
    fn may_stop(&self, why: StopReason) -> bool {
        match why {
            StopReason::TooLarge => self.kernel.knobs.map_blocks < MAP_BLOCKS,
            StopReason::NotDirtied { .. } => self.kernel.knobs.no_forced_writes,
            StopReason::Damaged { .. } => self.kernel.knobs.store_damaged > 0,
            _ => false,
        }
    }

    fn execute(&mut self, op: &Op, ranges: &[AddrRange]) -> Outcome {
        let space = space_of(op);
        if let Op::Compare { a, b, mask } = *op {
            let differs = mask
                .iter()
                .filter(|&i| self.content(a, i) != self.content(b, i))
                .fold(SubpageMask::NONE, SubpageMask::with);
            return Outcome::Mask(differs);
        }
        if let Op::Child { space, fd, .. } = *op {
            self.fds.insert(space, fd as usize);
            self.introduce(space);
            return Outcome::Done;
        }
        let Some((space, uffd)) = space.and_then(|s| Some((s, self.uffd(s)?))) else {
            return Outcome::Refused(19);
        };
        let mm = self.kernel.uffds[uffd].mm;
        let alive = self.kernel.mms[mm].alive;
        match *op {
            Op::ReadEvents { .. } => self.read_events(uffd),
            Op::Copy {
                at,
                source,
                subpages,
                ..
            } => {
                let bytes: Vec<Content> = match source {
                    Source::Frame(f, first) => (first..first + subpages)
                        .map(|i| self.content(f, i))
                        .collect(),
                    Source::Zeros => vec![ZERO; subpages],
                };
                self.kernel
                    .uffd_install(uffd, at.0, subpages as u64, Some(&bytes))
            }
            Op::Zero { range, .. } => {
                let (start, end) = subpages(range);
                self.kernel.uffd_install(uffd, start, end - start, None)
            }
            Op::Protect { range, .. } | Op::Unprotect { range, .. } => {
                let (start, end) = subpages(range);
                let on = matches!(op, Op::Protect { .. });
                self.kernel.uffd_protect(uffd, start, end, on)
            }
            Op::Wake { range, .. } => {
                let (start, end) = subpages(range);
                self.kernel.uffd_wake(uffd, start, end);
                Outcome::Done
            }
            Op::Register { range, .. } => {
                let (start, end) = subpages(range);
                if self.kernel.mms[mm].readers > 0 {
                    // Waits for the lock: whoever holds it goes on.
                    while self.kernel.mms[mm].readers > 0 && self.kernel.step() {}
                }
                self.kernel.uffd_register(uffd, start, end)
            }
            Op::Unregister { range, .. } => {
                let (start, end) = subpages(range);
                while self.kernel.mms[mm].readers > 0 && self.kernel.step() {}
                self.kernel.uffd_unregister(uffd, start, end)
            }
            Op::Advise {
                advice, range, tag, ..
            } => {
                let (start, end) = subpages(range);
                self.kernel.queue_advice(mm, advice, start, end, tag)
            }
            Op::Kick { .. } => {
                self.kernel.kick_ring(mm);
                Outcome::Done
            }
            // The simulated shell knows every process.
            Op::Waits { .. } => Outcome::Done,
            Op::NeedRing { .. } => {
                self.need_ring(space, mm);
                Outcome::Done
            }
            Op::NeedQuiesce {
                count, for_calm, ..
            } => {
                let waits_for = (0..self.kernel.threads.len())
                    .filter(|&t| {
                        self.kernel.threads[t].mm == mm && self.kernel.threads[t].in_call()
                    })
                    .collect();
                if for_calm {
                    self.kernel.hold_still(mm);
                }
                self.quiesces.push(Quiesce {
                    space,
                    count,
                    for_calm,
                    waits_for,
                });
                Outcome::Done
            }
            Op::NeedRedirty {
                page, mask, ticket, ..
            } => {
                let delay = self.kernel.knobs.input_delay_ns;
                let due_ns = self.kernel.now_ns + self.kernel.rng.below(delay + 1);
                self.redirties.push(Redirty {
                    due_ns,
                    space,
                    mm,
                    page,
                    mask,
                    ticket,
                });
                Outcome::Done
            }
            Op::Closed { detached, .. } => {
                self.close(space, uffd, detached);
                Outcome::Done
            }
            Op::Stop { why, .. } => {
                if self.may_stop(why) {
                    self.kernel.exit(mm);
                } else {
                    self.kernel.fail(format!("the core stops mm{mm}: {why:?}"));
                }
                Outcome::Done
            }
            _ if !alive => Outcome::Gone,
            Op::Read {
                at,
                subpages,
                frame,
                first,
                ..
            } => self.read(mm, at.0, subpages, frame, first),
            Op::Pageout { .. } => {
                self.kernel.window_over(mm);
                self.page_out(mm, ranges)
            }
            Op::Look { page, .. } => self.look(mm, page),
            Op::FindPresent { range, .. } => self.find_present(mm, range),
            Op::Threads { anew, .. } => {
                self.kernel.window_over(mm);
                if anew {
                    self.heads_told.retain(|&(s, _)| s != space);
                }
                self.heads(space, mm)
            }
            Op::Pins { .. } => {
                let long = self
                    .kernel
                    .transfers
                    .iter()
                    .filter(|t| t.mm == mm && t.long);
                Outcome::Pinned(long.count() as u64 * SUBPAGE_BYTES)
            }
            Op::Put { .. } | Op::Get { .. } | Op::Compare { .. } | Op::Child { .. } => {
                Outcome::Refused(19)
            }
        }
    }
}

fn space_of(op: &Op) -> Option<SpaceId> {
    match *op {
        Op::ReadEvents { space }
        | Op::Copy { space, .. }
        | Op::Zero { space, .. }
        | Op::Protect { space, .. }
        | Op::Unprotect { space, .. }
        | Op::Wake { space, .. }
        | Op::Read { space, .. }
        | Op::Advise { space, .. }
        | Op::Kick { space }
        | Op::Pageout { space }
        | Op::Look { space, .. }
        | Op::FindPresent { space, .. }
        | Op::Register { space, .. }
        | Op::Unregister { space, .. }
        | Op::Threads { space, .. }
        | Op::Pins { space }
        | Op::NeedRedirty { space, .. }
        | Op::NeedRing { space }
        | Op::NeedQuiesce { space, .. }
        | Op::Child { space, .. }
        | Op::Waits { space, .. }
        | Op::Closed { space, .. }
        | Op::Stop { space, .. } => Some(space),
        Op::Compare { .. } | Op::Put { .. } | Op::Get { .. } => None,
    }
}

fn is_about(input: &Input, about: SpaceId) -> bool {
    match *input {
        Input::Readable(space)
        | Input::RingDone { space, .. }
        | Input::RingQuiet { space, .. }
        | Input::RingReady(space)
        | Input::RingRefused(space)
        | Input::RingLost(space)
        | Input::Adopt { space, .. }
        | Input::Registered { space, .. }
        | Input::Never { space, .. }
        | Input::Known(space)
        | Input::NothingRegistered(space)
        | Input::Wiped { space, .. }
        | Input::Quiesced { space, .. }
        | Input::Redirtied { space, .. }
        | Input::Measured { space, .. }
        | Input::Detach(space)
        | Input::Exited(space) => space == about,
        Input::Store(_) | Input::Budget { .. } => false,
    }
}

impl World for Sim<'_> {
    fn now(&mut self) -> Nanos {
        Nanos(self.kernel.now_ns)
    }

    fn perform(&mut self, op: &Op, pageout: &[AddrRange]) -> Outcome {
        self.maybe_die();
        self.ops += 1;
        self.kernel.now_ns += 1 + self.kernel.rng.below(2 * self.kernel.knobs.op_ns);
        let outcome = self.execute(op, pageout);
        match &outcome {
            Outcome::Heads(h) => trace!(self.kernel, "> {op:x?} -> {:x?}", &h.at[..h.len]),
            Outcome::Look(l) => trace!(
                self.kernel,
                "> {op:x?} -> present {:?} zero {:?} own {:?}", l.present, l.zero, l.exclusive
            ),
            _ => trace!(self.kernel, "> {op:x?} -> {outcome:x?}"),
        }
        self.maybe_die();
        outcome
    }

    fn frame(&mut self, frame: FrameId) -> &mut PageBytes {
        &mut self.frames[usize::from(frame.0)]
    }

    fn poll(&mut self) -> Option<Input> {
        if !self.moved {
            self.moved = true;
            self.run_kernel();
        }
        let input = self
            .due_input()
            .or_else(|| self.ring_input())
            .or_else(|| self.readable(50));
        if input.is_none() {
            self.moved = false;
        } else {
            trace!(self.kernel, "< {:x?}", input.as_ref());
        }
        input
    }
}
