//! Odd programs, and states, that a stop must leave as they were.

use std::process::Command;

use holo_pager::sys::attach::{
    AttachError, Hold, advise_self, drop_keeper, make_ring, preflight, quiesce, take_hold,
};
use holo_pager::sys::ring::{Advice, AdviceRing, RingParams};
use holo_pager::sys::uffd::Uffd;
use holo_proto::AddrRange;

use crate::refused::as_nobody;
use crate::support::{Target, build, in_time, kill, state_of};

/// The userfaultfd works: it is of a program that runs on.
#[track_caller]
fn works(hold: Hold) {
    Uffd::from_owned(hold.uffd).handshake().unwrap();
}

/// Takes hold and lets go; the descriptors and mappings are those of before, but for the keeper.
#[track_caller]
fn leaves_nothing_behind(target: &Target) {
    let pid = target.pid;
    let before = (target.descriptors(), target.maps());
    let hold = take_hold(pid).unwrap();
    let keeper = hold.keeper_fd;
    let mut held = target.descriptors();
    assert_eq!(
        held.remove(&keeper).as_deref(),
        Some("anon_inode:[userfaultfd]")
    );
    assert_eq!((held, target.maps()), before);
    let info = target.proc(&format!("fdinfo/{keeper}"));
    let flags = info
        .lines()
        .find_map(|line| line.strip_prefix("flags:"))
        .unwrap();
    let flags = i32::from_str_radix(flags.trim(), 8).unwrap();
    assert_eq!(flags & libc::O_CLOEXEC, libc::O_CLOEXEC);
    works(hold);

    make_ring(pid, 8).unwrap();
    quiesce(pid).unwrap();
    drop_keeper(pid, keeper).unwrap();
    target.wait_until("the ring's thread ends", |t| {
        t.proc("status").contains("Threads:\t1\n")
    });
    assert_eq!((target.descriptors(), target.maps()), before);
    assert!(target.proc("status").contains("TracerPid:\t0\n"));
}

#[test]
fn nothing_stays_behind() {
    leaves_nothing_behind(&Target::sleeper());
}

#[test]
fn nothing_stays_behind_in_an_unprivileged_program() {
    let target = Target::start(&mut as_nobody("sleep".as_ref(), &["1000"]));
    target.wait_until("it sleeps", |t| t.comm() == "sleep" && t.state() == 'S');
    leaves_nothing_behind(&target);
}

#[test]
fn priority_and_signal_mask_are_as_before() {
    let start = [
        "-n",
        "7",
        "chrt",
        "-b",
        "0",
        "env",
        "--block-signal=USR2",
        "sleep",
        "1000",
    ];
    let target = Target::start(Command::new("nice").args(start));
    target.wait_until("it sleeps", |t| t.comm() == "sleep" && t.state() == 'S');
    let about = || {
        let status = target.proc("status");
        // All masks; SigQ counts the signals of all of the user's processes.
        let masks = status
            .lines()
            .filter(|line| line.starts_with("Sig") && !line.contains('/'));
        let stat = target.proc("stat");
        let after_name = stat.rsplit_once(')').unwrap().1;
        // Priority, nice value, real-time priority, policy: fields 18, 19, 40, 41.
        let fields: Vec<&str> = after_name.split_whitespace().collect();
        let chosen = [fields[15], fields[16], fields[37], fields[38]].map(str::to_owned);
        (masks.map(str::to_owned).collect::<Vec<_>>(), chosen)
    };
    let before = about();
    assert_eq!(before.1[1], "7");
    for _ in 0..20 {
        let hold = take_hold(target.pid).unwrap();
        drop_keeper(target.pid, hold.keeper_fd).unwrap();
        quiesce(target.pid).unwrap();
    }
    assert_eq!(about(), before);
}

#[test]
fn the_keeper_is_high_and_another_descriptor_of_that_number_is_left_alone() {
    let target = Target::sleeper();
    let hold = take_hold(target.pid).unwrap();
    assert!(hold.keeper_fd > 30, "{}", hold.keeper_fd);
    drop_keeper(target.pid, 0).unwrap();
    assert!(target.descriptors().contains_key(&0));
    drop_keeper(target.pid, hold.keeper_fd).unwrap();
    assert!(!target.descriptors().contains_key(&hold.keeper_fd));
    drop_keeper(target.pid, hold.keeper_fd).unwrap();
}

