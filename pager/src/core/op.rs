//! What the core asks of the world, and what the world answers.
//!
//! The core never calls anything. [`Core::next`](super::Core::next) hands out one [`Op`]; whoever drives it
//! performs the operation (on the kernel, or on a simulated one) and returns the [`Outcome`] before it asks
//! for the next. What comes on its own time arrives as an [`Input`]. Operations name buffers by
//! [`FrameId`]; they carry no page bytes.

use holo_proto::{AddrRange, PAGE_SUBPAGES, PageIndex, SpaceId, SubpageIndex, SubpageMask};

use super::map::FrameId;
use crate::store::api::{Completion, Location, Ticket};

/// A moment on the monotonic clock, in nanoseconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Default)]
pub struct Nanos(pub u64);

impl Nanos {
    /// This moment plus `ns` nanoseconds.
    #[must_use]
    pub fn after(self, ns: u64) -> Self {
        Self(self.0.saturating_add(ns))
    }
}

/// Where installed bytes come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// A frame, from this subpage of it on.
    Frame(FrameId, usize),
    /// Zeros.
    Zeros,
}

/// What a ring request asks the kernel to do, in the target's own address space.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Advice {
    /// `MADV_FREE`: may drop while clean.
    Free,
    /// `MADV_POPULATE_WRITE`: make present and dirty. Undoes [`Advice::Free`] without touching content.
    Populate,
}

/// One operation. Performed at once; the ring requests and store transfers that some of them begin end
/// later, as an [`Input`].
#[expect(
    clippy::large_enum_variant,
    reason = "one operation lives at a time, on the stack; a box would be an allocation for each fault"
)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Op {
    /// Reads waiting messages into the journal. Answer: [`Outcome::Events`].
    ReadEvents {
        /// Whose.
        space: SpaceId,
    },
    /// Installs pages (`UFFDIO_COPY`), wakes nobody.
    Copy {
        /// Where.
        space: SpaceId,
        /// First subpage.
        at: SubpageIndex,
        /// The bytes.
        source: Source,
        /// How many subpages.
        subpages: usize,
    },
    /// Installs the shared zero page (`UFFDIO_ZEROPAGE`), wakes nobody.
    Zero {
        /// Where.
        space: SpaceId,
        /// Whole subpages.
        range: AddrRange,
    },
    /// Write-protects what is present.
    Protect {
        /// Where.
        space: SpaceId,
        /// Whole subpages.
        range: AddrRange,
    },
    /// Lifts the protection and wakes writers.
    Unprotect {
        /// Where.
        space: SpaceId,
        /// Whole subpages.
        range: AddrRange,
    },
    /// Wakes faulting threads: they try again.
    Wake {
        /// Where.
        space: SpaceId,
        /// Whole subpages.
        range: AddrRange,
    },
    /// Reads the target's memory into a frame. Answer: [`Outcome::Subpages`], short at a missing subpage.
    Read {
        /// Where.
        space: SpaceId,
        /// First subpage.
        at: SubpageIndex,
        /// How many.
        subpages: usize,
        /// Into this frame,
        frame: FrameId,
        /// from this subpage of it on.
        first: usize,
    },
    /// Compares two frames. Answer: [`Outcome::Mask`], the subpages that differ.
    Compare {
        /// One.
        a: FrameId,
        /// The other.
        b: FrameId,
        /// Which subpages.
        mask: SubpageMask,
    },
    /// Queues a request on the target's ring. It ends as [`Input::RingDone`]. [`Outcome::Full`]: no room now.
    Advise {
        /// Where.
        space: SpaceId,
        /// What.
        advice: Advice,
        /// Whole subpages.
        range: AddrRange,
        /// Returned with the result.
        tag: u64,
    },
    /// Makes the ring run what is queued.
    Kick {
        /// Whose.
        space: SpaceId,
    },
    /// `MADV_PAGEOUT` from outside over [`Core::pageout_ranges`](super::Core::pageout_ranges).
    Pageout {
        /// Where.
        space: SpaceId,
    },
    /// Looks at pagemap. Answer: [`Outcome::Look`].
    Look {
        /// Where.
        space: SpaceId,
        /// Which page.
        page: PageIndex,
    },
    /// Finds the first present run in a range. Answer: [`Outcome::Found`].
    FindPresent {
        /// Where.
        space: SpaceId,
        /// Search here.
        range: AddrRange,
    },
    /// Begins to store a frame's subpages.
    Put {
        /// Names the transfer.
        ticket: Ticket,
        /// The bytes.
        frame: FrameId,
        /// Which subpages.
        mask: SubpageMask,
    },
    /// Begins to fetch subpages into a frame.
    Get {
        /// Names the transfer.
        ticket: Ticket,
        /// Into here.
        frame: FrameId,
        /// From there, by subpage of the frame.
        wanted: [Option<Location>; PAGE_SUBPAGES],
    },
    /// Registers a mapping for missing and write-protect faults.
    Register {
        /// Where.
        space: SpaceId,
        /// The whole mapping.
        range: AddrRange,
    },
    /// Gives a range back to the kernel.
    Unregister {
        /// Where.
        space: SpaceId,
        /// Whole subpages.
        range: AddrRange,
    },
    /// Lists robust-list heads of threads that were not listed before. Answer: [`Outcome::Heads`].
    Threads {
        /// Whose.
        space: SpaceId,
        /// Those that were listed before as well: what was known of some is forgotten.
        anew: bool,
    },
    /// How much of the address space is pinned for long (`VmPin` in `/proc/PID/status`)?
    Pins {
        /// Whose.
        space: SpaceId,
    },
    /// Asks that present pages, which need not be writable, be made dirty: a byte of each is read and written back
    /// while all threads of the process are stopped, so that nothing it writes comes in between. It ends as
    /// [`Input::Redirtied`].
    NeedRedirty {
        /// Where.
        space: SpaceId,
        /// Which page,
        page: PageIndex,
        /// and which of its subpages.
        mask: SubpageMask,
        /// Returned with the answer.
        ticket: Ticket,
    },
    /// Asks for a ring in the target. It ends as [`Input::RingReady`] or [`Input::RingRefused`].
    NeedRing {
        /// Whose.
        space: SpaceId,
    },
    /// Asks that all threads be stopped at once, for an instant. It ends as [`Input::Quiesced`].
    NeedQuiesce {
        /// Whose.
        space: SpaceId,
        /// Returned with the answer.
        count: u64,
        /// For some milliseconds, in which nothing changes its mappings.
        for_calm: bool,
    },
    /// Announces a fork's child. The shell finds its process and answers with [`Input::Known`].
    Child {
        /// The parent.
        parent: SpaceId,
        /// The child.
        space: SpaceId,
        /// Its userfaultfd, as a descriptor number of the pager.
        fd: u32,
    },
    /// A thread waits for a page of a space whose process is not known: a hint for the shell's search.
    Waits {
        /// Where.
        space: SpaceId,
        /// The thread, as its own pid namespace counts.
        thread: u32,
    },
    /// The space is over: its descriptors can be closed.
    Closed {
        /// Which.
        space: SpaceId,
        /// Whether everything was made resident first (a detach), or the process is gone.
        detached: bool,
    },
    /// Stops (kills) the process, with an explanation: its memory cannot be made right.
    Stop {
        /// Whose process.
        space: SpaceId,
        /// Why.
        why: StopReason,
    },
}

