use super::super::arena::SharedWords;
use super::super::pagemap::Pagemap;
use super::super::testing::{Target, next_event, pin_to_cpu, wait_readable, within};
use super::*;
use holo_proto::SUBPAGE_BYTES;
use std::os::fd::FromRawFd;
use std::sync::atomic::Ordering;

const WAKE_PLAIN: CopyMode = CopyMode {
    wake: true,
    protect: false,
};

fn sub(range: AddrRange, first: u64, count: u64) -> AddrRange {
    let start = range.start.0 + first * SUBPAGE_BYTES;
    AddrRange::new(start, start + count * SUBPAGE_BYTES)
}

/// Repeats a call that pending events hold up, as long as no event is left to read.
fn settled<T>(mut call: impl FnMut() -> Result<T, UffdError>) -> Result<T, UffdError> {
    within("events to settle", || match call() {
        Err(UffdError::EventsPending) => None,
        other => Some(other),
    })
}

#[test]
fn a_missing_page_is_served_and_the_thread_goes_on() {
    let mut target = Target::start();
    let uffd = target.uffd();
    let range = target.map(16);
    uffd.register(range).unwrap();
    target.begin_peek(range.start.offset(5000));
    let event = next_event(&uffd);
    let thread = u32::try_from(target.pid).unwrap();
    assert_eq!(
        event,
        Event::Fault {
            at: range.start.offset(4096),
            write: false,
            protect: false,
            thread,
        }
    );
    assert!(!target.is_done());
    uffd.copy(range.start, &[7; 65536], WAKE_PLAIN).unwrap();
    assert_eq!(target.finish(), 7);
    // The neighbours came along: no further event.
    assert_eq!(target.peek(Addr(range.end.0 - 1)), 7);
    assert_eq!(uffd.read_events(&[const { AtomicU64::new(0) }; 4]), Ok(0));
}

#[test]
fn a_write_to_a_protected_page_waits_until_unprotected() {
    let mut target = Target::start();
    let uffd = target.uffd();
    let range = target.map(16);
    target.fill(range, 1);
    uffd.register(range).unwrap();
    uffd.protect(range).unwrap();
    assert_eq!(target.peek(range.start), 1);
    target.begin_poke(range.start.offset(0x3010), 2);
    let event = next_event(&uffd);
    let Event::Fault {
        at, write, protect, ..
    } = event
    else {
        panic!("{event:?}");
    };
    assert_eq!(
        (at, write, protect),
        (range.start.offset(0x3000), true, true)
    );
    uffd.unprotect(range, false).unwrap();
    assert!(!target.is_done());
    uffd.wake(range).unwrap();
    target.finish();
    assert_eq!(target.peek(range.start.offset(0x3010)), 2);
}

#[test]
fn a_page_can_be_installed_protected() {
    let mut target = Target::start();
    let uffd = target.uffd();
    let range = target.map(1);
    uffd.register(range).unwrap();
    let mode = CopyMode {
        wake: false,
        protect: true,
    };
    uffd.copy(range.start, &[3; 4096], mode).unwrap();
    assert_eq!(target.peek(range.start), 3);
    target.begin_poke(range.start, 4);
    assert!(matches!(
        next_event(&uffd),
        Event::Fault {
            write: true,
            protect: true,
            ..
        }
    ));
    uffd.unprotect(range, true).unwrap();
    target.finish();
}

#[test]
fn zero_pages_read_zero_and_take_a_write() {
    let mut target = Target::start();
    let uffd = target.uffd();
    let range = target.map(16);
    uffd.register(range).unwrap();
    target.begin_peek(range.start);
    let _ = next_event(&uffd);
    uffd.zero(range, true).unwrap();
    assert_eq!(target.finish(), 0);
    target.poke(range.start.offset(4096), 9);
    assert_eq!(target.peek(range.start.offset(4096)), 9);
    assert_eq!(uffd.zero(range, true), Err(UffdError::AlreadyThere));
}

