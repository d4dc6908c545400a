//! When messages come, in which order they are read, and what is refused meanwhile.

use std::process::Command;

use holo_pager::sys::attach::quiesce;
use holo_pager::sys::errors::UffdError;
use holo_pager::sys::maps::{ProcMaps, mappings};
use holo_pager::sys::procfs::Children;
use holo_pager::sys::ring::Advice;
use holo_pager::sys::uffd::{Event, FEATURE_WP_UNPOPULATED, Uffd};
use holo_proto::{Addr, AddrRange, SubpageMask};

use crate::agent::{A, Agent, B, C};
use crate::support::{
    PLAIN, advise_served, bounded, descriptor_of, is_silent, look, next_event, next_fault, present,
    read_many, read_until_done, settled, sub, wait_for_faults, wait_readable, within, word,
};

/// Every call that would act on an older state than the unread message tells is refused.
#[track_caller]
fn refuses_everything(uffd: &Uffd, present: AddrRange, missing: AddrRange) {
    let pending = Err(UffdError::EventsPending);
    assert_eq!(uffd.copy(missing.start, &[9; 4096], PLAIN), pending);
    assert_eq!(uffd.zero(sub(missing, 0, 1), true), pending);
    assert_eq!(uffd.protect(present), pending);
    assert_eq!(uffd.unprotect(present, true), pending);
    assert_eq!(uffd.wake(present), Ok(()));
}

/// And accepted again once it was read and its sender ran.
#[track_caller]
fn accepts(uffd: &Uffd, present: AddrRange, missing: AddrRange) {
    settled(|| uffd.copy(missing.start, &[9; 4096], PLAIN)).unwrap();
    uffd.protect(present).unwrap();
    uffd.unprotect(present, true).unwrap();
}

/// An agent, its userfaultfd, and two served ranges: all present, all missing.
fn scene() -> (Agent, Uffd, AddrRange, AddrRange) {
    let agent = Agent::start();
    let (uffd, _) = agent.uffd();
    let present = agent.served(&uffd, 16);
    let missing = agent.map(16);
    uffd.register(missing).unwrap();
    (agent, uffd, present, missing)
}

fn is_mapped(agent: &Agent, range: AddrRange) -> bool {
    let mut text = Vec::new();
    let maps = ProcMaps::open(agent.pid).unwrap();
    maps.read_into(&mut text).unwrap();
    mappings(&text).any(|mapping| mapping.range.overlaps(range))
}

#[test]
fn calls_fail_while_a_fork_waits_to_be_read() {
    let _bound = bounded();
    let (agent, uffd, present, missing) = scene();
    let fork = agent.begin_fork(A);
    wait_readable(&uffd);
    refuses_everything(&uffd, present, missing);
    let _child_uffd = descriptor_of(next_event(&uffd));
    accepts(&uffd, present, missing);
    let _child = agent.child_of(fork);
}

/// Of what comes after the message nobody tells: only a stop after the reading says that it is over.
#[test]
fn a_stop_of_all_threads_is_after_each_removal_that_was_read() {
    let _bound = bounded();
    let (agent, uffd, ..) = scene();
    let mut before_the_stop = 0;
    for _ in 0..300 {
        let range = agent.served(&uffd, 16);
        let removal = agent.begin_madvise(A, range, libc::MADV_DONTNEED);
        assert_eq!(next_event(&uffd), Event::Remove(range));
        before_the_stop += u32::from(present(&agent, range) != SubpageMask::NONE);
        quiesce(agent.pid).unwrap();
        assert_eq!(present(&agent, range), SubpageMask::NONE);
        assert_eq!(removal.finish(), 0);
        uffd.unregister(range).unwrap();
    }
    println!("{before_the_stop} of 300 were not over before");
}

#[test]
fn calls_fail_while_an_unmap_waits_to_be_read() {
    let _bound = bounded();
    let (agent, uffd, present, missing) = scene();
    let gone = agent.served(&uffd, 4);
    let unmap = agent.begin_unmap(A, gone);
    wait_readable(&uffd);
    refuses_everything(&uffd, present, missing);
    assert_eq!(next_event(&uffd), Event::Unmap(gone));
    accepts(&uffd, present, missing);
    assert_eq!(unmap.finish(), 0);
}

