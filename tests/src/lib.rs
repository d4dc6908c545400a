//! holo's test tools.

pub mod torture;