#[test]
fn the_place_of_the_thread_id_is_the_c_librarys() {
    let target = Target::sleeper();
    let hold = take_hold(target.pid).unwrap();
    let at = hold.clear_child_tid.unwrap();
    // glibc keeps it in the thread's descriptor, and holds the id there.
    let mut id = [0_u8; 4];
    let mem = holo_pager::sys::mem::TargetMem::open(target.pid).unwrap();
    mem.read(at, &mut id).unwrap();
    assert_eq!(i32::from_ne_bytes(id), target.pid);
}

#[test]
fn a_stopped_program_stays_stopped() {
    let mut target = Target::odd("memory");
    let pid = target.pid;
    let start: u64 = target.line().parse().unwrap();
    target.signal(libc::SIGSTOP);
    target.wait_until("it is stopped", |t| t.state() == 'T');
    // Its parent learns of the stop once.
    assert_eq!(wait_for_change(pid), Some(libc::CLD_STOPPED));
    let hold = take_hold(pid).unwrap();
    target.wait_until("it is stopped again", |t| t.state() == 'T');
    make_ring(pid, 8).unwrap();
    target.wait_until("it is stopped again", |t| t.state() == 'T');
    quiesce(pid).unwrap();
    target.wait_until("it is stopped again", |t| t.state() == 'T');

    // Advice to itself works all the same.
    let kept = 100 * 4096;
    let dropped = AddrRange::new(start + kept, start + (1 << 20));
    let advised = advise_self(pid, &[dropped], libc::MADV_DONTNEED).unwrap();
    assert_eq!((advised.bytes, advised.errno), (dropped.len(), None));
    target.wait_until("it is stopped again", |t| t.state() == 'T');
    assert_eq!(wait_for_change(pid), None);

    target.signal(libc::SIGCONT);
    target.wait_until("it goes on", |t| t.state() == 'S');
    assert_eq!(wait_for_change(pid), Some(libc::CLD_CONTINUED));
    drop_keeper(pid, hold.keeper_fd).unwrap();
    let (lines, success) = target.finish();
    assert_eq!(lines, [kept.to_string(), "ok".to_owned()]);
    assert!(success);
}

/// What a parent would learn now: how its child changed.
fn wait_for_change(pid: i32) -> Option<i32> {
    let how = libc::WSTOPPED | libc::WCONTINUED | libc::WNOHANG;
    let id = libc::id_t::try_from(pid).unwrap();
    let mut info = std::mem::MaybeUninit::<libc::siginfo_t>::zeroed();
    // SAFETY: the structure is valid for writes.
    let r = unsafe { libc::waitid(libc::P_PID, id, info.as_mut_ptr(), how) };
    assert_eq!(r, 0);
    // SAFETY: zeroed, then filled by the kernel; any bits are valid.
    let info = unsafe { info.assume_init() };
    // SAFETY: waitid fills the child's fields or leaves them zero.
    (unsafe { info.si_pid() } == pid).then_some(info.si_code)
}

#[test]
fn stop_and_continue_in_the_middle_take_effect() {
    let target = Target::busy(&["nanosleep", "futex_timeout", "fpu"]);
    let pid = target.pid;
    let reaches = move |what: &str, seen: fn(char) -> bool| {
        let since = std::time::Instant::now();
        while !state_of(pid).is_some_and(seen) {
            in_time(since, what);
            std::thread::yield_now();
        }
    };
    let signals = std::thread::spawn(move || {
        for i in 0..200 {
            kill(pid, libc::SIGSTOP);
            reaches("a stop", |state| state == 'T');
            std::thread::sleep(std::time::Duration::from_micros(i * 5));
            kill(pid, libc::SIGCONT);
            reaches("a continuation", |state| !matches!(state, 'T' | 't'));
            std::thread::sleep(std::time::Duration::from_micros(i * 7));
        }
    });
    let mut rounds = 0;
    while !signals.is_finished() {
        let hold = take_hold(pid).unwrap();
        make_ring(pid, 8).unwrap();
        drop_keeper(pid, hold.keeper_fd).unwrap();
        quiesce(pid).unwrap();
        rounds += 1;
    }
    signals.join().unwrap();
    println!("{rounds} rounds among 200 stops");
    // Its sleeps were cut by real stops: what it says of them does not matter here, that it ends does.
    assert!(target.finish().0.last().unwrap().contains("calls"));
}

