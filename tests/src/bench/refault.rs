//! What a touch of an evicted page costs, against a handler that does nothing but answer.
//!
//! Both peers are asked in turn, for the same number of touches in the same order. *Same placement*: each
//! has a program that touches, with one thread, and a handler in another process with one thread for it,
//! asleep in `poll` between faults, of ordinary priority and with its memory locked. In `free` neither is
//! bound; in `apart` the program is bound to the first CPU and the handler's thread to the second; in
//! `together` both to the first.

use std::ffi::OsString;
use std::path::Path;

use anyhow::{Context as _, Result, ensure};

use super::figures::Sample;
use super::helper::{Bench, Helper, micros, own_thread};
use super::table::{Cell, Table};
use super::trace::{self, Call, Recording};
use super::{calls, machine};
use crate::sys;

/// How much is done in one comparison.
#[derive(Clone, Copy)]
struct Scale {
    /// What holo may keep in memory. Room for all touches between two gifts back, so that none evicts.
    budget_mib: u64,
    /// Older memory than so much more is evicted.
    ballast_mib: u64,
    /// Touches in one go.
    touches: usize,
    /// Pages that are touched under pressure, the first half unmeasured, until the budget is full.
    pressed: usize,
}

impl Scale {
    fn of(bench: &Bench) -> Self {
        if bench.quick {
            Self {
                budget_mib: 16,
                ballast_mib: 32,
                touches: 60,
                pressed: 800,
            }
        } else {
            Self {
                budget_mib: 64,
                ballast_mib: 128,
                touches: 500,
                pressed: 3000,
            }
        }
    }
}

/// Long enough for a handler to fall asleep, and its CPU.
const PAUSE_US: u64 = 200;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Placement {
    Free,
    Apart,
    Together,
}

impl Placement {
    const ALL: [Self; 3] = [Self::Free, Self::Apart, Self::Together];

    fn name(self) -> &'static str {
        match self {
            Self::Free => "free",
            Self::Apart => "apart",
            Self::Together => "together",
        }
    }

    /// The CPUs of the program and of the handler; none: all.
    fn cpus(self) -> (Option<usize>, Option<usize>) {
        match self {
            Self::Free => (None, None),
            Self::Apart => (Some(0), Some(1)),
            Self::Together => (Some(0), Some(0)),
        }
    }
}

/// One side of the comparison.
struct Peer {
    program: Helper,
    handler: i32,
}

impl Peer {
    fn place(&mut self, placement: Placement) -> Result<()> {
        let (program, handler) = placement.cpus();
        let number = program.map_or_else(|| "-1".to_owned(), |cpu| cpu.to_string());
        self.program.ask(&format!("pin {number}"), "pinned")?;
        let all: Vec<usize> = (0..machine::processors()).collect();
        let cpus = handler.map_or(all, |cpu| vec![cpu]);
        sys::set_cpus(self.handler, &cpus).context("placing the handler's thread")
    }

    fn touch(&mut self, count: usize, pause_us: u64, drop: bool, file: &Path) -> Result<Vec<f64>> {
        let give_back = u8::from(drop);
        let line = format!("touch {count} {pause_us} {give_back} {}", file.display());
        self.program.ask(&line, "touched")?;
        micros(file)
    }
}

fn floor(bench: &Bench, size: &str, content: &str, pages: usize) -> Result<Peer> {
    let pages = pages.to_string();
    let program = bench.start(&bench.program("touch")?, &["floor", size, content, &pages])?;
    let handler = program.expect("ready")?.parse()?;
    Ok(Peer { program, handler })
}

/// How often other memory goes through the budget until the pages have left. On a busy machine eviction is still at
/// work when that memory is unmapped again, and then has no more reason to go on.
const BALLASTS: usize = 8;

