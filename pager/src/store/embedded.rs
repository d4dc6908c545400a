//! The embedded store: evicted pages in this machine's own memory, compressed and hashed.
//!
//! One blob a put (see `blob`), in a slot of an [`Arena`] (see `slots`, `classes`) that outlives the
//! process. Everything completes at once; [`EmbeddedStore::put_now`] and [`EmbeddedStore::get_now`] are
//! the same without the completion queue. It runs on the thread that serves faults: after it is made,
//! nothing in it allocates.
//!
//! # What survives `kill -9`
//! The caller's map of live locations is the truth; the arena holds only what the map cannot: the blobs,
//! and the superblock (see `superblock`). [`EmbeddedStore::recover`] derives all else (reference counts, taken
//! slots, classes of segments) from the live locations and the headers that they lead to. What no live
//! location leads to does not exist: it is never looked at, and its segment is given back or its slot
//! written over. So a put that was cut off leaves nothing that could be mistaken, however little or
//! much of it was written, and *the order of writes within a put or release does not matter*. Four rules
//! carry that, two of them the caller's:
//! 1. A put writes only to free slots, the bitmap and the superblock's ceiling; a segment is opened only
//!    while it is free. No live location leads to any of these.
//! 2. A location enters the map after the put that returned it. Then all of its blob is written: the dead
//!    do not undo stores, and the compiler is kept from moving them across the return by a fence.
//! 3. A location leaves the map before it is released (fenced likewise). So a slot is freed, and
//!    written over or given back, only when no live location leads to it.
//! 4. For a fork the order of entering the map and [`PageStore::retain`] is free: recovery counts
//!    what it finds in the map.
//!
//! The superblock's ceiling of serial numbers can lag behind only for a put that nobody heard of, so no
//! location that was ever known is issued again.
//!
//! # What damage does
//! A read trusts nothing: the slot must be taken, the header must pass its check and have the location's
//! tag, the digest must match, all before a byte is decompressed. A blob whose header fails keeps
//! its slot until the arena ends: where its reference counts are is not known any more, and the slot
//! hurts nobody else.

use std::collections::VecDeque;
use std::sync::atomic::{Ordering, compiler_fence};

use holo_proto::{PAGE_SUBPAGES, SUBPAGE_BYTES, SubpageMask};

use super::api::{
    Completion, Location, Locations, PageBytes, PageStore, StoreError, StoreUsage, Ticket,
};
use super::arena::Arena;
use super::blob::{self, HEADER_BYTES, Header};
use super::location::{Place, Reference};
use super::slots::{Slot, Slots};
use super::subframe::{self, Encoder, SUBPAGE};
use super::superblock::Serials;

/// Puts and gets that may be finished and not yet polled.
pub const COMPLETIONS_MAX: usize = 256;

/// A store of pages in an arena.
pub struct EmbeddedStore<A> {
    pub(super) arena: A,
    pub(super) slots: Slots,
    pub(super) serials: Serials,
    pub(super) encoder: Encoder,
    pub(super) finished: VecDeque<Completion>,
    /// Subframes with a reference.
    pub(super) live_subpages: u64,
    /// Bytes of the slots of live blobs.
    pub(super) stored_bytes: u64,
    pub(super) integrity_failures: u64,
    pub(super) refused: u64,
}

impl<A: Arena> EmbeddedStore<A> {
    /// An empty store in `arena`, whose content is lost. `limit_bytes` bounds the memory that blobs use,
    /// in steps of 1 MiB; the capacity, less 1 MiB for the superblock, bounds it as well.
    ///
    /// # Panics
    /// When the arena has less than 64 bytes.
    #[must_use]
    pub fn create(mut arena: A, limit_bytes: u64) -> Self {
        let serials = Serials::create(&mut arena);
        let mut slots = Slots::new(&arena, limit_bytes);
        slots.finish(&mut arena);
        Self::assemble(arena, slots, serials)
    }

    pub(super) fn assemble(arena: A, slots: Slots, serials: Serials) -> Self {
        Self {
            arena,
            slots,
            serials,
            encoder: Encoder::new(),
            finished: VecDeque::with_capacity(COMPLETIONS_MAX),
            live_subpages: 0,
            stored_bytes: 0,
            integrity_failures: 0,
            refused: 0,
        }
    }

    /// Ends the store and hands its arena over, content and all.
    #[must_use]
    pub fn into_arena(self) -> A {
        self.arena
    }

    /// Bytes of the arena that are in use by blobs, in whole segments of 1 MiB: what the limit bounds.
    #[must_use]
    pub fn held_bytes(&self) -> u64 {
        self.slots.held_bytes()
    }

