//! Standard error into a pipe whose reader is slow: a target waits in `write` while its source pages
//! are evicted. Nothing of holo may wait behind it, and every byte must arrive.

use std::path::Path;
use std::time::Duration;

use anyhow::{Result, ensure};

use super::cases::Program;
use super::harness::mix;
use super::harness::suite::Run;

const PROGRAM: Program = Program {
    name: "slowpipe",
    size_mib: 128,
    seconds: 8,
    bare_peak_mib: 129,
    works: Some("stream_bytes"),
    limit: None,
    counted: &[],
    residence_told: None,
};

/// With 4 KiB a read this is about 2 MB/s: the pipe is always full.
const PAUSE: Duration = Duration::from_millis(2);

/// Reads standard error slowly and compares it with the generator.
///
/// # Errors
/// Bytes differ or are missing, or somebody hangs.
pub fn slow_reader(run: &Run<'_>, binaries: &Path) -> Result<()> {
    read_slowly(run, binaries, false)
}

/// The same while pagers are killed.
///
/// # Errors
/// Bytes differ or are missing, or somebody hangs.
pub fn slow_reader_pager_killed(run: &Run<'_>, binaries: &Path) -> Result<()> {
    read_slowly(run, binaries, true)
}

fn read_slowly(run: &Run<'_>, binaries: &Path, kill: bool) -> Result<()> {
    let mut plan = PROGRAM.plan(run, binaries)?;
    plan.stderr_pause = PAUSE;
    let mut running = plan.start(run)?;
    if kill {
        running.kill_pagers(run.seed);
    }
    let end = running.finish()?;
    PROGRAM.judge(&end, run)?;
    let bytes = end.statement("stream_bytes")?;
    ensure!(
        u64::try_from(end.stderr.len())? == bytes,
        "{} bytes arrived on standard error, {bytes} were written",
        end.stderr.len()
    );
    for (index, piece) in (0..).zip(end.stderr.chunks(8)) {
        let want = mix(run.seed.wrapping_add(index)).to_le_bytes();
        ensure!(
            piece == &want[..piece.len()],
            "word {index} of standard error is wrong"
        );
    }
    Ok(())
}
