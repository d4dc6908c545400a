//! Where pages go when they leave local memory.
pub mod api;
