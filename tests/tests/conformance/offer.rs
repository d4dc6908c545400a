//! Offering pages to the kernel: what FREE and PAGEOUT drop, what they keep, and what gets lost.

use std::fs;
use std::os::unix::ffi::OsStrExt as _;
use std::path::PathBuf;

use holo_pager::sys::advise::pageout;
use holo_pager::sys::mem::TargetMem;
use holo_pager::sys::procfs::PinCount;
use holo_pager::sys::ring::{Advice, AdviceRing};
use holo_pager::sys::uffd::Event;
use holo_proto::{AddrRange, SubpageMask};

use crate::agent::{A, Agent, B};
use crate::support::{
    PLAIN, advise, advise_served, bounded, is_silent, look, next_event, next_fault, present,
    read_until_done, reclaim, settled, sub, wait_readable, within, word,
};

/// A file full of sevens, on a disk. Removed when dropped.
struct Sevens(PathBuf);

impl Sevens {
    fn create(name: &str) -> Self {
        let name = format!("holo-conformance-{}-{name}", std::process::id());
        let path = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(name);
        fs::create_dir_all(env!("CARGO_TARGET_TMPDIR")).unwrap();
        fs::write(&path, [7; 65536]).unwrap();
        // On the disk already: reading past the cache writes back what is not, which takes its time.
        fs::File::open(&path).unwrap().sync_all().unwrap();
        Self(path)
    }

    /// Opens it in an agent.
    fn open(&self, agent: &Agent, flags: i32) -> u64 {
        let scratch = agent.map(1);
        let path = str::from_utf8(self.0.as_os_str().as_bytes()).unwrap();
        agent.run(A, &format!("text {} {path}", scratch.start));
        let fd = agent.call(libc::SYS_open, &[scratch.start.0, word(flags)]);
        assert!(fd >= 0, "open: {fd}");
        fd.cast_unsigned()
    }
}

impl Drop for Sevens {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}

/// An io_uring of the agent's own pins the first 16 subpages.
fn pin(agent: &Agent, range: AddrRange) {
    let step = format!("pin {} 65536", range.start);
    assert_eq!(agent.run(A, &step), 0);
    agent.drain();
}

/// An agent with a ring and two pages of ones, the first of which is pinned.
fn pinned() -> (Agent, AdviceRing, AddrRange) {
    let agent = Agent::start();
    let ring = agent.ring();
    let range = agent.map(32);
    agent.fill(range, 1);
    pin(&agent, range);
    (agent, ring, range)
}

/// A device writes sevens to the first subpage.
fn device_writes(agent: &Agent, file: u64, range: AddrRange) {
    let step = format!("read_into_pinned {file} {} 4096", range.start);
    assert_eq!(agent.run(A, &step), 4096);
}

#[test]
fn pinned_pages_stay() {
    let _bound = bounded();
    let (agent, mut ring, range) = pinned();
    let pins = PinCount::open(agent.pid).unwrap();
    assert!(pins.bytes().unwrap() >= 65536);
    assert_eq!(advise(&mut ring, range, Advice::Free), 0);
    assert_eq!(reclaim(&agent, range), SubpageMask::ALL);
    assert_eq!(present(&agent, sub(range, 16, 16)), SubpageMask::NONE);
    assert!(agent.holds(sub(range, 0, 16), 1));
    // A pin that ends protects no longer.
    assert_eq!(agent.run(A, "unpin"), 0);
    assert_eq!(pins.bytes().unwrap(), 0);
    assert_eq!(reclaim(&agent, range), SubpageMask::NONE);
}

#[test]
fn dropping_a_pinned_page_loses_what_the_device_writes() {
    let _bound = bounded();
    let (agent, mut ring, range) = pinned();
    let file = Sevens::create("dropped").open(&agent, libc::O_RDONLY);
    assert_eq!(advise(&mut ring, range, Advice::DontNeed), 0);
    assert_eq!(present(&agent, range), SubpageMask::NONE);
    device_writes(&agent, file, range);
    assert_eq!(agent.peek(range.start), 0);
}

