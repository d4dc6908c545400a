//! One run of one suite: start it, watch it, end it, read what it did.

use std::collections::HashSet;
use std::ffi::OsStr;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow};

use super::cargo::{self, Built};
use super::cgroups;
use super::count::{self, Count};
use super::manifest::{CargoTarget, Program, Suite, Terms};
use crate::procs::{Proc, RUN_ID_VAR};
use crate::sys;
use crate::watchdog::{self, Family};

const POLL: Duration = Duration::from_millis(20);
/// How long what a suite leaves behind may take to end by itself: a pager notices that its targets are gone.
const GRACE: Duration = Duration::from_secs(2);

/// What a run of a suite depends on besides the suite.
#[derive(Debug)]
pub(crate) struct Context<'a> {
    pub(crate) root: &'a Path,
    pub(crate) bin_dir: &'a Path,
    pub(crate) logs: &'a Path,
    pub(crate) built: &'a Built,
    pub(crate) seed: u64,
    /// What marks the suite's processes.
    pub(crate) run_id: String,
    /// Only cases whose name holds this.
    pub(crate) case: Option<&'a str>,
    /// In a soak: how long the whole of it takes.
    pub(crate) soak_minutes: Option<u64>,
}

/// How a run of a suite ended.
#[derive(Debug, Default)]
pub(crate) struct Outcome {
    pub(crate) passed: u64,
    /// A line for each failed case.
    pub(crate) failed_cases: Vec<String>,
    /// A line for everything else that is wrong.
    pub(crate) problems: Vec<String>,
    /// What hung or leaked processes were waiting for.
    pub(crate) dump: String,
    pub(crate) took: Duration,
    /// The last lines of its output; for a failed run.
    pub(crate) tail: String,
}

impl Outcome {
    fn not_run(problem: String) -> Self {
        Self {
            problems: vec![problem],
            ..Self::default()
        }
    }

    pub(crate) fn failures(&self) -> usize {
        self.failed_cases.len() + self.problems.len()
    }
}

enum End {
    Exited(ExitStatus),
    Ended(String),
}

/// Runs the suite; leaves no process and no control group of it behind.
pub(crate) fn run(suite: &Suite, terms: &Terms, context: &Context<'_>) -> Outcome {
    if let Some(problem) = unmet_need(suite) {
        return Outcome::not_run(problem);
    }
    let started = Instant::now();
    match command(suite, terms, context).and_then(|command| watch(command, suite, terms, context)) {
        Err(error) => Outcome::not_run(format!("{error:#}")),
        Ok(mut outcome) => {
            outcome.took = started.elapsed();
            outcome
        }
    }
}

fn unmet_need(suite: &Suite) -> Option<String> {
    let missing: Vec<&str> = suite
        .needs
        .iter()
        .map(String::as_str)
        .filter(|need| !is_met(need))
        .collect();
    let needs = missing.join(", ");
    (!missing.is_empty()).then(|| {
        let remedy = if missing == ["root"] {
            "run it as root"
        } else {
            "scripts/setup installs programs"
        };
        format!("not run: it needs {needs}, not there ({remedy})")
    })
}

fn is_met(need: &str) -> bool {
    match need {
        "root" => fs::metadata("/proc/self")
            .is_ok_and(|own| std::os::unix::fs::MetadataExt::uid(&own) == 0),
        // Only where the system's packages put programs: a version manager's stand-in is something else.
        program => ["/usr/sbin", "/usr/bin", "/sbin", "/bin"]
            .iter()
            .any(|folder| Path::new(folder).join(program).exists()),
    }
}

