//! Guardian and pager of one session, found by a token in their environment, and killed one by one.

use std::fs;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Error, Result, anyhow, ensure};

use crate::procs::{self, Proc};
use crate::torture::harness::launch::Running;
use crate::torture::harness::process::Process;

/// Environment variable by which a session's processes are known.
pub const TOKEN: &str = "HOLO_TAKEOVER_CASE";

/// The pause between two looks at something that is to be met at once.
const GLANCE: Duration = Duration::from_micros(300);

/// How long anything may take that has to happen by itself; the machine may be busy.
const PATIENCE: Duration = Duration::from_secs(30);

/// Looks until `probe` finds something.
///
/// # Errors
/// The command ends first, or it takes too long: then everything is dumped and killed.
pub fn until<T>(
    running: &mut Running,
    what: &str,
    mut probe: impl FnMut(&mut Running) -> Option<T>,
) -> Result<T> {
    let end = Instant::now() + PATIENCE;
    loop {
        if let Some(found) = probe(running) {
            return Ok(found);
        }
        if !running.goes_on_for(Duration::ZERO)? {
            return Err(ended(running, what));
        }
        if Instant::now() >= end {
            return Err(running.hung(&format!("waited too long for {what}")));
        }
        thread::sleep(GLANCE);
    }
}

/// The error of a command that has ended before `what`, with what it said on standard error.
pub fn ended(running: &mut Running, what: &str) -> Error {
    let said = match running.wait_for(what) {
        Err(error) => error,
        Ok(()) => anyhow!("the command said {what:?}"),
    };
    match running.wait() {
        Ok(code) => said.context(format!("exit code {code}")),
        Err(error) => said.context(error),
    }
}

/// The guardian of one session.
#[derive(Clone, Copy, Debug)]
pub struct Tree {
    /// The guardian.
    pub guardian: Process,
}

impl Tree {
    /// The guardian whose environment has this token, if there is one.
    #[must_use]
    pub fn look(token: &str) -> Option<Self> {
        let entry = format!("{TOKEN}={token}");
        procs::all()
            .iter()
            .filter(|proc| proc.comm == "holo-guardian" && proc.is_alive())
            .find(|proc| {
                fs::read(format!("/proc/{}/environ", proc.id.pid))
                    .is_ok_and(|all| all.split(|byte| *byte == 0).any(|e| e == entry.as_bytes()))
            })
            .map(|proc| Self {
                guardian: Process::from(proc),
            })
    }

    /// The guardian with this token, as soon as there is one; its session counts as the command's.
    ///
    /// # Errors
    /// None appears.
    pub fn find(running: &mut Running, token: &str) -> Result<Self> {
        let tree = until(running, "a guardian appears", |_| Self::look(token))?;
        running.family().adopt(tree.guardian);
        Ok(tree)
    }

    /// The pager that lives now, among the guardian's children.
    #[must_use]
    pub fn pager(&self) -> Option<Process> {
        let pid = self.guardian.pid;
        let text = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).ok()?;
        text.split_ascii_whitespace()
            .filter_map(|pid| Proc::read(pid.parse().ok()?))
            .find(|proc| proc.is_alive() && proc.comm == "holo-pager")
            .map(|proc| Process::from(&proc))
    }

    /// A pager, as soon as there is one; with `after`, another one than that.
    ///
    /// # Errors
    /// None appears.
    pub fn next_pager(&self, running: &mut Running, after: Option<Process>) -> Result<Process> {
        until(running, "a pager appears", |_| {
            self.pager().filter(|&pager| Some(pager) != after)
        })
    }
}

/// Waits until a process has gone.
///
/// # Errors
/// It lives on.
pub fn await_end(process: Process, name: &str) -> Result<()> {
    let end = Instant::now() + PATIENCE;
    while process.alive() {
        ensure!(Instant::now() < end, "{name} {} lives on", process.pid);
        thread::sleep(GLANCE);
    }
    Ok(())
}
