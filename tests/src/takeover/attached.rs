//! Deaths of a pager around `holo attach` and `holo detach` of a program that runs already.

use std::ffi::OsString;
use std::io::ErrorKind;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use holo_pager::core::CrashPoint;
use holo_pager::shell::request;
use holo_proto::Report;

use super::load::{self, EVERYTHING, SIZE_MIB};
use super::traces::{Traces, await_traces};
use super::tree::{self, Role, TOKEN, Tree};
use crate::procs;
use crate::torture::harness::Draw;
use crate::torture::harness::holo::Binaries;
use crate::torture::harness::launch::Running;
use crate::torture::harness::process::Process;
use crate::torture::harness::suite::{Case, Run, print_line};
use crate::torture::harness::tool::{Said, Tool};
use crate::torture::harness::verdict::{self, Expected};

/// From start to end of a case.
const DEADLINE: Duration = Duration::from_secs(180);

/// How long attaching or detaching may take.
const COMMAND_DEADLINE: Duration = Duration::from_secs(40);

/// Times that the pager is killed in an attach, and in a detach, at least.
const ROUNDS: u64 = 12;

/// At most, where too few of them were in time.
const ROUNDS_MAX: u64 = 36;

/// How many of them have to be in time: a successor finished what the dead pager was doing.
const HITS: u64 = 3;

/// Times that a program is attached to right after it was let go of.
const AGAIN: u64 = 8;

/// Times that a program is attached to which never pauses.
const RESTLESS: u64 = 4;

/// The pager is killed so many microseconds after it was seen, at most.
const ATTACH_US_MAX: u64 = 50_000;

/// The pager is killed so many microseconds after the detach began, at most.
const DETACH_US_MAX: u64 = 60_000;

/// How long it may take until pages of a held program have left and come back.
const PAGING: Duration = Duration::from_secs(30);

/// The cases.
pub fn cases(folder: &Path) -> Vec<Case> {
    let case = |name: &str, body: fn(&Run<'_>, &Path) -> Result<()>| {
        let folder = folder.to_owned();
        Case::new(name, move |run| body(run, &folder))
    };
    vec![
        case("attach.killed", killed_in_attach),
        case("detach.killed", killed_in_detach),
        case("attach.orphaned", orphaned),
        case("attach.again", attached_again),
        case("attach.restless", restless),
    ]
}

/// A bare program, and holo beside it.
struct Held<'a> {
    running: Running,
    target: Process,
    binaries: &'a Binaries,
}

impl<'a> Held<'a> {
    /// None in a bare run, in which the program has then been run and checked.
    fn start(run: &Run<'a>, folder: &Path, what: &[&str]) -> Result<Option<Self>> {
        let bare = run.without_holo();
        let plan = load::plan(&bare, folder, what, "bare", DEADLINE)?;
        let mut running = plan.start(&bare)?;
        running.wait_for("@ready")?;
        let target = running.first().context("the program has gone")?;
        let Some(binaries) = run.binaries else {
            running.finish()?;
            return Ok(None);
        };
        Ok(Some(Self {
            running,
            target,
            binaries,
        }))
    }

    /// Starts `holo attach` with a token, and this crash point.
    fn attach(&self, token: &str, report: &Path, crash: Option<CrashPoint>) -> Result<Tool> {
        let mut line: Vec<OsString> = vec![format!("{TOKEN}={token}").into()];
        line.extend(crash.map(|point| format!("HOLO_CRASH_AT={}", point.name()).into()));
        line.push(self.binaries.holo.clone().into());
        line.push("attach".into());
        line.push(self.target.pid.to_string().into());
        line.push("--local-memory".into());
        line.push(format!("{}K", budget_bytes() / 1024).into());
        line.push("--report".into());
        line.push(report.into());
        Tool::start("/usr/bin/env", line)
    }

    fn detach(&self) -> Result<Tool> {
        Tool::start(
            &self.binaries.holo,
            ["detach", &self.target.pid.to_string()],
        )
    }

