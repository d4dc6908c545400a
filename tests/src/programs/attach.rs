//! `holo attach` to programs that already run under load, and `holo detach`, twice in a row.
//!
//! The programs check their data before, during and after. Afterwards nothing of holo may be left in
//! them: no descriptor, no thread, no mark on a mapping.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::fs;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};

use super::redis::Server;
use super::scripts::PY_HASH;
use crate::torture::harness::holo::Binaries;
use crate::torture::harness::launch::Running;
use crate::torture::harness::process::Process;
use crate::torture::harness::suite::{Case, Run, print_line};
use crate::torture::harness::tool::Tool;
use crate::torture::harness::verdict::{self, Expected};

/// Times that a program is attached and detached.
const TURNS: u32 = 2;

/// How long attaching or detaching may take.
const COMMAND_DEADLINE: Duration = Duration::from_secs(60);

/// How long it may take until pages are marked, and until all marks are gone.
const MARK_DEADLINE: Duration = Duration::from_secs(30);

/// How long the program works in each phase.
const PHASE: Duration = Duration::from_secs(3);

/// Keys of the Redis case's data set.
const REDIS_KEYS: u64 = 50_000;

/// The same, MiB of private memory.
const REDIS_PEAK_MIB: u64 = 181;

/// Both programs.
pub fn cases() -> Vec<Case> {
    vec![
        Case::new("attach_python", python),
        Case::new("attach_redis", redis),
    ]
}

fn python(run: &Run<'_>) -> Result<()> {
    // It is stopped by its own clock, which has to outlast all phases.
    let seconds = u64::from(TURNS) * 20 + 10;
    let mut running = PY_HASH.plan(run, seconds).start(&run.without_holo())?;
    running.goes_on_for(PHASE)?;
    let target = running.first().context("the program has gone")?;
    let beats = |running: &Running| beat(&running.lines());
    turns(run, &mut running, target, PY_HASH.bare_peak_mib, beats)?;
    ensure!(
        running.goes_on()?,
        "the program ended before its last phase"
    );
    let end = running.finish()?;
    ensure!(end.statement("checks")? > 0, "nothing was checked");
    Ok(())
}

fn redis(run: &Run<'_>) -> Result<()> {
    let server = Server::prepare(run, REDIS_KEYS)?;
    let mut running = server.plan(REDIS_PEAK_MIB)?.start(&run.without_holo())?;
    let target = running.target()?;
    server.phase(&mut running, "state", "fill", "0")?;
    let mut load = server.client("state", "load", "600")?;
    running.goes_on_for(PHASE)?;
    {
        let load = &load;
        let beats = |_: &Running| beat(&load.said().lines().map(str::to_owned).collect::<Vec<_>>());
        turns(run, &mut running, target, REDIS_PEAK_MIB, beats)?;
    }
    load.say("enough")?;
    let said = load.succeeds_beside(&mut running)?;
    ensure!(said.out.contains("# checks="), "the client checked nothing");
    server.phase(&mut running, "state", "reload", "0")?;
    server.phase(&mut running, "state", "stop", "0")?;
    running.finish().map(drop)
}

/// The program's latest count of checks.
fn beat(lines: &[String]) -> u64 {
    lines
        .iter()
        .rev()
        .find_map(|line| line.strip_prefix("@beat ")?.parse().ok())
        .unwrap_or(0)
}

/// Lets the program work for a phase, in which it must have checked something.
fn phase(running: &mut Running, beats: &impl Fn(&Running) -> u64, name: &str) -> Result<()> {
    let before = beats(running);
    ensure!(
        running.goes_on_for(PHASE)?,
        "the program ended in the phase {name:?}"
    );
    // Under pressure a check may wait its turn: the deadline of the whole case bounds this.
    while beats(running) <= before {
        ensure!(
            running.goes_on()?,
            "the program ended in the phase {name:?}"
        );
    }
    Ok(())
}

fn turns(
    run: &Run<'_>,
    running: &mut Running,
    target: Process,
    bare_peak_mib: u64,
    beats: impl Fn(&Running) -> u64,
) -> Result<()> {
    for turn in 1..=TURNS {
        phase(running, &beats, "before")?;
        let Some(binaries) = run.binaries else {
            phase(running, &beats, "bare")?;
            continue;
        };
        let before = Traces::of(target)?;
        ensure!(
            before.is_clean(),
            "a bare program has traces of holo: {before:?}"
        );
        let report = run.scratch.join(format!("attach-{turn}.json"));
        let budget_kib = bare_peak_mib * 1024 / 4;
        attach(binaries, running, target, budget_kib, &report)?;
        await_marks(running, target)?;
        phase(running, &beats, "attached")?;
        running.measure_residence();
        phase(running, &beats, "attached for longer")?;
        running.judge_residence(budget_kib)?;
        detach(binaries, running, target)?;
        await_clean(running, target, &before)?;
        let wanted = Expected {
            local_memory_bytes: budget_kib * 1024,
            exit_code: None,
            pressure: true,
            takeovers_min: 0,
        };
        let seen = verdict::check(&report, wanted)?;
        print_line(&format!(
            "# turn {turn}: attach_stop_us_max={} pages_evicted={} faults_remote={}",
            seen.attach_stop_us_max, seen.pages_evicted, seen.faults_remote
        ));
        phase(running, &beats, "after")?;
    }
    Ok(())
}

