//! `holo-bench`: what holo costs, beside what the kernel's mechanism alone costs.

use std::process::ExitCode;

use holo_tests::bench::{self, Options};
use holo_tests::torture::harness::suite::print_line;

fn main() -> ExitCode {
    if std::env::args().any(|argument| argument == "--help") {
        print_line(bench::USAGE);
        return ExitCode::SUCCESS;
    }
    Options::parse(std::env::args().skip(1))
        .and_then(|options| bench::run(&options))
        .unwrap_or_else(|error| {
            print_line(&format!("not ok {error:#}"));
            ExitCode::from(2)
        })
}
