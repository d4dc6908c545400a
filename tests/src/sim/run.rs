//! One seed: a machine, its programs and a pager, from the first touch to the last comparison.

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicU64, Ordering};

use holo_pager::core::{
    BLOCK_WORDS, Config, Core, Input, JOURNAL_WORDS, MapError, Memory, NOTE_WORDS, Nanos,
};
use holo_pager::drive;
use holo_pager::store::api::{PageBytes, PageStore};
use holo_proto::{PAGE_BYTES, SUBPAGE_BYTES};

use super::kernel::{HANG_NS, Kernel, trace};
use super::knobs::{Knobs, MAP_BLOCKS};
use super::oracle::ZERO;
use super::rng::Rng;
use super::store::Store;
use super::thread::Task;
use super::world::{DEATHS_MOST, Death, Sim, at_point, die_after_points};

/// Operations after which a run has failed.
const OPS_MOST: u64 = 200_000;

/// What one run did.
#[derive(Clone, Debug, Default)]
pub struct Report {
    /// Why it failed, if it did.
    pub failure: Option<String>,
    /// Steps of the simulated kernel.
    pub steps: u64,
    /// Operations of the core.
    pub ops: u64,
    /// Contents compared with the oracle.
    pub checks: u64,
    /// Subpages that left memory.
    pub evicted: u64,
    /// Deaths of the pager.
    pub deaths: u64,
    /// One if there was more than the budget when the programs had paused, and one if there was not any more later.
    pub over: u64,
    /// See there.
    pub brought_down: u64,
}

/// The memory that outlives pagers, used again from seed to seed.
pub struct Bank {
    map: Vec<AtomicU64>,
    journal: Vec<AtomicU64>,
    notes: Vec<AtomicU64>,
    frames: Vec<Box<PageBytes>>,
}

impl Default for Bank {
    fn default() -> Self {
        Self::new()
    }
}

impl Bank {
    /// Fresh memory.
    #[must_use]
    pub fn new() -> Self {
        let words = |n: usize| (0..n).map(|_| AtomicU64::new(0)).collect();
        Self {
            map: words(MAP_BLOCKS * BLOCK_WORDS),
            journal: words(JOURNAL_WORDS),
            notes: words(NOTE_WORDS),
            frames: (0..48)
                .map(|_| Box::new([0; PAGE_BYTES as usize]))
                .collect(),
        }
    }

    fn clear(&mut self) {
        for words in [&self.map, &self.journal, &self.notes] {
            for w in words {
                w.store(0, Ordering::Relaxed);
            }
        }
        for f in &mut self.frames {
            f.fill(0);
        }
    }
}

type SimCore<'m> = Core<'m, Store>;

/// Runs one seed.
pub fn run_seed(seed: u64, bank: &mut Bank, trace: bool, wild: bool) -> Report {
    bank.clear();
    let mut rng = Rng::new(seed);
    let mut knobs = Knobs::draw(&mut rng);
    if !wild {
        knobs.tame();
    }
    if trace {
        eprintln!("{knobs:#?}");
    }
    let mut report = Report::default();
    let result = catch_unwind(AssertUnwindSafe(|| {
        run(rng, knobs, bank, trace, &mut report)
    }));
    die_after_points(0);
    if let Err(panic) = result {
        let why = panic
            .downcast_ref::<String>()
            .cloned()
            .or_else(|| panic.downcast_ref::<&str>().map(ToString::to_string))
            .unwrap_or_else(|| "a panic".into());
        report.failure.get_or_insert(format!("PANIC: {why}"));
    }
    report
}

