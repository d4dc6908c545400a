//! What the simulated programs do: acts drawn by chance, such as a correct program could make.
//!
//! Threads of one process may touch anything at any time and share all memory, but none changes what
//! another's call is at work on: what a program gets then is its own fault. The kernel may: a place that
//! was unmapped is given to the next who asks for any, before the one that unmapped it goes on.

use super::kernel::{Kernel, trace};
use super::knobs::{ACTS, Act};
use super::mm::{MmId, Prot, Vma};
use super::thread::{Advise, Age, Change, Drop, Life, Stage, Task, ThreadId};

/// So long after a change of mappings all is read.
const CALM_NS: u64 = 3_000_000;

impl Kernel {
    /// A process with some mappings, natively touched.
    pub(crate) fn start_process(&mut self) -> MmId {
        let (start, len) = (self.knobs.arena_start, self.knobs.arena_len);
        let mm = super::mm::Mm {
            alive: true,
            arena: (start, start + len),
            ..super::mm::Mm::default()
        };
        let mm = self.add_mm(mm, super::oracle::Ideal::default());
        for _ in 0..self.rng.between(1, 4) {
            if let Some((a, b)) = self.hole(mm) {
                let vma = self.fresh_vma(a, b);
                self.mms[mm].insert_vma(vma);
            }
        }
        if self.rng.percent(20) {
            let head = start + self.rng.below(len);
            self.mms[mm].heads.push(head);
        }
        for _ in 0..self.knobs.threads {
            self.threads.push(super::thread::Thread::new(mm, false));
        }
        mm
    }

    fn fresh_vma(&mut self, start: u64, end: u64) -> Vma {
        Vma {
            start,
            end,
            prot: Prot::Write,
            locked: false,
            wipe_on_fork: self.rng.percent(10),
            dont_fork: self.rng.percent(10),
            uffd: None,
            moved: false,
        }
    }

    /// A subpage of the arena.
    fn anywhere(&mut self, mm: MmId) -> u64 {
        let (start, end) = self.mms[mm].arena;
        start + self.rng.below(end - start)
    }

    /// An unmapped range of random length.
    fn hole(&mut self, mm: MmId) -> Option<(u64, u64)> {
        let (_, last) = self.mms[mm].arena;
        let start = self.anywhere(mm);
        let len = self.rng.between(1, 40);
        self.mms[mm].is_hole(start, start + 1).then_some(())?;
        let mut end = start;
        while end < last && end < start + len && self.mms[mm].is_hole(end, end + 1) {
            end += 1;
        }
        Some((start, end))
    }

    /// A place that somebody has just left who has not told so yet.
    fn left_untold(&mut self, mm: MmId) -> Option<(u64, u64)> {
        let untold = |t: &super::thread::Thread| match t.task {
            Task::Tell {
                told: false,
                child: None,
                named: [left, _],
                ..
            } if t.alive && t.mm == mm => Some(left),
            _ => None,
        };
        let places: Vec<_> = self.threads.iter().filter_map(untold).collect();
        (!places.is_empty()).then(|| places[self.rng.index(places.len())])
    }

    /// A mapping that has moved to such a place.
    fn guest(&mut self, mm: MmId) -> Option<(u64, u64)> {
        let (start, end) = self.left_untold(mm)?;
        let inside = |m: &&Vma| m.moved && m.start >= start && m.end <= end;
        let guest = self.mms[mm].vmas.iter().find(inside)?;
        Some((guest.start, guest.end))
    }

    /// A range that begins in a mapping.
    fn range(&mut self, mm: MmId) -> Option<(u64, u64)> {
        if self.knobs.late_tellers && self.rng.percent(50) {
            if let Some(guest) = self.guest(mm) {
                return Some(guest);
            }
        }
        if self.mms[mm].vmas.is_empty() {
            return None;
        }
        let i = self.rng.index(self.mms[mm].vmas.len());
        let m = self.mms[mm].vmas[i].clone();
        match self.rng.below(4) {
            0 => Some((m.start, m.end)),
            1 => {
                let at = m.start + self.rng.below(m.end - m.start);
                Some((at, at + 1))
            }
            _ => {
                let a = m.start + self.rng.below(m.end - m.start);
                let b = a + self.rng.between(1, 24);
                let arena_end = self.mms[mm].arena.1;
                // Now and then over the mapping's end.
                let limit = if self.rng.percent(30) {
                    arena_end
                } else {
                    m.end
                };
                Some((a, b.min(limit)))
            }
        }
    }

