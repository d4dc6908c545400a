//! The programs that are measured, and a conversation with one: a command line, an answer line.

use std::ffi::{OsStr, OsString};
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use holo_proto::Report;

use crate::procs::{self, Proc};
use crate::torture::build;
use crate::torture::harness::holo::Binaries;
use crate::torture::harness::suite::Scratch;
use crate::watchdog::{self, hung};

/// Longer than anything that a benchmark waits for, on a busy machine too: later is a hang.
const DEADLINE: Duration = Duration::from_secs(60);

/// How often a process's end is looked for.
const LOOK_EVERY: Duration = Duration::from_millis(5);

/// What all sections need.
#[derive(Debug)]
pub struct Bench {
    /// holo.
    pub binaries: Binaries,
    /// Files.
    pub scratch: Scratch,
    /// How many times the usual work is done.
    pub rounds: usize,
    /// The least work that fills every table.
    pub quick: bool,
    started: AtomicU32,
}

impl Bench {
    /// Finds holo and makes a folder for files.
    ///
    /// # Errors
    /// Either fails.
    pub fn new(rounds: usize, quick: bool) -> Result<Self> {
        Ok(Self {
            binaries: Binaries::find()?,
            scratch: Scratch::create("holo-bench")?,
            rounds,
            quick,
            started: AtomicU32::new(0),
        })
    }

    /// `usual` times the rounds, or `quick`.
    #[must_use]
    pub fn times(&self, usual: usize, quick: usize) -> usize {
        if self.quick {
            quick
        } else {
            usual * self.rounds
        }
    }

    /// A file of this run.
    #[must_use]
    pub fn file(&self, name: &str) -> PathBuf {
        self.scratch.path().join(name)
    }

    /// A C program of `tests/bench`, compiled.
    ///
    /// # Errors
    /// It does not compile.
    pub fn program(&self, name: &str) -> Result<PathBuf> {
        build::program_of("bench", name, self.scratch.path())
    }

    /// A mark for the environment of the next command, by which its processes are found.
    fn mark(&self) -> String {
        let number = self.started.fetch_add(1, Ordering::Relaxed);
        format!("{}/{number}", run_mark())
    }

    /// Starts a command to talk to.
    ///
    /// # Errors
    /// It cannot be started.
    pub fn start<A: AsRef<OsStr>>(&self, program: &Path, arguments: &[A]) -> Result<Helper> {
        Helper::start(program, arguments, self.mark())
    }

    /// Starts a command under `holo-exec`.
    ///
    /// # Errors
    /// It cannot be started.
    pub fn start_held(
        &self,
        budget_mib: u64,
        report: Option<&Path>,
        command: &[OsString],
    ) -> Result<Helper> {
        self.start(&self.binaries.exec, &held(budget_mib, report, command))
    }

