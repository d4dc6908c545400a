//! Do the checks bite? A bare program gets zeros into its memory behind its back, and must notice.

use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};

use super::cases::Program;
use super::harness::Draw;
use super::harness::process::Process;
use super::harness::suite::{Run, print_line};

/// Pages that are spoilt; a few of them may be zero anyway, or be given back before anyone looks.
const PAGES: u64 = 16;

/// By then every program has filled its memory, and none has ended.
const FILL_TIME: Duration = Duration::from_millis(1500);

const PAGE_BYTES: u64 = 4096;

/// Runs the program bare, spoils its memory, and expects it to fail by its own check.
///
/// # Errors
/// It has noticed nothing.
pub fn must_be_noticed(program: &Program, run: &Run<'_>, binaries: &Path) -> Result<()> {
    let mut running = program.plan(run, binaries)?.start(&run.without_holo())?;
    let target = running.target()?;
    running.goes_on_for(FILL_TIME)?;
    let written = spoil(target, run.seed)?;
    match running.finish() {
        Ok(_) => bail!("{written} pages were spoilt and nobody noticed"),
        Err(error) => {
            let said = format!("{error:#}");
            ensure!(
                said.starts_with("exit code"),
                "spoilt memory led to: {said}"
            );
            print_line(&format!("# noticed: {said}"));
            Ok(())
        }
    }
}

fn spoil(target: Process, seed: u64) -> Result<u64> {
    let (low, high) = region_of(target)?;
    let memory = File::options()
        .write(true)
        .open(format!("/proc/{}/mem", target.pid))
        .context("opening the target's memory")?;
    let mut draw = Draw::new(seed);
    let mut written = 0;
    for _ in 0..PAGES {
        let page = draw.between(low / PAGE_BYTES, high / PAGE_BYTES);
        // A page that is unmapped at this moment cannot be spoilt.
        let zeros = [0; 4096];
        written += u64::from(memory.write_all_at(&zeros, page * PAGE_BYTES).is_ok());
    }
    ensure!(written > 0, "no page could be written");
    Ok(written)
}

/// The addresses of the program's region: of all runs of neighbouring mappings, the one with the most
/// private memory in it. Some programs cut theirs into pieces, with files of their own between.
fn region_of(target: Process) -> Result<(u64, u64)> {
    let text = target.read("smaps")?;
    let mut spans: Vec<Span> = Vec::new();
    let mut counts = false;
    for line in text.lines() {
        if let Some((range, name)) = header(line) {
            counts = name.is_empty() || name.ends_with("(deleted)");
            match spans.last_mut() {
                Some(last) if counts && last.high == range.0 => last.high = range.1,
                _ if counts => spans.push(Span {
                    low: range.0,
                    high: range.1,
                    private_kib: 0,
                }),
                _ => {}
            }
        } else if let (true, Some(value)) = (counts, line.strip_prefix("Private_Dirty:")) {
            let kib: u64 = value
                .trim()
                .trim_end_matches(" kB")
                .parse()
                .context("smaps")?;
            if let Some(last) = spans.last_mut() {
                last.private_kib += kib;
            }
        }
    }
    let span = spans
        .into_iter()
        .max_by_key(|span| span.private_kib)
        .context("no memory")?;
    Ok((span.low, span.high))
}

struct Span {
    low: u64,
    high: u64,
    private_kib: u64,
}

/// Addresses and name, if the line is the first one of a mapping.
fn header(line: &str) -> Option<((u64, u64), &str)> {
    let (range, rest) = line.split_once(' ')?;
    let (low, high) = range.split_once('-')?;
    let addresses = (
        u64::from_str_radix(low, 16).ok()?,
        u64::from_str_radix(high, 16).ok()?,
    );
    Some((addresses, rest.splitn(5, ' ').nth(4)?.trim()))
}
