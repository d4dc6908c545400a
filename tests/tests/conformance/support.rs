//! What is asked of the kernel about an agent: messages, pages, advice.

use std::fs;
use std::os::fd::AsFd as _;
use std::sync::atomic::AtomicU64;
use std::thread;
use std::time::{Duration, Instant};

use holo_pager::sys::advise::pageout;
use holo_pager::sys::errors::UffdError;
use holo_pager::sys::pagemap::{PageLook, Pagemap};
use holo_pager::sys::ring::{Advice, AdviceRing};
use holo_pager::sys::uffd::{CopyMode, EVENT_WORDS, Event, Uffd};
use holo_pager::sys::{spawn, table};
use holo_proto::{Addr, AddrRange, SUBPAGE_BYTES, SubpageMask};
use holo_tests::watchdog::{Guard, Watchdog, give_up};

use crate::agent::{Agent, Step};

/// Longer than any single step takes unless it hangs.
const STEP_BOUND: Duration = Duration::from_secs(20);
/// Longer than any test takes unless it hangs.
const TEST_BOUND: Duration = Duration::from_secs(90);
/// Long enough for what is not to happen to happen if it could.
pub(crate) const MOMENT: Duration = Duration::from_millis(200);
/// Reclaims of one range: one may find a page in somebody else's hands for a moment.
const RECLAIMS: usize = 3;

pub(crate) const PLAIN: CopyMode = CopyMode {
    wake: true,
    protect: false,
};

/// Bounds the test that calls it: when the bound is over, everything is described and killed.
pub(crate) fn bounded() -> Guard {
    let name = thread::current().name().unwrap_or("a test").to_owned();
    Watchdog::guard(&name, TEST_BOUND)
}

/// Waits for something that has to come.
#[track_caller]
pub(crate) fn within<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let since = Instant::now();
    loop {
        if let Some(found) = look() {
            return found;
        }
        if since.elapsed() >= STEP_BOUND {
            give_up(&format!("waited too long for {what}"));
        }
        thread::sleep(Duration::from_micros(200));
    }
}

/// The subpages `first..first + count` of a range.
pub(crate) fn sub(range: AddrRange, first: u64, count: u64) -> AddrRange {
    let start = range.start.0 + first * SUBPAGE_BYTES;
    AddrRange::new(start, start + count * SUBPAGE_BYTES)
}

/// A number as a word of a system call.
pub(crate) fn word(number: impl Into<i64>) -> u64 {
    number.into().cast_unsigned()
}

// --- userfaultfd ---------------------------------------------------------------------------------

/// Waits until a message can be read, and leaves it there.
#[track_caller]
pub(crate) fn wait_readable(uffd: &Uffd) {
    within("a message", || (!is_silent(uffd)).then_some(()));
}

/// Nothing can be read now.
pub(crate) fn is_silent(uffd: &Uffd) -> bool {
    spawn::poll_readable(&[uffd.as_raw_fd()], Some(0)) == 0
}

/// All messages that one read brings, at most eight.
pub(crate) fn read_many(uffd: &Uffd) -> Vec<Event> {
    let slots: [AtomicU64; 8 * EVENT_WORDS] = [const { AtomicU64::new(0) }; 8 * EVENT_WORDS];
    let count = uffd.read_events(&slots).unwrap();
    let words = slots.map(AtomicU64::into_inner);
    words
        .chunks(EVENT_WORDS)
        .take(count)
        .map(|message| Event::decode(message.try_into().unwrap()).unwrap())
        .collect()
}

/// Waits for the next message and reads it alone.
#[track_caller]
pub(crate) fn next_event(uffd: &Uffd) -> Event {
    wait_readable(uffd);
    let slots: [AtomicU64; EVENT_WORDS] = [const { AtomicU64::new(0) }; EVENT_WORDS];
    assert_eq!(uffd.read_events(&slots), Ok(1));
    Event::decode(&slots.map(AtomicU64::into_inner)).unwrap()
}

