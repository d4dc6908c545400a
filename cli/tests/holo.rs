//! What `holo` promises: attach, detach, status, completions, man pages, and what it ends with.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use std::collections::BTreeSet;
use std::fs;
use std::io::{Read as _, Write as _};
use std::os::unix::fs::FileExt as _;
use std::process::{Command, Output, Stdio};
use std::time::Duration;

use clap::CommandFactory as _;
use holo_cli::args::Holo;

use common::{
    Ends, Folder, PYTHON, await_that, holo, holo_exec, json, report, script, start, text,
};

/// A user that is neither root nor whoever runs the tests.
const STRANGER: &str = "65534";

fn run(arguments: &[&str]) -> Output {
    holo(arguments).stdin(Stdio::null()).output().unwrap()
}

/// Its standard output; it must have succeeded.
fn told(arguments: &[&str]) -> String {
    let said = run(arguments);
    assert!(
        said.status.success(),
        "{arguments:?}: {}",
        text(&said.stderr)
    );
    assert_eq!(text(&said.stderr), "", "{arguments:?}");
    text(&said.stdout)
}

/// Its error; it must have failed with 1 and said nothing else.
fn refused(arguments: &[&str]) -> String {
    let said = run(arguments);
    assert_eq!(
        said.status.code(),
        Some(1),
        "{arguments:?}: {}",
        text(&said.stderr)
    );
    assert_eq!(text(&said.stdout), "", "{arguments:?}");
    let error = text(&said.stderr);
    assert!(error.starts_with("holo: "), "{error}");
    error
}

/// A program with so much memory, filled.
fn program(mib: &str) -> Ends {
    let mut c = script("grows.py");
    c.arg(mib);
    let mut child = start(c);
    assert!(child.line().starts_with("filled"));
    child
}

fn checks(child: &mut Ends) {
    child
        .0
        .stdin
        .as_mut()
        .unwrap()
        .write_all(b"check\n")
        .unwrap();
    let line = child.line();
    assert!(line.starts_with("right"), "{line:?}");
}

/// Attaches with standard streams into files: the pager keeps them.
fn attach(child: &Ends, folder: &Folder, options: &[&str]) -> (Output, String) {
    let (out, err) = (folder.file("out"), folder.file("err"));
    let pid = child.pid().to_string();
    let status = holo(&["attach", &pid])
        .args(options)
        .stdin(Stdio::null())
        .stdout(fs::File::create(&out).unwrap())
        .stderr(fs::File::create(&err).unwrap())
        .status()
        .unwrap();
    let said = Output {
        status,
        stdout: fs::read(out).unwrap(),
        stderr: fs::read(err).unwrap(),
    };
    (said, pid)
}

fn attached(child: &Ends, folder: &Folder, options: &[&str]) -> String {
    let (said, pid) = attach(child, folder, options);
    assert!(said.status.success(), "{}", text(&said.stderr));
    pid
}

fn number(report: &serde_json::Value, field: &str) -> u64 {
    let value = &report[field];
    value
        .as_u64()
        .unwrap_or_else(|| panic!("{field}: {report}"))
}

#[test]
fn a_process_is_attached_paged_shown_and_detached() {
    let folder = Folder::new("whole");
    let file = folder.file("report.json");
    let mut child = program("48");
    let options = ["--local-memory", "16M", "--report", file.to_str().unwrap()];
    let (said, pid) = attach(&child, &folder, &options);
    assert!(said.status.success(), "{}", text(&said.stderr));
    assert!(text(&said.stdout).contains(&format!("holo detach {pid}")));
    await_that("eviction", || {
        let r = json(&told(&["status", &pid, "--json"]));
        number(&r, "resident_bytes") <= 17 << 20
    });
    checks(&mut child);
    // The counts are published after the work that they count.
    let mut r = serde_json::Value::Null;
    await_that("every fault is answered", || {
        r = json(&told(&["status", &pid, "--json"]));
        number(&r, "faults_waiting") == 0
    });
    assert!(number(&r, "resident_bytes") > 4 << 20, "{r}");
    assert!(number(&r, "bytes_refaulted") > 0, "{r}");
    assert!(number(&r, "attach_stop_us_max") > 0, "{r}");
    assert!(r["exit_code"].is_null(), "{r}");
    let line = told(&["status", &pid]);
    for part in [&pid[..], "of 16 MiB resident", "0 faults waiting"] {
        assert!(line.contains(part), "no {part:?} in {line:?}");
    }
    let line = told(&["detach", &pid]);
    assert!(line.starts_with("holo: 16 MiB budget"), "{line}");
    checks(&mut child);
    let r = report(&file);
    assert_eq!(number(&r, "schema"), 2);
    assert_eq!(number(&r, "processes"), 1);
    assert_eq!(number(&r, "resident_bytes"), 0, "{r}");
    assert!(refused(&["detach", &pid]).contains("is not held by holo"));
}

