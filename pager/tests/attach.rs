//! Taking hold of real processes: what they notice of it (nothing), and what is refused (with its reason).

#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "a test fails by panicking, and prints times for who runs it by hand"
)]

#[path = "attach/refused.rs"]
mod refused;
#[path = "attach/support.rs"]
mod support;
#[path = "attach/unnoticed.rs"]
mod unnoticed;
#[path = "attach/without.rs"]
mod without;

use holo_pager::sys::attach::{
    AttachError, advise_self, drop_keeper, make_ring, quiesce, take_hold,
};
use support::{Target, print_distribution};

/// Rounds of everything on one busy program.
fn rounds() -> usize {
    std::env::var("HOLO_ATTACH_ROUNDS").map_or(25, |n| n.parse().unwrap())
}

/// Takes hold of a busy program and lets go, again and again; it must notice nothing.
fn notices_nothing(kinds: &[&str], rounds: usize) {
    let target = Target::busy(kinds);
    let pid = target.pid;
    let descriptors = target.descriptors();
    let (mut holds, mut rings, mut stops) = (vec![], vec![], vec![]);
    for round in 0..rounds {
        let hold = take_hold(pid).unwrap_or_else(|e| panic!("round {round}: {e}"));
        holds.push(hold.stop_us);
        if round % 4 == 1 {
            rings.push(make_ring(pid, 8).unwrap().stop_us);
        }
        if round % 4 == 2 {
            advise_self(pid, &[], libc::MADV_DONTNEED).unwrap();
        }
        if round % 4 == 3 {
            stops.push(quiesce(pid).unwrap());
        }
        drop_keeper(pid, hold.keeper_fd).unwrap();
        std::thread::sleep(std::time::Duration::from_millis(1));
    }
    target.wait_until("the rings' threads end", |t| t.descriptors() == descriptors);
    print_distribution(&format!("take_hold {kinds:?}"), &mut holds);
    print_distribution("  make_ring", &mut rings);
    print_distribution("  quiesce", &mut stops);
    let (lines, success) = target.finish();
    assert!(
        success && lines.last().unwrap().starts_with("ok"),
        "{lines:#?}"
    );
}

macro_rules! unnoticed {
    ($($kind:ident)*) => {$(
        mod $kind {
            #[test]
            fn is_unnoticed() {
                super::notices_nothing(&[stringify!($kind); 3], super::rounds());
            }
        }
    )*};
}

// One program for each kind of call: the stopped thread is then surely in one.
unnoticed!(nanosleep clock_abs read recv_timeout poll ppoll select futex_timeout futex epoll epoll_pwait2
    sigsuspend pause sigtimedwait semtimedop msgrcv fpu getpid);

#[test]
fn a_program_of_eight_threads_notices_nothing() {
    let kinds = [
        "epoll",
        "nanosleep",
        "sigsuspend",
        "read",
        "fpu",
        "ppoll",
        "futex_timeout",
        "semtimedop",
    ];
    notices_nothing(&kinds, 8 * rounds());
}

#[test]
fn a_process_that_starts_programs_all_the_time_is_not_refused_for_it() {
    let again = r#"exec sh -c "$0" "$0""#;
    let target = Target::start(std::process::Command::new("sh").args(["-c", again, again]));
    let mut held = Vec::new();
    for _ in 0..8 * rounds() {
        match take_hold(target.pid) {
            // The next exec closes what it keeps; until then that is known for ours.
            Ok(hold) => held.push(hold),
            Err(AttachError::Changed { .. }) => {}
            Err(other) => panic!("{other}"),
        }
    }
    println!("taken {} times", held.len());
    assert!(!held.is_empty());
}
