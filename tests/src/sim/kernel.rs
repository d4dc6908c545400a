//! The simulated kernel: pages, page tables, reclaim, devices, and who runs next.
//!
//! It follows Linux 6.18 in what the pager can see: see `docs/testing.md` for what it leaves out, and the
//! conformance suite for what the real kernel says to each point. Everything happens in single steps of
//! single threads, chosen by the seed.

use holo_pager::core::Event;

use super::knobs::Knobs;
use super::mm::{Folio, FolioId, Mm, MmId, Prot, Pte, UffdId, Vma};
use super::oracle::{Content, Ideal, ZERO};
use super::ring::Ring;
use super::rng::Rng;
use super::thread::{Task, Thread, ThreadId, Wait};
use super::uffd::Uffd;

/// How long a page is safe from reclaim at most (`Folio::spared_until_ns`).
pub(crate) const SPARE_NS: u64 = 500_000_000;
/// A fault or message that waits longer than this is a hang.
pub(crate) const HANG_NS: u64 = 3_000_000_000;

/// Prints a line of the trace.
macro_rules! trace {
    ($kernel:expr, $($arg:tt)*) => {
        if $kernel.trace {
            eprintln!("{:>9}us {}", $kernel.now_ns / 1000, format!($($arg)*));
        }
    };
}
pub(crate) use trace;

/// A device that writes to a pinned page.
#[derive(Debug)]
pub(crate) struct Transfer {
    pub(crate) mm: MmId,
    pub(crate) folio: FolioId,
    pub(crate) writes: u64,
    /// A registered buffer: it counts as pinned, and letting go marks no page dirty.
    pub(crate) long: bool,
}

/// What became of an access.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Touch {
    /// It may be made now.
    Done,
    /// The thread waits for the pager.
    Blocked,
    /// SIGSEGV.
    Fault,
}

/// The machine.
pub(crate) struct Kernel {
    pub(crate) rng: Rng,
    pub(crate) knobs: Knobs,
    pub(crate) now_ns: u64,
    pub(crate) trace: bool,
    /// What went wrong first; nothing runs after it.
    pub(crate) failure: Option<String>,
    pub(crate) mms: Vec<Mm>,
    pub(crate) ideals: Vec<Ideal>,
    pub(crate) folios: Vec<Folio>,
    pub(crate) uffds: Vec<Uffd>,
    pub(crate) rings: Vec<Option<Ring>>,
    pub(crate) threads: Vec<Thread>,
    pub(crate) transfers: Vec<Transfer>,
    /// Acts that the programs may still begin.
    pub(crate) acts_left: u64,
    /// When the last pager began: where each one dies early nobody hangs because of the last.
    pub(crate) pager_since_ns: u64,
    pub(crate) names: u64,
    values: u32,
    runnable: Vec<ThreadId>,
    /// Reads of memory that were compared with the oracle.
    pub(crate) checks: u64,
    pub(crate) steps: u64,
}

impl Kernel {
    pub(crate) fn new(rng: Rng, knobs: Knobs, trace: bool) -> Self {
        Self {
            rng,
            acts_left: knobs.acts,
            pager_since_ns: 0,
            knobs,
            now_ns: 1_000_000,
            trace,
            failure: None,
            mms: Vec::new(),
            ideals: Vec::new(),
            folios: Vec::new(),
            uffds: Vec::new(),
            rings: Vec::new(),
            threads: Vec::new(),
            transfers: Vec::new(),
            names: 0,
            values: 0,
            runnable: Vec::new(),
            checks: 0,
            steps: 0,
        }
    }

    pub(crate) fn fail(&mut self, why: String) {
        trace!(self, "FAIL {why}");
        self.failure.get_or_insert(why);
    }

    pub(crate) fn name(&mut self) -> u64 {
        self.names += 1;
        self.names
    }

    /// A value that was never written before.
    fn value(&mut self) -> u32 {
        self.values += 1;
        self.values
    }

    // --- address spaces -------------------------------------------------------------------------

    pub(crate) fn add_mm(&mut self, mm: Mm, ideal: Ideal) -> MmId {
        self.mms.push(mm);
        self.ideals.push(ideal);
        self.rings.push(None);
        self.mms.len() - 1
    }

    pub(crate) fn mms_alive(&self) -> usize {
        self.mms.iter().filter(|m| m.alive).count()
    }

