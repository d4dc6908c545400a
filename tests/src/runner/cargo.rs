//! What cargo builds: the programs under test and the test executables.

use std::collections::HashMap;
use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use serde::Deserialize;

use super::manifest::CargoTarget;
use crate::procs;

/// How long a test executable may take to list its cases.
const LIST_LIMIT: Duration = Duration::from_secs(20);

/// A built test executable.
#[derive(Debug, Clone)]
pub(crate) struct Executable {
    pub(crate) path: PathBuf,
    /// Its package's folder, where cargo would run it.
    pub(crate) folder: PathBuf,
}

/// All that was built.
#[derive(Debug, Default)]
pub(crate) struct Built {
    executables: HashMap<(String, CargoTarget), Executable>,
}

impl Built {
    pub(crate) fn find(&self, package: &str, target: &CargoTarget) -> Option<&Executable> {
        self.executables.get(&(package.to_owned(), target.clone()))
    }

    /// The test executables that `is_listed` does not know and that hold cases; these would never run.
    pub(crate) fn unlisted(&self, is_listed: impl Fn(&str, &CargoTarget) -> bool) -> Vec<String> {
        let mut names: Vec<String> = self
            .executables
            .iter()
            .filter(|((package, target), executable)| {
                !is_listed(package, target) && executable.has_cases()
            })
            .map(|((package, target), _)| format!("package \"{package}\", {}", describe(target)))
            .collect();
        names.sort();
        names
    }
}

impl Executable {
    /// Whether it lists any case; one that does not answer counts as having some.
    fn has_cases(&self) -> bool {
        let mut command = Command::new(&self.path);
        command
            .args(["--list", "--format", "terse"])
            .stdin(Stdio::null());
        let output = procs::bounded(LIST_LIMIT, move || command.output());
        output
            .and_then(Result::ok)
            .is_none_or(|output| !output.stdout.is_empty())
    }
}

/// A target in the manifest's words.
pub(crate) fn describe(target: &CargoTarget) -> String {
    match target {
        CargoTarget::Lib => "target \"lib\"".to_owned(),
        CargoTarget::Doc => "target \"doc\"".to_owned(),
        CargoTarget::Bin(name) => format!("target \"bin:{name}\""),
        CargoTarget::Test(name) => format!("target \"test:{name}\""),
    }
}

/// The cargo to call: the one that called us, where one did.
pub(crate) fn cargo() -> Command {
    Command::new(std::env::var_os("CARGO").unwrap_or_else(|| OsString::from("cargo")))
}

/// Where the workspace at `root` is built.
///
/// # Errors
/// Where cargo cannot be run or does not understand the workspace.
pub(crate) fn target_folder(root: &Path) -> Result<PathBuf> {
    #[derive(Deserialize)]
    struct Metadata {
        target_directory: PathBuf,
    }
    let mut command = cargo();
    command
        .args(["metadata", "--no-deps", "--format-version", "1"])
        .current_dir(root)
        .stderr(Stdio::inherit());
    let output = command.output().context("running cargo metadata")?;
    ensure!(
        output.status.success(),
        "cargo metadata failed in {}",
        root.display()
    );
    let metadata: Metadata =
        serde_json::from_slice(&output.stdout).context("reading cargo metadata")?;
    Ok(metadata.target_directory)
}

/// Builds the programs as users get them (release) and the tests with their assertions (dev).
///
/// # Errors
/// Where something does not compile; cargo has said what on standard error.
pub(crate) fn build(root: &Path) -> Result<Built> {
    let mut programs = cargo();
    programs
        .args(["build", "--release", "--workspace", "--bins"])
        .current_dir(root)
        .stdin(Stdio::null());
    ensure!(
        programs.status().context("running cargo build")?.success(),
        "the programs don't build"
    );

    let mut tests = cargo();
    tests.args([
        "test",
        "--no-run",
        "--workspace",
        "--message-format=json-render-diagnostics",
    ]);
    tests
        .current_dir(root)
        .stdin(Stdio::null())
        .stderr(Stdio::inherit());
    let output = tests.output().context("running cargo test --no-run")?;
    ensure!(output.status.success(), "the tests don't build");
    let mut built = Built::default();
    for line in String::from_utf8_lossy(&output.stdout)
        .lines()
        .filter(|line| line.starts_with('{'))
    {
        built.add(line)?;
    }
    Ok(built)
}

impl Built {
    /// Takes note of one of cargo's messages, if it is about a test executable.
    fn add(&mut self, message: &str) -> Result<()> {
        #[derive(Deserialize)]
        struct Message {
            reason: String,
            manifest_path: Option<PathBuf>,
            target: Option<Target>,
            profile: Option<Profile>,
            executable: Option<PathBuf>,
        }
        #[derive(Deserialize)]
        struct Target {
            kind: Vec<String>,
            name: String,
        }
        #[derive(Deserialize)]
        struct Profile {
            test: bool,
        }
        let message: Message = serde_json::from_str(message).context("reading cargo's messages")?;
        if message.reason != "compiler-artifact"
            || !message.profile.is_some_and(|profile| profile.test)
        {
            return Ok(());
        }
        let (Some(path), Some(target), Some(manifest)) =
            (message.executable, message.target, message.manifest_path)
        else {
            return Ok(());
        };
        let target = match target.kind.first().map(String::as_str) {
            Some("bin") => CargoTarget::Bin(target.name),
            Some("test") => CargoTarget::Test(target.name),
            _ => CargoTarget::Lib,
        };
        let folder = manifest
            .parent()
            .map_or_else(PathBuf::new, Path::to_path_buf);
        self.executables.insert(
            (package_name(&manifest)?, target),
            Executable { path, folder },
        );
        Ok(())
    }
}

fn package_name(manifest: &Path) -> Result<String> {
    #[derive(Deserialize)]
    struct Manifest {
        package: Package,
    }
    #[derive(Deserialize)]
    struct Package {
        name: String,
    }
    let text =
        fs::read_to_string(manifest).with_context(|| format!("reading {}", manifest.display()))?;
    let manifest: Manifest =
        toml::from_str(&text).with_context(|| format!("reading {}", manifest.display()))?;
    Ok(manifest.package.name)
}
