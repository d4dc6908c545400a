//! Making memory resident again: for a detach, and for ranges that turn out to be never pageable.
//!
//! Where the target has a ring, `MADV_POPULATE_WRITE` does it: a missing page faults to us and is
//! served, a clean one that was offered before becomes dirty, so that the kernel can no longer drop it.
//! Only then may the map forget it. Without a ring, or where populate is refused (a read-only mapping), pages
//! are installed from here, and what is present already is made dirty by writing back a byte of it while all
//! threads of the process are stopped ([`Op::NeedRedirty`]): of all that is restored in one go at once, since a stop is
//! dear.
//!
//! Nothing is forgotten on the word of an operation alone: the process may have moved other pages to these
//! addresses meanwhile. So at last a change of protection is made there. It fails while any move or unmap
//! is under way; if it does not, all messages about such have been applied, and if none of them touched the
//! place, what was made dirty is what the map means.

use std::collections::VecDeque;

use holo_proto::{AddrRange, PageIndex, SUBPAGE_BYTES, SpaceId, SubpageIndex, SubpageMask};

use super::fault::Fault;
use super::space::{Life, Ring};
use super::{Advice, Core, CrashPoint, NEVER_RAN, NOT_WRITABLE, Nanos, Op, Outcome, StopReason};
use crate::store::api::{PageStore, Ticket};

/// Marks a ring request as the restorer's; the rest of the tag is the page.
pub(super) const TAG: u64 = 1 << 63;
/// Requests at once.
const WINDOW: usize = 8;
/// A page that cannot be made dirty is tried again so often, after a rest that doubles each time.
const REFUSALS: u32 = 7;
const REST_NS: u64 = 1_000_000;
/// Pages with holes that are remembered: more than are asked for at once.
const HOLED: usize = 2 * WINDOW;

/// Subpages of one page that a populate is about.
#[derive(Clone, Copy, Debug)]
struct Flight {
    range: AddrRange,
    /// The request ended well; the proof is still to be made.
    ended: bool,
    /// The process moved or unmapped something here meanwhile.
    disturbed: bool,
}

impl Flight {
    fn page(self) -> PageIndex {
        self.range.start.page()
    }
}

/// Where the restoring of one page without the ring is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    /// What is missing is to be installed.
    Install,
    Installing,
    /// What is present is to be made writable, dirty, found present still, and proved.
    Open,
    Redirty,
    Redirtying(Ticket),
    Look,
    Prove,
}

#[derive(Clone, Copy, Debug)]
struct Direct {
    range: AddrRange,
    stage: Stage,
    at: SubpageIndex,
    disturbed: bool,
    /// What has been made dirty while nothing was moved or unmapped in the range.
    dirtied: SubpageMask,
    /// It could not be made dirty, and how often in a row that was so of a page that is there.
    refused: bool,
    refusals: u32,
    /// Populate found the mapping gone, or changed: if there is one now, populate tries again.
    only_if_unmapped: bool,
}

/// What a step in progress was, for its completion.
#[derive(Clone, Copy, Debug, Default)]
enum Step {
    #[default]
    None,
    Ask(Flight),
    Prove(PageIndex),
    Direct,
    Unregister(AddrRange),
}

/// What the restorer of one space is at.
#[derive(Debug, Default)]
pub(crate) struct Restore {
    queue: VecDeque<AddrRange>,
    cursor: Option<SubpageIndex>,
    flights: Vec<Flight>,
    /// Requests on the ring that it was not kicked for.
    unkicked: bool,
    /// The ring had no room: nothing more before a request ends.
    full: bool,
    direct: Option<Direct>,
    /// Pages that no request can be about as a whole: asked for subpage by subpage.
    holed: VecDeque<PageIndex>,
    step: Step,
    /// When it last began something or heard of its end.
    pub(crate) went_on: Nanos,
}

impl Restore {
    /// Nothing is to be restored.
    pub(crate) fn is_idle(&self) -> bool {
        self.queue.is_empty() && self.flights.is_empty() && self.direct.is_none()
    }

