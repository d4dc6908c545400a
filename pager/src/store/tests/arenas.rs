//! Arenas that watch, and arenas that die.

use crate::store::arena::{Arena, HeapArena};
use crate::store::tests::content::noise;

/// Remembers what was given back, and can have no memory.
pub(super) struct WatchedArena {
    pub(super) inner: HeapArena,
    /// So many more reservations succeed.
    pub(super) reservations: u64,
    pub(super) given_back: Vec<(u64, u64)>,
}

impl WatchedArena {
    pub(super) fn new(capacity: usize) -> Self {
        Self {
            inner: HeapArena::new(capacity),
            reservations: u64::MAX,
            given_back: Vec::new(),
        }
    }
}

impl Arena for WatchedArena {
    fn capacity(&self) -> u64 {
        self.inner.capacity()
    }
    fn bytes(&self, offset: u64, len: usize) -> &[u8] {
        self.inner.bytes(offset, len)
    }
    fn bytes_mut(&mut self, offset: u64, len: usize) -> &mut [u8] {
        self.inner.bytes_mut(offset, len)
    }
    fn reserve(&mut self, offset: u64, len: u64) -> bool {
        let left = self.reservations.checked_sub(1);
        self.reservations = left.unwrap_or(0);
        left.is_some() && self.inner.reserve(offset, len)
    }
    fn give_back(&mut self, offset: u64, len: u64) {
        assert_eq!((offset % (1 << 20), len % (1 << 20)), (0, 0));
        self.given_back.push((offset, len));
        self.inner.give_back(offset, len);
    }
}

/// Keeps what memory would hold, had its process been killed during write number `dies_at`.
///
/// From then on the writer works on a copy that nobody will see. Of the fatal write and of those before
/// it in the same operation, single words are lost or kept at random, as if the compiler had put the
/// operation's stores in any order.
pub(super) struct MortalArena {
    /// What a successor could see.
    seen: HeapArena,
    /// What the running operation's writes found, oldest first.
    undo: Vec<Old>,
    /// What the dying process sees, and where it wrote last.
    after_death: Option<(HeapArena, Old)>,
    writes: u64,
    dies_at: u64,
}

/// Bytes as they were before a write.
struct Old {
    offset: u64,
    bytes: Vec<u8>,
}

impl MortalArena {
    pub(super) fn new(inner: HeapArena, dies_at: u64) -> Self {
        Self {
            seen: inner,
            undo: Vec::new(),
            after_death: None,
            writes: 0,
            dies_at,
        }
    }

    pub(super) fn is_dead(&self) -> bool {
        self.after_death.is_some()
    }

    /// An operation ended: all of its writes will be seen.
    pub(super) fn operation_ended(&mut self) {
        self.undo.clear();
    }

    /// What a successor finds.
    pub(super) fn corpse(self, seed: u64) -> HeapArena {
        let mut found = self.seen;
        if let Some((phantom, fatal)) = self.after_death {
            let mut coin = noise(seed);
            let done = phantom.bytes(fatal.offset, fatal.bytes.len());
            mix(&mut found, fatal.offset, done, &mut coin);
            for old in self.undo.iter().rev() {
                mix(&mut found, old.offset, &old.bytes, &mut coin);
            }
        }
        found
    }

    fn write(&mut self, offset: u64, len: usize) -> &mut HeapArena {
        if self.after_death.is_none() {
            self.writes += 1;
            let bytes = self.seen.bytes(offset, len).to_vec();
            let old = Old { offset, bytes };
            if self.writes == self.dies_at {
                self.after_death = Some((self.seen.clone(), old));
            } else {
                self.undo.push(old);
            }
        }
        match &mut self.after_death {
            Some((phantom, _)) => phantom,
            None => &mut self.seen,
        }
    }
}

/// Takes all, none or a random half of the words of `from`.
fn mix(into: &mut HeapArena, offset: u64, from: &[u8], coin: &mut impl Iterator<Item = u8>) {
    let to = into.bytes_mut(offset, from.len());
    let odds = coin.next().unwrap() % 3;
    for (to, from) in to.chunks_mut(8).zip(from.chunks(8)) {
        if odds == 1 || odds == 2 && coin.next().unwrap().is_multiple_of(2) {
            to.copy_from_slice(from);
        }
    }
}

impl Arena for MortalArena {
    fn capacity(&self) -> u64 {
        self.seen.capacity()
    }
    fn bytes(&self, offset: u64, len: usize) -> &[u8] {
        match &self.after_death {
            Some((phantom, _)) => phantom.bytes(offset, len),
            None => self.seen.bytes(offset, len),
        }
    }
    fn bytes_mut(&mut self, offset: u64, len: usize) -> &mut [u8] {
        self.write(offset, len).bytes_mut(offset, len)
    }
    fn reserve(&mut self, offset: u64, len: u64) -> bool {
        // No byte changes.
        self.seen.reserve(offset, len)
    }
    fn give_back(&mut self, offset: u64, len: u64) {
        self.write(offset, usize::try_from(len).unwrap())
            .give_back(offset, len);
    }
}
