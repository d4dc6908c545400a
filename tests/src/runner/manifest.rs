//! The list of suites, read and checked.

use std::collections::{BTreeMap, HashSet};
use std::fs;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use serde::Deserialize;

/// Seconds that all suites of `make test-fast` may be allowed together.
const FAST_BUDGET_SECONDS: u64 = 300;
/// Seconds that all suites of `make test` may be allowed together.
const FULL_BUDGET_SECONDS: u64 = 1800;
/// Silence that means a hang, where a suite doesn't say.
const QUIET_SECONDS_DEFAULT: u64 = 120;

/// When a suite runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Tier {
    /// In `make test-fast` and `make test`.
    Fast,
    /// In `make test`.
    Full,
    /// In `make soak` only.
    Soak,
}

/// Which target of a package a cargo suite is.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) enum CargoTarget {
    /// The unit tests of the library.
    Lib,
    /// The unit tests of a program.
    Bin(String),
    /// The integration test with this name.
    Test(String),
    /// The examples in the library's documentation.
    Doc,
}

/// What a suite runs.
#[derive(Debug, Clone)]
pub(crate) enum Program {
    /// A test executable that cargo builds.
    Cargo {
        /// The package's name.
        package: String,
        /// Its target.
        target: CargoTarget,
    },
    /// A program that prints a line a case; see the manifest's header.
    Exec {
        /// The program and its first arguments.
        command: Vec<String>,
    },
}

/// How one kind of run starts a suite.
#[derive(Debug, Clone)]
pub(crate) struct Terms {
    /// Arguments after those of the program itself.
    pub(crate) args: Vec<String>,
    /// The time it should take at most; twice that ends it.
    pub(crate) allowed: Duration,
}

/// One entry of the manifest.
#[derive(Debug, Clone)]
pub(crate) struct Suite {
    pub(crate) name: String,
    pub(crate) tier: Tier,
    pub(crate) program: Program,
    /// The least number of cases that must pass.
    pub(crate) cases: u64,
    pub(crate) ordinary: Terms,
    /// How a soak starts it; None: soaks leave it out.
    pub(crate) soak: Option<Terms>,
    /// The most rounds of one soak; None: until the time is over.
    pub(crate) rounds: Option<u64>,
    pub(crate) quiet: Duration,
    pub(crate) needs: Vec<String>,
    /// Cases that may be skipped, and must be.
    pub(crate) ignored: Vec<String>,
    pub(crate) env: BTreeMap<String, String>,
}

