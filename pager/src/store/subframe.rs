//! How one 4 KiB subpage becomes a subframe that decodes alone, and back.
//!
//! | kind | stored bytes | when |
//! |---|---|---|
//! | 1 filled | one 64-bit word, 8 bytes as they are in memory | the subpage repeats that word |
//! | 2 LZ4 | one LZ4 block, at most 3,584 bytes | it saves at least an eighth |
//! | 3 plain | the 4,096 bytes | otherwise |
//!
//! A subpage of zeros has no subframe. An eighth is asked of LZ4 because decoding costs a fault about as
//! much as checking the hash does: a few saved bytes are not worth it.

use holo_proto::{PAGE_SUBPAGES, SUBPAGE_BYTES, SubpageMask};
use lz4_flex::block::{
    CompressTable, compress_into_with_table, decompress_into, get_maximum_output_size,
};

use super::api::PageBytes;
use super::blob::array;

/// Bytes of a subpage, as a length in memory.
#[expect(clippy::cast_possible_truncation, reason = "4096 fits")]
pub(super) const SUBPAGE: usize = SUBPAGE_BYTES as usize;
/// The longest LZ4 block that is worth its decoding.
const LZ4_BYTES_MAX: usize = SUBPAGE / 8 * 7;
/// Bytes of the word that a filled subpage repeats.
const WORD: usize = 8;

/// How a subframe's stored bytes stand for the subpage.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// One word, repeated.
    Filled,
    /// An LZ4 block.
    Lz4,
    /// The bytes themselves.
    Plain,
}

impl Kind {
    /// Its number in the format.
    pub(super) fn number(self) -> u8 {
        match self {
            Self::Filled => 1,
            Self::Lz4 => 2,
            Self::Plain => 3,
        }
    }

    /// The kind with this number.
    pub(super) fn numbered(number: u8) -> Option<Self> {
        match number {
            1 => Some(Self::Filled),
            2 => Some(Self::Lz4),
            3 => Some(Self::Plain),
            _ => None,
        }
    }
}

/// One encoded subpage.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Subframe<'a> {
    /// What the bytes are.
    pub(super) kind: Kind,
    /// What is stored.
    pub(super) bytes: &'a [u8],
}

/// Fills `subpage` with what the subframe stands for; false when it stands for nothing of 4 KiB.
pub(super) fn decode(frame: Subframe<'_>, subpage: &mut [u8]) -> bool {
    match frame.kind {
        Kind::Filled if frame.bytes.len() == WORD => {
            for word in subpage.chunks_exact_mut(WORD) {
                word.copy_from_slice(frame.bytes);
            }
            true
        }
        Kind::Plain if frame.bytes.len() == SUBPAGE => {
            subpage.copy_from_slice(frame.bytes);
            true
        }
        Kind::Lz4 => decompress_into(frame.bytes, subpage).is_ok_and(|n| n == SUBPAGE),
        Kind::Filled | Kind::Plain => false,
    }
}

/// The word that `subpage` repeats from end to end, if it does.
fn repeated_word(subpage: &[u8]) -> Option<&[u8]> {
    // Eight words at a time without a branch: four times as fast as one by one.
    const STEP: usize = 8 * WORD;
    let word = &subpage[..WORD];
    let first = u64::from_le_bytes(array(word));
    subpage
        .chunks_exact(STEP)
        .all(|step| {
            let differences = step
                .chunks_exact(WORD)
                .map(|w| u64::from_le_bytes(array(w)) ^ first);
            differences.fold(0, |all, d| all | d) == 0
        })
        .then_some(word)
}

/// Turns pages into subframes, in memory of its own that is allocated once.
pub(super) struct Encoder {
    table: CompressTable,
    /// LZ4 blocks, one behind the other; room for fifteen that pay and one attempt.
    blocks: Vec<u8>,
}

impl Encoder {
    /// An encoder, with all the memory that it will use (about 72 KiB).
    pub(super) fn new() -> Self {
        let room = (PAGE_SUBPAGES - 1) * LZ4_BYTES_MAX + get_maximum_output_size(SUBPAGE);
        Self {
            table: CompressTable::default(),
            blocks: vec![0; room],
        }
    }

