//! `holo-programs`: real programs that check their own data, under holo or bare.

use std::process::ExitCode;

use holo_tests::programs;
use holo_tests::torture::harness::options::Options;
use holo_tests::torture::harness::suite::{self, Scratch, print_line};

fn main() -> ExitCode {
    let result = Options::from_process().and_then(|options| {
        let scratch = Scratch::create("holo-programs")?;
        Ok(suite::run(&programs::all(), &options, &scratch))
    });
    result.unwrap_or_else(|error| {
        print_line(&format!("not ok {error:#}"));
        ExitCode::from(2)
    })
}
