//! What `holo-exec` promises: a command under it sees, and leaves behind, what it would without.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use std::collections::BTreeSet;
use std::fs;
use std::io::Write as _;
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::process::ExitStatusExt as _;
use std::process::{Command, Stdio};
use std::time::Instant;

use holo_proto::Report;
use serde_json::{Value, json};

use common::{
    Folder, PYTHON, await_that, bare, holo, holo_exec, json, line_of, report, script, start, text,
};

#[test]
fn exit_codes_are_the_commands() {
    for code in [0, 1, 7, 125, 255] {
        let with = holo_exec(&["-q"], &["sh", "-c", &format!("exit {code}")]).status();
        assert_eq!(with.unwrap().code(), Some(code));
    }
}

#[test]
fn a_signal_that_kills_the_command_is_told_as_shells_do() {
    for (name, number) in [("TERM", 15), ("KILL", 9), ("SEGV", 11), ("USR1", 10)] {
        let with = holo_exec(
            &["-q"],
            &["sh", "-c", &format!("kill -{name} $$; sleep 60")],
        )
        .status()
        .unwrap();
        assert_eq!(with.code(), Some(128 + number), "SIG{name}");
    }
}

#[test]
fn a_command_that_cannot_be_run_is_said_so() {
    let folder = Folder::new("cannot");
    let plain = folder.file("plain");
    fs::write(&plain, "no program").unwrap();
    fs::set_permissions(&plain, fs::Permissions::from_mode(0o644)).unwrap();
    for (command, code) in [
        ("/no/such/command", 127),
        ("no-such-command-anywhere", 127),
        (plain.to_str().unwrap(), 126),
        ("/", 126),
    ] {
        let file = folder.file("report");
        let said = holo_exec(&["--report", file.to_str().unwrap()], &[command])
            .output()
            .unwrap();
        assert_eq!(said.status.code(), Some(code), "{command}");
        assert!(
            text(&said.stderr).contains(command),
            "{}",
            text(&said.stderr)
        );
        assert_eq!(report(&file)["exit_code"], code, "{command}");
    }
}

