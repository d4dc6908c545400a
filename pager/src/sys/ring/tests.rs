use super::super::advise::pageout;
use super::super::pagemap::Pagemap;
use super::super::testing::{Target, drain_cpu_lists, next_event, within};
use super::super::uffd::{CopyMode, Event};
use super::*;
use holo_proto::SubpageMask;

fn present(target: &Target, range: AddrRange) -> SubpageMask {
    let pagemap = Pagemap::open(target.pid).unwrap();
    pagemap.look_page(range.start.page()).unwrap().present
}

/// Puts one request in and waits for its end.
fn advise(ring: &mut AdviceRing, range: AddrRange, advice: Advice) -> i32 {
    ring.submit(range, advice, 77).unwrap();
    ring.wake_if_needed().unwrap();
    let done = within("the advice", || ring.reap());
    assert_eq!(done.tag, 77);
    done.result
}

/// Asks for the reclaim of `range`; says what is left.
fn reclaim(target: &Target, range: AddrRange) -> SubpageMask {
    for _ in 0..3 {
        drain_cpu_lists();
        assert_eq!(pageout(&target.pidfd, &[range]), Ok(range.len()));
    }
    present(target, range)
}

/// Gives memory to `range` in a way that a FREE can act on.
fn fill(target: &mut Target, range: AddrRange, value: u8) {
    target.fill(range, value);
    drain_cpu_lists();
}

#[test]
fn freed_clean_pages_are_dropped_from_outside_and_written_ones_stay() {
    let mut target = Target::start();
    let mut ring = target.ring();
    let range = target.map(16);
    fill(&mut target, range, 1);
    // Without the FREE nothing goes: there is no other copy of these bytes.
    assert_eq!(reclaim(&target, range), SubpageMask::ALL);
    drain_cpu_lists();
    assert_eq!(advise(&mut ring, range, Advice::Free), 0);
    assert_eq!(present(&target, range), SubpageMask::ALL);
    target.poke(range.start.offset(5 * 4096 + 1), 2);
    assert_eq!(reclaim(&target, range), SubpageMask::one(5));
    // The rest of the written page is as it was, the others read zero.
    assert_eq!(target.peek(range.start.offset(5 * 4096)), 1);
    assert_eq!(target.peek(range.start.offset(5 * 4096 + 1)), 2);
    assert_eq!(target.peek(range.start.offset(4 * 4096)), 0);
    // Reading does not make a page stay.
    let other = target.map(16);
    fill(&mut target, other, 1);
    assert_eq!(advise(&mut ring, other, Advice::Free), 0);
    assert_eq!(target.peek(other.start), 1);
    assert_eq!(reclaim(&target, other), SubpageMask::NONE);
}

#[test]
fn populate_write_after_free_makes_pages_stay() {
    let mut target = Target::start();
    let mut ring = target.ring();
    let range = target.map(16);
    fill(&mut target, range, 9);
    assert_eq!(advise(&mut ring, range, Advice::Free), 0);
    let half = AddrRange::new(range.start.0, range.start.0 + 8 * 4096);
    assert_eq!(advise(&mut ring, half, Advice::PopulateWrite), 0);
    assert_eq!(reclaim(&target, range), SubpageMask(0x00ff));
    for i in 0..8 {
        assert_eq!(target.peek(range.start.offset(i * 4096)), 9);
    }
}

#[test]
fn populate_read_after_free_does_not_make_pages_stay() {
    let mut target = Target::start();
    let mut ring = target.ring();
    let range = target.map(16);
    fill(&mut target, range, 9);
    assert_eq!(advise(&mut ring, range, Advice::Free), 0);
    assert_eq!(advise(&mut ring, range, Advice::PopulateRead), 0);
    assert_eq!(reclaim(&target, range), SubpageMask::NONE);
}

#[test]
fn populate_write_on_a_missing_served_page_waits_for_us() {
    let mut target = Target::start();
    let mut ring = target.ring();
    let uffd = target.uffd();
    let range = target.map(16);
    uffd.register(range).unwrap();
    ring.submit(range, Advice::PopulateWrite, 5).unwrap();
    ring.wake_if_needed().unwrap();
    let mode = CopyMode {
        wake: true,
        protect: false,
    };
    for i in 0..16 {
        let event = next_event(&uffd);
        let Event::Fault {
            at,
            write: true,
            protect: false,
            thread,
        } = event
        else {
            panic!("{event:?}");
        };
        assert_eq!(at, range.start.offset(i * 4096));
        // A worker of the ring, not the program.
        assert_ne!(Ok(thread), u32::try_from(target.pid));
        assert_eq!(ring.peek(), None);
        assert_eq!(ring.outstanding(), 1);
        uffd.copy(at, &[4; 4096], mode).unwrap();
    }
    assert_eq!(
        within("the populate", || ring.reap()),
        Done { tag: 5, result: 0 }
    );
    assert_eq!(target.peek(range.start.offset(4096)), 4);
}