/// A program under `holo-exec` of whose pages nine of ten have left memory, or more.
fn held(bench: &Bench, size: &str, content: &str, pages: usize) -> Result<Peer> {
    let scale = Scale::of(bench);
    let mut command: Vec<OsString> = vec![bench.program("touch")?.into()];
    command.extend(["plain", size, content, &pages.to_string()].map(OsString::from));
    let mut program = bench.start_held(scale.budget_mib, None, &command)?;
    program.expect("ready")?;
    // What was there before holo took the process leaves last: so it fills the pages when it is taken.
    program.ask(&format!("ballast {}", scale.ballast_mib), "dropped")?;
    program.ask("fill", "filled")?;
    let mut left: Vec<usize> = Vec::new();
    while left.last().is_none_or(|n| n * 10 >= pages) {
        ensure!(
            left.len() < BALLASTS,
            "of {pages} pages these did not leave memory, after each try: {left:?}; there is nothing to measure"
        );
        program.ask(&format!("ballast {}", scale.ballast_mib), "dropped")?;
        left.push(program.ask("resident", "resident")?.parse()?);
    }
    let (_, handler) = own_thread(&program.mark, "holo-serve")?;
    Ok(Peer { program, handler })
}

/// What is gathered over the rounds of one comparison.
#[derive(Default)]
struct Gathered {
    floor: Vec<f64>,
    holo: Vec<f64>,
    ratios: Vec<f64>,
}

impl Gathered {
    fn add(&mut self, floor: Vec<f64>, holo: Vec<f64>) -> Result<()> {
        let median = |v: &[f64]| Sample::new(v.to_vec()).median();
        let (below, above) = (median(&floor), median(&holo));
        let (below, above) = below.zip(above).context("no touch waited for a page")?;
        self.ratios.push(above / below);
        self.floor.extend(floor);
        self.holo.extend(holo);
        Ok(())
    }

    fn row(self, case: String) -> Vec<Cell> {
        let ratios = Sample::new(self.ratios);
        let (floor, holo) = (Sample::new(self.floor), Sample::new(self.holo));
        let quantile = |s: &Sample, q| Cell::maybe(s.quantile(q), 1);
        vec![
            Cell::Word(case),
            Cell::maybe(ratios.median(), 2),
            Cell::maybe_range(ratios.range(), 2),
            quantile(&holo, 500),
            quantile(&holo, 900),
            quantile(&holo, 990),
            quantile(&holo, 999),
            quantile(&floor, 500),
            quantile(&floor, 900),
            quantile(&floor, 990),
            quantile(&floor, 999),
            Cell::Number(holo.len() as f64, 0),
        ]
    }
}

const COLUMNS: [&str; 12] = [
    "case",
    "ratio",
    "ratio_spread",
    "p50_us",
    "p90_us",
    "p99_us",
    "p999_us",
    "floor_p50_us",
    "floor_p90_us",
    "floor_p99_us",
    "floor_p999_us",
    "touches",
];

/// Measures refaults.
///
/// # Errors
/// A program fails, or its pages don't leave memory.
pub fn run(bench: &Bench) -> Result<Vec<Table>> {
    let about = "One touch of an evicted page, from the program's side: holo against a minimal handler \
                 (UFFDIO_COPY from a hot buffer). Ratio: of the medians, the median of all rounds. Pause: the \
                 program computes 200 us between touches, so that the handler falls asleep.";
    let mut table = Table::new("refault", about, &COLUMNS);
    let about = "The same under pressure: random touches of three times the budget, so that every page which \
                 comes has to drive out another one. The floor evicts nothing.";
    let mut pressed = Table::new("refault_under_pressure", about, &COLUMNS);
    let about = "Where a refault's time goes (placed apart), microseconds for each page that came back, mean. From a \
                 trace of the handler's thread from outside, which adds about 1 us a system call. own: between \
                 calls (store: LZ4, BLAKE3; core). waiting: what is left of the program's own wait (its fault's \
                 entry and return, both wake-ups).";
    let mut parts = Table::new("refault_parts", about, &PART_COLUMNS);
    let refusal = trace::refusal(&bench.file("perf.probe"));
    for (size, content) in [
        ("4", "random"),
        ("4", "text"),
        ("64", "random"),
        ("64", "text"),
    ] {
        let case = format!("{size} KiB {content}");
        compare(bench, size, content, &mut table).with_context(|| case.clone())?;
        if size == "64" {
            press(bench, content, &mut pressed).with_context(|| case.clone())?;
        }
        if refusal.is_none() {
            divide(bench, size, content, &mut parts).with_context(|| case.clone())?;
        }
    }
    if let Some(why) = refusal {
        parts.about = format!("Not measured: {why}.");
        parts.row(unmeasured(&why));
    }
    Ok(vec![table, pressed, parts])
}

