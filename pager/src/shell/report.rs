//! The run report, from the control block: whoever is alive can write it.

use holo_proto::{FaultLatency, LeftAlone, PAGE_BYTES, Report, SUBPAGE_BYTES, Stayed};

use super::control::{Control, Scalar};
use crate::core::{Stats, StopReason};
use crate::sys::clock;

/// Builds the report of everything that the control block counted.
pub(crate) fn build(control: Control, exit_code: Option<i32>, own_cpu_ns: u64) -> Report {
    let s = control.stats();
    let micros = |q| s.latency.quantile_ns(q) as f64 / 1000.0;
    let evicted = s.subpages_evicted * SUBPAGE_BYTES;
    let seconds = |ns: u64| ns as f64 / 1e9;
    let started = control.get(Scalar::StartedNs);
    Report {
        schema: Report::SCHEMA,
        exit_code,
        wall_s: seconds(clock::monotonic_ns().saturating_sub(started)),
        local_memory_bytes: control.get(Scalar::Budget),
        // Of what was never taken the serving thread knows nothing; it sees what comes between two looks.
        resident_peak_bytes: s.usage_peak_bytes.max(control.get(Scalar::ResidentPeak)),
        resident_bytes: control.get(Scalar::Resident),
        faults_waiting: control.get(Scalar::Waiting),
        processes: control.get(Scalar::Processes).max(s.spaces),
        faults_remote: s.faults_remote,
        faults_zero: s.faults_zero,
        faults_wp: s.faults_wp,
        pages_evicted: s.pages_evicted,
        pages_stayed: Stayed {
            written: s.stayed_written,
            pinned: s.stayed_pinned,
            shared: s.stayed_shared,
            other: s.stayed_other,
        },
        pages_left_alone: LeftAlone {
            stack: control.get(Scalar::LeftStack),
            locked: control.get(Scalar::LeftLocked),
            pinned: s.pinned_peak_bytes.div_ceil(PAGE_BYTES),
            shared: control.get(Scalar::LeftShared),
            file: control.get(Scalar::LeftFile),
        },
        processes_left_alone: control.get(Scalar::LeftProcesses),
        bytes_evicted: evicted,
        bytes_refaulted: s.subpages_refaulted * SUBPAGE_BYTES,
        store_bytes_raw: control.get(Scalar::StoreRaw),
        store_bytes_stored: control.get(Scalar::StoreStored),
        integrity_failures: control.get(Scalar::IntegrityFailures),
        attach_stop_us_max: control.get(Scalar::StopMaxUs),
        takeovers: control.get(Scalar::Takeovers),
        fault_us: FaultLatency {
            p50: micros(0.5),
            p90: micros(0.9),
            p99: micros(0.99),
            p999: micros(0.999),
            max: s.latency.max_ns() as f64 / 1000.0,
            count: s.latency.count(),
        },
        evict_bytes_per_s: rate(&s, evicted),
        holo_cpu_s: seconds(
            [
                Scalar::CpuOfDead,
                Scalar::CpuOfPager,
                Scalar::CpuOfGuardian,
                Scalar::CpuOfWarden,
            ]
            .iter()
            .map(|&s| control.get(s))
            .sum::<u64>()
                + own_cpu_ns,
        ),
    }
}

fn rate(s: &Stats, evicted: u64) -> u64 {
    (u128::from(evicted) * 1_000_000_000)
        .checked_div(u128::from(s.evict_ns))
        .and_then(|r| u64::try_from(r).ok())
        .unwrap_or(0)
}

fn left_alone(r: &Report) -> String {
    match r.processes_left_alone {
        0 => String::new(),
        1 => "; 1 process was not limited".to_owned(),
        n => format!("; {n} processes were not limited"),
    }
}

/// The summary line of a run.
#[must_use]
pub fn summary(r: &Report) -> String {
    let mib = |b: u64| b as f64 / (1 << 20) as f64;
    let alone = left_alone(r);
    if r.pages_evicted == 0 && r.processes_left_alone > 0 {
        return format!("holo: nothing was paged{alone}");
    }
    if r.pages_evicted == 0 {
        return format!(
            "holo: fitted in {:.0} MiB; nothing was paged",
            mib(r.local_memory_bytes)
        );
    }
    format!(
        "holo: {:.0} MiB budget (peak {:.0}); {:.0} MiB out at {:.0} MiB/s, {:.0} MiB back in {} faults \
         (p50 {:.0} us, p99 {:.0} us); store {:.0} -> {:.0} MiB{}{alone}",
        mib(r.local_memory_bytes),
        mib(r.resident_peak_bytes),
        mib(r.bytes_evicted),
        mib(r.evict_bytes_per_s),
        mib(r.bytes_refaulted),
        r.faults_remote,
        r.fault_us.p50,
        r.fault_us.p99,
        mib(r.store_bytes_raw),
        mib(r.store_bytes_stored),
        match r.takeovers {
            0 => String::new(),
            1 => "; 1 take-over".to_owned(),
            n => format!("; {n} take-overs"),
        }
    )
}

/// What holo does for a process now, for people.
#[must_use]
pub fn progress(r: &Report) -> String {
    let mib = |b: u64| b as f64 / (1 << 20) as f64;
    let plural = |n: u64| if n == 1 { "" } else { "s" };
    format!(
        "{:.1} of {:.0} MiB resident; {} fault{} waiting; {} process{} paged; {:.0} MiB out, {:.0} MiB back in {} \
         faults (p50 {:.0} us, p99 {:.0} us), {} take-over{}, {:.0} s so far{}",
        mib(r.resident_bytes),
        mib(r.local_memory_bytes),
        r.faults_waiting,
        plural(r.faults_waiting),
        r.processes,
        if r.processes == 1 { "" } else { "es" },
        mib(r.bytes_evicted),
        mib(r.bytes_refaulted),
        r.faults_remote,
        r.fault_us.p50,
        r.fault_us.p99,
        r.takeovers,
        plural(r.takeovers),
        r.wall_s,
        left_alone(r),
    )
}

/// Why a process was stopped, for people.
pub(crate) fn explain(why: StopReason) -> String {
    match why {
        StopReason::Damaged { at } => format!(
            "the stored copy of page {} fails its checksum; the bytes are lost, so the process was \
             stopped rather than given wrong ones (suspect memory: run a memory test)",
            at.start()
        ),
        StopReason::Lost { at } => format!(
            "the stored copy of page {} is not to be found; the process was stopped rather than given \
             wrong bytes (suspect memory, or a bug in holo: please report it)",
            at.start()
        ),
        StopReason::Kernel { at, errno } => format!(
            "the kernel refused an operation on page {} with errno {errno}; the process was stopped \
             (this is a bug in holo: please report it)",
            at.start()
        ),
        StopReason::TooLarge => {
            "the process is larger than holo's tables allow; it was stopped".to_owned()
        }
        StopReason::NotDirtied { at } => format!(
            "page {} can be lost at any moment and could not be written back in its place, where the process \
             itself may not write; it was stopped rather than read zeros there later (does the kernel run \
             with proc_mem.force_override other than \"always\"?)",
            at.start()
        ),
        StopReason::Contradiction { at } => format!(
            "the kernel no longer serves page {} through holo although it was paged; the process was \
             stopped rather than read zeros there",
            at.start()
        ),
    }
}
