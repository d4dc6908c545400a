//! What a failed kernel call means for the pager.
//!
//! An errno is turned into a meaning here, once, at the boundary. Each variant says whether the
//! target changed, because every answer in the page state machine depends on it.

/// Why a userfaultfd call did not do what was asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum UffdError {
    /// The address space is gone; nothing can be done to it any more (ESRCH).
    #[error("the address space is gone")]
    Gone,
    /// Nothing was done: a fork, remap, remove or unmap is under way (EAGAIN without progress). Read all
    /// events and decide again. The process that made the event has to run before this ends.
    #[error("an event of the process has to be read first")]
    EventsPending,
    /// The range is not wholly inside one mapping that this descriptor serves (ENOENT). A copy changed
    /// nothing; a change of protection may have been made up to the edge.
    #[error("the range crosses the edge of a served mapping")]
    EdgeOfMapping,
    /// The first subpage is present; nothing was done (EEXIST).
    #[error("a page is there already")]
    AlreadyThere,
    /// So many bytes at the start were installed, then it stopped; the next call says why (EAGAIN with
    /// progress). The installed part was woken if waking was asked for.
    #[error("only the first {0} bytes were installed")]
    Partial(u64),
    /// No memory, or the process has as many mappings as it may have; nothing was done (ENOMEM).
    #[error("the kernel has no memory for it, or the process no room for one more mapping")]
    NoMemory,
    /// Another userfaultfd serves a part of the range; nothing was done (EBUSY).
    #[error("another userfaultfd serves a part of the range")]
    Busy,
    /// The rights are missing; nothing was done (EPERM, EACCES).
    #[error("not permitted")]
    Denied,
    /// The kernel lacks a feature that was asked for, the descriptor had its handshake before, or the
    /// range holds a mapping that userfaultfd cannot serve; nothing was done (EINVAL).
    #[error("this kernel, descriptor or mapping does not support it")]
    Unsupported,
    /// An errno that has no meaning here, with the call that gave it.
    #[error("{1} failed with errno {0}")]
    Unexpected(i32, &'static str),
}

impl UffdError {
    /// The meaning of `errno` after a call that made no progress.
    pub(super) fn of(errno: i32, op: &'static str) -> Self {
        match errno {
            libc::ESRCH => Self::Gone,
            libc::EAGAIN => Self::EventsPending,
            libc::ENOENT => Self::EdgeOfMapping,
            libc::EEXIST => Self::AlreadyThere,
            libc::ENOMEM => Self::NoMemory,
            libc::EBUSY => Self::Busy,
            libc::EPERM | libc::EACCES => Self::Denied,
            libc::EINVAL => Self::Unsupported,
            other => Self::Unexpected(other, op),
        }
    }
}

/// Why a target's memory could not be read or written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MemError {
    /// The first byte is in no resident subpage, or in no mapping (EIO).
    #[error("the first byte is not resident")]
    NotResident,
    /// The address space is gone.
    #[error("the address space is gone")]
    Gone,
    /// The rights are missing (EPERM, EACCES).
    #[error("not permitted")]
    Denied,
    /// An errno that has no meaning here, with the call that gave it.
    #[error("{1} failed with errno {0}")]
    Unexpected(i32, &'static str),
}

impl MemError {
    pub(super) fn of(errno: i32, op: &'static str) -> Self {
        match errno {
            libc::EIO => Self::NotResident,
            libc::ESRCH | libc::ENOENT => Self::Gone,
            libc::EPERM | libc::EACCES => Self::Denied,
            other => Self::Unexpected(other, op),
        }
    }
}

/// Why advice about another process's memory was refused. Part of the range may have been walked all
/// the same: look at the pagemap.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AdviseError {
    /// The process is gone (ESRCH).
    #[error("the process is gone")]
    Gone,
    /// The rights are missing: ptrace access and CAP_SYS_NICE are needed (EPERM, EACCES).
    #[error("not permitted")]
    Denied,
    /// A part of the range is in no mapping; the rest was walked (ENOMEM).
    #[error("a part of the range is in no mapping")]
    Unmapped,
    /// A mapping in the range is locked, huge or a device's, or the kernel lacks the advice (EINVAL).
    #[error("a mapping in the range does not take this advice")]
    NotTaken,
    /// An errno that has no meaning here, with the call that gave it.
    #[error("{1} failed with errno {0}")]
    Unexpected(i32, &'static str),
}

impl AdviseError {
    pub(super) fn of(errno: i32, op: &'static str) -> Self {
        match errno {
            libc::ESRCH => Self::Gone,
            libc::EPERM | libc::EACCES => Self::Denied,
            libc::ENOMEM => Self::Unmapped,
            libc::EINVAL => Self::NotTaken,
            other => Self::Unexpected(other, op),
        }
    }
}

/// Why the kernel did not say what is mapped at a place.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MapsError {
    /// The address space is gone (ESRCH).
    #[error("the address space is gone")]
    Gone,
    /// The kernel lacks the call (ENOTTY).
    #[error("this kernel cannot be asked about a single mapping")]
    Unsupported,
    /// An errno that has no meaning here, with the call that gave it.
    #[error("{1} failed with errno {0}")]
    Unexpected(i32, &'static str),
}

impl MapsError {
    pub(super) fn of(errno: i32, op: &'static str) -> Self {
        match errno {
            libc::ESRCH => Self::Gone,
            libc::ENOTTY => Self::Unsupported,
            other => Self::Unexpected(other, op),
        }
    }
}