#[test]
fn what_a_device_wrote_before_the_free_is_missed_by_a_read_before_it_and_seen_by_one_after_it() {
    let _bound = bounded();
    let (agent, mut ring, range) = pinned();
    let file = Sevens::create("between").open(&agent, libc::O_RDONLY);
    let page = sub(range, 0, 16);
    let (uffd, _) = agent.uffd();
    uffd.register(range).unwrap();
    let mem = TargetMem::open(agent.pid).unwrap();
    let mut bytes = [0; 4096];
    uffd.protect(page).unwrap();
    assert_eq!(mem.read(page.start, &mut bytes), Ok(4096));
    assert_eq!(bytes, [1; 4096]);
    // The protection is no obstacle to a device.
    device_writes(&agent, file, range);
    assert!(is_silent(&uffd));
    assert_eq!(agent.run(A, "unpin"), 0);
    let (result, _) = advise_served(&mut ring, &uffd, page, Advice::Free);
    assert_eq!(result, 0);
    assert_eq!(mem.read(page.start, &mut bytes), Ok(4096));
    assert_eq!(bytes, [7; 4096]);
    // The kernel has nothing against dropping it: only that second read has the bytes.
    uffd.unprotect(page, true).unwrap();
    assert_eq!(reclaim(&agent, page), SubpageMask::NONE);
}

#[test]
fn what_a_registered_buffer_got_after_the_free_is_lost_when_it_is_unregistered() {
    let _bound = bounded();
    let (agent, mut ring, range) = pinned();
    let file = Sevens::create("after").open(&agent, libc::O_RDONLY);
    assert_eq!(advise(&mut ring, range, Advice::Free), 0);
    device_writes(&agent, file, range);
    assert_eq!(agent.peek(range.start), 7);
    assert_eq!(reclaim(&agent, range), SubpageMask::ALL);
    // Nobody marked the page dirty: this is why ranges of a process with VmPin are left alone.
    assert_eq!(agent.run(A, "unpin"), 0);
    assert_eq!(reclaim(&agent, range), SubpageMask::NONE);
    assert_eq!(agent.peek(range.start), 0);
}

#[test]
fn a_buffer_registered_after_the_free_does_not_mark_its_page_either() {
    let _bound = bounded();
    let agent = Agent::start();
    let mut ring = agent.ring();
    let range = agent.map(16);
    agent.fill(range, 1);
    let file = Sevens::create("late").open(&agent, libc::O_RDONLY);
    assert_eq!(advise(&mut ring, range, Advice::Free), 0);
    // Nothing was pinned when the page was offered, and nothing is when it is dropped.
    pin(&agent, range);
    device_writes(&agent, file, range);
    assert_eq!(agent.run(A, "unpin"), 0);
    assert!(agent.holds(sub(range, 0, 1), 7));
    assert_eq!(reclaim(&agent, range), SubpageMask::NONE);
    assert_eq!(agent.peek(range.start), 0);
}

#[test]
fn a_read_past_the_cache_into_a_protected_page_waits_until_it_is_unprotected() {
    let _bound = bounded();
    let agent = Agent::start();
    let file = Sevens::create("waits").open(&agent, libc::O_RDONLY | libc::O_DIRECT);
    let (uffd, _) = agent.uffd();
    let range = agent.served(&uffd, 16);
    uffd.protect(range).unwrap();
    let read = agent.begin_call(A, libc::SYS_pread64, &[file, range.start.0, 4096, 0]);
    assert_eq!(next_fault(&uffd), (range.start, true));
    assert!(agent.holds(range, 1));
    uffd.unprotect(range, true).unwrap();
    assert_eq!(read.finish(), 4096);
    assert!(agent.holds(sub(range, 0, 1), 7));
}

#[test]
fn what_a_read_past_the_cache_brought_after_the_free_stays() {
    let _bound = bounded();
    let agent = Agent::start();
    let file = Sevens::create("stays").open(&agent, libc::O_RDONLY | libc::O_DIRECT);
    let mut ring = agent.ring();
    let range = agent.map(16);
    agent.fill(range, 1);
    assert_eq!(advise(&mut ring, range, Advice::Free), 0);
    let at = sub(range, 3, 2);
    let got = agent.call(libc::SYS_pread64, &[file, at.start.0, at.len(), 0]);
    assert_eq!(got, 8192);
    assert_eq!(reclaim(&agent, range), SubpageMask(0b1_1000));
    assert!(agent.holds(at, 7));
}

