//! `holo`: attach, detach, status.

#![forbid(unsafe_code)]

use std::io::{ErrorKind, Write as _};
use std::path::Path;

use anyhow::Context as _;
use clap::{CommandFactory as _, Parser as _};
use holo_cli::args::{Action, Exec, Holo, Program};
use holo_cli::attach;
use holo_pager::shell::{progress, summary};
use holo_proto::Report;

fn main() {
    if let Err(e) = act(Holo::parse().action) {
        eprintln!("holo: {e:#}");
        std::process::exit(1);
    }
}

fn act(action: Action) -> anyhow::Result<()> {
    match action {
        Action::Attach {
            pid,
            local_memory,
            report,
            json,
        } => {
            let so_far = attach::attach(pid, local_memory, report.as_deref())?;
            let held = || format!("holding process {pid}; `holo detach {pid}` lets go");
            say_report(json, &so_far, held)
        }
        Action::Detach { pid, json } => {
            let report = attach::detach(pid)?;
            say_report(json, &report, || summary(&report))
        }
        Action::Status { pid, json } => {
            let so_far = attach::status(pid)?;
            say_report(json, &so_far, || {
                format!("process {pid}: {}", progress(&so_far))
            })
        }
        Action::Completions { shell, program } => {
            let (mut table, name) = match program {
                Program::Holo => (Holo::command(), "holo"),
                Program::HoloExec => (Exec::command(), "holo-exec"),
            };
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut table, name, &mut script);
            say(&script)
        }
        Action::Man { folder } => man(&folder),
    }
}

fn say_report(json: bool, report: &Report, line: impl FnOnce() -> String) -> anyhow::Result<()> {
    let text = if json {
        serde_json::to_string_pretty(report)?
    } else {
        line()
    };
    say(format!("{text}\n").as_bytes())
}

/// A reader that has gone is no failure.
fn say(bytes: &[u8]) -> anyhow::Result<()> {
    let mut out = std::io::stdout();
    match out.write_all(bytes).and_then(|()| out.flush()) {
        Err(e) if e.kind() != ErrorKind::BrokenPipe => {
            Err(e).context("cannot write to standard output")
        }
        _ => Ok(()),
    }
}

fn man(folder: &Path) -> anyhow::Result<()> {
    std::fs::create_dir_all(folder).with_context(|| format!("cannot make {}", folder.display()))?;
    clap_mangen::generate_to(Holo::command(), folder)?;
    clap_mangen::generate_to(Exec::command(), folder)?;
    Ok(())
}
