//! The run report: what `holo-exec --report` and `holo attach --report` write as JSON.
//!
//! The field names are a stable interface, described in `docs/report.md`. Fields are added, never
//! renamed; [`Report::SCHEMA`] grows when one is added.

use serde::{Deserialize, Serialize};

/// Pages (64 KiB) that were offered to the kernel and are still resident, by reason.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stayed {
    /// Written by the process between the offer and the drop.
    pub written: u64,
    /// Pinned for device or io_uring access.
    pub pinned: u64,
    /// Shared with a fork relative.
    pub shared: u64,
    /// On a per-CPU list, locked by the kernel, or not explained.
    pub other: u64,
}

/// Pages (64 KiB) of memory that holo never takes, by reason: the most at once, over all processes.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct LeftAlone {
    /// Thread stacks, robust lists, thread ids, the main stack.
    pub stack: u64,
    /// Locked by `mlock`.
    pub locked: u64,
    /// In a mapping under long-term pins.
    pub pinned: u64,
    /// Shared memory.
    pub shared: u64,
    /// File mappings.
    pub file: u64,
}

/// How long a fault waited, from the pager's reading of it to the installed page, in microseconds.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct FaultLatency {
    /// Median.
    pub p50: f64,
    /// 90th percentile.
    pub p90: f64,
    /// 99th percentile.
    pub p99: f64,
    /// 99.9th percentile.
    pub p999: f64,
    /// Longest.
    pub max: f64,
    /// Faults measured.
    pub count: u64,
}

/// What one run under holo did.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// [`Report::SCHEMA`] of the writer.
    pub schema: u32,
    /// The command's exit code (128 + n for a signal); null while it runs and after a detach.
    pub exit_code: Option<i32>,
    /// Wall time under holo, seconds.
    pub wall_s: f64,
    /// The budget, bytes.
    pub local_memory_bytes: u64,
    /// Most pageable memory seen resident at once, bytes.
    pub resident_peak_bytes: u64,
    /// Pageable memory that is resident now, bytes; zero at the end.
    pub resident_bytes: u64,
    /// Faults that wait for their page now; zero at the end.
    pub faults_waiting: u64,
    /// Address spaces that were served.
    pub processes: u64,
    /// Faults answered from the store.
    pub faults_remote: u64,
    /// First touches answered with zeros.
    pub faults_zero: u64,
    /// Writes that met a page under eviction.
    pub faults_wp: u64,
    /// Pages that left memory.
    pub pages_evicted: u64,
    /// Pages that were offered and stayed.
    pub pages_stayed: Stayed,
    /// Pages never taken.
    pub pages_left_alone: LeftAlone,
    /// Processes that could not be taken, or not be evicted from, for a time or to their end: their memory was not
    /// limited.
    pub processes_left_alone: u64,
    /// Bytes that left memory.
    pub bytes_evicted: u64,
    /// Bytes that came back.
    pub bytes_refaulted: u64,
    /// Most bytes that were in the store at once, before compression.
    pub store_bytes_raw: u64,
    /// What they took there after compression, headers and rounding included.
    pub store_bytes_stored: u64,
    /// Stored subframes whose checksum did not match.
    pub integrity_failures: u64,
    /// Longest time for which threads of a process were stopped at once, for whatever reason, microseconds.
    pub attach_stop_us_max: u64,
    /// Times that a successor took over from a dead pager.
    pub takeovers: u64,
    /// Fault latency.
    pub fault_us: FaultLatency,
    /// Bytes evicted for each second of eviction work.
    pub evict_bytes_per_s: u64,
    /// CPU time of all of holo's own processes, those that ended included, seconds.
    pub holo_cpu_s: f64,
}

impl Report {
    /// Version of the schema.
    pub const SCHEMA: u32 = 2;
}
