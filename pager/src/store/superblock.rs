//! The first 64 bytes of an arena: what it is, and which serial numbers are spent. Version 1.
//!
//! Little endian:
//! ```text
//! at  bytes  what
//! 0   1      version, 1: of the superblock, the segments, the classes and the locations
//! 1   7      "holosto"
//! 8   8      capacity of the arena in bytes
//! 16  8      bytes of a segment
//! 24  8      check: BLAKE3 of the 24 bytes before, cut to 8
//! 32  8      serial ceiling: no blob has this serial number or a higher one
//! 40  24     zero
//! ```
//! The first segment's worth of the arena (1 MiB) holds only this; memory is used for one kernel page
//! of it. The ceiling is raised some thousands at a time, so that a put rarely writes here.

use super::api::StoreError;
use super::arena::Arena;
use super::blob::array;
use super::classes::SEGMENT_BYTES;
use super::location::Serial;

const VERSION: u8 = 1;
const MAGIC: &[u8; 7] = b"holosto";
/// Bytes of the superblock.
const BYTES: usize = 64;
const CHECKED: usize = 24;
const CEILING_AT: usize = 32;
/// Serial numbers that are made usable by one write.
const BATCH: u64 = 4096;

/// Hands out serial numbers that no blob of this arena ever had.
#[derive(Debug)]
pub(super) struct Serials {
    next: u64,
    ceiling: u64,
}

impl Serials {
    /// Makes `arena` an empty one of ours.
    ///
    /// # Panics
    /// When the arena has no room for a superblock.
    pub(super) fn create(arena: &mut impl Arena) -> Self {
        let identity = identity(arena.capacity());
        let block = arena.bytes_mut(0, BYTES);
        block.fill(0);
        block[..CHECKED].copy_from_slice(&identity);
        block[CHECKED..CHECKED + 8].copy_from_slice(&check(&identity));
        Self::from(1)
    }

    /// Goes on where the last owner of `arena` stopped.
    ///
    /// # Errors
    /// `Damaged` when the superblock is not that of an arena of this version and capacity.
    pub(super) fn recover(arena: &impl Arena) -> Result<Self, StoreError> {
        if arena.capacity() < BYTES as u64 {
            return Err(StoreError::Damaged);
        }
        let block = arena.bytes(0, BYTES);
        let expected = identity(arena.capacity());
        if block[..CHECKED] != expected || block[CHECKED..CHECKED + 8] != check(&expected) {
            return Err(StoreError::Damaged);
        }
        let ceiling = u64::from_le_bytes(array(&block[CEILING_AT..CEILING_AT + 8]));
        Ok(Self::from(ceiling.max(1)))
    }

    fn from(next: u64) -> Self {
        Self {
            next,
            ceiling: next,
        }
    }

    /// Never hands out `serial` or one below it: a blob has it.
    pub(super) fn skip(&mut self, serial: Serial) {
        if self.next <= serial.0 {
            *self = Self::from(serial.0.saturating_add(1));
        }
    }

    /// A new serial number.
    pub(super) fn take(&mut self, arena: &mut impl Arena) -> Serial {
        if self.next == self.ceiling {
            self.ceiling = self.next.saturating_add(BATCH);
            arena
                .bytes_mut(CEILING_AT as u64, 8)
                .copy_from_slice(&self.ceiling.to_le_bytes());
        }
        let serial = Serial(self.next);
        self.next = self.next.saturating_add(1);
        serial
    }
}

fn identity(capacity: u64) -> [u8; CHECKED] {
    let mut out = [0; CHECKED];
    out[0] = VERSION;
    out[1..8].copy_from_slice(MAGIC);
    out[8..16].copy_from_slice(&capacity.to_le_bytes());
    out[16..24].copy_from_slice(&SEGMENT_BYTES.to_le_bytes());
    out
}

fn check(identity: &[u8; CHECKED]) -> [u8; 8] {
    array(&blake3::hash(identity).as_bytes()[..8])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::arena::HeapArena;

    #[test]
    fn the_superblock_is_as_documented() {
        let mut arena = HeapArena::new(4096);
        let mut serials = Serials::create(&mut arena);
        assert_eq!(serials.take(&mut arena), Serial(1));
        let block = arena.bytes(0, BYTES);
        assert_eq!(&block[..8], b"\x01holosto");
        assert_eq!(block[8..16], 4096u64.to_le_bytes());
        assert_eq!(block[16..24], (1u64 << 20).to_le_bytes());
        assert_eq!(block[24..32], blake3::hash(&block[..24]).as_bytes()[..8]);
        assert_eq!(block[32..40], 4097u64.to_le_bytes());
        assert_eq!(block[40..], [0; 24]);
    }

    #[test]
    fn serials_are_never_given_twice_across_recoveries() {
        let mut arena = HeapArena::new(4096);
        let mut serials = Serials::create(&mut arena);
        let mut last = Serial(0);
        for round in 0..5u64 {
            for _ in 0..round * 3000 {
                let serial = serials.take(&mut arena);
                assert!(serial > last);
                last = serial;
            }
            serials = Serials::recover(&arena).unwrap();
        }
        serials.skip(Serial(1 << 40));
        assert_eq!(serials.take(&mut arena), Serial((1 << 40) + 1));
    }

    #[test]
    fn a_foreign_arena_is_refused() {
        let mut arena = HeapArena::new(4096);
        assert_eq!(Serials::recover(&arena).unwrap_err(), StoreError::Damaged);
        Serials::create(&mut arena);
        for bit in 0..32 * 8 {
            let mut other = arena.clone();
            other.bytes_mut(bit / 8, 1)[0] ^= 1 << (bit % 8);
            assert_eq!(Serials::recover(&other).unwrap_err(), StoreError::Damaged);
        }
        assert!(Serials::recover(&arena).is_ok());
    }
}
