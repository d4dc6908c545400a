//! The note of a batch: which requests may be outstanding on a target's ring, for a successor.
//!
//! Between queueing `MADV_FREE` and reading its end, each subpage of the batch gets one removal message
//! of our own doing. A second one for the same subpage is the process's: it dropped the page at the same
//! time. So messages are *counted* by subpage, here, where a successor finds the counts. A count and the
//! sequence number of the message that changed it last share a word: applying a message again after a
//! crash changes nothing.
//!
//! Layout by space, 384 words:
//!
//! | word | content |
//! |---|---|
//! | 0 | pages noted; bit 32: all requests have ended; bit 33: what was hit is repaired as well, so the batch is over but for pages that may be clean |
//! | 1 + 5i | page `i`: its index \| (its frame + 1) << 48 |
//! | 2 + 5i | mask \| queued << 16 \| gone << 32 \| how many messages told of that << 48 (3: or more) \| the last one's sequence number << 50, its low 14 bits |
//! | 3 + 5i | counts (16 x 2 bits, saturating) \| sequence number << 32 |
//! | 4 + 5i | [`Heard`]: quiet \| doubtful << 16 \| holed << 32 \| early << 48 |
//! | 5 + 5i | skipped |
//! | 81 | the request that was being queued last: requests that the ring will have had with it \| page << 32 \| first subpage << 40 \| subpages << 48 |
//! | 82 to 125 | old places of moves whose second message has not come: first subpage << 28 \| subpages |
//! | 126 | 1: the process drops a large range, or several |
//! | 127 | bit 32 and the sequence number of the move whose new place was cleared last |
//! | 128 | runs of doubtful subpages; bit 30: there was a move with which they moved on; bit 31: in the second of two areas; the sequence number of that move << 32 |
//! | 129 | bit 32 and the sequence number of the message that was a move's second one last |
//! | 130 to 191, 192 to 253 | run `i`: first subpage \| how many << 48; the witness of the first one \| bit 63: they are here if that is |
//! | 256 | pages that requests may have hit, beside those of the batch; bit 31: in the second of two areas |
//! | 258 to 320, 321 to 383 | those pages |
//!
//! A request is noted before it is queued. Whether its queueing was reached, the ring itself tells a
//! successor: it counts what was ever put in.

use holo_proto::{
    AddrRange, PAGE_SUBPAGES, PageIndex, SUBPAGE_BYTES, SpaceId, SubpageIndex, SubpageMask,
};

use super::map::{FrameId, SPACES};
use super::space::Suspect;
use super::words::{Words, get, set};

/// Most pages in a batch.
pub const BATCH_PAGES: usize = 16;
const WORDS: usize = 384;
/// Words of a page.
const PAGE_WORDS: usize = 5;
/// The request that was being queued last.
const LAST: usize = 1 + PAGE_WORDS * BATCH_PAGES;
/// Old places of moves: their words, and how many.
const LEFT_AT: usize = LAST + 1;
const LEFT: usize = LARGE_DROP - LEFT_AT;
/// Whether there is a large drop that no entry tells of.
const LARGE_DROP: usize = CLEARED - 1;
/// The move whose new place was cleared last.
const CLEARED: usize = 127;
/// The message that was a move's second one last.
const LEFT_FOR_GOOD: usize = DOUBTS + 1;
/// Doubtful subpages: how many runs, and the two areas of which one counts.
const DOUBTS: usize = CLEARED + 1;
const DOUBTS_AT: [usize; 2] = [DOUBTS + 2, DOUBTS + 2 + 2 * RUNS];
/// Most runs.
const RUNS: usize = 31;
const RUNS_MASK: u64 = 0xff;
/// Pages to be made dirty beside those of the batch: how many, and the two areas of which one counts.
const HITS: usize = DOUBTS_AT[1] + 2 * RUNS + 2;
const HITS_AT: [usize; 2] = [HITS + 2, HITS + 2 + HITS_MOST];
/// Most of them.
const HITS_MOST: usize = 63;
/// In the word of a number: the second area.
const SECOND: u64 = 1 << 31;
/// In the word of the doubts: bits 32 on are the sequence number of the move with which they moved on last.
const MOVED_ON: u64 = 1 << 30;
const SEQ_SHIFT: u32 = 32;
/// In the first word of a run: above its first subpage, how many. In the second: entries count if the witness is there.
const LEN_SHIFT: u32 = 48;
const IF_THERE: u64 = 1 << 63;
/// In the first word of a page: above its index, its frame.
const FRAME_SHIFT: u32 = 48;
/// In word 0: all requests have ended.
const SETTLED: u64 = 1 << 32;
/// In word 0: nothing is left to be told apart or repaired.
const OVER: u64 = 1 << 33;
/// In words 127 and 129: there was such a message.
const ONE: u64 = 1 << 32;
/// In a page's word of what has gone.
const TOLD_BY_SHIFT: u32 = 50;
/// Words of the notes of all spaces.
pub const NOTE_WORDS: usize = SPACES * WORDS;