#[test]
fn a_free_waits_until_its_remove_event_is_read() {
    let mut target = Target::start();
    let mut ring = target.ring();
    let uffd = target.uffd();
    let range = target.map(16);
    fill(&mut target, range, 1);
    uffd.register(range).unwrap();
    ring.submit(range, Advice::Free, 1).unwrap();
    ring.wake_if_needed().unwrap();
    assert_eq!(next_event(&uffd), Event::Remove(range));
    assert_eq!(within("the free", || ring.reap()).result, 0);
}

#[test]
fn an_unmapped_range_is_an_error_with_its_tag() {
    let mut target = Target::start();
    let mut ring = target.ring();
    let range = target.map(1);
    let beyond = AddrRange::new(range.end.0, range.end.0 + 4096);
    assert_eq!(advise(&mut ring, beyond, Advice::Free), -libc::ENOMEM);
}

#[test]
fn a_full_ring_refuses_and_loses_nothing() {
    let mut target = Target::start();
    let mut ring = target.ring();
    let range = target.map(16);
    fill(&mut target, range, 1);
    let cq = ring.params.cq_entries();
    let mut submitted = 0_u32;
    // Nothing is reaped, so the room for completions is the limit, also when the thread has taken all.
    within("a full ring", || {
        while ring
            .submit(range, Advice::Cold, u64::from(submitted))
            .is_ok()
        {
            submitted += 1;
        }
        ring.wake_if_needed().unwrap();
        let words = ring.words().unwrap();
        let taken = words.sq_head.load(Ordering::Acquire);
        (submitted >= cq && taken == words.sq_tail.load(Ordering::Relaxed)).then_some(())
    });
    assert_eq!(submitted, cq);
    assert_eq!(ring.outstanding(), cq);
    assert_eq!(ring.submit(range, Advice::Cold, 0), Err(RingFull));
    let mut tags: Vec<_> = (0..cq)
        .map(|_| within("a completion", || ring.reap()).tag)
        .collect();
    tags.sort_unstable();
    assert_eq!(tags, (0..u64::from(cq)).collect::<Vec<_>>());
    assert_eq!((ring.outstanding(), ring.reap()), (0, None));
}

#[test]
fn a_successor_finds_what_its_predecessor_left() {
    let mut target = Target::start();
    let mut ring = target.ring();
    let uffd = target.uffd();
    let (free, missing) = (target.map(16), target.map(1));
    fill(&mut target, free, 1);
    uffd.register(missing).unwrap();
    // One request done and not taken out, one that waits for a page.
    ring.submit(free, Advice::Free, 1).unwrap();
    ring.wake_if_needed().unwrap();
    within("the free", || ring.peek());
    ring.submit(missing, Advice::PopulateRead, 2).unwrap();
    ring.wake_if_needed().unwrap();
    let _ = next_event(&uffd);
    let params = *ring.params();
    let fd = ring.as_fd().try_clone_to_owned().unwrap();
    drop(ring);
    let mut ring = AdviceRing::map(fd, &params).unwrap();
    assert_eq!(ring.outstanding(), 2);
    assert_eq!(ring.reap(), Some(Done { tag: 1, result: 0 }));
    assert_eq!((ring.peek(), ring.outstanding()), (None, 1));
    uffd.zero(missing, true).unwrap();
    assert_eq!(
        within("the populate", || ring.reap()),
        Done { tag: 2, result: 0 }
    );
    assert_eq!(ring.outstanding(), 0);
    assert_eq!(advise(&mut ring, free, Advice::DontNeed), 0);
    assert_eq!(present(&target, free), SubpageMask::NONE);
}

#[test]
fn a_sleeping_ring_is_woken() {
    let mut target = Target::start();
    let mut ring = target.ring();
    let range = target.map(1);
    for _ in 0..3 {
        // Longer than its idle time.
        within("the ring's sleep", || {
            let flags = ring.words().unwrap().sq_flags.load(Ordering::Relaxed);
            (flags & SQ_NEED_WAKEUP != 0).then_some(())
        });
        fill(&mut target, range, 1);
        assert_eq!(advise(&mut ring, range, Advice::DontNeed), 0);
        assert_eq!(target.peek(range.start), 0);
    }
}

#[test]
fn parameters_that_make_no_sense_are_refused() {
    let mut target = Target::start();
    let ring = target.ring();
    let fd = || ring.as_fd().try_clone_to_owned().unwrap();
    let good = *ring.params();
    assert!(AdviceRing::map(fd(), &good).is_ok());
    for (word, bits) in [
        (0, u64::from(u32::MAX)),
        (1, 2),
        (1, 1 << 10),
        (5, u64::MAX),
    ] {
        let mut bad = good;
        bad.0[word] ^= bits;
        assert!(AdviceRing::map(fd(), &bad).is_err(), "word {word}");
    }
}
