//! Processes to take hold of, and what can be seen of them from outside.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

/// How long a test waits for anything before it fails.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// Builds a C program of this folder, once for each run of the tests.
pub fn build(name: &str) -> PathBuf {
    static FOLDER: OnceLock<PathBuf> = OnceLock::new();
    let folder = FOLDER.get_or_init(|| {
        let folder = PathBuf::from(env!("CARGO_TARGET_TMPDIR"))
            .join(format!("attach-{}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        // A target of another user has to be able to start it.
        folder
    });
    static BUILDING: std::sync::Mutex<()> = std::sync::Mutex::new(());
    let _one_at_a_time = BUILDING.lock().unwrap_or_else(|e| e.into_inner());
    let program = folder.join(name);
    if !program.exists() {
        let source = Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("tests/attach")
            .join(format!("{name}.c"));
        let built = Command::new("cc")
            .args(["-O1", "-o"])
            .arg(&program)
            .arg(source)
            .args(["-lpthread", "-lrt"])
            .status()
            .unwrap();
        assert!(built.success());
    }
    program
}

/// A process that a test started. Killed when dropped.
pub struct Target {
    pub child: Child,
    pub pid: i32,
    input: Option<ChildStdin>,
}

impl Target {
    /// Starts it with its input and output in our hands.
    pub fn start(command: &mut Command) -> Self {
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
    pub fn sleeper() -> Self {
        let target = Self::start(Command::new("sleep").arg("1000"));
        target.wait_until("it sleeps", |t| t.comm() == "sleep" && t.state() == 'S');
        target
    }

    /// Starts the busy program and waits until it says its id.
    pub fn busy(kinds: &[&str]) -> Self {
        let mut target = Self::start(Command::new(build("busy")).args(kinds));
        target.pid = target.line().parse().unwrap();
        target
    }

    /// The next line of output.
    pub fn line(&mut self) -> String {
        let mut line = String::new();
        let output = self.child.stdout.as_mut().unwrap();
        // Byte by byte, so that nothing of the next line is lost.
        let mut byte = [0];
        while output.read(&mut byte).unwrap() == 1 && byte != *b"\n" {
            line.push(char::from(byte[0]));
        }
        line
    }

    /// Ends its input, and returns what it says until it ends.
    pub fn finish(mut self) -> (Vec<String>, bool) {
        drop(self.input.take());
        let output = self.child.stdout.take().unwrap();
        let lines = BufReader::new(output).lines().map(Result::unwrap).collect();
        (lines, self.child.wait().unwrap().success())
    }

    pub fn wait_until(&self, what: &str, seen: impl Fn(&Self) -> bool) {
        let since = Instant::now();
        while !seen(self) {
            assert!(since.elapsed() < PATIENCE, "not in time: {what}");
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    pub fn proc(&self, file: &str) -> String {
        let text = std::fs::read(format!("/proc/{}/{file}", self.pid)).unwrap();
        String::from_utf8_lossy(&text).into_owned()
    }

    pub fn comm(&self) -> String {
        self.proc("comm").trim().to_owned()
    }

    pub fn state(&self) -> char {
        state_of(self.pid).unwrap()
    }

    pub fn signal(&self, signal: i32) {
        kill(self.pid, signal);
    }

    /// Its descriptors and what they are.
    pub fn descriptors(&self) -> BTreeMap<i32, String> {
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
    pub fn maps(&self) -> String {
        self.proc("maps")
    }
}

impl Drop for Target {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

pub fn kill(pid: i32, signal: i32) {
    // SAFETY: touches no memory of ours.
    assert_eq!(unsafe { libc::kill(pid, signal) }, 0);
}

pub fn state_of(pid: i32) -> Option<char> {
    let text = std::fs::read(format!("/proc/{pid}/stat")).ok()?;
    let text = String::from_utf8_lossy(&text).into_owned();
    text[text.rfind(')')? + 2..].chars().next()
}

/// Prints how a set of times is distributed.
pub fn print_distribution(what: &str, times_us: &mut [u64]) {
    times_us.sort_unstable();
    let at = |part: f64| {
        if times_us.is_empty() {
            return 0;
        }
        if times_us.is_empty() {
            return 0;
        }
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
