//! Runs seeds of the simulation: one to replay it, a range, or as many as fit a time.

use std::time::{Duration, Instant};

use holo_tests::sim::{Bank, Report, run_seed};

const USAGE: &str = "usage: holo-sim [--seed N [--trace] | --seeds A..B | --count N | --minutes M [--from A]]
                [--keep-going] [--wild]
--count takes N seeds from HOLO_SEED on (1 if that is not set), in twenty cases.
--wild also lets a process fork while a change of its mappings is not wholly told: see docs/testing.md.";

/// Cases of `--count`.
const CASES: u64 = 20;

/// So many seeds tell whether anything is evicted at all.
const MANY: u64 = 1000;

/// Of the seeds that end with more than the budget, one in so many at least comes down to it: others keep what
/// fork relatives share, what is locked, and what is in a stopped process.
const BROUGHT_DOWN_ONE_IN: u64 = 5;

/// What the command line asks for.
struct Asked {
    from: u64,
    to: u64,
    cases: u64,
    until: Option<Duration>,
    trace: bool,
    keep_going: bool,
    wild: bool,
}

fn parse() -> Option<Asked> {
    let mut asked = Asked {
        from: 1,
        to: 1000,
        cases: 1,
        until: None,
        trace: false,
        keep_going: false,
        wild: false,
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
            "--count" => {
                let count: u64 = args.next()?.parse().ok()?;
                let from = std::env::var("HOLO_SEED").ok();
                asked.from = from.map_or(Some(1), |s| s.parse().ok())?;
                asked.to = asked.from.checked_add(count)?;
                asked.cases = CASES;
            }
            "--from" => asked.from = args.next()?.parse().ok()?,
            "--minutes" => {
                let minutes: f64 = args.next()?.parse().ok()?;
                asked.until = Some(Duration::try_from_secs_f64(minutes * 60.0).ok()?);
                asked.to = u64::MAX;
            }
            "--trace" => asked.trace = true,
            "--keep-going" => asked.keep_going = true,
            "--wild" => asked.wild = true,
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
    let own = std::env::args().next().unwrap_or_default();
    let started = Instant::now();
    let mut bank = Bank::new();
    let (mut seeds, mut passed, mut failed) = (0u64, 0u64, 0u64);
    let mut sum = Report::default();
    let all = asked.to.saturating_sub(asked.from);
    for case in 0..asked.cases {
        let from = asked.from + all / asked.cases * case;
        let to = if case + 1 == asked.cases {
            asked.to
        } else {
            from + all / asked.cases
        };
        let mut right = true;
        for seed in from..to {
            let over = asked.until.is_some_and(|d| started.elapsed() >= d);
            if over || (!right && !asked.keep_going) {
                break;
            }
            let report = run_seed(seed, &mut bank, asked.trace, asked.wild);
            seeds += 1;
            sum.steps += report.steps;
            sum.ops += report.ops;
            sum.checks += report.checks;
            sum.evicted += report.evicted;
            sum.deaths += report.deaths;
            sum.over += report.over;
            sum.brought_down += report.brought_down;
            if let Some(why) = report.failure {
                right = false;
                failed += 1;
                let wild = if asked.wild { " --wild" } else { "" };
                say(&mut out, &format!("not ok seed-{seed}: {why}"));
                say(
                    &mut out,
                    &format!("# replay: {own} --seed {seed}{wild} --trace"),
                );
            }
        }
        if right {
            passed += 1;
            say(&mut out, &format!("ok seeds-{}", case + 1));
        }
    }
    say(
        &mut out,
        &format!(
            "# {seeds} seeds from {}, {} steps, {} operations, {} checks, {} subpages evicted, {} deaths, {} of {} brought down \
             to their budget, {:.1} s",
            asked.from,
            sum.steps,
            sum.ops,
            sum.checks,
            sum.evicted,
            sum.deaths,
            sum.brought_down,
            sum.over,
            started.elapsed().as_secs_f64()
        ),
    );
    // A pager that does nothing makes no mistake.
    let idle = sum.evicted < seeds || sum.brought_down * BROUGHT_DOWN_ONE_IN < sum.over;
    if seeds >= MANY && idle {
        failed += 1;
        say(
            &mut out,
            "not ok pages-go: too little was evicted for this to have tested anything",
        );
    }
    say(&mut out, &format!("{passed} passed, {failed} failed"));
    std::process::ExitCode::from(u8::from(failed > 0))
}

fn say(out: &mut impl std::io::Write, line: &str) {
    // A reader that went away wants no more.
    let _ = writeln!(out, "{line}");
}