#[test]
fn attach_and_detach_speak_json() {
    let folder = Folder::new("json");
    let child = program("1");
    let (said, pid) = attach(&child, &folder, &["--local-memory", "16M", "--json"]);
    assert!(said.status.success(), "{}", text(&said.stderr));
    let r = json(&text(&said.stdout));
    assert_eq!(number(&r, "local_memory_bytes"), 16 << 20);
    let r = json(&told(&["detach", &pid, "--json"]));
    assert_eq!(number(&r, "processes"), 1);
    assert_eq!(number(&r, "bytes_evicted"), 0);
}

#[test]
fn what_cannot_be_attached_or_asked_is_said_with_1() {
    let folder = Folder::new("cannot");
    let mut gone = program("1");
    gone.0.kill().unwrap();
    gone.0.wait().unwrap();
    let (said, pid) = attach(&gone, &folder, &["--local-memory", "16M"]);
    assert_eq!(said.status.code(), Some(1));
    assert!(text(&said.stderr).contains(&pid), "{}", text(&said.stderr));
    for action in ["status", "detach"] {
        let error = refused(&[action, &pid]);
        assert!(error.contains("is not held by holo"), "{error}");
    }
    let child = program("1");
    let pid = attached(&child, &folder, &["--local-memory", "16M"]);
    let (said, _) = attach(&child, &folder, &["--local-memory", "16M"]);
    assert_eq!(said.status.code(), Some(1));
    let error = text(&said.stderr);
    assert!(error.contains("held by holo already"), "{error}");
    told(&["detach", &pid]);
}

/// The kernel does not say any more what it has: nobody may promise to limit it, or that it fits.
#[test]
fn a_program_without_its_first_thread_is_not_said_to_be_limited() {
    let folder = Folder::new("headless");
    let mut child = start(script("headless.py"));
    assert!(child.line().starts_with("filled"));
    let (said, _) = attach(&child, &folder, &["--local-memory", "16M"]);
    assert_eq!(said.status.code(), Some(1));
    let error = text(&said.stderr);
    assert!(
        error.contains("first thread") && error.contains("pthread_join"),
        "{error}"
    );
    drop(child.0.stdin.take());
    assert_eq!(child.0.wait().unwrap().code(), Some(7));

    let path = format!("{}/tests/scripts/headless.py", env!("CARGO_MANIFEST_DIR"));
    let mut child = Ends(
        holo_exec(&["--local-memory", "16M"], &[PYTHON, &path])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap(),
    );
    assert!(child.line().starts_with("filled"));
    std::thread::sleep(Duration::from_secs(2));
    drop(child.0.stdin.take());
    let mut error = String::new();
    child
        .0
        .stderr
        .take()
        .unwrap()
        .read_to_string(&mut error)
        .unwrap();
    assert_eq!(child.0.wait().unwrap().code(), Some(7));
    assert!(error.contains("first thread"), "{error}");
    assert!(
        error.contains("nothing was paged; 1 process was not limited"),
        "{error}"
    );
}

#[test]
fn a_report_that_cannot_be_written_is_said() {
    let folder = Folder::new("full");
    let mut child = program("1");
    let pid = attached(
        &child,
        &folder,
        &["--local-memory", "16M", "--report", "/dev/full"],
    );
    told(&["detach", &pid]);
    checks(&mut child);
    let error = fs::read_to_string(folder.file("err")).unwrap();
    assert!(error.contains("cannot write the report"), "{error:?}");
    assert!(error.contains("No space left"), "{error:?}");
    let (said, _) = attach(
        &child,
        &folder,
        &[
            "--local-memory",
            "16M",
            "--report",
            "/no/such/folder/report",
        ],
    );
    assert_eq!(said.status.code(), Some(1));
    assert!(text(&said.stderr).contains("/no/such/folder"));
}

