//! Which slots of an arena are taken: the allocator.
//!
//! The arena is cut into segments of 1 MiB. The first holds the superblock; each other one is free, or
//! holds slots of one size class, or is set aside because recovery could not tell its class:
//! ```text
//!            allocate, claim                  last slot freed
//!   Free ----------------------> InUse(class) ----------------> Free, memory given back
//!     \---- set aside (recovery only) ----> Aside, until the arena ends
//! ```
//! Each class keeps a ring of its segments that have a free slot. Slots are taken from the ring's head;
//! a segment that was full joins at its tail, where it has time to become empty before it is filled up
//! again. Both are O(1), finding the free bit is a walk over at most 2 KiB of bitmap.
//!
//! # Where the state is
//! The bitmaps lie in the segments themselves, so that their memory comes and goes with the segments.
//! They mean nothing to a successor, which makes them anew. All else is a table of one small entry a
//! segment (40 bytes for each MiB of arena), allocated once.
//!
//! # Limits
//! Blobs never move. Segments that are nearly empty, each in a class that is not the wanted one, can fill
//! the arena; a larger class lends its slots then, but a smaller one cannot.

use super::api::StoreError;
use super::arena::Arena;
use super::blob::array;
use super::classes::{CLASSES, Class, SEGMENT_BYTES};
use super::location::{ADDRESSABLE_BYTES, Place};

const WORD_BYTES: usize = 8;
const WORD_BITS: u32 = 64;

/// The number of a segment; number 0 is the superblock's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct SegmentId(u32);

impl SegmentId {
    fn start(self) -> u64 {
        u64::from(self.0) * SEGMENT_BYTES
    }
}

#[derive(Clone, Copy, Debug)]
enum Segment {
    Free,
    InUse(InUse),
    Aside,
}

#[derive(Clone, Copy, Debug)]
struct InUse {
    class: Class,
    /// Slots taken.
    taken: u32,
    /// No word of the bitmap below this one has a clear bit.
    first_word: u32,
    /// Neighbours in the class's ring; itself when alone, meaningless while full.
    next: SegmentId,
    previous: SegmentId,
}

impl InUse {
    fn is_full(&self) -> bool {
        self.taken == self.class.layout().slots
    }
}

/// A slot that is taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Slot {
    /// Where it begins.
    pub(super) place: Place,
    /// Its size class.
    pub(super) class: Class,
}

/// The allocator's state.
#[derive(Debug)]
pub(super) struct Slots {
    segments: Vec<Segment>,
    /// The ring of segments with a free slot, by class.
    rings: [Option<SegmentId>; CLASSES],
    /// Free segments, the next one to use last. Its capacity is that of the arena.
    free: Vec<SegmentId>,
    /// Segments in use or set aside, and how many may be.
    held: u64,
    held_max: u64,
}

impl Slots {
    /// All free, with nothing to take yet: see [`Self::finish`].
    pub(super) fn new(arena: &impl Arena, limit_bytes: u64) -> Self {
        let count = arena.capacity().min(ADDRESSABLE_BYTES) / SEGMENT_BYTES;
        let count = usize::try_from(count).expect("2^20 segments at most");
        Self {
            segments: vec![Segment::Free; count],
            rings: [None; CLASSES],
            free: Vec::with_capacity(count),
            held: 0,
            held_max: limit_bytes / SEGMENT_BYTES,
        }
    }

    /// Gives back the memory of every segment that nothing was claimed in, and makes them takeable.
    pub(super) fn finish(&mut self, arena: &mut impl Arena) {
        let count = u32::try_from(self.segments.len()).expect("2^20 segments at most");
        let mut end = u64::from(count) * SEGMENT_BYTES;
        for id in (0..count).rev().map(SegmentId) {
            if id.0 > 0 && matches!(self.segment(id), Segment::Free) {
                self.free.push(id);
                continue;
            }
            // One call for each run of free segments: an arena of holes costs one call.
            let after = id.start() + SEGMENT_BYTES;
            if after < end {
                arena.give_back(after, end - after);
            }
            end = id.start();
        }
    }

    /// Bytes of the segments that hold something.
    pub(super) fn held_bytes(&self) -> u64 {
        self.held * SEGMENT_BYTES
    }

