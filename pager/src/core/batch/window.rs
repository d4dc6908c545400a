//! The protected window: what the process may not write to meanwhile.

use holo_proto::{AddrRange, SUBPAGE_BYTES, SpaceId, SubpageIndex, SubpageMask};

use super::{Batch, Phase, Step, run_mask, tag_of};
use crate::core::{ANYWHERE, Advice, Core, CrashPoint, Entry, FrameId, Op, Outcome, StopReason};
use crate::store::api::PageStore;

/// So long a list of the threads is good: less than a thread needs to begin, run and end.
const THREADS_NS: u64 = 30_000;
/// On a machine where even the next operation always comes later than that, eviction must go on all the same.
const LATE_LISTS: u32 = 16;

impl<S: PageStore> Core<'_, S> {
    pub(super) fn protect(&mut self, id: SpaceId, b: &mut Batch) -> Option<Op> {
        let in_time = b.listed.is_some_and(|at| self.now < at.after(THREADS_NS));
        let patience_over = b.listed.is_some() && b.late_lists >= LATE_LISTS;
        if b.list_after_all || b.at < b.pages.len() && !in_time && !patience_over {
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
            b.list_after_all = !in_time;
            return Some(Op::Protect { space: id, range });
        }
        b.goto(Phase::Pins);
        None
    }

    pub(super) fn protect_done(&mut self, id: SpaceId, b: &mut Batch, outcome: Outcome) {
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

    /// Does a device have a hold on memory of the process for long? What such a one writes marks no page, and
    /// after it has let go nothing tells a page that it wrote. Whoever wants to take hold now waits: a page
    /// that is written by a device is made writable first, and those of the batch are protected.
    pub(super) fn pins(&mut self, id: SpaceId, b: &mut Batch) -> Option<Op> {
        if b.pages.iter().all(|p| p.lost || p.mask.is_empty()) {
            b.goto(Phase::Read);
            return None;
        }
        b.step = Step::Pins;
        Some(Op::Pins { space: id })
    }

    pub(super) fn pins_known(&mut self, b: &mut Batch, outcome: Outcome) {
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

    pub(super) fn read(&mut self, id: SpaceId, b: &mut Batch) -> Option<Op> {
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
    pub(super) fn stage(&mut self, id: SpaceId, b: &Batch) {
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

    pub(super) fn queue(&mut self, id: SpaceId, b: &mut Batch) -> Option<Op> {
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
    pub(super) fn waited(&mut self, id: SpaceId, b: &mut Batch) {
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

    pub(super) fn reread(&mut self, id: SpaceId, b: &mut Batch) -> Option<Op> {
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
    pub(super) fn restage_children(
        &mut self,
        id: SpaceId,
        at: SubpageIndex,
        (old, new): (FrameId, FrameId),
    ) {
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
    pub(super) fn restage(&mut self, id: SpaceId, b: &mut Batch, read: SubpageMask) {
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
                self.leave_frame(old);
                b.spare = None;
            } else {
                b.spare = Some(old);
            }
        }
        if b.spare.is_none() {
            b.spare = self.frames.take();
        }
    }

    pub(super) fn unprotect(&mut self, id: SpaceId, b: &mut Batch) -> Option<Op> {
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

    pub(super) fn unprotect_done(&mut self, id: SpaceId, b: &mut Batch, outcome: Outcome) {
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

    pub(super) fn opened(&mut self, b: &mut Batch) {
        if let Some(p) = b.pages.get_mut(b.at) {
            p.open = true;
        }
        b.at += 1;
        b.sub = 0;
        b.single_steps = false;
        self.crash(CrashPoint::Unprotected);
    }
}

#[cfg(test)]
mod tests {
    use holo_proto::{Addr, PageIndex};

    use super::super::BatchPage;
    use super::*;
    use crate::core::scripted::core_of;
    use crate::core::{HEADS, Heads, Nanos, Next};

    const PAGES: [PageIndex; 2] = [PageIndex(0x700), PageIndex(0x701)];

    /// What is asked from the first protection on, where each list of threads comes late, and the first one after that
    /// names `head`.
    fn after_a_late_list(head: Option<Addr>) -> Vec<Op> {
        let range = AddrRange {
            start: PAGES[0].range().start,
            end: PAGES[1].range().end,
        };
        let (mut core, id) = core_of(range);
        let mut b = Batch::new(Nanos(0));
        for page in PAGES {
            let frame = core.frames.take();
            b.pages.push(BatchPage::new(page, run_mask(0, 16), frame));
        }
        b.goto(Phase::Threads);
        core.space(id).unwrap().batch = Some(b);
        let mut asked: Vec<Op> = Vec::new();
        for ms in 0..200 {
            let now = Nanos(ms * 1_000_000);
            let Next::Op(op) = core.next(now) else {
                break;
            };
            let mut heads = Heads {
                at: [Addr(0); HEADS],
                len: 0,
                more: false,
            };
            if let (Some(head), false) = (head, asked.is_empty()) {
                heads.at[0] = head;
                heads.len = 1;
            }
            let outcome = match op {
                Op::Threads { .. } => Outcome::Heads(heads),
                Op::ReadEvents { .. } => Outcome::Events { count: 0, gone: 0 },
                Op::Pins { .. } => Outcome::Pinned(0),
                Op::Read { subpages, .. } => Outcome::Subpages(subpages),
                _ => Outcome::Done,
            };
            core.complete(now, outcome);
            if !asked.is_empty() || matches!(op, Op::Protect { .. }) {
                asked.push(op);
            }
        }
        asked
    }

    #[test]
    fn who_came_after_a_late_list_is_asked_and_let_go_at_once() {
        let lists = |op: &Op| matches!(op, Op::Threads { .. });
        let asked = after_a_late_list(Some(PAGES[0].range().start.offset(8)));
        assert!(lists(&asked[1]), "{asked:?}");
        let Op::Unprotect { range, .. } = asked[2] else {
            panic!("{:?}", asked[2]);
        };
        assert_eq!(range, PAGES[0].range());
        // Neither is evicted.
        assert!(!asked.iter().any(|op| matches!(op, Op::Advise { .. })));

        // Nobody came: both are protected, one list after the last one, and both go.
        let asked = after_a_late_list(None);
        let protects = |op: &Op| matches!(op, Op::Protect { .. });
        let last = asked.iter().rposition(protects).unwrap();
        assert_eq!(asked.iter().filter(|op| protects(op)).count(), 2);
        assert_eq!(asked[last..].iter().filter(|op| lists(op)).count(), 1);
        assert!(asked.iter().any(|op| matches!(op, Op::Advise { .. })));
    }
}
