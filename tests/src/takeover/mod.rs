//! The take-over suite: pagers die at every named point and at random moments, under a program that
//! checks every word of its memory; where nobody can take over, the program is killed and told why.
//!
//! [`points`] has one case for each crash point, [`panics`] deaths of a fault of the pager's own, [`kills`] random
//! moments, [`orphaned`] guardians and wardens that die as well, [`attached`] the deaths around `holo attach` and `holo detach`. The program is
//! `tests/takeover/load.c`, started by [`load`]; [`tree`] finds the processes that are to die, by their
//! token, so that no other session's are hit.

pub mod attached;
pub mod kills;
pub mod load;
pub mod orphaned;
pub mod panics;
pub mod points;
pub mod traces;
pub mod tree;

use std::path::Path;

use crate::torture::harness::suite::Case;

/// All cases; the folder takes the compiled program.
#[must_use]
pub fn all(folder: &Path) -> Vec<Case> {
    let mut cases = points::cases(folder);
    cases.extend(panics::cases(folder));
    cases.extend(kills::cases(folder));
    cases.extend(orphaned::cases(folder));
    cases.extend(attached::cases(folder));
    cases
}
