//! What the core believes of one address space, apart from the map.

use std::collections::VecDeque;

use holo_proto::{Addr, AddrRange, PageIndex, SpaceId, SubpageIndex};

use super::Childhood;
use super::batch::Batch;
use super::op::Nanos;
use super::policy::{PageSet, Policy};
use super::ranges::Ranges;
use super::restore::Restore;
use super::unsettled::{Drops, Unsettled};

/// Where a space is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Life {
    /// Faults are served, pages evicted.
    Serving,
    /// Everything is made resident, then let go.
    Detaching,
    /// The process is being stopped, or is gone.
    Over,
}

/// Whether a space can be evicted from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ring {
    /// Not asked for yet.
    Absent,
    /// A predecessor's, if there is one: not ours before it is quiet.
    Inherited,
    /// Asked for, at this moment.
    Asked(Nanos),
    /// There.
    Ready,
    /// Cannot be had.
    Refused,
}

/// A subpage whose entry a fork's child has only if something is registered at the witness, or if nothing is.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Suspect {
    pub(crate) at: SubpageIndex,
    pub(crate) witness: SubpageIndex,
    pub(crate) if_there: bool,
}

/// What tells a fork's child from its parent while the parent is unsettled.
#[derive(Default)]
pub(crate) struct Youth {
    /// What it moved or unmapped itself.
    pub(crate) own: Ranges,
    /// What the parent had, as far as was known when the fork's message was read.
    pub(crate) inherited: Ranges,
}

/// How far it is proved that there are mappings for what the map says (`Core::step_prove`).
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Unproved {
    /// The next subpage.
    pub(crate) at: SubpageIndex,
    /// Up to here one by one.
    pub(crate) singly_to: SubpageIndex,
}

/// After a quiesce that did not come about, so long until the next one; it doubles so often.
const QUIESCE_REST_NS: u64 = 10_000_000;
const QUIESCE_RESTS: u32 = 7;
/// After the end of another process a search for resident pages that rests after fruitless batches comes so soon.
const SWEEP_REST_NS: u64 = 2_000_000;
/// Least time between two such ends of which it is hoped that something can be freed again: several batches need less.
const HOPE_NS: u64 = 20_000_000;

/// Where that part of `page` is now which was in `from` and has moved to `to`.
pub(crate) fn moved_pages(
    page: PageIndex,
    from: AddrRange,
    to: Addr,
) -> impl Iterator<Item = PageIndex> {
    let part = Some(page.range().intersect(from)).filter(|r| !r.is_empty());
    part.into_iter().flat_map(move |r| {
        let start = to.offset(r.start.0 - from.start.0);
        let end = start.offset(r.len());
        AddrRange { start, end }.pages()
    })
}

