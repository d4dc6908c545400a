//! A list of cases, run one after the other, one line each.

use std::cell::Cell;
use std::fs;
use std::io::Write as _;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context as _, Result};

use super::holo::Binaries;
use super::options::Options;

/// What a case runs: once a round.
pub type Body = Box<dyn Fn(&Run<'_>) -> Result<()>>;

/// One case of a suite.
pub struct Case {
    /// Its name: a stem, and after a dot a variant.
    pub name: String,
    /// What it does.
    pub body: Body,
}

impl Case {
    /// A case.
    pub fn new(name: impl Into<String>, body: impl Fn(&Run<'_>) -> Result<()> + 'static) -> Self {
        Self {
            name: name.into(),
            body: Box::new(body),
        }
    }
}

/// One round of one case.
#[derive(Debug)]
pub struct Run<'a> {
    /// The case's name.
    pub name: &'a str,
    /// This round's seed.
    pub seed: u64,
    /// A folder of its own, on a disk, that every user may enter.
    pub scratch: PathBuf,
    /// holo, or none in a bare run.
    pub binaries: Option<&'a Binaries>,
    /// What was asked for.
    pub options: &'a Options,
    started: Cell<u64>,
}

impl<'a> Run<'a> {
    /// The same round, bare: for cases that compare.
    #[must_use]
    pub fn without_holo(&self) -> Run<'a> {
        Run {
            name: self.name,
            seed: self.seed,
            scratch: self.scratch.clone(),
            binaries: None,
            options: self.options,
            started: Cell::new(self.next_number()),
        }
    }

    /// Counts the commands that this round starts.
    pub fn next_number(&self) -> u64 {
        self.started.set(self.started.get() + 1);
        self.started.get()
    }
}

/// Prints one line to standard output; a closed one is nobody's concern.
pub fn print_line(line: &str) {
    let mut out = std::io::stdout().lock();
    let _ = writeln!(out, "{line}");
    let _ = out.flush();
}

/// Where a suite keeps its files: a real disk (`/tmp` may be a tmpfs, without O_DIRECT), removed at
/// the end.
#[derive(Debug)]
pub struct Scratch(PathBuf);

impl Scratch {
    /// Makes the folder.
    ///
    /// # Errors
    /// It cannot be made.
    pub fn create(suite: &str) -> Result<Self> {
        let folder = PathBuf::from(format!("/var/tmp/{suite}-{}", std::process::id()));
        fs::create_dir_all(&folder).with_context(|| format!("making {}", folder.display()))?;
        open_to_all(&folder)?;
        Ok(Self(folder))
    }

    /// The folder.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        // A file that stays behind is a nuisance, no failure.
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn open_to_all(folder: &Path) -> Result<()> {
    fs::set_permissions(folder, fs::Permissions::from_mode(0o755))
        .with_context(|| format!("opening {}", folder.display()))
}

/// Runs the cases that the options ask for; exit code 1 if one failed.
pub fn run(cases: &[Case], options: &Options, scratch: &Scratch) -> ExitCode {
    let wanted: Vec<&Case> = cases
        .iter()
        .filter(|case| options.wants(&case.name))
        .collect();
    if options.list {
        for case in wanted {
            print_line(&case.name);
        }
        return ExitCode::SUCCESS;
    }
    if wanted.is_empty() {
        print_line("not ok no case has this name; --list shows them");
        return ExitCode::FAILURE;
    }
    let binaries = if options.bare {
        None
    } else {
        Some(Binaries::find())
    };
    let binaries = match binaries.transpose() {
        Ok(binaries) => binaries,
        Err(error) => {
            print_line(&format!("not ok {error:#}"));
            return ExitCode::from(2);
        }
    };
    let (mut passed, mut failed) = (0_u32, 0_u32);
    for case in wanted {
        match rounds(case, options, binaries.as_ref(), scratch) {
            Ok(count) => {
                passed += 1;
                if count > 1 {
                    print_line(&format!("# {} rounds of {}", count, case.name));
                }
                print_line(&format!("ok {}", case.name));
            }
            Err(error) => {
                failed += 1;
                print_line(&format!(
                    "not ok {}: {}",
                    case.name,
                    format!("{error:#}").replace('\n', " ")
                ));
            }
        }
    }
    print_line(&format!("{passed} passed, {failed} failed"));
    if failed == 0 {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}

fn rounds(
    case: &Case,
    options: &Options,
    binaries: Option<&Binaries>,
    scratch: &Scratch,
) -> Result<u64> {
    let mut round = 0;
    loop {
        let seed = options.seed.wrapping_add(round);
        let folder = scratch.path().join(format!("{}-{round}", case.name));
        let result = one_round(case, options, binaries, &folder, seed);
        let _ = fs::remove_dir_all(&folder);
        result.inspect_err(|_| {
            print_line(&format!(
                "# replay with: --only {} --seed {seed}",
                case.name
            ));
        })?;
        round += 1;
        if round >= options.rounds {
            return Ok(round);
        }
    }
}

fn one_round(
    case: &Case,
    options: &Options,
    binaries: Option<&Binaries>,
    folder: &Path,
    seed: u64,
) -> Result<()> {
    fs::create_dir_all(folder).with_context(|| format!("making {}", folder.display()))?;
    open_to_all(folder)?;
    let run = Run {
        name: &case.name,
        seed,
        scratch: folder.to_owned(),
        binaries,
        options,
        started: Cell::new(0),
    };
    (case.body)(&run)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    use crate::torture::harness::launch::Plan;

    fn bare(script: &'static str, deadline_s: u64) -> Result<()> {
        let scratch = Scratch::create(&format!("suite-test-{script:.3}-{deadline_s}"))?;
        let options = Options {
            bare: true,
            measure: false,
            sabotage: false,
            list: false,
            only: Vec::new(),
            rounds: 1,
            holding: None,
            seed: 1,
        };
        let case = Case::new("case", move |run| {
            Plan::new(
                ["/bin/sh", "-c", script],
                4,
                Duration::from_secs(deadline_s),
            )
            .start(run)?
            .finish()?;
            Ok(())
        });
        rounds(&case, &options, None, &scratch).map(|_| ())
    }

    #[test]
    fn a_command_that_succeeds_passes() {
        bare("true", 10).unwrap();
    }

    #[test]
    fn a_wrong_exit_code_is_told_with_the_reason() {
        let error = bare("echo because >&2; exit 3", 10)
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("exit code 3") && error.contains("because"),
            "{error}"
        );
    }

    #[test]
    fn an_overrun_is_a_hang() {
        let error = bare("sleep 60", 1).unwrap_err().to_string();
        assert_eq!(error, "hung: the deadline has passed");
    }

    #[test]
    fn a_process_left_behind_is_a_failure() {
        let error = bare("setsid sleep 60 >/dev/null 2>&1 & exit 0", 30)
            .unwrap_err()
            .to_string();
        assert!(error.contains("behind"), "{error}");
    }
}