fn compare(bench: &Bench, size: &str, content: &str, table: &mut Table) -> Result<()> {
    let placements: &[Placement] = if machine::processors() < 2 {
        &Placement::ALL[..1]
    } else {
        &Placement::ALL
    };
    let pauses = [0, PAUSE_US];
    let touches = Scale::of(bench).touches;
    let pages = touches * placements.len() * pauses.len();
    let cases: Vec<(Placement, u64)> = placements
        .iter()
        .flat_map(|&p| pauses.map(|pause| (p, pause)))
        .collect();
    let mut gathered: Vec<Gathered> = cases.iter().map(|_| Gathered::default()).collect();
    for round in 0..bench.times(3, 1) {
        let mut peers = [
            floor(bench, size, content, pages)?,
            held(bench, size, content, pages)?,
        ];
        for (n, (&(placement, pause), all)) in cases.iter().zip(&mut gathered).enumerate() {
            let mut found = [Vec::new(), Vec::new()];
            // Neither is always the first.
            let first = (round + n) % 2;
            for side in [first, 1 - first] {
                let peer = &mut peers[side];
                peer.place(placement)?;
                found[side] = peer.touch(touches, pause, true, &bench.file("touches"))?;
            }
            let [below, above] = found;
            all.add(below, above)?;
        }
        for peer in peers {
            peer.program.finish()?;
        }
    }
    for ((placement, pause), all) in cases.into_iter().zip(gathered) {
        let manner = if pause == 0 { "" } else { ", pause" };
        let name = placement.name();
        table.row(all.row(format!("{size} KiB {content}, {name}{manner}")));
    }
    Ok(())
}

fn press(bench: &Bench, content: &str, table: &mut Table) -> Result<()> {
    let mut all = Gathered::default();
    let pressed = Scale::of(bench).pressed;
    for _ in 0..bench.times(3, 1) {
        let mut peers = [
            floor(bench, "64", content, pressed)?,
            held(bench, "64", content, pressed)?,
        ];
        let mut found = [Vec::new(), Vec::new()];
        for (peer, found) in peers.iter_mut().zip(&mut found) {
            let file = bench.file("touches");
            peer.touch(pressed / 2, 0, false, &file)?;
            *found = peer.touch(pressed / 2, 0, false, &file)?;
        }
        let [below, above] = found;
        all.add(below, above)?;
        for peer in peers {
            peer.program.finish()?;
        }
    }
    table.row(all.row(format!("64 KiB {content}")));
    Ok(())
}

const PART_COLUMNS: [&str; 10] = [
    "case",
    "whole_us",
    "waiting_us",
    "read_us",
    "own_us",
    "copy_us",
    "wake_us",
    "polls_us",
    "other_us",
    "calls",
];

fn unmeasured(why: &str) -> Vec<Cell> {
    let mut row = vec![Cell::Word(why.to_owned())];
    row.resize(PART_COLUMNS.len(), Cell::None);
    row
}