/// A checked manifest.
#[derive(Debug)]
pub(crate) struct Manifest {
    pub(crate) suites: Vec<Suite>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct ManifestText {
    #[serde(default)]
    suite: Vec<SuiteText>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct SuiteText {
    name: String,
    tier: Tier,
    kind: Kind,
    package: Option<String>,
    target: Option<String>,
    command: Option<Vec<String>>,
    cases: u64,
    seconds: u64,
    quiet_seconds: Option<u64>,
    #[serde(default)]
    args: Vec<String>,
    soak_args: Option<Vec<String>>,
    soak_seconds: Option<u64>,
    rounds: Option<u64>,
    #[serde(default)]
    needs: Vec<String>,
    #[serde(default)]
    ignored: Vec<String>,
    #[serde(default)]
    env: BTreeMap<String, String>,
}

#[derive(Deserialize, Clone, Copy)]
#[serde(rename_all = "lowercase")]
enum Kind {
    Cargo,
    Exec,
}

impl Manifest {
    /// Reads and checks the file.
    ///
    /// # Errors
    /// Names the file, and the suite or line that is wrong.
    pub(crate) fn read(path: &Path) -> Result<Self> {
        let text = fs::read_to_string(path)
            .with_context(|| format!("reading the manifest {}", path.display()))?;
        Self::parse(&text).with_context(|| format!("in the manifest {}", path.display()))
    }

    fn parse(text: &str) -> Result<Self> {
        let raw: ManifestText = toml::from_str(text)?;
        ensure!(!raw.suite.is_empty(), "it lists no suite ([[suite]])");
        let mut names = HashSet::new();
        let mut suites = Vec::new();
        for entry in raw.suite {
            let name = entry.name.clone();
            ensure!(
                names.insert(name.clone()),
                "suite \"{name}\" is listed twice"
            );
            suites.push(entry.check().with_context(|| format!("suite \"{name}\""))?);
        }
        let manifest = Self { suites };
        manifest.check_budget("fast", FAST_BUDGET_SECONDS, |tier| tier == Tier::Fast)?;
        manifest.check_budget("fast and full", FULL_BUDGET_SECONDS, |tier| {
            tier != Tier::Soak
        })?;
        Ok(manifest)
    }

    fn check_budget(&self, what: &str, budget: u64, counts: impl Fn(Tier) -> bool) -> Result<()> {
        let chosen = self.suites.iter().filter(|suite| counts(suite.tier));
        let sum: u64 = chosen.map(|suite| suite.ordinary.allowed.as_secs()).sum();
        ensure!(
            sum <= budget,
            "the {what} suites are allowed {sum} s together; at most {budget} s are"
        );
        Ok(())
    }
}

impl SuiteText {
    fn check(self) -> Result<Suite> {
        let plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
        ensure!(
            !self.name.is_empty() && self.name.chars().all(plain),
            "a name has small letters, digits and dashes only"
        );
        ensure!(
            self.cases > 0,
            "cases = 0: a suite that may run nothing shows nothing"
        );
        for (field, value) in [
            ("seconds", Some(self.seconds)),
            ("quiet_seconds", self.quiet_seconds),
            ("soak_seconds", self.soak_seconds),
            ("rounds", self.rounds),
        ] {
            ensure!(
                value != Some(0),
                "{field} = 0: leave it out or give a number"
            );
        }
        let program = match self.kind {
            Kind::Cargo => {
                ensure!(self.command.is_none(), "command is for kind = \"exec\"");
                Program::Cargo {
                    package: self.package.context("kind = \"cargo\" needs package")?,
                    target: parse_target(self.target.as_deref().unwrap_or("lib"))?,
                }
            }
            Kind::Exec => {
                ensure!(
                    self.package.is_none() && self.target.is_none(),
                    "package and target are for kind = \"cargo\""
                );
                let command = self.command.unwrap_or_default();
                ensure!(
                    !command.is_empty(),
                    "kind = \"exec\" needs command = [\"program\", …]"
                );
                Program::Exec { command }
            }
        };
        let is_soaked = self.tier == Tier::Soak || self.soak_args.is_some();
        ensure!(
            is_soaked || (self.soak_seconds.is_none() && self.rounds.is_none()),
            "soak_seconds and rounds are for suites of tier \"soak\" or with soak_args"
        );
        let soak = is_soaked.then(|| Terms {
            args: self.soak_args.unwrap_or_else(|| self.args.clone()),
            allowed: Duration::from_secs(self.soak_seconds.unwrap_or(self.seconds)),
        });
        Ok(Suite {
            name: self.name,
            tier: self.tier,
            program,
            cases: self.cases,
            ordinary: Terms {
                args: self.args,
                allowed: Duration::from_secs(self.seconds),
            },
            soak,
            rounds: self.rounds,
            quiet: Duration::from_secs(self.quiet_seconds.unwrap_or(QUIET_SECONDS_DEFAULT)),
            needs: self.needs,
            ignored: self.ignored,
            env: self.env,
        })
    }
}

fn parse_target(text: &str) -> Result<CargoTarget> {
    Ok(match text.split_once(':') {
        None if text == "lib" => CargoTarget::Lib,
        None if text == "doc" => CargoTarget::Doc,
        Some(("bin", name)) if !name.is_empty() => CargoTarget::Bin(name.to_owned()),
        Some(("test", name)) if !name.is_empty() => CargoTarget::Test(name.to_owned()),
        _ => bail!("target = \"{text}\": it is \"lib\", \"doc\", \"bin:NAME\" or \"test:NAME\""),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = "[[suite]]\nname = 'a'\ntier = 'fast'\nkind = 'exec'\ncommand = ['x']\ncases = 1\nseconds = 1\n";

    fn error(text: &str) -> String {
        format!("{:#}", Manifest::parse(text).expect_err("is refused"))
    }

    #[test]
    fn smallest_entry_gets_the_stated_defaults() {
        let suite = Manifest::parse(GOOD).unwrap().suites.remove(0);
        assert_eq!(suite.quiet, Duration::from_secs(QUIET_SECONDS_DEFAULT));
        assert!(suite.soak.is_none() && suite.needs.is_empty() && suite.ignored.is_empty());
    }

    #[test]
    fn mistakes_are_named_with_their_suite() {
        for (mistake, named) in [
            ("", "lists no suite"),
            (&GOOD.replace("'a'", "'A b'"), "small letters"),
            (
                &GOOD.replace("cases = 1", "cases = 0"),
                "suite \"a\": cases = 0",
            ),
            (
                &GOOD.replace("seconds = 1", "seconds = 0"),
                "suite \"a\": seconds = 0",
            ),
            (&GOOD.replace("cases = 1\n", ""), "missing field `cases`"),
            (&GOOD.replace("fast", "slow"), "unknown variant `slow`"),
            (&GOOD.replace("command = ['x']", ""), "needs command"),
            (&GOOD.replace("'exec'", "'cargo'"), "command is for"),
            (&format!("{GOOD}rounds = 2\n"), "rounds are for"),
            (&format!("{GOOD}case = 2\n"), "unknown field `case`"),
            (&format!("{GOOD}{GOOD}"), "listed twice"),
            (
                &GOOD.replace("seconds = 1", "seconds = 301"),
                "at most 300 s",
            ),
        ] {
            assert!(
                error(mistake).contains(named),
                "{mistake}\n{}",
                error(mistake)
            );
        }
    }

    #[test]
    fn soak_terms_fall_back_to_the_ordinary_ones() {
        let text = format!(
            "{}args = ['-a']\nsoak_seconds = 9\n",
            GOOD.replace("fast", "soak")
        );
        let soak = Manifest::parse(&text)
            .unwrap()
            .suites
            .remove(0)
            .soak
            .unwrap();
        assert_eq!(
            (soak.args, soak.allowed),
            (vec!["-a".to_owned()], Duration::from_secs(9))
        );
    }

    #[test]
    fn targets_are_told_apart() {
        assert_eq!(
            parse_target("test:x").unwrap(),
            CargoTarget::Test("x".into())
        );
        assert_eq!(parse_target("doc").unwrap(), CargoTarget::Doc);
        assert!(parse_target("test:").is_err() && parse_target("bench:x").is_err());
    }
}
