//! The seed of each suite: the same for the same commit, another one for each suite and round.

use std::path::Path;
use std::process::Command;

/// Where the seeds of a run come from.
#[derive(Debug, Clone)]
pub(crate) enum SeedSource {
    /// Mixed from the commit's hash.
    Commit(String),
    /// The same for every suite, as somebody asked for.
    Given(u64),
}

impl SeedSource {
    /// `given` where there is one, else the commit that `root` is at.
    ///
    /// Outside of a git checkout (a source archive) the name is empty: still the same seeds every time.
    pub(crate) fn find(given: Option<u64>, root: &Path) -> Self {
        given.map_or_else(
            || Self::Commit(commit(root).unwrap_or_default()),
            Self::Given,
        )
    }

    /// The seed of a suite in a round (0 outside of soaks).
    pub(crate) fn seed(&self, suite: &str, round: u64) -> u64 {
        match self {
            Self::Given(seed) => *seed,
            Self::Commit(hash) => fnv1a(&[hash.as_bytes(), suite.as_bytes(), &round.to_le_bytes()]),
        }
    }
}

fn commit(root: &Path) -> Option<String> {
    // A checkout that belongs to somebody else (as in a container) is read all the same: only its name is.
    let output = Command::new("git")
        .args(["-c", "safe.directory=*", "-C"])
        .arg(root)
        .args(["rev-parse", "HEAD"])
        .output()
        .ok()?;
    output
        .status
        .success()
        .then(|| String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

/// FNV-1a over all parts, each closed by a byte that text does not hold.
fn fnv1a(parts: &[&[u8]]) -> u64 {
    let bytes = parts.iter().flat_map(|part| part.iter().chain(&[0xff]));
    bytes.fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn seed_depends_on_commit_suite_and_round_alone() {
        let source = SeedSource::Commit("abc".into());
        assert_eq!(
            source.seed("s", 0),
            SeedSource::Commit("abc".into()).seed("s", 0)
        );
        assert_ne!(source.seed("s", 0), source.seed("t", 0));
        assert_ne!(source.seed("s", 0), source.seed("s", 1));
        assert_ne!(
            source.seed("s", 0),
            SeedSource::Commit("abd".into()).seed("s", 0)
        );
    }

    #[test]
    fn given_seed_reaches_every_suite_as_it_is() {
        assert_eq!(SeedSource::find(Some(7), Path::new("/")).seed("any", 3), 7);
    }
}
