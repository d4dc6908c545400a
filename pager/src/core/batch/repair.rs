//! After the window: what a request hit in the place of an offered page becomes dirty again.

use holo_proto::{SpaceId, SubpageIndex, SubpageMask};

use super::{Batch, Phase, Step, run_mask, tag_of};
use crate::core::{Advice, Core, Op, Outcome, StopReason};
use crate::store::api::PageStore;

/// So many rounds of one page's repair may end with something refused that is there at the next look.
const ROUNDS: u32 = 8;

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
    /// Populate does not do it (not writable): through `/proc/PID/mem`, where nobody else can write.
    pub(super) redirty: SubpageMask,
    /// Of these, the one that a protection was lifted from, which came there with what moved.
    pub(super) lifted: Option<SubpageIndex>,
    /// Of which that was refused in this round: the page is not there any more, or it is always so.
    pub(super) refused: SubpageMask,
    /// Rounds of which something refused was there afterwards.
    pub(super) rounds: u32,
}

impl<S: PageStore> Core<'_, S> {
    pub(super) fn repair(&mut self, id: SpaceId, b: &mut Batch) -> Option<Op> {
        while let Some(p) = b.pages.get(b.at) {
            if !p.repair {
                b.at += 1;
                continue;
            }
            if let Some(i) = b.repair.redirty.iter().next() {
                let at = p.page.subpage(i);
                if b.repair.lifted != Some(at) {
                    b.step = Step::RepairLift(at);
                    let range = p.run(i, 1);
                    return Some(Op::Unprotect { space: id, range });
                }
                b.repair.redirty = b.repair.redirty.without(i);
                b.step = Step::RepairRedirty(at);
                return Some(Op::Redirty { space: id, at });
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
        self.notes.finish(id);
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
                let present = if let Outcome::Look(l) = outcome {
                    l.present.minus(l.zero).minus(l.file)
                } else {
                    SubpageMask::NONE
                };
                b.repair.looked = true;
                b.repair.left = present;
                let refused = std::mem::replace(&mut b.repair.refused, SubpageMask::NONE);
                let still = refused.and(present).iter().next();
                b.repair.rounds += u32::from(still.is_some());
                if let (Some(i), Some(p), ROUNDS..) = (still, b.pages.get(b.at), b.repair.rounds) {
                    let at = p.page.subpage(i);
                    self.stop(id, StopReason::NotDirtied { at });
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
                _ => b.repair.redirty = run_mask(first, count),
            },
            Step::RepairLift(at) => {
                b.repair.lifted = Some(at);
                self.progressed(id);
            }
            Step::RepairRedirty(at) => {
                b.repair.lifted = None;
                if outcome != Outcome::Done {
                    // Is it still there?
                    b.repair.looked = false;
                    b.repair.refused = b.repair.refused.with(at.in_page());
                }
            }
            _ => {}
        }
    }
}
