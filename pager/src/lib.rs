//! holo's pager: keeps the memory of unmodified processes within a budget, and the rest of it in a store.
//!
//! The kernel is asked through userfaultfd; a page that is not in memory comes back when the process touches it.
//! [`core`] decides, [`sys`] calls the kernel, [`store`] keeps what left, [`drive`] is the loop over the first with
//! whatever performs its operations, and [`shell`] makes processes of all that. Only [`sys`] has `unsafe`. The
//! command lines and the simulation are built on this crate.

/// Every decision about every page, and no I/O: a state machine that takes inputs and gives operations.
pub mod core;
/// The loop that drives a core against the kernel, or against a simulated one.
pub mod drive;
/// Guardian, warden, pager and successor: the processes, and what a command line starts.
pub mod shell;
/// The bytes of pages that left memory: compressed, checked, in memory that a successor takes over.
pub mod store;
/// System calls as small safe types; all `unsafe` of this crate.
pub mod sys;
