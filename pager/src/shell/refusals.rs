//! What cannot be paged: when that is tried again, and what the user is told of it.

use std::collections::BTreeSet;

use crate::sys::attach::AttachError;

/// Between the first two attempts, nanoseconds; twice as long each time.
const PAUSE_NS: u64 = 1_000_000;
/// Most between two attempts: whatever stands in the way may be removed.
const PAUSE_MOST_NS: u64 = 10_000_000_000;
/// An attempt looks at the whole process: it costs at most this share of a CPU, one in so many; of what may have been a
/// wait, up to a second.
const ATTEMPT_SHARE: u64 = 50;
const COST_MOST_NS: u64 = 1_000_000_000;
/// Failed attempts before something that passes by itself, as a rule, counts as well: a quarter of a second.
const PASSING_ATTEMPTS: u32 = 9;
/// Reasons that one pager tells.
const REASONS_MOST: usize = 16;

/// Why a process was not taken, or cannot be evicted from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Refusal {
    /// Cause and remedy.
    pub(crate) why: String,
    /// It passes by itself, as a rule.
    pub(crate) is_passing: bool,
}

impl Refusal {
    /// One that stays until somebody does something about it.
    pub(crate) fn lasting(why: impl Into<String>) -> Self {
        Self {
            why: why.into(),
            is_passing: false,
        }
    }

    /// One that passes by itself.
    pub(crate) fn passing(why: impl Into<String>) -> Self {
        Self {
            why: why.into(),
            is_passing: true,
        }
    }

    /// Holo is full.
    pub(crate) fn too_many(pid: i32) -> Self {
        Self::lasting(format!(
            "process {pid} is one more than holo serves at once: run fewer together, or under several holo-exec"
        ))
    }
}

impl From<AttachError> for Refusal {
    fn from(e: AttachError) -> Self {
        Self {
            is_passing: e.is_passing(),
            why: e.to_string(),
        }
    }
}

/// Failed attempts at one program in a process.
#[derive(Debug, Default)]
pub(crate) struct Attempts {
    /// Of the program, as [`procfs::image`](crate::sys::procfs::image) tells; 0 while nothing has failed.
    image: u64,
    failed: u32,
    next_ns: u64,
    counted: bool,
}

impl Attempts {
    /// What the process runs now; 0 if that is not known. Another program begins anew, and counts anew.
    pub(crate) fn are_at(&mut self, image: u64) {
        if image != 0 && image != self.image {
            *self = Self {
                image,
                ..Self::default()
            };
        }
    }

    /// Whether there were any.
    pub(crate) fn have_failed(&self) -> bool {
        self.failed > 0
    }

    /// Whether it is time for another one.
    pub(crate) fn is_due(&self, now_ns: u64) -> bool {
        now_ns >= self.next_ns
    }

    /// One more has failed, which took so long. True once: when it counts as left alone from now on.
    pub(crate) fn fail(&mut self, now_ns: u64, took_ns: u64, is_passing: bool) -> bool {
        let pause = PAUSE_NS.saturating_mul(1 << self.failed.min(20));
        let cost = took_ns.saturating_mul(ATTEMPT_SHARE).min(COST_MOST_NS);
        self.next_ns = now_ns + pause.min(PAUSE_MOST_NS).max(cost);
        self.failed = self.failed.saturating_add(1);
        let counts = !self.counted && (!is_passing || self.failed >= PASSING_ATTEMPTS);
        self.counted |= counts;
        counts
    }
}

/// Reasons that the user has been told: one message for each, however many processes it is about.
#[derive(Debug, Default)]
pub(crate) struct Told(BTreeSet<String>);

impl Told {
    /// Whether this one is to be told. Messages that differ in numbers only give one reason.
    pub(crate) fn is_new(&mut self, why: &str) -> bool {
        let reason = why.chars().filter(|c| !c.is_ascii_digit()).collect();
        self.0.len() < REASONS_MOST && self.0.insert(reason)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_grow_up_to_a_bound() {
        let mut attempts = Attempts::default();
        assert!(attempts.is_due(0));
        let (mut now, mut last) = (0, 0);
        for _ in 0..40 {
            attempts.fail(now, 0, false);
            let pause = attempts.next_ns - now;
            assert!(
                pause == 2 * last || last == 0 || pause == PAUSE_MOST_NS,
                "{pause}"
            );
            assert!(!attempts.is_due(attempts.next_ns - 1));
            assert!(attempts.is_due(attempts.next_ns));
            (now, last) = (attempts.next_ns, pause);
        }
        assert_eq!(last, PAUSE_MOST_NS);
        // A costly one waits longer.
        let mut attempts = Attempts::default();
        attempts.fail(0, 5_000_000, false);
        assert_eq!(attempts.next_ns, 250_000_000);
        attempts.fail(0, 100_000_000_000, false);
        assert_eq!(attempts.next_ns, COST_MOST_NS);
    }

    #[test]
    fn what_passes_by_itself_counts_when_it_has_not() {
        let mut attempts = Attempts::default();
        let counted: Vec<u32> = (1..100).filter(|_| attempts.fail(0, 0, true)).collect();
        assert_eq!(counted, [PASSING_ATTEMPTS]);
        let mut attempts = Attempts::default();
        assert!(attempts.fail(0, 0, false));
        assert!(!attempts.fail(0, 0, false));
    }

    #[test]
    fn another_program_begins_anew() {
        let mut attempts = Attempts::default();
        attempts.are_at(7);
        assert!(attempts.fail(0, 0, false) && !attempts.is_due(0));
        for same in [7, 0] {
            attempts.are_at(same);
            assert!(attempts.have_failed() && !attempts.is_due(0));
            assert!(!attempts.fail(0, 0, false));
        }
        attempts.are_at(8);
        assert!(!attempts.have_failed() && attempts.is_due(0));
        assert!(attempts.fail(0, 0, false));
    }

    #[test]
    fn each_reason_is_told_once_and_not_too_many() {
        let mut told = Told::default();
        assert!(told.is_new("process 12 uses userfaultfd itself"));
        assert!(!told.is_new("process 345 uses userfaultfd itself"));
        assert!(told.is_new("process 12 is traced"));
        let new = (b'a'..=b'z').filter(|&c| told.is_new(&char::from(c).to_string()));
        assert_eq!(new.count(), REASONS_MOST - 2);
    }
}
