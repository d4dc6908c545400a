//! One process of a case: the questions and signals that the process table of [`crate::procs`] has not.

use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context as _, Result};

use crate::procs::{Proc, bounded};
use crate::watchdog::hung;

/// How long a file may take to read that the kernel fills under the process's memory lock.
const READ_DEADLINE: Duration = Duration::from_secs(10);

/// One process, told from a later one of the same number by its start.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Process {
    /// Process id.
    pub pid: i32,
    start_ticks: u64,
}

impl From<&Proc> for Process {
    fn from(proc: &Proc) -> Self {
        Self {
            pid: proc.id.pid,
            start_ticks: proc.id.start_ticks,
        }
    }
}

impl Process {
    /// The process with this id, as it is now.
    #[must_use]
    pub fn of(pid: i32) -> Option<Self> {
        Proc::read(pid).map(|proc| Self::from(&proc))
    }

    fn now(self) -> Option<Proc> {
        Proc::read(self.pid).filter(|proc| Self::from(proc) == self)
    }

    /// Clock ticks since boot at which it started.
    #[must_use]
    pub fn start_ticks(self) -> u64 {
        self.start_ticks
    }

    /// The state letter of its first thread; none when it is gone.
    #[must_use]
    pub fn state(self) -> Option<char> {
        self.now().map(|proc| proc.state)
    }

    /// Says whether any of its threads is there.
    #[must_use]
    pub fn alive(self) -> bool {
        self.now().is_some_and(|proc| proc.is_alive())
    }

    /// The program file that it executes.
    #[must_use]
    pub fn program(self) -> Option<PathBuf> {
        fs::read_link(format!("/proc/{}/exe", self.pid)).ok()
    }

    /// The ids of its threads.
    #[must_use]
    pub fn threads(self) -> Vec<i32> {
        let Ok(entries) = fs::read_dir(format!("/proc/{}/task", self.pid)) else {
            return Vec::new();
        };
        entries
            .flatten()
            .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
            .collect()
    }

    /// Page faults and clock ticks of CPU time so far: what tells a slow process from a stuck one.
    #[must_use]
    pub fn work_done(self) -> Option<(u64, u64)> {
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.pid)).ok()?;
        let (_, tail) = stat.rsplit_once(')')?;
        let fields: Vec<u64> = tail
            .split_ascii_whitespace()
            .map(|field| field.parse().unwrap_or(0))
            .collect();
        Some((
            fields.get(7)? + fields.get(9)?,
            fields.get(11)? + fields.get(12)?,
        ))
    }

    /// Sends a signal, unless the process is gone.
    pub fn signal(self, signal: i32) {
        if let Some(proc) = self.now() {
            proc.signal(signal);
        }
    }

    /// Reads one of its `/proc` files that need its memory lock (`maps`, `smaps`…): a process that hangs
    /// with the lock must not take its watcher with it.
    ///
    /// # Errors
    /// It is gone, or does not let itself be read in time.
    pub fn read(self, file: &str) -> Result<String> {
        let path = format!("/proc/{}/{file}", self.pid);
        let name = path.clone();
        bounded(READ_DEADLINE, move || fs::read_to_string(path))
            .ok_or_else(|| hung(&format!("{name} cannot be read within {READ_DEADLINE:?}")))?
            .with_context(|| format!("reading {name}"))
    }

    /// The value of the `name: N kB` lines of one of its `/proc` files, in KiB, summed.
    ///
    /// # Errors
    /// The process is gone, or has no such line.
    pub fn kib(self, file: &str, name: &str) -> Result<u64> {
        kib_in(&self.read(file)?, name)
            .with_context(|| format!("process {} has no {name} in {file}", self.pid))
    }
}

/// The value of the `name: N kB` lines of a `/proc` file, in KiB, summed; none without one.
pub fn kib_in(text: &str, name: &str) -> Option<u64> {
    let value = |line: &str| {
        line.strip_prefix(name)?
            .strip_prefix(':')?
            .trim()
            .strip_suffix(" kB")?
            .parse::<u64>()
            .ok()
    };
    text.lines().filter_map(value).reduce(|sum, kib| sum + kib)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_own_process_is_seen_and_a_wrong_start_time_is_not() {
        let own = Process::of(i32::try_from(std::process::id()).unwrap()).unwrap();
        assert!(own.alive());
        assert!(
            !Process {
                start_ticks: own.start_ticks + 1,
                ..own
            }
            .alive()
        );
    }
}
