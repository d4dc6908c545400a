//! The control thread of the pager: it watches the processes, decides when one is taken, finds what is
//! to be registered, identifies fork children, and talks to the guardian and the user.
//!
//! Nothing is taken before pressure: a process that fits in its budget is only looked at, the more
//! often the less room is left.

use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::{AsFd as _, AsRawFd as _};
use std::sync::Arc;

use holo_proto::{Addr, AddrRange, LeftAlone, SpaceId};

use super::console::{self, Console, Request, What};
use super::control::{Control, Record, Scalar};
use super::family::{self, Match};
use super::guardian::{Ask, Line};
use super::limits::Limits;
use super::live::{Command, Errand, Parts, Queue, Target};
use super::refusals::{Attempts, Refusal, Told};
use super::report;
use super::scan;
use crate::core::{Input, StopReason};
use crate::sys::advise::PidFd;
use crate::sys::maps::ProcMaps;
use crate::sys::mem::TargetMem;
use crate::sys::pagemap::Pagemap;
use crate::sys::procfs::{self, PinCount, Statm, Tasks};
use crate::sys::ring::{AdviceRing, RingParams};
use crate::sys::uffd::Uffd;
use crate::sys::{clock, spawn, table};

/// A program fills memory at most so fast, bytes a second: what it can add between two looks.
const FILL_BYTES_PER_S: u64 = 4 << 30;
/// Shortest and longest time between two looks, nanoseconds.
const LOOK_MIN_NS: u64 = 500_000;
const LOOK_MAX_NS: u64 = 100_000_000;
/// A search for new mappings or children costs at most this share of a CPU: one in so many.
const SEARCH_SHARE: u64 = 50;
/// The same while nothing grows or shrinks.
const SEARCH_SHARE_QUIET: u64 = 8 * SEARCH_SHARE;
/// After so many looks at which nothing had changed it is quiet.
const QUIET_LOOKS: u32 = 20;
/// The same while a tree that is short of memory grows: new mappings fill up unseen until they are found.
const SEARCH_SHARE_GROWING: u64 = 3;
/// Growth from one look to the next that counts as such.
const GROWTH_BYTES: u64 = 256 << 10;
/// Least time between two counts of what fork relatives share, nanoseconds.
const COUNT_NS: u64 = 20_000_000;
/// Least time between two attempts to find a fork's child, which may wait for it, nanoseconds.
const MATCH_NS: u64 = 1_000_000;
/// Least time between two full surveys (smaps walks all page tables), nanoseconds.
const SURVEY_NS: u64 = 1_000_000_000;
/// A process with less private memory than this is not worth taking.
const TAKE_MIN_BYTES: u64 = 1 << 20;

/// A process of the tree, taken or not.
struct Member {
    statm: Statm,
    pidfd: PidFd,
    space: Option<SpaceId>,
    taking: bool,
    /// Its memory is another member's as well, and is counted there.
    shares: bool,
    attempts: Attempts,
    anon_bytes: u64,
    left_bytes: u64,
    /// Never taken, by the last survey.
    left: LeftAlone,
    /// Shared with fork relatives, as last counted.
    shared_bytes: u64,
    next_count_ns: u64,
    /// Mappings as last seen, to find new ones.
    seen: BTreeSet<(u64, u64)>,
    maps: ProcMaps,
    never: Vec<Addr>,
    next_survey_ns: u64,
}

/// A space whose process is not known.
struct Orphan {
    space: SpaceId,
    uffd: i32,
    /// The number of the descriptor that a fork's child has of what its parent keeps; -1 without one.
    kept: i32,
    /// It had a process, which ended or started another program, and whose memory lives on.
    bereaved: bool,
    /// Nothing is left of the ring in that process. Before, a successor has to find things as they were.
    ring_gone: bool,
    /// A ring was asked for.
    wants_ring: bool,
    /// It cannot go on, for this reason; said and done when its process is known.
    stopped: Option<StopReason>,
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
            wants_ring: false,
            stopped: None,
        }
    }
}

/// The control thread's state.
pub(crate) struct Watch {
    control: Control,
    commands: Arc<Queue<Command>>,
    errands: Arc<Queue<Errand>>,
    line: Line,
    console: Console,
    members: BTreeMap<i32, Member>,
    spaces: BTreeMap<SpaceId, (i32, i32)>,
    orphans: Vec<Orphan>,
    /// Spaces that were refused a ring, without which nothing of theirs is evicted.
    ringless: BTreeMap<SpaceId, Attempts>,
    told: Told,
    limits: Option<Limits>,
    told_budget: Option<u64>,
    text: Vec<u8>,
    ranges: Vec<AddrRange>,
    next_search_ns: u64,
    next_hasty_ns: u64,
    /// This search looks after what the last one found.
    follows_up: bool,
    next_match_ns: u64,
    next_wide_ns: u64,
    next_tree_ns: u64,
    quiet_looks: u32,
    last_total: u64,
    pub(crate) refusal: Option<String>,
}