    /// Whether a short thread's control block lies in the range.
    fn is_lived_in(&self, mm: MmId, start: u64, end: u64) -> bool {
        let blocks = self.threads.iter().filter(|t| t.alive && t.mm == mm);
        blocks
            .filter_map(|t| t.life)
            .any(|l| l.block >= start && l.block < end)
    }

    /// Whether a call that has not returned is about a part of the range, or a thread lives there. What the kernel
    /// chooses itself, it may choose there: for the kernel the call is over.
    fn is_named(&self, mm: MmId, start: u64, end: u64) -> bool {
        let busy = |task: &Task| match task {
            Task::Tell { named, .. } => named.iter().any(|&(s, e)| s < end && e > start),
            _ => false,
        };
        let mut threads = self.threads.iter().filter(|t| t.alive && t.mm == mm);
        threads.any(|t| busy(&t.task)) || self.is_lived_in(mm, start, end)
    }

    /// A place that has just become free is given to the next who asks, whatever messages are on the way.
    /// Where the pager may die in between, and in a fork's child, only such places of whose becoming free it
    /// has heard: what another order of messages means is not all written down, and what a child has mapped
    /// not certain (stated limits).
    fn kernel_may_choose(&self, mm: MmId, start: u64, end: u64) -> bool {
        let unheard = |t: &super::thread::Thread| match &t.task {
            Task::Tell {
                messages, named, ..
            } => {
                let here = named.iter().any(|&(s, e)| s < end && e > start);
                // The second message of a move; a mapping that shrinks where it is sends one alone.
                let moves = named[1].0 < named[1].1 && named[0].0 != named[1].0;
                let last = moves && messages.len() == 1;
                here && !last
            }
            _ => false,
        };
        let limited = self.knobs.deaths > 0 || self.mms[mm].forked;
        let relent = |&(s, e): &(u64, u64)| s < end && e > start;
        !self.mms[mm].relent.iter().any(relent)
            && (!limited
                || !self
                    .threads
                    .iter()
                    .any(|t| t.alive && t.mm == mm && unheard(t)))
    }

    /// Somebody leaves `place`. Where that is a guest, and its host's message is still to come, the pager tells the two
    /// apart by looking whether anything is there: a third who comes before that look would be taken for the guest (a
    /// stated limit).
    pub(crate) fn leaves(&mut self, mm: MmId, place: (u64, u64)) {
        if self.mms[mm].uffd.is_some() && self.is_named(mm, place.0, place.1) {
            self.mms[mm].relent.push(place);
        }
    }

    /// The pager has looked what is where somebody has left.
    pub(crate) fn looked_who_left(&mut self, mm: MmId) {
        let mut relent = std::mem::take(&mut self.mms[mm].relent);
        relent.retain(|&place| {
            let mut threads = self.threads.iter().filter(|t| t.alive && t.mm == mm);
            threads.any(|t| matches!(t.task, Task::Tell { named: [left, _], .. } if left == place))
        });
        self.mms[mm].relent = relent;
    }

    /// A mapping that is not registered yet has come to the place of an offered page, and a request of the pager's has
    /// hit it there. If it moves away now no message tells where it went, to put it right there (a stated limit).
    fn hit_unheard(&self, mm: MmId, start: u64, end: u64) -> bool {
        let m = &self.mms[mm];
        m.ptes.range(start..end).any(|(&at, pte)| {
            let spared = |f: usize| {
                let folio = &self.folios[f];
                folio.spared_until_ns > self.now_ns && folio.spared_for == mm
            };
            pte.folio.is_some_and(spared) && m.vma(at).is_some_and(|v| v.uffd.is_none())
        })
    }

    /// Whoever was there before has left, and the messages that say so are on the way. What has come since may
    /// leave as well before they are read. One thing nobody could tell (a stated limit): whose message one is that
    /// names no more than the newcomer had.
    fn is_newcomers(&self, mm: MmId, start: u64, end: u64) -> bool {
        let limited = self.knobs.deaths > 0 || self.mms[mm].forked;
        let Some(vma) = self.mms[mm].vma(start).filter(|m| m.moved && end <= m.end) else {
            return false;
        };
        let names = |t: &super::thread::Thread| match &t.task {
            Task::Tell { named, .. } => Some(*named),
            _ => None,
        };
        let mut telling = self
            .threads
            .iter()
            .filter(|t| t.alive && t.mm == mm)
            .filter_map(names);
        !limited
            && !self.ideals[mm].drops_in(start, end)
            && !self.is_lived_in(mm, start, end)
            && telling.all(|[(s, e), (to, to_end)]| {
                // One that shrinks on its way names what is left of it in one message, and the rest in another.
                let e = if to < to_end {
                    e.min(s + (to_end - to))
                } else {
                    e
                };
                let before = s <= vma.start && e >= vma.end && (s, e) != (vma.start, vma.end);
                (before || s >= vma.end || e <= vma.start) && (to >= vma.end || to_end <= vma.start)
            })
    }

