//! What a thread of the pager spends its time with, seen from outside: perf records when each system call
//! begins and ends, what lies between them is the thread's own work. That costs about a microsecond a call.

use std::ffi::OsString;
use std::fs::{File, OpenOptions};
use std::io::{Read as _, Write as _};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};

use crate::procs;
use crate::watchdog::hung;

const EVENTS: &str = "raw_syscalls:sys_enter,raw_syscalls:sys_exit";
const DEADLINE: Duration = Duration::from_secs(60);

/// A system call, times in nanoseconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Call {
    /// Its number.
    pub number: i64,
    /// The second argument: an ioctl's request.
    pub second: u64,
    /// When it began.
    pub begin_ns: u64,
    /// When it ended.
    pub end_ns: u64,
    /// What it returned: a count, or an error's number below zero.
    pub result: i64,
}

impl Call {
    /// How long it took.
    #[must_use]
    pub fn took_ns(&self) -> u64 {
        self.end_ns - self.begin_ns
    }
}

/// A recording in progress.
#[derive(Debug)]
pub struct Recording {
    perf: Child,
    file: PathBuf,
}

fn perf(file: &PathBuf) -> Command {
    let mut command = Command::new("perf");
    command
        .args([
            "record",
            "--quiet",
            "--mmap-pages",
            "4096",
            "--event",
            EVENTS,
            "--output",
        ])
        .arg(file)
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    command
}

/// Why nothing can be recorded here, if so.
#[must_use]
pub fn refusal(file: &PathBuf) -> Option<String> {
    let status = perf(file).args(["--", "true"]).status();
    match status {
        Ok(status) if status.success() => None,
        Ok(_) => Some("perf may not record system calls here".to_owned()),
        Err(_) => Some("perf is not installed (Debian: linux-perf)".to_owned()),
    }
}

impl Recording {
    /// Records a process with all its threads; returns when it does.
    ///
    /// # Errors
    /// perf cannot be started, or does not say that it records.
    pub fn of(pid: i32, file: PathBuf) -> Result<Self> {
        let pipe = |end: &str| -> Result<(PathBuf, File)> {
            let path = file.with_extension(end);
            let _ = std::fs::remove_file(&path);
            let made = Command::new("mkfifo").arg(&path).status();
            ensure!(made.context("making a pipe")?.success(), "no pipe");
            // Opened for both, so that neither side waits for the other.
            let open = OpenOptions::new().read(true).write(true).open(&path)?;
            Ok((path, open))
        };
        let (order_path, mut order) = pipe("order")?;
        let (answer_path, mut answer) = pipe("answer")?;
        let control = format!("fifo:{},{}", order_path.display(), answer_path.display());
        let child = perf(&file)
            .args(["--delay=-1", "--control", &control, "--pid"])
            .arg(pid.to_string())
            .spawn();
        let recording = Self {
            perf: child.context("starting perf")?,
            file,
        };
        writeln!(order, "enable")?;
        let said = procs::bounded(DEADLINE, move || {
            let mut said = [0; 4];
            answer.read_exact(&mut said).map(|()| said)
        });
        let said = said.ok_or_else(|| hung("perf does not begin to record"))??;
        ensure!(&said == b"ack\n", "perf says {said:?}");
        let _ = std::fs::remove_file(order_path);
        let _ = std::fs::remove_file(answer_path);
        Ok(recording)
    }

    /// Runs a command, and records all processes that come from it until the recording is ended.
    ///
    /// # Errors
    /// perf cannot be started.
    pub fn run(command: &[OsString], file: PathBuf) -> Result<Self> {
        let child = perf(&file)
            .args(["--", "/bin/sh", "-c", "\"$@\" && read -r line", "sh"])
            .args(command)
            .stdin(Stdio::piped())
            .spawn();
        let perf = child.context("starting perf")?;
        Ok(Self { perf, file })
    }

