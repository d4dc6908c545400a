//! What `holo attach` and `holo-exec` say of what they cannot page, and what an attach leaves behind.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::{BufRead as _, BufReader, Read, Write as _};
use std::os::unix::fs::FileExt as _;
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Output, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use holo_tests::watchdog::give_up;

/// How long a test waits for anything before it fails: less than its suite has (tests/manifest.toml), so that it is named.
const PATIENCE: Duration = Duration::from_secs(8);

/// Fills so many MiB for each number that it reads, forks for "fork" and "nap", and looks at all of it again at the
/// end of its input.
const FILLER: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/scripts/fills.py");

const PYTHON: &str = "/usr/bin/python3";

/// More descriptors than usual, for `prlimit`.
const LIMIT: &str = "--nofile=4096:4096";
/// So many are opened then.
const DESCRIPTORS: &str = "2000";

/// Runs what is added as another user.
fn as_user(uid: u32) -> Command {
    let mut command = Command::new("setpriv");
    let user = [format!("--reuid={uid}"), format!("--regid={uid}")];
    command.arg("--clear-groups").args(user);
    command
}

/// A program of a user of its own that fills memory when it is told to.
struct Filler {
    child: Child,
    out: BufReader<ChildStdout>,
    pid: String,
    uid: u32,
}

impl Filler {
    fn start(uid: u32) -> Self {
        Self::begin(uid, as_user(uid).args([PYTHON, FILLER]))
    }

    /// With so many descriptors open, which it may have.
    fn with_descriptors(uid: u32, count: &str) -> Self {
        let mut command = as_user(uid);
        command.args(["prlimit", LIMIT, PYTHON, FILLER, count]);
        Self::begin(uid, &mut command)
    }

    fn begin(uid: u32, command: &mut Command) -> Self {
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let out = BufReader::new(child.stdout.take().unwrap());
        let pid = child.id().to_string();
        let mut filler = Self {
            child,
            out,
            pid,
            uid,
        };
        assert_eq!(filler.line(), "ready\n");
        filler
    }

    fn line(&mut self) -> String {
        let mut line = String::new();
        self.out.read_line(&mut line).unwrap();
        line
    }

    fn fill(&mut self, mib: u32) {
        let mut input = self.child.stdin.as_ref().unwrap();
        writeln!(input, "{mib}").unwrap();
        assert_eq!(self.line(), "filled\n");
    }

    /// Has it fork; the child writes to all of its memory.
    fn fork(&mut self) -> String {
        self.child_by("fork")
    }

    /// Has it fork; the child sleeps until [`Filler::wake`].
    fn nap(&mut self) -> String {
        self.child_by("nap")
    }

    fn child_by(&mut self, word: &str) -> String {
        let mut input = self.child.stdin.as_ref().unwrap();
        writeln!(input, "{word}").unwrap();
        self.line().trim().to_owned()
    }

    /// A child that sleeps looks at all of its memory, and ends.
    fn wake(&mut self, child: &str) {
        let sent = Command::new("kill").args(["-USR1", child]).status();
        assert!(sent.unwrap().success());
        assert_eq!(
            self.line(),
            "child True\n",
            "the child's memory is as it was"
        );
    }

    fn open_userfaultfd(&mut self) {
        let mut input = self.child.stdin.as_ref().unwrap();
        writeln!(input, "userfaultfd").unwrap();
        assert_eq!(self.line(), "True\n");
    }

    fn limit_threads(&self, most: &str) {
        let done = as_user(self.uid)
            .args(["prlimit", "--pid", &self.pid, &format!("--nproc={most}:")])
            .status();
        assert!(done.unwrap().success());
    }

    fn finish(mut self) {
        drop(self.child.stdin.take());
        self.ends_with(0);
    }

    /// Has it end with this exit code.
    fn end(mut self, code: i32) {
        let mut input = self.child.stdin.as_ref().unwrap();
        writeln!(input, "end {code}").unwrap();
        self.ends_with(code);
    }

    fn ends_with(&mut self, code: i32) {
        assert_eq!(self.line(), "True\n", "its memory is as it filled it");
        assert_eq!(self.child.wait().unwrap().code(), Some(code));
    }
}

