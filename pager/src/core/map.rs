//! The map of address spaces: for every subpage, what a missing fault there must be answered with.
//!
//! **The invariant of the whole pager**: for each subpage of a registered mapping, *if the kernel has no
//! page there, its content is what this map says*: stored or staged bytes, or zero where it says nothing.
//! Everything else (residency, replacement order) is belief, and may be wrong without harm.
//!
//! An entry may also stand over a page that is present. Then it is either equal to it (offered to the
//! kernel, which may drop the page at any time while it is clean) or older than it (written since; the
//! kernel never drops a dirty page, so the entry is never used).
//!
//! # Format, version 1
//!
//! The map is an array of 64-bit words that a successor, a snapshot or a move can read. Blocks of 4096
//! words (32 KiB); block 0 is the header:
//!
//! | word | content |
//! |---|---|
//! | 0 | byte 0: version (1); bytes 1-7: `"HOLOMAP"` |
//! | 1 | blocks in the file |
//! | 16 + 4s | space `s`: state (0 free, 1 being built, 2 active, 3 doomed) |
//! | 17 + 4s | space `s`: block number of its root; a doomed one may have none |
//! | 18 + 4s | space `s`: sequence number of the fork that made it, plus one, until the child is known; else 0 |
//! | 19 + 4s | space `s`: owner's word (the shell's) |
//!
//! A root has 4096 block numbers of middles (64 GiB of addresses each), a middle 4096 of leaves (16 MiB
//! each), a leaf 4096 entries, one a 4 KiB subpage. Zero is none everywhere. An entry is
//!
//! | bits 60-63 | meaning | bits 0-59 |
//! |---|---|---|
//! | 0 | nothing: reads zero | 0 |
//! | 1 | stored | the store's [`Location`] |
//! | 2 | staged in a frame of the pager's own | frame << 4 \| subpage of the frame |
//! | 3 | dropped by the process, the kernel's act not yet seen: reads zero, must not be evicted | the space's quiesce count |
//!
//! Blocks are filled before the word that points to them is set, so that a cut leaves an unreachable
//! block, never a wrong one. Which blocks are free is not stored: [`Map::recover`] walks the tree.

use holo_proto::{AddrRange, SpaceId, SubpageIndex};

use super::words::{Words, get, set};
use crate::store::api::Location;

/// Words in a block.
pub const BLOCK_WORDS: usize = 4096;
/// Most address spaces at once.
pub const SPACES: usize = 256;
/// Of these, kept for children of forks that there is no room for, until they are stopped.
const SPARE_SLOTS: usize = 16;
/// Version of the format, the map's first byte.
pub const VERSION: u8 = 1;

const MAGIC: u64 = u64::from_le_bytes([VERSION, b'H', b'O', b'L', b'O', b'M', b'A', b'P']);
const SPACE_BASE: usize = 16;
const SPACE_WORDS: usize = 4;
const KIND_SHIFT: u32 = 60;
const PAYLOAD: u64 = (1 << KIND_SHIFT) - 1;

/// A page-sized buffer of the pager's own, in memory that a successor keeps.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct FrameId(pub u16);

/// What the map says of one subpage.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Entry {
    /// Reads zero.
    Nothing,
    /// Reads these stored bytes.
    Stored(Location),
    /// Reads subpage `.1` of frame `.0`.
    Staged(FrameId, usize),
    /// Reads zero; the process dropped it, and whether the kernel has done so yet is not known.
    /// The number is the space's quiesce count when the event came.
    Dropping(u64),
}

impl Entry {
    fn to_word(self) -> u64 {
        match self {
            Self::Nothing => 0,
            Self::Stored(l) => 1 << KIND_SHIFT | (l.0 & PAYLOAD),
            Self::Staged(f, i) => 2 << KIND_SHIFT | u64::from(f.0) << 4 | i as u64,
            Self::Dropping(n) => 3 << KIND_SHIFT | (n & PAYLOAD),
        }
    }

