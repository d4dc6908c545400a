//! Pagers killed at random moments, also while they recover from their predecessor's death.

use std::path::Path;
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};

use super::load::{self, EVERYTHING};
use super::tree::{self, Tree};
use crate::torture::harness::Draw;
use crate::torture::harness::suite::{Case, Run, print_line};

/// From start to end; on a quiet machine each takes a fourth of it.
const DEADLINE: Duration = Duration::from_secs(180);

/// Moments at which pagers are killed, microseconds after they were first seen.
#[derive(Clone, Copy, Debug)]
struct Moments {
    kills: u64,
    /// One kill in so many comes early: while the pager takes over.
    early_one_in: u64,
    early_us_max: u64,
    late_us_max: u64,
    /// After each so many kills the program must make progress.
    rest_every: u64,
}

const RANDOM: Moments = Moments {
    kills: 50,
    early_one_in: 4,
    early_us_max: 20_000,
    late_us_max: 800_000,
    rest_every: 5,
};

const STORM: Moments = Moments {
    kills: 20,
    early_one_in: 8,
    ..RANDOM
};

/// Each second kill hits a successor within 5 ms of its predecessor's death.
const DOUBLE: Moments = Moments {
    kills: 20,
    early_one_in: 2,
    early_us_max: 4000,
    late_us_max: 300_000,
    rest_every: 2,
};

/// Waits for a line, then becomes the command.
const WHEN_TOLD: [&str; 3] = ["/bin/sh", "-c", "echo @small; read go; exec \"$0\" \"$@\""];

/// The four cases.
pub fn cases(folder: &Path) -> Vec<Case> {
    let case = |name: &str, what: &'static [&'static str], moments| {
        let folder = folder.to_owned();
        Case::new(name, move |run| killed(run, &folder, what, moments))
    };
    let of_its_own = folder.to_owned();
    vec![
        Case::new("kills.small", move |run| {
            killed_while_small(run, &of_its_own)
        }),
        case("kills.random", EVERYTHING, RANDOM),
        case("kills.storm", &["storm"], STORM),
        case("kills.double", EVERYTHING, DOUBLE),
    ]
}

/// The pager dies while the command is too small to be taken, which no record tells of: its successor has to
/// find the command, and page it when it has grown.
fn killed_while_small(run: &Run<'_>, folder: &Path) -> Result<()> {
    let token = load::new_token();
    let mut plan = load::plan(run, folder, &[], &token, DEADLINE)?;
    plan.command.splice(0..0, WHEN_TOLD.map(Into::into));
    let mut running = plan.start(run)?;
    running.wait_for("@small")?;
    if run.binaries.is_some() {
        let tree = Tree::find(&mut running, &token)?;
        let pager = tree.next_pager(&mut running, None)?;
        pager.signal(libc::SIGKILL);
        tree.next_pager(&mut running, Some(pager))?;
    }
    running.say("go")?;
    running.wait_for("@ready")?;
    running.goes_on_for(Duration::from_secs(1))?;
    let Some(report) = running.finish()?.report else {
        return Ok(());
    };
    ensure!(report.takeovers == 1, "{} take-overs", report.takeovers);
    Ok(())
}

fn killed(run: &Run<'_>, folder: &Path, what: &[&str], moments: Moments) -> Result<()> {
    let token = load::new_token();
    let mut running = load::plan(run, folder, what, &token, DEADLINE)?.start(run)?;
    running.wait_for("@ready")?;
    if run.binaries.is_none() {
        running.goes_on_for(Duration::from_secs(3))?;
        return running.finish().map(drop);
    }
    let tree = Tree::find(&mut running, &token)?;
    let mut draw = Draw::new(run.seed);
    let mut last = None;
    for kill in 1..=moments.kills {
        let pager = tree.next_pager(&mut running, last)?;
        // In turn, not drawn: a pair of close kills is what the case is about.
        let most = if kill % moments.early_one_in == 0 {
            moments.early_us_max
        } else {
            moments.late_us_max
        };
        thread::sleep(Duration::from_micros(draw.between(0, most)));
        if !running.goes_on_for(Duration::ZERO)? {
            return Err(tree::ended(&mut running, "the last kill"));
        }
        if !pager.alive() {
            return Err(running.hung(&format!("the pager died by itself before kill {kill}")));
        }
        pager.signal(libc::SIGKILL);
        last = Some(pager);
        if kill % moments.rest_every == 0 {
            load::goes_on(&mut running, &format!("after kill {kill}"))?;
        }
    }
    tree.next_pager(&mut running, last)?;
    load::goes_on(&mut running, "after the last kill")?;
    let report = running.finish()?.report.context("no report")?;
    print_line(&format!(
        "# kills={} takeovers={}",
        moments.kills, report.takeovers
    ));
    ensure!(
        report.takeovers == moments.kills,
        "{} take-overs after {} kills",
        report.takeovers,
        moments.kills
    );
    Ok(())
}
