//! One command of a case: started bare or under `holo-exec`, watched to its end, and judged.

use std::ffi::{OsStr, OsString};
use std::io::{BufRead as _, BufReader, Read, Write as _};
use std::os::unix::process::ExitStatusExt as _;
use std::path::PathBuf;
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use holo_proto::Report;

use super::family::{Family, MARK_VARIABLE};
use super::killer::PagerKiller;
use super::process::Process;
use super::residence::Residence;
use super::suite::{Run, print_line};
use super::verdict::{self, Expected};
use super::{LEFTOVER_GRACE, LOOK_EVERY, dump};

/// Time between two refreshes of the list of a case's processes.
const FAMILY_EVERY: Duration = Duration::from_millis(100);

/// Time between two signs of life of the driver, which has its own deadlines: who waits for it need
/// not take a long case for a hang.
const WORD_EVERY: Duration = Duration::from_secs(30);

/// How long killed processes may take to go.
const KILL_GRACE: Duration = Duration::from_secs(10);

/// Bytes of standard error that an error message quotes.
const STDERR_QUOTED_MAX: usize = 2000;

/// What to start, and what must come of it.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Program and arguments.
    pub command: Vec<OsString>,
    /// The program file that the paged process executes, without links.
    pub target: PathBuf,
    /// Peak of private memory in a bare run, MiB, as `--measure` gave it; the budget is a quarter.
    pub bare_peak_mib: u64,
    /// Time from start to end, after which the run counts as hung.
    pub deadline: Duration,
    /// A command that runs `holo-exec` as its arguments.
    pub wrapper: Vec<OsString>,
    /// Variables added to the environment.
    pub environment: Vec<(&'static str, OsString)>,
    /// Standard input is a pipe that [`Running::say`] writes to; otherwise it is empty.
    pub talk: bool,
    /// Pause between two reads of standard error.
    pub stderr_pause: Duration,
    /// The report must show pages that left and came back.
    pub pressure: bool,
    /// Why resident memory is only told, and not judged.
    pub residence_told: Option<&'static str>,
    /// Exit code that the command must have.
    pub exit_code: i32,
}

impl Plan {
    /// A plan for a command that ends with 0, under pressure, within the deadline.
    pub fn new<A: Into<OsString>>(
        command: impl IntoIterator<Item = A>,
        bare_peak_mib: u64,
        deadline: Duration,
    ) -> Self {
        let command: Vec<OsString> = command.into_iter().map(Into::into).collect();
        Self {
            target: command
                .first()
                .map(|name| program_file(name))
                .unwrap_or_default(),
            command,
            bare_peak_mib,
            deadline,
            wrapper: Vec::new(),
            environment: Vec::new(),
            talk: false,
            stderr_pause: Duration::ZERO,
            pressure: true,
            residence_told: None,
            exit_code: 0,
        }
    }

    /// The budget: a quarter of the bare peak.
    #[must_use]
    pub fn budget_kib(&self) -> u64 {
        self.bare_peak_mib * 1024 / 4
    }

    /// Starts the command, under holo unless the suite runs bare.
    ///
    /// # Errors
    /// It cannot be started.
    pub fn start(self, run: &Run<'_>) -> Result<Running> {
        let number = run.next_number();
        let report = run.scratch.join(format!("report-{number}.json"));
        let mark = Family::mark_for(run.name);
        let mut line = self.wrapper.clone();
        if let Some(binaries) = run.binaries {
            line.push(binaries.exec.clone().into());
            line.push("--local-memory".into());
            line.push(format!("{}K", self.budget_kib()).into());
            line.push("--report".into());
            line.push(report.clone().into());
            line.extend(["--quiet".into(), "--".into()]);
        }
        line.extend(self.command.iter().cloned());
        let (program, arguments) = line.split_first().context("an empty command")?;
        let mut command = Command::new(program);
        command
            .args(arguments)
            .env(MARK_VARIABLE, &mark)
            .env("TORTURE_DIR", &run.scratch)
            .current_dir(&run.scratch)
            .stdin(if self.talk {
                Stdio::piped()
            } else {
                Stdio::null()
            })
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        command.envs(self.environment.iter().map(|(name, value)| (name, value)));
        let mut family = Family::new(mark);
        let started = Instant::now();
        let mut child = command
            .spawn()
            .with_context(|| format!("starting {}", program.to_string_lossy()))?;
        let pid = i32::try_from(child.id()).context("a process id")?;
        family.adopt(Process::of(pid).context("the command has gone at once")?);
        let lines = Arc::new(Mutex::new(Vec::new()));
        let errors = Arc::new(Mutex::new(Vec::new()));
        let stdout = child.stdout.take().context("no pipe of standard output")?;
        let stderr = child.stderr.take().context("no pipe of standard error")?;
        let readers = vec![
            thread::spawn({
                let lines = Arc::clone(&lines);
                move || read_lines(stdout, &lines)
            }),
            thread::spawn({
                let (errors, pause) = (Arc::clone(&errors), self.stderr_pause);
                move || read_slowly(stderr, pause, &errors)
            }),
        ];
        let stdin = child.stdin.take();
        let mut running = Running {
            started,
            due: started + self.deadline,
            plan: self,
            holo: run.binaries.is_some(),
            measure: run.options.measure,
            report,
            child,
            stdin,
            family,
            looked: started,
            next_word: started + WORD_EVERY,
            name: run.name.to_owned(),
            status: None,
            lines,
            errors,
            readers,
            peak_kib: 0,
            residence: run.binaries.map(|_| Residence::default()),
            killer: None,
            finished: false,
        };
        running.look();
        Ok(running)
    }
}

