//! How many cases a suite ran, read from what it printed.

/// What a suite's output says.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Count {
    pub(crate) passed: u64,
    /// A line for each failed case: its name, and why where that was said.
    pub(crate) failed: Vec<String>,
    /// The names of cases that did not run.
    pub(crate) skipped: Vec<String>,
    /// What is wrong with the output itself.
    pub(crate) problem: Option<String>,
}

/// Reads the output of Rust's test harness.
///
/// The totals come from its result lines; the names from the lines of the cases, into which a test's
/// children may have written.
pub(crate) fn libtest(output: &str) -> Count {
    let mut count = Count::default();
    let mut passed_lines = 0;
    let mut totals = None::<(u64, u64)>;
    for line in output.lines() {
        if let Some(totals_text) = line.strip_prefix("test result: ") {
            let (passed, failed) = totals.unwrap_or_default();
            totals = Some((
                passed + total(totals_text, "passed"),
                failed + total(totals_text, "failed"),
            ));
        } else if let Some((name, result)) = line
            .strip_prefix("test ")
            .and_then(|rest| rest.rsplit_once(" ... "))
        {
            match result.split([',', ' ']).next() {
                Some("ok") => passed_lines += 1,
                Some("FAILED") => count.failed.push(name.to_owned()),
                Some("ignored") => count.skipped.push(name.to_owned()),
                _ => {}
            }
        }
    }
    match totals {
        Some((passed, failed)) => {
            count.passed = passed;
            while u64::try_from(count.failed.len()).is_ok_and(|named| named < failed) {
                count
                    .failed
                    .push("(a case whose line cannot be read)".to_owned());
            }
        }
        None => {
            count.passed = passed_lines;
            count.problem = Some("it ended without a \"test result:\" line".to_owned());
        }
    }
    count
}

/// The number before `word` in "ok. 3 passed; 1 failed; …".
fn total(text: &str, word: &str) -> u64 {
    let words: Vec<&str> = text
        .split([' ', ';', '.'])
        .filter(|part| !part.is_empty())
        .collect();
    let at = words
        .iter()
        .position(|part| *part == word)
        .and_then(|at| at.checked_sub(1));
    at.and_then(|at| words.get(at)?.parse().ok()).unwrap_or(0)
}

/// Reads the output of a program of kind `exec`.
pub(crate) fn lines(output: &str) -> Count {
    let mut count = Count::default();
    for line in output.lines() {
        if let Some(failed) = line.strip_prefix("not ok ") {
            count.failed.push(failed.to_owned());
        } else if let Some(skipped) = line.strip_prefix("skip ") {
            count.skipped.push(
                skipped
                    .split(':')
                    .next()
                    .unwrap_or(skipped)
                    .trim()
                    .to_owned(),
            );
        } else if line.starts_with("ok ") {
            count.passed += 1;
        }
    }
    let expected = format!("{} passed, {} failed", count.passed, count.failed.len());
    let last = output
        .lines()
        .rev()
        .find(|line| !line.trim().is_empty())
        .unwrap_or("");
    if last != expected {
        count.problem = Some(format!(
            "its last line is \"{last}\"; its cases' lines say \"{expected}\""
        ));
    }
    count
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn libtest_results_of_several_runs_add_up() {
        let output = "running 2 tests\ntest a::b ... ok\ntest c - should panic ... ok\n\
            test d ... ignored, slow; owner: me\ntest e ... FAILED\n\n\
            test result: FAILED. 2 passed; 1 failed; 1 ignored; 0 measured; 0 filtered out; finished in 0.00s\n\
            test result: ok. 5 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0.00s\n";
        let count = libtest(output);
        assert_eq!(count.passed, 7);
        assert_eq!(
            (count.failed, count.skipped, count.problem),
            (vec!["e".into()], vec!["d".into()], None)
        );
    }

    #[test]
    fn failure_without_a_readable_line_still_counts() {
        let output = "test a ... child wrote here\nFAILED\ntest result: FAILED. 0 passed; 1 failed; 0 ignored\n";
        assert_eq!(libtest(output).failed.len(), 1);
    }

    #[test]
    fn libtest_that_was_cut_off_is_a_problem() {
        let count = libtest("running 2 tests\ntest a ... ok\n");
        assert_eq!(count.passed, 1);
        assert!(count.problem.is_some());
    }

    #[test]
    fn program_whose_total_differs_from_its_lines_is_a_problem() {
        assert_eq!(
            lines("hello\nok a\nskip b: no gdb\nnot ok c: 3 != 4\n1 passed, 1 failed\n\n"),
            Count {
                passed: 1,
                failed: vec!["c: 3 != 4".into()],
                skipped: vec!["b".into()],
                problem: None,
            }
        );
        assert!(lines("ok a\n2 passed, 0 failed\n").problem.is_some());
        assert!(lines("ok a\n").problem.is_some());
        assert!(lines("").problem.is_some());
    }
}
