//! Descriptors by number, in a table that processes share and that outlives each of them.
//!
//! Pager, guardian and successor share one descriptor table (`CLONE_FILES`). A dead pager's descriptors stay
//! open; its successor knows their numbers from shared memory and takes them over here.

use std::collections::BTreeSet;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::FileTypeExt as _;
use std::os::unix::net::UnixDatagram;
use std::sync::Mutex;

static CLAIMED: Mutex<BTreeSet<RawFd>> = Mutex::new(BTreeSet::new());

/// Whether a descriptor of this number is open.
#[must_use]
pub fn is_open(number: RawFd) -> bool {
    // SAFETY: asks for flags of a number; changes nothing.
    unsafe { libc::fcntl(number, libc::F_GETFD) >= 0 }
}

/// Takes over the descriptor with this number, which no part of this process owns yet. `None` if it is
/// not open, or was claimed before.
pub fn claim(number: RawFd) -> Option<OwnedFd> {
    if number < 0 || !is_open(number) {
        return None;
    }
    let mut claimed = CLAIMED.lock().ok()?;
    if !claimed.insert(number) {
        return None;
    }
    // SAFETY: open just now; claimed once (the set), and by contract a number that came from shared
    // memory, hence from another process: no value of this one owns it.
    Some(unsafe { OwnedFd::from_raw_fd(number) })
}

/// Keeps a descriptor open for whoever knows its number, and gives the number.
#[must_use]
pub fn leave(fd: OwnedFd) -> RawFd {
    let number = fd.as_raw_fd();
    std::mem::forget(fd);
    number
}

/// Says that the owner of a claimed descriptor closes it next. Before that, for the kernel gives the number to
/// whoever opens something then, and that may be claimed at once.
pub fn unclaim(number: RawFd) {
    if let Ok(mut claimed) = CLAIMED.lock() {
        claimed.remove(&number);
    }
}

/// For a new process that shares the table: what its parent had claimed is its parent's.
pub fn forget_claims() {
    if let Ok(mut claimed) = CLAIMED.lock() {
        claimed.clear();
    }
}

/// Whether a process no longer shares this table: it has ended, or opens and closes nothing any more.
#[must_use]
pub fn has_left(pid: i32) -> bool {
    super::fds::has_left_our_table(pid)
}

/// Closes a descriptor that was left, by number.
pub fn close(number: RawFd) {
    unclaim(number);
    // SAFETY: a number that was left in the shared table; its only user says that it is over.
    unsafe { libc::close(number) };
}

/// Numbers of all open descriptors.
///
/// # Errors
/// What `/proc` says.
pub fn open_numbers() -> io::Result<Vec<RawFd>> {
    let mut numbers = Vec::new();
    for entry in std::fs::read_dir("/proc/self/fd")? {
        if let Some(n) = entry?.file_name().to_str().and_then(|s| s.parse().ok()) {
            numbers.push(n);
        }
    }
    // Not that of the listing itself.
    numbers.retain(|&n| is_open(n));
    Ok(numbers)
}