#[test]
fn pages_shared_by_a_fork_are_passed_by_at_a_reclaim_and_their_offer_stands() {
    let _bound = bounded();
    let agent = Agent::start();
    let mut ring = agent.ring();
    let range = agent.map(16);
    agent.fill(range, 1);
    let child = agent.fork();
    assert_eq!(look(&agent, range).exclusive, SubpageMask::NONE);
    assert_eq!(advise(&mut ring, range, Advice::Free), 0);
    assert_eq!(reclaim(&agent, range), SubpageMask::ALL);
    assert_eq!(reclaim(&child, range), SubpageMask::ALL);
    // The child's write takes a copy, and one page is the parent's alone: the FREE did mark it.
    child.poke(range.start, 2);
    assert_eq!(reclaim(&agent, range), SubpageMask::ALL.without(0));
    assert!(child.holds(sub(range, 1, 15), 1));
    // So it did all others. Without another FREE they go as soon as the child has.
    child.kill();
    assert_eq!(reclaim(&agent, range), SubpageMask::NONE);
}

#[test]
fn pages_shared_by_a_fork_that_were_written_past_the_page_table_refuse_the_offer() {
    let _bound = bounded();
    let agent = Agent::start();
    let file = Sevens::create("shared").open(&agent, libc::O_RDONLY | libc::O_DIRECT);
    let mut ring = agent.ring();
    let range = agent.map(16);
    agent.fill(range, 1);
    // What a device wrote has its mark at the page itself, where a FREE by one of two owners leaves it.
    let got = agent.call(libc::SYS_pread64, &[file, range.start.0, 8192, 0]);
    assert_eq!(got, 8192);
    let child = agent.fork();
    assert_eq!(advise(&mut ring, range, Advice::Free), 0);
    child.kill();
    assert_eq!(reclaim(&agent, range), SubpageMask(0b11));
    assert!(agent.holds(sub(range, 0, 2), 7));
    assert_eq!(advise(&mut ring, range, Advice::Free), 0);
    assert_eq!(reclaim(&agent, range), SubpageMask::NONE);
}

#[test]
fn a_fork_after_the_free_takes_the_offer_along() {
    let _bound = bounded();
    let agent = Agent::start();
    let mut ring = agent.ring();
    let range = agent.map(16);
    agent.fill(range, 1);
    assert_eq!(advise(&mut ring, range, Advice::Free), 0);
    let child = agent.fork();
    child.poke(range.start, 2);
    assert_eq!(agent.begin_unmap(A, range).finish(), 0);
    // Nobody gave advice on the child's memory, and still the kernel drops what it did not write.
    assert!(child.holds(sub(range, 1, 15), 1));
    assert_eq!(reclaim(&child, range), SubpageMask::one(0));
    assert_eq!(child.peek(sub(range, 1, 1).start), 0);
}

#[test]
fn locked_memory_refuses_the_free_before_any_message() {
    let _bound = bounded();
    let agent = Agent::start();
    let (uffd, _) = agent.uffd();
    let mut ring = agent.ring();
    let range = agent.served(&uffd, 16);
    let lock = |part: AddrRange| {
        assert_eq!(agent.call(libc::SYS_mlock, &[part.start.0, part.len()]), 0);
    };
    lock(range);
    let (result, seen) = advise_served(&mut ring, &uffd, range, Advice::Free);
    assert_eq!((result, seen), (-libc::EINVAL, vec![]));
    // In the middle: what lies before is done, what lies behind is not, and one number is all that is said.
    let range = agent.served(&uffd, 16);
    lock(sub(range, 6, 1));
    agent.drain();
    let (result, seen) = advise_served(&mut ring, &uffd, range, Advice::Free);
    assert_eq!(result, -libc::EINVAL);
    assert_eq!(seen, [Event::Remove(sub(range, 0, 6))]);
    for part in [sub(range, 0, 6), sub(range, 7, 9)] {
        agent.drain();
        assert_eq!(pageout(&agent.pidfd, &[part]), Ok(part.len()));
    }
    assert_eq!(present(&agent, range), SubpageMask(0xffc0));
}

