//! `holo attach`, `holo detach`, `holo status`.

use std::fs::File;
use std::io::{ErrorKind, IsTerminal as _};
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::FileTypeExt as _;
use std::path::Path;

use anyhow::{Context as _, bail};
use holo_pager::shell::{Session, Settings, request};
use holo_pager::sys::inherited::Inherited;
use holo_proto::Report;

use crate::run::{crash_at, open_report, store_limit_bytes};
use crate::size::{self, Size};

/// Takes over a process; returns when it is held, and leaves the pager running. The report so far.
///
/// # Errors
/// In words for the user; the process goes on as if nothing had happened.
pub fn attach(pid: i32, local_memory: Size, report: Option<&Path>) -> anyhow::Result<Report> {
    let ram = size::ram_bytes().context("cannot read this machine's memory size")?;
    let file = report.map(open_lasting_report).transpose()?;
    let settings = Settings {
        local_memory_bytes: local_memory.bytes(ram),
        store_limit_bytes: store_limit_bytes()?,
        attach: Some(pid),
        messages_fd: 2,
        report_fd: file.as_ref().map(|f| f.as_raw_fd()),
        crash_at: crash_at()?,
    };
    // The guardian waits for the pager.
    let _ = Inherited::take();
    Ok(Session::start(&settings)?.report(None))
}

/// Opens a report that the pager writes when the command line is long gone. What somebody has to read may be full then,
/// which would hold the pager and every detach; and who reads it to its end would wait for that detach.
fn open_lasting_report(path: &Path) -> anyhow::Result<File> {
    let refuse = || -> anyhow::Result<File> {
        bail!(
            "cannot write the report to {}, a pipe, socket or terminal: choose a file with --report FILE, or `holo \
             detach --json`",
            path.display()
        )
    };
    // Before it is opened: that waits for the reader of a pipe. One that does not exist is made.
    let kind = std::fs::metadata(path).map(|m| m.file_type());
    if kind.is_ok_and(|kind| kind.is_fifo() || kind.is_socket()) {
        return refuse();
    }
    let file = open_report(path)?;
    if file.is_terminal() {
        return refuse();
    }
    Ok(file)
}

fn ask(pid: i32, what: &str) -> anyhow::Result<Report> {
    let line = match request(pid, what) {
        Ok(line) => line,
        Err(e) if e.kind() == ErrorKind::ConnectionRefused => {
            bail!(
                "process {pid} is not held by holo: `holo attach {pid} --local-memory SIZE` takes it"
            )
        }
        Err(e) if e.kind() == ErrorKind::PermissionDenied => bail!("{e}"),
        Err(e) => return Err(e).context(format!("the pager of process {pid} does not answer")),
    };
    if line.is_empty() {
        bail!("the pager of process {pid} ended without an answer");
    }
    let said = || format!("the pager says: {}", line.trim());
    let answer: serde_json::Value = serde_json::from_str(&line).with_context(said)?;
    if let Some(why) = answer.get("error").and_then(|e| e.as_str()) {
        bail!("{why}");
    }
    serde_json::from_value(answer).with_context(said)
}

/// Lets go of a process.
///
/// # Errors
/// It is not held, or its pager does not answer.
pub fn detach(pid: i32) -> anyhow::Result<Report> {
    ask(pid, "detach")
}

/// What the pager of a process has done so far.
///
/// # Errors
/// It is not held, or its pager does not answer.
pub fn status(pid: i32) -> anyhow::Result<Report> {
    ask(pid, "status")
}
