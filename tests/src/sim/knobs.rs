//! What one seed makes of a run: sizes, rates and which troubles occur at all.

use holo_pager::core::Childhood;

use super::rng::Rng;

/// Kinds of acts of a program, in the order of [`Knobs::weights`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Act {
    Read,
    Write,
    DontNeed,
    Free,
    Unmap,
    Map,
    Protect,
    Move,
    Fork,
    Pin,
    Lock,
    Unlock,
    Exit,
    /// A thread begins, lives for a while and ends.
    Thread,
}

pub(crate) const ACTS: [Act; 14] = [
    Act::Read,
    Act::Write,
    Act::DontNeed,
    Act::Free,
    Act::Unmap,
    Act::Map,
    Act::Protect,
    Act::Move,
    Act::Fork,
    Act::Pin,
    Act::Lock,
    Act::Unlock,
    Act::Exit,
    Act::Thread,
];

/// Blocks of the map where there is room for all: a root, a middle and a few leaves for each space.
pub(crate) const MAP_BLOCKS: usize = 64;

/// The parameters of a run.
#[derive(Clone, Debug)]
pub(crate) struct Knobs {
    pub(crate) processes: usize,
    pub(crate) threads: u64,
    /// Address spaces at once, forks included.
    pub(crate) spaces_most: usize,
    /// First subpage of each process's memory, and how many.
    pub(crate) arena_start: u64,
    pub(crate) arena_len: u64,
    pub(crate) budget_bytes: u64,
    pub(crate) frames: u16,
    pub(crate) tracked_pages: usize,
    /// Acts of all programs together.
    pub(crate) acts: u64,
    pub(crate) weights: [u64; ACTS.len()],
    /// Writes and reads go to this share of the arena, percent.
    pub(crate) hot: u64,
    /// At most so many steps of the kernel between two operations of the pager.
    pub(crate) pace: u64,
    pub(crate) step_ns: u64,
    pub(crate) op_ns: u64,
    pub(crate) ring_workers: usize,
    pub(crate) ring_entries: usize,
    /// Percent of installs that stop part-way.
    pub(crate) partial: u64,
    /// Percent of installs during which the programs go on.
    pub(crate) overtaken: u64,
    /// Percent of installs that find no memory.
    pub(crate) no_memory: u64,
    /// One in so many steps the kernel reclaims a page; 0: never.
    pub(crate) reclaim: u64,
    /// Percent of pages that `MADV_PAGEOUT` leaves.
    pub(crate) leaves: u64,
    /// One in so many steps a waiting thread is woken for nothing; 0: never.
    pub(crate) spurious: u64,
    /// One in so many steps a process is stopped for a while; 0: never.
    pub(crate) stops: u64,
    /// Polls of the store until a transfer ends; 0: at once.
    pub(crate) store_delay: u64,
    /// Percent of puts that find the store full.
    pub(crate) store_full: u64,
    /// Percent of gets that find what was stored damaged.
    pub(crate) store_damaged: u64,
    /// The store that ships, instead of the simple one.
    pub(crate) embedded: bool,
    /// Blocks of the map: with few, it is full before all is served.
    pub(crate) map_blocks: usize,
    /// Subpages beyond which a drop is remembered as a range.
    pub(crate) large_drop: u64,
    /// How long mappings may change all the time before the process is kept still.
    pub(crate) restless_ns: u64,
    /// Nobody may write through `/proc/PID/mem` what the process may not.
    pub(crate) no_forced_writes: bool,
    /// Percent of ring requests that are refused.
    pub(crate) ring_refused: u64,
    /// One in so many looks a ring ends, as with the process that it was made in; 0: never.
    pub(crate) ring_lost: u64,
    /// One in so many operations the pager dies; 0: never.
    pub(crate) deaths: u64,
    /// One in so many named points the pager dies; 0: never.
    pub(crate) death_points: u64,
    /// One in so many steps a space is told to let go early; 0: never.
    pub(crate) early_detach: u64,
    /// A process also forks while a change of its mappings is not wholly told, and the other way round.
    pub(crate) wild: bool,
    /// A thread may be preempted between a change of mappings and its messages, while others use the place that has
    /// become free, and leave it again.
    pub(crate) late_tellers: bool,
    /// When a fork's child is left alone.
    pub(crate) childhood: Childhood,
    /// Time between two looks of the shell at the mappings.
    pub(crate) scan_every_ns: u64,
    /// Inputs of the shell come late by up to so many nanoseconds.
    pub(crate) input_delay_ns: u64,
}

impl Knobs {
    /// Leaves out what the core is not yet always right about (docs/testing.md): a fork that overlaps with a change of
    /// mappings.
    pub(crate) fn tame(&mut self) {
        self.wild = false;
    }

    /// Far too little memory for what the programs touch all over it, and little that keeps a page from leaving.
    fn evict_more(&mut self) {
        self.budget_bytes = self.budget_bytes.min(4 * 65536);
        self.hot = 100;
        self.acts *= 2;
        for (weight, act) in self.weights.iter_mut().zip(ACTS) {
            match act {
                Act::Read => *weight *= 2,
                Act::Pin | Act::Lock | Act::Exit => *weight = 0,
                _ => {}
            }
        }
        self.ring_refused = 0;
        self.leaves = self.leaves.min(10);
        self.pace = self.pace.min(2);
        self.step_ns = self.step_ns.max(20_000);
    }