#[test]
fn a_fault_that_was_read_is_raised_again_by_wake() {
    let mut target = Target::start();
    let uffd = target.uffd();
    let range = target.map(1);
    uffd.register(range).unwrap();
    target.begin_peek(range.start);
    let first = next_event(&uffd);
    assert_eq!(uffd.read_events(&[const { AtomicU64::new(0) }; 4]), Ok(0));
    uffd.wake(range).unwrap();
    assert_eq!(next_event(&uffd), first);
    uffd.zero(range, true).unwrap();
    target.finish();
}

#[test]
fn a_copy_stops_at_a_page_that_is_there() {
    let mut target = Target::start();
    let uffd = target.uffd();
    let range = target.map(16);
    target.poke(range.start.offset(2 * 4096), 1);
    uffd.register(range).unwrap();
    let bytes = [5; 65536];
    assert_eq!(
        uffd.copy(range.start, &bytes, WAKE_PLAIN),
        Err(UffdError::Partial(8192))
    );
    let rest = sub(range, 2, 14);
    assert_eq!(
        uffd.copy(rest.start, &bytes[8192..], WAKE_PLAIN),
        Err(UffdError::AlreadyThere)
    );
    let rest = sub(range, 3, 13);
    uffd.copy(rest.start, &bytes[3 * 4096..], WAKE_PLAIN)
        .unwrap();
    assert_eq!(target.peek(range.start.offset(2 * 4096)), 1);
    assert_eq!(target.peek(range.start.offset(2 * 4096 + 1)), 0);
    assert_eq!(target.peek(range.start.offset(3 * 4096)), 5);
    // Zeroing tells the same.
    let other = target.map(4);
    target.poke(other.start.offset(4096), 1);
    uffd.register(other).unwrap();
    assert_eq!(uffd.zero(other, false), Err(UffdError::Partial(4096)));
}

#[test]
fn a_copy_over_an_edge_does_nothing() {
    let mut target = Target::start();
    let uffd = target.uffd();
    let range = target.map(16);
    uffd.register(range).unwrap();
    // Past the end of the mapping, and in a mapping that is not served.
    let bytes = [5; 65536];
    let beyond = range.start.offset(8 * 4096);
    assert_eq!(
        uffd.copy(beyond, &bytes, WAKE_PLAIN),
        Err(UffdError::EdgeOfMapping)
    );
    let plain = target.map(16);
    assert_eq!(
        uffd.copy(plain.start, &bytes, WAKE_PLAIN),
        Err(UffdError::EdgeOfMapping)
    );
    assert_eq!(uffd.protect(plain), Err(UffdError::EdgeOfMapping));
    // mprotect splits without an event.
    let part = sub(range, 4, 4);
    let read_only = libc::PROT_READ as u64;
    assert_eq!(
        target.syscall(
            libc::SYS_mprotect,
            [part.start.0, part.len(), read_only, 0, 0]
        ),
        0
    );
    assert_eq!(uffd.read_events(&[const { AtomicU64::new(0) }; 4]), Ok(0));
    assert_eq!(
        uffd.copy(range.start, &bytes, WAKE_PLAIN),
        Err(UffdError::EdgeOfMapping)
    );
    assert_eq!(uffd.zero(range, true), Err(UffdError::EdgeOfMapping));
    for i in 0..16 {
        let one = sub(range, i, 1);
        uffd.copy(one.start, &bytes[..4096], WAKE_PLAIN).unwrap();
        assert_eq!(target.peek(one.start), 5);
    }
}

#[test]
fn only_one_userfaultfd_serves_a_range() {
    let mut target = Target::start();
    let (first, second) = (target.uffd(), target.uffd());
    let range = target.map(16);
    first.register(range).unwrap();
    // Again by the same one is allowed.
    first.register(range).unwrap();
    assert_eq!(second.register(range), Err(UffdError::Busy));
    assert_eq!(second.register(sub(range, 15, 1)), Err(UffdError::Busy));
    first.unregister(range).unwrap();
    second.register(range).unwrap();
    let unmapped = AddrRange::new(range.end.0, range.end.0 + 4096);
    assert_eq!(first.register(unmapped), Err(UffdError::Unsupported));
}

