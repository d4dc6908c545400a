//! How fast memory leaves, and what that consists of.
//!
//! A program that sleeps is attached with a budget far below what it has: nothing but eviction happens.

use std::ffi::OsString;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};

use super::calls;
use super::figures::Sample;
use super::helper::{self, Bench, Helper};
use super::table::{Cell, Table};
use super::trace::{self, Call, Recording};
use crate::watchdog::hung;

const BUDGET_MIB: u64 = 16;
/// How often the memory of the program is looked at.
const LOOK_EVERY: Duration = Duration::from_millis(5);
const DEADLINE: Duration = Duration::from_secs(60);
const PAGE_BYTES: f64 = 65536.0;
const SUBPAGE_BYTES: i64 = 4096;
const MIB: f64 = 1_048_576.0;

const PARTS: [&str; 6] = ["protect", "read", "free", "unprotect", "pageout", "look"];

/// The floor: nanoseconds a page of each part.
fn floor(bench: &Bench, mib: u64) -> Result<[f64; 6]> {
    let text = bench.output(&bench.program("evict")?, &[mib.to_string()])?;
    let value = |name: &str| -> Result<f64> {
        let line = text.lines().find_map(|l| l.strip_prefix(name));
        let value = line.with_context(|| format!("evict says nothing of {name}: {text}"))?;
        Ok(value.trim().parse()?)
    };
    ensure!(
        value("gone")? > 0.99,
        "the kernel did not drop the pages: {text}"
    );
    let mut parts = [0.0; 6];
    for (part, name) in parts.iter_mut().zip(PARTS) {
        *part = value(name)?;
    }
    Ok(parts)
}

fn full(bench: &Bench, content: &str, mib: u64) -> Result<Helper> {
    let pages = (mib * 16).to_string();
    let mut program = bench.start(&bench.program("touch")?, &["plain", "64", content, &pages])?;
    program.expect("ready")?;
    program.ask("fill", "filled")?;
    Ok(program)
}

fn resident_bytes(pid: i32) -> Result<f64> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/statm"))?;
    let pages = text
        .split(' ')
        .nth(1)
        .context("statm has no second field")?;
    Ok(pages.parse::<f64>()? * 4096.0)
}

/// Waits until no more memory leaves; bytes a second as the program's memory showed them, between its
/// first and its last tenth.
fn watch(pid: i32) -> Result<f64> {
    let start = Instant::now();
    let whole = resident_bytes(pid)?;
    let goal = BUDGET_MIB as f64 * MIB + 4.0 * MIB;
    let mut seen: Vec<(f64, f64)> = Vec::new();
    loop {
        let now = resident_bytes(pid)?;
        seen.push((start.elapsed().as_secs_f64(), now));
        if now < goal {
            break;
        }
        if start.elapsed() >= DEADLINE {
            return Err(hung(&format!("{now} bytes are still in memory")));
        }
        thread::sleep(LOOK_EVERY);
    }
    let out = whole - goal;
    let at = |share: f64| seen.iter().find(|(_, left)| *left <= whole - share * out);
    let (from, to) = at(0.1).zip(at(0.9)).context("memory left at once")?;
    Ok((from.1 - to.1) / (to.0 - from.0))
}

