//! Threads, and what each kernel call of theirs does, step by step.
//!
//! Between two steps of one thread anything else may happen. What a step does at once is what the
//! kernel does under its lock.

use std::collections::VecDeque;

use holo_pager::core::Event;
use holo_proto::Addr;

use super::kernel::{Kernel, SPARE_NS, Touch, Transfer, trace};
use super::mm::{MmId, Prot, UffdId, Vma};
use super::ring::Request;
use super::uffd::addresses;

pub(crate) type ThreadId = usize;

const EINVAL: i32 = -22;
const ENOMEM: i32 = -12;

/// What a thread waits for.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Wait {
    /// The pager's answer to a fault.
    Fault {
        uffd: UffdId,
        v: u64,
        write: bool,
        protect: bool,
    },
    /// That its message is read.
    Event,
}

/// What `madvise` is to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Drop {
    DontNeed,
    Free,
}

/// Where a `madvise` is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stage {
    /// To find the next mapping.
    Look,
    /// To queue the message about it.
    Queue(UffdId),
    /// The message was read.
    Told(UffdId),
    /// To find the mapping again.
    LookAgain,
    /// Under the lock.
    Act,
}

/// A `madvise` that drops pages, of the program or of the ring.
#[derive(Clone, Debug)]
pub(crate) struct Advise {
    pub(crate) what: Drop,
    pub(crate) cursor: u64,
    pub(crate) piece_end: u64,
    pub(crate) end: u64,
    pub(crate) stage: Stage,
    pub(crate) error: i32,
    pub(crate) name: u64,
    /// Messages were sent up to here.
    pub(crate) told_to: u64,
    /// The piece's message was the second one about it.
    pub(crate) again: bool,
    /// Of the ring.
    pub(crate) request: Option<Request>,
}

/// A change of mappings.
#[derive(Clone, Debug)]
pub(crate) enum Change {
    Unmap {
        start: u64,
        end: u64,
    },
    Map(Vma),
    Protect {
        start: u64,
        end: u64,
        prot: Prot,
    },
    Move {
        from: u64,
        len: u64,
        to: u64,
        new_len: u64,
    },
    Unlock {
        start: u64,
        end: u64,
    },
}

impl Change {
    /// The ranges that the change is about.
    pub(crate) fn named(&self) -> [(u64, u64); 2] {
        match *self {
            Self::Unmap { start, end }
            | Self::Protect { start, end, .. }
            | Self::Unlock { start, end } => [(start, end), (0, 0)],
            Self::Map(ref vma) => [(vma.start, vma.end), (0, 0)],
            Self::Move {
                from,
                len,
                to,
                new_len,
            } => [(from, from + len), (to, to + new_len)],
        }
    }
}

#[derive(Clone, Debug)]
pub(crate) enum Task {
    Idle,
    Access {
        v: u64,
        write: bool,
    },
    /// A read of a device into memory: the page is pinned, the device writes later.
    Pin {
        v: u64,
    },
    Advise(Advise),
    Populate {
        cursor: u64,
        end: u64,
        tag: u64,
    },
    /// Messages of an act that has happened, one after the other.
    Tell {
        messages: VecDeque<(UffdId, Event)>,
        told: bool,
        child: Option<MmId>,
        /// What the call named: no correct program changes it before the call returns.
        named: [(u64, u64); 2],
    },
    Lock {
        cursor: u64,
        end: u64,
    },
    /// Reads everything once.
    Verify {
        cursor: u64,
    },
}

/// What comes next in a short thread's life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Age {
    /// Its creator has written its control block: now it can be listed.
    Made,
    /// It lives until this moment at least, and then writes its block once more.
    Lives(u64),
    /// It may give back a part of its stack.
    Written,
    /// The kernel clears its id.
    Ends,
}

/// A thread that ends before its process does. The thread that made it plays it as well.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Life {
    /// Its control block. What a correct program does not do while it lives there: drop, unmap, move or
    /// protect it.
    pub(crate) block: u64,
    pub(crate) age: Age,
}

/// The least from when a thread can be listed to its own last write (`THREADS_NS` of the core), without the time of
/// an operation: the pager is not held up between its look at the clock and the protection (a stated limit).
const LIFE_NS: u64 = 30_000;

/// How long the guardian keeps a process still.
const STILL_NS: u64 = 5_000_000;

#[derive(Clone, Debug)]
pub(crate) struct Thread {
    pub(crate) mm: MmId,
    pub(crate) alive: bool,
    /// Runs ring requests, not the program.
    pub(crate) worker: bool,
    pub(crate) wait: Option<Wait>,
    pub(crate) task: Task,
    pub(crate) life: Option<Life>,
    /// The scheduler lets others run until then.
    pub(crate) preempted_until_ns: u64,
    pub(crate) blocked_since_ns: Option<u64>,
}

