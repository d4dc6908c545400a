//! When the control thread does what: how often it looks, and for how long each search rests after it was made.
//!
//! Only rules: whoever asks says what time it is and what a search cost. No clock is read here, and no process.

/// A program fills memory at most so fast, bytes a second: what it can add between two looks.
const FILL_BYTES_PER_S: u64 = 4 << 30;
/// Shortest and longest time between two looks, nanoseconds.
const LOOK_MIN_NS: u64 = 500_000;
const LOOK_MAX_NS: u64 = 100_000_000;
/// Time between two looks while nothing has been started that could be looked at, nanoseconds.
pub(super) const START_NS: u64 = 2_000_000;
/// A search for new mappings or children costs at most this share of a CPU: one in so many.
const SEARCH_SHARE: u64 = 50;
/// The same while nothing grows or shrinks.
const SEARCH_SHARE_QUIET: u64 = 20 * SEARCH_SHARE;
/// After so many looks at which nothing had changed it is quiet.
const QUIET_LOOKS: u32 = 20;
/// The same while a tree that is short of memory grows: new mappings fill up unseen until they are found.
const SEARCH_SHARE_GROWING: u64 = 3;
/// Shortest and longest time between two searches for new mappings, nanoseconds.
const SEARCH_MIN_NS: u64 = 1_000_000;
const SEARCH_MAX_NS: u64 = 1_000_000_000;
/// The same at most for children: what a child fills is not seen before it is found.
const TREE_SHARE_MOST: u64 = 8 * SEARCH_SHARE;
/// Shortest and longest time between two searches for children, nanoseconds.
const TREE_MIN_NS: u64 = 10_000_000;
const TREE_MAX_NS: u64 = 1_000_000_000;
/// Growth from one look to the next that counts as such.
const GROWTH_BYTES: u64 = 256 << 10;
/// Least time between two counts of what fork relatives share, nanoseconds.
const COUNT_NS: u64 = 20_000_000;
/// The same after a process has ended, and the share of a CPU that such a count may cost: one in so many.
const RECOUNT_NS: u64 = 2_000_000;
const RECOUNT_SHARE: u64 = 10;
/// A signal to a group has reached all of it after that time, nanoseconds.
const GROUP_NS: u64 = 20_000_000;
/// Least time between two attempts to find a fork's child, which may wait for it, nanoseconds.
pub(super) const MATCH_NS: u64 = 1_000_000;
/// Least time between two full surveys (smaps walks all page tables), nanoseconds.
const SURVEY_NS: u64 = 1_000_000_000;
/// The same while nothing grows or shrinks.
const SURVEY_QUIET_NS: u64 = 5 * SURVEY_NS;

/// When what is shared is counted again, after a count at `now` that took so long.
pub(super) fn next_count_ns(now: u64, cost: u64) -> u64 {
    now + (cost * SEARCH_SHARE).max(COUNT_NS)
}

/// The same after a process has ended, which may have shared most of it: as long as the old count stands, that much
/// seems to be no one's to evict. `cost`: of a count of all processes.
pub(super) fn recount_ns(now: u64, cost: u64) -> u64 {
    now + (cost * RECOUNT_SHARE).max(RECOUNT_NS)
}

/// When the next of each search is due, and how quiet the tree is, which decides it.
#[derive(Debug, Default)]
pub(super) struct Pace {
    next_tree_ns: u64,
    next_match_ns: u64,
    next_wide_ns: u64,
    next_search_ns: u64,
    next_hasty_ns: u64,
    /// The next search looks after what the last one found.
    follows_up: bool,
    quiet_looks: u32,
    last_total: u64,
    left_since: Option<u64>,
}

impl Pace {
    /// Whether it has been so at all looks for so long that it is left alone.
    pub(super) fn is_left_for_long(&mut self, is_left: bool, now: u64) -> bool {
        self.left_since = is_left.then(|| self.left_since.unwrap_or(now));
        self.left_since.is_some_and(|since| now >= since + GROUP_NS)
    }

