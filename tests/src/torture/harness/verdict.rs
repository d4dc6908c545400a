//! Is a run's report what a run of this kind must have?

use std::fs;
use std::path::Path;

use anyhow::{Context as _, Result, ensure};
use holo_proto::Report;

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
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn good() -> Report {
        Report {
            exit_code: Some(0),
            local_memory_bytes: 64,
            processes: 1,
            faults_remote: 5,
            pages_evicted: 9,
            bytes_evicted: 9,
            bytes_refaulted: 5,
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
}
