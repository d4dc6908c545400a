//! What is left of a pager that dies.

use std::os::fd::{AsFd as _, AsRawFd as _};
use std::sync::atomic::Ordering;
use std::thread;
use std::time::Duration;

use holo_pager::sys::advise::PidFd;
use holo_pager::sys::arena::SharedWords;
use holo_pager::sys::maps::VmFlags;
use holo_pager::sys::uffd::{EVENT_WORDS, Event, Uffd};
use holo_proto::AddrRange;
use holo_tests::session;
use holo_tests::torture::harness::Draw;

use crate::agent::{A, Agent, B};
use crate::fork::flags_at;
use crate::support::{
    MOMENT, PLAIN, another, bounded, is_silent, next_event, next_fault, present, read_until_done,
    sub, wait_for_faults, wait_readable, within, word,
};

/// Times that a reader is killed.
const KILLS: u64 = 200;
/// Messages that the journal of that test holds: more than come between two kills.
const SLOTS: u64 = 1 << 16;
/// Words in front of the journal: drops that came back, and whether to stop.
const FRONT_WORDS: u64 = 512;

/// A pager of one thread: it has a descriptor for `uffd`, of which this is the number there, and room for what it
/// reads.
struct Pager {
    agent: Agent,
    uffd: u64,
    buffer: AddrRange,
}

impl Pager {
    fn of(target: &Agent, number_there: i32) -> Self {
        let agent = Agent::start();
        let uffd = agent.take_descriptor(target.pid, number_there);
        let buffer = agent.map(1);
        agent.fill(buffer, 0);
        Self {
            agent,
            uffd,
            buffer,
        }
    }

    /// Reads one message.
    fn read(&self) {
        let arguments = [self.uffd, self.buffer.start.0, 32];
        let got = within("a message for the pager", || {
            let got = self.agent.call(libc::SYS_read, &arguments);
            (got != -i64::from(libc::EAGAIN)).then_some(got)
        });
        assert_eq!(got, 32);
    }
}

#[test]
fn without_a_descriptor_missing_pages_read_zero() {
    let _bound = bounded();
    let agent = Agent::start();
    let (uffd, number) = agent.uffd();
    let range = agent.map(16);
    uffd.register(range).unwrap();
    let peek = agent.begin_peek(A, range.start);
    wait_readable(&uffd);
    drop(uffd);
    // The process has one itself: nothing is answered, and nothing is wrong.
    thread::sleep(MOMENT);
    assert!(!peek.is_done());
    assert_eq!(agent.call(libc::SYS_close, &[word(number)]), 0);
    // Who waited and who comes later both get what was never there.
    assert_eq!(peek.finish(), 0);
    assert_eq!(agent.peek(sub(range, 1, 1).start), 0);
    assert!(!flags_at(&agent, range).unwrap().has(VmFlags::UFFD_MISSING));
}

#[test]
fn a_fault_that_a_dead_pager_read_comes_back_only_by_a_wake() {
    let _bound = bounded();
    let agent = Agent::start();
    let (uffd, number) = agent.uffd();
    let range = agent.map(16);
    uffd.register(range).unwrap();
    let pager = Pager::of(&agent, number);
    let peek = agent.begin_peek(A, range.start);
    pager.read();
    pager.agent.kill();
    assert!(is_silent(&uffd));
    // One that was not read waits for whoever comes.
    let unread = agent.begin_peek(B, sub(range, 1, 1).start);
    assert_eq!(next_fault(&uffd), (sub(range, 1, 1).start, false));
    assert!(is_silent(&uffd));
    uffd.wake(range).unwrap();
    wait_for_faults(&uffd, 2);
    let mut again = [next_fault(&uffd), next_fault(&uffd)];
    again.sort_unstable();
    assert_eq!(
        again,
        [(range.start, false), (sub(range, 1, 1).start, false)]
    );
    uffd.copy(range.start, &[2; 8192], PLAIN).unwrap();
    assert_eq!((peek.finish(), unread.finish()), (2, 2));
}

#[test]
fn a_message_that_a_dead_pager_read_is_lost_and_its_act_done() {
    let _bound = bounded();
    let agent = Agent::start();
    let (uffd, number) = agent.uffd();
    let range = agent.served(&uffd, 16);
    let pager = Pager::of(&agent, number);
    let drop = agent.begin_madvise(A, range, libc::MADV_DONTNEED);
    pager.read();
    pager.agent.kill();
    assert_eq!(drop.finish(), 0);
    assert_eq!(present(&agent, range).count(), 0);
    uffd.wake(range).unwrap();
    assert!(is_silent(&uffd));
}

#[test]
fn a_message_that_was_not_read_waits_for_the_successor() {
    let _bound = bounded();
    let agent = Agent::start();
    let (uffd, number) = agent.uffd();
    let range = agent.served(&uffd, 16);
    let successor = another(&uffd);
    drop(uffd);
    let pager = Pager::of(&agent, number);
    let drop = agent.begin_madvise(A, range, libc::MADV_DONTNEED);
    wait_readable(&successor);
    pager.agent.kill();
    assert!(!drop.is_done());
    assert_eq!(next_event(&successor), Event::Remove(range));
    assert_eq!(drop.finish(), 0);
}