#[test]
fn an_attach_reports_to_nothing_that_somebody_has_to_read() {
    let folder = Folder::new("pipe");
    let child = program("1");
    let pipe = folder.file("pipe");
    let made = Command::new("mkfifo").arg(&pipe).status();
    assert!(made.unwrap().success());
    // Nobody opens the first one for reading; the second one is read here.
    for report in [pipe.to_str().unwrap(), "/dev/stdout"] {
        let pid = child.pid().to_string();
        let error = refused(&["attach", &pid, "--local-memory", "16M", "--report", report]);
        assert!(error.contains(report), "{error}");
        assert!(error.contains("holo detach --json"), "{error}");
        assert!(refused(&["status", &pid]).contains("is not held by holo"));
    }
}

/// CPU seconds of processes, by their clocks.
fn cpu_s(pids: &[i32]) -> f64 {
    let list = pids.iter().map(|p| format!("{p},")).collect::<String>();
    let sum =
        format!("import time; print(sum(time.clock_gettime((~p << 3) | 2) for p in [{list}]))");
    let said = Command::new(PYTHON).args(["-c", &sum]).output().unwrap();
    text(&said.stdout).trim().parse().unwrap()
}

/// Pager, guardian and warden that hold `mark` open.
fn holos_own(mark: &std::path::Path) -> Vec<(String, i32)> {
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc").unwrap().flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|n| n.parse().ok()) else {
            continue;
        };
        let fds = fs::read_dir(entry.path().join("fd"));
        let holds = fds.into_iter().flatten().flatten();
        if holds
            .into_iter()
            .any(|fd| fs::read_link(fd.path()).is_ok_and(|l| l == mark))
        {
            let name = fs::read_to_string(entry.path().join("comm")).unwrap_or_default();
            found.push((name.trim().to_owned(), pid));
        }
    }
    found
}

#[test]
fn the_cpu_time_is_that_of_all_of_holos_processes() {
    let folder = Folder::new("cpu");
    let file = folder.file("report.json");
    let mut child = program("48");
    let options = ["--local-memory", "16M", "--report", file.to_str().unwrap()];
    let pid = attached(&child, &folder, &options);
    checks(&mut child);
    let all = holos_own(&file);
    let names: Vec<_> = all.iter().map(|(name, _)| name.as_str()).collect();
    for name in ["holo-pager", "holo-guardian", "holo-warden"] {
        assert!(names.contains(&name), "{names:?}");
    }
    let others: Vec<i32> = all
        .iter()
        .filter(|(name, _)| name != "holo-pager")
        .map(|&(_, pid)| pid)
        .collect();
    // What they do not note at once is little, and less than what they take to attach.
    let of_others = cpu_s(&others);
    assert!(of_others > 0.0);
    let slack_s = (of_others / 2.0).min(0.005);
    let used = cpu_s(&all.iter().map(|&(_, pid)| pid).collect::<Vec<_>>());
    let r = json(&told(&["status", &pid, "--json"]));
    let counted = r["holo_cpu_s"].as_f64().unwrap();
    assert!(counted + slack_s >= used, "{counted} of {used}");
    // One that ends takes nothing with it.
    let guardian = all
        .iter()
        .find(|(name, _)| name == "holo-guardian")
        .unwrap()
        .1;
    let killed = Command::new("/bin/kill")
        .args(["-9", &guardian.to_string()])
        .status();
    assert!(killed.unwrap().success());
    await_that("another guardian", || {
        let now = holos_own(&file);
        now.iter()
            .any(|(name, pid)| name == "holo-guardian" && *pid != guardian)
    });
    let r = json(&told(&["detach", &pid, "--json"]));
    assert!(r["holo_cpu_s"].as_f64().unwrap() + slack_s >= used, "{r}");
}