/// Why a process cannot go on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StopReason {
    /// A stored page came back damaged.
    Damaged {
        /// The page.
        at: SubpageIndex,
    },
    /// A stored page is not to be had.
    Lost {
        /// The page.
        at: SubpageIndex,
    },
    /// The kernel refused an operation in a way that no rule covers.
    Kernel {
        /// The page.
        at: SubpageIndex,
        /// Its errno.
        errno: i32,
    },
    /// A table is full (the map, the spaces).
    TooLarge,
    /// What the kernel may drop could not be made dirty: nobody may write there, and for us the kernel makes no
    /// exception.
    NotDirtied {
        /// Where.
        at: SubpageIndex,
    },
    /// What the kernel says contradicts the map (a registered mapping is not registered).
    Contradiction {
        /// Where.
        at: SubpageIndex,
    },
}

/// What became of an [`Op`].
#[expect(clippy::large_enum_variant, reason = "as for [`Op`]")]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// All of it is done.
    Done,
    /// The first so many subpages are done, then it stopped.
    Partial(usize),
    /// Nothing done: an event waits to be read, or its waiter has not yet run on (`EAGAIN`).
    EventsPending,
    /// Nothing done: the range leaves the mapping (`ENOENT`).
    Edge,
    /// Nothing done: a page is already there (`EEXIST`).
    AlreadyThere,
    /// The address space is gone (`ESRCH`).
    Gone,
    /// No memory for it now (`ENOMEM`).
    NoMemory,
    /// A queue is full: again later.
    Full,
    /// Refused for a reason that no rule covers, with its errno.
    Refused(i32),
    /// Messages are in the journal.
    Events {
        /// How many; fewer than its slots: none waits.
        count: usize,
        /// One bit for each: it says that a range was unmapped or left, and just now nothing at all was mapped
        /// there. Cleared where that is not known.
        gone: u64,
    },
    /// So many subpages were read.
    Subpages(usize),
    /// Subpages of a page.
    Mask(SubpageMask),
    /// What pagemap says.
    Look(PageLook),
    /// The first present run, if any.
    Found(Option<AddrRange>),
    /// Robust-list heads.
    Heads(Heads),
    /// So many bytes of the address space are pinned for long; [`u64::MAX`] if that cannot be told.
    Pinned(u64),
}

