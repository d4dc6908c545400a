//! After the window: what a request hit in the place of an offered page becomes dirty again.

use holo_proto::{Addr, AddrRange, PageIndex, SpaceId, SubpageMask};

use super::{Batch, Phase, Step, run_mask, tag_of};
use crate::core::space::{Space, moved_pages};
use crate::core::{ANYWHERE, Advice, Core, Op, Outcome, StopReason};
use crate::store::api::{PageStore, Ticket};

/// So many rounds of one page's repair may end with something refused that is there at the next look. They follow each other
/// after a rest that doubles.
const ROUNDS: u32 = 8;
const REST_NS: u64 = 500_000;

/// The repair of one page: what the process has put in the place of an offered page, or what it is not
/// certain of whether it was dropped, becomes dirty again.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Repair {
    pub(super) looked: bool,
    /// The ring had no room: nothing more before all requests have ended.
    pub(super) full: bool,
    /// To be populated.
    pub(super) left: SubpageMask,
    /// A request over several failed: one by one.
    pub(super) single: SubpageMask,
    /// Populate does not do it (not writable): in a stop of all threads.
    pub(super) redirty: SubpageMask,
    /// Of these, the ones that a protection was lifted from, which came there with what moved.
    pub(super) lifted: SubpageMask,
    /// The request for that which is under way, and whether there was one.
    pub(super) redirtying: Option<Ticket>,
    pub(super) asked: bool,
    /// Of which that was refused in this round: the page is not there any more, or it is always so.
    pub(super) refused: SubpageMask,
    /// Rounds of which something refused was there afterwards.
    pub(super) rounds: u32,
}

impl Repair {
    /// Populate has done what it can, and some is left.
    fn wants_stop(&self, outstanding: usize) -> bool {
        self.left.is_empty() && outstanding == 0 && !self.redirty.is_empty()
    }
}

