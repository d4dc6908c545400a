//! Making memory resident again: for a detach, and for ranges that turn out to be never pageable.
//!
//! Where the target has a ring, `MADV_POPULATE_WRITE` does it: a missing page faults to us and is
//! served, a clean one that was offered before becomes dirty, so that the kernel can no longer drop it.
//! Only then may the map forget it. Without a ring, or where populate fails (a read-only mapping), pages
//! are installed from here, and what is present already is made dirty through `/proc/PID/mem`.

use std::collections::VecDeque;

use holo_proto::{AddrRange, PageIndex, SUBPAGE_BYTES, SpaceId, SubpageIndex};

use super::fault::Fault;
use super::space::{Life, Ring};
use super::{Advice, Core, CrashPoint, Entry, Op, Outcome};
use crate::store::api::PageStore;

/// Marks a ring request as the restorer's; the rest of the tag is the page.
pub(super) const TAG: u64 = 1 << 63;
/// Requests at once.
const WINDOW: usize = 8;

/// What the restorer of one space is at.
#[derive(Debug, Default)]
pub(crate) struct Restore {
    queue: VecDeque<AddrRange>,
    cursor: Option<SubpageIndex>,
    inflight: usize,
    queued: usize,
    asked: Option<PageIndex>,
    /// The ring had no room: nothing more before a request ends.
    full: bool,
    /// A page that populate could not do.
    direct: Option<PageIndex>,
    installing: bool,
    redirty: Option<SubpageIndex>,
    unregistering: Option<AddrRange>,
}

impl Restore {
    /// Nothing is to be restored.
    pub(crate) fn is_idle(&self) -> bool {
        self.queue.is_empty() && self.inflight == 0 && self.direct.is_none()
    }

    /// Whether `page` is in a range that is being restored.
    pub(crate) fn covers(&self, page: PageIndex) -> bool {
        self.queue.iter().any(|r| r.overlaps(page.range()))
    }

    pub(crate) fn push(&mut self, range: AddrRange) {
        self.queue.push_back(range);
    }
}

