//! Redis as an unprivileged user: filled, overwritten, saved while writing, reloaded, started anew from
//! its file, and every value compared each time.

use std::ffi::OsString;
use std::fs;
use std::os::unix::fs::chown;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};

use super::scripts::PYTHON;
use super::source;
use crate::torture::harness::launch::{Plan, Running};
use crate::torture::harness::suite::{Case, Run};
use crate::torture::harness::tool::Tool;

/// A data set.
#[derive(Clone, Copy, Debug)]
struct DataSet {
    /// 100 to 6,100 bytes each, strings, hashes and lists.
    keys: u64,
    /// Peak of private memory in a bare run, MiB, the saving child included, as `--measure` gave it.
    bare_peak_mib: u64,
    /// The same for the server that only reads its file again.
    reloaded_peak_mib: u64,
}

/// What `make test` has time for. The saving child reads every value, in the order of their hashes, and the client
/// writes and reads at random as long as that lasts: at a quarter of the memory nearly each of them is a
/// fault, which brings in 64 KiB and drives out as much. On two busy cores these are a thousand a second. With
/// fewer keys it is no quicker: too few pages of 64 KiB are left then for what is used all the time.
const SMALL: DataSet = DataSet {
    keys: 3_000,
    bare_peak_mib: 24,
    reloaded_peak_mib: 14,
};

/// What a soak has time for.
const LARGE: DataSet = DataSet {
    keys: 8_000,
    bare_peak_mib: 55,
    reloaded_peak_mib: 32,
};

/// For the whole of one server's life.
const DEADLINE: Duration = Duration::from_secs(600);

/// Seconds of overwriting and saving.
const CHURN_SECONDS: &str = "8";

/// A server's folder, and how to talk to it.
#[derive(Clone, Debug)]
pub struct Server {
    folder: PathBuf,
    user: &'static str,
    seed: u64,
    keys: u64,
}

impl Server {
    /// Makes the folder for a data set of so many keys, which belongs to the user that the server will run as.
    ///
    /// # Errors
    /// There is no unprivileged user, or the folder cannot be made.
    pub fn prepare(run: &Run<'_>, keys: u64) -> Result<Self> {
        let folder = run.scratch.join("redis");
        fs::create_dir(&folder).with_context(|| format!("making {}", folder.display()))?;
        let (user, uid) = user("redis").or_else(|_| user("nobody"))?;
        chown(&folder, Some(uid), None).context("giving the folder to the server's user")?;
        Ok(Self {
            folder,
            user,
            seed: run.seed,
            keys,
        })
    }

    /// The plan to run the server.
    ///
    /// # Errors
    /// Redis is not installed.
    pub fn plan(&self, bare_peak_mib: u64) -> Result<Plan> {
        let server = Path::new("/usr/bin/redis-server");
        // Debian's is a link to a program of another name, under which it then runs.
        let program = server
            .canonicalize()
            .context("is redis-server installed?")?;
        let mut command: Vec<OsString> = [
            "setpriv",
            "--reuid",
            self.user,
            "--init-groups",
            "--inh-caps=-all",
        ]
        .map(OsString::from)
        .to_vec();
        command.push(server.into());
        let flags = [
            "--port",
            "0",
            "--save",
            "",
            "--appendonly",
            "no",
            "--dbfilename",
            "dump.rdb",
            "--enable-debug-command",
            "yes",
            "--unixsocketperm",
            "777",
        ];
        command.extend(flags.map(OsString::from));
        for (flag, value) in [("--unixsocket", "s"), ("--dir", ""), ("--logfile", "log")] {
            command.extend([flag.into(), self.folder.join(value).into_os_string()]);
        }
        let mut plan = Plan::new(command, bare_peak_mib, DEADLINE);
        plan.target = program;
        Ok(plan)
    }

    /// Starts a phase of the client.
    ///
    /// # Errors
    /// It cannot be started.
    pub fn client(&self, state: &str, phase: &str, seconds: &str) -> Result<Tool> {
        let arguments: [OsString; 10] = [
            "-B".into(),
            "-S".into(),
            "-E".into(),
            source("redis_check.py").into(),
            self.folder.join("s").into(),
            self.folder.join(state).into(),
            self.seed.to_string().into(),
            self.keys.to_string().into(),
            phase.into(),
            seconds.into(),
        ];
        Tool::start(PYTHON, arguments)
    }

    /// Runs a phase of the client to its end.
    ///
    /// # Errors
    /// It found wrong data, or the server died or hung.
    pub fn phase(
        &self,
        running: &mut Running,
        state: &str,
        phase: &str,
        seconds: &str,
    ) -> Result<()> {
        self.client(state, phase, seconds)?
            .succeeds_beside(running)
            .map(drop)
            .with_context(|| format!("{phase} (server's log: {})", self.last_log_lines()))
    }

    fn last_log_lines(&self) -> String {
        let log = fs::read_to_string(self.folder.join("log")).unwrap_or_default();
        let lines: Vec<&str> = log.lines().rev().take(3).collect();
        lines.into_iter().rev().collect::<Vec<_>>().join(" | ")
    }
}

fn user(name: &'static str) -> Result<(&'static str, u32)> {
    let text = fs::read_to_string("/etc/passwd").context("reading /etc/passwd")?;
    let uid = text
        .lines()
        .find_map(|line| {
            line.strip_prefix(name)?
                .strip_prefix(':')?
                .split(':')
                .nth(1)?
                .parse()
                .ok()
        })
        .with_context(|| format!("no user {name}"))?;
    Ok((name, uid))
}

/// The whole life of a data set, with and without kills of the pager.
pub fn cases() -> Vec<Case> {
    vec![
        Case::new("redis", |run| life(run, SMALL, false)),
        Case::new("redis.pager_killed", |run| life(run, SMALL, true)),
        Case::new("redis_large", |run| life(run, LARGE, false)),
        Case::new("redis_large.pager_killed", |run| life(run, LARGE, true)),
    ]
}

fn life(run: &Run<'_>, data: DataSet, kill: bool) -> Result<()> {
    let server = Server::prepare(run, data.keys)?;
    let mut running = server.plan(data.bare_peak_mib)?.start(run)?;
    if kill {
        running.kill_pagers(run.seed);
    }
    for (phase, seconds) in [
        ("fill", "0"),
        ("churn", CHURN_SECONDS),
        ("reload", "0"),
        ("snapshot", "0"),
        ("verify", "0"),
    ] {
        server.phase(&mut running, "state", phase, seconds)?;
    }
    let file = server.folder.join("dump.rdb");
    server.phase(&mut running, "state", "stop", "0")?;
    running.finish()?;
    // What the child had written while the parent went on, read by a new server.
    ensure!(file.is_file(), "the server has saved nothing");
    let mut again = server.plan(data.reloaded_peak_mib)?.start(run)?;
    server.phase(&mut again, "state.snapshot", "verify", "0")?;
    server.phase(&mut again, "state.snapshot", "stop", "0")?;
    again.finish()?;
    Ok(())
}
