//! How much private memory a command keeps resident, as `/proc` shows it: holo's own counts are not asked.

use std::iter;
use std::time::Instant;

use anyhow::{Context as _, Result, ensure};

use holo_pager::sys::procfs::share_memory;

use super::process::{Process, kib_in};
use crate::procs::Proc;

/// A sample of many processes takes milliseconds: the pause after it is so many times as long at least, so that no
/// case gets slower by being measured.
const PAUSE_PER_COST: u32 = 20;

/// What the kernel counts and holo leaves alone: stacks, data of files, small and locked mappings. And what is seen
/// while the program is quicker than the pager, or has none for a moment: real runs stay within 1 MiB of the budget
/// in the median, also on a busy machine, and `threads` with its stacks 4 MiB above it.
const SLACK_KIB: u64 = 4 << 10;

/// The same, as a part of the budget: one in so many.
const SLACK_ONE_IN: u64 = 4;

/// Private anonymous memory at one moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Sample {
    /// What is of one process alone.
    own_kib: u64,
    /// What fork relatives share, each page once. Nobody can evict that from one of them, as long as they do: no
    /// budget bounds it.
    shared_kib: u64,
}

impl Sample {
    /// The only process of a command: this doesn't need its memory lock.
    fn of_one(status: &str) -> Option<Self> {
        Some(Self {
            own_kib: kib_in(status, "RssAnon")?,
            shared_kib: 0,
        })
    }

    /// One of several processes. What each page adds to the proportional size tells how many share it; it is taken
    /// as shared by all, which makes the shared part too small rather than too large.
    fn of_one_among(smaps_rollup: &str, relatives: u64) -> Option<Self> {
        let all = kib_in(smaps_rollup, "Anonymous")?;
        let proportional = kib_in(smaps_rollup, "Pss_Anon")?;
        let elsewhere = all.saturating_sub(proportional);
        let own_kib = all.saturating_sub(elsewhere * relatives / (relatives - 1).max(1));
        Some(Self {
            own_kib,
            shared_kib: proportional.saturating_sub(own_kib),
        })
    }
}

impl iter::Sum for Sample {
    fn sum<I: Iterator<Item = Self>>(samples: I) -> Self {
        samples.fold(Self::default(), |sum, sample| Self {
            own_kib: sum.own_kib + sample.own_kib,
            shared_kib: sum.shared_kib + sample.shared_kib,
        })
    }
}

/// Samples of a command while it is held.
#[derive(Clone, Debug, Default)]
pub struct Residence {
    samples: Vec<Sample>,
    next: Option<Instant>,
}

impl Residence {
    /// Takes a sample of these processes, unless the last one is too recent for what it cost.
    pub fn look(&mut self, members: &[Proc]) {
        let now = Instant::now();
        if self.next.is_some_and(|next| now < next) {
            return;
        }
        let sample = sample(members);
        self.next = Some(now + now.elapsed() * PAUSE_PER_COST);
        // Zero: the program has not started, or has ended.
        self.samples
            .extend(sample.filter(|sample| sample.own_kib > 0));
    }

    /// What was seen, in one line.
    #[must_use]
    pub fn summary(&self, budget_kib: u64) -> String {
        let peak = |part: fn(&Sample) -> u64| self.samples.iter().map(part).max().unwrap_or(0);
        format!(
            "# resident_mib median={:.1} peak={:.1} budget={:.1} shared_peak={:.1} samples={}",
            mib(self.median_kib().unwrap_or(0)),
            mib(peak(|sample| sample.own_kib)),
            mib(budget_kib),
            mib(peak(|sample| sample.shared_kib)),
            self.samples.len(),
        )
    }

    /// Was the budget kept? Filling overshoots, and so may a moment without a pager: what counts is the median of
    /// the second half.
    ///
    /// # Errors
    /// It was not, or there is no sample.
    pub fn judge(&self, budget_kib: u64) -> Result<()> {
        let median_kib = self
            .median_kib()
            .context("resident memory was never seen")?;
        let allowed_kib = allowed_kib(budget_kib);
        ensure!(
            median_kib <= allowed_kib,
            "the budget was not kept: {median_kib} KiB resident in the median of the second half, allowed are \
             {allowed_kib} with a budget of {budget_kib}"
        );
        Ok(())
    }

