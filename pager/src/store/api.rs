//! The trait that every home of evicted pages implements: embedded RAM today, remote memory later.
//!
//! A put and a get are *begun* with a ticket and *completed* from [`PageStore::poll`], so that a store
//! across a network fits behind it; the embedded store completes at once. Reference counts are plain
//! memory work and immediate.

use holo_proto::{PAGE_BYTES, PAGE_SUBPAGES, SubpageMask};

/// One page's bytes, 64 KiB.
pub type PageBytes = [u8; PAGE_BYTES as usize];

/// Names one begun put or get; chosen by the caller.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Ticket(pub u64);

/// Where one 4 KiB subpage's bytes are, as the map of an address space holds it (60 bits; the upper
/// four belong to the map). Opaque to everyone but the store that issued it. Never zero.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Location(pub u64);

impl Location {
    /// Bits that a store may use.
    pub const BITS: u32 = 60;
}

/// Why a put or get has no good answer. The store's state is unchanged by a failed put.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum StoreError {
    /// The bytes that came back are not the ones that were stored.
    #[error("stored bytes fail their BLAKE3 checksum")]
    Damaged,
    /// The location names nothing that is stored here: the map is wrong.
    #[error("the map names a place in the store that holds nothing")]
    NoSuchLocation,
    /// No room is left.
    #[error("the store is full")]
    Full,
}

/// Where the subpages of a stored page went; `None` for one that is all zero (never stored: an absent
/// entry already reads as zero) or was not in the mask.
pub type Locations = [Option<Location>; PAGE_SUBPAGES];

/// The end of a begun put or get.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Completion {
    /// The page is durable. Each location carries one reference, owned by the caller.
    Put {
        /// Which put.
        ticket: Ticket,
        /// Where the subpages are.
        result: Result<Locations, StoreError>,
    },
    /// The wanted subpages are in the frame, verified.
    Get {
        /// Which get.
        ticket: Ticket,
        /// On an error the frame's content is undefined and must not be used.
        result: Result<(), StoreError>,
    },
}

/// Bytes held, for the report.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StoreUsage {
    /// Live subpages times 4096.
    pub raw_bytes: u64,
    /// Bytes of the blobs that hold them, headers and rounding included.
    pub stored_bytes: u64,
    /// Checksum mismatches seen.
    pub integrity_failures: u64,
}

/// A home for evicted pages.
pub trait PageStore {
    /// Begins to store the subpages of `page` that are in `mask`.
    fn put(&mut self, ticket: Ticket, page: &PageBytes, mask: SubpageMask);

    /// Begins to fetch: subpage `i` of `frame` gets the bytes of `wanted[i]`; others stay as they are.
    fn get(&mut self, ticket: Ticket, wanted: &Locations, frame: &mut PageBytes);

    /// The next finished put or get, if any.
    fn poll(&mut self) -> Option<Completion>;

    /// One more reference to a stored subpage (a fork's child shares it).
    fn retain(&mut self, location: Location);

    /// One reference less; the last one frees it.
    fn release(&mut self, location: Location);

    /// What is held now.
    fn usage(&self) -> StoreUsage;
}