    /// Waits for a command of holo's.
    fn end_of(&mut self, tool: Tool, name: &str) -> Result<Said> {
        match tool.wait(COMMAND_DEADLINE)? {
            Some(said) => Ok(said),
            None => Err(self.running.hung(&format!("{name} does not return"))),
        }
    }

    /// Detaches from here, and asks for its pager the moment the answer is there: a command would come too late
    /// to find it still listening.
    fn detached_is_free(&mut self) -> Result<()> {
        let pid = self.target.pid;
        let said = procs::bounded(COMMAND_DEADLINE, move || {
            let answer = request(pid, "detach");
            (answer, request(pid, "status"))
        });
        match said {
            None => Err(self.running.hung("a detach does not return")),
            Some((Err(error), _)) => Err(error).context("no answer to a detach"),
            Some((Ok(answer), Err(error))) if error.kind() == ErrorKind::ConnectionRefused => {
                serde_json::from_str::<Report>(&answer)
                    .map(drop)
                    .with_context(|| format!("a detach is answered with {answer:?}"))
            }
            Some((Ok(_), after)) => bail!("detached, and its pager still answers: {after:?}"),
        }
    }

    fn must_succeed(&mut self, tool: Tool, name: &str) -> Result<()> {
        let said = self.end_of(tool, name)?;
        if said.code != Some(0) {
            bail!("{name} ended with {:?}: {}", said.code, said.err.trim());
        }
        Ok(())
    }

    /// Works on until pages have left and come back.
    fn await_paging(&mut self) -> Result<()> {
        let until = Instant::now() + PAGING;
        while self.status()?.faults_remote == 0 {
            if Instant::now() >= until {
                return Err(self.running.hung("held, but not paged"));
            }
            if !self.running.goes_on()? {
                return Err(tree::ended(&mut self.running, "a page came back"));
            }
        }
        load::goes_on(&mut self.running, "under holo")
    }

    fn status(&mut self) -> Result<Report> {
        let pid = self.target.pid.to_string();
        let tool = Tool::start(&self.binaries.holo, ["status", &pid, "--json"])?;
        let said = self.end_of(tool, "holo status")?;
        serde_json::from_str(&said.out)
            .with_context(|| format!("holo status says {:?} {:?}", said.out, said.err))
    }

    fn await_free(&mut self, when: &str) -> Result<()> {
        let what = format!("left in the program {when}");
        await_traces(&mut self.running, self.target, &what, Traces::is_clean)?;
        load::goes_on(&mut self.running, when)
    }
}

fn budget_bytes() -> u64 {
    (SIZE_MIB << 20) / 4
}

/// The pager dies at `point`, which only a detach reaches.
///
/// # Errors
/// Whatever was not as it has to be.
pub fn crash_in_detach(run: &Run<'_>, folder: &Path, point: CrashPoint) -> Result<()> {
    let Some(mut held) = Held::start(run, folder, EVERYTHING)? else {
        return Ok(());
    };
    let token = load::new_token();
    let report = run.scratch.join("attached.json");
    let attach = held.attach(&token, &report, Some(point))?;
    let tree = Tree::find(&mut held.running, &token)?;
    held.must_succeed(attach, "holo attach")?;
    held.await_paging()?;
    let detach = held.detach()?;
    held.must_succeed(detach, "holo detach")?;
    held.await_free("after the detach")?;
    tree.await_end(&mut held.running)?;
    held.running.finish()?;
    let seen = verdict::check(&report, expected())?;
    ensure!(seen.takeovers == 1, "{} take-overs, want 1", seen.takeovers);
    Ok(())
}

fn expected() -> Expected {
    Expected {
        local_memory_bytes: budget_bytes(),
        exit_code: None,
        pressure: true,
        takeovers_min: 0,
    }
}