    pub(crate) fn draw(rng: &mut Rng) -> Self {
        let pick = |rng: &mut Rng, of: &[u64]| of[rng.index(of.len())];
        let maps = pick(rng, &[0, 2, 6, 12]);
        let drops = pick(rng, &[0, 2, 8]);
        let forks = pick(rng, &[0, 0, 1, 3]);
        let arena_len = pick(rng, &[24, 40, 64, 100]);
        let leaf = 4096;
        let arena_start = match rng.below(3) {
            // Across the edge of a leaf of the map.
            0 => 5 * leaf - arena_len / 2,
            1 => 7 * leaf + rng.below(16),
            _ => 9 * leaf,
        };
        let deaths = if rng.percent(40) {
            pick(rng, &[40, 150, 600])
        } else {
            0
        };
        let mut knobs = Self {
            processes: if rng.percent(60) { 1 } else { 2 },
            threads: rng.between(1, 4),
            spaces_most: 5,
            arena_start,
            arena_len,
            budget_bytes: pick(rng, &[1, 4, 5, 6, 8]) * 65536,
            frames: pick(rng, &[34, 36, 48]) as u16,
            tracked_pages: if rng.percent(20) { 2 } else { 64 },
            acts: rng.between(100, 700),
            weights: [
                40,
                40,
                drops,
                if rng.percent(50) { drops } else { 0 },
                maps,
                maps,
                if rng.percent(50) { maps } else { 0 },
                if rng.percent(70) { maps } else { 0 },
                forks,
                pick(rng, &[0, 0, 2, 6]),
                pick(rng, &[0, 0, 0, 2]),
                2,
                u64::from(rng.percent(15)),
                0,
            ],
            hot: pick(rng, &[10, 40, 100]),
            pace: pick(rng, &[0, 1, 2, 4, 12, 40]),
            step_ns: pick(rng, &[1_000, 10_000, 50_000, 200_000]),
            op_ns: pick(rng, &[500, 5_000, 20_000]),
            ring_workers: if rng.percent(70) { 1 } else { 2 },
            ring_entries: if rng.percent(20) { 2 } else { 64 },
            partial: pick(rng, &[0, 0, 10, 50]),
            overtaken: pick(rng, &[0, 0, 5, 20]),
            no_memory: pick(rng, &[0, 0, 0, 5]),
            reclaim: pick(rng, &[0, 5, 20, 100]),
            leaves: pick(rng, &[0, 10, 50]),
            spurious: pick(rng, &[0, 50]),
            stops: pick(rng, &[0, 0, 300]),
            store_delay: pick(rng, &[0, 0, 2, 10]),
            store_full: pick(rng, &[0, 0, 0, 0, 0, 20]),
            store_damaged: 0,
            embedded: rng.one_in(16),
            map_blocks: MAP_BLOCKS,
            large_drop: 1 << 20,
            restless_ns: 2_000_000,
            no_forced_writes: false,
            ring_refused: pick(rng, &[0, 0, 0, 50]),
            ring_lost: 0,
            deaths,
            death_points: if deaths > 0 {
                pick(rng, &[0, 10, 50, 200])
            } else {
                0
            },
            early_detach: pick(rng, &[0, 0, 0, 400]),
            scan_every_ns: pick(rng, &[20_000, 200_000, 2_000_000]),
            wild: true,
            late_tellers: false,
            childhood: Childhood {
                new_ns: 0,
                young_ns: 0,
                small_bytes: 0,
            },
            input_delay_ns: pick(rng, &[0, 1_000, 100_000]),
        };
        if knobs.acts % 8 == 7 && knobs.ring_refused == 0 {
            // From a number that is drawn anyway: the other seeds do what they always did.
            knobs.ring_lost = 4;
        }
        if (knobs.acts / 8).is_multiple_of(3) {
            // Likewise.
            knobs.weights[ACTS.len() - 1] = 12;
        }
        knobs.late_tellers = (knobs.acts / 72).is_multiple_of(2) && knobs.threads > 1;
        if (knobs.acts / 24).is_multiple_of(3) {
            knobs.evict_more();
        }
        if knobs.acts % 11 == 3 {
            // A process takes a root, a middle and one or two leaves.
            knobs.map_blocks = 2 + (knobs.acts / 11 % 8) as usize + 3 * knobs.processes;
        }
        if knobs.acts % 5 == 2 {
            knobs.large_drop = 16;
        }
        if knobs.acts % 7 < 2 {
            knobs.childhood = Childhood {
                new_ns: knobs.acts % 3 * 1_000_000,
                young_ns: 1 << (18 + knobs.acts % 13),
                small_bytes: 65536,
            };
        }
        knobs.no_forced_writes = knobs.acts % 13 == 5;
        knobs.store_damaged = if knobs.acts % 17 == 9 { 2 } else { 0 };
        knobs
    }
}
