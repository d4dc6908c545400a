//! `holo`: attach, detach, status.

use std::io::Write as _;
use std::path::Path;

use anyhow::Context as _;
use clap::{CommandFactory as _, Parser as _};
use holo_cli::args::{Action, Exec, Holo};
use holo_cli::attach;

fn main() {
    if let Err(e) = act(Holo::parse().action) {
        eprintln!("holo: {e:#}");
        std::process::exit(1);
    }
}

fn act(action: Action) -> anyhow::Result<()> {
    let mut out = std::io::stdout();
    // A reader that has gone is no failure.
    let mut say = |text: &str| {
        let _ = writeln!(out, "{text}");
    };
    match action {
        Action::Attach {
            pid,
            local_memory,
            report,
        } => {
            attach::attach(pid, local_memory, report.as_deref())?;
            say(&format!(
                "holding process {pid}; `holo detach {pid}` lets go"
            ));
        }
        Action::Detach { pid } => {
            let report = attach::detach(pid)?;
            say(&attach::line(&report));
        }
        Action::Status { pid, json } => {
            let report = attach::status(pid)?;
            if json {
                say(&serde_json::to_string_pretty(&report)?);
            } else {
                say(&attach::line(&report));
            }
        }
        Action::Completions { shell } => {
            clap_complete::generate(shell, &mut Holo::command(), "holo", &mut out);
            clap_complete::generate(shell, &mut Exec::command(), "holo-exec", &mut out);
        }
        Action::Man { folder } => man(&folder)?,
    }
    Ok(())
}

fn man(folder: &Path) -> anyhow::Result<()> {
    std::fs::create_dir_all(folder).with_context(|| format!("cannot make {}", folder.display()))?;
    clap_mangen::generate_to(Holo::command(), folder)?;
    clap_mangen::generate_to(Exec::command(), folder)?;
    Ok(())
}
