//! Kills the pagers of a case with SIGKILL, each at a random moment of its life.

use std::time::Instant;

use super::Draw;
use super::family::Family;
use super::holo::pager_pids;
use super::process::Process;

/// Milliseconds between two kills: from less than a take-over needs to several rounds of eviction.
const PAUSE_MS: (u64, u64) = (100, 2000);

/// Kills pagers when it is asked to look.
#[derive(Clone, Debug)]
pub struct PagerKiller {
    draw: Draw,
    due: Instant,
    killed: Option<Process>,
    kills: u64,
}

impl PagerKiller {
    /// One whose moments come from this seed.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        let mut draw = Draw::new(seed);
        let due = Instant::now() + draw.pause_ms(PAUSE_MS.0, PAUSE_MS.1);
        Self {
            draw,
            due,
            killed: None,
            kills: 0,
        }
    }

    /// Kills a pager if it is time and there is one that it has not killed yet.
    pub fn look(&mut self, family: &mut Family) {
        if Instant::now() < self.due {
            return;
        }
        let fresh = pager_pids(family)
            .into_iter()
            .find(|pager| Some(*pager) != self.killed);
        if let Some(pager) = fresh {
            pager.signal(libc::SIGKILL);
            self.killed = Some(pager);
            self.kills += 1;
            self.due = Instant::now() + self.draw.pause_ms(PAUSE_MS.0, PAUSE_MS.1);
        }
    }

    /// How many it has killed.
    #[must_use]
    pub fn kills(&self) -> u64 {
        self.kills
    }
}