impl Thread {
    pub(crate) fn new(mm: MmId, worker: bool) -> Self {
        Self {
            mm,
            alive: true,
            worker,
            wait: None,
            task: Task::Idle,
            life: None,
            preempted_until_ns: 0,
            blocked_since_ns: None,
        }
    }

    /// Inside a system call (a fault is none).
    pub(crate) fn in_call(&self) -> bool {
        self.alive
            && !self.worker
            && !matches!(
                self.task,
                Task::Idle | Task::Access { .. } | Task::Verify { .. }
            )
    }
}

impl Kernel {
    /// Whoever is in no call stays where it is, for as long as the guardian keeps a process still.
    pub(crate) fn hold_still(&mut self, mm: MmId) {
        let until = self.now_ns + STILL_NS;
        let stopped = |t: &&mut Thread| t.mm == mm && !t.worker && !t.in_call();
        for thread in self.threads.iter_mut().filter(stopped) {
            thread.preempted_until_ns = thread.preempted_until_ns.max(until);
        }
    }

    pub(crate) fn run_thread(&mut self, t: ThreadId) {
        let mm = self.threads[t].mm;
        let task = std::mem::replace(&mut self.threads[t].task, Task::Idle);
        let next = match task {
            Task::Idle if self.threads[t].worker => self.take_request(mm),
            Task::Idle => match self.threads[t].life {
                Some(life) => self.live(t, life),
                None => self.choose(t),
            },
            Task::Access { v, write } => self.access(t, v, write),
            Task::Pin { v } => self.pin(t, v),
            Task::Advise(a) => self.advise(t, a),
            Task::Populate { cursor, end, tag } => self.populate(t, cursor, end, tag),
            Task::Tell {
                messages,
                told,
                child,
                named,
            } => self.tell(t, messages, told, child, named),
            Task::Lock { cursor, end } => self.lock(t, cursor, end),
            Task::Verify { cursor } => self.verify(t, cursor),
        };
        if self.threads[t].alive {
            self.threads[t].task = next;
        }
    }

    fn access(&mut self, t: ThreadId, v: u64, write: bool) -> Task {
        let mm = self.threads[t].mm;
        match self.touch(t, v, write) {
            Touch::Blocked => Task::Access { v, write },
            Touch::Fault => Task::Idle,
            Touch::Done => {
                trace!(
                    self,
                    "thread {t} of mm{mm} {} {v:#x}",
                    if write { "writes" } else { "reads" }
                );
                if write {
                    self.store_word(mm, v, true);
                } else {
                    self.observe(mm, v);
                }
                Task::Idle
            }
        }
    }

    fn verify(&mut self, t: ThreadId, cursor: u64) -> Task {
        let mm = self.threads[t].mm;
        let Some(m) = self.mms[mm].vma_after(cursor) else {
            return Task::Idle;
        };
        let v = cursor.max(m.start);
        match self.touch(t, v, false) {
            Touch::Blocked => return Task::Verify { cursor: v },
            Touch::Done => self.observe(mm, v),
            Touch::Fault => {}
        }
        Task::Verify { cursor: v + 1 }
    }

    fn pin(&mut self, t: ThreadId, v: u64) -> Task {
        let mm = self.threads[t].mm;
        // A page that may be written already is pinned as it is, clean or dirty.
        let ready = self.mms[mm]
            .ptes
            .get(&v)
            .and_then(|p| p.folio)
            .filter(|&f| {
                self.folios[f].maps.len() == 1
                    && !self.mms[mm].ptes[&v].wp
                    && self.mms[mm].vma(v).is_some_and(|m| m.prot == Prot::Write)
            });
        if ready.is_none() {
            match self.touch(t, v, true) {
                Touch::Blocked => return Task::Pin { v },
                Touch::Fault => return Task::Idle,
                Touch::Done => {}
            }
        }
        let folio = self.mms[mm].ptes.get(&v).and_then(|p| p.folio);
        if let Some(folio) = folio {
            trace!(self, "mm{mm} {v:#x} is pinned, folio {folio}");
            self.folios[folio].pins += 1;
            let writes = self.rng.between(0, 4);
            let long = self.rng.one_in(2);
            // A stated limit: a buffer that is registered, written and let go of between an offer and the
            // kernel's drop leaves no trace that anybody could see.
            self.folios[folio].dirty |= long && self.folios[folio].lazy;
            self.transfers.push(Transfer {
                mm,
                folio,
                writes,
                long,
            });
        }
        Task::Idle
    }

