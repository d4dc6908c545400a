//! `holo-torture`: the torture programs, under holo or bare.

use std::process::ExitCode;

use holo_tests::torture::cases;
use holo_tests::torture::harness::options::Options;
use holo_tests::torture::harness::suite::{self, Scratch, print_line};

fn main() -> ExitCode {
    let result = Options::from_process().and_then(|options| {
        let scratch = Scratch::create("holo-torture")?;
        let cases = cases::all(scratch.path().to_owned());
        Ok(suite::run(&cases, &options, &scratch))
    });
    result.unwrap_or_else(|error| {
        print_line(&format!("not ok {error:#}"));
        ExitCode::from(2)
    })
}