    /// Locations that were retained, released or said to be live, and name nothing that is stored here.
    #[must_use]
    pub fn refused(&self) -> u64 {
        self.refused
    }

    /// Stores the subpages of `page` that are in `mask`; each location has one reference.
    ///
    /// # Errors
    /// `Full`: nothing was changed.
    pub fn put_now(
        &mut self,
        page: &PageBytes,
        mask: SubpageMask,
    ) -> Result<Locations, StoreError> {
        let mut locations = [None; PAGE_SUBPAGES];
        let frames = self.encoder.encode(page, mask);
        let present = (0..PAGE_SUBPAGES).filter(|&i| frames[i].is_some());
        let present = present.fold(SubpageMask::NONE, SubpageMask::with);
        if present.is_empty() {
            return Ok(locations);
        }
        let payload = frames.iter().flatten().map(|f| f.bytes.len()).sum();
        let bytes = blob::blob_bytes(present.count() as usize, payload);
        let Slot { place, class } = self.slots.allocate(&mut self.arena, bytes)?;
        let header = Header {
            place,
            class,
            mask: present.0,
            bytes: u32::try_from(bytes).expect("a blob has less than 128 KiB"),
            serial: self.serials.take(&mut self.arena),
        };
        blob::write(self.arena.bytes_mut(place.0, bytes), &header, &frames);
        self.live_subpages += u64::from(present.count());
        self.stored_bytes += u64::from(class.layout().slot_bytes);
        for i in present.iter() {
            locations[i] = Some(Reference::location(place, i, header.serial));
        }
        // Rule 2 of the module: what the caller writes next comes after the blob.
        compiler_fence(Ordering::SeqCst);
        Ok(locations)
    }

    /// Fills subpage `i` of `frame` with the bytes of `wanted[i]`, for each that is given.
    ///
    /// # Errors
    /// `NoSuchLocation` and `Damaged`; the frame's content is then undefined.
    pub fn get_now(&mut self, wanted: &Locations, frame: &mut PageBytes) -> Result<(), StoreError> {
        let result = self.read(wanted, frame);
        self.note(result)
    }

    fn read(&self, wanted: &Locations, frame: &mut PageBytes) -> Result<(), StoreError> {
        // Neighbours are mostly of one blob, whose header is then read once.
        let mut last: Option<Header> = None;
        for (location, subpage) in wanted.iter().zip(frame.chunks_exact_mut(SUBPAGE)) {
            let Some(location) = *location else { continue };
            let reference = Reference::of(location).ok_or(StoreError::NoSuchLocation)?;
            let header = match last {
                Some(header) if names(&reference, &header) => header,
                Some(_) | None => self.header_of(&reference)?,
            };
            last = Some(header);
            self.count(&header, reference.subframe)?;
            let blob = self.arena.bytes(header.place.0, header.bytes as usize);
            let stored = blob::read(blob, &header, reference.subframe)?;
            if !subframe::decode(stored, subpage) {
                return Err(StoreError::Damaged);
            }
        }
        Ok(())
    }

    /// The header of the blob that `reference` names, checked.
    fn header_of(&self, reference: &Reference) -> Result<Header, StoreError> {
        let slot = self.slots.find(&self.arena, reference.place)?;
        let header = match read_header(&self.arena, reference.place) {
            // The slot is taken: something was there.
            Err(StoreError::NoSuchLocation) => return Err(StoreError::Damaged),
            other => other?,
        };
        if header.class != slot.class || header.bytes > slot.class.layout().slot_bytes {
            return Err(StoreError::Damaged);
        }
        if names(reference, &header) {
            Ok(header)
        } else {
            Err(StoreError::NoSuchLocation)
        }
    }

    /// The reference count of a subframe, and where it is. Never zero.
    fn count(&self, header: &Header, subframe: usize) -> Result<(u64, u32), StoreError> {
        let rank = header.rank(subframe).ok_or(StoreError::NoSuchLocation)?;
        let at = header.count_at(rank);
        match u32::from_le_bytes(blob::array(self.arena.bytes(at, 4))) {
            0 => Err(StoreError::NoSuchLocation),
            count => Ok((at, count)),
        }
    }

    fn set_count(&mut self, at: u64, count: u32) {
        self.arena
            .bytes_mut(at, 4)
            .copy_from_slice(&count.to_le_bytes());
    }

