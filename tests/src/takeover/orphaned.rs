//! Sessions that lose more than their pager.
//!
//! Any one that is left of pager, guardian and warden brings back the others, and the program notices
//! nothing. When all of them die at once nobody is left: then the program is killed, with its children, and
//! `holo-exec` says why.

use std::fs;
use std::path::Path;
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};

use super::load::{self, EVERYTHING};
use super::tree::{self, Role, Tree};
use crate::torture::harness::Draw;
use crate::torture::harness::launch::Running;
use crate::torture::harness::process::Process;
use crate::torture::harness::suite::{Case, Run, print_line};

/// From start to end.
const DEADLINE: Duration = Duration::from_secs(120);

/// Pages have left and come back by then.
const PRESSURE: Duration = Duration::from_secs(2);

/// 128 + SIGKILL.
const KILLED: i32 = 137;

/// Rounds of `orphaned.random`.
const ROUNDS: u64 = 15;

/// Two die within so many microseconds, at most.
const APART_US_MAX: u64 = 6000;

use Role::{Guardian, Pager, Warden};

/// Deaths one after the other, each time of these at once; between them all are back.
type Deaths = &'static [&'static [Role]];

/// The cases.
pub fn cases(folder: &Path) -> Vec<Case> {
    let replaced = |name: &str, what: &'static [&'static str], deaths: Deaths| {
        let folder = folder.to_owned();
        Case::new(name, move |run| {
            with_deaths(run, &folder, what, |running, tree, _| {
                for roles in deaths {
                    die_together(running, tree, roles)?;
                }
                Ok(())
            })
        })
    };
    let all_dead = |name: &str, what: &'static [&'static str]| {
        let folder = folder.to_owned();
        Case::new(name, move |run| killed(run, &folder, what))
    };
    let random = folder.to_owned();
    vec![
        replaced("orphaned.at_once", EVERYTHING, &[&[Guardian, Pager]]),
        replaced(
            "orphaned.at_once_with_children",
            &["fork"],
            &[&[Guardian, Pager]],
        ),
        replaced(
            "orphaned.guardian_first",
            EVERYTHING,
            &[&[Guardian], &[Pager]],
        ),
        replaced(
            "orphaned.warden_first",
            EVERYTHING,
            &[&[Warden], &[Guardian], &[Pager]],
        ),
        replaced(
            "orphaned.pager_alone",
            EVERYTHING,
            &[&[Guardian, Warden], &[Pager], &[Guardian]],
        ),
        replaced(
            "orphaned.guardian_alone",
            EVERYTHING,
            &[&[Warden, Pager], &[Guardian, Pager]],
        ),
        Case::new("orphaned.random", move |run| {
            with_deaths(run, &random, EVERYTHING, |running, tree, seed| {
                let mut draw = Draw::new(seed);
                for _ in 0..ROUNDS {
                    two_die(running, tree, &mut draw)?;
                }
                Ok(())
            })
        }),
        all_dead("orphaned.all", &["drop", "move", "direct"]),
        all_dead("orphaned.all_with_children", &["fork"]),
    ]
}

/// Runs the program under pressure with these deaths; it ends right.
fn with_deaths(
    run: &Run<'_>,
    folder: &Path,
    what: &[&str],
    deaths: impl Fn(&mut Running, &Tree, u64) -> Result<()>,
) -> Result<()> {
    let token = load::new_token();
    let plan = load::plan(run, folder, what, &token, DEADLINE)?;
    let mut running = plan.start(run)?;
    running.wait_for("@ready")?;
    if run.binaries.is_none() {
        return running.finish().map(drop);
    }
    let tree = Tree::find(&mut running, &token)?;
    load::goes_on(&mut running, "before anything dies")?;
    running.goes_on_for(PRESSURE)?;
    deaths(&mut running, &tree, run.seed)?;
    let pager = tree.next_pager(&mut running, None)?;
    load::goes_on(&mut running, "after the last death")?;
    ensure!(pager.alive(), "the last pager died by itself");
    let report = running.finish()?.report.context("no report")?;
    print_line(&format!("# takeovers={}", report.takeovers));
    Ok(())
}

fn of(running: &mut Running, tree: &Tree, roles: &[Role]) -> Result<Vec<Process>> {
    roles
        .iter()
        .map(|&role| tree.next(running, role, &[]))
        .collect()
}