    /// Whether `page` is in a range that is being restored.
    pub(crate) fn covers(&self, page: PageIndex) -> bool {
        let flights = self.flights.iter().map(|f| &f.range);
        let mut all = self.queue.iter().chain(flights);
        all.any(|r| r.overlaps(page.range()))
    }

    pub(crate) fn push(&mut self, range: AddrRange, now: Nanos) {
        self.went_on = now;
        self.queue.push_back(range);
    }

    /// The process moved or unmapped something in `range`.
    pub(crate) fn disturb(&mut self, range: AddrRange) {
        for f in self.flights.iter_mut().filter(|f| f.range.overlaps(range)) {
            f.disturbed = true;
        }
        if let Some(d) = self.direct.as_mut().filter(|d| d.range.overlaps(range)) {
            d.disturbed = true;
            d.dirtied = SubpageMask::NONE;
        }
    }

    /// What is being restored without the ring.
    pub(crate) fn direct_range(&self) -> Option<AddrRange> {
        self.direct.as_ref().map(|d| d.range)
    }

    /// It goes on when the process can be stopped.
    pub(crate) fn awaits_stop(&self) -> bool {
        matches!(&self.direct, Some(d) if matches!(d.stage, Stage::Redirty | Stage::Redirtying(_)))
    }

    /// A request is on the ring.
    fn in_flight(&self) -> bool {
        self.flights.iter().any(|f| !f.ended)
    }

    /// The ring is gone: the next request goes to another one.
    pub(crate) fn ring_lost(&mut self) {
        self.unkicked = false;
        self.full = false;
    }

    fn go_direct(&mut self, range: AddrRange) {
        self.direct.get_or_insert(Direct {
            range,
            stage: Stage::Install,
            at: range.start.subpage(),
            disturbed: false,
            dirtied: SubpageMask::NONE,
            refused: false,
            refusals: 0,
            only_if_unmapped: false,
        });
    }

    /// A request found holes in `range`, or parts that may not be written: one subpage at a time, and if it was
    /// one, is anything there at all?
    fn apart(&mut self, range: AddrRange) {
        if range.len() > SUBPAGE_BYTES {
            if self.holed.len() == HOLED {
                self.holed.pop_front();
            }
            self.holed.push_back(range.start.page());
            self.cursor = None;
            return;
        }
        self.direct.get_or_insert(Direct {
            range,
            stage: Stage::Open,
            at: range.start.subpage(),
            disturbed: false,
            dirtied: SubpageMask::NONE,
            refused: false,
            refusals: 0,
            only_if_unmapped: true,
        });
    }
}

fn one(at: SubpageIndex) -> AddrRange {
    AddrRange {
        start: at.start(),
        end: at.start().offset(SUBPAGE_BYTES),
    }
}

