//! Single processes as `/proc` shows them, and signals to them.
//!
//! Only files that the kernel answers without the process's memory lock are read here, so that a
//! process that hangs in that lock cannot make its watcher hang too. The exceptions say so.

use std::fs;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, ensure};

/// One process: its id, and its start time, without which an id can mean another process later.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Process {
    /// Process id.
    pub pid: u32,
    /// Start time in clock ticks since boot.
    pub started: u64,
}

/// The fields of `/proc/PID/stat` that matter here.
#[derive(Clone, Debug)]
pub struct Stat {
    /// The process.
    pub process: Process,
    /// Name of the main thread.
    pub name: String,
    /// `R`, `S`, `D`, `T`, `Z`…
    pub state: char,
    /// Parent's process id.
    pub parent: u32,
}

impl Stat {
    fn parse(line: &str) -> Option<Self> {
        // The name may hold anything, blanks and parentheses included: it ends at the last one.
        let (head, tail) = line.rsplit_once(") ")?;
        let (pid, name) = head.split_once(" (")?;
        let fields: Vec<&str> = tail.split_ascii_whitespace().collect();
        Some(Self {
            process: Process {
                pid: pid.parse().ok()?,
                started: fields.get(19)?.parse().ok()?,
            },
            name: name.to_owned(),
            state: fields.first()?.chars().next()?,
            parent: fields.get(1)?.parse().ok()?,
        })
    }

    /// Reads the state of one process; none when it is gone.
    #[must_use]
    pub fn read(pid: u32) -> Option<Self> {
        Self::parse(&fs::read_to_string(format!("/proc/{pid}/stat")).ok()?)
    }

    /// Reads the state of every process.
    #[must_use]
    pub fn all() -> Vec<Self> {
        let Ok(entries) = fs::read_dir("/proc") else {
            return Vec::new();
        };
        entries
            .flatten()
            .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
            .filter_map(Self::read)
            .collect()
    }
}

impl Process {
    /// The process with this id, as it is now.
    #[must_use]
    pub fn of(pid: u32) -> Option<Self> {
        Stat::read(pid).map(|stat| stat.process)
    }

    /// Its state letter; none when it is gone.
    #[must_use]
    pub fn state(self) -> Option<char> {
        Stat::read(self.pid)
            .filter(|stat| stat.process == self)
            .map(|stat| stat.state)
    }

    /// Says whether it still runs code (a zombie does not).
    #[must_use]
    pub fn alive(self) -> bool {
        self.state()
            .is_some_and(|state| state != 'Z' && state != 'X')
    }

    /// The program file that it executes.
    #[must_use]
    pub fn program(self) -> Option<PathBuf> {
        fs::read_link(format!("/proc/{}/exe", self.pid)).ok()
    }

    /// The ids of its threads.
    #[must_use]
    pub fn threads(self) -> Vec<u32> {
        let Ok(entries) = fs::read_dir(format!("/proc/{}/task", self.pid)) else {
            return Vec::new();
        };
        entries
            .flatten()
            .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
            .collect()
    }

    /// Sends a signal by its name (`KILL`, `STOP`…), unless the process is gone.
    ///
    /// # Errors
    /// No shell could be started.
    pub fn signal(self, name: &str) -> Result<()> {
        if !self.alive() {
            return Ok(());
        }
        // The shell's own kill: no system call wrapper, hence no unsafe code, is needed here.
        Command::new("/bin/sh")
            .args(["-c", "kill -s \"$0\" \"$1\"", name, &self.pid.to_string()])
            .stderr(Stdio::null())
            .status()
            .context("running kill")?;
        Ok(())
    }

    /// The value of one `name: N kB` line of a `/proc` file, in KiB, summed over its occurrences.
    ///
    /// The `smaps` files take the process's memory lock: only for processes known to be well.
    ///
    /// # Errors
    /// The process is gone, or has no such line.
    pub fn kib(self, file: &str, name: &str) -> Result<u64> {
        let path = format!("/proc/{}/{file}", self.pid);
        let text = fs::read_to_string(&path).with_context(|| format!("reading {path}"))?;
        let values: Vec<u64> = text
            .lines()
            .filter_map(|line| {
                line.strip_prefix(name)?
                    .strip_prefix(':')?
                    .trim()
                    .strip_suffix(" kB")?
                    .parse()
                    .ok()
            })
            .collect();
        ensure!(!values.is_empty(), "{path} has no {name}");
        Ok(values.iter().sum())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_with_parentheses_do_not_shift_the_fields() {
        let line = "12 (a) b (c) S 3 12 12 0 -1 4194560 1 0 0 0 0 0 0 0 20 0 1 0 777 5 6 7";
        let stat = Stat::parse(line).unwrap();
        assert_eq!((stat.process.pid, stat.process.started), (12, 777));
        assert_eq!(
            (stat.name.as_str(), stat.state, stat.parent),
            ("a) b (c", 'S', 3)
        );
    }

    #[test]
    fn the_own_process_is_seen_and_a_wrong_start_time_is_not() {
        let own = Process::of(std::process::id()).unwrap();
        assert!(own.alive());
        assert!(
            !Process {
                started: own.started + 1,
                ..own
            }
            .alive()
        );
    }
}