#[test]
fn advice_to_itself_tells_how_far_it_came() {
    let mut target = Target::odd("memory");
    let pid = target.pid;
    let start: u64 = target.line().parse().unwrap();
    let page = |i: u64| AddrRange::new(start + i * 4096, start + (i + 1) * 4096);
    let nowhere = AddrRange::new(0x1000, 0x2000);
    // More than fit in one call, every other page.
    let advised = advise_self(pid, &[page(0), nowhere, page(1)], libc::MADV_DONTNEED).unwrap();
    assert_eq!((advised.bytes, advised.errno), (4096, Some(libc::ENOMEM)));
    let many: Vec<_> = (0..1100).map(|i| page(2 + i % 100)).collect();
    let advised = advise_self(pid, &many, libc::MADV_DONTNEED).unwrap();
    assert_eq!((advised.bytes, advised.errno), (1100 * 4096, None));
    let (lines, success) = target.finish();
    assert_eq!(lines[0], ((256 - 101) * 4096).to_string());
    assert!(success);
}

#[test]
fn a_program_without_its_first_thread() {
    let target = Target::odd("without-a-leader");
    let pid = target.pid;
    target.wait_until("the first thread has ended", |t| t.state() == 'Z');
    let hold = take_hold(pid).unwrap();
    make_ring(pid, 8).unwrap();
    quiesce(pid).unwrap();
    advise_self(pid, &[], libc::MADV_DONTNEED).unwrap();
    works(hold);
    // What it has is not told any more, though: nobody promises to limit it.
    assert_eq!(preflight(pid), Err(AttachError::FirstThreadEnded { pid }));
    let (lines, success) = target.finish();
    assert!(success, "{lines:?}");
}

#[test]
fn a_restartable_sequence_is_started_anew() {
    let target = Target::odd("restartable-sequences");
    for _ in 0..100 {
        let hold = take_hold(target.pid).unwrap();
        drop_keeper(target.pid, hold.keeper_fd).unwrap();
    }
    quiesce(target.pid).unwrap();
    let (lines, success) = target.finish();
    assert!(success, "{lines:?}");
}

#[test]
fn system_calls_that_would_become_signals() {
    let target = Target::odd("dispatches");
    for _ in 0..50 {
        let hold = take_hold(target.pid).unwrap();
        drop_keeper(target.pid, hold.keeper_fd).unwrap();
    }
    let (lines, success) = target.finish();
    assert!(success, "{lines:?}");
}

#[test]
fn a_program_that_starts_itself_anew_all_the_time() {
    let target = Target::odd("restless");
    let pid = target.pid;
    let (mut held, mut missed) = (Vec::new(), 0);
    for _ in 0..150 {
        match take_hold(pid) {
            // What it keeps of this until its next exec is known for ours.
            Ok(hold) => held.push(hold),
            // It changed in the middle. What was made in it is gone with the program that it was.
            Err(
                AttachError::Changed { .. }
                | AttachError::Exiting { .. }
                | AttachError::Busy { .. }
                | AttachError::NoVdso { .. }
                | AttachError::Uninterruptible { .. },
            ) => missed += 1,
            Err(e) => panic!("{e:?}"),
        }
        match quiesce(pid) {
            Ok(_)
            | Err(
                AttachError::Busy { .. }
                | AttachError::Exiting { .. }
                | AttachError::Changed { .. },
            ) => {}
            Err(e) => panic!("{e:?}"),
        }
    }
    println!("taken {} times, missed {missed}", held.len());
    assert!(!held.is_empty());
    let (lines, success) = target.finish();
    assert!(success && lines.last().unwrap() == "ok", "{lines:?}");
}

#[test]
fn programs_that_end_in_the_middle() {
    for round in 0..150 {
        let mut child = Command::new(build("odd"))
            .arg("no such kind")
            .spawn()
            .unwrap();
        let pid = i32::try_from(child.id()).unwrap();
        match take_hold(pid) {
            Ok(_)
            | Err(
                AttachError::Exiting { .. }
                | AttachError::Changed { .. }
                | AttachError::NoVdso { .. }
                | AttachError::Uninterruptible { .. }
                | AttachError::NoSuchProcess { .. },
            ) => {}
            Err(e) => panic!("round {round}: {e:?}"),
        }
        // Its exit code is its parent's, whatever happened.
        assert_eq!(child.wait().unwrap().code(), Some(2), "round {round}");
    }
}

