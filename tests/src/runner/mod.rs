//! The runner of all test suites: what the manifest lists is run, counted, bounded and cleaned up after.
//!
//! It knows nothing of holo. A suite that is missing, skips something, runs fewer cases than the manifest
//! says, takes twice its time or leaves a process behind has failed.

mod args;
mod cargo;
mod cgroups;
mod count;
mod manifest;
mod seed;
mod suite;

use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};

use args::{Args, Task, USAGE};
use cargo::Built;
use manifest::{CargoTarget, Manifest, Program, Suite, Terms, Tier};
use seed::SeedSource;
use suite::{Context, Outcome};

use crate::procs::RUN_ID_VAR;
use crate::sys;

/// Prints a line, calm where nobody reads it any more.
macro_rules! say {
    ($($part:tt)*) => {{
        let _ = writeln!(io::stdout(), $($part)*);
    }};
}

/// Runs the command line; prints `N passed, N failed` last, where suites were to run.
pub fn main(words: impl IntoIterator<Item = String>) -> ExitCode {
    let args = match Args::parse(words) {
        Ok(args) => args,
        Err(error) => {
            let _ = writeln!(io::stderr(), "holo-test: {error:#}\n{USAGE}");
            return ExitCode::from(2);
        }
    };
    let totals = match args.task {
        Task::List => return exit_code(list(&args)),
        Task::Build => return exit_code(prepare(&args).map(drop)),
        Task::Run { fast_only } => Run::prepare(&args).and_then(|run| run.once(fast_only)),
        Task::Soak { minutes, rounds } => {
            Run::prepare(&args).and_then(|run| run.soak(minutes, rounds))
        }
    };
    let totals = totals.unwrap_or_else(|error| {
        say!("FAIL nothing was run: {error:#}");
        Totals {
            passed: 0,
            failed: 1,
        }
    });
    say!("{} passed, {} failed", totals.passed, totals.failed);
    match sys::stop_signal() {
        Some(signal) => ExitCode::from(u8::try_from(128 + signal).unwrap_or(1)),
        None if totals.failed == 0 => ExitCode::SUCCESS,
        None => ExitCode::FAILURE,
    }
}

fn exit_code(result: Result<()>) -> ExitCode {
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let _ = writeln!(io::stderr(), "holo-test: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn read_manifest(args: &Args) -> Result<Manifest> {
    let path = args
        .manifest
        .clone()
        .unwrap_or_else(|| args.root.join("tests/manifest.toml"));
    Manifest::read(&path)
}

fn list(args: &Args) -> Result<()> {
    for suite in read_manifest(args)?.suites {
        let tier = format!("{:?}", suite.tier).to_lowercase();
        say!(
            "{:<24} {tier:<5} {:>5} cases {:>5} s",
            suite.name,
            suite.cases,
            suite.ordinary.allowed.as_secs()
        );
    }
    Ok(())
}

/// What is there before the first suite starts.
struct Prepared {
    built: Built,
    bin_dir: PathBuf,
    logs: PathBuf,
}

fn prepare(args: &Args) -> Result<Prepared> {
    let (built, target) = if args.builds {
        (cargo::build(&args.root)?, cargo::target_folder(&args.root)?)
    } else {
        let own = std::env::current_exe().context("the runner's own path")?;
        let beside = own
            .parent()
            .and_then(Path::parent)
            .map_or_else(PathBuf::new, Path::to_path_buf);
        (Built::default(), beside)
    };
    let bin_dir = if args.builds {
        target.join("release")
    } else {
        std::env::current_exe()?
            .parent()
            .map_or_else(PathBuf::new, Path::to_path_buf)
    };
    Ok(Prepared {
        built,
        bin_dir,
        logs: args
            .logs
            .clone()
            .unwrap_or_else(|| target.join("test-logs")),
    })
}

#[derive(Debug, Default, Clone, Copy)]
struct Totals {
    passed: u64,
    failed: u64,
}

/// A run of several suites.
struct Run<'a> {
    args: &'a Args,
    root: PathBuf,
    manifest: Manifest,
    prepared: Prepared,
    seeds: SeedSource,
    totals: Totals,
    started: u64,
}

