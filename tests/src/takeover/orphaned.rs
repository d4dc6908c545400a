//! Sessions whose guardian dies: nobody can take over any more.
//!
//! A pager without its guardian serves on: what it holds it can go on serving, only taking hold of
//! further processes fails. When it dies as well, the program is killed and `holo-exec` says why.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};

use super::load::{self, EVERYTHING};
use super::tree::{self, Tree};
use crate::torture::harness::launch::Running;
use crate::torture::harness::suite::{Case, Run};

/// From start to end.
const DEADLINE: Duration = Duration::from_secs(90);

/// How long the pager goes on alone.
const ALONE: Duration = Duration::from_secs(2);

/// 128 + SIGKILL.
const KILLED: i32 = 137;

/// The cases.
pub fn cases(folder: &Path) -> Vec<Case> {
    let case = |name: &str, what: &'static [&'static str], alone| {
        let folder = folder.to_owned();
        Case::new(name, move |run| orphaned(run, &folder, what, alone))
    };
    vec![
        case("orphaned.at_once", &["drop", "move", "direct"], false),
        case("orphaned.at_once_with_children", &["fork"], false),
        case("orphaned.guardian_first", EVERYTHING, true),
    ]
}

fn orphaned(run: &Run<'_>, folder: &Path, what: &[&str], alone: bool) -> Result<()> {
    let token = load::new_token();
    let mut plan = load::plan(run, folder, what, &token, DEADLINE)?;
    if run.binaries.is_some() {
        plan.exit_code = KILLED;
    }
    let mut running = plan.start(run)?;
    running.wait_for("@ready")?;
    if run.binaries.is_none() {
        return running.finish().map(drop);
    }
    let tree = Tree::find(&mut running, &token)?;
    let pager = tree.next_pager(&mut running, None)?;
    load::goes_on(&mut running, "before anything dies")?;
    await_pressure(&mut running)?;
    tree.guardian.signal(libc::SIGKILL);
    if alone {
        tree::await_end(tree.guardian, "the killed guardian")?;
        running.goes_on_for(ALONE)?;
        load::goes_on(&mut running, "without the guardian")?;
        ensure!(pager.alive(), "the pager died with its guardian");
    }
    pager.signal(libc::SIGKILL);
    // The end comes by itself: the program's input stays open.
    while running.goes_on()? {}
    let end = running.finish()?;
    let said = String::from_utf8_lossy(&end.stderr).into_owned();
    ensure!(
        said.contains("guardian both died") && said.contains("was killed"),
        "no explanation on standard error: {said:?}"
    );
    ensure!(!said.contains("WRONG"), "wrong data was seen: {said}");
    let report = end.report.context("no report")?;
    ensure!(report.takeovers == 0, "{} take-overs", report.takeovers);
    Ok(())
}

/// Lets the program work until pages have come back.
fn await_pressure(running: &mut Running) -> Result<()> {
    running.goes_on_for(Duration::from_secs(2)).map(drop)
}
