//! The memory that a store keeps its blobs in, as a trait: plain bytes that can be given back.
//!
//! The store never asks where the bytes live. In the pager it is a memfd that outlives the process, in
//! tests a vector.

/// One contiguous range of bytes, `0..capacity`, owned by the store that holds it.
///
/// What was written must be what the next reader sees, also when that reader is another process which
/// mapped the same memory after this one was killed. A fresh arena reads as zero.
pub trait Arena {
    /// Bytes that can be addressed; constant.
    fn capacity(&self) -> u64;

    /// The bytes `offset..offset + len`.
    ///
    /// # Panics
    /// When the range is not inside the capacity.
    fn bytes(&self, offset: u64, len: usize) -> &[u8];

    /// The bytes `offset..offset + len`, to be changed in place.
    ///
    /// # Panics
    /// When the range is not inside the capacity.
    fn bytes_mut(&mut self, offset: u64, len: usize) -> &mut [u8];

    /// Takes memory for `offset..offset + len` now, so that writing there cannot fail later. False where there is none;
    /// then part of it may have been taken.
    ///
    /// # Panics
    /// When the range is not inside the capacity.
    fn reserve(&mut self, offset: u64, len: u64) -> bool;

    /// Frees the memory behind `offset..offset + len`, which reads as zero from then on.
    ///
    /// Both are multiples of 1 MiB. A release asks for 1 MiB at most; more at once is asked for only while a
    /// store is made or recovered.
    ///
    /// # Panics
    /// When the range is not inside the capacity.
    fn give_back(&mut self, offset: u64, len: u64);
}

/// An arena in ordinary heap memory, for tests and simulations: it dies with the process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HeapArena {
    bytes: Vec<u8>,
}

impl HeapArena {
    /// An arena of `capacity` zero bytes.
    #[must_use]
    pub fn new(capacity: usize) -> Self {
        Self {
            bytes: vec![0; capacity],
        }
    }
}

/// An offset as an index into memory.
///
/// # Panics
/// When the machine could not address it, which an arena's capacity rules out.
pub(super) fn index(offset: u64) -> usize {
    usize::try_from(offset).expect("an offset inside the arena is addressable")
}

impl Arena for HeapArena {
    fn capacity(&self) -> u64 {
        self.bytes.len() as u64
    }

    fn bytes(&self, offset: u64, len: usize) -> &[u8] {
        &self.bytes[index(offset)..][..len]
    }

    fn bytes_mut(&mut self, offset: u64, len: usize) -> &mut [u8] {
        &mut self.bytes[index(offset)..][..len]
    }

    fn reserve(&mut self, offset: u64, len: u64) -> bool {
        index(offset) + index(len) <= self.bytes.len()
    }

    fn give_back(&mut self, offset: u64, len: u64) {
        self.bytes[index(offset)..][..index(len)].fill(0);
    }
}
