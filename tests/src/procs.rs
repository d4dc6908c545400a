//! Processes as `/proc` shows them: who descends from whom, and what every thread waits for.
//!
//! Nothing here waits for the processes it looks at, as far as the kernel allows; [`bounded`] is for the
//! rest (reading a command line takes the target's mmap lock, which a stuck process may hold).

use std::collections::{HashMap, HashSet};
use std::fmt::Write as _;
use std::fs;
use std::io::Read as _;
use std::os::unix::fs::FileExt as _;
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use crate::sys::PidFd;

/// The environment variable that marks every process of one suite.
pub const RUN_ID_VAR: &str = "HOLO_TEST_RUN";

/// Kernel stack frames shown for a thread: the innermost ones say what it waits for.
const STACK_FRAMES_MAX: usize = 8;

/// A process, told from a later one with the same number by its start time.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct ProcId {
    /// Its number.
    pub pid: i32,
    /// Its start, in clock ticks since boot.
    pub start_ticks: u64,
}

/// One line of the process table.
#[derive(Debug, Clone)]
pub struct Proc {
    /// Which process.
    pub id: ProcId,
    /// Its parent's number.
    pub parent: i32,
    /// The kernel's state letter, of the first thread; `Z` is dead and not yet collected.
    pub state: char,
    /// How many threads there are, a dead first one included.
    pub threads: u32,
    /// The kernel's short name for it.
    pub comm: String,
}

impl Proc {
    /// The process with this number, if there is one.
    #[must_use]
    pub fn read(pid: i32) -> Option<Self> {
        Self::parse(pid, &fs::read_to_string(format!("/proc/{pid}/stat")).ok()?)
    }

    fn parse(pid: i32, stat: &str) -> Option<Self> {
        // The name is in parentheses and may hold anything, parentheses too: the last one ends it.
        let (head, tail) = stat.rsplit_once(')')?;
        let (_, comm) = head.split_once('(')?;
        let fields: Vec<&str> = tail.split_ascii_whitespace().collect();
        Some(Self {
            id: ProcId {
                pid,
                start_ticks: fields.get(19)?.parse().ok()?,
            },
            parent: fields.get(1)?.parse().ok()?,
            state: fields.first()?.chars().next()?,
            threads: fields.get(17)?.parse().ok()?,
            comm: comm.to_owned(),
        })
    }

    /// Whether it still runs or waits, in any of its threads: the first one may have ended before the rest.
    #[must_use]
    pub fn is_alive(&self) -> bool {
        !matches!(self.state, 'Z' | 'X') || self.threads > 1
    }

    /// Sends a signal, unless the process is gone or its number has passed to another.
    pub(crate) fn signal(&self, signal: i32) {
        let Ok(handle) = PidFd::open(self.id.pid) else {
            return;
        };
        // The handle was opened first, so the number cannot pass on between this look and the signal.
        if Self::read(self.id.pid).is_some_and(|now| now.id == self.id) {
            let _ = handle.signal(signal);
        }
    }
}

/// Every process that can be seen.
#[must_use]
pub fn all() -> Vec<Proc> {
    let Ok(entries) = fs::read_dir("/proc") else {
        return Vec::new();
    };
    entries
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
        .filter_map(Proc::read)
        .collect()
}

/// The descendants of `root` in `table`, without `root`.
#[must_use]
pub fn descendants(table: &[Proc], root: i32) -> Vec<Proc> {
    let mut children: HashMap<i32, Vec<&Proc>> = HashMap::new();
    for proc in table {
        children.entry(proc.parent).or_default().push(proc);
    }
    let mut seen = HashSet::from([root]);
    let mut found: Vec<Proc> = Vec::new();
    let mut todo = vec![root];
    while let Some(parent) = todo.pop() {
        for child in children.get(&parent).into_iter().flatten() {
            if seen.insert(child.id.pid) {
                todo.push(child.id.pid);
                found.push((*child).clone());
            }
        }
    }
    found
}

/// `pid` and the chain of its parents.
#[must_use]
pub fn ancestry(table: &[Proc], pid: i32) -> HashSet<i32> {
    let parents: HashMap<i32, i32> = table
        .iter()
        .map(|proc| (proc.id.pid, proc.parent))
        .collect();
    let mut chain = HashSet::new();
    let mut next = Some(pid);
    while let Some(pid) = next.filter(|pid| chain.insert(*pid)) {
        next = parents.get(&pid).copied();
    }
    chain
}

/// Whether the process was started with `HOLO_TEST_RUN` set to `run_id` or to a run nested in it.
///
/// A process that overwrote its environment (as some servers do to show a title) is not recognised, nor
/// one between two images.
#[must_use]
pub fn is_marked(pid: i32, run_id: &str) -> bool {
    environ(pid).is_some_and(|environ| has_mark(&environ, run_id))
}

/// The whole environment that the process's image was started with; None for a process that has gone or
/// is between two images, where nothing can be said about it.
///
/// The descriptor holds the image that it was opened on: once that is replaced its file ends, wherever the
/// reader has got to. So what was read is whole only if the file can still be read afterwards. A new image has
/// an empty environment until it has got its stack.
#[must_use]
pub fn environ(pid: i32) -> Option<Vec<u8>> {
    let mut file = fs::File::open(format!("/proc/{pid}/environ")).ok()?;
    let mut whole = Vec::new();
    file.read_to_end(&mut whole).ok()?;
    let goes_on = file.read_at(&mut [0], 0).ok()? == 1;
    (goes_on && !whole.is_empty()).then_some(whole)
}