impl<S: PageStore> Core<'_, S> {
    pub(super) fn never(&mut self, id: SpaceId, range: AddrRange) {
        let now = self.now;
        if let Some(s) = self.space(id) {
            if s.never
                .around(range.start)
                .is_some_and(|r| r.end >= range.end)
            {
                return;
            }
            s.never.add(range);
            s.restore.push(range, now);
        }
    }

    pub(super) fn begin_detach(&mut self, id: SpaceId) {
        let now = self.now;
        if let Some(s) = self.space(id) {
            if s.life == Life::Over {
                return;
            }
            s.life = Life::Detaching;
            s.adopt.clear();
            s.restore.push(AddrRange::new(0, super::USER_END.0), now);
        }
    }

    /// The next step of making memory resident; at the end of a detach, of letting go.
    pub(super) fn step_restore(&mut self, id: SpaceId) -> Option<Op> {
        let s = self.space(id)?;
        if s.batch.is_some() || !s.known {
            return None;
        }
        if s.restore.is_idle() {
            // First what was hit here by a relative's request, or may have been: that is the batch's.
            if s.life == Life::Detaching {
                self.hear_of_hits(id);
            }
            let hit = !self.space_ref(id)?.hits.is_empty();
            self.again |= hit;
            return if hit { None } else { self.step_let_go(id) };
        }
        if let Some(f) = s.restore.flights.iter().find(|f| f.ended).copied() {
            s.restore.step = Step::Prove(f.page());
            return Some(Op::Unprotect {
                space: id,
                range: f.range,
            });
        }
        if let Some(d) = s.restore.direct {
            return self.step_direct(id, d);
        }
        let range = match s.restore.queue.front() {
            Some(r) if s.restore.flights.len() < WINDOW && !s.restore.full => *r,
            _ => return self.kick_restore(id),
        };
        let Some(wanted) = self.next_to_restore(id, range) else {
            if self.space_ref(id)?.restore.in_flight() {
                return self.kick_restore(id);
            }
            let s = self.space(id)?;
            if s.restore.cursor.take().is_none() {
                // From the start of the range on, and nothing is left: a move brought nothing back.
                s.restore.queue.pop_front();
                s.restore.holed.clear();
            }
            return self.step_restore(id);
        };
        let (now, childhood) = (self.now, self.childhood);
        let s = self.space(id)?;
        match s.ring {
            Ring::Absent if s.does_without_ring(&childhood, now) => {
                s.restore.go_direct(wanted);
                self.step_restore(id)
            }
            Ring::Absent => {
                s.ring = Ring::Asked(now);
                Some(Op::NeedRing { space: id })
            }
            Ring::Asked(_) | Ring::Inherited => None,
            Ring::Refused => {
                s.restore.go_direct(wanted);
                self.step_restore(id)
            }
            Ring::Ready => {
                let flight = Flight {
                    range: wanted,
                    ended: false,
                    disturbed: false,
                };
                s.restore.step = Step::Ask(flight);
                s.restore.cursor = Some(SubpageIndex(flight.page().subpage(15).0 + 1));
                Some(Op::Advise {
                    space: id,
                    advice: Advice::Populate,
                    range: wanted,
                    tag: TAG | flight.page().0,
                })
            }
        }
    }

    /// The next subpages, of one page, that have bytes in the map and no request yet.
    fn next_to_restore(&self, id: SpaceId, range: AddrRange) -> Option<AddrRange> {
        let restore = &self.space_ref(id)?.restore;
        let end = range.end_subpage();
        let mut at = restore.cursor.unwrap_or(range.start.subpage());
        loop {
            let (found, entry) = self.map.next_in(id, at, end)?;
            let page = found.page();
            if restore.flights.iter().any(|f| f.page() == page) {
                at = SubpageIndex(page.subpage(15).0 + 1);
            } else if !entry.has_bytes() {
                at = SubpageIndex(found.0 + 1);
            } else if restore.holed.contains(&page) {
                return Some(one(found));
            } else {
                let last = (0..16)
                    .map(|i| page.subpage(i))
                    .rfind(|&x| x >= found && x < end && self.map.entry(id, x).has_bytes())?;
                return Some(AddrRange {
                    start: found.start(),
                    end: last.start().offset(SUBPAGE_BYTES),
                });
            }
        }
    }

    fn kick_restore(&mut self, id: SpaceId) -> Option<Op> {
        let s = self.space(id)?;
        std::mem::take(&mut s.restore.unkicked).then_some(Op::Kick { space: id })
    }

    /// Forgets what the map says of a range that is resident and dirty.
    fn forget_restored(&mut self, id: SpaceId, range: AddrRange) {
        self.forget_bytes(id, range);
        self.crash(CrashPoint::Restored);
    }

    // --- without the ring -----------------------------------------------------------------------

    fn step_direct(&mut self, id: SpaceId, d: Direct) -> Option<Op> {
        let left = d
            .range
            .subpages()
            .find(|&x| self.map.entry(id, x).has_bytes());
        let Some(at) = left else {
            self.space(id)?.restore.direct = None;
            return self.step_restore(id);
        };
        let one = one(at);
        let op = match d.stage {
            Stage::Install => {
                if self.install.is_some() {
                    return None;
                }
                let now = self.now;
                self.ready.push_back(Fault {
                    space: id,
                    at,
                    write: false,
                    protect: false,
                    since: now,
                    own: true,
                    alone: false,
                });
                self.direct_goes_on(id, Stage::Installing, at);
                return None;
            }
            Stage::Installing => {
                let ours = |f: &Fault| f.own && f.space == id;
                if self.install.as_ref().is_some_and(|i| ours(&i.fault))
                    || self.held.iter().any(ours)
                    || self.ready.iter().any(ours)
                {
                    return None;
                }
                self.direct_goes_on(id, Stage::Open, at);
                Op::Unprotect {
                    space: id,
                    range: one,
                }
            }
            // Another subpage's turn came between two steps of one: from its start.
            _ if d.at != at || d.stage == Stage::Open => {
                self.direct_goes_on(id, Stage::Open, at);
                Op::Unprotect {
                    space: id,
                    range: one,
                }
            }
            Stage::Redirty => {
                if self.space_ref(id)?.redirty_rests(self.now) {
                    return None;
                }
                let mask = d
                    .range
                    .subpages()
                    .filter(|&x| self.map.entry(id, x).has_bytes())
                    .fold(SubpageMask::NONE, |m, x| m.with(x.in_page()));
                let ticket = self.new_ticket();
                self.direct_goes_on(id, Stage::Redirtying(ticket), at);
                Op::NeedRedirty {
                    space: id,
                    page: at.page(),
                    mask,
                    ticket,
                }
            }
            Stage::Redirtying(_) => return None,
            Stage::Look => Op::Look {
                space: id,
                page: at.page(),
            },
            Stage::Open | Stage::Prove => Op::Unprotect {
                space: id,
                range: one,
            },
        };
        self.space(id)?.restore.step = Step::Direct;
        Some(op)
    }

    fn direct_goes_on(&mut self, id: SpaceId, stage: Stage, at: SubpageIndex) {
        if let Some(d) = self.space(id).and_then(|s| s.restore.direct.as_mut()) {
            d.disturbed &= stage != Stage::Open;
            d.refused &= stage != Stage::Open;
            if d.at != at {
                d.refusals = 0;
            }
            d.stage = stage;
            d.at = at;
        }
    }

    fn direct_done(&mut self, id: SpaceId, outcome: Outcome) {
        let Some(d) = self.space(id).and_then(|s| s.restore.direct.as_mut()) else {
            return;
        };
        if d.stage == Stage::Look {
            // In swap, perhaps: it is to be brought in.
            let there = matches!(outcome, Outcome::Look(l) if l.present.has(d.at.in_page()));
            if !there {
                d.dirtied = d.dirtied.without(d.at.in_page());
            }
        }
        let (d, one) = (*d, one(d.at));
        let next = match (d.stage, outcome) {
            // No mapping of ours is there: the map means nothing by it.
            (Stage::Open | Stage::Prove, Outcome::Edge) if !d.disturbed => {
                self.forget_restored(id, one);
                Stage::Open
            }
            (Stage::Open, _) if d.only_if_unmapped => {
                if let Some(s) = self.space(id) {
                    s.restore.direct = None;
                    s.restore.cursor = None;
                }
                return;
            }
            (Stage::Open, _) if d.dirtied.has(d.at.in_page()) => Stage::Look,
            (Stage::Open, _) => Stage::Redirty,
            (asked @ Stage::Redirtying(_), Outcome::Done) => asked,
            (Stage::Redirtying(_), _) => {
                let now = self.now;
                if let Some(s) = self.space(id) {
                    s.redirtied(false, now);
                }
                Stage::Redirty
            }
            (Stage::Look, Outcome::Look(look)) if look.present.has(d.at.in_page()) => Stage::Prove,
            (Stage::Prove, Outcome::Done) if !d.disturbed && d.refused => {
                if d.refusals == REFUSALS {
                    return self.stop(id, StopReason::NotDirtied { at: d.at });
                }
                // Perhaps for want of memory, or of a moment.
                let rest = self.now.after(REST_NS << d.refusals);
                if let Some(s) = self.space(id) {
                    s.retry_at = Some(rest);
                    if let Some(d) = s.restore.direct.as_mut() {
                        d.refusals += 1;
                    }
                }
                Stage::Open
            }
            (Stage::Prove, Outcome::Done) if !d.disturbed => {
                self.forget_restored(id, one);
                Stage::Open
            }
            _ => Stage::Install,
        };
        self.direct_goes_on(id, next, d.at);
    }

    /// What was asked for was made dirty, or could not be (then the page was not there, or is not to be written: the
    /// next look tells); `None`: the process was not stopped.
    pub(super) fn restore_redirtied(
        &mut self,
        id: SpaceId,
        ticket: Ticket,
        done: Option<SubpageMask>,
    ) {
        let Some(d) = self.space(id).and_then(|s| s.restore.direct.as_mut()) else {
            return;
        };
        if d.stage != Stage::Redirtying(ticket) {
            return;
        }
        let Some(done) = done else {
            d.stage = Stage::Redirty;
            return;
        };
        d.refused = !done.has(d.at.in_page());
        if !d.disturbed {
            d.dirtied = done;
        }
        d.stage = Stage::Look;
    }

    // --- completions ----------------------------------------------------------------------------

    pub(super) fn restore_step_done(&mut self, id: SpaceId, outcome: Outcome) {
        if outcome == Outcome::Gone {
            return self.gone(id);
        }
        let now = self.now;
        let Some(s) = self.space(id) else { return };
        // A process that cannot be stopped may wait for just this.
        if !s.restore.awaits_stop() {
            s.restore.went_on = now;
        }
        let step = std::mem::take(&mut s.restore.step);
        if outcome == Outcome::EventsPending {
            // Made again when all messages are applied.
            return self.events_pending(id);
        }
        if matches!(step, Step::Prove(_))
            || matches!(s.restore.direct, Some(d) if matches!(d.stage, Stage::Open | Stage::Prove))
        {
            self.progressed(id);
        }
        let Some(s) = self.space(id) else { return };
        match step {
            Step::None => {}
            Step::Ask(flight) => match outcome {
                Outcome::Done => {
                    s.restore.flights.push(flight);
                    s.restore.unkicked = true;
                }
                _ if s.restore.in_flight() => {
                    s.restore.full = true;
                    s.restore.cursor = Some(flight.range.start.subpage());
                }
                _ => s.restore.go_direct(flight.range),
            },
            Step::Prove(page) => {
                let found = s.restore.flights.iter().position(|f| f.page() == page);
                if let Some(f) = found.map(|i| s.restore.flights.swap_remove(i)) {
                    if !f.disturbed {
                        self.forget_restored(id, f.range);
                    }
                }
            }
            Step::Direct => self.direct_done(id, outcome),
            Step::Unregister(range) => {
                // Refused or at an edge: the process changed the mapping; closing the descriptor ends it.
                s.regions.remove(range);
                self.crash(CrashPoint::Unregistered);
            }
        }
    }

    /// A populate request ended.
    pub(super) fn restored(&mut self, id: SpaceId, page: PageIndex, result: i32) {
        let now = self.now;
        let Some(s) = self.space(id) else { return };
        s.restore.went_on = now;
        s.restore.full = false;
        let Some(i) = s.restore.flights.iter().position(|f| f.page() == page) else {
            return;
        };
        if result == NEVER_RAN {
            // Found again from the start of the range, when there is another ring.
            s.restore.flights.swap_remove(i);
            s.restore.cursor = None;
        } else if result < 0 {
            let f = s.restore.flights.swap_remove(i);
            // One at a time: whatever else failed is found again from the start of the range.
            if f.range.len() == SUBPAGE_BYTES && NOT_WRITABLE.contains(&result) {
                s.restore.go_direct(f.range);
            } else {
                s.restore.apart(f.range);
            }
        } else {
            s.restore.flights[i].ended = true;
        }
    }

    fn step_let_go(&mut self, id: SpaceId) -> Option<Op> {
        let s = self.space(id)?;
        if s.life != Life::Detaching {
            return None;
        }
        if let Some(range) = s.regions.pop() {
            s.restore.step = Step::Unregister(range);
            return Some(Op::Unregister { space: id, range });
        }
        self.end_space(id, true);
        None
    }
}

