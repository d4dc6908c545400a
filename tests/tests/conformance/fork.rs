//! What a fork's child has, and who answers for it.

use std::fs;

use holo_pager::sys::errors::UffdError;
use holo_pager::sys::maps::{ProcMaps, VmFlags, smaps};
use holo_pager::sys::pagemap::Pagemap;
use holo_pager::sys::uffd::Uffd;
use holo_proto::{AddrRange, SubpageMask};

use crate::agent::{A, Agent, B};
use crate::support::{
    PLAIN, bounded, descriptor_of, is_silent, look, next_event, next_fault, settled, sub, within,
    word,
};

/// Flags of the mapping that holds the start of `range`; none where nothing is mapped.
pub(crate) fn flags_at(agent: &Agent, range: AddrRange) -> Option<VmFlags> {
    let mut text = Vec::new();
    let maps = ProcMaps::open_smaps(agent.pid).unwrap();
    maps.read_into(&mut text).unwrap();
    smaps(&text)
        .find(|detail| detail.mapping.range.contains(range.start))
        .map(|detail| detail.flags)
}

/// Forks an agent that `uffd` serves; the child, and the descriptor that serves it.
fn fork(agent: &Agent, uffd: &Uffd) -> (Agent, Uffd) {
    let fork = agent.begin_fork(A);
    let child_uffd = descriptor_of(next_event(uffd));
    (agent.child_of(fork), child_uffd)
}

#[test]
fn the_message_names_a_new_descriptor_of_the_reader_that_closes_on_exec() {
    let _bound = bounded();
    let agent = Agent::start();
    let (uffd, _) = agent.uffd();
    let _range = agent.served(&uffd, 16);
    let (_child, child_uffd) = fork(&agent, &uffd);
    let info = format!("/proc/self/fdinfo/{}", child_uffd.as_raw_fd());
    let info = fs::read_to_string(info).unwrap();
    let flags = info.lines().find_map(|line| line.strip_prefix("flags:"));
    let flags = i32::from_str_radix(flags.unwrap().trim(), 8).unwrap();
    assert_eq!(flags & libc::O_CLOEXEC, libc::O_CLOEXEC);
    assert_eq!(flags & libc::O_NONBLOCK, libc::O_NONBLOCK);
}

#[test]
fn pages_missing_at_the_fork_are_asked_for_through_the_childs_descriptor() {
    let _bound = bounded();
    let agent = Agent::start();
    let (uffd, _) = agent.uffd();
    let range = agent.map(16);
    uffd.register(range).unwrap();
    let (child, child_uffd) = fork(&agent, &uffd);
    let peek = child.begin_peek(A, range.start);
    assert_eq!(next_fault(&child_uffd), (range.start, false));
    assert!(is_silent(&uffd));
    settled(|| child_uffd.copy(range.start, &[3; 4096], PLAIN)).unwrap();
    assert_eq!(peek.finish(), 3);
    // The parent's page is another one, still missing.
    let peek = agent.begin_peek(A, range.start);
    assert_eq!(next_fault(&uffd), (range.start, false));
    assert!(is_silent(&child_uffd));
    uffd.copy(range.start, &[4; 4096], PLAIN).unwrap();
    assert_eq!(peek.finish(), 4);
    assert_eq!(child.peek(range.start), 3);
}

#[test]
fn protection_is_inherited_and_asked_for_on_each_side() {
    let _bound = bounded();
    let agent = Agent::start();
    let (uffd, _) = agent.uffd();
    let range = agent.served(&uffd, 16);
    uffd.protect(sub(range, 0, 4)).unwrap();
    let (child, child_uffd) = fork(&agent, &uffd);
    assert_eq!(look(&child, range).protected, SubpageMask(0xf));
    let poke = child.begin_poke(A, range.start, 9);
    assert_eq!(next_fault(&child_uffd), (range.start, true));
    settled(|| child_uffd.unprotect(range, true)).unwrap();
    poke.finish();
    // Copied on the write, and the parent's protection stands.
    assert_eq!(look(&agent, range).protected, SubpageMask(0xf));
    assert_eq!((child.peek(range.start), agent.peek(range.start)), (9, 1));
    let poke = agent.begin_poke(A, range.start, 8);
    assert_eq!(next_fault(&uffd), (range.start, true));
    uffd.unprotect(range, true).unwrap();
    poke.finish();
    assert_eq!((child.peek(range.start), agent.peek(range.start)), (9, 8));
}

