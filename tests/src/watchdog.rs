//! Deadlines that say what hung before they end it.
//!
//! The order is the point: first every thread of every process in question is described, then they are
//! killed, all of them. A process that waits for a page from a pager can be freed by nothing but a kill,
//! and its state is gone with it.
//!
//! [`Watchdog::guard`] does both. A test that ends a wait by itself calls [`give_up`], or [`dump`] where it fails by
//! an error: its own guards kill what it started as soon as it goes on.

use std::collections::HashSet;
use std::io::{self, Write as _};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use crate::procs::{self, Proc, ProcId, RUN_ID_VAR};

/// The longest that the look at one process may take: longer means that the look itself is stuck.
const LOOK_LIMIT: Duration = Duration::from_secs(5);
/// How long processes may take to end after SIGTERM.
const TERM_LIMIT: Duration = Duration::from_secs(1);
/// How long processes may take to disappear after SIGKILL.
const KILL_LIMIT: Duration = Duration::from_secs(10);
/// How often a guard notes its process's descendants, so that a later orphan is still known.
const TICK: Duration = Duration::from_millis(500);
const POLL: Duration = Duration::from_millis(20);

/// The processes that a watchdog answers for.
#[derive(Debug, Clone)]
pub(crate) struct Family {
    root: i32,
    run_id: Option<String>,
}

impl Family {
    /// This process's descendants, and those marked with `run_id`.
    pub(crate) fn of_this_process(run_id: Option<String>) -> Self {
        Self {
            root: own_pid(),
            run_id,
        }
    }

    /// This process's descendants, and those with its own mark.
    fn of_this_suite() -> Self {
        Self::of_this_process(std::env::var(RUN_ID_VAR).ok())
    }

    /// Its members that are alive, without this process and its ancestors; `known` are members wherever
    /// they are now.
    pub(crate) fn members(&self, known: &HashSet<ProcId>) -> Vec<Proc> {
        let table = procs::all();
        let spared = procs::ancestry(&table, self.root);
        let below: HashSet<i32> = procs::descendants(&table, self.root)
            .iter()
            .map(|proc| proc.id.pid)
            .collect();
        let run_id = self.run_id.clone();
        let others: Vec<i32> = table
            .iter()
            .map(|proc| proc.id.pid)
            .filter(|pid| !below.contains(pid))
            .collect();
        // Reading an environment may block on a stuck process of somebody else's.
        let marked = run_id.map_or_else(HashSet::new, |run_id| {
            let look = move || {
                others
                    .into_iter()
                    .filter(|pid| procs::is_marked(*pid, &run_id))
                    .collect()
            };
            procs::bounded(LOOK_LIMIT, look).unwrap_or_default()
        });
        let is_member = |proc: &Proc| {
            below.contains(&proc.id.pid)
                || marked.contains(&proc.id.pid)
                || known.contains(&proc.id)
        };
        table
            .into_iter()
            .filter(|proc| proc.is_alive() && !spared.contains(&proc.id.pid) && is_member(proc))
            .collect()
    }
}

/// Describes on standard error what [`everything`] waits for; kills nothing.
pub fn dump(why: &str) {
    tell(why, &everything());
}

/// [`dump`], and then fails the test.
///
/// # Panics
/// Always.
#[track_caller]
pub fn give_up(why: &str) -> ! {
    dump(why);
    panic!("{why}");
}

/// [`dump`], and the error that says why.
pub(crate) fn hung(why: &str) -> anyhow::Error {
    dump(why);
    anyhow::anyhow!("{why}")
}

/// This process, its descendants, and those marked with the same `HOLO_TEST_RUN`.
pub(crate) fn everything() -> Vec<Proc> {
    let members = Family::of_this_suite().members(&HashSet::new());
    with_own(members)
}

fn with_own(members: Vec<Proc>) -> Vec<Proc> {
    Proc::read(own_pid()).into_iter().chain(members).collect()
}

fn tell(why: &str, procs: &[Proc]) {
    // Straight to the descriptor: the test harness holds back what its own printing macros write. Locked, since
    // several tests may give up at once.
    let mut stderr = io::stderr().lock();
    let _ = writeln!(stderr, "\nwatchdog: {why}; what everything waits for:");
    let _ = stderr.write_all(describe_all(procs).as_bytes());
}

/// Describes every process with every thread; never waits long for any of them.
pub(crate) fn describe_all(procs: &[Proc]) -> String {
    procs
        .iter()
        .map(|proc| {
            let target = proc.clone();
            procs::bounded(LOOK_LIMIT, move || procs::describe(&target)).unwrap_or_else(|| {
                format!(
                    "process {} ({}): /proc did not answer in {LOOK_LIMIT:?}\n",
                    proc.id.pid, proc.comm
                )
            })
        })
        .collect()
}

