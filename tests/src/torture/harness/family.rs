//! The processes of one case: whatever it started, also what has left its parent.
//!
//! A case's command carries a token in its environment. A process belongs to the case if it has the
//! token, or a parent that belonged when it was seen. Only processes that started later than the case
//! are asked, and none is ever signalled that was not found this way.

use std::collections::{HashMap, HashSet};
use std::fs;
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use super::process::{Process, Stat};

/// Name of the environment variable that carries the token.
pub const TOKEN_VARIABLE: &str = "HOLO_TEST_CASE";

/// Reading an environment needs the process's memory lock: past this it is given up.
const ENVIRON_WAIT: Duration = Duration::from_secs(1);

/// The processes that one command started.
#[derive(Debug)]
pub struct Family {
    token: String,
    since: u64,
    members: HashSet<Process>,
    strangers: HashSet<Process>,
}

impl Family {
    /// A family for the command that will carry `token`; to be made before the command starts.
    #[must_use]
    pub fn new(token: String) -> Self {
        // A fresh process's start time is now: only younger processes can belong to the case.
        let since = std::process::Command::new("/bin/true")
            .spawn()
            .ok()
            .and_then(|mut child| {
                let started = Process::of(child.id()).map(|process| process.started);
                child.wait().ok()?;
                started
            })
            .unwrap_or(0);
        Self {
            token,
            since,
            members: HashSet::new(),
            strangers: HashSet::new(),
        }
    }

    /// Takes a process in that is known to belong: the command itself, just started.
    ///
    /// Its environment may not tell: between two images it is empty, and some programs write their title
    /// over it.
    pub fn adopt(&mut self, pid: u32) {
        self.members.extend(Process::of(pid));
    }

    /// The processes that run now, oldest first; zombies are not counted.
    pub fn members(&mut self) -> Vec<Stat> {
        let all = Stat::all();
        let by_pid: HashMap<u32, Process> = all
            .iter()
            .map(|stat| (stat.process.pid, stat.process))
            .collect();
        loop {
            let before = self.members.len();
            for stat in &all {
                if stat.process.started < self.since || self.members.contains(&stat.process) {
                    continue;
                }
                let of_member = by_pid
                    .get(&stat.parent)
                    .is_some_and(|parent| self.members.contains(parent));
                if of_member || self.has_token(stat) {
                    self.members.insert(stat.process);
                }
            }
            // A child may stand before its parent in the list.
            if self.members.len() == before {
                break;
            }
        }
        let mut alive: Vec<Stat> = all
            .into_iter()
            .filter(|stat| {
                self.members.contains(&stat.process) && stat.state != 'Z' && stat.state != 'X'
            })
            .collect();
        alive.sort_by_key(|stat| (stat.process.started, stat.process.pid));
        alive
    }

    fn has_token(&mut self, stat: &Stat) -> bool {
        if self.strangers.contains(&stat.process) || stat.state == 'Z' {
            return false;
        }
        let (sender, receiver) = mpsc::channel();
        let pid = stat.process.pid;
        thread::spawn(move || {
            // The receiver may have given up: then nobody wants the answer.
            let _ = sender.send(fs::read(format!("/proc/{pid}/environ")));
        });
        let wanted = format!("{TOKEN_VARIABLE}={}", self.token);
        match receiver.recv_timeout(ENVIRON_WAIT) {
            Ok(Ok(environment)) if !environment.is_empty() => {
                let found = environment
                    .split(|byte| *byte == 0)
                    .any(|entry| entry == wanted.as_bytes());
                // A process between fork and exec has its parent's environment: one that has not the
                // token now cannot get it later, except by exec from a member, which is a member then.
                if !found {
                    self.strangers.insert(stat.process);
                }
                found
            }
            // Empty: between two images, or a kernel thread. Gone or blocked: nothing to say.
            Ok(_) | Err(_) => false,
        }
    }

    /// The members that execute this program file.
    pub fn running(&mut self, program: &std::path::Path) -> Vec<Process> {
        self.members()
            .into_iter()
            .map(|stat| stat.process)
            .filter(|process| process.program().as_deref() == Some(program))
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    #[test]
    fn an_orphan_that_left_its_session_still_belongs() {
        let token = format!("family-{}", std::process::id());
        let mut family = Family::new(token.clone());
        let mut child = Command::new("/bin/sh")
            .args(["-c", "setsid sleep 30 & exit 0"])
            .env(TOKEN_VARIABLE, &token)
            .spawn()
            .unwrap();
        child.wait().unwrap();
        let deadline = std::time::Instant::now() + Duration::from_secs(5);
        let found = loop {
            let members = family.members();
            if members.iter().any(|stat| stat.name == "sleep") {
                break members;
            }
            assert!(
                std::time::Instant::now() < deadline,
                "the orphan was not found"
            );
            thread::sleep(super::super::LOOK_EVERY);
        };
        for stat in &found {
            stat.process.signal("KILL").unwrap();
        }
        assert!(
            found
                .iter()
                .all(|stat| stat.process.pid != std::process::id())
        );
    }

    #[test]
    fn a_process_without_the_token_is_a_stranger() {
        let mut family = Family::new("nobody-has-this".to_owned());
        let mut child = Command::new("/bin/sleep").arg("5").spawn().unwrap();
        assert!(family.members().is_empty());
        child.kill().unwrap();
        child.wait().unwrap();
    }
}