impl<S: PageStore> Core<'_, S> {
    pub(super) fn never(&mut self, id: SpaceId, range: AddrRange) {
        if let Some(s) = self.space(id) {
            if s.never
                .around(range.start)
                .is_some_and(|r| r.end >= range.end)
            {
                return;
            }
            s.never.add(range);
            s.restore.push(range);
        }
    }

    pub(super) fn begin_detach(&mut self, id: SpaceId) {
        if let Some(s) = self.space(id) {
            if s.life == Life::Over {
                return;
            }
            s.life = Life::Detaching;
            s.adopt.clear();
            s.restore.push(AddrRange::new(0, 1 << 48));
        }
    }

    /// The next step of making memory resident; at the end of a detach, of letting go.
    pub(super) fn step_restore(&mut self, id: SpaceId) -> Option<Op> {
        let s = self.space_ref(id)?;
        if s.batch.is_some() || !s.known {
            return None;
        }
        if s.restore.is_idle() {
            return self.step_let_go(id);
        }
        if let Some(page) = s.restore.direct {
            return self.step_direct(id, page);
        }
        let range = match s.restore.queue.front() {
            Some(r) if s.restore.inflight < WINDOW && !s.restore.full => *r,
            _ => return self.kick_restore(id),
        };
        let from = s.restore.cursor.unwrap_or(range.start.subpage());
        let end = SubpageIndex(range.end.0.div_ceil(SUBPAGE_BYTES));
        let mut at = from;
        let first = loop {
            match self.map.next_in(id, at, end) {
                Some((found, e)) if e.has_bytes() => break Some(found),
                Some((found, _)) => at = SubpageIndex(found.0 + 1),
                None => break None,
            }
        };
        let Some(first) = first else {
            if self.space_ref(id)?.restore.inflight > 0 {
                return self.kick_restore(id);
            }
            let s = self.space(id)?;
            s.restore.queue.pop_front();
            s.restore.cursor = None;
            return self.step_restore(id);
        };
        let page = first.page();
        match self.space_ref(id)?.ring {
            Ring::Absent => {
                self.space(id)?.ring = Ring::Asked;
                Some(Op::NeedRing { space: id })
            }
            Ring::Asked => None,
            Ring::Refused => {
                self.space(id)?.restore.direct = Some(page);
                self.step_restore(id)
            }
            Ring::Ready => {
                let last = (0..16)
                    .map(|i| page.subpage(i))
                    .rfind(|&x| x >= first && x < end && self.map.entry(id, x).has_bytes())
                    .unwrap_or(first);
                let s = self.space(id)?;
                s.restore.asked = Some(page);
                s.restore.cursor = Some(page.subpage(15).max(first)).map(|x| SubpageIndex(x.0 + 1));
                Some(Op::Advise {
                    space: id,
                    advice: Advice::Populate,
                    range: AddrRange {
                        start: first.start(),
                        end: last.start().offset(SUBPAGE_BYTES),
                    },
                    tag: TAG | page.0,
                })
            }
        }
    }

    fn kick_restore(&mut self, id: SpaceId) -> Option<Op> {
        let s = self.space(id)?;
        if s.restore.queued == 0 {
            return None;
        }
        s.restore.queued = 0;
        Some(Op::Kick { space: id })
    }

    /// Without a ring: install what is missing, make dirty what is there.
    fn step_direct(&mut self, id: SpaceId, page: PageIndex) -> Option<Op> {
        let left = (0..16)
            .map(|i| page.subpage(i))
            .find(|&x| self.map.entry(id, x).has_bytes());
        let Some(at) = left else {
            let s = self.space(id)?;
            s.restore.direct = None;
            s.restore.installing = false;
            return self.step_restore(id);
        };
        let busy = self.install.is_some();
        let now = self.now;
        let s = self.space(id)?;
        if !s.restore.installing {
            if busy {
                return None;
            }
            s.restore.installing = true;
            self.ready.push_back(Fault {
                space: id,
                at,
                write: false,
                protect: false,
                since: now,
                own: true,
                alone: false,
            });
            return None;
        }
        let still_wanted = |f: &Fault| f.own && f.space == id;
        if self
            .install
            .as_ref()
            .is_some_and(|i| still_wanted(&i.fault))
            || self.held.iter().any(still_wanted)
            || self.ready.iter().any(still_wanted)
        {
            return None;
        }
        self.space(id)?.restore.redirty = Some(at);
        Some(Op::Redirty { space: id, at })
    }

    pub(super) fn restore_step_done(&mut self, id: SpaceId, outcome: Outcome) {
        if outcome == Outcome::Gone {
            return self.gone(id);
        }
        let Some(s) = self.space(id) else { return };
        if let Some(range) = s.restore.unregistering.take() {
            // Refused or at an edge: the process changed the mapping; closing the descriptor ends it.
            s.regions.remove(range);
            self.crash(CrashPoint::Unregistered);
        } else if let Some(at) = s.restore.redirty.take() {
            self.set_entry(id, at, Entry::Nothing);
            self.crash(CrashPoint::Restored);
        } else if let Some(page) = s.restore.asked.take() {
            match outcome {
                Outcome::Done => {
                    s.restore.inflight += 1;
                    s.restore.queued += 1;
                }
                _ if s.restore.inflight > 0 => {
                    s.restore.full = true;
                    s.restore.cursor = Some(page.subpage(0));
                }
                _ => s.restore.direct = Some(page),
            }
        }
    }

    /// A populate request ended.
    pub(super) fn restored(&mut self, id: SpaceId, page: PageIndex, result: i32) {
        let Some(s) = self.space(id) else { return };
        s.restore.inflight = s.restore.inflight.saturating_sub(1);
        s.restore.full = false;
        if result < 0 {
            s.restore.direct = Some(page);
            // One at a time: whatever else failed is found again from the start of the range.
            s.restore.cursor = None;
            return;
        }
        let range = s.restore.queue.front().copied().unwrap_or_default();
        for at in page.range().intersect(range).subpages() {
            if self.map.entry(id, at).has_bytes() {
                self.set_entry(id, at, Entry::Nothing);
            }
        }
        self.crash(CrashPoint::Restored);
    }

    fn step_let_go(&mut self, id: SpaceId) -> Option<Op> {
        let s = self.space(id)?;
        if s.life != Life::Detaching {
            return None;
        }
        if let Some(range) = s.regions.pop() {
            s.restore.unregistering = Some(range);
            return Some(Op::Unregister { space: id, range });
        }
        self.end_space(id, true);
        None
    }
}