    fn retain_one(&mut self, location: Location) -> Result<(), StoreError> {
        let reference = Reference::of(location).ok_or(StoreError::NoSuchLocation)?;
        let header = self.header_of(&reference)?;
        let (at, count) = self.count(&header, reference.subframe)?;
        // At the top it sticks: a blob that is kept for ever is better than one freed too early.
        self.set_count(at, count.saturating_add(1));
        Ok(())
    }

    fn release_one(&mut self, location: Location) -> Result<(), StoreError> {
        let reference = Reference::of(location).ok_or(StoreError::NoSuchLocation)?;
        let header = self.header_of(&reference)?;
        let (at, count) = self.count(&header, reference.subframe)?;
        if count == u32::MAX {
            return Ok(());
        }
        self.set_count(at, count - 1);
        if count > 1 {
            return Ok(());
        }
        self.live_subpages -= 1;
        let counts = header.subframes() * 4;
        let counts = self.arena.bytes(header.count_at(0), counts);
        if counts.iter().all(|&b| b == 0) {
            self.stored_bytes -= u64::from(header.class.layout().slot_bytes);
            self.slots.free(&mut self.arena, header.place);
        }
        Ok(())
    }

    /// Adds a live location of the map that is being recovered from.
    pub(super) fn adopt(&mut self, header: &Header, subframe: usize) -> Result<(), StoreError> {
        let rank = header.rank(subframe).ok_or(StoreError::NoSuchLocation)?;
        if !self.slots.admits(header.place, header.class) {
            return Err(StoreError::NoSuchLocation);
        }
        if self
            .slots
            .claim(&mut self.arena, header.place, header.class)
        {
            let counts = header.subframes() * 4;
            self.arena.bytes_mut(header.count_at(0), counts).fill(0);
            self.stored_bytes += u64::from(header.class.layout().slot_bytes);
            self.serials.skip(header.serial);
        }
        let at = header.count_at(rank);
        let count = u32::from_le_bytes(blob::array(self.arena.bytes(at, 4)));
        self.set_count(at, count.saturating_add(1));
        self.live_subpages += u64::from(count == 0);
        Ok(())
    }

    fn note(&mut self, result: Result<(), StoreError>) -> Result<(), StoreError> {
        self.integrity_failures += u64::from(result == Err(StoreError::Damaged));
        result
    }

    fn finish(&mut self, completion: Completion) {
        assert!(
            self.finished.len() < COMPLETIONS_MAX,
            "the owner of a store polls before it has begun {COMPLETIONS_MAX} more operations"
        );
        self.finished.push_back(completion);
    }
}

/// The header at `place`, wherever that leads inside the arena.
pub(super) fn read_header(arena: &impl Arena, place: Place) -> Result<Header, StoreError> {
    let end = place.0.saturating_add(HEADER_BYTES as u64);
    if end > arena.capacity() {
        return Err(StoreError::NoSuchLocation);
    }
    Header::read(arena.bytes(place.0, HEADER_BYTES), place)
}

/// Whether the blob with this header is the one that `reference` means.
pub(super) fn names(reference: &Reference, header: &Header) -> bool {
    reference.place == header.place && reference.tag == header.serial.tag()
}

/// Puts and gets are finished when they return.
///
/// # Panics
/// `put` and `get`, when [`COMPLETIONS_MAX`] results wait to be polled.
impl<A: Arena> PageStore for EmbeddedStore<A> {
    fn put(&mut self, ticket: Ticket, page: &PageBytes, mask: SubpageMask) {
        let result = self.put_now(page, mask);
        self.finish(Completion::Put { ticket, result });
    }

    fn get(&mut self, ticket: Ticket, wanted: &Locations, frame: &mut PageBytes) {
        let result = self.get_now(wanted, frame);
        self.finish(Completion::Get { ticket, result });
    }

    fn poll(&mut self) -> Option<Completion> {
        self.finished.pop_front()
    }

    /// A location that names nothing here is counted in [`EmbeddedStore::refused`].
    fn retain(&mut self, location: Location) {
        let result = self.retain_one(location);
        self.refused += u64::from(self.note(result).is_err());
    }

    /// A location that names nothing here is counted in [`EmbeddedStore::refused`].
    fn release(&mut self, location: Location) {
        // Rule 3 of the module: what the caller wrote to its map comes before.
        compiler_fence(Ordering::SeqCst);
        let result = self.release_one(location);
        self.refused += u64::from(self.note(result).is_err());
    }

    fn usage(&self) -> StoreUsage {
        StoreUsage {
            raw_bytes: self.live_subpages * SUBPAGE_BYTES,
            stored_bytes: self.stored_bytes,
            integrity_failures: self.integrity_failures,
        }
    }
}
