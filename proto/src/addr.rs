//! Addresses of a target, as claims: nothing here says that anything is mapped there.

use std::fmt;

/// Bytes of a subpage, the unit of residency.
pub const SUBPAGE_BYTES: u64 = 4096;
/// Bytes of a page, the unit of placement and eviction.
pub const PAGE_BYTES: u64 = 65536;
/// [`SUBPAGE_BYTES`] as a length in memory.
pub const SUBPAGE_LEN: usize = 4096;
/// [`PAGE_BYTES`] as a length in memory.
pub const PAGE_LEN: usize = 65536;
/// Subpages in one page.
pub const PAGE_SUBPAGES: usize = 16;

/// A virtual address in a target's address space, in bytes.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub struct Addr(pub u64);

impl fmt::Debug for Addr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

impl fmt::Display for Addr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

impl Addr {
    /// The subpage that holds this address.
    #[must_use]
    pub const fn subpage(self) -> SubpageIndex {
        SubpageIndex(self.0 / SUBPAGE_BYTES)
    }

    /// The page that holds this address.
    #[must_use]
    pub const fn page(self) -> PageIndex {
        PageIndex(self.0 / PAGE_BYTES)
    }

    /// This address plus `bytes`, saturating at the end of the address space.
    #[must_use]
    pub const fn offset(self, bytes: u64) -> Self {
        Self(self.0.saturating_add(bytes))
    }
}

/// Number of a 4 KiB subpage: its address divided by 4096.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub struct SubpageIndex(pub u64);

impl SubpageIndex {
    /// First byte of the subpage.
    #[must_use]
    pub const fn start(self) -> Addr {
        Addr(self.0 * SUBPAGE_BYTES)
    }

    /// The page around it.
    #[must_use]
    pub const fn page(self) -> PageIndex {
        PageIndex(self.0 / PAGE_SUBPAGES as u64)
    }

    /// Its place in that page, 0 to 15.
    #[must_use]
    #[expect(clippy::cast_possible_truncation, reason = "a remainder below sixteen")]
    pub const fn in_page(self) -> usize {
        (self.0 % PAGE_SUBPAGES as u64) as usize
    }
}

/// Number of a 64 KiB page: its address divided by 65536.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PageIndex(pub u64);

impl PageIndex {
    /// First byte of the page.
    #[must_use]
    pub const fn start(self) -> Addr {
        Addr(self.0 * PAGE_BYTES)
    }

    /// The page's 64 KiB.
    #[must_use]
    pub const fn range(self) -> AddrRange {
        AddrRange {
            start: Addr(self.0 * PAGE_BYTES),
            end: Addr((self.0 + 1) * PAGE_BYTES),
        }
    }

    /// The page's subpage number `i`, 0 to 15.
    #[must_use]
    pub const fn subpage(self, i: usize) -> SubpageIndex {
        SubpageIndex(self.0 * PAGE_SUBPAGES as u64 + i as u64)
    }
}

/// A half-open range of addresses, `start..end`; empty when `end <= start`.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct AddrRange {
    /// First byte.
    pub start: Addr,
    /// One past the last byte.
    pub end: Addr,
}

impl fmt::Debug for AddrRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}-{:#x}", self.start.0, self.end.0)
    }
}

impl AddrRange {
    /// The range `start..end`.
    #[must_use]
    pub const fn new(start: u64, end: u64) -> Self {
        Self {
            start: Addr(start),
            end: Addr(end),
        }
    }

    /// Bytes in the range.
    #[must_use]
    pub const fn len(self) -> u64 {
        self.end.0.saturating_sub(self.start.0)
    }

    /// No byte is in it.
    #[must_use]
    pub const fn is_empty(self) -> bool {
        self.end.0 <= self.start.0
    }

    /// The first subpage that lies wholly behind the range.
    #[must_use]
    pub const fn end_subpage(self) -> SubpageIndex {
        SubpageIndex(self.end.0.div_ceil(SUBPAGE_BYTES))
    }

    /// Whether `at` lies in the range.
    #[must_use]
    pub const fn contains(self, at: Addr) -> bool {
        at.0 >= self.start.0 && at.0 < self.end.0
    }

    /// The part that both ranges share, possibly empty.
    #[must_use]
    pub fn intersect(self, other: Self) -> Self {
        Self {
            start: self.start.max(other.start),
            end: self.end.min(other.end),
        }
    }

    /// Whether the ranges share a byte.
    #[must_use]
    pub fn overlaps(self, other: Self) -> bool {
        !self.intersect(other).is_empty()
    }

    /// Subpages that the range touches, in order.
    pub fn subpages(self) -> impl DoubleEndedIterator<Item = SubpageIndex> {
        let end = if self.is_empty() {
            self.start.0 / SUBPAGE_BYTES
        } else {
            self.end.0.div_ceil(SUBPAGE_BYTES)
        };
        (self.start.0 / SUBPAGE_BYTES..end).map(SubpageIndex)
    }

