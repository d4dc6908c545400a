//! Who is refused, and that it runs on as before.

use std::os::unix::process::ExitStatusExt;
use std::process::{Command, Stdio};

use holo_pager::sys::attach::{AttachError, make_ring, preflight, quiesce, take_hold};

use crate::support::{Target, ThreadGroup, build, state_of};
use crate::without;

/// Both ways to ask say the same, and the process is left as it was.
#[track_caller]
fn refused(pid: i32) -> AttachError {
    let before = preflight(pid).unwrap_err();
    let error = take_hold(pid).unwrap_err();
    assert_eq!(before, error);
    explains_itself(&error);
    error
}

/// A message is about the process, and says what to do after a colon.
#[track_caller]
fn explains_itself(error: &AttachError) {
    let text = error.to_string();
    assert!(text.len() > 40 && text.contains(": "), "{text}");
    println!("{text}");
}

#[test]
fn a_process_that_was_reaped() {
    let mut child = Command::new("true").spawn().unwrap();
    let pid = i32::try_from(child.id()).unwrap();
    child.wait().unwrap();
    assert_eq!(refused(pid), AttachError::NoSuchProcess { pid });
    assert_eq!(quiesce(pid), Err(AttachError::NoSuchProcess { pid }));
    assert_eq!(refused(0), AttachError::NoSuchProcess { pid: 0 });
    assert_eq!(refused(-5), AttachError::NoSuchProcess { pid: -5 });
}

#[test]
fn a_process_that_was_not_reaped() {
    let mut child = Command::new("true").spawn().unwrap();
    let pid = i32::try_from(child.id()).unwrap();
    while state_of(pid) != Some('Z') {
        std::thread::yield_now();
    }
    assert_eq!(refused(pid), AttachError::Exiting { pid });
    assert_eq!(quiesce(pid), Err(AttachError::Exiting { pid }));
    // Its exit status is still its parent's.
    assert_eq!(child.wait().unwrap().into_raw(), 0);
}

#[test]
fn a_thread_instead_of_a_process() {
    let target = Target::busy(&["futex_forever", "nanosleep"]);
    let pid = target.pid;
    for task in std::fs::read_dir(format!("/proc/{pid}/task")).unwrap() {
        let tid: i32 = task.unwrap().file_name().to_str().unwrap().parse().unwrap();
        if tid != pid {
            assert_eq!(refused(tid), AttachError::IsAThread { tid, pid });
        }
    }
}

#[test]
fn ourselves() {
    let pid = i32::try_from(std::process::id()).unwrap();
    assert_eq!(refused(pid), AttachError::Myself { pid });
    assert_eq!(quiesce(pid), Err(AttachError::Myself { pid }));
}

#[test]
fn a_thread_of_the_kernel() {
    if std::fs::read_to_string("/proc/2/comm").is_ok_and(|name| name.trim() == "kthreadd") {
        assert_eq!(refused(2), AttachError::KernelThread { pid: 2 });
    }
}

#[test]
fn a_32_bit_program() {
    let target = Target::start(&mut Command::new(build("small32")));
    target.wait_until("it sleeps", |t| t.comm() == "small32" && t.state() == 'S');
    let pid = target.pid;
    assert_eq!(refused(pid), AttachError::ThirtyTwoBit { pid });
}

#[test]
fn a_traced_program_but_a_debugger_may_come_afterwards() {
    let target = Target::sleeper();
    let pid = target.pid;
    let gdb = || {
        let mut command = Command::new("gdb");
        command.args(["-q", "-nx", "-p", &pid.to_string()]);
        command
    };
    // At its prompt it waits for its standard input. Killed before that it would leave a child behind.
    let mut debugger = Target::start(gdb().stderr(Stdio::null()));
    debugger.read_until("(gdb) ");
    target.wait_until("gdb has it", |t| {
        !t.proc("status").contains("TracerPid:\t0\n")
    });
    let tracer = debugger.pid;
    assert_eq!(refused(pid), AttachError::TracedBy { pid, tracer });
    assert_eq!(quiesce(pid), Err(AttachError::TracedBy { pid, tracer }));
    assert!(debugger.finish().1);
    target.wait_until("gdb is gone", |t| {
        t.proc("status").contains("TracerPid:\t0\n")
    });

    take_hold(pid).unwrap();
    let seen = gdb()
        .args(["-batch", "-ex", "info registers rip"])
        .stdin(Stdio::null())
        .output();
    let seen = String::from_utf8(seen.unwrap().stdout).unwrap();
    assert!(seen.contains("rip"), "{seen}");
}

