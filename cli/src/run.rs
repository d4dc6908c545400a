//! Running a command under the pager: its parent, which passes everything on and adds nothing.
//!
//! The command stays in this process's group and on its terminal: what the terminal sends reaches it
//! without us. What is sent to this process alone is passed on. When the command is stopped (`^Z`), this
//! process stops too, so that the shell sees it.

use std::fs::File;
use std::io::Write as _;
use std::process::{Child, Command};

use anyhow::Context as _;
use holo_pager::core::CrashPoint;
use holo_pager::shell::{Crash, Session, Settings, summary};
use holo_pager::sys::inherited::Inherited;
use holo_pager::sys::procfs;
use holo_pager::sys::signals::{self, Came, Signals};
use holo_pager::sys::spawn::{self, Ended};
use holo_proto::Report;

use crate::args::Exec;
use crate::size;

/// Exit code when holo itself fails.
pub const EXIT_HOLO: i32 = 125;
const EXIT_CANNOT_RUN: i32 = 126;
const EXIT_NOT_FOUND: i32 = 127;
/// How long the pager may take to count the last events of a command that ended, nanoseconds.
const SETTLE_NS: u64 = 2_000_000_000;

/// The store may hold as much as this machine has RAM.
pub(crate) fn store_limit_bytes() -> std::io::Result<u64> {
    size::ram_bytes()
}

/// How and where the pager is to die, as `HOLO_CRASH_AT` says: for tests.
///
/// # Errors
/// It names none.
pub(crate) fn crash_at() -> anyhow::Result<Option<Crash>> {
    let Some(name) = std::env::var_os("HOLO_CRASH_AT") else {
        return Ok(None);
    };
    let name = name.to_string_lossy();
    let crash = Crash::parse(&name).with_context(|| {
        let all: Vec<_> = CrashPoint::ALL.iter().map(|p| p.name()).collect();
        format!(
            "HOLO_CRASH_AT={name} is no crash point (nor panic:, panics: or aborts: and one); there are: {}",
            all.join(", ")
        )
    })?;
    Ok(Some(crash))
}

/// Opens the report's file, so that a wrong name is known before the command runs.
///
/// # Errors
/// It cannot be written.
pub fn open_report(path: &std::path::Path) -> anyhow::Result<std::fs::File> {
    std::fs::File::create(path).with_context(|| {
        format!(
            "cannot write the report to {}: choose another --report FILE",
            path.display()
        )
    })
}

/// Runs the command to its end; returns the exit code to leave with.
///
/// # Errors
/// holo itself failed; the command was not started, or was stopped and the error says so.
pub fn exec(args: &Exec) -> anyhow::Result<i32> {
    let ram = size::ram_bytes().context("cannot read this machine's memory size")?;
    let mut report_file = args.report.as_deref().map(open_report).transpose()?;
    let settings = Settings {
        local_memory_bytes: args.local_memory.bytes(ram),
        store_limit_bytes: store_limit_bytes()?,
        attach: None,
        messages_fd: 2,
        report_fd: None,
        crash_at: crash_at()?,
    };
    let inherited = Inherited::take();
    let mut session = Session::start(&settings)?;
    let signals = Signals::take(&received()).context("cannot receive signals")?;
    let (program, rest) = args.command.split_first().context("no command given")?;
    let mut command = Command::new(program);
    signals.restore_in(command.args(rest));
    inherited.restore_in(&mut command);
    let mut child = match command.spawn() {
        Ok(child) => child,
        Err(e) => {
            let program = program.to_string_lossy();
            let (code, what) = if e.kind() == std::io::ErrorKind::NotFound {
                (EXIT_NOT_FOUND, "not found: check the name, or give a path")
            } else {
                (EXIT_CANNOT_RUN, "cannot be run")
            };
            eprintln!("holo-exec: {program}: {what} ({e})");
            write_report(report_file.as_mut(), &session.report(Some(code)));
            return Ok(code);
        }
    };
    let pid = i32::try_from(child.id()).context("the command's process id")?;
    session.watch(pid);
    let ended = wait_for(&mut session, &signals, &mut child, pid);
    session.settle(SETTLE_NS);
    let code = match ended {
        Ended::Code(code) => code,
        Ended::Signal(n) | Ended::Stopped(n) => 128 + n,
    };
    let report = session.report(Some(code));
    write_report(report_file.as_mut(), &report);
    if !args.quiet {
        // Standard error may be closed: that is no failure of the run.
        let _ = writeln!(std::io::stderr(), "{}", summary(&report));
    }
    Ok(code)
}

/// A report that cannot be written is said, and no failure of the command's.
fn write_report(file: Option<&mut File>, report: &Report) {
    let Some(file) = file else { return };
    let written = serde_json::to_string_pretty(report)
        .map_err(std::io::Error::from)
        .and_then(|json| writeln!(file, "{json}"));
    if let Err(e) = written {
        eprintln!("holo-exec: cannot write the report: {e}");
    }
}

/// Signals that this process receives rather than acting on. A fault of its own ends it all the same: the kernel
/// does not heed the mask then.
fn received() -> Vec<i32> {
    (1..=libc::SIGRTMAX())
        .filter(|s| ![libc::SIGKILL, libc::SIGSTOP].contains(s))
        .collect()
}

/// Whether the command would not know of it otherwise.
fn is_to_be_passed_on(came: Came, session: &Session) -> bool {
    match came.sender {
        // A write of ours to a pipe that nobody reads; the pager continues us when the command is continued.
        Some(sender) => sender != spawn::own_pid() && sender != session.pager_pid(),
        // From a terminal, which tells the whole group, but for one that goes away.
        None => match came.signal {
            // The timer of `alarm` stays with the process over an exec.
            libc::SIGCONT | libc::SIGALRM => true,
            libc::SIGHUP => signals::leads_session(),
            _ => false,
        },
    }
}

fn is_stopped(pid: i32) -> bool {
    procfs::state_of(pid).is_ok_and(|state| state == b'T')
}

fn wait_for(session: &mut Session, received: &Signals, child: &mut Child, pid: i32) -> Ended {
    let (mut watched, mut continued) = (true, false);
    loop {
        match spawn::wait(pid, false) {
            Ok(Some(Ended::Stopped(signal))) => {
                session.stop_with_command(signal);
                continued = true;
            }
            Ok(Some(ended)) => return ended,
            Ok(None) => {}
            // It cannot be waited for: whatever became of it, std knows.
            Err(_) => {
                return Ended::Code(
                    child
                        .wait()
                        .ok()
                        .and_then(|s| s.code())
                        .unwrap_or(EXIT_HOLO),
                );
            }
        }
        let (alive, keepers) = if watched {
            (session.alive_fd(), session.keepers_fd())
        } else {
            (-1, -1)
        };
        spawn::poll_readable(&[received.as_raw_fd(), alive, keepers], None);
        session.keep();
        while let Some(came) = received.next() {
            // What continued us went to the whole group, unless the command is stopped still.
            let known = continued && came.signal == libc::SIGCONT && !is_stopped(pid);
            if !known && is_to_be_passed_on(came, session) {
                let _ = signals::pass_on(pid, came);
            }
        }
        continued = false;
        if watched && session.gone() {
            watched = false;
            if let Ok(Some(ended @ (Ended::Code(_) | Ended::Signal(_)))) = spawn::wait(pid, false) {
                return ended;
            }
            for held in session.kill_held() {
                eprintln!(
                    "holo-exec: holo's pager, guardian and warden all died; process {held} was killed, \
                     because part of its memory was with them"
                );
            }
        }
    }
}