    /// Runs a command to its end; what it wrote to standard output.
    ///
    /// # Errors
    /// It fails, or does not end in time.
    pub fn output<A: AsRef<OsStr>>(&self, program: &Path, arguments: &[A]) -> Result<String> {
        let mark = self.mark();
        let mut command = Command::new(program);
        command
            .args(arguments)
            .env(procs::RUN_ID_VAR, &mark)
            .stdin(Stdio::null());
        let name = program.display().to_string();
        let Some(output) = procs::bounded(DEADLINE, move || command.output()) else {
            let error = hung(&format!("{name} does not end"));
            kill_marked(&mark);
            return Err(error);
        };
        let output = output.with_context(|| format!("starting {name}"))?;
        ensure!(
            output.status.success(),
            "{name}: {}: {}",
            output.status,
            String::from_utf8_lossy(&output.stderr).trim()
        );
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// Takes a process; the mark of its pager.
    ///
    /// # Errors
    /// holo refuses.
    pub fn attach(&self, pid: i32, budget_mib: u64, report: &Path) -> Result<String> {
        let mark = self.mark();
        let mut command = Command::new(&self.binaries.holo);
        command
            .args(["attach".into(), pid.to_string()])
            .args(["--local-memory".into(), format!("{budget_mib}M")])
            .arg("--report")
            .arg(report)
            .env(procs::RUN_ID_VAR, &mark)
            .stdin(Stdio::null())
            .stdout(Stdio::null());
        // Not `output`: the pager that it leaves behind keeps the pipes open.
        let status = procs::bounded(DEADLINE, move || command.status());
        let status = status.ok_or_else(|| hung("holo attach does not return"))??;
        ensure!(status.success(), "holo attach {pid}: {status}");
        Ok(mark)
    }

    /// Lets go of a process; `mark` is its pager's, whose end is waited for as well.
    ///
    /// # Errors
    /// holo does not.
    pub fn detach(&self, pid: i32, mark: &str) -> Result<()> {
        self.output(&self.binaries.holo, &["detach", &pid.to_string()])?;
        await_end(mark)
    }

    /// What the pager of a process has counted so far.
    ///
    /// # Errors
    /// It does not answer.
    pub fn status(&self, pid: i32) -> Result<Report> {
        let arguments = ["status", &pid.to_string(), "--json"];
        let text = self.output(&self.binaries.holo, &arguments)?;
        serde_json::from_str(&text).context("reading holo's status")
    }
}

/// The arguments of `holo-exec`.
#[must_use]
pub fn held(budget_mib: u64, report: Option<&Path>, command: &[OsString]) -> Vec<OsString> {
    let mut all: Vec<OsString> = vec![
        "--quiet".into(),
        "--local-memory".into(),
        format!("{budget_mib}M").into(),
    ];
    if let Some(file) = report {
        all.extend(["--report".into(), file.into()]);
    }
    all.push("--".into());
    all.extend_from_slice(command);
    all
}

/// A report that holo wrote.
///
/// # Errors
/// It is not there, or is none.
pub fn report(file: &Path) -> Result<Report> {
    let text = std::fs::read_to_string(file).with_context(|| file.display().to_string())?;
    serde_json::from_str(&text).with_context(|| format!("{} is no report", file.display()))
}

/// holo's own processes (pager, guardian, command line) with this mark.
#[must_use]
pub fn own_processes(mark: &str) -> Vec<Proc> {
    let mut all = marked(mark);
    all.retain(|p| p.comm.starts_with("holo"));
    all
}

/// Waits until all of holo's processes with this mark have ended.
///
/// # Errors
/// They go on.
pub fn await_end(mark: &str) -> Result<()> {
    let until = Instant::now() + DEADLINE;
    while !own_processes(mark).is_empty() {
        if Instant::now() >= until {
            return Err(hung("holo does not end"));
        }
        thread::sleep(LOOK_EVERY);
    }
    Ok(())
}

/// The thread of this name in holo's processes with this mark: its process and its own number.
///
/// # Errors
/// There is none.
pub fn own_thread(mark: &str, name: &str) -> Result<(i32, i32)> {
    own_processes(mark)
        .iter()
        .flat_map(|p| threads(p.id.pid).into_iter().map(|tid| (p.id.pid, tid)))
        .find(|(pid, tid)| thread_name(*pid, *tid) == name)
        .with_context(|| format!("there is no thread {name}"))
}

/// The numbers of a process's threads.
#[must_use]
pub fn threads(pid: i32) -> Vec<i32> {
    let entries = std::fs::read_dir(format!("/proc/{pid}/task"));
    let names = entries.into_iter().flatten().flatten();
    names
        .filter_map(|e| e.file_name().to_str()?.parse().ok())
        .collect()
}

/// What a thread is called.
#[must_use]
pub fn thread_name(pid: i32, tid: i32) -> String {
    let text = std::fs::read_to_string(format!("/proc/{pid}/task/{tid}/comm"));
    text.unwrap_or_default().trim().to_owned()
}

/// The mark of all commands of this run.
fn run_mark() -> String {
    let outer = std::env::var(procs::RUN_ID_VAR).unwrap_or_default();
    format!("{outer}/bench-{}", std::process::id())
}

fn marked(mark: &str) -> Vec<Proc> {
    let mut all = procs::all();
    all.retain(|p| p.is_alive() && procs::is_marked(p.id.pid, mark));
    all
}

fn kill_marked(mark: &str) {
    for proc in marked(mark) {
        proc.signal(libc::SIGKILL);
    }
}

/// A command that answers each line with a line. It ends when its standard input does, which it does when
/// this is dropped; what is left of it then is killed.
#[derive(Debug)]
pub struct Helper {
    name: String,
    /// In the environment of all its processes.
    pub mark: String,
    child: Child,
    stdin: Option<ChildStdin>,
    lines: Receiver<String>,
}

impl Helper {
    fn start<A: AsRef<OsStr>>(program: &Path, arguments: &[A], mark: String) -> Result<Self> {
        let name = program.display().to_string();
        let mut child = Command::new(program)
            .args(arguments)
            .env(procs::RUN_ID_VAR, &mark)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .with_context(|| format!("starting {name}"))?;
        let out = child.stdout.take().context("no pipe")?;
        let (sender, lines) = mpsc::channel();
        thread::spawn(move || {
            for line in BufReader::new(out).lines() {
                let Ok(line) = line else { return };
                if sender.send(line).is_err() {
                    return;
                }
            }
        });
        Ok(Self {
            name,
            mark,
            stdin: child.stdin.take(),
            child,
            lines,
        })
    }