#[test]
fn what_is_left_alone_is_counted_over_all_processes() {
    let folder = Folder::new("left");
    let file = folder.file("report.json");
    let grows = script("grows.py");
    let path = grows.get_args().next().unwrap().to_str().unwrap();
    let options = [
        "-q",
        "--local-memory",
        "24M",
        "--report",
        file.to_str().unwrap(),
    ];
    // The last one, which is the last to be looked at, locks nothing.
    let two =
        format!("exec 3<&0; {PYTHON} {path} 32 8 <&3 & {PYTHON} {path} 32 <&3 & wait $!; wait");
    let mut child = start(holo_exec(&options, &["sh", "-c", &two]));
    for _ in 0..2 {
        assert!(child.line().starts_with("filled"));
    }
    await_that("two processes", || {
        let r = json(&told(&["status", &child.pid().to_string(), "--json"]));
        number(&r, "processes") == 2
    });
    let id = child.pid().to_string();
    let locked = || json(&told(&["status", &id, "--json"]))["pages_left_alone"]["locked"].as_u64();
    // A survey is made when there is pressure: what the two use keeps it up.
    await_that("a look at the locked memory", || {
        checks(&mut child);
        locked() >= Some(128)
    });
    // Each is looked at once a second.
    std::thread::sleep(std::time::Duration::from_millis(1500));
    drop(child.0.stdin.take());
    assert!(child.0.wait().unwrap().success());
    let r = report(&file);
    assert!(
        r["pages_left_alone"]["locked"].as_u64().unwrap() >= 128,
        "{r}"
    );
}

/// The child of this process with this name.
fn child_called(parent: &str, name: &str) -> String {
    let children = fs::read_to_string(format!("/proc/{parent}/task/{parent}/children")).unwrap();
    let is_it = |p: &&str| {
        fs::read_to_string(format!("/proc/{p}/comm")).is_ok_and(|c| c.trim_end() == name)
    };
    let found = children.split_whitespace().find(is_it);
    found
        .unwrap_or_else(|| panic!("no {name} of {parent}"))
        .to_owned()
}

/// The pager of this `holo-exec`.
fn pager_of(exec: &str) -> String {
    child_called(&child_called(exec, "holo-guardian"), "holo-pager")
}

/// Inverts a bit in each 64 bytes of what this pager's store holds of a program's random bytes: those in which many
/// values are found. (Where the store's own numbers are damaged, a page is not found at all.)
fn damage_the_store(pager: &str) {
    let numbers = format!("/proc/{pager}/fd");
    let store = fs::read_dir(numbers)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .find(|p| fs::read_link(p).is_ok_and(|to| to.to_string_lossy().contains("holo-store")));
    let file = fs::File::options()
        .read(true)
        .write(true)
        .open(store.unwrap())
        .unwrap();
    let (mut at, mut damaged) = (0, 0);
    let mut bytes = vec![0_u8; 1 << 16];
    // It fills from its beginning on; behind that it is one great hole.
    while at < 256 << 20 && file.read_exact_at(&mut bytes, at).is_ok() {
        let before = damaged;
        for piece in bytes.chunks_mut(64) {
            let mut seen = [false; 256];
            piece.iter().for_each(|&b| seen[usize::from(b)] = true);
            if seen.iter().filter(|&&s| s).count() > 44 {
                piece[0] ^= 1;
                damaged += piece.len();
            }
        }
        if damaged > before {
            file.write_all_at(&bytes, at).unwrap();
        }
        at += bytes.len() as u64;
    }
    assert!(damaged > 8 << 20, "only {damaged} bytes were stored");
}

#[test]
fn a_process_whose_stored_pages_are_damaged_is_stopped_and_told_why() {
    let folder = Folder::new("damaged");
    let (file, errors) = (folder.file("report.json"), folder.file("err"));
    let grows = script("grows.py");
    let path = grows.get_args().next().unwrap().to_str().unwrap();
    let options = ["--local-memory", "16M", "--report", file.to_str().unwrap()];
    let mut command = holo_exec(&options, &[PYTHON, path, "40"]);
    command.stderr(fs::File::create(&errors).unwrap());
    let mut child = start(command);
    assert!(child.line().starts_with("filled"));
    let exec = child.pid().to_string();
    await_that("eviction", || {
        let r = json(&told(&["status", &exec, "--json"]));
        number(&r, "resident_bytes") <= 17 << 20
    });
    damage_the_store(&pager_of(&exec));
    let input = child.0.stdin.as_mut().unwrap();
    input.write_all(b"check\n").unwrap();
    assert_eq!(child.line(), "", "nothing is right any more");
    assert_eq!(child.0.wait().unwrap().code(), Some(128 + 9));
    let said = fs::read_to_string(&errors).unwrap();
    let told = said.lines().find(|l| l.contains("checksum"));
    let why = told.unwrap_or_else(|| panic!("{said:?}"));
    assert!(why.starts_with("holo: process "), "{why}");
    assert!(why.contains("page 0x"), "{why}");
    let r = report(&file);
    assert_eq!(number(&r, "exit_code"), 137);
    assert!(number(&r, "integrity_failures") > 0, "{r}");
}

