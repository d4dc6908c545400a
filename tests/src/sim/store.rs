//! The store of a simulation: a table that knows every reference, or the one that ships.

use std::cell::RefCell;
use std::collections::{BTreeMap, VecDeque};
use std::rc::Rc;

use holo_pager::store::api::{
    Completion, Location, Locations, PageBytes, PageStore, StoreError, StoreUsage, Ticket,
};
use holo_pager::store::{EmbeddedStore, HeapArena};
use holo_proto::{PAGE_SUBPAGES, SubpageMask};

use super::oracle::{Content, ZERO};
use super::rng::Rng;

const ARENA_BYTES: usize = 8 << 20;

/// Reads what a subpage of a frame holds.
pub(crate) fn content_of(frame: &PageBytes, i: usize) -> Content {
    let at = i * 4096;
    std::array::from_fn(|k| {
        let b = &frame[at + 4 * k..at + 4 * k + 4];
        u32::from_le_bytes([b[0], b[1], b[2], b[3]])
    })
}

/// Writes a subpage of a frame.
pub(crate) fn set_content(frame: &mut PageBytes, i: usize, content: Content) {
    let at = i * 4096;
    for (k, word) in content.iter().enumerate() {
        frame[at + 4 * k..at + 4 * k + 4].copy_from_slice(&word.to_le_bytes());
    }
}

#[derive(Debug)]
struct Stored {
    content: Content,
    references: u64,
}

/// A store whose every misuse is a panic.
#[derive(Debug)]
struct Table {
    held: BTreeMap<u64, Stored>,
    last: u64,
}

impl Table {
    fn stored(&mut self, at: Location, what: &str) -> &mut Stored {
        self.held
            .get_mut(&at.0)
            .unwrap_or_else(|| panic!("STORE: {what} {at:?}, which was freed"))
    }
}

enum Backend {
    Table(Table),
    Embedded(Box<EmbeddedStore<HeapArena>>),
}

/// A store with delays and refusals. A clone is a handle to the same stored bytes, as the arena that
/// outlives a pager is.
#[derive(Clone)]
pub(crate) struct Store {
    backend: Rc<RefCell<Backend>>,
    done: VecDeque<(u64, Completion)>,
    delay: u64,
    full_percent: u64,
    damaged_percent: u64,
    rng: Rng,
}

impl Store {
    pub(crate) fn new(
        embedded: bool,
        delay: u64,
        full_percent: u64,
        damaged_percent: u64,
        rng: Rng,
    ) -> Self {
        let backend = if embedded {
            let arena = HeapArena::new(ARENA_BYTES);
            Backend::Embedded(Box::new(EmbeddedStore::create(arena, ARENA_BYTES as u64)))
        } else {
            Backend::Table(Table {
                held: BTreeMap::new(),
                last: 0,
            })
        };
        Self {
            backend: Rc::new(RefCell::new(backend)),
            done: VecDeque::new(),
            delay,
            full_percent,
            damaged_percent,
            rng,
        }
    }

    /// What a successor makes of what its predecessor left, with the locations that the map holds.
    pub(crate) fn recovered(mut self, live: &[Location]) -> Self {
        self.done.clear();
        let mut backend = self.backend.borrow_mut();
        match &mut *backend {
            Backend::Table(table) => {
                for s in table.held.values_mut() {
                    s.references = 0;
                }
                for l in live {
                    table.stored(*l, "live").references += 1;
                }
                table.held.retain(|_, s| s.references > 0);
            }
            Backend::Embedded(store) => {
                let old = std::mem::replace(
                    store.as_mut(),
                    EmbeddedStore::create(HeapArena::new(1 << 20), 0),
                );
                let live = live.iter().copied();
                **store = EmbeddedStore::recover(old.into_arena(), ARENA_BYTES as u64, live)
                    .expect("STORE: the embedded store recovers");
            }
        }
        drop(backend);
        self
    }

    /// Locations that were used and name nothing.
    pub(crate) fn refused(&self) -> u64 {
        match &*self.backend.borrow() {
            Backend::Table(_) => 0,
            Backend::Embedded(store) => store.refused(),
        }
    }

    fn finish(&mut self, completion: Completion) {
        let delay = self.rng.below(self.delay + 1);
        self.done.push_back((delay, completion));
    }

    /// Transfers that have not ended.
    pub(crate) fn is_busy(&self) -> bool {
        !self.done.is_empty()
    }
}

impl PageStore for Store {
    fn put(&mut self, ticket: Ticket, page: &PageBytes, mask: SubpageMask) {
        if self.rng.percent(self.full_percent) {
            let result = Err(StoreError::Full);
            return self.finish(Completion::Put { ticket, result });
        }
        match &mut *Rc::clone(&self.backend).borrow_mut() {
            Backend::Table(table) => {
                let mut locations: Locations = [None; PAGE_SUBPAGES];
                for i in mask.iter() {
                    let content = content_of(page, i);
                    if content != ZERO {
                        table.last += 1;
                        table.held.insert(
                            table.last,
                            Stored {
                                content,
                                references: 1,
                            },
                        );
                        locations[i] = Some(Location(table.last));
                    }
                }
                let result = Ok(locations);
                self.finish(Completion::Put { ticket, result });
            }
            Backend::Embedded(store) => {
                store.put(ticket, page, mask);
                while let Some(done) = store.poll() {
                    self.done.push_back((0, done));
                }
            }
        }
    }

    fn get(&mut self, ticket: Ticket, wanted: &Locations, frame: &mut PageBytes) {
        if self.damaged_percent > 0 && self.rng.percent(self.damaged_percent) {
            // What came before the damage was seen may be there.
            set_content(frame, 0, [!0; 4]);
            let result = Err(StoreError::Damaged);
            return self.finish(Completion::Get { ticket, result });
        }
        match &mut *Rc::clone(&self.backend).borrow_mut() {
            Backend::Table(table) => {
                for (i, l) in wanted.iter().enumerate() {
                    if let Some(l) = l {
                        set_content(frame, i, table.stored(*l, "get").content);
                    }
                }
                self.finish(Completion::Get {
                    ticket,
                    result: Ok(()),
                });
            }
            Backend::Embedded(store) => {
                store.get(ticket, wanted, frame);
                while let Some(done) = store.poll() {
                    self.done.push_back((0, done));
                }
            }
        }
    }

    fn poll(&mut self) -> Option<Completion> {
        let (delay, _) = self.done.front_mut()?;
        if *delay > 0 {
            *delay -= 1;
            return None;
        }
        self.done.pop_front().map(|(_, done)| done)
    }

    fn retain(&mut self, location: Location) {
        match &mut *Rc::clone(&self.backend).borrow_mut() {
            Backend::Table(table) => {
                table.stored(location, "retain").references += 1;
            }
            Backend::Embedded(store) => store.retain(location),
        }
    }

    fn release(&mut self, location: Location) {
        match &mut *Rc::clone(&self.backend).borrow_mut() {
            Backend::Table(table) => {
                let stored = table.stored(location, "release");
                stored.references -= 1;
                if stored.references == 0 {
                    table.held.remove(&location.0);
                }
            }
            Backend::Embedded(store) => store.release(location),
        }
    }

    fn usage(&self) -> StoreUsage {
        match &*self.backend.borrow() {
            Backend::Table(table) => StoreUsage {
                raw_bytes: table.held.len() as u64 * 4096,
                ..StoreUsage::default()
            },
            Backend::Embedded(store) => store.usage(),
        }
    }
}