/// What the ends of requests, and the order of messages, have told of one page: who removed what is decided from it
/// when all messages are read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Heard {
    /// Of requests that stopped on the way: subpages of which nothing had been heard, and the others.
    pub(crate) quiet: SubpageMask,
    pub(crate) doubtful: SubpageMask,
    /// Of requests that found holes.
    pub(crate) holed: SubpageMask,
    /// Heard of before something below it in the same request, and what that was: if that was there, the message
    /// was not ours.
    pub(crate) early: SubpageMask,
    pub(crate) skipped: SubpageMask,
}

/// What is noted of a message's sequence number, to know it again.
pub(crate) fn told_by(seq: u32) -> u16 {
    (seq & ((1 << (64 - TOLD_BY_SHIFT)) - 1)) as u16
}

/// The notes, over words that outlive the pager.
pub(crate) struct Notes<'m> {
    words: Words<'m>,
}

impl<'m> Notes<'m> {
    pub(crate) fn open(words: Words<'m>) -> Self {
        assert!(words.len() >= NOTE_WORDS, "note words");
        Self { words }
    }

    fn at(space: SpaceId, field: usize) -> usize {
        space.0 as usize * WORDS + field
    }

    /// Word `field` of page `i`.
    fn of_page(space: SpaceId, i: usize, field: usize) -> usize {
        Self::at(space, 1 + PAGE_WORDS * i + field)
    }

    /// Writes a batch down; the count last, so that a cut leaves no note.
    pub(crate) fn write(
        &self,
        space: SpaceId,
        pages: impl ExactSizeIterator<Item = (PageIndex, SubpageMask, Option<FrameId>)>,
    ) {
        let count = pages.len();
        assert!(count <= BATCH_PAGES, "{count} pages in a batch");
        for (i, (page, mask, frame)) in pages.enumerate() {
            let frame = frame.map_or(0, |f| u64::from(f.0) + 1) << FRAME_SHIFT;
            set(self.words, Self::of_page(space, i, 0), page.0 | frame);
            set(self.words, Self::of_page(space, i, 1), u64::from(mask.0));
            for field in 2..PAGE_WORDS {
                set(self.words, Self::of_page(space, i, field), 0);
            }
        }
        set(self.words, Self::at(space, LAST), 0);
        set(self.words, Self::at(space, 0), count as u64);
    }

    /// All requests have ended: whatever message comes now is the process's.
    pub(crate) fn settle(&self, space: SpaceId) {
        for i in 0..self.pages(space) {
            let at = Self::of_page(space, i, 2);
            let word = get(self.words, at);
            let heard = (0..PAGE_SUBPAGES)
                .filter(|s| word >> (2 * s) & 3 == 0)
                .fold(word, |w, s| w | 1 << (2 * s));
            set(self.words, at, heard);
        }
        set(
            self.words,
            Self::at(space, 0),
            self.pages(space) as u64 | SETTLED,
        );
    }