#[test]
fn a_childs_descriptor_dies_with_the_pager_that_read_the_fork() {
    let _bound = bounded();
    let agent = Agent::start();
    let (uffd, number) = agent.uffd();
    let range = agent.served(&uffd, 16);
    let pager = Pager::of(&agent, number);
    let fork = agent.begin_fork(A);
    pager.read();
    let child = agent.child_of(fork);
    assert!(flags_at(&child, range).unwrap().has(VmFlags::UFFD_MISSING));
    pager.agent.kill();
    within("the descriptor's end", || {
        (!flags_at(&child, range).unwrap().has(VmFlags::UFFD_MISSING)).then_some(())
    });
    // The parent's is open elsewhere.
    assert!(flags_at(&agent, range).unwrap().has(VmFlags::UFFD_MISSING));
}

#[test]
fn a_process_that_shares_the_pagers_descriptors_keeps_them_also_later_ones() {
    let _bound = bounded();
    let agent = Agent::start();
    let (uffd, number) = agent.uffd();
    let range = agent.map(16);
    uffd.register(range).unwrap();
    let pager = Pager::of(&agent, number);
    // First the guardian, then the descriptor that the fork's message brings.
    let guardian = pager.agent.run(A, "share_descriptors");
    let guardian = PidFd::open(i32::try_from(guardian).unwrap()).unwrap();
    let fork = agent.begin_fork(A);
    pager.read();
    let child = agent.child_of(fork);
    let named = pager
        .agent
        .run(A, &format!("word {}", pager.buffer.start.offset(8)));
    pager.agent.kill();
    let kept = guardian.get_fd(i32::try_from(named).unwrap()).unwrap();
    let child_uffd = Uffd::from_owned(kept);
    let peek = child.begin_peek(A, range.start);
    assert_eq!(next_fault(&child_uffd), (range.start, false));
    child_uffd.copy(range.start, &[5; 4096], PLAIN).unwrap();
    assert_eq!(peek.finish(), 5);
    guardian.send_signal(libc::SIGKILL).unwrap();
    within("the guardian's end", || guardian.has_exited().then_some(()));
}

/// Maps shared words in an agent.
fn share(agent: &Agent, words: &SharedWords) -> u64 {
    let own = i32::try_from(std::process::id()).unwrap();
    let fd = agent.take_descriptor(own, words.as_fd().as_raw_fd());
    let len = words.words().len() as u64 * 8;
    let flags = libc::MAP_SHARED | libc::MAP_POPULATE;
    let prot = libc::PROT_READ | libc::PROT_WRITE;
    let at = agent.call(libc::SYS_mmap, &[0, len, word(prot), word(flags), fd, 0]);
    assert!(at > 0, "mmap: {at}");
    at.cast_unsigned()
}

#[test]
fn a_message_read_into_shared_memory_outlives_a_kill_of_its_reader() {
    let _bound = bounded();
    let mut draw = Draw::new(session::seed());
    let journal = SharedWords::create("conformance", FRONT_WORDS + SLOTS * 4).unwrap();
    assert!(journal.populate_and_lock());
    let (front, slots) = journal
        .words()
        .split_at(usize::try_from(FRONT_WORDS).unwrap());
    let agent = Agent::start();
    let (uffd, number) = agent.uffd();
    let range = agent.served(&uffd, 1);
    let shared = share(&agent, &journal);
    let (at, len) = (range.start, range.len());
    let victim = agent.begin(A, &format!("drop_and_count {at} {len} {shared:#x}"));

    let pagers = Agent::start();
    let theirs = pagers.take_descriptor(agent.pid, number);
    let shared = share(&pagers, &journal) + FRONT_WORDS * 8;
    let (mut told, mut most) = (0, 0);
    for round in 0..KILLS {
        let pager = pagers.fork();
        let first = told % SLOTS;
        let read = format!("read_into_slots {theirs} {shared:#x} {SLOTS} {first}");
        let _never_done = pager.begin(A, &read);
        thread::sleep(Duration::from_micros(draw.between(0, 3000)));
        pager.kill();
        assert_eq!(
            pagers.call(libc::SYS_wait4, &[word(pager.pid), 0, 0, 0]),
            i64::from(pager.pid)
        );
        // The next message waits unread: every drop before it has come back.
        wait_readable(&uffd);
        let before = told;
        loop {
            let slot = usize::try_from(told % SLOTS).unwrap() * EVENT_WORDS;
            if slots[slot].load(Ordering::Acquire) == 0 {
                break;
            }
            let message = std::array::from_fn(|i| slots[slot + i].swap(0, Ordering::AcqRel));
            assert_eq!(Event::decode(&message), Some(Event::Remove(range)));
            told += 1;
        }
        most = most.max(told - before);
        let done = front[0].load(Ordering::Acquire);
        assert_eq!(told, done, "round {round}: messages in the journal, drops");
    }
    println!("{told} messages through {KILLS} kills, at most {most} of one reader");
    assert!(told > KILLS && most < SLOTS);
    front[1].store(1, Ordering::Release);
    let _ = read_until_done(&uffd, &victim);
}