/// One address space.
pub(crate) struct Space {
    pub(crate) id: SpaceId,
    pub(crate) life: Life,
    /// A fork's child of which it is not known yet what the fork wiped gets no stored bytes.
    pub(crate) known: bool,
    /// While it is not known: what it moved since the fork, from where and to where; before that, what parents
    /// had moved that were not known either.
    pub(crate) moves: Vec<(AddrRange, Addr)>,
    /// Whose moves these are, from which one on: the oldest parent that was not known first, itself last.
    pub(crate) lineage: Vec<(SpaceId, usize)>,
    /// The parent, while that is not known: what its fork wiped is not this child's either.
    pub(crate) waits_for: Option<SpaceId>,
    /// The shell has said all that it knows.
    pub(crate) told: bool,
    /// It has seen nothing registered. Whether anything should be is known when all messages are read.
    pub(crate) unregistered: bool,
    /// Before that: the thread that was last heard of to wait for a page.
    pub(crate) waiting: Option<u32>,
    /// What it has seen wiped: no sooner believed than all is heard of that was moved before it looked.
    pub(crate) wiped: Vec<AddrRange>,
    /// Mappings that the same look saw.
    pub(crate) seen: Ranges,
    pub(crate) unsettled: Unsettled,
    /// Of a fork's child whose parent is unsettled.
    pub(crate) youth: Option<Youth>,
    /// Of a fork's child: subpages of which it is to be found out whether the child has them at all, with
    /// the place that tells.
    pub(crate) suspects: Vec<Suspect>,
    /// Of the entries of a predecessor, or of a parent, those of which it is not known that something is registered
    /// there.
    pub(crate) unproved: Option<Unproved>,
    pub(crate) regions: Ranges,
    /// Of the regions, those that we were told of, perhaps after the message that they are gone.
    pub(crate) hearsay: Ranges,
    pub(crate) never: Ranges,
    /// Some of `never` is not any more: should threads come to the same places again, they are to be told.
    pub(crate) heads_forgotten: bool,
    /// Mappings to register, in order.
    pub(crate) adopt: VecDeque<AddrRange>,
    /// When no change of mappings was under way, and how often there was one since the last registration.
    pub(crate) calm: Option<Nanos>,
    pub(crate) calm_tries: u32,
    /// Events wait, or may wait: read before deciding anything.
    pub(crate) drain: bool,
    /// An ioctl said that events are pending, but none could be read: its waiter has not run on.
    pub(crate) retry_at: Option<Nanos>,
    pub(crate) said_pending: bool,
    /// It is waited until no change of mappings is under way: ended by any message that is read.
    pub(crate) awaits_calm: bool,
    /// Since when each operation that fails meanwhile has met a change of mappings.
    pub(crate) restless_since: Option<Nanos>,
    pub(crate) backoff_ns: u64,
    pub(crate) ring: Ring,
    /// Requests that were ever put into the ring.
    pub(crate) requests: u32,
    pub(crate) batch: Option<Batch>,
    /// Pages that it shares, or did, with a relative in which a request may have hit them: to be made dirty here as well.
    pub(crate) hits: Vec<PageIndex>,
    pub(crate) restore: Restore,
    pub(crate) policy: Policy,
    pub(crate) queued: PageSet,
    /// Where the search for resident pages that nobody told us of goes on.
    pub(crate) sweep: Addr,
    /// The sweep found nothing; not again before this moment.
    pub(crate) sweep_after: Nanos,
    pub(crate) usage_bytes: u64,
    /// When it was forked, if it was.
    pub(crate) born: Option<Nanos>,
    /// Where a sequential first touch would come next.
    pub(crate) zero_next: SubpageIndex,
    pub(crate) quiesce_count: u64,
    /// The quiesce that was asked for and has not been yet.
    pub(crate) quiesce_asked: Option<u64>,
    /// How many in a row did not come about, and the moment before which none is asked for.
    pub(crate) quiesces_failed: u32,
    pub(crate) quiesce_after: Nanos,
    /// Requests in a row that pages be made dirty ([`Op::NeedRedirty`](super::Op::NeedRedirty)) for which the process
    /// could not be stopped, and when the next one may come.
    pub(crate) redirties_failed: u32,
    pub(crate) redirty_after: Nanos,
    /// The newest number that a predecessor's marks have: the first quiesce is after all of them.
    pub(crate) quiesce_inherited: u64,
    pub(crate) drops: Drops,
    /// Some faults were dropped for want of room: wake everything when there is room.
    pub(crate) overflowed: bool,
    /// Batches in a row that freed nothing.
    pub(crate) fruitless: u32,
    /// No batch before this moment.
    pub(crate) rest_until: Nanos,
    /// The end of a process is no reason for hope before this moment.
    pub(crate) hopeful_after: Nanos,
}

