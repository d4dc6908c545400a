//! holo's test tools.