impl Watch {
    pub(crate) fn new(
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
            told: Told::default(),
            limits: None,
            told_budget: None,
            text: Vec::with_capacity(1 << 20),
            ranges: Vec::with_capacity(4096),
            next_search_ns: 0,
            next_hasty_ns: 0,
            follows_up: false,
            next_match_ns: 0,
            next_wide_ns: 0,
            next_tree_ns: 0,
            quiet_looks: 0,
            last_total: 0,
            refusal: None,
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

    /// A space that a predecessor served: its parts by the record, or a search for its process.
    /// `away`: the map says that pages of it are, and nothing was on its way that could explain that they are not
    /// registered any more.
    pub(crate) fn adopt_recovered(&mut self, space: SpaceId, uffd: i32, away: bool) {
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
            m.never
                .extend((r.clear_tid != 0).then_some(Addr(r.clear_tid)));
        }
        self.introduce(space, r.pid, away);
    }

    /// Tells the serving thread about mappings of a process that it holds already.
    fn introduce(&mut self, space: SpaceId, pid: i32, away: bool) {
        let never = self.members.get(&pid).map_or(&[][..], |m| &m.never[..]);
        match scan::survey(pid, never) {
            Ok(s) => {
                if away && s.registered.is_empty() && !self.has_left(space) {
                    let at = Addr(0).subpage();
                    self.stopped(space, StopReason::Contradiction { at });
                    return;
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

    /// The memory of a space is gone: its process has started another program since it was looked at.
    fn has_left(&self, space: SpaceId) -> bool {
        let uffd = self.spaces.get(&space).and_then(|&(_, n)| duplicate(n));
        uffd.is_none_or(|u| family::is_gone(&u))
    }

    /// Watches until there is nothing left to watch.
    pub(crate) fn run(&mut self) {
        loop {
            let now = clock::monotonic_ns();
            self.control
                .set(Scalar::CpuOfPager, clock::process_cpu_ns());
            while let Some(errand) = self.errands.pop() {
                self.carry_out(errand);
            }
            self.find_root();
            self.look(now);
            self.note_root();
            self.wake_starter();
            self.line.look_after_guardian();
            if self.is_over() {
                return;
            }
            // Whatever comes first: an errand, a request, the end of a process, the next look.
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
    }

    /// The command that the parent started, or the process that was named, once it is known.
    fn find_root(&mut self) {
        let root = self.control.pid(Scalar::RootPid);
        if root > 0 && self.control.get(Scalar::Started) == 0 {
            self.control.set(Scalar::Started, 1);
            self.add_member(root);
        }
    }

    /// Says when the first process has ended and everything of it is counted.
    fn note_root(&self) {
        let root = self.control.pid(Scalar::RootPid);
        let known = self.control.get(Scalar::Started) != 0;
        let held = self.spaces.values().any(|&(pid, _)| pid == root);
        if known && !held && !self.members.contains_key(&root) {
            self.control.set(Scalar::RootGone, 1);
        }
    }

    /// A command line that stopped with its command has nobody else who tells it that the command alone
    /// was continued, or killed.
    fn wake_starter(&self) {
        let stopped = |pid| procfs::state_of(pid).is_ok_and(|s| matches!(s, b'T' | b't'));
        let starter = self.control.pid(Scalar::StarterPid);
        if self.control.get(Scalar::StarterStopped) != 0
            && stopped(starter)
            && !stopped(self.control.pid(Scalar::RootPid))
        {
            let _ = spawn::signal(starter, libc::SIGCONT);
        }
    }

    /// It may still have to be woken.
    fn starter_is_stopped(&self) -> bool {
        let starter = self.control.pid(Scalar::StarterPid);
        self.control.get(Scalar::StarterStopped) != 0
            && procfs::state_of(starter).is_ok_and(|s| !matches!(s, b'Z' | b'X'))
    }

    /// Takes the process that the session was started for; a failure is the session's.
    pub(crate) fn attach_first(&mut self) {
        let pid = self.control.pid(Scalar::RootPid);
        self.find_root();
        if self
            .members
            .get(&pid)
            .is_some_and(|m| m.taking || m.space.is_some())
        {
            return; // by a predecessor
        }
        if let Err(refusal) = self.take_one(pid) {
            self.refusal = Some(refusal.why);
        }
    }

    /// Says something to the user.
    pub(crate) fn message(&self, text: &str) {
        console::message(self.control, text);
    }

    /// Answers those who wait for the end.
    pub(crate) fn finish(self, json: &str) {
        self.console.finish(self.control, json);
    }

    fn is_over(&self) -> bool {
        if self.control.get(Scalar::Started) == 0 {
            // It ended, perhaps without having been waited for: whoever started it may first read to the end of what we
            // hold open.
            let starter = self.control.pid(Scalar::StarterPid);
            return procfs::state_of(starter).map_or(true, |s| matches!(s, b'Z' | b'X'));
        }
        // Members that were never taken have nothing to give back.
        let left = |m: &Member| !self.is_detaching() || m.space.is_some() || m.taking;
        !self.members.values().any(left)
            && self.spaces.is_empty()
            && self.orphans.is_empty()
            && !self.starter_is_stopped()
    }

    fn interval_ns(&self) -> u64 {
        if self.control.get(Scalar::Started) == 0 {
            return 2_000_000;
        }
        let room = self.budget().saturating_sub(self.last_total);
        let fill = room.saturating_mul(1_000_000_000) / FILL_BYTES_PER_S / 2;
        if !self.orphans.is_empty() {
            return MATCH_NS;
        }
        // Nothing changed for a while: look less often.
        let idle = LOOK_MIN_NS << self.quiet_looks.min(7);
        fill.max(idle).clamp(LOOK_MIN_NS, LOOK_MAX_NS)
    }

    fn budget(&self) -> u64 {
        self.control.get(Scalar::Budget)
    }

    /// Above this the tree is taken: taking and registering takes milliseconds, while it fills on.
    fn take_above(&self) -> u64 {
        let b = self.budget();
        b - (b / 2).min(64 << 20)
    }

    fn add_member(&mut self, pid: i32) {
        if self.members.contains_key(&pid) || self.is_ours(pid) {
            return;
        }
        let opened = || -> std::io::Result<Member> {
            Ok(Member {
                statm: Statm::open(pid)?,
                pidfd: PidFd::open(pid)?,
                space: None,
                taking: false,
                shares: false,
                attempts: Attempts::default(),
                anon_bytes: 0,
                left_bytes: 0,
                left: LeftAlone::default(),
                shared_bytes: 0,
                next_count_ns: 0,
                seen: BTreeSet::new(),
                maps: ProcMaps::open(pid)?,
                never: Vec::new(),
                next_survey_ns: 0,
            })
        };
        if let Ok(m) = opened() {
            if self.limits.is_none() {
                self.limits = Limits::of(pid);
            }
            self.members.insert(pid, m);
        }
    }

    /// Whether this is one of holo's own processes, which may descend from the one that was attached: a pager that
    /// waits for its own pages waits for ever.
    fn is_ours(&self, pid: i32) -> bool {
        [
            Scalar::PagerPid,
            Scalar::GuardianPid,
            Scalar::WardenPid,
            Scalar::StarterPid,
        ]
        .iter()
        .any(|&s| self.control.pid(s) == pid)
    }

    fn is_detaching(&self) -> bool {
        self.control.get(Scalar::Detaching) != 0
    }

    /// One look at everything.
    fn look(&mut self, now: u64) {
        self.bury();
        if now >= self.next_tree_ns && !self.members.is_empty() && !self.is_detaching() {
            let started = clock::monotonic_ns();
            self.find_children();
            self.find_ended();
            let cost = clock::monotonic_ns() - started;
            self.next_tree_ns = now + (cost * self.share()).clamp(10_000_000, 1_000_000_000);
        }
        let mut total = 0;
        let mut measured = Vec::new();
        let relatives = self.members.len() as u64;
        for (&pid, m) in &mut self.members {
            if relatives < 2 {
                m.shared_bytes = 0;
            } else if now >= m.next_count_ns {
                let started = clock::monotonic_ns();
                m.shared_bytes = scan::shared_bytes(pid, relatives).unwrap_or(0);
                let cost = clock::monotonic_ns() - started;
                m.next_count_ns = now + (cost * SEARCH_SHARE).max(COUNT_NS);
            }
            // An exec leaves the old address space: what was opened of it reads empty.
            m.anon_bytes = m
                .statm
                .sample()
                .map_or(0, |s| s.resident_bytes.saturating_sub(s.shared_bytes));
            if m.shares {
                continue;
            }
            let pageable = m.anon_bytes.saturating_sub(m.left_bytes + m.shared_bytes);
            total += pageable;
            if let Some(space) = m.space {
                measured.push((space, pageable));
            }
        }
        let growing = total > self.last_total + GROWTH_BYTES;
        self.quiet_looks = if total == self.last_total {
            self.quiet_looks.saturating_add(1)
        } else {
            0
        };
        self.last_total = total;
        self.control.set(Scalar::Resident, total);
        // Now and then all the same: what the core counts itself may have gone astray.
        if self.quiet_looks < QUIET_LOOKS || self.quiet_looks.is_multiple_of(QUIET_LOOKS) {
            for (space, bytes) in measured {
                self.input(Input::Measured { space, bytes });
            }
        }
        self.respect_limits(total);
        let pressed = total > self.take_above() && !self.is_detaching();
        if pressed {
            self.take();
            self.make_missing_rings();
        }
        if !self.orphans.is_empty() && now >= self.next_match_ns {
            let started = clock::monotonic_ns();
            self.match_orphans();
            let cost = clock::monotonic_ns() - started;
            self.next_match_ns = now + cost.max(MATCH_NS);
        }
        if now >= self.next_search_ns || (pressed && growing && now >= self.next_hasty_ns) {
            let started = clock::monotonic_ns();
            let found = pressed && self.find_mappings(now);
            let cost = clock::monotonic_ns() - started;
            // A program that was just then taking its mappings apart puts together pieces that are
            // registered and pieces that are not, and cannot move the whole until all of them are.
            self.follows_up = found && !self.follows_up;
            let share = if self.follows_up {
                SEARCH_SHARE_GROWING
            } else {
                self.share()
            };
            self.next_hasty_ns = now + cost * SEARCH_SHARE_GROWING;
            self.next_search_ns = now + (cost * share).clamp(1_000_000, 1_000_000_000);
        }
    }

    /// Of a search that took so long, how many times that passes before the next one.
    fn share(&self) -> u64 {
        if self.quiet_looks < QUIET_LOOKS {
            SEARCH_SHARE
        } else {
            SEARCH_SHARE_QUIET
        }
    }

    fn respect_limits(&mut self, total: u64) {
        let mut bytes = self.budget();
        if let Some(room) = self.limits.as_ref().and_then(Limits::room_bytes) {
            let most = i64::try_from(total)
                .unwrap_or(i64::MAX)
                .saturating_add(room);
            bytes = bytes.min(u64::try_from(most).unwrap_or(0)).max(1 << 20);
        }
        if self.told_budget != Some(bytes) {
            self.told_budget = Some(bytes);
            self.input(Input::Budget { bytes });
        }
    }

    /// Forgets members that ended.
    fn bury(&mut self) {
        let dead: Vec<i32> = self
            .members
            .iter()
            .filter(|(_, m)| m.pidfd.has_exited())
            .map(|(&pid, _)| pid)
            .collect();
        for pid in dead {
            if let Some(m) = self.members.remove(&pid) {
                // Children that are not found yet would be lost with their parent.
                self.next_tree_ns = 0;
                if let Some(space) = m.space {
                    self.bereaved(space);
                }
            }
        }
    }

    /// The process of a space has ended. Its address space may live on in another process (clone with
    /// `CLONE_VM` alone): then that one is looked for, and nothing is let go of.
    fn bereaved(&mut self, space: SpaceId) {
        let uffd = self.spaces.get(&space).map_or(-1, |s| s.1);
        match duplicate(uffd) {
            Some(fd) if !family::is_gone(&fd) => {
                self.spaces.remove(&space);
                self.ringless.remove(&space);
                self.orphans.push(Orphan {
                    bereaved: true,
                    ring_gone: false,
                    ..Orphan::child(space, uffd)
                });
                self.tell(Command::RingLost(space));
            }
            _ => self.input(Input::Exited(space)),
        }
    }

    /// What was left of a ring whose process ended has been answered.
    fn ring_gone(&mut self, space: SpaceId, ring: Option<Box<AdviceRing>>) {
        if let Some(ring) = ring {
            let number = ring.as_fd().as_raw_fd();
            table::unclaim(number);
            drop(ring);
            let with_it = self.control.records().find(|r| r.ring == number);
            if let Some(r) = with_it {
                self.control.put_record(&Record { ring: -1, ..r });
            }
        }
        if let Some(o) = self.orphans.iter_mut().find(|o| o.space == space) {
            o.ring_gone = true;
            self.next_match_ns = 0;
        }
    }

    fn find_children(&mut self) {
        let mut roots: Vec<i32> = self.members.keys().copied().collect();
        // A member that ended left its children to whoever started it all.
        let parent = self.control.pid(Scalar::GuardianPid);
        roots.retain(|&p| p != parent);
        for pid in family::descendants(roots.into_iter()) {
            self.add_member(pid);
        }
        self.note_shared();
    }

    /// Finds members that run on another member's memory (`CLONE_VM`, vfork).
    fn note_shared(&mut self) {
        let held: Vec<i32> = self
            .members
            .iter()
            .filter(|(_, m)| m.space.is_some() || m.taking)
            .map(|(&pid, _)| pid)
            .collect();
        for (&pid, m) in &mut self.members {
            m.shares = m.space.is_none()
                && !m.taking
                && held.iter().any(|&h| procfs::share_memory(h, pid));
        }
    }

    /// Whether `pid` runs on the memory of a process that is held already.
    fn is_held_by_another(&self, pid: i32) -> bool {
        self.members.iter().any(|(&other, m)| {
            other != pid && (m.space.is_some() || m.taking) && procfs::share_memory(other, pid)
        })
    }

    /// Notices processes that started another program: their address space ended, or lives on in another
    /// process.
    fn find_ended(&mut self) {
        let mut bereaved = Vec::new();
        for (&space, &(pid, uffd)) in &self.spaces {
            if duplicate(uffd).is_none_or(|fd| family::is_gone(&fd)) {
                self.input(Input::Exited(space));
                continue;
            }
            let held = self.control.record(uffd).map_or(0, |r| r.image);
            let now = procfs::image(pid).unwrap_or(0);
            if held != 0 && now != 0 && held != now {
                bereaved.push((space, pid));
            }
        }
        // What was refused starts another program as well, which may be taken at once.
        for (&pid, m) in &mut self.members {
            if m.attempts.have_failed() {
                m.attempts.are_at(procfs::image(pid).unwrap_or(0));
            }
        }
        for (space, pid) in bereaved {
            if let Some(m) = self.members.get_mut(&pid) {
                m.space = None;
            }
            self.bereaved(space);
        }
    }

    fn take(&mut self) {
        let now = clock::monotonic_ns();
        let wanted: Vec<i32> = self
            .members
            .iter()
            .filter(|(_, m)| {
                m.space.is_none()
                    && !m.taking
                    && !m.shares
                    && m.attempts.is_due(now)
                    && m.anon_bytes >= TAKE_MIN_BYTES
            })
            .map(|(&pid, _)| pid)
            .collect();
        for pid in wanted {
            // A fork's child that is served already, but not identified, must not be taken again.
            if !self.orphans.is_empty() {
                self.match_orphans();
                if self.members.get(&pid).is_some_and(|m| m.space.is_some()) {
                    continue;
                }
            }
            if self.is_held_by_another(pid) {
                continue;
            }
            let started = clock::monotonic_ns();
            if let Err(refusal) = self.take_one(pid) {
                self.not_taken(pid, started, &refusal);
            }
        }
    }

    /// An attempt to take a process has failed: it is tried again later.
    fn not_taken(&mut self, pid: i32, started: u64, refusal: &Refusal) {
        let Some(m) = self.members.get_mut(&pid) else {
            return;
        };
        m.attempts.are_at(procfs::image(pid).unwrap_or(0));
        let now = clock::monotonic_ns();
        if m.attempts.fail(now, now - started, refusal.is_passing) {
            self.left_alone(&refusal.why);
        }
    }

    /// A process takes what memory it wants: counted, and told if it is the first one with this reason.
    fn left_alone(&mut self, why: &str) {
        self.control.add(Scalar::LeftProcesses, 1);
        if self.told.is_new(why) {
            let text = format!(
                "the memory of a process is not limited: {why} (tried again later; others with this cause are counted \
                 in the report)"
            );
            console::message(self.control, &text);
        }
    }

    /// What was refused a ring is tried again, for whatever refused it may be gone.
    fn make_missing_rings(&mut self) {
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

    /// Records of processes that were taken for a pager that died before it served them.
    fn held_for_nobody(&self) -> impl Iterator<Item = Record> + '_ {
        self.control.records().filter(|r| {
            let taking = self.members.get(&r.pid).is_some_and(|m| m.taking);
            !taking
                && self.spaces.values().all(|&(_, uffd)| uffd != r.uffd)
                && self.orphans.iter().all(|o| o.uffd != r.uffd)
        })
    }

    /// Goes on with what a predecessor died over: takes and detaches.
    pub(crate) fn finish_what_was_begun(&mut self) {
        let detaching = self.control.get(Scalar::Detaching) != 0;
        // Watched, but too small to be taken as yet: no record tells of it.
        if self.control.get(Scalar::Started) != 0
            && self.control.get(Scalar::RootGone) == 0
            && !detaching
        {
            self.add_member(self.control.pid(Scalar::RootPid));
        }
        let all: Vec<Record> = self.held_for_nobody().collect();
        for r in all {
            let same = procfs::image(r.pid).is_ok_and(|image| image == r.image);
            if same && !detaching {
                self.add_member(r.pid);
                // Given back where it fails; then it is taken again when there is pressure.
                let _ = self.take_one(r.pid);
            } else {
                self.give_back(&r, same);
            }
        }
        if detaching {
            self.detach_all();
        }
    }

    /// Undoes a hold of which no page is away. `same`: the process still has the memory.
    fn give_back(&mut self, r: &Record, same: bool) {
        if let Some(uffd) = table::claim(r.uffd).map(Uffd::from_owned) {
            if same {
                family::let_go(&uffd, r.pid);
                let (pid, keeper) = (r.pid, r.keeper);
                let _ = self.line.ask(Ask::DropKeeper { pid, keeper });
            }
            table::unclaim(r.uffd);
            drop(uffd);
        }
        self.control.drop_record(r.uffd);
        table::close(r.pidfd);
        if r.ring >= 0 {
            table::close(r.ring);
        }
    }

    fn detach_all(&mut self) {
        let spaces: Vec<_> = self.spaces.keys().copied().collect();
        for space in spaces {
            self.input(Input::Detach(space));
        }
        // Members that were never taken have nothing to give back.
        self.members.retain(|_, m| m.space.is_some() || m.taking);
    }

    fn take_one(&mut self, pid: i32) -> Result<(), Refusal> {
        let there = self.held_for_nobody().find(|r| r.pid == pid);
        let uffd = match there {
            Some(r) => r.uffd,
            None => i32::try_from(self.line.ask(Ask::TakeHold { pid })?).unwrap_or(-1),
        };
        let Some(r) = self.control.record(uffd) else {
            return Err(Refusal::passing(format!(
                "holo's guardian lost the record of process {pid}"
            )));
        };
        self.begin_to_serve(&r).inspect_err(|_| {
            // What was made in the process for it must not stay.
            let same = procfs::image(pid).is_ok_and(|image| image == r.image);
            self.give_back(&r, same);
        })
    }

    /// Hands a process that was taken to the serving thread.
    fn begin_to_serve(&mut self, r: &Record) -> Result<(), Refusal> {
        let pid = r.pid;
        let ended = || Refusal::passing(format!("process {pid} ended while it was taken"));
        let m = self.members.get_mut(&pid).ok_or_else(ended)?;
        // An exec since the member was found: what was opened then belongs to the old address space.
        m.statm = Statm::open(pid).map_err(|_| ended())?;
        m.maps = ProcMaps::open(pid).map_err(|_| ended())?;
        let target = Box::new(self.target(r).ok_or_else(ended)?);
        let m = self.members.get_mut(&pid).ok_or_else(ended)?;
        m.taking = true;
        m.never
            .extend((r.clear_tid != 0).then_some(Addr(r.clear_tid)));
        m.seen.clear();
        self.control.add(Scalar::Processes, 1);
        self.tell(Command::Add { pid, target });
        Ok(())
    }

    fn target(&self, r: &Record) -> Option<Target> {
        let uffd = Uffd::from_owned(table::claim(r.uffd)?);
        Some(Target::new(uffd, parts(r.pid), None))
    }

    fn carry_out(&mut self, errand: Errand) {
        match errand {
            Errand::Added { space, pid } => {
                let uffd = self
                    .control
                    .records()
                    .find(|r| r.pid == pid)
                    .map_or(-1, |r| r.uffd);
                self.spaces.insert(space, (pid, uffd));
                if !self.members.contains_key(&pid) {
                    // It ended meanwhile.
                    self.bereaved(space);
                } else if let Some(m) = self.members.get_mut(&pid) {
                    m.space = Some(space);
                    m.taking = false;
                    let never = m.never.clone();
                    for at in never {
                        let range = AddrRange {
                            start: Addr(at.0 & !0xffff),
                            end: Addr((at.0 & !0xffff) + 0x10000),
                        };
                        self.input(Input::Never { space, range });
                    }
                }
                if self.control.get(Scalar::Detaching) == 0 {
                    self.find_mappings(clock::monotonic_ns());
                } else {
                    // Asked for between the stop and now, when no space was there to be told.
                    self.input(Input::Detach(space));
                }
            }
            Errand::Refused { pid, target } => {
                if let Some(m) = self.members.get_mut(&pid) {
                    m.taking = false;
                }
                let now = clock::monotonic_ns();
                self.not_taken(pid, now, &Refusal::too_many(pid));
                let number = target.uffd.as_raw_fd();
                table::unclaim(number);
                if let Some(r) = self.control.record(number) {
                    // Nothing of it is registered yet.
                    let keeper = r.keeper;
                    let _ = self.line.ask(Ask::DropKeeper { pid, keeper });
                    table::close(r.pidfd);
                }
                self.control.drop_record(number);
            }
            Errand::NeedRing(space) => self.make_ring(space),
            Errand::NeedQuiesce { space, count } => {
                // Not now: a count of zero changes nothing but lets the core ask again.
                let count = if self.quiesce(space) { count } else { 0 };
                self.input(Input::Quiesced { space, count });
            }
            Errand::Child {
                parent,
                space,
                uffd,
            } => self.child_of(parent, space, uffd),
            Errand::PartsLost(space) => {
                let pid = self.spaces.get(&space).map(|s| s.0);
                if let Some(parts) = pid.and_then(parts) {
                    self.tell(Command::Parts { space, parts });
                }
            }
            Errand::RingGone { space, ring } => self.ring_gone(space, ring),
            Errand::Stop { space, why } => self.stopped(space, why),
            Errand::Closed {
                space,
                detached,
                target,
            } => self.closed(space, detached, target),
            Errand::Drop(parts) => drop(parts),
        }
    }

    /// A fork's message has been read. A successor may read it again, of a child that it adopted.
    fn child_of(&mut self, parent: SpaceId, space: SpaceId, uffd: i32) {
        // Now: when the child's process is found, the parent may have ended or been let go of.
        let kept = self.kept_in(parent);
        if let Some(&(_, uffd)) = self.spaces.get(&space) {
            if let Some(r) = self.control.record(uffd).filter(|r| r.inherited < 0) {
                let inherited = kept;
                self.control.put_record(&Record { inherited, ..r });
            }
        } else if let Some(o) = self.orphans.iter_mut().find(|o| o.space == space) {
            o.kept = kept;
        } else {
            self.orphans.push(Orphan {
                kept,
                ..Orphan::child(space, uffd)
            });
        }
        self.next_match_ns = 0;
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

    /// Stops every thread that runs on the memory of a space for an instant.
    fn quiesce(&mut self, space: SpaceId) -> bool {
        let Some(&(pid, _)) = self.spaces.get(&space) else {
            return false;
        };
        self.find_children();
        let mut all: Vec<i32> = self.members.keys().copied().collect();
        all.retain(|&other| other == pid || procfs::share_memory(pid, other));
        all.into_iter()
            .all(|pid| self.line.ask(Ask::Quiesce { pid }).is_ok())
    }

    fn make_ring(&mut self, space: SpaceId) {
        let Some(&(pid, uffd)) = self.spaces.get(&space) else {
            if let Some(o) = self.orphans.iter_mut().find(|o| o.space == space) {
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

    fn stopped(&mut self, space: SpaceId, why: StopReason) {
        let Some(&(pid, _)) = self.spaces.get(&space) else {
            if let Some(o) = self.orphans.iter_mut().find(|o| o.space == space) {
                o.stopped = Some(why);
            }
            return;
        };
        if let Some(m) = self.members.get(&pid) {
            let _ = m.pidfd.send_signal(libc::SIGKILL);
        }
        console::message(
            self.control,
            &format!("process {pid}: {}", report::explain(why)),
        );
    }

    fn closed(&mut self, space: SpaceId, detached: bool, target: Box<Target>) {
        let uffd = target.uffd.as_raw_fd();
        // Its members, if it had more than one, are watched again.
        self.orphans.retain(|o| o.space != space);
        self.ringless.remove(&space);
        let record = self.control.record(uffd);
        if let Some((pid, _)) = self.spaces.remove(&space) {
            if detached {
                family::let_go(&target.uffd, pid);
                let keeper = record.map_or(-1, |r| r.keeper.max(r.inherited));
                if keeper >= 0 {
                    let _ = self.line.ask(Ask::DropKeeper { pid, keeper });
                }
                self.members.remove(&pid);
            } else if let Some(m) = self.members.get_mut(&pid) {
                // It may have started another program: that one is watched again.
                m.space = None;
            }
        }
        self.control.drop_record(uffd);
        if let Some(r) = record {
            table::close(r.pidfd);
        }
        let ring = record.map_or(-1, |r| r.ring);
        table::unclaim(uffd);
        if ring >= 0 {
            table::unclaim(ring);
        }
        drop(target);
    }

    /// Finds the processes of fork children, and those in which the memory of an ended process lives on.
    fn match_orphans(&mut self) {
        if self.orphans.is_empty() {
            return;
        }
        self.find_children();
        let mut left = Vec::new();
        let only = self.orphans.len() == 1;
        for o in std::mem::take(&mut self.orphans) {
            let Some(uffd) = duplicate(o.uffd) else {
                // No room in the table; or it is closed.
                if table::is_open(o.uffd) {
                    left.push(o);
                }
                continue;
            };
            if family::is_gone(&uffd) {
                self.input(Input::Exited(o.space));
                continue;
            }
            if !o.ring_gone {
                left.push(o);
                continue;
            }
            let found = self
                .find_match(&uffd, only)
                .or_else(|| self.find_elsewhere(&uffd, &o));
            let served = match found {
                Some(pid) if o.bereaved => self.lives_on(&o, pid),
                Some(pid) => self.known(&o, pid),
                None => false,
            };
            if !served {
                left.push(o);
            }
        }
        self.orphans = left;
    }

    /// Searches among the members. `only`: no other space looks for its process.
    fn find_match(&self, uffd: &Uffd, only: bool) -> Option<i32> {
        let mut unsure = Vec::new();
        for (&pid, m) in &self.members {
            if m.space.is_some() || m.taking {
                continue;
            }
            match family::compare(uffd, pid) {
                Match::Same => return Some(pid),
                Match::Unsure => unsure.push(pid),
                Match::Other | Match::Gone => {}
            }
        }
        // Nothing present to try on: the only one that it can be, it is.
        match unsure.as_slice() {
            [pid] if only => Some(*pid),
            _ => None,
        }
    }

    /// Searches among all processes: whoever starts one may end at once, which leaves it to init.
    fn find_elsewhere(&mut self, uffd: &Uffd, o: &Orphan) -> Option<i32> {
        let started = clock::monotonic_ns();
        if started < self.next_wide_ns {
            return None;
        }
        // An ended process's memory has its image; a fork's child has that of a process that was held.
        let images: BTreeSet<u64> = self
            .control
            .records()
            .filter(|r| !o.bereaved || r.uffd == o.uffd)
            .map(|r| r.image)
            .collect();
        let everyone = procfs::everyone().unwrap_or_default();
        let found = everyone.into_iter().find(|&pid| {
            !self.members.contains_key(&pid)
                && procfs::image(pid).is_ok_and(|i| images.contains(&i))
                && matches!(family::compare(uffd, pid), Match::Same)
        });
        if let Some(pid) = found {
            self.add_member(pid);
        }
        let now = clock::monotonic_ns();
        self.next_wide_ns = now + (now - started) * SEARCH_SHARE;
        found
    }

    /// A space whose process ended is served on in the process that shares its memory.
    /// False if that one has ended meanwhile.
    fn lives_on(&mut self, o: &Orphan, pid: i32) -> bool {
        let (Some(p), Ok(pidfd)) = (parts(pid), PidFd::open(pid)) else {
            return false;
        };
        let Some(old) = self.control.record(o.uffd) else {
            return self.known(o, pid);
        };
        self.control.put_record(&Record {
            pid,
            pidfd: table::leave(pidfd.into_owned()),
            ring: -1,
            ..old
        });
        table::close(old.pidfd);
        self.spaces.insert(o.space, (pid, o.uffd));
        if let Some(m) = self.members.get_mut(&pid) {
            m.space = Some(o.space);
            m.shares = false;
        }
        self.tell(Command::Parts {
            space: o.space,
            parts: p,
        });
        self.settle(o, pid);
        true
    }

    /// The process of a space is known: what was asked for before that is done now.
    fn settle(&mut self, o: &Orphan, pid: i32) {
        self.introduce(o.space, pid, false);
        if o.wants_ring {
            self.make_ring(o.space);
        }
        if let Some(why) = o.stopped {
            self.stopped(o.space, why);
        }
        if self.is_detaching() {
            self.input(Input::Detach(o.space));
        }
    }

    /// A fork's child is known; false if it has ended meanwhile.
    fn known(&mut self, o: &Orphan, pid: i32) -> bool {
        let (Some(p), Ok(pidfd)) = (parts(pid), PidFd::open(pid)) else {
            return false;
        };
        let record = Record {
            uffd: o.uffd,
            pid,
            pidfd: table::leave(pidfd.into_owned()),
            keeper: -1,
            // What the parent keeps is open in a child as well.
            inherited: o.kept,
            ring: -1,
            params: [0; 15],
            clear_tid: 0,
            image: procfs::image(pid).unwrap_or(0),
        };
        self.control.put_record(&record);
        self.control.add(Scalar::Processes, 1);
        self.spaces.insert(o.space, (pid, o.uffd));
        if let Some(m) = self.members.get_mut(&pid) {
            m.space = Some(o.space);
        }
        self.tell(Command::Parts {
            space: o.space,
            parts: p,
        });
        self.settle(o, pid);
        true
    }

    /// Registers mappings that were not there, or not seen, before; now and then surveys everything. Whether
    /// there were any.
    fn find_mappings(&mut self, now: u64) -> bool {
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
            if now >= m.next_survey_ns {
                let started = clock::monotonic_ns();
                if let Ok(survey) = scan::survey(pid, &m.never) {
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
                }
                let cost = clock::monotonic_ns() - started;
                m.next_survey_ns = now + (cost * SEARCH_SHARE).max(SURVEY_NS);
            }
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

    fn answer(&mut self, request: Request) {
        let Request { what, pid, reply } = request;
        let root = self.control.pid(Scalar::RootPid);
        let names_all = pid == root || self.is_ours(pid);
        if !names_all && !self.members.contains_key(&pid) {
            reply.refuse(&format!("process {pid} is not held by holo"));
            return;
        }
        match what {
            What::Detach if !names_all => reply.refuse(&format!(
                "process {pid} is held together with process {root}: `holo detach {root}` lets go of both"
            )),
            What::Detach => {
                self.control.set(Scalar::Detaching, 1);
                self.detach_all();
                self.console.reply_at_end(reply);
            }
            What::Status => {
                self.control.note_cpu(Scalar::CpuOfPager);
                let report = report::build(self.control, None, 0);
                reply.send(&serde_json::to_string(&report).unwrap_or_default());
            }
        }
    }
}

pub(crate) fn parts(pid: i32) -> Option<Parts> {
    Some(Parts {
        pidfd: PidFd::open(pid).ok()?,
        mem: TargetMem::open(pid).ok()?,
        pagemap: Pagemap::open(pid).ok()?,
        maps: ProcMaps::open(pid).ok()?,
        tasks: Tasks::open(pid).ok()?,
        pins: PinCount::open(pid).ok()?,
    })
}

pub(crate) fn map_ring(r: &Record) -> Option<AdviceRing> {
    let fd = table::claim(r.ring)?;
    let ring = AdviceRing::map(fd, &RingParams(r.params)).ok()?;
    // Without the limit the target would only have more idle workers.
    let _ = ring.limit_workers();
    // A predecessor may have died after it queued a request and before it woke the ring for it: nobody
    // else would, and its end is waited for. Without a polling thread there is nothing to wake.
    let _ = ring.wake_if_needed();
    Some(ring)
}

/// Another descriptor for what a number names, of our own to close.
fn duplicate(number: i32) -> Option<Uffd> {
    table::duplicate(number).map(Uffd::from_owned)
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

#[cfg(test)]
mod tests {
    use super::super::guardian::tests::{control, heard, line_of};
    use super::*;
    use crate::sys::testing;

    #[test]
    fn nothing_is_left_of_a_process_that_ends_while_it_is_taken() {
        let control = control();
        let (line, guardian) = line_of(control);
        let (commands, errands) = (Queue::new().unwrap(), Queue::new().unwrap());
        let mut target = testing::Target::start();
        let pid = target.pid;
        let console = Console::open(pid).unwrap();
        let mut watch = Watch::new(
            control,
            Arc::new(commands),
            Arc::new(errands),
            line,
            console,
        );
        watch.add_member(pid);
        // The guardian takes it, and it ends.
        let guardian = std::thread::spawn(move || {
            let (count, ask) = heard(&guardian);
            assert_eq!(ask, format!("hold {pid} 0"));
            let uffd = target.uffd().into_raw_fd();
            let image = procfs::image(pid).unwrap();
            control.put_record(&Record {
                uffd,
                pid,
                pidfd: -1,
                keeper: 9,
                inherited: -1,
                ring: -1,
                params: [0; 15],
                clear_tid: 0,
                image,
            });
            target.end();
            guardian
                .send(format!("{count} ok {uffd}").as_bytes())
                .unwrap();
        });
        let refusal = watch.take_one(pid).unwrap_err();
        guardian.join().unwrap();
        assert!(
            refusal.is_passing && refusal.why.contains("ended"),
            "{refusal:?}"
        );
        assert_eq!(control.records().count(), 0);
        assert!(!watch.members[&pid].taking);
    }
}
