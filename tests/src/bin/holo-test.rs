//! The test runner's program; what it does is in `holo_tests::runner`.

use std::process::ExitCode;

fn main() -> ExitCode {
    holo_tests::runner::main(std::env::args().skip(1))
}