    fn from_word(w: u64) -> Result<Self, MapError> {
        let payload = w & PAYLOAD;
        match w >> KIND_SHIFT {
            0 if w == 0 => Ok(Self::Nothing),
            1 => Ok(Self::Stored(Location(payload))),
            2 => Ok(Self::Staged(
                FrameId(u16::try_from(payload >> 4).map_err(|_| MapError::BadEntry)?),
                (payload & 15) as usize,
            )),
            3 => Ok(Self::Dropping(payload)),
            _ => Err(MapError::BadEntry),
        }
    }

    /// Whether a missing fault needs bytes from somewhere.
    #[must_use]
    pub fn has_bytes(self) -> bool {
        matches!(self, Self::Stored(_) | Self::Staged(..))
    }
}

/// Why a map cannot be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MapError {
    /// The first word is not this format's.
    #[error("not a map, or of another version")]
    BadHeader,
    /// A word is none of the kinds.
    #[error("the map holds an entry of no known kind")]
    BadEntry,
    /// A pointer leads outside the file, or two lead to one block.
    #[error("the map's tree is damaged")]
    BadTree,
    /// No block is left.
    #[error("the map is full")]
    Full,
    /// All spaces are in use.
    #[error("more than {} address spaces", SPACES - SPARE_SLOTS)]
    TooManySpaces,
}

/// Life of a space's slot in the map.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SlotState {
    /// Unused.
    Free,
    /// A fork's child is being copied; a successor starts the copy again.
    Building,
    /// In use.
    Active,
    /// In use, and there was no room for what belongs into it: its process must be stopped.
    Doomed,
}

/// The map, over words that outlive the pager.
pub struct Map<'m> {
    words: Words<'m>,
    free: Vec<u32>,
    bump: u32,
    blocks: u32,
    /// Where the search for a free slot begins.
    next_slot: u16,
}

impl<'m> Map<'m> {
    /// Makes an empty map; the words must all be zero.
    ///
    /// # Errors
    /// [`MapError::Full`] if there is no room for a single block.
    pub fn create(words: Words<'m>) -> Result<Self, MapError> {
        let blocks = u32::try_from(words.len() / BLOCK_WORDS).unwrap_or(u32::MAX);
        if blocks < 2 {
            return Err(MapError::Full);
        }
        set(words, 1, u64::from(blocks));
        set(words, 0, MAGIC);
        Ok(Self {
            words,
            free: Vec::with_capacity(blocks as usize),
            bump: 1,
            blocks,
            next_slot: 0,
        })
    }

    /// Takes over a predecessor's map: checks it and finds the free blocks.
    ///
    /// # Errors
    /// Any damage: the caller stops the processes rather than guess.
    pub fn recover(words: Words<'m>) -> Result<Self, MapError> {
        let blocks = u32::try_from(words.len() / BLOCK_WORDS).unwrap_or(u32::MAX);
        if blocks < 2 || get(words, 0) != MAGIC || get(words, 1) != u64::from(blocks) {
            return Err(MapError::BadHeader);
        }
        let mut map = Self {
            words,
            free: Vec::with_capacity(blocks as usize),
            bump: 1,
            blocks,
            next_slot: 0,
        };
        let mut used = vec![false; blocks as usize];
        used[0] = true;
        let mut claim = |b: u64| -> Result<Option<u32>, MapError> {
            if b == 0 {
                return Ok(None);
            }
            let b = u32::try_from(b).map_err(|_| MapError::BadTree)?;
            match used.get_mut(b as usize) {
                Some(u) if !*u => {
                    *u = true;
                    Ok(Some(b))
                }
                _ => Err(MapError::BadTree),
            }
        };
        for s in 0..SPACES {
            let Some(root) = claim(get(words, SPACE_BASE + s * SPACE_WORDS + 1))? else {
                continue;
            };
            for i in 0..BLOCK_WORDS {
                let Some(mid) = claim(map.word(root, i))? else {
                    continue;
                };
                for j in 0..BLOCK_WORDS {
                    let Some(leaf) = claim(map.word(mid, j))? else {
                        continue;
                    };
                    for k in 0..BLOCK_WORDS {
                        Entry::from_word(map.word(leaf, k))?;
                    }
                }
            }
        }
        let last = used.iter().rposition(|&u| u).unwrap_or(0);
        map.bump = u32::try_from(last + 1).unwrap_or(blocks);
        map.free
            .extend((1..map.bump).filter(|&b| !used[b as usize]));
        Ok(map)
    }

