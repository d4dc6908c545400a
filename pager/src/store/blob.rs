//! The format of a blob: the subframes of one put page, each with a hash of its own. Version 1.
//!
//! Little endian, `n` subframes, in the order of their numbers:
//! ```text
//! at            bytes  what
//! 0             1      version, 1
//! 1             1      number of the slot's size class
//! 2             2      mask: bit i is set when subframe i is there
//! 4             4      bytes of the blob, from its first to the last payload byte
//! 8             8      serial number of the put
//! 16            8      header check
//! 24            4 n    reference counts, one a subframe
//! 24 + 4 n      24 n   entries, one a subframe
//! 24 + 28 n     ...    payload: the subframes' stored bytes
//! ```
//! An entry:
//! ```text
//! 0             4      where the stored bytes begin, from the blob's first byte
//! 4             2      their length
//! 6             1      kind (see `subframe`)
//! 7             1      subframe number
//! 8             16     digest
//! ```
//! # What the digests bind
//! A digest is keyed BLAKE3 of the stored bytes, cut to 16 bytes. The 32 bytes of key are the header's
//! first 16, the blob's place in the arena and the entry's first 8: nothing of a blob can be taken for
//! another blob, an older one in the same slot, another subframe or another length. The key costs
//! nothing over plain hashing, where a prefix would push the content out of the alignment at which
//! BLAKE3 hashes four chunks at once. The header check is the first 8 bytes of the same hash of no bytes,
//! with all ones for the entry.
//!
//! 16 bytes are enough: they are there to find out damage and mistakes, not an enemy (whoever can write
//! this memory is the pager itself), and a damaged subframe passes with a chance of 2^-128. An enemy who
//! chose the content could find two that agree after 2^64 tries, and would gain nothing by it: he would
//! need to swap them in here. The header check decides no bytes of a page, so half of that will do.
//!
//! The reference counts are outside of it all. They change while the blob lies still, are made anew from
//! the map at every recovery, and a wrong one loses a blob at worst: whoever still asks for it meets
//! another serial number.

use holo_proto::PAGE_SUBPAGES;

use super::api::StoreError;
use super::classes::Class;
use super::location::{Place, Serial};
use super::subframe::{Kind, SUBPAGE, Subframe};

const VERSION: u8 = 1;
/// Bytes of the header that stand in every key.
const IDENTITY: usize = 16;
/// Bytes of the header.
pub(super) const HEADER_BYTES: usize = 24;
const COUNT_BYTES: usize = 4;
const DESCRIPTOR_BYTES: usize = 8;
const DIGEST_BYTES: usize = 16;
const ENTRY_BYTES: usize = DESCRIPTOR_BYTES + DIGEST_BYTES;
/// Stands for the entry in the key of the header check; no entry has this kind.
const NO_ENTRY: [u8; DESCRIPTOR_BYTES] = [0xff; DESCRIPTOR_BYTES];

/// Bytes of the largest blob: sixteen plain subframes.
pub(super) const BLOB_BYTES_MAX: usize =
    HEADER_BYTES + PAGE_SUBPAGES * (COUNT_BYTES + ENTRY_BYTES + SUBPAGE);

/// Bytes of a blob of `subframes` subframes whose payloads are `payload` bytes together.
pub(super) fn blob_bytes(subframes: usize, payload: usize) -> usize {
    HEADER_BYTES + subframes * (COUNT_BYTES + ENTRY_BYTES) + payload
}

/// A blob's header, bound to the place where the blob is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Header {
    /// Where the blob begins; not stored, but part of every hash.
    pub(super) place: Place,
    /// The class of the slot.
    pub(super) class: Class,
    /// Which subframes are there.
    pub(super) mask: u16,
    /// Length of the blob.
    pub(super) bytes: u32,
    /// The put that made it.
    pub(super) serial: Serial,
}

impl Header {
    /// Reads and checks the header of the blob at `place`.
    ///
    /// # Errors
    /// `NoSuchLocation` where every byte is zero, as in memory that was given back; `Damaged` where the
    /// check fails or the version is another.
    pub(super) fn read(bytes: &[u8], place: Place) -> Result<Self, StoreError> {
        let (identity, check) = bytes.split_at(IDENTITY);
        if identity.iter().all(|&b| b == 0) {
            return Err(StoreError::NoSuchLocation);
        }
        let identity: [u8; IDENTITY] = array(identity);
        let read = || {
            (identity[0] == VERSION && header_check(&identity, place) == array(check)).then_some(
                Self {
                    place,
                    class: Class::numbered(identity[1])?,
                    mask: u16::from_le_bytes(array(&identity[2..4])),
                    bytes: u32::from_le_bytes(array(&identity[4..8])),
                    serial: Serial(u64::from_le_bytes(array(&identity[8..16]))),
                },
            )
        };
        read().ok_or(StoreError::Damaged)
    }

    fn identity(&self) -> [u8; IDENTITY] {
        let mut out = [0; IDENTITY];
        out[0] = VERSION;
        out[1] = self.class.number();
        out[2..4].copy_from_slice(&self.mask.to_le_bytes());
        out[4..8].copy_from_slice(&self.bytes.to_le_bytes());
        out[8..16].copy_from_slice(&self.serial.0.to_le_bytes());
        out
    }

    /// Subframes in the blob.
    pub(super) fn subframes(&self) -> usize {
        self.mask.count_ones() as usize
    }