#[test]
fn a_command_is_asked_for_by_its_id_or_holo_execs() {
    let grows = script("grows.py");
    let path = grows.get_args().next().unwrap().to_str().unwrap();
    let mut child = start(holo_exec(
        &["-q", "--local-memory", "16M"],
        &[PYTHON, path, "32"],
    ));
    let command = child.line().split(' ').nth(1).unwrap().to_owned();
    let exec = child.pid().to_string();
    let by_id = || {
        for id in [&exec, &command] {
            let r = json(&told(&["status", id, "--json"]));
            assert_eq!(number(&r, "local_memory_bytes"), 16 << 20);
            assert!(number(&r, "resident_bytes") > 1 << 20, "{r}");
        }
    };
    by_id();
    // Also after a take-over.
    let first = pager_of(&exec);
    assert!(
        Command::new("/bin/kill")
            .args(["-9", &first])
            .status()
            .unwrap()
            .success()
    );
    await_that("a take-over", || {
        number(&json(&told(&["status", &exec, "--json"])), "takeovers") == 1
    });
    by_id();
    checks(&mut child);
    // A child is known, but is not let go of alone.
    child
        .0
        .stdin
        .as_mut()
        .unwrap()
        .write_all(b"fork\n")
        .unwrap();
    let forked = child.line().split(' ').nth(1).unwrap().to_owned();
    assert_ne!(forked, command);
    await_that("the child", || run(&["status", &forked]).status.success());
    let error = refused(&["detach", &forked]);
    assert!(error.contains(&format!("holo detach {command}")), "{error}");
    let own = std::process::id().to_string();
    assert!(refused(&["status", &own]).contains("is not held by holo"));
    drop(child.0.stdin.take());
    assert!(child.0.wait().unwrap().success());
}

fn squatter(pid: &str) -> Ends {
    let mut c = script("squats.py");
    c.args([STRANGER, pid]);
    let mut squatter = start(c);
    assert!(squatter.line().starts_with("listening"));
    squatter
}

#[test]
fn a_stranger_in_the_place_of_a_pager_is_not_believed() {
    let folder = Folder::new("stranger");
    let child = program("1");
    let pid = child.pid().to_string();
    let stranger = squatter(&pid);
    let who = format!("process {} of user {STRANGER}", stranger.pid());
    for action in ["status", "detach"] {
        let error = refused(&[action, &pid]);
        assert!(error.contains(&who), "{error}");
    }
    let (said, _) = attach(&child, &folder, &["--local-memory", "16M"]);
    assert_eq!(said.status.code(), Some(1));
    let error = text(&said.stderr);
    assert!(error.contains(&who), "{error}");
    drop(stranger);
    attached(&child, &folder, &["--local-memory", "16M"]);
    told(&["detach", &pid]);
}

#[test]
fn a_stranger_in_the_place_of_a_pager_keeps_no_command_from_running() {
    let mut c = script("squats.py");
    c.args([
        STRANGER,
        "self",
        env!("CARGO_BIN_EXE_holo-exec"),
        "--",
        "sh",
        "-c",
        "echo ran; exit 3",
    ]);
    let said = c.stdin(Stdio::null()).output().unwrap();
    let error = text(&said.stderr);
    assert_eq!(said.status.code(), Some(3), "{error}");
    assert_eq!(text(&said.stdout), "ran\n");
    assert!(error.contains(&format!("of user {STRANGER}")), "{error}");
}

#[test]
fn a_stranger_is_not_answered() {
    let folder = Folder::new("asked");
    let mut child = program("1");
    let pid = attached(&child, &folder, &["--local-memory", "16M"]);
    for word in ["status", "detach"] {
        let said = script("asks.py")
            .args([STRANGER, &pid, word])
            .output()
            .unwrap();
        let answer = json(&text(&said.stdout));
        let why = answer["error"].as_str().unwrap();
        assert!(why.contains("only root"), "{why}");
    }
    // Nor does it ask for ever.
    let copy = folder.file("holo");
    fs::copy(env!("CARGO_BIN_EXE_holo"), &copy).unwrap();
    let said = Command::new("setpriv")
        .args(["--reuid", STRANGER, "--clear-groups"])
        .arg(copy)
        .args(["status", &pid])
        .output()
        .unwrap();
    assert_eq!(said.status.code(), Some(1));
    let error = text(&said.stderr);
    assert!(error.contains("only root"), "{error}");
    told(&["status", &pid]);
    told(&["detach", &pid]);
    checks(&mut child);
}

