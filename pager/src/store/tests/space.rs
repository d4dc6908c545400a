//! Room: what is used, what is given back, and what happens when there is none.

use holo_proto::{PAGE_SUBPAGES, SubpageMask};

use super::arenas::WatchedArena;
use super::content::{Content, page_of};
use super::model::Map;
use crate::store::api::{PageStore, StoreError, StoreUsage};
use crate::store::{Arena, EmbeddedStore, HeapArena};

const MIB: u64 = 1 << 20;

fn noisy(n: u64) -> Vec<Content> {
    (0..16).map(|i| Content::Noise(n << 8 | i)).collect()
}

#[test]
fn a_page_of_zeros_stores_nothing() {
    let mut store = EmbeddedStore::create(HeapArena::new(3 << 20), MIB);
    let locations = store.put_now(&page_of(&[]), SubpageMask::ALL);
    assert_eq!(locations, Ok([None; PAGE_SUBPAGES]));
    let locations = store.put_now(&page_of(&noisy(1)), SubpageMask::NONE);
    assert_eq!(locations, Ok([None; PAGE_SUBPAGES]));
    assert_eq!(store.usage(), StoreUsage::default());
    assert_eq!(store.held_bytes(), 0);
}

#[test]
fn a_filled_subpage_takes_one_unit() {
    let mut store = EmbeddedStore::create(HeapArena::new(3 << 20), MIB);
    let page = page_of(&[Content::Filled(7)]);
    store.put_now(&page, SubpageMask::ALL).unwrap();
    assert_eq!(store.usage().raw_bytes, 4096);
    assert_eq!(store.usage().stored_bytes, 64);
}

#[test]
fn usage_follows_blobs_and_subpages_exactly() {
    let mut store = EmbeddedStore::create(HeapArena::new(3 << 20), 2 * MIB);
    let locations = store
        .put_now(&page_of(&noisy(1)), SubpageMask::ALL)
        .unwrap();
    let full = store.usage();
    assert_eq!(full.raw_bytes, 65536);
    assert!(full.stored_bytes.is_multiple_of(64) && full.stored_bytes >= 65536 + 24 + 16 * 28);
    store.retain(locations[3].unwrap());
    assert_eq!(store.usage(), full, "a reference costs nothing");
    for (i, location) in locations.iter().enumerate() {
        store.release(location.unwrap());
        let shared = u64::from(i >= 3);
        let usage = store.usage();
        assert_eq!(usage.raw_bytes, 4096 * (15 - i as u64 + shared));
        assert_eq!(usage.stored_bytes, full.stored_bytes);
    }
    store.release(locations[3].unwrap());
    assert_eq!(store.usage(), StoreUsage::default());
}

#[test]
fn a_full_store_says_so_and_goes_on() {
    let mut store = EmbeddedStore::create(HeapArena::new(5 << 20), 3 * MIB);
    let mut map = Map::default();
    let mut puts = 0;
    while map.put(&mut store, &noisy(puts), SubpageMask::ALL).is_ok() {
        puts += 1;
    }
    assert_eq!(puts, 3 * 15, "15 plain pages a segment");
    assert_eq!(store.held_bytes(), 3 * MIB);
    map.check(&mut store);
    let before = (store.usage(), store.held_bytes());
    let refused = store.put_now(&page_of(&noisy(999)), SubpageMask::ALL);
    assert_eq!(refused, Err(StoreError::Full));
    assert_eq!((store.usage(), store.held_bytes()), before);
    // The subpages of one page make room for one page again.
    let blob = map.at(0).0.0 >> 4;
    for _ in 0..16 {
        let i = map.locations().position(|l| l.0 >> 4 == blob);
        store.release(map.remove(i.unwrap()));
    }
    assert_eq!(map.put(&mut store, &noisy(999), SubpageMask::ALL), Ok(()));
    map.check(&mut store);
}

#[test]
fn single_slots_of_a_full_segment_are_found_again() {
    let mut store = EmbeddedStore::create(HeapArena::new(2 << 20), MIB);
    let mut map = Map::default();
    let mut next = 1..;
    let mut put = |store: &mut _, map: &mut Map| {
        let content = Content::Filled(next.next().unwrap());
        map.put(store, &[content], SubpageMask::ALL)
    };
    while put(&mut store, &mut map).is_ok() {}
    let slots = map.len();
    assert_eq!(slots, (1 << 20) / 64 - 32);
    // From the last to the first, alone and in pairs.
    for i in [slots - 1, 9000, 64, 63, 1, 0] {
        store.release(map.remove(i));
        assert_eq!(put(&mut store, &mut map), Ok(()));
        assert_eq!(put(&mut store, &mut map), Err(StoreError::Full));
    }
    store.release(map.remove(12_345));
    store.release(map.remove(123));
    assert_eq!(put(&mut store, &mut map), Ok(()));
    assert_eq!(put(&mut store, &mut map), Ok(()));
    assert_eq!(put(&mut store, &mut map), Err(StoreError::Full));
    map.check(&mut store);
}