    fn word(&self, block: u32, at: usize) -> u64 {
        get(self.words, block as usize * BLOCK_WORDS + at)
    }

    /// A word that points to a block; one that cannot is none.
    fn pointer(&self, block: u32, at: usize) -> u32 {
        u32::try_from(self.word(block, at)).unwrap_or(0)
    }

    fn root(&self, space: SpaceId) -> u32 {
        u32::try_from(get(self.words, Self::slot(space, 1))).unwrap_or(0)
    }

    fn set_word(&self, block: u32, at: usize, value: u64) {
        set(self.words, block as usize * BLOCK_WORDS + at, value);
    }

    fn alloc(&mut self) -> Result<u32, MapError> {
        let block = match self.free.pop() {
            Some(b) => b,
            None if self.bump < self.blocks => {
                self.bump += 1;
                self.bump - 1
            }
            None => return Err(MapError::Full),
        };
        for i in 0..BLOCK_WORDS {
            if self.word(block, i) != 0 {
                self.set_word(block, i, 0);
            }
        }
        Ok(block)
    }

    /// Blocks that are in use, header included.
    #[must_use]
    pub fn blocks_used(&self) -> u32 {
        self.bump - u32::try_from(self.free.len()).unwrap_or(u32::MAX)
    }

    // --- spaces ---------------------------------------------------------------------------------

    fn slot(space: SpaceId, field: usize) -> usize {
        SPACE_BASE + space.0 as usize * SPACE_WORDS + field
    }

    /// State of a space's slot.
    #[must_use]
    pub fn state(&self, space: SpaceId) -> SlotState {
        match get(self.words, Self::slot(space, 0)) {
            0 => SlotState::Free,
            1 => SlotState::Building,
            2 => SlotState::Active,
            _ => SlotState::Doomed,
        }
    }

    /// Sequence number of the fork message that made the space, while what the fork wiped is not known.
    #[must_use]
    pub fn fork_seq(&self, space: SpaceId) -> Option<u32> {
        u32::try_from(get(self.words, Self::slot(space, 2)).checked_sub(1)?).ok()
    }

    /// The shell's own word of the space (a descriptor number).
    #[must_use]
    pub fn owner_word(&self, space: SpaceId) -> u64 {
        get(self.words, Self::slot(space, 3))
    }

    /// Takes a free slot, with an empty root, in state *being built*.
    ///
    /// # Errors
    /// [`MapError::TooManySpaces`] or [`MapError::Full`].
    pub fn begin_space(
        &mut self,
        fork_seq: Option<u32>,
        owner_word: u64,
    ) -> Result<SpaceId, MapError> {
        if self.spaces().count() >= SPACES - SPARE_SLOTS {
            return Err(MapError::TooManySpaces);
        }
        let root = self.alloc()?;
        self.take_slot(fork_seq, owner_word, root, 1)
    }

    /// Takes a free slot, with no root, in state *doomed*: for a fork's child for which there is no room.
    ///
    /// # Errors
    /// [`MapError::TooManySpaces`].
    pub fn begin_doomed(&mut self, fork_seq: u32, owner_word: u64) -> Result<SpaceId, MapError> {
        self.take_slot(Some(fork_seq), owner_word, 0, 3)
    }