#[test]
fn a_ring_works_and_is_no_thread_of_the_program() {
    let mut target = Target::odd("memory");
    let pid = target.pid;
    let start: u64 = target.line().parse().unwrap();
    let before = (target.descriptors(), target.maps());
    let made = make_ring(pid, 8).unwrap();
    assert_eq!((target.descriptors(), target.maps()), before);
    let names = || -> Vec<String> {
        std::fs::read_dir(format!("/proc/{pid}/task"))
            .unwrap()
            // One that ends in between has no name any more.
            .filter_map(|task| std::fs::read_to_string(task.ok()?.path().join("comm")).ok())
            .collect()
    };
    // It takes its name when it first runs; the thread that made the ring may not have left yet.
    let is_alone = |names: &[String]| names.len() == 2 && names[1].starts_with("iou-sqp-");
    let since = std::time::Instant::now();
    loop {
        let names = names();
        if is_alone(&names) {
            break;
        }
        in_time(since, "the ring's thread alone");
        std::thread::sleep(std::time::Duration::from_millis(1));
    }
    let mut ring = AdviceRing::map(made.fd, &RingParams(made.params)).unwrap();
    let dropped = AddrRange::new(start, start + 40 * 4096);
    ring.submit(dropped, Advice::DontNeed, 1).unwrap();
    let since = std::time::Instant::now();
    let done = loop {
        ring.wake_if_needed().unwrap();
        if let Some(done) = ring.reap() {
            break done;
        }
        in_time(since, "the advice");
    };
    assert_eq!((done.tag, done.result), (1, 0));
    let (lines, success) = target.finish();
    assert_eq!(lines[0], ((256 - 40) * 4096).to_string());
    assert!(success);
}

#[test]
fn a_hole_that_the_program_fills_again_is_left_alone() {
    let target = Target::busy(&["futex_timeout", "hole"]);
    for _ in 0..300 {
        make_ring(target.pid, 8).unwrap();
    }
    let (lines, success) = target.finish();
    assert!(success, "{lines:?}");
}

/// Takes hold of the process that the environment names until it is killed; see the test below.
#[test]
#[ignore = "a part of another test, which kills it; owner: pager"]
fn takes_hold_for_ever() {
    let pid: i32 = std::env::var("HOLO_ATTACH_PID").unwrap().parse().unwrap();
    println!("ready");
    while let Ok(hold) = take_hold(pid) {
        if std::env::var_os("HOLO_ATTACH_RING").is_some() {
            let _ = make_ring(pid, 8);
        }
        let _ = drop_keeper(pid, hold.keeper_fd);
    }
}

#[test]
fn a_program_whose_tracer_is_killed_runs_right_or_not_at_all() {
    use std::os::unix::process::ExitStatusExt;
    let (mut alive, mut killed) = (0, 0);
    for round in 0..40 {
        let mut target = Target::busy(&["nanosleep", "epoll", "fpu"]);
        let name = "unnoticed::takes_hold_for_ever";
        let mut command = Command::new(std::env::current_exe().unwrap());
        command
            .args(["--exact", name, "--ignored", "--nocapture"])
            .env("HOLO_ATTACH_PID", target.pid.to_string());
        if round % 4 == 0 {
            command.env("HOLO_ATTACH_RING", "1");
        }
        let mut tracer = Target::start(&mut command);
        tracer.read_until("ready\n");
        // The work of a round takes some milliseconds: this is anywhere in it.
        std::thread::sleep(std::time::Duration::from_micros(1000 + 517 * round));
        drop(tracer);
        std::thread::sleep(std::time::Duration::from_millis(20));
        match target.child.try_wait().unwrap() {
            // With our registers it may not run on.
            Some(status) => {
                assert_eq!(status.signal(), Some(libc::SIGKILL), "{status}");
                killed += 1;
            }
            None => {
                let (lines, success) = target.finish();
                assert!(success, "{lines:?}");
                alive += 1;
            }
        }
    }
    println!("killed with its tracer {killed} times, ran on {alive} times");
    assert!(alive > 0);
}
