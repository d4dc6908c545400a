//! Whose removal was that? What messages, and the ends of requests, tell of the pages of a batch.

use holo_proto::{Addr, AddrRange, PageIndex, SpaceId, SubpageIndex, SubpageMask};

use super::{Batch, BatchPage, Phase, run_mask};
use crate::core::note::{Heard, told_by};
use crate::core::restore::TAG;
use crate::core::space::{Ring, moved_pages};
use crate::core::{Core, CrashPoint, Entry, FrameId, HOLES, NEVER_RAN, NOT_WRITABLE, Op};
use crate::store::api::PageStore;

impl Batch {
    /// A removal message came. `count` gets each page of the batch with the subpages that our own requests
    /// may explain, and those of them that the batch is still about; of the others the batch forgets those that were
    /// dropped. `noted` says of which subpages of a page a request is on the ring, and what was heard of. A message of
    /// ours is about no more than one request, which goes upwards: also over what the process has dropped meanwhile.
    pub(crate) fn note_removal(
        &mut self,
        range: AddrRange,
        noted: impl Fn(usize) -> (SubpageMask, SubpageMask),
        mut count: impl FnMut(usize, [SubpageMask; 2], Heard),
    ) {
        let submitted = self.submitted();
        for (i, p) in self.pages.iter_mut().enumerate() {
            let named = SubpageMask::of_page_in(p.page, range);
            let covered = named.and(p.mask);
            let (queued, heard) = noted(i);
            let within = p.page.range().intersect(range) == range && named.minus(queued).is_empty();
            let (told, ours) = if submitted && within {
                (named, covered)
            } else {
                (SubpageMask::NONE, SubpageMask::NONE)
            };
            p.mask = p.mask.minus(covered.minus(ours));
            // What is told of later was there, for nobody drops what he unmaps at the same time.
            p.heard.skipped = p.heard.skipped.minus(told);
            if let Some(first) = ours.iter().next() {
                let request = queued.runs().find(|&(at, n)| (at..at + n).contains(&first));
                let before = request.map_or(SubpageMask::NONE, |(at, _)| run_mask(at, first - at));
                let skipped = before.minus(heard).minus(told);
                if !skipped.is_empty() {
                    p.heard.early = p.heard.early.or(ours);
                    p.heard.skipped = p.heard.skipped.or(skipped);
                }
            }
            if !told.is_empty() {
                count(i, [told, ours], p.heard);
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

    /// The pages in `range` are no longer where they were; `came`: because others have come there. What is noted of the
    /// message's number, and whether that was perhaps noted before.
    pub(crate) fn lose(&mut self, range: AddrRange, (by, replays): (u16, bool), came: bool) {
        for p in &mut self.pages {
            let gone = range.intersect(p.span);
            if !gone.is_empty() {
                // As if it were several messages: what has come is no hole.
                let told = if came { 2 } else { 1 };
                // The same one a second time.
                p.told = if replays && p.told > 0 && p.told_by == by {
                    p.told.max(told)
                } else {
                    p.told.saturating_add(told)
                };
                p.told_by = by;
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
        if !self.repairs() {
            return;
        }
        let repaired = if matches!(self.phase, Phase::Repair | Phase::RepairWait) {
            self.at + 1
        } else {
            0
        };
        let hit = self.pages.iter().filter(|p| p.repair);
        let there: Vec<_> = hit.flat_map(|p| moved_pages(p.page, from, to)).collect();
        for page in there {
            let mut rest = self.pages.iter().skip(repaired);
            if !rest.any(|p| p.page == page && p.repair) {
                self.repair_also(page);
            }
        }
    }
}

impl<S: PageStore> Core<'_, S> {
    pub(in crate::core) fn ring_done(&mut self, id: SpaceId, tag: u64, result: i32) {
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
            // For a successor as well: it takes for ours what it hears of what is queued.
            self.notes.set_queued(id, i, run.minus(heard), false);
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
    pub(super) fn offered_nothing(
        &mut self,
        id: SpaceId,
        b: &mut Batch,
        i: usize,
        run: SubpageMask,
    ) {
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
    pub(super) fn settle_stopped(&mut self, id: SpaceId, b: &mut Batch) {
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
    pub(in crate::core) fn batch_loses(
        &mut self,
        id: SpaceId,
        range: AddrRange,
        seq: u32,
        came: bool,
    ) {
        let by = (told_by(seq), self.replays);
        let Some(s) = self.spaces.get_mut(usize::from(id.0)) else {
            return;
        };
        if let Some(b) = s.as_mut().and_then(|s| s.batch.as_mut()) {
            b.lose(range, by, came);
            for (i, p) in b.pages.iter().enumerate() {
                self.notes.set_gone(id, i, p.gone, (p.told, p.told_by));
            }
        }
    }

    /// What was heard of these was the process's doing: it drops them, and no request has offered them. So the kernel cannot
    /// have dropped them from a child that was forked since they were read: what is not there the process had dropped before.
    pub(super) fn dropped_after_all(
        &mut self,
        id: SpaceId,
        b: &Batch,
        i: usize,
        which: SubpageMask,
    ) {
        let (Some(s), Some(p)) = (self.space_ref(id), b.pages.get(i)) else {
            return;
        };
        let quiesce = s.next_quiesce();
        let (page, frame, left) = (p.page, p.frame.or(p.noted), p.left);
        for sub in which.iter() {
            let at = page.subpage(sub);
            // Not what has come to its place since; itself may be elsewhere.
            let now_at = match frame {
                Some(f) if left.has(sub) => self.staged_at(id, at, Entry::Staged(f, sub)),
                _ => (!left.has(sub)).then_some(at),
            };
            if let Some(at) = now_at {
                let entry = self.map.entry(id, at);
                for child in self.all_spaces().filter(|&c| c != id && entry.has_bytes()) {
                    let shares = self.space_ref(child).is_some();
                    let copy = shares.then(|| self.staged_at(child, at, entry)).flatten();
                    if let Some(copy) = copy {
                        self.set_entry(child, copy, Entry::Nothing);
                    }
                }
                self.set_entry(id, at, Entry::Dropping(quiesce));
                self.stats.dropped_in_batch += 1;
            }
        }
    }

    /// A removal of this was heard while a request for it is on the ring: ours, or the process's, which has moved
    /// the place away before the request came to it? Then what was read of it is no longer its content.
    /// That is known when the request has ended.
    pub(in crate::core) fn in_doubt(&self, id: SpaceId, entry: Entry) -> bool {
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

    /// A batch, or a predecessor's before it is decided whose each removal was, needs the map to say what is in `frame`; and
    /// its own it brings to the store itself.
    pub(in crate::core) fn is_of_a_batch(&self, frame: FrameId) -> bool {
        let mut batches = self
            .spaces
            .iter()
            .flatten()
            .filter_map(|s| s.batch.as_ref());
        batches.any(|b| {
            let undecided = matches!(b.phase, Phase::Recover | Phase::Unprotect);
            let noted = |p: &BatchPage| undecided && p.noted == Some(frame);
            b.frames().any(|f| f == frame) || b.pages.iter().any(noted)
        })
    }

    /// Where in a space a staged subpage is now: at `first`, or where the process has moved it.
    pub(super) fn staged_at(
        &self,
        id: SpaceId,
        first: SubpageIndex,
        entry: Entry,
    ) -> Option<SubpageIndex> {
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
    pub(super) fn awaits_ring(&mut self, id: SpaceId) -> bool {
        let now = self.now;
        let Some(s) = self.space(id) else {
            return false;
        };
        if s.ring == Ring::Absent {
            s.ring = Ring::Asked(now);
            self.errands.push_back(Op::NeedRing { space: id });
            return true;
        }
        matches!(s.ring, Ring::Asked(_) | Ring::Inherited)
    }

    /// Nothing of a predecessor is outstanding: its batch can be finished, and the ring is ours.
    pub(in crate::core) fn ring_quiet(&mut self, id: SpaceId, requests: Option<u32>) {
        if let Some(s) = self.space(id) {
            s.ring = requests.map_or(Ring::Absent, |_| Ring::Ready);
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
    pub(super) fn unqueued(&mut self, id: SpaceId, b: &mut Batch, requests: Option<u32>) {
        let Some((total, i, run)) = self.notes.last(id) else {
            return;
        };
        let (Some(p), true) = (
            b.pages.get_mut(i),
            // Fewer still, if a ring that is lost has given back others behind it.
            requests.is_some_and(|n| total.wrapping_sub(n).cast_signed() > 0),
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
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::core::scripted::{Hollow, config, core_of, memory, play};
    use crate::core::{Input, MapError, Nanos, Outcome, PageLook};

    const PAGE: PageIndex = PageIndex(0x900);
    const EINVAL: i32 = -22;

    /// Requests for subpage 6 and for 10 to 15 are on the ring; `messages` are ranges of subpages, from and to. What is
    /// left of the batch, and what came before something below it.
    fn after(messages: &[(usize, usize)]) -> (SubpageMask, SubpageMask) {
        let queued = run_mask(6, 1).or(run_mask(10, 6));
        let mut b = Batch::new(Nanos(0));
        b.pages.push(BatchPage::new(PAGE, queued, None));
        b.goto(Phase::Wait);
        let mut heard = SubpageMask::NONE;
        for &(from, to) in messages {
            let range = AddrRange {
                start: PAGE.subpage(from).start(),
                end: PAGE.subpage(to).start(),
            };
            let before = heard;
            b.note_removal(
                range,
                |_| (queued, before),
                |_, [told, _], _| heard = heard.or(told),
            );
        }
        (b.pages[0].mask, b.pages[0].heard.early)
    }

    #[test]
    fn a_message_of_ours_goes_over_what_the_process_has_dropped() {
        let left = run_mask(11, 5);
        let theirs = (6, 11);
        // In one message, and in two of a mapping that was split.
        assert_eq!(after(&[theirs, (10, 12)]), (left, SubpageMask::NONE));
        assert_eq!(
            after(&[theirs, (10, 11), (11, 12)]),
            (left, SubpageMask::NONE)
        );
        // Nothing was heard of the one below.
        assert_eq!(after(&[theirs, (11, 12)]), (left, run_mask(11, 1)));
        assert_eq!(after(&[(10, 12)]).1, SubpageMask::NONE);
        assert_eq!(after(&[(11, 12)]).1, run_mask(11, 1));
    }

    /// A request for subpages 6 to 10 ends so after a message about the first two. What does a successor take for
    /// the batch's own?
    fn left_to_a_successor(result: i32) -> SubpageMask {
        let (mut core, id) = core_of(PAGE.range());
        let queued = run_mask(6, 5);
        core.notes.write(id, [(PAGE, queued, None)].into_iter());
        core.notes.set_queued(id, 0, queued, true);
        core.notes.count(id, 0, run_mask(6, 2), 1);
        let mut b = Batch::new(Nanos(0));
        b.pages.push(BatchPage::new(PAGE, queued, None));
        b.outstanding = 2;
        b.goto(Phase::Wait);
        core.space(id).unwrap().batch = Some(b);
        let tag = 6 << 8 | 5 << 16;
        let space = id;
        core.handle(Nanos(1), Input::RingDone { space, tag, result });
        Batch::recovered(&core.notes, id).pages[0].mask
    }

    #[test]
    fn a_successor_takes_no_message_for_that_of_a_request_which_has_failed() {
        assert_eq!(left_to_a_successor(0), run_mask(6, 5));
        // The first of them may have been told of by the request, or by the process: that is settled later.
        assert_eq!(left_to_a_successor(EINVAL), run_mask(6, 2));
        assert_eq!(left_to_a_successor(HOLES), run_mask(6, 2));
        assert_eq!(left_to_a_successor(NEVER_RAN), SubpageMask::NONE);
    }

    /// A request stopped at subpage 5, after the process had dropped 6; the pager died before that was decided, with
    /// the requests `settled` or not. The successor, before it has heard that the ring is quiet.
    fn undecided(settled: bool) -> (Core<'static, Hollow>, SpaceId) {
        let memory = memory();
        let mut dead = Core::create(memory, Hollow::default(), config()).unwrap();
        let id = dead.add_space(0).unwrap();
        let frame = dead.frames.take().unwrap();
        let queued = run_mask(4, 4);
        dead.notes
            .write(id, [(PAGE, queued, Some(frame))].into_iter());
        dead.notes.set_queued(id, 0, queued, true);
        for sub in queued.iter() {
            let entry = Entry::Staged(frame, sub);
            dead.map.replace(id, PAGE.subpage(sub), entry).unwrap();
        }
        let heard = Heard {
            quiet: run_mask(5, 1).with(7),
            doubtful: run_mask(4, 1).with(6),
            ..Heard::default()
        };
        dead.notes.count(id, 0, heard.doubtful, 1);
        dead.notes.set_heard(id, 0, heard);
        if settled {
            dead.notes.settle(id);
        }
        drop(dead);
        let store = |_: &[_]| Ok::<_, MapError>(Hollow::default());
        let mut core = Core::recover(memory, config(), Nanos(0), store).unwrap();
        let range = PAGE.range();
        core.handle(Nanos(0), Input::Registered { space: id, range });
        (core, id)
    }

    #[test]
    fn a_successor_decides_whose_a_removal_was_before_it_serves_the_page() {
        for settled in [false, true] {
            let (mut core, id) = undecided(settled);
            assert!(core.space(id).unwrap().batch_holds(PAGE, false));
            let space = id;
            let requests = Some(1);
            core.handle(Nanos(0), Input::RingQuiet { space, requests });
            let looked = Outcome::Look(PageLook::default());
            play(
                &mut core,
                |_| 0,
                |op| matches!(op, Op::Look { .. }).then_some(looked),
            );
            assert!(!core.space(id).unwrap().batch_holds(PAGE, false));
            let dropped = |sub| matches!(core.map.entry(id, PAGE.subpage(sub)), Entry::Dropping(_));
            assert_eq!([4, 5, 6, 7].map(dropped), [false, false, true, false]);
        }
    }

    #[test]
    fn what_was_dropped_after_all_is_not_given_to_a_child_of_which_was_heard_first() {
        let (mut core, id) = undecided(true);
        let at = PAGE.subpage(6);
        let entry = core.map.entry(id, at);
        assert!(entry.has_bytes());
        core.forked(id, 7, 1);
        let child = core.all_spaces().nth(1).unwrap();
        assert_eq!(core.map.entry(child, at), entry);
        let b = Batch::recovered(&core.notes, id);
        core.dropped_after_all(id, &b, 0, run_mask(6, 1));
        assert!(matches!(core.map.entry(id, at), Entry::Dropping(_)));
        assert_eq!(core.map.entry(child, at), Entry::Nothing);
        // What else it has it keeps.
        let other = PAGE.subpage(7);
        assert_eq!(core.map.entry(child, other), core.map.entry(id, other));
    }

    #[test]
    fn what_was_dropped_is_found_where_it_is_whatever_it_was_read_into() {
        let (mut core, id) = undecided(true);
        let other = core.frames.take().unwrap();
        let at = PAGE.subpage(6);
        core.map.replace(id, at, Entry::Staged(other, 6)).unwrap();
        let b = Batch::recovered(&core.notes, id);
        core.dropped_after_all(id, &b, 0, run_mask(6, 1));
        assert!(matches!(core.map.entry(id, at), Entry::Dropping(_)));
    }

    #[test]
    fn a_message_that_is_applied_again_has_told_once() {
        let lost = |messages: &[(u16, bool, bool)]| {
            let mut b = Batch::new(Nanos(0));
            b.pages.push(BatchPage::new(PAGE, run_mask(0, 16), None));
            for &(by, replays, came) in messages {
                b.lose(PAGE.range(), (by, replays), came);
            }
            b.pages[0].told
        };
        assert_eq!(lost(&[(0, true, false)]), 1);
        assert_eq!(lost(&[(0, false, false), (0, true, false)]), 1);
        assert_eq!(lost(&[(0, false, false), (1, true, false)]), 2);
        // The number has come round.
        assert_eq!(lost(&[(0, false, false), (0, false, false)]), 2);
        // What has come is no hole.
        assert_eq!(lost(&[(0, false, true)]), 2);
        assert_eq!(lost(&[(0, false, false), (0, true, true)]), 2);
    }
}