#[test]
fn a_handshake_is_done_once() {
    let mut target = Target::start();
    let uffd = target.uffd();
    assert_eq!(uffd.handshake(), Err(UffdError::Unsupported));
}

#[test]
fn everything_says_gone_after_the_end() {
    let mut target = Target::start();
    let uffd = target.uffd();
    let range = target.map(16);
    uffd.register(range).unwrap();
    target.end();
    let gone = Err(UffdError::Gone);
    assert_eq!(uffd.copy(range.start, &[1; 4096], WAKE_PLAIN), gone);
    assert_eq!(uffd.zero(range, true), gone);
    assert_eq!(uffd.protect(range), gone);
    assert_eq!(uffd.unprotect(range, true), gone);
    assert_eq!(uffd.register(range), gone);
    assert_eq!(uffd.unregister(range), gone);
    assert_eq!(uffd.wake(range), Ok(()));
    assert_eq!(uffd.read_events(&[const { AtomicU64::new(0) }; 4]), Ok(0));
}

#[test]
fn calls_fail_while_an_event_waits_to_be_read() {
    let mut target = Target::start();
    let uffd = target.uffd();
    let range = target.map(32);
    let other = target.map(16);
    target.fill(sub(range, 16, 16), 1);
    target.fill(other, 1);
    uffd.register(range).unwrap();
    uffd.register(other).unwrap();
    let drop_it = sub(range, 16, 16);
    let dontneed = libc::MADV_DONTNEED as u64;
    target.begin_syscall(
        libc::SYS_madvise,
        [drop_it.start.0, drop_it.len(), dontneed, 0, 0],
    );
    wait_readable(&uffd);
    let pending = Err(UffdError::EventsPending);
    assert_eq!(uffd.copy(range.start, &[1; 4096], WAKE_PLAIN), pending);
    assert_eq!(uffd.zero(sub(range, 0, 1), true), pending);
    assert_eq!(uffd.protect(other), pending);
    assert_eq!(uffd.unprotect(other, true), pending);
    // These don't care.
    assert_eq!(uffd.wake(other), Ok(()));
    assert!(!target.is_done());
    assert_eq!(next_event(&uffd), Event::Remove(drop_it));
    assert_eq!(target.finish(), 0);
    settled(|| uffd.copy(range.start, &[1; 4096], WAKE_PLAIN)).unwrap();
}

#[test]
fn an_event_that_was_read_holds_calls_up_until_the_process_ran() {
    let mut target = Target::start();
    let uffd = target.uffd();
    let range = target.map(16);
    let (kept, half) = (sub(range, 0, 1), sub(range, 8, 8));
    target.fill(range, 1);
    uffd.register(range).unwrap();
    let slots = SharedWords::create("test-journal", 512).unwrap();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            // On one CPU, and we go first: the target runs only when we sleep. Other tests' forks can make
            // us sleep on a page fault, so a round may fail to show it.
            pin_to_cpu(target.pid, 0);
            pin_to_cpu(0, 0);
            go_first();
            within("a round without a sleep", || {
                let dontneed = libc::MADV_DONTNEED as u64;
                target.begin_syscall(
                    libc::SYS_madvise,
                    [half.start.0, half.len(), dontneed, 0, 0],
                );
                wait_readable(&uffd);
                let read = uffd.read_events(slots.words());
                let at_once: [_; 20] = std::array::from_fn(|_| uffd.protect(kept));
                let nothing = uffd.read_events(slots.words());
                assert_eq!((read, nothing), (Ok(1), Ok(0)));
                assert_eq!(settled(|| uffd.protect(kept)), Ok(()));
                assert_eq!(target.finish(), 0);
                (at_once == [Err(UffdError::EventsPending); 20]).then_some(())
            });
        });
    });
}

