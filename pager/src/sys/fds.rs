//! Descriptors that cross between processes, and what two processes share.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use super::ptrace::{Errno, bits};

/// `pidfd_open` for a thread that is no leader, Linux 6.9.
const PIDFD_THREAD: i32 = libc::O_EXCL;
const KCMP_FILE: i32 = 0;
const KCMP_VM: i32 = 1;
const KCMP_FILES: i32 = 2;
/// Makes a userfaultfd out of an open `/dev/userfaultfd`.
pub(super) const USERFAULTFD_IOC_NEW: u64 = 0xaa00;

fn owned(fd: libc::c_long) -> Result<OwnedFd, Errno> {
    match RawFd::try_from(fd) {
        // SAFETY: the kernel just made this descriptor for us; nobody else knows its number.
        Ok(fd) if fd >= 0 => Ok(unsafe { OwnedFd::from_raw_fd(fd) }),
        _ => Err(super::errno()),
    }
}

/// A pidfd of a process. ESRCH without one, EINVAL or ENOENT for the id of a thread.
pub(super) fn open_process(pid: i32) -> Result<OwnedFd, Errno> {
    // SAFETY: touches no memory of ours.
    owned(unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) })
}

/// A pidfd of a thread, else of its process on kernels that have none: the same table of descriptors, as
/// long as the leader lives.
pub(super) fn open_thread(pid: i32, tid: i32) -> Result<OwnedFd, Errno> {
    if tid == pid {
        return open_process(pid);
    }
    // SAFETY: touches no memory of ours.
    let fd = owned(unsafe { libc::syscall(libc::SYS_pidfd_open, tid, PIDFD_THREAD) });
    match fd {
        Err(libc::EINVAL) => open_process(pid),
        result => result,
    }
}

/// Copies a descriptor out of another process, close-on-exec.
pub(super) fn copy_out(pidfd: BorrowedFd<'_>, number: u64) -> Result<OwnedFd, Errno> {
    let Ok(number) = RawFd::try_from(number) else {
        return Err(libc::EBADF);
    };
    // SAFETY: touches no memory of ours.
    owned(unsafe { libc::syscall(libc::SYS_pidfd_getfd, pidfd.as_raw_fd(), number, 0) })
}

/// Sends a descriptor, with one byte, through a Unix socket; EAGAIN where there is no room.
pub(super) fn send(socket: BorrowedFd<'_>, fd: BorrowedFd<'_>) -> Result<(), Errno> {
    let mut byte = 0_u8;
    let mut part = libc::iovec {
        iov_base: (&raw mut byte).cast(),
        iov_len: 1,
    };
    let mut control = control_words(fd.as_raw_fd());
    // SAFETY: a message header of zeros is valid: no name, no parts, no control data.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = &raw mut part;
    message.msg_iovlen = 1;
    message.msg_control = control.as_mut_ptr().cast();
    message.msg_controllen = size_of_val(&control);
    let how = libc::MSG_NOSIGNAL | libc::MSG_DONTWAIT;
    // SAFETY: the header points at a part and control data that live until the call returns.
    let sent = unsafe { libc::sendmsg(socket.as_raw_fd(), &raw const message, how) };
    if sent == 1 {
        Ok(())
    } else {
        Err(super::errno())
    }
}

/// What [`send`] sent, close-on-exec: EAGAIN where there is nothing yet, ENOENT at the end, EMFILE for a
/// descriptor that found no room in our table.
pub(super) fn receive(socket: BorrowedFd<'_>) -> Result<OwnedFd, Errno> {
    let mut byte = 0_u8;
    let mut part = libc::iovec {
        iov_base: (&raw mut byte).cast(),
        iov_len: 1,
    };
    let mut control = [0_u64; 3];
    // SAFETY: a message header of zeros is valid: no name, no parts, no control data.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = &raw mut part;
    message.msg_iovlen = 1;
    message.msg_control = control.as_mut_ptr().cast();
    message.msg_controllen = size_of_val(&control);
    let how = libc::MSG_CMSG_CLOEXEC | libc::MSG_DONTWAIT;
    // SAFETY: the header points at a part and control data that live until the call returns.
    match unsafe { libc::recvmsg(socket.as_raw_fd(), &raw mut message, how) } {
        1 => match descriptor_in(control).map(RawFd::try_from) {
            // SAFETY: the kernel just made this descriptor for us; nobody else knows its number.
            Some(Ok(fd)) => Ok(unsafe { OwnedFd::from_raw_fd(fd) }),
            _ => Err(libc::EMFILE),
        },
        0 => Err(libc::ENOENT),
        _ => Err(super::errno()),
    }
}

