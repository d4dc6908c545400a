//! holo's test tools: the runner of all suites, and what suites share.
//!
//! A suite that `tests/manifest.toml` lists is started by [`runner`]; [`session`] is what it is told then,
//! and [`watchdog`] guards its single tests.

pub mod bench;
pub mod procs;
pub mod runner;
pub mod session;
pub mod sim;
mod sys;
pub mod watchdog;

pub mod programs;
pub mod takeover;
pub mod torture;
