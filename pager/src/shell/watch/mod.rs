//! The control thread of the pager: it watches the processes, decides when one is taken, finds what is
//! to be registered, identifies fork children, and talks to the guardian and the user.
//!
//! Nothing is taken before pressure: a process that fits in its budget is only looked at, the more
//! often the less room is left. Here is what it does in turn; each part of it is in a file of its own.

mod errands;
mod mappings;
mod matching;
mod measure;
mod members;
mod orphans;
mod pace;
mod requests;
mod rings;
mod starter;
mod taking;

pub(super) use rings::map_ring;
pub(super) use taking::parts;

use std::collections::BTreeMap;
use std::sync::Arc;

use holo_proto::{AddrRange, SpaceId};

use super::console::{self, Console, Request};
use super::control::{Control, Scalar};
use super::guardian::Line;
use super::limits::Limits;
use super::live::{Command, Errand, Queue};
use super::refusals::{Attempts, Told};
use crate::core::Input;
use crate::sys::{clock, spawn};
use measure::Pressure;
use members::Member;
use orphans::Orphan;
use pace::Pace;

/// The control thread's state.
pub(super) struct Watch {
    control: Control,
    commands: Arc<Queue<Command>>,
    errands: Arc<Queue<Errand>>,
    line: Line,
    console: Console,
    members: BTreeMap<i32, Member>,
    /// The process of each space, and the number of its userfaultfd.
    spaces: BTreeMap<SpaceId, (i32, i32)>,
    orphans: Vec<Orphan>,
    /// Spaces that were refused a ring, without which nothing of theirs is evicted.
    ringless: BTreeMap<SpaceId, Attempts>,
    /// How often in a row a process could not be stopped for what only a stop allows.
    unstopped: BTreeMap<SpaceId, u32>,
    told: Told,
    limits: Option<Limits>,
    /// What the serving thread was told last.
    told_budget: Option<u64>,
    text: Vec<u8>,
    ranges: Vec<AddrRange>,
    pace: Pace,
    pub(super) refusal: Option<String>,
}

impl Watch {
    pub(super) fn new(
        control: Control,
        commands: Arc<Queue<Command>>,
        errands: Arc<Queue<Errand>>,
        line: Line,
        console: Console,
    ) -> Self {
        Self {
            control,
            commands,
            errands,
            line,
            console,
            members: BTreeMap::new(),
            spaces: BTreeMap::new(),
            orphans: Vec::new(),
            ringless: BTreeMap::new(),
            unstopped: BTreeMap::new(),
            told: Told::default(),
            limits: None,
            told_budget: None,
            text: Vec::with_capacity(1 << 20),
            ranges: Vec::with_capacity(4096),
            pace: Pace::default(),
            refusal: None,
        }
    }

    /// Watches until there is nothing left to watch.
    pub(super) fn run(&mut self) {
        loop {
            let now = clock::monotonic_ns();
            self.control.note_cpu(Scalar::CpuOfPager);
            while let Some(errand) = self.errands.pop() {
                self.carry_out(errand);
            }
            self.find_root();
            self.look(now);
            self.note_root();
            self.wake_starter(now);
            self.line.look_after_guardian();
            if self.is_over() {
                return;
            }
            self.wait();
        }
    }

    /// Waits for whatever comes first: an errand, a request, the end of a process, the next look. Answers requests.
    fn wait(&mut self) {
        let own = [self.errands.bell.as_raw_fd(), self.console.as_raw_fd()];
        let ends = self.members.values().map(|m| m.pidfd.as_raw_fd());
        let fds: Vec<_> = own.into_iter().chain(ends).collect();
        let patience = if self.errands.is_empty() {
            self.interval_ns()
        } else {
            0
        };
        let ready = spawn::poll_readable(&fds, Some(patience));
        if ready & 1 != 0 {
            self.errands.bell.heard();
        }
        if ready & 2 != 0 {
            let requests: Vec<Request> = self.console.requests().collect();
            for r in requests {
                self.answer(r);
            }
        }
    }

    /// One look at everything.
    fn look(&mut self, now: u64) {
        self.bury();
        if self.pace.tree_is_due(now) && !self.members.is_empty() && !self.is_detaching() {
            let ((), cost) = timed(|| {
                self.find_children();
                self.find_ended();
            });
            self.pace.tree_took(now, cost);
        }
        let pressure = self.measure(now);
        let pressed = pressure != Pressure::None;
        if pressed {
            self.take();
            self.make_missing_rings();
        }
        if !self.orphans.is_empty() && self.pace.match_is_due(now) {
            let ((), cost) = timed(|| self.match_orphans());
            self.pace.match_took(now, cost);
        }
        let hasty = pressure == Pressure::Growing;
        if self.pace.search_is_due(now, hasty) {
            let (found, cost) = timed(|| pressed && self.find_mappings(now));
            self.pace.search_took(now, cost, found);
        }
    }

    fn is_over(&self) -> bool {
        if !self.has_started() {
            // It ended, perhaps without having been waited for: whoever started it may first read to the end of what we
            // hold open.
            return !self.starter_lives();
        }
        // Members that were never taken have nothing to give back.
        let left = |m: &Member| !self.is_detaching() || m.is_held();
        !self.members.values().any(left)
            && self.spaces.is_empty()
            && self.orphans.is_empty()
            && !self.starter_is_stopped()
    }

    fn interval_ns(&self) -> u64 {
        if !self.has_started() {
            pace::START_NS
        } else if !self.orphans.is_empty() {
            pace::MATCH_NS
        } else {
            self.pace.interval_ns(self.budget())
        }
    }

    fn tell(&self, mut command: Command) {
        // The serving thread empties the queue all the time; full means "in a moment".
        while let Err(back) = self.commands.push(command) {
            command = back;
            std::thread::yield_now();
        }
    }

    fn input(&self, input: Input) {
        self.tell(Command::Input(input));
    }

    /// Says something to the user.
    pub(super) fn message(&self, text: &str) {
        console::message(self.control, text);
    }

    /// Answers those who wait for the end.
    pub(super) fn finish(self, json: &str) {
        self.console.finish(self.control, json);
    }
}

/// What it comes to, and how long that took, nanoseconds.
fn timed<T>(what: impl FnOnce() -> T) -> (T, u64) {
    let started = clock::monotonic_ns();
    let value = what();
    (value, clock::monotonic_ns() - started)
}