impl Space {
    pub(crate) fn new(id: SpaceId, known: bool, pages: usize) -> Self {
        Self {
            id,
            life: Life::Serving,
            known,
            moves: Vec::new(),
            lineage: vec![(id, 0)],
            waits_for: None,
            told: false,
            unregistered: false,
            waiting: None,
            wiped: Vec::new(),
            seen: Ranges::new(),
            unsettled: Unsettled::default(),
            youth: None,
            suspects: Vec::new(),
            unproved: None,
            regions: Ranges::new(),
            hearsay: Ranges::new(),
            never: Ranges::new(),
            heads_forgotten: false,
            adopt: VecDeque::with_capacity(4096),
            calm: None,
            calm_tries: 0,
            drain: true,
            retry_at: None,
            said_pending: false,
            awaits_calm: false,
            restless_since: None,
            backoff_ns: 0,
            ring: Ring::Absent,
            requests: 0,
            batch: None,
            hits: Vec::new(),
            restore: Restore::default(),
            policy: Policy::new(pages, pages),
            queued: PageSet::new(pages),
            sweep: Addr(0),
            sweep_after: Nanos(0),
            usage_bytes: 0,
            born: None,
            zero_next: SubpageIndex(0),
            quiesce_count: 0,
            quiesce_asked: None,
            quiesces_failed: 0,
            quiesce_after: Nanos(0),
            redirties_failed: 0,
            redirty_after: Nanos(0),
            quiesce_inherited: 0,
            drops: Drops::default(),
            overflowed: false,
            fruitless: 0,
            rest_until: Nanos(0),
            hopeful_after: Nanos(0),
        }
    }

    /// What is in `range` now may be paged, whatever was there.
    pub(crate) fn forget_never(&mut self, range: AddrRange) {
        self.heads_forgotten |= self.never.overlapping(range).is_some();
        self.never.remove(range);
    }

    /// Something stands in `range` that is perhaps not registered.
    pub(crate) fn adopt_later(&mut self, range: AddrRange) {
        let has_room = self.adopt.len() < self.adopt.capacity();
        if self.life == Life::Serving && has_room && !self.adopt.contains(&range) {
            self.adopt.push_back(range);
        }
    }

    /// Nothing is registered, as the shell says, of what has not moved since; and what is doubtful is found out.
    pub(crate) fn is_unregistered(&self) -> bool {
        self.unregistered && self.regions.is_empty() && self.suspects.is_empty()
    }

    /// A message is about `range`, where something was registered that is not believed yet: which came first is
    /// not known, so it is registered again. What lies beside `range` by itself, for the kernel refuses what has a
    /// hole, and nobody would offer again what is registered.
    pub(crate) fn adopt_again(&mut self, range: AddrRange) {
        let doubtful = |r: &mut AddrRange| r.overlaps(range);
        let Unsettled { adopted, torn, .. } = &mut self.unsettled;
        let again = adopted
            .extract_if(.., doubtful)
            .chain(torn.extract_if(.., doubtful));
        for r in again {
            let ends = [(r.start, range.start), (range.end, r.end)];
            let beside = ends.map(|(start, end)| AddrRange { start, end });
            for part in [r.intersect(range)].into_iter().chain(beside) {
                if !part.is_empty() {
                    self.adopt.push_front(part);
                }
            }
        }
    }

    /// Nothing can be decided for this space now.
    pub(crate) fn blocked(&self, now: Nanos) -> bool {
        self.drain || self.retry_at.is_some_and(|t| t > now)
    }

    /// Nothing is evicted from a fork's child that is young and small, or new: most of them exec, or end, and some begin
    /// with what a process cannot do that has a ring (`unshare(CLONE_NEWUSER)`). A new one has what its parent has written
    /// to since, be it much or little.
    pub(crate) fn is_spared(&self, rules: &Childhood, now: Nanos) -> bool {
        self.is_younger(rules.new_ns, now)
            || self.usage_bytes < rules.small_bytes && self.is_younger(rules.young_ns, now)
    }

    /// What has to be done in it is done without a ring if it has none, for the same reason.
    pub(crate) fn does_without_ring(&self, rules: &Childhood, now: Nanos) -> bool {
        self.ring == Ring::Absent && self.is_younger(rules.young_ns, now)
    }

