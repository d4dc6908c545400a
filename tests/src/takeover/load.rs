//! Starts the program of `tests/takeover`, bare or under holo, and follows its progress.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};

use super::tree::{TOKEN, until};
use crate::torture::harness::launch::{Plan, Running};
use crate::torture::harness::suite::Run;

/// Memory that the program fills, MiB; the budget is a quarter.
pub const SIZE_MIB: u64 = 64;

/// After so many seconds the program ends by itself.
const LIMIT_S: u64 = 300;

/// What the program can do besides reading and writing.
pub const EVERYTHING: &[&str] = &["drop", "move", "fork", "direct", "stacks"];

/// Compiles the program into the folder; done once, then the file is taken as it is.
///
/// # Errors
/// There is no C compiler, or it refuses the program.
fn build(folder: &Path) -> Result<PathBuf> {
    let binary = folder.join("load");
    if binary.exists() {
        return Ok(binary);
    }
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("takeover/load.c");
    let output = Command::new("cc")
        .args(["-std=gnu11", "-O2", "-g", "-pthread"])
        .args(["-Wall", "-Wextra", "-Werror", "-o"])
        .arg(&binary)
        .arg(&source)
        .output()
        .context("running cc (is a C compiler installed?)")?;
    ensure!(
        output.status.success(),
        "cc refuses {}: {}",
        source.display(),
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(binary)
}

/// A token for one session, which no other has.
#[must_use]
pub fn new_token() -> String {
    static COUNT: AtomicU64 = AtomicU64::new(0);
    let number = COUNT.fetch_add(1, Ordering::Relaxed);
    format!("{}-{number}", std::process::id())
}

/// The plan of a run that does `what`, with this deadline; it ends when its input is closed.
///
/// # Errors
/// The program cannot be compiled.
pub fn plan(
    run: &Run<'_>,
    folder: &Path,
    what: &[&str],
    token: &str,
    deadline: Duration,
) -> Result<Plan> {
    let mut command: Vec<OsString> = vec![build(folder)?.into()];
    let numbers = [run.seed, SIZE_MIB, LIMIT_S];
    command.extend(numbers.map(|number| number.to_string().into()));
    command.extend(what.iter().map(Into::into));
    let mut plan = Plan::new(command, SIZE_MIB, deadline);
    plan.talk = true;
    plan.residence_told = Some("while there is no pager nothing is evicted");
    plan.environment.push((TOKEN, token.into()));
    Ok(plan)
}

/// The program's steps so far.
#[must_use]
pub fn beats(running: &Running) -> u64 {
    let last = |line: &String| line.strip_prefix("@beat ")?.parse().ok();
    running.lines().iter().rev().find_map(last).unwrap_or(0)
}

/// Waits until the program has made progress from now.
///
/// # Errors
/// It ends, or stands still for too long: then everything is dumped and killed.
pub fn goes_on(running: &mut Running, when: &str) -> Result<()> {
    // What is said next may have been counted before.
    for _ in 0..2 {
        let before = beats(running);
        until(running, &format!("any progress {when}"), |running| {
            (beats(running) > before).then_some(())
        })?;
    }
    Ok(())
}