/// Measures eviction.
///
/// # Errors
/// A program fails, or holo does not evict.
pub fn run(bench: &Bench) -> Result<Vec<Table>> {
    let mib = if bench.quick { 64 } else { 384 };
    let about = "A sleeping program's memory leaves for holo's store. Reported: holo's own figure \
                 (evict_bytes_per_s); seen: how fast the program's memory shrank. Floor: the kernel's part alone, \
                 nothing stored. Ratio: seen to floor, median of all rounds.";
    let columns = [
        "contents",
        "ratio",
        "ratio_spread",
        "seen_mib_per_s",
        "reported_mib_per_s",
        "floor_mib_per_s",
        "stored_share",
    ];
    let mut rates = Table::new("eviction", about, &columns);
    let mut floors = Vec::new();
    for content in ["random", "text"] {
        let mut gathered = [const { Vec::new() }; 5];
        for _ in 0..bench.times(3, 1) {
            let parts = floor(bench, mib)?;
            let least = PAGE_BYTES / (parts.iter().sum::<f64>() / 1e9);
            floors.push(parts);
            let program = full(bench, content, mib)?;
            let pid = program.pid()?;
            let file = bench.file("evict.json");
            let mark = bench.attach(pid, BUDGET_MIB, &file)?;
            let seen = watch(pid)?;
            // The last batch may still be counted.
            thread::sleep(Duration::from_millis(100));
            let status = bench.status(pid)?;
            drop(program);
            helper::await_end(&mark)?;
            let stored = status.store_bytes_stored as f64 / status.store_bytes_raw.max(1) as f64;
            let figures = [
                seen / least,
                seen / MIB,
                status.evict_bytes_per_s as f64 / MIB,
            ];
            for (all, value) in gathered
                .iter_mut()
                .zip(figures.into_iter().chain([least / MIB, stored]))
            {
                all.push(value);
            }
        }
        let [ratios, seen, reported, least, stored] = gathered.map(Sample::new);
        rates.row(vec![
            Cell::Word(content.to_owned()),
            Cell::maybe(ratios.median(), 2),
            Cell::maybe_range(ratios.range(), 2),
            Cell::maybe(seen.median(), 0),
            Cell::maybe(reported.median(), 0),
            Cell::maybe(least.median(), 0),
            Cell::maybe(stored.median(), 2),
        ]);
    }
    Ok(vec![rates, parts(bench, mib, &floors)?])
}

fn parts(bench: &Bench, mib: u64, floors: &[[f64; 6]]) -> Result<Table> {
    let columns = ["part", "floor_us", "random_us", "text_us"];
    let mut table = Table::new("eviction_parts", "", &columns);
    let median = |i: usize| Sample::new(floors.iter().map(|f| f[i] / 1000.0).collect()).median();
    let mut traced = Vec::new();
    if let Some(why) = trace::refusal(&bench.file("perf.probe")) {
        table.about = format!("Microseconds for each 64 KiB page. holo's: not measured, {why}.");
    } else {
        table.about = "Microseconds of the serving thread for each 64 KiB page that left, from a trace of its \
                       system calls (which adds about 1 us a call). free: from the last read to the first \
                       un-protect, with the ring's wake-up and the wait for it; store: own work between un-protect \
                       and pageout (LZ4, BLAKE3, copy); threads: looking for robust lists; core: own work else; \
                       polls: are there faults?, and sleep."
            .to_owned();
        for content in ["random", "text"] {
            traced.push(trace_one(bench, content, mib)?);
        }
    }
    for (i, name) in NAMES.iter().enumerate() {
        let least = PARTS.iter().position(|p| p == name).and_then(median);
        let mut row = vec![Cell::Word((*name).to_owned()), Cell::maybe(least, 1)];
        for column in 0..2 {
            row.push(Cell::maybe(
                traced.get(column).map(|t: &[f64; TRACED]| t[i]),
                1,
            ));
        }
        table.row(row);
    }
    let least: f64 = (0..PARTS.len()).filter_map(median).sum();
    let mut row = vec![Cell::Word("sum".to_owned()), Cell::Number(least, 1)];
    for column in 0..2 {
        row.push(Cell::maybe(traced.get(column).map(|t| t.iter().sum()), 1));
    }
    table.row(row);
    Ok(table)
}

fn trace_one(bench: &Bench, content: &str, mib: u64) -> Result<[f64; TRACED]> {
    let program = full(bench, content, mib)?;
    let pid = program.pid()?;
    let mut command: Vec<OsString> = vec![bench.binaries.holo.clone().into()];
    command.extend(["attach".into(), pid.to_string().into()]);
    command.extend(["--local-memory".into(), format!("{BUDGET_MIB}M").into()]);
    let recording = Recording::run(&command, bench.file("evict.perf"))?;
    watch(pid)?;
    let evicted = bench.status(pid)?.pages_evicted;
    let all = recording.end("holo-serve")?;
    program.finish()?;
    ensure!(evicted > 0, "nothing was evicted");
    divide(&all, evicted as f64)
}

