//! What the runner tells a suite, with values that serve where a test is started by hand.

use std::env;
use std::path::PathBuf;

/// The seed of everything random in the suite: `HOLO_SEED`, or 1.
///
/// # Panics
/// Where `HOLO_SEED` is not a decimal number: to go on would replay something else than was asked for.
#[must_use]
pub fn seed() -> u64 {
    number("HOLO_SEED").unwrap_or(1)
}

/// How long the soak takes that the suite is part of, in minutes; None in an ordinary run.
///
/// # Panics
/// Where `HOLO_SOAK_MINUTES` is not a decimal number.
#[must_use]
pub fn soak_minutes() -> Option<u64> {
    number("HOLO_SOAK_MINUTES")
}

/// The folder of the built programs: `HOLO_BIN_DIR`, or the one that this test was built into.
///
/// # Panics
/// Where this program's own path cannot be found out.
#[must_use]
pub fn bin_dir() -> PathBuf {
    env::var_os("HOLO_BIN_DIR").map_or_else(
        || {
            let own = env::current_exe().expect("a running program has a path");
            let folder = own.parent().expect("a program lies in a folder");
            // Cargo puts test executables one level below the programs.
            let programs = if folder.ends_with("deps") {
                folder.parent()
            } else {
                None
            };
            programs.unwrap_or(folder).to_path_buf()
        },
        PathBuf::from,
    )
}

/// The name for a control group of a test: the runner knows by it which are left over.
///
/// It holds this process's number: a group whose maker is gone is nobody's.
#[must_use]
pub fn cgroup_name(purpose: &str) -> String {
    format!("holo-test-{}-{purpose}", std::process::id())
}

fn number(variable: &str) -> Option<u64> {
    let text = env::var(variable).ok()?;
    match text.parse() {
        Ok(number) => Some(number),
        Err(error) => panic!("{variable}={text}: {error}"),
    }
}