#[test]
fn calls_fail_until_both_messages_of_a_move_are_read() {
    let _bound = bounded();
    let (agent, uffd, present, missing) = scene();
    let from = agent.served(&uffd, 4);
    let to = agent.room(4);
    let moved = agent.begin_move(A, from, to.start);
    wait_readable(&uffd);
    refuses_everything(&uffd, present, missing);
    let remap = Event::Remap {
        from: from.start,
        to: to.start,
        len: from.len(),
    };
    assert_eq!(next_event(&uffd), remap);
    // The old place is told as unmapped as well, in a second message.
    wait_readable(&uffd);
    refuses_everything(&uffd, present, missing);
    assert_eq!(next_event(&uffd), Event::Unmap(from));
    accepts(&uffd, present, missing);
    assert_eq!(moved.finish().cast_unsigned(), to.start.0);
}

#[test]
fn a_fault_at_the_new_place_is_read_before_the_move_and_cannot_be_served_before_it() {
    let _bound = bounded();
    let agent = Agent::start();
    let (uffd, _) = agent.uffd();
    let from = agent.map(4);
    agent.fill(sub(from, 0, 1), 1);
    uffd.register(from).unwrap();
    let to = agent.room(4);
    let missing = sub(to, 1, 1);
    let moved = agent.begin_move(A, from, to.start);
    wait_readable(&uffd);
    let peek = agent.begin_peek(B, missing.start);
    wait_for_faults(&uffd, 1);
    assert_eq!(next_fault(&uffd), (missing.start, false));
    let pending = Err(UffdError::EventsPending);
    assert_eq!(uffd.copy(missing.start, &[7; 4096], PLAIN), pending);
    assert_eq!(uffd.zero(missing, true), pending);
    let remap = Event::Remap {
        from: from.start,
        to: to.start,
        len: from.len(),
    };
    assert_eq!(next_event(&uffd), remap);
    assert_eq!(next_event(&uffd), Event::Unmap(from));
    settled(|| uffd.copy(missing.start, &[7; 4096], PLAIN)).unwrap();
    assert_eq!(peek.finish(), 7);
    assert_eq!(moved.finish().cast_unsigned(), to.start.0);
    assert_eq!(agent.peek(to.start), 1);
}

#[test]
fn faults_are_read_before_messages_that_came_earlier_and_in_their_order() {
    let _bound = bounded();
    let (agent, uffd, range, missing) = scene();
    let drop = agent.begin_madvise(A, range, libc::MADV_DONTNEED);
    wait_readable(&uffd);
    let first = agent.begin_peek(B, sub(missing, 3, 1).start);
    wait_for_faults(&uffd, 1);
    let second = agent.begin_peek(C, sub(missing, 1, 1).start);
    wait_for_faults(&uffd, 2);
    let seen = read_many(&uffd);
    let places: Vec<_> = seen
        .iter()
        .filter_map(|event| match *event {
            Event::Fault { at, .. } => Some(at),
            Event::Remove(what) => Some(what.start),
            Event::Fork { .. } | Event::Remap { .. } | Event::Unmap(_) => None,
        })
        .collect();
    let expected = [
        sub(missing, 3, 1).start,
        sub(missing, 1, 1).start,
        range.start,
    ];
    assert_eq!(places, expected, "{seen:?}");
    assert_eq!(drop.finish(), 0);
    settled(|| uffd.zero(missing, true)).unwrap();
    assert_eq!((first.finish(), second.finish()), (0, 0));
}

