//! Programs that start, work, check themselves and end.

use std::ffi::OsString;
use std::time::Duration;

use anyhow::{Result, ensure};

use super::source;
use crate::torture::harness::launch::{End, Plan};
use crate::torture::harness::suite::{Case, Run};

/// Debian's own interpreter, whatever else is on the path.
pub const PYTHON: &str = "/usr/bin/python3";

const NODE: &str = "node";

/// One script with its arguments.
#[derive(Clone, Copy, Debug)]
pub struct Script {
    /// The case.
    pub name: &'static str,
    /// Interpreter and its flags.
    pub interpreter: &'static [&'static str],
    /// File in `tests/programs`.
    pub file: &'static str,
    /// How large: MiB, or thousands of objects.
    pub size: u64,
    /// Seconds that it is told to run.
    pub seconds: u64,
    /// Peak of private memory in a bare run, MiB, as `--measure` gave it. The budget is a quarter.
    pub bare_peak_mib: u64,
}

// -B: no compiled files beside the sources. -S and -E: no site packages, no environment of the user's.
const PYTHON_FLAGS: &[&str] = &[PYTHON, "-B", "-S", "-E"];

/// Threads that hash and rewrite one bytearray; also the load of the attach case.
pub const PY_HASH: Script = Script {
    name: "python_hash",
    interpreter: PYTHON_FLAGS,
    file: "py_hash.py",
    size: 256,
    seconds: 12,
    bare_peak_mib: 262,
};

const SCRIPTS: &[Script] = &[
    PY_HASH,
    Script {
        name: "python_dict",
        interpreter: PYTHON_FLAGS,
        file: "py_dict.py",
        size: 500,
        seconds: 10,
        bare_peak_mib: 220,
    },
    Script {
        name: "python_workers",
        interpreter: PYTHON_FLAGS,
        file: "py_workers.py",
        size: 40,
        seconds: 10,
        bare_peak_mib: 155,
    },
    Script {
        name: "node_heap",
        interpreter: &[NODE, "--expose-gc"],
        file: "node_heap.js",
        size: 100,
        seconds: 10,
        bare_peak_mib: 182,
    },
];

impl Script {
    /// The plan to run it for so many seconds.
    #[must_use]
    pub fn plan(&self, run: &Run<'_>, seconds: u64) -> Plan {
        let mut command: Vec<OsString> = self.interpreter.iter().map(OsString::from).collect();
        command.push(source(self.file).into_os_string());
        command.extend([run.seed, self.size, seconds].map(|number| number.to_string().into()));
        // Filling and the last check take their time as well, more so under pressure.
        Plan::new(
            command,
            self.bare_peak_mib,
            Duration::from_secs(120 + 10 * seconds),
        )
    }
}

fn judge(end: &End) -> Result<()> {
    ensure!(end.statement("checks")? > 0, "nothing was checked");
    Ok(())
}

/// The scripts by themselves, and while pagers are killed.
pub fn cases() -> Vec<Case> {
    let plain = SCRIPTS.iter().map(|script| {
        Case::new(script.name, move |run| {
            judge(&script.plan(run, script.seconds).start(run)?.finish()?)
        })
    });
    let killed = SCRIPTS.iter().map(|script| {
        Case::new(format!("{}.pager_killed", script.name), move |run| {
            let mut running = script.plan(run, script.seconds).start(run)?;
            running.kill_pagers(run.seed);
            judge(&running.finish()?)
        })
    });
    plain.chain(killed).collect()
}
