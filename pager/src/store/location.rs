//! How a [`Location`] packs a blob's place, a subframe and a tag into 60 bits.
//!
//! ```text
//!  bit 59          38 37                      4 3       0
//!     +--------------+-------------------------+---------+
//!     | tag, 22 bits | place / 64, 34 bits     | subframe|
//!     +--------------+-------------------------+---------+
//! ```
//! - *place*: the blob's byte offset in the arena, which is a multiple of 64: up to 1 TiB.
//! - *subframe*: the number that the subpage had in the page when it was put, 0 to 15.
//! - *tag*: the low 22 bits of the blob's serial number. A reference that outlived its blob is found out
//!   by it. Serial numbers count puts, so the tag of a slot's next tenant differs for certain within
//!   4,194,303 puts of the first, and for all but one in four million after that.
//!
//! The packing has no version of its own: a location means something only together with the arena that
//! issued it, whose superblock carries the version of both.

use super::api::Location;

/// Blobs begin at multiples of this.
pub(super) const UNIT_BYTES: u64 = UNIT as u64;
/// The same, for offsets within a segment.
pub(super) const UNIT: u32 = 64;

const SUBFRAME_BITS: u32 = 4;
const UNITS_BITS: u32 = 34;
const TAG_BITS: u32 = Location::BITS - SUBFRAME_BITS - UNITS_BITS;

/// Bytes of an arena that a location can name.
pub(super) const ADDRESSABLE_BYTES: u64 = UNIT_BYTES << UNITS_BITS;

/// A blob's byte offset in the arena, a multiple of [`UNIT_BYTES`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Place(pub(super) u64);

/// The number of a put; one blob has one, and no two blobs of an arena share it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Serial(pub(super) u64);

impl Serial {
    /// The part that a location repeats.
    pub(super) fn tag(self) -> u64 {
        self.0 & ((1 << TAG_BITS) - 1)
    }
}

/// What a location says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Reference {
    /// Where the blob is said to begin.
    pub(super) place: Place,
    /// Which of its subframes, 0 to 15.
    pub(super) subframe: usize,
    /// What the blob's serial must end in.
    pub(super) tag: u64,
}

impl Reference {
    /// The location of subframe `subframe` of the blob `serial` at `place`.
    pub(super) fn location(place: Place, subframe: usize, serial: Serial) -> Location {
        let units = place.0 / UNIT_BYTES;
        debug_assert!(units >> UNITS_BITS == 0 && subframe >> SUBFRAME_BITS == 0);
        Location(
            serial.tag() << (UNITS_BITS + SUBFRAME_BITS) | units << SUBFRAME_BITS | subframe as u64,
        )
    }

    /// What `location` says; `None` when bits are set that no location of ours has.
    pub(super) fn of(location: Location) -> Option<Self> {
        let bits = location.0;
        (bits >> Location::BITS == 0).then_some(Self {
            place: Place((bits >> SUBFRAME_BITS & ((1 << UNITS_BITS) - 1)) * UNIT_BYTES),
            subframe: (bits % (1 << SUBFRAME_BITS)) as usize,
            tag: bits >> (UNITS_BITS + SUBFRAME_BITS),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn packing_is_as_documented() {
        let at = Reference::location(Place(0x10_0040), 5, Serial(0x1_0000_0003));
        assert_eq!(at, Location(3 << 38 | 0x4001 << 4 | 5));
        assert_eq!(
            Reference::of(at),
            Some(Reference {
                place: Place(0x10_0040),
                subframe: 5,
                tag: 3
            })
        );
    }

    #[test]
    fn extremes_survive_and_stay_within_sixty_bits() {
        let place = Place(ADDRESSABLE_BYTES - UNIT_BYTES);
        let at = Reference::location(place, 15, Serial(u64::MAX));
        assert_eq!(at.0, (1 << Location::BITS) - 1);
        assert_eq!(Reference::of(at).unwrap().place, place);
    }

    #[test]
    fn bits_of_the_map_are_refused() {
        assert_eq!(Reference::of(Location(1 << Location::BITS)), None);
    }
}