impl<'a> Run<'a> {
    fn prepare(args: &'a Args) -> Result<Self> {
        let manifest = read_manifest(args)?;
        for name in &args.suites {
            let known = manifest.suites.iter().any(|suite| suite.name == *name);
            ensure!(
                known,
                "no suite is called \"{name}\" (holo-test list shows them)"
            );
        }
        let seed = match std::env::var("HOLO_SEED") {
            Ok(text) => Some(
                text.parse()
                    .with_context(|| format!("HOLO_SEED={text}: not a whole number"))?,
            ),
            Err(_) => None,
        };
        let root = args
            .root
            .canonicalize()
            .with_context(|| format!("the checkout {}", args.root.display()))?;
        let seeds = SeedSource::find(seed, &root);
        let prepared = prepare(args)?;
        std::fs::create_dir_all(&prepared.logs)
            .with_context(|| format!("making {}", prepared.logs.display()))?;
        sys::catch_stop_signals();
        sys::become_subreaper().context("adopting orphans")?;
        Ok(Self {
            args,
            root,
            manifest,
            prepared,
            seeds,
            totals: Totals::default(),
            started: 0,
        })
    }

    /// The suites of a tier, or those that were named, once each.
    fn once(mut self, fast_only: bool) -> Result<Totals> {
        let is_chosen = |suite: &Suite| match suite.tier {
            _ if !self.args.suites.is_empty() => self.args.suites.contains(&suite.name),
            Tier::Fast => true,
            Tier::Full => !fast_only,
            Tier::Soak => false,
        };
        let chosen: Vec<Suite> = self
            .manifest
            .suites
            .iter()
            .filter(|suite| is_chosen(suite))
            .cloned()
            .collect();
        ensure!(!chosen.is_empty(), "no suite is of this tier");
        let begun = Instant::now();
        for suite in &chosen {
            self.one(suite, &suite.ordinary, None, 0);
            if sys::stop_signal().is_some() {
                return Ok(self.totals);
            }
        }
        if self.args.suites.is_empty() && self.args.builds {
            self.check_unlisted();
        }
        say!("{} suites in {}", chosen.len(), seconds(begun.elapsed()));
        Ok(self.totals)
    }

    /// The soak suites in turn until the time is over; the suite that runs then ends first.
    fn soak(mut self, minutes: u64, rounds_max: Option<u64>) -> Result<Totals> {
        for suite in self
            .manifest
            .suites
            .iter()
            .filter(|suite| self.args.suites.contains(&suite.name))
        {
            ensure!(
                suite.soak.is_some(),
                "suite \"{}\" is not soaked: no tier \"soak\", no soak_args",
                suite.name
            );
        }
        let is_named =
            |suite: &Suite| self.args.suites.is_empty() || self.args.suites.contains(&suite.name);
        let with_terms = |suite: &Suite| suite.soak.clone().map(|terms| (suite.clone(), terms));
        let chosen: Vec<(Suite, Terms)> = self
            .manifest
            .suites
            .iter()
            .filter(|suite| is_named(suite))
            .filter_map(with_terms)
            .collect();
        ensure!(!chosen.is_empty(), "no suite is to be soaked");
        let end = Instant::now() + Duration::from_secs(minutes * 60);
        let is_over = || Instant::now() >= end || sys::stop_signal().is_some();
        for round in 0_u64.. {
            let left_to_run = |suite: &Suite| {
                let limits = [rounds_max, suite.rounds];
                limits.into_iter().flatten().all(|limit| round < limit)
            };
            let turn: Vec<&(Suite, Terms)> = chosen
                .iter()
                .filter(|(suite, _)| left_to_run(suite))
                .collect();
            if turn.is_empty() || is_over() {
                break;
            }
            for (suite, terms) in turn {
                if is_over() {
                    say!(
                        "suite {}: the time is over before its round {}",
                        suite.name,
                        round + 1
                    );
                    continue;
                }
                // Round 0 is what ordinary runs have seen.
                self.one(suite, terms, Some(minutes), round + 1);
            }
        }
        Ok(self.totals)
    }