/// The file that a name on a command line stands for.
fn program_file(name: &OsStr) -> PathBuf {
    let path = std::env::var_os("PATH").unwrap_or_default();
    // With a slash in it, the name replaces the folder that it is joined to.
    let candidates = std::env::split_paths(&path).map(|folder| folder.join(name));
    let direct = PathBuf::from(name);
    let found = if direct.is_absolute() {
        Some(direct)
    } else {
        candidates.into_iter().find(|file| file.is_file())
    };
    found
        .and_then(|file| file.canonicalize().ok())
        .unwrap_or_default()
}

fn read_lines(pipe: impl Read, lines: &Mutex<Vec<String>>) {
    for line in BufReader::new(pipe).split(b'\n').map_while(Result::ok) {
        let line = String::from_utf8_lossy(&line).trim_end().to_owned();
        lines
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(line);
    }
}

fn read_slowly(mut pipe: impl Read, pause: Duration, bytes: &Mutex<Vec<u8>>) {
    let mut piece = [0; 4096];
    while let Ok(count) = pipe.read(&mut piece) {
        if count == 0 {
            return;
        }
        bytes
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .extend_from_slice(&piece[..count]);
        thread::sleep(pause);
    }
}

/// How a command ended.
#[derive(Debug)]
pub struct End {
    /// What it said on standard output.
    pub lines: Vec<String>,
    /// What came on standard error.
    pub stderr: Vec<u8>,
    /// The report; none in a bare run.
    pub report: Option<Report>,
}

impl End {
    /// The value of a `# name=value` statement.
    ///
    /// # Errors
    /// The command has not made it.
    pub fn statement(&self, name: &str) -> Result<u64> {
        statement(&self.lines, name).with_context(|| format!("the program did not state {name}"))
    }
}

fn statement(lines: &[String], name: &str) -> Option<u64> {
    lines.iter().find_map(|line| {
        line.strip_prefix("# ")?
            .strip_prefix(name)?
            .strip_prefix('=')?
            .parse()
            .ok()
    })
}

/// A command under way. Dropped before its end, it and all that it started are killed.
#[derive(Debug)]
pub struct Running {
    plan: Plan,
    holo: bool,
    measure: bool,
    report: PathBuf,
    child: Child,
    stdin: Option<ChildStdin>,
    family: Family,
    started: Instant,
    due: Instant,
    looked: Instant,
    next_word: Instant,
    name: String,
    status: Option<ExitStatus>,
    lines: Arc<Mutex<Vec<String>>>,
    errors: Arc<Mutex<Vec<u8>>>,
    readers: Vec<JoinHandle<()>>,
    peak_kib: u64,
    residence: Option<Residence>,
    killer: Option<PagerKiller>,
    finished: bool,
}

impl Running {
    /// The processes of this command.
    pub fn family(&mut self) -> &mut Family {
        &mut self.family
    }

    /// The process that was started: the command itself when bare, `holo-exec` otherwise.
    #[must_use]
    pub fn first(&self) -> Option<Process> {
        Process::of(i32::try_from(self.child.id()).ok()?)
    }

    /// The processes that execute the plan's program.
    pub fn targets(&mut self) -> Vec<Process> {
        self.family.running(&self.plan.target)
    }

