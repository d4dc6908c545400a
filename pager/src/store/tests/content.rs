//! What the test pages hold.

use holo_proto::PAGE_SUBPAGES;

use crate::store::api::PageBytes;
use crate::store::subframe::SUBPAGE;

/// What one subpage holds. The numbers make two of a kind differ.
#[derive(Clone, Copy, Debug)]
pub(in crate::store) enum Content {
    /// Nothing but zeros.
    Zero,
    /// One word, repeated.
    Filled(u64),
    /// Lines that LZ4 makes much smaller.
    Text(u64),
    /// Just worth LZ4.
    HalfNoise(u64),
    /// Not worth LZ4.
    Noise(u64),
    /// Zeros and one byte.
    AlmostZero(u16),
}

/// A deterministic stream of bytes (splitmix64).
pub(in crate::store) fn noise(seed: u64) -> impl Iterator<Item = u8> {
    let mut state = seed;
    std::iter::from_fn(move || {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = state;
        z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        Some((z ^ z >> 31).to_le_bytes())
    })
    .flatten()
}

impl Content {
    /// The 4 KiB.
    pub(in crate::store) fn bytes(self) -> Vec<u8> {
        let mut out = match self {
            Self::Zero => Vec::new(),
            Self::Filled(word) => word.to_le_bytes().repeat(SUBPAGE / 8),
            Self::Text(n) => (n..)
                .flat_map(|i| format!("key-{i}: value of key {i}\n").into_bytes())
                .take(SUBPAGE)
                .collect(),
            Self::HalfNoise(n) => noise(n).take(SUBPAGE / 32 * 27).collect(),
            Self::Noise(n) => noise(!n).take(SUBPAGE).collect(),
            Self::AlmostZero(at) => {
                let mut out = vec![0; usize::from(at) % SUBPAGE];
                out.push(1);
                out
            }
        };
        out.resize(SUBPAGE, 0);
        out
    }
}

/// A page with these subpages at its front and zeros behind.
pub(in crate::store) fn page_of(contents: &[Content]) -> Box<PageBytes> {
    let mut page = vec![0; PAGE_SUBPAGES * SUBPAGE];
    for (content, subpage) in contents.iter().zip(page.chunks_exact_mut(SUBPAGE)) {
        subpage.copy_from_slice(&content.bytes());
    }
    page.into_boxed_slice().try_into().unwrap()
}
