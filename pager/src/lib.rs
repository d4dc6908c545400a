//! holo's pager.
pub mod store;
