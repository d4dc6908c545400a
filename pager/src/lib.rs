//! holo's pager.
pub mod store;
pub mod sys;