#[test]
fn a_program_of_another_user() {
    let target = Target::sleeper();
    let pid = target.pid;
    let error = without::privilege(move || refused(pid));
    let AttachError::NotPermitted { why, .. } = error else {
        panic!("{error}");
    };
    assert!(why.contains("user 0"), "{why}");
    let error = without::privilege(move || quiesce(pid).unwrap_err());
    assert!(matches!(error, AttachError::NotPermitted { .. }), "{error}");
}

#[test]
fn an_undumpable_program_of_the_same_user() {
    let mut target = Target::start(&mut as_nobody(&build("odd"), &["undumpable"]));
    let pid = target.read_pid();
    let error = without::privilege(move || refused(pid));
    let AttachError::NotPermitted { why, .. } = error else {
        panic!("{error}");
    };
    assert!(why.contains("undumpable"), "{why}");
    assert!(target.finish().1);
}

#[test]
fn a_program_in_vfork_and_its_child() {
    let mut target = Target::odd("lends-its-memory");
    let owner = target.pid;
    let pid: i32 = target.line().parse().unwrap();
    assert_eq!(refused(owner), AttachError::Uninterruptible { pid: owner });
    assert_eq!(refused(pid), AttachError::ForeignMm { pid, owner });
    // One thread that cannot stop does not hold up the others for ever.
    let error = quiesce(owner).unwrap_err();
    assert!(matches!(error, AttachError::Busy { .. }), "{error}");
    explains_itself(&error);
    let (lines, success) = target.finish();
    assert!(success, "{lines:?}");
}

#[test]
fn a_program_that_uses_userfaultfd() {
    let target = Target::odd("serves-itself");
    let pid = target.pid;
    assert_eq!(refused(pid), AttachError::UsesUserfaultfd { pid });
    assert!(target.finish().1);
}

#[test]
fn a_program_that_has_opened_a_userfaultfd() {
    let target = Target::odd("opens-userfaultfd");
    let pid = target.pid;
    let before = (target.descriptors(), target.maps());
    assert_eq!(refused(pid), AttachError::UsesUserfaultfd { pid });
    assert_eq!((target.descriptors(), target.maps()), before);
    assert!(target.finish().1);
}

#[test]
fn a_userfaultfd_of_memory_that_is_gone_is_no_reason() {
    let target = Target::odd("inherits-userfaultfd");
    preflight(target.pid).unwrap();
    take_hold(target.pid).unwrap();
    assert!(target.finish().0.contains(&"ok".to_owned()));
}

#[test]
fn a_program_without_the_right_where_there_is_no_device() {
    let target = Target::start(&mut as_nobody("sleep".as_ref(), &["1000"]));
    target.wait_until("it sleeps", |t| t.comm() == "sleep" && t.state() == 'S');
    let pid = target.pid;
    let error = without::file("/dev/userfaultfd", move || refused(pid));
    let AttachError::UserfaultfdOff { why, .. } = error else {
        panic!("{error}");
    };
    assert!(why.contains("unprivileged_userfaultfd"), "{why}");
    // A program with the right does not need the device.
    let target = Target::sleeper();
    let pid = target.pid;
    without::file("/dev/userfaultfd", move || take_hold(pid).unwrap());
}

#[test]
fn a_program_without_a_free_descriptor() {
    let target = Target::sleeper();
    let pid = target.pid;
    let limit = |n: u32| {
        let done = Command::new("prlimit")
            .args([format!("--pid={pid}"), format!("--nofile={n}:")])
            .status();
        assert!(done.unwrap().success());
    };
    for n in [3, 4] {
        limit(n);
        let limit = u64::from(n);
        assert_eq!(refused(pid), AttachError::LimitNoFile { pid, limit });
    }
    limit(64);
    let hold = take_hold(pid).unwrap();
    // Found out in the middle: the descriptor that was made is closed again.
    limit(3);
    let before = target.descriptors();
    let error = make_ring(pid, 8).unwrap_err();
    assert_eq!(error, AttachError::LimitNoFile { pid, limit: 3 });
    assert_eq!(target.descriptors(), before);
    assert!(before.contains_key(&hold.keeper_fd));
}

