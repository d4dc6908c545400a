//! The blob format, byte by byte.

use holo_proto::{PAGE_SUBPAGES, SubpageMask};

use super::content::{Content, page_of};
use super::model::empty_frame;
use crate::store::api::Location;
use crate::store::location::Reference;
use crate::store::{Arena, EmbeddedStore, HeapArena};

/// A blob of version 1 as the first put of a new arena wrote it, with a subframe of each kind.
const GOLDEN: &[u8] = include_bytes!("golden/blob-v1.bin");
const CONTENTS: [Content; 5] = [
    Content::Filled(0x0123_4567_89ab_cdef),
    Content::Zero,
    Content::Text(42),
    Content::Noise(42),
    Content::Filled(u64::MAX),
];

fn store() -> EmbeddedStore<HeapArena> {
    EmbeddedStore::create(HeapArena::new(3 << 20), 2 << 20)
}

#[test]
fn a_golden_blob_is_still_readable() {
    let mut store = store();
    let locations = store
        .put_now(&page_of(&CONTENTS), SubpageMask::ALL)
        .unwrap();
    let place = Reference::of(locations[0].unwrap()).unwrap().place.0;
    let mut arena = store.into_arena();
    arena.bytes_mut(place, 65536).fill(0);
    arena.bytes_mut(place, GOLDEN.len()).copy_from_slice(GOLDEN);
    let live = locations.into_iter().flatten();
    let mut store = EmbeddedStore::recover(arena, 2 << 20, live).unwrap();
    assert_eq!(store.refused(), 0);
    let mut frame = empty_frame();
    assert_eq!(store.get_now(&locations, &mut frame), Ok(()));
    assert_eq!(frame, page_of(&CONTENTS));
}

/// The blob of one filled subpage is written as documented, and the digest is what it says it is.
#[test]
fn a_blob_is_written_as_documented() {
    let mut store = store();
    let page = page_of(&[Content::Zero, Content::Zero, Content::Filled(0x55aa)]);
    let locations = store.put_now(&page, SubpageMask::ALL).unwrap();
    let place: u64 = (1 << 20) + 2048;
    assert_eq!(
        locations[2],
        Some(Location(1 << 38 | (place / 64) << 4 | 2))
    );
    let blob = store.arena.bytes(place, 64);

    let mut identity = vec![1, 0, 0b100, 0, 60, 0, 0, 0];
    identity.extend_from_slice(&1u64.to_le_bytes());
    let descriptor = [52, 0, 0, 0, 8, 0, 1, 2];
    let word = 0x55aa_u64.to_le_bytes();
    let key = |entry: &[u8]| -> [u8; 32] {
        [&identity, &place.to_le_bytes()[..], entry]
            .concat()
            .try_into()
            .unwrap()
    };
    let check = blake3::keyed_hash(&key(&[0xff; 8]), b"");
    let digest = blake3::keyed_hash(&key(&descriptor), &word);
    let expected = [
        &identity,
        &check.as_bytes()[..8],
        &[1, 0, 0, 0],
        &descriptor,
        &digest.as_bytes()[..16],
        &word,
        &[0; 4],
    ]
    .concat();
    assert_eq!(blob, expected);
}

#[test]
fn one_subpage_decodes_without_the_payload_of_the_others() {
    let mut store = store();
    let locations = store
        .put_now(&page_of(&CONTENTS), SubpageMask::ALL)
        .unwrap();
    let place = Reference::of(locations[0].unwrap()).unwrap().place.0;
    // The payload begins behind header, counts and entries: the word of subframe 0, the block of 2.
    let payload = place + 24 + 4 * 28;
    store.arena.bytes_mut(payload, 8).fill(0xff);
    store.arena.bytes_mut(payload + 8, 8).fill(0xff);
    let mut wanted = [None; PAGE_SUBPAGES];
    wanted[3] = locations[3];
    let mut frame = empty_frame();
    assert_eq!(store.get_now(&wanted, &mut frame), Ok(()));
    assert_eq!(frame[3 * 4096..4 * 4096], CONTENTS[3].bytes());
}
