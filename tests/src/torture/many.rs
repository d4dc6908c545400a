//! More processes under one pager than one look at descriptors has room for, and than the usual limit of
//! descriptors allows: holo has a dozen open for each.

use std::fs;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use holo_pager::shell::request;
use holo_proto::Report;

use super::cases::Program;
use super::harness::holo::pager_pids;
use super::harness::launch::Running;
use super::harness::suite::{Run, print_line};

const PROGRAM: Program = Program {
    name: "many",
    size_mib: 128,
    seconds: 1,
    bare_peak_mib: 131,
    works: Some("together"),
    limit: None,
    counted: &[("processes", PROCESSES)],
    residence_told: None,
};

/// Processes that the program makes.
const PROCESSES: u64 = 100;

/// Pages come back so often before it ends: to some of each process.
const FAULTS: u64 = 2 * PROCESSES;

/// What a shell lets open what it starts, which may raise it: holo has to.
const DESCRIPTORS: usize = 1024;

/// Pause between two looks.
const LOOK_EVERY: Duration = Duration::from_millis(50);

/// All of them are held and paged at once.
///
/// # Errors
/// Wrong data, a hang, or fewer processes or descriptors than the case is about.
pub fn together(run: &Run<'_>, binaries: &Path) -> Result<()> {
    let mut plan = PROGRAM.plan(run, binaries)?;
    plan.talk = true;
    plan.residence_told =
        Some("a hundred processes are asked too slowly for more than two samples");
    let limit = format!("--nofile={DESCRIPTORS}:");
    plan.wrapper = vec!["prlimit".into(), limit.into()];
    let mut running = plan.start(run)?;
    if run.binaries.is_some() {
        let descriptors = await_all(&mut running)?;
        print_line(&format!("# descriptors={descriptors}"));
        ensure!(
            descriptors > DESCRIPTORS,
            "the pager has {descriptors} descriptors: the limit was not passed"
        );
    }
    PROGRAM.judge(&running.finish()?, run)
}

/// Waits until all are held and pages come back; the number of descriptors that the pager has then.
fn await_all(running: &mut Running) -> Result<usize> {
    let exec = running.first().context("holo-exec has gone")?.pid;
    loop {
        ensure!(
            running.goes_on_for(LOOK_EVERY)?,
            "ended before all were held"
        );
        // It may not listen yet.
        let Ok(answer) = request(exec, "status") else {
            continue;
        };
        let report: Report = serde_json::from_str(&answer)?;
        if report.processes >= PROCESSES && report.faults_remote >= FAULTS {
            let pagers = pager_pids(running.family());
            let pager = pagers.first().context("no pager")?;
            let open = fs::read_dir(format!("/proc/{}/fd", pager.pid))?;
            return Ok(open.count());
        }
    }
}
