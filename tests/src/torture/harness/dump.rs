//! What a case's threads were doing when it overran: printed before anything is killed.

use std::time::Duration;

use super::family::Family;
use super::process::Process;
use super::suite::print_line;
use crate::procs;

/// How long the description of one process may take.
const DESCRIBE_WAIT: Duration = Duration::from_secs(5);

/// Prints state, wait channel, system call and kernel stack of every thread of the family.
pub fn threads(family: &mut Family, why: &str) {
    print_line(&format!("# watchdog: {why}"));
    for member in family.members() {
        let program = Process::from(&member).program().unwrap_or_default();
        let text = procs::bounded(DESCRIBE_WAIT, move || procs::describe(&member))
            .unwrap_or_else(|| "a process that /proc does not describe in time".to_owned());
        print_line(&format!("# {}", program.display()));
        for line in text.lines() {
            print_line(&format!("#   {line}"));
        }
    }
}