    /// No request of the batch is on the ring any more, but for repairs.
    pub(crate) fn is_settled(&self, space: SpaceId) -> bool {
        get(self.words, Self::at(space, 0)) & SETTLED != 0
    }

    /// Writes down the old places of moves of which one more message will come. More than there is room
    /// for are not remembered by a successor.
    pub(crate) fn set_left(&self, space: SpaceId, left: &[AddrRange]) {
        for i in 0..LEFT {
            let word = left.get(i).map_or(0, |r| {
                (r.start.0 / SUBPAGE_BYTES) << 28 | (r.len() / SUBPAGE_BYTES).min((1 << 28) - 1)
            });
            set(self.words, Self::at(space, LEFT_AT + i), word);
        }
    }

    /// What [`Notes::set_left`] wrote. (Cut off half-way it wrote one of them twice.)
    pub(crate) fn left(&self, space: SpaceId) -> Vec<AddrRange> {
        let mut left = Vec::new();
        for i in 0..LEFT {
            let word = get(self.words, Self::at(space, LEFT_AT + i));
            let start = (word >> 28) * SUBPAGE_BYTES;
            let len = (word & ((1 << 28) - 1)) * SUBPAGE_BYTES;
            let range = AddrRange::new(start, start + len);
            if word != 0 && !left.contains(&range) {
                left.push(range);
            }
        }
        left
    }

    /// Writes down that the new place of the move with this message holds nothing of before.
    pub(crate) fn set_cleared(&self, space: SpaceId, seq: u32) {
        set(self.words, Self::at(space, CLEARED), u64::from(seq) | ONE);
    }

    /// Whether [`Notes::set_cleared`] was the last for this message.
    pub(crate) fn is_cleared(&self, space: SpaceId, seq: u32) -> bool {
        get(self.words, Self::at(space, CLEARED)) == u64::from(seq) | ONE
    }

    /// Writes down that this message was a move's second one, and is nobody else's.
    pub(crate) fn set_left_for_good(&self, space: SpaceId, seq: u32) {
        let at = Self::at(space, LEFT_FOR_GOOD);
        set(self.words, at, u64::from(seq) | ONE);
    }

    /// Whether [`Notes::set_left_for_good`] was the last for this message.
    pub(crate) fn is_left_for_good(&self, space: SpaceId, seq: u32) -> bool {
        get(self.words, Self::at(space, LEFT_FOR_GOOD)) == u64::from(seq) | ONE
    }

    /// Writes down whether the process drops a large range, of which the map says nothing.
    pub(crate) fn set_large_drop(&self, space: SpaceId, is: bool) {
        set(self.words, Self::at(space, LARGE_DROP), u64::from(is));
    }

    /// What [`Notes::set_large_drop`] wrote.
    pub(crate) fn has_large_drop(&self, space: SpaceId) -> bool {
        get(self.words, Self::at(space, LARGE_DROP)) != 0
    }

    /// Writes down of which subpages it is to be found out whether what the map says is there. More runs than there is room
    /// for are not remembered by a successor.
    pub(crate) fn set_doubts(&self, space: SpaceId, suspects: &[Suspect]) {
        let was = get(self.words, Self::at(space, DOUBTS));
        self.write_doubts(space, suspects, was & !(SECOND | RUNS_MASK));
    }

    /// The same, after the move with this message.
    pub(crate) fn set_doubts_moved(&self, space: SpaceId, suspects: &[Suspect], seq: u32) {
        self.write_doubts(space, suspects, u64::from(seq) << SEQ_SHIFT | MOVED_ON);
    }

    /// Whether [`Notes::set_doubts_moved`] was the last for this message.
    pub(crate) fn have_doubts_moved(&self, space: SpaceId, seq: u32) -> bool {
        let number = get(self.words, Self::at(space, DOUBTS));
        number & !(SECOND | RUNS_MASK) == u64::from(seq) << SEQ_SHIFT | MOVED_ON
    }