/// An attach whose pager dies either holds the process or says that it does not; then nothing is left.
fn killed_in_attach(run: &Run<'_>, folder: &Path) -> Result<()> {
    let Some(mut held) = Held::start(run, folder, EVERYTHING)? else {
        return Ok(());
    };
    let mut moments = Moments::new(run.seed, ATTACH_US_MAX);
    let mut refused = 0;
    while let Some((round, moment)) = moments.next()? {
        let token = load::new_token();
        let report = run.scratch.join(format!("attached-{round}.json"));
        let mut attach = held.attach(&token, &report, None)?;
        let tree = Tree::find(&mut held.running, &token)?;
        let pager = tree.next_pager(&mut held.running, None)?;
        thread::sleep(moment);
        let in_time = !attach.ended()?;
        pager.signal(libc::SIGKILL);
        let said = held.end_of(attach, "holo attach")?;
        if said.code == Some(0) {
            load::goes_on(&mut held.running, "after an attach with a take-over")?;
            held.await_paging()?;
            let detach = held.detach()?;
            held.must_succeed(detach, "holo detach")?;
            held.await_free("after a detach")?;
        } else {
            refused += 1;
            ensure!(
                in_time,
                "round {round}: refused before anything was killed: {}",
                said.err.trim()
            );
            ensure!(
                !said.err.trim().is_empty(),
                "round {round}: a failed attach says nothing"
            );
            held.await_free("after a failed attach")?;
        }
        tree.await_end(&mut held.running)?;
        if !in_time {
            moments.too_late();
        } else if said.code == Some(0) && verdict::check(&report, expected())?.takeovers > 0 {
            moments.hit();
        }
    }
    let Moments { rounds, hits, .. } = moments;
    print_line(&format!("# attaches={rounds} hit={hits} refused={refused}"));
    held.running.finish().map(drop)
}

/// Threads that move their memory without a pause leave hardly a moment for an operation that no change of mappings
/// may overlap with: they are brought down to the budget and let go of all the same.
fn restless(run: &Run<'_>, folder: &Path) -> Result<()> {
    let Some(mut held) = Held::start(run, folder, &["move"])? else {
        return Ok(());
    };
    let target = held.target;
    let resident_kib = || target.kib("status", "RssAnon");
    let budget_kib = budget_bytes() / 1024;
    let all_kib = resident_kib()?;
    ensure!(
        all_kib > 3 * budget_kib,
        "only {all_kib} KiB are resident before the attach"
    );
    for round in 0..RESTLESS {
        let token = load::new_token();
        let report = run.scratch.join(format!("attached-{round}.json"));
        let attach = held.attach(&token, &report, None)?;
        held.must_succeed(attach, "holo attach")?;
        tree::until(&mut held.running, "the budget to be kept", |_| {
            (resident_kib().ok()? <= budget_kib * 5 / 4).then_some(())
        })?;
        load::goes_on(&mut held.running, "at its budget")?;
        let detach = held.detach()?;
        held.must_succeed(detach, "holo detach")?;
        held.await_free("after a detach")?;
        verdict::check(&report, expected())?;
    }
    held.running.finish().map(drop)
}

/// A detach whose pager dies goes on with its successor.
fn killed_in_detach(run: &Run<'_>, folder: &Path) -> Result<()> {
    let Some(mut held) = Held::start(run, folder, EVERYTHING)? else {
        return Ok(());
    };
    let mut moments = Moments::new(run.seed, DETACH_US_MAX);
    while let Some((round, moment)) = moments.next()? {
        let token = load::new_token();
        let report = run.scratch.join(format!("attached-{round}.json"));
        let attach = held.attach(&token, &report, None)?;
        let tree = Tree::find(&mut held.running, &token)?;
        held.must_succeed(attach, "holo attach")?;
        held.await_paging()?;
        let pager = tree.next_pager(&mut held.running, None)?;
        let detach = held.detach()?;
        thread::sleep(moment);
        pager.signal(libc::SIGKILL);
        held.must_succeed(detach, "holo detach")?;
        held.await_free("after a detach with a take-over")?;
        tree.await_end(&mut held.running)?;
        if verdict::check(&report, expected())?.takeovers > 0 {
            moments.hit();
        } else {
            moments.too_late();
        }
    }
    let Moments { rounds, hits, .. } = moments;
    print_line(&format!("# detaches={rounds} hit={hits}"));
    held.running.finish().map(drop)
}

