//! How much memory the processes have, and how much they may: measured at every look, told to the serving thread.

use super::members::Member;
use super::pace;
use super::{Watch, timed};
use crate::core::Input;
use crate::shell::control::Scalar;
use crate::shell::limits::Limits;
use crate::shell::scan;
use crate::sys::attach::{self, AttachError};

/// A process that has no first thread for so long, nanoseconds, is not just ending.
const HEADLESS_NS: u64 = 500_000_000;

/// How near the tree is to its budget.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Pressure {
    /// It fits, or is being let go of: nothing is taken.
    None,
    /// What it has is taken.
    Full,
    /// And it grows.
    Growing,
}

impl Member {
    /// Its private bytes that can be paged. `members`: how many processes there are, itself too. `text` is room for what is read.
    fn measure(&mut self, pid: i32, members: usize, text: &mut Vec<u8>, now: u64) -> u64 {
        if members < 2 {
            self.shared_bytes = 0;
        } else if now >= self.next_count_ns {
            let (shared, cost) = timed(|| scan::shared_bytes(pid, text).unwrap_or(0));
            self.shared_bytes = shared;
            self.next_count_ns = pace::next_count_ns(now, cost);
            self.recount_ns = pace::recount_ns(now, cost * members as u64);
        }
        // An exec leaves the old address space: what was opened of it reads empty.
        let sample = self.statm.sample().unwrap_or_default();
        self.anon_bytes = sample.resident_bytes.saturating_sub(sample.shared_bytes);
        if sample.size_bytes > 0 || !attach::first_thread_has_ended(pid) {
            self.headless_since = None;
        } else {
            self.headless_since.get_or_insert(now);
        }
        self.anon_bytes
            .saturating_sub(self.left_bytes + self.shared_bytes)
    }
}

impl Watch {
    /// Measures every member.
    pub(super) fn measure(&mut self, now: u64) -> Pressure {
        let mut total = 0;
        let (mut measured, mut headless) = (Vec::new(), Vec::new());
        let count = self.members.len();
        for (&pid, m) in &mut self.members {
            let bytes = m.measure(pid, count, &mut self.text, now);
            if !m.headless && m.headless_since.is_some_and(|t| now - t > HEADLESS_NS) {
                m.headless = true;
                headless.push(pid);
            }
            if m.shares {
                continue;
            }
            total += bytes;
            if let Some(space) = m.space {
                measured.push((space, bytes));
            }
        }
        for pid in headless {
            self.left_alone(&AttachError::FirstThreadEnded { pid }.to_string());
        }
        let growing = self.pace.note_total(total);
        self.control.set(Scalar::Resident, total);
        self.control.max(Scalar::ResidentPeak, total);
        if self.pace.passes_on() {
            for (space, bytes) in measured {
                self.input(Input::Measured { space, bytes });
            }
        }
        self.respect_limits(total);
        if total <= self.take_above() || self.is_detaching() {
            Pressure::None
        } else if growing {
            Pressure::Growing
        } else {
            Pressure::Full
        }
    }

    fn respect_limits(&mut self, total: u64) {
        let mut bytes = self.budget();
        if let Some(room) = self.limits.as_ref().and_then(Limits::room_bytes) {
            let most = i64::try_from(total)
                .unwrap_or(i64::MAX)
                .saturating_add(room);
            bytes = bytes.min(u64::try_from(most).unwrap_or(0)).max(1 << 20);
        }
        if self.told_budget.replace(bytes) != Some(bytes) {
            self.input(Input::Budget { bytes });
        }
    }

    pub(super) fn budget(&self) -> u64 {
        self.control.get(Scalar::Budget)
    }

    /// Above this the tree is taken: taking and registering takes milliseconds, while it fills on.
    fn take_above(&self) -> u64 {
        let b = self.budget();
        b - (b / 2).min(64 << 20)
    }
}
