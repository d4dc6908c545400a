//! How much may be in memory, and who waits for room.

use holo_proto::{PAGE_BYTES, PageIndex, SpaceId};

use super::{Core, batch};
use crate::store::api::PageStore;

impl<S: PageStore> Core<'_, S> {
    /// Above this eviction begins, bytes.
    pub(super) fn high_bytes(&self) -> u64 {
        let margin = (self.budget_bytes / 32).clamp(4 * PAGE_BYTES, 16 << 20);
        self.budget_bytes.saturating_sub(margin)
    }

    /// Down to this it goes on, bytes.
    pub(super) fn low_bytes(&self) -> u64 {
        self.high_bytes()
            .saturating_sub((self.budget_bytes / 64).clamp(2 * PAGE_BYTES, 8 << 20))
    }

    /// Whether a fault that needs memory should wait: there is none left in the budget, and waiting
    /// helps.
    pub(super) fn must_wait_for_room(&self, by: SpaceId, page: PageIndex) -> bool {
        self.usage_bytes() + PAGE_BYTES > self.budget_bytes
            && !self
                .space_ref(by)
                .is_some_and(|s| batch::populates(s, page))
            && self
                .spaces
                .iter()
                .flatten()
                // Stopped processes may hold all frames.
                .filter(|s| s.batch.is_some() || self.frames.free() >= batch::FRAMES_LEAST)
                .any(|s| batch::can_make_room(s, by, &self.childhood, self.now))
    }
}
