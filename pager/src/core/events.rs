//! What each message of the kernel does to the map. Applying one twice is the same as once.

use holo_proto::{Addr, AddrRange, SUBPAGE_BYTES, SpaceId, SubpageIndex, SubpageMask};

use super::event::Event;
use super::fault::Fault;
use super::map::SlotState;
use super::space::{Life, Space, Unsettled, shadow};
use super::{Core, CrashPoint, Entry, FAULTS, JOURNAL_SLOTS, Op, StopReason, USER_END};
use crate::store::api::PageStore;

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
                    self.apply(id, event, seq);
                }
            }
            self.crash(CrashPoint::EventApplied);
            self.journal.clear(i);
            self.crash(CrashPoint::EventCleared);
        }
    }

    fn apply(&mut self, id: SpaceId, event: Event, seq: u32) {
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
            Event::Remap { from, to, len } => self.moved(id, from, to, len),
            Event::Remove(range) => self.removed(id, range, seq),
            Event::Unmap(range) => self.unmapped(id, range),
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
                |i| self.notes.queued(id, i),
                |i, ours| noted.push((i, ours)),
            );
            if let Some(s) = self.space(id) {
                s.batch = Some(b);
            }
        }
        let mut counted = Vec::new();
        for (i, covered) in noted {
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
        let Some(s) = self.space_ref(id) else { return };
        // A quiesce that was asked for before may end before this one's act.
        let quiesce = s.quiesce_count + u64::from(s.quiesce_asked);
        for page in range.pages() {
            let mine = counted
                .iter()
                .find(|(p, _)| *p == page)
                .map_or(SubpageMask::NONE, |(_, m)| *m);
            let theirs = SubpageMask::of_page_in(page, range).minus(mine);
            for i in theirs.iter() {
                self.set_entry(id, page.subpage(i), Entry::Dropping(quiesce));
            }
        }
    }

    /// A range was unmapped, as far as the message is about what is there now.
    fn unmapped(&mut self, id: SpaceId, range: AddrRange) {
        let Some(s) = self.space(id) else { return };
        if let Some(i) = s.unsettled.left.iter().position(|&r| r == range) {
            // The second message of a move, about its old place: somebody may have come there since.
            s.unsettled.left.swap_remove(i);
            let left = s.unsettled.left.clone();
            self.notes.set_left(id, &left);
            return;
        }
        let there = s.unsettled.displaced.without(range);
        for part in s.unsettled.take_displaced(range) {
            self.forget_range(id, shadow(part));
        }
        for part in there {
            self.forget_range(id, part);
            if let Some(s) = self.space(id) {
                s.regions.remove(part);
                s.never.remove(part);
                s.restore.disturb(part);
                if let Some(b) = s.batch.as_mut() {
                    b.lose(part);
                }
            }
        }
    }

    /// The pages of `from` are at `to` now. Entry by entry, and a moved one is gone from its old place:
    /// the second application finds only what the first did not reach.
    fn moved(&mut self, id: SpaceId, from: Addr, to: Addr, len: u64) {
        let old = AddrRange {
            start: from,
            end: from.offset(len),
        };
        let new = AddrRange {
            start: to,
            end: to.offset(len),
        };
        let Some(s) = self.space(id) else { return };
        let was_ours = s.regions.overlapping(old).is_some()
            || s.unsettled.displaced.overlapping(old).is_some();
        if !s.known {
            s.moves.push((old, to));
        }
        // What the message is about may have made room here already, for what has come since.
        let rest = s.unsettled.displaced.without(old);
        let aside = s.unsettled.take_displaced(old);
        // Whoever we believe in the new place has left it: its own message is on the way.
        let leaving: Vec<_> = s
            .regions
            .iter()
            .map(|r| r.intersect(new))
            .filter(|r| !r.is_empty())
            .collect();
        for part in leaving {
            self.move_entries(id, part, shadow(part).start);
            if let Some(s) = self.space(id) {
                s.unsettled.displaced.add(part);
            }
        }
        for part in aside {
            self.move_entries(id, shadow(part), to.offset(part.start.0 - from.0));
        }
        for &part in &rest {
            self.move_entries(id, part, to.offset(part.start.0 - from.0));
        }
        let Some(s) = self.space(id) else { return };
        for part in rest {
            s.regions.remove(part);
            s.never.remove(part);
        }
        s.regions.remove(new);
        if was_ours {
            s.regions.add(new);
        }
        if !s.unsettled.left.contains(&old) {
            s.unsettled.left.push(old);
        }
        s.restore.disturb(old);
        s.restore.disturb(new);
        if let Some(b) = s.batch.as_mut() {
            b.lose(old);
            b.lose(new);
        }
        s.sweep_after = super::Nanos(0);
        let left = s.unsettled.left.clone();
        self.notes.set_left(id, &left);
    }

    fn move_entries(&mut self, id: SpaceId, from: AddrRange, to: Addr) {
        let end = SubpageIndex(from.end.0.div_ceil(SUBPAGE_BYTES));
        let mut at = from.start.subpage();
        while let Some((found, entry)) = self.map.next_in(id, at, end) {
            at = SubpageIndex(found.0 + 1);
            let target = SubpageIndex(found.0 - from.start.subpage().0 + to.subpage().0);
            self.set_entry(id, target, entry);
            // The reference moves along: what the old place held is not given back.
            if self.map.replace(id, found, Entry::Nothing).is_err() {
                self.stop(id, StopReason::TooLarge);
            }
        }
    }

    /// An operation that fails while any change of mappings is under way has not failed: every message is
    /// applied, whatever their order.
    pub(super) fn settled(&mut self, id: SpaceId) {
        let Some(s) = self.space(id) else { return };
        if s.unsettled.is_empty() {
            return;
        }
        let never_heard_of: Vec<_> = s.unsettled.displaced.iter().collect();
        s.unsettled = Unsettled::default();
        self.notes.set_left(id, &[]);
        for part in never_heard_of {
            self.forget_range(id, shadow(part));
        }
    }

    /// The process forked: the child's map is the parent's at this moment. Pages that the parent is about
    /// to drop are not dropped in the child; both zero and the old bytes are right there.
    fn forked(&mut self, parent: SpaceId, fd: u32, seq: u32) {
        let made = self.map.spaces().find(|&s| {
            self.map.fork_seq(s) == Some(seq) && self.map.owner_word(s) == u64::from(fd)
        });
        if let Some(child) = made {
            if self.map.state(child) == SlotState::Active {
                self.errands.push_back(Op::Child {
                    parent,
                    space: child,
                    fd,
                });
                return;
            }
        }
        let Ok(child) = self.map.begin_space(Some(seq), u64::from(fd)) else {
            return self.stop(parent, StopReason::TooLarge);
        };
        self.crash(CrashPoint::ForkBegun);
        let end = USER_END.subpage();
        let mut at = SubpageIndex(0);
        while let Some((found, entry)) = self.map.next_in(parent, at, end) {
            at = SubpageIndex(found.0 + 1);
            match entry {
                Entry::Stored(l) => self.store.retain(l),
                Entry::Staged(f, _) => self.frames.hold(f),
                Entry::Nothing | Entry::Dropping(_) => continue,
            }
            if self.map.replace(child, found, entry).is_err() {
                self.release(entry);
                self.stop(parent, StopReason::TooLarge);
                break;
            }
        }
        self.crash(CrashPoint::ForkCopied);
        let mut space = Box::new(Space::new(child, false, self.tracked_pages));
        if let Some(p) = self.space_ref(parent) {
            space.regions = p.regions.clone();
            space.never = p.never.clone();
            if p.life == Life::Detaching {
                space.life = Life::Detaching;
            }
        }
        self.map.activate(child);
        self.spaces[usize::from(child.0)] = Some(space);
        self.stats.spaces += 1;
        self.errands.push_back(Op::Child {
            parent,
            space: child,
            fd,
        });
        if self
            .space_ref(child)
            .is_some_and(|s| s.life == Life::Detaching)
        {
            self.begin_detach(child);
        }
    }
}
