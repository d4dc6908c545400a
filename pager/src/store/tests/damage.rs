//! Damaged memory is found out: an error or the right bytes, never others.

use holo_proto::{PAGE_SUBPAGES, SubpageMask};

use super::content::{Content, page_of};
use super::model::empty_frame;
use crate::store::api::{Location, PageStore, StoreError};
use crate::store::location::Reference;
use crate::store::subframe::SUBPAGE;
use crate::store::{Arena, EmbeddedStore, HeapArena};

const CONTENTS: [Content; 5] = [
    Content::Filled(0x1234_5678_9abc_def0),
    Content::Text(1),
    Content::Zero,
    Content::Noise(2),
    Content::HalfNoise(3),
];
/// What a blob of the four stored subframes has before its payload.
const HEADER: u64 = 24;
const COUNTS: u64 = 4 * 4;

/// A store with one blob, where it is and how long it is.
fn one_blob() -> (EmbeddedStore<HeapArena>, Vec<(usize, Location)>, u64, u64) {
    let mut store = EmbeddedStore::create(HeapArena::new(3 << 20), 2 << 20);
    let locations = store
        .put_now(&page_of(&CONTENTS), SubpageMask::ALL)
        .unwrap();
    let stored: Vec<_> = (0..PAGE_SUBPAGES)
        .filter_map(|i| locations[i].map(|l| (i, l)))
        .collect();
    let place = Reference::of(stored[0].1).unwrap().place.0;
    let len = u32::from_le_bytes(store.arena.bytes(place + 4, 4).try_into().unwrap());
    (store, stored, place, u64::from(len))
}

/// Reads each subframe alone; how many failed. None may give wrong bytes.
fn failures(store: &mut EmbeddedStore<HeapArena>, stored: &[(usize, Location)]) -> usize {
    let mut failed = 0;
    let mut frame = empty_frame();
    for (i, location) in stored {
        let mut wanted = [None; PAGE_SUBPAGES];
        wanted[0] = Some(*location);
        let noted = store.usage().integrity_failures;
        match store.get_now(&wanted, &mut frame) {
            Ok(()) => assert_eq!(&frame[..SUBPAGE], CONTENTS[*i].bytes(), "wrong bytes"),
            Err(error) => {
                assert!(matches!(
                    error,
                    StoreError::Damaged | StoreError::NoSuchLocation
                ));
                let damaged = u64::from(error == StoreError::Damaged);
                assert_eq!(store.usage().integrity_failures, noted + damaged);
                failed += 1;
            }
        }
    }
    failed
}

#[test]
fn every_flipped_bit_of_a_blob_is_found_out() {
    let (mut store, stored, place, len) = one_blob();
    assert_eq!(failures(&mut store, &stored), 0);
    for byte in 0..len {
        // All bits of header and entries, one bit of each byte of payload.
        let payload = byte >= HEADER + COUNTS + 4 * 24;
        for bit in if payload {
            byte % 8..byte % 8 + 1
        } else {
            0..8
        } {
            let flip = |store: &mut EmbeddedStore<HeapArena>| {
                store.arena.bytes_mut(place + byte, 1)[0] ^= 1 << bit;
            };
            flip(&mut store);
            let failed = failures(&mut store, &stored);
            let is_count = (HEADER..HEADER + COUNTS).contains(&byte);
            let expected = match byte {
                0..HEADER => stored.len(),
                // A count only says whether the subframe is there; here it goes from 1 to 0.
                _ if is_count => usize::from(byte % 4 == 0 && bit == 0),
                _ => 1,
            };
            assert_eq!(failed, expected, "byte {byte}, bit {bit}");
            flip(&mut store);
        }
    }
    assert_eq!(failures(&mut store, &stored), 0);
    assert!(store.usage().integrity_failures > len);
}

#[test]
fn every_flipped_bit_of_a_location_is_found_out() {
    let (mut store, stored, _, _) = one_blob();
    for (i, location) in &stored {
        for bit in 0..64 {
            let other = Location(location.0 ^ 1 << bit);
            let mut wanted = [None; PAGE_SUBPAGES];
            wanted[3] = Some(other);
            let mut frame = empty_frame();
            match store.get_now(&wanted, &mut frame) {
                Ok(()) => {
                    // It names another subframe of the same blob, and gets that.
                    let other = (other.0 % 16) as usize;
                    assert!(bit < 4 && other != *i);
                    let found = &frame[3 * SUBPAGE..4 * SUBPAGE];
                    assert_eq!(found, CONTENTS[other].bytes());
                }
                Err(error) => assert_eq!(error, StoreError::NoSuchLocation),
            }
        }
    }
}

