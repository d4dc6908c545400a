//! holo's pager.
pub mod core;
pub mod drive;
pub mod store;
pub mod sys;
