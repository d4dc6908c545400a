//! holo's pager.
pub mod core;
pub mod drive;
pub mod shell;
pub mod store;
pub mod sys;