fn go_first() {
    let param = libc::sched_param { sched_priority: 1 };
    // SAFETY: a valid structure, read during the call.
    let r = unsafe { libc::sched_setscheduler(0, libc::SCHED_FIFO, &raw const param) };
    assert_eq!(r, 0, "real-time scheduling needs root");
}

#[test]
fn several_messages_come_in_one_read_into_the_given_words() {
    let mut target = Target::start();
    let uffd = target.uffd();
    let range = target.map(16);
    uffd.register(range).unwrap();
    let mut threads = Vec::new();
    for i in 0..3 {
        let tid = target.peek_by_thread(range.start.offset(i * 4096));
        threads.push((range.start.offset(i * 4096), u32::try_from(tid).unwrap()));
    }
    let journal = SharedWords::create("test-journal", 64).unwrap();
    let slots = &journal.words()[8..8 + 3 * EVENT_WORDS + 2];
    let mut got = 0;
    within("three faults", || {
        got += uffd.read_events(&slots[got * EVENT_WORDS..]).unwrap();
        (got == 3).then_some(())
    });
    let mut seen: Vec<_> = (0..3)
        .map(|i| {
            let message =
                std::array::from_fn(|k| slots[i * EVENT_WORDS + k].load(Ordering::Relaxed));
            match Event::decode(&message) {
                Some(Event::Fault { at, thread, .. }) => (at, thread),
                other => panic!("{other:?}"),
            }
        })
        .collect();
    seen.sort_unstable();
    threads.sort_unstable();
    assert_eq!(seen, threads);
    // Nothing before or behind was touched, and a successor's mapping sees the same.
    let again = SharedWords::from_fd(
        std::os::fd::AsFd::as_fd(&journal)
            .try_clone_to_owned()
            .unwrap(),
    )
    .unwrap();
    let words: Vec<_> = again
        .words()
        .iter()
        .map(|w| w.load(Ordering::Relaxed))
        .collect();
    assert!(words[..8].iter().chain(&words[20..]).all(|&w| w == 0));
    assert_ne!(words[8], 0);
    assert_eq!(Event::decode(&[0; 4]), None);
    uffd.zero(range, true).unwrap();
}

#[test]
fn room_for_no_message_is_an_error_not_a_loss() {
    let mut target = Target::start();
    let uffd = target.uffd();
    let range = target.map(1);
    uffd.register(range).unwrap();
    target.begin_peek(range.start);
    wait_readable(&uffd);
    let short = [const { AtomicU64::new(0) }; 3];
    assert_eq!(uffd.read_events(&short), Err(UffdError::Unsupported));
    assert!(matches!(next_event(&uffd), Event::Fault { .. }));
    uffd.zero(range, true).unwrap();
}

#[test]
fn moves_unmaps_and_drops_are_told() {
    let mut target = Target::start();
    let uffd = target.uffd();
    let range = target.map(16);
    target.fill(range, 1);
    uffd.register(range).unwrap();
    let to = range.start.0 + (1 << 30);
    let flags = (libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED) as u64;
    target.begin_syscall(
        libc::SYS_mremap,
        [range.start.0, range.len(), range.len(), flags, to],
    );
    // The move also unmaps the old place; the order is the kernel's.
    let mut seen = Vec::new();
    within("the move", || {
        let slots = [const { AtomicU64::new(0) }; EVENT_WORDS];
        if uffd.read_events(&slots).unwrap() == 1 {
            seen.push(Event::decode(&slots.map(AtomicU64::into_inner)).unwrap());
        }
        target.is_done().then_some(())
    });
    assert_eq!(target.finish(), i64::try_from(to).unwrap());
    assert!(
        seen.contains(&Event::Remap {
            from: range.start,
            to: Addr(to),
            len: range.len()
        }),
        "{seen:?}"
    );
    let moved = AddrRange::new(to, to + range.len());
    target.begin_syscall(libc::SYS_munmap, [to, moved.len(), 0, 0, 0]);
    assert_eq!(next_event(&uffd), Event::Unmap(moved));
    assert_eq!(target.finish(), 0);
}

