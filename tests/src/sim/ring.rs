//! The simulated ring in a target: queued advice, carried out by a worker of the target's own.

use std::collections::VecDeque;

use holo_pager::core::{Advice, Outcome};

use super::kernel::{Kernel, trace};
use super::mm::{FolioId, MmId};
use super::thread::{Advise, Drop, Stage, Task, Thread};

/// One request.
#[derive(Clone, Debug)]
pub(crate) struct Request {
    pub(crate) tag: u64,
    pub(crate) advice: Advice,
    pub(crate) start: u64,
    pub(crate) end: u64,
    /// Which page the pager read at each subpage before.
    pub(crate) seen: Vec<Option<FolioId>>,
    /// The program has dropped some of it since.
    pub(crate) dropped: bool,
}

/// A ring.
#[derive(Debug, Default)]
pub(crate) struct Ring {
    pub(crate) queue: VecDeque<Request>,
    /// Of the queue, what the kernel's side has seen.
    pub(crate) visible: usize,
    pub(crate) running: usize,
    pub(crate) done: VecDeque<(u64, i32)>,
    /// Requests that were ever put in.
    pub(crate) requests: u32,
    /// It has ended: what runs ends, nothing more begins.
    pub(crate) lost: bool,
}

impl Ring {
    pub(crate) fn is_quiet(&self) -> bool {
        self.queue.is_empty() && self.running == 0
    }

    /// A request of a lost ring that will never run; none while any runs.
    pub(crate) fn stranded(&self) -> Option<u64> {
        if !self.lost || self.running > 0 {
            return None;
        }
        self.queue.front().map(|r| r.tag)
    }
}

impl Kernel {
    /// A ring is made in `mm`.
    pub(crate) fn add_ring(&mut self, mm: MmId) {
        if self.rings[mm].is_some() || !self.mms[mm].alive {
            return;
        }
        self.rings[mm] = Some(Ring::default());
        if self.threads.iter().any(|t| t.mm == mm && t.worker) {
            return;
        }
        for _ in 0..self.knobs.ring_workers {
            self.threads.push(Thread::new(mm, true));
        }
    }

    /// The process in which the ring of `mm` was made ends; `mm` lives on in another one.
    pub(crate) fn end_ring(&mut self, mm: MmId) {
        if let Some(r) = self.rings[mm].as_mut().filter(|r| !r.lost) {
            r.lost = true;
            r.visible = 0;
            trace!(self, "ring of mm{mm} is lost");
        }
    }

    pub(crate) fn queue_advice(
        &mut self,
        mm: MmId,
        advice: Advice,
        start: u64,
        end: u64,
        tag: u64,
    ) -> Outcome {
        if !self.mms[mm].alive {
            return Outcome::Gone;
        }
        let seen = (start..end)
            .map(|v| self.mms[mm].read.get(&v).copied())
            .collect();
        let Some(ring) = self.rings[mm].as_mut() else {
            return Outcome::Refused(9);
        };
        if ring.queue.len() + ring.running + ring.done.len() >= self.knobs.ring_entries {
            return Outcome::Full;
        }
        ring.requests += 1;
        ring.queue.push_back(Request {
            tag,
            advice,
            start,
            end,
            seen,
            dropped: false,
        });
        Outcome::Done
    }

    /// The program dropped `v`.
    pub(crate) fn note_drop(&mut self, mm: MmId, v: u64) {
        let queued = self.rings[mm].iter_mut().flat_map(|r| r.queue.iter_mut());
        let running = self.threads.iter_mut().filter(|t| t.mm == mm);
        let running = running.filter_map(|t| match &mut t.task {
            Task::Advise(a) => a.request.as_mut(),
            _ => None,
        });
        for r in queued.chain(running) {
            r.dropped |= v >= r.start && v < r.end;
        }
    }

    /// The program dropped what a request of the pager's that has not ended is about: in a child forked now
    /// the pager cannot tell which of the two messages is whose (a stated limit; no fork is made then).
    pub(crate) fn drop_is_ambiguous(&self, mm: MmId) -> bool {
        self.drops_in_flight(mm, 0, u64::MAX)
    }

    /// The program dropped something in a range that a request of the pager's is about which has not ended. If the
    /// place moves away now, and the request finds something else there, or nothing, the pager cannot tell in every
    /// case whose message it heard (a stated limit).
    pub(crate) fn drops_in_flight(&self, mm: MmId, start: u64, end: u64) -> bool {
        let hit = |r: &Request| r.dropped && r.start < end && start < r.end;
        let running = |t: &Thread| {
            t.mm == mm && matches!(&t.task, Task::Advise(a) if a.request.as_ref().is_some_and(hit))
        };
        let queued = self.rings[mm].as_ref().map(|r| &r.queue);
        queued.is_some_and(|q| q.iter().any(hit)) || self.threads.iter().any(running)
    }

    /// A request of the pager's has told of a range that it has not come to the end of. What moves there now it finds
    /// as another mapping, and tells of again: the pager takes that for a removal of the program's (a stated limit).
    pub(crate) fn would_tell_twice(&self, mm: MmId, start: u64, end: u64) -> bool {
        self.threads.iter().any(|t| {
            let hit = |a: &Advise| a.request.is_some() && a.cursor < end && start < a.told_to;
            t.mm == mm && matches!(&t.task, Task::Advise(a) if hit(a))
        })
    }

    pub(crate) fn kick_ring(&mut self, mm: MmId) {
        if let Some(r) = self.rings[mm].as_mut().filter(|r| !r.lost) {
            r.visible = r.queue.len();
        }
    }

    /// A worker takes the next request.
    pub(crate) fn take_request(&mut self, mm: MmId) -> Task {
        let name = self.name();
        let Some(ring) = self.rings[mm].as_mut() else {
            return Task::Idle;
        };
        let Some(r) = ring.queue.pop_front() else {
            return Task::Idle;
        };
        ring.visible -= 1;
        ring.running += 1;
        trace!(
            self,
            "ring of mm{mm} begins {:?} {:#x}-{:#x}", r.advice, r.start, r.end
        );
        match r.advice {
            Advice::Free => Task::Advise(Advise {
                what: Drop::Free,
                cursor: r.start,
                piece_end: r.start,
                end: r.end,
                stage: Stage::Look,
                error: 0,
                name,
                told_to: r.start,
                again: false,
                request: Some(r),
            }),
            Advice::Populate => Task::Populate {
                cursor: r.start,
                end: r.end,
                tag: r.tag,
            },
        }
    }

    pub(crate) fn request_done(&mut self, mm: MmId, tag: u64, result: i32) {
        trace!(self, "ring of mm{mm}: request {tag:#x} ends with {result}");
        if let Some(r) = self.rings[mm].as_mut() {
            r.running -= 1;
            r.done.push_back((tag, result));
        }
    }
}
