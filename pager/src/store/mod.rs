//! Where pages go when they leave local memory.

#![forbid(unsafe_code)]

#[allow(
    clippy::cast_possible_truncation,
    clippy::large_enum_variant,
    reason = "64 KiB fits a length; a boxed completion would be an allocation on the fault path"
)]
pub mod api;
mod arena;
mod blob;
mod classes;
mod embedded;
mod location;
mod recover;
mod shared;
mod slots;
mod subframe;
mod superblock;
#[cfg(test)]
mod tests;

pub use arena::{Arena, HeapArena};
pub use embedded::{COMPLETIONS_MAX, EmbeddedStore};