    fn take_slot(
        &mut self,
        fork_seq: Option<u32>,
        owner_word: u64,
        root: u32,
        state: u64,
    ) -> Result<SpaceId, MapError> {
        // The slot that was free longest: what is said late about its last owner is not taken for the new one's.
        let first = usize::from(self.next_slot);
        let space = self
            .all_slots()
            .cycle()
            .skip(first)
            .take(SPACES)
            .find(|&s| self.state(s) == SlotState::Free)
            .ok_or(MapError::TooManySpaces)?;
        set(self.words, Self::slot(space, 3), owner_word);
        set(
            self.words,
            Self::slot(space, 2),
            fork_seq.map_or(0, |s| u64::from(s) + 1),
        );
        set(self.words, Self::slot(space, 1), u64::from(root));
        set(self.words, Self::slot(space, 0), state);
        self.next_slot = space.0 + 1;
        Ok(space)
    }

    /// Something that belongs into the space had no room: a successor must not take it for whole.
    pub fn doom(&mut self, space: SpaceId) {
        set(self.words, Self::slot(space, 0), 3);
    }

    /// Forgets that a fork made the space: its own history has begun, which a successor must not wipe.
    pub fn settle_fork(&mut self, space: SpaceId) {
        set(self.words, Self::slot(space, 2), 0);
    }

    /// Makes a built space active.
    pub fn activate(&mut self, space: SpaceId) {
        set(self.words, Self::slot(space, 0), 2);
    }

    /// Forgets a space and all its entries, handing each entry to `each` (to release it).
    pub fn end_space(&mut self, space: SpaceId, mut each: impl FnMut(Entry)) {
        let root = get(self.words, Self::slot(space, 1));
        // Unreachable first: a successor must not release the same locations again.
        set(self.words, Self::slot(space, 0), 0);
        set(self.words, Self::slot(space, 1), 0);
        let Ok(root) = u32::try_from(root) else {
            return;
        };
        if root == 0 {
            return;
        }
        for i in 0..BLOCK_WORDS {
            let mid = self.pointer(root, i);
            if mid == 0 {
                continue;
            }
            for j in 0..BLOCK_WORDS {
                let leaf = self.pointer(mid, j);
                if leaf == 0 {
                    continue;
                }
                for k in 0..BLOCK_WORDS {
                    if let Ok(e) = Entry::from_word(self.word(leaf, k)) {
                        if e != Entry::Nothing {
                            each(e);
                        }
                    }
                }
                self.free.push(leaf);
            }
            self.free.push(mid);
        }
        self.free.push(root);
    }

    fn all_slots(&self) -> impl Iterator<Item = SpaceId> + Clone + use<> {
        (0..u16::MAX).take(SPACES).map(SpaceId)
    }

