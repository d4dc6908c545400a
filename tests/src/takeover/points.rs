//! One case for each crash point: the pager kills itself there once, under load.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use holo_pager::core::CrashPoint;

use super::attached;
use super::load::{self, EVERYTHING};
use super::tree::{self, Tree};
use crate::torture::harness::launch::End;
use crate::torture::harness::suite::{Case, Run};

/// How long the program works at most until the point is reached.
const REACH: Duration = Duration::from_secs(40);

/// How long it goes on afterwards.
const AFTERWARDS: Duration = Duration::from_millis(700);

/// From start to end.
const DEADLINE: Duration = Duration::from_secs(120);

/// How a point is reached from outside.
#[derive(Clone, Copy, Debug)]
pub enum Way {
    /// Under `holo-exec`, by a program that does this.
    Load(&'static [&'static str]),
    /// In a `holo detach`.
    Detach,
}

/// How each point is reached. A new point has to be given its way here.
#[must_use]
pub fn way(point: CrashPoint) -> Way {
    use CrashPoint as P;
    match point {
        P::EventsRead | P::EventApplied | P::EventCleared => Way::Load(EVERYTHING),
        P::NewPlaceCleared | P::EntryMoving | P::Moved => Way::Load(&["move"]),
        P::ForkBegun | P::ForkCopied => Way::Load(&["fork"]),
        P::Zeroed => Way::Load(&["drop"]),
        P::Restaged => Way::Load(&["direct"]),
        P::Restored | P::Unregistered => Way::Detach,
        P::Installed
        | P::InstalledForgotten
        | P::Protected
        | P::PageRead
        | P::Staged
        | P::BatchNoted
        | P::FreeQueued
        | P::FreeKicked
        | P::FreeDone
        | P::Unprotected
        | P::StorePut
        | P::Stored
        | P::PagedOut
        | P::Looked
        | P::Registered => Way::Load(EVERYTHING),
    }
}

/// One case a point.
pub fn cases(folder: &Path) -> Vec<Case> {
    CrashPoint::ALL
        .iter()
        .map(|&point| {
            let folder = folder.to_owned();
            Case::new(format!("crash.{}", point.name()), move |run| {
                match way(point) {
                    Way::Load(what) => under_load(run, &folder, point.name(), what).map(drop),
                    Way::Detach => attached::crash_in_detach(run, &folder, point),
                }
            })
        })
        .collect()
}

/// Runs the program until one pager has died as `crash` says and the next one has served for a while. The end, of
/// which there is none in a bare run.
///
/// # Errors
/// Whatever was not as it has to be.
pub fn under_load(run: &Run<'_>, folder: &Path, crash: &str, what: &[&str]) -> Result<Option<End>> {
    let token = load::new_token();
    let mut plan = load::plan(run, folder, what, &token, DEADLINE)?;
    plan.environment.push(("HOLO_CRASH_AT", crash.into()));
    let mut running = plan.start(run)?;
    if run.binaries.is_none() {
        running.wait_for("@ready")?;
        return running.finish().map(|_| None);
    }
    let tree = Tree::find(&mut running, &token)?;
    let first = tree.next_pager(&mut running, None)?;
    let until = Instant::now() + REACH;
    // Whether it was reached is in the report; this only says when that is known.
    while tree.pager().is_none_or(|pager| pager == first) && Instant::now() < until {
        if !running.goes_on()? {
            return Err(tree::ended(&mut running, "the take-over"));
        }
    }
    load::goes_on(&mut running, "after the take-over")?;
    running.goes_on_for(AFTERWARDS)?;
    let end = running.finish()?;
    let takeovers = end.report.as_ref().context("no report")?.takeovers;
    ensure!(
        takeovers == 1,
        "{takeovers} take-overs, want 1: {}",
        if takeovers == 0 {
            "the point was not reached"
        } else {
            "a successor died as well"
        }
    );
    Ok(Some(end))
}