fn run(mut rng: Rng, knobs: Knobs, bank: &mut Bank, trace: bool, report: &mut Report) {
    let store = Store::new(
        knobs.embedded,
        knobs.store_delay,
        knobs.store_full,
        knobs.store_damaged,
        Rng::new(rng.next()),
    );
    let config = Config {
        budget_bytes: knobs.budget_bytes,
        frames: knobs.frames,
        tracked_pages: knobs.tracked_pages,
        childhood: knobs.childhood,
        large_drop_bytes: knobs.large_drop * SUBPAGE_BYTES,
        restless_ns: knobs.restless_ns,
        crash: at_point,
    };
    let memory = Memory {
        map: &bank.map[..knobs.map_blocks * BLOCK_WORDS],
        journal: &bank.journal,
        notes: &bank.notes,
    };
    let processes = knobs.processes;
    let kernel = Kernel::new(rng, knobs, trace);
    let core = SimCore::create(memory, store.clone(), config).expect("room for the map");
    let journal = core.journal_slots();
    let mut run = Run {
        sim: Sim::new(kernel, &mut bank.frames, journal),
        core: Some(core),
        memory,
        config,
        store,
        evicted: 0,
    };
    for _ in 0..processes {
        run.start();
    }
    run.programs();
    let over = run.resident_bytes() > config.budget_bytes;
    run.settle();
    report.over = over.into();
    report.brought_down = (over && run.resident_bytes() <= config.budget_bytes).into();
    run.verify();
    run.let_go();
    if !run.failed() {
        run.compare();
    }
    report.failure = run.sim.kernel.failure.take();
    report.steps = run.sim.kernel.steps;
    report.checks = run.sim.kernel.checks;
    report.ops = run.sim.ops;
    report.deaths = run.sim.deaths;
    report.evicted = run.evicted + run.core.as_ref().map_or(0, |c| c.stats().subpages_evicted);
}

struct Run<'m> {
    sim: Sim<'m>,
    core: Option<SimCore<'m>>,
    memory: Memory<'m>,
    config: Config,
    store: Store,
    evicted: u64,
}

