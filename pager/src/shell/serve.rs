//! The serving thread: one loop around the core. It answers faults and evicts, and does nothing else.

use std::sync::Arc;

use holo_proto::SpaceId;

use super::control::{Control, Scalar};
use super::live::{Command, Errand, Live, Queue};
use crate::core::{Core, Input, Nanos, SPACES};
use crate::drive::{self, World as _};
use crate::store::EmbeddedStore;
use crate::store::api::PageStore as _;
use crate::sys::arena::SharedBytes;
use crate::sys::clock;
use crate::sys::spawn::PollSet;

/// Operations between two looks at the command queue.
const SLICE: usize = 256;
/// Longest sleep, so that the counters stay fresh; nanoseconds.
const SLEEP_MAX_NS: u64 = 500_000_000;
/// Sleep while a ring works for us and nothing else is to be done, nanoseconds.
const RING_NAP_NS: u64 = 20_000;

/// The core as the pager runs it.
pub(crate) type LiveCore = Core<'static, EmbeddedStore<SharedBytes>>;

/// Serves until told to finish.
pub(crate) fn serve(
    mut core: LiveCore,
    mut live: Live,
    commands: &Arc<Queue<Command>>,
    control: Control,
) {
    let mut fds = PollSet::with_capacity(SPACES + 1);
    let mut spaces = Vec::with_capacity(SPACES);
    loop {
        let mut finish = false;
        commands.bell.heard();
        while let Some(command) = commands.pop() {
            finish |= take(&mut core, &mut live, command);
        }
        let deadline = drive::run(&mut core, &mut live, SLICE);
        live.flush_errands();
        publish(&mut core, control);
        if finish {
            return;
        }
        if deadline == Some(Nanos(0)) {
            continue; // more to do
        }
        let now = clock::monotonic_ns();
        let mut timeout = deadline.map_or(SLEEP_MAX_NS, |d| d.0.saturating_sub(now));
        if live.rings_busy() {
            timeout = timeout.min(RING_NAP_NS);
        }
        fds.clear();
        spaces.clear();
        live.descriptors(&mut fds, &mut spaces);
        fds.push(commands.bell.as_raw_fd());
        fds.wait(timeout.min(SLEEP_MAX_NS));
        let now = live.now();
        for (i, &space) in spaces.iter().enumerate() {
            if fds.is_ready(i) {
                core.handle(now, Input::Readable(space));
            }
        }
    }
}

/// Carries out a command; true for the last one.
fn take(core: &mut LiveCore, live: &mut Live, command: Command) -> bool {
    let now = live.now();
    let slot = |space: SpaceId| usize::from(space.0);
    match command {
        Command::Input(input) => core.handle(now, input),
        Command::Add { pid, target } => {
            let owner = u64::try_from(target.uffd.as_raw_fd()).unwrap_or(0);
            match core.add_space(owner) {
                Ok(space) => {
                    live.targets[slot(space)] = Some(target);
                    live.errand(Errand::Added { space, pid });
                }
                Err(_) => live.errand(Errand::Refused { pid, target }),
            }
        }
        Command::Parts { space, parts } => match live.targets[slot(space)].as_mut() {
            Some(t) => {
                if let Some(old) = t.parts.replace(parts) {
                    live.errand(Errand::Drop(old));
                }
            }
            None => live.errand(Errand::Drop(parts)),
        },
        Command::Ring { space, ring } => {
            if let Some(t) = live.targets[slot(space)].as_mut() {
                t.set_ring(ring);
                core.handle(now, Input::RingReady(space));
            }
        }
        Command::RingLost(space) => live.lost[slot(space)] = live.targets[slot(space)].is_some(),
        Command::Rest(at) => {
            at.wait();
            at.wait();
        }
        Command::Finish => return true,
    }
    false
}

/// Writes down what was counted.
fn publish(core: &mut LiveCore, control: Control) {
    let usage = core.store().usage();
    if usage.raw_bytes >= control.get(Scalar::StoreRaw) {
        control.set(Scalar::StoreRaw, usage.raw_bytes);
        control.set(Scalar::StoreStored, usage.stored_bytes);
    }
    control.max(Scalar::IntegrityFailures, usage.integrity_failures);
    control.set(Scalar::Usage, core.usage_bytes());
    control.set(Scalar::Spaces, core.spaces_alive() as u64);
    control.set(Scalar::Waiting, core.faults_waiting() as u64);
    core.stats().save(control.stats_words());
}