#[test]
fn messages_are_read_in_the_order_of_the_acts() {
    let _bound = bounded();
    let (agent, uffd, range, _) = scene();
    let (unmapped, moved) = (agent.served(&uffd, 1), agent.served(&uffd, 1));
    let to = agent.room(1);
    let mut steps = Vec::new();
    let mut expected = Vec::new();
    for thread in 1..=5 {
        let part = sub(range, 3 * thread, 1);
        let thread = usize::try_from(thread).unwrap();
        let tid = agent.tid(thread);
        let (step, event) = match thread {
            2 => (agent.begin_unmap(thread, unmapped), Event::Unmap(unmapped)),
            4 => {
                let event = Event::Remap {
                    from: moved.start,
                    to: to.start,
                    len: moved.len(),
                };
                (agent.begin_move(thread, moved, to.start), event)
            }
            3 => (
                agent.begin_madvise(thread, part, libc::MADV_FREE),
                Event::Remove(part),
            ),
            _ => (
                agent.begin_madvise(thread, part, libc::MADV_DONTNEED),
                Event::Remove(part),
            ),
        };
        // Each is in the queue before the next begins.
        agent.wait_until_in(tid, "userfaultfd_event_wait");
        steps.push(step);
        expected.push(event);
    }
    let seen: Vec<_> = (0..5).map(|_| next_event(&uffd)).collect();
    assert_eq!(seen, expected);
    assert_eq!(next_event(&uffd), Event::Unmap(moved));
    for step in steps {
        assert!(step.finish() >= 0);
    }
}

#[test]
fn a_mapping_made_before_the_unmap_is_read_is_not_served() {
    let _bound = bounded();
    let (agent, uffd, range, _) = scene();
    let unmap = agent.begin_unmap(A, range);
    wait_readable(&uffd);
    agent.map_at(B, range);
    // Nobody is asked for its pages.
    assert_eq!(agent.peek(range.start), 0);
    agent.poke(range.start, 4);
    let pending = Err(UffdError::EventsPending);
    assert_eq!(uffd.copy(range.start, &[9; 4096], PLAIN), pending);
    assert_eq!(uffd.protect(range), pending);
    assert_eq!(next_event(&uffd), Event::Unmap(range));
    assert_eq!(unmap.finish(), 0);
    let edge = Err(UffdError::EdgeOfMapping);
    let at = sub(range, 1, 1);
    assert_eq!(settled(|| uffd.copy(at.start, &[9; 4096], PLAIN)), edge);
    assert_eq!(uffd.zero(at, true), edge);
    assert_eq!(uffd.protect(range), edge);
    assert_eq!(agent.peek(range.start), 4);
    assert_eq!(agent.peek(at.start), 0);
    assert!(is_silent(&uffd));
}

#[test]
fn a_mapping_over_a_part_unmaps_that_part_and_is_not_served() {
    let _bound = bounded();
    let (agent, uffd, range, _) = scene();
    let part = sub(range, 4, 4);
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED;
    let arguments = [
        part.start.0,
        part.len(),
        3,
        u64::from(flags.cast_unsigned()),
        u64::MAX,
    ];
    let map = agent.begin_call(A, libc::SYS_mmap, &arguments);
    assert_eq!(next_event(&uffd), Event::Unmap(part));
    assert_eq!(map.finish().cast_unsigned(), part.start.0);
    assert_eq!(agent.peek(part.start), 0);
    assert!(is_silent(&uffd));
    let edge = Err(UffdError::EdgeOfMapping);
    assert_eq!(settled(|| uffd.zero(part, true)), edge);
    // What lies around is served as before.
    uffd.protect(sub(range, 0, 4)).unwrap();
    uffd.protect(sub(range, 8, 8)).unwrap();
    assert_eq!(look(&agent, range).protected, SubpageMask(0xff0f));
}

#[test]
fn an_unmap_is_told_after_the_act() {
    let _bound = bounded();
    let (agent, uffd, range, _) = scene();
    let unmap = agent.begin_unmap(A, range);
    wait_readable(&uffd);
    assert!(!is_mapped(&agent, range));
    assert_eq!(read_until_done(&uffd, &unmap), [Event::Unmap(range)]);
}

#[test]
fn a_move_is_told_after_the_act() {
    let _bound = bounded();
    let (agent, uffd, range, _) = scene();
    let to = agent.room(16);
    let moved = agent.begin_move(A, range, to.start);
    wait_readable(&uffd);
    assert!(!is_mapped(&agent, range));
    assert_eq!(present(&agent, to), SubpageMask::ALL);
    // Present pages of the new place can be used before anybody read of it.
    assert!(agent.holds(to, 1));
    assert_eq!(read_until_done(&uffd, &moved).len(), 2);
}