    fn is_younger(&self, ns: u64, now: Nanos) -> bool {
        self.born.is_some_and(|b| now < b.after(ns))
    }

    /// The quiesce after which a drop that was heard of just now has happened. One that was asked for
    /// before may end before that.
    pub(crate) fn next_quiesce(&self) -> u64 {
        self.quiesce_asked.unwrap_or(self.quiesce_count)
    }

    /// The number of a quiesce to ask for, unless one is under way or the last one has just failed.
    pub(crate) fn ask_quiesce(&mut self, now: Nanos) -> Option<u64> {
        if self.quiesce_asked.is_some() || now < self.quiesce_after {
            return None;
        }
        self.quiesce_asked = Some(self.quiesce_count.max(self.quiesce_inherited) + 1);
        self.quiesce_asked
    }

    /// A quiesce has been, or (a count of zero) has not come about: it stops all threads, so the next try has time.
    pub(crate) fn quiesced(&mut self, count: u64, now: Nanos) {
        self.quiesce_asked = None;
        if count == 0 {
            self.quiesce_after = now.after(QUIESCE_REST_NS << self.quiesces_failed);
            self.quiesces_failed = (self.quiesces_failed + 1).min(QUIESCE_RESTS);
        } else {
            self.quiesces_failed = 0;
            self.quiesce_after = now;
            self.quiesce_count = self.quiesce_count.max(count);
        }
    }

    /// The next request that pages be made dirty is not to come yet.
    pub(crate) fn redirty_rests(&self, now: Nanos) -> bool {
        now < self.redirty_after
    }

    /// Pages were made dirty in a stop, or it was not stopped: the next try has time, as above.
    pub(crate) fn redirtied(&mut self, stopped: bool, now: Nanos) {
        if stopped {
            self.redirties_failed = 0;
            self.redirty_after = now;
        } else {
            let doubled = self.redirties_failed.min(QUIESCE_RESTS);
            self.redirty_after = now.after(QUIESCE_REST_NS << doubled);
            self.redirties_failed = self.redirties_failed.saturating_add(1);
        }
    }

    /// What was hit has moved.
    pub(crate) fn chase_hits(&mut self, from: AddrRange, to: Addr) {
        let along = |&p: &PageIndex| moved_pages(p, from, to);
        let there: Vec<_> = self.hits.iter().flat_map(along).collect();
        self.add_hits(there.into_iter());
    }

    /// A relative's requests may have hit these pages here. Whether any of them is new.
    pub(crate) fn add_hits(&mut self, pages: impl Iterator<Item = PageIndex>) -> bool {
        let before = self.hits.len();
        for page in pages {
            if !self.hits.contains(&page) {
                self.hits.push(page);
            }
        }
        self.hits.len() > before
    }

    /// Where that is now which was in `range` of this process, or of a parent before it forked, when somebody looked and
    /// saw mappings in `seen`. When that was, all moves together tell; where they do not, it was after the last move to
    /// there, but for moves of what was seen where it came from.
    pub(crate) fn since_look(&self, of: SpaceId, range: AddrRange, seen: &Ranges) -> Ranges {
        let mut now = Ranges::new();
        let Some(i) = self.lineage.iter().position(|l| l.0 == of) else {
            return now;
        };
        let first = self.lineage[i].1;
        let end = self.lineage.get(i + 1).map_or(self.moves.len(), |l| l.1);
        let arrived = |&(from, to): &(AddrRange, Addr)| {
            let end = to.offset(from.len());
            AddrRange { start: to, end }.overlaps(range) && !seen.without(from).is_empty()
        };
        let moves = &self.moves[first..end];
        let looked = moved_before(moves, seen)
            .unwrap_or_else(|| moves.iter().rposition(arrived).map_or(0, |k| k + 1));
        now.add(range);
        for &(from, to) in &self.moves[first + looked..] {
            let along: Vec<_> = now
                .iter()
                .map(|r| r.intersect(from))
                .filter(|r| !r.is_empty())
                .map(|r| {
                    let start = to.offset(r.start.0 - from.start.0);
                    let end = start.offset(r.len());
                    AddrRange { start, end }
                })
                .collect();
            now.remove(from);
            now.remove(AddrRange {
                start: to,
                end: to.offset(from.len()),
            });
            for r in along {
                now.add(r);
            }
        }
        now
    }

