//! Is a run's report what a run of this kind must have?

use std::fs;
use std::path::Path;

use anyhow::{Context as _, Result, ensure};
use holo_proto::{PAGE_BYTES, Report, SUBPAGE_BYTES};

/// What the report has to show besides the rules that hold for every run.
#[derive(Clone, Copy, Debug, Default)]
pub struct Expected {
    /// The budget that was given, bytes.
    pub local_memory_bytes: u64,
    /// The command's exit code; none after a detach.
    pub exit_code: Option<i32>,
    /// Pages must have left and come back: without that nothing was tested.
    pub pressure: bool,
    /// Pagers that died must have been followed by so many successors at least.
    pub takeovers_min: u64,
}

/// Reads and checks a report.
///
/// # Errors
/// It is missing, malformed, or says what must not be.
pub fn check(path: &Path, expected: Expected) -> Result<Report> {
    let text =
        fs::read_to_string(path).with_context(|| format!("no report at {}", path.display()))?;
    let report: Report =
        serde_json::from_str(&text).with_context(|| format!("malformed report: {text}"))?;
    judge(&report, expected).with_context(|| format!("report: {text}"))?;
    Ok(report)
}

fn judge(report: &Report, expected: Expected) -> Result<()> {
    ensure!(
        report.integrity_failures == 0,
        "{} integrity failures",
        report.integrity_failures
    );
    ensure!(
        report.exit_code == expected.exit_code,
        "exit code {:?}, want {:?}",
        report.exit_code,
        expected.exit_code
    );
    ensure!(
        report.local_memory_bytes == expected.local_memory_bytes,
        "a budget of {} bytes, want {}",
        report.local_memory_bytes,
        expected.local_memory_bytes
    );
    ensure!(report.processes > 0, "no process was served");
    ensure!(
        report.takeovers >= expected.takeovers_min,
        "{} take-overs, want at least {}",
        report.takeovers,
        expected.takeovers_min
    );
    if expected.pressure {
        ensure!(
            report.pages_evicted > 0,
            "the case never paged: no page was evicted"
        );
        ensure!(
            report.faults_remote > 0,
            "the case never paged: no fault was answered from the store"
        );
        ensure!(
            report.bytes_evicted > 0 && report.bytes_refaulted > 0,
            "pages were counted without bytes"
        );
        judge_counts(report)?;
    }
    Ok(())
}

/// What every run has counted in which pages left and came back, whatever the program does.
fn judge_counts(report: &Report) -> Result<()> {
    for name in ALWAYS_COUNTED {
        ensure!(count(report, name)? > 0.0, "{name} is 0");
    }
    let pages = report.pages_evicted;
    ensure!(
        (pages * SUBPAGE_BYTES..=pages * PAGE_BYTES).contains(&report.bytes_evicted),
        "{pages} pages cannot be {} bytes",
        report.bytes_evicted
    );
    // Nothing is evicted below that. (A cgroup may set a lower limit than the budget.)
    ensure!(
        report.resident_peak_bytes >= report.local_memory_bytes / 2,
        "evicted, though only {} bytes were resident at most",
        report.resident_peak_bytes
    );
    let f = &report.fault_us;
    ensure!(
        [f.p50, f.p90, f.p99, f.p999, f.max].is_sorted(),
        "quantiles out of order"
    );
    ensure!(
        f.max <= report.wall_s * 1e6,
        "a fault waited for {} us in a run of {} s",
        f.max,
        report.wall_s
    );
    Ok(())
}

/// Not zero in any such run, by their names in the report. Every process has a stack and files mapped.
const ALWAYS_COUNTED: &[&str] = &[
    "attach_stop_us_max",
    "evict_bytes_per_s",
    "fault_us.count",
    "fault_us.p50",
    "holo_cpu_s",
    "pages_left_alone.file",
    "pages_left_alone.stack",
    "store_bytes_raw",
    "store_bytes_stored",
    "wall_s",
];