    fn write_doubts(&self, space: SpaceId, suspects: &[Suspect], moved: u64) {
        let number = Self::at(space, DOUBTS);
        let was = get(self.words, number);
        if suspects.is_empty() {
            if was != 0 {
                set(self.words, number, 0);
            }
            return;
        }
        let second = was & SECOND ^ SECOND;
        let area = Self::at(space, DOUBTS_AT[usize::from(second != 0)]);
        let mut sorted = suspects.to_vec();
        let key = |x: &Suspect| (x.if_there, x.witness.0.wrapping_sub(x.at.0), x.at);
        sorted.sort_unstable_by_key(key);
        sorted.dedup_by_key(|x| key(x));
        let mut runs = 0;
        let mut rest = sorted.as_slice();
        while let (Some(&first), true) = (rest.first(), runs < RUNS) {
            let along = |(i, x): &(usize, &Suspect)| {
                let i = *i as u64;
                x.at.0 == first.at.0 + i
                    && x.witness.0 == first.witness.0 + i
                    && x.if_there == first.if_there
            };
            let longest = rest.len().min(usize::from(u16::MAX));
            let len = rest[..longest].iter().enumerate().take_while(along).count();
            let there = if first.if_there { IF_THERE } else { 0 };
            set(
                self.words,
                area + 2 * runs,
                first.at.0 | (len as u64) << LEN_SHIFT,
            );
            set(self.words, area + 2 * runs + 1, first.witness.0 | there);
            runs += 1;
            rest = &rest[len..];
        }
        set(self.words, number, runs as u64 | second | moved);
    }

    /// What [`Notes::set_doubts`] wrote.
    pub(crate) fn doubts(&self, space: SpaceId) -> Vec<Suspect> {
        let number = get(self.words, Self::at(space, DOUBTS));
        let area = Self::at(space, DOUBTS_AT[usize::from(number & SECOND != 0)]);
        let runs = usize::try_from(number & RUNS_MASK).map_or(0, |n| n.min(RUNS));
        let mut all = Vec::new();
        for i in 0..runs {
            let [first, witness] = [0, 1].map(|word| get(self.words, area + 2 * i + word));
            for k in 0..first >> LEN_SHIFT {
                all.push(Suspect {
                    at: SubpageIndex((first & ((1 << LEN_SHIFT) - 1)) + k),
                    witness: SubpageIndex((witness & !IF_THERE) + k),
                    if_there: witness & IF_THERE != 0,
                });
            }
        }
        all
    }

    /// Writes down pages that requests may have hit, beside those of the batch. More than there is room for are not
    /// remembered by a successor.
    pub(crate) fn set_hits(&self, space: SpaceId, pages: impl Iterator<Item = PageIndex>) {
        let number = Self::at(space, HITS);
        let was = get(self.words, number);
        let second = was & SECOND ^ SECOND;
        let area = Self::at(space, HITS_AT[usize::from(second != 0)]);
        let mut count = 0;
        for page in pages.take(HITS_MOST) {
            set(self.words, area + count, page.0);
            count += 1;
        }
        if count > 0 || was != 0 {
            let area = if count > 0 { second } else { 0 };
            set(self.words, number, count as u64 | area);
        }
    }

