//! What holo leaves in a process that it holds, and must not leave in one that it let go.

use std::collections::BTreeSet;
use std::fs;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};

use super::tree;
use crate::torture::harness::launch::Running;
use crate::torture::harness::process::Process;

/// How long marks may take to come and to go.
const PATIENCE: Duration = Duration::from_secs(30);

/// Traces of holo in a process.
#[derive(Debug)]
pub struct Traces {
    /// Mappings with a uffd flag.
    pub marks: usize,
    /// Descriptors of a userfaultfd or a ring.
    pub descriptors: BTreeSet<String>,
    /// Threads of a ring.
    pub ring_threads: Vec<String>,
}

impl Traces {
    /// Looks.
    ///
    /// # Errors
    /// The process has gone, or cannot be looked at within the time.
    pub fn of(target: Process) -> Result<Self> {
        let pid = target.pid;
        let smaps = target.read("smaps")?;
        let flags: Vec<&str> = smaps
            .lines()
            .filter_map(|line| line.strip_prefix("VmFlags:"))
            .collect();
        ensure!(!flags.is_empty(), "the program has gone");
        let marked = |line: &&&str| {
            line.split_ascii_whitespace()
                .any(|flag| flag == "um" || flag == "uw")
        };
        let descriptors = fs::read_dir(format!("/proc/{pid}/fd"))
            .context("listing the program's descriptors")?
            .flatten()
            .filter_map(|entry| fs::read_link(entry.path()).ok())
            .map(|link| link.to_string_lossy().into_owned())
            .filter(|link| link.contains("userfaultfd") || link.contains("io_uring"))
            .collect();
        let ring_threads = target
            .threads()
            .into_iter()
            .filter_map(|thread| fs::read_to_string(format!("/proc/{pid}/task/{thread}/comm")).ok())
            .filter(|name| name.starts_with("iou-"))
            .collect();
        Ok(Self {
            marks: flags.iter().filter(marked).count(),
            descriptors,
            ring_threads,
        })
    }

    /// Says whether there are none.
    #[must_use]
    pub fn is_clean(&self) -> bool {
        self.marks == 0 && self.descriptors.is_empty() && self.ring_threads.is_empty()
    }
}

/// Waits until the traces are as wanted.
///
/// # Errors
/// They are not in time, or the program ends.
pub fn await_traces(
    running: &mut Running,
    target: Process,
    what: &str,
    wanted: impl Fn(&Traces) -> bool,
) -> Result<()> {
    let until = Instant::now() + PATIENCE;
    loop {
        let now = Traces::of(target);
        if !running.goes_on()? {
            return Err(tree::ended(running, what));
        }
        let now = now?;
        if wanted(&now) {
            return Ok(());
        }
        if Instant::now() >= until {
            return Err(running.hung(&format!("{what}: {now:?}")));
        }
    }
}