    fn median_kib(&self) -> Option<u64> {
        let second_half = &self.samples[self.samples.len() / 2..];
        let mut sorted: Vec<u64> = second_half.iter().map(|sample| sample.own_kib).collect();
        sorted.sort_unstable();
        sorted.get(sorted.len() / 2).copied()
    }
}

fn allowed_kib(budget_kib: u64) -> u64 {
    budget_kib + budget_kib / SLACK_ONE_IN + SLACK_KIB
}

#[expect(clippy::cast_precision_loss, reason = "shown with one digit")]
fn mib(kib: u64) -> f64 {
    kib as f64 / 1024.0
}

/// All but holo's own processes; none if one of them cannot be asked. Those that run on the same memory (a vfork's child
/// before its exec) count once.
fn sample(members: &[Proc]) -> Option<Sample> {
    let mut programs: Vec<Process> = Vec::new();
    for proc in members
        .iter()
        .filter(|proc| !proc.comm.starts_with("holo-"))
    {
        let process = Process::from(proc);
        if !programs
            .iter()
            .any(|other| share_memory(other.pid, process.pid))
        {
            programs.push(process);
        }
    }
    match programs.as_slice() {
        [only] => Sample::of_one(&only.read("status").ok()?),
        several => several
            .iter()
            .map(|process| {
                let text = process.read("smaps_rollup").ok()?;
                Sample::of_one_among(&text, several.len() as u64)
            })
            .sum(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seen(own_kib: impl IntoIterator<Item = u64>) -> Residence {
        let sample = |own_kib| Sample {
            own_kib,
            shared_kib: 0,
        };
        Residence {
            samples: own_kib.into_iter().map(sample).collect(),
            next: None,
        }
    }

    #[test]
    fn the_median_is_of_the_second_half() {
        assert_eq!(seen([]).median_kib(), None);
        assert_eq!(seen([7]).median_kib(), Some(7));
        assert_eq!(
            seen([900, 900, 900, 900, 3, 800, 1, 2]).median_kib(),
            Some(3)
        );
    }

    #[test]
    fn a_budget_that_is_not_kept_is_a_failure_and_a_short_overshoot_is_none() {
        let budget = 16 << 10;
        let allowed = 24 << 10;
        assert!(seen([allowed; 9]).judge(budget).is_ok());
        assert!(seen([allowed + 1; 9]).judge(budget).is_err());
        let mut overshoot = vec![4 * budget; 14];
        overshoot.extend([budget; 6]);
        assert!(seen(overshoot.clone()).judge(budget).is_ok());
        overshoot.reverse();
        assert!(seen(overshoot).judge(budget).is_err());
    }

    #[test]
    fn a_command_that_was_never_seen_is_a_failure() {
        assert!(seen([]).judge(1 << 20).is_err());
    }

    #[test]
    fn fork_relatives_count_what_is_of_one_alone_and_shared_pages_once() {
        // 100 KiB of its own, 60 that all three share.
        let text = "Pss_Anon:            120 kB\nAnonymous:           160 kB\n";
        let one = Sample::of_one_among(text, 3).unwrap();
        assert_eq!((one.own_kib, one.shared_kib), (100, 20));
        let all: Sample = [one; 3].into_iter().sum();
        assert_eq!((all.own_kib, all.shared_kib), (300, 60));
        assert_eq!(Sample::of_one_among("Anonymous: 1 kB\n", 2), None);
    }

    #[test]
    fn only_a_process_that_is_not_holos_is_asked() {
        let mut own = Proc::read(i32::try_from(std::process::id()).unwrap()).unwrap();
        assert!(sample(std::slice::from_ref(&own)).unwrap().own_kib > 0);
        own.comm = "holo-pager".to_owned();
        assert_eq!(sample(&[own]), Some(Sample::default()));
    }
}