#[test]
fn the_capacity_bounds_a_store_whose_limit_is_larger() {
    let mut store = EmbeddedStore::create(HeapArena::new((3 << 20) + 4096), u64::MAX);
    let page = page_of(&noisy(1));
    let puts = (0..).take_while(|_| store.put_now(&page, SubpageMask::ALL).is_ok());
    assert_eq!(puts.count(), 2 * 15);
}

#[test]
fn no_segment_at_all_is_just_full() {
    for (capacity, limit) in [(64, u64::MAX), (1 << 20, u64::MAX), (3 << 20, MIB - 1)] {
        let mut store = EmbeddedStore::create(HeapArena::new(capacity), limit);
        let result = store.put_now(&page_of(&noisy(1)), SubpageMask::ALL);
        assert_eq!(result, Err(StoreError::Full));
    }
}

#[test]
fn a_larger_class_lends_a_slot_when_no_segment_is_left() {
    let mut store = EmbeddedStore::create(HeapArena::new(3 << 20), MIB);
    store
        .put_now(&page_of(&noisy(1)), SubpageMask::ALL)
        .unwrap();
    let large = store.usage().stored_bytes;
    store
        .put_now(&page_of(&[Content::Filled(1)]), SubpageMask::ALL)
        .unwrap();
    assert_eq!(store.usage().stored_bytes, 2 * large);
}

#[test]
fn an_emptied_segment_is_given_back_and_serves_any_class() {
    let mut store = EmbeddedStore::create(WatchedArena::new(4 << 20), 3 * MIB);
    assert_eq!(
        store.arena.given_back,
        [(MIB, 3 * MIB)],
        "a new store starts from nothing"
    );
    store.arena.given_back.clear();
    let mut pages = Vec::new();
    while let Ok(locations) = store.put_now(&page_of(&noisy(7)), SubpageMask::ALL) {
        pages.push(locations);
    }
    assert_eq!(pages.len(), 45);
    // Every second page goes: nothing is empty yet, and no small blob finds a segment.
    let (gone, kept): (Vec<_>, Vec<_>) = pages.iter().enumerate().partition(|(i, _)| i % 2 == 0);
    for (_, locations) in gone {
        locations.iter().flatten().for_each(|l| store.release(*l));
    }
    assert_eq!(
        (store.held_bytes(), store.arena.given_back.len()),
        (3 * MIB, 0)
    );
    for (_, locations) in kept {
        locations.iter().flatten().for_each(|l| store.release(*l));
    }
    assert_eq!(store.held_bytes(), 0);
    let mut given_back = store.arena.given_back.clone();
    given_back.sort_unstable();
    assert_eq!(given_back, [(MIB, MIB), (2 * MIB, MIB), (3 * MIB, MIB)]);
    assert!(store.arena.bytes(MIB, 3 << 20).iter().all(|&b| b == 0));

    let small = page_of(&[Content::Filled(1)]);
    let puts = (0..).take_while(|_| store.put_now(&small, SubpageMask::ALL).is_ok());
    assert_eq!(puts.count(), 3 * ((1 << 20) - 2048) / 64);
    assert_eq!(store.usage().stored_bytes, 3 * (MIB - 2048));
}

#[test]
fn memory_that_cannot_be_had_is_a_full_store_until_there_is_some() {
    let mut arena = WatchedArena::new(4 << 20);
    arena.reservations = 0;
    let mut store = EmbeddedStore::create(arena, 3 * MIB);
    let page = page_of(&noisy(1));
    assert_eq!(
        store.put_now(&page, SubpageMask::ALL),
        Err(StoreError::Full)
    );
    assert_eq!(
        (store.held_bytes(), store.usage()),
        (0, StoreUsage::default())
    );
    store.arena.reservations = 1;
    let locations = store.put_now(&page, SubpageMask::ALL).unwrap();
    assert_eq!(store.held_bytes(), MIB);
    let mut frame = page_of(&[]);
    store.get_now(&locations, &mut frame).unwrap();
    assert_eq!(frame, page);
}
