//! The journal: messages are read from the kernel straight into words that outlive the pager.
//!
//! Reading a message acknowledges it: the target runs on at once, and nobody delivers it again. So
//! there must be no moment in which a message is only in the memory of a process that may die. The
//! kernel writes it here; it is applied from here; its slot is cleared last. A successor applies what it
//! finds once more, so every application is idempotent; where that needs help, the message's sequence
//! number, which is the same both times, tells.
//!
//! Layout: word 0: space of the read plus one; word 1: sequence number of slot 0; slots from word 8.

use holo_proto::SpaceId;

use super::event::EVENT_WORDS;
use super::words::{Words, get, set};

/// Messages that one read takes at most.
pub const SLOTS: usize = 64;
const FIRST: usize = 8;
/// Words of a journal.
pub const JOURNAL_WORDS: usize = FIRST + SLOTS * EVENT_WORDS;

/// A journal over words that outlive the pager.
pub struct Journal<'m> {
    words: Words<'m>,
}

impl<'m> Journal<'m> {
    /// Opens the journal, empty or a predecessor's.
    ///
    /// # Panics
    /// If there are fewer than [`JOURNAL_WORDS`] words: the shell sized them.
    #[must_use]
    pub fn open(words: Words<'m>) -> Self {
        assert!(words.len() >= JOURNAL_WORDS, "journal words");
        Self { words }
    }

    /// Prepares a read for `space` under fresh sequence numbers.
    pub fn begin(&self, space: SpaceId) {
        debug_assert!((0..SLOTS).all(|i| self.slot(i).is_none()), "unapplied");
        let base = get(self.words, 1);
        set(self.words, 1, (base + SLOTS as u64) & u64::from(u32::MAX));
        set(self.words, 0, u64::from(space.0) + 1);
    }

    /// The words that the kernel reads messages into.
    #[must_use]
    pub fn slots(&self) -> Words<'m> {
        &self.words[FIRST..FIRST + SLOTS * EVENT_WORDS]
    }

    /// The space that the messages are of.
    #[must_use]
    pub fn space(&self) -> Option<SpaceId> {
        u16::try_from(get(self.words, 0).checked_sub(1)?)
            .ok()
            .map(SpaceId)
    }

    /// Sequence number of slot `i`.
    #[must_use]
    pub fn seq(&self, i: usize) -> u32 {
        u32::try_from((get(self.words, 1) + i as u64) & u64::from(u32::MAX)).unwrap_or(0)
    }

    /// The message in slot `i`, if one is there.
    #[must_use]
    pub fn slot(&self, i: usize) -> Option<[u64; EVENT_WORDS]> {
        let at = FIRST + i * EVENT_WORDS;
        let w = [0, 1, 2, 3].map(|k| get(self.words, at + k));
        (w[0] != 0).then_some(w)
    }

    /// Clears slot `i`: its message is applied.
    pub fn clear(&self, i: usize) {
        set(self.words, FIRST + i * EVENT_WORDS, 0);
    }
}
