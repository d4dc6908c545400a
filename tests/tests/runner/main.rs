//! The runner, run on suites that are made to fail in each of the ways that it has to notice.

mod scene;

use std::fs;
use std::path::Path;
use std::process::Command;

use scene::{Ran, Scene, is_alive, until};

const GREEN: &str = "echo ok one; echo ok two; echo 2 passed, 0 failed";

#[test]
fn green_suites_add_up_and_the_totals_stand_last() {
    let scene = Scene::new()
        .script("first", "cases = 2", GREEN)
        .script("second", "", GREEN);
    scene.run(&["run"]).passed("4 passed, 0 failed");
}

#[test]
fn suites_run_in_the_order_of_the_manifest() {
    let note = |name: &str| format!("echo {name} >> order; {GREEN}");
    let scene = Scene::new()
        .script("b", "", &note("b"))
        .script("a", "", &note("a"));
    scene.run(&["run"]).passed("4 passed, 0 failed");
    assert_eq!(
        fs::read_to_string(scene.folder.join("order")).unwrap(),
        "b\na\n"
    );
}

#[test]
fn tiers_decide_what_runs() {
    let scene = Scene::new()
        .script("quick", "", GREEN)
        .script("slow", "tier = 'full'", GREEN)
        .script("long", "tier = 'soak'", GREEN);
    scene
        .run(&["run", "--tier", "fast"])
        .passed("2 passed, 0 failed");
    scene
        .run(&["run", "--tier", "full"])
        .passed("4 passed, 0 failed");
    scene
        .run(&["run", "--suite", "long"])
        .passed("2 passed, 0 failed");
}

#[test]
fn failed_case_is_named_and_fails_the_run() {
    let body = "echo ok one; echo 'not ok two: 3 != 4'; echo 1 passed, 1 failed; exit 1";
    let ran = Scene::new().script("mixed", "", body).run(&["run"]);
    ran.failed(
        "1 passed, 1 failed",
        &[
            "case two: 3 != 4",
            "replay: make test SUITE=mixed HOLO_SEED=",
        ],
    );
}

#[test]
fn suite_without_its_program_fails_and_the_others_still_run() {
    let missing = "[[suite]]\nname = 'gone'\ntier = 'fast'\nkind = 'exec'\ncommand = ['./gone']\ncases = 1\nseconds = 1";
    let ran = Scene::new()
        .manifest(missing)
        .script("there", "", GREEN)
        .run(&["run"]);
    ran.failed("2 passed, 1 failed", &["FAIL gone: missing: no program"]);
}

#[test]
fn suite_whose_needs_are_not_there_fails() {
    let ran = Scene::new()
        .script("needy", "needs = ['sh', 'no-such-program']", GREEN)
        .run(&["run"]);
    ran.failed(
        "0 passed, 1 failed",
        &["it needs no-such-program", "scripts/setup"],
    );
}

#[test]
fn too_few_cases_fail() {
    let ran = Scene::new()
        .script("thin", "cases = 3", GREEN)
        .run(&["run"]);
    ran.failed(
        "2 passed, 1 failed",
        &["too few cases: 2 ran, at least 3 must"],
    );
}

#[test]
fn skipped_case_fails_unless_it_is_listed() {
    let body = format!("echo skip three: no time; {GREEN}");
    let ran = Scene::new().script("skips", "", &body).run(&["run"]);
    ran.failed("2 passed, 1 failed", &["case three was skipped"]);
    Scene::new()
        .script("skips", "ignored = ['three']", &body)
        .run(&["run"])
        .passed("2 passed, 0 failed");
}

#[test]
fn case_that_is_listed_as_ignored_and_runs_fails() {
    let ran = Scene::new()
        .script("eager", "ignored = ['three']", GREEN)
        .run(&["run"]);
    ran.failed(
        "2 passed, 1 failed",
        &["case three is listed as ignored and was not"],
    );
}