impl<S: PageStore> Core<'_, S> {
    /// Who shares what was hit has to put it right as well: the kernel drops a page from all who have it, and what was
    /// written before the fork is marked nowhere else.
    fn tell_children(&mut self, id: SpaceId, b: &mut Batch) {
        let hits: Vec<_> = b.hits().collect();
        self.tell(id, b, &hits);
    }

    /// A batch ends with its process: whatever its requests may have hit, its children are told of.
    pub(in crate::core) fn leave_hits(&mut self, id: SpaceId, b: &mut Batch) {
        let all: Vec<_> = b.pages.iter().map(|p| p.page).collect();
        self.tell(id, b, &all);
    }

    fn tell(&mut self, id: SpaceId, b: &mut Batch, hits: &[PageIndex]) {
        if std::mem::replace(&mut b.told_children, true) || b.only_repairs {
            return;
        }
        let (children, anybody) = (std::mem::take(&mut b.children), b.recovered);
        for s in self.spaces.iter_mut().flatten() {
            let shares = anybody || children.contains(&s.id);
            if s.id != id && shares {
                self.again |= s.add_hits(hits.iter().copied());
            }
        }
        for space in self.all_spaces().filter(|&s| s != id) {
            self.note_hits(space);
        }
    }

    /// A space that is about to be let go of waits for nobody: what it may share that requests have hit, it puts right.
    pub(in crate::core) fn hear_of_hits(&mut self, id: SpaceId) {
        let others = self.spaces.iter_mut().flatten().filter(|s| s.id != id);
        let hits: Vec<_> = others
            .filter_map(|s| s.batch.as_mut())
            .flat_map(|b| b.tell_early(id))
            .collect();
        if let Some(s) = self.space(id) {
            s.add_hits(hits.into_iter());
        }
        self.note_hits(id);
    }

    /// What a relative's batch may yet tell that it has hit moves away from where it will be told of.
    pub(in crate::core) fn hits_move_unheard(&mut self, id: SpaceId, from: AddrRange, to: Addr) {
        let others = self.spaces.iter().flatten().filter(|s| s.id != id);
        let there: Vec<_> = others
            .filter_map(|s| s.batch.as_ref())
            .filter(|b| b.may_tell(id))
            .flat_map(|b| b.pages.iter())
            .flat_map(|p| moved_pages(p.page, from, to))
            .collect();
        if let Some(s) = self.space(id) {
            s.add_hits(there.into_iter());
        }
    }

    /// Nothing goes on before the process was stopped, or may be stopped again.
    pub(super) fn awaits_stop(&self, b: &Batch, id: SpaceId) -> bool {
        let rests = self
            .space_ref(id)
            .is_some_and(|s| s.redirty_rests(self.now));
        b.repair.redirtying.is_some() || rests && b.repair.wants_stop(b.outstanding)
    }

    pub(super) fn repair(&mut self, id: SpaceId, b: &mut Batch) -> Option<Op> {
        self.tell_children(id, b);
        while let Some(p) = b.pages.get(b.at) {
            if !p.repair {
                b.at += 1;
                continue;
            }
            // All that the requests have found out about this page, in one stop.
            if b.repair.wants_stop(b.outstanding) {
                if let Some(i) = b.repair.redirty.minus(b.repair.lifted).iter().next() {
                    b.step = Step::RepairLift(p.page.subpage(i));
                    let range = p.run(i, 1);
                    return Some(Op::Unprotect { space: id, range });
                }
                if !std::mem::replace(&mut b.repair.asked, true) {
                    b.waiting_since = self.now;
                }
                let ticket = self.new_ticket();
                b.repair.redirtying = Some(ticket);
                b.step = Step::RepairRedirty;
                return Some(Op::NeedRedirty {
                    space: id,
                    page: p.page,
                    mask: b.repair.redirty,
                    ticket,
                });
            }
            let next = b.repair.left.runs().next();
            if let (false, Some((first, count))) = (b.repair.full, next) {
                let alone = b.repair.single.has(first);
                let count = if alone { 1 } else { count };
                b.repair.left = b.repair.left.minus(run_mask(first, count));
                b.step = Step::RepairQueue { first, count };
                return Some(Op::Advise {
                    space: id,
                    advice: Advice::Populate,
                    range: p.run(first, count),
                    tag: tag_of(b.at, first, count),
                });
            }
            if b.outstanding > 0 {
                return Some(self.await_repair(id, b));
            }
            if b.repair.looked {
                b.repair = Repair::default();
                b.at += 1;
                continue;
            }
            b.step = Step::RepairLook;
            return Some(Op::Look {
                space: id,
                page: p.page,
            });
        }
        // A child that was forked before the last of this may be heard of only now: it finds the batch as long as this has
        // not succeeded.
        if !b.proved && b.pages.iter().any(|p| p.repair) {
            b.step = Step::RepairProof;
            return Some(Op::Unprotect {
                space: id,
                range: ANYWHERE,
            });
        }
        self.notes.finish(id);
        self.note_hits(id);
        b.goto(Phase::Put);
        None
    }

    pub(super) fn await_repair(&mut self, id: SpaceId, b: &mut Batch) -> Op {
        b.phase = Phase::RepairWait;
        b.waiting_since = self.now;
        b.step = Step::RepairKick;
        Op::Kick { space: id }
    }

    pub(super) fn repair_step_done(
        &mut self,
        id: SpaceId,
        b: &mut Batch,
        step: Step,
        outcome: Outcome,
    ) {
        match step {
            Step::RepairLook => {
                let Outcome::Look(look) = outcome else {
                    // Nobody could look (whose process it is may not be known yet): not "nothing is there".
                    let rest = self.now.after(REST_NS << 2);
                    if let Some(s) = self.space(id) {
                        s.retry_at = Some(rest);
                    }
                    return;
                };
                // What is being migrated looks as if it were swapped out, for a moment.
                let there = look.present.or(look.swapped);
                let present = there.minus(look.zero).minus(look.file);
                b.repair.looked = true;
                let spared = |s: &Space| s.does_without_ring(&self.childhood, self.now);
                if self.space_ref(id).is_some_and(spared) {
                    b.repair.redirty = present;
                } else {
                    b.repair.left = present;
                }
                let refused = std::mem::replace(&mut b.repair.refused, SubpageMask::NONE);
                let still = refused.and(present).iter().next();
                if let (Some(i), Some(p)) = (still, b.pages.get(b.at)) {
                    b.repair.rounds += 1;
                    if b.repair.rounds == ROUNDS {
                        let at = p.page.subpage(i);
                        return self.stop(id, StopReason::NotDirtied { at });
                    }
                    // Perhaps for want of memory, or of a moment.
                    let rest = self.now.after(REST_NS << b.repair.rounds);
                    if let Some(s) = self.space(id) {
                        s.retry_at = Some(rest);
                    }
                }
                self.stats.foreign_repaired += u64::from(!present.is_empty());
            }
            Step::RepairQueue { first, count } => match outcome {
                Outcome::Done => b.outstanding += 1,
                // No room: when some have ended.
                _ if b.outstanding > 0 => {
                    b.repair.left = b.repair.left.or(run_mask(first, count));
                    b.repair.full = true;
                }
                _ => b.repair.redirty = b.repair.redirty.or(run_mask(first, count)),
            },
            Step::RepairProof => {
                b.proved = true;
                self.progressed(id);
            }
            Step::RepairLift(at) => {
                b.repair.lifted = b.repair.lifted.with(at.in_page());
                self.progressed(id);
            }
            Step::RepairRedirty if outcome != Outcome::Done => {
                b.repair.redirtying = None;
                let now = self.now;
                if let Some(s) = self.space(id) {
                    s.redirtied(false, now);
                }
            }
            _ => {}
        }
    }

    /// What was asked for was made dirty, or could not be; `None`: the process was not stopped.
    pub(in crate::core) fn repair_redirtied(
        &mut self,
        id: SpaceId,
        ticket: Ticket,
        done: Option<SubpageMask>,
    ) {
        let Some(b) = self.space(id).and_then(|s| s.batch.as_mut()) else {
            return;
        };
        let repair = &mut b.repair;
        if repair.redirtying != Some(ticket) {
            return;
        }
        repair.redirtying = None;
        // The next try has it all again: what has moved there meanwhile may be protected.
        repair.lifted = SubpageMask::NONE;
        let Some(done) = done else { return };
        let refused = repair.redirty.minus(done);
        repair.redirty = SubpageMask::NONE;
        repair.asked = false;
        if !refused.is_empty() {
            // Is it still there?
            repair.looked = false;
            repair.refused = repair.refused.or(refused);
        }
    }
}

