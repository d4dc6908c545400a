//! The rings through which memory is dropped inside a process: made there when one is needed, tried again after a
//! refusal, closed when the process has ended.

use std::os::fd::{AsFd as _, AsRawFd as _};

use holo_proto::SpaceId;

use super::Watch;
use crate::core::Input;
use crate::shell::control::Record;
use crate::shell::guardian::Ask;
use crate::shell::live::Command;
use crate::shell::refusals::Refusal;
use crate::sys::ring::{AdviceRing, RingParams};
use crate::sys::{clock, table};

impl Watch {
    pub(super) fn make_ring(&mut self, space: SpaceId) {
        let Some(&(pid, uffd)) = self.spaces.get(&space) else {
            if let Some(o) = self.orphan(space) {
                // When its process is known.
                o.wants_ring = true;
                return;
            }
            self.input(Input::RingRefused(space));
            return;
        };
        let started = clock::monotonic_ns();
        match self.ring_of(pid, uffd) {
            Ok(ring) => {
                self.ringless.remove(&space);
                let ring = Box::new(ring);
                self.tell(Command::Ring { space, ring });
            }
            Err(refusal) => {
                let now = clock::monotonic_ns();
                let attempts = self.ringless.entry(space).or_default();
                if attempts.fail(now, now - started, refusal.is_passing) {
                    self.left_alone(&refusal.why);
                }
                self.input(Input::RingRefused(space));
            }
        }
    }

    /// What was refused a ring is tried again, for whatever refused it may be gone.
    pub(super) fn make_missing_rings(&mut self) {
        let now = clock::monotonic_ns();
        let due: Vec<SpaceId> = self
            .ringless
            .iter()
            .filter(|(_, attempts)| attempts.is_due(now))
            .map(|(&space, _)| space)
            .collect();
        for space in due {
            self.make_ring(space);
        }
    }

    /// The ring in the process of a userfaultfd, made if there is none.
    fn ring_of(&mut self, pid: i32, uffd: i32) -> Result<AdviceRing, Refusal> {
        let known = self.control.record(uffd).is_some_and(|r| r.ring >= 0);
        if !known {
            self.line.ask(Ask::MakeRing { pid, uffd })?;
        }
        let record = self.control.record(uffd);
        record.and_then(|r| map_ring(&r)).ok_or_else(|| {
            Refusal::passing(format!("the ring in process {pid} cannot be used by holo"))
        })
    }

    /// What was left of a ring whose process ended has been answered.
    pub(super) fn ring_gone(&mut self, space: SpaceId, ring: Option<Box<AdviceRing>>) {
        if let Some(ring) = ring {
            let number = ring.as_fd().as_raw_fd();
            table::unclaim(number);
            drop(ring);
            let with_it = self.control.records().find(|r| r.ring == number);
            if let Some(r) = with_it {
                self.control.put_record(&Record { ring: -1, ..r });
            }
        }
        if let Some(o) = self.orphan(space) {
            o.ring_gone = true;
            self.pace.match_at_once();
        }
    }
}

pub(in crate::shell) fn map_ring(r: &Record) -> Option<AdviceRing> {
    let fd = table::claim(r.ring)?;
    let ring = AdviceRing::map(fd, &RingParams(r.params)).ok()?;
    // Without the limit the target would only have more idle workers.
    let _ = ring.limit_workers();
    // A predecessor may have died after it queued a request and before it woke the ring for it: nobody
    // else would, and its end is waited for. Without a polling thread there is nothing to wake.
    let _ = ring.wake_if_needed();
    Some(ring)
}
