//! holo's pager: keeps the memory of unmodified processes within a budget, and the rest of it in a store.
//!
//! The kernel is asked through userfaultfd; a page that is not in memory comes back when the process touches it.
//!
//! - [`mod@core`]: every decision about every page, and no I/O; a state machine that takes inputs and gives operations.
//! - [`drive`]: the loop that drives a core against the kernel, or against a simulated one.
//! - [`shell`]: guardian, warden, pager and successor; the processes, and what a command line starts.
//! - [`store`]: the bytes of pages that left memory, compressed and checked, where a successor finds them.
//! - [`sys`]: system calls as small safe types; all `unsafe` of this crate.

pub mod core;
pub mod drive;
pub mod shell;
pub mod store;
pub mod sys;