    /// Batches that freed nothing say nothing of the next one: it comes at once, and faults wait for it; not for one after the
    /// other, where processes end faster than batches.
    pub(crate) fn end_rest(&mut self, now: Nanos) {
        if self.fruitless == 0 {
            return;
        }
        self.rest_until = now;
        self.sweep_after = self.sweep_after.min(now.after(SWEEP_REST_NS));
        if now >= self.hopeful_after {
            self.fruitless = 0;
            self.hopeful_after = now.after(HOPE_NS);
        }
    }

    /// Queues a resident page for replacement, unless it is queued or there is no room.
    pub(crate) fn enqueue(&mut self, page: PageIndex, kept: bool) {
        if self.queued.insert(page) {
            if kept {
                self.policy.insert_kept(page);
            } else {
                self.policy.insert(page);
            }
        }
    }
}

/// How many of `moves` were before somebody looked and saw mappings in `seen`: all that had moved was there then, and all that
/// was to move, each where it was at that time. The fewest that can be, `None` if no number can.
fn moved_before(moves: &[(AddrRange, Addr)], seen: &Ranges) -> Option<usize> {
    const MOST: usize = 64;
    if moves.len() > MOST {
        return None;
    }
    let is_in = |there: &Ranges, r: AddrRange| there.without(r).is_empty();
    let moves_on = |there: &mut Ranges, &(from, to): &(AddrRange, Addr)| {
        let end = to.offset(from.len());
        there.remove(from);
        there.add(AddrRange { start: to, end });
    };
    (0..=moves.len()).find(|&count| {
        let (before, after) = moves.split_at(count);
        let mut moved = Ranges::new();
        for step in before {
            moves_on(&mut moved, step);
        }
        let mut there = seen.clone();
        moved.iter().all(|r| is_in(seen, r))
            && after.iter().all(|step| {
                let was_there = is_in(&there, step.0);
                moves_on(&mut there, step);
                was_there
            })
    })
}

#[cfg(test)]
mod tests {
    use super::super::scripted::core_of;
    use super::*;

    #[test]
    fn what_is_registered_and_taken_apart_is_registered_again_piece_by_piece() {
        let mut s = Space::new(SpaceId(0), true, 16);
        s.unsettled.adopted.push(AddrRange::new(10, 40));
        s.unsettled.torn.push(AddrRange::new(50, 60));
        s.unsettled.torn.push(AddrRange::new(70, 80));
        s.adopt_again(AddrRange::new(20, 55));
        let mut queued: Vec<_> = s.adopt.iter().map(|r| (r.start.0, r.end.0)).collect();
        queued.sort_unstable();
        assert_eq!(queued, [(10, 20), (20, 40), (50, 55), (55, 60)]);
        assert!(s.unsettled.adopted.is_empty());
        assert_eq!(s.unsettled.torn, [AddrRange::new(70, 80)]);
    }

    #[test]
    fn the_end_of_a_relative_ends_the_rest_after_fruitless_batches() {
        let (mut core, parent) = core_of(AddrRange::new(0x10000, 0x20000));
        let child = core.add_space(1).unwrap();
        let s = core.space(parent).unwrap();
        s.fruitless = 5;
        s.rest_until = Nanos(1 << 40);
        s.sweep_after = Nanos(1 << 40);
        core.end_space(child, false);
        let s = core.space(parent).unwrap();
        let soon = Nanos(SWEEP_REST_NS);
        assert_eq!(
            (s.fruitless, s.rest_until, s.sweep_after),
            (0, Nanos(0), soon)
        );
        // Where one end follows the other, what frees nothing is not waited for.
        (s.fruitless, s.rest_until) = (1, Nanos(1 << 40));
        s.end_rest(Nanos(HOPE_NS - 1));
        assert_eq!(
            (s.fruitless, s.rest_until, s.sweep_after),
            (1, Nanos(HOPE_NS - 1), soon)
        );
        s.end_rest(Nanos(HOPE_NS));
        assert_eq!(s.fruitless, 0);
        // Who is not resting has its time.
        s.sweep_after = Nanos(1 << 40);
        s.end_rest(Nanos(1 << 30));
        assert_eq!(s.sweep_after, Nanos(1 << 40));
    }

