//! State that outlives the pager: words in shared memory, every access an atomic.
//!
//! A pager that dies by `kill -9` leaves all stores that it made before, in program order, and none torn
//! (one `u64` each). That is the whole persistence model: no flush, no fence, only the order of stores.
//! `Release`/`Acquire` keep the compiler to that order.

use std::sync::atomic::{AtomicU64, Ordering};

/// Words that a successor will read; the shell maps them from a memfd, the simulation from a `Vec`.
pub type Words<'m> = &'m [AtomicU64];

/// Reads one word.
pub(crate) fn get(words: Words<'_>, at: usize) -> u64 {
    words[at].load(Ordering::Acquire)
}

/// Writes one word, after everything written before it.
pub(crate) fn set(words: Words<'_>, at: usize, value: u64) {
    words[at].store(value, Ordering::Release);
}