/// Kills what `find` finds until it finds nothing; returns what would not die.
///
/// All at once and again each round: a pager killed before its targets leaves them stuck, and targets may
/// fork meanwhile.
pub(crate) fn kill_all(find: impl Fn() -> Vec<Proc>) -> Vec<Proc> {
    let deadline = Instant::now() + KILL_LIMIT;
    loop {
        let left = find();
        if left.is_empty() || Instant::now() > deadline {
            return left;
        }
        for proc in &left {
            proc.signal(libc::SIGKILL);
        }
        thread::sleep(POLL);
    }
}

/// Asks what `find` finds to end, and kills it when it does not soon; returns what would not die.
pub(crate) fn end_all(find: impl Fn() -> Vec<Proc>) -> Vec<Proc> {
    for proc in &find() {
        proc.signal(libc::SIGTERM);
        // A stopped process takes the signal only when it goes on.
        proc.signal(libc::SIGCONT);
    }
    let deadline = Instant::now() + TERM_LIMIT;
    while Instant::now() < deadline && !find().is_empty() {
        thread::sleep(POLL);
    }
    kill_all(find)
}

/// Where [`Watchdog::guard`] is found.
#[derive(Debug)]
pub enum Watchdog {}

impl Watchdog {
    /// Bounds what happens until the guard is dropped.
    ///
    /// When the time is over, every thread of this process, of its descendants (orphaned ones too, when
    /// they lived for half a second before) and of everything marked with the same `HOLO_TEST_RUN` is
    /// described on standard error; then all of them are killed and this process aborts, with whatever
    /// other tests it was running. The mark is the whole suite's: a helper that is to end alone gets one of
    /// its own, `<the suite's>/<something>`.
    ///
    /// # Panics
    /// Where no thread can be started.
    #[must_use = "the bound ends when the guard is dropped"]
    pub fn guard(name: &str, limit: Duration) -> Guard {
        let bound = Arc::new(Bound::default());
        let guard = Guard(Arc::clone(&bound));
        let name = name.to_owned();
        let deadline = Instant::now() + limit;
        thread::Builder::new()
            .name("watchdog".to_owned())
            .spawn(move || {
                let family = Family::of_this_suite();
                let mut known = HashSet::new();
                while !bound.is_over_within(TICK, deadline) {
                    let table = procs::all();
                    known.extend(
                        procs::descendants(&table, family.root)
                            .into_iter()
                            .map(|proc| proc.id),
                    );
                }
                if bound.end(Phase::Expired) == Phase::Expired {
                    expire(&name, limit, &family, &known);
                }
            })
            .expect("a thread for the watchdog");
        guard
    }
}

/// A running bound; ends when dropped.
#[derive(Debug)]
pub struct Guard(Arc<Bound>);

impl Drop for Guard {
    fn drop(&mut self) {
        if self.0.end(Phase::Disarmed) == Phase::Expired {
            // What the test waited for was killed just now. It must not go on and end with a verdict of
            // its own before the watchdog has said everything.
            loop {
                thread::park();
            }
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
enum Phase {
    #[default]
    Armed,
    Disarmed,
    Expired,
}

/// What a guard and its thread share: whichever ends the bound first has ended it.
#[derive(Debug, Default)]
struct Bound {
    phase: Mutex<Phase>,
    changed: Condvar,
}

impl Bound {
    /// Ends an armed bound; returns how it has ended.
    fn end(&self, how: Phase) -> Phase {
        let mut phase = self.phase.lock().unwrap_or_else(PoisonError::into_inner);
        if *phase == Phase::Armed {
            *phase = how;
            self.changed.notify_all();
        }
        *phase
    }

    /// Waits for the end, the deadline or `tick`; says whether it was one of the first two.
    fn is_over_within(&self, tick: Duration, deadline: Instant) -> bool {
        let left = deadline.saturating_duration_since(Instant::now());
        let phase = self.phase.lock().unwrap_or_else(PoisonError::into_inner);
        let waited = self
            .changed
            .wait_timeout_while(phase, left.min(tick), |phase| *phase == Phase::Armed);
        let (phase, _) = waited.unwrap_or_else(PoisonError::into_inner);
        *phase != Phase::Armed || Instant::now() >= deadline
    }
}

fn expire(name: &str, limit: Duration, family: &Family, known: &HashSet<ProcId>) -> ! {
    let why = format!("{name} is not done after {limit:?}");
    tell(&why, &with_own(family.members(known)));
    let mut stderr = io::stderr();
    for proc in kill_all(|| family.members(known)) {
        let _ = writeln!(
            stderr,
            "watchdog: process {} ({}) does not die",
            proc.id.pid, proc.comm
        );
    }
    let _ = writeln!(stderr, "watchdog: {name} ended");
    std::process::abort();
}

pub(crate) fn own_pid() -> i32 {
    i32::try_from(std::process::id())
        .expect("process numbers fit, they are positive ints in the kernel")
}
