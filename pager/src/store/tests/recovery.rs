//! What a successor makes of an arena and a map that do not fit each other.

use holo_proto::{PAGE_SUBPAGES, SubpageMask};

use super::content::{Content, page_of};
use super::model::{Map, empty_frame};
use crate::store::api::{Location, PageStore, StoreError};
use crate::store::location::Reference;
use crate::store::{Arena, EmbeddedStore, HeapArena};

const LIMIT: u64 = 4 << 20;

fn get(store: &mut EmbeddedStore<HeapArena>, location: Location) -> Result<(), StoreError> {
    let mut wanted = [None; PAGE_SUBPAGES];
    wanted[0] = Some(location);
    store.get_now(&wanted, &mut empty_frame())
}

/// Two blobs of one class, one of another; the entries of the first come first.
fn three_blobs() -> (EmbeddedStore<HeapArena>, Map) {
    let mut store = EmbeddedStore::create(HeapArena::new(5 << 20), LIMIT);
    let mut map = Map::default();
    for content in [Content::Noise(1), Content::Noise(2), Content::Filled(3)] {
        map.put(&mut store, &[content], SubpageMask::ALL).unwrap();
    }
    (store, map)
}

#[test]
fn multiplicity_comes_from_the_map() {
    let (store, mut map) = three_blobs();
    map.insert(map.at(0));
    let arena = store.into_arena();
    let mut store = EmbeddedStore::recover(arena, LIMIT, map.locations()).unwrap();
    let first = map.remove(0);
    store.release(first);
    map.check(&mut store);
    let last = map.locations().position(|l| l == first).unwrap();
    store.release(map.remove(last));
    map.check(&mut store);
    assert_eq!(get(&mut store, first), Err(StoreError::NoSuchLocation));
}

#[test]
fn what_the_map_does_not_hold_is_free() {
    let (store, map) = three_blobs();
    let (kept, dropped) = (map.at(1).0, map.at(0).0);
    let arena = store.into_arena();
    let mut store = EmbeddedStore::recover(arena, LIMIT, [kept].into_iter()).unwrap();
    assert_eq!(get(&mut store, kept), Ok(()));
    assert_eq!(get(&mut store, dropped), Err(StoreError::NoSuchLocation));
    assert_eq!(
        get(&mut store, map.at(2).0),
        Err(StoreError::NoSuchLocation)
    );
    assert_eq!(store.held_bytes(), 1 << 20);
    assert_eq!(store.usage().raw_bytes, 4096);
    let filled = Reference::of(map.at(2).0).unwrap().place.0;
    assert_eq!(
        store.arena.bytes(filled, 64),
        [0; 64],
        "its memory was given back"
    );
}

#[test]
fn a_damaged_blob_fails_alone() {
    let (mut store, map) = three_blobs();
    let damaged = map.at(0).0;
    let place = Reference::of(damaged).unwrap().place;
    store.arena.bytes_mut(place.0 + 8, 1)[0] ^= 1;
    let arena = store.into_arena();
    let mut store = EmbeddedStore::recover(arena, LIMIT, map.locations()).unwrap();
    assert_eq!(store.refused(), 1);
    assert_eq!(get(&mut store, damaged), Err(StoreError::Damaged));
    assert_eq!(get(&mut store, map.at(1).0), Ok(()));
    // Its slot is not used again.
    let again = store
        .put_now(&page_of(&[Content::Noise(9)]), SubpageMask::ALL)
        .unwrap();
    assert_ne!(Reference::of(again[0].unwrap()).unwrap().place, place);
}

#[test]
fn a_segment_of_which_nothing_is_readable_is_set_aside() {
    let (mut store, map) = three_blobs();
    let damaged = map.at(2).0;
    let place = Reference::of(damaged).unwrap().place.0;
    store.arena.bytes_mut(place + 8, 1)[0] ^= 1;
    let arena = store.into_arena();
    let mut store = EmbeddedStore::recover(arena, LIMIT, map.locations()).unwrap();
    assert_eq!(get(&mut store, damaged), Err(StoreError::Damaged));
    assert_eq!(store.held_bytes(), 2 << 20);
    store.release(damaged);
    assert_eq!(get(&mut store, damaged), Err(StoreError::Damaged));
    for n in 1.. {
        match store.put_now(&page_of(&[Content::Filled(n)]), SubpageMask::ALL) {
            Ok(locations) => {
                let used = Reference::of(locations[0].unwrap()).unwrap().place.0;
                assert_ne!(used >> 20, place >> 20);
            }
            Err(error) => {
                assert_eq!(error, StoreError::Full);
                break;
            }
        }
    }
}

#[test]
fn locations_that_lead_nowhere_are_counted_and_harmless() {
    let (store, map) = three_blobs();
    let real = map.at(0).0;
    let nowhere = [
        Location(1),
        Location(u64::MAX),
        Location(real.0 ^ 1 << 40),
        Location(real.0 ^ 1 << 5),
        Location(real.0 | 7),
        Location(((5 << 20) / 64) << 4),
        Location(((5 << 20) / 64 - 1) << 4),
    ];
    let arena = store.into_arena();
    let live = nowhere.into_iter().chain(map.locations());
    let mut store = EmbeddedStore::recover(arena, LIMIT, live).unwrap();
    assert_eq!(store.refused(), nowhere.len() as u64);
    for location in nowhere {
        assert!(get(&mut store, location).is_err());
    }
    map.check(&mut store);
}

#[test]
fn an_arena_of_another_kind_is_refused() {
    let arena = HeapArena::new(5 << 20);
    let result = EmbeddedStore::recover(arena, LIMIT, [].into_iter());
    assert_eq!(result.err(), Some(StoreError::Damaged));
    let (store, _) = three_blobs();
    let mut longer = HeapArena::new(6 << 20);
    longer
        .bytes_mut(0, 5 << 20)
        .copy_from_slice(store.into_arena().bytes(0, 5 << 20));
    let result = EmbeddedStore::recover(longer, LIMIT, [].into_iter());
    assert_eq!(result.err(), Some(StoreError::Damaged));
}

#[test]
fn a_smaller_limit_keeps_what_is_there_and_takes_no_more() {
    let (store, map) = three_blobs();
    let arena = store.into_arena();
    let mut store = EmbeddedStore::recover(arena, 1 << 20, map.locations()).unwrap();
    map.check(&mut store);
    let page = page_of(&[Content::Noise(1), Content::Noise(2), Content::Noise(3)]);
    assert_eq!(
        store.put_now(&page, SubpageMask::ALL),
        Err(StoreError::Full)
    );
}

#[test]
fn a_lost_ceiling_does_not_give_a_serial_number_twice() {
    let (store, map) = three_blobs();
    let mut arena = store.into_arena();
    arena.bytes_mut(32, 8).fill(0);
    let mut store = EmbeddedStore::recover(arena, LIMIT, map.locations()).unwrap();
    let new = store.put_now(&page_of(&[Content::Noise(9)]), SubpageMask::ALL);
    let new = Reference::of(new.unwrap()[0].unwrap()).unwrap();
    let tags = map.locations().map(|l| Reference::of(l).unwrap().tag);
    assert!(tags.max() < Some(new.tag));
}
