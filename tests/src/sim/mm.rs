//! An address space as the kernel holds it: mappings, page tables and the pages behind them.

use std::collections::BTreeMap;

use super::oracle::Content;

/// Index of an address space; one process each.
pub(crate) type MmId = usize;
/// Index of a userfaultfd context; also its descriptor number in the pager.
pub(crate) type UffdId = usize;
/// Index of a physical page; never used again for another.
pub(crate) type FolioId = usize;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Prot {
    None,
    Read,
    Write,
}

/// A private anonymous mapping, in subpages.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Vma {
    pub(crate) start: u64,
    pub(crate) end: u64,
    pub(crate) prot: Prot,
    pub(crate) locked: bool,
    pub(crate) wipe_on_fork: bool,
    pub(crate) dont_fork: bool,
    pub(crate) uffd: Option<UffdId>,
    /// It came by a move, so that all that happens to it was told of.
    pub(crate) moved: bool,
}

impl Vma {
    pub(crate) fn overlaps(&self, start: u64, end: u64) -> bool {
        self.start < end && self.end > start
    }

    fn joins(&self, next: &Self) -> bool {
        self.end == next.start
            && self.prot == next.prot
            && self.locked == next.locked
            && self.wipe_on_fork == next.wipe_on_fork
            && self.dont_fork == next.dont_fork
            && self.uffd == next.uffd
    }
}

/// A page-table entry that is present.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Pte {
    /// The page; `None` is the shared zero page.
    pub(crate) folio: Option<FolioId>,
    pub(crate) dirty: bool,
    /// Write-protected for the userfaultfd.
    pub(crate) wp: bool,
}

/// A physical page.
#[derive(Clone, Debug, Default)]
pub(crate) struct Folio {
    pub(crate) content: Content,
    /// The page's own mark, beside that of each page table.
    pub(crate) dirty: bool,
    /// `MADV_FREE` was done: may be dropped while clean.
    pub(crate) lazy: bool,
    /// Devices that may write at any moment.
    pub(crate) pins: u32,
    /// Where it is mapped.
    pub(crate) maps: Vec<(MmId, u64)>,
    /// Not dropped before this moment, or the end of the pager's eviction window. A request of the pager's
    /// offered what it had not read: another page by now, one that a device wrote after it was read, or
    /// one that the process may have dropped itself. The pager puts that right within the window. What
    /// nobody can put right is a reclaim of just this page before: a stated limit.
    pub(crate) spared_until_ns: u64,
    /// Whose window that is.
    pub(crate) spared_for: MmId,
}

/// An address space.
#[derive(Debug, Default)]
pub(crate) struct Mm {
    pub(crate) alive: bool,
    /// SIGSTOP: no thread leaves the kernel, the ring takes no new request.
    pub(crate) stopped_until_ns: u64,
    pub(crate) vmas: Vec<Vma>,
    pub(crate) ptes: BTreeMap<u64, Pte>,
    /// What the pager read last at each place.
    pub(crate) read: BTreeMap<u64, FolioId>,
    /// Walks in progress that hold the lock for reading: nobody changes a mapping meanwhile.
    pub(crate) readers: u32,
    pub(crate) uffd: Option<UffdId>,
    /// First subpage and end of where the program maps.
    pub(crate) arena: (u64, u64),
    /// Subpages that the kernel writes with faults forbidden.
    pub(crate) heads: Vec<u64>,
    /// The same, of threads that end before their process does.
    pub(crate) passing: Vec<u64>,
    /// When its mappings changed last, or a change of them was heard of.
    pub(crate) changed_ns: u64,
    /// A fork's child.
    pub(crate) forked: bool,
    /// Of a fork's child: what the fork left out, and those that made its parents.
    pub(crate) left_out: Vec<(u64, u64)>,
    /// Left by a guest before its host's message, until what the guest's own message says has been looked at.
    pub(crate) relent: Vec<(u64, u64)>,
}

impl Mm {
    pub(crate) fn vma(&self, v: u64) -> Option<&Vma> {
        self.vmas.iter().find(|m| v >= m.start && v < m.end)
    }

    /// The control blocks of all threads that can be listed now.
    pub(crate) fn all_heads(&self) -> impl Iterator<Item = u64> + '_ {
        self.heads.iter().chain(&self.passing).copied()
    }

    /// The first mapping that ends after `v`.
    pub(crate) fn vma_after(&self, v: u64) -> Option<&Vma> {
        self.vmas.iter().find(|m| m.end > v)
    }

    /// Nothing is mapped in `start..end`.
    pub(crate) fn is_hole(&self, start: u64, end: u64) -> bool {
        !self.vmas.iter().any(|m| m.overlaps(start, end))
    }

    /// Cuts mappings at `at`.
    pub(crate) fn split(&mut self, at: u64) {
        if let Some(i) = self.vmas.iter().position(|m| m.start < at && at < m.end) {
            let mut right = self.vmas[i].clone();
            right.start = at;
            self.vmas[i].end = at;
            self.vmas.insert(i + 1, right);
        }
    }

    /// Changes each mapping in `start..end`, cutting at the ends; equal neighbours join afterwards.
    pub(crate) fn change(&mut self, start: u64, end: u64, mut f: impl FnMut(&mut Vma)) {
        self.split(start);
        self.split(end);
        for m in self.vmas.iter_mut().filter(|m| m.overlaps(start, end)) {
            f(m);
        }
        self.merge();
    }

    pub(crate) fn merge(&mut self) {
        let mut i = 0;
        while i + 1 < self.vmas.len() {
            if self.vmas[i].joins(&self.vmas[i + 1]) {
                self.vmas[i].end = self.vmas[i + 1].end;
                self.vmas[i].moved = false;
                self.vmas.remove(i + 1);
            } else {
                i += 1;
            }
        }
    }

    pub(crate) fn insert_vma(&mut self, vma: Vma) {
        let i = self.vmas.partition_point(|m| m.end <= vma.start);
        self.vmas.insert(i, vma);
        self.merge();
    }

    pub(crate) fn remove_vmas(&mut self, start: u64, end: u64) {
        self.split(start);
        self.split(end);
        self.vmas.retain(|m| !m.overlaps(start, end));
    }

    /// Whether any mapping in `start..end` is served, and by whom.
    pub(crate) fn served(&self, start: u64, end: u64) -> Option<UffdId> {
        self.vmas
            .iter()
            .filter(|m| m.overlaps(start, end))
            .find_map(|m| m.uffd)
    }
}
