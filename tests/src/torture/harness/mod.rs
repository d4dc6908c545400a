//! Runs one command at a time, bare or under holo, watches its processes, and judges the end.
//!
//! Used by the torture suite and by the real programs. Nothing here knows a single case.

pub mod dump;
pub mod family;
pub mod holo;
pub mod killer;
pub mod launch;
pub mod memcg;
pub mod options;
pub mod process;
pub mod residence;
pub mod suite;
pub mod tool;
pub mod verdict;

use std::time::Duration;

/// The time between two looks at anything that is waited for.
pub const LOOK_EVERY: Duration = Duration::from_millis(20);

/// How long processes of a case may outlive it before they count as left over.
pub const LEFTOVER_GRACE: Duration = Duration::from_secs(10);

/// The finalizer of splitmix64: the generator that the C and Python programs use as well.
#[must_use]
pub fn mix(seed: u64) -> u64 {
    let x = seed.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// A stream of pseudo-random numbers from one seed.
#[derive(Clone, Debug)]
pub struct Draw(u64);

impl Draw {
    /// A stream for `seed`.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        Self(mix(seed))
    }

    /// The next number from `low` to `high`, the latter excluded.
    pub fn between(&mut self, low: u64, high: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x632b_e59b_d9b4_e019);
        low + mix(self.0) % (high - low).max(1)
    }

    /// A pause between so many milliseconds.
    pub fn pause_ms(&mut self, low: u64, high: u64) -> Duration {
        Duration::from_millis(self.between(low, high))
    }
}