fn die_together(running: &mut Running, tree: &Tree, roles: &[Role]) -> Result<()> {
    let victims = of(running, tree, roles)?;
    kill_together(running, &victims)?;
    all_are_back(running, tree, &victims)
}

/// None of them sees another's death.
fn kill_together(running: &mut Running, victims: &[Process]) -> Result<()> {
    stop_between_injections(running, victims)?;
    for victim in victims {
        victim.signal(libc::SIGKILL);
    }
    Ok(())
}

/// Stops them at a moment at which none traces anything: a process that is traced by one that dies is killed
/// with it, which is a stated limit.
fn stop_between_injections(running: &mut Running, victims: &[Process]) -> Result<()> {
    loop {
        for victim in victims {
            victim.signal(libc::SIGSTOP);
        }
        tree::until(running, "all that are to die are stopped", |_| {
            victims.iter().all(|v| is_stopped(*v)).then_some(())
        })?;
        // The tracer is a thread of the guardian's, not its first one.
        let dying: Vec<i32> = victims.iter().flat_map(|victim| victim.threads()).collect();
        let family = running.family().members();
        let traced = family.iter().any(|proc| {
            let tracers = tracers_of(proc.id.pid);
            tracers.iter().any(|tid| dying.contains(tid))
        });
        if !traced {
            return Ok(());
        }
        for victim in victims {
            victim.signal(libc::SIGCONT);
        }
        thread::sleep(Duration::from_millis(1));
    }
}

/// Each of its threads: one that is in a system call ends that first.
fn is_stopped(process: Process) -> bool {
    let states: Vec<Option<char>> = process
        .threads()
        .into_iter()
        .map(|tid| {
            let stat = fs::read_to_string(format!("/proc/{}/task/{tid}/stat", process.pid)).ok()?;
            stat.rsplit_once(") ")?.1.chars().next()
        })
        .collect();
    states.iter().all(|state| *state == Some('T'))
}

/// The threads that trace threads of a process.
fn tracers_of(pid: i32) -> Vec<i32> {
    let Ok(threads) = fs::read_dir(format!("/proc/{pid}/task")) else {
        return Vec::new();
    };
    threads
        .flatten()
        .filter_map(|thread| fs::read_to_string(thread.path().join("status")).ok())
        .filter_map(|status| {
            let line = status.lines().find_map(|l| l.strip_prefix("TracerPid:"))?;
            line.trim().parse().ok()
        })
        .collect()
}

fn all_are_back(running: &mut Running, tree: &Tree, dead: &[Process]) -> Result<()> {
    for role in Role::ALL {
        tree.next(running, role, dead)?;
    }
    load::goes_on(running, "after deaths")
}

/// Two of them die one shortly after the other, also in the middle of what the first death sets off.
fn two_die(running: &mut Running, tree: &Tree, draw: &mut Draw) -> Result<()> {
    let spared = usize::try_from(draw.between(0, 3))?;
    let mut victims = of(running, tree, &Role::ALL)?;
    victims.remove(spared);
    if draw.between(0, 2) == 1 {
        victims.reverse();
    }
    for victim in &victims {
        stop_between_injections(running, &[*victim])?;
        victim.signal(libc::SIGKILL);
        thread::sleep(Duration::from_micros(draw.between(0, APART_US_MAX)));
    }
    all_are_back(running, tree, &victims)
}

/// All die at once: so does the program, and its children.
fn killed(run: &Run<'_>, folder: &Path, what: &[&str]) -> Result<()> {
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
    load::goes_on(&mut running, "before anything dies")?;
    running.goes_on_for(PRESSURE)?;
    let victims = of(&mut running, &tree, &Role::ALL)?;
    kill_together(&mut running, &victims)?;
    // The end comes by itself: the program's input stays open.
    while running.goes_on()? {}
    let end = running.finish()?;
    let said = String::from_utf8_lossy(&end.stderr).into_owned();
    ensure!(
        said.contains("all died") && said.contains("was killed"),
        "no explanation on standard error: {said:?}"
    );
    ensure!(!said.contains("WRONG"), "wrong data was seen: {said}");
    let report = end.report.context("no report")?;
    ensure!(report.takeovers == 0, "{} take-overs", report.takeovers);
    Ok(())
}
