//! What each message of the kernel does to the map. Applying one twice is the same as once.

use holo_proto::{Addr, AddrRange, PageIndex, SpaceId, SubpageIndex, SubpageMask};

use super::event::Event;
use super::fault::Fault;
use super::space::{Space, Suspect};
use super::unsettled::shadow;
use super::{ANYWHERE, Core, CrashPoint, Entry, FAULTS, JOURNAL_SLOTS, Op, SPACES, StopReason};
use crate::store::api::PageStore;

impl<S: PageStore> Core<'_, S> {
    /// Applies what is in the journal, in order, clearing each slot after its message.
    pub(super) fn apply_journal(&mut self) {
        let Some(id) = self.journal.space() else {
            self.replays = false;
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
                if !matches!(event, Event::Fault { .. } | Event::Remove(_)) {
                    self.note_doubts();
                }
            }
            self.crash(CrashPoint::EventApplied);
            self.journal.clear(i);
            self.crash(CrashPoint::EventCleared);
            self.replays = false;
        }
        self.replays = false;
        self.gone = 0;
        self.clear_graves(|g| g.dropped);
    }

    /// Writes down what is doubtful: a successor would take the map's word for it.
    fn note_doubts(&mut self) {
        for s in self.spaces.iter().flatten() {
            self.notes.set_doubts(s.id, &s.suspects);
        }
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
                at,
                write,
                protect,
                thread,
            } => {
                self.waits(id, thread);
                self.fault_read(Fault {
                    space: id,
                    at: at.subpage(),
                    write,
                    protect,
                    since: self.now,
                    own: false,
                    alone: false,
                });
            }
            Event::Fork { fd } => self.forked(id, fd, seq),
            Event::Remap { from, to, len } => self.moved(id, (from, to, len), seq, gone),
            Event::Remove(range) => self.removed(id, range, seq),
            Event::Unmap(range) => self.unmapped(id, range, seq, gone),
        }
    }

    /// Says who waits, where the process is not known: by what is in its memory it cannot be told if nothing is.
    fn waits(&mut self, id: SpaceId, thread: u32) {
        if let Some(s) = self.space(id).filter(|s| !s.told && !s.known) {
            if s.waiting.replace(thread) != Some(thread) {
                self.errands.push_back(Op::Waits { space: id, thread });
            }
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
                |i, told, heard| noted.push((i, told, heard)),
            );
            if let Some(s) = self.space(id) {
                s.batch = Some(b);
            }
        }
        let mut counted = Vec::new();
        for (i, [told, covered], heard) in noted {
            self.notes.set_heard(id, i, heard);
            self.notes.count(id, i, told, seq);
            // The second one is the process's, and is known at once: a fork read next copies the entry.
            let twice = self.notes.counted(id, i, 2).and(covered);
            let mine = covered.minus(twice);
            counted.push((self.notes.page(id, i).0, mine, twice));
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
            return self.removed_at_large(id, range);
        }
        for page in range.pages() {
            let (mine, twice) = counted
                .iter()
                .find(|(p, ..)| *p == page)
                .map_or((SubpageMask::NONE, SubpageMask::NONE), |c| (c.1, c.2));
            let theirs = SubpageMask::of_page_in(page, range).minus(mine);
            // Two messages may be ours after all (a mapping that was split). What the process surely drops a child need
            // not have: the call overlaps with the fork, or was before it, for whoever was woken may run on and fork
            // before the next message of the same read.
            if fork_follows {
                for i in twice.iter() {
                    self.bury_subpage(id, page.subpage(i), true);
                }
            }
            self.process_drops(id, page, theirs);
        }
    }

    /// The process will drop so much that an entry for each subpage would take long, and much of the map: the range is
    /// remembered instead. (None of it is our own doing, for a request of ours is within a page.) A successor is told
    /// only that there is such a range.
    fn removed_at_large(&mut self, id: SpaceId, range: AddrRange) {
        let (mut at, end) = (range.start.subpage(), range.end_subpage());
        while let Some((found, entry)) = self.map.next_in(id, at, end) {
            at = SubpageIndex(found.0 + 1);
            if entry.has_bytes() {
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
    pub(super) fn unmapped(&mut self, id: SpaceId, range: AddrRange, seq: u32, gone: bool) {
        let Some(s) = self.space(id) else { return };
        if let Some(youth) = s.youth.as_mut() {
            youth.own.add(range);
        }
        s.adopt_again(range);
        let second = s.unsettled.left.iter().position(|&r| r == range);
        if second.is_some() || self.replays && self.notes.is_left_for_good(id, seq) {
            // The second message of a move, about its old place: somebody may have come there since. It is that also when
            // a successor applies it again.
            self.notes.set_left_for_good(id, seq);
            self.crash(CrashPoint::Moved);
            let Some(s) = self.space(id) else { return };
            if let Some(i) = second {
                s.unsettled.left.swap_remove(i);
            }
            let left = s.unsettled.left.clone();
            self.notes.set_left(id, &left);
            return;
        }
        self.witnessed(id, range);
        let Some(s) = self.space(id) else { return };
        let (there, displaced) = s.unsettled.leaving(range, gone);
        s.suspects.retain(|x| !range.contains(x.at.start()));
        for part in displaced {
            self.forget_range(id, shadow(part));
        }
        for part in there {
            self.doubt(id, part);
            self.bury(id, part);
            for r in self.perhaps_late(id, part, gone) {
                self.forget_range(id, r);
            }
            if let Some(s) = self.space(id) {
                s.unsettled.changed.add(part);
                s.regions.remove(part);
                s.hearsay.remove(part);
                s.forget_never(part);
                s.restore.disturb(part);
            }
            self.batch_loses(id, part, seq, false);
        }
    }

    /// A range of one call may have holes, where something was moved to before this was heard of it; or it was somebody's
    /// of whom nothing is known, a mapping that has grown for instance. What has come to `part` may be there still, and is
    /// looked for. The rest of `part`.
    fn perhaps_late(&mut self, id: SpaceId, part: AddrRange, gone: bool) -> Vec<AddrRange> {
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
        let arrived: Vec<_> = s.unsettled.arrived.within(part).collect();
        s.unsettled.arrived.remove(part);
        for r in arrived {
            if let Some(s) = self.space(id) {
                s.adopt_later(r);
            }
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
    pub(super) fn moved(
        &mut self,
        id: SpaceId,
        (from, to, len): (Addr, Addr, u64),
        seq: u32,
        gone: bool,
    ) {
        let old = AddrRange {
            start: from,
            end: from.offset(len),
        };
        let new = AddrRange {
            start: to,
            end: to.offset(len),
        };
        let cleared = self.replays && self.notes.is_cleared(id, seq);
        // A predecessor's doubts have moved on already.
        let moved_on = self.replays && self.notes.have_doubts_moved(id, seq);
        if !cleared && !moved_on {
            self.witnessed(id, old);
            self.doubts_move(id, old, new, seq);
        }
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
        if !cleared {
            self.forget_range(id, new);
            self.crash(CrashPoint::NewPlaceCleared);
            self.notes.set_cleared(id, seq);
        }
        for part in aside {
            self.move_entries(id, shadow(part), to.offset(part.start.0 - from.0));
        }
        self.doubt(id, new);
        self.rebury(id, from, new, gone);
        if let Some(s) = self.space(id) {
            s.unsettled.moves.push((new, from));
        }
        for &part in &rest {
            self.doubt(id, part);
            self.doubt_move(id, part, to.offset(part.start.0 - from.0));
            self.bury(id, part);
            let target = |r: AddrRange| to.offset(r.start.0 - from.0);
            let Some(s) = self.space_ref(id) else { return };
            let arrived: Vec<_> = s.unsettled.arrived.within(part).collect();
            for r in s.unsettled.arrived.without(part) {
                self.move_entries(id, r, target(r));
            }
            for r in arrived {
                if gone {
                    self.move_entries(id, r, target(r));
                } else {
                    self.perhaps_moved(id, r, target(r));
                }
            }
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
        s.chase_hits(old, to);
        self.hits_move_unheard(id, old, to);
        let Some(s) = self.space(id) else { return };
        s.sweep_after = super::Nanos(0);
        let left = s.unsettled.left.clone();
        self.notes.set_left(id, &left);
        self.batch_loses(id, old, seq, false);
        if let Some(b) = self.space(id).and_then(|s| s.batch.as_mut()) {
            b.chase(old, to);
        }
        self.batch_loses(id, new, seq, true);
        self.note_hits(id);
        self.crash(CrashPoint::Moved);
    }

    /// What was to be found out where something has come from, or gone to.
    fn doubts_move(&mut self, id: SpaceId, old: AddrRange, new: AddrRange, seq: u32) {
        let mut moved_on = Vec::new();
        let Some(s) = self.space(id) else { return };
        // Only stale entries are left where the child has never been.
        let mut stale: Vec<_> = s
            .suspects
            .extract_if(.., |x| new.contains(x.at.start()))
            .collect();
        // Nothing was there any more: it would have been heard of first.
        s.suspects
            .retain(|x| x.if_there || x.witness == x.at || !new.contains(x.witness.start()));
        // What moves was there, so much is known now; if that was to be found out elsewhere, it still is, and where the
        // process has put itself what moves, it cannot be any more.
        for mut x in s.suspects.extract_if(.., |x| old.contains(x.at.start())) {
            if x.witness == x.at {
                continue;
            } else if new.contains(x.witness.start()) {
                stale.push(x);
            } else {
                x.at = new.start.offset(x.at.start().0 - old.start.0).subpage();
                moved_on.push(x);
            }
        }
        s.suspects.append(&mut moved_on);
        for x in stale {
            self.not_there(id, x.at);
        }
        if let Some(s) = self.space_ref(id) {
            self.notes.set_doubts_moved(id, &s.suspects, seq);
        }
    }

    /// Something has moved from `from` to `to`, and something is at `from` now: what had come to `from`, as was heard of
    /// before, has moved on, or is there still, and who moved is somebody of whom nothing was known (a mapping that had
    /// grown). What is registered at `from` now can only be the former.
    fn perhaps_moved(&mut self, id: SpaceId, from: AddrRange, to: Addr) {
        let end = from.end_subpage();
        let mut at = from.start.subpage();
        while let Some((found, entry)) = self.map.next_in(id, at, end) {
            at = SubpageIndex(found.0 + 1);
            let target = SubpageIndex(found.0 - from.start.subpage().0 + to.subpage().0);
            let is_kept = self.retain(entry);
            self.set_entry(id, target, entry);
            if let (Some(s), true) = (self.space(id), is_kept) {
                let one_of = [(found, true), (target, false)];
                s.suspects.extend(one_of.map(|(at, if_there)| Suspect {
                    at,
                    witness: found,
                    if_there,
                }));
            }
        }
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

    pub(super) fn all_spaces(&self) -> impl Iterator<Item = SpaceId> + use<S> {
        (0..u16::MAX).take(SPACES).map(SpaceId)
    }

    /// An operation that fails while any change of mappings is under way has not failed: every message is
    /// applied, whatever their order.
    pub(super) fn settled(&mut self, id: SpaceId) {
        let Some(s) = self.space(id) else { return };
        if s.is_unregistered() {
            s.unregistered = false;
            if self.is_away(id) {
                let at = Addr(0).subpage();
                return self.stop(id, StopReason::Contradiction { at });
            }
        }
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

    /// While messages of moves and unmaps may be out of order, asks at once whether more are on the way: the
    /// sooner that is settled, the fewer forks can fall into it. So too before a fork's child counts as known. Nothing is mapped at the address; the kernel
    /// looks at that last.
    pub(super) fn step_settle(&mut self, id: SpaceId) -> Option<Op> {
        let s = self.space_ref(id)?;
        let unknown = s.told && !s.known && s.waits_for.is_none();
        (unknown || s.is_unregistered() || !s.unsettled.is_empty()).then_some(Op::Unprotect {
            space: id,
            range: ANYWHERE,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::super::scripted::core_of;
    use super::super::{Input, Nanos, Next, Outcome};
    use super::*;
    use crate::store::api::Location;

    #[test]
    fn a_moves_second_message_is_that_when_it_is_applied_again() {
        let old = AddrRange::new(0x90_0000, 0x91_0000);
        let (mut core, id) = core_of(old);
        let (at, bytes) = (old.start.subpage(), core.frames.take().unwrap());
        // Something has left, and something else has come there: that was heard of, the second message was not.
        core.space(id).unwrap().unsettled.left.push(old);
        core.notes.set_left(id, &[old]);
        let here = Entry::Staged(bytes, 0);
        core.map.replace(id, at, here).unwrap();
        for replays in [false, true] {
            core.replays = replays;
            core.unmapped(id, old, 7, false);
            assert_eq!(core.map.entry(id, at), here);
            assert_eq!(core.notes.left(id), []);
        }
        // Another one is about what is there; so is one of the same number, which has come round.
        core.replays = false;
        core.unmapped(id, old, 7, false);
        assert_eq!(core.map.entry(id, at), Entry::Nothing);
    }

    #[test]
    fn what_came_to_a_place_is_looked_for_when_something_is_there_still() {
        let old = AddrRange::new(0x90_0000, 0x91_0000);
        let new = AddrRange::new(0xa0_0000, 0xa1_0000);
        let at = new.start.subpage();
        for gone in [false, true] {
            let (mut core, id) = core_of(old);
            let bytes = Entry::Staged(core.frames.take().unwrap(), 0);
            core.map.replace(id, old.start.subpage(), bytes).unwrap();
            // Of the last occupant nothing is known, or not that it is what was registered last.
            core.adopted(id, new, Outcome::Done);
            core.moved(id, (old.start, new.start, old.len()), 1, true);
            core.unmapped(id, old, 2, true);
            core.unmapped(id, new, 3, gone);
            let looked_for = core.space(id).unwrap().suspects.iter().any(|x| x.at == at);
            assert_eq!(looked_for, !gone);
            let here = if gone { Entry::Nothing } else { bytes };
            assert_eq!(core.map.entry(id, at), here);
        }
    }

    /// The shell has seen nothing registered of a process whose page is away, while a message was to be read: that it
    /// was `unmapped`, or another. Is the process stopped?
    fn is_stopped(unmapped: bool) -> bool {
        let range = AddrRange::new(0x90_0000, 0x91_0000);
        let (mut core, id) = core_of(range);
        let stored = Entry::Stored(Location(8));
        core.map.replace(id, range.start.subpage(), stored).unwrap();
        // What was registered is not any more.
        core.space(id).unwrap().regions.remove(range);
        core.handle(Nanos(0), Input::NothingRegistered(id));
        let (mut tried, mut stopped) = (0, false);
        for ms in 0..100 {
            let now = Nanos(ms * 1_000_000);
            let Next::Op(op) = core.next(now) else {
                continue;
            };
            stopped |= matches!(op, Op::Stop { .. });
            let outcome = match op {
                Op::Unprotect { .. } if tried == 0 => {
                    tried += 1;
                    assert!(!stopped);
                    if unmapped {
                        core.unmapped(id, range, 1, true);
                    }
                    Outcome::EventsPending
                }
                Op::ReadEvents { .. } => Outcome::Events { count: 0, gone: 0 },
                _ => Outcome::Done,
            };
            core.complete(now, outcome);
        }
        assert_eq!(tried, 1);
        stopped
    }

    #[test]
    fn a_process_of_which_nothing_is_registered_is_stopped_if_anything_should_be() {
        assert!(is_stopped(false));
        assert!(!is_stopped(true));
    }
}