/// The parts of holo's time, in the order of [`divide`].
const NAMES: [&str; TRACED] = [
    "protect",
    "read",
    "free",
    "unprotect",
    "store",
    "pageout",
    "look",
    "threads",
    "core",
    "polls",
    "other",
];
const TRACED: usize = 11;

/// Sums the time of each part, by what comes in which order: a batch protects all its pages, reads them,
/// has them freed, un-protects them, stores them, and lets go of all in one `process_madvise`.
fn divide(all: &[Call], pages: f64) -> Result<[f64; TRACED]> {
    let mut sums = [0_u64; TRACED];
    // Within one batch: has it been read, and un-protected?
    let (mut read, mut open) = (false, false);
    let mut batches = 0_u32;
    let is_madvise = |c: &Call| c.number == libc::SYS_process_madvise;
    let first = all.iter().position(is_madvise);
    let last = all.iter().rposition(is_madvise);
    let (first, last) = first.zip(last).context("no PAGEOUT was seen")?;
    let mut previous: Option<&Call> = None;
    for call in &all[first..=last] {
        if let Some(before) = previous {
            let own = if open { 4 } else { 8 };
            sums[own] += call.begin_ns.saturating_sub(before.end_ns);
        }
        let part = match (call.number, call.second) {
            (libc::SYS_ioctl, calls::WRITE_PROTECT) if read => {
                open = true;
                3
            }
            (libc::SYS_ioctl, calls::WRITE_PROTECT) => 0,
            (libc::SYS_ioctl, calls::PAGEMAP_SCAN) => 6,
            // A page's bytes, or what pagemap says of a page.
            (libc::SYS_pread64 | libc::SYS_preadv, _) if call.result >= SUBPAGE_BYTES => {
                read = true;
                1
            }
            (libc::SYS_pread64 | libc::SYS_preadv, _) => 6,
            (libc::SYS_lseek | libc::SYS_getdents64 | libc::SYS_get_robust_list, _) => 7,
            _ if read && !open => 2,
            (libc::SYS_process_madvise, _) => {
                batches += 1;
                (read, open) = (false, false);
                5
            }
            (number, _) if calls::is_poll(number) => 9,
            _ => 10,
        };
        // The first only says where a batch ends.
        if previous.is_some() {
            sums[part] += call.took_ns();
        }
        previous = Some(call);
    }
    ensure!(batches > 1, "only one batch was seen");
    // The pages of the first batch were not looked at.
    let pages = pages * f64::from(batches - 1) / f64::from(batches);
    Ok(sums.map(|ns| ns as f64 / 1000.0 / pages))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_follow_from_the_order_of_calls() {
        let mut at = 0;
        let mut call = |number, second, took: u64, gap: u64, result| {
            at += took + gap;
            Call {
                number,
                second,
                begin_ns: at - took,
                end_ns: at,
                result,
            }
        };
        let mut batch = || {
            [
                call(libc::SYS_pread64, 0, 2000, 1000, 128),
                call(libc::SYS_ioctl, calls::WRITE_PROTECT, 4000, 1000, 0),
                call(libc::SYS_pread64, 0, 9000, 1000, 65_536),
                call(libc::SYS_ppoll, 0, 7000, 1000, 0),
                call(libc::SYS_ioctl, calls::WRITE_PROTECT, 3000, 1000, 0),
                call(libc::SYS_process_madvise, 0, 11_000, 50_000, 65_536),
                call(libc::SYS_ppoll, 0, 1000, 0, 0),
            ]
        };
        let all: Vec<Call> = batch().into_iter().chain(batch()).collect();
        let parts = divide(&all, 2.0).unwrap();
        assert_eq!(
            parts,
            [4.0, 9.0, 7.0, 3.0, 50.0, 11.0, 2.0, 0.0, 5.0, 1.0, 0.0]
        );
    }
}
