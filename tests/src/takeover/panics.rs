//! Pagers that die of a fault of their own: of a panic of the serving thread, in the middle of its work.
//!
//! One such death is like any other. One that comes again in each successor ends the session: the program is
//! killed, and told why.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};

use super::load::{self, EVERYTHING};
use super::points::under_load;
use super::tree::Tree;
use crate::torture::harness::suite::{Case, Run};

/// From start to end.
const DEADLINE: Duration = Duration::from_secs(120);

/// In a batch: pages are protected, and their bytes are with the pager.
const POINT: &str = "staged";

/// What a death is told by.
const PANIC: &str = "panicked at ";
const SIGNAL: &str = "signal 6";

/// The session ends with the fifth death.
const SUCCESSORS: u64 = 4;

/// 128 + SIGKILL.
const KILLED: i32 = 137;

/// The cases.
pub fn cases(folder: &Path) -> Vec<Case> {
    let [one, panics, aborts] = [(); 3].map(|()| folder.to_owned());
    vec![
        Case::new("panic.once", move |run| once(run, &one)),
        Case::new("panic.in_each", move |run| {
            in_each(run, &panics, "panics", PANIC)
        }),
        // Who cannot say it himself is told of by the guardian.
        Case::new("panic.silent_in_each", move |run| {
            in_each(run, &aborts, "aborts", SIGNAL)
        }),
    ]
}

/// A successor takes over, and the program notices nothing.
fn once(run: &Run<'_>, folder: &Path) -> Result<()> {
    let crash = format!("panic:{POINT}");
    let Some(end) = under_load(run, folder, &crash, EVERYTHING)? else {
        return Ok(());
    };
    is_told(&end.stderr, PANIC, 1)
}

/// The program is killed with the last pager; its input stays open meanwhile.
fn in_each(run: &Run<'_>, folder: &Path, how: &str, told: &str) -> Result<()> {
    let token = load::new_token();
    let mut plan = load::plan(run, folder, EVERYTHING, &token, DEADLINE)?;
    if run.binaries.is_none() {
        let mut running = plan.start(run)?;
        running.wait_for("@ready")?;
        return running.finish().map(drop);
    }
    plan.environment
        .push(("HOLO_CRASH_AT", format!("{how}:{POINT}").into()));
    plan.exit_code = KILLED;
    // Pages need not have come back by then.
    plan.pressure = false;
    let mut running = plan.start(run)?;
    let tree = Tree::find(&mut running, &token)?;
    while running.goes_on()? {}
    let end = running.finish()?;
    is_told(&end.stderr, told, SUCCESSORS + 1)?;
    let said = String::from_utf8_lossy(&end.stderr);
    ensure!(
        said.contains("was killed: the pager ended again and again"),
        "no explanation on standard error: {said:?}"
    );
    let takeovers = end.report.context("no report")?.takeovers;
    ensure!(
        takeovers == SUCCESSORS,
        "{takeovers} take-overs, want {SUCCESSORS}"
    );
    ensure!(
        !tree.guardian.alive(),
        "the guardian has outlived the program"
    );
    Ok(())
}

/// Each death has its message, with the place or the signal; nobody saw wrong data.
fn is_told(stderr: &[u8], how: &str, deaths: u64) -> Result<()> {
    let said = String::from_utf8_lossy(stderr);
    let told = said
        .lines()
        .filter(|line| line.contains("fault of its own: ") && line.contains(how));
    let count = u64::try_from(told.count())?;
    ensure!(count == deaths, "{deaths} deaths, {count} told: {said:?}");
    ensure!(!said.contains("WRONG"), "wrong data was seen: {said}");
    Ok(())
}
