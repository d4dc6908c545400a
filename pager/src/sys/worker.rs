//! A thread for one piece of tracing, and the agreement with the caller who waits for it for a limited time.
//!
//! Only the end of the tracing thread lets go of a thread that does not stop, so each piece of tracing gets
//! a thread that ends with it.

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::mpsc::sync_channel;
use std::time::{Duration, Instant};

use super::boost;

/// How long a caller waits on for work that it has abandoned: until it is undone, as a rule.
const UNDO_PATIENCE: Duration = Duration::from_millis(500);
const STACK_BYTES: usize = 256 * 1024;

/// The agreement between a caller with a time limit and the thread that works for it: either the work
/// counts, or its traces are removed.
#[derive(Clone, Debug, Default)]
pub(super) struct Agreement(Arc<AtomicU8>);

const OPEN: u8 = 0;
const COMMITTED: u8 = 1;
const ABANDONED: u8 = 2;

impl Agreement {
    /// The work is done. False: the caller has left.
    pub(super) fn commit(&self) -> bool {
        self.settle(COMMITTED)
    }

    /// Whether the caller has left.
    pub(super) fn is_abandoned(&self) -> bool {
        self.0.load(Ordering::Acquire) == ABANDONED
    }

    fn settle(&self, to: u8) -> bool {
        self.0
            .compare_exchange(OPEN, to, Ordering::AcqRel, Ordering::Acquire)
            .is_ok()
    }
}

/// Why there is no answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum NoAnswer {
    /// The time was up; what was begun is undone when it can be.
    TimeUp,
    /// No thread could be started, with the errno.
    NoThread(i32),
}

/// Runs `job` on a thread of its own and waits for it no longer than `patience` and some. A job that
/// commits in time is always waited for.
pub(super) fn on_a_worker<T: Send + 'static>(
    patience: Duration,
    job: impl FnOnce(&Agreement) -> T + Send + 'static,
) -> Result<T, NoAnswer> {
    on_a_worker_while(patience, patience, || (), job)
}

/// As [`on_a_worker`], with something done by the caller each time that it has waited for `step`.
pub(super) fn on_a_worker_while<T: Send + 'static>(
    patience: Duration,
    step: Duration,
    mut meanwhile: impl FnMut(),
    job: impl FnOnce(&Agreement) -> T + Send + 'static,
) -> Result<T, NoAnswer> {
    let agreement = Agreement::default();
    let (answer, answers) = sync_channel(1);
    let theirs = agreement.clone();
    let started = std::thread::Builder::new()
        .name("holo-tracer".to_owned())
        .stack_size(STACK_BYTES)
        .spawn(move || {
            boost::this_thread();
            let result = job(&theirs);
            // A caller that has left does not want it.
            let _ = answer.send(result);
        });
    let worker = match started {
        Ok(worker) => worker,
        Err(e) => return Err(NoAnswer::NoThread(e.raw_os_error().unwrap_or(0))),
    };
    let mut wait = |limit: Duration| {
        let since = Instant::now();
        while since.elapsed() < limit {
            if let Ok(result) = answers.recv_timeout(step) {
                return Some(result);
            }
            meanwhile();
        }
        None
    };
    let mut result = wait(patience);
    if result.is_none() {
        // If it is too late to leave, the answer is on its way.
        let left = agreement.settle(ABANDONED);
        result = wait(if left { UNDO_PATIENCE } else { Duration::MAX });
    }
    match result {
        Some(result) => {
            // Its end lets go of a thread that did not stop: the answer holds from then on.
            let _ = worker.join();
            Ok(result)
        }
        None => Err(NoAnswer::TimeUp),
    }
}