#[cfg(test)]
mod tests {
    use super::super::scripted::{Hollow, core_of, play};
    use super::super::{Entry, Input, Next, PageLook};
    use super::*;
    use crate::store::api::Location;

    const EINVAL: i32 = -22;
    const PAGE: PageIndex = PageIndex(0x700);

    /// One subpage whose content is stored and that is present, clean: never to be paged again.
    fn stayed() -> (Core<'static, Hollow>, SpaceId, SubpageIndex) {
        let (mut core, space) = core_of(PAGE.range());
        let at = PAGE.subpage(3);
        core.map
            .replace(space, at, Entry::Stored(Location(8)))
            .unwrap();
        let range = one(at);
        core.handle(Nanos(0), Input::Never { space, range });
        (core, space, at)
    }

    fn present(op: &Op) -> Option<Outcome> {
        let look = PageLook {
            present: SubpageMask::ALL,
            ..PageLook::default()
        };
        match op {
            Op::Look { .. } => Some(Outcome::Look(look)),
            Op::Copy { .. } => Some(Outcome::AlreadyThere),
            _ => None,
        }
    }

    fn redirties(asked: &[Op]) -> Vec<SubpageMask> {
        let mask = |op: &Op| match *op {
            Op::NeedRedirty { mask, .. } => Some(mask),
            _ => None,
        };
        asked.iter().filter_map(mask).collect()
    }

