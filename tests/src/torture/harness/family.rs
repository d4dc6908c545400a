//! The processes of one case: whatever it started, also what has left its parent.
//!
//! A case's command carries a mark in its environment, nested in the suite's own (see [`crate::procs`]).
//! A process belongs to the case if it has the mark, or a parent that belonged when it was seen. Only
//! processes that are younger than the case are asked, and none is ever signalled that was not found
//! this way.

use std::collections::{HashMap, HashSet};
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use super::process::Process;
use crate::procs::{self, Proc};

pub use crate::procs::RUN_ID_VAR as MARK_VARIABLE;

/// Reading an environment needs the process's memory lock: past this it is given up.
const ENVIRON_WAIT: Duration = Duration::from_secs(1);

/// The processes that one command started.
#[derive(Debug)]
pub struct Family {
    mark: String,
    since: u64,
    members: HashSet<Process>,
    strangers: HashSet<Process>,
}

impl Family {
    /// A family for the command that will carry the mark; to be made before the command starts.
    #[must_use]
    pub fn new(mark: String) -> Self {
        Self {
            mark,
            since: ticks_now(),
            members: HashSet::new(),
            strangers: HashSet::new(),
        }
    }

    /// The mark for a case of this name: unique, and within the suite's if there is one.
    #[must_use]
    pub fn mark_for(case: &str) -> String {
        static COUNT: AtomicU64 = AtomicU64::new(0);
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let own = format!("{}-{count}-{case}", std::process::id());
        match std::env::var(MARK_VARIABLE) {
            Ok(suite) => format!("{suite}/{own}"),
            Err(_) => own,
        }
    }

    /// Takes a process in that is known to belong: the command itself, just started.
    ///
    /// Its environment may not tell: between two images it is empty, and some programs write their title
    /// over it.
    pub fn adopt(&mut self, process: Process) {
        self.members.insert(process);
    }

    /// The processes that run now, oldest first; dead ones that nobody collected are not counted.
    pub fn members(&mut self) -> Vec<Proc> {
        let all = procs::all();
        let by_pid: HashMap<i32, Process> = all
            .iter()
            .map(|proc| (proc.id.pid, Process::from(proc)))
            .collect();
        loop {
            let before = self.members.len();
            for proc in &all {
                let process = Process::from(proc);
                if proc.id.start_ticks < self.since || self.members.contains(&process) {
                    continue;
                }
                let parent = by_pid.get(&proc.parent);
                if parent.is_some_and(|parent| self.members.contains(parent))
                    || self.is_marked(proc)
                {
                    self.members.insert(process);
                }
            }
            // A child may stand before its parent in the list.
            if self.members.len() == before {
                break;
            }
        }
        let belongs = |proc: &Proc| self.members.contains(&Process::from(proc)) && proc.is_alive();
        let mut alive: Vec<Proc> = all.into_iter().filter(belongs).collect();
        alive.sort_by_key(|proc| (proc.id.start_ticks, proc.id.pid));
        alive
    }

    fn is_marked(&mut self, proc: &Proc) -> bool {
        let process = Process::from(proc);
        if self.strangers.contains(&process) || !proc.is_alive() {
            return false;
        }
        let (pid, mark) = (proc.id.pid, self.mark.clone());
        let look = move || {
            // One reading for both questions: the image may be replaced between two.
            procs::environ(pid).map(|environ| procs::has_mark(&environ, &mark))
        };
        // One that does not let itself be read in time would stop every later look as well: it is left
        // to its parentage.
        let looked = procs::bounded(ENVIRON_WAIT, look).unwrap_or(Some(false));
        if looked == Some(false) {
            // It cannot get the mark later, except by exec from a member, which is a member then.
            self.strangers.insert(process);
        }
        // None: between two images, or gone. Nothing to say yet.
        looked == Some(true)
    }

    /// The members that execute this program file.
    pub fn running(&mut self, program: &Path) -> Vec<Process> {
        self.members()
            .iter()
            .map(Process::from)
            .filter(|process| process.program().as_deref() == Some(program))
            .collect()
    }
}

/// The start time that a process gets which starts now: that of one that does.
fn ticks_now() -> u64 {
    let Ok(mut child) = Command::new("/bin/true").spawn() else {
        return 0;
    };
    let process = i32::try_from(child.id()).ok().and_then(Process::of);
    // It cannot fail otherwise than by being collected already.
    let _ = child.wait();
    process.map_or(0, Process::start_ticks)
}

#[cfg(test)]
mod tests {
    use std::thread;
    use std::time::Instant;

    use super::super::LOOK_EVERY;
    use super::*;

    #[test]
    fn an_orphan_that_left_its_session_still_belongs() {
        let mark = Family::mark_for("orphan");
        let mut family = Family::new(mark.clone());
        let mut child = Command::new("/bin/sh")
            .args(["-c", "setsid sleep 30 & exit 0"])
            .env(MARK_VARIABLE, &mark)
            .spawn()
            .unwrap();
        child.wait().unwrap();
        let deadline = Instant::now() + Duration::from_secs(5);
        let found = loop {
            let members = family.members();
            if members.iter().any(|proc| proc.comm == "sleep") {
                break members;
            }
            assert!(Instant::now() < deadline, "the orphan was not found");
            thread::sleep(LOOK_EVERY);
        };
        for proc in &found {
            proc.signal(libc::SIGKILL);
        }
        assert!(
            found
                .iter()
                .all(|proc| proc.id.pid.cast_unsigned() != std::process::id())
        );
    }

    #[test]
    fn a_process_without_the_mark_is_a_stranger() {
        let mut family = Family::new("nobody-has-this".to_owned());
        let mut child = Command::new("/bin/sleep").arg("5").spawn().unwrap();
        assert!(family.members().is_empty());
        child.kill().unwrap();
        child.wait().unwrap();
    }
}
