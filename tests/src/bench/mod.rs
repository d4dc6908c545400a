//! Benchmarks: what holo costs, each figure beside a floor or a peer that was measured in the same run.
//!
//! Not part of the tests: a figure is nothing to pass or fail, on a machine that does other things as well.
//! [`Options::smoke`] only asks whether every table comes about and holds nothing that cannot be.

pub mod calls;
pub mod evict;
pub mod figures;
pub mod helper;
pub mod idle;
pub mod machine;
pub mod overhead;
pub mod refault;
pub mod stop;
pub mod table;
pub mod trace;

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Context as _, Result, bail};
use serde_json::json;

use crate::torture::harness::suite::print_line;
use helper::Bench;
use machine::Machine;
use table::Table;

/// Version of the JSON.
const SCHEMA: u32 = 1;

/// A section: its name, and what measures it.
type Section = (&'static str, fn(&Bench) -> Result<Vec<Table>>);

const SECTIONS: [Section; 5] = [
    ("refault", refault::run),
    ("eviction", evict::run),
    ("attach_stop", stop::run),
    ("overhead", overhead::run),
    ("idle", idle::run),
];

/// How the flags are used.
pub const USAGE: &str = "\
usage: holo-bench [--only SECTION]... [--rounds N] [--quick] [--smoke] [--json] [--save FILE]
  --only    refault, eviction, attach_stop, overhead or idle; else all of them
  --rounds  N times as many rounds, pairs and attaches
  --quick   the least that fills every table
  --smoke   as --quick, and check that the figures can be: a case a section, as test suites print them
  --json    print JSON, not tables
  --save    write the JSON to FILE as well";

/// What was asked for.
#[derive(Clone, Debug, Default)]
pub struct Options {
    only: Vec<String>,
    rounds: usize,
    quick: bool,
    /// Check the tables rather than print them.
    smoke: bool,
    json: bool,
    save: Option<PathBuf>,
}

impl Options {
    /// Reads arguments.
    ///
    /// # Errors
    /// One is unknown or lacks its value.
    pub fn parse(arguments: impl IntoIterator<Item = String>) -> Result<Self> {
        let mut options = Self {
            rounds: 1,
            ..Self::default()
        };
        let mut arguments = arguments.into_iter();
        while let Some(flag) = arguments.next() {
            let mut value = || {
                arguments
                    .next()
                    .with_context(|| format!("{flag} wants a value"))
            };
            match flag.as_str() {
                "--only" => {
                    let name = value()?;
                    if !SECTIONS.iter().any(|(section, _)| *section == name) {
                        bail!("there is no section {name:?}\n{USAGE}");
                    }
                    options.only.push(name);
                }
                "--rounds" => {
                    options.rounds = value()?.parse().context("--rounds wants a number")?
                }
                "--quick" => options.quick = true,
                "--smoke" => (options.quick, options.smoke) = (true, true),
                "--json" => options.json = true,
                "--save" => options.save = Some(value()?.into()),
                _ => bail!("unknown argument {flag:?}\n{USAGE}"),
            }
        }
        if options.rounds == 0 {
            bail!("--rounds 0 measures nothing");
        }
        Ok(options)
    }

    fn wants(&self, section: &str) -> bool {
        self.only.is_empty() || self.only.iter().any(|name| name == section)
    }
}

/// Measures and prints.
///
/// # Errors
/// holo is missing, or a section fails (unless it is only a smoke test's case).
pub fn run(options: &Options) -> Result<ExitCode> {
    let bench = Bench::new(options.rounds, options.quick)?;
    let machine = Machine::this();
    let mut all = Vec::new();
    let (mut passed, mut failed) = (0, 0);
    let talks = !options.json && !options.smoke;
    if talks {
        print_line(&machine.text());
    }
    let (begin, load_before) = (Instant::now(), machine::load());
    for (name, section) in SECTIONS.iter().filter(|(name, _)| options.wants(name)) {
        let (started, load) = (Instant::now(), machine::load());
        let tables = section(&bench).with_context(|| (*name).to_owned());
        if options.smoke {
            match tables.and_then(|t| t.iter().try_for_each(Table::check)) {
                Ok(()) => {
                    passed += 1;
                    print_line(&format!("ok {name}"));
                }
                Err(error) => {
                    failed += 1;
                    let why = format!("{error:#}").replace('\n', " ");
                    print_line(&format!("not ok {name}: {why}"));
                }
            }
            continue;
        }
        let tables = tables?;
        if talks {
            for table in &tables {
                print_line(&format!("\n{}", table.text().trim_end()));
            }
            let seconds = started.elapsed().as_secs_f64();
            print_line(&format!("({seconds:.0} s, load {load:.2} at the start)"));
        }
        all.extend(tables.iter().map(|table| {
            let mut found = table.json();
            found["load"] = json!(load);
            found
        }));
    }
    if options.smoke {
        print_line(&format!("{passed} passed, {failed} failed"));
        return Ok(if failed == 0 {
            ExitCode::SUCCESS
        } else {
            ExitCode::FAILURE
        });
    }
    let found = json!({
        "schema": SCHEMA,
        "machine": machine.json(),
        "rounds": options.rounds,
        "quick": options.quick,
        "load_before": load_before,
        "load_after": machine::load(),
        "wall_s": begin.elapsed().as_secs_f64(),
        "tables": all,
    });
    let text = serde_json::to_string_pretty(&found)?;
    if let Some(file) = &options.save {
        std::fs::write(file, format!("{text}\n")).with_context(|| file.display().to_string())?;
    }
    if options.json {
        print_line(&text);
    }
    Ok(ExitCode::SUCCESS)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> Result<Options> {
        Options::parse(line.split_whitespace().map(str::to_owned))
    }

    #[test]
    fn flags_are_read_and_wrong_ones_refused() {
        let o = parse("--only idle --rounds 3 --json --save x").unwrap();
        assert!(o.wants("idle") && !o.wants("refault") && o.rounds == 3 && o.json);
        assert!(parse("").unwrap().wants("refault"));
        assert!(parse("--smoke").unwrap().quick);
        for bad in ["--only nothing", "--rounds 0", "--rounds", "--fast"] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }
}