impl Run<'_> {
    fn failed(&self) -> bool {
        self.sim.kernel.failure.is_some()
    }

    fn start(&mut self) {
        let mm = self.sim.kernel.start_process();
        let uffd = self.sim.kernel.new_uffd(mm, true);
        self.sim.kernel.mms[mm].uffd = Some(uffd);
        let core = self.core.as_mut().expect("a core");
        let space = core.add_space(uffd as u64).expect("room for a space");
        self.sim.fds.insert(space, uffd);
    }

    /// Runs pager and kernel for a while; false if nothing more will happen.
    fn turn(&mut self) -> bool {
        if self.failed() {
            return false;
        }
        let core = self.core.as_mut().expect("a core");
        let points = self.sim.kernel.knobs.death_points;
        let most = self.sim.deaths >= DEATHS_MOST;
        if points > 0 && self.sim.kernel.acts_left > 0 && !most {
            if self.sim.kernel.rng.one_in(4) {
                die_after_points(1 + self.sim.kernel.rng.below(points));
            }
        } else {
            die_after_points(0);
        }
        let sim = &mut self.sim;
        let ran = catch_unwind(AssertUnwindSafe(|| {
            let mut deadline = drive::run(core, sim, 64);
            while let Some(done) = core.store().poll() {
                let now = Nanos(sim.kernel.now_ns);
                core.handle(now, Input::Store(done));
                deadline = Some(Nanos(0));
            }
            deadline
        }));
        let forsaken = core.frames_forsaken();
        if ran.is_ok() && forsaken > 0 {
            let why = format!("{forsaken} frames are held that nobody brings to the store");
            self.sim.kernel.fail(why);
        }
        match ran {
            Ok(Some(Nanos(0))) => true,
            Ok(deadline) => {
                let busy = core.store().is_busy();
                let soon = self.sim.kernel.now_ns + 1000;
                let deadline = deadline.map(|d| d.0);
                let deadline = if busy {
                    Some(deadline.map_or(soon, |d| d.min(soon)))
                } else {
                    deadline
                };
                trace!(self.sim.kernel, "idle until {deadline:?}");
                self.sim.idle(deadline)
            }
            Err(death) if death.is::<Death>() => {
                self.take_over();
                true
            }
            Err(panic) => resume_unwind(panic),
        }
    }

    /// The pager died: the machine goes on alone for a while, then a successor comes, which may die as
    /// well.
    fn take_over(&mut self) {
        if let Some(dead) = self.core.take() {
            self.evicted += dead.stats().subpages_evicted;
        }
        while self.core.is_none() && !self.failed() {
            self.sim.deaths += 1;
            trace!(self.sim.kernel, "==== the pager dies ====");
            self.sim.forget_shell();
            for _ in 0..self.sim.kernel.rng.below(60) {
                self.sim.kernel.step();
            }
            let points = self.sim.kernel.knobs.death_points;
            let dies = points > 0 && self.sim.kernel.rng.one_in(3);
            die_after_points(if dies {
                1 + self.sim.kernel.rng.below(6)
            } else {
                0
            });
            self.sim.kernel.pager_since_ns = self.sim.kernel.now_ns;
            let (memory, config, store) = (self.memory, self.config, self.store.clone());
            let now = Nanos(self.sim.kernel.now_ns);
            let recovered = catch_unwind(AssertUnwindSafe(|| {
                Core::recover(memory, config, now, |live| {
                    Ok::<_, MapError>(store.recovered(live))
                })
            }));
            match recovered {
                Ok(Ok(core)) => self.core = Some(core),
                Ok(Err(why)) => self.sim.kernel.fail(format!("take-over: {why}")),
                Err(death) if death.is::<Death>() => {}
                Err(panic) => resume_unwind(panic),
            }
        }
        if !self.failed() {
            self.succeed();
        }
    }

    /// What a successor's shell tells its core.
    fn succeed(&mut self) {
        let core = self.core.as_ref().expect("a core");
        let spaces: Vec<_> = core
            .map()
            .spaces()
            .map(|s| (s, core.map().owner_word(s), core.map().fork_seq(s)))
            .collect();
        trace!(
            self.sim.kernel,
            "==== a successor takes over {spaces:?} ===="
        );
        for &(space, owner, _) in &spaces {
            let fd = usize::try_from(owner).expect("a descriptor");
            self.sim.fds.insert(space, fd);
        }
        let served: Vec<usize> = self.sim.fds.values().copied().collect();
        for u in 0..self.sim.kernel.uffds.len() {
            if self.sim.kernel.uffds[u].open && !served.contains(&u) {
                // Its space ended, and the descriptor was not closed yet.
                self.sim.kernel.uffd_close(u);
                let mm = self.sim.kernel.uffds[u].mm;
                if self.sim.kernel.mms[mm].alive {
                    self.sim.kernel.mms[mm].uffd = None;
                }
            }
        }
        for (space, ..) in spaces {
            let mm = self.sim.mm_of(space).expect("just put in");
            if !self.sim.kernel.mms[mm].alive {
                self.sim.send(Input::Exited(space));
                continue;
            }
            self.sim.introduce(space);
            self.sim.kernel.kick_ring(mm);
            self.sim.quiet_wait.insert(space);
            if self.sim.detaching.contains(&mm) {
                self.sim.send(Input::Detach(space));
            }
        }
    }

    /// Until the programs have done what they do.
    fn programs(&mut self) {
        while !self.failed() {
            let more = self.turn();
            let done = self.sim.kernel.acts_left == 0 && self.sim.kernel.programs_idle();
            if done {
                return;
            }
            if !more {
                if self.sim.kernel.programs_idle() {
                    return;
                }
                self.stuck("programs run");
            }
            self.limit();
        }
    }

    fn limit(&mut self) {
        if self.sim.ops > OPS_MOST {
            self.sim.kernel.fail("too many operations".into());
        }
    }

    fn stuck(&mut self, when: &str) {
        if self.failed() {
            return;
        }
        let waiting: Vec<String> = self
            .sim
            .kernel
            .threads
            .iter()
            .enumerate()
            .filter(|(_, t)| {
                let idle = matches!(t.task, Task::Idle) && t.life.is_none();
                t.alive && (t.wait.is_some() || !idle)
            })
            .map(|(i, t)| format!("{i}: {t:?}"))
            .collect();
        self.sim.kernel.fail(format!(
            "HANG: nothing happens any more while {when}: {waiting:?}"
        ));
    }

    /// What the budget bounds.
    fn resident_bytes(&self) -> u64 {
        let served = self.sim.fds.values().map(|&u| self.sim.kernel.uffds[u].mm);
        served.map(|mm| self.sim.kernel.resident_bytes(mm)).sum()
    }

    /// Gives the pager time to come down to its budget.
    fn settle(&mut self) {
        let until = self.sim.kernel.now_ns + 200_000_000;
        while !self.failed() && self.sim.kernel.now_ns < until {
            self.sim.scan();
            let before = self.sim.kernel.now_ns;
            self.turn();
            if self.sim.kernel.now_ns < before + 2_000_000 {
                self.sim.kernel.now_ns += 2_000_000;
            }
            self.limit();
        }
    }

    /// Every process reads all its memory.
    fn verify(&mut self) {
        for mm in 0..self.sim.kernel.mms.len() {
            let thread = self
                .sim
                .kernel
                .threads
                .iter()
                .position(|t| t.mm == mm && t.alive && !t.worker);
            if let Some(t) = thread {
                self.sim.kernel.threads[t].task = Task::Verify { cursor: 0 };
            }
        }
        while !self.failed() && !self.sim.kernel.programs_idle() {
            if !self.turn() && !self.sim.kernel.programs_idle() {
                self.stuck("all is read");
            }
            self.limit();
        }
    }

    /// Every space is let go.
    fn let_go(&mut self) {
        if self.failed() {
            return;
        }
        let spaces: Vec<_> = self.sim.fds.keys().copied().collect();
        for space in spaces {
            let mm = self.sim.mm_of(space).expect("a served space");
            if self.sim.kernel.rng.percent(20) {
                self.sim.kernel.exit(mm);
                self.sim.send(Input::Exited(space));
            } else {
                self.sim.detach(space);
            }
        }
        let until = self.sim.kernel.now_ns + HANG_NS;
        while !self.failed() && !self.sim.fds.is_empty() {
            self.sim.scan();
            let before = self.sim.kernel.now_ns;
            self.turn();
            // What the looks say must not keep the clock from what waits for it.
            if self.sim.kernel.now_ns < before + 100_000 {
                self.sim.kernel.now_ns += 100_000;
            }
            if self.sim.kernel.now_ns > until {
                self.stuck("spaces are let go");
            }
            self.limit();
        }
    }

    /// Everything is where it belongs, and nothing is left over.
    fn compare(&mut self) {
        let kernel = &mut self.sim.kernel;
        for mm in 0..kernel.mms.len() {
            if !kernel.mms[mm].alive {
                continue;
            }
            if let Some(m) = kernel.mms[mm].vmas.iter().find(|m| m.uffd.is_some()) {
                let why = format!("mm{mm} is still registered at {:#x}-{:#x}", m.start, m.end);
                kernel.fail(why);
            }
            let mapped: Vec<u64> = kernel.mms[mm]
                .vmas
                .iter()
                .flat_map(|m| m.start..m.end)
                .collect();
            let touched: Vec<u64> = kernel.ideals[mm].touched().collect();
            for v in mapped.into_iter().chain(touched) {
                let content = kernel.content(mm, v).unwrap_or(ZERO);
                kernel.checks += 1;
                if let Err(why) = kernel.ideals[mm].see(v, content) {
                    kernel.fail(format!("WRONG DATA after letting go of mm{mm}: {why}"));
                }
            }
        }
        if self.failed() {
            return;
        }
        let core = self.core.as_mut().expect("a core");
        while core.store().is_busy() {
            if let Some(done) = core.store().poll() {
                let now = Nanos(self.sim.kernel.now_ns);
                core.handle(now, Input::Store(done));
            }
        }
        let stored = core.store().usage().raw_bytes;
        let blocks = core.map().blocks_used();
        let refused = self.store.refused();
        if refused != 0 {
            self.sim
                .kernel
                .fail(format!("STORE: {refused} locations named nothing"));
        }
        if stored != 0 {
            self.sim
                .kernel
                .fail(format!("LEAK: {stored} bytes are still stored"));
        }
        if blocks != 1 {
            self.sim
                .kernel
                .fail(format!("LEAK: {blocks} blocks of the map are in use"));
        }
    }
}