#[test]
fn where_holo_itself_has_no_free_descriptor() {
    let target = Target::sleeper();
    let pid = target.pid;
    let before = (target.descriptors(), target.maps());
    // With each one more it comes a step further; what was begun is undone.
    let is_enough = |&free: &usize| {
        let made = without::descriptors(free, move || make_ring(pid, 8).map(drop));
        if let Err(error) = &made {
            println!("with {free}: {error}");
        }
        target.wait_until("nothing is left in it", |t| {
            (t.descriptors(), t.maps()) == before && t.proc("status").contains("Threads:\t1\n")
        });
        made.is_ok()
    };
    let enough = (0..20).find(is_enough);
    assert!(enough.is_some_and(|free| free > 2), "{enough:?}");
    assert_eq!(target.state(), 'S');
}

/// A sleeping program of a user of its own: limits count all that a user has.
fn limited(uid: u32, limits: &[&str]) -> Target {
    let target = Target::start(
        Command::new("prlimit")
            .args(limits)
            .args(["setpriv", "--clear-groups"])
            .args([format!("--reuid={uid}"), format!("--regid={uid}")])
            .args(["sleep", "1000"]),
    );
    target.wait_until("it sleeps", |t| t.comm() == "sleep" && t.state() == 'S');
    target
}

/// Neither before it is touched nor in the attempt can it have a ring, and nothing is left of that.
fn has_no_free_thread(target: &Target) {
    let pid = target.pid;
    let before = (target.descriptors(), target.maps());
    let error = make_ring(pid, 8).unwrap_err();
    assert_eq!(error, AttachError::LimitNproc { pid });
    target.wait_until("the maker has ended", |t| {
        t.proc("status").contains("Threads:\t1\n")
    });
    assert_eq!(refused(pid), AttachError::LimitNproc { pid });
    assert_eq!((target.descriptors(), target.maps()), before);
}

#[test]
fn a_user_without_a_free_thread() {
    // The ring needs two for a moment: its own, and the one that makes it.
    for limit in [1, 2] {
        has_no_free_thread(&limited(64123, &[&format!("--nproc={limit}:{limit}")]));
    }
    let target = limited(64123, &["--nproc=3:3"]);
    preflight(target.pid).unwrap();
    make_ring(target.pid, 8).unwrap();
    // The limit is no limit for the system's own user.
    let mut command = Command::new("prlimit");
    let target = Target::start(command.args(["--nproc=1:1", "sleep", "1000"]));
    target.wait_until("it sleeps", |t| t.comm() == "sleep" && t.state() == 'S');
    preflight(target.pid).unwrap();
}

#[test]
fn a_cgroup_without_a_free_thread() {
    let made = ThreadGroup::with_sleeper(2);
    let (group, target) = made.expect("a control group that counts threads (controller pids)");
    has_no_free_thread(&target);
    drop((target, group));
}

#[test]
fn a_program_without_address_space() {
    let target = Target::sleeper();
    let pid = target.pid;
    let status = target.proc("status");
    let size = status.lines().find_map(|l| l.strip_prefix("VmSize:"));
    let size: u64 = size
        .unwrap()
        .trim()
        .trim_end_matches(" kB")
        .parse()
        .unwrap();
    let limit = size * 1024;
    let before = (target.descriptors(), target.maps());
    let set = |bytes: u64| {
        let done = Command::new("prlimit")
            .args([format!("--pid={pid}"), format!("--as={bytes}:")])
            .status();
        assert!(done.unwrap().success());
    };
    set(limit);
    assert_eq!(refused(pid), AttachError::LimitAs { pid, limit });
    assert_eq!((target.descriptors(), target.maps()), before);
    set(limit + 4096);
    preflight(pid).unwrap();
    take_hold(pid).unwrap();
}

