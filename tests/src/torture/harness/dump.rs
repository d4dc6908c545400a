//! What a case's threads were doing when it overran: printed before anything is killed.

use std::fs;
use std::io::Write as _;

use super::family::Family;

/// Lines of a kernel stack that are kept for one thread.
const STACK_LINES_MAX: usize = 12;

/// Prints state, wait channel, system call and kernel stack of every thread of the family.
pub fn threads(family: &mut Family, why: &str) {
    let mut text = format!("# watchdog: {why}\n");
    for member in family.members() {
        let pid = member.process.pid;
        let program = member.process.program().unwrap_or_default();
        text.push_str(&format!(
            "# process {pid} ({}) {} parent {} state {}\n",
            member.name,
            program.display(),
            member.parent,
            member.state
        ));
        for thread in member.process.threads() {
            let of = |file: &str| {
                fs::read_to_string(format!("/proc/{pid}/task/{thread}/{file}"))
                    .unwrap_or_default()
                    .trim()
                    .to_owned()
            };
            let stat = of("stat");
            let state = stat
                .rsplit_once(") ")
                .and_then(|(_, tail)| tail.chars().next())
                .unwrap_or('?');
            text.push_str(&format!(
                "#   thread {thread} ({}) state {state} wchan {} syscall {}\n",
                of("comm"),
                of("wchan"),
                of("syscall")
            ));
            for line in of("stack").lines().take(STACK_LINES_MAX) {
                text.push_str(&format!("#     {}\n", line.trim()));
            }
        }
    }
    // Nothing can be done about a closed standard output here.
    let _ = std::io::stdout().lock().write_all(text.as_bytes());
}