    /// The rank of subframe `number` among those that are there.
    pub(super) fn rank(&self, number: usize) -> Option<usize> {
        let below = (1u16 << number) - 1;
        (self.mask >> number & 1 == 1).then(|| (self.mask & below).count_ones() as usize)
    }

    /// Where the reference count of the subframe of rank `rank` is, from the arena's first byte.
    pub(super) fn count_at(&self, rank: usize) -> u64 {
        self.place.0 + (HEADER_BYTES + rank * COUNT_BYTES) as u64
    }

    fn entry_at(&self, rank: usize) -> usize {
        HEADER_BYTES + self.subframes() * COUNT_BYTES + rank * ENTRY_BYTES
    }
}

/// Writes a whole blob into `out`, which is exactly as long; every reference count is 1.
pub(super) fn write(
    out: &mut [u8],
    header: &Header,
    frames: &[Option<Subframe<'_>>; PAGE_SUBPAGES],
) {
    let identity = header.identity();
    out[..IDENTITY].copy_from_slice(&identity);
    out[IDENTITY..HEADER_BYTES].copy_from_slice(&header_check(&identity, header.place));
    let mut at = header.entry_at(header.subframes());
    let present = frames
        .iter()
        .enumerate()
        .filter_map(|(i, f)| f.map(|f| (i, f)));
    for (rank, (number, frame)) in present.enumerate() {
        out[HEADER_BYTES + rank * COUNT_BYTES..][..COUNT_BYTES]
            .copy_from_slice(&1u32.to_le_bytes());
        let descriptor = descriptor(at, frame, number);
        let digest = digest(&key(&identity, header.place, descriptor), frame.bytes);
        let entry = &mut out[header.entry_at(rank)..][..ENTRY_BYTES];
        entry[..DESCRIPTOR_BYTES].copy_from_slice(&descriptor);
        entry[DESCRIPTOR_BYTES..].copy_from_slice(&digest);
        out[at..][..frame.bytes.len()].copy_from_slice(frame.bytes);
        at += frame.bytes.len();
    }
    debug_assert_eq!(at, out.len(), "the blob is as long as its header says");
}

/// The subframe `number` of the blob in `blob`, its digest checked.
///
/// # Errors
/// `NoSuchLocation` when the header has no such subframe, `Damaged` when anything is not as written.
pub(super) fn read<'a>(
    blob: &'a [u8],
    header: &Header,
    number: usize,
) -> Result<Subframe<'a>, StoreError> {
    let rank = header.rank(number).ok_or(StoreError::NoSuchLocation)?;
    let checked = || {
        let entry = blob.get(header.entry_at(rank)..)?.get(..ENTRY_BYTES)?;
        let (descriptor, expected) = entry.split_at(DESCRIPTOR_BYTES);
        let descriptor: [u8; DESCRIPTOR_BYTES] = array(descriptor);
        let at = u32::from_le_bytes(array(&descriptor[..4])) as usize;
        let len = usize::from(u16::from_le_bytes(array(&descriptor[4..6])));
        let bytes = blob.get(at..)?.get(..len)?;
        let found = digest(&key(&header.identity(), header.place, descriptor), bytes);
        let kind = Kind::numbered(descriptor[6])?;
        let same = found == array(expected) && usize::from(descriptor[7]) == number;
        same.then_some(Subframe { kind, bytes })
    };
    checked().ok_or(StoreError::Damaged)
}

/// An entry's first 8 bytes.
fn descriptor(at: usize, frame: Subframe<'_>, number: usize) -> [u8; DESCRIPTOR_BYTES] {
    const { assert!(BLOB_BYTES_MAX <= u32::MAX as usize && SUBPAGE <= u16::MAX as usize) };
    let mut out = [0; DESCRIPTOR_BYTES];
    // Neither narrowing loses anything: see the assertion.
    out[..4].copy_from_slice(&at.to_le_bytes()[..4]);
    out[4..6].copy_from_slice(&frame.bytes.len().to_le_bytes()[..2]);
    out[6] = frame.kind.number();
    out[7] = number.to_le_bytes()[0];
    out
}

fn key(
    identity: &[u8; IDENTITY],
    place: Place,
    descriptor: [u8; DESCRIPTOR_BYTES],
) -> [u8; blake3::KEY_LEN] {
    let mut key = [0; blake3::KEY_LEN];
    key[..16].copy_from_slice(identity);
    key[16..24].copy_from_slice(&place.0.to_le_bytes());
    key[24..].copy_from_slice(&descriptor);
    key
}

fn digest(key: &[u8; blake3::KEY_LEN], bytes: &[u8]) -> [u8; DIGEST_BYTES] {
    array(&blake3::keyed_hash(key, bytes).as_bytes()[..DIGEST_BYTES])
}

fn header_check(identity: &[u8; IDENTITY], place: Place) -> [u8; HEADER_BYTES - IDENTITY] {
    let check = blake3::keyed_hash(&key(identity, place, NO_ENTRY), b"");
    array(&check.as_bytes()[..HEADER_BYTES - IDENTITY])
}

/// A slice of known length as an array.
///
/// # Panics
/// When the length is another, which no caller's slice is.
pub(super) fn array<const N: usize>(bytes: &[u8]) -> [u8; N] {
    bytes.try_into().expect("the slice was cut to this length")
}
