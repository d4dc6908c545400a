//! The command lines, as tables from which help, completions and man pages come.

use std::ffi::OsString;
use std::path::PathBuf;

use clap::{Parser, Subcommand, ValueEnum};

use crate::size::Size;

/// What `holo` and each of its commands ends with.
const EXIT_CODES: &str = "Exit codes: 0 if it was done; 1 if it was not, and standard error says why; 2 for a wrong usage.";

/// Runs a command within an amount of local memory; what does not fit is paged by holo, invisibly to the
/// command.
#[derive(Debug, Parser)]
#[command(
    name = "holo-exec",
    version,
    after_help = "Exit codes: the command's own; 128+n if signal n killed it; 127 if it was not found, 126 \
                  if it could not be run, 125 if holo itself failed, 2 for a wrong usage.\n\n\
                  Example: holo-exec --local-memory 512M -- python3 job.py"
)]
pub struct Exec {
    /// Memory that the command and its fork children may keep in RAM: 512M, 2G, 25% (of this machine's).
    #[arg(long, value_name = "SIZE", default_value = "50%")]
    pub local_memory: Size,
    /// Write a JSON report of the run to FILE at its end.
    #[arg(long, value_name = "FILE")]
    pub report: Option<PathBuf>,
    /// No summary line at the end.
    #[arg(long, short)]
    pub quiet: bool,
    /// The command and its arguments.
    #[arg(required = true, trailing_var_arg = true, value_name = "CMD")]
    pub command: Vec<OsString>,
}

/// Uses memory beyond this machine's for unmodified programs.
#[derive(Debug, Parser)]
#[command(name = "holo", version, after_help = EXIT_CODES)]
pub struct Holo {
    /// What to do.
    #[command(subcommand)]
    pub action: Action,
}

/// The programs of which there are completions.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum Program {
    /// `holo`
    Holo,
    /// `holo-exec`
    HoloExec,
}

/// What `holo` can do.
#[derive(Debug, Subcommand)]
pub enum Action {
    /// Take over a running process: from now on it keeps at most SIZE in RAM.
    ///
    /// Refused, with cause and remedy, where it could not be paged; the process goes on as it was. What holo has to
    /// say later (why a process was killed, or is not limited) goes to standard error if that is a file or a terminal,
    /// else to the system's log: see dmesg or journalctl.
    #[command(after_help = EXIT_CODES)]
    Attach {
        /// The process.
        pid: i32,
        /// Memory that it may keep in RAM: 512M, 2G, 25% (of this machine's).
        #[arg(long, value_name = "SIZE")]
        local_memory: Size,
        /// Write a JSON report to FILE, no pipe or terminal, when it ends or is detached.
        #[arg(long, value_name = "FILE")]
        report: Option<PathBuf>,
        /// Print the report so far as JSON when it is held.
        #[arg(long)]
        json: bool,
    },
    /// Make all memory of a process resident again and let go of it.
    #[command(after_help = EXIT_CODES)]
    Detach {
        /// The process that was attached; one that holo-exec runs, or holo-exec itself.
        pid: i32,
        /// Print the report as JSON.
        #[arg(long)]
        json: bool,
    },
    /// Show what holo does for a process and its children.
    #[command(after_help = EXIT_CODES)]
    Status {
        /// The process that was attached; one that holo-exec runs, or holo-exec itself; or a child of these.
        pid: i32,
        /// Print the report so far as JSON.
        #[arg(long)]
        json: bool,
    },
    /// Print completions for a shell.
    #[command(after_help = EXIT_CODES)]
    Completions {
        /// The shell.
        shell: clap_complete::Shell,
        /// Of which program.
        #[arg(default_value = "holo")]
        program: Program,
    },
    /// Write the man pages of holo and holo-exec to a folder.
    #[command(after_help = EXIT_CODES)]
    Man {
        /// The folder.
        folder: PathBuf,
    },
}
