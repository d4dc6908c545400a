//! What installing pages and protecting them does beyond the single call.

use holo_pager::sys::errors::UffdError;
use holo_pager::sys::ring::Advice;
use holo_pager::sys::uffd::Event;
use holo_proto::SubpageMask;

use crate::agent::{A, Agent, B};
use crate::support::{
    PLAIN, advise_served, bounded, is_silent, look, next_fault, present, read_until_done, reclaim,
    settled, sub, wait_for_faults,
};

#[test]
fn copied_pages_stay_at_a_reclaim_until_they_are_freed() {
    let _bound = bounded();
    let agent = Agent::start();
    let (uffd, _) = agent.uffd();
    let range = agent.map(16);
    uffd.register(range).unwrap();
    uffd.copy(range.start, &[7; 65536], PLAIN).unwrap();
    assert_eq!(reclaim(&agent, range), SubpageMask::ALL);
    assert!(agent.holds(range, 7));
    let mut ring = agent.ring();
    let (result, _) = advise_served(&mut ring, &uffd, range, Advice::Free);
    assert_eq!(result, 0);
    assert_eq!(reclaim(&agent, range), SubpageMask::NONE);
    // And so again for what is installed in their place, with no write of the program in between.
    uffd.copy(range.start, &[8; 65536], PLAIN).unwrap();
    assert_eq!(reclaim(&agent, range), SubpageMask::ALL);
    assert!(agent.holds(range, 8));
}

#[test]
fn zero_pages_are_neither_freed_nor_reclaimed() {
    let _bound = bounded();
    let agent = Agent::start();
    let (uffd, _) = agent.uffd();
    let range = agent.map(16);
    uffd.register(range).unwrap();
    uffd.zero(range, true).unwrap();
    let mut ring = agent.ring();
    let (result, seen) = advise_served(&mut ring, &uffd, range, Advice::Free);
    assert_eq!((result, seen), (0, vec![Event::Remove(range)]));
    assert_eq!(reclaim(&agent, range), SubpageMask::ALL);
    assert_eq!(look(&agent, range).zero, SubpageMask::ALL);
}

#[test]
fn a_write_to_a_protected_zero_page_waits() {
    let _bound = bounded();
    let agent = Agent::start();
    let (uffd, _) = agent.uffd();
    let range = agent.map(16);
    uffd.register(range).unwrap();
    uffd.zero(range, true).unwrap();
    uffd.protect(range).unwrap();
    assert_eq!(look(&agent, range).protected, SubpageMask::ALL);
    let poke = agent.begin_poke(A, range.start, 3);
    assert_eq!(next_fault(&uffd), (range.start, true));
    uffd.unprotect(range, true).unwrap();
    poke.finish();
    assert_eq!(look(&agent, range).zero, SubpageMask::ALL.without(0));
}

#[test]
fn one_install_wakes_every_thread_that_waits_for_the_page() {
    let _bound = bounded();
    let agent = Agent::start();
    let (uffd, _) = agent.uffd();
    let range = agent.map(16);
    uffd.register(range).unwrap();
    let steps: Vec<_> = (A..=4)
        .map(|thread| agent.begin_peek(thread, range.start.offset(5)))
        .collect();
    wait_for_faults(&uffd, 4);
    // Served after one of the four faults was read; the others are not delivered any more.
    assert_eq!(next_fault(&uffd), (range.start, false));
    uffd.copy(range.start, &[6; 4096], PLAIN).unwrap();
    for step in steps {
        assert_eq!(step.finish(), 6);
    }
    assert!(is_silent(&uffd));
}

#[test]
fn protection_goes_over_splits_and_holes_and_stops_at_a_mapping_that_is_not_served() {
    let _bound = bounded();
    let agent = Agent::start();
    let (uffd, _) = agent.uffd();
    let range = agent.served(&uffd, 16);
    agent.protect(sub(range, 2, 2), libc::PROT_READ);
    let hole = sub(range, 6, 2);
    let unmap = agent.begin_unmap(A, hole);
    assert_eq!(read_until_done(&uffd, &unmap), [Event::Unmap(hole)]);
    assert_eq!(settled(|| uffd.protect(range)), Ok(()));
    let all = SubpageMask(0xff3f);
    assert_eq!(look(&agent, range).protected, all);
    assert_eq!(uffd.unprotect(range, true), Ok(()));
    assert_eq!(look(&agent, range).protected, SubpageMask::NONE);
    // Nothing but a hole is an error, however.
    assert_eq!(uffd.protect(hole), Err(UffdError::EdgeOfMapping));
    uffd.unregister(sub(range, 12, 2)).unwrap();
    assert_eq!(uffd.protect(range), Err(UffdError::EdgeOfMapping));
    // Done up to it, and not behind.
    assert_eq!(look(&agent, range).protected, SubpageMask(0x0f3f));
}

#[test]
fn protecting_a_missing_page_leaves_no_trace() {
    let _bound = bounded();
    let agent = Agent::start();
    let (uffd, _) = agent.uffd();
    let range = agent.map(16);
    agent.poke(range.start, 1);
    uffd.register(range).unwrap();
    uffd.protect(range).unwrap();
    assert_eq!(look(&agent, range).protected, SubpageMask::one(0));
    let at = sub(range, 1, 1).start;
    let poke = agent.begin_poke(A, at, 9);
    assert_eq!(next_fault(&uffd), (at, false));
    uffd.copy(at, &[2; 4096], PLAIN).unwrap();
    // The write goes through at once.
    poke.finish();
    assert!(is_silent(&uffd));
    assert_eq!(agent.peek(at), 9);
}

#[test]
fn pages_are_installed_and_protected_whatever_the_program_may_do_there() {
    let _bound = bounded();
    let agent = Agent::start();
    let (uffd, _) = agent.uffd();
    for prot in [libc::PROT_NONE, libc::PROT_READ] {
        let range = agent.map(16);
        uffd.register(range).unwrap();
        agent.protect(range, prot);
        uffd.copy(range.start, &[7; 65536], PLAIN).unwrap();
        uffd.protect(range).unwrap();
        assert_eq!(look(&agent, range).protected, SubpageMask::ALL);
        uffd.unprotect(range, true).unwrap();
        agent.protect(range, libc::PROT_READ | libc::PROT_WRITE);
        assert!(agent.holds(range, 7));
        agent.poke(range.start, 1);
    }
}

#[test]
fn letting_go_lifts_protection_and_wakes_who_waits() {
    let _bound = bounded();
    let agent = Agent::start();
    let (uffd, _) = agent.uffd();
    let range = agent.map(16);
    agent.fill(sub(range, 0, 8), 1);
    uffd.register(range).unwrap();
    uffd.protect(range).unwrap();
    let poke = agent.begin_poke(A, range.start, 2);
    let peek = agent.begin_peek(B, sub(range, 9, 1).start);
    wait_for_faults(&uffd, 2);
    uffd.unregister(range).unwrap();
    poke.finish();
    // A page that was not put back reads zero from now on: everything has to be there before.
    assert_eq!(peek.finish(), 0);
    assert_eq!(look(&agent, range).protected, SubpageMask::NONE);
    assert_eq!(
        present(&agent, range).minus(SubpageMask(0x02ff)),
        SubpageMask::NONE
    );
}
