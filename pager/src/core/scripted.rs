//! For tests of what the simulation meets too seldom: a core with one space whose questions a script answers.

use std::collections::VecDeque;
use std::sync::atomic::AtomicU64;

use holo_proto::{AddrRange, SpaceId, SubpageMask};

use super::{
    BATCH_PAGES, BLOCK_WORDS, Childhood, Config, Core, Input, JOURNAL_WORDS, Memory, NOTE_WORDS,
    Nanos, Next, Op, Outcome, Words,
};
use crate::store::api::{
    Completion, Location, Locations, PageBytes, PageStore, StoreUsage, Ticket,
};

/// Everything is in it, and nothing has bytes.
#[derive(Debug, Default)]
pub(crate) struct Hollow {
    done: VecDeque<Completion>,
    pub(crate) released: Vec<Location>,
}

impl PageStore for Hollow {
    fn put(&mut self, ticket: Ticket, _: &PageBytes, _: SubpageMask) {
        let result = Ok(Locations::default());
        self.done.push_back(Completion::Put { ticket, result });
    }

    fn get(&mut self, ticket: Ticket, _: &Locations, _: &mut PageBytes) {
        let result = Ok(());
        self.done.push_back(Completion::Get { ticket, result });
    }

    fn poll(&mut self) -> Option<Completion> {
        self.done.pop_front()
    }

    fn retain(&mut self, _: Location) {}

    fn release(&mut self, location: Location) {
        self.released.push(location);
    }

    fn usage(&self) -> StoreUsage {
        StoreUsage::default()
    }
}

fn words(count: usize) -> Words<'static> {
    Vec::leak((0..count).map(|_| AtomicU64::new(0)).collect())
}

pub(crate) fn memory() -> Memory<'static> {
    Memory {
        map: words(16 * BLOCK_WORDS),
        journal: words(JOURNAL_WORDS),
        notes: words(NOTE_WORDS),
    }
}

pub(crate) fn config() -> Config {
    Config {
        budget_bytes: 1 << 30,
        frames: (2 * BATCH_PAGES + 2).try_into().unwrap(),
        tracked_pages: 16,
        childhood: Childhood {
            new_ns: 0,
            young_ns: 0,
            small_bytes: 0,
        },
        large_drop_bytes: 1 << 30,
        restless_ns: 100_000_000,
        crash: |_| (),
    }
}

/// A core with one space, `range` of which is registered, with a ring.
pub(crate) fn core_of(range: AddrRange) -> (Core<'static, Hollow>, SpaceId) {
    let mut core = Core::create(memory(), Hollow::default(), config()).unwrap();
    let space = core.add_space(0).unwrap();
    core.handle(Nanos(0), Input::Registered { space, range });
    core.handle(Nanos(0), Input::RingReady(space));
    (core, space)
}

/// Runs the core, a millisecond after each operation, until it sleeps for ever. What the script knows nothing of
/// goes well, and no message ever comes; a request on the ring ends at once, with the result that `populate` gives.
/// To [`Op::NeedRedirty`] it answers with the mask of what is dirty, or, if the process is not stopped, with anything else.
///
/// # Panics
/// If it never sleeps.
pub(crate) fn play(
    core: &mut Core<'static, Hollow>,
    mut populate: impl FnMut(AddrRange) -> i32,
    mut answer: impl FnMut(&Op) -> Option<Outcome>,
) -> Vec<Op> {
    let mut asked = Vec::new();
    let mut frame: Box<PageBytes> = Box::new([0; _]);
    let mut now = Nanos(0);
    for _ in 0..10_000 {
        now = now.after(1_000_000);
        let op = match core.next(now) {
            Next::Op(op) => op,
            Next::Idle(None) => return asked,
            Next::Idle(Some(then)) => {
                now = now.max(then);
                continue;
            }
        };
        asked.push(op);
        let outcome = answer(&op).unwrap_or(match op {
            Op::ReadEvents { .. } => Outcome::Events { count: 0, gone: 0 },
            Op::Get { ticket, wanted, .. } => {
                core.store().get(ticket, &wanted, &mut frame);
                Outcome::Done
            }
            Op::Put { ticket, mask, .. } => {
                core.store().put(ticket, &frame, mask);
                Outcome::Done
            }
            _ => Outcome::Done,
        });
        if let Op::NeedRedirty {
            space,
            mask,
            ticket,
            ..
        } = op
        {
            core.complete(now, Outcome::Done);
            let done = match outcome {
                Outcome::Done => Some(mask),
                Outcome::Mask(done) => Some(done),
                _ => None,
            };
            let input = Input::Redirtied {
                space,
                ticket,
                done,
            };
            core.handle(now, input);
            continue;
        }
        core.complete(now, outcome);
        while let Some(done) = core.store().poll() {
            core.handle(now, Input::Store(done));
        }
        if let (
            Op::Advise {
                space, range, tag, ..
            },
            Outcome::Done,
        ) = (op, outcome)
        {
            let result = populate(range);
            core.handle(now, Input::RingDone { space, tag, result });
        }
    }
    let last = asked.split_off(asked.len().saturating_sub(20));
    panic!("it never sleeps for ever: {last:?}");
}