fn attach(
    binaries: &Binaries,
    running: &mut Running,
    target: Process,
    budget_kib: u64,
    report: &PathBuf,
) -> Result<()> {
    let arguments: [OsString; 6] = [
        "attach".into(),
        target.pid.to_string().into(),
        "--local-memory".into(),
        format!("{budget_kib}K").into(),
        "--report".into(),
        report.into(),
    ];
    command(binaries, running, &arguments, "holo attach")
}

fn detach(binaries: &Binaries, running: &mut Running, target: Process) -> Result<()> {
    command(
        binaries,
        running,
        &["detach".into(), target.pid.to_string().into()],
        "holo detach",
    )
}

fn command(
    binaries: &Binaries,
    running: &mut Running,
    arguments: &[OsString],
    name: &str,
) -> Result<()> {
    let said = Tool::start(&binaries.holo, arguments)?.wait(COMMAND_DEADLINE)?;
    let Some(said) = said else {
        return Err(running.hung(&format!("{name} does not return")));
    };
    ensure!(
        said.code == Some(0),
        "{name} ended with {:?}: {}",
        said.code,
        said.err.trim()
    );
    Ok(())
}

/// Waits until the program's memory is under holo's hand.
fn await_marks(running: &mut Running, target: Process) -> Result<()> {
    let until = Instant::now() + MARK_DEADLINE;
    while Traces::of(target)?.marks == 0 {
        if Instant::now() >= until {
            let why = format!("attached, but no mapping was taken within {MARK_DEADLINE:?}");
            return Err(running.hung(&why));
        }
        ensure!(running.goes_on()?, "the program ended when it was attached");
    }
    Ok(())
}

fn await_clean(running: &mut Running, target: Process, before: &Traces) -> Result<()> {
    let until = Instant::now() + MARK_DEADLINE;
    loop {
        let now = Traces::of(target)?;
        let extra: Vec<_> = now.descriptors.difference(&before.descriptors).collect();
        // The program's own descriptors may come and go meanwhile; holo's may not be there at all.
        if now.is_clean() && extra.is_empty() {
            // Mappings that were split for holo would have to merge again.
            print_line(&format!(
                "# mappings before={} after={}",
                before.mappings, now.mappings
            ));
            ensure!(
                now.mappings <= before.mappings + before.mappings / 10 + 8,
                "{} mappings after the detach, {} before",
                now.mappings,
                before.mappings
            );
            return Ok(());
        }
        if Instant::now() >= until {
            let why = format!("left in the program: {now:?}, new descriptors: {extra:?}");
            return Err(running.hung(&why));
        }
        ensure!(running.goes_on()?, "the program ended when it was detached");
    }
}

/// What holo could leave in a process.
#[derive(Debug)]
struct Traces {
    /// Mappings with a uffd flag.
    marks: usize,
    mappings: usize,
    descriptors: BTreeSet<(String, String)>,
    ring_threads: Vec<String>,
}

impl Traces {
    fn of(target: Process) -> Result<Self> {
        let smaps = target.read("smaps")?;
        let flags: Vec<&str> = smaps
            .lines()
            .filter_map(|line| line.strip_prefix("VmFlags:"))
            .collect();
        ensure!(
            !flags.is_empty(),
            "the program has gone, or has no mappings"
        );
        let marked = |line: &&&str| {
            line.split_ascii_whitespace()
                .any(|flag| flag == "um" || flag == "uw")
        };
        let folder = format!("/proc/{}/fd", target.pid);
        let descriptors = fs::read_dir(&folder)
            .with_context(|| format!("reading {folder}"))?
            .flatten()
            .filter_map(|entry| {
                let link = fs::read_link(entry.path()).ok()?;
                Some((
                    entry.file_name().to_string_lossy().into(),
                    link.to_string_lossy().into(),
                ))
            })
            .collect();
        let ring_threads = target
            .threads()
            .into_iter()
            .filter_map(|thread| {
                fs::read_to_string(format!("/proc/{}/task/{thread}/comm", target.pid)).ok()
            })
            .filter(|name| name.starts_with("iou-"))
            .collect();
        Ok(Self {
            marks: flags.iter().filter(marked).count(),
            mappings: flags.len(),
            descriptors,
            ring_threads,
        })
    }

    fn is_clean(&self) -> bool {
        let holds = |(_, link): &(String, String)| {
            link.contains("userfaultfd") || link.contains("io_uring")
        };
        self.marks == 0 && self.ring_threads.is_empty() && !self.descriptors.iter().any(holds)
    }
}
