//! What the pager's core takes for granted about the kernel, one fact a test.
//!
//! The simulation is as good as these facts: each test is named for what the kernel does, and
//! `docs/conformance.md` has the fact in words, and on which kernel all were seen. Facts about single
//! calls that the kernel layer's own tests already check are not repeated here.

#![allow(
    clippy::unwrap_used,
    reason = "helpers of tests: they are to fail where it does"
)]

mod agent;
mod events;
mod fork;
mod install;
mod observe;
mod offer;
mod support;
mod takeover;
mod thp;
mod threads;