    // --- short threads --------------------------------------------------------------------------

    /// The next step of a short thread's life; what it does meanwhile is a task.
    fn live(&mut self, t: ThreadId, life: Life) -> Task {
        let mm = self.threads[t].mm;
        let v = life.block;
        let (age, task) = match life.age {
            Age::Made => {
                trace!(self, "a thread of mm{mm} with its block at {v:#x} begins");
                self.mms[mm].passing.push(v);
                let until_ns = self.now_ns + LIFE_NS + 2 * self.knobs.op_ns;
                (Age::Lives(until_ns), Task::Idle)
            }
            Age::Lives(until_ns) if self.now_ns < until_ns => (life.age, Task::Idle),
            Age::Lives(_) => (Age::Written, Task::Access { v, write: true }),
            Age::Written => (Age::Ends, self.give_stack_back(t, v).unwrap_or(Task::Idle)),
            Age::Ends => {
                self.clear_id(t, v);
                self.mms[mm].passing.retain(|&h| h != v);
                self.threads[t].life = None;
                return Task::Idle;
            }
        };
        self.threads[t].life = Some(Life { age, ..life });
        task
    }

    /// What the kernel does at a thread's end: a write that waits for no userfaultfd, and is not made then.
    fn clear_id(&mut self, t: ThreadId, v: u64) {
        let mm = self.threads[t].mm;
        let served = self.mms[mm].served(v, v + 1).is_some();
        let pte = self.mms[mm].ptes.get(&v).copied();
        trace!(self, "a thread of mm{mm} with its block at {v:#x} ends");
        if served && pte.is_none_or(|p| p.wp) {
            let why = if pte.is_some() {
                "protected"
            } else {
                "missing"
            };
            self.fail(format!(
                "THREAD: its id was not cleared in mm{mm}: its block at {v:#x} is {why}"
            ));
        } else if self.touch(t, v, true) == Touch::Done {
            self.store_word(mm, v, true);
        }
    }

    // --- madvise --------------------------------------------------------------------------------

    fn advise(&mut self, t: ThreadId, mut a: Advise) -> Task {
        let mm = self.threads[t].mm;
        match a.stage {
            Stage::Look => {
                if a.cursor >= a.end {
                    return self.advised(t, &a, None);
                }
                let Some(m) = self.mms[mm].vma_after(a.cursor).cloned() else {
                    return self.advised(t, &a, Some(ENOMEM));
                };
                if m.start > a.cursor {
                    a.error = ENOMEM;
                    a.cursor = m.start;
                    if a.cursor >= a.end {
                        return self.advised(t, &a, None);
                    }
                }
                if m.locked {
                    return self.advised(t, &a, Some(EINVAL));
                }
                a.piece_end = m.end.min(a.end);
                a.stage = match m.uffd {
                    Some(u) => {
                        self.announce(u);
                        Stage::Queue(u)
                    }
                    None => {
                        self.mms[mm].readers += 1;
                        Stage::Act
                    }
                };
            }
            Stage::Queue(u) => {
                a.again = a.cursor < a.told_to;
                a.told_to = a.told_to.max(a.piece_end);
                let range = addresses(a.cursor, a.piece_end);
                self.queue_event(t, u, Event::Remove(range));
                a.stage = Stage::Told(u);
            }
            Stage::Told(u) => {
                self.settled(u);
                a.stage = Stage::LookAgain;
            }
            Stage::LookAgain => {
                let Some(m) = self.mms[mm].vma(a.cursor).cloned() else {
                    return self.advised(t, &a, Some(ENOMEM));
                };
                if m.locked {
                    return self.advised(t, &a, Some(EINVAL));
                }
                a.piece_end = a.piece_end.min(m.end);
                self.mms[mm].readers += 1;
                a.stage = Stage::Act;
            }
            Stage::Act => {
                let n = self.rng.between(1, 8);
                let to = (a.cursor + n).min(a.piece_end);
                while a.cursor < to {
                    self.drop_page(mm, &a);
                    a.cursor += 1;
                }
                if a.request.is_none() {
                    self.ideals[mm].drop_reached(a.name, Some(a.cursor));
                }
                if a.cursor == a.piece_end {
                    self.mms[mm].readers -= 1;
                    a.stage = Stage::Look;
                }
            }
        }
        Task::Advise(a)
    }

    /// An act's message was read and its thread ran on.
    fn settled(&mut self, uffd: UffdId) {
        let u = &mut self.uffds[uffd];
        u.changing = u.changing.saturating_sub(1);
        let mm = u.mm;
        self.mms[mm].changed_ns = self.now_ns;
    }

