//! A helper command beside the one under test: a client, a debugger, `holo attach`.

use std::ffi::OsStr;
use std::io::{Read, Write as _};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};

use super::LOOK_EVERY;
use super::launch::Running;
use super::process::Process;
use crate::watchdog;

/// A command that runs beside; killed when dropped before its end.
#[derive(Debug)]
pub struct Tool {
    name: String,
    child: Child,
    stdin: Option<ChildStdin>,
    out: Arc<Mutex<Vec<u8>>>,
    err: Arc<Mutex<Vec<u8>>>,
    readers: Vec<JoinHandle<()>>,
}

/// How a tool ended, and what it said.
#[derive(Clone, Debug)]
pub struct Said {
    /// Its exit code; none for a signal.
    pub code: Option<i32>,
    /// Standard output.
    pub out: String,
    /// Standard error.
    pub err: String,
}

impl Tool {
    /// Starts a command.
    ///
    /// # Errors
    /// It cannot be started.
    pub fn start<A: AsRef<OsStr>>(
        program: impl AsRef<OsStr>,
        arguments: impl IntoIterator<Item = A>,
    ) -> Result<Self> {
        let name = program.as_ref().to_string_lossy().into_owned();
        let mut child = Command::new(program)
            .args(arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .with_context(|| format!("starting {name}"))?;
        let (out, err) = (Arc::default(), Arc::default());
        let readers = vec![
            collect(child.stdout.take().context("no pipe")?, &out),
            collect(child.stderr.take().context("no pipe")?, &err),
        ];
        Ok(Self {
            name,
            stdin: child.stdin.take(),
            child,
            out,
            err,
            readers,
        })
    }

    /// What it has said on standard output so far.
    #[must_use]
    pub fn said(&self) -> String {
        text(&self.out)
    }

    /// Writes a line to its standard input.
    ///
    /// # Errors
    /// It does not listen any more.
    pub fn say(&mut self, line: &str) -> Result<()> {
        let stdin = self.stdin.as_mut().context("no standard input")?;
        writeln!(stdin, "{line}").with_context(|| format!("writing to {}", self.name))
    }

    /// Says whether it has ended.
    ///
    /// # Errors
    /// It cannot be waited for.
    pub fn ended(&mut self) -> Result<bool> {
        Ok(self.child.try_wait()?.is_some())
    }

    /// Waits for its end; none when the time is over: then everything has been described, and it killed.
    ///
    /// # Errors
    /// It cannot be waited for.
    pub fn wait(mut self, time: Duration) -> Result<Option<Said>> {
        let until = Instant::now() + time;
        while !self.ended()? {
            if Instant::now() >= until {
                watchdog::dump(&format!("{} has not ended after {time:?}", self.name));
                return Ok(None);
            }
            thread::sleep(LOOK_EVERY);
        }
        self.result().map(Some)
    }

    /// Waits for its success while the command under test runs.
    ///
    /// # Errors
    /// It fails, or the command under test ends or overruns.
    pub fn succeeds_beside(mut self, running: &mut Running) -> Result<Said> {
        while !self.ended()? {
            if !running.goes_on()? && !self.ended()? {
                // The tool may be what ended it: a moment for its own end.
                let name = self.name.clone();
                let said = self.wait(Duration::from_secs(10))?;
                return match said {
                    Some(said) if said.code == Some(0) => Ok(said),
                    said => bail!("the command ended under {name}: {said:?}"),
                };
            }
        }
        let said = self.result()?;
        if said.code != Some(0) {
            bail!(
                "{} ended with {:?}: {}",
                self.name,
                said.code,
                said.err.trim().replace('\n', " | ")
            );
        }
        Ok(said)
    }

    fn result(&mut self) -> Result<Said> {
        let status = self.child.wait()?;
        // A background child may hold the pipes: what came until now is what counts.
        let until = Instant::now() + Duration::from_secs(1);
        while !self.readers.iter().all(JoinHandle::is_finished) && Instant::now() < until {
            thread::sleep(LOOK_EVERY);
        }
        Ok(Said {
            code: status.code(),
            out: text(&self.out),
            err: text(&self.err),
        })
    }

    /// The process.
    #[must_use]
    pub fn process(&self) -> Option<Process> {
        Process::of(i32::try_from(self.child.id()).ok()?)
    }
}

impl Drop for Tool {
    fn drop(&mut self) {
        if let Ok(None) = self.child.try_wait() {
            // It may be in a call that nothing interrupts: then it is not waited for.
            let _ = self.child.kill();
            let until = Instant::now() + Duration::from_secs(5);
            while matches!(self.child.try_wait(), Ok(None)) && Instant::now() < until {
                thread::sleep(LOOK_EVERY);
            }
        }
    }
}

fn collect(mut pipe: impl Read + Send + 'static, bytes: &Arc<Mutex<Vec<u8>>>) -> JoinHandle<()> {
    let bytes = Arc::clone(bytes);
    thread::spawn(move || {
        let mut piece = [0; 4096];
        while let Ok(count @ 1..) = pipe.read(&mut piece) {
            bytes
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .extend_from_slice(&piece[..count]);
        }
    })
}

fn text(bytes: &Mutex<Vec<u8>>) -> String {
    String::from_utf8_lossy(&bytes.lock().unwrap_or_else(PoisonError::into_inner)).into_owned()
}