    /// The process ends: no event, no wait, at once.
    pub(crate) fn exit(&mut self, mm: MmId) {
        if !self.mms[mm].alive {
            return;
        }
        trace!(self, "mm{mm} exits");
        self.mms[mm].alive = false;
        self.transfers.retain(|t| t.mm != mm);
        let pages: Vec<u64> = self.mms[mm].ptes.keys().copied().collect();
        for v in pages {
            self.unmap_page(mm, v);
        }
        self.mms[mm].vmas.clear();
        self.rings[mm] = None;
        if let Some(u) = self.mms[mm].uffd {
            self.uffds[u].faults.clear();
            self.uffds[u].events.clear();
            self.uffds[u].changing = 0;
        }
        let mut unborn = Vec::new();
        for t in self.threads.iter_mut().filter(|t| t.mm == mm) {
            if let Task::Tell { child: Some(c), .. } = t.task {
                unborn.push(c);
            }
            t.alive = false;
            t.wait = None;
            t.task = Task::Idle;
            t.life = None;
        }
        for child in unborn {
            self.exit(child);
        }
    }

    // --- pages ----------------------------------------------------------------------------------

    pub(crate) fn content(&self, mm: MmId, v: u64) -> Option<Content> {
        let pte = self.mms[mm].ptes.get(&v)?;
        Some(pte.folio.map_or(ZERO, |f| self.folios[f].content))
    }

    pub(crate) fn unmap_page(&mut self, mm: MmId, v: u64) {
        if let Some(Pte { folio: Some(f), .. }) = self.mms[mm].ptes.remove(&v) {
            self.folios[f].maps.retain(|&m| m != (mm, v));
        }
    }

    /// Maps a new page of this content, dirty.
    pub(crate) fn install(&mut self, mm: MmId, v: u64, content: Content) {
        self.unmap_page(mm, v);
        self.folios.push(Folio {
            content,
            maps: vec![(mm, v)],
            ..Folio::default()
        });
        let pte = Pte {
            folio: Some(self.folios.len() - 1),
            dirty: true,
            wp: false,
        };
        self.mms[mm].ptes.insert(v, pte);
    }

    pub(crate) fn install_zero_page(&mut self, mm: MmId, v: u64) {
        let pte = Pte {
            folio: None,
            dirty: false,
            wp: false,
        };
        self.mms[mm].ptes.insert(v, pte);
    }

    /// Breaks sharing and marks dirty, as a write does.
    pub(crate) fn make_writable(&mut self, mm: MmId, v: u64) {
        let Some(pte) = self.mms[mm].ptes.get(&v).copied() else {
            return;
        };
        match pte.folio {
            Some(f) if self.folios[f].maps.len() == 1 => {
                if let Some(p) = self.mms[mm].ptes.get_mut(&v) {
                    p.dirty = true;
                }
            }
            Some(f) => self.install(mm, v, self.folios[f].content),
            None => self.install(mm, v, ZERO),
        }
    }

    /// What the processor does for an access of thread `t` to subpage `v`.
    pub(crate) fn touch(&mut self, t: ThreadId, v: u64, write: bool) -> Touch {
        let mm = self.threads[t].mm;
        let Some(vma) = self.mms[mm].vma(v) else {
            return Touch::Fault;
        };
        if vma.prot == Prot::None || (write && vma.prot != Prot::Write) {
            return Touch::Fault;
        }
        let uffd = vma.uffd;
        match (self.mms[mm].ptes.get(&v).copied(), uffd) {
            (None, Some(u)) => {
                self.raise(t, u, v, write, false);
                return Touch::Blocked;
            }
            (None, None) if write => self.install(mm, v, ZERO),
            (None, None) => self.install_zero_page(mm, v),
            (Some(_), _) if !write => {}
            (Some(pte), Some(u)) if pte.wp => {
                self.raise(t, u, v, true, true);
                return Touch::Blocked;
            }
            (Some(_), _) => self.make_writable(mm, v),
        }
        self.threads[t].blocked_since_ns = None;
        Touch::Done
    }

    /// The thread reads what is at `v`, which is present.
    pub(crate) fn observe(&mut self, mm: MmId, v: u64) {
        let content = self.content(mm, v).unwrap_or(ZERO);
        self.checks += 1;
        if let Err(why) = self.ideals[mm].see(v, content) {
            self.fail(format!("WRONG DATA in mm{mm}: {why}"));
        }
    }