/// When the pager is killed, counted from the start of what it is to die in. Goes on until enough kills were in time.
struct Moments {
    draw: Draw,
    latest_us: u64,
    drawn_us: u64,
    rounds: u64,
    hits: u64,
}

impl Moments {
    fn new(seed: u64, latest_us: u64) -> Self {
        Self {
            draw: Draw::new(seed),
            latest_us,
            drawn_us: 0,
            rounds: 0,
            hits: 0,
        }
    }

    /// The number of the next round and its moment, until there were enough.
    fn next(&mut self) -> Result<Option<(u64, Duration)>> {
        let (round, hits) = (self.rounds, self.hits);
        if round >= ROUNDS && hits >= HITS {
            return Ok(None);
        }
        ensure!(
            round < ROUNDS_MAX,
            "{hits} of {round} kills were taken over in time, want {HITS}: this has hardly been tested"
        );
        self.rounds += 1;
        self.drawn_us = self.draw.between(0, self.latest_us);
        Ok(Some((round, Duration::from_micros(self.drawn_us))))
    }

    fn hit(&mut self) {
        self.hits += 1;
    }

    /// All was over by then: the next ones come before that, though not all at the very beginning.
    fn too_late(&mut self) {
        self.latest_us = self.drawn_us.max(self.latest_us / 2);
    }
}

/// Guardian and pager die at once: the warden brings them back, and a detach leaves nothing.
fn orphaned(run: &Run<'_>, folder: &Path) -> Result<()> {
    let Some(mut held) = Held::start(run, folder, EVERYTHING)? else {
        return Ok(());
    };
    let token = load::new_token();
    let report = run.scratch.join("attached.json");
    let attach = held.attach(&token, &report, None)?;
    let tree = Tree::find(&mut held.running, &token)?;
    held.must_succeed(attach, "holo attach")?;
    held.await_paging()?;
    let dead = [
        tree.next(&mut held.running, Role::Guardian, &[])?,
        tree.next(&mut held.running, Role::Pager, &[])?,
    ];
    for process in dead {
        process.signal(libc::SIGKILL);
    }
    for role in Role::ALL {
        tree.next(&mut held.running, role, &dead)?;
    }
    load::goes_on(&mut held.running, "after the deaths")?;
    let detach = held.detach()?;
    held.must_succeed(detach, "holo detach")?;
    held.await_free("after a detach")?;
    tree.await_end(&mut held.running)?;
    held.running.finish().map(drop)
}

/// Whoever was told that a process was let go of can attach to it at once. A pager that took over has more to
/// let go of than the first one; all rounds but one have such a one.
fn attached_again(run: &Run<'_>, folder: &Path) -> Result<()> {
    let Some(mut held) = Held::start(run, folder, EVERYTHING)? else {
        return Ok(());
    };
    for round in 0..AGAIN {
        let token = load::new_token();
        let report = run.scratch.join(format!("attached-{round}.json"));
        let attach = held.attach(&token, &report, None)?;
        held.must_succeed(attach, &format!("holo attach, round {round},"))?;
        let tree = Tree::find(&mut held.running, &token)?;
        if round > 0 {
            let dead = tree.next_pager(&mut held.running, None)?;
            dead.signal(libc::SIGKILL);
            tree.next_pager(&mut held.running, Some(dead))?;
        }
        held.detached_is_free()
            .with_context(|| format!("round {round}"))?;
    }
    held.await_free("after the last detach")?;
    held.running.finish().map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kills_that_were_never_in_time_are_a_failure() {
        let mut moments = Moments::new(1, DETACH_US_MAX);
        let mut rounds = 0;
        let end = loop {
            match moments.next() {
                Ok(Some(_)) => moments.too_late(),
                end => break end,
            }
            rounds += 1;
        };
        assert!(end.is_err());
        assert_eq!(rounds, ROUNDS_MAX);
        assert!(moments.latest_us < DETACH_US_MAX);

        let mut moments = Moments::new(1, DETACH_US_MAX);
        while moments.next().unwrap().is_some() {
            moments.hit();
        }
        assert_eq!((moments.rounds, moments.hits), (ROUNDS, ROUNDS));
    }
}
