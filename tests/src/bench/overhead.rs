//! What holo costs a program that fits in its budget: the same run bare and under `holo-exec`, in pairs.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context as _, Result, ensure};

use super::figures::Sample;
use super::helper::{Bench, held, report};
use super::table::{Cell, Table};
use crate::programs::scripts::PYTHON;

/// Far above the need of each.
const BUDGET_MIB: u64 = 4096;

/// Measures the overhead.
///
/// # Errors
/// A program fails, or was paged after all.
pub fn run(bench: &Bench) -> Result<Vec<Table>> {
    let about = "The same program bare and under holo-exec with a budget of 4 GiB, in pairs, the first of a pair by \
                 turns. Ratio: holo to bare of the time that the program itself measured, median of all pairs; \
                 interval: 95 %, of that median. Start: how much longer the whole command took (holo-exec's start \
                 and end), median. memory_fill does nothing but touch new memory: the worst case. bare_twice \
                 compares bare runs with bare runs: what the machine's noise alone does.";
    let columns = [
        "program",
        "ratio",
        "ratio_interval",
        "ratio_spread",
        "bare_ms",
        "holo_ms",
        "start_ms",
        "pairs",
    ];
    let mut table = Table::new("overhead", about, &columns);
    let work = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("bench/work.py");
    let python = |what: &str, scale: u32| -> Vec<OsString> {
        let flags = [PYTHON, "-B", "-S", "-E"].map(OsString::from);
        let mut command = Vec::from(flags);
        command.extend([work.clone().into(), what.into(), scale.to_string().into()]);
        command
    };
    let (fill, size) = (
        bench.program("fill")?,
        if bench.quick { "64" } else { "512" },
    );
    let scale = if bench.quick { 1 } else { 4 };
    let programs = [
        ("python_hash", python("hash", 16 * scale)),
        ("python_dict", python("dict", 50 * scale)),
        ("python_sort", python("sort", 75 * scale)),
        ("memory_fill", vec![fill.into(), size.into()]),
    ];
    for (name, command) in &programs {
        table.row(pairs(bench, name, command, true)?);
    }
    let (_, command) = &programs[0];
    table.row(pairs(bench, "bare_twice", command, false)?);
    Ok(vec![table])
}

/// What the program measured, and the whole command's time, both in milliseconds.
fn time(bench: &Bench, program: &Path, arguments: &[OsString]) -> Result<(f64, f64)> {
    let before = Instant::now();
    let text = bench.output(program, arguments)?;
    let whole = before.elapsed().as_secs_f64() * 1000.0;
    let took = text.lines().find_map(|l| l.strip_prefix("took "));
    let took: f64 = took.context("no time was measured")?.trim().parse()?;
    Ok((took / 1000.0, whole))
}

fn pairs(bench: &Bench, name: &str, command: &[OsString], holo: bool) -> Result<Vec<Cell>> {
    let count = bench.times(15, 2);
    let file = bench.file("overhead.json");
    let (program, arguments) = command.split_first().context("no command")?;
    let second = held(BUDGET_MIB, Some(&file), command);
    let mut found = [const { Vec::new() }; 4];
    for n in 0..count {
        let mut seen = [(0.0, 0.0); 2];
        let first = n % 2;
        for side in [first, 1 - first] {
            seen[side] = if side == 1 && holo {
                let seen = time(bench, &bench.binaries.exec, &second)?;
                let evicted = report(&file)?.pages_evicted;
                ensure!(evicted == 0, "{name} did not fit: {evicted} pages left");
                seen
            } else {
                time(bench, Path::new(program), arguments)?
            };
        }
        let [(bare, bare_whole), (held, held_whole)] = seen;
        let start = (held_whole - held) - (bare_whole - bare);
        for (all, value) in found.iter_mut().zip([held / bare, bare, held, start]) {
            all.push(value);
        }
    }
    let [ratios, bare, held, start] = found.map(Sample::new);
    Ok(vec![
        Cell::Word(name.to_owned()),
        Cell::maybe(ratios.median(), 4),
        Cell::maybe_range(ratios.median_interval(), 4),
        Cell::maybe_range(ratios.range(), 3),
        Cell::maybe(bare.median(), 1),
        Cell::maybe(held.median(), 1),
        // Without holo the difference is noise, and may be less than nothing.
        Cell::maybe(start.median().filter(|_| holo).map(|v| v.max(0.0)), 1),
        Cell::Number(count as f64, 0),
    ])
}
