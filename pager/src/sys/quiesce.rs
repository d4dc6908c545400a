//! All threads of a process stopped at once, for the moment, so that no system call is under way; and what is done to
//! its memory meanwhile.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use holo_proto::{PageIndex, SubpageMask};

use super::inject::{Lost, note_stop};
use super::mem::TargetMem;
use super::pagemap::Pagemap;
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
    while_stopped(&[pid], || ()).map(|((), stop_us)| stop_us)
}

/// Keeps all threads of `pids`, processes that share their memory, stopped for `time`: nothing changes its mappings
/// meanwhile. Otherwise as [`quiesce`].
///
/// # Errors
/// As [`quiesce`].
pub fn hold_still(pids: &[i32], time: Duration) -> Result<u64, AttachError> {
    while_stopped(pids, move || std::thread::sleep(time)).map(|((), stop_us)| stop_us)
}

/// Makes present pages dirty, whether the process may write them or not, by writing back a byte of each while all
/// threads of `pids`, the processes with this memory, are stopped. Returns which are dirty now: not those that are
/// missing or protected by userfaultfd.
///
/// What others write to the byte meanwhile (a device, a process with a system call for it) is undone. So is what a
/// process writes that shares the memory and is not among `pids`, if only because it was made just now.
///
/// # Errors
/// [`AttachError::Busy`] when a thread did not stop in time: nothing was done.
pub fn redirty(
    pids: &[i32],
    mem: TargetMem,
    pagemap: Pagemap,
    page: PageIndex,
    mask: SubpageMask,
) -> Result<SubpageMask, AttachError> {
    let write_back = move || {
        let done = |&i: &usize| mem.write_back(&pagemap, page.subpage(i).start()).is_ok();
        let all = mask.iter().filter(done);
        all.fold(SubpageMask::NONE, SubpageMask::with)
    };
    while_stopped(pids, write_back).map(|(done, _)| done)
}