    /// Takes a slot of at least `bytes`.
    ///
    /// # Errors
    /// `Full`: nothing was changed.
    pub(super) fn allocate(
        &mut self,
        arena: &mut impl Arena,
        bytes: usize,
    ) -> Result<Slot, StoreError> {
        let wanted = Class::holding(bytes).ok_or(StoreError::Full)?;
        let id = self.rings[wanted.index()]
            .or_else(|| self.open_free(arena, wanted))
            .or_else(|| wanted.and_larger().find_map(|c| self.rings[c.index()]))
            .ok_or(StoreError::Full)?;
        let mut segment = self.in_use(id).expect("rings hold segments in use");
        let layout = segment.class.layout();
        let slot = free_slot(arena, id, &segment).expect("a segment in a ring has a free slot");
        segment.first_word = slot / WORD_BITS;
        self.take(arena, id, segment, slot);
        Ok(Slot {
            place: Place(id.start() + u64::from(layout.slot_start(slot))),
            class: segment.class,
        })
    }

    /// Frees the slot at `place`; the last of a segment gives the segment's memory back.
    ///
    /// # Panics
    /// When no taken slot begins there: callers look first.
    pub(super) fn free(&mut self, arena: &mut impl Arena, place: Place) {
        let (id, mut segment, slot) = self.taken_at(arena, place).expect("callers look first");
        let was_full = segment.is_full();
        write_bit(arena, id, slot, false);
        segment.taken -= 1;
        segment.first_word = segment.first_word.min(slot / WORD_BITS);
        self.segments[id.0 as usize] = Segment::InUse(segment);
        if segment.taken == 0 {
            if !was_full {
                self.leave_ring(id);
            }
            self.segments[id.0 as usize] = Segment::Free;
            self.held -= 1;
            self.free.push(id);
            arena.give_back(id.start(), SEGMENT_BYTES);
        } else if was_full {
            self.join_ring(id);
        }
    }

    /// The slot that begins at `place`.
    ///
    /// # Errors
    /// `NoSuchLocation` when no taken slot begins there, `Damaged` when recovery could not tell.
    pub(super) fn find(&self, arena: &impl Arena, place: Place) -> Result<Slot, StoreError> {
        if matches!(self.segment(segment_of(place)), Segment::Aside) {
            return Err(StoreError::Damaged);
        }
        let (_, segment, _) = self
            .taken_at(arena, place)
            .ok_or(StoreError::NoSuchLocation)?;
        Ok(Slot {
            place,
            class: segment.class,
        })
    }

    /// Whether `place` is one where a slot of `class` may begin, as far as is known of its segment.
    pub(super) fn admits(&self, place: Place, class: Class) -> bool {
        let id = segment_of(place);
        let class_fits = match self.segment(id) {
            Segment::Free => id.0 > 0 && (id.0 as usize) < self.segments.len(),
            Segment::InUse(segment) => segment.class == class,
            Segment::Aside => false,
        };
        class_fits && class.layout().slot_at(within(place)).is_some()
    }

    /// The class of the segment around `place`, when it is in use.
    pub(super) fn class_around(&self, place: Place) -> Option<Class> {
        self.in_use(segment_of(place)).map(|s| s.class)
    }

    /// Takes the slot at `place` on the word of a live location; false when it was taken already.
    ///
    /// # Panics
    /// When [`Self::admits`] says no.
    pub(super) fn claim(&mut self, arena: &mut impl Arena, place: Place, class: Class) -> bool {
        assert!(self.admits(place, class), "callers ask first");
        let id = segment_of(place);
        if matches!(self.segment(id), Segment::Free) {
            self.open(arena, id, class);
        }
        let segment = self.in_use(id).expect("it was in use or opened");
        let slot = class.layout().slot_at(within(place));
        let slot = slot.expect("`admits` looked");
        if read_bit(arena, id, slot) {
            return false;
        }
        self.take(arena, id, segment, slot);
        true
    }

