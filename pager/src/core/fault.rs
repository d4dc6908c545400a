//! Faults: what each is answered with, decided anew whenever the state it was decided on has changed.

use holo_proto::{
    AddrRange, PAGE_BYTES, PAGE_SUBPAGES, PageIndex, SUBPAGE_BYTES, SpaceId, SubpageIndex,
    SubpageMask,
};

use super::space::Life;
use super::{Core, CrashPoint, Doing, Entry, FrameId, Nanos, Op, Outcome, Source, StopReason};
use crate::store::api::{Locations, PageStore, StoreError, Ticket};

/// A thread that waits for a page; or the restorer, which wants one.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Fault {
    pub(crate) space: SpaceId,
    pub(crate) at: SubpageIndex,
    pub(crate) write: bool,
    pub(crate) protect: bool,
    pub(crate) since: Nanos,
    /// Made by the restorer: nobody waits, nothing is counted.
    pub(crate) own: bool,
    /// A wider answer left the mapping: this subpage alone.
    pub(crate) alone: bool,
}

/// A page on its way into the target: fetched, then copied run by run.
#[derive(Debug)]
pub(crate) struct Install {
    pub(crate) fault: Fault,
    pub(super) page: PageIndex,
    pub(crate) frame: Option<FrameId>,
    only: SubpageMask,
    wanted: Locations,
    fetching: Option<Ticket>,
    get_begun: bool,
    cursor: usize,
    run: usize,
    single_steps: bool,
    /// At the cursor a copy has found no mapping of ours: is none there, as far as is heard?
    absent: bool,
    installed: u64,
}

