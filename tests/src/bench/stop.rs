//! How long `holo attach` stops a program.

use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result};

use super::figures::Sample;
use super::helper::{Bench, report};
use super::machine;
use super::table::{Cell, Table};

/// More than the program has: it is taken, nothing leaves.
const LARGE_MIB: u64 = 1024;
/// Less than it has: a ring is made in it as well, and part of its memory leaves.
const SMALL_MIB: u64 = 8;
const PROGRAM_MIB: u64 = 32;

/// Keeps all CPUs busy while it lives.
struct Load(Vec<Child>);

impl Load {
    /// Two that compute for each CPU.
    fn start() -> Result<Self> {
        let mut load = Self(Vec::new());
        for _ in 0..2 * machine::processors() {
            let child = Command::new("/bin/sh")
                .args(["-c", "while :; do :; done"])
                .stdin(Stdio::null())
                .spawn()
                .context("starting a shell")?;
            load.0.push(child);
        }
        Ok(load)
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        for child in &mut self.0 {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// Measures the stop.
///
/// # Errors
/// A program fails, or holo refuses it.
pub fn run(bench: &Bench) -> Result<Vec<Table>> {
    let about = "How long `holo attach` keeps a computing program from running (attach_stop_us_max of one attach \
                 each). Floor: one thread is stopped with ptrace and let go, nothing done. Gap: the longest time, \
                 during the attach, that the program's first thread was kept from looking at the clock, whatever \
                 the reason. Under load: two more computing processes for each CPU. With a ring: the budget is \
                 below what the program has, so that the ring is made as well.";
    let columns = [
        "case",
        "ratio",
        "p50_us",
        "p90_us",
        "p99_us",
        "max_us",
        "floor_p50_us",
        "floor_p99_us",
        "gap_p50_us",
        "attach_ms",
        "attaches",
    ];
    let mut table = Table::new("attach_stop", about, &columns);
    for loaded in [false, true] {
        let load = if loaded { Some(Load::start()?) } else { None };
        let beside = if loaded { "under load" } else { "a CPU free" };
        for threads in [1, 8, 64] {
            let case = format!("{threads} threads, {beside}");
            table.row(one(bench, case, threads, LARGE_MIB, bench.times(50, 3))?);
        }
        let case = format!("8 threads, {beside}, with a ring");
        table.row(one(bench, case, 8, SMALL_MIB, bench.times(20, 2))?);
        drop(load);
    }
    Ok(vec![table])
}

fn one(
    bench: &Bench,
    case: String,
    threads: u32,
    budget_mib: u64,
    times: usize,
) -> Result<Vec<Cell>> {
    let size = [threads.to_string(), PROGRAM_MIB.to_string()];
    let mut program = bench.start(&bench.program("threads")?, &size)?;
    program.expect("ready")?;
    let pid = program.pid()?;
    let stop = bench.program("stop")?;
    let file = bench.file("stop.json");
    let mut found = [const { Vec::new() }; 4];
    for _ in 0..times {
        let text = bench.output(&stop, &[pid.to_string()])?;
        let floor = text.strip_prefix("stop ").context("stop says nothing")?;
        program.ask("gap", "gap")?;
        let before = std::time::Instant::now();
        let mark = bench.attach(pid, budget_mib, &file)?;
        let took = before.elapsed();
        if budget_mib < PROGRAM_MIB {
            // The ring is made when the first pages are to leave.
            while bench.status(pid)?.pages_evicted == 0 {
                thread::sleep(Duration::from_millis(5));
            }
        }
        let gap: f64 = program.ask("gap", "gap")?.parse()?;
        bench.detach(pid, &mark)?;
        let stopped = report(&file)?.attach_stop_us_max as f64;
        let figures = [
            stopped,
            floor.trim().parse()?,
            gap,
            took.as_secs_f64() * 1000.0,
        ];
        for (all, value) in found.iter_mut().zip(figures) {
            all.push(value);
        }
    }
    program.finish()?;
    let [stops, floors, gaps, took] = found.map(Sample::new);
    let ratio = stops.median().zip(floors.median()).map(|(a, b)| a / b);
    Ok(vec![
        Cell::Word(case),
        Cell::maybe(ratio, 1),
        Cell::maybe(stops.quantile(500), 0),
        Cell::maybe(stops.quantile(900), 0),
        Cell::maybe(stops.quantile(990), 0),
        Cell::maybe(stops.quantile(1000), 0),
        Cell::maybe(floors.quantile(500), 0),
        Cell::maybe(floors.quantile(990), 0),
        Cell::maybe(gaps.median(), 0),
        Cell::maybe(took.median(), 0),
        Cell::Number(times as f64, 0),
    ])
}
