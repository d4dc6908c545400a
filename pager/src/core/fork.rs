//! Forks: what the map of a child says, and how it is found out what of it is the child's.

use holo_proto::{Addr, AddrRange, SUBPAGE_BYTES, SpaceId, SubpageIndex};

use super::map::SlotState;
use super::ranges::Ranges;
use super::space::{Life, Space, Suspect, Unproved, Youth};
use super::{Core, CrashPoint, Doing, Entry, GRAVES, Grave, Op, Outcome, StopReason, USER_END};
use crate::store::api::PageStore;

/// Subpages of one mapping of which it is found out at once that they are there.
const PROVED_AT_ONCE: u64 = 4096;

impl<S: PageStore> Core<'_, S> {
    /// The process forked: the child's map is the parent's at the moment of the fork.
    ///
    /// The fork's message may be read after those of what other threads did since. So of what was unmapped
    /// or moved while changes of mappings are under way, and of what may have been dropped by us or by the process in
    /// messages read together with the fork's, the child gets what the map said before. Whether it has anything
    /// mapped there its own userfaultfd tells ([`Core::step_suspects`]). What is given on trial is noted as such
    /// ([`Notes::set_doubts`](super::note::Notes::set_doubts)); what was before is not: after a take-over between the unmap and the
    /// fork's message the child gets the later state.
    pub(super) fn forked(&mut self, parent: SpaceId, fd: u32, seq: u32) {
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
        // What a doomed one has is not all that belongs to it.
        if self.map.state(parent) == SlotState::Doomed {
            return self.forked_without_room(parent, fd, seq);
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
                if let Entry::Staged(f, _) = entry {
                    // Its batch may be over, and nobody else refer to it.
                    self.add_orphan(f);
                }
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
            space.hits.clone_from(&p.hits);
            if let Some(b) = p.batch.as_mut() {
                space.add_hits(b.hits());
                b.has_child(child);
            }
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
        // A grandchild of whoever has a batch under way.
        for b in self
            .spaces
            .iter_mut()
            .flatten()
            .filter_map(|s| s.batch.as_mut())
        {
            if b.may_tell(parent) {
                b.has_child(child);
            }
        }
        self.notes.set_doubts(child, &space.suspects);
        self.notes.set_hits(child, space.hits.iter().copied());
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
    pub(super) fn forked_without_room(&mut self, parent: SpaceId, fd: u32, seq: u32) {
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

    /// The child's map says `entry` of `at`, too. False if there is no room: the child is doomed.
    pub(super) fn give(&mut self, child: SpaceId, at: SubpageIndex, entry: Entry) -> bool {
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

    pub(super) fn newborn(&self, parent: SpaceId) -> Vec<SpaceId> {
        self.space_ref(parent)
            .map_or_else(Vec::new, |s| s.unsettled.newborn.clone())
            .into_iter()
            .filter(|&c| self.space_ref(c).is_some())
            .collect()
    }

    /// The children that were forked just now may or may not have what was in `range`.
    pub(super) fn doubt(&mut self, parent: SpaceId, range: AddrRange) {
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
    /// tells by what it has at the new one. Where the new place was the child's before, in the order of the messages,
    /// that order is believed: that the old place is not the child's may be since the fork left it out (MADV_DONTFORK).
    pub(super) fn doubt_move(&mut self, parent: SpaceId, range: AddrRange, to: Addr) {
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
                let nobody_knows = its_own(target) || occupied;
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

    /// Keeps what the map says of a range that is unmapped or moved away. Not where a mapping that has come
    /// since is registered already: a child's userfaultfd could not tell the two.
    pub(super) fn bury(&mut self, id: SpaceId, range: AddrRange) {
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
    /// place. What lies behind the new place, up to where it had become free, may be its growth. That the child was
    /// forked before is told by what it has at the place from which this moved; and where that was heard of first
    /// which came to that place later and is there still (not `gone`), by what it has where that came from.
    pub(super) fn rebury(&mut self, id: SpaceId, from: Addr, new: AddrRange, gone: bool) {
        let Some(s) = self.space_ref(id) else { return };
        let free_to = s
            .unsettled
            .changed
            .around(new.start)
            .map_or(new.end, |r| r.end.max(new.end));
        let unsettled = &self.spaces[usize::from(id.0)];
        let later = |at: Addr| {
            let s = unsettled.as_ref().filter(|_| !gone)?;
            Some(s.unsettled.origin(at)?.subpage())
        };
        for g in self.graves.iter_mut().filter(|g| g.space == id) {
            let at = g.at.start();
            if new.contains(at) || at >= new.end && at < free_to {
                let origin = from.offset(if new.contains(at) {
                    at.0 - new.start.0
                } else {
                    0
                });
                g.witness = origin.subpage();
                g.witness_too = later(origin);
            } else if new.contains(g.witness.start()) {
                let old = from.offset(g.witness.start().0 - new.start.0);
                g.witness_too = Some(old.subpage());
            }
        }
    }

    pub(super) fn bury_subpage(&mut self, space: SpaceId, at: SubpageIndex, dropped: bool) {
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
    pub(super) fn retain(&mut self, entry: Entry) -> bool {
        match entry {
            Entry::Stored(l) => self.store.retain(l),
            Entry::Staged(f, _) => self.frames.hold(f),
            Entry::Nothing | Entry::Dropping(_) => return false,
        }
        true
    }

    /// The fork that made `id` wiped `range`: so it did for children that `id` had before this was known.
    pub(super) fn wiped(&mut self, id: SpaceId, range: AddrRange) {
        let Some(looked_at) = self.space(id) else {
            return;
        };
        let seen = looked_at.seen.clone();
        for child in self.all_spaces() {
            let unknown = self.space_ref(child).filter(|s| !s.known);
            for r in unknown
                .map_or_else(Ranges::new, |s| s.since_look(id, range, &seen))
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
        for range in std::mem::take(&mut s.wiped) {
            self.wiped(id, range);
        }
        self.child_told(id);
    }

    /// Is all known of a fork's child? Only together with its parent.
    pub(super) fn child_told(&mut self, id: SpaceId) {
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

    /// A message about `range`: something of ours was there. Whatever was to be found out by that is known.
    pub(super) fn witnessed(&mut self, id: SpaceId, range: AddrRange) {
        let Some(s) = self.space(id) else { return };
        let known: Vec<_> = s
            .suspects
            .extract_if(.., |x| {
                x.witness != x.at && range.contains(x.witness.start())
            })
            .collect();
        for x in known.iter().filter(|x| !x.if_there) {
            self.not_there(id, x.at);
        }
    }

    /// What the map says of a doubtful subpage is not so. (What the process is dropping is known by other means.)
    pub(super) fn not_there(&mut self, id: SpaceId, at: SubpageIndex) {
        if self.map.entry(id, at).has_bytes() {
            self.set_entry(id, at, Entry::Nothing);
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
        let Some(witness) = self.space_ref(id).and_then(|s| s.suspects.last()) else {
            return;
        };
        let Some(there) = self.is_there(id, witness.witness, outcome) else {
            return;
        };
        let Some(suspect) = self.space(id).and_then(|s| s.suspects.pop()) else {
            return;
        };
        if there != suspect.if_there {
            self.not_there(id, suspect.at);
        } else if let (Some(s), true) = (self.space(id), suspect.if_there) {
            let start = suspect.witness.start();
            let end = start.offset(SUBPAGE_BYTES);
            s.regions.add(AddrRange { start, end });
        }
        // Until then they are doubtful to a successor, which would find the same.
        if self.space_ref(id).is_some_and(|s| s.suspects.is_empty()) {
            self.notes.set_doubts(id, &[]);
        }
        self.unhold();
    }

    /// What a change of protection tells of a place: whether something is registered there. `None`: nothing now, and it
    /// is tried again, or the process is gone or stopped.
    fn is_there(&mut self, id: SpaceId, at: SubpageIndex, outcome: Outcome) -> Option<bool> {
        match outcome {
            Outcome::Done => return Some(true),
            Outcome::Edge => return Some(false),
            Outcome::Gone => self.gone(id),
            Outcome::EventsPending => self.events_pending(id),
            Outcome::Refused(errno) => self.stop(id, StopReason::Kernel { at, errno }),
            // Short of memory: once more.
            _ => {}
        }
        None
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
        let Some(there) = self.is_there(id, range.start.subpage(), outcome) else {
            return;
        };
        self.progressed(id);
        let single = range.len() == SUBPAGE_BYTES;
        if !there && single {
            self.forget_bytes(id, range);
        }
        if let Some(u) = self.space(id).and_then(|s| s.unproved.as_mut()) {
            if there || single {
                u.at = range.end_subpage();
            } else {
                u.singly_to = range.end_subpage();
            }
        }
    }
}
