//! Cases in which the driver interferes: it kills pagers, stops and continues the target, and looks at
//! it with debuggers, all under load.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};

use super::cases::{Program, WRITE_RACE};
use super::harness::Draw;
use super::harness::launch::Running;
use super::harness::process::Process;
use super::harness::suite::{Run, print_line};
use super::harness::tool::Tool;

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
    running.kill_pagers(run.seed);
    program.judge(&running.finish()?, run)
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
        target.signal(libc::SIGSTOP);
        if !reaches(&mut running, target, true)? {
            break;
        }
        running.goes_on_for(draw.pause_ms(5, 600))?;
        let state = target.state();
        ensure!(state == Some('T'), "a stopped target is in state {state:?}");
        target.signal(libc::SIGCONT);
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
                let why = format!("in state {state} {STOP_DEADLINE:?} after the signal");
                return Err(running.hung(&why));
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
            match Tool::start(tool, arguments)?
                .wait(TOOL_DEADLINE)?
                .map(|said| said.out)
            {
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
