//! What the pager's tools in a target show and bear, and what waits for the pager besides plain accesses.

use std::fs;
use std::thread;

use holo_pager::sys::advise::pageout;
use holo_pager::sys::pagemap::Pagemap;
use holo_pager::sys::ring::Advice;
use holo_pager::sys::uffd::Event;
use holo_proto::SubpageMask;

use crate::agent::{A, Agent, MAIN};
use crate::support::{
    MOMENT, PLAIN, advise, advise_served, bounded, next_event, next_fault, present, reclaim, sub,
    within, word,
};

/// Names of a process's threads.
fn threads(agent: &Agent) -> Vec<String> {
    fs::read_dir(format!("/proc/{}/task", agent.pid))
        .unwrap()
        .filter_map(|task| fs::read_to_string(task.ok()?.path().join("comm")).ok())
        .map(|name| name.trim().to_owned())
        .collect()
}

fn state(agent: &Agent) -> char {
    let stat = fs::read_to_string(format!("/proc/{}/stat", agent.pid)).unwrap();
    let (_, rest) = stat.rsplit_once(") ").unwrap();
    rest.chars().next().unwrap()
}

#[test]
fn another_process_that_reads_a_missing_page_waits_until_it_is_served() {
    let _bound = bounded();
    let (agent, other) = (Agent::start(), Agent::start());
    let (uffd, _) = agent.uffd();
    let range = agent.map(16);
    uffd.register(range).unwrap();
    let scratch = other.map(1);
    let (to, from, buffer) = (
        scratch.start.offset(0),
        scratch.start.offset(16),
        scratch.start.offset(64),
    );
    other.words(to, &[buffer.0, 8]);
    other.words(from, &[range.start.0, 8]);
    let arguments = [word(agent.pid), to.0, 1, from.0, 1, 0];
    let read = other.begin_call(A, libc::SYS_process_vm_readv, &arguments);
    let event = next_event(&uffd);
    let Event::Fault { at, thread, .. } = event else {
        panic!("{event:?} where a fault was expected");
    };
    assert_eq!(at, range.start);
    // Who waits is no thread of the target's.
    assert!(!agent.has_thread(i64::from(thread)));
    thread::sleep(MOMENT);
    assert!(!read.is_done());
    uffd.copy(range.start, &[6; 4096], PLAIN).unwrap();
    assert_eq!(read.finish(), 8);
    assert_eq!(other.peek(buffer), 6);
}

#[test]
fn system_calls_of_the_process_wait_for_their_pages() {
    let _bound = bounded();
    let agent = Agent::start();
    let (uffd, _) = agent.uffd();
    let range = agent.map(16);
    agent.fill(sub(range, 0, 2), 0);
    uffd.register(range).unwrap();
    let (pipe, from, into) = (
        sub(range, 0, 1).start,
        sub(range, 3, 1).start,
        sub(range, 1, 1).start,
    );
    assert_eq!(agent.call(libc::SYS_pipe2, &[pipe.0, 0]), 0);
    let end = |i: u64| {
        agent
            .run(A, &format!("word {}", pipe.offset(4 * i)))
            .cast_unsigned()
    };
    let (reader, writer) = (end(0), end(1));
    let write = agent.begin_call(A, libc::SYS_write, &[writer, from.0, 100]);
    assert_eq!(next_fault(&uffd), (from, false));
    uffd.copy(from, &[5; 4096], PLAIN).unwrap();
    assert_eq!(write.finish(), 100);
    uffd.protect(range).unwrap();
    let read = agent.begin_call(A, libc::SYS_read, &[reader, into.0, 100]);
    assert_eq!(next_fault(&uffd), (into, true));
    uffd.unprotect(range, true).unwrap();
    assert_eq!(read.finish(), 100);
    assert_eq!(agent.peek(into), 5);
}

#[test]
fn whoever_writes_to_a_pipe_from_a_missing_page_blocks_its_other_writers() {
    let _bound = bounded();
    let (agent, other) = (Agent::start(), Agent::start());
    let (uffd, _) = agent.uffd();
    let range = agent.map(16);
    let pipe = agent.map(1);
    uffd.register(range).unwrap();
    assert_eq!(agent.call(libc::SYS_pipe2, &[pipe.start.0, 0]), 0);
    let writer = agent.run(A, &format!("word {}", pipe.start.offset(4)));
    let theirs = other.take_descriptor(agent.pid, i32::try_from(writer).unwrap());
    let write = agent.begin_call(
        A,
        libc::SYS_write,
        &[writer.cast_unsigned(), range.start.0, 100],
    );
    assert_eq!(next_fault(&uffd), (range.start, false));
    let present_page = other.map(1);
    other.fill(present_page, 1);
    let blocked = other.begin_call(A, libc::SYS_write, &[theirs, present_page.start.0, 1]);
    thread::sleep(MOMENT);
    assert!(!blocked.is_done());
    uffd.zero(range, true).unwrap();
    assert_eq!((write.finish(), blocked.finish()), (100, 1));
}

