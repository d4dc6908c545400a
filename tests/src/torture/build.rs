//! Compiles the C programs of `tests/torture` and of folders like it.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, ensure};

/// Compiles one program into the folder; done once, then the file is taken as it is.
///
/// # Errors
/// There is no C compiler, or it refuses the program.
pub fn program(name: &str, folder: &Path) -> Result<PathBuf> {
    program_of("torture", name, folder)
}

/// The same for a program of another folder of `tests`.
///
/// # Errors
/// There is no C compiler, or it refuses the program.
pub fn program_of(sources: &str, name: &str, folder: &Path) -> Result<PathBuf> {
    let binary = folder.join(name);
    if binary.exists() {
        return Ok(binary);
    }
    let source = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join(sources)
        .join(format!("{name}.c"));
    let output = Command::new("cc")
        .args([
            "-std=gnu11",
            "-O2",
            "-g",
            "-pthread",
            "-Wall",
            "-Wextra",
            "-Werror",
            "-o",
        ])
        .arg(&binary)
        .arg(&source)
        .output()
        .context("running cc (is a C compiler installed?)")?;
    ensure!(
        output.status.success(),
        "cc refuses {}: {}",
        source.display(),
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(binary)
}
