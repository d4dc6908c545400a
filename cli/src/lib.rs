//! What the two command lines share: sizes, and running a command under the pager.

#![forbid(unsafe_code)]

pub mod args;
pub mod attach;
pub mod run;
pub mod size;