    /// Waits for the first process that executes the plan's program.
    ///
    /// # Errors
    /// There is none in time.
    pub fn target(&mut self) -> Result<Process> {
        loop {
            if let Some(target) = self.targets().first() {
                return Ok(*target);
            }
            if !self.goes_on()? {
                bail!("the program ended before it was seen");
            }
        }
    }

    /// Pauses a moment; false when the command has ended.
    ///
    /// # Errors
    /// The deadline has passed: everything is dumped, then killed.
    pub fn goes_on(&mut self) -> Result<bool> {
        self.goes_on_for(LOOK_EVERY)
    }

    /// Pauses so long, or until the command has ended: then false.
    ///
    /// # Errors
    /// The deadline has passed: everything is dumped, then killed.
    pub fn goes_on_for(&mut self, pause: Duration) -> Result<bool> {
        let until = Instant::now() + pause;
        loop {
            if self.ended()? {
                return Ok(false);
            }
            let now = Instant::now();
            if now >= until {
                return Ok(true);
            }
            if now >= self.due {
                return Err(self.hung("the deadline has passed"));
            }
            thread::sleep(LOOK_EVERY.min(until - now));
            if self.looked.elapsed() >= FAMILY_EVERY {
                self.look();
            }
        }
    }

    fn ended(&mut self) -> Result<bool> {
        if self.status.is_none() {
            self.status = self.child.try_wait().context("waiting for the command")?;
        }
        Ok(self.status.is_some())
    }

    fn look(&mut self) {
        self.looked = Instant::now();
        if self.looked >= self.next_word {
            self.next_word = self.looked + WORD_EVERY;
            print_line(&format!("# {} goes on", self.name));
        }
        let members = self.family.members();
        if self.measure {
            let sum = members
                .iter()
                .filter_map(|proc| Process::from(proc).kib("smaps_rollup", "Pss_Anon").ok())
                .sum();
            self.peak_kib = self.peak_kib.max(sum);
        }
        if let Some(residence) = &mut self.residence {
            residence.look(&members);
        }
        if let Some(killer) = &mut self.killer {
            killer.look(&mut self.family);
        }
    }

    /// Dumps every thread of the case, kills it, and gives the error that says so.
    pub fn hung(&mut self, why: &str) -> anyhow::Error {
        dump::threads(&mut self.family, why);
        print_line(&format!("# standard error: {}", self.stderr_end()));
        self.kill_all();
        anyhow::anyhow!("hung: {why}")
    }

    fn kill_all(&mut self) {
        self.finished = true;
        let until = Instant::now() + KILL_GRACE;
        loop {
            let members = self.family.members();
            for member in &members {
                // One that cannot be signalled is seen again in the next turn.
                member.signal(libc::SIGKILL);
            }
            let reaped = self.ended().unwrap_or(true);
            if members.is_empty() && reaped {
                return;
            }
            if Instant::now() >= until {
                dump::threads(&mut self.family, "these did not die of SIGKILL");
                return;
            }
            thread::sleep(LOOK_EVERY);
        }
    }

    /// Waits for a line on standard output.
    ///
    /// # Errors
    /// The command ends, or the deadline passes, without it.
    pub fn wait_for(&mut self, line: &str) -> Result<()> {
        loop {
            let last = self.ended()?;
            if self.lines().iter().any(|seen| seen == line) {
                return Ok(());
            }
            ensure!(
                !last,
                "ended before it said {line:?}: {}",
                self.stderr_end()
            );
            self.goes_on()?;
        }
    }

    /// Writes a line to the command's standard input.
    ///
    /// # Errors
    /// The plan does not talk, or the command does not listen any more.
    pub fn say(&mut self, line: &str) -> Result<()> {
        let stdin = self
            .stdin
            .as_mut()
            .context("this plan has no standard input")?;
        writeln!(stdin, "{line}").context("writing to the command")?;
        stdin.flush().context("writing to the command")
    }