#[cfg(test)]
mod tests {
    use holo_proto::PageIndex;

    use super::super::BatchPage;
    use super::*;
    use crate::core::scripted::{Hollow, core_of, play};
    use crate::core::space::Ring;
    use crate::core::{Input, Nanos, PageLook};

    const EINVAL: i32 = -22;
    const ENODEV: i32 = 19;
    const PAGE: PageIndex = PageIndex(0x700);

    /// A batch of one page, two subpages of which a request may have hit in the place of what was offered.
    fn hit() -> (Core<'static, Hollow>, SpaceId) {
        let (mut core, space) = core_of(PAGE.range());
        let mut b = Batch::new(Nanos(0));
        let mut p = BatchPage::new(PAGE, run_mask(4, 2), None);
        p.repair = true;
        p.lost = true;
        b.pages.push(p);
        b.goto(Phase::Repair);
        core.space(space).unwrap().batch = Some(b);
        (core, space)
    }

    fn look(present: SubpageMask) -> Option<Outcome> {
        Some(Outcome::Look(PageLook {
            present,
            ..PageLook::default()
        }))
    }

    fn count(asked: &[Op], what: impl Fn(&Op) -> bool) -> usize {
        asked.iter().filter(|op| what(op)).count()
    }

    fn is_redirty(op: &Op) -> bool {
        matches!(op, Op::NeedRedirty { .. })
    }

    #[test]
    fn what_populate_refuses_is_made_dirty_in_one_stop() {
        let (mut core, space) = hit();
        let mut dirtied = Vec::new();
        play(
            &mut core,
            |_| EINVAL,
            |op| match *op {
                Op::Look { .. } => look(run_mask(4, 2)),
                Op::NeedRedirty { page, mask, .. } => {
                    dirtied.push((page, mask));
                    None
                }
                _ => None,
            },
        );
        assert_eq!(dirtied, [(PAGE, run_mask(4, 2))]);
        assert!(core.space(space).unwrap().batch.is_none());
    }

    #[test]
    fn a_young_child_is_repaired_without_a_ring() {
        for (young_ns, rings) in [(1 << 40, 0), (0, 1)] {
            let (mut core, space) = hit();
            core.childhood.young_ns = young_ns;
            let s = core.space(space).unwrap();
            s.ring = Ring::Absent;
            s.born = Some(Nanos(0));
            let asked = play(
                &mut core,
                |_| 0,
                |op| matches!(op, Op::Look { .. }).then(|| look(run_mask(4, 2)))?,
            );
            assert_eq!(count(&asked, |op| matches!(op, Op::NeedRing { .. })), rings);
            assert_eq!(count(&asked, is_redirty), 1 - rings);
            assert_eq!(core.space(space).unwrap().batch.is_none(), rings == 0);
        }
    }