/// What a report says under this name: `field`, or `field.part`.
///
/// # Errors
/// It has no such number.
pub fn count(report: &Report, name: &str) -> Result<f64> {
    let mut value = &serde_json::to_value(report)?;
    for part in name.split('.') {
        value = &value[part];
    }
    value
        .as_f64()
        .with_context(|| format!("the report has no number {name}"))
}

#[cfg(test)]
mod tests {
    use holo_proto::{FaultLatency, LeftAlone};

    use super::*;

    fn good() -> Report {
        Report {
            exit_code: Some(0),
            wall_s: 1.0,
            local_memory_bytes: 64,
            resident_peak_bytes: 64,
            processes: 1,
            faults_remote: 5,
            pages_evicted: 9,
            bytes_evicted: 9 * PAGE_BYTES,
            bytes_refaulted: 5,
            pages_left_alone: LeftAlone {
                stack: 1,
                file: 1,
                ..LeftAlone::default()
            },
            store_bytes_raw: 9,
            store_bytes_stored: 9,
            attach_stop_us_max: 1,
            fault_us: FaultLatency {
                p50: 1.0,
                p90: 2.0,
                p99: 3.0,
                p999: 4.0,
                max: 5.0,
                count: 5,
            },
            evict_bytes_per_s: 1,
            holo_cpu_s: 0.1,
            ..Report::default()
        }
    }

    const WANT: Expected = Expected {
        local_memory_bytes: 64,
        exit_code: Some(0),
        pressure: true,
        takeovers_min: 0,
    };

    #[test]
    fn a_run_that_never_paged_is_a_failure_where_pressure_is_meant() {
        assert!(judge(&good(), WANT).is_ok());
        assert!(
            judge(
                &Report {
                    faults_remote: 0,
                    ..good()
                },
                WANT
            )
            .is_err()
        );
        assert!(
            judge(
                &Report {
                    pages_evicted: 0,
                    ..good()
                },
                WANT
            )
            .is_err()
        );
        assert!(
            judge(
                &Report {
                    pages_evicted: 0,
                    ..good()
                },
                Expected {
                    pressure: false,
                    ..WANT
                }
            )
            .is_ok()
        );
    }

    #[test]
    fn wrong_bytes_wrong_code_and_missing_takeovers_are_failures() {
        assert!(
            judge(
                &Report {
                    integrity_failures: 1,
                    ..good()
                },
                WANT
            )
            .is_err()
        );
        assert!(
            judge(
                &Report {
                    exit_code: Some(1),
                    ..good()
                },
                WANT
            )
            .is_err()
        );
        assert!(
            judge(
                &good(),
                Expected {
                    takeovers_min: 1,
                    ..WANT
                }
            )
            .is_err()
        );
    }

    #[test]
    fn a_paged_run_that_counted_nothing_or_what_cannot_be_is_a_failure() {
        let spoilt: [fn(&mut Report); 9] = [
            |r| r.wall_s = 0.0,
            |r| r.holo_cpu_s = 0.0,
            |r| r.evict_bytes_per_s = 0,
            |r| r.store_bytes_stored = 0,
            |r| r.pages_left_alone.stack = 0,
            |r| r.resident_peak_bytes = 31,
            |r| r.bytes_evicted += 1,
            |r| r.fault_us.p90 = 3.5,
            |r| r.fault_us.max = 1e7,
        ];
        for (i, spoil) in spoilt.into_iter().enumerate() {
            let mut report = good();
            spoil(&mut report);
            assert!(judge(&report, WANT).is_err(), "{i}: {report:?}");
        }
    }

    #[test]
    fn a_count_is_found_by_its_name() {
        assert!(count(&good(), "pages_evicted").is_ok_and(|n| n == 9.0));
        assert!(count(&good(), "fault_us.p99").is_ok_and(|n| n == 3.0));
        for name in [
            "no_such_field",
            "fault_us",
            "fault_us.p98",
            "pages_evicted.x",
        ] {
            assert!(count(&good(), name).is_err(), "{name}");
        }
    }
}