/// Does `act` while all threads of these processes are stopped, and says how many microseconds that took.
fn while_stopped<T: Send + 'static>(
    pids: &[i32],
    act: impl FnOnce() -> T + Send + 'static,
) -> Result<(T, u64), AttachError> {
    let pid = pids.first().copied().unwrap_or(0);
    for &pid in pids {
        process::exists(pid)?;
    }
    let leaders = pids.to_vec();
    let pids = leaders.clone();
    let traced = Arc::new(Mutex::new(Vec::new()));
    let theirs = traced.clone();
    // The worker may wait in a request to trace one thread for an exec by another to end, and that exec waits
    // for the threads that it has killed to be taken note of.
    let take_note = || {
        let traced = traced.lock().unwrap_or_else(PoisonError::into_inner);
        for &tid in traced.iter().filter(|tid| !leaders.contains(tid)) {
            ptrace::reap(tid);
        }
    };
    let answer = on_a_worker_while(
        PATIENCE + ANSWER_PATIENCE,
        REAP_INTERVAL,
        take_note,
        move |agreement| stop_all(&pids, &theirs, agreement, act),
    );
    match answer {
        Ok(Ok(done)) => Ok(done),
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
    pid: i32,
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

fn stop_all<T>(
    pids: &[i32],
    traced: &Mutex<Vec<i32>>,
    agreement: &Agreement,
    act: impl FnOnce() -> T,
) -> Result<(T, u64), Lost> {
    let since = Instant::now();
    let mut held = Vec::new();
    let outcome = match hold_all(pids, traced, agreement, since, &mut held) {
        Ok(()) if agreement.is_abandoned() => Err(Lost::Abandoned),
        Ok(()) => Ok(act()),
        Err(lost) => Err(lost),
    };
    let was_stopped = held.iter().any(|thread| thread.stopped);
    drop(held);
    let stop_us = u64::try_from(since.elapsed().as_micros()).unwrap_or(u64::MAX);
    if was_stopped {
        note_stop(stop_us);
    }
    outcome.map(|done| (done, stop_us))
}

fn hold_all(
    pids: &[i32],
    traced: &Mutex<Vec<i32>>,
    agreement: &Agreement,
    since: Instant,
    held: &mut Vec<Held>,
) -> Result<(), Lost> {
    loop {
        // A thread that still runs may start others: only a listing that holds no new one, after all were
        // seen stopped, is the last.
        let all_stopped = held.iter().all(|thread| thread.stopped);
        let new = seize_new(pids, held, traced)?;
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
                && held.iter().any(|thread| {
                    !thread.stopped && process::sleeps_deeply(thread.pid, thread.tid)
                });
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
fn seize_new(pids: &[i32], held: &mut Vec<Held>, traced: &Mutex<Vec<i32>>) -> Result<bool, Lost> {
    let first_new = held.len();
    let all = pids
        .iter()
        .flat_map(|&pid| process::tasks(pid).into_iter().map(move |t| (pid, t)));
    for (pid, task) in all {
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
                pid,
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
    use holo_proto::SUBPAGE_BYTES;

    use super::super::inject::longest_stop_us;
    use super::super::procfs;
    use super::*;
    use crate::sys::advise::pageout;
    use crate::sys::testing::{self, Target};

    /// A process with a page that is filled, offered, and may not be written any more.
    fn offered() -> (Target, PageIndex) {
        let mut target = Target::start();
        let all = target.map(32);
        let page = PageIndex(all.start.page().0 + 1);
        target.fill(page.range(), 7);
        // What is on a processor's list is not offered, and stays.
        testing::drain_cpu_lists();
        assert_eq!(target.madvise(page.range(), libc::MADV_FREE), 0);
        let read_only = [all.start.0, all.len(), 1, 0, 0];
        assert_eq!(target.syscall(libc::SYS_mprotect, read_only), 0);
        (target, page)
    }

    #[test]
    fn what_was_made_dirty_in_a_stop_is_not_dropped() {
        let (mut target, page) = offered();
        let dirtied = SubpageMask::NONE.with(1).with(3);
        let open = || {
            let mem = TargetMem::open(target.pid).unwrap();
            (mem, Pagemap::open(target.pid).unwrap())
        };
        let ((mem, given), (_, pagemap)) = (open(), open());
        let unmapped = [page.subpage(15).start().0, SUBPAGE_BYTES, 0, 0, 0];
        assert_eq!(target.syscall(libc::SYS_munmap, unmapped), 0);
        let asked = dirtied.with(15);
        assert_eq!(redirty(&[target.pid], mem, given, page, asked), Ok(dirtied));
        let mut mapped = page.range();
        mapped.end = page.subpage(15).start();
        for _ in 0..3 {
            testing::drain_cpu_lists();
            pageout(&target.pidfd, &[mapped]).unwrap();
        }
        let left = pagemap.look_page(page).unwrap().present;
        assert_eq!(left.and(dirtied), dirtied);
        assert!(left.count() < 15, "nothing was dropped");
        for i in dirtied.iter() {
            assert_eq!(target.peek(page.subpage(i).start()), 7);
        }
    }

    #[test]
    fn what_cannot_be_stopped_is_not_touched() {
        let (target, page) = offered();
        let mem = TargetMem::open(target.pid).unwrap();
        let pagemap = Pagemap::open(target.pid).unwrap();
        let own = i32::try_from(std::process::id()).unwrap();
        let refused = redirty(&[target.pid, own], mem, pagemap, page, SubpageMask::ALL);
        assert_eq!(refused, Err(AttachError::Myself { pid: own }));
    }

    #[test]
    fn a_process_that_is_kept_still_does_nothing() {
        let mut target = Target::start();
        let page = target.map(1);
        let pid = target.pid;
        let time = Duration::from_millis(200);
        let still = std::thread::spawn(move || hold_still(&[pid], time));
        while procfs::state_of(pid).unwrap() != b't' {
            std::thread::yield_now();
        }
        let since = Instant::now();
        target.fill(page, 7);
        assert!(since.elapsed() > time / 2);
        assert!(still.join().unwrap().unwrap() >= 200_000);
    }

    #[test]
    fn a_stop_of_all_threads_counts_among_the_longest() {
        let target = Target::start();
        let stop_us = quiesce(target.pid).unwrap();
        assert!(longest_stop_us() >= stop_us);
    }
}