    #[test]
    fn what_is_being_migrated_is_made_dirty_as_well() {
        let (mut core, _) = hit();
        let swapped = run_mask(4, 2);
        let looked = Outcome::Look(PageLook {
            swapped,
            ..PageLook::default()
        });
        let asked = play(
            &mut core,
            |_| 0,
            |op| matches!(op, Op::Look { .. }).then_some(looked),
        );
        assert_eq!(count(&asked, |op| matches!(op, Op::Advise { .. })), 1);
    }

    #[test]
    fn a_look_that_fails_is_tried_again() {
        let (mut core, space) = hit();
        let mut failures = 5;
        let asked = play(
            &mut core,
            |_| 0,
            |op| match op {
                Op::Look { .. } if failures > 0 => {
                    failures -= 1;
                    Some(Outcome::Refused(ENODEV))
                }
                Op::Look { .. } => look(run_mask(4, 2)),
                _ => None,
            },
        );
        assert_eq!(failures, 0);
        let hit = AddrRange {
            start: PAGE.subpage(4).start(),
            end: PAGE.subpage(6).start(),
        };
        let populated = |op: &Op| matches!(op, Op::Advise { range, .. } if *range == hit);
        assert_eq!(count(&asked, populated), 1);
        assert!(core.space(space).unwrap().batch.is_none());
    }

    #[test]
    fn a_process_that_cannot_be_stopped_is_waited_for() {
        let (mut core, space) = hit();
        let mut failures = 20;
        let asked = play(
            &mut core,
            |_| EINVAL,
            |op| match op {
                Op::Look { .. } => look(run_mask(4, 1)),
                Op::NeedRedirty { .. } if failures > 0 => {
                    failures -= 1;
                    Some(Outcome::Full)
                }
                _ => None,
            },
        );
        assert_eq!(count(&asked, is_redirty), 21);
        assert_eq!(count(&asked, |op| matches!(op, Op::Stop { .. })), 0);
        assert!(core.space(space).unwrap().batch.is_none());
    }

    #[test]
    fn what_is_gone_when_it_is_refused_is_no_reason_to_stop() {
        let (mut core, _) = hit();
        let mut there = run_mask(4, 2);
        let asked = play(
            &mut core,
            |_| EINVAL,
            |op| match *op {
                Op::Look { .. } => look(there),
                Op::NeedRedirty { mask, .. } => {
                    there = there.minus(mask);
                    Some(Outcome::Mask(SubpageMask::NONE))
                }
                _ => None,
            },
        );
        assert_eq!(count(&asked, |op| matches!(op, Op::Stop { .. })), 0);
    }

    #[test]
    fn what_cannot_be_made_dirty_at_all_stops_the_process() {
        let (mut core, _) = hit();
        let asked = play(
            &mut core,
            |_| EINVAL,
            |op| match *op {
                Op::Look { .. } => look(run_mask(4, 2)),
                Op::NeedRedirty { .. } => Some(Outcome::Mask(SubpageMask::NONE)),
                _ => None,
            },
        );
        assert_eq!(count(&asked, |op| matches!(op, Op::Stop { .. })), 1);
    }

    /// Plays on where all that was hit is still resident: what was asked, and what was populated of whom.
    fn populated(core: &mut Core<'static, Hollow>) -> (Vec<Op>, Vec<(SpaceId, AddrRange)>) {
        let mut populated = Vec::new();
        let asked = play(
            core,
            |_| 0,
            |op| match *op {
                Op::Look { .. } => look(run_mask(4, 2)),
                Op::Advise { space, range, .. } => {
                    populated.push((space, range));
                    None
                }
                _ => None,
            },
        );
        (asked, populated)
    }

    #[test]
    fn what_a_child_shares_is_repaired_there_as_well() {
        let (mut core, space) = hit();
        let child = core.add_space(1).unwrap();
        let stranger = core.add_space(2).unwrap();
        core.handle(Nanos(0), crate::core::Input::RingReady(child));
        let batch = core.space(space).unwrap().batch.as_mut().unwrap();
        batch.has_child(child);
        let (_, populated) = populated(&mut core);
        let range = super::super::run(PAGE, 4, 2);
        assert_eq!(populated, [(space, range), (child, range)]);
        for id in [space, child, stranger] {
            let s = core.space(id).unwrap();
            assert!(s.batch.is_none() && s.hits.is_empty());
        }
    }

