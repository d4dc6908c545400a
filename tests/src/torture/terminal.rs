//! ^Z on a terminal: the whole job stops and goes on, as without holo.

use std::path::Path;

use anyhow::{Result, ensure};

use super::build;
use super::cases::WRITE_RACE;
use super::harness::suite::Run;

/// Times that the key is typed.
const ROUNDS: &str = "6";

/// Types ^Z at the command, which runs as a shell's foreground job.
///
/// # Errors
/// A process of the job goes on running, or the target ends with wrong data.
pub fn suspend_key(run: &Run<'_>, binaries: &Path) -> Result<()> {
    let shell = build::program("ptyshell", binaries)?;
    let mut plan = WRITE_RACE.plan(run, binaries)?;
    plan.wrapper = vec![shell.into_os_string(), ROUNDS.into()];
    let end = plan.start(run)?.finish()?;
    ensure!(end.statement("pty_stops")? > 0, "the job was never stopped");
    Ok(())
}
