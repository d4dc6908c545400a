use super::super::testing::{Target, drain_cpu_lists, within};
use super::*;

#[test]
fn a_target_that_ends_is_seen_before_and_after_it_is_reaped() {
    let mut target = Target::start();
    assert!(!target.pidfd.has_exited());
    target.pidfd.send_signal(0).unwrap();
    target.pidfd.send_signal(libc::SIGKILL).unwrap();
    within("the end", || target.pidfd.has_exited().then_some(()));
    // A zombie takes signals; a reaped one does not.
    assert!(target.pidfd.send_signal(0).is_ok());
    target.end();
    assert!(target.pidfd.has_exited());
    let gone = target.pidfd.send_signal(0).unwrap_err();
    assert_eq!(gone.raw_os_error(), Some(libc::ESRCH));
    assert!(target.pidfd.get_fd(0).is_err());
    assert!(PidFd::open(target.pid).is_err());
}

#[test]
fn a_descriptor_of_the_target_is_the_same_file() {
    let mut target = Target::start();
    let name = libc::MFD_CLOEXEC;
    let range = target.map(1);
    target.poke(range.start, b'x');
    let number = target.syscall(
        libc::SYS_memfd_create,
        [range.start.0, u64::from(name), 0, 0, 0],
    );
    let number = RawFd::try_from(number).unwrap();
    let file = std::fs::File::from(target.pidfd.get_fd(number).unwrap());
    file.set_len(12345).unwrap();
    let len = target.syscall(
        libc::SYS_lseek,
        [
            u64::try_from(number).unwrap(),
            0,
            libc::SEEK_END as u64,
            0,
            0,
        ],
    );
    assert_eq!(len, 12345);
    let none = target.pidfd.get_fd(1000).unwrap_err();
    assert_eq!(none.raw_os_error(), Some(libc::EBADF));
}

#[test]
fn refusals_have_meanings() {
    let mut target = Target::start();
    let range = target.map(16);
    target.fill(range, 1);
    assert_eq!(pageout(&target.pidfd, &[]), Ok(0));
    assert_eq!(pageout(&target.pidfd, &[range]), Ok(65536));
    let beyond = AddrRange::new(range.end.0, range.end.0 + 4096);
    assert_eq!(
        pageout(&target.pidfd, &[beyond]),
        Err(AdviseError::Unmapped)
    );
    // The first range counts, the second one ends it.
    assert_eq!(pageout(&target.pidfd, &[range, beyond, range]), Ok(65536));
    // So does a whole further call.
    let mut many = [range; RANGES_PER_CALL + 1];
    many[RANGES_PER_CALL] = beyond;
    let first_call = RANGES_PER_CALL as u64 * 65536;
    assert_eq!(pageout(&target.pidfd, &many), Ok(first_call));
    assert_eq!(
        target.syscall(libc::SYS_mlock, [range.start.0, range.len(), 0, 0, 0]),
        0
    );
    assert_eq!(pageout(&target.pidfd, &[range]), Err(AdviseError::NotTaken));
    target.end();
    assert_eq!(pageout(&target.pidfd, &[range]), Err(AdviseError::Gone));
}

#[test]
fn more_ranges_than_one_call_takes_are_all_walked() {
    let mut target = Target::start();
    let range = target.map(200);
    target.fill(range, 1);
    let ranges: Vec<_> = range
        .subpages()
        .map(|s| AddrRange::new(s.start().0, s.start().0 + 4096))
        .collect();
    drain_cpu_lists();
    assert_eq!(target.madvise(range, libc::MADV_FREE), 0);
    for _ in 0..3 {
        drain_cpu_lists();
        assert_eq!(pageout(&target.pidfd, &ranges), Ok(200 * 4096));
    }
    let pagemap = super::super::pagemap::Pagemap::open(target.pid).unwrap();
    let mut left = [Default::default(); 4];
    assert_eq!(
        pagemap.scan_present(range, &mut left).unwrap().0,
        0,
        "{left:?}"
    );
}
