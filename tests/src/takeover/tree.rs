//! Pager, guardian and warden of one session, found by a token in their environment.

use std::fs;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Error, Result, anyhow};

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

/// A part that a process of a session plays.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Serves.
    Pager,
    /// Injects, and starts pagers.
    Guardian,
    /// Starts guardians.
    Warden,
}

impl Role {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Pager, Self::Guardian, Self::Warden];

    fn comm(self) -> &'static str {
        match self {
            Self::Pager => "holo-pager",
            Self::Guardian => "holo-guardian",
            Self::Warden => "holo-warden",
        }
    }
}

/// The processes of one session.
#[derive(Clone, Debug)]
pub struct Tree {
    entry: String,
    /// The guardian that it began with.
    pub guardian: Process,
}

impl Tree {
    /// The session with this token, as soon as there is one; it counts as the command's.
    ///
    /// # Errors
    /// None appears.
    pub fn find(running: &mut Running, token: &str) -> Result<Self> {
        let entry = format!("{TOKEN}={token}");
        let guardian = until(running, "a guardian appears", |_| {
            look(&entry, Role::Guardian)
        })?;
        running.family().adopt(guardian);
        Ok(Self { entry, guardian })
    }

    /// The process that plays this part now.
    #[must_use]
    pub fn now(&self, role: Role) -> Option<Process> {
        look(&self.entry, role)
    }

    /// The pager that lives now.
    #[must_use]
    pub fn pager(&self) -> Option<Process> {
        let pid = self.guardian.pid;
        let text = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children"));
        // Quick, since it may be about to die: most often it is among these.
        text.unwrap_or_default()
            .split_ascii_whitespace()
            .filter_map(|pid| Proc::read(pid.parse().ok()?))
            .find(|proc| proc.is_alive() && proc.comm == Role::Pager.comm())
            .map(|proc| Process::from(&proc))
            .or_else(|| self.now(Role::Pager))
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

    /// The process that plays this part, as soon as there is one that is none of `before`.
    ///
    /// # Errors
    /// None appears.
    pub fn next(&self, running: &mut Running, role: Role, before: &[Process]) -> Result<Process> {
        let next = until(running, &format!("a {} appears", role.comm()), |_| {
            self.now(role).filter(|process| !before.contains(process))
        })?;
        running.family().adopt(next);
        Ok(next)
    }

    /// Waits until none of them is left.
    ///
    /// # Errors
    /// One lives on.
    pub fn await_end(&self, running: &mut Running) -> Result<()> {
        until(running, "the end of the session", |_| {
            Role::ALL
                .iter()
                .all(|&role| self.now(role).is_none())
                .then_some(())
        })
    }
}

fn look(entry: &str, role: Role) -> Option<Process> {
    procs::all()
        .iter()
        .filter(|proc| proc.comm == role.comm() && proc.is_alive())
        .find(|proc| {
            fs::read(format!("/proc/{}/environ", proc.id.pid))
                .is_ok_and(|all| all.split(|byte| *byte == 0).any(|e| e == entry.as_bytes()))
        })
        .map(Process::from)
}
