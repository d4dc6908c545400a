//! The vocabulary that every part of holo shares: addresses, units and ids.
//!
//! No I/O, no clock, no policy. Two sizes matter everywhere: the *page* (64 KiB, the unit of
//! placement and eviction) and the *subpage* (4 KiB, the unit of residency, because a mapping is not
//! 64 KiB-aligned and a process frees single subpages).

#![forbid(unsafe_code)]

mod addr;
mod report;

pub use addr::{
    Addr, AddrRange, ByteLen, PAGE_BYTES, PAGE_LEN, PAGE_SUBPAGES, PageIndex, SUBPAGE_BYTES,
    SUBPAGE_LEN, SubpageIndex, SubpageMask,
};
pub use report::{FaultLatency, LeftAlone, Report, Stayed};

/// Index of one address space (one `mm`) that the pager serves; dense, reused after the space ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SpaceId(pub u16);