    /// Leaves the segment around `place` alone from now on: something in it is live, but not readable.
    pub(super) fn set_aside(&mut self, place: Place) {
        let id = segment_of(place);
        if matches!(self.segment(id), Segment::Free) && (id.0 as usize) < self.segments.len() {
            self.segments[id.0 as usize] = Segment::Aside;
            self.held += 1;
        }
    }

    fn segment(&self, id: SegmentId) -> Segment {
        let known = self.segments.get(id.0 as usize);
        known.copied().unwrap_or(Segment::Free)
    }

    fn in_use(&self, id: SegmentId) -> Option<InUse> {
        match self.segment(id) {
            Segment::InUse(segment) => Some(segment),
            Segment::Free | Segment::Aside => None,
        }
    }

    fn taken_at(&self, arena: &impl Arena, place: Place) -> Option<(SegmentId, InUse, u32)> {
        let id = segment_of(place);
        let segment = self.in_use(id)?;
        let slot = segment.class.layout().slot_at(within(place))?;
        read_bit(arena, id, slot).then_some((id, segment, slot))
    }

    fn open_free(&mut self, arena: &mut impl Arena, class: Class) -> Option<SegmentId> {
        if self.held >= self.held_max {
            return None;
        }
        let id = self.free.pop()?;
        if !arena.reserve(id.start(), SEGMENT_BYTES) {
            arena.give_back(id.start(), SEGMENT_BYTES);
            self.free.push(id);
            return None;
        }
        self.open(arena, id, class);
        Some(id)
    }

    fn open(&mut self, arena: &mut impl Arena, id: SegmentId, class: Class) {
        let bitmap_bytes = class.layout().bitmap_bytes as usize;
        arena.bytes_mut(id.start(), bitmap_bytes).fill(0);
        self.segments[id.0 as usize] = Segment::InUse(InUse {
            class,
            taken: 0,
            first_word: 0,
            next: id,
            previous: id,
        });
        self.held += 1;
        self.join_ring(id);
    }

    fn take(&mut self, arena: &mut impl Arena, id: SegmentId, mut segment: InUse, slot: u32) {
        write_bit(arena, id, slot, true);
        segment.taken += 1;
        self.segments[id.0 as usize] = Segment::InUse(segment);
        if segment.is_full() {
            self.leave_ring(id);
        }
    }

    /// Puts `id` at the tail of its class's ring.
    fn join_ring(&mut self, id: SegmentId) {
        let class = self.neighbours(id).class;
        let Some(head) = self.rings[class.index()] else {
            let alone = self.neighbours(id);
            (alone.next, alone.previous) = (id, id);
            self.rings[class.index()] = Some(id);
            return;
        };
        let tail = std::mem::replace(&mut self.neighbours(head).previous, id);
        self.neighbours(tail).next = id;
        let new = self.neighbours(id);
        (new.next, new.previous) = (head, tail);
    }

    fn leave_ring(&mut self, id: SegmentId) {
        let InUse {
            class,
            next,
            previous,
            ..
        } = *self.neighbours(id);
        self.neighbours(previous).next = next;
        self.neighbours(next).previous = previous;
        let ring = &mut self.rings[class.index()];
        if *ring == Some(id) {
            *ring = (next != id).then_some(next);
        }
    }

    fn neighbours(&mut self, id: SegmentId) -> &mut InUse {
        match &mut self.segments[id.0 as usize] {
            Segment::InUse(segment) => segment,
            Segment::Free | Segment::Aside => panic!("rings hold segments in use"),
        }
    }
}

fn segment_of(place: Place) -> SegmentId {
    // A place is below 2^40: it came out of a location's 34 bits times 64.
    SegmentId(u32::try_from(place.0 / SEGMENT_BYTES).unwrap_or(u32::MAX))
}

fn within(place: Place) -> u32 {
    (place.0 % SEGMENT_BYTES) as u32
}

/// The first free slot. A segment in a ring has one, so that the bits behind the last slot's, which are
/// clear as well, are never reached.
fn free_slot(arena: &impl Arena, id: SegmentId, segment: &InUse) -> Option<u32> {
    let bitmap = arena.bytes(id.start(), segment.class.layout().bitmap_bytes as usize);
    let words = bitmap.chunks_exact(WORD_BYTES);
    (0..)
        .zip(words)
        .skip(segment.first_word as usize)
        .find_map(|(i, word)| {
            let taken = u64::from_le_bytes(array(word));
            (taken != u64::MAX).then(|| i * WORD_BITS + taken.trailing_ones())
        })
}

