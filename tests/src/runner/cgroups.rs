//! Control groups that tests left behind.

use std::collections::HashSet;
use std::fs;
use std::path::{Path, PathBuf};

const ROOT: &str = "/sys/fs/cgroup";
const PREFIX: &str = "holo-test-";

/// Every control group of a test, of any run, each before the groups inside it.
pub(crate) fn of_tests() -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut todo = vec![PathBuf::from(ROOT)];
    while let Some(folder) = todo.pop() {
        for entry in fs::read_dir(folder)
            .into_iter()
            .flatten()
            .filter_map(Result::ok)
        {
            if !entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                continue;
            }
            if maker_of(&entry.path()).is_some() {
                found.push(entry.path());
            }
            todo.push(entry.path());
        }
    }
    found
}

/// Who made a test's group; None: it is no test's.
enum Maker {
    Unknown,
    Process(i32),
}

fn maker_of(group: &Path) -> Option<Maker> {
    let rest = group.file_name()?.to_str()?.strip_prefix(PREFIX)?;
    let number = rest
        .split('-')
        .next()
        .and_then(|number| number.parse().ok());
    Some(number.map_or(Maker::Unknown, Maker::Process))
}

/// The groups that came after `before` was taken and that no living process made: another run on this
/// machine keeps its own.
pub(crate) fn left_over(before: &HashSet<PathBuf>) -> Vec<PathBuf> {
    let is_stale = |group: &PathBuf| match maker_of(group) {
        None => false,
        Some(Maker::Unknown) => true,
        Some(Maker::Process(pid)) => !Path::new(&format!("/proc/{pid}")).exists(),
    };
    of_tests()
        .into_iter()
        .filter(|group| !before.contains(group) && is_stale(group))
        .collect()
}

/// Lets the processes of a group run: a frozen one does not even die.
pub(crate) fn thaw(group: &Path) {
    // Version 2 has the one file, version 1's freezer the other.
    let _ = fs::write(group.join("cgroup.freeze"), "0");
    let _ = fs::write(group.join("freezer.state"), "THAWED");
}

/// Removes groups with the groups inside them; returns those that stayed, with the reason.
pub(crate) fn remove(groups: &[PathBuf]) -> Vec<String> {
    let remove_one = |group: &PathBuf| {
        let error = remove_tree(group).err()?;
        Some(format!("{}: {error}", group.display()))
    };
    groups
        .iter()
        .rev()
        .filter(|group| group.exists())
        .filter_map(remove_one)
        .collect()
}

fn remove_tree(group: &Path) -> std::io::Result<()> {
    for entry in fs::read_dir(group)?.filter_map(Result::ok) {
        if entry.file_type()?.is_dir() {
            remove_tree(&entry.path())?;
        }
    }
    fs::remove_dir(group)
}