    #[test]
    fn a_child_that_is_let_go_of_waits_for_no_parent() {
        let (mut core, space) = hit();
        let child = core.add_space(1).unwrap();
        core.handle(Nanos(0), Input::RingReady(child));
        let batch = core.space(space).unwrap().batch.as_mut().unwrap();
        batch.goto(Phase::Wait);
        batch.outstanding = 1;
        batch.has_child(child);
        core.handle(Nanos(0), Input::Detach(child));
        let (asked, populated) = populated(&mut core);
        assert_eq!(populated, [(child, super::super::run(PAGE, 4, 2))]);
        let closed = |op: &Op| matches!(op, Op::Closed { space, .. } if *space == child);
        assert_eq!(count(&asked, closed), 1);
        // Its slot's next owner may be a child again.
        let batch = core.space(space).unwrap().batch.as_mut().unwrap();
        assert_eq!(batch.tell_early(child), []);
        batch.has_child(child);
        assert_eq!(batch.tell_early(child), [PAGE]);
    }

    #[test]
    fn what_a_child_has_moved_before_it_is_told_is_repaired_in_both_places() {
        let (mut core, space) = hit();
        let child = core.add_space(1).unwrap();
        let batch = core.space(space).unwrap().batch.as_mut().unwrap();
        batch.has_child(child);
        let to = PageIndex(0x900);
        core.hits_move_unheard(child, PAGE.range(), to.range().start);
        core.hear_of_hits(child);
        assert_eq!(core.space(child).unwrap().hits, [to, PAGE]);
        // What it has been told of moves on by itself.
        core.hits_move_unheard(space, PAGE.range(), to.range().start);
        assert_eq!(core.space(space).unwrap().hits, []);
    }

    #[test]
    fn a_batch_is_not_over_before_all_forks_are_heard_of() {
        let (mut core, space) = hit();
        let (mut pending, mut over_before) = (3, false);
        let asked = play(
            &mut core,
            |_| 0,
            |op| match *op {
                Op::Look { .. } => look(run_mask(4, 2)),
                Op::Unprotect { range, .. } if range == ANYWHERE && pending > 0 => {
                    pending -= 1;
                    Some(Outcome::EventsPending)
                }
                Op::Pageout { .. } | Op::Put { .. } => {
                    over_before |= pending > 0;
                    None
                }
                _ => None,
            },
        );
        let proof = |op: &Op| matches!(op, Op::Unprotect { range, .. } if *range == ANYWHERE);
        assert!(count(&asked, proof) >= 4 && !over_before, "{asked:?}");
        assert!(core.space(space).unwrap().batch.is_none());
    }

    #[test]
    fn a_successor_knows_what_was_to_be_made_dirty() {
        let (mut core, space) = hit();
        let child = core.add_space(1).unwrap();
        let (from, to) = (PAGE.range(), PageIndex(0x900));
        core.notes
            .write(space, [(PAGE, run_mask(4, 2), None)].into_iter());
        let batch = core.space(space).unwrap().batch.as_mut().unwrap();
        batch.has_child(child);
        batch.chase(from, to.range().start);
        core.note_hits(space);
        // Nothing is told twice.
        for _ in 0..2 {
            core.hear_of_hits(child);
        }
        let hits = |id| core.notes.hits(id).collect::<Vec<_>>();
        assert_eq!((hits(space), hits(child)), (vec![to], vec![PAGE, to]));
        let mut b = Batch::recovered(&core.notes, space);
        assert_eq!(b.hits().collect::<Vec<_>>(), [PAGE, to]);
        assert!(b.may_tell(child) && b.tell_early(child) == [PAGE, to]);
        // What it has been told it does not tell to others.
        core.notes
            .write(space, [(PAGE, SubpageMask::NONE, None)].into_iter());
        assert!(!Batch::recovered(&core.notes, space).may_tell(child));
        core.end_space(child, false);
        assert_eq!(core.notes.hits(child).count(), 0);
    }

    #[test]
    fn a_parent_that_ends_leaves_to_its_children_what_it_may_have_hit() {
        let (mut core, space) = hit();
        let [child, grandchild, stranger] = [1, 2, 3].map(|word| core.add_space(word).unwrap());
        let batch = core.space(space).unwrap().batch.as_mut().unwrap();
        batch.has_child(child);
        assert!(batch.will_tell(child) && !batch.will_tell(grandchild));
        batch.has_child(grandchild);
        core.end_space(space, false);
        let hits = |core: &Core<'_, Hollow>, id| core.space_ref(id).unwrap().hits.clone();
        for id in [child, grandchild] {
            assert_eq!(hits(&core, id), [PAGE]);
        }
        assert_eq!(hits(&core, stranger), []);
    }
}
