//! Where holo's binaries are, and which of a case's processes are holo's own.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, ensure};

use super::family::Family;
use super::process::Process;

/// The binaries under test.
#[derive(Clone, Debug)]
pub struct Binaries {
    /// `holo-exec`.
    pub exec: PathBuf,
    /// `holo`.
    pub holo: PathBuf,
}

impl Binaries {
    /// Takes them from `HOLO_BIN_DIR`, or from the folder that this program lies in.
    ///
    /// # Errors
    /// One of them is not there.
    pub fn find() -> Result<Self> {
        let folder = match std::env::var_os("HOLO_BIN_DIR") {
            Some(folder) => PathBuf::from(folder),
            None => std::env::current_exe()
                .context("finding this program's folder")?
                .parent()
                .map(Path::to_owned)
                .unwrap_or_default(),
        };
        // A case runs its commands in a folder of its own.
        let folder = folder
            .canonicalize()
            .with_context(|| format!("looking for holo's programs in {}", folder.display()))?;
        let binaries = Self {
            exec: folder.join("holo-exec"),
            holo: folder.join("holo"),
        };
        for path in [&binaries.exec, &binaries.holo] {
            ensure!(
                path.is_file(),
                "{} is missing: build it, set HOLO_BIN_DIR, or use --bare",
                path.display()
            );
        }
        Ok(binaries)
    }
}

/// The pagers among a case's processes: those whose death another one has to survive.
///
/// Empty in a bare run, and while a successor is being made.
pub fn pager_pids(family: &mut Family) -> Vec<Process> {
    family
        .members()
        .iter()
        .filter(|proc| proc.comm == "holo-pager")
        .map(Process::from)
        .collect()
}