#[test]
fn what_is_wiped_at_a_fork_asks_like_a_missing_page_and_only_its_flag_tells() {
    let _bound = bounded();
    let agent = Agent::start();
    let (uffd, _) = agent.uffd();
    let range = agent.served(&uffd, 16);
    assert_eq!(agent.madvise(range, libc::MADV_WIPEONFORK), 0);
    let (child, child_uffd) = fork(&agent, &uffd);
    let flags = flags_at(&child, range).unwrap();
    assert!(flags.has(VmFlags::WIPE_ON_FORK) && flags.has(VmFlags::UFFD_MISSING));
    assert_eq!(look(&child, range).present, SubpageMask::NONE);
    let peek = child.begin_peek(A, range.start);
    assert_eq!(next_fault(&child_uffd), (range.start, false));
    settled(|| child_uffd.zero(range, true)).unwrap();
    assert_eq!(peek.finish(), 0);
    assert!(agent.holds(range, 1));
}

#[test]
fn what_a_fork_leaves_out_is_not_mapped_in_the_child() {
    let _bound = bounded();
    let agent = Agent::start();
    let (uffd, _) = agent.uffd();
    let kept = agent.served(&uffd, 16);
    let range = agent.served(&uffd, 16);
    assert_eq!(agent.madvise(range, libc::MADV_DONTFORK), 0);
    assert!(flags_at(&agent, range).unwrap().has(VmFlags::DONT_COPY));
    let (child, child_uffd) = fork(&agent, &uffd);
    assert_eq!(flags_at(&child, range), None);
    assert!(flags_at(&child, kept).is_some());
    // What the child maps there later is its own.
    child.map_at(A, range);
    assert_eq!(child.peek(range.start), 0);
    assert!(is_silent(&child_uffd));
}

#[test]
fn a_fork_with_nothing_served_sends_no_message() {
    let _bound = bounded();
    let agent = Agent::start();
    let (uffd, _) = agent.uffd();
    let range = agent.served(&uffd, 16);
    assert_eq!(agent.madvise(range, libc::MADV_DONTFORK), 0);
    let child = agent.child_of(agent.begin_fork(A));
    assert!(is_silent(&uffd));
    assert_eq!(flags_at(&child, range), None);
}

#[test]
fn whose_descriptor_it_is_shows_in_the_pagemap_of_the_process_that_it_protects() {
    let _bound = bounded();
    let agent = Agent::start();
    let (uffd, _) = agent.uffd();
    let range = agent.served(&uffd, 16);
    // Two at once: neither message says which child it is about.
    let (one, two) = (agent.begin_fork(A), agent.begin_fork(B));
    let descriptors = [
        descriptor_of(next_event(&uffd)),
        descriptor_of(next_event(&uffd)),
    ];
    let children = [agent.child_of(one), agent.child_of(two)];
    let protected = |pid: i32| {
        let pagemap = Pagemap::open(pid).unwrap();
        pagemap.look_page(range.start.page()).unwrap().protected
    };
    let mut owners = Vec::new();
    for descriptor in &descriptors {
        settled(|| descriptor.protect(sub(range, 5, 1))).unwrap();
        let marked = children.each_ref().map(|child| protected(child.pid));
        let owner = marked.iter().position(|&mask| mask == SubpageMask::one(5));
        assert_eq!(marked[1 - owner.unwrap()], SubpageMask::NONE);
        assert_eq!(protected(agent.pid), SubpageMask::NONE);
        descriptor.unprotect(range, true).unwrap();
        owners.push(owner.unwrap());
    }
    owners.sort_unstable();
    assert_eq!(owners, [0, 1]);
}

#[test]
fn a_program_that_is_started_is_a_new_address_space_without_a_message() {
    let _bound = bounded();
    let agent = Agent::start();
    let (uffd, _) = agent.uffd();
    let range = agent.served(&uffd, 16);
    let scratch = agent.map(1);
    agent.run(A, &format!("text {} /bin/cat", scratch.start));
    agent.words(scratch.start.offset(64), &[scratch.start.0, 0]);
    let vector = scratch.start.offset(64).0;
    let _exec = agent.begin_call(
        A,
        libc::SYS_execve,
        &[scratch.start.0, vector, vector + word(8)],
    );
    within("the program", || {
        let name = fs::read_to_string(format!("/proc/{}/comm", agent.pid)).unwrap();
        (name.trim() == "cat").then_some(())
    });
    assert!(is_silent(&uffd));
    assert_eq!(uffd.protect(range), Err(UffdError::Gone));
    assert!(!agent.pidfd.has_exited());
}