#[test]
fn streams_are_the_commands() {
    let input: Vec<u8> = (0..300_000_u32).flat_map(u32::to_le_bytes).collect();
    let mut child = holo_exec(&["-q"], &["cat"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let (mut stdin, bytes) = (child.stdin.take().unwrap(), input.clone());
    let writer = std::thread::spawn(move || stdin.write_all(&bytes));
    let said = child.wait_with_output().unwrap();
    writer.join().unwrap().unwrap();
    assert!(said.status.success());
    assert!(
        said.stdout == input,
        "{} bytes came back",
        said.stdout.len()
    );
    assert_eq!(text(&said.stderr), "");

    let said = holo_exec(&[], &["sh", "-c", "echo out; echo err >&2"])
        .output()
        .unwrap();
    assert_eq!(text(&said.stdout), "out\n");
    let lines: Vec<_> = text(&said.stderr).lines().map(str::to_owned).collect();
    assert_eq!(
        lines.len(),
        2,
        "the command's line and the summary: {lines:?}"
    );
    assert!(
        lines[0] == "err" && lines[1].starts_with("holo: "),
        "{lines:?}"
    );
}

#[test]
fn environment_folder_limits_and_descriptors_are_as_bare() {
    let folder = Folder::new("same");
    let show = "env | sort | grep -v '^_='; pwd; umask; ulimit -a; ulimit -Ha; ls /proc/self/fd | wc -l; \
                cat /proc/self/oom_score_adj; grep -E '^(Sig(Blk|Ign|Cgt)|NoNewPrivs|Cap...)' /proc/self/status; \
                ps -o nice=,cls= -p $$";
    let command = ["sh", "-c", show];
    let run = |mut c: Command| {
        c.current_dir(&folder.0)
            .env("HOLO_TEST", "one two\n three")
            .stdin(Stdio::null());
        text(&c.output().unwrap().stdout)
    };
    assert_eq!(run(holo_exec(&["-q"], &command)), run(bare(&command)));
}

/// A command, bare and under `holo-exec`, with more words before it.
fn both(before: impl Fn() -> Command, command: &[&str]) -> [Command; 2] {
    let mut bare = before();
    bare.args(command);
    let mut with = before();
    with.args([env!("CARGO_BIN_EXE_holo-exec"), "-q", "--"])
        .args(command);
    [bare, with]
}

fn outputs(commands: [Command; 2]) -> [(Option<i32>, String); 2] {
    commands.map(|mut c| {
        let said = c.stdin(Stdio::null()).output().unwrap();
        let code = said.status.code().or(said.status.signal().map(|n| 128 + n));
        (code, text(&said.stdout))
    })
}

#[test]
fn signals_are_ignored_and_blocked_as_bare() {
    let command = [
        "sh",
        "-c",
        "grep -E '^Sig(Blk|Ign|Cgt|Pnd)' /proc/self/status; exit 3",
    ];
    for (ignored, blocked) in [
        ("", ""),
        ("13", ""),
        ("17", ""),
        ("1,2,3,10,13,17,20,21,22,25,34,64", ""),
        ("13,17", "2,12,13,15,17,35,64"),
    ] {
        let before = || {
            let mut c = script("disposed.py");
            c.args([ignored, blocked]);
            c
        };
        let [bare, with] = outputs(both(before, &command));
        assert_eq!(bare.0, Some(3));
        assert_eq!(with, bare, "ignored: {ignored:?}, blocked: {blocked:?}");
    }
}

#[test]
fn closed_streams_are_the_commands() {
    let command = ["ls", "/proc/self/fd"];
    for closed in ["", "exec <&-", "exec 2>&-", "exec <&- 2>&-"] {
        let before = || {
            let mut c = Command::new("sh");
            c.args(["-c", &format!("{closed}\nexec \"$@\""), "sh"]);
            c
        };
        let [bare, with] = outputs(both(before, &command));
        assert_eq!(bare.0, Some(0));
        assert_eq!(with, bare, "{closed:?}");
    }
}

fn send(signal: i32, options: &[&str], to: &str) {
    let sent = Command::new("/bin/kill")
        .args(["-s", &signal.to_string()])
        .args(options)
        .arg(to)
        .status();
    assert!(sent.unwrap().success(), "kill -s {signal}");
}

#[test]
fn every_signal_sent_to_holo_exec_reaches_the_command() {
    let listens = script("listens.py");
    let path = listens.get_args().next().unwrap().to_str().unwrap();
    let mut child = start(holo_exec(&["-q"], &[PYTHON, path]));
    assert_eq!(child.line(), "ready");
    let pid = child.pid().to_string();
    // 32 and 33 are the C library's.
    for signal in (1..=64).filter(|s| ![libc::SIGKILL, libc::SIGSTOP, 32, 33].contains(s)) {
        send(signal, &[], &pid);
        assert_eq!(child.line(), signal.to_string());
    }
    // They may be many.
    let queued = script("queued.py");
    let path = queued.get_args().next().unwrap().to_str().unwrap();
    let mut child = start(holo_exec(&["-q"], &[PYTHON, path, "37", "3"]));
    assert_eq!(child.line(), "ready");
    for value in ["7", "8", "70000"] {
        send(37, &["-q", value], &child.pid().to_string());
    }
    for value in ["7", "8", "70000"] {
        assert_eq!(child.line(), format!("queued {value}"));
    }
    assert!(child.0.wait().unwrap().success());
}

#[test]
fn a_signal_that_nobody_handles_ends_both() {
    for signal in [
        libc::SIGABRT,
        libc::SIGPIPE,
        libc::SIGALRM,
        libc::SIGSYS,
        34,
        64,
    ] {
        let mut child = start(holo_exec(
            &["-q"],
            &["sh", "-c", "echo ready; exec sleep 60"],
        ));
        assert_eq!(child.line(), "ready");
        send(signal, &[], &child.pid().to_string());
        let status = child.0.wait().unwrap();
        assert_eq!(status.code(), Some(128 + signal), "{status}");
    }
}

#[test]
fn a_timer_set_before_reaches_the_command() {
    let before = || {
        let mut c = Command::new(PYTHON);
        c.args([
            "-c",
            "import os, signal, sys; signal.alarm(1); os.execvp(sys.argv[1], sys.argv[1:])",
        ]);
        c
    };
    let [bare, with] = outputs(both(before, &["sleep", "10"]));
    assert_eq!(bare.0, Some(128 + libc::SIGALRM));
    assert_eq!(with, bare);
}

#[test]
fn a_terminal_is_the_commands() {
    let [bare, with] = outputs(both(|| script("terminal.py"), &[]));
    assert_eq!(bare.0, Some(0), "{}", bare.1);
    for seen in [
        "terminal True True True 31 99",
        "interrupted",
        "stopped by 20",
        "stopped by 21",
        "end of input",
    ] {
        assert!(bare.1.contains(seen), "no {seen:?}: {}", bare.1);
    }
    assert_eq!(with, bare);
}

#[test]
fn a_terminal_that_goes_away_ends_the_command() {
    let [bare, with] = outputs(both(|| script("hangup.py"), &[]));
    assert_eq!(bare, (Some(0), format!("{}\n", 128 + libc::SIGHUP)));
    assert_eq!(with, bare);
}

#[test]
fn signals_sent_to_holo_exec_reach_the_command() {
    for name in ["TERM", "USR2", "HUP"] {
        let script =
            format!("trap 'echo got; exit 3' {name}; echo ready; while :; do sleep 0.05; done");
        let mut child = holo_exec(&["-q"], &["sh", "-c", &script])
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        assert_eq!(line_of(&mut child), "ready");
        let pid = child.id().to_string();
        let sent = Command::new("kill")
            .args([&format!("-{name}"), &pid])
            .status();
        assert!(sent.unwrap().success());
        assert_eq!(line_of(&mut child), "got", "SIG{name}");
        let status = child.wait().unwrap();
        assert_eq!(
            (status.code(), status.signal()),
            (Some(3), None),
            "SIG{name}"
        );
    }
}

#[test]
fn sizes_are_taken_or_refused_with_their_forms() {
    for size in ["64M", "1.5G", "67108864", "25%", "100%", "1024k", " 2 GiB "] {
        let said = holo_exec(&["-q", "--local-memory", size], &["true"])
            .output()
            .unwrap();
        assert!(said.status.success(), "{size}: {}", text(&said.stderr));
    }
    for size in [
        "", "M", "12X", "1e9", "-5M", "0", "1K", "0%", "101%", "9999T", "64 M B",
    ] {
        let option = format!("--local-memory={size}");
        let said = holo_exec(&[&option], &["true"]).output().unwrap();
        assert_eq!(said.status.code(), Some(2), "{size}");
        let error = text(&said.stderr);
        for form in ["4194304", "512M", "25%"] {
            assert!(
                error.contains(form),
                "{size:?} is refused without {form}: {error}"
            );
        }
    }
}

#[test]
fn a_wrong_usage_is_refused() {
    for options in [&["--no-such-option"][..], &["--report"], &[]] {
        let said = Command::new(env!("CARGO_BIN_EXE_holo-exec"))
            .args(options)
            .output()
            .unwrap();
        assert_eq!(said.status.code(), Some(2), "{options:?}");
        assert!(text(&said.stderr).contains("--help"), "{options:?}");
    }
    let said = Command::new(env!("CARGO_BIN_EXE_holo-exec"))
        .arg("--help")
        .output()
        .unwrap();
    assert!(said.status.success() && text(&said.stdout).contains("Exit codes"));
}

/// Where the report's fields are described.
const REPORT_MD: &str = include_str!("../../docs/report.md");

/// The paths of an object's members: `name`, and `name.part` for those of an object in it.
fn fields_of(object: &Value) -> BTreeSet<String> {
    let mut fields = BTreeSet::new();
    for (name, value) in object.as_object().unwrap() {
        if value.is_object() {
            let parts = fields_of(value);
            fields.extend(parts.iter().map(|part| format!("{name}.{part}")));
        }
        fields.insert(name.clone());
    }
    fields
}

/// The same paths by the table: a row begins with its fields, and names the parts of one in its meaning.
fn fields_described() -> BTreeSet<String> {
    let mut fields = BTreeSet::new();
    for row in REPORT_MD.lines().filter(|line| line.starts_with("| `")) {
        let cells: Vec<_> = row.split('|').collect();
        let (names, parts) = (names_in(cells[1]), names_in(cells[3]));
        for name in names {
            fields.extend(parts.iter().map(|part| format!("{name}.{part}")));
            fields.insert(name.to_owned());
        }
    }
    fields
}

/// What is between backticks and can be a field's name.
fn names_in(cell: &str) -> Vec<&str> {
    let is_name = |text: &str| {
        text.bytes()
            .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_')
    };
    let quoted = cell.split('`').skip(1).step_by(2);
    quoted.filter(|text| is_name(text)).collect()
}

#[test]
fn the_report_has_all_its_fields() {
    let folder = Folder::new("report");
    let file = folder.file("report.json");
    let script = "b = bytearray(b'x') * (48 << 20)\nfor i in range(0, len(b), 4096): b[i] = i >> 12 & 255\n\
                  assert all(b[i] == i >> 12 & 255 for i in range(0, len(b), 4096))";
    let options = [
        "-q",
        "--local-memory",
        "16M",
        "--report",
        file.to_str().unwrap(),
    ];
    let said = holo_exec(&options, &["python3", "-c", script])
        .output()
        .unwrap();
    assert!(said.status.success(), "{}", text(&said.stderr));
    let report = report(&file);
    let written = fields_of(&report);
    assert_eq!(written, fields_of(&json!(Report::default())));
    assert_eq!(written, fields_described());
    for (field, value) in report.as_object().unwrap() {
        let numbers = value
            .as_object()
            .map_or_else(|| vec![value], |object| object.values().collect());
        assert!(numbers.iter().all(|n| n.is_number()), "{field}: {report}");
    }
    assert_eq!(report["schema"], Report::SCHEMA);
    assert!(REPORT_MD.contains(&format!("| version of this table: {} |", Report::SCHEMA)));
    assert_eq!(report["exit_code"], 0);
    assert_eq!(report["local_memory_bytes"], 16 << 20);
    assert_eq!(report["integrity_failures"], 0);
    assert!(report["pages_evicted"].as_u64().unwrap() > 100, "{report}");
    assert!(report["bytes_refaulted"].as_u64().unwrap() > 0, "{report}");
}

/// The number that a report has under this name: `field`, or `field.part`.
fn number(report: &Value, name: &str) -> f64 {
    let value = report.pointer(&format!("/{}", name.replace('.', "/")));
    let number = value.and_then(Value::as_f64);
    number.unwrap_or_else(|| panic!("{name}: {report}"))
}

#[test]
fn the_report_says_what_was_done() {
    const MIB: f64 = 1048576.0;
    const PAGE: f64 = 65536.0;
    const SUBPAGE: f64 = 4096.0;
    let folder = Folder::new("done");
    let file = folder.file("report.json");
    let script = script("counted.py");
    let path = script.get_args().next().unwrap().to_str().unwrap();
    let options = [
        "-q",
        "--local-memory",
        "16M",
        "--report",
        file.to_str().unwrap(),
    ];
    let before = Instant::now();
    let mut child = start(holo_exec(&options, &[PYTHON, path]));
    let pid = child.pid().to_string();
    // After each step all that it has filled leaves, but for the budget and a little more.
    let mut step = |line, filled_mib| {
        assert_eq!(child.line(), line);
        await_that("eviction", || {
            let said = holo(&["status", &pid, "--json"]).output().unwrap();
            let status = json(&text(&said.stdout));
            let n = |name| number(&status, name);
            let away = n("bytes_evicted") - n("bytes_refaulted");
            away >= (filled_mib - 17.0) * MIB && n("faults_waiting") == 0.0
        });
        child.0.stdin.as_mut().unwrap().write_all(b"\n").unwrap();
    };
    step("filled", 32.0);
    let since_filled = Instant::now();
    step("full", 64.0);
    let least_s = since_filled.elapsed().as_secs_f64();
    step("right", 64.0);
    assert!(child.0.wait().unwrap().success());
    let most_s = before.elapsed().as_secs_f64();

    let report = report(&file);
    let n = |name| number(&report, name);
    let away = 64.0 - 17.0;
    let whole = 64.0 + 16.0; // with the memory of Python itself
    let cpus = std::thread::available_parallelism().unwrap().get() as f64;
    for (name, least, most) in [
        ("exit_code", 0.0, 0.0),
        ("wall_s", least_s, most_s),
        ("processes", 1.0, 1.0),
        // Eviction begins a 32nd below the budget.
        ("resident_peak_bytes", 15.5 * MIB, whole * MIB),
        ("resident_bytes", 0.0, 0.0),
        ("faults_waiting", 0.0, 0.0),
        // The second half was touched for the first time, in sequence, when it was held.
        ("faults_zero", 32.0 * MIB / PAGE, whole * MIB / SUBPAGE),
        (
            "faults_remote",
            away * MIB / PAGE / 2.0,
            2.0 * whole * MIB / SUBPAGE,
        ),
        ("bytes_refaulted", away * MIB, 2.0 * whole * MIB),
        ("bytes_evicted", n("bytes_refaulted"), 4.0 * whole * MIB),
        (
            "pages_evicted",
            n("bytes_evicted") / PAGE,
            n("bytes_evicted") / SUBPAGE,
        ),
        ("pages_left_alone.stack", 1.0, 64.0),
        ("pages_left_alone.locked", 32.0, 32.0),
        ("pages_left_alone.pinned", 0.0, 0.0),
        ("pages_left_alone.shared", 64.0, 70.0),
        ("pages_left_alone.file", 1.0, 1000.0),
        ("processes_left_alone", 0.0, 0.0),
        ("store_bytes_raw", away * MIB, whole * MIB),
        ("store_bytes_stored", MIB / 4.0, n("store_bytes_raw") / 4.0),
        ("integrity_failures", 0.0, 0.0),
        ("attach_stop_us_max", 1.0, most_s * 1e6),
        ("takeovers", 0.0, 0.0),
        ("fault_us.p50", 0.1, n("fault_us.p90")),
        ("fault_us.p99", n("fault_us.p90"), n("fault_us.p999")),
        ("fault_us.max", n("fault_us.p999"), most_s * 1e6),
        // Those that found a page protected may have been decided twice.
        (
            "fault_us.count",
            n("faults_zero") + n("faults_remote"),
            n("faults_zero") + n("faults_remote") + n("faults_wp"),
        ),
        // With one process there is one batch at a time.
        ("evict_bytes_per_s", n("bytes_evicted") / most_s, 1e12),
        ("holo_cpu_s", 0.001, most_s * cpus),
    ] {
        let is = n(name);
        assert!(
            (least..=most).contains(&is),
            "{name} is {is}, not from {least} to {most}: {report}"
        );
    }
}

#[test]
fn a_report_that_cannot_be_written_costs_nothing_else() {
    let said = holo_exec(&["--report", "/dev/full"], &["sh", "-c", "exit 4"])
        .output()
        .unwrap();
    assert_eq!(said.status.code(), Some(4));
    let error = text(&said.stderr);
    assert!(error.contains("cannot write the report"), "{error}");
    assert!(
        error.lines().any(|l| l.starts_with("holo: ")),
        "the summary comes all the same: {error}"
    );

    let said = holo_exec(
        &["--report", "/no/such/folder/report"],
        &["sh", "-c", "echo ran"],
    )
    .output()
    .unwrap();
    assert_eq!(said.status.code(), Some(125));
    assert_eq!(
        text(&said.stdout),
        "",
        "nothing is run where the report has no place"
    );
}

#[test]
fn a_user_without_the_right_to_lock_memory_is_told() {
    let folder = Folder::new("locked");
    let copy = folder.file("holo-exec");
    fs::copy(env!("CARGO_BIN_EXE_holo-exec"), &copy).unwrap();
    let said = Command::new("setpriv")
        .args(["--reuid", "65534", "--clear-groups"])
        .args(["prlimit", "--memlock=8388608"])
        .arg(copy)
        .args(["sh", "-c", "echo ran"])
        .output()
        .unwrap();
    assert_eq!(said.status.code(), Some(125));
    assert_eq!(text(&said.stdout), "");
    let error = text(&said.stderr);
    assert!(error.contains("ulimit -l"), "{error}");
}

#[test]
fn a_closed_standard_error_changes_nothing() {
    let command = ["sh", "-c", "exec 2>&-; echo fine; exit 5"];
    let with = holo_exec(&[], &command).output().unwrap();
    let without = bare(&command).output().unwrap();
    assert_eq!((with.status, with.stdout), (without.status, without.stdout));
    let closed = Command::new("sh")
        .args([
            "-c",
            "exec 2>&-; exec \"$@\"",
            "sh",
            env!("CARGO_BIN_EXE_holo-exec"),
            "sh",
            "-c",
            "exit 6",
        ])
        .status()
        .unwrap();
    assert_eq!(closed.code(), Some(6));
}