impl<S: PageStore> Core<'_, S> {
    /// Begins to answer a fault; `None` if it waits or needs nothing more (or became the install).
    pub(super) fn serve(&mut self, fault: Fault) -> Option<(Doing, Op)> {
        let id = fault.space;
        let now = self.now;
        let page = fault.at.page();
        let in_install = self
            .install
            .as_ref()
            .is_some_and(|i| i.fault.space == id && i.page == page);
        let s = self.space(id)?;
        if s.life == Life::Over {
            return None;
        }
        if s.blocked(now)
            || !s.suspects.is_empty()
            || in_install
            || s.batch_holds(page, fault.write)
        {
            self.hold(fault);
            return None;
        }
        let known = s.known;
        if fault.protect {
            self.stats.faults_wp += 1;
            let range = self.clip(fault, page.range());
            let op = Op::Unprotect { space: id, range };
            return Some((Doing::Unprotect(fault), op));
        }
        let entry = self.map.entry(id, fault.at);
        match entry {
            Entry::Stored(_) | Entry::Staged(..) => {
                let must_wait = self.in_doubt(id, entry)
                    || !known
                    || self.install.is_some()
                    || (!fault.own && self.must_wait_for_room(id, page));
                if must_wait || !self.begin_install(fault, page) {
                    self.hold(fault);
                }
                None
            }
            // The restorer wants no zeros.
            Entry::Nothing | Entry::Dropping(_) if fault.own => None,
            Entry::Nothing | Entry::Dropping(_) => {
                if fault.write && self.must_wait_for_room(id, page) {
                    self.hold(fault);
                    return None;
                }
                let subpages = self.zero_window(fault);
                Some(self.zero_op(fault, subpages))
            }
        }
    }

    /// `wide` as far as it lies in the mapping around the fault; the subpage alone if none is known.
    fn clip(&self, fault: Fault, wide: AddrRange) -> AddrRange {
        let start = fault.at.start();
        let one = AddrRange {
            start,
            end: start.offset(SUBPAGE_BYTES),
        };
        if fault.alone {
            return one;
        }
        self.space_ref(fault.space)
            .and_then(|s| s.regions.around(start))
            .map_or(one, |r| r.intersect(wide))
    }

    // --- first touches --------------------------------------------------------------------------

    /// How many subpages from the fault on get zeros: to the end of the page while touches are in
    /// sequence, else one.
    fn zero_window(&self, fault: Fault) -> usize {
        let Some(s) = self.space_ref(fault.space) else {
            return 1;
        };
        if fault.write && s.zero_next != fault.at {
            return 1;
        }
        let page = fault.at.page();
        let rest = AddrRange {
            start: fault.at.start(),
            end: page.range().end,
        };
        let clipped = self.clip(fault, rest);
        let mut n = 1;
        for at in clipped.subpages().skip(1) {
            if self.map.entry(fault.space, at).has_bytes() {
                break;
            }
            n += 1;
        }
        n
    }

    fn zero_op(&self, fault: Fault, subpages: usize) -> (Doing, Op) {
        let op = if fault.write {
            Op::Copy {
                space: fault.space,
                at: fault.at,
                source: Source::Zeros,
                subpages,
            }
        } else {
            let start = fault.at.start();
            Op::Zero {
                space: fault.space,
                range: AddrRange {
                    start,
                    end: start.offset(subpages as u64 * SUBPAGE_BYTES),
                },
            }
        };
        (Doing::Zero { fault, subpages }, op)
    }

    pub(super) fn zeroed(&mut self, fault: Fault, subpages: usize, outcome: Outcome) {
        let id = fault.space;
        let done = match outcome {
            Outcome::Done => subpages,
            Outcome::Partial(n) => n,
            // A page is there by now, or the place is no mapping of ours any more: the thread finds out.
            Outcome::AlreadyThere => 0,
            Outcome::Edge if subpages == 1 => 0,
            Outcome::Edge => {
                self.ready.push_front(Fault {
                    alone: true,
                    ..fault
                });
                return;
            }
            Outcome::EventsPending => {
                self.events_pending(id);
                self.hold(fault);
                return;
            }
            Outcome::NoMemory => return self.wait_for_memory(fault),
            Outcome::Gone => return self.gone(id),
            other => {
                let errno = if let Outcome::Refused(e) = other {
                    e
                } else {
                    0
                };
                return self.stop(
                    id,
                    StopReason::Kernel {
                        at: fault.at,
                        errno,
                    },
                );
            }
        };
        self.progressed(id);
        self.crash(CrashPoint::Zeroed);
        if let Some(s) = self.space(id) {
            if fault.write {
                s.usage_bytes += done as u64 * SUBPAGE_BYTES;
                s.zero_next = SubpageIndex(fault.at.0 + done.max(1) as u64);
            }
            if done > 0 {
                s.enqueue(fault.at.page(), false);
            }
        }
        self.note_peak();
        self.stats.faults_zero += 1;
        let start = fault.at.start();
        self.answered(
            fault,
            AddrRange {
                start,
                end: start.offset(done.max(1) as u64 * SUBPAGE_BYTES),
            },
        );
    }

    /// The kernel has no memory for the page now (a cgroup's limit): again after a while.
    fn wait_for_memory(&mut self, fault: Fault) {
        let retry = self.now.after(1_000_000);
        if let Some(s) = self.space(fault.space) {
            s.retry_at = Some(retry);
        }
        self.hold(fault);
    }

    fn answered(&mut self, fault: Fault, wake: AddrRange) {
        self.errands.push_back(Op::Wake {
            space: fault.space,
            range: wake,
        });
        if !fault.own {
            self.stats
                .latency
                .add(self.now.0.saturating_sub(fault.since.0));
        }
    }

    // --- writes to a protected page -------------------------------------------------------------

    pub(super) fn unprotected(&mut self, fault: Fault, outcome: Outcome) {
        let id = fault.space;
        match outcome {
            Outcome::Done => self.progressed(id),
            Outcome::EventsPending => {
                self.events_pending(id);
                self.hold(fault);
                return;
            }
            Outcome::Gone => return self.gone(id),
            Outcome::Edge if !fault.alone => {
                self.ready.push_front(Fault {
                    alone: true,
                    ..fault
                });
                return;
            }
            Outcome::Refused(errno) => {
                return self.stop(
                    id,
                    StopReason::Kernel {
                        at: fault.at,
                        errno,
                    },
                );
            }
            _ => {}
        }
        let start = fault.at.start();
        self.answered(
            fault,
            AddrRange {
                start,
                end: start.offset(SUBPAGE_BYTES),
            },
        );
    }

    // --- stored pages ---------------------------------------------------------------------------

    /// False if no frame is free.
    fn begin_install(&mut self, fault: Fault, page: PageIndex) -> bool {
        // The restorer takes no more than it is about: with the rest, what was evicted just now would come back.
        let restored = self
            .space_ref(fault.space)
            .filter(|s| fault.own && s.life == Life::Serving)
            .and_then(|s| s.restore.direct_range());
        let only = restored.map_or(SubpageMask::ALL, |r| SubpageMask::of_page_in(page, r));
        let mut wanted: Locations = [None; PAGE_SUBPAGES];
        for (i, w) in wanted.iter_mut().enumerate().filter(|&(i, _)| only.has(i)) {
            if let Entry::Stored(l) = self.map.entry(fault.space, page.subpage(i)) {
                *w = Some(l);
            }
        }
        let fetch = wanted.iter().any(Option::is_some);
        let frame = if fetch {
            match self.frames.take() {
                Some(f) => Some(f),
                None => return false,
            }
        } else {
            None
        };
        let fetching = fetch.then(|| self.new_ticket());
        self.install = Some(Install {
            fault,
            page,
            frame,
            only,
            wanted,
            fetching,
            get_begun: false,
            cursor: 0,
            run: 0,
            single_steps: false,
            absent: false,
            installed: 0,
        });
        true
    }

    /// The next operation of the install in progress, if it can go on.
    pub(super) fn step_install(&mut self) -> Option<Op> {
        let install = self.install.as_mut()?;
        if let Some(ticket) = install.fetching {
            if install.get_begun {
                return None;
            }
            install.get_begun = true;
            return Some(Op::Get {
                ticket,
                frame: install.frame?,
                wanted: install.wanted,
            });
        }
        let (id, page, cursor) = (install.fault.space, install.page, install.cursor);
        if install.absent {
            let start = page.subpage(cursor).start();
            let end = start.offset(SUBPAGE_BYTES);
            return Some(Op::Unprotect {
                space: id,
                range: AddrRange { start, end },
            });
        }
        let most = if install.single_steps {
            1
        } else {
            PAGE_SUBPAGES
        };
        let Some((first, count, source)) = self.next_run(id, page, cursor, most) else {
            self.end_install();
            return None;
        };
        let install = self.install.as_mut()?;
        install.cursor = first;
        install.run = count;
        Some(Op::Copy {
            space: id,
            at: page.subpage(first),
            source,
            subpages: count,
        })
    }

    /// Where the bytes of a subpage are now, if they can be installed: in a frame of the map's, or fetched
    /// and still current.
    fn bytes_of(&self, id: SpaceId, page: PageIndex, i: usize) -> Option<(FrameId, usize)> {
        let install = self.install.as_ref()?;
        match self.map.entry(id, page.subpage(i)) {
            entry if !install.only.has(i) || self.in_doubt(id, entry) => None,
            Entry::Staged(f, k) => Some((f, k)),
            Entry::Stored(l) if install.wanted[i] == Some(l) => Some((install.frame?, i)),
            Entry::Stored(_) | Entry::Nothing | Entry::Dropping(_) => None,
        }
    }

    fn next_run(
        &self,
        id: SpaceId,
        page: PageIndex,
        from: usize,
        most: usize,
    ) -> Option<(usize, usize, Source)> {
        let (first, (frame, offset)) =
            (from..PAGE_SUBPAGES).find_map(|i| Some((i, self.bytes_of(id, page, i)?)))?;
        let mut count = 1;
        while count < most
            && first + count < PAGE_SUBPAGES
            && offset + count < PAGE_SUBPAGES
            && self.bytes_of(id, page, first + count) == Some((frame, offset + count))
        {
            count += 1;
        }
        Some((first, count, Source::Frame(frame, offset)))
    }

    pub(super) fn install_fetched(&mut self, ticket: Ticket, result: Result<(), StoreError>) {
        let Some(install) = self.install.as_mut() else {
            return;
        };
        if install.fetching != Some(ticket) {
            return;
        }
        install.fetching = None;
        let (id, at) = (install.fault.space, install.fault.at);
        match result {
            Ok(()) => {}
            Err(StoreError::Damaged) => {
                self.abandon_install();
                self.stop(id, StopReason::Damaged { at });
            }
            Err(StoreError::NoSuchLocation | StoreError::Full) => {
                self.abandon_install();
                self.stop(id, StopReason::Lost { at });
            }
        }
    }

    fn abandon_install(&mut self) -> Option<Fault> {
        let install = self.install.take()?;
        if let Some(f) = install.frame {
            self.frames.drop_hold(f);
        }
        self.unhold();
        Some(install.fault)
    }

    pub(super) fn install_step_done(&mut self, outcome: Outcome) {
        let Some(install) = self.install.as_mut() else {
            return;
        };
        if install.fetching.is_some() {
            return; // the transfer has begun
        }
        let (id, page) = (install.fault.space, install.page);
        let (first, run) = (install.cursor, install.run);
        if std::mem::take(&mut install.absent) {
            match outcome {
                // Nor is a message about it on the way, for then it would have failed in another way: what the map says is
                // about something that is gone.
                Outcome::Edge => {
                    let at = page.subpage(install.cursor);
                    install.cursor += 1;
                    if self.space_ref(id).is_some_and(|s| s.life == Life::Serving) {
                        self.set_entry(id, at, Entry::Nothing);
                    }
                    return;
                }
                // It is there again.
                Outcome::Done => return,
                _ => {}
            }
        }
        let done = match outcome {
            Outcome::Done => run,
            Outcome::Partial(n) => n.min(run),
            Outcome::AlreadyThere => {
                // Someone was first. What the map says stays: the page may be a clean one that the kernel
                // can still drop.
                install.cursor += 1;
                return;
            }
            Outcome::Edge => {
                // A copy looks for the mapping after it has asked whether a change is under way, so that one may have come
                // between the two (Linux 6.9 and later). An un-protect asks first.
                install.absent = install.single_steps;
                install.single_steps = true;
                return;
            }
            Outcome::EventsPending => {
                let fault = self.abandon_install();
                self.events_pending(id);
                if let Some(f) = fault {
                    self.hold(f);
                }
                return;
            }
            Outcome::NoMemory => {
                if let Some(f) = self.abandon_install() {
                    self.wait_for_memory(f);
                }
                return;
            }
            Outcome::Gone => return self.gone(id),
            other => {
                let errno = if let Outcome::Refused(e) = other {
                    e
                } else {
                    0
                };
                let at = page.subpage(first);
                self.abandon_install();
                return self.stop(id, StopReason::Kernel { at, errno });
            }
        };
        install.cursor += done;
        install.installed += done as u64;
        self.progressed(id);
        self.crash(CrashPoint::Installed);
        for i in first..first + done {
            if let Ok(old) = self.map.replace(id, page.subpage(i), Entry::Nothing) {
                self.crash(CrashPoint::InstalledForgotten);
                self.release(old);
            }
        }
        if let Some(s) = self.space(id) {
            s.usage_bytes += done as u64 * SUBPAGE_BYTES;
        }
        self.note_peak();
    }

    fn end_install(&mut self) {
        let Some(install) = self.install.take() else {
            return;
        };
        if let Some(f) = install.frame {
            self.frames.drop_hold(f);
        }
        let fault = install.fault;
        self.stats.subpages_refaulted += install.installed;
        if !fault.own {
            self.stats.faults_remote += 1;
        }
        if let Some(s) = self.space(fault.space) {
            s.enqueue(install.page, false);
        }
        let start = install.page.start();
        self.answered(
            fault,
            AddrRange {
                start,
                end: start.offset(PAGE_BYTES),
            },
        );
        self.unhold();
    }
}

