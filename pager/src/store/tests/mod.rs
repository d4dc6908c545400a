//! Tests of the embedded store as a whole; those of its parts are beside them.

mod arenas;
pub(in crate::store) mod content;
mod crash;
mod damage;
mod format;
mod killed;
mod model;
mod recovery;
mod space;
mod traits;