#[test]
fn a_free_that_meets_a_new_mapping_offers_it_too_and_populating_takes_that_back() {
    let _bound = bounded();
    for repaired in [false, true] {
        let agent = Agent::start();
        let (uffd, _) = agent.uffd();
        let mut ring = agent.ring();
        let range = agent.served(&uffd, 16);
        ring.submit(range, Advice::Free, 1).unwrap();
        ring.wake_if_needed().unwrap();
        wait_readable(&uffd);
        // While the ring waits for its message to be read, another thread puts something else there.
        let tid = agent.tid(A);
        let unmap = agent.begin_unmap(A, range);
        agent.wait_until_in(tid, "userfaultfd_event_wait");
        agent.map_at(B, range);
        agent.madvise(range, libc::MADV_NOHUGEPAGE);
        agent.fill(range, 5);
        assert_eq!(next_event(&uffd), Event::Remove(range));
        let done = within("the advice", || ring.reap());
        assert_eq!(done.result, 0);
        assert_eq!(read_until_done(&uffd, &unmap), [Event::Unmap(range)]);
        assert!(agent.holds(range, 5));
        if repaired {
            assert_eq!(advise(&mut ring, range, Advice::PopulateWrite), 0);
        }
        let left = reclaim(&agent, range);
        if repaired {
            assert_eq!(left, SubpageMask::ALL);
            assert!(agent.holds(range, 5));
        } else {
            assert_eq!(left, SubpageMask::NONE);
        }
    }
}

#[test]
fn a_page_that_is_dropped_while_protected_leaves_no_mark() {
    let _bound = bounded();
    let agent = Agent::start();
    let (uffd, _) = agent.uffd();
    let mut ring = agent.ring();
    let range = agent.served(&uffd, 16);
    uffd.protect(range).unwrap();
    let (result, _) = advise_served(&mut ring, &uffd, range, Advice::Free);
    assert_eq!(result, 0);
    assert_eq!(look(&agent, range).protected, SubpageMask::ALL);
    assert_eq!(reclaim(&agent, range), SubpageMask::NONE);
    assert_eq!(look(&agent, range).protected, SubpageMask::NONE);
    let poke = agent.begin_poke(A, range.start, 2);
    assert_eq!(next_fault(&uffd), (range.start, false));
    settled(|| uffd.copy(range.start, &[1; 65536], PLAIN)).unwrap();
    poke.finish();
    assert_eq!(agent.peek(range.start), 2);
}

#[test]
fn a_write_between_free_and_reclaim_that_waited_for_protection_keeps_the_page() {
    let _bound = bounded();
    let agent = Agent::start();
    let (uffd, _) = agent.uffd();
    let mut ring = agent.ring();
    let range = agent.served(&uffd, 16);
    uffd.protect(range).unwrap();
    let at = sub(range, 7, 1).start;
    let poke = agent.begin_poke(A, at, 2);
    assert_eq!(next_fault(&uffd), (at, true));
    let (result, _) = advise_served(&mut ring, &uffd, range, Advice::Free);
    assert_eq!(result, 0);
    uffd.unprotect(range, true).unwrap();
    poke.finish();
    assert_eq!(reclaim(&agent, range), SubpageMask::one(7));
    assert_eq!(agent.peek(at), 2);
}

#[test]
fn nobody_else_may_free_or_drop_a_processs_memory() {
    let _bound = bounded();
    let (agent, other) = (Agent::start(), Agent::start());
    let range = agent.map(16);
    agent.fill(range, 1);
    let scratch = other.map(1);
    other.words(scratch.start, &[range.start.0, range.len()]);
    let process = other.call(libc::SYS_pidfd_open, &[word(agent.pid), 0]);
    let advise = |advice: i32| {
        let arguments = [process.cast_unsigned(), scratch.start.0, 1, word(advice), 0];
        other.call(libc::SYS_process_madvise, &arguments)
    };
    let refused = -i64::from(libc::EINVAL);
    for advice in [
        libc::MADV_FREE,
        libc::MADV_DONTNEED,
        libc::MADV_POPULATE_WRITE,
    ] {
        assert_eq!(advise(advice), refused, "advice {advice}");
    }
    assert_eq!(advise(libc::MADV_PAGEOUT), 65536);
    assert!(agent.holds(range, 1));
}