#[test]
fn wrong_usage_is_refused_with_2() {
    for arguments in [
        &[][..],
        &["no-such-action"],
        &["attach"],
        &["attach", "1"],
        &["attach", "x", "--local-memory", "16M"],
        &["attach", "1", "--local-memory", "12X"],
        &["status", "--no-such-option", "1"],
        &["detach"],
        &["completions", "no-such-shell"],
        &["completions", "bash", "no-such-program"],
    ] {
        let said = run(arguments);
        assert_eq!(said.status.code(), Some(2), "{arguments:?}");
        let error = text(&said.stderr);
        assert!(
            error.contains("--help") || error.contains("Usage"),
            "{error}"
        );
    }
}

#[test]
fn help_says_what_it_ends_with() {
    for action in [
        &[][..],
        &["attach"],
        &["detach"],
        &["status"],
        &["completions"],
        &["man"],
    ] {
        let mut arguments = action.to_vec();
        arguments.push("--help");
        let help = told(&arguments);
        assert!(help.contains("Exit codes: 0"), "{arguments:?}: {help}");
    }
}

#[test]
fn completions_are_one_script_a_program() {
    let complete = |shell, program| told(&["completions", shell, program]);
    for program in ["holo", "holo-exec"] {
        let zsh = complete("zsh", program);
        let first: Vec<_> = zsh.lines().filter(|l| l.starts_with("#compdef")).collect();
        assert_eq!(first, [format!("#compdef {program}")]);
        assert!(zsh.starts_with("#compdef"));
        assert!(complete("fish", program).contains(&format!("complete -c {program} ")));
        // Bash itself says whether it knows how to complete the program, and only that.
        let mut bash = Command::new("bash");
        bash.args([
            "--norc",
            "-c",
            "eval \"$1\"; complete -p | grep -o '[^ ]*$'",
            "bash",
        ]);
        let said = bash.arg(complete("bash", program)).output().unwrap();
        assert_eq!(
            text(&said.stdout),
            format!("{program}\n"),
            "{}",
            text(&said.stderr)
        );
    }
    assert_eq!(told(&["completions", "zsh"]), complete("zsh", "holo"));
}

#[test]
fn a_reader_that_goes_is_no_failure_and_a_full_disk_is() {
    let binary = env!("CARGO_BIN_EXE_holo");
    let said = Command::new("bash")
        .args([
            "-c",
            "\"$1\" completions bash | head -c 1; echo \" ${PIPESTATUS[0]}\"",
            "bash",
        ])
        .arg(binary)
        .output()
        .unwrap();
    assert_eq!(
        (text(&said.stdout).as_str(), text(&said.stderr).as_str()),
        ("_ 0\n", "")
    );
    let full = fs::File::options().write(true).open("/dev/full").unwrap();
    let said = holo(&["completions", "bash"])
        .stdout(full)
        .output()
        .unwrap();
    assert_eq!(said.status.code(), Some(1));
    assert!(
        text(&said.stderr).contains("No space left"),
        "{}",
        text(&said.stderr)
    );
}

#[test]
fn man_pages_are_written_for_every_command() {
    let folder = Folder::new("man");
    told(&["man", folder.0.to_str().unwrap()]);
    let commands = Holo::command();
    let mut want: BTreeSet<_> = commands
        .get_subcommands()
        .map(|command| format!("holo-{}.1", command.get_name()))
        .collect();
    assert!(want.contains("holo-man.1"), "{want:?}");
    want.extend(["holo.1".to_owned(), "holo-exec.1".to_owned()]);
    let written: BTreeSet<_> = fs::read_dir(&folder.0)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    assert_eq!(written, want);
    for page in &want {
        let text = fs::read_to_string(folder.file(page)).unwrap();
        assert!(text.contains("Exit codes"), "{page}: {text}");
    }
    let file = folder.file("holo.1");
    let error = refused(&["man", file.to_str().unwrap()]);
    assert!(error.contains(file.to_str().unwrap()), "{error}");
}
