//! The torture cases: which program, how large, how long.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Result, ensure};
use holo_proto::Report;

use super::harness::launch::{End, Plan};
use super::harness::suite::{Case, Run};
use super::harness::verdict;
use super::{build, cgroup, huge, interfere, many, sabotage, slow_pipe, terminal};

/// A case in which the driver takes part; the folder takes the compiled programs.
type Special = fn(&Run<'_>, &Path) -> Result<()>;

/// One program of `tests/torture` with its arguments.
#[derive(Clone, Copy, Debug)]
pub struct Program {
    /// Name of the source file, without its ending.
    pub name: &'static str,
    /// Memory that it is told to use, MiB.
    pub size_mib: u64,
    /// Seconds that it is told to run.
    pub seconds: u64,
    /// Peak of private memory in a bare run, MiB, as `--measure` gave it. The budget is a quarter.
    pub bare_peak_mib: u64,
    /// A statement that must not be zero in a bare run, or the case would test nothing.
    pub works: Option<&'static str>,
    /// A statement of a stated limit: zero in a bare run, counted under holo.
    pub limit: Option<&'static str>,
    /// Counts of the report that what it does makes certain, by name, and what they are at least.
    pub counted: &'static [(&'static str, u64)],
    /// Why its resident memory is only told, and not judged.
    pub residence_told: Option<&'static str>,
}

const fn plain(name: &'static str, size_mib: u64, seconds: u64, bare_peak_mib: u64) -> Program {
    Program {
        name,
        size_mib,
        seconds,
        bare_peak_mib,
        works: None,
        limit: None,
        counted: &[],
        residence_told: None,
    }
}

/// Threads write the page being evicted; also the load of the cases in which the driver interferes.
pub const WRITE_RACE: Program = Program {
    counted: &[("pages_left_alone.shared", 1)],
    ..plain("write_race", 256, 8, 257)
};

/// The programs that run by themselves.
pub const PROGRAMS: &[Program] = &[
    WRITE_RACE,
    Program {
        works: Some("threads_joined"),
        ..plain("threads", 128, 10, 136)
    },
    Program {
        works: Some("robust_deaths"),
        limit: Some("robust_unrecovered"),
        ..plain("robust", 128, 8, 129)
    },
    Program {
        works: Some("pi_kernel_locks"),
        limit: Some("pi_efault"),
        ..plain("pi", 128, 8, 129)
    },
    plain("mremap", 128, 8, 129),
    Program {
        counted: &[("faults_zero", 1)],
        ..plain("madvise", 128, 8, 108)
    },
    plain("mprotect", 96, 8, 97),
    plain("mapfixed", 96, 8, 90),
    Program {
        works: Some("fork_chains"),
        // A thread counts in the same few pages all the time.
        counted: &[
            ("faults_wp", 1),
            ("pages_stayed.written", 1),
            ("pages_stayed.shared", 1),
            ("processes", 5),
        ],
        ..plain("forkchain", 32, 8, 63)
    },
    Program {
        works: Some("new_programs"),
        ..plain("vforkexec", 128, 8, 130)
    },
    Program {
        works: Some("second_process"),
        ..plain("clonevm", 128, 8, 129)
    },
    Program {
        works: Some("signals_handled"),
        ..plain("sigaltstack", 128, 8, 129)
    },
    Program {
        works: Some("transfers"),
        ..plain("syscalls", 128, 8, 129)
    },
    Program {
        works: Some("direct_reads"),
        ..plain("odirect", 128, 8, 129)
    },
    Program {
        works: Some("ring_reads"),
        residence_told: Some("nothing is evicted while a buffer is registered, which is pinned"),
        counted: &[("pages_stayed.pinned", 1), ("pages_left_alone.pinned", 8)],
        ..plain("uring", 128, 8, 129)
    },
    Program {
        works: Some("locks"),
        counted: &[("pages_left_alone.locked", 1), ("pages_stayed.other", 1)],
        ..plain("mlock", 128, 8, 129)
    },
    Program {
        works: Some("children"),
        counted: &[("processes", 2)],
        ..plain("children", 128, 8, 129)
    },
];

