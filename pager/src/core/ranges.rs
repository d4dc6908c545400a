//! Sets of address ranges.

use holo_proto::{Addr, AddrRange};

/// Most registered mappings of one space (the kernel's default `max_map_count` is 65530).
pub(crate) const REGIONS: usize = 65536;

/// Disjoint address ranges in order; neighbours stay apart, as the mappings they stand for.
#[derive(Clone, Debug, Default)]
pub(crate) struct Ranges {
    list: Vec<AddrRange>,
}

impl Ranges {
    pub(crate) fn new() -> Self {
        Self {
            list: Vec::with_capacity(1024),
        }
    }

    /// Index of the first range that ends after `at`.
    fn first_after(&self, at: Addr) -> usize {
        self.list.partition_point(|r| r.end <= at)
    }

    pub(crate) fn around(&self, at: Addr) -> Option<AddrRange> {
        let r = *self.list.get(self.first_after(at))?;
        r.contains(at).then_some(r)
    }

    /// The first range that overlaps `range`.
    pub(crate) fn overlapping(&self, range: AddrRange) -> Option<AddrRange> {
        let r = *self.list.get(self.first_after(range.start))?;
        r.overlaps(range).then_some(r)
    }

    /// The first range that ends after `at`.
    pub(crate) fn at_or_after(&self, at: Addr) -> Option<AddrRange> {
        self.list.get(self.first_after(at)).copied()
    }

    /// What lies in `range`.
    pub(crate) fn within(&self, range: AddrRange) -> impl Iterator<Item = AddrRange> + '_ {
        self.iter()
            .map(move |r| r.intersect(range))
            .filter(|r| !r.is_empty())
    }

    /// Adds a range; what it covers already is replaced.
    pub(crate) fn add(&mut self, range: AddrRange) {
        if range.is_empty() || self.list.len() >= REGIONS {
            return;
        }
        self.remove(range);
        let i = self.first_after(range.start);
        self.list.insert(i, range);
    }

    pub(crate) fn remove(&mut self, range: AddrRange) {
        let mut i = self.first_after(range.start);
        while i < self.list.len() && self.list[i].start < range.end {
            let old = self.list[i];
            let left = AddrRange {
                start: old.start,
                end: range.start.min(old.end),
            };
            let right = AddrRange {
                start: range.end.max(old.start),
                end: old.end,
            };
            match (left.is_empty(), right.is_empty()) {
                (true, true) => {
                    self.list.remove(i);
                }
                (false, true) => {
                    self.list[i] = left;
                    i += 1;
                }
                (true, false) => {
                    self.list[i] = right;
                    break;
                }
                (false, false) => {
                    self.list[i] = left;
                    self.list.insert(i + 1, right);
                    break;
                }
            }
        }
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = AddrRange> + '_ {
        self.list.iter().copied()
    }

    /// The parts of `range` that no range here covers.
    pub(crate) fn without(&self, range: AddrRange) -> Vec<AddrRange> {
        let mut left = Self::default();
        left.add(range);
        for &r in &self.list {
            left.remove(r);
        }
        left.list
    }

    pub(crate) fn pop(&mut self) -> Option<AddrRange> {
        self.list.pop()
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.list.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn list(r: &Ranges) -> Vec<(u64, u64)> {
        r.iter().map(|r| (r.start.0, r.end.0)).collect()
    }

    #[test]
    fn removal_clips_splits_and_deletes() {
        let mut r = Ranges::new();
        for (s, e) in [(10, 20), (20, 30), (40, 50)] {
            r.add(AddrRange::new(s, e));
        }
        assert_eq!(list(&r), [(10, 20), (20, 30), (40, 50)]);
        r.remove(AddrRange::new(15, 25));
        assert_eq!(list(&r), [(10, 15), (25, 30), (40, 50)]);
        r.remove(AddrRange::new(42, 44));
        assert_eq!(list(&r), [(10, 15), (25, 30), (40, 42), (44, 50)]);
        r.remove(AddrRange::new(0, 100));
        assert!(r.is_empty());
    }

    #[test]
    fn adding_over_replaces() {
        let mut r = Ranges::new();
        r.add(AddrRange::new(10, 20));
        r.add(AddrRange::new(15, 40));
        assert_eq!(list(&r), [(10, 15), (15, 40)]);
        assert_eq!(r.around(Addr(15)), Some(AddrRange::new(15, 40)));
        assert_eq!(r.around(Addr(40)), None);
        assert_eq!(
            r.overlapping(AddrRange::new(0, 11)),
            Some(AddrRange::new(10, 15))
        );
    }
}
