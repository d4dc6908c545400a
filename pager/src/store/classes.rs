//! The size classes of slots, and how a segment of each class is laid out; tables made at compile time.
//!
//! A segment is 1 MiB and holds slots of one class:
//! ```text
//! +------------------------------+--------+--------+ ... +--------+------+
//! | bitmap, one bit a slot,      | slot 0 | slot 1 |     | slot   | rest |
//! | rounded up to 64 bytes       |        |        |     | n - 1  |      |
//! +------------------------------+--------+--------+ ... +--------+------+
//! ```
//! Sizes are multiples of 64 bytes, from 64 to the largest blob, each at most an eighth (or 64 bytes)
//! above the last, so that rounding wastes less than an eighth of a blob beyond its last 64 bytes.

use super::blob::BLOB_BYTES_MAX;
use super::location::UNIT;

/// Bytes of a segment.
pub(super) const SEGMENT_BYTES: u64 = SEGMENT as u64;

const SEGMENT: u32 = 1 << 20;
#[expect(
    clippy::cast_possible_truncation,
    reason = "a blob is shorter than a segment"
)]
const SIZE_MAX: u32 = (BLOB_BYTES_MAX as u32).div_ceil(UNIT) * UNIT;

/// Number of classes.
pub(super) const CLASSES: usize = count();

/// A slot size, by its number in the table; the number is part of the blob format.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Class(u8);

/// How a segment of one class is laid out.
#[derive(Clone, Copy, Debug)]
pub(super) struct Layout {
    /// Bytes of a slot.
    pub(super) slot_bytes: u32,
    /// Slots in the segment.
    pub(super) slots: u32,
    /// Bytes of the bitmap in front of them.
    pub(super) bitmap_bytes: u32,
}

const LAYOUTS: [Layout; CLASSES] = layouts();
const CLASS_OF_UNITS: [u8; (SIZE_MAX / UNIT) as usize + 1] = class_of_units();

impl Class {
    /// The smallest class whose slots hold `bytes`; `None` when nothing does.
    pub(super) fn holding(bytes: usize) -> Option<Self> {
        let units = bytes.div_ceil(UNIT as usize);
        CLASS_OF_UNITS.get(units).copied().map(Self)
    }

    /// The class with this number.
    pub(super) fn numbered(number: u8) -> Option<Self> {
        (usize::from(number) < CLASSES).then_some(Self(number))
    }

    /// Its number.
    pub(super) fn number(self) -> u8 {
        self.0
    }

    /// This class and every larger one.
    pub(super) fn and_larger(self) -> impl Iterator<Item = Self> {
        (self.0..).map_while(Self::numbered)
    }

    /// Its place in a table of [`CLASSES`] entries.
    pub(super) fn index(self) -> usize {
        usize::from(self.0)
    }

    /// How its segments look.
    pub(super) fn layout(self) -> Layout {
        LAYOUTS[self.index()]
    }
}

impl Layout {
    /// The number of the slot that begins `at` bytes into the segment, if one does.
    pub(super) fn slot_at(self, at: u32) -> Option<u32> {
        let past = at.checked_sub(self.bitmap_bytes)?;
        let slot = past / self.slot_bytes;
        (past % self.slot_bytes == 0 && slot < self.slots).then_some(slot)
    }

    /// Where slot `slot` begins in the segment.
    pub(super) fn slot_start(self, slot: u32) -> u32 {
        self.bitmap_bytes + slot * self.slot_bytes
    }
}

const fn next_size(size: u32) -> u32 {
    let next = size / 8 * 9 / UNIT * UNIT;
    let next = if next > size { next } else { size + UNIT };
    if next > SIZE_MAX { SIZE_MAX } else { next }
}

const fn count() -> usize {
    let (mut size, mut n) = (UNIT, 1);
    while size < SIZE_MAX {
        size = next_size(size);
        n += 1;
    }
    n
}

const fn bitmap_bytes(slots: u32) -> u32 {
    slots.div_ceil(UNIT * 8) * UNIT
}

const fn layouts() -> [Layout; CLASSES] {
    let mut all = [Layout {
        slot_bytes: UNIT,
        slots: 0,
        bitmap_bytes: 0,
    }; CLASSES];
    let mut i = 0;
    let mut size = UNIT;
    while i < CLASSES {
        let mut slots = SEGMENT / size;
        while bitmap_bytes(slots) + slots * size > SEGMENT {
            slots -= 1;
        }
        all[i] = Layout {
            slot_bytes: size,
            slots,
            bitmap_bytes: bitmap_bytes(slots),
        };
        size = next_size(size);
        i += 1;
    }
    all
}

const fn class_of_units() -> [u8; (SIZE_MAX / UNIT) as usize + 1] {
    let mut of = [0; (SIZE_MAX / UNIT) as usize + 1];
    let mut units = 0;
    let mut class = 0u8;
    while units <= SIZE_MAX / UNIT {
        // Never past the last class: its slots hold the last entry of this table.
        while LAYOUTS[class as usize].slot_bytes < units * UNIT {
            class += 1;
        }
        of[units as usize] = class;
        units += 1;
    }
    of
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_grow_by_at_most_an_eighth_or_one_unit() {
        assert_eq!(LAYOUTS[0].slot_bytes, 64);
        assert_eq!(LAYOUTS[CLASSES - 1].slot_bytes, SIZE_MAX);
        for pair in LAYOUTS.windows(2) {
            let (a, b) = (pair[0].slot_bytes, pair[1].slot_bytes);
            assert!(a < b && b - a <= (a / 8).max(64) && b % 64 == 0);
        }
    }

    #[test]
    fn segments_hold_their_slots_and_not_one_more() {
        for layout in LAYOUTS {
            let bits = layout.bitmap_bytes * 8;
            assert!(layout.slots <= bits && layout.slots > 0);
            assert!(layout.slot_start(layout.slots) <= SEGMENT);
            assert!(layout.slot_start(layout.slots + 2) > SEGMENT);
        }
    }

    #[test]
    fn the_smallest_class_that_fits_is_chosen() {
        for bytes in 1..=BLOB_BYTES_MAX {
            let class = Class::holding(bytes).unwrap();
            assert!(class.layout().slot_bytes as usize >= bytes);
            if let Some(smaller) = class.number().checked_sub(1).and_then(Class::numbered) {
                assert!((smaller.layout().slot_bytes as usize) < bytes);
            }
        }
        assert_eq!(Class::holding(SIZE_MAX as usize + 1), None);
    }

    #[test]
    fn only_slot_starts_are_slots() {
        let layout = Class::holding(1000).unwrap().layout();
        assert_eq!(layout.slot_at(layout.slot_start(7)), Some(7));
        assert_eq!(layout.slot_at(layout.slot_start(7) + 64), None);
        assert_eq!(layout.slot_at(layout.slot_start(layout.slots)), None);
        assert_eq!(layout.slot_at(0), None);
    }

    /// A blob names its class by number: the table is part of the format.
    #[test]
    fn the_table_of_classes_is_version_one() {
        let sizes = LAYOUTS.map(|l| l.slot_bytes);
        let fine = (1..=16).map(|n| n * 64);
        let coarse = [
            1152, 1280, 1408, 1536, 1728, 1920, 2112, 2368, 2624, 2944, 3264, 3648, 4096, 4608,
            5184, 5824, 6528, 7296, 8192, 9216, 10368, 11648, 13056, 14656, 16448, 18496, 20800,
            23360, 26240, 29504, 33152, 37248, 41856, 47040, 52864, 59456, 66048,
        ];
        assert!(sizes.into_iter().eq(fine.chain(coarse)));
    }
}