    fn advised(&mut self, t: ThreadId, a: &Advise, error: Option<i32>) -> Task {
        let mm = self.threads[t].mm;
        match &a.request {
            Some(r) => self.request_done(mm, r.tag, error.unwrap_or(a.error)),
            None => {
                self.ideals[mm].drop_reached(a.name, None);
                trace!(self, "thread {t} of mm{mm}: {:?} ends", a.what);
            }
        }
        Task::Idle
    }

    fn drop_page(&mut self, mm: MmId, a: &Advise) {
        let v = a.cursor;
        if a.request.is_none() {
            self.note_drop(mm, v);
        }
        if a.what == Drop::DontNeed {
            self.unmap_page(mm, v);
            self.ideals[mm].zero(v);
            return;
        }
        if a.request.is_none() {
            self.ideals[mm].lazy(v, v + 1);
        }
        let Some(pte) = self.mms[mm].ptes.get_mut(&v) else {
            return;
        };
        let Some(f) = pte.folio else { return };
        let folio = &mut self.folios[f];
        if folio.dirty && folio.maps.len() > 1 {
            return;
        }
        // A device was done with it after it was last read.
        let written = std::mem::take(&mut folio.dirty);
        folio.lazy = true;
        pte.dirty = false;
        if let Some(r) = &a.request {
            let at = usize::try_from(v - r.start).expect("in the request");
            if a.again || written || r.seen[at] != Some(f) {
                self.folios[f].spared_until_ns = self.now_ns + SPARE_NS;
                self.folios[f].spared_for = mm;
            }
        }
    }

    fn populate(&mut self, t: ThreadId, cursor: u64, end: u64, tag: u64) -> Task {
        let mm = self.threads[t].mm;
        if cursor >= end {
            self.request_done(mm, tag, 0);
            return Task::Idle;
        }
        let error = match self.mms[mm].vma(cursor) {
            None => ENOMEM,
            Some(m) if m.prot != Prot::Write => EINVAL,
            Some(_) => {
                let cursor = match self.touch(t, cursor, true) {
                    Touch::Done => cursor + 1,
                    _ => cursor,
                };
                return Task::Populate { cursor, end, tag };
            }
        };
        self.request_done(mm, tag, error);
        Task::Idle
    }

    // --- mappings -------------------------------------------------------------------------------

    /// A change of mappings; nobody holds the lock.
    pub(crate) fn change(&mut self, t: ThreadId, change: Change) -> Task {
        let mm = self.threads[t].mm;
        trace!(self, "thread {t} of mm{mm} does {change:x?}");
        let mut told: Vec<(UffdId, Event)> = Vec::new();
        let named = change.named();
        self.mms[mm].changed_ns = self.now_ns;
        if matches!(change, Change::Unmap { .. } | Change::Move { .. }) {
            self.leaves(mm, named[0]);
        }
        match change {
            Change::Unmap { start, end } => {
                if let Some(u) = self.unmap_range(mm, start, end) {
                    told.push((u, Event::Unmap(addresses(start, end))));
                }
            }
            Change::Map(vma) => {
                if let Some(u) = self.unmap_range(mm, vma.start, vma.end) {
                    told.push((u, Event::Unmap(addresses(vma.start, vma.end))));
                }
                self.mms[mm].insert_vma(vma);
            }
            Change::Protect { start, end, prot } => {
                self.mms[mm].change(start, end, |m| m.prot = prot);
            }
            Change::Unlock { start, end } => {
                self.mms[mm].change(start, end, |m| m.locked = false);
            }
            Change::Move {
                from,
                len,
                to,
                new_len,
            } => self.remap(mm, from, len, to, new_len, &mut told),
        }
        if self.knobs.late_tellers && !told.is_empty() && self.rng.one_in(3) {
            let ns = self.knobs.step_ns * self.rng.between(5, 100);
            self.threads[t].preempted_until_ns = self.now_ns + ns;
            trace!(self, "thread {t} is preempted for {} us", ns / 1000);
        }
        self.announced(told, None, named)
    }

