//! Runs seeds of the simulation: one to replay it, a range, or as many as fit a time.

use std::time::{Duration, Instant};

use holo_tests::sim::{Bank, Report, run_seed};

const USAGE: &str =
    "usage: holo-sim [--seed N [--trace] | --seeds A..B | --minutes M [--from A]] [--keep-going]";

/// What the command line asks for.
struct Asked {
    from: u64,
    to: u64,
    until: Option<Duration>,
    trace: bool,
    keep_going: bool,
}

fn parse() -> Option<Asked> {
    let mut asked = Asked {
        from: 1,
        to: 1000,
        until: None,
        trace: false,
        keep_going: false,
    };
    let mut args = std::env::args().skip(1);
    while let Some(arg) = args.next() {
        match arg.as_str() {
            "--seed" => {
                asked.from = args.next()?.parse().ok()?;
                asked.to = asked.from.checked_add(1)?;
            }
            "--seeds" => {
                let range = args.next()?;
                let (a, b) = range.split_once("..")?;
                asked.from = a.parse().ok()?;
                asked.to = b.parse().ok()?;
            }
            "--from" => asked.from = args.next()?.parse().ok()?,
            "--minutes" => {
                let minutes: f64 = args.next()?.parse().ok()?;
                asked.until = Some(Duration::try_from_secs_f64(minutes * 60.0).ok()?);
                asked.to = u64::MAX;
            }
            "--trace" => asked.trace = true,
            "--keep-going" => asked.keep_going = true,
            _ => return None,
        }
    }
    Some(asked)
}

fn main() -> std::process::ExitCode {
    let Some(asked) = parse() else {
        eprintln!("{USAGE}");
        return std::process::ExitCode::from(2);
    };
    if !asked.trace {
        std::panic::set_hook(Box::new(|_| {}));
    }
    let mut out = std::io::stdout().lock();
    let started = Instant::now();
    let mut bank = Bank::new();
    let (mut passed, mut failed) = (0u64, 0u64);
    let mut sum = Report::default();
    for seed in asked.from..asked.to {
        if asked.until.is_some_and(|d| started.elapsed() >= d) {
            break;
        }
        let report = run_seed(seed, &mut bank, asked.trace);
        sum.steps += report.steps;
        sum.ops += report.ops;
        sum.checks += report.checks;
        sum.evicted += report.evicted;
        sum.deaths += report.deaths;
        match report.failure {
            None => passed += 1,
            Some(why) => {
                failed += 1;
                say(&mut out, &format!("not ok seed-{seed}: {why}"));
                say(
                    &mut out,
                    &format!("# replay: holo-sim --seed {seed} --trace"),
                );
                if !asked.keep_going {
                    break;
                }
            }
        }
    }
    say(
        &mut out,
        &format!(
            "# {} seeds, {} steps, {} operations, {} checks, {} subpages evicted, {} deaths, {:.1} s",
            passed + failed,
            sum.steps,
            sum.ops,
            sum.checks,
            sum.evicted,
            sum.deaths,
            started.elapsed().as_secs_f64()
        ),
    );
    if failed == 0 {
        say(&mut out, "ok seeds");
    }
    say(
        &mut out,
        &format!("{} passed, {failed} failed", u64::from(failed == 0)),
    );
    std::process::ExitCode::from(u8::from(failed > 0))
}

fn say(out: &mut impl std::io::Write, line: &str) {
    // A reader that went away wants no more.
    let _ = writeln!(out, "{line}");
}
