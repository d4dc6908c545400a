//! Targets for the tests of the kernel layer.
