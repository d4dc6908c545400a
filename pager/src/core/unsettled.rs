//! Changes of mappings that are under way, or whose messages come in another order than they were made.

use holo_proto::{Addr, AddrRange, SpaceId};

use super::USER_END;
use super::ranges::Ranges;

/// Where the map keeps what was at `range` while something else has come there already: in the upper
/// half of its addresses, which no process has.
pub(crate) fn shadow(range: AddrRange) -> AddrRange {
    AddrRange {
        start: Addr(range.start.0 | USER_END.0),
        end: Addr(range.end.0 | USER_END.0),
    }
}

/// Moves and unmaps that are read in another order than they were made.
///
/// The kernel queues a message after its act, when another thread may already have moved something into
/// the place that has become free; and a move is followed by a message that its old place was unmapped
/// (seen on 6.18). All of this is over when an operation succeeds that fails while changes are under way.
#[derive(Debug, Default)]
pub(crate) struct Unsettled {
    /// Old places of moves: one more unmap will be heard of each.
    pub(crate) left: Vec<AddrRange>,
    /// Places whose last occupant has left, though its message has not come yet; its entries are in the
    /// place's [`shadow`].
    pub(crate) displaced: Ranges,
    /// What has moved to such places since.
    pub(crate) newcomers: Vec<AddrRange>,
    /// What was unmapped, moved away from, or moved to.
    pub(crate) changed: Ranges,
    /// New places of moves.
    pub(crate) arrived: Ranges,
    /// All moves in the order of their messages: where to, and from where.
    pub(crate) moves: Vec<(AddrRange, Addr)>,
    /// Registered anew where the message that the last occupant has gone was perhaps not read yet.
    pub(crate) reborn: Ranges,
    /// Of these, what nothing was heard of since: believed when all is settled.
    pub(crate) adopted: Vec<AddrRange>,
    /// Of these, what the kernel refused to register once more: a message that is still to come takes it apart.
    pub(crate) torn: Vec<AddrRange>,
    /// Children of forks whose messages were read meanwhile: what is heard now may have been before the fork.
    pub(crate) newborn: Vec<SpaceId>,
}

impl Unsettled {
    pub(crate) fn is_empty(&self) -> bool {
        self.left.is_empty()
            && self.displaced.is_empty()
            && self.changed.is_empty()
            && self.reborn.is_empty()
            && self.newborn.is_empty()
    }

    /// From where that came which was moved to `at`, by the last move that was heard of.
    pub(crate) fn origin(&self, at: Addr) -> Option<Addr> {
        let (new, from) = self.moves.iter().rfind(|(new, _)| new.contains(at))?;
        Some(from.offset(at.0 - new.start.0))
    }

    /// Who leaves `range`, as a message says: the parts of whoever is there, and those of who was there before.
    /// Before, unless a newcomer had only these places and nothing is there any more: the thread whose message is
    /// overdue left them to somebody who has come and gone meanwhile.
    pub(crate) fn leaving(
        &mut self,
        range: AddrRange,
        gone: bool,
    ) -> (Vec<AddrRange>, Vec<AddrRange>) {
        let came = self
            .newcomers
            .iter()
            .position(|n| n.intersect(range) == range);
        if let (true, Some(i)) = (gone, came) {
            let all = self.newcomers.swap_remove(i);
            let ends = [(all.start, range.start), (range.end, all.end)];
            let stay = ends.map(|(start, end)| AddrRange { start, end });
            self.newcomers.extend(stay.iter().filter(|r| !r.is_empty()));
            return (vec![range], Vec::new());
        }
        let there = self.displaced.without(range);
        let before = self.displaced.within(range).collect();
        self.displaced.remove(range);
        let displaced = &self.displaced;
        self.newcomers
            .retain(|&n| displaced.overlapping(n).is_some());
        (there, before)
    }
}

/// Large ranges that the process drops, with the quiesce after which each has happened.
#[derive(Default)]
pub(crate) struct Drops {
    list: Vec<(AddrRange, u64)>,
}

