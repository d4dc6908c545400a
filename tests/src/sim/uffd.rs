//! The simulated userfaultfd: its two queues and its ioctls.

use std::collections::VecDeque;

use holo_pager::core::{Event, Outcome};
use holo_proto::{Addr, AddrRange};

use super::kernel::{Kernel, trace};
use super::mm::{MmId, UffdId, Vma};
use super::oracle::{Content, ZERO};
use super::thread::{ThreadId, Wait};

/// One userfaultfd context.
#[derive(Debug, Default)]
pub(crate) struct Uffd {
    pub(crate) mm: MmId,
    /// The pager holds a descriptor of it.
    pub(crate) open: bool,
    /// The last descriptor was closed: nobody waits for it any more.
    pub(crate) released: bool,
    /// Threads whose faults are to be read, in order.
    pub(crate) faults: VecDeque<ThreadId>,
    /// Threads whose events are to be read, in order.
    pub(crate) events: VecDeque<(ThreadId, Event)>,
    /// Acts under way: while there are any, nothing may be installed (`mmap_changing`).
    pub(crate) changing: u32,
    /// There was one, and the pager does not know yet that it is over.
    pub(crate) unsettled: bool,
}

/// First subpage and end of a range of addresses.
pub(crate) fn subpages(range: AddrRange) -> (u64, u64) {
    (range.start.0 / 4096, range.end.0.div_ceil(4096))
}

pub(crate) fn addresses(start: u64, end: u64) -> AddrRange {
    AddrRange::new(start * 4096, end * 4096)
}

impl Kernel {
    pub(crate) fn new_uffd(&mut self, mm: MmId, open: bool) -> UffdId {
        self.uffds.push(Uffd {
            mm,
            open,
            ..Uffd::default()
        });
        self.uffds.len() - 1
    }

    /// Thread `t` waits for subpage `v`.
    pub(crate) fn raise(&mut self, t: ThreadId, uffd: UffdId, v: u64, write: bool, protect: bool) {
        let kind = if protect { "write-protect" } else { "missing" };
        trace!(
            self,
            "thread {t} of mm{} faults at {v:#x}, {kind}, write {write}", self.threads[t].mm
        );
        self.uffds[uffd].faults.push_back(t);
        let thread = &mut self.threads[t];
        thread.blocked_since_ns.get_or_insert(self.now_ns);
        thread.wait = Some(Wait::Fault {
            uffd,
            v,
            write,
            protect,
        });
    }

    /// Queues a message; the thread waits until it is read.
    pub(crate) fn queue_event(&mut self, t: ThreadId, uffd: UffdId, event: Event) {
        if self.uffds[uffd].released {
            return self.unheard_fork(event);
        }
        trace!(self, "thread {t} sends {event:?}");
        self.uffds[uffd].events.push_back((t, event));
        let thread = &mut self.threads[t];
        thread.blocked_since_ns = Some(self.now_ns);
        thread.wait = Some(Wait::Event);
    }

    pub(crate) fn is_readable(&self, uffd: UffdId) -> bool {
        let u = &self.uffds[uffd];
        u.open && !(u.faults.is_empty() && u.events.is_empty())
    }

    /// Reads one message: faults first, then events, in order.
    pub(crate) fn read_message(&mut self, uffd: UffdId) -> Option<Event> {
        if let Some(t) = self.uffds[uffd].faults.pop_front() {
            let Some(Wait::Fault {
                v, write, protect, ..
            }) = self.threads[t].wait
            else {
                return None;
            };
            return Some(Event::Fault {
                at: Addr(v * 4096 + 8),
                write,
                protect,
                thread: u32::try_from(t).unwrap_or(0),
            });
        }
        let (t, event) = self.uffds[uffd].events.pop_front()?;
        self.threads[t].wait = None;
        self.threads[t].blocked_since_ns = None;
        if let Event::Fork { fd } = event {
            self.uffds[fd as usize].open = true;
        }
        let (mm, own) = (self.uffds[uffd].mm, self.threads[t].worker);
        self.note_read(mm, event, own);
        Some(event)
    }

    pub(crate) fn uffd_wake(&mut self, uffd: UffdId, start: u64, end: u64) {
        let mm = self.uffds[uffd].mm;
        for i in 0..self.threads.len() {
            let t = &mut self.threads[i];
            if t.mm != mm {
                continue;
            }
            if let Some(Wait::Fault { v, .. }) = t.wait {
                if v >= start && v < end {
                    t.wait = None;
                    self.uffds[uffd].faults.retain(|&w| w != i);
                }
            }
        }
    }

    /// Where an install at `start..end` is possible at all. The mapping is looked for after the question whether a change
    /// is under way, which is asked once more then.
    fn install_refused(&mut self, uffd: UffdId, start: u64, end: u64) -> Option<Outcome> {
        let alone = self.uffds[uffd].changing == 0;
        self.uffds[uffd].unsettled &= !alone;
        if alone && self.rng.percent(self.knobs.overtaken) {
            for _ in 0..self.rng.between(1, 8) {
                self.step();
            }
        }
        let u = &self.uffds[uffd];
        let mm = &self.mms[u.mm];
        let served = |m: &Vma| m.end >= end && m.uffd == Some(uffd);
        if !mm.alive {
            Some(Outcome::Gone)
        } else if alone && !mm.vma(start).is_some_and(served) {
            Some(Outcome::Edge)
        } else if u.changing > 0 {
            Some(Outcome::EventsPending)
        } else {
            (!mm.vma(start).is_some_and(served)).then_some(Outcome::Edge)
        }
    }