    fn remap(
        &mut self,
        mm: MmId,
        from: u64,
        len: u64,
        to: u64,
        new_len: u64,
        told: &mut Vec<(UffdId, Event)>,
    ) {
        let Some(vma) = self.mms[mm].vma(from).cloned() else {
            return;
        };
        if vma.end < from + len {
            return;
        }
        if to == from {
            if new_len < len {
                if let Some(u) = self.unmap_range(mm, from + new_len, from + len) {
                    told.push((u, Event::Unmap(addresses(from + new_len, from + len))));
                }
            } else if new_len > len
                && vma.end == from + len
                && self.mms[mm].is_hole(from + len, from + new_len)
            {
                // Grows in place, without a message.
                self.mms[mm].insert_vma(Vma {
                    start: from + len,
                    end: from + new_len,
                    moved: false,
                    ..vma
                });
            }
            return;
        }
        if let Some(u) = self.unmap_range(mm, to, to + new_len) {
            told.push((u, Event::Unmap(addresses(to, to + new_len))));
        }
        let moved = len.min(new_len);
        let mut tail = None;
        if new_len < len {
            tail = self.unmap_range(mm, from + new_len, from + len);
        }
        self.move_pages(mm, from, to, moved);
        self.mms[mm].remove_vmas(from, from + moved);
        self.mms[mm].insert_vma(Vma {
            start: to,
            end: to + new_len,
            moved: new_len <= len,
            ..vma
        });
        if let Some(u) = vma.uffd {
            told.push((
                u,
                Event::Remap {
                    from: Addr(from * 4096),
                    to: Addr(to * 4096),
                    len: moved * 4096,
                },
            ));
            if tail.is_some() {
                let range = addresses(from + new_len, from + len);
                told.push((u, Event::Unmap(range)));
            }
            // Seen on 6.18: the old place is announced as unmapped too.
            told.push((u, Event::Unmap(addresses(from, from + moved))));
        }
    }

    /// The act has happened; now its messages.
    fn announced(
        &mut self,
        told: Vec<(UffdId, Event)>,
        child: Option<MmId>,
        named: [(u64, u64); 2],
    ) -> Task {
        for &(u, _) in &told {
            self.announce(u);
        }
        Task::Tell {
            messages: told.into(),
            told: false,
            child,
            named,
        }
    }

    fn tell(
        &mut self,
        t: ThreadId,
        mut messages: VecDeque<(UffdId, Event)>,
        told: bool,
        child: Option<MmId>,
        named: [(u64, u64); 2],
    ) -> Task {
        if told {
            if let Some((u, _)) = messages.pop_front() {
                self.settled(u);
            }
        }
        if let Some(&(u, event)) = messages.front() {
            self.queue_event(t, u, event);
            return Task::Tell {
                messages,
                told: true,
                child,
                named,
            };
        }
        // One that the pager could not serve was killed before it ran.
        if let Some(mm) = child.filter(|&mm| self.mms[mm].alive) {
            trace!(self, "mm{mm} begins to run");
            let threads = self.rng.between(1, 2);
            for _ in 0..threads {
                self.threads.push(Thread::new(mm, false));
            }
        }
        Task::Idle
    }

    fn lock(&mut self, t: ThreadId, cursor: u64, end: u64) -> Task {
        let mm = self.threads[t].mm;
        if cursor >= end {
            return Task::Idle;
        }
        let Some(m) = self.mms[mm].vma(cursor).cloned() else {
            return Task::Idle;
        };
        let cursor = match self.touch(t, cursor, m.prot == Prot::Write) {
            Touch::Done => cursor + 1,
            Touch::Blocked => cursor,
            Touch::Fault => return Task::Idle,
        };
        Task::Lock { cursor, end }
    }

    /// Whether a thread of `mm` has not told all of such a change or fork.
    pub(crate) fn is_telling(&self, mm: MmId, which: impl Fn(Option<MmId>) -> bool) -> bool {
        self.threads.iter().any(|t| {
            t.alive && t.mm == mm && matches!(t.task, Task::Tell { child, .. } if which(child))
        })
    }

    pub(crate) fn fork(&mut self, t: ThreadId) -> Task {
        let parent = self.threads[t].mm;
        if self.mms_alive() >= self.knobs.spaces_most
            || self.drop_is_ambiguous(parent)
            || (!self.knobs.wild && self.is_telling(parent, |_| true))
        {
            return Task::Idle;
        }
        let child = self.fork_mm(parent);
        trace!(self, "thread {t} forks mm{parent} into mm{child}");
        let uffd = self.mms[parent]
            .uffd
            .filter(|_| self.mms[child].vmas.iter().any(|m| m.uffd.is_some()));
        let mut told = Vec::new();
        if let Some(u) = uffd {
            let fresh = self.new_uffd(child, false);
            self.mms[child].uffd = Some(fresh);
            for m in &mut self.mms[child].vmas {
                if m.uffd.is_some() {
                    m.uffd = Some(fresh);
                }
            }
            let fd = u32::try_from(fresh).expect("few descriptors");
            told.push((u, Event::Fork { fd }));
        }
        self.announced(told, Some(child), [(0, 0); 2])
    }
}