impl Drop for Filler {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn holo(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_holo"));
    command.args(arguments);
    command
}

/// What a command wrote, once nobody holds its streams any more; a daemon that does is a failure, not a hang.
fn to_the_end(command: &mut Command) -> Output {
    to_the_end_after(command, |_| ())
}

/// The same of one that runs until something has been done or seen.
fn to_the_end_after(command: &mut Command, before: impl FnOnce(&mut Child)) -> Output {
    let mut child = command
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let read = |mut from: Box<dyn Read + Send>| {
        let (sender, receiver) = mpsc::channel();
        std::thread::spawn(move || {
            let mut bytes = Vec::new();
            from.read_to_end(&mut bytes).unwrap();
            let _ = sender.send(bytes);
        });
        receiver
    };
    let stdout = read(Box::new(child.stdout.take().unwrap()));
    let stderr = read(Box::new(child.stderr.take().unwrap()));
    before(&mut child);
    let end = |stream: mpsc::Receiver<Vec<u8>>| {
        stream
            .recv_timeout(PATIENCE)
            .unwrap_or_else(|_| give_up(&format!("not in time: the end of {command:?}")))
    };
    let (stdout, stderr) = (end(stdout), end(stderr));
    Output {
        status: child.wait().unwrap(),
        stdout,
        stderr,
    }
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

fn status(pid: &str) -> serde_json::Value {
    let said = holo(&["status", pid, "--json"]).output().unwrap();
    serde_json::from_slice(&said.stdout).unwrap_or_else(|_| panic!("{}", text(&said.stderr)))
}

/// Whether a pager knows the process: of a fork's child, whether that is found.
fn is_known(pid: &str) -> bool {
    let said = holo(&["status", pid]).output().unwrap();
    said.status.success()
}

/// Whether so many are left alone, of a command whose pager may not answer yet.
fn leaves_alone(pid: &str, count: u64) -> bool {
    is_known(pid) && status(pid)["processes_left_alone"] == count
}

fn wait_until(what: &str, mut seen: impl FnMut() -> bool) {
    let since = Instant::now();
    while !seen() {
        if since.elapsed() >= PATIENCE {
            give_up(&format!("not in time: {what}"));
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// A folder of its own, gone with the test, that everybody may use.
struct Folder(PathBuf);

impl Folder {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("holo-cli-{}-{name}", std::process::id()));
        fs::create_dir_all(&path).unwrap();
        Self(path)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// Processes whose working directory it is.
fn those_in(folder: &Path) -> Vec<String> {
    let all = fs::read_dir("/proc").unwrap();
    let inside = |at: &PathBuf| fs::read_link(at.join("cwd")).is_ok_and(|cwd| cwd == folder);
    all.map(|entry| entry.unwrap().path())
        .filter(inside)
        .map(|at| fs::read_to_string(at.join("comm")).unwrap_or_default())
        .collect()
}

/// Messages of holo in the system's log, the kernel's or the log daemon's, about one process.
struct Log {
    about: String,
    /// In the place of the log daemon, where there is no log of the kernel.
    daemon: Option<UnixDatagram>,
    /// Messages of the kernel's log that have been seen: it keeps those of earlier processes with the same number.
    seen: usize,
}

impl Log {
    const KERNEL: &str = "/dev/kmsg";
    const DAEMON: &str = "/dev/log";

    fn open(about: &str) -> Self {
        let daemon = (!Path::new(Self::KERNEL).exists()).then(|| {
            let daemon = UnixDatagram::bind(Self::DAEMON).expect(
                "without /dev/kmsg the messages go to the log daemon, whose place this test has to take",
            );
            daemon.set_nonblocking(true).unwrap();
            daemon
        });
        let about = about.to_owned();
        let mut log = Self {
            about,
            daemon,
            seen: 0,
        };
        log.new_messages();
        log
    }

    fn new_messages(&mut self) -> Vec<String> {
        let lines: Vec<String> = match &self.daemon {
            Some(daemon) => {
                let mut bytes = [0; 4096];
                let messages =
                    std::iter::from_fn(|| daemon.recv(&mut bytes).ok().map(|n| text(&bytes[..n])));
                messages.collect()
            }
            None => {
                let said = Command::new("dmesg").output().unwrap();
                assert!(said.status.success(), "{}", text(&said.stderr));
                text(&said.stdout).lines().map(str::to_owned).collect()
            }
        };
        let ours = |line: &String| line.contains("holo: ") && line.contains(&self.about);
        let messages: Vec<String> = lines.into_iter().filter(ours).collect();
        if self.daemon.is_some() {
            return messages;
        }
        let new = messages.iter().skip(self.seen).cloned().collect();
        self.seen = messages.len();
        new
    }
}

impl Drop for Log {
    fn drop(&mut self) {
        if self.daemon.is_some() {
            let _ = fs::remove_file(Self::DAEMON);
        }
    }
}

#[test]
fn an_attach_lets_go_of_streams_and_folder() {
    let folder = Folder::new("streams");
    let mut filler = Filler::start(64131);
    let pid = filler.pid.clone();
    let mut log = Log::open(&format!("process {pid} "));
    let said = to_the_end(holo(&["attach", &pid, "--local-memory", "16M"]).current_dir(&folder.0));
    assert!(said.status.success(), "{}", text(&said.stderr));
    assert!(text(&said.stdout).contains(&pid));
    assert_eq!(those_in(&folder.0), Vec::<String>::new());

    // What it has to say from now on is in the system's log.
    filler.limit_threads("1");
    filler.fill(48);
    wait_until("it is left alone", || {
        status(&pid)["processes_left_alone"] == 1
    });
    let mut said = Vec::new();
    wait_until("it is said", || {
        said.extend(log.new_messages());
        !said.is_empty()
    });
    assert_eq!(said.len(), 1, "{said:?}");
    assert!(
        said[0].contains(&format!("prlimit --pid {pid} --nproc")),
        "{said:?}"
    );

    assert!(holo(&["detach", &pid]).output().unwrap().status.success());
    filler.finish();
}

#[test]
fn what_was_refused_a_ring_gets_one_when_it_may() {
    let folder = Folder::new("ring");
    let messages = folder.0.join("messages");
    let mut filler = Filler::start(64132);
    let pid = filler.pid.clone();
    let attached = holo(&["attach", &pid, "--local-memory", "16M"])
        .stderr(fs::File::create(&messages).unwrap())
        .output()
        .unwrap();
    assert!(attached.status.success());
    filler.limit_threads("1");
    filler.fill(48);
    wait_until("it is left alone", || {
        status(&pid)["processes_left_alone"] == 1
    });
    // A file is kept for messages.
    let mut said = String::new();
    wait_until("it is said", || {
        said = fs::read_to_string(&messages).unwrap();
        said.ends_with('\n')
    });
    assert_eq!(said.lines().count(), 1, "{said}");
    assert!(
        said.contains("is not limited") && said.contains("--nproc"),
        "{said}"
    );
    let line = text(&holo(&["status", &pid]).output().unwrap().stdout);
    assert!(line.contains("1 process was not limited"), "{line}");
    assert!(!line.contains("fitted"), "{line}");
    assert_eq!(status(&pid)["pages_evicted"], 0);

    filler.limit_threads("1000");
    wait_until("it is evicted from", || {
        status(&pid)["pages_evicted"].as_u64().unwrap() >= 256
    });
    assert_eq!(status(&pid)["processes_left_alone"], 1);
    assert!(holo(&["detach", &pid]).output().unwrap().status.success());
    filler.finish();
    assert_eq!(fs::read_to_string(&messages).unwrap(), said, "said once");
}

/// The descriptors that a process has open, and what they are.
fn descriptors(pid: &str) -> BTreeMap<PathBuf, PathBuf> {
    let all = fs::read_dir(format!("/proc/{pid}/fd")).unwrap();
    all.map(|entry| entry.unwrap().path())
        .filter_map(|at| Some((at.clone(), fs::read_link(at).ok()?)))
        .collect()
}

/// Numbers of the userfaultfds that a process has open.
fn userfaultfds(pid: &str) -> Vec<PathBuf> {
    descriptors(pid)
        .into_iter()
        .filter(|(_, link)| link.to_string_lossy().ends_with("[userfaultfd]"))
        .map(|(at, _)| at)
        .collect()
}

#[test]
fn a_detach_leaves_nothing_in_a_child_either() {
    let mut filler = Filler::start(64134);
    let pid = filler.pid.clone();
    filler.fill(48);
    let attach = |pid: &str| {
        let said = to_the_end(&mut holo(&["attach", pid, "--local-memory", "16M"]));
        assert!(said.status.success(), "{}", text(&said.stderr));
        wait_until("it is evicted from", || {
            status(pid)["pages_evicted"].as_u64().unwrap() >= 256
        });
    };
    attach(&pid);
    let child = filler.fork();
    wait_until("the child is served", || {
        is_known(&child) && status(&pid)["processes"] == 2
    });
    assert!(holo(&["detach", &pid]).output().unwrap().status.success());
    let none = Vec::<PathBuf>::new();
    assert_eq!(
        [userfaultfds(&pid), userfaultfds(&child)],
        [none.clone(), none]
    );
    attach(&child);
    assert!(holo(&["detach", &child]).output().unwrap().status.success());
    Command::new("kill").arg(&child).status().unwrap();
    filler.finish();
}

/// Marks of holo on mappings, and threads of a ring.
fn marks_and_ring_threads(pid: &str) -> [usize; 2] {
    let smaps = fs::read_to_string(format!("/proc/{pid}/smaps")).unwrap();
    let is_marked = |line: &&str| {
        let mut flags = line.split_ascii_whitespace();
        flags.next() == Some("VmFlags:") && flags.any(|flag| flag == "um" || flag == "uw")
    };
    let threads = fs::read_dir(format!("/proc/{pid}/task")).unwrap();
    let of_a_ring = threads.filter(|thread| {
        let name = fs::read_to_string(thread.as_ref().unwrap().path().join("comm"));
        name.is_ok_and(|name| name.starts_with("iou-"))
    });
    [smaps.lines().filter(is_marked).count(), of_a_ring.count()]
}

/// What holo made in a process is gone again.
#[track_caller]
fn nothing_is_left_in(pid: &str) {
    assert_eq!(userfaultfds(pid), Vec::<PathBuf>::new());
    assert_eq!(marks_and_ring_threads(pid)[0], 0, "mappings are marked");
    // They end by themselves.
    wait_until("no ring", || marks_and_ring_threads(pid)[1] == 0);
}

#[test]
fn a_detach_leaves_nothing_in_a_small_child_that_sleeps() {
    let mut filler = Filler::start(64135);
    let pid = filler.pid.clone();
    filler.fill(48);
    // The detach finds a child whose process is known, or perhaps not yet.
    for is_awaited in [true, false] {
        let said = to_the_end(&mut holo(&["attach", &pid, "--local-memory", "16M"]));
        assert!(said.status.success(), "{}", text(&said.stderr));
        wait_until("it is evicted from", || {
            status(&pid)["pages_evicted"].as_u64().unwrap() >= 256
        });
        let child = filler.nap();
        if is_awaited {
            wait_until("the child is served", || {
                is_known(&child) && status(&pid)["processes"] == 2
            });
            let [marks, ring_threads] = marks_and_ring_threads(&child);
            assert!(marks > 0, "the child is registered");
            assert_eq!(ring_threads, 0, "the child is small");
        }
        let said = to_the_end(&mut holo(&["detach", &pid]));
        assert!(said.status.success(), "{}", text(&said.stderr));
        nothing_is_left_in(&pid);
        nothing_is_left_in(&child);
        filler.wake(&child);
    }
    filler.finish();
}

/// What it says on standard output, in time.
fn said_in_time(command: &[&str]) -> String {
    let said = to_the_end(
        Command::new(command[0])
            .args(&command[1..])
            .stdin(Stdio::null()),
    );
    assert!(
        said.status.success(),
        "{command:?}: {} {}",
        said.status,
        text(&said.stderr)
    );
    text(&said.stdout)
}

#[test]
fn a_descendant_may_attach_holo_to_its_ancestor() {
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/scripts/attaches.py");
    let binary = env!("CARGO_BIN_EXE_holo");
    assert_eq!(said_in_time(&[PYTHON, script, binary]), "right\n");
    // The shell waits for holo, which stops it for that.
    let shell = "\"$0\" attach $$ --local-memory 16M >&2 && \"$0\" status $$ >&2 && \"$0\" detach $$ >&2 && \
                 echo right";
    assert_eq!(said_in_time(&["sh", "-c", shell, binary]), "right\n");
}

/// The descriptors of a held process but for the one that holo keeps there.
fn without_userfaultfd(pid: &str) -> BTreeMap<PathBuf, PathBuf> {
    let kept = userfaultfds(pid);
    assert_eq!(kept.len(), 1, "{kept:?}");
    let mut others = descriptors(pid);
    others.remove(&kept[0]);
    others
}

#[test]
fn more_than_1024_descriptors_are_no_hindrance_to_an_attach() {
    let mut filler = Filler::with_descriptors(64136, DESCRIPTORS);
    let pid = filler.pid.clone();
    filler.fill(48);
    let before = descriptors(&pid);
    assert!(before.len() > 2000, "{}", before.len());
    let said = to_the_end(&mut holo(&["attach", &pid, "--local-memory", "16M"]));
    assert!(said.status.success(), "{}", text(&said.stderr));
    wait_until("it is evicted from", || {
        status(&pid)["pages_evicted"].as_u64().unwrap() >= 256
    });
    assert!(
        without_userfaultfd(&pid) == before,
        "the program's own have changed"
    );
    let said = to_the_end(&mut holo(&["detach", &pid]));
    assert!(said.status.success(), "{}", text(&said.stderr));
    assert!(descriptors(&pid) == before, "some are left or lost");
    filler.finish();
}

#[test]
fn more_than_1024_descriptors_are_no_hindrance_under_holo_exec() {
    let folder = Folder::new("many");
    let report = folder.0.join("report.json");
    // They are open in holo-exec too, and in the command.
    let inherits = "import os, sys\nfor _ in range(int(sys.argv[1])): os.set_inheritable(os.dup(1), True)\n\
                    os.execv(sys.argv[2], sys.argv[2:])";
    let mut command = Command::new("prlimit");
    command
        .args([LIMIT, PYTHON, "-c", inherits, DESCRIPTORS])
        .args([env!("CARGO_BIN_EXE_holo-exec"), "-q", "--report"])
        .arg(&report)
        .args(["--local-memory", "16M", "--"]);
    let mut filler = Filler::begin(0, command.args([PYTHON, FILLER]));
    let exec = filler.pid.clone();
    let children = fs::read_to_string(format!("/proc/{exec}/task/{exec}/children")).unwrap();
    let mut children = children.split_whitespace();
    let pid = children.find(|pid| descriptors(pid).len() > 2000).unwrap();
    let before = descriptors(pid);
    filler.fill(48);
    wait_until("it is evicted from", || {
        status(&exec)["pages_evicted"].as_u64().unwrap() >= 256
    });
    assert!(
        without_userfaultfd(pid) == before,
        "the program's own have changed"
    );
    filler.finish();
    let report: serde_json::Value = serde_json::from_slice(&fs::read(&report).unwrap()).unwrap();
    assert_eq!(report["integrity_failures"], 0, "{report}");
}

#[test]
fn what_cannot_be_paged_is_said_once_and_does_not_count_as_fitting() {
    let folder = Folder::new("alone");
    let report = folder.0.join("report.json");
    // Three of them, each with a userfaultfd of its own, fill memory when all have one, and keep it until they are told.
    let one = "import ctypes, os, sys, time\n\
               assert ctypes.CDLL(None).syscall(323, 1) >= 0\n\
               open(f'{sys.argv[1]}/{os.getpid()}', 'w')\n\
               while len(os.listdir(sys.argv[1])) < 3: time.sleep(0.01)\n\
               b = bytearray(b'x') * (96 << 20)\n\
               while len(os.listdir(sys.argv[1])) < 4: time.sleep(0.01)";
    let meeting = folder.0.join("meeting");
    fs::create_dir(&meeting).unwrap();
    let script = "for i in 1 2 3; do python3 -c \"$0\" \"$1\" & done; wait";
    let mut command = Command::new(env!("CARGO_BIN_EXE_holo-exec"));
    command
        .args([
            "--local-memory",
            "64M",
            "--report",
            report.to_str().unwrap(),
        ])
        .args(["--", "sh", "-c", script, one, meeting.to_str().unwrap()]);
    let said = to_the_end_after(&mut command, |child| {
        let pid = child.id().to_string();
        wait_until("all are left alone", || leaves_alone(&pid, 3));
        fs::write(meeting.join("end"), "").unwrap();
    });
    assert_eq!(said.status.code(), Some(0));
    let error = text(&said.stderr);
    let about: Vec<_> = error
        .lines()
        .filter(|l| l.contains("uses userfaultfd"))
        .collect();
    assert_eq!(about.len(), 1, "{error}");
    assert!(
        about[0].starts_with("holo: ") && about[0].contains(": stop that use"),
        "{error}"
    );
    assert!(!error.contains("fitted"), "{error}");
    assert!(error.contains("3 processes were not limited"), "{error}");
    let report: serde_json::Value = serde_json::from_slice(&fs::read(&report).unwrap()).unwrap();
    assert_eq!(report["processes_left_alone"], 3, "{report}");
}

/// A stretch of private anonymous memory: its beginning, its end, and the kernel's flags of it.
type Stretch = (u64, u64, String);

/// The private anonymous memory of a process, in order. Mappings that touch and are alike are one stretch: what was split
/// need not be one mapping again. The flag "sd" is left out: it says what was done to a mapping, not what it is.
fn anonymous_memory(pid: &str) -> Vec<Stretch> {
    let smaps = fs::read_to_string(format!("/proc/{pid}/smaps")).unwrap();
    let mut all: Vec<Stretch> = Vec::new();
    let mut place = None;
    for line in smaps.lines() {
        let words: Vec<&str> = line.split_ascii_whitespace().collect();
        match words[..] {
            [range, mode, _, _, inode, ..] if !range.ends_with(':') => {
                let number = |hex| u64::from_str_radix(hex, 16).unwrap();
                let (start, end) = range.split_once('-').unwrap();
                place = (mode.ends_with('p') && inode == "0").then(|| (number(start), number(end)));
            }
            ["VmFlags:", ref flags @ ..] => {
                let Some((start, end)) = place else { continue };
                let flags: Vec<&str> = flags.iter().copied().filter(|f| *f != "sd").collect();
                let flags = flags.join(" ");
                match all.last_mut() {
                    Some(last) if last.1 == start && last.2 == flags => last.1 = end,
                    _ => all.push((start, end, flags)),
                }
            }
            _ => {}
        }
    }
    all
}

/// The pages of it that are in memory.
fn resident_pages(pid: &str) -> BTreeSet<u64> {
    let pagemap = fs::File::open(format!("/proc/{pid}/pagemap")).unwrap();
    let mut pages = BTreeSet::new();
    for (start, end, _) in anonymous_memory(pid) {
        let mut entries = vec![0; usize::try_from((end - start) / 512).unwrap()];
        // Nothing is told of pages of the kernel's that a process may read (vsyscall).
        let told = pagemap.read_at(&mut entries, start / 512).unwrap();
        let is_there = |entry: &[u8]| entry[7] & 0x80 != 0;
        let there = (start..).step_by(4096).zip(entries[..told].chunks(8));
        pages.extend(there.filter(|(_, entry)| is_there(entry)).map(|(at, _)| at));
    }
    pages
}

fn mib(pages: &BTreeSet<u64>) -> usize {
    pages.len() >> 8
}

#[test]
fn after_a_detach_all_memory_is_where_and_what_it_was() {
    let mut filler = Filler::start(64137);
    let pid = filler.pid.clone();
    filler.fill(48);
    let before = (anonymous_memory(&pid), resident_pages(&pid));
    assert!(mib(&before.1) >= 48, "{before:x?}");
    let said = to_the_end(&mut holo(&["attach", &pid, "--local-memory", "16M"]));
    assert!(said.status.success(), "{}", text(&said.stderr));
    wait_until("all beyond the budget is away", || {
        mib(&resident_pages(&pid)) <= 16
    });
    assert!(status(&pid)["bytes_evicted"].as_u64() >= Some(32 << 20));
    assert_ne!(anonymous_memory(&pid), before.0, "what is held is marked");
    let said = to_the_end(&mut holo(&["detach", &pid]));
    assert!(said.status.success(), "{}", text(&said.stderr));
    let after = (anonymous_memory(&pid), resident_pages(&pid));
    assert_eq!(after.0, before.0);
    // A page of zeros needs no memory, wherever it has been.
    let memory = fs::File::open(format!("/proc/{pid}/mem")).unwrap();
    for &page in before.1.difference(&after.1) {
        let mut bytes = [1; 4096];
        memory.read_exact_at(&mut bytes, page).unwrap();
        assert_eq!(bytes, [0; 4096], "page {page:x} is not resident");
    }
    nothing_is_left_in(&pid);
    filler.finish();
}

/// Those that a process started and that run: nobody need have waited for those that ended.
fn children_of(pid: &str) -> Vec<String> {
    let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap();
    let runs = |child: &&str| {
        let status = fs::read_to_string(format!("/proc/{child}/status"));
        status.is_ok_and(|status| !status.contains("\nState:\tZ"))
    };
    let running = children.split_whitespace().filter(runs);
    running.map(str::to_owned).collect()
}

#[test]
fn a_command_of_holo_exec_is_let_go_of_and_goes_on() {
    let folder = Folder::new("let-go");
    let report = folder.0.join("report.json");
    // It is asked for by its own id, or by that of holo-exec.
    for by_its_own in [true, false] {
        let mut command = Command::new(env!("CARGO_BIN_EXE_holo-exec"));
        command
            .args(["-q", "--local-memory", "16M", "--report"])
            .arg(&report)
            .args(["--", PYTHON, FILLER]);
        let mut filler = Filler::begin(0, &mut command);
        let exec = filler.pid.clone();
        let is_command =
            |pid: &String| fs::read_to_string(format!("/proc/{pid}/comm")).unwrap() == "python3\n";
        let pid = children_of(&exec).into_iter().find(is_command).unwrap();
        filler.fill(48);
        wait_until("it is evicted from", || {
            status(&exec)["pages_evicted"].as_u64().unwrap() >= 256
        });
        assert_eq!(userfaultfds(&pid).len(), 1);
        assert!(marks_and_ring_threads(&pid)[0] > 0);
        let asked_for = if by_its_own { &pid } else { &exec };
        let said = to_the_end(&mut holo(&["detach", asked_for]));
        assert!(said.status.success(), "{}", text(&said.stderr));
        nothing_is_left_in(&pid);
        assert!(mib(&resident_pages(&pid)) >= 48);
        wait_until("holo-exec has no other child", || {
            children_of(&exec) == [pid.clone()]
        });
        // It is not taken again, and ends as it wants.
        filler.fill(48);
        nothing_is_left_in(&pid);
        assert!(mib(&resident_pages(&pid)) >= 96);
        filler.end(7);
        let report = fs::read(&report).unwrap();
        let report: serde_json::Value = serde_json::from_slice(&report).unwrap();
        assert_eq!(report["exit_code"], 7, "{report}");
        assert!(report["pages_evicted"].as_u64() >= Some(256), "{report}");
    }
}

/// In the environment of holo's processes: whose they are.
const MARK: &str = "HOLO_TEST_MARK";

/// Processes with this mark.
fn those_marked(mark: &str) -> Vec<String> {
    let wanted = format!("{MARK}={mark}");
    let is_marked = |at: &PathBuf| {
        let all = fs::read(at.join("environ")).unwrap_or_default();
        all.split(|&b| b == 0).any(|one| one == wanted.as_bytes())
    };
    let all = fs::read_dir("/proc").unwrap();
    all.map(|entry| entry.unwrap().path())
        .filter(is_marked)
        .map(|at| fs::read_to_string(at.join("comm")).unwrap_or_default())
        .collect()
}

/// `attach` is refused, with this cause and this remedy; nobody of holo's lives on.
#[track_caller]
fn is_refused(attach: &mut Command, pid: &str, cause: &str, remedy: &str) {
    let mark = format!("{}-{pid}", std::process::id());
    attach.args(["attach", pid, "--local-memory", "16M"]);
    let said = to_the_end(attach.env(MARK, &mark));
    let error = text(&said.stderr);
    assert_eq!(said.status.code(), Some(1), "{error}");
    assert_eq!(text(&said.stdout), "");
    assert!(error.starts_with("holo: "), "{error}");
    for part in [pid, cause, remedy] {
        assert!(error.contains(part), "no {part:?} in {error}");
    }
    assert!(!is_known(pid));
    wait_until("holo has ended", || those_marked(&mark).is_empty());
}

/// The same of a program that goes on as if nothing had happened.
#[track_caller]
fn is_refused_and_goes_on(attach: &mut Command, filler: &mut Filler, cause: &str, remedy: &str) {
    let pid = filler.pid.clone();
    let look = || {
        let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
        let is_asked = |line: &&str| line.starts_with("Threads:") || line.starts_with("TracerPid:");
        let status: Vec<String> = status.lines().filter(is_asked).map(str::to_owned).collect();
        (status, descriptors(&pid), anonymous_memory(&pid))
    };
    let before = look();
    is_refused(attach, &pid, cause, remedy);
    assert_eq!(look(), before);
    filler.fill(32);
    assert_eq!(marks_and_ring_threads(&pid), [0, 0]);
}

#[test]
fn whoever_lacks_the_right_is_refused() {
    let folder = Folder::new("no-right");
    let mut filler = Filler::start(64138);
    // The folder that it was built in may be closed to others.
    let copy = folder.0.join("holo");
    fs::copy(env!("CARGO_BIN_EXE_holo"), &copy).unwrap();
    // Holo locks memory before it looks at the process: that right it has.
    let mut stranger = as_user(64139);
    stranger
        .args(["--inh-caps=+ipc_lock", "--ambient-caps=+ipc_lock"])
        .arg(copy);
    is_refused_and_goes_on(
        &mut stranger,
        &mut filler,
        "it belongs to user 64138 and holo runs as user 64139",
        "run holo as that user or as root",
    );
    filler.finish();
}

#[test]
fn a_thread_of_the_kernel_is_refused() {
    const PF_KTHREAD: u64 = 0x0020_0000;
    let is_kernels = |stat: &str| {
        // The name, in parentheses, may hold anything.
        let behind_name = &stat[stat.rfind(')').unwrap()..];
        let flags = behind_name.split(' ').nth(7).unwrap();
        flags.parse::<u64>().unwrap() & PF_KTHREAD != 0
    };
    let mut all = fs::read_dir("/proc").unwrap();
    let pid = all.find_map(|entry| {
        let at = entry.unwrap().path();
        let stat = fs::read_to_string(at.join("stat")).ok()?;
        let pid = at.file_name()?.to_str()?.parse::<u32>().ok()?;
        is_kernels(&stat).then(|| pid.to_string())
    });
    let pid =
        pid.expect("threads of the kernel are only seen in the first namespace of process ids");
    is_refused(
        &mut holo(&[]),
        &pid,
        "is a thread of the kernel",
        "give a program's process id",
    );
}

#[test]
fn a_program_that_is_traced_is_refused_until_it_is_not() {
    let mut filler = Filler::start(64140);
    let pid = filler.pid.clone();
    let traces = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/scripts/traces.py");
    let mut tracer = Command::new(PYTHON)
        .args([traces, &pid])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut line = String::new();
    let mut out = BufReader::new(tracer.stdout.take().unwrap());
    out.read_line(&mut line).unwrap();
    assert_eq!(line, "traces\n");
    is_refused_and_goes_on(
        &mut holo(&[]),
        &mut filler,
        &format!("is traced by process {}", tracer.id()),
        "detach that one, then try again",
    );
    drop(tracer.stdin.take());
    assert!(tracer.wait().unwrap().success());
    let said = to_the_end(&mut holo(&["attach", &pid, "--local-memory", "16M"]));
    assert!(said.status.success(), "{}", text(&said.stderr));
    assert!(holo(&["detach", &pid]).output().unwrap().status.success());
    filler.finish();
}

#[test]
fn a_program_that_uses_userfaultfd_is_refused() {
    let mut filler = Filler::start(64141);
    filler.open_userfaultfd();
    let own = userfaultfds(&filler.pid);
    assert_eq!(own.len(), 1);
    is_refused_and_goes_on(
        &mut holo(&[]),
        &mut filler,
        "uses userfaultfd itself",
        "stop that use, or leave the process alone",
    );
    assert_eq!(userfaultfds(&filler.pid), own);
    filler.finish();
}

#[test]
#[ignore = "changes a setting of the whole machine for a moment; owner: cli"]
fn where_io_uring_is_off_it_is_said() {
    struct Restore(&'static str, String);
    // Also when the test fails; nothing in between waits without a limit.
    impl Drop for Restore {
        fn drop(&mut self) {
            let _ = fs::write(self.0, &self.1);
        }
    }
    let filler = Filler::start(64133);
    let setting = "/proc/sys/kernel/io_uring_disabled";
    let restore = Restore(setting, fs::read_to_string(setting).unwrap());
    fs::write(setting, "1").unwrap();
    let refused = to_the_end(&mut holo(&["attach", &filler.pid, "--local-memory", "16M"]));
    // It keeps its memory until its input ends.
    let mut command = Command::new(env!("CARGO_BIN_EXE_holo-exec"));
    command
        .args(["--local-memory", "16M", "--", "setpriv", "--clear-groups"])
        .args(["--reuid=64133", "--regid=64133", "/usr/bin/python3", "-c"])
        .arg("import sys; b = bytearray(b'x') * (48 << 20); print(len(b)); sys.stdin.read()")
        .stdin(Stdio::piped());
    let ran = to_the_end_after(&mut command, |child| {
        let pid = child.id().to_string();
        wait_until("it is left alone", || leaves_alone(&pid, 1));
        drop(child.stdin.take());
    });
    drop(restore);
    assert_eq!(refused.status.code(), Some(1));
    let error = text(&refused.stderr);
    assert!(
        error.contains("io_uring_disabled is 1: set it to 0"),
        "{error}"
    );
    assert_eq!(text(&ran.stdout), "50331648\n");
    let error = text(&ran.stderr);
    assert_eq!(
        error.matches("io_uring_disabled is 1: set it to 0").count(),
        1,
        "{error}"
    );
    assert!(
        error.contains("1 process was not limited") && !error.contains("fitted"),
        "{error}"
    );
    filler.finish();
}
