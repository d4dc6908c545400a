//! The runner's command line.

use std::path::PathBuf;

use anyhow::{Context as _, Result, bail, ensure};

/// What the command line may say.
pub(crate) const USAGE: &str = "\
usage: holo-test run [--tier fast|full] [OPTIONS]    run the suites of a tier, in the manifest's order
       holo-test soak --minutes N [OPTIONS]          run the soak suites in turn until the time is over
       holo-test build                               build what the suites need
       holo-test list                                show the suites
options: --suite NAME     only this suite, whatever its tier (may be repeated)
         --case TEXT      only cases whose name holds TEXT; the least number of cases is not asked for then
         --rounds N       soak: at most N rounds of each suite
         --manifest FILE  another list (default: tests/manifest.toml)
         --root FOLDER    the checkout (default: the current folder)
         --logs FOLDER    where outputs go (default: test-logs where cargo builds)
         --no-build       take the programs beside the runner; no cargo suite can run
environment: HOLO_SEED=N  the seed of every suite, instead of one from the commit";

/// What to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Task {
    /// Run all suites up to a tier.
    Run {
        /// Only those of the fast tier.
        fast_only: bool,
    },
    /// Run the soak suites in turn.
    Soak {
        /// For how long.
        minutes: u64,
        /// At most so many rounds of each.
        rounds: Option<u64>,
    },
    /// Only build.
    Build,
    /// Only show the list.
    List,
}

/// The command line, understood.
#[derive(Debug)]
pub(crate) struct Args {
    pub(crate) task: Task,
    pub(crate) suites: Vec<String>,
    pub(crate) case: Option<String>,
    pub(crate) manifest: Option<PathBuf>,
    pub(crate) root: PathBuf,
    pub(crate) logs: Option<PathBuf>,
    pub(crate) builds: bool,
}

impl Args {
    /// # Errors
    /// Names the argument that is wrong.
    pub(crate) fn parse(words: impl IntoIterator<Item = String>) -> Result<Self> {
        let mut words = words.into_iter();
        let verb = words.next().context("no command")?;
        let mut args = Self {
            task: Task::List,
            suites: Vec::new(),
            case: None,
            manifest: None,
            root: PathBuf::from("."),
            logs: None,
            builds: true,
        };
        let (mut fast_only, mut minutes, mut rounds) = (None, None, None);
        while let Some(word) = words.next() {
            let mut value = || {
                words
                    .next()
                    .with_context(|| format!("{word} needs a value"))
            };
            match word.as_str() {
                "--suite" => args.suites.push(value()?),
                "--case" => args.case = Some(value()?),
                "--manifest" => args.manifest = Some(value()?.into()),
                "--root" => args.root = value()?.into(),
                "--logs" => args.logs = Some(value()?.into()),
                "--no-build" => args.builds = false,
                "--minutes" => minutes = Some(whole_number(&word, &value()?)?),
                "--rounds" => rounds = Some(whole_number(&word, &value()?)?),
                "--tier" => {
                    fast_only = Some(match value()?.as_str() {
                        "fast" => true,
                        "full" => false,
                        other => bail!("--tier {other}: it is fast or full"),
                    });
                }
                other => bail!("unknown argument {other}"),
            }
        }
        args.task = match verb.as_str() {
            "run" => Task::Run {
                fast_only: fast_only.unwrap_or(false),
            },
            "soak" => Task::Soak {
                minutes: minutes.context("soak needs --minutes N")?,
                rounds,
            },
            "build" => Task::Build,
            "list" => Task::List,
            other => bail!("unknown command {other}"),
        };
        let is_soak = matches!(args.task, Task::Soak { .. });
        ensure!(
            is_soak || (minutes.is_none() && rounds.is_none()),
            "--minutes and --rounds are for soak"
        );
        ensure!(fast_only.is_none() || verb == "run", "--tier is for run");
        Ok(args)
    }
}

fn whole_number(option: &str, text: &str) -> Result<u64> {
    let number = text
        .parse()
        .with_context(|| format!("{option} {text}: not a whole number"))?;
    ensure!(number > 0, "{option} 0: at least 1");
    Ok(number)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> Result<Args> {
        Args::parse(line.split(' ').map(str::to_owned))
    }

    #[test]
    fn commands_and_options_are_understood() {
        assert_eq!(
            parse("run --tier fast").unwrap().task,
            Task::Run { fast_only: true }
        );
        assert_eq!(parse("run --suite a --suite b").unwrap().suites, ["a", "b"]);
        assert_eq!(
            parse("soak --minutes 5 --rounds 2").unwrap().task,
            Task::Soak {
                minutes: 5,
                rounds: Some(2)
            }
        );
        assert!(!parse("list --no-build").unwrap().builds);
    }

    #[test]
    fn nonsense_is_refused_by_name() {
        for (line, named) in [
            ("walk", "walk"),
            ("soak", "--minutes"),
            ("soak --minutes 0", "at least 1"),
            ("soak --minutes 1.5", "1.5"),
            ("run --rounds 2", "for soak"),
            ("run --tier slow", "slow"),
            ("run --suite", "needs a value"),
            ("run all", "all"),
        ] {
            let error = format!("{:#}", parse(line).expect_err(line));
            assert!(error.contains(named), "{line}: {error}");
        }
    }
}