    fn populates(asked: &[Op]) -> usize {
        let populates = |op: &&Op| matches!(op, Op::Advise { .. });
        asked.iter().filter(populates).count()
    }

    #[test]
    fn what_populate_refuses_is_made_dirty_in_a_stop() {
        let (mut core, space, at) = stayed();
        let asked = play(&mut core, |_| EINVAL, present);
        assert_eq!(populates(&asked), 1);
        assert_eq!(redirties(&asked), [SubpageMask::NONE.with(at.in_page())]);
        assert_eq!(core.map.entry(space, at), Entry::Nothing);
        assert_eq!(core.store.released, [Location(8)]);
    }

    /// Two subpages of one page, of a process without a ring.
    fn two_stayed() -> (Core<'static, Hollow>, SpaceId) {
        let (mut core, space) = core_of(PAGE.range());
        core.handle(Nanos(0), Input::RingRefused(space));
        for i in [3, 5] {
            let stored = Entry::Stored(Location(8 + i as u64));
            core.map.replace(space, PAGE.subpage(i), stored).unwrap();
        }
        let range = PAGE.range();
        core.handle(Nanos(0), Input::Never { space, range });
        (core, space)
    }

    #[test]
    fn one_stop_is_for_all_of_a_page() {
        let (mut core, space) = two_stayed();
        let asked = play(&mut core, |_| EINVAL, present);
        let both = SubpageMask::NONE.with(3).with(5);
        assert_eq!(redirties(&asked), [both]);
        assert!(core.space(space).unwrap().restore.is_idle());
        assert_eq!(core.store.released, [Location(11), Location(13)]);
    }