    /// The next thing that thread `t` does.
    pub(crate) fn choose(&mut self, t: ThreadId) -> Task {
        self.acts_left = self.acts_left.saturating_sub(1);
        let mm = self.threads[t].mm;
        let act = ACTS[self.rng.weighted(&self.knobs.weights.clone())];
        self.act(t, mm, act).unwrap_or(Task::Idle)
    }

    fn act(&mut self, t: ThreadId, mm: MmId, act: Act) -> Option<Task> {
        match act {
            Act::Read | Act::Write | Act::Pin => {
                let (start, end) = self.mms[mm].arena;
                let hot = ((end - start) * self.knobs.hot / 100).max(1);
                let v = if self.rng.percent(80) {
                    start + self.rng.below(hot)
                } else {
                    self.anywhere(mm)
                };
                Some(match act {
                    Act::Pin => Task::Pin { v },
                    _ => Task::Access {
                        v,
                        write: act == Act::Write,
                    },
                })
            }
            Act::DontNeed | Act::Free => {
                let (start, end) = self.range(mm)?;
                if self.is_named(mm, start, end) {
                    return None;
                }
                let what = if act == Act::Free {
                    Drop::Free
                } else {
                    Drop::DontNeed
                };
                Some(self.call_drop(t, what, start, end))
            }
            Act::Thread => self.make_thread(t),
            Act::Fork => (self.mms[mm].readers == 0).then(|| self.fork(t)),
            Act::Exit => {
                // Not too often: a run of nothing finds nothing.
                if self.rng.one_in(20) {
                    self.exit(mm);
                }
                None
            }
            Act::Unmap | Act::Map | Act::Protect | Act::Move | Act::Unlock => {
                if !self.knobs.wild && self.is_telling(mm, |child| child.is_some()) {
                    return None;
                }
                let change = self.draw_change(mm, act)?;
                (self.mms[mm].readers == 0).then(|| self.change(t, change))
            }
            Act::Lock => {
                let (start, end) = self.range(mm)?;
                let busy = self.is_named(mm, start, end) || self.ideals[mm].drops_in(start, end);
                if self.mms[mm].readers > 0 || busy {
                    return None;
                }
                trace!(self, "thread {t} of mm{mm} locks {start:#x}-{end:#x}");
                self.mms[mm].change(start, end, |m| m.locked = true);
                Some(Task::Lock { cursor: start, end })
            }
        }
    }

    fn call_drop(&mut self, t: ThreadId, what: Drop, start: u64, end: u64) -> Task {
        let mm = self.threads[t].mm;
        let name = self.name();
        trace!(
            self,
            "thread {t} of mm{mm} calls {what:?} {start:#x}-{end:#x}"
        );
        self.ideals[mm].drop_begins(name, start, end);
        Task::Advise(Advise {
            what,
            cursor: start,
            piece_end: start,
            end,
            stage: Stage::Look,
            error: 0,
            name,
            told_to: start,
            again: false,
            request: None,
        })
    }

    /// Begins a short thread, by writing its control block. Stacks come to the same places again and again.
    fn make_thread(&mut self, t: ThreadId) -> Option<Task> {
        let mm = self.threads[t].mm;
        let (start, end) = self.mms[mm].arena;
        let block = start + 8 * self.rng.below((end - start) / 8) + 5;
        let writable = self.mms[mm]
            .vma(block)
            .is_some_and(|m| m.prot == Prot::Write);
        let busy = self.is_named(mm, block, block + 1)
            || self.ideals[mm].drops_in(block, block + 1)
            || self.mms[mm].heads.contains(&block);
        if !writable || busy {
            return None;
        }
        self.threads[t].life = Some(Life {
            block,
            age: Age::Made,
        });
        Some(Task::Access {
            v: block,
            write: true,
        })
    }

