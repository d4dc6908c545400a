//! `holo-takeover`: pagers die at every named point and at random moments.

use std::process::ExitCode;

use holo_tests::takeover;
use holo_tests::torture::harness::options::Options;
use holo_tests::torture::harness::suite::{self, Scratch, print_line};

fn main() -> ExitCode {
    let result = Options::from_process().and_then(|options| {
        let scratch = Scratch::create("holo-takeover")?;
        let cases = takeover::all(scratch.path());
        Ok(suite::run(&cases, &options, &scratch))
    });
    result.unwrap_or_else(|error| {
        print_line(&format!("not ok {error:#}"));
        ExitCode::from(2)
    })
}