/// The programs that also run while the pager is killed at random moments.
const KILLED: &[&str] = &[
    "write_race",
    "madvise",
    "mremap",
    "forkchain",
    "mapfixed",
    "odirect",
    "uring",
    "threads",
];

impl Program {
    /// The plan to run it in this round.
    ///
    /// # Errors
    /// It cannot be compiled.
    pub fn plan(&self, run: &Run<'_>, binaries: &Path) -> Result<Plan> {
        let program = build::program(self.name, binaries)?;
        let arguments = [
            program.into_os_string(),
            run.seed.to_string().into(),
            self.size_mib.to_string().into(),
            self.seconds.to_string().into(),
        ];
        // Far more than it takes: other work may share the machine, and nothing is learned from
        // being slow.
        let deadline = Duration::from_secs(120 + 15 * self.seconds);
        Ok(Plan {
            residence_told: self.residence_told,
            ..Plan::new(arguments, self.bare_peak_mib, deadline)
        })
    }

    /// Checks the statements of a finished run.
    ///
    /// # Errors
    /// One of them is missing or has a value that it must not have.
    pub fn judge(&self, end: &End, run: &Run<'_>) -> Result<()> {
        if let Some(name) = self.works {
            ensure!(end.statement(name)? > 0, "{name} is 0: nothing was tested");
        }
        if let Some(name) = self.limit {
            let count = end.statement(name)?;
            ensure!(
                count == 0 || run.binaries.is_some(),
                "{name}={count} without holo"
            );
        }
        end.report.as_ref().map_or(Ok(()), |r| self.judge_report(r))
    }

    fn judge_report(&self, report: &Report) -> Result<()> {
        // The first process of one of them ends half-way, and it may have begun a moment before it was watched.
        let least_s = self.seconds as f64 / 3.0;
        ensure!(
            report.wall_s > least_s,
            "only {} s under holo",
            report.wall_s
        );
        for &(name, least) in self.counted {
            let count = verdict::count(report, name)?;
            ensure!(
                count >= least as f64,
                "{name} is {count} in the report, and must be {least} at least"
            );
        }
        Ok(())
    }
}

/// All cases; the folder takes the compiled programs.
#[must_use]
pub fn all(binaries: PathBuf) -> Vec<Case> {
    let mut cases = Vec::new();
    for program in PROGRAMS {
        let binaries = binaries.clone();
        cases.push(Case::new(program.name, move |run| {
            if run.options.sabotage {
                return sabotage::must_be_noticed(program, run, &binaries);
            }
            let end = program.plan(run, &binaries)?.start(run)?.finish()?;
            program.judge(&end, run)
        }));
    }
    for program in PROGRAMS
        .iter()
        .filter(|program| KILLED.contains(&program.name))
    {
        let binaries = binaries.clone();
        cases.push(Case::new(
            format!("{}.pager_killed", program.name),
            move |run| interfere::kill_pagers(program, run, &binaries),
        ));
    }
    let special: [(&str, Special); 8] = [
        ("stop_continue", interfere::stop_and_continue),
        ("debuggers", interfere::debuggers),
        ("terminal_stop", terminal::suspend_key),
        ("slow_stderr", slow_pipe::slow_reader),
        (
            "slow_stderr.pager_killed",
            slow_pipe::slow_reader_pager_killed,
        ),
        ("small_cgroup", cgroup::small),
        ("huge_pages", huge::free_memory_rises),
        ("many", many::together),
    ];
    for (name, body) in special {
        let binaries = binaries.clone();
        cases.push(Case::new(name, move |run| body(run, &binaries)));
    }
    cases
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_has_to_be_counted_is_in_the_report() {
        for (name, _) in PROGRAMS.iter().flat_map(|program| program.counted) {
            verdict::count(&Report::default(), name).unwrap();
        }
    }
}
