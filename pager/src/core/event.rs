//! Messages of a userfaultfd, decoded from the journal's words (`struct uffd_msg`, userfaultfd(2)).

use holo_proto::{Addr, AddrRange};

/// Words of one message.
pub const EVENT_WORDS: usize = 4;

/// One message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// A thread waits for a page.
    Fault {
        /// Where it faulted.
        at: Addr,
        /// It wanted to write.
        write: bool,
        /// The page is there, but write-protected.
        protect: bool,
        /// The thread, in its own pid namespace.
        thread: u32,
    },
    /// The process forked; the child's userfaultfd is this descriptor of the reader.
    Fork {
        /// Descriptor number.
        fd: u32,
    },
    /// Pages moved (`mremap`); the kernel has already done it.
    Remap {
        /// Old start.
        from: Addr,
        /// New start.
        to: Addr,
        /// Bytes.
        len: u64,
    },
    /// Pages are about to be dropped (`madvise`); the kernel does it after this was read.
    Remove(AddrRange),
    /// A range was unmapped.
    Unmap(AddrRange),
}

const FAULT: u64 = 0x12;
const FORK: u64 = 0x13;
const REMAP: u64 = 0x14;
const REMOVE: u64 = 0x15;
const UNMAP: u64 = 0x16;

impl Event {
    /// Decodes a message; `None` for a kind that was not asked for.
    #[must_use]
    pub fn decode(w: [u64; EVENT_WORDS]) -> Option<Self> {
        Some(match w[0] & 0xff {
            FAULT => Self::Fault {
                write: w[1] & 1 != 0,
                protect: w[1] & 2 != 0,
                at: Addr(w[2]),
                thread: (w[3] & 0xffff_ffff) as u32,
            },
            FORK => Self::Fork {
                fd: (w[1] & 0xffff_ffff) as u32,
            },
            REMAP => Self::Remap {
                from: Addr(w[1]),
                to: Addr(w[2]),
                len: w[3],
            },
            REMOVE => Self::Remove(AddrRange::new(w[1], w[2])),
            UNMAP => Self::Unmap(AddrRange::new(w[1], w[2])),
            _ => return None,
        })
    }

    /// The range that it says was unmapped, or moved away from.
    #[must_use]
    pub fn left(self) -> Option<AddrRange> {
        match self {
            Self::Unmap(range) => Some(range),
            Self::Remap { from, len, .. } => Some(AddrRange {
                start: from,
                end: from.offset(len),
            }),
            Self::Fault { .. } | Self::Fork { .. } | Self::Remove(_) => None,
        }
    }

    /// Encodes a message as the kernel would (for simulations).
    #[must_use]
    pub fn encode(self) -> [u64; EVENT_WORDS] {
        match self {
            Self::Fault {
                at,
                write,
                protect,
                thread,
            } => [
                FAULT,
                u64::from(write) | u64::from(protect) << 1,
                at.0,
                u64::from(thread),
            ],
            Self::Fork { fd } => [FORK, u64::from(fd), 0, 0],
            Self::Remap { from, to, len } => [REMAP, from.0, to.0, len],
            Self::Remove(r) => [REMOVE, r.start.0, r.end.0, 0],
            Self::Unmap(r) => [UNMAP, r.start.0, r.end.0, 0],
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_event_survives_encoding() {
        for e in [
            Event::Fault {
                at: Addr(0x7f00_0000_1234),
                write: true,
                protect: true,
                thread: 77,
            },
            Event::Fault {
                at: Addr(1),
                write: false,
                protect: false,
                thread: 0,
            },
            Event::Fork { fd: 9 },
            Event::Remap {
                from: Addr(0x1000),
                to: Addr(0x5000),
                len: 0x3000,
            },
            Event::Remove(AddrRange::new(0x1000, 0x2000)),
            Event::Unmap(AddrRange::new(0x1000, 0x2000)),
        ] {
            assert_eq!(Event::decode(e.encode()), Some(e));
        }
        assert_eq!(Event::decode([0; 4]), None);
        assert_eq!(Event::decode([0x99, 0, 0, 0]), None);
    }
}