    /// The number of the process that was started: the command's own, or `holo-exec`'s.
    ///
    /// # Errors
    /// None that the kernel would cause.
    pub fn pid(&self) -> Result<i32> {
        Ok(i32::try_from(self.child.id())?)
    }

    /// Its next line, which must begin with `word`; what follows it.
    ///
    /// # Errors
    /// Another line comes, or none in time.
    pub fn expect(&self, word: &str) -> Result<String> {
        let line = self.lines.recv_timeout(DEADLINE).inspect_err(|&e| {
            if e == RecvTimeoutError::Timeout {
                watchdog::dump(&format!("{} does not say {word:?}", self.name));
            }
        });
        let line = line.with_context(|| format!("{} does not say {word:?}", self.name))?;
        let rest = line.strip_prefix(word);
        let rest = rest.with_context(|| format!("{} says {line:?}, not {word:?}", self.name))?;
        Ok(rest.trim().to_owned())
    }

    /// Says a line.
    ///
    /// # Errors
    /// It does not listen any more.
    pub fn say(&mut self, line: &str) -> Result<()> {
        let stdin = self.stdin.as_mut().context("no standard input")?;
        writeln!(stdin, "{line}").with_context(|| format!("writing to {}", self.name))
    }

    /// Says a line, and waits for the answer that begins with `word`; what follows it.
    ///
    /// # Errors
    /// Those of both.
    pub fn ask(&mut self, line: &str, word: &str) -> Result<String> {
        self.say(line)?;
        self.expect(word)
    }

    /// Ends it by ending its input.
    ///
    /// # Errors
    /// It fails, or does not end in time.
    pub fn finish(mut self) -> Result<()> {
        drop(self.stdin.take());
        let until = Instant::now() + DEADLINE;
        loop {
            if let Some(status) = self.child.try_wait()? {
                ensure!(status.success(), "{}: {status}", self.name);
                return Ok(());
            }
            ensure!(Instant::now() < until, "{} does not end", self.name);
            thread::sleep(LOOK_EVERY);
        }
    }
}

impl Drop for Helper {
    fn drop(&mut self) {
        drop(self.stdin.take());
        for _ in 0..200 {
            if !matches!(self.child.try_wait(), Ok(None)) {
                return;
            }
            thread::sleep(LOOK_EVERY);
        }
        watchdog::dump(&format!("{} does not end", self.name));
        kill_marked(&self.mark);
        let _ = self.child.wait();
    }
}

/// Numbers of 32 bits, as the programs write them, nanoseconds; in microseconds.
///
/// # Errors
/// The file cannot be read.
pub fn micros(file: &Path) -> Result<Vec<f64>> {
    let mut bytes = Vec::new();
    std::fs::File::open(file)
        .and_then(|mut f| f.read_to_end(&mut bytes))
        .with_context(|| file.display().to_string())?;
    let words = bytes.chunks_exact(4);
    Ok(words
        .map(|w| f64::from(u32::from_ne_bytes([w[0], w[1], w[2], w[3]])) / 1000.0)
        .collect())
}