    /// What [`Notes::set_hits`] wrote.
    pub(crate) fn hits(&self, space: SpaceId) -> impl Iterator<Item = PageIndex> + '_ {
        let number = get(self.words, Self::at(space, HITS));
        let area = Self::at(space, HITS_AT[usize::from(number & SECOND != 0)]);
        let count = usize::try_from(number & (SECOND - 1)).map_or(0, |n| n.min(HITS_MOST));
        (0..count).map(move |i| PageIndex(get(self.words, area + i)))
    }

    pub(crate) fn clear(&self, space: SpaceId) {
        set(self.words, Self::at(space, 0), 0);
    }

    /// What requests have hit is repaired. Pages of the batch may be clean and present all the same: until they are
    /// gone, or made dirty, the kernel may drop them.
    pub(crate) fn finish(&self, space: SpaceId) {
        let pages = self.pages(space) as u64;
        set(self.words, Self::at(space, 0), pages | SETTLED | OVER);
    }

    fn count_of(word: u64) -> usize {
        usize::try_from(word & (SETTLED - 1)).map_or(0, |n| n.min(BATCH_PAGES))
    }

    /// Pages of a batch that is not over.
    pub(crate) fn pages(&self, space: SpaceId) -> usize {
        let word = get(self.words, Self::at(space, 0));
        if word & OVER == 0 {
            Self::count_of(word)
        } else {
            0
        }
    }

    /// Pages of a batch that is over, which may be clean.
    pub(crate) fn offered(&self, space: SpaceId) -> impl Iterator<Item = PageIndex> + '_ {
        let word = get(self.words, Self::at(space, 0));
        let count = if word & OVER == 0 {
            0
        } else {
            Self::count_of(word)
        };
        (0..count).map(move |i| self.page(space, i).0)
    }

    /// Writes down what was heard of page `i`.
    pub(crate) fn set_heard(&self, space: SpaceId, i: usize, heard: Heard) {
        if i >= BATCH_PAGES {
            return;
        }
        let [quiet, doubtful, holed, early] =
            [heard.quiet, heard.doubtful, heard.holed, heard.early].map(|m| u64::from(m.0));
        let word = quiet | doubtful << 16 | holed << 32 | early << 48;
        // Where something is early, what it skipped is there: written before it, and cleared after it.
        let mut words = [(4, u64::from(heard.skipped.0)), (3, word)];
        if word == 0 {
            words.reverse();
        }
        for (field, word) in words {
            set(self.words, Self::of_page(space, i, field), word);
        }
    }

    /// What [`Notes::set_heard`] wrote.
    pub(crate) fn heard(&self, space: SpaceId, i: usize) -> Heard {
        let word = get(self.words, Self::of_page(space, i, 3));
        let mask = |word: u64, shift: u32| SubpageMask((word >> shift & 0xffff) as u16);
        Heard {
            quiet: mask(word, 0),
            doubtful: mask(word, 16),
            holed: mask(word, 32),
            early: mask(word, 48),
            skipped: mask(get(self.words, Self::of_page(space, i, 4)), 0),
        }
    }

    pub(crate) fn page(&self, space: SpaceId, i: usize) -> (PageIndex, SubpageMask) {
        let word = get(self.words, Self::of_page(space, i, 0));
        (
            PageIndex(word & ((1 << FRAME_SHIFT) - 1)),
            SubpageMask((get(self.words, Self::of_page(space, i, 1)) & 0xffff) as u16),
        )
    }

    /// The frame that page `i` was read into.
    pub(crate) fn frame(&self, space: SpaceId, i: usize) -> Option<FrameId> {
        let word = get(self.words, Self::of_page(space, i, 0)) >> FRAME_SHIFT;
        Some(FrameId(u16::try_from(word).ok()?.checked_sub(1)?))
    }

    /// Writes down that requests for `run` of page `i` are on the ring, or not after all.
    pub(crate) fn set_queued(&self, space: SpaceId, i: usize, run: SubpageMask, on: bool) {
        // Of pages that only a repair is about nothing is noted.
        if i >= BATCH_PAGES {
            return;
        }
        let at = Self::of_page(space, i, 1);
        let bits = u64::from(run.0) << 16;
        let word = get(self.words, at);
        set(self.words, at, if on { word | bits } else { word & !bits });
    }

    /// Writes down which subpages of page `i` were unmapped or moved away; how many messages said so, and which one last.
    pub(crate) fn set_gone(
        &self,
        space: SpaceId,
        i: usize,
        gone: SubpageMask,
        (told, by): (u8, u16),
    ) {
        if i >= BATCH_PAGES {
            return;
        }
        let at = Self::of_page(space, i, 1);
        let word = get(self.words, at) & 0xffff_ffff;
        let told = u64::from(told.min(3)) << 48 | u64::from(by) << TOLD_BY_SHIFT;
        set(self.words, at, word | u64::from(gone.0) << 32 | told);
    }

    /// What [`Notes::set_gone`] wrote.
    pub(crate) fn gone(&self, space: SpaceId, i: usize) -> (SubpageMask, (u8, u16)) {
        let word = get(self.words, Self::of_page(space, i, 1));
        let gone = SubpageMask((word >> 32 & 0xffff) as u16);
        let by = (word >> TOLD_BY_SHIFT) as u16;
        (gone, ((word >> 48 & 3) as u8, by))
    }

    /// Writes down the request for `count` subpages of page `i` that is to be queued next; the ring will have
    /// had `total` requests then.
    pub(crate) fn set_last(
        &self,
        space: SpaceId,
        total: u32,
        i: usize,
        (first, count): (usize, usize),
    ) {
        let word =
            u64::from(total) | (i as u64) << 32 | (first as u64) << 40 | (count as u64) << 48;
        set(self.words, Self::at(space, LAST), word);
    }

    /// The request of [`Notes::set_last`] is answered for, or its ring is lost: another ring counts anew.
    pub(crate) fn forget_last(&self, space: SpaceId) {
        set(self.words, Self::at(space, LAST), 0);
    }

    /// What [`Notes::set_last`] wrote: the ring's requests with it, page of the batch, subpages.
    pub(crate) fn last(&self, space: SpaceId) -> Option<(u32, usize, SubpageMask)> {
        let word = get(self.words, Self::at(space, LAST));
        let [a, b, c, d, i, first, count, _] = word.to_le_bytes();
        let (i, first, count) = (usize::from(i), usize::from(first), usize::from(count));
        let total = u32::from_le_bytes([a, b, c, d]);
        let known = count > 0 && i < self.pages(space);
        known.then(|| (total, i, super::batch::run_mask(first, count)))
    }

    /// Subpages of page `i` that are on the ring.
    pub(crate) fn queued(&self, space: SpaceId, i: usize) -> SubpageMask {
        if i >= BATCH_PAGES {
            return SubpageMask::NONE;
        }
        SubpageMask((get(self.words, Self::of_page(space, i, 1)) >> 16 & 0xffff) as u16)
    }

    /// Counts one message over `covered` of page `i`.
    pub(crate) fn count(&self, space: SpaceId, i: usize, covered: SubpageMask, seq: u32) {
        let at = Self::of_page(space, i, 2);
        let word = get(self.words, at);
        let mut counts = word & 0xffff_ffff;
        if (word >> 32) as u32 == seq && counts != 0 {
            return;
        }
        for s in covered.iter() {
            if counts >> (2 * s) & 3 < 3 {
                counts += 1 << (2 * s);
            }
        }
        set(self.words, at, counts | u64::from(seq) << 32);
    }

    /// Subpages of page `i` with at least `least` messages.
    pub(crate) fn counted(&self, space: SpaceId, i: usize, least: u64) -> SubpageMask {
        if i >= BATCH_PAGES {
            return SubpageMask::NONE;
        }
        let counts = get(self.words, Self::of_page(space, i, 2));
        (0..PAGE_SUBPAGES)
            .filter(|s| counts >> (2 * s) & 3 >= least)
            .fold(SubpageMask::NONE, SubpageMask::with)
    }
}

