//! What the core counts, for the report and for tests.

use super::words::{Words, get, set};

/// Counters since the core began. Pages are 64 KiB, subpages 4 KiB.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    /// Faults answered from the store or a frame.
    pub faults_remote: u64,
    /// First touches answered with zeros.
    pub faults_zero: u64,
    /// Writes that met a protected page.
    pub faults_wp: u64,
    /// Pages of which at least one subpage left memory.
    pub pages_evicted: u64,
    /// Subpages that left memory.
    pub subpages_evicted: u64,
    /// Subpages that came back from the store or a frame.
    pub subpages_refaulted: u64,
    /// Offered pages that stayed: a writer waited, or the content changed.
    pub stayed_written: u64,
    /// Offered pages that stayed unchanged.
    pub stayed_other: u64,
    /// Pages not offered because the process had pinned memory for long.
    pub stayed_pinned: u64,
    /// Most bytes that a process was seen to have pinned for long.
    pub pinned_peak_bytes: u64,
    /// Pages not offered because a fork relative shares them.
    pub stayed_shared: u64,
    /// Times that an operation was decided again because an event was pending.
    pub decided_again: u64,
    /// Subpages that the process dropped while they were offered.
    pub dropped_in_batch: u64,
    /// Pages that a request hit after the process had put something else there, and were repaired.
    pub foreign_repaired: u64,
    /// Second reads that differed from the first (a device wrote between).
    pub reread_differed: u64,
    /// Nanoseconds from the start of each batch to its end, summed.
    pub evict_ns: u64,
    /// Address spaces served so far.
    pub spaces: u64,
    /// Highest usage seen, bytes.
    pub usage_peak_bytes: u64,
    /// How long faults waited.
    pub latency: Histogram,
}

macro_rules! scalar_words {
    ($($field:ident),* $(,)?) => {
        /// Words of the counters in shared memory.
        pub const STATS_WORDS: usize = [$(stringify!($field)),*].len() + 514;

        impl Stats {
            /// Writes all counters where a successor and the reporter read them.
            pub fn save(&self, words: Words<'_>) {
                let mut at = 0;
                $(set(words, at, self.$field); at += 1;)*
                set(words, at, self.latency.count);
                set(words, at + 1, self.latency.max_ns);
                for (i, &n) in self.latency.buckets.iter().enumerate() {
                    if get(words, at + 2 + i) != n {
                        set(words, at + 2 + i, n);
                    }
                }
            }

            /// Reads what [`Stats::save`] wrote.
            #[must_use]
            pub fn load(words: Words<'_>) -> Self {
                let mut stats = Self::default();
                let mut at = 0;
                $(stats.$field = get(words, at); at += 1;)*
                stats.latency.count = get(words, at);
                stats.latency.max_ns = get(words, at + 1);
                for (i, n) in stats.latency.buckets.iter_mut().enumerate() {
                    *n = get(words, at + 2 + i);
                }
                stats
            }
        }
    };
}

scalar_words!(
    faults_remote,
    faults_zero,
    faults_wp,
    pages_evicted,
    subpages_evicted,
    subpages_refaulted,
    stayed_written,
    stayed_other,
    stayed_pinned,
    pinned_peak_bytes,
    stayed_shared,
    decided_again,
    dropped_in_batch,
    foreign_repaired,
    reread_differed,
    evict_ns,
    spaces,
    usage_peak_bytes,
);

/// A histogram of nanoseconds, eight buckets an octave (at most 9 % wide), 1 us to an hour.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Histogram {
    buckets: [u64; 512],
    count: u64,
    max_ns: u64,
}

impl Default for Histogram {
    fn default() -> Self {
        Self {
            buckets: [0; 512],
            count: 0,
            max_ns: 0,
        }
    }
}

impl Histogram {
    /// Adds one value.
    pub fn add(&mut self, ns: u64) {
        self.buckets[Self::bucket(ns)] += 1;
        self.count += 1;
        self.max_ns = self.max_ns.max(ns);
    }

    fn bucket(ns: u64) -> usize {
        let v = ns.max(8);
        let octave = v.ilog2();
        (octave as usize * 8 + (v >> (octave - 3) & 7) as usize).min(511)
    }

    /// The value that a share `q` (0 to 1) of all values does not exceed, in nanoseconds (a bucket's upper
    /// edge); 0 when empty.
    #[must_use]
    pub fn quantile_ns(&self, q: f64) -> u64 {
        let mut left = (q.clamp(0.0, 1.0) * self.count as f64).ceil().max(1.0);
        for (i, &n) in self.buckets.iter().enumerate() {
            left -= n as f64;
            if left <= 0.0 {
                let (octave, step) = (i / 8, i % 8);
                let edge = ((8 + step as u64 + 1) << octave) >> 3;
                return edge.min(self.max_ns);
            }
        }
        self.max_ns
    }

    /// Values added.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.count
    }

    /// Greatest value added, nanoseconds.
    #[must_use]
    pub fn max_ns(&self) -> u64 {
        self.max_ns
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_within_a_bucket() {
        let mut h = Histogram::default();
        assert_eq!(h.quantile_ns(0.5), 0);
        for i in 1..=1000 {
            h.add(i * 1000);
        }
        for (q, want) in [(0.5, 500_000.0), (0.9, 900_000.0), (0.99, 990_000.0)] {
            let got = h.quantile_ns(q) as f64;
            assert!((got / want - 1.0).abs() < 0.15, "{q}: {got}");
        }
        assert_eq!(h.max_ns(), 1_000_000);
        assert_eq!(h.quantile_ns(1.0), 1_000_000);
    }
}