    /// A word of the present, writable subpage `v` gets a new value.
    pub(crate) fn store_word(&mut self, mm: MmId, v: u64, marked: bool) {
        self.observe(mm, v);
        let (word, value) = (self.rng.index(4), self.value());
        let Some(Pte { folio: Some(f), .. }) = self.mms[mm].ptes.get(&v) else {
            return;
        };
        self.folios[*f].content[word] = value;
        if marked {
            self.ideals[mm].write(v, word, value);
        } else {
            self.ideals[mm].write_unmarked(v, word, value);
        }
    }

    // --- reclaim and devices --------------------------------------------------------------------

    /// Whether the kernel may drop the page now, wherever it is mapped clean.
    pub(crate) fn may_drop(&self, f: FolioId) -> bool {
        let folio = &self.folios[f];
        folio.lazy && !folio.dirty && folio.pins == 0 && folio.spared_until_ns <= self.now_ns
    }

    /// Drops a page where it is clean; where it is dirty it becomes an ordinary one again.
    pub(crate) fn reclaim(&mut self, f: FolioId) {
        if !self.may_drop(f) {
            return;
        }
        let mut maps = self.folios[f].maps.clone();
        while !maps.is_empty() {
            let (mm, v) = maps.swap_remove(self.rng.index(maps.len()));
            if self.mms[mm].ptes.get(&v).is_some_and(|p| p.dirty) {
                self.folios[f].dirty = true;
                self.folios[f].lazy = false;
                return;
            }
            trace!(self, "kernel drops mm{mm} {v:#x}");
            self.unmap_page(mm, v);
        }
    }

    /// The pager's batch has done what it does within its window, repairs included.
    pub(crate) fn window_over(&mut self, mm: MmId) {
        for pte in self.mms[mm].ptes.values() {
            if let Some(f) = pte.folio.filter(|&f| self.folios[f].spared_for == mm) {
                self.folios[f].spared_until_ns = 0;
            }
        }
    }

    fn reclaim_some(&mut self) {
        let lazy: Vec<FolioId> = (0..self.folios.len())
            .rev()
            .take(400)
            .filter(|&f| !self.folios[f].maps.is_empty() && self.may_drop(f))
            .collect();
        if !lazy.is_empty() {
            let f = lazy[self.rng.index(lazy.len())];
            self.reclaim(f);
        }
    }

    fn step_transfer(&mut self) {
        let i = self.rng.index(self.transfers.len());
        let (mm, f) = (self.transfers[i].mm, self.transfers[i].folio);
        if self.transfers[i].writes == 0 {
            self.folios[f].dirty |= !self.transfers[i].long;
            self.folios[f].pins -= 1;
            self.transfers.swap_remove(i);
            trace!(self, "device done with folio {f}");
            return;
        }
        self.transfers[i].writes -= 1;
        let mapped = self.folios[f].maps.iter().find(|m| m.0 == mm).copied();
        match mapped {
            Some((_, v)) => {
                trace!(self, "device writes mm{mm} {v:#x}");
                let marked = !self.transfers[i].long;
                self.store_word(mm, v, marked);
            }
            None => {
                let value = self.value();
                self.folios[f].content[0] = value;
            }
        }
    }

    // --- who runs -------------------------------------------------------------------------------

    fn can_run(&self, t: ThreadId) -> bool {
        let thread = &self.threads[t];
        if !thread.alive || thread.wait.is_some() || thread.preempted_until_ns > self.now_ns {
            return false;
        }
        let mm = &self.mms[thread.mm];
        let stopped = mm.stopped_until_ns > self.now_ns;
        match &thread.task {
            Task::Idle if thread.worker => {
                !stopped
                    && self.rings[thread.mm]
                        .as_ref()
                        .is_some_and(|r| r.visible > 0)
            }
            Task::Idle => !stopped && (self.acts_left > 0 || thread.life.is_some()),
            Task::Access { .. } | Task::Verify { .. } => !stopped,
            _ => true,
        }
    }

    /// One step of anything; false if nothing can run now.
    pub(crate) fn step(&mut self) -> bool {
        if self.failure.is_some() {
            return false;
        }
        let mut runnable = std::mem::take(&mut self.runnable);
        runnable.clear();
        runnable.extend((0..self.threads.len()).filter(|&t| self.can_run(t)));
        let ran = self.step_of(&runnable);
        self.runnable = runnable;
        ran
    }