    /// Pageable bytes of all processes at this look. Whether they have grown since the last one.
    pub(super) fn note_total(&mut self, total: u64) -> bool {
        let growing = total > self.last_total + GROWTH_BYTES;
        self.quiet_looks = if total == self.last_total {
            self.quiet_looks.saturating_add(1)
        } else {
            0
        };
        self.last_total = total;
        growing
    }

    /// Whether what was measured at this look is passed on. While it is quiet now and then all the same: what the
    /// core counts itself may have gone astray.
    pub(super) fn passes_on(&self) -> bool {
        !self.is_quiet() || self.quiet_looks.is_multiple_of(QUIET_LOOKS)
    }

    /// Until the next look: the less room is left of the budget the shorter.
    pub(super) fn interval_ns(&self, budget: u64) -> u64 {
        let room = budget.saturating_sub(self.last_total);
        let fill = room.saturating_mul(1_000_000_000) / FILL_BYTES_PER_S / 2;
        // Nothing changed for a while: look less often.
        let idle = LOOK_MIN_NS << self.quiet_looks.min(7);
        fill.max(idle).clamp(LOOK_MIN_NS, LOOK_MAX_NS)
    }

    /// Of a search that took so long, how many times that passes before the next one.
    fn share(&self) -> u64 {
        if self.is_quiet() {
            SEARCH_SHARE_QUIET
        } else {
            SEARCH_SHARE
        }
    }

    fn is_quiet(&self) -> bool {
        self.quiet_looks >= QUIET_LOOKS
    }

    /// Whether a process is to be surveyed which was surveyed `last`, at that time, at that cost.
    pub(super) fn survey_is_due(&self, last: Option<(u64, u64)>, now: u64) -> bool {
        let least = if self.is_quiet() {
            SURVEY_QUIET_NS
        } else {
            SURVEY_NS
        };
        last.is_none_or(|(at, cost)| now >= at + (cost * self.share()).max(least))
    }

    /// Whether children are to be looked for, and processes that ended.
    pub(super) fn tree_is_due(&self, now: u64) -> bool {
        now >= self.next_tree_ns
    }

    pub(super) fn tree_at_once(&mut self) {
        self.next_tree_ns = 0;
    }

    /// Children were looked for at `now`, which took so long.
    pub(super) fn tree_took(&mut self, now: u64, cost: u64) {
        let share = self.share().min(TREE_SHARE_MOST);
        self.next_tree_ns = now + (cost * share).clamp(TREE_MIN_NS, TREE_MAX_NS);
    }

    /// Whether the processes of orphans are to be looked for.
    pub(super) fn match_is_due(&self, now: u64) -> bool {
        now >= self.next_match_ns
    }

    pub(super) fn match_at_once(&mut self) {
        self.next_match_ns = 0;
    }

    /// The processes of orphans were looked for at `now`, which took so long.
    pub(super) fn match_took(&mut self, now: u64, cost: u64) {
        self.next_match_ns = now + cost.max(MATCH_NS);
    }

    /// Whether an orphan's process may be looked for among all processes there are.
    pub(super) fn wide_is_due(&self, now: u64) -> bool {
        now >= self.next_wide_ns
    }

    /// A search among all processes has ended at `now`; it took so long.
    pub(super) fn wide_took(&mut self, now: u64, cost: u64) {
        self.next_wide_ns = now + cost * SEARCH_SHARE;
    }

    /// Whether new mappings are to be looked for. `hasty`: the tree grows, and is short of memory.
    pub(super) fn search_is_due(&self, now: u64, hasty: bool) -> bool {
        now >= self.next_search_ns || (hasty && now >= self.next_hasty_ns)
    }

