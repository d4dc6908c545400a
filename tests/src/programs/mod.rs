//! Real programs that check their own data: Python, Redis and Node.js, within a quarter of their memory.
//!
//! [`scripts`] run by themselves under `holo-exec`; [`redis`] is a server with a client beside it; in
//! [`attach`] the programs run already when holo takes them over, and go on when it lets go.

pub mod attach;
pub mod redis;
pub mod scripts;

use std::path::PathBuf;

use crate::torture::harness::suite::Case;

/// All cases.
#[must_use]
pub fn all() -> Vec<Case> {
    let mut cases = scripts::cases();
    cases.extend(redis::cases());
    cases.extend(attach::cases());
    cases
}

/// A file of `tests/programs`.
fn source(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
        .join("programs")
        .join(name)
}
