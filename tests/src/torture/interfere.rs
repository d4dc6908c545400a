//! Cases in which the driver interferes: it kills pagers, stops and continues the target, and looks at
//! it with debuggers, all under load.

use std::path::Path;
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};

use super::cases::{Program, WRITE_RACE};
use super::harness::holo::pager_pids;
use super::harness::launch::Running;
use super::harness::process::Process;
use super::harness::suite::{Run, print_line};
use super::harness::{Draw, LOOK_EVERY};

/// How long a tool that looks at the target may take.
const TOOL_DEADLINE: Duration = Duration::from_secs(60);

/// How long a signalled process may take to stop or go on.
const STOP_DEADLINE: Duration = Duration::from_secs(10);

/// Runs a program while its pager is killed again and again.
///
/// # Errors
/// Wrong data, a hang, or a pager that no successor followed.
pub fn kill_pagers(program: &Program, run: &Run<'_>, binaries: &Path) -> Result<()> {
    let mut running = program.plan(run, binaries)?.start(run)?;
    let kills = kill_until_the_end(&mut running, run)?;
    let end = running.finish_with(kills.saturating_sub(1))?;
    program.judge(&end, run)
}

/// Kills every pager that comes up, after a random time each; returns how many.
///
/// # Errors
/// Under holo none was ever seen, or the deadline passed.
pub fn kill_until_the_end(running: &mut Running, run: &Run<'_>) -> Result<u64> {
    let mut draw = Draw::new(run.seed);
    let mut kills = 0;
    let mut killed: Option<Process> = None;
    while running.goes_on_for(draw.pause_ms(100, 1000))? {
        // A successor may need a moment; one pager is killed once.
        if let Some(pager) = pager_pids(running.family())
            .into_iter()
            .find(|pager| Some(*pager) != killed)
        {
            pager.signal("KILL")?;
            killed = Some(pager);
            kills += 1;
        }
    }
    print_line(&format!("# pager_kills={kills}"));
    ensure!(
        kills > 0 || run.binaries.is_none(),
        "no pager was seen: nothing was killed"
    );
    Ok(kills)
}

/// Stops the target with SIGSTOP for a while and lets it go on, over and over.
///
/// # Errors
/// It does not stop, does not go on, or ends with wrong data.
pub fn stop_and_continue(run: &Run<'_>, binaries: &Path) -> Result<()> {
    let mut running = WRITE_RACE.plan(run, binaries)?.start(run)?;
    let target = running.target()?;
    let mut draw = Draw::new(run.seed);
    let mut stops = 0;
    while running.goes_on_for(draw.pause_ms(20, 400))? {
        target.signal("STOP")?;
        if !reaches(&mut running, target, true)? {
            break;
        }
        running.goes_on_for(draw.pause_ms(5, 600))?;
        let state = target.state();
        ensure!(state == Some('T'), "a stopped target is in state {state:?}");
        target.signal("CONT")?;
        reaches(&mut running, target, false)?;
        stops += 1;
    }
    running.finish()?;
    print_line(&format!("# stops={stops}"));
    ensure!(stops > 0, "the target was never stopped");
    Ok(())
}

/// Waits until the target is stopped, or not; false when it has gone.
fn reaches(running: &mut Running, target: Process, stopped: bool) -> Result<bool> {
    let until = Instant::now() + STOP_DEADLINE;
    loop {
        match target.state() {
            None | Some('Z' | 'X') => return Ok(false),
            Some(state) if (state == 'T') == stopped => return Ok(true),
            Some(state) if Instant::now() >= until => {
                bail!("in state {state} {STOP_DEADLINE:?} after the signal")
            }
            Some(_) => running.goes_on()?,
        };
    }
}

/// Looks at the target with gdb, ps and gcore while it is paged.
///
/// # Errors
/// A tool hangs or sees nothing, or the target ends with wrong data.
pub fn debuggers(run: &Run<'_>, binaries: &Path) -> Result<()> {
    let mut running = WRITE_RACE.plan(run, binaries)?.start(run)?;
    let target = running.target()?;
    running.goes_on_for(Duration::from_secs(2))?;
    let pid = target.pid.to_string();
    let core = run.scratch.join("core");
    let mut looks = 0;
    while running.goes_on_for(Duration::from_millis(300))? {
        let gdb: &[&str] = &[
            "-nx",
            "-p",
            &pid,
            "-batch",
            "-ex",
            "bt",
            "-ex",
            "thread apply all bt 2",
        ];
        let tools: [(&str, &[&str], &str); 3] = [
            (
                "ps",
                &["-L", "-o", "pid,stat,rss,wchan:20,args", "-p", &pid],
                &pid,
            ),
            ("gdb", gdb, "#0"),
            (
                "gcore",
                &["-o", core.to_str().context("a path that is no text")?, &pid],
                "Saved corefile",
            ),
        ];
        let mut saw = 0;
        for (tool, arguments, expected) in tools {
            match bounded(tool, arguments)? {
                Some(said) if said.contains(expected) => saw += 1,
                Some(said) if target.alive() => {
                    bail!("{tool} says only: {}", said.trim().replace('\n', " | "))
                }
                Some(_) => {} // the target had ended before
                None => bail!("{tool} hangs"),
            }
        }
        looks += u32::from(saw == tools.len());
        // Not a copy of every look is kept.
        let _ = std::fs::remove_file(core.with_extension(&pid));
    }
    running.finish()?;
    print_line(&format!("# looks={looks}"));
    ensure!(looks > 0, "the target ended before the tools had looked");
    Ok(())
}

/// Runs a tool to its end and returns what it said; none when it overran and was killed.
fn bounded(tool: &str, arguments: &[&str]) -> Result<Option<String>> {
    let mut child = Command::new(tool)
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .with_context(|| format!("running {tool}"))?;
    let mut stdout = child.stdout.take().context("no pipe")?;
    let reader = thread::spawn(move || {
        let mut said = String::new();
        std::io::Read::read_to_string(&mut stdout, &mut said).map(|_| said)
    });
    let until = Instant::now() + TOOL_DEADLINE;
    while child.try_wait()?.is_none() {
        if Instant::now() >= until {
            let process = Process::of(child.id());
            print_line(&format!(
                "# {tool} in state {:?}",
                process.and_then(Process::state)
            ));
            child.kill()?;
            child.wait()?;
            return Ok(None);
        }
        thread::sleep(LOOK_EVERY);
    }
    Ok(Some(
        reader
            .join()
            .map_err(|_| anyhow::anyhow!("reading {tool}"))??,
    ))
}