#[test]
fn a_program_that_may_lock_no_more() {
    let mut target = Target::start(&mut as_nobody(&build("odd"), &["locks-what-it-maps"]));
    let pid = target.read_pid();
    let before = (target.descriptors(), target.maps());
    // Nothing outside of the process says that it locks what it maps.
    let error = take_hold(pid).unwrap_err();
    assert_eq!(error, AttachError::LimitMemlock { pid, limit: 0 });
    explains_itself(&error);
    assert_eq!((target.descriptors(), target.maps()), before);
    assert!(target.finish().1);
}

#[test]
fn a_filtered_program_if_the_filter_cannot_be_suspended() {
    let mut target = Target::odd("filtered");
    let pid = target.pid;
    assert_eq!(target.line(), "filtered");
    let error = without::capability(without::CAP_SYS_ADMIN, move || refused(pid));
    assert_eq!(error, AttachError::Seccomp { pid });
    // The filter would kill it for every call that is made in it.
    take_hold(pid).unwrap();
    make_ring(pid, 8).unwrap();
    quiesce(pid).unwrap();
    let (lines, success) = target.finish();
    assert!(success, "{lines:?}");
}

#[test]
fn a_frozen_program() {
    for freezer in crate::support::freezers() {
        let target = Target::sleeper();
        let pid = target.pid;
        let frozen = freezer.freeze(pid);
        assert_eq!(refused(pid), AttachError::Frozen { pid });
        // Frozen when it is already ours: the ring cannot be made, and nothing is left of the attempt.
        let before = target.descriptors();
        let error = make_ring(pid, 8).unwrap_err();
        assert!(
            matches!(
                error,
                AttachError::Frozen { .. } | AttachError::Uninterruptible { .. }
            ),
            "{error}"
        );
        drop(frozen);
        target.wait_until("it is thawed and let go", |t| {
            t.state() == 'S' && t.proc("status").contains("TracerPid:\t0\n")
        });
        assert_eq!(target.descriptors(), before);
        take_hold(pid).unwrap();
    }
}

#[test]
#[ignore = "changes a setting of the whole machine for a moment; owner: pager"]
fn an_unprivileged_program_where_io_uring_is_off() {
    struct Setting(&'static str, String);
    impl Setting {
        fn set(path: &'static str, value: &str) -> Self {
            let setting = Self(path, std::fs::read_to_string(path).unwrap());
            std::fs::write(path, value).unwrap();
            setting
        }
    }
    // Also when the test fails.
    impl Drop for Setting {
        fn drop(&mut self) {
            let _ = std::fs::write(self.0, &self.1);
        }
    }
    let sleeping = |target: Target| {
        target.wait_until("it sleeps", |t| t.comm() == "sleep" && t.state() == 'S');
        target
    };
    let target = sleeping(Target::start(&mut as_nobody("sleep".as_ref(), &["1000"])));
    let privileged = Target::sleeper();
    let pid = target.pid;
    let before = (target.descriptors(), target.maps());

    let off = Setting::set("/proc/sys/kernel/io_uring_disabled", "1");
    let made = make_ring(pid, 8);
    let looked = [preflight(pid), preflight(privileged.pid)];
    let taken = take_hold(pid);
    // Whoever is in the group may.
    let group = Setting::set("/proc/sys/kernel/io_uring_group", "65534");
    let as_member = preflight(pid);
    drop((group, off));

    let error = made.unwrap_err();
    let AttachError::IoUringOff { why, .. } = &error else {
        panic!("{error}");
    };
    assert!(why.contains("io_uring_disabled is 1"), "{why}");
    explains_itself(&error);
    assert_eq!(looked, [Err(error.clone()), Ok(())]);
    assert_eq!(taken.unwrap_err(), error);
    as_member.unwrap();
    target.wait_until("the maker has ended", |t| {
        t.proc("status").contains("Threads:\t1\n")
    });
    assert_eq!((target.descriptors(), target.maps()), before);
}

/// A command run as an unprivileged user.
pub(crate) fn as_nobody(program: &std::path::Path, arguments: &[&str]) -> Command {
    let mut command = Command::new("setpriv");
    command
        .args(["--reuid=65534", "--regid=65534", "--clear-groups"])
        .arg(program)
        .args(arguments);
    command
}