#[test]
fn totals_that_are_missing_or_wrong_fail() {
    let ran = Scene::new()
        .script("liar", "", "echo ok one; echo 5 passed, 0 failed")
        .run(&["run"]);
    ran.failed(
        "1 passed, 1 failed",
        &["5 passed, 0 failed", "1 passed, 0 failed"],
    );
}

#[test]
fn exit_status_that_contradicts_the_cases_fails() {
    let ran = Scene::new()
        .script("crash", "", &format!("{GREEN}; kill -SEGV $$"))
        .run(&["run"]);
    ran.failed("2 passed, 1 failed", &["signal: 11"]);
    let body = "echo not ok one: because; echo 0 passed, 1 failed";
    Scene::new()
        .script("polite", "", body)
        .run(&["run"])
        .failed("0 passed, 2 failed", &["exit status: 0"]);
}

#[test]
fn overrun_is_described_and_then_killed() {
    let body = "sleep 1000 & echo $! > pid; echo ok one; wait";
    let scene = Scene::new().script("slow", "seconds = 1", body);
    let ran = scene.run(&["run"]);
    ran.failed(
        "1 passed, 1 failed",
        &[
            "overrun: not done after 2s",
            "(sleep) state S",
            "nanosleep",
            "TracerPid:",
        ],
    );
    assert!(!is_alive(scene.pid("pid")));
    let dump = fs::read_to_string(scene.folder.join("logs/slow.dump")).unwrap();
    assert!(dump.contains("nanosleep"), "{dump}");
}

#[test]
fn silence_is_a_hang() {
    let ran = Scene::new()
        .script("mute", "quiet_seconds = 1", "echo ok one; sleep 1000")
        .run(&["run"]);
    ran.failed(
        "1 passed, 1 failed",
        &["silent: no output for 1s", "nanosleep"],
    );
}

#[test]
fn threads_that_wait_for_a_page_are_described_and_freed() {
    let scene = Scene::new();
    scene.compile("stuck");
    let scene = scene.script("waits", "seconds = 2", "./stuck & echo $! > pid; wait");
    scene.run(&["run"]).failed(
        "0 passed, 1 failed",
        &["overrun", "(stuck) state", "handle_userfault"],
    );
    assert!(!is_alive(scene.pid("pid")));
}

#[test]
fn stopped_process_is_ended_too() {
    let scene = Scene::new().script(
        "halts",
        "seconds = 1",
        "sleep 1000 & echo $! > pid; kill -STOP $!; wait",
    );
    scene
        .run(&["run"])
        .failed("0 passed, 1 failed", &["state T", "do_signal_stop"]);
    assert!(!is_alive(scene.pid("pid")));
}

#[test]
fn process_left_behind_fails_and_is_killed() {
    // Out of the session, its parent dead and its environment empty: only adoption can find it.
    let body = format!("(setsid env -i /bin/sleep 1000 & echo $! > pid); {GREEN}");
    let scene = Scene::new().script("leaks", "", &body);
    scene.run(&["run"]).failed(
        "2 passed, 1 failed",
        &["leaked process", "(sleep)", "nanosleep"],
    );
    assert!(!is_alive(scene.pid("pid")));
}

#[test]
fn process_left_behind_without_its_first_thread_is_found() {
    let scene = Scene::new();
    scene.compile("headless");
    let body = format!("./headless & echo $! > pid; sleep 0.2; {GREEN}");
    let scene = scene.script("leaks", "", &body);
    scene.run(&["run"]).failed(
        "2 passed, 1 failed",
        &["leaked process", "(headless) state Z", "nanosleep"],
    );
    until("its end", || {
        (!scene::has_threads(scene.pid("pid"))).then_some(())
    });
}

#[test]
fn process_that_ignores_sigterm_is_killed() {
    let body = "trap '' TERM; echo $$ > pid; while :; do sleep 1; done";
    let scene = Scene::new().script("deaf", "seconds = 1", body);
    scene
        .run(&["run"])
        .failed("0 passed, 1 failed", &["overrun"]);
    assert!(!is_alive(scene.pid("pid")));
}

