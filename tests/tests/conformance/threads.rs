//! Memory that the kernel itself writes with faults forbidden, and so does not wait for.

use holo_pager::sys::mem::TargetMem;
use holo_pager::sys::uffd::Uffd;
use holo_proto::{Addr, AddrRange};

use crate::agent::{A, Agent};
use crate::support::{PLAIN, bounded, is_silent, next_fault, sub, wait_readable, within, word};

const PRIVATE: i32 = 128;
const WAIT: i32 = PRIVATE;
const LOCK_PI: i32 = 6 | PRIVATE;
const UNLOCK_PI: i32 = 7 | PRIVATE;

fn futex(agent: &Agent, at: Addr, operation: i32) -> i64 {
    agent.call(libc::SYS_futex, &[at.0, word(operation), 0, 0, 0, 0])
}

/// Four bytes as whoever may see them without touching them.
fn word_at(agent: &Agent, at: Addr) -> u32 {
    let mut bytes = [0; 4];
    let mem = TargetMem::open(agent.pid).unwrap();
    assert_eq!(mem.read(at, &mut bytes), Ok(4));
    u32::from_le_bytes(bytes)
}

/// A page with a thread's id, which the kernel clears when the thread ends.
fn page_with_tid() -> (Agent, Uffd, AddrRange, i64) {
    let agent = Agent::start();
    let (uffd, _) = agent.uffd();
    let page = agent.map(1);
    agent.fill(page, 0);
    let tid = agent.run(A, &format!("thread_with_tid_at {}", page.start));
    assert_eq!(i64::from(word_at(&agent, page.start)), tid);
    (agent, uffd, page, tid)
}

fn end_thread(agent: &Agent, tid: i64) {
    agent.run(A, "end_threads");
    within("the thread's end", || {
        (!agent.has_thread(tid)).then_some(())
    });
}

#[test]
fn the_end_of_a_thread_clears_its_id_on_a_present_page() {
    let _bound = bounded();
    let (agent, uffd, page, tid) = page_with_tid();
    uffd.register(page).unwrap();
    end_thread(&agent, tid);
    assert_eq!(word_at(&agent, page.start), 0);
}

#[test]
fn the_end_of_a_thread_does_not_clear_its_id_on_a_protected_page() {
    let _bound = bounded();
    let (agent, uffd, page, tid) = page_with_tid();
    uffd.register(page).unwrap();
    uffd.protect(page).unwrap();
    end_thread(&agent, tid);
    // Whoever joins it waits for ever: nobody is asked, and nothing is done later.
    assert!(is_silent(&uffd));
    uffd.unprotect(page, true).unwrap();
    assert_eq!(i64::from(word_at(&agent, page.start)), tid);
}

#[test]
fn the_end_of_a_thread_does_not_clear_its_id_on_a_missing_page() {
    let _bound = bounded();
    let (agent, uffd, page, tid) = page_with_tid();
    let kept = word_at(&agent, page.start);
    assert_eq!(agent.madvise(page, libc::MADV_DONTNEED), 0);
    uffd.register(page).unwrap();
    end_thread(&agent, tid);
    assert!(is_silent(&uffd));
    let mut bytes = [0; 4096];
    bytes[..4].copy_from_slice(&kept.to_le_bytes());
    uffd.copy(page.start, &bytes, PLAIN).unwrap();
    assert_eq!(i64::from(word_at(&agent, page.start)), tid);
}

#[test]
fn a_lock_with_inheritance_fails_on_a_protected_or_missing_page() {
    let _bound = bounded();
    let agent = Agent::start();
    let (uffd, _) = agent.uffd();
    let range = agent.map(16);
    let fault = -i64::from(libc::EFAULT);
    let (plain, protected, held, missing) = (
        sub(range, 0, 1),
        sub(range, 1, 1),
        sub(range, 2, 1),
        sub(range, 3, 1),
    );
    for page in [plain, protected, held] {
        agent.fill(page, 0);
    }
    uffd.register(range).unwrap();
    assert_eq!(futex(&agent, plain.start, LOCK_PI), 0);
    assert_eq!(futex(&agent, plain.start, UNLOCK_PI), 0);
    assert_eq!(futex(&agent, held.start, LOCK_PI), 0);
    uffd.protect(protected).unwrap();
    uffd.protect(held).unwrap();
    assert_eq!(futex(&agent, protected.start, LOCK_PI), fault);
    assert_eq!(futex(&agent, held.start, UNLOCK_PI), fault);
    assert_eq!(futex(&agent, missing.start, LOCK_PI), fault);
    assert!(is_silent(&uffd));
    // It can be done again where it was left.
    uffd.unprotect(range, true).unwrap();
    assert_eq!(futex(&agent, held.start, UNLOCK_PI), 0);
    assert_eq!(futex(&agent, protected.start, LOCK_PI), 0);
}

#[test]
fn an_ordinary_futex_waits_for_its_page() {
    let _bound = bounded();
    let agent = Agent::start();
    let (uffd, _) = agent.uffd();
    let page = agent.map(1);
    uffd.register(page).unwrap();
    let wait = agent.begin_call(A, libc::SYS_futex, &[page.start.0, word(WAIT), 1, 0, 0, 0]);
    wait_readable(&uffd);
    assert!(!wait.is_done());
    assert_eq!(next_fault(&uffd), (page.start, false));
    uffd.zero(page, true).unwrap();
    // The word is 0 and not the 1 that it was to be.
    assert_eq!(wait.finish(), -i64::from(libc::EAGAIN));
}
