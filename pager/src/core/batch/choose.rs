//! Which pages a batch is about.

use holo_proto::{AddrRange, PAGE_BYTES, PageIndex, SUBPAGE_BYTES, SpaceId, SubpageMask};

use super::{Batch, BatchPage, Phase, Step, run};
use crate::core::op::Heads;
use crate::core::{BATCH_PAGES, Core, Entry, Op, Outcome, PageLook};
use crate::store::api::PageStore;

/// Least time between two full searches for resident pages, nanoseconds; doubled while fruitless.
const SWEEP_NS: u64 = 10_000_000;
/// Around an address that the kernel writes with faults forbidden: the rest of the thread's control block.
const CONTROL_BLOCK_BYTES: u64 = 4096;

impl<S: PageStore> Core<'_, S> {
    pub(super) fn select(&mut self, id: SpaceId, b: &mut Batch) -> Option<Op> {
        if b.spare.is_none() {
            b.spare = self.frames.take();
        }
        let enough = self.usage_bytes() <= self.low_bytes() + b.planned_bytes;
        if b.spare.is_none() || b.pages.len() >= BATCH_PAGES || enough || self.frames.free() < 2 {
            return self.selected(b);
        }
        let now = self.now;
        let s = self.space(id)?;
        while let Some(page) = s.policy.take_victim() {
            s.queued.remove(page);
            let kept_out = s.restore.covers(page) || b.pages.iter().any(|p| p.page == page);
            if kept_out || s.regions.overlapping(page.range()).is_none() {
                continue;
            }
            b.step = Step::Look(page);
            return Some(Op::Look { space: id, page });
        }
        // Nobody told us of more: search.
        if now < s.sweep_after {
            return self.selected(b);
        }
        match s.regions.at_or_after(s.sweep) {
            Some(r) => {
                let range = AddrRange {
                    start: r.start.max(s.sweep),
                    end: r.end,
                };
                b.step = Step::Sweep(range);
                Some(Op::FindPresent { space: id, range })
            }
            None => {
                s.sweep = holo_proto::Addr(0);
                s.sweep_after = now.after(SWEEP_NS << s.fruitless.min(5));
                self.selected(b)
            }
        }
    }

    pub(super) fn selected(&mut self, b: &mut Batch) -> Option<Op> {
        if b.pages.is_empty() {
            b.goto(Phase::Look);
        } else {
            b.goto(Phase::Protect);
        }
        None
    }

    /// What of a page may be offered, from what pagemap says and what we know.
    pub(super) fn eligible(&mut self, id: SpaceId, page: PageIndex, look: PageLook) -> SubpageMask {
        let in_memory = look
            .present
            .minus(look.zero)
            .minus(look.swapped)
            .minus(look.file);
        let Some(s) = self.space_ref(id) else {
            return SubpageMask::NONE;
        };
        let quiesced = s.quiesce_count;
        let mut mask = SubpageMask::NONE;
        let mut droppable = SubpageMask::NONE;
        let mut dropping = false;
        for i in 0..16 {
            let at = page.subpage(i);
            if s.drops.may_drop(at.start(), quiesced) {
                dropping |= in_memory.has(i);
                continue;
            }
            match self.map.entry(id, at) {
                Entry::Dropping(n) if n >= quiesced => {
                    dropping |= in_memory.has(i);
                    continue;
                }
                // Forked while the parent had offered it: clean, and the kernel may drop it at any time. What
                // the outcome of a request of ours means can be told only of pages that are dirty before it.
                Entry::Stored(_) | Entry::Staged(..) if in_memory.has(i) => {
                    droppable = droppable.with(i);
                    continue;
                }
                _ => {}
            }
            let start = at.start();
            if in_memory.has(i)
                && look.exclusive.has(i)
                && s.regions.around(start).is_some()
                && s.never.around(start).is_none()
            {
                mask = mask.with(i);
            }
        }
        let now = self.now;
        if let Some(s) = self.space(id) {
            for (first, count) in droppable.runs() {
                s.restore.push(run(page, first, count), now);
            }
        }
        if dropping {
            if let Some(count) = self.space(id).and_then(|s| s.ask_quiesce(now)) {
                self.errands.push_back(Op::NeedQuiesce {
                    space: id,
                    count,
                    for_calm: false,
                });
            }
        }
        mask
    }

    pub(super) fn looked_at(
        &mut self,
        id: SpaceId,
        b: &mut Batch,
        page: PageIndex,
        look: PageLook,
    ) {
        let mask = self.eligible(id, page, look);
        if mask.is_empty() {
            let shared = look.present.minus(look.zero).minus(look.exclusive);
            if !shared.is_empty() {
                self.stats.stayed_shared += 1;
            }
            return; // found again by a sweep, if it is still there
        }
        let Some(frame) = self.frames.take() else {
            if let Some(s) = self.space(id) {
                s.enqueue(page, true);
            }
            return;
        };
        b.planned_bytes += u64::from(mask.count()) * SUBPAGE_BYTES;
        b.pages.push(BatchPage::new(page, mask, Some(frame)));
    }

    pub(super) fn heads_known(&mut self, id: SpaceId, b: &mut Batch, heads: &Heads) {
        for at in heads.at.iter().take(heads.len) {
            let near = AddrRange::new(
                at.0.saturating_sub(CONTROL_BLOCK_BYTES) / PAGE_BYTES * PAGE_BYTES,
                (at.0 + CONTROL_BLOCK_BYTES).next_multiple_of(PAGE_BYTES),
            );
            self.never(id, near);
        }
        if heads.more {
            return;
        }
        b.list_after_all = false;
        // Before other spaces' turns: the list grows old.
        self.turn = usize::from(id.0);
        if let Some(s) = self.space_ref(id) {
            let mut too_late = false;
            for (i, p) in b.pages.iter_mut().enumerate() {
                if s.never.overlapping(p.page.range()).is_some() {
                    let protected = i < b.at || i == b.at && b.single_steps;
                    too_late |= protected && !p.mask.is_empty();
                    p.mask = SubpageMask::NONE;
                }
            }
            if too_late {
                // Its thread may end at any moment, and would not be joined: nothing comes before the un-protect.
                b.evict_nothing();
                return;
            }
        }
        b.listed = Some(self.now);
        b.phase = Phase::Protect;
    }

    pub(super) fn swept(&mut self, id: SpaceId, range: AddrRange, outcome: Outcome) {
        let found = if let Outcome::Found(f) = outcome {
            f
        } else {
            None
        };
        let Some(s) = self.space(id) else { return };
        match found {
            Some(run) => {
                let mut next = run.end;
                for page in run.pages() {
                    if s.queued.is_full() {
                        next = page.start();
                        break;
                    }
                    s.enqueue(page, false);
                }
                // At least one page on, or a full queue would find the same page for ever.
                s.sweep = next.max(range.start.offset(SUBPAGE_BYTES));
            }
            None => s.sweep = range.end,
        }
    }
}