#[test]
fn a_fork_is_told_after_the_act_and_before_the_child_can_be_found() {
    let _bound = bounded();
    let (agent, uffd, range, _) = scene();
    let fork = agent.begin_fork(A);
    wait_readable(&uffd);
    assert!(Children::list(agent.pid).unwrap().is_empty());
    // Written by another thread before the message is read: the child's memory is a copy already.
    agent.poke(range.start, 5);
    let child_uffd = descriptor_of(next_event(&uffd));
    let child = agent.child_of(fork);
    assert_eq!(child.peek(range.start), 1);
    assert_eq!(agent.peek(range.start), 5);
    assert!(is_silent(&child_uffd));
}

#[test]
fn a_removal_is_told_before_the_act() {
    let _bound = bounded();
    for advice in [libc::MADV_DONTNEED, libc::MADV_FREE] {
        let (agent, uffd, range, _) = scene();
        let drop = agent.begin_madvise(A, range, advice);
        wait_readable(&uffd);
        assert_eq!(present(&agent, range), SubpageMask::ALL);
        assert!(agent.holds(range, 1));
        // What is written meanwhile goes as well.
        agent.poke(range.start, 5);
        assert_eq!(read_until_done(&uffd, &drop), [Event::Remove(range)]);
        assert_eq!(drop.finish(), 0);
        let left = if advice == libc::MADV_FREE {
            SubpageMask::ALL
        } else {
            SubpageMask::NONE
        };
        assert_eq!(present(&agent, range), left);
    }
}

#[test]
fn a_mapping_split_while_its_removal_waits_is_told_of_twice_behind_the_split() {
    let _bound = bounded();
    let (agent, uffd, range, _) = scene();
    let mut ring = agent.ring();
    let rest = sub(range, 6, 10);
    ring.submit(range, Advice::Free, 1).unwrap();
    ring.wake_if_needed().unwrap();
    wait_readable(&uffd);
    agent.protect(rest, libc::PROT_READ);
    assert_eq!(next_event(&uffd), Event::Remove(range));
    assert_eq!(next_event(&uffd), Event::Remove(rest));
    let done = within("the advice", || ring.reap());
    assert_eq!(done.result, 0);
    assert!(is_silent(&uffd));
}

#[test]
fn a_free_through_the_ring_tells_of_each_mapping_and_of_each_subpage_once() {
    let _bound = bounded();
    let (agent, uffd, range, _) = scene();
    let mut ring = agent.ring();
    agent.protect(sub(range, 4, 4), libc::PROT_READ);
    let (result, seen) = advise_served(&mut ring, &uffd, range, Advice::Free);
    assert_eq!(result, 0);
    let pieces = [sub(range, 0, 4), sub(range, 4, 4), sub(range, 8, 8)];
    assert_eq!(seen, pieces.map(Event::Remove));
    // Only the asked part of a mapping.
    let part = sub(range, 9, 2);
    let (result, seen) = advise_served(&mut ring, &uffd, part, Advice::Free);
    assert_eq!((result, seen), (0, vec![Event::Remove(part)]));
}

#[test]
fn a_move_that_leaves_the_old_place_mapped_tells_no_unmap_and_serves_both_places() {
    let _bound = bounded();
    let (agent, uffd, range, _) = scene();
    let to = agent.room(16);
    let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED | libc::MREMAP_DONTUNMAP;
    let arguments = [
        range.start.0,
        range.len(),
        range.len(),
        u64::from(flags.cast_unsigned()),
        to.start.0,
    ];
    let moved = agent.begin_call(A, libc::SYS_mremap, &arguments);
    let remap = Event::Remap {
        from: range.start,
        to: to.start,
        len: range.len(),
    };
    assert_eq!(read_until_done(&uffd, &moved), [remap]);
    assert_eq!(moved.finish().cast_unsigned(), to.start.0);
    assert!(agent.holds(to, 1));
    assert_eq!(present(&agent, range), SubpageMask::NONE);
    // The old place is empty and asks us.
    let peek = agent.begin_peek(A, range.start);
    assert_eq!(next_fault(&uffd), (range.start, false));
    uffd.zero(range, true).unwrap();
    assert_eq!(peek.finish(), 0);
    uffd.protect(to).unwrap();
    assert_eq!(look(&agent, to).protected, SubpageMask::ALL);
}

