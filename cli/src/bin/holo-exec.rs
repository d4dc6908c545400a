//! `holo-exec`: runs a command within an amount of local memory.

#![forbid(unsafe_code)]

use clap::Parser as _;
use holo_cli::args::Exec;
use holo_cli::run;

fn main() {
    let code = match run::exec(&Exec::parse()) {
        Ok(code) => code,
        Err(e) => {
            eprintln!("holo-exec: {e:#}");
            run::EXIT_HOLO
        }
    };
    std::process::exit(code);
}
