//! Processes to take hold of, and what can be seen of them from outside.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use holo_tests::session::cgroup_name;
use holo_tests::watchdog::give_up;

/// How long a test waits for anything before it fails.
const PATIENCE: Duration = Duration::from_secs(30);

/// Fails when what was begun then should have been there by now.
#[track_caller]
pub(crate) fn in_time(since: Instant, what: &str) {
    if since.elapsed() >= PATIENCE {
        give_up(&format!("not in time: {what}"));
    }
}

static FOLDER: OnceLock<PathBuf> = OnceLock::new();

extern "C" fn remove_builds() {
    if let Some(folder) = FOLDER.get() {
        let _ = std::fs::remove_dir_all(folder);
    }
}

/// Builds a C program of this folder, once for each run of the tests.
pub(crate) fn build(name: &str) -> PathBuf {
    let folder = FOLDER.get_or_init(|| {
        // Where an unprivileged user can start a program, which the folders of a build need not be.
        let folder = std::env::temp_dir().join(format!("holo-attach-{}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        // SAFETY: the function is called with nothing, at the end of the process.
        unsafe { libc::atexit(remove_builds) };
        folder
    });
    static BUILDING: std::sync::Mutex<()> = std::sync::Mutex::new(());
    let _one_at_a_time = BUILDING.lock().unwrap_or_else(|e| e.into_inner());
    let program = folder.join(name);
    if !program.exists() {
        let source = Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("tests/attach")
            .join(format!("{name}.c"));
        let options: &[&str] = if name == "small32" {
            &[
                "-m32",
                "-nostdlib",
                "-static",
                "-fno-pie",
                "-no-pie",
                "-fno-stack-protector",
            ]
        } else {
            &["-lpthread", "-lrt"]
        };
        let built = Command::new("cc")
            .args(["-O1", "-o"])
            .arg(&program)
            .arg(source)
            .args(options)
            .status()
            .unwrap();
        assert!(built.success());
    }
    program
}

/// A process that a test started. Killed when dropped.
pub(crate) struct Target {
    pub(crate) child: Child,
    pub(crate) pid: i32,
    input: Option<ChildStdin>,
}

impl Target {
    /// Starts it with its input and output in our hands.
    pub(crate) fn start(command: &mut Command) -> Self {
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let input = child.stdin.take();
        let pid = i32::try_from(child.id()).unwrap();
        Self { child, pid, input }
    }

    /// Starts a program that does nothing, once it really runs it.
    pub(crate) fn sleeper() -> Self {
        let target = Self::start(Command::new("sleep").arg("1000"));
        target.wait_until("it sleeps", |t| t.comm() == "sleep" && t.state() == 'S');
        target
    }

    /// Starts the busy program and waits until it says its id.
    pub(crate) fn busy(kinds: &[&str]) -> Self {
        let mut target = Self::start(Command::new(build("busy")).args(kinds));
        target.read_pid();
        target
    }

    /// Starts one of the odd programs and waits until it says its id.
    pub(crate) fn odd(kind: &str) -> Self {
        let mut target = Self::start(Command::new(build("odd")).arg(kind));
        target.read_pid();
        target
    }

    /// Takes the process's own id from its first line: a command may start another one.
    pub(crate) fn read_pid(&mut self) -> i32 {
        self.pid = self.line().parse().unwrap();
        self.pid
    }

    /// The next line of output.
    pub(crate) fn line(&mut self) -> String {
        let mut line = String::new();
        let output = self.child.stdout.as_mut().unwrap();
        // Byte by byte, so that nothing of the next line is lost.
        let mut byte = [0];
        while output.read(&mut byte).unwrap() == 1 && byte != *b"\n" {
            line.push(char::from(byte[0]));
        }
        line
    }

    /// Reads its output up to and with `end`.
    pub(crate) fn read_until(&mut self, end: &str) {
        let output = self.child.stdout.as_mut().unwrap();
        let (mut seen, mut byte) = (Vec::new(), [0]);
        while !seen.ends_with(end.as_bytes()) {
            assert_eq!(output.read(&mut byte).unwrap(), 1, "it ended");
            seen.push(byte[0]);
        }
    }

    /// Ends its input, and returns what it says until it ends.
    pub(crate) fn finish(mut self) -> (Vec<String>, bool) {
        drop(self.input.take());
        let output = self.child.stdout.take().unwrap();
        let lines = BufReader::new(output).lines().map(Result::unwrap).collect();
        let status = self.child.wait().unwrap();
        if !status.success() {
            println!("{status}");
        }
        (lines, status.success())
    }

    pub(crate) fn wait_until(&self, what: &str, seen: impl Fn(&Self) -> bool) {
        let since = Instant::now();
        while !seen(self) {
            in_time(since, what);
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    pub(crate) fn proc(&self, file: &str) -> String {
        let text = std::fs::read(format!("/proc/{}/{file}", self.pid)).unwrap();
        String::from_utf8_lossy(&text).into_owned()
    }

    pub(crate) fn comm(&self) -> String {
        self.proc("comm").trim().to_owned()
    }

    pub(crate) fn state(&self) -> char {
        state_of(self.pid).unwrap()
    }

    pub(crate) fn signal(&self, signal: i32) {
        kill(self.pid, signal);
    }

    /// Its descriptors and what they are.
    pub(crate) fn descriptors(&self) -> BTreeMap<i32, String> {
        std::fs::read_dir(format!("/proc/{}/fd", self.pid))
            .unwrap()
            .map(|entry| {
                let entry = entry.unwrap();
                let what = std::fs::read_link(entry.path()).unwrap();
                let number = entry.file_name().to_str().unwrap().parse().unwrap();
                (number, what.to_string_lossy().into_owned())
            })
            .collect()
    }

    /// Its mappings.
    pub(crate) fn maps(&self) -> String {
        self.proc("maps")
    }
}

impl Drop for Target {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

pub(crate) fn kill(pid: i32, signal: i32) {
    // SAFETY: touches no memory of ours.
    assert_eq!(unsafe { libc::kill(pid, signal) }, 0);
}

pub(crate) fn state_of(pid: i32) -> Option<char> {
    let text = std::fs::read(format!("/proc/{pid}/stat")).ok()?;
    let text = String::from_utf8_lossy(&text).into_owned();
    text[text.rfind(')')? + 2..].chars().next()
}

/// Prints how a set of times is distributed.
pub(crate) fn print_distribution(what: &str, times_us: &mut [u64]) {
    times_us.sort_unstable();
    let at = |part: f64| {
        if times_us.is_empty() {
            return 0;
        }
        let last = times_us.len() - 1;
        times_us[(last as f64 * part) as usize]
    };
    println!(
        "{what}: {} times, p50 {} us, p90 {} us, p99 {} us, max {} us",
        times_us.len(),
        at(0.5),
        at(0.9),
        at(0.99),
        at(1.0)
    );
}

/// A way to freeze a process, with a cgroup of its own.
pub(crate) struct Freezer {
    folder: PathBuf,
    file: &'static str,
    values: [&'static str; 2],
}

/// The freezers of this machine: of the old hierarchy, of the new one, or both.
pub(crate) fn freezers() -> Vec<Freezer> {
    let name = format!("holo-attach-{}", std::process::id());
    let mut all = Vec::new();
    let old = Path::new("/sys/fs/cgroup/freezer");
    if old.exists() {
        all.push(Freezer {
            folder: old.join(&name),
            file: "freezer.state",
            values: ["FROZEN", "THAWED"],
        });
    }
    for new in ["/sys/fs/cgroup", "/sys/fs/cgroup/unified"] {
        let new = Path::new(new);
        if new.join("cgroup.controllers").exists() {
            all.push(Freezer {
                folder: new.join(&name),
                file: "cgroup.freeze",
                values: ["1", "0"],
            });
        }
    }
    all
}

/// A frozen process; thawed when dropped.
pub(crate) struct Frozen {
    freezer: Freezer,
}

impl Freezer {
    pub(crate) fn freeze(self, pid: i32) -> Frozen {
        std::fs::create_dir_all(&self.folder).unwrap();
        std::fs::write(self.folder.join("cgroup.procs"), pid.to_string()).unwrap();
        let frozen = Frozen { freezer: self };
        let file = frozen.freezer.folder.join(frozen.freezer.file);
        std::fs::write(&file, frozen.freezer.values[0]).unwrap();
        let since = Instant::now();
        let is_frozen = || {
            let state = std::fs::read_to_string(&file).unwrap();
            let events = frozen.freezer.folder.join("cgroup.events");
            std::fs::read_to_string(events)
                .map_or(state.trim() == "FROZEN", |text| text.contains("frozen 1"))
        };
        while !is_frozen() {
            in_time(since, "frozen");
            std::thread::sleep(Duration::from_millis(1));
        }
        frozen
    }
}

impl Drop for Frozen {
    fn drop(&mut self) {
        let folder = &self.freezer.folder;
        let _ = std::fs::write(folder.join(self.freezer.file), self.freezer.values[1]);
        let up = folder.parent().unwrap().join("cgroup.procs");
        for pid in std::fs::read_to_string(folder.join("cgroup.procs"))
            .unwrap_or_default()
            .lines()
        {
            let _ = std::fs::write(&up, pid);
        }
        let _ = std::fs::remove_dir(folder);
    }
}

/// A control group that limits how many threads its processes may have; removed when dropped.
pub(crate) struct ThreadGroup {
    folder: PathBuf,
}

impl ThreadGroup {
    /// With a program that sleeps in it, and may have so many threads. `None` where nothing counts them.
    pub(crate) fn with_sleeper(most: u32) -> Option<(Self, Target)> {
        static MADE: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(0);
        let number = MADE.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let name = cgroup_name(&format!("threads-{number}"));
        let tops = [
            "/sys/fs/cgroup/pids",
            "/sys/fs/cgroup",
            "/sys/fs/cgroup/unified",
        ];
        let group = tops.iter().find_map(|top| {
            let folder = Path::new(top).join(&name);
            std::fs::create_dir(&folder).ok()?;
            let group = Self { folder };
            group.folder.join("pids.max").exists().then_some(group)
        })?;
        let target = Target::sleeper();
        let write =
            |file: &str, what: String| std::fs::write(group.folder.join(file), what).unwrap();
        write("pids.max", most.to_string());
        write("cgroup.procs", target.pid.to_string());
        Some((group, target))
    }
}

impl Drop for ThreadGroup {
    fn drop(&mut self) {
        // A process that was killed leaves it in a moment.
        let since = Instant::now();
        while let Err(e) = std::fs::remove_dir(&self.folder) {
            if e.kind() == std::io::ErrorKind::NotFound || since.elapsed() >= PATIENCE {
                return;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}