fn command(suite: &Suite, terms: &Terms, context: &Context<'_>) -> Result<Command> {
    let mut command = match &suite.program {
        Program::Cargo {
            package,
            target: CargoTarget::Doc,
        } => {
            let mut command = cargo::cargo();
            command
                .args(["test", "--doc", "--package", package, "--"])
                .current_dir(context.root);
            command
        }
        Program::Cargo { package, target } => {
            let what = || {
                format!(
                    "missing: package \"{package}\" has no {}",
                    cargo::describe(target)
                )
            };
            let executable = context.built.find(package, target).with_context(what)?;
            let mut command = Command::new(&executable.path);
            command
                .current_dir(&executable.folder)
                .env("CARGO_MANIFEST_DIR", &executable.folder);
            command
        }
        Program::Exec { command } => {
            let (program, first_args) = command.split_first().context("an empty command")?;
            let path = find_program(program, context)?;
            let mut command = Command::new(path);
            command.args(first_args).current_dir(context.root);
            command
        }
    };
    command.args(&terms.args).envs(&suite.env);
    match (&suite.program, context.case) {
        (Program::Cargo { .. }, Some(case)) => drop(command.arg(case)),
        (Program::Exec { .. }, Some(case)) => drop(command.env("HOLO_CASE", case)),
        (_, None) => {}
    }
    command
        .env("HOLO_SEED", context.seed.to_string())
        .env("HOLO_BIN_DIR", context.bin_dir);
    command.env(RUN_ID_VAR, &context.run_id);
    match context.soak_minutes {
        Some(minutes) => command.env("HOLO_SOAK_MINUTES", minutes.to_string()),
        None => command.env_remove("HOLO_SOAK_MINUTES"),
    };
    Ok(command)
}

fn find_program(program: &str, context: &Context<'_>) -> Result<PathBuf> {
    let path = if let Some(built) = program.strip_prefix("bin:") {
        context.bin_dir.join(built)
    } else if program.contains('/') {
        context.root.join(program)
    } else {
        let folders = std::env::var_os("PATH").unwrap_or_default();
        let found = std::env::split_paths(&folders)
            .map(|folder| folder.join(program))
            .find(|path| path.is_file());
        found.unwrap_or_else(|| PathBuf::from(program))
    };
    if path.is_file() {
        Ok(path)
    } else {
        Err(anyhow!("missing: no program {}", path.display()))
    }
}

fn watch(
    mut command: Command,
    suite: &Suite,
    terms: &Terms,
    context: &Context<'_>,
) -> Result<Outcome> {
    let log = |ending: &str| context.logs.join(format!("{}.{ending}", suite.name));
    let (stdout, stderr) = (log("stdout"), log("stderr"));
    let open =
        |path: &Path| File::create(path).with_context(|| format!("writing {}", path.display()));
    // Files, not pipes: nothing that the suite leaves behind can keep the runner waiting for their end.
    command
        .stdin(Stdio::null())
        .stdout(open(&stdout)?)
        .stderr(open(&stderr)?);
    sys::start_session(&mut command);
    let groups_before: HashSet<PathBuf> = cgroups::of_tests().into_iter().collect();
    let child = command
        .spawn()
        .with_context(|| format!("starting {}", Path::new(command.get_program()).display()))?;
    let main_pid = i32::try_from(child.id()).context("a process number")?;

    let family = Family::of_this_process(Some(context.run_id.clone()));
    let find = || {
        let members = family.members(&HashSet::new());
        while sys::reap_any().is_some() {}
        members
    };
    let mut outcome = Outcome::default();
    let end = wait(main_pid, suite, terms, &[&stdout, &stderr]);
    let is_over = matches!(end, End::Exited(_));
    let left = if is_over { after_grace(&find) } else { find() };
    outcome.dump = watchdog::describe_all(&left);
    // The dump comes first, before a thaw lets anything move.
    for group in cgroups::of_tests()
        .iter()
        .filter(|group| !groups_before.contains(*group))
    {
        cgroups::thaw(group);
    }
    let undead = watchdog::end_all(find);
    if is_over {
        outcome.problems.extend(left.iter().map(leak));
    }
    for proc in undead {
        outcome.problems.push(format!(
            "process {} ({}) does not die",
            proc.id.pid, proc.comm
        ));
    }
    let groups = cgroups::left_over(&groups_before);
    outcome.problems.extend(
        groups
            .iter()
            .map(|group| format!("leaked control group {}", group.display())),
    );
    outcome.problems.extend(
        cgroups::remove(&groups)
            .into_iter()
            .map(|group| format!("cannot remove {group}")),
    );

    let text = read_lossy(&stdout);
    judge(
        &mut outcome,
        end,
        read_count(suite, &text),
        suite,
        context.case,
    );
    if outcome.failures() > 0 {
        outcome.tail = format!(
            "{}{}",
            tail(&stdout, &text),
            tail(&stderr, &read_lossy(&stderr))
        );
        if !outcome.dump.is_empty() {
            fs::write(log("dump"), &outcome.dump)
                .with_context(|| format!("writing {}", log("dump").display()))?;
        }
    }
    Ok(outcome)
}

