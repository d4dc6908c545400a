//! Taking over from a core that died: what the memory it left says, and what is in doubt.

use holo_proto::{Addr, AddrRange, SUBPAGE_BYTES};

use super::batch::Batch;
use super::space::{Ring, Space, Unproved};
use super::{Config, Core, Entry, Map, MapError, Memory, Nanos, SlotState, StopReason, USER_END};
use crate::store::api::{Location, PageStore};

impl<'m, S: PageStore> Core<'m, S> {
    /// A successor's core: checks the map, finds the spaces and rebuilds what was not written down. The
    /// shell then says what the kernel has registered ([`super::Input::Registered`]) and when each ring is quiet.
    /// `store` gets the live locations and recovers from them. `now`: from when on the faults that the predecessor read
    /// count as waiting.
    ///
    /// # Errors
    /// The map is damaged, or the store refuses: the processes must be stopped.
    pub fn recover<E: From<MapError>>(
        memory: Memory<'m>,
        config: Config,
        now: Nanos,
        store: impl FnOnce(&[Location]) -> Result<S, E>,
    ) -> Result<Self, E> {
        let mut map = Map::recover(memory.map)?;
        let unfinished: Vec<_> = map
            .spaces()
            .filter(|&s| map.state(s) == SlotState::Building)
            .collect();
        for &s in &unfinished {
            map.end_space(s, |_| ());
        }
        let mut live = Vec::new();
        let mut staged = Vec::new();
        map.for_each_everywhere(|_, _, e| match e {
            Entry::Stored(l) => live.push(l),
            Entry::Staged(f, _) => staged.push(f),
            Entry::Nothing | Entry::Dropping(_) => {}
        });
        let store = store(&live)?;
        let mut core = Self::with_map(map, memory, store, config);
        core.now = now;
        for s in unfinished {
            core.notes.set_doubts(s, &[]);
            core.notes.set_hits(s, std::iter::empty());
        }
        for f in staged {
            core.frames.hold(f);
            core.add_orphan(f);
        }
        let spaces: Vec<_> = core.map.spaces().collect();
        for id in spaces {
            let known = core.map.fork_seq(id).is_none();
            let mut space = Box::new(Space::new(id, known, core.tracked_pages));
            // A removal that the predecessor read may still be on its way: nothing that is marked so is
            // evicted before a quiesce of our own. So none that the predecessor saw counts, and the first of ours
            // ends all marks.
            let mut oldest = None;
            core.map
                .for_each_in(id, AddrRange::new(0, u64::MAX), |_, e| {
                    if let Entry::Dropping(n) = e {
                        oldest = Some(oldest.map_or(n, |m: u64| m.min(n)));
                        space.quiesce_inherited = space.quiesce_inherited.max(n);
                    }
                });
            space.quiesce_count = oldest.unwrap_or(0);
            if core.notes.has_large_drop(id) {
                let all = AddrRange::new(0, USER_END.0);
                space.drops.add(all, space.quiesce_count);
            }
            space.unsettled.left = core.notes.left(id);
            space.suspects = core.notes.doubts(id);
            space.unproved = Some(Unproved::default());
            let all = AddrRange {
                start: USER_END,
                end: Addr(u64::MAX),
            };
            core.map.for_each_in(id, all, |at, _| {
                let start = Addr(at.start().0 & !USER_END.0);
                let end = start.offset(SUBPAGE_BYTES);
                space.unsettled.displaced.add(AddrRange { start, end });
            });
            // What stayed is made dirty; what has gone comes back once.
            for page in core.notes.offered(id) {
                space.restore.push(page.range(), Nanos(0));
            }
            if core.notes.pages(id) > 0 {
                space.batch = Some(Batch::recovered(&core.notes, id));
            } else {
                space.hits.extend(core.notes.hits(id));
            }
            space.ring = Ring::Inherited;
            core.spaces[usize::from(id.0)] = Some(space);
            core.stats.spaces += 1;
            if core.map.state(id) == SlotState::Doomed {
                core.stop(id, StopReason::TooLarge);
            }
        }
        core.replays = true;
        core.apply_journal();
        for s in core.spaces.iter_mut().flatten() {
            s.suspects
                .retain(|x| core.map.entry(s.id, x.at).has_bytes());
        }
        for id in core.map.spaces().collect::<Vec<_>>() {
            core.wake_all(id);
        }
        Ok(core)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::Ordering::Relaxed;

    use holo_proto::SubpageIndex;

    use super::super::event::Event;
    use super::super::journal::Journal;
    use super::super::scripted::{Hollow, config, memory};
    use super::super::{Input, Next, Op, Outcome};
    use super::*;

    fn recovered(memory: Memory<'static>, now: Nanos) -> Core<'static, Hollow> {
        Core::recover(memory, config(), now, |_| {
            Ok::<_, MapError>(Hollow::default())
        })
        .unwrap()
    }

    #[test]
    fn a_fault_that_a_predecessor_read_waits_since_the_take_over() {
        let memory = memory();
        let mut dead = Core::create(memory, Hollow::default(), config()).unwrap();
        let space = dead.add_space(0).unwrap();
        let journal = Journal::open(memory.journal);
        journal.begin(space);
        let fault = Event::Fault {
            at: Addr(1 << 20),
            write: true,
            protect: false,
            thread: 0,
        };
        for (slot, word) in journal.slots().iter().zip(fault.encode()) {
            slot.store(word, Relaxed);
        }
        drop(dead);
        let mut core = recovered(memory, Nanos(7_000_000_000));
        let range = AddrRange::new(1 << 20, 2 << 20);
        core.handle(Nanos(7_000_000_000), Input::Registered { space, range });
        let now = Nanos(7_000_001_000);
        while let Next::Op(op) = core.next(now) {
            let none = Outcome::Events { count: 0, gone: 0 };
            let reads = matches!(op, Op::ReadEvents { .. });
            core.complete(now, if reads { none } else { Outcome::Done });
        }
        assert_eq!(core.stats().latency.count(), 1);
        assert_eq!(core.stats().latency.max_ns(), 1000);
    }

    #[test]
    fn one_quiesce_ends_all_marks_of_a_predecessor() {
        let memory = memory();
        let mut dead = Core::create(memory, Hollow::default(), config()).unwrap();
        let space = dead.add_space(0).unwrap();
        for (at, mark) in [(1, 3), (2, 500)] {
            let entry = Entry::Dropping(mark);
            dead.map.replace(space, SubpageIndex(at), entry).unwrap();
        }
        drop(dead);
        let mut core = recovered(memory, Nanos(0));
        let s = core.space(space).unwrap();
        // None counts that the predecessor saw.
        assert_eq!((s.quiesce_count, s.next_quiesce()), (3, 3));
        assert_eq!(s.ask_quiesce(Nanos(0)), Some(501));
        assert_eq!(s.ask_quiesce(Nanos(0)), None);
        // What is dropped now may be dropped after that one.
        assert_eq!(s.next_quiesce(), 501);
        let input = |count| Input::Quiesced { space, count };
        core.handle(Nanos(0), input(0));
        // It did not come about: the next one has time.
        let s = core.space(space).unwrap();
        assert_eq!(s.ask_quiesce(Nanos(1_000_000)), None);
        assert_eq!(
            core.space(space).unwrap().ask_quiesce(Nanos(1 << 40)),
            Some(501)
        );
        core.handle(Nanos(0), input(501));
        let s = core.space(space).unwrap();
        assert_eq!((s.quiesce_count, s.ask_quiesce(Nanos(0))), (501, Some(502)));
    }
}
