//! The memory cgroups of a target: a limit that is not ours is respected.
//!
//! Installing a page charges the target's cgroup and all that it is in; at the limit of any of them the kernel would
//! kill the target. So the budget shrinks to what they leave.

use std::fs;
use std::path::{Path, PathBuf};

/// The memory controller's files of the cgroups around a process that have a limit, the innermost first.
#[derive(Debug)]
pub(crate) struct Limits {
    dirs: Vec<PathBuf>,
    unified: bool,
}

fn number(path: PathBuf) -> Option<u64> {
    fs::read_to_string(path).ok()?.trim().parse().ok()
}

impl Limits {
    /// Finds the memory cgroups of a process; `None` if none has a limit.
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
            let limits = Self::around(Path::new(&mount), path, unified);
            if !limits.dirs.is_empty() {
                return Some(limits);
            }
        }
        None
    }

    fn around(mount: &Path, path: &str, unified: bool) -> Self {
        let leaf = mount.join(path.trim_start_matches('/'));
        let mut limits = Self {
            dirs: Vec::new(),
            unified,
        };
        for dir in leaf.ancestors().take_while(|dir| dir.starts_with(mount)) {
            if limits.limit_bytes(dir).is_some() {
                limits.dirs.push(dir.to_path_buf());
            }
        }
        limits
    }

    fn limit_bytes(&self, dir: &Path) -> Option<u64> {
        let file = if self.unified {
            "memory.max"
        } else {
            "memory.limit_in_bytes"
        };
        // Version 1 says "no limit" by a number near 2^63.
        number(dir.join(file)).filter(|&b| b < 1 << 60)
    }

    /// Bytes that can still be charged: file cache counts as free, a margin does not.
    pub(crate) fn room_bytes(&self) -> Option<i64> {
        self.dirs.iter().filter_map(|dir| self.room_in(dir)).min()
    }

    fn room_in(&self, dir: &Path) -> Option<i64> {
        let limit = self.limit_bytes(dir)?;
        let file = if self.unified {
            "memory.current"
        } else {
            "memory.usage_in_bytes"
        };
        let used = number(dir.join(file))?;
        let stat = fs::read_to_string(dir.join("memory.stat")).ok()?;
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
    let Some(mut dir) = limits.dirs.first().map(PathBuf::as_path) else {
        return;
    };
    while let Some(parent) = dir.parent() {
        let procs = parent.join("cgroup.procs");
        if !procs.exists() {
            break;
        }
        dir = parent;
    }
    let _ = fs::write(dir.join("cgroup.procs"), me.to_string());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tightest_limit_of_all_around_counts() {
        const MIB: u64 = 1 << 20;
        let mount = std::env::temp_dir().join(format!("holo-limits-{}", std::process::id()));
        let group = |path: &str, limit: &str, used: u64| {
            let dir = mount.join(path);
            fs::create_dir_all(&dir).unwrap();
            let files = [
                ("memory.max", limit.to_owned()),
                ("memory.current", used.to_string()),
                ("memory.stat", format!("anon 7\nactive_file {MIB}\n")),
            ];
            for (name, content) in files {
                fs::write(dir.join(name), content).unwrap();
            }
        };
        group("a/b/c", "max", MIB);
        group("a/b", &(640 * MIB).to_string(), 600 * MIB);
        group("a", &(6400 * MIB).to_string(), 700 * MIB);
        let limits = Limits::around(&mount, "/a/b/c", true);
        // 640 - (600 - 1 of cache) - a margin of a sixteenth.
        let room = limits.room_bytes();
        let none = Limits::around(&mount.join("a/b/c"), "/", true).dirs;
        fs::remove_dir_all(&mount).unwrap();
        assert_eq!(room, Some(MIB as i64));
        assert!(none.is_empty(), "{none:?}");
    }
}