/// A control message that carries one descriptor: length 20, SOL_SOCKET, SCM_RIGHTS, the number.
pub(super) fn control_words(fd: RawFd) -> [u64; 3] {
    let level_and_type = bits(libc::SOL_SOCKET) | bits(libc::SCM_RIGHTS) << 32;
    [CONTROL_LEN, level_and_type, bits(fd)]
}

/// Length of that control message without its padding.
const CONTROL_LEN: u64 = 20;

/// The descriptor in a control message that arrived.
pub(super) fn descriptor_in(control: [u64; 3]) -> Option<u64> {
    let [len, level_and_type, fd] = control;
    let [_, expected, _] = control_words(0);
    (len == CONTROL_LEN && level_and_type == expected).then_some(fd & u64::from(u32::MAX))
}

/// Whether two processes run on the same memory; false when that cannot be known.
pub(super) fn share_memory(one: i32, other: i32) -> bool {
    compare(one, other, KCMP_VM) == Some(true)
}

/// Whether two threads have different tables of descriptors; false when that cannot be known.
pub(super) fn have_different_descriptors(one: i32, other: i32) -> bool {
    compare(one, other, KCMP_FILES) == Some(false)
}

/// Whether a process no longer has our table of descriptors: it has ended, or is so far on its way that
/// it opens and closes nothing any more. The id of another process by now counts as ended, too.
pub(super) fn has_left_our_table(pid: i32) -> bool {
    match compare(super::spawn::own_pid(), pid, KCMP_FILES) {
        Some(shared) => !shared,
        None => super::errno() == libc::ESRCH,
    }
}

/// Whether two descriptors of ours are of one open file; false when that cannot be known.
pub(super) fn are_the_same(one: BorrowedFd<'_>, other: BorrowedFd<'_>) -> bool {
    let me = super::spawn::own_pid();
    let (one, other) = (one.as_raw_fd(), other.as_raw_fd());
    // SAFETY: touches no memory of ours.
    let order = unsafe { libc::syscall(libc::SYS_kcmp, me, me, KCMP_FILE, one, other) };
    order == 0
}

fn compare(one: i32, other: i32, what: i32) -> Option<bool> {
    // SAFETY: touches no memory of ours.
    let order = unsafe { libc::syscall(libc::SYS_kcmp, one, other, what, 0, 0) };
    (order >= 0).then_some(order == 0)
}

/// Whether the kernel was built with userfaultfd at all.
pub(super) fn kernel_has_userfaultfd() -> bool {
    // SAFETY: touches no memory of ours.
    let fd = owned(unsafe { libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC) });
    fd.err() != Some(libc::ENOSYS)
}

/// Whether the kernel was built with io_uring at all.
pub(super) fn kernel_has_io_uring() -> bool {
    let nowhere = std::ptr::null_mut::<u8>();
    // SAFETY: a ring without entries is refused before its parameters, which are nowhere, are written to.
    let fd = owned(unsafe { libc::syscall(libc::SYS_io_uring_setup, 0, nowhere) });
    fd.err() != Some(libc::ENOSYS)
}

/// Whether a descriptor of another process is of the same open file as one of ours; false when that cannot be
/// known.
pub(super) fn is_one_of_ours(pid: i32, number: RawFd) -> bool {
    let me = super::spawn::own_pid();
    let ours = super::table::open_numbers().unwrap_or_default();
    ours.into_iter().any(|own| {
        // SAFETY: touches no memory of ours.
        unsafe { libc::syscall(libc::SYS_kcmp, me, pid, KCMP_FILE, own, number) == 0 }
    })
}

/// Opens `/dev/userfaultfd`, which makes userfaultfds for a process without the right; an error says
/// why it cannot be had. Linux 6.1.
pub(super) fn open_userfaultfd_device() -> io::Result<OwnedFd> {
    let device = std::fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/userfaultfd")?;
    // SAFETY: this request takes flags and touches no memory of ours.
    let fd = unsafe { libc::ioctl(device.as_raw_fd(), USERFAULTFD_IOC_NEW, libc::O_CLOEXEC) };
    // A device that makes one for us makes one for the target.
    match owned(libc::c_long::from(fd)) {
        Ok(_) => Ok(OwnedFd::from(device)),
        Err(errno) => Err(io::Error::from_raw_os_error(errno)),
    }
}