/// What a program may do with a mapping of its own must not fail because a part of it is served: the pager
/// registers whole mappings.
#[test]
fn a_mapping_of_which_a_part_is_served_cannot_be_moved_whole_until_the_rest_is() {
    let _bound = bounded();
    let agent = Agent::start();
    let (uffd, _) = agent.uffd();
    let (range, to) = (agent.map(16), agent.room(16));
    agent.fill(range, 1);
    let begin = |flags: libc::c_int| {
        let flags = u64::from((libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED | flags).cast_unsigned());
        let arguments = [range.start.0, range.len(), range.len(), flags, to.start.0];
        agent.begin_call(A, libc::SYS_mremap, &arguments)
    };
    let mappings = || {
        let mut text = Vec::new();
        let maps = ProcMaps::open(agent.pid).unwrap();
        maps.read_into(&mut text).unwrap();
        let inside: Vec<_> = mappings(&text)
            .map(|mapping| mapping.range)
            .filter(|part| part.overlaps(range))
            .collect();
        inside
    };
    assert_eq!(mappings(), [range]);
    uffd.register(sub(range, 0, 8)).unwrap();
    assert_eq!(mappings(), [sub(range, 0, 8), sub(range, 8, 8)]);
    for flags in [0, libc::MREMAP_DONTUNMAP] {
        let moved = begin(flags);
        assert_eq!(moved.finish(), -i64::from(libc::EFAULT), "flags {flags}");
        assert!(is_silent(&uffd));
    }
    uffd.register(sub(range, 8, 8)).unwrap();
    assert_eq!(mappings(), [range]);
    let moved = begin(libc::MREMAP_DONTUNMAP);
    let remap = Event::Remap {
        from: range.start,
        to: to.start,
        len: range.len(),
    };
    assert_eq!(read_until_done(&uffd, &moved), [remap]);
    assert_eq!(moved.finish().cast_unsigned(), to.start.0);
    assert!(agent.holds(to, 1));
}

#[test]
fn growth_in_place_is_served_and_not_told() {
    let _bound = bounded();
    let (agent, uffd, range, _) = scene();
    let grown = AddrRange::new(range.start.0, range.end.0 + 4 * 4096);
    let arguments = [range.start.0, range.len(), grown.len(), 0];
    let got = agent.call(libc::SYS_mremap, &arguments);
    assert_eq!(got.cast_unsigned(), range.start.0);
    assert!(is_silent(&uffd));
    let peek = agent.begin_peek(A, range.end);
    assert_eq!(next_fault(&uffd), (range.end, false));
    uffd.copy(range.end, &[8; 4 * 4096], PLAIN).unwrap();
    assert_eq!(peek.finish(), 8);
    // It is one mapping: a copy goes over the old end.
    assert_eq!(uffd.protect(grown), Ok(()));
}

#[test]
fn growth_that_moves_tells_the_old_length_and_serves_the_new_one() {
    let _bound = bounded();
    let (agent, uffd, range, _) = scene();
    let to = agent.room(20);
    let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
    let arguments = [
        range.start.0,
        range.len(),
        to.len(),
        u64::from(flags.cast_unsigned()),
        to.start.0,
    ];
    let moved = agent.begin_call(A, libc::SYS_mremap, &arguments);
    let remap = Event::Remap {
        from: range.start,
        to: to.start,
        len: range.len(),
    };
    let seen = read_until_done(&uffd, &moved);
    assert_eq!(seen, [remap, Event::Unmap(range)]);
    let grown = sub(to, 16, 4);
    let peek = agent.begin_peek(A, grown.start);
    assert_eq!(next_fault(&uffd), (grown.start, false));
    uffd.zero(grown, true).unwrap();
    assert_eq!(peek.finish(), 0);
}