/// Waits for the next message, which has to be a fault: where, and whether at a protected page.
#[track_caller]
pub(crate) fn next_fault(uffd: &Uffd) -> (Addr, bool) {
    let event = next_event(uffd);
    let Event::Fault { at, protect, .. } = event else {
        panic!("{event:?} where a fault was expected");
    };
    (at, protect)
}

/// Reads every message until a step is done.
#[track_caller]
pub(crate) fn read_until_done(uffd: &Uffd, step: &Step<'_>) -> Vec<Event> {
    let mut seen = Vec::new();
    within("the end of a step", || {
        seen.extend(read_many(uffd));
        step.is_done().then_some(())
    });
    seen
}

/// Repeats a call that was refused because who sent a message has not run since it was read.
#[track_caller]
pub(crate) fn settled<T>(mut call: impl FnMut() -> Result<T, UffdError>) -> Result<T, UffdError> {
    within("messages to settle", || match call() {
        Err(UffdError::EventsPending) => None,
        other => Some(other),
    })
}

/// The descriptor that a fork's message named.
#[track_caller]
pub(crate) fn descriptor_of(event: Event) -> Uffd {
    let Event::Fork { fd } = event else {
        panic!("{event:?} where a fork was expected");
    };
    // The number may have been claimed, and closed, by an earlier test.
    table::unclaim(fd);
    Uffd::from_owned(table::claim(fd).expect("the message's descriptor is open"))
}

/// Waits until so many faults can be read.
#[track_caller]
pub(crate) fn wait_for_faults(uffd: &Uffd, count: u64) {
    let path = format!("/proc/self/fdinfo/{}", uffd.as_raw_fd());
    within("faults", || {
        let info = fs::read_to_string(&path).unwrap();
        let unread = info.lines().find_map(|line| line.strip_prefix("pending:"));
        (unread.unwrap().trim().parse() == Ok(count)).then_some(())
    });
}

/// A new descriptor of ours for a userfaultfd.
pub(crate) fn another(uffd: &Uffd) -> Uffd {
    Uffd::from_owned(uffd.as_fd().try_clone_to_owned().unwrap())
}

// --- memory --------------------------------------------------------------------------------------

pub(crate) fn look(agent: &Agent, range: AddrRange) -> PageLook {
    Pagemap::open(agent.pid)
        .unwrap()
        .look_page(range.start.page())
        .unwrap()
}

/// What is present of the page that begins with `range`.
pub(crate) fn present(agent: &Agent, range: AddrRange) -> SubpageMask {
    look(agent, range).present
}

/// Present subpages of a range of any length.
pub(crate) fn present_count(agent: &Agent, range: AddrRange) -> usize {
    let mut raw = vec![0; range.subpages().count()];
    let pagemap = Pagemap::open(agent.pid).unwrap();
    pagemap.look_range(range, &mut raw).unwrap();
    raw.iter().filter(|&&entry| entry >> 63 == 1).count()
}

/// Puts one request into a ring and waits for its end.
#[track_caller]
pub(crate) fn advise(ring: &mut AdviceRing, range: AddrRange, advice: Advice) -> i32 {
    ring.submit(range, advice, 1).unwrap();
    ring.wake_if_needed().unwrap();
    within("the advice", || ring.reap()).result
}

/// The same for a range that `uffd` serves: reads the messages meanwhile.
#[track_caller]
pub(crate) fn advise_served(
    ring: &mut AdviceRing,
    uffd: &Uffd,
    range: AddrRange,
    advice: Advice,
) -> (i32, Vec<Event>) {
    ring.submit(range, advice, 1).unwrap();
    ring.wake_if_needed().unwrap();
    let mut seen = Vec::new();
    let done = within("the advice", || {
        seen.extend(read_many(uffd));
        ring.reap()
    });
    (done.result, seen)
}

/// Asks for the reclaim of a range from outside, thoroughly; says what is left of its page.
#[track_caller]
pub(crate) fn reclaim(agent: &Agent, range: AddrRange) -> SubpageMask {
    for _ in 0..RECLAIMS {
        agent.drain();
        assert_eq!(pageout(&agent.pidfd, &[range]), Ok(range.len()));
    }
    // What stayed was given back by way of a CPU's list, where a later FREE would not find it.
    agent.drain();
    present(agent, range)
}
