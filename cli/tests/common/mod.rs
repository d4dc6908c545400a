//! What the suites of both command lines need.

#![allow(dead_code, reason = "each suite uses a part of it")]

use std::fs;
use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use holo_tests::watchdog::give_up;

/// Python of the system: the one in PATH may be a script that finds another.
pub(crate) const PYTHON: &str = "/usr/bin/python3";

/// A folder of its own, gone with the test.
pub(crate) struct Folder(pub(crate) PathBuf);

impl Folder {
    pub(crate) fn new(name: &str) -> Self {
        let path =
            std::env::temp_dir().join(format!("holo-contract-{}-{name}", std::process::id()));
        fs::create_dir_all(&path).unwrap();
        Self(path)
    }

    pub(crate) fn file(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// A child that does not outlive the test.
pub(crate) struct Ends(pub(crate) Child);

impl Drop for Ends {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Ends {
    pub(crate) fn pid(&self) -> i32 {
        i32::try_from(self.0.id()).unwrap()
    }

    /// One more line of its output.
    pub(crate) fn line(&mut self) -> String {
        line_of(&mut self.0)
    }
}

pub(crate) fn holo_exec(options: &[&str], command: &[&str]) -> Command {
    let mut c = Command::new(env!("CARGO_BIN_EXE_holo-exec"));
    c.args(options).arg("--").args(command);
    c
}

pub(crate) fn holo(arguments: &[&str]) -> Command {
    let mut c = Command::new(env!("CARGO_BIN_EXE_holo"));
    c.args(arguments);
    c
}

pub(crate) fn bare(command: &[&str]) -> Command {
    let mut c = Command::new(command[0]);
    c.args(&command[1..]);
    c
}

/// A script of `tests/scripts`, with arguments that follow.
pub(crate) fn script(name: &str) -> Command {
    let mut c = Command::new(PYTHON);
    c.arg(
        Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("tests/scripts")
            .join(name),
    );
    c
}

/// Starts it with its output to be read line by line, and input that ends with it.
pub(crate) fn start(mut command: Command) -> Ends {
    let streams = command.stdin(Stdio::piped()).stdout(Stdio::piped());
    Ends(streams.spawn().unwrap())
}

pub(crate) fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

pub(crate) fn json(text: &str) -> serde_json::Value {
    serde_json::from_str(text).unwrap_or_else(|e| panic!("{e}: {text:?}"))
}

pub(crate) fn report(path: &Path) -> serde_json::Value {
    json(&fs::read_to_string(path).unwrap())
}

/// Waits for a line of the child's output.
pub(crate) fn line_of(child: &mut Child) -> String {
    let mut line = String::new();
    let mut byte = [0];
    let out = child.stdout.as_mut().unwrap();
    while out.read(&mut byte).unwrap() == 1 && byte[0] != b'\n' {
        line.push(char::from(byte[0]));
    }
    line
}

/// Waits until it is so; fails, saying `what`, when that takes too long: before the time of the suite is over
/// (tests/manifest.toml).
pub(crate) fn await_that(what: &str, mut is_so: impl FnMut() -> bool) {
    let until = Instant::now() + Duration::from_secs(10);
    while !is_so() {
        if Instant::now() >= until {
            give_up(&format!("{what}: waited for in vain"));
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}
