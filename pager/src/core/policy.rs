//! Which page goes next: a FIFO in two parts, with ghosts. Pure and bounded.
//!
//! What can be seen of a page's use is only when it arrived and that it came back (a refault); there is
//! no accessed bit. New pages enter *probation*. A page that comes back while its ghost is remembered was
//! evicted too early and enters the *main* queue. Probation loses pages first, unless it is smaller than
//! a tenth of all, then the main queue does. (The idea is 2Q's: Johnson and Shasha, VLDB 1994.)

use std::collections::VecDeque;

use holo_proto::PageIndex;

/// The replacement order of one address space's resident pages.
///
/// A page is in at most one queue; the caller keeps track ([`Policy::insert`] must not be called twice
/// without [`Policy::take_victim`] between). A page that is no longer resident may stay
/// queued: the caller drops it when it comes up.
#[derive(Debug)]
pub struct Policy {
    probation: VecDeque<PageIndex>,
    main: VecDeque<PageIndex>,
    ghosts: Ghosts,
}

impl Policy {
    /// A policy that remembers the last `ghosts` evicted pages (rounded up to a power of two) and has
    /// room for `pages` without allocating.
    #[must_use]
    pub fn new(pages: usize, ghosts: usize) -> Self {
        Self {
            probation: VecDeque::with_capacity(pages),
            main: VecDeque::with_capacity(pages),
            ghosts: Ghosts::new(ghosts),
        }
    }

    /// A page became resident.
    pub fn insert(&mut self, page: PageIndex) {
        if self.ghosts.take(page) {
            self.main.push_back(page);
        } else {
            self.probation.push_back(page);
        }
    }

    /// A page was offered and stayed: it is in use, and goes behind all others.
    pub fn insert_kept(&mut self, page: PageIndex) {
        self.main.push_back(page);
    }

    /// The page to give up next; it leaves the queue.
    pub fn take_victim(&mut self) -> Option<PageIndex> {
        let all = self.probation.len() + self.main.len();
        if self.probation.len() * 10 >= all && !self.probation.is_empty() {
            self.probation.pop_front()
        } else {
            self.main.pop_front().or_else(|| self.probation.pop_front())
        }
    }

    /// A page left memory.
    pub fn evicted(&mut self, page: PageIndex) {
        self.ghosts.put(page);
    }

    /// Pages queued.
    #[must_use]
    pub fn len(&self) -> usize {
        self.probation.len() + self.main.len()
    }

    /// No page is queued.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// The last evicted pages, in a direct-mapped table: constant time and space; two pages in one place
/// cost a forgotten ghost, no more.
#[derive(Debug)]
struct Ghosts {
    table: Vec<u64>,
}

impl Ghosts {
    fn new(len: usize) -> Self {
        Self {
            table: vec![0; len.next_power_of_two().max(16)],
        }
    }

    fn place(&self, page: PageIndex) -> usize {
        let hash = page.0.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 20;
        usize::try_from(hash).unwrap_or(0) & (self.table.len() - 1)
    }

    fn put(&mut self, page: PageIndex) {
        let at = self.place(page);
        self.table[at] = page.0 + 1;
    }

    fn take(&mut self, page: PageIndex) -> bool {
        let at = self.place(page);
        let hit = self.table[at] == page.0 + 1;
        if hit {
            self.table[at] = 0;
        }
        hit
    }
}

/// A set of pages with a fixed number of places: never allocates after it is made.
#[derive(Debug)]
pub struct PageSet {
    table: Vec<u64>,
    len: usize,
    most: usize,
}

impl PageSet {
    /// A set for at most `most` pages.
    #[must_use]
    pub fn new(most: usize) -> Self {
        Self {
            table: vec![0; (most * 2).next_power_of_two().max(16)],
            len: 0,
            most,
        }
    }

    fn home(&self, key: u64) -> usize {
        let hash = key.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 16;
        usize::try_from(hash).unwrap_or(0) & (self.table.len() - 1)
    }

    fn find(&self, key: u64) -> Result<usize, usize> {
        let mut at = self.home(key);
        loop {
            match self.table[at] {
                0 => return Err(at),
                k if k == key => return Ok(at),
                _ => at = (at + 1) & (self.table.len() - 1),
            }
        }
    }

    /// Adds a page; false if it was in already, or the set is full.
    pub fn insert(&mut self, page: PageIndex) -> bool {
        let key = page.0 + 1;
        match self.find(key) {
            Err(at) if self.len < self.most => {
                self.table[at] = key;
                self.len += 1;
                true
            }
            _ => false,
        }
    }

    /// Removes a page; false if it was not in.
    pub fn remove(&mut self, page: PageIndex) -> bool {
        let Ok(mut hole) = self.find(page.0 + 1) else {
            return false;
        };
        self.len -= 1;
        let mask = self.table.len() - 1;
        let mut at = hole;
        // Close the gap: move back each follower whose home is not behind the hole.
        loop {
            at = (at + 1) & mask;
            let key = self.table[at];
            if key == 0 {
                self.table[hole] = 0;
                return true;
            }
            let home = self.home(key);
            if (at.wrapping_sub(home) & mask) >= (at.wrapping_sub(hole) & mask) {
                self.table[hole] = key;
                hole = at;
            }
        }
    }

    /// No room for another page.
    #[must_use]
    pub fn is_full(&self) -> bool {
        self.len >= self.most
    }

    /// Removes all.
    pub fn clear(&mut self) {
        self.table.fill(0);
        self.len = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn new_pages_leave_in_the_order_they_came() {
        let mut p = Policy::new(8, 16);
        for i in 1..=4 {
            p.insert(PageIndex(i));
        }
        let order: Vec<_> = std::iter::from_fn(|| p.take_victim()).collect();
        assert_eq!(order, [1, 2, 3, 4].map(PageIndex));
    }

    #[test]
    fn a_page_that_came_back_outlives_new_ones() {
        let mut p = Policy::new(64, 64);
        p.insert(PageIndex(1));
        let v = p.take_victim().unwrap();
        p.evicted(v);
        p.insert(v);
        for i in 2..10 {
            p.insert(PageIndex(i));
        }
        let order: Vec<_> = std::iter::from_fn(|| p.take_victim()).collect();
        assert_eq!(order.last(), Some(&PageIndex(1)));
        assert_eq!(order.len(), 9);
    }

    #[test]
    fn main_gives_way_when_it_has_nearly_everything() {
        let mut p = Policy::new(64, 64);
        for i in 0..20 {
            p.insert_kept(PageIndex(i));
        }
        p.insert(PageIndex(100));
        assert_eq!(p.take_victim(), Some(PageIndex(0)));
    }

    #[test]
    fn the_page_set_agrees_with_a_hash_set() {
        let mut set = PageSet::new(100);
        let mut model = std::collections::HashSet::new();
        let mut x = 1u64;
        for _ in 0..100_000 {
            x = x.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            let page = PageIndex(x >> 40 & 127);
            if x >> 60 & 1 == 0 {
                let fits = model.len() < 100;
                let fresh = fits && !model.contains(&page);
                assert_eq!(set.insert(page), fresh);
                if fresh {
                    model.insert(page);
                }
            } else {
                assert_eq!(set.remove(page), model.remove(&page));
            }
        }
    }
}
