//! Which process a fork's userfaultfd belongs to; the end of a process's userfaultfd.
//!
//! The message of a fork carries a descriptor and no process id, and comes before the child is in
//! `/proc`. So candidates are tried: a present subpage of the candidate is write-protected *through the
//! descriptor*; if the candidate's pagemap then shows the protection, and no longer shows it after it was
//! lifted, they are one address space. Nothing of the child changes.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicU64, Ordering};

use holo_proto::{AddrRange, SUBPAGE_BYTES};

use super::scan;
use crate::sys::errors::UffdError;
use crate::sys::pagemap::{Pagemap, PresentRun};
use crate::sys::procfs::{self, Children};
use crate::sys::uffd::{EVENT_WORDS, Event, NOWHERE, Uffd};
use crate::sys::{spawn, table};

/// Messages read at once.
const MESSAGES: usize = 16;
/// Between two looks at what is under way, nanoseconds.
const PAUSE_NS: u64 = 1_000_000;

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

/// The process of a thread that waits for a page of its own memory, outside any system call: then the memory that
/// it waits for is its process's. (A system call may read another one's.) `thread` as a message names it, in its own
/// pid namespace: only of ours is it known which one that is.
pub(crate) fn waits_in_own_memory(thread: u32) -> Option<i32> {
    let thread = i32::try_from(thread).ok()?;
    let pid = procfs::process_of(thread).ok()?;
    let theirs = procfs::pid_namespace(&pid.to_string()).ok()?;
    let same = procfs::pid_namespace("self").ok()? == theirs;
    (same && procfs::waits_outside_calls(thread).ok()?).then_some(pid)
}

/// Whether the address space of a descriptor is gone.
pub(crate) fn is_gone(uffd: &Uffd) -> bool {
    // Of an address that no mapping of ours holds: ENOENT while the address space lives.
    matches!(uffd.unprotect(NOWHERE, false), Err(UffdError::Gone))
}

/// Whether the address space lives and no change of its mappings is under way, of which nobody has heard yet.
pub(crate) fn is_calm(uffd: &Uffd) -> bool {
    matches!(
        uffd.unprotect(NOWHERE, false),
        Ok(()) | Err(UffdError::EdgeOfMapping)
    )
}

/// Ends what `pid` has to do with a descriptor that serves it no longer, before that is closed. All its
/// pages are there.
///
/// Closing would do, but for a fork that is under way: it holds a copy of the descriptor that the process
/// keeps, and waits for its message to be read, for ever when nobody is left to read it. So messages are
/// read until no mapping is registered and nothing is under way that could send one.
pub(crate) fn let_go(uffd: &Uffd, pid: i32) {
    let slots = [const { AtomicU64::new(0) }; MESSAGES * EVENT_WORDS];
    loop {
        let Ok(survey) = scan::survey(pid, &[]) else {
            return; // it has ended
        };
        for &range in &survey.registered {
            // Where it changed meanwhile the next look knows.
            let _ = uffd.unregister(range);
        }
        let mut messages = 0;
        while let Ok(count @ 1..) = uffd.read_events(&slots) {
            messages += count;
            for slot in slots.chunks(EVENT_WORDS).take(count) {
                let words = std::array::from_fn(|i| slot[i].load(Ordering::Relaxed));
                if let Some(Event::Fork { fd }) = Event::decode(&words) {
                    // The child's pages are there as well; closed, it serves none.
                    table::close(fd);
                }
            }
        }
        // A mapping that moved while the mappings were read has sent a message, or is about to.
        match uffd.unprotect(NOWHERE, false) {
            Err(UffdError::Gone) => return,
            Err(UffdError::EventsPending) => {}
            _ if survey.registered.is_empty() && messages == 0 => return,
            _ => continue,
        }
        spawn::poll_readable(&[uffd.as_raw_fd()], Some(PAUSE_NS));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::testing::{Target, next_event};

    #[test]
    fn who_waits_for_a_page_of_its_own_is_told_by_its_thread() {
        let mut target = Target::start();
        let range = target.map(16);
        let uffd = target.uffd();
        uffd.register(range).unwrap();
        // It waits for what it is to do, in a system call.
        assert_eq!(waits_in_own_memory(target.pid.cast_unsigned()), None);
        target.begin_peek(range.start);
        let Event::Fault { thread, .. } = next_event(&uffd) else {
            panic!("no fault");
        };
        assert_eq!(waits_in_own_memory(thread), Some(target.pid));
        assert!(matches!(compare(&uffd, target.pid), Match::Unsure));
        uffd.zero(range, true).unwrap();
        target.finish();
        assert_eq!(waits_in_own_memory(u32::MAX), None);
        target.end();
        assert_eq!(waits_in_own_memory(thread), None);
    }
}