fn divide(bench: &Bench, size: &str, content: &str, table: &mut Table) -> Result<()> {
    let touches = Scale::of(bench).touches;
    let peers = [
        (
            "floor",
            "floor-handler",
            floor(bench, size, content, touches)?,
        ),
        ("holo", "holo-serve", held(bench, size, content, touches)?),
    ];
    for (name, thread, mut peer) in peers {
        let process = match name {
            "holo" => own_thread(&peer.program.mark, thread)?.0,
            _ => peer.handler,
        };
        peer.place(Placement::Apart)?;
        let recording = Recording::of(process, bench.file("refault.perf"))?;
        let touched = peer.touch(touches, 0, true, &bench.file("touches"))?;
        let calls = recording.end(thread)?;
        peer.program.finish()?;
        let whole = touched.iter().sum::<f64>() / touched.len() as f64;
        let case = format!("{size} KiB {content}, {name}");
        table.row(part_row(case, whole, &calls).with_context(|| format!("tracing {name}"))?);
    }
    Ok(())
}

/// Adds up what the thread did from each reading of a fault to the end of its answer.
fn part_row(case: String, whole_us: f64, all: &[Call]) -> Result<Vec<Cell>> {
    // In the order of the columns; the second is the thread's own work, between calls.
    let part = |c: &Call| match (c.number, c.second) {
        (libc::SYS_read, _) => 0,
        (libc::SYS_ioctl, calls::COPY) => 2,
        (libc::SYS_ioctl, calls::WAKE) => 3,
        (number, _) if calls::is_poll(number) => 4,
        _ => 5,
    };
    let is_fault = |c: &Call| {
        c.number == libc::SYS_read && c.result > 0 && c.result % calls::MESSAGE_BYTES == 0
    };
    let mut sums = [0_u64; 6];
    let (mut answers, mut count) = (0_u64, 0_usize);
    let faults: Vec<usize> = (0..all.len()).filter(|&i| is_fault(&all[i])).collect();
    for (n, &from) in faults.iter().enumerate() {
        let to = faults.get(n + 1).copied().unwrap_or(all.len());
        let turn = &all[from..to];
        let is_answer = |c: &Call| matches!(part(c), 2 | 3);
        let Some(last) = turn.iter().rposition(is_answer) else {
            continue;
        };
        let turn = &turn[..=last];
        answers += turn.iter().filter(|c| part(c) == 2).count() as u64;
        count += turn.len();
        for call in turn {
            sums[part(call)] += call.took_ns();
        }
        for two in turn.windows(2) {
            sums[1] += two[1].begin_ns.saturating_sub(two[0].end_ns);
        }
    }
    ensure!(answers > 0, "no UFFDIO_COPY was seen");
    let mean = |ns: u64| ns as f64 / 1000.0 / answers as f64;
    let spent: f64 = sums.iter().map(|&ns| mean(ns)).sum();
    let mut row = vec![
        Cell::Word(case),
        Cell::Number(whole_us, 1),
        Cell::Number((whole_us - spent).max(0.0), 1),
    ];
    row.extend(sums.map(|ns| Cell::Number(mean(ns), 1)));
    row.push(Cell::Number(count as f64 / answers as f64, 1));
    Ok(row)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_counted_from_the_fault_to_its_answer_only() {
        let mut at = 0;
        let mut call = |number, second, took: u64, result| {
            at += took + 1000;
            Call {
                number,
                second,
                begin_ns: at - took,
                end_ns: at,
                result,
            }
        };
        let all = [
            call(libc::SYS_read, 0, 9000, 8),
            call(libc::SYS_read, 0, 2000, 32),
            call(libc::SYS_ppoll, 0, 1000, 0),
            call(libc::SYS_ioctl, calls::COPY, 7000, 0),
            call(libc::SYS_ioctl, calls::WAKE, 3000, 0),
            call(libc::SYS_ppoll, 0, 50_000, 1),
        ];
        let row = part_row("x".to_owned(), 30.0, &all).unwrap();
        let figures: Vec<f64> = row
            .iter()
            .filter_map(|c| match c {
                Cell::Number(v, _) => Some(*v),
                Cell::Range(..) | Cell::Word(_) | Cell::None => None,
            })
            .collect();
        assert_eq!(figures, [30.0, 14.0, 2.0, 3.0, 7.0, 3.0, 1.0, 0.0, 4.0]);
    }
}