#[cfg(test)]
mod tests {
    use super::super::scripted::core_of;
    use super::super::{Input, Next};
    use super::*;
    use crate::store::api::Location;

    const RANGE: AddrRange = AddrRange::new(0x90_0000, 0x91_0000);

    /// A thread waits for the first subpage of `RANGE`, and a copy finds no mapping there. What the map says of it in the
    /// end, if the un-protect that follows is answered so and `meanwhile` is heard before.
    fn after_a_copy_found_nothing(answer: Outcome, meanwhile: &[(AddrRange, AddrRange)]) -> Entry {
        let (mut core, space) = core_of(RANGE);
        let at = RANGE.start.subpage();
        core.map
            .replace(space, at, Entry::Stored(Location(8)))
            .unwrap();
        core.ready.push_back(Fault {
            space,
            at,
            write: false,
            protect: false,
            since: Nanos(0),
            own: false,
            alone: false,
        });
        let (mut asked, mut copies) = (false, 0);
        for ms in 0..100 {
            let now = Nanos(ms * 1_000_000);
            let op = match core.next(now) {
                Next::Op(op) => op,
                Next::Idle(None) => break,
                Next::Idle(Some(_)) => continue,
            };
            let mut outcome = match op {
                Op::ReadEvents { .. } => Outcome::Events { count: 0, gone: 0 },
                Op::Copy { .. } if asked => Outcome::AlreadyThere,
                Op::Copy { .. } => {
                    copies += 1;
                    Outcome::Edge
                }
                Op::Unprotect { range, .. } if range.start == RANGE.start => {
                    asked = true;
                    answer
                }
                _ => Outcome::Done,
            };
            if let Op::Get { ticket, wanted, .. } = op {
                let mut frame = Box::new([0; _]);
                core.store().get(ticket, &wanted, &mut frame);
                outcome = Outcome::Done;
            }
            core.complete(now, outcome);
            while let Some(done) = core.store().poll() {
                core.handle(now, Input::Store(done));
            }
            if copies == 2 && !asked {
                for &(from, to) in meanwhile {
                    core.moved(space, (from.start, to.start, from.len()), 1, true);
                    core.unmapped(space, from, 2, true);
                }
            }
        }
        assert!(asked);
        core.map.entry(space, at)
    }

    #[test]
    fn what_a_copy_does_not_find_is_gone_only_if_an_unprotect_says_so() {
        let stored = Entry::Stored(Location(8));
        assert_eq!(
            after_a_copy_found_nothing(Outcome::Edge, &[]),
            Entry::Nothing
        );
        assert_eq!(
            after_a_copy_found_nothing(Outcome::EventsPending, &[]),
            stored
        );
        // It has been away, and is back.
        let away = AddrRange::new(0xa0_0000, 0xa1_0000);
        let swing = [(RANGE, away), (away, RANGE)];
        assert_eq!(after_a_copy_found_nothing(Outcome::Done, &swing), stored);
    }
}