    /// A thread that ends drops what it no longer needs of its stack, below its control block.
    pub(crate) fn give_stack_back(&mut self, t: ThreadId, block: u64) -> Option<Task> {
        let mm = self.threads[t].mm;
        let least = self.mms[mm].vma(block)?.start;
        let start = (block - self.rng.between(1, 4)).max(least);
        let free = start < block && !self.is_named(mm, start, block);
        (free && self.rng.percent(50)).then(|| self.call_drop(t, Drop::DontNeed, start, block))
    }

    fn draw_change(&mut self, mm: MmId, act: Act) -> Option<Change> {
        let free = |k: &Self, start: u64, end: u64| !k.ideals[mm].drops_in(start, end);
        let own =
            |k: &Self, start: u64, end: u64| free(k, start, end) && !k.is_named(mm, start, end);
        match act {
            Act::Unmap => {
                let (start, end) = self.range(mm)?;
                (own(self, start, end) || self.is_newcomers(mm, start, end))
                    .then_some(Change::Unmap { start, end })
            }
            Act::Map => {
                let over = self.rng.percent(20);
                let (start, end) = if over {
                    self.range(mm)?
                } else {
                    self.hole(mm)?
                };
                let there = if over {
                    own(self, start, end)
                } else {
                    free(self, start, end) && self.kernel_may_choose(mm, start, end)
                };
                if !there {
                    return None;
                }
                let vma = self.fresh_vma(start, end);
                Some(Change::Map(vma))
            }
            Act::Protect => {
                let (start, end) = self.range(mm)?;
                let prot = match self.rng.below(5) {
                    0 => Prot::None,
                    1 => Prot::Read,
                    _ => Prot::Write,
                };
                (!self.is_named(mm, start, end)).then_some(Change::Protect { start, end, prot })
            }
            Act::Unlock => {
                let (start, end) = self.range(mm)?;
                Some(Change::Unlock { start, end })
            }
            _ => {
                let (from, end) = self.range(mm)?;
                let end = end.min(self.mms[mm].vma(from)?.end);
                let len = end - from;
                let new_len = match self.rng.below(4) {
                    0 => self.rng.between(1, len),
                    1 => len + self.rng.between(1, 8),
                    _ => len,
                };
                let arena = self.mms[mm].arena;
                let place = self.rng.below(8);
                let to = match place {
                    0 => from,
                    1 => self.anywhere(mm),
                    _ => {
                        // The kernel chooses: the first hole that is large enough, from somewhere on.
                        let left = self.knobs.late_tellers.then(|| self.left_untold(mm));
                        let at = match left.flatten() {
                            Some((at, _)) if at < arena.1 => at,
                            _ => self.anywhere(mm),
                        };
                        (at..arena.1)
                            .chain(arena.0..at)
                            .find(|&a| self.mms[mm].is_hole(a, a + new_len))?
                    }
                };
                let apart = to == from || to + new_len <= from || to >= from + len;
                let inside = to + new_len <= arena.1.max(from + len);
                let widest = len.max(new_len);
                let there = if place == 1 {
                    own(self, to, to + new_len)
                } else {
                    free(self, to, to + new_len) && self.kernel_may_choose(mm, to, to + new_len)
                };
                // A stated limit: no message tells how far a mapping grows, so one that grows over what was
                // just unmapped looks like what was there.
                // A fork's child has what its relatives had there, or not.
                let is_quiet = |m: &super::mm::Mm| {
                    let is_quiet = |u: &super::uffd::Uffd| u.changing == 0 && !u.unsettled;
                    m.uffd.is_none_or(|u| is_quiet(&self.uffds[u]))
                        && self.now_ns >= m.changed_ns + CALM_NS
                };
                let quiet = is_quiet(&self.mms[mm])
                    && (!self.mms[mm].forked || self.mms.iter().all(is_quiet));
                // Nor does it tell a fork's child from what the fork left out there.
                let grown = (to + len, to + new_len);
                let over_left_out = |&(start, end): &(u64, u64)| start < grown.1 && grown.0 < end;
                let left_out = self.mms[mm].left_out.iter().any(over_left_out);
                let calm = new_len <= len || quiet && !left_out;
                let certain = self.knobs.wild
                    || !self.drops_in_flight(mm, from, from + len)
                        && !self.hit_unheard(mm, from, from + len)
                        && !self.would_tell_twice(mm, to, to + new_len);
                (apart
                    && inside
                    && (calm || self.knobs.wild)
                    && certain
                    && (own(self, from, from + len) || self.is_newcomers(mm, from, end))
                    && free(self, from, from + widest)
                    && there)
                    .then_some(Change::Move {
                        from,
                        len,
                        to,
                        new_len,
                    })
            }
        }
    }
}
