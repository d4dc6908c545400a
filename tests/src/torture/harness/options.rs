//! The command line and environment of a suite.

use anyhow::{Context as _, Result, bail};

/// What a suite was asked to do.
#[derive(Clone, Debug)]
pub struct Options {
    /// Run every case without holo: proves the checks themselves.
    pub bare: bool,
    /// Print each case's peak of private memory (implies bare).
    pub measure: bool,
    /// Spoil the programs' memory behind their back: they must notice (where a suite knows how).
    pub sabotage: bool,
    /// Only print the cases' names.
    pub list: bool,
    /// Cases to run; empty: all.
    pub only: Vec<String>,
    /// Only cases whose name holds this: what the test runner asks for.
    pub holding: Option<String>,
    /// Times that each case runs, with a seed of its own each time.
    pub rounds: u64,
    /// Seed of the first round.
    pub seed: u64,
}

/// How the flags are used.
pub const USAGE: &str = "\
usage: [--bare] [--measure] [--sabotage] [--list] [--only NAME]... [--rounds N] [--seed N]
  --bare      run without holo, to check the cases themselves
  --measure   as --bare, and print each case's peak of private memory
  --sabotage  as --bare, and spoil each program's memory: pass if it notices
  --only      run the cases whose name is NAME or begins with NAME and a dot
  --rounds    run each case N times, seeds counting up
  --seed      seed of the first round (default: HOLO_SEED, or 1)
environment: HOLO_BIN_DIR (where holo and holo-exec are), HOLO_SEED, HOLO_CASE (a part of a name)";

impl Options {
    /// Reads the process's arguments and environment.
    ///
    /// # Errors
    /// A flag is unknown or its value is not a number.
    pub fn from_process() -> Result<Self> {
        Self::parse(std::env::args().skip(1), |name| std::env::var(name).ok())
    }

    fn parse(
        arguments: impl IntoIterator<Item = String>,
        environment: impl Fn(&str) -> Option<String>,
    ) -> Result<Self> {
        let number = |text: &str, what: &str| -> Result<u64> {
            text.parse()
                .with_context(|| format!("{what} wants a number, not {text:?}"))
        };
        let mut options = Self {
            bare: false,
            measure: false,
            sabotage: false,
            list: false,
            only: Vec::new(),
            holding: environment("HOLO_CASE").filter(|text| !text.is_empty()),
            rounds: 1,
            seed: match environment("HOLO_SEED") {
                Some(text) => number(&text, "HOLO_SEED")?,
                None => 1,
            },
        };
        let mut arguments = arguments.into_iter();
        while let Some(flag) = arguments.next() {
            let mut value = || {
                arguments
                    .next()
                    .with_context(|| format!("{flag} wants a value"))
            };
            match flag.as_str() {
                "--bare" => options.bare = true,
                "--measure" => (options.bare, options.measure) = (true, true),
                "--sabotage" => (options.bare, options.sabotage) = (true, true),
                "--list" => options.list = true,
                "--only" => options.only.push(value()?),
                "--rounds" => options.rounds = number(&value()?, "--rounds")?,
                "--seed" => options.seed = number(&value()?, "--seed")?,
                _ => bail!("unknown argument {flag:?}\n{USAGE}"),
            }
        }
        Ok(options)
    }

    /// Says whether the case of this name was asked for.
    #[must_use]
    pub fn wants(&self, name: &str) -> bool {
        let is = |only: &String| {
            name == only
                || name
                    .strip_prefix(only.as_str())
                    .is_some_and(|rest| rest.starts_with('.'))
        };
        self.holding
            .as_deref()
            .is_none_or(|part| name.contains(part))
            && (self.only.is_empty() || self.only.iter().any(is))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> Result<Options> {
        Options::parse(line.split_whitespace().map(String::from), |name| {
            (name == "HOLO_SEED").then(|| "7".to_owned())
        })
    }

    #[test]
    fn flags_override_the_environment() {
        let options = parse("--bare --only a --only b --rounds 3 --seed 9").unwrap();
        assert!(options.bare && options.rounds == 3 && options.seed == 9);
        assert!(options.wants("a") && options.wants("b.killed") && !options.wants("bc"));
        assert_eq!(parse("").unwrap().seed, 7);
    }

    #[test]
    fn unknown_flags_and_missing_values_are_errors() {
        assert!(parse("--onyl x").is_err());
        assert!(parse("--rounds").is_err());
        assert!(parse("--rounds many").is_err());
    }
}
