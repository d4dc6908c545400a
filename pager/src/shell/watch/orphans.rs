//! Spaces whose process is not known: a fork's child, of which there is only a descriptor at first; memory that
//! outlives its process in another one; what a predecessor left without a record. How their processes are found is
//! in [`super::matching`].

use holo_proto::SpaceId;

use super::Watch;
use crate::core::{Input, StopReason};
use crate::shell::control::Record;
use crate::shell::family;
use crate::shell::live::Command;
use crate::sys::advise::PidFd;
use crate::sys::table;
use crate::sys::uffd::Uffd;

/// A space whose process is not known.
pub(super) struct Orphan {
    pub(super) space: SpaceId,
    pub(super) uffd: i32,
    /// The number of the descriptor that a fork's child has of what its parent keeps; -1 without one.
    pub(super) kept: i32,
    /// It had a process, which ended or started another program, and whose memory lives on.
    pub(super) bereaved: bool,
    /// Nothing is left of the ring in that process. Before, a successor has to find things as they were.
    pub(super) ring_gone: bool,
    /// What the parent of a fork's child ran, and so the child; 0 where that is not known.
    pub(super) image: u64,
    /// A thread that waited for a page of it.
    pub(super) waiting: Option<u32>,
    /// A ring was asked for.
    pub(super) wants_ring: bool,
    /// It cannot go on, for this reason; said and done when its process is known.
    pub(super) stopped: Option<StopReason>,
}

impl Orphan {
    /// A fork's child.
    fn child(space: SpaceId, uffd: i32) -> Self {
        Self {
            space,
            uffd,
            kept: -1,
            bereaved: false,
            ring_gone: true,
            image: 0,
            waiting: None,
            wants_ring: false,
            stopped: None,
        }
    }
}

impl Watch {
    pub(super) fn orphan(&mut self, space: SpaceId) -> Option<&mut Orphan> {
        self.orphans.iter_mut().find(|o| o.space == space)
    }

    /// A space that a predecessor served: its parts by the record, or a search for its process.
    /// `away`: the map says that pages of it are, and nothing was on its way that could explain that they are not
    /// registered any more.
    pub(in crate::shell) fn adopt_recovered(&mut self, space: SpaceId, uffd: i32, away: bool) {
        let Some(r) = self.control.record(uffd) else {
            self.orphans.push(Orphan::child(space, uffd));
            return;
        };
        self.spaces.insert(space, (r.pid, uffd));
        let Some(pidfd) = PidFd::open(r.pid).ok().filter(|p| !p.has_exited()) else {
            self.bereaved(space);
            return;
        };
        drop(pidfd);
        self.add_member(r.pid);
        if let Some(m) = self.members.get_mut(&r.pid) {
            m.space = Some(space);
            m.spare_clear_tid(&r);
        }
        self.introduce(space, r.pid, away);
    }

    /// The process of a space has ended. Its address space may live on in another process (clone with
    /// `CLONE_VM` alone): then that one is looked for, and nothing is let go of.
    pub(super) fn bereaved(&mut self, space: SpaceId) {
        let uffd = self.spaces.get(&space).map_or(-1, |s| s.1);
        if memory_is_gone(uffd) {
            self.input(Input::Exited(space));
            return;
        }
        self.spaces.remove(&space);
        self.ringless.remove(&space);
        self.orphans.push(Orphan {
            bereaved: true,
            ring_gone: false,
            ..Orphan::child(space, uffd)
        });
        self.tell(Command::RingLost(space));
    }

    /// A fork's message has been read. A successor may read it again, of a child that it adopted.
    pub(super) fn child_of(&mut self, parent: SpaceId, space: SpaceId, uffd: i32) {
        // Now: when the child's process is found, the parent may have ended or been let go of.
        let kept = self.kept_in(parent);
        let image = self.image_of(parent);
        if let Some(&(_, uffd)) = self.spaces.get(&space) {
            if let Some(r) = self.control.record(uffd).filter(|r| r.inherited < 0) {
                let inherited = kept;
                self.control.put_record(&Record { inherited, ..r });
            }
        } else if let Some(o) = self.orphan(space) {
            (o.kept, o.image) = (kept, image);
        } else {
            self.orphans.push(Orphan {
                kept,
                image,
                ..Orphan::child(space, uffd)
            });
        }
        self.pace.match_at_once();
    }

    /// What the process of a space runs, as [`procfs::image`](crate::sys::procfs::image) tells; 0 where that is not known.
    fn image_of(&self, space: SpaceId) -> u64 {
        let served = self
            .spaces
            .get(&space)
            .and_then(|s| self.control.record(s.1));
        let orphan = || self.orphans.iter().find(|o| o.space == space);
        served.map_or_else(|| orphan().map_or(0, |o| o.image), |r| r.image)
    }

    /// The descriptor that a process keeps of its userfaultfd, which a fork's child has as well.
    fn kept_in(&self, space: SpaceId) -> i32 {
        let orphan = self.orphans.iter().find(|o| o.space == space);
        let uffd = self.spaces.get(&space).map(|s| s.1);
        let record = uffd
            .or(orphan.map(|o| o.uffd))
            .and_then(|uffd| self.control.record(uffd));
        match record {
            Some(r) => r.keeper.max(r.inherited),
            // A child itself, whose process is not found yet.
            None => orphan.map_or(-1, |o| o.kept),
        }
    }
}

/// Another descriptor for what a number names, of our own to close.
pub(super) fn duplicate(number: i32) -> Option<Uffd> {
    table::duplicate(number).map(Uffd::from_owned)
}

/// Whether the address space of the userfaultfd with this number is gone.
pub(super) fn memory_is_gone(number: i32) -> bool {
    duplicate(number).is_none_or(|uffd| family::is_gone(&uffd))
}
