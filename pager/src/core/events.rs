//! What each message of the kernel does to the map. Applying one twice is the same as once.

use holo_proto::{Addr, AddrRange, PageIndex, SUBPAGE_BYTES, SpaceId, SubpageIndex, SubpageMask};

use super::event::Event;
use super::fault::Fault;
use super::map::SlotState;
use super::space::{Life, Ranges, Seen, Space, Suspect, Unproved, Youth, shadow};
use super::{
    ANYWHERE, Core, CrashPoint, Doing, Entry, FAULTS, GRAVES, Grave, JOURNAL_SLOTS, Op, Outcome,
    SPACES, StopReason, USER_END,
};
use crate::store::api::PageStore;

/// Subpages of one mapping of which it is found out at once that they are there.
const PROVED_AT_ONCE: u64 = 4096;

impl<S: PageStore> Core<'_, S> {
    /// Applies what is in the journal, in order, clearing each slot after its message.
    pub(super) fn apply_journal(&mut self) {
        let Some(id) = self.journal.space() else {
            return;
        };
        for i in 0..JOURNAL_SLOTS {
            let Some(words) = self.journal.slot(i) else {
                continue;
            };
            let seq = self.journal.seq(i);
            if let Some(event) = Event::decode(words) {
                if self.space_ref(id).is_some() {
                    self.apply(id, event, seq, self.gone >> i & 1 == 1);
                }
            }
            self.crash(CrashPoint::EventApplied);
            self.journal.clear(i);
            self.crash(CrashPoint::EventCleared);
        }
        self.gone = 0;
        self.clear_graves(|g| g.dropped);
    }

    fn apply(&mut self, id: SpaceId, event: Event, seq: u32, gone: bool) {
        if let (false, Some(s)) = (matches!(event, Event::Fault { .. }), self.space(id)) {
            s.calm = None;
            if let Some(b) = s.batch.as_mut() {
                b.list_again();
            }
        }
        match event {
            Event::Fault {
                at, write, protect, ..
            } => self.fault_read(Fault {
                space: id,
                at: at.subpage(),
                write,
                protect,
                since: self.now,
                own: false,
                alone: false,
            }),
            Event::Fork { fd } => self.forked(id, fd, seq),
            Event::Remap { from, to, len } => self.moved(id, (from, to, len), seq, gone),
            Event::Remove(range) => self.removed(id, range, seq),
            Event::Unmap(range) => self.unmapped(id, range, gone),
        }
    }

    fn fault_read(&mut self, fault: Fault) {
        if self.ready.len() + self.held.len() >= FAULTS - 1 {
            // Forgotten on purpose: a wake makes the thread fault again.
            if let Some(s) = self.space(fault.space) {
                s.overflowed = true;
            }
            return;
        }
        self.ready.push_back(fault);
    }

    /// The process will drop `range` after this was read.
    fn removed(&mut self, id: SpaceId, range: AddrRange, seq: u32) {
        let mut noted = Vec::new();
        if let Some(mut b) = self.space(id).and_then(|s| s.batch.take()) {
            b.note_removal(
                range,
                |i| (self.notes.queued(id, i), self.notes.counted(id, i, 1)),
                |i, ours, heard| noted.push((i, ours, heard)),
            );
            if let Some(s) = self.space(id) {
                s.batch = Some(b);
            }
        }
        let mut counted = Vec::new();
        for (i, covered, heard) in noted {
            self.notes.set_heard(id, i, heard);
            self.notes.count(id, i, covered, seq);
            // The second one is the process's, and is known at once: a fork read next copies the entry.
            let twice = self.notes.counted(id, i, 2).and(covered);
            let mine = covered.minus(twice);
            counted.push((self.notes.page(id, i).0, mine));
            if let Some(b) = self.space(id).and_then(|s| s.batch.as_mut()) {
                b.dropped(i, twice);
            }
            self.stats.dropped_in_batch += u64::from(twice.count());
        }
        let fork_follows = (0..JOURNAL_SLOTS)
            .filter(|&i| (self.journal.seq(i).wrapping_sub(seq) as usize) < JOURNAL_SLOTS)
            .filter_map(|i| Event::decode(self.journal.slot(i)?))
            .any(|e| matches!(e, Event::Fork { .. }));
        if range.len() > self.large_drop_bytes {
            return self.removed_at_large(id, range, fork_follows);
        }
        for page in range.pages() {
            let mine = counted
                .iter()
                .find(|(p, _)| *p == page)
                .map_or(SubpageMask::NONE, |(_, m)| *m);
            let theirs = SubpageMask::of_page_in(page, range).minus(mine);
            if fork_follows {
                for i in theirs.iter() {
                    self.bury_subpage(id, page.subpage(i), true);
                }
            }
            self.process_drops(id, page, theirs);
        }
    }

    /// The process will drop so much that an entry for each subpage would take long, and much of the map: the range is
    /// remembered instead. (None of it is our own doing, for a request of ours is within a page.) A successor is told
    /// only that there is such a range.
    fn removed_at_large(&mut self, id: SpaceId, range: AddrRange, fork_follows: bool) {
        let (mut at, end) = (range.start.subpage(), range.end_subpage());
        while let Some((found, entry)) = self.map.next_in(id, at, end) {
            at = SubpageIndex(found.0 + 1);
            if entry.has_bytes() {
                if fork_follows {
                    self.bury_subpage(id, found, true);
                }
                self.set_entry(id, found, Entry::Nothing);
            }
        }
        self.notes.set_large_drop(id, true);
        if let Some(s) = self.space(id) {
            let quiesce = s.next_quiesce();
            s.drops.add(range, quiesce);
        }
    }

    /// The process drops these subpages, now or soon.
    pub(super) fn process_drops(&mut self, id: SpaceId, page: PageIndex, which: SubpageMask) {
        let Some(quiesce) = self.space_ref(id).map(Space::next_quiesce) else {
            return;
        };
        for i in which.iter() {
            self.set_entry(id, page.subpage(i), Entry::Dropping(quiesce));
        }
    }

    /// A range was unmapped, as far as the message is about what is there now.
    fn unmapped(&mut self, id: SpaceId, range: AddrRange, gone: bool) {
        self.witnessed(id, range);
        let Some(s) = self.space(id) else { return };
        if let Some(youth) = s.youth.as_mut() {
            youth.own.add(range);
        }
        s.adopt_again(range);
        if let Some(i) = s.unsettled.left.iter().position(|&r| r == range) {
            // The second message of a move, about its old place: somebody may have come there since.
            s.unsettled.left.swap_remove(i);
            let left = s.unsettled.left.clone();
            self.notes.set_left(id, &left);
            return;
        }
        let (there, displaced) = s.unsettled.leaving(range, gone);
        s.suspects.retain(|x| !range.contains(x.at.start()));
        // Who was there before is what the message is about.
        let others = !displaced.is_empty();
        for part in displaced {
            self.forget_range(id, shadow(part));
        }
        for part in there {
            self.doubt(id, part);
            self.bury(id, part);
            for r in self.perhaps_late(id, part, gone, others) {
                self.forget_range(id, r);
            }
            if let Some(s) = self.space(id) {
                s.unsettled.changed.add(part);
                s.regions.remove(part);
                s.hearsay.remove(part);
                s.forget_never(part);
                s.restore.disturb(part);
            }
            self.batch_loses(id, part, false);
        }
    }

    /// A range of one call may have holes, where something was moved to before this was heard of it: what has
    /// come to `part` may be there still, and is looked for. Not if there is nothing else in the range, for no
    /// message is about holes alone; `others` says that there was, though it is not in `part`. The rest of `part`.
    fn perhaps_late(
        &mut self,
        id: SpaceId,
        part: AddrRange,
        gone: bool,
        others: bool,
    ) -> Vec<AddrRange> {
        let Some(s) = self.space(id) else {
            return Vec::new();
        };
        if gone {
            // What had come to a part of it may have left by itself since: its own message is on the way then.
            let aside: Vec<_> = s
                .unsettled
                .arrived
                .within(part)
                .filter(|&r| r != part && s.unsettled.displaced.overlapping(r).is_none())
                .collect();
            s.unsettled.arrived.remove(part);
            for r in aside {
                self.move_entries(id, r, shadow(r).start);
                if let Some(s) = self.space(id) {
                    s.unsettled.displaced.add(r);
                }
            }
            return vec![part];
        }
        let rest = s.unsettled.arrived.without(part);
        // What is registered, though not believed yet, may be what the message is about as well.
        let (known, new) = (&s.regions, &s.unsettled.reborn);
        let empty =
            |r: &AddrRange| known.overlapping(*r).is_none() && new.overlapping(*r).is_none();
        if !others && rest.iter().all(empty) {
            s.unsettled.arrived.remove(part);
            return vec![part];
        }
        let arrived: Vec<_> = s.unsettled.arrived.within(part).collect();
        s.unsettled.arrived.remove(part);
        for r in arrived {
            let end = r.end_subpage();
            let mut at = r.start.subpage();
            while let Some((found, _)) = self.map.next_in(id, at, end) {
                at = SubpageIndex(found.0 + 1);
                if let Some(s) = self.space(id) {
                    s.suspects.push(Suspect {
                        at: found,
                        witness: found,
                        if_there: true,
                    });
                }
            }
        }
        rest
    }

    /// The pages of `from` are at `to` now. Entry by entry, and a moved one is gone from its old place:
    /// the second application finds only what the first did not reach.
    fn moved(&mut self, id: SpaceId, (from, to, len): (Addr, Addr, u64), seq: u32, gone: bool) {
        let old = AddrRange {
            start: from,
            end: from.offset(len),
        };
        let new = AddrRange {
            start: to,
            end: to.offset(len),
        };
        self.witnessed(id, old);
        let mut moved_on = Vec::new();
        let Some(s) = self.space(id) else { return };
        s.adopt_again(old);
        s.adopt_again(new);
        if !s.known {
            s.moves.push((old, to));
        }
        if let Some(youth) = s.youth.as_mut() {
            youth.own.add(old);
            youth.own.add(new);
        }
        // Only stale entries are left where the child has never been.
        let mut stale: Vec<_> = s
            .suspects
            .extract_if(.., |x| new.contains(x.at.start()))
            .collect();
        // What moves was there, so much is known now; if that was to be found out elsewhere, it still is, and where the
        // process has put itself what moves, it cannot be any more.
        for mut x in s.suspects.extract_if(.., |x| old.contains(x.at.start())) {
            if x.witness == x.at {
                continue;
            } else if new.contains(x.witness.start()) {
                stale.push(x);
            } else {
                x.at = to.offset(x.at.start().0 - from.0).subpage();
                moved_on.push(x);
            }
        }
        s.suspects.append(&mut moved_on);
        for x in stale {
            self.set_entry(id, x.at, Entry::Nothing);
        }
        let Some(s) = self.space(id) else { return };
        // What the message is about may have made room here already, for what has come since.
        let (rest, aside) = s.unsettled.leaving(old, gone);
        // Whoever we believe in the new place has left it: its own message is on the way.
        let leaving: Vec<_> = s
            .regions
            .iter()
            .map(|r| r.intersect(new))
            .filter(|r| !r.is_empty())
            .flat_map(|r| s.hearsay.without(r))
            .collect();
        for part in leaving {
            self.move_entries(id, part, shadow(part).start);
            if let Some(s) = self.space(id) {
                s.unsettled.displaced.add(part);
            }
        }
        // What is left there was heard of, or inherited, and is older than the move: ioctls fail from its beginning
        // until its message is read.
        if !self.notes.is_cleared(id, seq) {
            self.forget_range(id, new);
            self.crash(CrashPoint::NewPlaceCleared);
            self.notes.set_cleared(id, seq);
        }
        for part in aside {
            self.move_entries(id, shadow(part), to.offset(part.start.0 - from.0));
        }
        self.doubt(id, new);
        self.rebury(id, from, new);
        for &part in &rest {
            self.doubt(id, part);
            self.doubt_move(id, part, to.offset(part.start.0 - from.0));
            self.bury(id, part);
            self.move_entries(id, part, to.offset(part.start.0 - from.0));
        }
        let Some(s) = self.space(id) else { return };
        if s.unsettled.displaced.overlapping(new).is_some() {
            s.unsettled.newcomers.push(new);
        }
        for part in rest {
            s.regions.remove(part);
            s.hearsay.remove(part);
            s.forget_never(part);
        }
        s.hearsay.remove(new);
        s.unsettled.changed.add(old);
        s.unsettled.changed.add(new);
        s.unsettled.arrived.remove(old);
        s.unsettled.arrived.add(new);
        s.regions.remove(new);
        // Only moves of what is registered to us are heard of.
        s.regions.add(new);
        if !s.unsettled.left.contains(&old) {
            s.unsettled.left.push(old);
        }
        s.restore.disturb(old);
        s.restore.disturb(new);
        if let Some(b) = s.batch.as_mut() {
            b.chase(old, to);
        }
        s.sweep_after = super::Nanos(0);
        let left = s.unsettled.left.clone();
        self.notes.set_left(id, &left);
        self.batch_loses(id, old, false);
        self.batch_loses(id, new, true);
        self.crash(CrashPoint::Moved);
    }

    /// The children that were forked just now may or may not have what was in `range`.
    fn doubt(&mut self, parent: SpaceId, range: AddrRange) {
        let end = range.end_subpage();
        for child in self.newborn(parent) {
            let mut at = range.start.subpage();
            while let Some((found, _)) = self.map.next_in(child, at, end) {
                at = SubpageIndex(found.0 + 1);
                if let Some(c) = self.space(child) {
                    c.suspects.push(Suspect {
                        at: found,
                        witness: found,
                        if_there: true,
                    });
                }
            }
            if let Some(c) = self.space(child) {
                c.regions.remove(range);
            }
        }
    }

    /// The children that were forked just now may have what is in `range` at its new place: if they were forked
    /// after the move, which is why the old place is not theirs. One that has changed the old place itself
    /// tells by what it has at the new one, unless that was there before.
    fn doubt_move(&mut self, parent: SpaceId, range: AddrRange, to: Addr) {
        let end = range.end_subpage();
        for child in self.newborn(parent) {
            let mut source = range.start.subpage();
            while let Some((found, entry)) = self.map.next_in(parent, source, end) {
                source = SubpageIndex(found.0 + 1);
                let target = SubpageIndex(found.0 - range.start.subpage().0 + to.subpage().0);
                let Some(y) = self.space_ref(child).and_then(|c| c.youth.as_ref()) else {
                    break;
                };
                let its_own = |at: SubpageIndex| y.own.around(at.start()).is_some();
                let occupied = y.inherited.around(target.start()).is_some();
                let by_old_place = !its_own(found);
                let nobody_knows = its_own(target) || occupied && !by_old_place;
                if nobody_knows
                    || self.map.entry(child, target) != Entry::Nothing
                    || !self.give(child, target, entry)
                {
                    continue;
                }
                if let Some(c) = self.space(child) {
                    c.suspects.push(Suspect {
                        at: target,
                        witness: target,
                        if_there: true,
                    });
                    if by_old_place {
                        c.suspects.push(Suspect {
                            at: target,
                            witness: found,
                            if_there: false,
                        });
                    }
                }
            }
        }
    }

    fn newborn(&self, parent: SpaceId) -> Vec<SpaceId> {
        self.space_ref(parent)
            .map_or_else(Vec::new, |s| s.unsettled.newborn.clone())
            .into_iter()
            .filter(|&c| self.space_ref(c).is_some())
            .collect()
    }

    /// Keeps what the map says of a range that is unmapped or moved away. Not where a mapping that has come
    /// since is registered already: a child's userfaultfd could not tell the two.
    fn bury(&mut self, id: SpaceId, range: AddrRange) {
        let Some(s) = self.space(id) else { return };
        for part in s.unsettled.reborn.without(range) {
            let end = part.end_subpage();
            let mut at = part.start.subpage();
            while let Some((found, _)) = self.map.next_in(id, at, end) {
                at = SubpageIndex(found.0 + 1);
                self.bury_subpage(id, found, false);
            }
        }
    }

    /// Something moved to a place that had become free: a child forked before that still has it at its old
    /// place. What lies behind the new place, up to where it had become free, may be its growth.
    fn rebury(&mut self, id: SpaceId, from: Addr, new: AddrRange) {
        let Some(s) = self.space_ref(id) else { return };
        let free_to = s
            .unsettled
            .changed
            .around(new.start)
            .map_or(new.end, |r| r.end.max(new.end));
        for g in self.graves.iter_mut().filter(|g| g.space == id) {
            let at = g.at.start();
            if new.contains(at) {
                g.witness = from.offset(at.0 - new.start.0).subpage();
            } else if at >= new.end && at < free_to {
                g.witness = from.subpage();
            } else if new.contains(g.witness.start()) {
                let old = from.offset(g.witness.start().0 - new.start.0);
                g.witness_too = Some(old.subpage());
            }
        }
    }

    fn bury_subpage(&mut self, space: SpaceId, at: SubpageIndex, dropped: bool) {
        let entry = self.map.entry(space, at);
        if !self.retain(entry) {
            return;
        }
        if self.graves.len() == GRAVES {
            if let Some(g) = self.graves.pop_front() {
                self.release(g.entry);
            }
        }
        self.graves.push_back(Grave {
            space,
            at,
            entry,
            witness: at,
            witness_too: None,
            dropped,
        });
    }

    pub(super) fn clear_graves(&mut self, which: impl Fn(&Grave) -> bool) {
        for _ in 0..self.graves.len() {
            match self.graves.pop_front() {
                Some(g) if which(&g) => self.release(g.entry),
                Some(g) => self.graves.push_back(g),
                None => {}
            }
        }
    }

    /// One more reference to what an entry holds; false if it holds nothing.
    fn retain(&mut self, entry: Entry) -> bool {
        match entry {
            Entry::Stored(l) => self.store.retain(l),
            Entry::Staged(f, _) => self.frames.hold(f),
            Entry::Nothing | Entry::Dropping(_) => return false,
        }
        true
    }

    fn move_entries(&mut self, id: SpaceId, from: AddrRange, to: Addr) {
        let end = from.end_subpage();
        let mut at = from.start.subpage();
        while let Some((found, entry)) = self.map.next_in(id, at, end) {
            at = SubpageIndex(found.0 + 1);
            let target = SubpageIndex(found.0 - from.start.subpage().0 + to.subpage().0);
            let Ok(before) = self.map.replace(id, target, entry) else {
                return self.no_room(id);
            };
            self.release(before);
            self.crash(CrashPoint::EntryMoving);
            // The reference moves along: what the old place held is not given back.
            if self.map.replace(id, found, Entry::Nothing).is_err() {
                self.no_room(id);
            }
        }
    }

    /// The fork that made `id` wiped `range`, or left it out: so it did for children that `id` had before this was known.
    fn wiped(&mut self, id: SpaceId, range: AddrRange, seen: Seen) {
        for child in self.all_spaces() {
            let unknown = self.space_ref(child).filter(|s| !s.known);
            for r in unknown
                .map_or_else(Ranges::new, |s| s.since(seen, id, range))
                .iter()
            {
                self.forget_bytes(child, r);
            }
        }
    }

    /// No change of mappings is under way: what the shell has seen of a fork's child was before, or is here still.
    pub(super) fn child_settled(&mut self, id: SpaceId) {
        let Some(s) = self.space(id).filter(|s| s.told && !s.known) else {
            return;
        };
        for (range, seen) in std::mem::take(&mut s.wiped) {
            self.wiped(id, range, seen);
        }
        self.child_told(id);
    }

    /// Is all known of a fork's child? Only together with its parent.
    fn child_told(&mut self, id: SpaceId) {
        let Some(s) = self.space(id) else { return };
        if s.told && s.waits_for.is_none() {
            s.known = true;
            s.moves = Vec::new();
            s.lineage = Vec::new();
            self.map.settle_fork(id);
            self.unhold();
            self.release_children(id);
        }
    }

    /// Nothing more is said about the fork that made `id`.
    pub(super) fn release_children(&mut self, id: SpaceId) {
        for child in self.all_spaces() {
            if let Some(s) = self.space(child).filter(|s| s.waits_for == Some(id)) {
                s.waits_for = None;
            }
        }
    }

    pub(super) fn all_spaces(&self) -> impl Iterator<Item = SpaceId> + use<S> {
        (0..u16::MAX).take(SPACES).map(SpaceId)
    }

    /// An operation that fails while any change of mappings is under way has not failed: every message is
    /// applied, whatever their order.
    pub(super) fn settled(&mut self, id: SpaceId) {
        let Some(s) = self.space(id) else { return };
        if s.unsettled.is_empty() {
            return;
        }
        let never_heard_of: Vec<_> = s.unsettled.displaced.iter().collect();
        let was = std::mem::take(&mut s.unsettled);
        for child in was.newborn {
            if let Some(c) = self.space(child) {
                c.youth = None;
            }
        }
        self.clear_graves(|g| g.space == id);
        self.notes.set_left(id, &[]);
        for part in never_heard_of {
            self.forget_range(id, shadow(part));
        }
        for range in was.adopted {
            self.believe(id, range);
        }
    }

    /// The process forked: the child's map is the parent's at the moment of the fork.
    ///
    /// The fork's message may be read after those of what other threads did since. So of what was unmapped
    /// or moved while changes of mappings are under way, and of what is dropped by messages read together
    /// with the fork's (the act comes after the reading), the child gets what the map said before. Whether it
    /// has anything mapped there its own userfaultfd tells ([`Core::step_suspects`]). This is not written
    /// down: after a take-over at such a moment the child gets the later state.
    fn forked(&mut self, parent: SpaceId, fd: u32, seq: u32) {
        let made = self.map.spaces().find(|&s| {
            self.map.fork_seq(s) == Some(seq) && self.map.owner_word(s) == u64::from(fd)
        });
        if let Some(child) = made {
            if self.map.state(child) != SlotState::Building {
                self.errands.push_back(Op::Child {
                    parent,
                    space: child,
                    fd,
                });
                return;
            }
        }
        let Ok(child) = self.map.begin_space(Some(seq), u64::from(fd)) else {
            return self.forked_without_room(parent, fd, seq);
        };
        self.crash(CrashPoint::ForkBegun);
        let end = USER_END.subpage();
        let mut at = SubpageIndex(0);
        while let Some((found, entry)) = self.map.next_in(parent, at, end) {
            at = SubpageIndex(found.0 + 1);
            if !self.give(child, found, entry) {
                break;
            }
        }
        // What the parent does not know of itself yet, the child has to find out as well.
        let mut suspects = self
            .space_ref(parent)
            .map_or_else(Vec::new, |p| p.suspects.clone());
        for i in 0..self.graves.len() {
            let Grave {
                space,
                at,
                entry,
                witness,
                witness_too,
                ..
            } = self.graves[i];
            let free = space == parent && self.map.entry(child, at) == Entry::Nothing;
            if free && !self.give(child, at, entry) {
                break;
            }
            if free {
                let all = [witness].into_iter().chain(witness_too);
                suspects.extend(all.map(|witness| Suspect {
                    at,
                    witness,
                    if_there: true,
                }));
            }
        }
        self.crash(CrashPoint::ForkCopied);
        let mut space = Box::new(Space::new(child, false, self.tracked_pages));
        space.suspects = suspects;
        space.born = Some(self.now);
        // What the fork left out (MADV_DONTFORK) is nothing of the child's.
        space.unproved = Some(Unproved::default());
        if let Some(p) = self.space(parent) {
            if !p.known {
                space.moves = p.moves.clone();
                space.lineage = p.lineage.clone();
                space.lineage.push((child, p.moves.len()));
                space.waits_for = Some(parent);
            }
            p.unsettled.newborn.push(child);
            space.regions = p.regions.clone();
            space.youth = Some(Youth {
                own: Ranges::new(),
                inherited: p.regions.clone(),
            });
            for r in p.unsettled.changed.iter() {
                space.regions.remove(r);
            }
            // Without what the parent keeps from its children (MADV_DONTFORK).
            space.hearsay = space.regions.clone();
            space.never = p.never.clone();
            if p.life == Life::Detaching {
                space.life = Life::Detaching;
            }
        }
        let doomed = self.map.state(child) == SlotState::Doomed;
        if !doomed {
            self.map.activate(child);
        }
        self.spaces[usize::from(child.0)] = Some(space);
        self.stats.spaces += 1;
        self.errands.push_back(Op::Child {
            parent,
            space: child,
            fd,
        });
        if doomed {
            return self.no_room(child);
        }
        if self
            .space_ref(child)
            .is_some_and(|s| s.life == Life::Detaching)
        {
            self.begin_detach(child);
        }
    }

    /// There is no room for a fork's child: it must not run on with what it would find missing. If there are not even
    /// slots for those that are to be stopped, its parent is stopped, and the child waits for ever at its first fault.
    fn forked_without_room(&mut self, parent: SpaceId, fd: u32, seq: u32) {
        let Ok(child) = self.map.begin_doomed(seq, u64::from(fd)) else {
            return self.no_room(parent);
        };
        self.spaces[usize::from(child.0)] =
            Some(Box::new(Space::new(child, false, self.tracked_pages)));
        self.stats.spaces += 1;
        self.errands.push_back(Op::Child {
            parent,
            space: child,
            fd,
        });
        self.no_room(child);
    }

    /// While messages of moves and unmaps may be out of order, asks at once whether more are on the way: the
    /// sooner that is settled, the fewer forks can fall into it. So too before a fork's child counts as known. Nothing is mapped at the address; the kernel
    /// looks at that last.
    pub(super) fn step_settle(&mut self, id: SpaceId) -> Option<Op> {
        let s = self.space_ref(id)?;
        let unknown = s.told && !s.known && s.waits_for.is_none();
        (unknown || !s.unsettled.is_empty()).then_some(Op::Unprotect {
            space: id,
            range: ANYWHERE,
        })
    }

    /// A message about `range`: something of ours was there. Whatever was to be found out by that is known.
    fn witnessed(&mut self, id: SpaceId, range: AddrRange) {
        let Some(s) = self.space(id) else { return };
        let known: Vec<_> = s
            .suspects
            .extract_if(.., |x| {
                x.witness != x.at && range.contains(x.witness.start())
            })
            .collect();
        for x in known.iter().filter(|x| !x.if_there) {
            self.set_entry(id, x.at, Entry::Nothing);
        }
    }

    /// Finds out whether a fork's child has a subpage: lifting a protection there succeeds only where a
    /// mapping is registered, and a new mapping of the child's own is not. Not while a batch of the child's own
    /// needs the protection there.
    pub(super) fn step_suspects(&mut self, id: SpaceId) -> Option<Op> {
        let s = self.space_ref(id)?;
        let witness = s.suspects.last()?.witness;
        if s.batch.as_ref().is_some_and(|b| b.protects(witness.page())) {
            return None;
        }
        let at = witness.start();
        let end = at.offset(SUBPAGE_BYTES);
        let range = AddrRange { start: at, end };
        Some(Op::Unprotect { space: id, range })
    }

    pub(super) fn suspect_tried(&mut self, id: SpaceId, outcome: Outcome) {
        if outcome == Outcome::EventsPending {
            return self.events_pending(id);
        }
        let Some(suspect) = self.space(id).and_then(|s| s.suspects.pop()) else {
            return;
        };
        match outcome {
            Outcome::Gone => self.gone(id),
            there => {
                if (there == Outcome::Done) != suspect.if_there {
                    self.set_entry(id, suspect.at, Entry::Nothing);
                } else if let (Some(s), true) = (self.space(id), suspect.if_there) {
                    let start = suspect.witness.start();
                    let end = start.offset(SUBPAGE_BYTES);
                    s.regions.add(AddrRange { start, end });
                }
            }
        }
        self.unhold();
    }

    /// Are there mappings for what the map says? A fork leaves out some of them, and a predecessor may have had doubts
    /// that it did not write down. Before anything is registered anew, that is found out: entries where nothing is
    /// registered are about what is not there, or not any more. (What has come there by a move is registered.)
    pub(super) fn step_prove(&mut self, id: SpaceId) -> Option<(Doing, Op)> {
        let s = self.space_ref(id)?;
        let Unproved { mut at, singly_to } = s.unproved.filter(|_| s.told)?;
        let first = loop {
            let Some((found, entry)) = self.map.next_in(id, at, USER_END.subpage()) else {
                self.space(id)?.unproved = None;
                return None;
            };
            if entry.has_bytes() {
                break found;
            }
            at = SubpageIndex(found.0 + 1);
        };
        let s = self.space_ref(id)?;
        let protects = |at: SubpageIndex| s.batch.as_ref().is_some_and(|b| b.protects(at.page()));
        if protects(first) {
            return None;
        }
        // Over a hole the kernel would pass without a word.
        let one = SubpageIndex(first.0 + 1);
        let end = match s.regions.around(first.start()) {
            Some(r) if first >= singly_to => r.end_subpage(),
            _ => one,
        };
        let last = (one.0..end.0.min(first.0 + PROVED_AT_ONCE))
            .map(SubpageIndex)
            .take_while(|&at| self.map.entry(id, at).has_bytes() && !protects(at))
            .last();
        let range = AddrRange {
            start: first.start(),
            end: last.unwrap_or(first).start().offset(SUBPAGE_BYTES),
        };
        Some((Doing::Prove(id, range), Op::Unprotect { space: id, range }))
    }

    pub(super) fn proved(&mut self, id: SpaceId, range: AddrRange, outcome: Outcome) {
        match outcome {
            Outcome::Gone => return self.gone(id),
            Outcome::EventsPending => return self.events_pending(id),
            _ => self.progressed(id),
        }
        let single = range.len() == SUBPAGE_BYTES;
        if outcome != Outcome::Done && single {
            self.forget_bytes(id, range);
        }
        if let Some(u) = self.space(id).and_then(|s| s.unproved.as_mut()) {
            if outcome == Outcome::Done || single {
                u.at = range.end_subpage();
            } else {
                u.singly_to = range.end_subpage();
            }
        }
    }

    /// The child's map says `entry` of `at`, too. False if there is no room: the child is doomed.
    fn give(&mut self, child: SpaceId, at: SubpageIndex, entry: Entry) -> bool {
        if !self.retain(entry) {
            return true;
        }
        let given = self.map.replace(child, at, entry).is_ok();
        if !given {
            self.release(entry);
            self.map.doom(child);
            self.stop(child, StopReason::TooLarge);
        }
        given
    }
}