#[test]
fn control_group_left_behind_fails_and_is_removed() {
    let root = ["/sys/fs/cgroup/unified", "/sys/fs/cgroup"].map(Path::new);
    let root = root
        .into_iter()
        .find(|root| root.join("cgroup.procs").exists())
        .expect("control groups, version 2");
    let group = root.join(format!("holo-test-scene{}", std::process::id()));
    let body = format!("mkdir -p {0}/inner; {GREEN}", group.display());
    Scene::new()
        .script("groups", "", &body)
        .run(&["run"])
        .failed("2 passed, 1 failed", &["leaked control group"]);
    assert!(!group.exists());
}

#[test]
fn control_group_of_another_run_stays() {
    let root = ["/sys/fs/cgroup/unified", "/sys/fs/cgroup"].map(Path::new);
    let root = root
        .into_iter()
        .find(|root| root.join("cgroup.procs").exists())
        .expect("control groups, version 2");
    let group = root.join(format!("holo-test-{}-other", std::process::id()));
    let body = format!("mkdir {}; {GREEN}", group.display());
    let ran = Scene::new().script("groups", "", &body).run(&["run"]);
    let stayed = fs::remove_dir(&group).is_ok();
    ran.passed("2 passed, 0 failed");
    assert!(stayed);
}

#[test]
fn seed_is_the_same_each_time_and_another_for_each_suite() {
    let body = format!("echo \"$HOLO_SEED\" >> $(basename $0).seeds; {GREEN}");
    let scene = Scene::new()
        .script("one", "", &body)
        .script("two", "", &body);
    scene.run(&["run"]).passed("4 passed, 0 failed");
    scene.run(&["run"]).passed("4 passed, 0 failed");
    scene.run_with_seed("42").passed("4 passed, 0 failed");
    let seeds = |name: &str| -> Vec<u64> {
        let text = fs::read_to_string(scene.folder.join(name).with_extension("seeds")).unwrap();
        text.lines().map(|line| line.parse().unwrap()).collect()
    };
    let (one, two) = (seeds("one"), seeds("two"));
    assert_eq!((one[0], two[0]), (one[1], two[1]));
    assert_ne!(one[0], two[0]);
    assert_eq!((one[2], two[2]), (42, 42));
}

#[test]
fn seed_that_is_no_number_runs_nothing() {
    let ran = Scene::new().script("any", "", GREEN).run_with_seed("abc");
    ran.failed("0 passed, 1 failed", &["HOLO_SEED=abc"]);
}

#[test]
fn broken_manifest_is_named_with_what_is_wrong() {
    let ran = Scene::new().script("typo", "case = 1", GREEN).run(&["run"]);
    ran.failed(
        "0 passed, 1 failed",
        &["manifest.toml", "unknown field `case`"],
    );
    let ran = Scene::new().manifest("[[suite]\n").run(&["run"]);
    ran.failed("0 passed, 1 failed", &["manifest.toml", "line 1"]);
}

#[test]
fn unknown_suite_runs_nothing() {
    let ran = Scene::new()
        .script("real", "", GREEN)
        .run(&["run", "--suite", "reel"]);
    ran.failed("0 passed, 1 failed", &["no suite is called \"reel\""]);
}

#[test]
fn interrupted_run_ends_its_suite() {
    let scene = Scene::new().script("long", "", "echo $$ > pid; sleep 1000");
    let child = scene.start();
    let pid = scene.pid("pid");
    let killed = Command::new("kill")
        .args(["-TERM", &child.id().to_string()])
        .status()
        .unwrap();
    assert!(killed.success());
    let ran = Ran::of(child.wait_with_output().unwrap());
    assert_eq!(
        (ran.code, ran.text.lines().last()),
        (Some(143), Some("0 passed, 1 failed")),
        "{}",
        ran.text
    );
    until("the suite's end", || (!is_alive(pid)).then_some(()));
}