#[test]
fn a_blob_copied_to_another_slot_or_from_an_older_put_is_refused() {
    let (mut store, stored, place, len) = one_blob();
    let len = usize::try_from(len).unwrap();
    let old = store.arena.bytes(place, len).to_vec();
    let page = page_of(&CONTENTS);
    let second = store.put_now(&page, SubpageMask::ALL).unwrap();
    let other = Reference::of(second[0].unwrap()).unwrap().place.0;
    store.arena.bytes_mut(other, len).copy_from_slice(&old);
    let moved: Vec<_> = stored
        .iter()
        .map(|(i, _)| (*i, second[*i].unwrap()))
        .collect();
    assert_eq!(failures(&mut store, &moved), 4);

    for (_, location) in &stored {
        store.release(*location);
    }
    let third = store.put_now(&page, SubpageMask::ALL).unwrap();
    assert_eq!(Reference::of(third[0].unwrap()).unwrap().place.0, place);
    store.arena.bytes_mut(place, len).copy_from_slice(&old);
    let reused: Vec<_> = stored
        .iter()
        .map(|(i, _)| (*i, third[*i].unwrap()))
        .collect();
    assert_eq!(failures(&mut store, &reused), 4);
}

#[test]
fn subframes_of_one_blob_cannot_stand_for_each_other() {
    let mut store = EmbeddedStore::create(HeapArena::new(3 << 20), 2 << 20);
    let page = page_of(&[Content::Noise(1), Content::Noise(2)]);
    let locations = store.put_now(&page, SubpageMask::ALL).unwrap();
    let place = Reference::of(locations[0].unwrap()).unwrap().place.0;
    let entries = store.arena.bytes(place + 24 + 8, 48).to_vec();
    let swapped = [&entries[24..], &entries[..24]].concat();
    store
        .arena
        .bytes_mut(place + 24 + 8, 48)
        .copy_from_slice(&swapped);
    for location in [locations[0], locations[1]] {
        let mut wanted = [None; PAGE_SUBPAGES];
        wanted[0] = location;
        let found = store.get_now(&wanted, &mut empty_frame());
        assert_eq!(found, Err(StoreError::Damaged));
    }
}

#[test]
fn a_released_location_gives_nothing_even_when_its_slot_has_a_new_tenant() {
    let mut store = EmbeddedStore::create(HeapArena::new(3 << 20), 2 << 20);
    let keep = store.put_now(&page_of(&[Content::Noise(0)]), SubpageMask::ALL);
    let stale = store
        .put_now(&page_of(&[Content::Noise(1)]), SubpageMask::ALL)
        .unwrap();
    let stale = stale[0].unwrap();
    store.release(stale);
    let mut wanted = [None; PAGE_SUBPAGES];
    wanted[0] = Some(stale);
    let mut frame = empty_frame();
    assert_eq!(
        store.get_now(&wanted, &mut frame),
        Err(StoreError::NoSuchLocation)
    );

    let fresh = store
        .put_now(&page_of(&[Content::Noise(2)]), SubpageMask::ALL)
        .unwrap();
    let place = |l: Location| Reference::of(l).unwrap().place;
    assert_eq!(place(fresh[0].unwrap()), place(stale));
    assert_eq!(
        store.get_now(&wanted, &mut frame),
        Err(StoreError::NoSuchLocation)
    );

    let before = store.usage();
    store.release(stale);
    store.retain(stale);
    assert_eq!((store.refused(), store.usage()), (2, before));
    assert!(keep.is_ok());
}

#[test]
fn a_blob_with_a_damaged_header_keeps_its_slot() {
    let (mut store, stored, place, _) = one_blob();
    store.arena.bytes_mut(place + 8, 1)[0] ^= 1;
    for (_, location) in &stored {
        store.release(*location);
    }
    assert_eq!(store.refused(), 4);
    let page = page_of(&CONTENTS);
    while let Ok(locations) = store.put_now(&page, SubpageMask::ALL) {
        assert!(
            locations
                .iter()
                .flatten()
                .all(|l| Reference::of(*l).unwrap().place.0 != place)
        );
    }
    assert_eq!(failures(&mut store, &stored), 4);
}
