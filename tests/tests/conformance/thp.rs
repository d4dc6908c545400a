//! Huge pages: whether dropping a part of one gives memory back, and whether pages come together again.

use std::fs;

use holo_pager::sys::advise::pageout;
use holo_pager::sys::ring::Advice;
use holo_proto::AddrRange;
use holo_tests::torture::harness::memcg::MemoryCgroup;

use crate::agent::Agent;
use crate::support::{advise, bounded, present_count, within, word};

const HUGE_BYTES: u64 = 2 << 20;
const HUGE_PAGES: u64 = 32;
/// Of each huge page all but this is dropped.
const KEPT_BYTES: u64 = 64 << 10;
const MADV_COLLAPSE: i32 = 25;

/// An agent in a cgroup of its own, whose charge says how much memory it has: other tests do not disturb it.
/// The cgroup is dropped after the agent.
struct Scene {
    agent: Agent,
    range: AddrRange,
    cgroup: MemoryCgroup,
}

impl Scene {
    fn new(name: &str) -> Self {
        let cgroup = MemoryCgroup::create(name, None).unwrap();
        let agent = Agent::start();
        fs::write(cgroup.entrance(), agent.pid.to_string()).unwrap();
        let len = HUGE_PAGES * HUGE_BYTES;
        let room = agent.room((len + HUGE_BYTES) / 4096);
        let at = room.start.0.next_multiple_of(HUGE_BYTES);
        let range = AddrRange::new(at, at + len);
        agent.map_at(1, range);
        assert_eq!(agent.madvise(range, libc::MADV_HUGEPAGE), 0);
        agent.fill(range, 1);
        let scene = Self {
            agent,
            range,
            cgroup,
        };
        // A machine short of whole huge pages gives small ones: then there is nothing to see here.
        assert_eq!(scene.huge_bytes(), len, "no huge pages to be had");
        scene
    }

    fn huge_bytes(&self) -> u64 {
        let text = fs::read_to_string(format!("/proc/{}/smaps_rollup", self.agent.pid)).unwrap();
        let line = text
            .lines()
            .find_map(|line| line.strip_prefix("AnonHugePages:"));
        let kib = line.unwrap().trim().trim_end_matches(" kB");
        kib.parse::<u64>().unwrap() << 10
    }

    fn charged(&self) -> u64 {
        self.cgroup.charged_bytes().unwrap()
    }

    /// What is dropped of each huge page.
    fn parts(&self) -> Vec<AddrRange> {
        (0..HUGE_PAGES)
            .map(|i| {
                let start = self.range.start.0 + i * HUGE_BYTES;
                AddrRange::new(start + KEPT_BYTES, start + HUGE_BYTES)
            })
            .collect()
    }

    fn kept_subpages(&self) -> usize {
        usize::try_from(HUGE_PAGES * KEPT_BYTES / 4096).unwrap()
    }
}

#[test]
fn offering_a_part_of_a_huge_page_gives_its_memory_back() {
    let _bound = bounded();
    let scene = Scene::new("thp-offer");
    let mut ring = scene.agent.ring();
    let before = scene.charged();
    for part in scene.parts() {
        assert_eq!(advise(&mut ring, part, Advice::Free), 0);
    }
    within("the reclaim", || {
        scene.agent.drain();
        pageout(&scene.agent.pidfd, &scene.parts()).unwrap();
        (present_count(&scene.agent, scene.range) == scene.kept_subpages()).then_some(())
    });
    let dropped = HUGE_PAGES * (HUGE_BYTES - KEPT_BYTES);
    within("the memory", || {
        (before - scene.charged().min(before) > dropped * 9 / 10).then_some(())
    });
    assert_eq!(scene.huge_bytes(), 0);
}

#[test]
fn dropping_a_part_of_a_huge_page_at_once_gives_nothing_back() {
    let _bound = bounded();
    let scene = Scene::new("thp-drop");
    let before = scene.charged();
    for part in scene.parts() {
        assert_eq!(scene.agent.madvise(part, libc::MADV_DONTNEED), 0);
    }
    assert_eq!(
        present_count(&scene.agent, scene.range),
        scene.kept_subpages()
    );
    scene.agent.drain();
    let dropped = HUGE_PAGES * (HUGE_BYTES - KEPT_BYTES);
    // Half: a machine that is short of memory splits some of them meanwhile.
    assert!(before - scene.charged().min(before) < dropped / 2);
}

#[test]
fn missing_pages_of_a_served_mapping_are_not_collapsed_away() {
    let _bound = bounded();
    let scene = Scene::new("thp-collapse");
    let agent = &scene.agent;
    let huge = |i: u64| {
        let start = scene.range.start.0 + i * HUGE_BYTES;
        AddrRange::new(start, start + HUGE_BYTES)
    };
    let collapse = |range: AddrRange| {
        let arguments = [range.start.0, range.len(), word(MADV_COLLAPSE)];
        agent.call(libc::SYS_madvise, &arguments)
    };
    let hole_in = |range: AddrRange| AddrRange::new(range.end.0 - 4096, range.end.0);
    let (plain, served) = (huge(0), huge(1));
    for range in [plain, served] {
        assert_eq!(agent.madvise(hole_in(range), libc::MADV_DONTNEED), 0);
    }
    let (uffd, _) = agent.uffd();
    uffd.register(served).unwrap();
    assert_eq!(collapse(plain), 0);
    assert_eq!(present_count(agent, hole_in(plain)), 1);
    assert!(collapse(served) < 0);
    assert_eq!(present_count(agent, hole_in(served)), 0);
}
