//! The store against the obvious model: a list of locations with the bytes that each must give.

use std::collections::{HashMap, HashSet};

use holo_proto::{PAGE_SUBPAGES, SubpageMask};
use proptest::prelude::*;

use super::content::{Content, page_of};
use crate::store::api::{Location, PageBytes, PageStore, StoreError};
use crate::store::subframe::SUBPAGE;
use crate::store::{Arena, EmbeddedStore, HeapArena};

/// What the owner of a store holds: its map, entry by entry, and the bytes that each entry stands for.
#[derive(Default)]
pub(super) struct Map {
    entries: Vec<(Location, Vec<u8>)>,
}

impl Map {
    pub(super) fn locations(&self) -> impl Iterator<Item = Location> {
        self.entries.iter().map(|(location, _)| *location)
    }

    pub(super) fn len(&self) -> usize {
        self.entries.len()
    }

    pub(super) fn at(&self, i: usize) -> (Location, Vec<u8>) {
        self.entries[i].clone()
    }

    pub(super) fn insert(&mut self, entry: (Location, Vec<u8>)) {
        self.entries.push(entry);
    }

    pub(super) fn remove(&mut self, i: usize) -> Location {
        self.entries.swap_remove(i).0
    }

    /// Puts and enters what came back.
    pub(super) fn put<A: Arena>(
        &mut self,
        store: &mut EmbeddedStore<A>,
        contents: &[Content],
        mask: SubpageMask,
    ) -> Result<(), StoreError> {
        let page = page_of(contents);
        let locations = store.put_now(&page, mask)?;
        for (i, location) in locations.iter().enumerate() {
            let bytes = &page[i * SUBPAGE..][..SUBPAGE];
            let is_stored = mask.has(i) && bytes.iter().any(|&b| b != 0);
            assert_eq!(location.is_some(), is_stored);
            if let Some(location) = location {
                self.insert((*location, bytes.to_vec()));
            }
        }
        Ok(())
    }

    /// Every entry reads back, in page-sized groups and at shifted places; the figures are exact.
    pub(super) fn check<A: Arena>(&self, store: &mut EmbeddedStore<A>) {
        let mut frame = empty_frame();
        for group in self.entries.chunks(PAGE_SUBPAGES) {
            let mut wanted = [None; PAGE_SUBPAGES];
            for (i, (location, _)) in group.iter().enumerate() {
                wanted[i] = Some(*location);
            }
            frame.fill(0xcd);
            assert_eq!(store.get_now(&wanted, &mut frame), Ok(()));
            for (i, found) in frame.chunks_exact(SUBPAGE).enumerate() {
                match group.get(i) {
                    Some((_, expected)) => assert_eq!(found, expected),
                    None => assert!(found.iter().all(|&b| b == 0xcd), "not asked for"),
                }
            }
        }
        let distinct: HashSet<u64> = self.locations().map(|l| l.0).collect();
        let blobs: HashSet<u64> = distinct.iter().map(|l| l >> 4).collect();
        let usage = store.usage();
        assert_eq!(usage.raw_bytes, (distinct.len() * SUBPAGE) as u64);
        assert!(usage.stored_bytes >= 64 * blobs.len() as u64);
        assert!(usage.stored_bytes <= store.held_bytes());
        assert_eq!(usage.stored_bytes == 0, blobs.is_empty());
        assert_eq!(store.held_bytes() == 0, blobs.is_empty());
    }
}

pub(super) fn empty_frame() -> Box<PageBytes> {
    vec![0; PAGE_SUBPAGES * SUBPAGE]
        .into_boxed_slice()
        .try_into()
        .unwrap()
}

#[derive(Clone, Debug)]
enum Step {
    Put(Vec<Content>, u16),
    GetOne(usize, usize),
    Retain(usize),
    Release(usize),
    Recover,
}

fn content() -> impl Strategy<Value = Content> {
    prop_oneof![
        2 => Just(Content::Zero),
        1 => any::<u64>().prop_map(Content::Filled),
        1 => (0..4u64).prop_map(|b| Content::Filled(b * 0x0101_0101_0101_0101)),
        2 => (0..1000u64).prop_map(Content::Text),
        1 => any::<u64>().prop_map(Content::HalfNoise),
        2 => any::<u64>().prop_map(Content::Noise),
        1 => any::<u16>().prop_map(Content::AlmostZero),
    ]
}

fn step() -> impl Strategy<Value = Step> {
    let mask = prop_oneof![Just(u16::MAX), any::<u16>()];
    prop_oneof![
        6 => (prop::collection::vec(content(), 0..=PAGE_SUBPAGES), mask)
            .prop_map(|(contents, mask)| Step::Put(contents, mask)),
        4 => (any::<usize>(), 0..PAGE_SUBPAGES).prop_map(|(i, at)| Step::GetOne(i, at)),
        4 => any::<usize>().prop_map(Step::Retain),
        24 => any::<usize>().prop_map(Step::Release),
        1 => Just(Step::Recover),
    ]
}

const CAPACITY: usize = 7 << 20;
const LIMIT: u64 = 5 << 20;

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    #[test]
    fn any_history_reads_back_what_was_put(steps in prop::collection::vec(step(), 1..250)) {
        let mut store = EmbeddedStore::create(HeapArena::new(CAPACITY), LIMIT);
        let mut map = Map::default();
        let mut stale: HashMap<u64, Location> = HashMap::new();
        for step in steps {
            match step {
                Step::Put(contents, mask) => {
                    let before = (store.usage(), store.held_bytes());
                    let result = map.put(&mut store, &contents, SubpageMask(mask));
                    if let Err(error) = result {
                        prop_assert_eq!(error, StoreError::Full);
                        prop_assert_eq!((store.usage(), store.held_bytes()), before);
                    }
                }
                Step::GetOne(i, at) if map.len() > 0 => {
                    let (location, expected) = map.at(i % map.len());
                    let mut wanted = [None; PAGE_SUBPAGES];
                    wanted[at] = Some(location);
                    let mut frame = empty_frame();
                    prop_assert_eq!(store.get_now(&wanted, &mut frame), Ok(()));
                    prop_assert_eq!(&frame[at * SUBPAGE..][..SUBPAGE], expected);
                }
                Step::Retain(i) if map.len() > 0 => {
                    let entry = map.at(i % map.len());
                    store.retain(entry.0);
                    map.insert(entry);
                }
                Step::Release(i) if map.len() > 0 => {
                    let location = map.remove(i % map.len());
                    store.release(location);
                    if map.locations().all(|l| l != location) {
                        stale.insert(location.0, location);
                    }
                }
                Step::Recover => {
                    let before = (store.usage(), store.held_bytes());
                    let arena = store.into_arena();
                    store = EmbeddedStore::recover(arena, LIMIT, map.locations()).unwrap();
                    prop_assert_eq!((store.usage(), store.held_bytes()), before);
                }
                Step::GetOne(..) | Step::Retain(_) | Step::Release(_) => {}
            }
        }
        map.check(&mut store);
        prop_assert_eq!(store.refused(), 0);
        for location in stale.into_values() {
            let mut wanted = [None; PAGE_SUBPAGES];
            wanted[0] = Some(location);
            let found = store.get_now(&wanted, &mut empty_frame());
            prop_assert_eq!(found, Err(StoreError::NoSuchLocation));
        }
        while map.len() > 0 {
            store.release(map.remove(0));
        }
        map.check(&mut store);
        prop_assert_eq!(store.usage().integrity_failures, 0);
    }
}