/// What pagemap says of one page's subpages.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PageLook {
    /// In memory.
    pub present: SubpageMask,
    /// The shared zero page.
    pub zero: SubpageMask,
    /// In swap.
    pub swapped: SubpageMask,
    /// A file's or shared memory's page.
    pub file: SubpageMask,
    /// Mapped by this address space alone.
    pub exclusive: SubpageMask,
}

/// Most heads that one [`Op::Threads`] returns.
pub const HEADS: usize = 64;

/// Addresses that the kernel writes with faults forbidden, of threads not seen before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Heads {
    /// The addresses.
    pub at: [holo_proto::Addr; HEADS],
    /// How many are valid.
    pub len: usize,
    /// There are more: ask again.
    pub more: bool,
}

/// The result of a ring request that the kernel never began (`-ECANCELED`).
pub const NEVER_RAN: i32 = -125;

/// The result of a ring request that found parts of its range unmapped, and did the rest (`-ENOMEM`). Also of one
/// whose mapping went away between its message and its act: that one stopped there.
pub const HOLES: i32 = -12;

/// The results of a populate where the process may not write (`-EINVAL`; `-EFAULT` where a fault is refused).
pub const NOT_WRITABLE: [i32; 2] = [-22, -14];

/// What happens on its own time.
#[expect(clippy::large_enum_variant, reason = "as for [`Op`]")]
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Input {
    /// A space's descriptor can be read.
    Readable(SpaceId),
    /// A ring request ended, with the kernel's result.
    RingDone {
        /// Whose ring.
        space: SpaceId,
        /// The request.
        tag: u64,
        /// 0 or a negative errno.
        result: i32,
    },
    /// Nothing is outstanding on a ring (said once after a take-over).
    RingQuiet {
        /// Whose ring.
        space: SpaceId,
        /// Requests that were ever put into it, modulo 2^32; none if it is lost.
        requests: Option<u32>,
    },
    /// The space has a ring.
    RingReady(SpaceId),
    /// The space can have no ring: it is not evicted from.
    RingRefused(SpaceId),
    /// The ring has ended with the process that it was made in, while its address space lives on in
    /// another one. Every request has been answered before: with [`NEVER_RAN`] if it never ran.
    RingLost(SpaceId),
    /// A store transfer ended.
    Store(Completion),
    /// A mapping is to be registered. Ordered behind every event read before.
    Adopt {
        /// Where.
        space: SpaceId,
        /// The whole mapping.
        range: AddrRange,
    },
    /// The kernel has this range registered to us already (after a take-over, or in a fork's child).
    Registered {
        /// Where.
        space: SpaceId,
        /// The whole mapping.
        range: AddrRange,
    },
    /// A range must never be paged (again).
    Never {
        /// Where.
        space: SpaceId,
        /// What.
        range: AddrRange,
    },
    /// The process of a fork's child, or of a predecessor's space, is known, and all is said that its mappings tell:
    /// what the fork wiped, and what is registered.
    Known(SpaceId),
    /// Nothing of this process is registered, and pages of it were away when a predecessor died: they read as zeros, unless
    /// the process has unmapped them meanwhile.
    NothingRegistered(SpaceId),
    /// A range of a fork's child that the fork wiped, where it was when the shell looked.
    Wiped {
        /// The child.
        space: SpaceId,
        /// Where.
        range: AddrRange,
    },
    /// Every system call that ran when [`Op::NeedQuiesce`] was asked for has ended.
    Quiesced {
        /// Whose.
        space: SpaceId,
        /// The operation's count.
        count: u64,
    },
    /// What became of an [`Op::NeedRedirty`].
    Redirtied {
        /// Whose.
        space: SpaceId,
        /// The operation's.
        ticket: Ticket,
        /// What is dirty now. Not where there is no page, or none that even we may write. `None`: the process could
        /// not be stopped.
        done: Option<SubpageMask>,
    },
    /// The space's pageable memory in RAM, as the kernel counts it.
    Measured {
        /// Whose.
        space: SpaceId,
        /// Bytes.
        bytes: u64,
    },
    /// The budget of all spaces together.
    Budget {
        /// Bytes.
        bytes: u64,
    },
    /// Make everything resident and let go.
    Detach(SpaceId),
    /// The process is gone.
    Exited(SpaceId),
}

/// What to do next.
#[expect(clippy::large_enum_variant, reason = "as for [`Op`]")]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Next {
    /// Perform this and complete it.
    Op(Op),
    /// Nothing to do before this moment (or an input), if any.
    Idle(Option<Nanos>),
}