#[test]
fn shrinking_in_place_tells_of_the_tail() {
    let _bound = bounded();
    let (agent, uffd, range, _) = scene();
    let arguments = [range.start.0, range.len(), 4096 * 4, 0];
    let shrink = agent.begin_call(A, libc::SYS_mremap, &arguments);
    let seen = read_until_done(&uffd, &shrink);
    assert_eq!(seen, [Event::Unmap(sub(range, 4, 12))]);
    assert_eq!(shrink.finish().cast_unsigned(), range.start.0);
}

#[test]
fn protection_moves_with_its_page() {
    let _bound = bounded();
    let (agent, uffd, range, _) = scene();
    uffd.protect(sub(range, 2, 3)).unwrap();
    let to = agent.room(16);
    let moved = agent.begin_move(A, range, to.start);
    let _ = read_until_done(&uffd, &moved);
    assert_eq!(look(&agent, to).protected, SubpageMask(0b1_1100));
    let at = sub(to, 2, 1).start;
    let poke = agent.begin_poke(A, at, 9);
    assert_eq!(next_fault(&uffd), (at, true));
    uffd.unprotect(to, true).unwrap();
    poke.finish();
}

#[test]
fn an_exit_waits_for_no_message() {
    let _bound = bounded();
    let (agent, uffd, range, missing) = scene();
    // One thread waits for a message to be read, one for a page; none of it is ever done.
    let _drop = agent.begin_madvise(A, range, libc::MADV_DONTNEED);
    wait_readable(&uffd);
    let _peek = agent.begin_peek(B, missing.start);
    wait_for_faults(&uffd, 1);
    let _exit = agent.begin_call(C, libc::SYS_exit_group, &[0]);
    within("the exit", || agent.pidfd.has_exited().then_some(()));
    assert_eq!(uffd.protect(range), Err(UffdError::Gone));
    assert_eq!(
        uffd.copy(Addr(missing.start.0), &[1; 4096], PLAIN),
        Err(UffdError::Gone)
    );
}

/// Both look for the mapping after they have asked whether a change is under way (since Linux 6.9), so that one may begin in
/// between: that none is there does not say that nothing is.
#[test]
fn installs_may_find_no_mapping_while_a_move_is_under_way_and_an_unprotect_tells() {
    let _bound = bounded();
    let (agent, uffd, _, range) = scene();
    let (away, nowhere) = (agent.room(16), agent.room(1));
    let swing = format!("swing {} {} {} 10000", range.start, away.start, range.len());
    let swing = agent.begin(A, &swing);
    let (mut is_here, mut left, mut overtaken) = (true, 0, [0; 2]);
    while !swing.is_done() {
        for event in read_many(&uffd) {
            match event {
                Event::Remap { to, .. } => {
                    is_here = to == range.start;
                    left += 1;
                }
                Event::Unmap(_) => left -= 1,
                Event::Fault { .. } | Event::Fork { .. } | Event::Remove(_) => panic!("{event:?}"),
            }
        }
        // As far as was heard.
        if is_here && left == 0 {
            let tried = [
                uffd.copy(range.start, &[9; 4096], PLAIN),
                uffd.zero(sub(range, 1, 1), true),
            ];
            for (tried, overtaken) in tried.iter().zip(&mut overtaken) {
                if *tried == Err(UffdError::EdgeOfMapping) {
                    *overtaken += 1;
                    let told = uffd.unprotect(nowhere, true);
                    assert_eq!(told, Err(UffdError::EventsPending));
                }
            }
            let told = uffd.protect(range);
            assert!(matches!(told, Ok(()) | Err(UffdError::EventsPending)));
        }
    }
    assert_eq!(swing.finish(), 0);
    println!("copies, zero pages that found nothing: {overtaken:?}");
}