/// A new descriptor for what an open number names.
#[must_use]
pub fn duplicate(number: RawFd) -> Option<OwnedFd> {
    // SAFETY: makes a descriptor of an open one, or fails.
    let fd = unsafe { libc::fcntl(number, libc::F_DUPFD_CLOEXEC, 3) };
    // SAFETY: just made, owned by nobody else.
    (fd >= 0).then(|| unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Sends whoever has the other end of a Unix stream a descriptor of its own for what `number` names. Never
/// waits: false where there is no room, and nobody at the other end.
#[must_use]
pub fn send(socket: RawFd, number: RawFd) -> bool {
    if !is_open(socket) || !is_open(number) {
        return false;
    }
    // SAFETY: open just now. Should its only user close it meanwhile, the call fails.
    let socket = unsafe { BorrowedFd::borrow_raw(socket) };
    // SAFETY: as before.
    let fd = unsafe { BorrowedFd::borrow_raw(number) };
    super::fds::send(socket, fd).is_ok()
}

/// What [`send`] sent; `None` when nothing is there, or nothing will ever be. Never waits.
pub fn receive(socket: impl AsFd) -> Option<OwnedFd> {
    loop {
        match super::fds::receive(socket.as_fd()) {
            Ok(fd) => return Some(fd),
            // This one was lost; the next one may find room.
            Err(libc::EINTR | libc::EMFILE) => {}
            Err(_) => return None,
        }
    }
}

/// Whether two descriptors are of one open file; false when that cannot be known.
#[must_use]
pub fn are_the_same(one: impl AsFd, other: impl AsFd) -> bool {
    super::fds::are_the_same(one.as_fd(), other.as_fd())
}

/// Who is at the other end of a Unix stream: as it was when that end was made, or began to listen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Peer {
    /// Process id.
    pub pid: i32,
    /// Effective user id.
    pub uid: u32,
}

impl Peer {
    /// Root, or this process's own user.
    #[must_use]
    pub fn is_trusted(self) -> bool {
        // SAFETY: returns a number.
        let own = unsafe { libc::geteuid() };
        self.uid == 0 || self.uid == own
    }
}

/// Who is at the other end of a Unix stream.
#[must_use]
pub fn peer(socket: RawFd) -> Option<Peer> {
    let mut cred = libc::ucred {
        pid: 0,
        uid: u32::MAX,
        gid: 0,
    };
    let mut len = u32::try_from(size_of::<libc::ucred>()).ok()?;
    // SAFETY: the structure and its length are valid for the writes.
    let r = unsafe {
        libc::getsockopt(
            socket,
            libc::SOL_SOCKET,
            libc::SO_PEERCRED,
            (&raw mut cred).cast(),
            &raw mut len,
        )
    };
    (r == 0).then_some(Peer {
        pid: cred.pid,
        uid: cred.uid,
    })
}

/// The number of an owned descriptor.
#[must_use]
pub fn number_of(fd: &OwnedFd) -> RawFd {
    fd.as_raw_fd()
}

/// Closes every descriptor above standard error that is not in `keep`. For a new process, before it owns
/// anything.
pub fn close_all_but(keep: &[RawFd]) {
    for n in open_numbers().unwrap_or_default() {
        if n > 2 && !keep.contains(&n) {
            close(n);
        }
    }
}

/// Points the standard streams that are not in `keep` to nowhere.
pub fn null_standard_streams(keep: &[RawFd]) {
    let Ok(null) = std::fs::File::options()
        .read(true)
        .write(true)
        .open("/dev/null")
    else {
        return;
    };
    for n in (0..3).filter(|n| !keep.contains(n)) {
        // SAFETY: replaces a standard stream of a new process that has not used it.
        unsafe { libc::dup2(null.as_raw_fd(), n) };
    }
}

/// Whether somebody may wait for the end of what is written to this number: it is a pipe or a socket.
#[must_use]
pub fn has_a_reader(number: RawFd) -> bool {
    let kind = duplicate(number).map(|fd| File::from(fd).metadata());
    kind.is_some_and(|kind| {
        kind.is_ok_and(|kind| kind.file_type().is_fifo() || kind.file_type().is_socket())
    })
}

/// Where a daemon's messages are looked for: the kernel's log, or the log daemon's socket. One write is one message.
#[must_use]
pub fn open_log() -> Option<OwnedFd> {
    if let Ok(kernel) = File::options().write(true).open("/dev/kmsg") {
        return Some(kernel.into());
    }
    let socket = UnixDatagram::unbound().ok()?;
    socket.connect("/dev/log").ok()?;
    socket.set_nonblocking(true).ok()?;
    Some(socket.into())
}

/// Puts a descriptor, or one of nothing, in the place of another number: for everybody who shares the table.
pub fn put_in_place(fd: Option<OwnedFd>, number: RawFd) {
    let nothing = || File::options().write(true).open("/dev/null").ok();
    let Some(fd) = fd.or_else(|| nothing().map(OwnedFd::from)) else {
        return;
    };
    // SAFETY: replaces what a number names that is used by number only.
    unsafe { libc::dup2(fd.as_raw_fd(), number) };
}