/// Whether an environment marks its process as of this run or of one nested in it.
#[must_use]
pub fn has_mark(environ: &[u8], run_id: &str) -> bool {
    environ.split(|byte| *byte == 0).any(|entry| {
        let value = std::str::from_utf8(entry)
            .ok()
            .and_then(|entry| entry.split_once('='));
        value.is_some_and(|(name, value)| {
            let nested = value.strip_prefix(run_id);
            name == RUN_ID_VAR
                && nested.is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
        })
    })
}

/// What the process and each of its threads does or waits for, as lines of text.
#[must_use]
pub fn describe(proc: &Proc) -> String {
    let pid = proc.id.pid;
    let mut text = format!(
        "process {pid} ({}) state {} parent {}",
        proc.comm, proc.state, proc.parent
    );
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    for line in status
        .lines()
        .filter(|line| line.starts_with("Uid:") || line.starts_with("TracerPid:"))
    {
        let _ = write!(
            text,
            " {}",
            line.split_ascii_whitespace().collect::<Vec<_>>().join(" ")
        );
    }
    text.push('\n');
    let mut tids: Vec<i32> = fs::read_dir(format!("/proc/{pid}/task"))
        .into_iter()
        .flatten()
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
        .collect();
    tids.sort_unstable();
    for tid in tids {
        describe_thread(&mut text, pid, tid);
    }
    text
}

fn describe_thread(text: &mut String, pid: i32, tid: i32) {
    let read = |file: &str| {
        let path = format!("/proc/{pid}/task/{tid}/{file}");
        fs::read_to_string(path).map_or_else(
            |error| format!("({error})"),
            |value| value.trim().to_owned(),
        )
    };
    let stat = read("stat");
    let (comm, state) = Proc::parse(tid, &stat).map_or((String::from("?"), '?'), |thread| {
        (thread.comm, thread.state)
    });
    let _ = writeln!(
        text,
        "  thread {tid} ({comm}) state {state} wchan {} syscall {}",
        read("wchan"),
        read("syscall")
    );
    for frame in read("stack").lines().take(STACK_FRAMES_MAX) {
        let _ = writeln!(text, "    {}", frame.trim_start_matches("[<0>] "));
    }
}

/// Runs `look` in a thread of its own and gives up on it after `limit`; None then.
///
/// For looks at processes that may be stuck: the thread is left behind, the caller goes on.
pub fn bounded<T: Send + 'static>(
    limit: Duration,
    look: impl FnOnce() -> T + Send + 'static,
) -> Option<T> {
    let (sender, receiver) = mpsc::channel();
    thread::spawn(move || {
        // The receiver may have given up: then nobody wants the answer.
        let _ = sender.send(look());
    });
    receiver.recv_timeout(limit).ok()
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    #[test]
    fn an_environment_is_read_whole_or_not_at_all() {
        const IMAGES: u32 = 400;
        let script = "test $1 -eq 0 || exec /bin/sh -c \"$0\" \"$0\" $(($1 - 1))";
        let mut child = Command::new("/bin/sh")
            .args(["-c", script, script, &IMAGES.to_string()])
            // Too long for one piece, the mark behind it.
            .env_clear()
            .env("A_LONG_ONE", "x".repeat(20_000))
            .env(RUN_ID_VAR, "images")
            .spawn()
            .unwrap();
        let pid = i32::try_from(child.id()).unwrap();
        let mut whole = 0;
        while child.try_wait().unwrap().is_none() {
            if let Some(environ) = environ(pid) {
                assert!(has_mark(&environ, "images"), "{} bytes", environ.len());
                whole += 1;
            }
        }
        assert!(whole > IMAGES / 4, "only {whole} were read");
    }

    #[test]
    fn name_with_parentheses_and_spaces_is_read_whole() {
        let stat = "7 (a) b (c) S 3 7 7 0 -1 0 0 0 0 0 0 0 0 0 20 0 1 0 4242 0 0";
        let proc = Proc::parse(7, stat).unwrap();
        assert_eq!(
            (
                proc.comm.as_str(),
                proc.state,
                proc.parent,
                proc.id.start_ticks
            ),
            ("a) b (c", 'S', 3, 4242)
        );
    }

    #[test]
    fn own_process_is_seen_as_it_is() {
        let pid = i32::try_from(std::process::id()).unwrap();
        let table = all();
        let own = table
            .iter()
            .find(|proc| proc.id.pid == pid)
            .expect("in its own process table");
        assert!(own.is_alive());
        assert!(ancestry(&table, pid).contains(&own.parent));
        let dump = describe(own);
        assert!(
            dump.contains("TracerPid:") && dump.contains("wchan"),
            "{dump}"
        );
    }

    #[test]
    fn descendants_are_found_through_dead_and_living_alike_and_never_the_root() {
        let line = |pid, parent, state| Proc {
            id: ProcId {
                pid,
                start_ticks: 1,
            },
            parent,
            state,
            threads: 1,
            comm: String::new(),
        };
        let table = [
            line(1, 0, 'S'),
            line(2, 1, 'S'),
            line(3, 2, 'Z'),
            line(4, 3, 'S'),
            line(5, 1, 'S'),
            line(0, 0, 'S'),
        ];
        let mut found: Vec<i32> = descendants(&table, 2)
            .iter()
            .map(|proc| proc.id.pid)
            .collect();
        found.sort_unstable();
        assert_eq!(found, [3, 4]);
    }

    #[test]
    fn look_that_hangs_is_given_up() {
        let hang = || loop {
            thread::park();
        };
        assert_eq!(bounded::<()>(Duration::from_millis(20), hang), None);
        assert_eq!(bounded(Duration::from_secs(20), || 5), Some(5));
    }
}