#[cfg(test)]
mod tests {
    use super::super::scripted::memory;
    use super::*;

    const SPACE: SpaceId = SpaceId(3);

    fn suspect(at: u64, witness: u64, if_there: bool) -> Suspect {
        Suspect {
            at: SubpageIndex(at),
            witness: SubpageIndex(witness),
            if_there,
        }
    }

    fn doubts(notes: &Notes<'_>) -> Vec<(u64, u64, bool)> {
        let all = notes.doubts(SPACE).into_iter();
        let mut all: Vec<_> = all.map(|x| (x.at.0, x.witness.0, x.if_there)).collect();
        all.sort_unstable();
        all
    }

    #[test]
    fn doubts_are_read_back() {
        let notes = Notes::open(memory().notes);
        let last = (1 << 36) - 1;
        // As they come: two for each subpage.
        let mut all: Vec<_> = (0..500)
            .flat_map(|i| {
                [
                    suspect(0x9000 + i, 0x100 + i, true),
                    suspect(0x9000 + i, 0x9000 + i, false),
                ]
            })
            .collect();
        all.push(suspect(last, last, true));
        while !all.is_empty() {
            notes.set_doubts(SPACE, &all);
            let mut expected: Vec<_> = all
                .iter()
                .map(|x| (x.at.0, x.witness.0, x.if_there))
                .collect();
            expected.sort_unstable();
            assert_eq!(doubts(&notes), expected);
            all.truncate(all.len() / 3);
        }
        notes.set_doubts(SPACE, &[]);
        assert_eq!(doubts(&notes), []);
        let one = [suspect(5, 6, true)];
        assert!(!notes.have_doubts_moved(SPACE, 0));
        for seq in [0, u32::MAX] {
            notes.set_doubts_moved(SPACE, &one, seq);
            notes.set_doubts(SPACE, &one);
            assert!(notes.have_doubts_moved(SPACE, seq) && !notes.have_doubts_moved(SPACE, 7));
            assert_eq!(doubts(&notes), [(5, 6, true)]);
        }
        notes.set_doubts(SPACE, &[]);
        assert!(!notes.have_doubts_moved(SPACE, u32::MAX));
        for other in [SpaceId(2), SpaceId(4)] {
            assert!(notes.doubts(other).is_empty() && notes.left(other).is_empty());
        }
    }

