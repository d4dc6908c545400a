//! The memory cgroup of a target: a limit that is not ours is respected.
//!
//! Installing a page charges the target's cgroup; at its limit the kernel would kill the target. So
//! the budget shrinks to what the cgroup leaves.

use std::fs;
use std::path::PathBuf;

/// The memory controller's files of one cgroup.
#[derive(Debug)]
pub(crate) struct Limits {
    dir: PathBuf,
    unified: bool,
}

fn number(path: PathBuf) -> Option<u64> {
    fs::read_to_string(path).ok()?.trim().parse().ok()
}

impl Limits {
    /// Finds the memory cgroup of a process; `None` if it has no limit.
    pub(crate) fn of(pid: i32) -> Option<Self> {
        let text = fs::read_to_string(format!("/proc/{pid}/cgroup")).ok()?;
        let mounts = fs::read_to_string("/proc/self/mounts").ok()?;
        for line in text.lines() {
            let mut parts = line.splitn(3, ':');
            let (_, controllers, path) = (parts.next()?, parts.next()?, parts.next()?);
            let unified = controllers.is_empty();
            if !unified && !controllers.split(',').any(|c| c == "memory") {
                continue;
            }
            let mount = mounts.lines().find_map(|m| {
                let f: Vec<_> = m.split(' ').collect();
                let right = if unified {
                    f.get(2) == Some(&"cgroup2")
                } else {
                    f.get(2) == Some(&"cgroup")
                        && f.get(3)
                            .is_some_and(|o| o.split(',').any(|x| x == "memory"))
                };
                right.then(|| (*f.get(1).unwrap_or(&"")).to_owned())
            });
            let Some(mount) = mount else { continue };
            let dir = PathBuf::from(format!("{mount}{path}"));
            let limits = Self { dir, unified };
            if limits.limit_bytes().is_some() {
                return Some(limits);
            }
        }
        None
    }

    fn limit_bytes(&self) -> Option<u64> {
        let file = if self.unified {
            "memory.max"
        } else {
            "memory.limit_in_bytes"
        };
        // Version 1 says "no limit" by a number near 2^63.
        number(self.dir.join(file)).filter(|&b| b < 1 << 60)
    }

    /// Bytes that can still be charged: file cache counts as free, a margin does not.
    pub(crate) fn room_bytes(&self) -> Option<i64> {
        let limit = self.limit_bytes()?;
        let file = if self.unified {
            "memory.current"
        } else {
            "memory.usage_in_bytes"
        };
        let used = number(self.dir.join(file))?;
        let stat = fs::read_to_string(self.dir.join("memory.stat")).ok()?;
        let cache: u64 = stat
            .lines()
            .filter_map(|l| l.split_once(' '))
            .filter(|(k, _)| matches!(*k, "inactive_file" | "active_file"))
            .filter_map(|(_, v)| v.trim().parse::<u64>().ok())
            .sum();
        let margin = (limit / 16).max(4 << 20);
        let free = i64::try_from(limit).ok()?
            - i64::try_from(used.saturating_sub(cache)).ok()?
            - i64::try_from(margin).ok()?;
        Some(free)
    }
}

/// Moves this process out of the memory cgroup it was started in, so that a target's limit does not stop
/// its pager. Best effort: it takes root.
pub(crate) fn leave_memory_cgroup() {
    let me = std::process::id();
    let Some(limits) = i32::try_from(me).ok().and_then(Limits::of) else {
        return;
    };
    let mut dir = limits.dir.as_path();
    while let Some(parent) = dir.parent() {
        let procs = parent.join("cgroup.procs");
        if !procs.exists() {
            break;
        }
        dir = parent;
    }
    let _ = fs::write(dir.join("cgroup.procs"), me.to_string());
}