    /// Spaces that are active or being built.
    pub fn spaces(&self) -> impl Iterator<Item = SpaceId> + '_ {
        self.all_slots()
            .filter(|&s| self.state(s) != SlotState::Free)
    }

    // --- entries --------------------------------------------------------------------------------

    fn leaf(&self, space: SpaceId, at: SubpageIndex) -> Option<u32> {
        let root = self.root(space);
        if root == 0 || at.0 >> 36 != 0 {
            return None;
        }
        let mid = self.pointer(root, (at.0 >> 24) as usize);
        if mid == 0 {
            return None;
        }
        let leaf = self.pointer(mid, (at.0 >> 12 & 0xfff) as usize);
        (leaf != 0).then_some(leaf)
    }

    fn leaf_or_new(&mut self, space: SpaceId, at: SubpageIndex) -> Result<u32, MapError> {
        if let Some(leaf) = self.leaf(space, at) {
            return Ok(leaf);
        }
        let root = self.root(space);
        if root == 0 || at.0 >> 36 != 0 {
            return Err(MapError::BadTree);
        }
        let upper = (at.0 >> 24) as usize;
        let mut mid = self.pointer(root, upper);
        if mid == 0 {
            mid = self.alloc()?;
            self.set_word(root, upper, u64::from(mid));
        }
        let leaf = self.alloc()?;
        self.set_word(mid, (at.0 >> 12 & 0xfff) as usize, u64::from(leaf));
        Ok(leaf)
    }

    /// What the map says of a subpage.
    ///
    /// # Panics
    /// If the word is of no known kind: checked at [`Map::recover`], so this process wrote it.
    #[must_use]
    pub fn entry(&self, space: SpaceId, at: SubpageIndex) -> Entry {
        let Some(leaf) = self.leaf(space, at) else {
            return Entry::Nothing;
        };
        Entry::from_word(self.word(leaf, (at.0 & 0xfff) as usize))
            .expect("this process writes only entries of known kinds")
    }

    /// Replaces what the map says of a subpage; returns what it said before, for the caller to release.
    ///
    /// # Errors
    /// [`MapError::Full`]: nothing changed.
    pub fn replace(
        &mut self,
        space: SpaceId,
        at: SubpageIndex,
        new: Entry,
    ) -> Result<Entry, MapError> {
        let leaf = if new == Entry::Nothing {
            match self.leaf(space, at) {
                Some(l) => l,
                None => return Ok(Entry::Nothing),
            }
        } else {
            self.leaf_or_new(space, at)?
        };
        let k = (at.0 & 0xfff) as usize;
        let old = Entry::from_word(self.word(leaf, k))?;
        self.set_word(leaf, k, new.to_word());
        Ok(old)
    }

    /// The first entry at or after `from`, before `end`, that says something. Skips empty leaves, so that
    /// walking terabytes with little in them is cheap.
    #[must_use]
    pub fn next_in(
        &self,
        space: SpaceId,
        from: SubpageIndex,
        end: SubpageIndex,
    ) -> Option<(SubpageIndex, Entry)> {
        let root = self.root(space);
        let end = end.0.min(1 << 36);
        let mut at = from.0;
        while root != 0 && at < end {
            let mid = self.pointer(root, (at >> 24) as usize);
            if mid == 0 {
                at = ((at >> 24) + 1) << 24;
                continue;
            }
            let leaf = self.pointer(mid, (at >> 12 & 0xfff) as usize);
            let leaf_end = (((at >> 12) + 1) << 12).min(end);
            if leaf != 0 {
                for s in at..leaf_end {
                    let word = self.word(leaf, (s & 0xfff) as usize);
                    if word != 0 {
                        let entry = Entry::from_word(word)
                            .expect("this process writes only entries of known kinds");
                        return Some((SubpageIndex(s), entry));
                    }
                }
            }
            at = leaf_end;
        }
        None
    }

    /// Every entry of a space in `range` that says something, in address order.
    pub fn for_each_in(
        &self,
        space: SpaceId,
        range: AddrRange,
        mut each: impl FnMut(SubpageIndex, Entry),
    ) {
        let end = SubpageIndex(range.end.0.div_ceil(holo_proto::SUBPAGE_BYTES));
        let mut at = range.start.subpage();
        while let Some((found, entry)) = self.next_in(space, at, end) {
            each(found, entry);
            at = SubpageIndex(found.0 + 1);
        }
    }

    /// Every entry of every space.
    pub fn for_each_everywhere(&self, mut each: impl FnMut(SpaceId, SubpageIndex, Entry)) {
        for space in self.spaces() {
            self.for_each_in(space, AddrRange::new(0, u64::MAX), |at, e| {
                each(space, at, e)
            });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicU64;

    fn words(blocks: usize) -> Vec<AtomicU64> {
        (0..blocks * BLOCK_WORDS)
            .map(|_| AtomicU64::new(0))
            .collect()
    }

    #[test]
    fn entries_survive_a_take_over() {
        let w = words(16);
        let mut map = Map::create(&w).unwrap();
        let s = map.begin_space(Some(7), 42).unwrap();
        map.activate(s);
        let at = SubpageIndex(0x7_1234_5678);
        let kinds = [
            Entry::Stored(Location(0x0abc_def0_1234)),
            Entry::Staged(FrameId(513), 15),
            Entry::Dropping(9),
        ];
        for (i, &e) in kinds.iter().enumerate() {
            map.replace(s, SubpageIndex(at.0 + i as u64), e).unwrap();
        }
        drop(map);
        let map = Map::recover(&w).unwrap();
        assert_eq!(map.state(s), SlotState::Active);
        assert_eq!(map.fork_seq(s), Some(7));
        assert_eq!(map.owner_word(s), 42);
        for (i, &e) in kinds.iter().enumerate() {
            assert_eq!(map.entry(s, SubpageIndex(at.0 + i as u64)), e);
        }
        assert_eq!(
            map.entry(s, SubpageIndex(at.0 + 4096 * 4096)),
            Entry::Nothing
        );
        assert_eq!(map.blocks_used(), 4);
    }

    #[test]
    fn an_ended_space_gives_back_every_block_and_entry() {
        let w = words(8);
        let mut map = Map::create(&w).unwrap();
        for round in 0..20 {
            let s = map.begin_space(None, 0).unwrap();
            map.activate(s);
            let e = Entry::Stored(Location(round + 1));
            map.replace(s, SubpageIndex(5), e).unwrap();
            map.replace(s, SubpageIndex(1 << 30), e).unwrap();
            let mut seen = 0;
            map.end_space(s, |x| {
                assert_eq!(x, e);
                seen += 1;
            });
            assert_eq!(seen, 2);
            assert_eq!(map.blocks_used(), 1);
        }
    }

    #[test]
    fn a_full_map_says_so_and_changes_nothing() {
        let w = words(4);
        let mut map = Map::create(&w).unwrap();
        let s = map.begin_space(None, 0).unwrap();
        map.replace(s, SubpageIndex(0), Entry::Dropping(0)).unwrap();
        assert_eq!(
            map.replace(s, SubpageIndex(1 << 24), Entry::Dropping(0)),
            Err(MapError::Full)
        );
        assert_eq!(map.entry(s, SubpageIndex(1 << 24)), Entry::Nothing);
        assert_eq!(map.entry(s, SubpageIndex(0)), Entry::Dropping(0));
    }

    #[test]
    fn damage_is_found_at_recovery() {
        let w = words(8);
        let mut map = Map::create(&w).unwrap();
        let s = map.begin_space(None, 0).unwrap();
        map.activate(s);
        map.replace(s, SubpageIndex(3), Entry::Dropping(0)).unwrap();
        drop(map);
        for (at, bad, want) in [
            (0, 0x99, MapError::BadHeader),
            (SPACE_BASE + 1, 2, MapError::BadTree), // the root is also the middle
            (SPACE_BASE + 1, 77, MapError::BadTree),
            (BLOCK_WORDS * 3 + 3, 9 << 60, MapError::BadEntry),
        ] {
            let good = get(&w, at);
            set(&w, at, bad);
            assert_eq!(Map::recover(&w).err(), Some(want), "word {at}");
            set(&w, at, good);
        }
        assert!(Map::recover(&w).is_ok());
    }

    #[test]
    fn ranges_visit_exactly_what_is_in_them() {
        let w = words(16);
        let mut map = Map::create(&w).unwrap();
        let s = map.begin_space(None, 0).unwrap();
        map.activate(s);
        for at in [10, 11, 4095, 4096, 1 << 25] {
            map.replace(s, SubpageIndex(at), Entry::Dropping(1))
                .unwrap();
        }
        let collect = |r: AddrRange| {
            let mut v = Vec::new();
            map.for_each_in(s, r, |at, _| v.push(at.0));
            v
        };
        assert_eq!(
            collect(AddrRange::new(0, u64::MAX)),
            [10, 11, 4095, 4096, 1 << 25]
        );
        assert_eq!(collect(AddrRange::new(11 * 4096, 4096 * 4096)), [11, 4095]);
        assert!(collect(AddrRange::new(12 * 4096, 13 * 4096)).is_empty());
    }
}