fn leak(proc: &Proc) -> String {
    format!(
        "leaked process {} ({}): alive {GRACE:?} after the suite ended",
        proc.id.pid, proc.comm
    )
}

/// Waits for the suite's own process, its deadline, its silence or a signal to us.
fn wait(main_pid: i32, suite: &Suite, terms: &Terms, outputs: &[&Path]) -> End {
    let started = Instant::now();
    let (mut size_before, mut grew) = (0, started);
    loop {
        while let Some((pid, status)) = sys::reap_any() {
            if pid == main_pid {
                return End::Exited(status);
            }
        }
        if let Some(signal) = sys::stop_signal() {
            return End::Ended(format!("interrupted by signal {signal}"));
        }
        let limit = terms.allowed * 2;
        if started.elapsed() > limit {
            return End::Ended(format!(
                "overrun: not done after {limit:?}, twice what it is allowed"
            ));
        }
        let size: u64 = outputs
            .iter()
            .map(|path| fs::metadata(path).map_or(0, |file| file.len()))
            .sum();
        if size != size_before {
            (size_before, grew) = (size, Instant::now());
        }
        if grew.elapsed() > suite.quiet {
            return End::Ended(format!("silent: no output for {:?}", suite.quiet));
        }
        thread::sleep(POLL);
    }
}

fn after_grace(find: &impl Fn() -> Vec<Proc>) -> Vec<Proc> {
    let deadline = Instant::now() + GRACE;
    loop {
        let left = find();
        if left.is_empty() || Instant::now() > deadline {
            return left;
        }
        thread::sleep(POLL);
    }
}

fn read_lossy(path: &Path) -> String {
    String::from_utf8_lossy(&fs::read(path).unwrap_or_default()).into_owned()
}

fn read_count(suite: &Suite, output: &str) -> Count {
    match suite.program {
        Program::Cargo { .. } => count::libtest(output),
        Program::Exec { .. } => count::lines(output),
    }
}

/// Adds to the outcome what the way it ended and its cases say.
fn judge(outcome: &mut Outcome, end: End, count: Count, suite: &Suite, case: Option<&str>) {
    outcome.passed = count.passed;
    let skipped: HashSet<&str> = count.skipped.iter().map(String::as_str).collect();
    for name in skipped
        .iter()
        .filter(|name| !suite.ignored.iter().any(|listed| listed == *name))
    {
        outcome.problems.push(format!(
            "case {name} was skipped, and the manifest doesn't list it as ignored"
        ));
    }
    let status = match end {
        End::Ended(why) => {
            outcome.problems.push(why);
            outcome.failed_cases = count.failed;
            return;
        }
        End::Exited(status) => status,
    };
    outcome.problems.extend(count.problem);
    if status.success() != count.failed.is_empty() {
        outcome.problems.push(format!(
            "{status}, with {} failed cases",
            count.failed.len()
        ));
    }
    let ran = count.passed + u64::try_from(count.failed.len()).unwrap_or(u64::MAX);
    if case.is_some() {
        if ran == 0 {
            outcome.problems.push("no case has such a name".to_owned());
        }
    } else {
        if ran < suite.cases {
            outcome.problems.push(format!(
                "too few cases: {ran} ran, at least {} must",
                suite.cases
            ));
        }
        for name in suite
            .ignored
            .iter()
            .filter(|name| !skipped.contains(name.as_str()))
        {
            outcome
                .problems
                .push(format!("case {name} is listed as ignored and was not"));
        }
    }
    outcome.failed_cases = count.failed;
}

/// The end of an output, for a failure's report.
fn tail(path: &Path, text: &str) -> String {
    const LINES: usize = 60;
    let lines: Vec<&str> = text.lines().collect();
    let shown = lines
        .get(lines.len().saturating_sub(LINES)..)
        .unwrap_or_default();
    if shown.is_empty() {
        return String::new();
    }
    let name = path
        .file_name()
        .unwrap_or(OsStr::new("output"))
        .to_string_lossy();
    format!(
        "--- {name}, the last {} of {} lines\n{}\n",
        shown.len(),
        lines.len(),
        shown.join("\n")
    )
}