    fn step_of(&mut self, runnable: &[ThreadId]) -> bool {
        if runnable.is_empty() && self.transfers.is_empty() {
            return false;
        }
        self.steps += 1;
        self.now_ns += 1 + self.rng.below(2 * self.knobs.step_ns);
        let k = &self.knobs;
        let (reclaim, spurious, stops) = (k.reclaim, k.spurious, k.stops);
        if reclaim > 0 && self.rng.one_in(reclaim) {
            self.reclaim_some();
        }
        if spurious > 0 && self.rng.one_in(spurious) {
            self.wake_one_for_nothing();
        }
        if stops > 0 && self.acts_left > 0 && self.rng.one_in(stops) {
            let mm = self.rng.index(self.mms.len());
            let ns = self.rng.between(10_000, 100_000_000);
            trace!(self, "mm{mm} is stopped for {} us", ns / 1000);
            self.mms[mm].stopped_until_ns = self.now_ns + ns;
        }
        for r in self.rings.iter_mut().flatten() {
            // The ring's thread may be awake, and see requests before it is kicked.
            if r.visible < r.queue.len() && !r.lost && self.rng.one_in(4) {
                r.visible = r.queue.len();
            }
        }
        if !self.transfers.is_empty() && (runnable.is_empty() || self.rng.one_in(4)) {
            self.step_transfer();
            return true;
        }
        if !runnable.is_empty() {
            let t = runnable[self.rng.index(runnable.len())];
            self.run_thread(t);
        }
        true
    }

    /// A signal: the thread tries its access again though nobody woke it.
    fn wake_one_for_nothing(&mut self) {
        let waiting: Vec<ThreadId> = (0..self.threads.len())
            .filter(|&t| matches!(self.threads[t].wait, Some(Wait::Fault { .. })))
            .collect();
        if !waiting.is_empty() {
            let t = waiting[self.rng.index(waiting.len())];
            if let Some(Wait::Fault { uffd, .. }) = self.threads[t].wait.take() {
                self.uffds[uffd].faults.retain(|&w| w != t);
            }
        }
    }

    /// When the next stopped process or preempted thread goes on.
    pub(crate) fn next_continue_ns(&self) -> Option<u64> {
        let stopped = self.mms.iter().filter(|m| m.alive);
        let preempted = self.threads.iter().filter(|t| t.alive);
        stopped
            .map(|m| m.stopped_until_ns)
            .chain(preempted.map(|t| t.preempted_until_ns))
            .filter(|&t| t > self.now_ns)
            .min()
    }

    /// Fails if a thread waits for the pager for too long.
    pub(crate) fn check_hangs(&mut self) {
        let mut hung = None;
        for (i, t) in self.threads.iter().enumerate().filter(|(_, t)| t.alive) {
            let since = t.blocked_since_ns.unwrap_or(self.now_ns);
            let since = since.max(self.mms[t.mm].stopped_until_ns);
            let since = since.max(self.pager_since_ns);
            if t.wait.is_some() && self.now_ns > since + HANG_NS {
                hung = Some(format!("HANG: thread {i} of mm{} waits: {t:?}", t.mm));
            }
        }
        if let Some(why) = hung {
            self.fail(why);
        }
    }

    /// Nobody of the programs is inside the kernel or has anything left to do.
    pub(crate) fn programs_idle(&self) -> bool {
        self.transfers.is_empty()
            && self
                .threads
                .iter()
                .filter(|t| t.alive && !t.worker)
                .all(|t| matches!(t.task, Task::Idle) && t.life.is_none())
    }

    /// The pageable memory of a space in RAM, as the kernel counts it.
    pub(crate) fn resident_bytes(&self, mm: MmId) -> u64 {
        let served = |v: u64| self.mms[mm].vma(v).is_some_and(|m| m.uffd.is_some());
        let n = self.mms[mm]
            .ptes
            .iter()
            .filter(|&(&v, p)| p.folio.is_some() && served(v))
            .count();
        n as u64 * 4096
    }

    // --- mappings -------------------------------------------------------------------------------

