//! Huge pages: evicting a part of one lowers the resident count at once, but frees memory only if the
//! whole of it goes. What counts is the memory that is free.

use std::fs;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};

use super::cases::Program;
use super::harness::LOOK_EVERY;
use super::harness::launch::Running;
use super::harness::memcg::MemoryCgroup;
use super::harness::suite::{Run, print_line};

const PROGRAM: Program = Program {
    name: "thp",
    size_mib: 512,
    seconds: 5,
    bare_peak_mib: 513,
    works: Some("huge_kib"),
    limit: None,
    counted: &[],
    residence_told: None,
};

const MIB: u64 = 1 << 20;

/// How long the pager may take to come down to its budget, the program being idle.
const SETTLE_LOOKS_MAX: u32 = 1000;

/// Looks at free memory that are averaged: others use the machine too.
const FREE_LOOKS: u64 = 25;

/// Compares what a run costs the machine at its checkpoint, bare and under holo.
///
/// # Errors
/// The memory of evicted huge pages is not free, or data is wrong.
pub fn free_memory_rises(run: &Run<'_>, binaries: &Path) -> Result<()> {
    let bare = cost(run, binaries, true)?;
    print_line(&format!(
        "# bare_charged_mib={} bare_memfree_mib={}",
        bare.charged / MIB,
        bare.taken_free / MIB
    ));
    ensure!(
        bare.charged > PROGRAM.size_mib * MIB * 9 / 10,
        "a bare run costs only {} bytes",
        bare.charged
    );
    if run.binaries.is_none() {
        return Ok(());
    }
    let held = cost(run, binaries, false)?;
    print_line(&format!(
        "# holo_charged_mib={} holo_memfree_mib={}",
        held.charged / MIB,
        held.taken_free / MIB
    ));
    // A quarter is the budget; page tables, the program and the ring are in the rest.
    let allowed = PROGRAM.bare_peak_mib * MIB / 4 + 24 * MIB;
    ensure!(
        held.charged <= allowed,
        "{} bytes are charged at the checkpoint, allowed are {allowed}: huge pages stay whole",
        held.charged
    );
    // MemFree moves with everything else on the machine, so that only half of the effect is asked for.
    let want = (bare.charged - allowed) / 2;
    ensure!(
        bare.taken_free.saturating_sub(held.taken_free) >= want,
        "MemFree fell by {} bytes bare and by {} under holo: want {want} less",
        bare.taken_free,
        held.taken_free
    );
    Ok(())
}

struct Cost {
    charged: u64,
    taken_free: u64,
}

fn cost(run: &Run<'_>, binaries: &Path, bare: bool) -> Result<Cost> {
    // One of its own for each run: page cache that it leaves behind must not be charged to the next.
    let cgroup = MemoryCgroup::create(if bare { "huge-bare" } else { "huge" }, None)?;
    let mut plan = PROGRAM.plan(run, binaries)?;
    plan.talk = true;
    let enter = [
        "/bin/sh".into(),
        "-c".into(),
        "echo $$ > \"$0\" && exec \"$@\"".into(),
    ];
    plan.command.splice(
        0..0,
        enter
            .into_iter()
            .chain([cgroup.entrance().into_os_string()]),
    );
    let before = free_bytes()?;
    let mut running = if bare {
        plan.start(&run.without_holo())?
    } else {
        plan.start(run)?
    };
    running.wait_for("@filled")?;
    let charged = settled(
        &mut running,
        &cgroup,
        if bare {
            0
        } else {
            PROGRAM.bare_peak_mib * MIB / 4
        },
    )?;
    let taken_free = before.saturating_sub(free_bytes()?);
    running.say("go on")?;
    let end = running.finish()?;
    PROGRAM.judge(&end, run)?;
    Ok(Cost {
        charged,
        taken_free,
    })
}

/// Waits until the charge is near the budget, or does not fall any more in time.
fn settled(running: &mut Running, cgroup: &MemoryCgroup, budget_bytes: u64) -> Result<u64> {
    if budget_bytes > 0 {
        for _ in 0..SETTLE_LOOKS_MAX {
            if cgroup.charged_bytes()? <= budget_bytes + 16 * MIB {
                break;
            }
            ensure!(
                running.goes_on_for(LOOK_EVERY)?,
                "the program did not wait at its checkpoint"
            );
        }
    }
    ensure!(
        running.goes_on_for(Duration::from_millis(500))?,
        "the program did not wait at its checkpoint"
    );
    cgroup.charged_bytes()
}

/// Free memory, averaged over half a second.
fn free_bytes() -> Result<u64> {
    let mut sum = 0;
    for _ in 0..FREE_LOOKS {
        let text = fs::read_to_string("/proc/meminfo").context("reading /proc/meminfo")?;
        let kib: u64 = text
            .lines()
            .find_map(|line| {
                line.strip_prefix("MemFree:")?
                    .trim()
                    .strip_suffix(" kB")?
                    .parse()
                    .ok()
            })
            .context("no MemFree")?;
        sum += kib * 1024;
        std::thread::sleep(LOOK_EVERY);
    }
    Ok(sum / FREE_LOOKS)
}