/// Has the agent map more over `range` than it may have.
fn fails_to_map_over(agent: &Agent, uffd: &Uffd, range: AddrRange) {
    let limits = ["--pid", &agent.pid.to_string(), "--as=68719476736"].map(str::to_owned);
    let set = Command::new("prlimit").args(limits).status();
    assert!(set.unwrap().success());
    let too_much = AddrRange::new(range.start.0, range.start.0 + (128 << 30));
    let access = word(libc::PROT_READ | libc::PROT_WRITE);
    let flags = word(libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED);
    let arguments = [range.start.0, too_much.len(), access, flags, u64::MAX, 0];
    let map = agent.begin_call(A, libc::SYS_mmap, &arguments);
    assert_eq!(read_until_done(uffd, &map), [Event::Unmap(too_much)]);
    assert_eq!(map.finish(), -i64::from(libc::ENOMEM));
}

/// Here a limit is reached; a mapping at the end that may not be unmapped does the same.
#[test]
fn an_unmap_that_fails_is_told_and_leaves_everything_as_it_was() {
    let _bound = bounded();
    let (agent, uffd, filled, missing) = scene();
    for range in [filled, missing] {
        fails_to_map_over(&agent, &uffd, range);
        settled(|| uffd.unprotect(range, true)).unwrap();
    }
    assert_eq!(present(&agent, filled), SubpageMask::ALL);
    uffd.copy(missing.start, &[9; 4096], PLAIN).unwrap();
}

#[test]
fn a_mark_on_an_empty_entry_stays_until_that_is_unmapped_or_dropped() {
    let _bound = bounded();
    let agent = Agent::start();
    let (uffd, _) = agent.uffd_with(FEATURE_WP_UNPOPULATED);
    let range = agent.map(16);
    uffd.register(range).unwrap();
    let marked = |range| {
        let look = look(&agent, range);
        look.protected.and(look.swapped)
    };
    let served = |call, arguments: &[u64]| {
        let step = agent.begin_call(A, call, arguments);
        read_until_done(&uffd, &step);
        step.finish()
    };
    assert_eq!(marked(range), SubpageMask::NONE);
    uffd.protect(range).unwrap();
    assert_eq!(look(&agent, range).present, SubpageMask::NONE);
    assert_eq!(marked(range), SubpageMask::ALL);
    // An unmap that fails; a mapping that shrinks and has grown again before anybody can look.
    fails_to_map_over(&agent, &uffd, range);
    assert_eq!(marked(range), SubpageMask::ALL);
    let (start, len) = (range.start.0, range.len());
    for lens in [[len, len / 2], [len / 2, len]] {
        let at = served(libc::SYS_mremap, &[start, lens[0], lens[1], 0]);
        assert_eq!(at.cast_unsigned(), start);
    }
    let half = SubpageMask::of_page_in(range.start.page(), sub(range, 0, 8));
    assert_eq!(marked(range), half);
    // FREE leaves it, DONTNEED does not.
    for (i, advice, stays) in [
        (1_u8, libc::MADV_FREE, true),
        (2, libc::MADV_DONTNEED, false),
    ] {
        let at = sub(range, i.into(), 1);
        let arguments = [at.start.0, at.len(), word(advice)];
        assert_eq!(served(libc::SYS_madvise, &arguments), 0);
        assert_eq!(marked(range).has(i.into()), stays);
    }
    // It moves along.
    let (from, to) = (sub(range, 3, 1), agent.map(16));
    let flags = word(libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED);
    let arguments = [from.start.0, from.len(), from.len(), flags, to.start.0];
    assert_eq!(
        served(libc::SYS_mremap, &arguments).cast_unsigned(),
        to.start.0
    );
    assert!(marked(to).has(0) && !marked(range).has(3));
    // A fault there is one of a missing page. A copy goes over it, the zero page does not; an un-protect takes it away.
    let at = |i| sub(range, i, 1);
    let poke = agent.begin_poke(A, at(4).start, 9);
    assert_eq!(next_fault(&uffd), (at(4).start, false));
    assert_eq!(
        settled(|| uffd.zero(at(4), true)),
        Err(UffdError::AlreadyThere)
    );
    uffd.copy(at(4).start, &[7; 4096], PLAIN).unwrap();
    poke.finish();
    assert!(!look(&agent, range).protected.has(4));
    uffd.unprotect(at(5), true).unwrap();
    assert!(!marked(range).has(5) && marked(range).has(6));
}