    #[test]
    fn a_young_child_is_restored_without_a_ring() {
        for (young_ns, rings) in [(1 << 40, 0), (0, 1)] {
            let (mut core, space) = two_stayed();
            core.childhood.young_ns = young_ns;
            let s = core.space(space).unwrap();
            s.ring = Ring::Absent;
            s.born = Some(Nanos(0));
            let asked = play(&mut core, |_| 0, present);
            let rings_asked = asked.iter().filter(|op| matches!(op, Op::NeedRing { .. }));
            assert_eq!(rings_asked.count(), rings);
            assert_eq!(redirties(&asked).len(), 1 - rings);
        }
    }

    #[test]
    fn what_one_stop_has_left_out_has_its_own() {
        let (mut core, space) = two_stayed();
        let (three, five) = (SubpageMask::NONE.with(3), SubpageMask::NONE.with(5));
        let asked = play(
            &mut core,
            |_| EINVAL,
            |op| match op {
                Op::NeedRedirty { mask, .. } if mask.has(3) => Some(Outcome::Mask(three)),
                _ => present(op),
            },
        );
        assert_eq!(redirties(&asked), [three.or(five), five]);
        assert!(core.space(space).unwrap().restore.is_idle());
    }

    #[test]
    fn what_was_swapped_out_after_the_stop_is_brought_in_by_another_one() {
        let (mut core, space) = two_stayed();
        let mut in_swap = SubpageMask::NONE;
        let mut stops = 0;
        play(
            &mut core,
            |_| EINVAL,
            |op| match op {
                Op::NeedRedirty { mask, .. } => {
                    stops += 1;
                    in_swap = if stops == 1 {
                        SubpageMask::NONE.with(5)
                    } else {
                        in_swap.minus(*mask)
                    };
                    None
                }
                Op::Look { .. } => Some(Outcome::Look(PageLook {
                    present: SubpageMask::ALL.minus(in_swap),
                    swapped: in_swap,
                    ..PageLook::default()
                })),
                _ => present(op),
            },
        );
        assert_eq!(stops, 2);
        assert!(core.space(space).unwrap().restore.is_idle());
    }