#[test]
fn a_fork_brings_a_descriptor_for_the_child() {
    let mut target = Target::start();
    let uffd = target.uffd();
    let range = target.map(4);
    target.fill(range, 6);
    uffd.register(range).unwrap();
    target.begin_fork();
    let event = next_event(&uffd);
    let Event::Fork { fd } = event else {
        panic!("{event:?}");
    };
    // SAFETY: the event said that this number is ours now.
    let child = unsafe { Uffd::from_raw(fd) };
    let child_pid = target.finish();
    assert!(child_pid > 0);
    settled(|| child.protect(range)).unwrap();
    settled(|| uffd.protect(range)).unwrap();
    // SAFETY: a child of our child, started by this test.
    unsafe { libc::kill(i32::try_from(child_pid).unwrap(), libc::SIGKILL) };
    within("the child's end", || {
        (child.protect(range) == Err(UffdError::Gone)).then_some(())
    });
}

#[test]
fn a_descriptor_survives_its_wrapper_as_a_number() {
    let mut target = Target::start();
    let uffd = target.uffd();
    let range = target.map(1);
    uffd.register(range).unwrap();
    let number = uffd.into_raw_fd();
    // SAFETY: given away by the wrapper just now.
    let again = unsafe { Uffd::from_raw(number) };
    assert_eq!(again.as_raw_fd(), number);
    target.begin_peek(range.start);
    let _ = next_event(&again);
    again.copy(range.start, &[8; 4096], WAKE_PLAIN).unwrap();
    assert_eq!(target.finish(), 8);
}

#[test]
fn a_plain_file_is_no_userfaultfd() {
    let null = std::fs::File::open("/dev/null").unwrap();
    let number = std::os::fd::IntoRawFd::into_raw_fd(null);
    // SAFETY: given away just now.
    let fd = unsafe { OwnedFd::from_raw_fd(number) };
    assert_eq!(
        Uffd::from_owned(fd).handshake(),
        Err(UffdError::Unexpected(libc::ENOTTY, "UFFDIO_API"))
    );
}

#[test]
fn protection_that_says_done_covers_every_page_there_is() {
    let mut target = Target::start();
    let uffd = target.uffd();
    let range = target.map(16);
    target.fill(range, 1);
    uffd.register(range).unwrap();
    let (part, hole, foreign) = (sub(range, 4, 4), sub(range, 8, 2), sub(range, 12, 2));
    let read_only = libc::PROT_READ as u64;
    target.syscall(
        libc::SYS_mprotect,
        [part.start.0, part.len(), read_only, 0, 0],
    );
    target.begin_syscall(libc::SYS_munmap, [hole.start.0, hole.len(), 0, 0, 0]);
    let _ = next_event(&uffd);
    assert_eq!(target.finish(), 0);
    let pagemap = Pagemap::open(target.pid).unwrap();
    let look = || pagemap.look_page(range.start.page()).unwrap();
    // Kernels differ: a later one goes over splits and holes, an earlier one stops there and says so.
    match settled(|| uffd.protect(range)) {
        Ok(()) => assert_eq!(look().protected, look().present),
        other => assert_eq!(other, Err(UffdError::EdgeOfMapping)),
    }
    assert_eq!(look().present.count(), 14);
    let _ = uffd.unprotect(range, true);
    // A mapping that is not served always stops it, with what lies before already done or not.
    uffd.unregister(foreign).unwrap();
    assert_eq!(uffd.protect(range), Err(UffdError::EdgeOfMapping));
    assert!(!look().protected.has(12) && !look().protected.has(15));
}
