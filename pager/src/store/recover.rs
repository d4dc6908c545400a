//! Recovery: a successor rebuilds the store from its predecessor's arena and the map of live locations.
//!
//! Why that is enough, whenever the predecessor died, is said in `embedded`. A recovery that is killed is
//! simply done again: it changes nothing that the next one reads, except that it gives back what is free.

use super::api::{Location, StoreError};
use super::arena::Arena;
use super::blob::Header;
use super::embedded::{EmbeddedStore, names, read_header};
use super::location::{Place, Reference};
use super::slots::Slots;
use super::superblock::Serials;

impl<A: Arena> EmbeddedStore<A> {
    /// The store that `arena` held when its last owner went away.
    ///
    /// `live` are the locations that the owner's map holds, each as often as the map holds it, in any order;
    /// those of one blob next to each other cost least. Everything else is free.
    ///
    /// A live location that leads to nothing, or to something damaged, does not fail the recovery: only one
    /// process is hurt by it, and learns of it when it asks for that page. Such locations are counted
    /// in [`EmbeddedStore::refused`]. A damaged blob keeps its slot; when it leaves open which
    /// slots its segment has, the segment is set aside.
    ///
    /// # Errors
    /// `Damaged` when the superblock is not that of an arena of this version and capacity. The arena is lost
    /// to the caller then, and unchanged.
    pub fn recover(
        arena: A,
        limit_bytes: u64,
        live: impl Iterator<Item = Location>,
    ) -> Result<Self, StoreError> {
        let serials = Serials::recover(&arena)?;
        let slots = Slots::new(&arena, limit_bytes);
        let mut store = Self::assemble(arena, slots, serials);
        let mut damaged: Vec<Place> = Vec::new();
        let mut last: Option<Header> = None;
        for location in live {
            match store.recover_one(location, &mut last) {
                Ok(()) => continue,
                Err(Unreadable::Damaged(place)) => damaged.push(place),
                Err(Unreadable::Nothing) => {}
            }
            store.refused += 1;
        }
        // Only now is it known which classes their neighbours have.
        for place in damaged {
            match store.slots.class_around(place) {
                Some(class) if store.slots.admits(place, class) => {
                    if store.slots.claim(&mut store.arena, place, class) {
                        store.stored_bytes += u64::from(class.layout().slot_bytes);
                    }
                }
                Some(_) => {}
                None => store.slots.set_aside(place),
            }
        }
        store.slots.finish(&mut store.arena);
        Ok(store)
    }

    fn recover_one(
        &mut self,
        location: Location,
        last: &mut Option<Header>,
    ) -> Result<(), Unreadable> {
        let reference = Reference::of(location).ok_or(Unreadable::Nothing)?;
        let header = match *last {
            Some(header) if names(&reference, &header) => header,
            Some(_) | None => match read_header(&self.arena, reference.place) {
                Ok(header) => header,
                Err(StoreError::Damaged) => return Err(Unreadable::Damaged(reference.place)),
                Err(StoreError::NoSuchLocation | StoreError::Full) => {
                    return Err(Unreadable::Nothing);
                }
            },
        };
        if !names(&reference, &header) {
            return Err(Unreadable::Nothing);
        }
        *last = Some(header);
        self.adopt(&header, reference.subframe)
            .map_err(|_| Unreadable::Nothing)
    }
}

/// Why a live location could not be taken over.
enum Unreadable {
    /// Something is there, and it is not as it was written.
    Damaged(Place),
    /// Nothing is there.
    Nothing,
}
