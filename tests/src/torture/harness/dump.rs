//! What a case's threads were doing when it overran: printed before anything is killed.

use std::thread;
use std::time::Duration;

use super::family::Family;
use super::process::Process;
use super::suite::print_line;
use crate::{procs, watchdog};

/// How long the description of one process may take.
const DESCRIBE_WAIT: Duration = Duration::from_secs(5);

/// Time in which a process that only is slow must have done something.
const PROGRESS_TIME: Duration = Duration::from_secs(1);

/// Prints state, wait channel, system call and kernel stack of every thread of the family, then of the tools beside it.
pub fn threads(family: &mut Family, why: &str) {
    print_line(&format!("# watchdog: {why}"));
    progress(family);
    let mut members = family.members();
    let others = watchdog::everything()
        .into_iter()
        .filter(|other| members.iter().all(|member| member.id != other.id));
    members.extend(others.collect::<Vec<_>>());
    for member in members {
        let program = Process::from(&member).program().unwrap_or_default();
        let text = procs::bounded(DESCRIBE_WAIT, move || procs::describe(&member))
            .unwrap_or_else(|| "a process that /proc does not describe in time".to_owned());
        print_line(&format!("# {}", program.display()));
        for line in text.lines() {
            print_line(&format!("#   {line}"));
        }
    }
}

/// Prints what each process did within a second: none of them moves in a real hang.
fn progress(family: &mut Family) {
    let work = |process: &Process| process.work_done().unwrap_or_default();
    let before: Vec<_> = family
        .members()
        .into_iter()
        .map(|member| {
            let process = Process::from(&member);
            (process, member.comm, work(&process))
        })
        .collect();
    thread::sleep(PROGRESS_TIME);
    for (process, name, (faults, ticks)) in before {
        let (faults_now, ticks_now) = work(&process);
        print_line(&format!(
            "# within {PROGRESS_TIME:?}: {name} {} took {} faults and {} ticks of CPU time",
            process.pid,
            faults_now.saturating_sub(faults),
            ticks_now.saturating_sub(ticks)
        ));
    }
}