    /// The subframes of the subpages of `page` that are in `mask` and not all zero.
    pub(super) fn encode<'a>(
        &'a mut self,
        page: &'a PageBytes,
        mask: SubpageMask,
    ) -> [Option<Subframe<'a>>; PAGE_SUBPAGES] {
        let mut frames = [None; PAGE_SUBPAGES];
        let mut block_lengths = [0; PAGE_SUBPAGES];
        let mut used = 0;
        for i in mask.iter() {
            let bytes = &page[i * SUBPAGE..][..SUBPAGE];
            if let Some(word) = repeated_word(bytes) {
                frames[i] = word.iter().any(|&b| b != 0).then_some(Subframe {
                    kind: Kind::Filled,
                    bytes: word,
                });
                continue;
            }
            frames[i] = Some(Subframe {
                kind: Kind::Plain,
                bytes,
            });
            let room = &mut self.blocks[used..];
            // It cannot fail: there is room for the worst of blocks.
            if let Ok(len @ 1..=LZ4_BYTES_MAX) =
                compress_into_with_table(bytes, room, &mut self.table)
            {
                block_lengths[i] = len;
                used += len;
            }
        }
        // The blocks can be lent out only now that no more are made.
        let mut blocks = &self.blocks[..used];
        for (frame, len) in frames.iter_mut().zip(block_lengths) {
            if len > 0 {
                let (bytes, rest) = blocks.split_at(len);
                blocks = rest;
                *frame = Some(Subframe {
                    kind: Kind::Lz4,
                    bytes,
                });
            }
        }
        frames
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::tests::content::{Content, page_of};

    fn kinds(contents: &[Content]) -> Vec<Option<Kind>> {
        let page = page_of(contents);
        let mut encoder = Encoder::new();
        let frames = encoder.encode(&page, SubpageMask::ALL);
        for (i, frame) in frames.iter().enumerate() {
            let mut back = [0xee; SUBPAGE];
            if let Some(frame) = frame {
                assert!(decode(*frame, &mut back));
                assert_eq!(back, page[i * SUBPAGE..][..SUBPAGE], "subpage {i}");
            }
        }
        frames[..contents.len()]
            .iter()
            .map(|f| f.map(|f| f.kind))
            .collect()
    }

    #[test]
    fn each_content_gets_the_kind_that_pays() {
        assert_eq!(
            kinds(&[
                Content::Zero,
                Content::Filled(1),
                Content::Filled(0xabab_abab_abab_abab),
                Content::Text(3),
                Content::Noise(4),
            ]),
            [
                None,
                Some(Kind::Filled),
                Some(Kind::Filled),
                Some(Kind::Lz4),
                Some(Kind::Plain)
            ]
        );
    }

    #[test]
    fn a_page_of_sixteen_compressible_subpages_fits_the_scratch() {
        let contents: Vec<_> = (0..16).map(Content::HalfNoise).collect();
        assert!(kinds(&contents).iter().all(|k| *k == Some(Kind::Lz4)));
    }

    #[test]
    fn a_page_of_noise_fits_the_scratch() {
        let contents: Vec<_> = (0..16).map(Content::Noise).collect();
        assert!(kinds(&contents).iter().all(|k| *k == Some(Kind::Plain)));
    }

    #[test]
    fn subpages_outside_the_mask_are_not_encoded() {
        let page = page_of(&[Content::Noise(1), Content::Noise(2)]);
        let mut encoder = Encoder::new();
        let frames = encoder.encode(&page, SubpageMask::one(1));
        assert!(frames[0].is_none() && frames[1].is_some());
    }

    #[test]
    fn lengths_that_cannot_be_are_refused() {
        let mut out = [0; SUBPAGE];
        for (kind, len) in [(Kind::Filled, 7), (Kind::Plain, 4095), (Kind::Lz4, 0)] {
            let bytes = &[0; SUBPAGE][..len];
            assert!(!decode(Subframe { kind, bytes }, &mut out));
        }
    }
}