impl Drops {
    /// More than that are taken together.
    const MOST: usize = 32;

    pub(crate) fn add(&mut self, range: AddrRange, quiesce: u64) {
        let is_full = self.list.len() == Self::MOST;
        match self.list.last_mut() {
            Some((last, n)) if is_full => {
                last.start = last.start.min(range.start);
                last.end = last.end.max(range.end);
                *n = quiesce.max(*n);
            }
            _ => self.list.push((range, quiesce)),
        }
    }

    /// Whether what is at `at` may still be dropped, as far as `quiesced` quiesces tell.
    pub(crate) fn may_drop(&self, at: Addr, quiesced: u64) -> bool {
        let mut all = self.list.iter();
        all.any(|&(range, n)| n >= quiesced && range.contains(at))
    }

    /// So many quiesces have been; whether any of them is still awaited.
    pub(crate) fn quiesced(&mut self, quiesced: u64) -> bool {
        self.list.retain(|&(_, n)| n >= quiesced);
        !self.list.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn large_drops_are_awaited_each_and_together() {
        let mut d = Drops::default();
        let at = |i: u64| AddrRange::new(i << 30, (i << 30) + (1 << 29));
        for i in 1..=40 {
            d.add(at(i), i);
        }
        assert!((1..=40).all(|i| d.may_drop(at(i).start, i)));
        assert!(!d.may_drop(at(1).end, 0));
        assert!(!d.may_drop(at(5).start, 6));
        assert!(d.quiesced(40));
        assert!(!d.may_drop(at(5).start, 0));
        // The last nine are one.
        assert!(d.may_drop(at(33).end, 40));
        assert!(!d.quiesced(41));
        assert!(!d.may_drop(at(40).start, 0));
    }

    /// A block was moved away, its message is overdue, and its place was lent out meanwhile.
    fn lent() -> (Unsettled, AddrRange, AddrRange) {
        let (block, guest) = (
            AddrRange::new(0x10000, 0x20000),
            AddrRange::new(0x18000, 0x20000),
        );
        let mut u = Unsettled::default();
        u.displaced.add(guest);
        u.newcomers.push(guest);
        (u, block, guest)
    }

    #[test]
    fn what_moved_twice_to_a_place_came_from_the_last_one() {
        let mut u = Unsettled::default();
        let new = AddrRange::new(0x10000, 0x20000);
        u.moves = vec![(new, Addr(0x50000)), (new, Addr(0x80000))];
        assert_eq!(u.origin(Addr(0x1f000)), Some(Addr(0x8f000)));
        assert_eq!(u.origin(new.end), None);
    }

    #[test]
    fn who_leaves_a_place_where_nothing_is_left_is_the_newcomer() {
        let (mut u, block, guest) = lent();
        assert_eq!(u.leaving(guest, true), (vec![guest], vec![]));
        // Then it is the block's turn, whatever is there now.
        let rest = AddrRange::new(0x10000, 0x18000);
        assert_eq!(u.leaving(block, true), (vec![rest], vec![guest]));
        assert_eq!(u.leaving(guest, true), (vec![guest], vec![]));
    }

    #[test]
    fn who_leaves_a_place_where_the_newcomer_still_is_was_there_before() {
        let (mut u, block, guest) = lent();
        let rest = AddrRange::new(0x10000, 0x18000);
        assert_eq!(u.leaving(block, false), (vec![rest], vec![guest]));
        assert_eq!(u.leaving(guest, true), (vec![guest], vec![]));
    }

    #[test]
    fn a_newcomer_leaves_in_parts() {
        let (mut u, block, guest) = lent();
        let parts = [(0x18000, 0x1a000), (0x1c000, 0x20000), (0x1a000, 0x1c000)];
        for (start, end) in parts {
            let part = AddrRange::new(start, end);
            assert_eq!(u.leaving(part, true), (vec![part], vec![]));
        }
        assert_eq!(u.leaving(block, false).1, vec![guest]);
    }
}
