//! A memory cgroup for one case, of either version of the interface; removed with the value.

use std::fs;
use std::path::{Path, PathBuf};
use std::thread;

use anyhow::{Context as _, Result, bail};

use super::LOOK_EVERY;
use crate::session;

/// Attempts to remove a cgroup whose last process is just leaving.
const REMOVE_TRIES_MAX: u32 = 100;

/// A memory cgroup.
#[derive(Debug)]
pub struct MemoryCgroup {
    folder: PathBuf,
    version_1: bool,
}

impl MemoryCgroup {
    /// Makes one, with a limit in bytes if one is given.
    ///
    /// # Errors
    /// There is no memory controller, or this user may not use it.
    pub fn create(name: &str, limit_bytes: Option<u64>) -> Result<Self> {
        let root = Path::new("/sys/fs/cgroup");
        let version_1 = root.join("memory/memory.limit_in_bytes").exists();
        let parent = if version_1 {
            root.join("memory")
        } else {
            root.to_owned()
        };
        if !version_1 {
            if !root.join("cgroup.controllers").exists() {
                bail!("no memory cgroups under {}", root.display());
            }
            let control = root.join("cgroup.subtree_control");
            fs::write(&control, "+memory")
                .with_context(|| format!("writing {}", control.display()))?;
        }
        let folder = parent.join(session::cgroup_name(name));
        fs::create_dir(&folder).with_context(|| format!("making {}", folder.display()))?;
        let cgroup = Self { folder, version_1 };
        if let Some(limit) = limit_bytes {
            let file = if version_1 {
                "memory.limit_in_bytes"
            } else {
                "memory.max"
            };
            let path = cgroup.folder.join(file);
            fs::write(&path, limit.to_string())
                .with_context(|| format!("writing {}", path.display()))?;
        }
        Ok(cgroup)
    }

    /// The file into which a process writes its id to enter.
    #[must_use]
    pub fn entrance(&self) -> PathBuf {
        self.folder.join("cgroup.procs")
    }

    /// Bytes charged now, whole huge pages included as long as a part of one is in use.
    ///
    /// # Errors
    /// The file cannot be read.
    pub fn charged_bytes(&self) -> Result<u64> {
        let file = if self.version_1 {
            "memory.usage_in_bytes"
        } else {
            "memory.current"
        };
        let text =
            fs::read_to_string(self.folder.join(file)).context("reading the cgroup's usage")?;
        text.trim()
            .parse()
            .context("the cgroup's usage is no number")
    }

    /// Processes that the kernel has killed in it for want of memory.
    ///
    /// # Errors
    /// The file cannot be read.
    pub fn oom_kills(&self) -> Result<u64> {
        let file = if self.version_1 {
            "memory.oom_control"
        } else {
            "memory.events"
        };
        let text =
            fs::read_to_string(self.folder.join(file)).context("reading the cgroup's events")?;
        text.lines()
            .find_map(|line| line.strip_prefix("oom_kill ")?.trim().parse().ok())
            .context("no oom_kill line")
    }
}

impl Drop for MemoryCgroup {
    fn drop(&mut self) {
        for _ in 0..REMOVE_TRIES_MAX {
            if fs::remove_dir(&self.folder).is_ok() || !self.folder.exists() {
                return;
            }
            thread::sleep(LOOK_EVERY);
        }
    }
}