    #[test]
    fn a_process_that_cannot_be_stopped_is_waited_for() {
        let (mut core, space, at) = stayed();
        let mut failures = 20;
        let asked = play(
            &mut core,
            |_| EINVAL,
            |op| match op {
                Op::NeedRedirty { .. } if failures > 0 => {
                    failures -= 1;
                    Some(Outcome::Full)
                }
                _ => present(op),
            },
        );
        assert_eq!(redirties(&asked).len(), 21);
        assert_eq!(core.map.entry(space, at), Entry::Nothing);
        let stop = |op: &Op| matches!(op, Op::Stop { .. });
        assert!(!asked.iter().any(stop));
    }

    #[test]
    fn a_move_makes_what_was_dirtied_doubtful() {
        let (mut core, space) = two_stayed();
        let restore = &mut core.space(space).unwrap().restore;
        restore.go_direct(PAGE.range());
        // As if all were installed.
        restore.direct.as_mut().unwrap().stage = Stage::Open;
        let now = Nanos(1);
        let (ticket, mask) = loop {
            match core.next(now) {
                Next::Op(Op::NeedRedirty { ticket, mask, .. }) => break (ticket, mask),
                Next::Op(op) => {
                    let outcome = present(&op).unwrap_or(Outcome::Done);
                    core.complete(now, outcome);
                }
                Next::Idle(_) => panic!("nothing is asked for"),
            }
        };
        core.complete(now, Outcome::Done);
        let done = Some(mask);
        let input = Input::Redirtied {
            space,
            ticket,
            done,
        };
        core.handle(now, input);
        core.space(space).unwrap().restore.disturb(PAGE.range());
        let again = play(&mut core, |_| EINVAL, present);
        assert_eq!(redirties(&again), [mask]);
    }

    #[test]
    fn what_cannot_be_made_dirty_at_all_stops_the_process() {
        let (mut core, space, at) = stayed();
        let asked = play(
            &mut core,
            |_| EINVAL,
            |op| match op {
                Op::NeedRedirty { .. } => Some(Outcome::Mask(SubpageMask::NONE)),
                _ => present(op),
            },
        );
        assert_eq!(redirties(&asked).len(), 1 + REFUSALS as usize);
        let why = StopReason::NotDirtied { at };
        assert_eq!(asked.last(), Some(&Op::Stop { space, why }));
        assert!(core.store.released.is_empty());
    }
}
