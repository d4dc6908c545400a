//! All threads of a process stopped at once, for the moment, so that no system call is under way.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::inject::{Lost, note_stop};
use super::process;
use super::ptrace::{self, Pace, Stop};
use super::refuse::AttachError;
use super::restart;
use super::worker::{Agreement, NoAnswer, on_a_worker_while};

/// How long all threads together may take to stop. A thread in the middle of a disk access needs
/// milliseconds; one whose page fault waits for the pager needs the pager.
const PATIENCE: Duration = Duration::from_millis(500);
/// How long the stopped ones wait for one that sleeps where nothing wakes it (a disk, a child of a vfork): the next try
/// may find it elsewhere.
const SLEEPER_PATIENCE: Duration = Duration::from_millis(20);
/// How much longer the caller waits for the worker's own answer.
const ANSWER_PATIENCE: Duration = Duration::from_secs(1);
/// How often the caller takes note of ended threads.
const REAP_INTERVAL: Duration = Duration::from_millis(2);
const WHAT: &str = "stopping all threads";

/// Stops all threads of a process once, then lets them go; returns the microseconds from asking the first to
/// letting the last go.
///
/// Afterwards every system call that was under way when this was called is over, or has gone back to its
/// start: what it does to memory it does anew. What the kernel does on its own threads (io_uring, aio, a
/// device) goes on. A call that was writing may return short, as after any stop.
///
/// # Errors
/// [`AttachError::Busy`] when a thread did not stop in time: then all were let go, and nothing is known.
pub fn quiesce(pid: i32) -> Result<u64, AttachError> {
    process::exists(pid)?;
    let traced = Arc::new(Mutex::new(Vec::new()));
    let theirs = traced.clone();
    // The worker may wait in a request to trace one thread for an exec by another to end, and that exec waits
    // for the threads that it has killed to be taken note of.
    let take_note = || {
        let traced = traced.lock().unwrap_or_else(PoisonError::into_inner);
        for &tid in traced.iter().filter(|&&tid| tid != pid) {
            ptrace::reap(tid);
        }
    };
    let answer = on_a_worker_while(
        PATIENCE + ANSWER_PATIENCE,
        REAP_INTERVAL,
        take_note,
        move |agreement| stop_all(pid, &theirs, agreement),
    );
    match answer {
        Ok(Ok(stop_us)) => Ok(stop_us),
        Ok(Err(lost)) => Err(match lost {
            Lost::Gone => AttachError::Exiting { pid },
            Lost::Denied => process::why_denied(pid),
            Lost::Ptrace(errno) | Lost::NoDescriptor(errno) => {
                AttachError::kernel(pid, "ptrace", errno)
            }
            Lost::DidNotStop | Lost::Abandoned | Lost::ThirtyTwoBit => process::why_busy(pid, WHAT),
        }),
        Err(NoAnswer::TimeUp) => Err(process::why_busy(pid, WHAT)),
        Err(NoAnswer::NoThread(errno)) => Err(AttachError::kernel(pid, "clone (in holo)", errno)),
    }
}

/// A traced thread. Dropping it lets it go, if it is stopped; if not, the end of the tracing thread does.
struct Held {
    tid: i32,
    stopped: bool,
    signal: i32,
}

impl Held {
    fn look(&mut self) -> Look {
        if self.stopped {
            return Look::Stopped;
        }
        self.signal = match ptrace::stop_now(self.tid) {
            None => return Look::Runs,
            Some(Stop::Gone) => return Look::Gone,
            Some(Stop::Signal(signal)) => signal,
            Some(Stop::Trap | Stop::Syscall | Stop::Cloned) => 0,
        };
        self.stopped = true;
        if let Ok(mut regs) = ptrace::registers(self.tid) {
            if restart::make_restartable(&mut regs) {
                // It may have been killed meanwhile, and then it does not matter.
                let _ = ptrace::set_registers(self.tid, &regs);
            }
        }
        Look::Stopped
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        if self.look() == Look::Stopped {
            let _ = ptrace::detach(self.tid, self.signal);
        }
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Look {
    Runs,
    Stopped,
    Gone,
}

fn stop_all(pid: i32, traced: &Mutex<Vec<i32>>, agreement: &Agreement) -> Result<u64, Lost> {
    let since = Instant::now();
    let mut held = Vec::new();
    let outcome = hold_all(pid, traced, agreement, since, &mut held);
    let was_stopped = held.iter().any(|thread| thread.stopped);
    drop(held);
    let stop_us = u64::try_from(since.elapsed().as_micros()).unwrap_or(u64::MAX);
    if was_stopped {
        note_stop(stop_us);
    }
    outcome.map(|()| stop_us)
}

fn hold_all(
    pid: i32,
    traced: &Mutex<Vec<i32>>,
    agreement: &Agreement,
    since: Instant,
    held: &mut Vec<Held>,
) -> Result<(), Lost> {
    loop {
        // A thread that still runs may start others: only a listing that holds no new one, after all were
        // seen stopped, is the last.
        let all_stopped = held.iter().all(|thread| thread.stopped);
        let new = seize_new(pid, held, traced)?;
        if !new && all_stopped && !held.is_empty() {
            return Ok(());
        }
        if held.is_empty() {
            return Err(Lost::Gone);
        }
        loop {
            held.retain_mut(|thread| thread.look() != Look::Gone);
            if held.iter().all(|thread| thread.stopped) {
                break;
            }
            let waits_for_sleeper = since.elapsed() > SLEEPER_PATIENCE
                && held
                    .iter()
                    .any(|thread| !thread.stopped && process::sleeps_deeply(pid, thread.tid));
            if waits_for_sleeper || since.elapsed() > PATIENCE || agreement.is_abandoned() {
                return Err(Lost::DidNotStop);
            }
            Pace::Sleep.pause(since.elapsed());
        }
    }
}

/// Traces and stops the threads that are not held yet; whether there were any.
///
/// First all are traced, then all are asked to stop: tracing waits for an exec that is under way, and none
/// should be stopped meanwhile.
fn seize_new(pid: i32, held: &mut Vec<Held>, traced: &Mutex<Vec<i32>>) -> Result<bool, Lost> {
    let first_new = held.len();
    for task in process::tasks(pid) {
        let tid = task.tid;
        if !task.is_stoppable() || held.iter().any(|thread| thread.tid == tid) {
            continue;
        }
        traced
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(tid);
        match ptrace::seize(tid, 0) {
            Ok(()) => held.push(Held {
                tid,
                stopped: false,
                signal: 0,
            }),
            Err(libc::ESRCH) => {}
            // A thread that is ending is refused in the same way as one that is not ours to trace.
            Err(libc::EPERM | libc::EACCES) if process::is_ending(pid, tid) => {}
            Err(libc::EPERM | libc::EACCES) => return Err(Lost::Denied),
            Err(other) => return Err(Lost::Ptrace(other)),
        }
    }
    for thread in &held[first_new..] {
        // One that is gone is noticed when it is looked at.
        let _ = ptrace::interrupt(thread.tid);
    }
    Ok(held.len() > first_new)
}

#[cfg(test)]
mod tests {
    use super::super::inject::longest_stop_us;
    use super::*;
    use crate::sys::testing::Target;

    #[test]
    fn a_stop_of_all_threads_counts_among_the_longest() {
        let target = Target::start();
        let stop_us = quiesce(target.pid).unwrap();
        assert!(longest_stop_us() >= stop_us);
    }
}
