//! The pager's core against a simulated kernel: one seed, one run, every byte watched by an oracle.
//!
//! ```text
//!  program (acts) -> thread (system calls, step by step) -> kernel (pages, mappings, reclaim, devices)
//!                                                             |  uffd (faults, events)   ring (advice)
//!  oracle (what may be seen) <--------------------------------+
//!                                                             |
//!  holo_pager::core <- drive::run -> world (operations, and the shell's duties)
//! ```
//! Time, order, errors, partial results, and the death of the pager between any two steps come from the
//! seed. What the simulated kernel does is what the conformance suite sees the real one do.

#![allow(
    clippy::wildcard_enum_match_arm,
    clippy::cast_possible_truncation,
    clippy::redundant_iter_cloned,
    clippy::cloned_instead_of_copied,
    reason = "a model of the kernel passes over what it does not model; its numbers are small"
)]

mod kernel;
mod knobs;
mod mm;
mod oracle;
mod program;
mod ring;
mod rng;
mod run;
mod store;
mod thread;
mod uffd;
mod world;

pub use run::{Bank, Report, run_seed};