    /// Removes what is mapped in `start..end`; returns whom to tell.
    pub(crate) fn unmap_range(&mut self, mm: MmId, start: u64, end: u64) -> Option<UffdId> {
        let served = self.mms[mm].served(start, end);
        let pages: Vec<u64> = self.mms[mm]
            .ptes
            .range(start..end)
            .map(|(&v, _)| v)
            .collect();
        for v in pages {
            self.unmap_page(mm, v);
        }
        self.mms[mm].remove_vmas(start, end);
        self.ideals[mm].forget(start, end);
        served
    }

    /// Moves pages and what the programs know of them.
    pub(crate) fn move_pages(&mut self, mm: MmId, from: u64, to: u64, len: u64) {
        for i in 0..len {
            if let Some(pte) = self.mms[mm].ptes.remove(&(from + i)) {
                if let Some(f) = pte.folio {
                    for m in &mut self.folios[f].maps {
                        if *m == (mm, from + i) {
                            m.1 = to + i;
                        }
                    }
                }
                self.mms[mm].ptes.insert(to + i, pte);
            }
        }
        self.ideals[mm].moved(from, to, len);
    }

    /// The child of a fork of `mm`: its address space, not yet running.
    pub(crate) fn fork_mm(&mut self, parent: MmId) -> MmId {
        let vmas: Vec<Vma> = self.mms[parent]
            .vmas
            .iter()
            .filter(|m| !m.dont_fork)
            .cloned()
            .map(|m| Vma { locked: false, ..m })
            .collect();
        let kept = |v: u64| {
            vmas.iter()
                .any(|m| v >= m.start && v < m.end && !m.wipe_on_fork)
        };
        let ideal = self.ideals[parent].forked(kept);
        let copied: Vec<(u64, Pte)> = self.mms[parent]
            .ptes
            .iter()
            .filter(|&(&v, _)| kept(v))
            .map(|(&v, &p)| (v, p))
            .collect();
        let mut left_out = self.mms[parent].left_out.clone();
        let kept_out = self.mms[parent].vmas.iter().filter(|m| m.dont_fork);
        left_out.extend(kept_out.map(|m| (m.start, m.end)));
        let arena = self.mms[parent].arena;
        let heads = self.mms[parent].heads.clone();
        let child = self.add_mm(
            Mm {
                alive: true,
                vmas,
                arena,
                heads,
                forked: true,
                left_out,
                ..Mm::default()
            },
            ideal,
        );
        for (v, pte) in copied {
            let wp = pte.wp && self.mms[child].vma(v).is_some_and(|m| m.uffd.is_some());
            match pte.folio {
                Some(f) if self.folios[f].pins > 0 => {
                    let content = self.folios[f].content;
                    self.install(child, v, content);
                    if let Some(p) = self.mms[child].ptes.get_mut(&v) {
                        p.wp = wp;
                    }
                }
                folio => {
                    if let Some(f) = folio {
                        self.folios[f].maps.push((child, v));
                    }
                    self.mms[child].ptes.insert(v, Pte { wp, ..pte });
                }
            }
        }
        child
    }

    /// A message of a kernel act that changes the address space.
    pub(crate) fn announce(&mut self, uffd: UffdId) {
        self.uffds[uffd].changing += 1;
        self.uffds[uffd].unsettled = true;
    }

    /// Looks at an event that the pager has just read.
    pub(crate) fn note_read(&mut self, mm: MmId, event: Event, own: bool) {
        // A subpage that the parent drops between a fork's copy and the reading of the fork's message may be either
        // in the child: the two calls overlap.
        let dies = self.knobs.deaths > 0;
        let uffd = self.mms[mm].uffd;
        let to_be_read: Vec<MmId> = uffd
            .iter()
            .flat_map(|&u| &self.uffds[u].events)
            .filter_map(|(_, event)| match event {
                Event::Fork { fd } => Some(self.uffds[*fd as usize].mm),
                _ => None,
            })
            .collect();
        if let (Event::Remove(range), false) = (event, own) {
            let (start, end) = (range.start.0 / 4096, range.end.0 / 4096);
            let unborn: Vec<MmId> = self
                .threads
                .iter()
                .filter(|t| t.alive && t.mm == mm)
                .filter_map(|t| match t.task {
                    Task::Tell { child, told, .. } if !told || (dies && t.wait.is_some()) => child,
                    _ => None,
                })
                .collect();
            for child in unborn.into_iter().chain(to_be_read) {
                self.ideals[child].lazy(start, end);
            }
        }
    }
}