#[test]
fn soak_takes_turns_with_other_arguments_and_seeds() {
    let note =
        |name: &str| format!("echo {name} $1 $HOLO_SOAK_MINUTES $HOLO_SEED >> notes; {GREEN}");
    let scene = Scene::new()
        .script("never", "", GREEN)
        .script("a", "args = ['short']\nsoak_args = ['long']", &note("a"))
        .script("b", "tier = 'soak'\nargs = ['x']\nrounds = 2", &note("b"));
    scene
        .run(&["soak", "--minutes", "7", "--rounds", "3"])
        .passed("10 passed, 0 failed");
    let notes = fs::read_to_string(scene.folder.join("notes")).unwrap();
    let words: Vec<Vec<&str>> = notes
        .lines()
        .map(|line| line.split(' ').collect())
        .collect();
    let turns: Vec<String> = words.iter().map(|words| words[..3].join(" ")).collect();
    assert_eq!(
        turns,
        ["a long 7", "b x 7", "a long 7", "b x 7", "a long 7"]
    );
    assert_ne!(words[0][3], words[2][3]);
}

const TOY: &str = r#"
#[test]
fn works() {
    assert!(std::env::var("HOLO_SEED").is_ok());
}
#[test]
#[ignore = "reason; owner: nobody"]
fn rests() {}
"#;

#[test]
fn cargo_suite_is_built_counted_and_checked() {
    let suite = "[[suite]]\nname = 'toy'\ntier = 'fast'\nkind = 'cargo'\npackage = 'toy'\ncases = 1\nseconds = 20";
    let scene = Scene::new().toy_package(TOY).manifest(suite);
    scene
        .build_and_run(&["run"])
        .failed("1 passed, 1 failed", &["case rests was skipped"]);
    scene
        .manifest("ignored = ['rests']")
        .build_and_run(&["run"])
        .passed("1 passed, 0 failed");
}

#[test]
fn cargo_target_that_is_missing_fails_and_one_that_is_not_listed_too() {
    let suite = "[[suite]]\nname = 'gone'\ntier = 'fast'\nkind = 'cargo'\npackage = 'toy'\ntarget = 'test:gone'\n\
        cases = 1\nseconds = 20";
    let ran = Scene::new()
        .toy_package(TOY)
        .manifest(suite)
        .build_and_run(&["run"]);
    ran.failed(
        "0 passed, 2 failed",
        &[
            "FAIL gone: missing: package \"toy\" has no target \"test:gone\"",
            "\"lib\" has test cases",
        ],
    );
}

#[test]
fn failed_cargo_case_comes_with_the_line_that_repeats_it() {
    let lib = "#[test] fn breaks() { panic!(\"as it must\") }\n#[test] fn works() {}";
    let suite = "[[suite]]\nname = 'toy'\ntier = 'fast'\nkind = 'cargo'\npackage = 'toy'\ncases = 2\nseconds = 20";
    let scene = Scene::new().toy_package(lib).manifest(suite);
    scene.build_and_run(&["run"]).failed(
        "1 passed, 1 failed",
        &["as it must", "SUITE=toy CASE=breaks HOLO_SEED="],
    );
    scene
        .build_and_run(&["run", "--suite", "toy", "--case", "works"])
        .passed("1 passed, 0 failed");
    scene
        .build_and_run(&["run", "--case", "nothing"])
        .failed("0 passed, 1 failed", &["no case has such a name"]);
}

#[test]
fn code_that_does_not_compile_fails_with_the_totals_last() {
    let suite = "[[suite]]\nname = 'toy'\ntier = 'fast'\nkind = 'cargo'\npackage = 'toy'\ncases = 1\nseconds = 20";
    let scene = Scene::new()
        .toy_package("#[test] fn broken( {")
        .manifest(suite);
    scene
        .build_and_run(&["run"])
        .failed("0 passed, 1 failed", &["don't build"]);
}