    #[test]
    fn what_is_too_much_to_be_noted_is_cut() {
        let notes = Notes::open(memory().notes);
        let apart: Vec<_> = (0..100).map(|i| suspect(2 * i, 2 * i, true)).collect();
        notes.set_doubts(SPACE, &apart);
        assert_eq!(doubts(&notes).len(), RUNS);
        let pages = || (0..1000).map(PageIndex);
        notes.set_hits(SPACE, pages());
        assert!(notes.hits(SPACE).eq(pages().take(HITS_MOST)));
        // Neither is in the other's words, or in those of the next space.
        assert_eq!(doubts(&notes).len(), RUNS);
        assert_eq!(notes.pages(SpaceId(4)), 0);
        assert_eq!(notes.hits(SpaceId(4)).count(), 0);
    }

    #[test]
    fn a_list_of_places_that_was_cut_off_names_none_twice() {
        let notes = Notes::open(memory().notes);
        let [a, b, c] = [1, 2, 3].map(|i| AddrRange::new(i << 20, (i << 20) + 0x5000));
        notes.set_left(SPACE, &[a, b, c]);
        // `a` is taken out: the last one stands in its place before it is taken from its own.
        set(
            notes.words,
            Notes::at(SPACE, LEFT_AT),
            get(notes.words, Notes::at(SPACE, LEFT_AT + 2)),
        );
        assert_eq!(notes.left(SPACE), [c, b]);
        assert!(!notes.is_left_for_good(SPACE, 0));
        notes.set_left_for_good(SPACE, 0);
        assert!(notes.is_left_for_good(SPACE, 0) && !notes.is_left_for_good(SPACE, 1));
        assert!(!notes.is_left_for_good(SpaceId(4), 0) && doubts(&notes).is_empty());
    }

    #[test]
    fn what_has_gone_is_read_back() {
        let notes = Notes::open(memory().notes);
        let mask = SubpageMask(0x00f0);
        notes.write(SPACE, [(PageIndex(9), mask, None)].into_iter());
        notes.set_gone(SPACE, 0, mask, (2, told_by(u32::MAX)));
        notes.set_queued(SPACE, 0, mask, true);
        assert_eq!(notes.gone(SPACE, 0), (mask, (2, 0x3fff)));
        assert_eq!(notes.page(SPACE, 0), (PageIndex(9), mask));
        assert_eq!(notes.queued(SPACE, 0), mask);
        assert_ne!(told_by(6), told_by(7));
    }
}
