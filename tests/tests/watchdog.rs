//! The guard of single tests: what it says, what it ends, and that it does nothing in time. Limits of a test's own.

#![allow(
    clippy::unwrap_used,
    reason = "helpers of tests: they are to fail where it does"
)]

use std::os::unix::process::ExitStatusExt as _;
use std::process::{Command, Output};
use std::thread;
use std::time::Duration;

use holo_tests::procs::RUN_ID_VAR;
use holo_tests::watchdog::{Watchdog, give_up};

/// Set in the process in which a guard is to expire: a second run of one of these tests.
const ROLE: &str = "HOLO_TEST_WATCHDOG_ROLE";

/// Runs one of these tests again, in the role in which it hangs.
///
/// With a mark of its own: an expired guard ends everything with its mark, and other roles run meanwhile.
fn run_in_role(test: &str) -> Output {
    let outer = std::env::var(RUN_ID_VAR).unwrap_or_default();
    let own = std::env::current_exe().unwrap();
    Command::new(own)
        .args(["--exact", test, "--nocapture"])
        .env(ROLE, test)
        .env(RUN_ID_VAR, format!("{outer}/{}.{test}", std::process::id()))
        .output()
        .unwrap()
}

fn has_role(test: &str) -> bool {
    std::env::var(ROLE).is_ok_and(|role| role == test)
}

fn is_alive(pid: &str) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"));
    stat.is_ok_and(|stat| !stat.contains(") Z "))
}

/// The word after `marker` in what the role printed.
fn noted<'a>(text: &'a str, marker: &str) -> &'a str {
    let (_, rest) = text
        .split_once(marker)
        .unwrap_or_else(|| panic!("no \"{marker}\" in\n{text}"));
    rest.split_ascii_whitespace()
        .next()
        .expect("a word after the marker")
}

#[test]
fn expired_guard_describes_then_kills_and_aborts() {
    const NAME: &str = "expired_guard_describes_then_kills_and_aborts";
    if has_role(NAME) {
        let _guard = Watchdog::guard("the role", Duration::from_secs(1));
        let mut child = Command::new("sleep").arg("1000").spawn().unwrap();
        eprintln!("started {}", child.id());
        child.wait().unwrap();
        return;
    }
    let output = run_in_role(NAME);
    let text = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.signal(), Some(6), "{text}");
    for part in [
        "watchdog: the role is not done after 1s",
        "(sleep) state S",
        "nanosleep",
        "do_wait",
    ] {
        assert!(text.contains(part), "nothing about \"{part}\" in\n{text}");
    }
    assert!(!is_alive(noted(&text, "started ")));
}

#[test]
fn expired_guard_ends_orphans_too() {
    const NAME: &str = "expired_guard_ends_orphans_too";
    if has_role(NAME) {
        let _guard = Watchdog::guard("the role", Duration::from_secs(3));
        // An orphan after two seconds, in a session of its own, without a mark.
        let script = "setsid env -i /bin/sleep 1000 >/dev/null 2>&1 & echo orphan $! >&2; sleep 2";
        Command::new("/bin/sh")
            .args(["-c", script])
            .status()
            .unwrap();
        thread::sleep(Duration::from_secs(1000));
        return;
    }
    let output = run_in_role(NAME);
    let text = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.signal(), Some(6), "{text}");
    assert!(!is_alive(noted(&text, "orphan ")), "{text}");
}

#[test]
fn guard_that_is_dropped_in_time_does_nothing() {
    const NAME: &str = "guard_that_is_dropped_in_time_does_nothing";
    if has_role(NAME) {
        drop(Watchdog::guard("the role", Duration::from_millis(200)));
        thread::sleep(Duration::from_secs(1));
        return;
    }
    let output = run_in_role(NAME);
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
}

#[test]
fn passed_limit_is_described_before_the_test_fails() {
    const NAME: &str = "passed_limit_is_described_before_the_test_fails";
    if has_role(NAME) {
        let mut child = Command::new("sleep").arg("1000").spawn().unwrap();
        let failed = std::panic::catch_unwind(|| give_up("the role waits in vain"));
        assert!(failed.is_err());
        assert_eq!(child.try_wait().unwrap(), None, "killed by the description");
        child.kill().unwrap();
        child.wait().unwrap();
        return;
    }
    let output = run_in_role(NAME);
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{text}");
    for part in [
        "watchdog: the role waits in vain",
        "(sleep) state S",
        "nanosleep",
    ] {
        assert!(text.contains(part), "nothing about \"{part}\" in\n{text}");
    }
}
