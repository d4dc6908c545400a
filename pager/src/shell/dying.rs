//! How a pager dies: of a fault of its own, and where a test wants it to.
//!
//! Either way at once, with nothing unwound: what an owner closes on the way out is closed in the table that the
//! successor takes over, userfaultfds first of all.

use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};

use super::console;
use super::control::{Control, Scalar};
use crate::core::CrashPoint;
use crate::sys::spawn;

/// The point's number plus one.
static CRASH_AT: AtomicU64 = AtomicU64::new(0);
static HOW: AtomicU8 = AtomicU8::new(KILL);
const KILL: u8 = 0;
const PANIC: u8 = 1;
const ABORT: u8 = 2;
static CRASHED: AtomicBool = AtomicBool::new(false);
static PANICKED: AtomicBool = AtomicBool::new(false);

/// Characters of a panic's message that are told.
const MESSAGE_MOST: usize = 200;

/// What `HOLO_CRASH_AT` asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Crash {
    /// `NAME`: the first pager that comes there is killed.
    Kill(CrashPoint),
    /// `panic:NAME`: the first one panics.
    Panic(CrashPoint),
    /// `panics:NAME`: each one panics.
    Panics(CrashPoint),
    /// `aborts:NAME`: each one is ended by a signal for a fault of its own, and says nothing.
    Aborts(CrashPoint),
}

impl Crash {
    /// What this text asks for.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        let (how, name): (fn(CrashPoint) -> Self, &str) = match text.split_once(':') {
            None => (Self::Kill, text),
            Some(("panic", name)) => (Self::Panic, name),
            Some(("panics", name)) => (Self::Panics, name),
            Some(("aborts", name)) => (Self::Aborts, name),
            Some(_) => return None,
        };
        CrashPoint::from_name(name).map(how)
    }
}

/// Has this pager die as it was asked, unless an earlier one has been told to and its successor is to live.
pub(crate) fn arm(control: Control, crash: Option<Crash>) {
    let Some(crash) = crash else { return };
    let (point, how) = match crash {
        Crash::Kill(point) => (point, KILL),
        Crash::Panic(point) | Crash::Panics(point) => (point, PANIC),
        Crash::Aborts(point) => (point, ABORT),
    };
    let is_first = control.get(Scalar::Crashed) == 0;
    if is_first || matches!(crash, Crash::Panics(_) | Crash::Aborts(_)) {
        control.set(Scalar::Crashed, 1);
        HOW.store(how, Ordering::Relaxed);
        CRASH_AT.store(point as u64 + 1, Ordering::Relaxed);
    }
}

/// Called at each point.
pub(crate) fn crash(point: CrashPoint) {
    if CRASH_AT.load(Ordering::Relaxed) == point as u64 + 1
        && !CRASHED.swap(true, Ordering::Relaxed)
    {
        match HOW.load(Ordering::Relaxed) {
            PANIC => panic!("as HOLO_CRASH_AT says"),
            ABORT => std::process::abort(),
            _ => spawn::die(),
        }
    }
}

/// From now on a panic of this pager, on whichever thread, is told, counted, and ends it. What it was in the middle
/// of a successor can take up; a process that only looks alive cannot.
pub(crate) fn die_of_panics(control: Control) {
    let others = std::panic::take_hook();
    let me = spawn::own_pid();
    std::panic::set_hook(Box::new(move |info| {
        // In a guardian that this pager started: a tracer must not be cut off (see `guardian.rs`).
        if spawn::own_pid() != me {
            others(info);
            return;
        }
        if PANICKED.swap(true, Ordering::Relaxed) {
            // Another thread's: that one tells, and ends both.
            loop {
                std::thread::park();
            }
        }
        control.add(Scalar::Panics, 1);
        // No more than a pipe takes at once.
        let what: String = info.to_string().replace('\n', " ");
        let what: String = what.chars().take(MESSAGE_MOST).collect();
        // Not as Rust does it, which would wait for a pipe that nobody reads.
        console::message(
            control,
            &format!("the pager ends because of a fault of its own: {what}"),
        );
        spawn::die();
    }));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_crash_is_a_point_and_how_it_dies_there() {
        let point = CrashPoint::Staged;
        assert_eq!(Crash::parse("staged"), Some(Crash::Kill(point)));
        assert_eq!(Crash::parse("panic:staged"), Some(Crash::Panic(point)));
        assert_eq!(Crash::parse("panics:staged"), Some(Crash::Panics(point)));
        assert_eq!(Crash::parse("aborts:staged"), Some(Crash::Aborts(point)));
        for wrong in ["", "panic:", "panic", "stage", "dies:staged"] {
            assert_eq!(Crash::parse(wrong), None, "{wrong:?}");
        }
    }
}
