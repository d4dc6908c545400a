//! A target in a memory cgroup of twice its budget: what holo brings back must not get it killed.

use std::path::Path;

use anyhow::{Result, ensure};

use super::cases::WRITE_RACE;
use super::harness::memcg::MemoryCgroup;
use super::harness::suite::{Run, print_line};

/// Enters a cgroup, then becomes the command.
const ENTER: &str = "echo $$ > \"$0\" && exec \"$@\"";

/// Runs the writing threads in the small cgroup. Bare, they must be killed there: that is what shows
/// that the limit bites.
///
/// # Errors
/// The target is killed for want of memory, or ends with wrong data.
pub fn small(run: &Run<'_>, binaries: &Path) -> Result<()> {
    let mut plan = WRITE_RACE.plan(run, binaries)?;
    let cgroup = MemoryCgroup::create("small", Some(2 * 1024 * plan.budget_kib()))?;
    // Only the target enters: the pager and its store must not be charged here.
    let enter = [
        "/bin/sh".into(),
        "-c".into(),
        ENTER.into(),
        cgroup.entrance().into_os_string(),
    ];
    plan.command.splice(0..0, enter);
    if run.binaries.is_none() {
        plan.exit_code = 137;
        plan.start(run)?.finish()?;
        ensure!(
            cgroup.oom_kills()? > 0,
            "a bare run within half of its memory was not killed"
        );
        return Ok(());
    }
    let result = plan.start(run)?.finish();
    let kills = cgroup.oom_kills()?;
    print_line(&format!("# oom_kills={kills}"));
    ensure!(
        kills == 0,
        "the kernel killed {kills} processes in the cgroup"
    );
    result.map(drop)
}