    #[test]
    fn all_moves_together_tell_when_somebody_looked() {
        let mut s = Space::new(SpaceId(0), false, 16);
        let wiped = AddrRange::new(0x14000, 0x1a000);
        let mut seen = Ranges::new();
        seen.add(wiped);
        // Away, and a part of it back to where the wiped mapping was seen: the look was before both.
        s.moves.push((wiped, Addr(0x1e000)));
        let part = AddrRange::new(0x20000, 0x21000);
        s.moves.push((part, Addr(0x18000)));
        let now = s.since_look(SpaceId(0), wiped, &seen);
        let now: Vec<_> = now.iter().map(|r| (r.start.0, r.end.0)).collect();
        let all = [(0x18000, 0x19000), (0x1e000, 0x20000), (0x21000, 0x24000)];
        assert_eq!(now, all);
        // Seen where it ended: it was after both.
        let moves = std::mem::take(&mut s.moves);
        let mut ended = Ranges::new();
        for (start, end) in all {
            ended.add(AddrRange::new(start, end));
        }
        assert_eq!(moved_before(&moves, &ended), Some(2));
        assert_eq!(moved_before(&moves, &seen), Some(0));
        // Something else is gone: nobody can tell.
        assert_eq!(moved_before(&moves, &Ranges::new()), None);
    }

    #[test]
    fn a_child_is_spared_while_it_is_new_or_young_and_small() {
        let rules = Childhood {
            new_ns: 10,
            young_ns: 100,
            small_bytes: 4096,
        };
        let mut s = Space::new(SpaceId(0), false, 16);
        let spared = |s: &Space| [9, 10, 99, 100].map(|at| s.is_spared(&rules, Nanos(at)));
        let ringless = |s: &Space| [99, 100].map(|at| s.does_without_ring(&rules, Nanos(at)));
        // Nobody's child.
        assert_eq!((spared(&s), ringless(&s)), ([false; 4], [false; 2]));
        s.born = Some(Nanos(0));
        assert_eq!(spared(&s), [true, true, true, false]);
        s.usage_bytes = 4096;
        assert_eq!(spared(&s), [true, false, false, false]);
        assert_eq!(ringless(&s), [true, false]);
        s.ring = Ring::Ready;
        assert_eq!(ringless(&s), [false; 2]);
    }

    #[test]
    fn what_moved_over_a_wiped_mapping_is_not_wiped() {
        let mut s = Space::new(SpaceId(0), false, 16);
        let wiped = AddrRange::new(0x25000, 0x29000);
        s.moves
            .push((AddrRange::new(0x8000, 0x9000), Addr(0x27000)));
        let mut seen = Ranges::new();
        seen.add(wiped);
        let of_wiped = |s: &Space, seen: &Ranges| -> Vec<_> {
            let now = s.since_look(SpaceId(0), wiped, seen);
            now.iter().map(|r| (r.start.0, r.end.0)).collect()
        };
        // Nothing was where it came from: it had come before the look.
        assert_eq!(of_wiped(&s, &seen), [(0x25000, 0x29000)]);
        // It was there still, so it came after that.
        seen.add(AddrRange::new(0x3000, 0xb000));
        assert_eq!(
            of_wiped(&s, &seen),
            [(0x25000, 0x27000), (0x28000, 0x29000)]
        );
    }
}
