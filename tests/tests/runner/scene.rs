//! A checkout of its own for one test: a manifest, small programs, and the runner run on them.

#![allow(
    clippy::unwrap_used,
    reason = "only tests use it, and they are to fail where it does"
)]

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use holo_tests::watchdog::give_up;

/// Nothing that a test waits for takes this long unless it hangs.
const BOUND: Duration = Duration::from_secs(60);

static SCENES: AtomicU32 = AtomicU32::new(0);

/// A folder that goes away with the test.
pub(crate) struct Scene {
    pub(crate) folder: PathBuf,
    manifest: String,
}

/// What a run of the runner printed and how it ended.
pub(crate) struct Ran {
    pub(crate) code: Option<i32>,
    pub(crate) text: String,
}

impl Scene {
    pub(crate) fn new() -> Self {
        let number = SCENES.fetch_add(1, Ordering::Relaxed);
        let folder =
            std::env::temp_dir().join(format!("holo-test-scene-{}-{number}", std::process::id()));
        fs::create_dir_all(&folder).unwrap();
        Self {
            folder,
            manifest: String::new(),
        }
    }

    /// Adds a suite of kind `exec`: a shell script, with further lines of the manifest's entry.
    pub(crate) fn script(mut self, name: &str, more: &str, body: &str) -> Self {
        let path = self.folder.join(name);
        fs::write(&path, format!("#!/bin/sh\n{body}\n")).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        let defaults = |key: &str, line: &str| {
            if more.contains(key) {
                String::new()
            } else {
                format!("{line}\n")
            }
        };
        self.manifest += &format!(
            "[[suite]]\nname = '{name}'\nkind = 'exec'\ncommand = ['./{name}']\n{}{}{}{more}\n",
            defaults("tier", "tier = 'fast'"),
            defaults("cases", "cases = 1"),
            // Room for a busy machine: a test that is not about time must not fail by it.
            if more.starts_with("seconds") || more.contains("\nseconds") {
                ""
            } else {
                "seconds = 20\n"
            },
        );
        self
    }

    /// Adds lines to the manifest.
    pub(crate) fn manifest(mut self, lines: &str) -> Self {
        self.manifest += lines;
        self.manifest += "\n";
        self
    }

    /// Compiles a C program that lies beside these tests.
    pub(crate) fn compile(&self, name: &str) {
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("tests/runner/{name}.c"));
        let mut gcc = Command::new("gcc");
        gcc.args(["-Wall", "-pthread", "-o"])
            .arg(self.folder.join(name))
            .arg(source);
        assert!(gcc.status().unwrap().success());
    }

    /// Makes the folder a cargo workspace of one package, `toy`, without dependencies.
    pub(crate) fn toy_package(self, lib: &str) -> Self {
        fs::create_dir_all(self.folder.join("src")).unwrap();
        let package = "[package]\nname = 'toy'\nversion = '0.1.0'\nedition = '2024'\n[workspace]\n";
        fs::write(self.folder.join("Cargo.toml"), package).unwrap();
        fs::write(self.folder.join("src/lib.rs"), lib).unwrap();
        self
    }

    fn runner(&self, args: &[&str]) -> Command {
        let manifest = self.folder.join("manifest.toml");
        fs::write(&manifest, &self.manifest).unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_holo-test"));
        command
            .args(args)
            .arg("--root")
            .arg(&self.folder)
            .arg("--manifest")
            .arg(manifest);
        command
            .arg("--logs")
            .arg(self.folder.join("logs"))
            .stdin(Stdio::null());
        // What this test itself was told is not for the runner that it tests.
        command
            .env_remove("HOLO_SEED")
            .env_remove("HOLO_CASE")
            .env_remove("HOLO_SOAK_MINUTES");
        command.env("CARGO_TARGET_DIR", self.folder.join("target"));
        command
    }

    /// Runs the runner without building anything.
    pub(crate) fn run(&self, args: &[&str]) -> Ran {
        let mut all = args.to_vec();
        all.push("--no-build");
        Ran::of(self.runner(&all).output().unwrap())
    }

    /// Runs the runner with a seed given.
    pub(crate) fn run_with_seed(&self, seed: &str) -> Ran {
        Ran::of(
            self.runner(&["run", "--no-build"])
                .env("HOLO_SEED", seed)
                .output()
                .unwrap(),
        )
    }

    /// Runs the runner with what cargo builds.
    pub(crate) fn build_and_run(&self, args: &[&str]) -> Ran {
        Ran::of(self.runner(args).output().unwrap())
    }

    /// Starts the runner and lets it run.
    pub(crate) fn start(&self) -> Child {
        let mut command = self.runner(&["run", "--no-build"]);
        command.stdout(Stdio::piped()).spawn().unwrap()
    }

    /// The process number that a script wrote into a file, once it did.
    pub(crate) fn pid(&self, file: &str) -> u32 {
        let path = self.folder.join(file);
        let read = || {
            fs::read_to_string(&path)
                .ok()
                .filter(|text| text.ends_with('\n'))?
                .trim()
                .parse()
                .ok()
        };
        until(file, read)
    }
}

impl Drop for Scene {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.folder);
    }
}

impl Ran {
    pub(crate) fn of(output: Output) -> Self {
        Self {
            code: output.status.code(),
            text: String::from_utf8_lossy(&output.stdout).into_owned(),
        }
    }

    /// The run was green, with this last line.
    #[track_caller]
    pub(crate) fn passed(&self, last_line: &str) {
        assert_eq!(
            (self.code, self.text.lines().last()),
            (Some(0), Some(last_line)),
            "{}",
            self.text
        );
    }

    /// The run failed, with this last line, and said why.
    #[track_caller]
    pub(crate) fn failed(&self, last_line: &str, whys: &[&str]) {
        assert_eq!(
            (self.code, self.text.lines().last()),
            (Some(1), Some(last_line)),
            "{}",
            self.text
        );
        for why in whys {
            assert!(
                self.text.contains(why),
                "nothing about \"{why}\" in\n{}",
                self.text
            );
        }
    }
}

/// Whether a process is there and not just uncollected.
pub(crate) fn is_alive(pid: u32) -> bool {
    let stat = fs::read_to_string(Path::new("/proc").join(pid.to_string()).join("stat"));
    stat.is_ok_and(|stat| {
        !stat
            .rsplit_once(") ")
            .is_some_and(|(_, rest)| rest.starts_with('Z'))
    })
}

/// Whether a process has any thread left, dead or alive.
pub(crate) fn has_threads(pid: u32) -> bool {
    Path::new("/proc").join(pid.to_string()).exists()
}

/// Waits until `look` gives something.
#[track_caller]
pub(crate) fn until<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let started = Instant::now();
    loop {
        if let Some(found) = look() {
            return found;
        }
        if started.elapsed() >= BOUND {
            give_up(&format!("{what}: not in {BOUND:?}"));
        }
        thread::sleep(Duration::from_millis(10));
    }
}