    /// `UFFDIO_COPY`, and with `None` for the bytes `UFFDIO_ZEROPAGE`.
    pub(crate) fn uffd_install(
        &mut self,
        uffd: UffdId,
        start: u64,
        len: u64,
        bytes: Option<&[Content]>,
    ) -> Outcome {
        if let Some(refused) = self.install_refused(uffd, start, start + len) {
            return refused;
        }
        let mm = self.uffds[uffd].mm;
        let (partial, no_memory) = (self.knobs.partial, self.knobs.no_memory);
        let stop_at = self.rng.percent(partial).then(|| self.rng.below(len));
        let refuse_at = self.rng.percent(no_memory).then(|| self.rng.below(len));
        for i in 0..len {
            let done = usize::try_from(i).expect("few subpages");
            let stop = if self.mms[mm].ptes.contains_key(&(start + i)) {
                Some(Outcome::AlreadyThere)
            } else if refuse_at == Some(i) {
                Some(Outcome::NoMemory)
            } else if stop_at == Some(i) && i > 0 {
                Some(Outcome::Partial(done))
            } else {
                None
            };
            match stop {
                Some(_) if i > 0 => return Outcome::Partial(done),
                Some(outcome) => return outcome,
                None => {}
            }
            match bytes {
                Some(b) => {
                    self.install(mm, start + i, b.get(done).copied().unwrap_or(ZERO));
                }
                None => self.install_zero_page(mm, start + i),
            }
        }
        Outcome::Done
    }

    /// `UFFDIO_WRITEPROTECT`: mapping by mapping, up to the first that is not served.
    pub(crate) fn uffd_protect(&mut self, uffd: UffdId, start: u64, end: u64, on: bool) -> Outcome {
        let mm = self.uffds[uffd].mm;
        if !self.mms[mm].alive {
            return Outcome::Gone;
        }
        if self.uffds[uffd].changing > 0 {
            return Outcome::EventsPending;
        }
        self.uffds[uffd].unsettled = false;
        let parts: Vec<Vma> = self.mms[mm]
            .vmas
            .iter()
            .filter(|m| m.overlaps(start, end))
            .cloned()
            .collect();
        if parts.is_empty() {
            return Outcome::Edge;
        }
        for m in parts {
            if m.uffd.is_none() {
                return Outcome::Edge;
            }
            let range = m.start.max(start)..m.end.min(end);
            for (_, p) in self.mms[mm].ptes.range_mut(range) {
                p.wp = on;
            }
        }
        if !on {
            self.uffd_wake(uffd, start, end);
        }
        Outcome::Done
    }

    /// `UFFDIO_REGISTER`: everything mapped in the range, cut at its ends.
    pub(crate) fn uffd_register(&mut self, uffd: UffdId, start: u64, end: u64) -> Outcome {
        let mm = self.uffds[uffd].mm;
        if !self.mms[mm].alive {
            return Outcome::Gone;
        }
        if self.mms[mm].is_hole(start, end) {
            return Outcome::Refused(22);
        }
        // A stated limit: the kernel registers what is there. The pager takes a hole for its own then, until
        // the next message about it, and a mapping that comes there meanwhile for one that it has heard of.
        let mapped: u64 = self.mms[mm]
            .vmas
            .iter()
            .map(|m| m.end.min(end).saturating_sub(m.start.max(start)))
            .sum();
        if mapped < end - start {
            return Outcome::Refused(22);
        }
        self.mms[mm].change(start, end, |m| m.uffd = Some(uffd));
        Outcome::Done
    }

    /// `UFFDIO_UNREGISTER`: everything mapped in the range.
    pub(crate) fn uffd_unregister(&mut self, uffd: UffdId, start: u64, end: u64) -> Outcome {
        let mm = self.uffds[uffd].mm;
        if !self.mms[mm].alive {
            return Outcome::Gone;
        }
        if self.mms[mm].is_hole(start, end) {
            return Outcome::Refused(22);
        }
        self.let_go(uffd, start, end);
        Outcome::Done
    }

    fn let_go(&mut self, uffd: UffdId, start: u64, end: u64) {
        let mm = self.uffds[uffd].mm;
        for (_, p) in self.mms[mm].ptes.range_mut(start..end) {
            p.wp = false;
        }
        self.mms[mm].change(start, end, |m| m.uffd = None);
        self.uffd_wake(uffd, start, end);
    }

    /// The last descriptor is closed: everything is unregistered, whoever waits goes on.
    pub(crate) fn uffd_close(&mut self, uffd: UffdId) {
        let mm = self.uffds[uffd].mm;
        self.uffds[uffd].open = false;
        self.uffds[uffd].released = true;
        self.mms[mm].relent.clear();
        if self.mms[mm].alive {
            let served: Vec<(u64, u64)> = self.mms[mm]
                .vmas
                .iter()
                .filter(|m| m.uffd == Some(uffd))
                .map(|m| (m.start, m.end))
                .collect();
            for (start, end) in served {
                self.let_go(uffd, start, end);
            }
        }
        // Also who waits where nothing is mapped any more.
        self.uffd_wake(uffd, 0, u64::MAX);
        while let Some((t, event)) = self.uffds[uffd].events.pop_front() {
            self.threads[t].wait = None;
            self.threads[t].blocked_since_ns = None;
            self.unheard_fork(event);
        }
    }

    /// Nobody will read of this fork: the child is not served.
    fn unheard_fork(&mut self, event: Event) {
        if let Event::Fork { fd } = event {
            let fd = fd as usize;
            self.uffd_close(fd);
            let mm = self.uffds[fd].mm;
            self.mms[mm].uffd = None;
        }
    }
}
