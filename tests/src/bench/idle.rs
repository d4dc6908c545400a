//! What holo takes of a CPU while the program that it holds sleeps.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};

use super::helper::{Bench, own_processes, thread_name, threads};
use super::table::{Cell, Table};

const PROGRAM_MIB: u64 = 32;
/// Until what began with the attach has ended: eviction, more and more seldom looks.
const SETTLE: Duration = Duration::from_secs(3);

/// CPU time of each thread of holo's processes, nanoseconds, by process and thread name.
fn spent(mark: &str) -> BTreeMap<String, u64> {
    let mut all = BTreeMap::new();
    for proc in own_processes(mark) {
        let pid = proc.id.pid;
        for tid in threads(pid) {
            let path = format!("/proc/{pid}/task/{tid}/schedstat");
            let text = std::fs::read_to_string(path).unwrap_or_default();
            let ns: u64 = text
                .split(' ')
                .next()
                .and_then(|w| w.parse().ok())
                .unwrap_or(0);
            let name = format!("{}/{}", proc.comm, thread_name(pid, tid));
            *all.entry(name).or_insert(0) += ns;
        }
    }
    all
}

/// Measures idle processes.
///
/// # Errors
/// A program fails, or holo refuses it.
pub fn run(bench: &Bench) -> Result<Vec<Table>> {
    let seconds = if bench.quick { 3 } else { 20 };
    let about = format!(
        "CPU time of all of holo's processes while a program of 8 threads and {PROGRAM_MIB} MiB sleeps, percent of one \
         CPU, over {seconds} s; all cases at the same time. control: the thread that looks at the program; \
         serving: the one that answers faults."
    );
    let columns = [
        "case",
        "percent",
        "control_percent",
        "serving_percent",
        "rest_percent",
    ];
    let mut table = Table::new("idle", about, &columns);
    let size = ["8", "32"].map(OsString::from);
    let program = bench.program("threads")?;
    let mut cases = Vec::new();
    for (case, budget_mib) in [("attached, fits", 1024), ("attached, half of it paged", 16)] {
        let mut helper = bench.start(&program, &size)?;
        helper.expect("ready")?;
        helper.ask("sleep", "asleep")?;
        let mark = bench.attach(helper.pid()?, budget_mib, &bench.file("idle.json"))?;
        cases.push((case, mark, helper));
    }
    let mut command = vec![program.into_os_string()];
    command.extend(size);
    let mut helper = bench.start_held(1024, None, &command)?;
    helper.expect("ready")?;
    helper.ask("sleep", "asleep")?;
    cases.push(("holo-exec, fits", helper.mark.clone(), helper));
    thread::sleep(SETTLE);
    let from = Instant::now();
    let before: Vec<_> = cases.iter().map(|(_, mark, _)| spent(mark)).collect();
    thread::sleep(Duration::from_secs(seconds));
    for ((case, mark, _), before) in cases.iter().zip(before) {
        let after = spent(mark);
        let window = from.elapsed().as_secs_f64();
        ensure!(!after.is_empty(), "{case}: holo has gone");
        let percent = |wanted: &dyn Fn(&str) -> bool| {
            let parts = after.iter().filter(|(name, _)| wanted(name));
            let ns: u64 = parts
                .map(|(name, ns)| ns.saturating_sub(before.get(name).copied().unwrap_or(0)))
                .sum();
            ns as f64 / 1e7 / window
        };
        let (all, control, serving) = (
            percent(&|_| true),
            percent(&|name| name == "holo-pager/holo-pager"),
            percent(&|name| name.ends_with("/holo-serve")),
        );
        table.row(vec![
            Cell::Word((*case).to_owned()),
            Cell::Number(all, 3),
            Cell::Number(control, 3),
            Cell::Number(serving, 3),
            Cell::Number((all - control - serving).max(0.0), 3),
        ]);
    }
    Ok(vec![table])
}
