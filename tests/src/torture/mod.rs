//! The torture suite: C programs that do to memory what a pager finds hardest, under eviction.
//!
//! [`harness`] runs one command, bare or under holo, and judges it; [`cases`] lists the programs of
//! `tests/torture` with their sizes; the other modules are cases in which the driver takes part.

pub mod build;
pub mod cases;
pub mod cgroup;
pub mod harness;
pub mod huge;
pub mod interfere;
pub mod many;
pub mod sabotage;
pub mod slow_pipe;
pub mod terminal;