    /// What the command has said so far.
    #[must_use]
    pub fn lines(&self) -> Vec<String> {
        self.lines
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    fn stderr_end(&self) -> String {
        quoted(&self.errors.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Waits for the command, for the end of its output and for the last of its processes.
    ///
    /// # Errors
    /// It hung, or left a process behind.
    pub fn wait(&mut self) -> Result<i32> {
        drop(self.stdin.take());
        while self.goes_on()? {}
        // The first process may have gone before others that still work.
        while !self.readers.iter().all(JoinHandle::is_finished) {
            if Instant::now() >= self.due {
                return Err(self.hung("the command has ended, but its output stays open"));
            }
            self.look();
            thread::sleep(LOOK_EVERY);
        }
        let until = Instant::now() + LEFTOVER_GRACE;
        // One that is just between two images shows no mark: nobody is there if two looks say so.
        let mut empty_looks = 0;
        while empty_looks < 2 {
            match self.family.members().into_iter().next() {
                Some(left) if Instant::now() >= until => {
                    dump::threads(&mut self.family, "left over");
                    self.kill_all();
                    bail!("left process {} ({}) behind", left.id.pid, left.comm);
                }
                Some(_) => empty_looks = 0,
                None => empty_looks += 1,
            }
            thread::sleep(LOOK_EVERY);
        }
        self.finished = true;
        let status = self.status.context("no exit status")?;
        Ok(status
            .code()
            .unwrap_or_else(|| 128 + status.signal().unwrap_or(0)))
    }

    /// From now on, kills the pagers of this command one after the other.
    pub fn kill_pagers(&mut self, seed: u64) {
        self.killer = Some(PagerKiller::new(seed));
        self.plan.residence_told = Some("while there is no pager nothing is evicted");
    }

    /// Measures what a command that was started bare keeps resident, from now on.
    pub fn measure_residence(&mut self) {
        self.residence = Some(Residence::default());
    }

    /// Ends that, tells what was seen, and whether this budget was kept.
    ///
    /// # Errors
    /// It was not, or nothing was measured.
    pub fn judge_residence(&mut self, budget_kib: u64) -> Result<()> {
        let residence = self.residence.take().context("nothing was measured")?;
        print_line(&residence.summary(budget_kib));
        residence.judge(budget_kib)
    }

    /// Waits for the end and judges exit code, report and resident memory.
    ///
    /// # Errors
    /// Whatever was not as planned.
    pub fn finish(mut self) -> Result<End> {
        let code = self.wait()?;
        let end = End {
            lines: self.lines(),
            stderr: self.take_stderr(),
            report: None,
        };
        for line in end.lines.iter().filter(|line| line.starts_with("# ")) {
            print_line(line);
        }
        if self.measure {
            let (measured, planned) = (self.peak_kib.div_ceil(1024), self.plan.bare_peak_mib);
            print_line(&format!(
                "# bare_peak_mib={measured} (planned with {planned})"
            ));
        }
        if code != self.plan.exit_code {
            bail!(
                "exit code {code}, want {}: {}",
                self.plan.exit_code,
                quoted(&end.stderr)
            );
        }
        if !self.holo {
            return Ok(end);
        }
        let kills = self.killer.as_ref().map(PagerKiller::kills);
        if let Some(kills) = kills {
            print_line(&format!("# pager_kills={kills}"));
        }
        let report = verdict::check(
            &self.report,
            Expected {
                local_memory_bytes: self.plan.budget_kib() * 1024,
                exit_code: Some(self.plan.exit_code),
                pressure: self.plan.pressure,
                // The last one killed may have had nothing left to do.
                takeovers_min: kills.unwrap_or(0).saturating_sub(1),
            },
        )?;
        ensure!(
            report.wall_s <= self.started.elapsed().as_secs_f64(),
            "{} s under holo, of a command that was started {:?} ago",
            report.wall_s,
            self.started.elapsed()
        );
        // What fork relatives share may count for each of them for a moment.
        ensure!(
            report.resident_peak_bytes <= self.plan.bare_peak_mib << 21,
            "{} bytes resident, twice as many as the program has",
            report.resident_peak_bytes
        );
        let kept = self.judge_residence(self.plan.budget_kib());
        match self.plan.residence_told {
            Some(reason) => print_line(&format!("# resident memory is not judged: {reason}")),
            None => kept?,
        }
        ensure!(kills != Some(0), "no pager was seen: nothing was killed");
        Ok(End {
            report: Some(report),
            ..end
        })
    }

    fn take_stderr(&self) -> Vec<u8> {
        std::mem::take(&mut self.errors.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// The end of what came on standard error, as one line.
fn quoted(stderr: &[u8]) -> String {
    let from = stderr.len().saturating_sub(STDERR_QUOTED_MAX);
    String::from_utf8_lossy(&stderr[from..])
        .trim()
        .replace('\n', " | ")
}

impl Drop for Running {
    fn drop(&mut self) {
        if !self.finished {
            self.kill_all();
        }
    }
}
