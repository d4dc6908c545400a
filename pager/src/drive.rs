//! Drives a core against a world: the loop that the serving thread and the simulation share.

#![forbid(unsafe_code)]
#![allow(
    clippy::wildcard_enum_match_arm,
    reason = "all operations but two go to the world"
)]

use holo_proto::AddrRange;

use crate::core::{Core, FrameId, Input, Nanos, Next, Op, Outcome};
use crate::store::api::{PageBytes, PageStore};

/// Whoever performs the core's operations: the kernel, or a simulated one.
pub trait World {
    /// The time now.
    fn now(&mut self) -> Nanos;

    /// Performs one operation. [`Op::Put`] and [`Op::Get`] never come here.
    fn perform(&mut self, op: &Op, pageout: &[AddrRange]) -> Outcome;

    /// The bytes of a frame.
    fn frame(&mut self, frame: FrameId) -> &mut PageBytes;

    /// What has happened meanwhile, if anything (a descriptor became readable, a request ended). Asked
    /// between operations.
    fn poll(&mut self) -> Option<Input>;
}

/// Runs the core until it has nothing to do, or `most` operations were performed. Returns when it wants
/// to run again though nothing happens.
pub fn run<S: PageStore, W: World>(
    core: &mut Core<'_, S>,
    world: &mut W,
    most: usize,
) -> Option<Nanos> {
    for _ in 0..most {
        while let Some(input) = world.poll() {
            let now = world.now();
            core.handle(now, input);
        }
        let now = world.now();
        match core.next(now) {
            Next::Idle(deadline) => return deadline,
            Next::Op(op) => {
                let outcome = match op {
                    Op::Put {
                        ticket,
                        frame,
                        mask,
                    } => {
                        core.store().put(ticket, world.frame(frame), mask);
                        Outcome::Done
                    }
                    Op::Get {
                        ticket,
                        frame,
                        wanted,
                    } => {
                        core.store().get(ticket, &wanted, world.frame(frame));
                        Outcome::Done
                    }
                    other => world.perform(&other, core.pageout_ranges()),
                };
                let now = world.now();
                core.complete(now, outcome);
                while let Some(done) = core.store().poll() {
                    core.handle(now, Input::Store(done));
                }
            }
        }
    }
    Some(Nanos(0))
}