fn read_bit(arena: &impl Arena, id: SegmentId, slot: u32) -> bool {
    arena.bytes(id.start() + u64::from(slot / 8), 1)[0] >> (slot % 8) & 1 == 1
}

fn write_bit(arena: &mut impl Arena, id: SegmentId, slot: u32, taken: bool) {
    let byte = &mut arena.bytes_mut(id.start() + u64::from(slot / 8), 1)[0];
    let bit = 1 << (slot % 8);
    *byte = if taken { *byte | bit } else { *byte & !bit };
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::arena::HeapArena;
    use crate::store::tests::content::noise;

    /// Everything that must hold of the rings, the bitmaps and the counts.
    fn audit(slots: &Slots, arena: &HeapArena, taken: &[Slot]) {
        let mut in_rings = vec![0; slots.segments.len()];
        for (class, ring) in slots.rings.iter().enumerate() {
            let Some(head) = *ring else { continue };
            let mut id = head;
            loop {
                let segment = slots.in_use(id).expect("rings hold segments in use");
                assert_eq!(segment.class.index(), class);
                assert!(!segment.is_full());
                assert_eq!(slots.in_use(segment.next).unwrap().previous, id);
                in_rings[id.0 as usize] += 1;
                assert_eq!(
                    in_rings[id.0 as usize], 1,
                    "the ring comes back to its head"
                );
                id = segment.next;
                if id == head {
                    break;
                }
            }
        }
        let mut held = 0;
        for (id, in_rings) in (0..).map(SegmentId).zip(in_rings) {
            let Some(segment) = slots.in_use(id) else {
                assert_eq!(in_rings, 0);
                continue;
            };
            held += 1;
            assert_eq!(in_rings == 1, !segment.is_full());
            let within = taken.iter().filter(|s| segment_of(s.place) == id);
            assert_eq!(within.count(), segment.taken as usize);
            let layout = segment.class.layout();
            let bits = (0..layout.slots).filter(|&slot| read_bit(arena, id, slot));
            assert_eq!(bits.count(), segment.taken as usize);
        }
        assert_eq!(slots.held, held);
        let free = slots.segments.len() as u64 - 1 - held;
        assert_eq!(slots.free.len() as u64, free);
    }

    #[test]
    fn rings_bitmaps_and_counts_agree_through_any_history() {
        for seed in 0..8 {
            let mut arena = HeapArena::new(8 << 20);
            let mut slots = Slots::new(&arena, 7 << 20);
            slots.finish(&mut arena);
            let mut taken: Vec<Slot> = Vec::new();
            let mut dice = noise(seed).map(usize::from);
            let mut full = 0;
            for step in 0..2000 {
                let mut roll = || dice.next().unwrap() << 8 | dice.next().unwrap();
                // Fills, then drains, then fills again; large slots, so that segments fill up.
                if roll() % 8 < [6, 2][step / 500 % 2] {
                    let bytes = [66_000, 66_000, 30_000, 20_000][roll() % 4];
                    match slots.allocate(&mut arena, bytes) {
                        Ok(slot) => {
                            assert!(slot.class.layout().slot_bytes as usize >= bytes);
                            assert!(!taken.contains(&slot));
                            taken.push(slot);
                        }
                        Err(_) => full += 1,
                    }
                } else if !taken.is_empty() {
                    let slot = taken.swap_remove(roll() % taken.len());
                    assert_eq!(slots.find(&arena, slot.place), Ok(slot));
                    slots.free(&mut arena, slot.place);
                    let gone = Err(StoreError::NoSuchLocation);
                    assert_eq!(slots.find(&arena, slot.place), gone);
                }
                audit(&slots, &arena, &taken);
            }
            assert!(full > 0, "it was full at times");
            for slot in taken.drain(..) {
                slots.free(&mut arena, slot.place);
            }
            audit(&slots, &arena, &taken);
            assert_eq!(slots.held_bytes(), 0);
        }
    }
}