    /// New mappings were looked for at `now`, which took so long. `found`: there were some.
    pub(super) fn search_took(&mut self, now: u64, cost: u64, found: bool) {
        // A program that was just then taking its mappings apart puts together pieces that are
        // registered and pieces that are not, and cannot move the whole until all of them are.
        self.follows_up = found && !self.follows_up;
        let share = if self.follows_up {
            SEARCH_SHARE_GROWING
        } else {
            self.share()
        };
        self.next_hasty_ns = now + cost * SEARCH_SHARE_GROWING;
        self.next_search_ns = now + (cost * share).clamp(SEARCH_MIN_NS, SEARCH_MAX_NS);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: u64 = 1_000_000;
    const NOW: u64 = 77_000 * MS;

    /// At so many looks one after the other nothing had changed.
    fn quiet_for(looks: u32) -> Pace {
        let mut pace = Pace::default();
        pace.note_total(1);
        for _ in 0..looks {
            pace.note_total(1);
        }
        pace
    }

    /// The first moment at which it is due, which was not due a nanosecond before.
    fn assert_due_at(at: u64, is_due: impl Fn(u64) -> bool) {
        assert!(!is_due(at - 1), "before {at}");
        assert!(is_due(at), "at {at}");
    }

    #[test]
    fn looks_are_as_frequent_as_a_budget_can_fill_up() {
        let mut pace = Pace::default();
        let budget = 8 << 30;
        assert_eq!(pace.interval_ns(budget), LOOK_MAX_NS);
        // At the highest speed this is full in 20 ms: there is a look in the middle.
        pace.note_total(budget - FILL_BYTES_PER_S / 50);
        assert!(pace.interval_ns(budget).abs_diff(10 * MS) <= 1);
        for total in [budget, budget + 1] {
            pace.note_total(total);
            assert_eq!(pace.interval_ns(budget), LOOK_MIN_NS);
        }
    }

    #[test]
    fn looks_become_rare_while_nothing_changes() {
        let intervals = [0, 1, 2, 6, 7, 1000].map(|looks| quiet_for(looks).interval_ns(0));
        let least = LOOK_MIN_NS;
        let most = 128 * least;
        assert_eq!(
            intervals,
            [least, 2 * least, 4 * least, 64 * least, most, most]
        );
        let mut pace = quiet_for(1000);
        pace.note_total(2);
        assert_eq!(pace.interval_ns(0), LOOK_MIN_NS);
    }

    #[test]
    fn only_more_than_a_little_is_growth() {
        let mut pace = Pace::default();
        assert!(!pace.note_total(GROWTH_BYTES));
        assert!(pace.note_total(2 * GROWTH_BYTES + 1));
        assert!(!pace.note_total(2 * GROWTH_BYTES + 1));
        assert!(!pace.note_total(0));
    }

    #[test]
    fn what_was_measured_is_passed_on_while_it_changes_and_now_and_then() {
        let mut pace = quiet_for(0);
        assert!(pace.passes_on());
        let passed_on: Vec<u32> = (1..=3 * QUIET_LOOKS)
            .filter(|_| {
                pace.note_total(1);
                pace.passes_on()
            })
            .collect();
        let often = 1..QUIET_LOOKS;
        let rarely = [1, 2, 3].map(|k| k * QUIET_LOOKS);
        assert_eq!(passed_on, often.chain(rarely).collect::<Vec<_>>());
    }

    #[test]
    fn a_search_costs_a_share_of_a_cpu() {
        let mut pace = Pace::default();
        for (cost, pause) in [
            (0, SEARCH_MIN_NS),
            (2 * MS, 100 * MS),
            (60 * MS, SEARCH_MAX_NS),
        ] {
            pace.search_took(NOW, cost, false);
            assert_due_at(NOW + pause, |now| pace.search_is_due(now, false));
        }
        for (cost, pause) in [(0, TREE_MIN_NS), (2 * MS, 100 * MS), (60 * MS, TREE_MAX_NS)] {
            pace.tree_took(NOW, cost);
            assert_due_at(NOW + pause, |now| pace.tree_is_due(now));
        }
        pace.wide_took(NOW, 60 * MS);
        assert_due_at(NOW + 3000 * MS, |now| pace.wide_is_due(now));
    }

    #[test]
    fn while_it_is_quiet_a_search_costs_less() {
        for (looks, share, tree_share) in [(QUIET_LOOKS - 1, 50, 50), (QUIET_LOOKS, 1000, 400)] {
            let mut pace = quiet_for(looks);
            pace.search_took(NOW, MS / 4, false);
            pace.tree_took(NOW, MS / 4);
            assert_due_at(NOW + share * MS / 4, |now| pace.search_is_due(now, false));
            assert_due_at(NOW + tree_share * MS / 4, |now| pace.tree_is_due(now));
        }
    }

    #[test]
    fn a_tree_that_fills_up_is_searched_sooner() {
        let mut pace = Pace::default();
        pace.search_took(NOW, MS, false);
        assert_due_at(NOW + 3 * MS, |now| pace.search_is_due(now, true));
        assert_due_at(NOW + 50 * MS, |now| pace.search_is_due(now, false));
    }

    #[test]
    fn what_was_found_is_looked_after_once() {
        let mut pace = Pace::default();
        for pause in [3, 50, 3, 50] {
            pace.search_took(NOW, MS, true);
            assert_due_at(NOW + pause * MS, |now| pace.search_is_due(now, false));
        }
        pace.search_took(NOW, MS, true);
        pace.search_took(NOW, MS, false);
        assert_due_at(NOW + 50 * MS, |now| pace.search_is_due(now, false));
    }

    #[test]
    fn what_is_wanted_at_once_is_due() {
        let mut pace = Pace::default();
        pace.tree_took(NOW, MS);
        pace.match_took(NOW, 0);
        assert_due_at(NOW + MATCH_NS, |now| pace.match_is_due(now));
        pace.match_took(NOW, 2 * MATCH_NS);
        assert_due_at(NOW + 2 * MATCH_NS, |now| pace.match_is_due(now));
        assert!(!pace.tree_is_due(NOW));
        pace.match_at_once();
        assert!(pace.match_is_due(NOW) && !pace.tree_is_due(NOW));
        pace.tree_at_once();
        assert!(pace.tree_is_due(NOW));
    }

    #[test]
    fn whoever_is_left_stopped_is_woken_when_nobody_else_has_for_a_while() {
        let mut pace = Pace::default();
        assert!(!pace.is_left_for_long(true, NOW));
        assert!(!pace.is_left_for_long(true, NOW + GROUP_NS - 1));
        assert!(pace.is_left_for_long(true, NOW + GROUP_NS));
        assert!(!pace.is_left_for_long(false, NOW + GROUP_NS));
        assert!(!pace.is_left_for_long(true, NOW + 2 * GROUP_NS));
    }

    #[test]
    fn counts_and_surveys_are_rare() {
        assert_eq!(next_count_ns(NOW, 0), NOW + COUNT_NS);
        assert_eq!(next_count_ns(NOW, 2 * MS), NOW + 100 * MS);
        assert_eq!(recount_ns(NOW, 0), NOW + RECOUNT_NS);
        assert_eq!(recount_ns(NOW, 2 * MS), NOW + 20 * MS);
        for (looks, cost, pause) in [
            (0, 2 * MS, SURVEY_NS),
            (0, 60 * MS, 3000 * MS),
            (QUIET_LOOKS, 2 * MS, SURVEY_QUIET_NS),
            (QUIET_LOOKS, 60 * MS, 60_000 * MS),
        ] {
            let pace = quiet_for(looks);
            assert!(pace.survey_is_due(None, 0));
            let last = Some((NOW, cost));
            assert_due_at(NOW + pause, |now| pace.survey_is_due(last, now));
        }
    }
}
