//! What of a process's memory is registered: everything once when a predecessor's process is taken on, new mappings
//! after that.

use std::collections::BTreeSet;

use holo_proto::{Addr, AddrRange, LeftAlone, SpaceId};

use super::orphans::memory_is_gone;
use super::{Watch, timed};
use crate::core::Input;
use crate::shell::control::Scalar;
use crate::shell::scan;
use crate::sys::procfs::{self, Tasks};

impl Watch {
    /// Tells the serving thread about mappings of a process that it holds already. `away`: see
    /// [`Watch::adopt_recovered`].
    pub(super) fn introduce(&mut self, space: SpaceId, pid: i32, away: bool) {
        let never = self.members.get(&pid).map_or(&[][..], |m| &m.never[..]);
        match scan::survey(pid, never) {
            Ok(s) => {
                if away && s.registered.is_empty() && !self.has_left(space) {
                    self.input(Input::NothingRegistered(space));
                }
                for &range in &s.wiped {
                    self.input(Input::Wiped { space, range });
                    self.input(Input::Never { space, range });
                }
                for &range in &s.registered {
                    self.input(Input::Registered { space, range });
                }
                self.input(Input::Known(space));
            }
            Err(_) => self.input(Input::Exited(space)),
        }
    }

    /// The memory of a space is gone, or another process's: its process has started another program since it was looked at.
    fn has_left(&self, space: SpaceId) -> bool {
        let held = self.spaces.get(&space);
        held.is_none_or(|&(pid, uffd)| memory_is_gone(uffd) || self.runs_another(pid, uffd))
    }

    /// Registers mappings that were not there, or not seen, before; now and then surveys everything. Whether
    /// there were any.
    pub(super) fn find_mappings(&mut self, now: u64) -> bool {
        let mut found = BTreeSet::new();
        for (&pid, m) in &mut self.members {
            let Some(space) = m.space else { continue };
            heads_of(pid, &mut m.never);
            let read = scan::candidates(&mut self.text, &m.maps, &m.never, &mut self.ranges);
            if read.is_err() {
                continue;
            }
            let ranges: BTreeSet<_> = self.ranges.iter().map(|r| (r.start.0, r.end.0)).collect();
            found.extend(
                ranges
                    .difference(&m.seen)
                    .map(|&(start, end)| (space, start, end)),
            );
            m.seen = ranges;
            if !self.pace.survey_is_due(m.surveyed, now) {
                continue;
            }
            let ((), cost) = timed(|| {
                let Ok(survey) = scan::survey(pid, &m.never) else {
                    return;
                };
                m.left_bytes = survey.left_bytes;
                // Also what was seen before: a mapping that went and came back between two scans, or was
                // another for the moment in which it was to be registered.
                found.extend(
                    survey
                        .take
                        .iter()
                        .map(|&range| (space, range.start.0, range.end.0)),
                );
                m.left = survey.left;
            });
            m.surveyed = Some((now, cost));
        }
        let any = !found.is_empty();
        // First of all, before anything fills further.
        for (space, start, end) in found {
            let range = AddrRange::new(start, end);
            self.input(Input::Adopt { space, range });
        }
        self.count_left_alone();
        any
    }

    /// Notes what all processes together keep from being taken, where it is more than it ever was.
    fn count_left_alone(&self) {
        let most = |place, of: fn(&LeftAlone) -> u64| {
            let all = self.members.values().map(|m| of(&m.left)).sum();
            self.control.max(place, all);
        };
        most(Scalar::LeftStack, |left| left.stack);
        most(Scalar::LeftLocked, |left| left.locked);
        most(Scalar::LeftShared, |left| left.shared);
        most(Scalar::LeftFile, |left| left.file);
    }
}

/// Adds the robust-list heads of all threads.
fn heads_of(pid: i32, never: &mut Vec<Addr>) {
    let Ok(mut tasks) = Tasks::open(pid) else {
        return;
    };
    let _ = tasks.for_each(|tid| {
        if let Ok(Some(head)) = procfs::robust_list_of(tid) {
            if !never.contains(&head) {
                never.push(head);
            }
        }
    });
}