    /// Ends the recording; the calls of the threads of this name, in order.
    ///
    /// # Errors
    /// perf fails.
    pub fn end(mut self, thread: &str) -> Result<Vec<Call>> {
        if let Some(mut stdin) = self.perf.stdin.take() {
            let _ = writeln!(stdin, "enough");
        }
        if let Some(proc) = procs::Proc::read(i32::try_from(self.perf.id())?) {
            proc.signal(libc::SIGINT);
        }
        let mut child = self.perf;
        let ended = procs::bounded(DEADLINE, move || child.wait());
        ended.ok_or_else(|| hung("perf does not end"))??;
        let output = Command::new("perf")
            .args([
                "script",
                "--ns",
                "--fields",
                "comm,tid,time,event,trace",
                "--input",
            ])
            .arg(&self.file)
            .stderr(Stdio::null())
            .output()
            .context("reading what perf recorded")?;
        let _ = std::fs::remove_file(&self.file);
        ensure!(output.status.success(), "perf script: {}", output.status);
        let text = String::from_utf8_lossy(&output.stdout);
        Ok(calls(&text, thread))
    }
}

/// The complete calls in perf's text: `comm tid seconds.nanoseconds: raw_syscalls:sys_enter: NR n (args)`, with more
/// spaces here and there.
fn calls(text: &str, thread: &str) -> Vec<Call> {
    let mut found = Vec::new();
    let mut open: Option<(i64, u64, u64)> = None;
    for line in text.lines() {
        let Some((head, tail)) = line.split_once(" raw_syscalls:sys_") else {
            continue;
        };
        let mut words = head.split_whitespace().rev();
        let time = words.next().and_then(nanoseconds);
        let is_it = head.trim_start().starts_with(thread);
        let (Some(time), true) = (time, is_it) else {
            continue;
        };
        if let Some(call) = tail.strip_prefix("enter: NR ") {
            open = entered(call).map(|(number, second)| (number, second, time));
        } else if let (Some((number, second, begin_ns)), Some(result)) = (
            open.take(),
            tail.strip_prefix("exit: NR ").and_then(result_of),
        ) {
            found.push(Call {
                number,
                second,
                begin_ns,
                end_ns: time,
                result,
            });
        }
    }
    found
}

/// `16 (5, c028aa03, …)`: the number and the second argument.
fn entered(text: &str) -> Option<(i64, u64)> {
    let (number, arguments) = text.split_once(" (")?;
    let second = arguments.split(", ").nth(1)?;
    let second = second.trim_end_matches(')');
    Some((
        number.trim().parse().ok()?,
        u64::from_str_radix(second, 16).ok()?,
    ))
}

/// `16 = 0`: what the call returned.
fn result_of(text: &str) -> Option<i64> {
    text.split_once(" = ")?.1.trim().parse().ok()
}

fn nanoseconds(text: &str) -> Option<u64> {
    let (seconds, fraction) = text.strip_suffix(':')?.split_once('.')?;
    Some(seconds.parse::<u64>().ok()? * 1_000_000_000 + fraction.parse::<u64>().ok()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn calls_of_one_thread_are_found_with_their_times() {
        let text = "\
  holo-serve 12 7.000000100:  raw_syscalls:sys_exit: NR 7 = 1
  holo-serve 12 7.000000500: raw_syscalls:sys_enter: NR 16 (5, c028aa03, 7fbd57eb59e0, 0, 0, 1)
       other 13 7.000000600: raw_syscalls:sys_enter: NR 0 (5, 1, 2, 0, 0, 1)
  holo-serve 12 7.000000900:  raw_syscalls:sys_exit: NR 16 = -11
";
        let call = Call {
            number: 16,
            second: 0xc028_aa03,
            begin_ns: 7_000_000_500,
            end_ns: 7_000_000_900,
            result: -11,
        };
        assert_eq!(calls(text, "holo-serve"), [call]);
    }
}
