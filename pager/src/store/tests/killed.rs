//! A real process, a real memfd and a real `kill -9`: what its map holds is in the store.
//!
//! The writer is this test's own program, started again. Its map is in shared memory as well; it keeps
//! the rules that `embedded` asks of a caller.

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::os::fd::{AsFd, AsRawFd};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use holo_proto::{PAGE_SUBPAGES, SubpageMask};

use super::content::{Content, page_of};
use super::model::empty_frame;
use crate::store::EmbeddedStore;
use crate::store::api::{Location, PageStore};
use crate::store::subframe::SUBPAGE;
use crate::sys::arena::{SharedBytes, SharedWords};

const IS_WRITER: &str = "HOLO_TEST_STORE_WRITER";
const TEST: &str = "store::tests::killed::what_the_map_of_a_killed_process_holds_is_there";
const CAPACITY: u64 = 17 << 20;
const LIMIT: u64 = 16 << 20;
/// Pages in the map. Each has a word that says how often it was put, then a word a subpage.
const PAGES: usize = 150;
const WORDS: usize = 1 + PAGE_SUBPAGES;
/// Bounds a writer that is not killed.
const PUTS_MAX: u64 = 1_000_000;

/// What page `page` holds at its put number `round`.
fn contents(page: usize, round: u64) -> Vec<Content> {
    let seed = (page as u64) << 32 | round << 4;
    let of = |i: u64| match (i + round) % 4 {
        0 => Content::Filled(seed | i | 1 << 60),
        1 => Content::Text(seed | i),
        2 => Content::Noise(seed | i),
        _ => Content::AlmostZero(u16::try_from((seed ^ seed >> 32 ^ (i * 256)) % 4096).unwrap()),
    };
    (0..1 + (round + page as u64) % 16).map(of).collect()
}

fn write_until_killed() {
    let words = SharedWords::create("test-map", (PAGES * WORDS) as u64).unwrap();
    let arena = SharedBytes::create("test-store", CAPACITY).unwrap();
    let (map, pages) = (words.as_fd().as_raw_fd(), arena.as_fd().as_raw_fd());
    let mut store = EmbeddedStore::create(arena, LIMIT);
    println!("\nfds {map} {pages} of {}", std::process::id());
    for n in 0..PUTS_MAX {
        let page = usize::try_from(n * 7 % PAGES as u64).unwrap();
        let entry = &words.words()[page * WORDS..][..WORDS];
        // Out of the map, then released.
        for word in &entry[1..] {
            let old = word.swap(0, Ordering::SeqCst);
            if old != 0 {
                store.release(Location(old));
            }
        }
        let round = entry[0].fetch_add(1, Ordering::SeqCst) + 1;
        let new = store.put_now(&page_of(&contents(page, round)), SubpageMask::ALL);
        // Put, then into the map.
        for (word, location) in entry[1..].iter().zip(new.unwrap()) {
            word.store(location.map_or(0, |l| l.0), Ordering::SeqCst);
        }
    }
}

struct Writer(Child);

impl Drop for Writer {
    fn drop(&mut self) {
        // Fails only when it has ended, which is what is wanted.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn open(pid: &str, fd: &str) -> File {
    let path = format!("/proc/{pid}/fd/{fd}");
    File::options().read(true).write(true).open(path).unwrap()
}

fn check(words: &[AtomicU64], arena: SharedBytes) -> usize {
    let word = |i: usize| words[i].load(Ordering::SeqCst);
    let is_location = |i: &usize| !i.is_multiple_of(WORDS) && word(*i) != 0;
    let live: Vec<usize> = (0..words.len()).filter(is_location).collect();
    let locations = live.iter().map(|&i| Location(word(i)));
    let mut store = EmbeddedStore::recover(arena, LIMIT, locations).unwrap();
    assert_eq!(store.refused(), 0);
    assert_eq!(store.usage().raw_bytes, (live.len() * SUBPAGE) as u64);
    let mut frame = empty_frame();
    for &i in &live {
        let (page, subpage) = (i / WORDS, i % WORDS - 1);
        let mut wanted = [None; PAGE_SUBPAGES];
        wanted[subpage] = Some(Location(word(i)));
        assert_eq!(store.get_now(&wanted, &mut frame), Ok(()));
        let expected = contents(page, word(page * WORDS))[subpage].bytes();
        assert_eq!(frame[subpage * SUBPAGE..][..SUBPAGE], expected);
    }
    for &i in &live {
        store.release(Location(word(i)));
    }
    assert_eq!((store.held_bytes(), store.refused()), (0, 0));
    // Only the superblock's page is left, and the one in which the file names its owner.
    assert!(store.into_arena().taken_bytes().unwrap() <= 2 * 4096);
    live.len()
}

#[test]
fn what_the_map_of_a_killed_process_holds_is_there() {
    if std::env::var_os(IS_WRITER).is_some() {
        write_until_killed();
        return;
    }
    let mut found = 0;
    for round in 0..20 {
        let child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", TEST, "--nocapture"])
            .env(IS_WRITER, "1")
            .stdout(Stdio::piped())
            .spawn();
        let mut writer = Writer(child.unwrap());
        let lines = BufReader::new(writer.0.stdout.take().unwrap()).lines();
        let line = lines.map_while(Result::ok).find(|l| l.starts_with("fds "));
        let line = line.expect("the writer says where its memory is");
        let parts: Vec<&str> = line.split(' ').collect();
        let (map, arena) = (open(parts[4], parts[1]), open(parts[4], parts[2]));
        std::thread::sleep(Duration::from_micros(15_000 + round * 1_777));
        writer.0.kill().unwrap();
        writer.0.wait().unwrap();
        let words = SharedWords::from_fd(map.into()).unwrap();
        let arena = SharedBytes::from_fd(arena.into()).unwrap();
        found += check(words.words(), arena);
    }
    assert!(found > 0, "some writer got to write");
}