#[test]
fn a_ring_shows_as_a_thread_and_keeps_its_process_from_a_new_user_namespace() {
    let _bound = bounded();
    // Everything on its only thread: a process with more could not unshare anyway.
    let agent = Agent::start();
    let on_main = |number: libc::c_long, arguments: &[u64]| {
        agent.begin_call(MAIN, number, arguments).finish()
    };
    let newuser = word(libc::CLONE_NEWUSER);
    let text = 0x10_0000_0000;
    let mapped = on_main(libc::SYS_mmap, &[text, 4096, 3, 0x32, u64::MAX, 0]);
    assert_eq!(mapped.cast_unsigned(), text);
    agent.run(MAIN, &format!("text {text:#x} /proc/self/ns/mnt"));
    let namespace = on_main(libc::SYS_open, &[text, 0]);
    assert!(namespace >= 0);
    let enter = [namespace.cast_unsigned(), word(libc::CLONE_NEWNS)];
    assert_eq!(on_main(libc::SYS_setns, &enter), 0);

    let ring = agent.ring();
    // It names itself when it begins to run.
    within("the ring's thread", || {
        threads(&agent)
            .iter()
            .any(|name| name.starts_with("iou-sqp"))
            .then_some(())
    });
    let refused = -i64::from(libc::EINVAL);
    assert_eq!(on_main(libc::SYS_unshare, &[newuser]), refused);
    assert_eq!(on_main(libc::SYS_setns, &enter), refused);
    drop(ring);
    within("the end of the ring's thread", || {
        (threads(&agent).len() == 1).then_some(())
    });
    assert_eq!(on_main(libc::SYS_setns, &enter), 0);
    assert_eq!(on_main(libc::SYS_unshare, &[newuser]), 0);
}

#[test]
fn the_ring_of_a_stopped_process_does_nothing_until_it_goes_on() {
    let _bound = bounded();
    let agent = Agent::start();
    let mut ring = agent.ring();
    let range = agent.map(16);
    agent.fill(range, 1);
    agent.pidfd.send_signal(libc::SIGSTOP).unwrap();
    within("the stop", || (state(&agent) == 'T').then_some(()));
    ring.submit(range, Advice::DontNeed, 3).unwrap();
    ring.wake_if_needed().unwrap();
    thread::sleep(MOMENT);
    assert_eq!(ring.peek(), None);
    assert_eq!(present(&agent, range), SubpageMask::ALL);
    agent.pidfd.send_signal(libc::SIGCONT).unwrap();
    let done = within("the advice", || ring.reap());
    assert_eq!((done.tag, done.result), (3, 0));
    assert_eq!(present(&agent, range), SubpageMask::NONE);
}

#[test]
fn a_stopped_process_can_be_looked_at_protected_and_reclaimed_from_outside() {
    let _bound = bounded();
    let agent = Agent::start();
    let (uffd, _) = agent.uffd();
    let mut ring = agent.ring();
    let range = agent.served(&uffd, 16);
    let (result, _) = advise_served(&mut ring, &uffd, range, Advice::Free);
    assert_eq!(result, 0);
    agent.drain();
    agent.pidfd.send_signal(libc::SIGSTOP).unwrap();
    within("the stop", || (state(&agent) == 'T').then_some(()));
    uffd.protect(sub(range, 0, 1)).unwrap();
    let helper = Agent::start();
    within("the reclaim", || {
        helper.drain();
        pageout(&agent.pidfd, &[range]).unwrap();
        (present(&agent, range) == SubpageMask::NONE).then_some(())
    });
    uffd.copy(range.start, &[4; 65536], PLAIN).unwrap();
    agent.pidfd.send_signal(libc::SIGCONT).unwrap();
    assert!(agent.holds(range, 4));
}

#[test]
fn reading_does_not_make_an_offered_page_stay_and_shows_nowhere() {
    let _bound = bounded();
    let agent = Agent::start();
    let mut ring = agent.ring();
    let range = agent.map(16);
    agent.fill(range, 1);
    assert_eq!(advise(&mut ring, range, Advice::Free), 0);
    let pagemap = Pagemap::open(agent.pid).unwrap();
    let look = || {
        let mut raw = [0; 16];
        pagemap.look_range(range, &mut raw).unwrap();
        raw
    };
    let before = look();
    assert!(agent.holds(range, 1));
    assert_eq!(look(), before);
    assert_eq!(reclaim(&agent, range), SubpageMask::NONE);
}