    /// Pages that the range touches, in order.
    pub fn pages(self) -> impl DoubleEndedIterator<Item = PageIndex> {
        let end = if self.is_empty() {
            self.start.0 / PAGE_BYTES
        } else {
            self.end.0.div_ceil(PAGE_BYTES)
        };
        (self.start.0 / PAGE_BYTES..end).map(PageIndex)
    }
}

/// A length in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub struct ByteLen(pub u64);

/// Which of a page's 16 subpages: bit `i` is subpage `i`.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct SubpageMask(pub u16);

impl fmt::Debug for SubpageMask {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016b}", self.0)
    }
}

impl SubpageMask {
    /// No subpage.
    pub const NONE: Self = Self(0);
    /// All sixteen.
    pub const ALL: Self = Self(u16::MAX);

    /// Only subpage `i`.
    #[must_use]
    pub const fn one(i: usize) -> Self {
        Self(1 << i)
    }

    /// Whether subpage `i` is in.
    #[must_use]
    pub const fn has(self, i: usize) -> bool {
        self.0 >> i & 1 == 1
    }

    /// With subpage `i` as well.
    #[must_use]
    pub const fn with(self, i: usize) -> Self {
        Self(self.0 | 1 << i)
    }

    /// Without subpage `i`.
    #[must_use]
    pub const fn without(self, i: usize) -> Self {
        Self(self.0 & !(1 << i))
    }

    /// Subpages in both.
    #[must_use]
    pub const fn and(self, other: Self) -> Self {
        Self(self.0 & other.0)
    }

    /// Subpages in either.
    #[must_use]
    pub const fn or(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    /// Subpages in this one but not in `other`.
    #[must_use]
    pub const fn minus(self, other: Self) -> Self {
        Self(self.0 & !other.0)
    }

    /// How many.
    #[must_use]
    pub const fn count(self) -> u32 {
        self.0.count_ones()
    }

    /// None of them.
    #[must_use]
    pub const fn is_empty(self) -> bool {
        self.0 == 0
    }

    /// The subpages in it, ascending.
    pub fn iter(self) -> impl Iterator<Item = usize> {
        (0..PAGE_SUBPAGES).filter(move |&i| self.has(i))
    }

    /// Maximal runs of neighbouring subpages, as `(first, count)`, ascending.
    pub fn runs(self) -> impl Iterator<Item = (usize, usize)> {
        let mut at = 0;
        std::iter::from_fn(move || {
            while at < PAGE_SUBPAGES && !self.has(at) {
                at += 1;
            }
            if at == PAGE_SUBPAGES {
                return None;
            }
            let first = at;
            while at < PAGE_SUBPAGES && self.has(at) {
                at += 1;
            }
            Some((first, at - first))
        })
    }

    /// The subpages of `page` that lie wholly in `range`.
    #[must_use]
    pub fn of_page_in(page: PageIndex, range: AddrRange) -> Self {
        let part = page.range().intersect(range);
        if part.is_empty() {
            return Self::NONE;
        }
        let first = part.start.0.div_ceil(SUBPAGE_BYTES);
        let end = part.end.0 / SUBPAGE_BYTES;
        (first..end).fold(Self::NONE, |m, s| m.with(SubpageIndex(s).in_page()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_cover_the_mask_exactly() {
        let mask = SubpageMask(0b1000_0110_0000_0111);
        assert_eq!(mask.runs().collect::<Vec<_>>(), [(0, 3), (9, 2), (15, 1)]);
        assert_eq!(SubpageMask::NONE.runs().count(), 0);
        assert_eq!(SubpageMask::ALL.runs().collect::<Vec<_>>(), [(0, 16)]);
    }

    #[test]
    fn a_page_is_clipped_to_whole_subpages_of_a_range() {
        let page = Addr(0x20000).page();
        assert_eq!(
            SubpageMask::of_page_in(page, AddrRange::new(0x21000, 0x23000)),
            SubpageMask(0b110)
        );
        assert_eq!(
            SubpageMask::of_page_in(page, AddrRange::new(0, u64::MAX)),
            SubpageMask::ALL
        );
        assert!(SubpageMask::of_page_in(page, AddrRange::new(0x30000, 0x40000)).is_empty());
    }

    #[test]
    fn empty_ranges_have_no_pages() {
        assert_eq!(AddrRange::new(0x5000, 0x5000).subpages().count(), 0);
        assert_eq!(AddrRange::new(0x5800, 0x5000).pages().count(), 0);
        assert_eq!(AddrRange::new(0x1f000, 0x21000).pages().count(), 2);
    }
}