    fn one(&mut self, suite: &Suite, terms: &Terms, soak_minutes: Option<u64>, round: u64) {
        let seed = self.seeds.seed(&suite.name, round);
        let turn = if round > 0 {
            format!(", round {round}")
        } else {
            String::new()
        };
        say!("suite {}{turn}: HOLO_SEED={seed}", suite.name);
        self.started += 1;
        let own_id = format!("{}.{}", std::process::id(), self.started);
        let run_id = std::env::var(RUN_ID_VAR)
            .map_or_else(|_| own_id.clone(), |outer| format!("{outer}/{own_id}"));
        let context = Context {
            root: &self.root,
            bin_dir: &self.prepared.bin_dir,
            logs: &self.prepared.logs,
            built: &self.prepared.built,
            seed,
            run_id,
            case: self.args.case.as_deref(),
            soak_minutes,
        };
        let outcome = suite::run(suite, terms, &context);
        self.totals.passed += outcome.passed;
        self.totals.failed += u64::try_from(outcome.failures()).unwrap_or(u64::MAX);
        let time = format!("{} of {}", seconds(outcome.took), seconds(terms.allowed));
        if outcome.failures() == 0 {
            say!("  ok: {} cases, {time}", outcome.passed);
        } else {
            self.report(suite, &outcome, &time, seed, soak_minutes);
        }
    }

    fn report(
        &self,
        suite: &Suite,
        outcome: &Outcome,
        time: &str,
        seed: u64,
        soak_minutes: Option<u64>,
    ) {
        let name = &suite.name;
        say!(
            "  FAIL {name}: {} passed, {} failed, {time}",
            outcome.passed,
            outcome.failures()
        );
        for problem in &outcome.problems {
            say!("  FAIL {name}: {problem}");
        }
        for case in &outcome.failed_cases {
            say!("  FAIL {name}: case {case}");
        }
        if !outcome.dump.is_empty() {
            say!(
                "--- what its processes were waiting for\n{}",
                outcome.dump.trim_end()
            );
        }
        if !outcome.tail.is_empty() {
            say!("{}---", outcome.tail);
            say!("  all of it: {}/{name}.*", self.prepared.logs.display());
        }
        let verb = match soak_minutes {
            Some(minutes) => format!("soak MINUTES={minutes} ROUNDS=1"),
            None => "test".to_owned(),
        };
        let case = match (
            &outcome.failed_cases[..],
            &outcome.problems[..],
            &suite.program,
        ) {
            // Only the test harness gives a name alone, fit to be a filter.
            ([case], [], Program::Cargo { target, .. }) if *target != CargoTarget::Doc => {
                format!(" CASE={case}")
            }
            _ => String::new(),
        };
        say!("  replay: make {verb} SUITE={name}{case} HOLO_SEED={seed}");
    }

    /// A test that nobody lists would never run, and nobody would know.
    fn check_unlisted(&mut self) {
        let is_listed = |package: &str, target: &CargoTarget| {
            self.manifest
                .suites
                .iter()
                .any(|suite| match &suite.program {
                    Program::Cargo {
                        package: listed,
                        target: listed_target,
                    } => listed == package && listed_target == target,
                    Program::Exec { .. } => false,
                })
        };
        for name in self.prepared.built.unlisted(is_listed) {
            say!("FAIL {name} has test cases, and the manifest lists no suite for it");
            self.totals.failed += 1;
        }
    }
}

fn seconds(time: Duration) -> String {
    format!("{:.1} s", time.as_secs_f64())
}
