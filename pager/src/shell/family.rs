//! Which process a fork's userfaultfd belongs to.
//!
//! The message of a fork carries a descriptor and no process id, and comes before the child is in
//! `/proc`. So candidates are tried: a present subpage of the candidate is write-protected *through the
//! descriptor*; if the candidate's pagemap then shows the protection, and no longer shows it after it was
//! lifted, they are one address space. Nothing of the child changes.

use std::collections::BTreeSet;

use holo_proto::{AddrRange, SUBPAGE_BYTES};

use super::scan;
use crate::sys::errors::UffdError;
use crate::sys::pagemap::{Pagemap, PresentRun};
use crate::sys::procfs::Children;
use crate::sys::uffd::Uffd;

/// All descendants of `roots`, roots excluded.
pub(crate) fn descendants(roots: impl Iterator<Item = i32>) -> BTreeSet<i32> {
    let mut found = BTreeSet::new();
    let mut queue: Vec<i32> = roots.collect();
    while let Some(pid) = queue.pop() {
        for child in Children::list(pid).unwrap_or_default() {
            if found.insert(child) {
                queue.push(child);
            }
        }
    }
    found
}

/// What a comparison came to.
#[derive(Debug)]
pub(crate) enum Match {
    Same,
    Other,
    /// Not to be told now: nothing present to try on.
    Unsure,
    /// The descriptor's address space is gone.
    Gone,
}

/// Whether `pid` is the process of `uffd`.
pub(crate) fn compare(uffd: &Uffd, pid: i32) -> Match {
    let Ok(survey) = scan::survey(pid, &[]) else {
        return Match::Other;
    };
    if survey.registered.is_empty() {
        return Match::Other;
    }
    let Ok(pagemap) = Pagemap::open(pid) else {
        return Match::Other;
    };
    for &range in &survey.registered {
        let mut runs = [PresentRun::default(); 8];
        let Ok((count, _)) = pagemap.scan_present(range, &mut runs) else {
            return Match::Other;
        };
        for run in &runs[..count] {
            let start = run.range().start;
            let one = AddrRange {
                start,
                end: start.offset(SUBPAGE_BYTES),
            };
            let shown = || {
                pagemap
                    .look_page(start.page())
                    .is_ok_and(|l| l.protected.has(start.subpage().in_page()))
            };
            if shown() {
                continue;
            }
            match uffd.protect(one) {
                Ok(()) => {}
                Err(UffdError::Gone) => return Match::Gone,
                Err(UffdError::EdgeOfMapping) => return Match::Other,
                Err(_) => return Match::Unsure,
            }
            let on = shown();
            let lifted = uffd.unprotect(one, true).is_ok();
            return match (on, lifted) {
                (true, true) if !shown() => Match::Same,
                (false, _) => Match::Other,
                _ => Match::Unsure,
            };
        }
    }
    Match::Unsure
}

/// Whether the address space of a descriptor is gone.
pub(crate) fn is_gone(uffd: &Uffd) -> bool {
    // Of an address that no mapping of ours holds: ENOENT while the address space lives.
    matches!(
        uffd.unprotect(AddrRange::new(SUBPAGE_BYTES, 2 * SUBPAGE_BYTES), false),
        Err(UffdError::Gone)
    )
}
