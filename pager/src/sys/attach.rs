//! Taking hold of a process: one stop of one thread, after which the process runs without a tracer.
//!
//! Each function here stops one thread for some hundred microseconds (see `inject.rs`), chosen so that it
//! minds least: one that waits for a futex or a timer loses nothing at all. The work is done on a thread of
//! its own, because only the end of the tracing thread lets go of a thread that does not stop; so the
//! caller's wait always has a limit. Nobody in the calling process may wait for children in general
//! (`waitpid(-1)`) meanwhile: it would take the stops for itself.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use holo_proto::{Addr, AddrRange};

use super::fds;
pub use super::inject::longest_stop_us;
use super::inject::{Lost, Plan, Stopped, with_stopped};
pub use super::process::first_thread_has_ended;
use super::process::{self, Target};
use super::ptrace::{Errno, bits, register};
pub use super::quiesce::{hold_still, quiesce, redirty};
pub use super::refuse::AttachError;
use super::ring::RingParams;
use super::worker::{NoAnswer, on_a_worker};

/// How long a caller waits for the calls in one stop, most of which take microseconds. Longer than a
/// thread under load needs to get a CPU.
const CALL_PATIENCE: Duration = Duration::from_secs(2);
/// Threads tried before the process counts as one that cannot be stopped.
const THREADS_TRIED: usize = 8;

const MAKING_A_RING: &str = "io_uring_setup";
const MAKING_A_THREAD: &str = "clone";
const PR_GET_TID_ADDRESS: u64 = 40;
/// The ring's thread sleeps after so many milliseconds without work.
const RING_IDLE_MS: u32 = 2;
/// A pidfd argument that means the calling process, Linux 6.14.
const PIDFD_SELF_PROCESS: i64 = -10001;
/// Ranges in one `process_madvise`.
const RANGES_PER_CALL: usize = 1024;
const SCRATCH_BYTES: u64 = 4096;

/// A process that was taken. It runs, without a tracer.
#[derive(Debug)]
pub struct Hold {
    /// The userfaultfd of its address space: our copy, close-on-exec, before the UFFDIO_API handshake.
    pub uffd: OwnedFd,
    /// The number of the descriptor for the same userfaultfd that the process keeps, close-on-exec.
    pub keeper_fd: i32,
    /// The process. When its first thread has ended and others run on, the kernel refuses advice
    /// (`process_madvise`) through it with ESRCH, and has no other name for the memory: only
    /// [`advise_self`] and a ring work then.
    pub pidfd: OwnedFd,
    /// Where the kernel clears a thread's id at its exit, with faults forbidden: the mapping that holds it must
    /// never be paged. Of the thread that was stopped; `None` when it has none or the kernel does not say.
    pub clear_child_tid: Option<Addr>,
    /// How long that thread was stopped, microseconds.
    pub stop_us: u64,
}

/// An io_uring that was made in a process and is ours alone.
#[derive(Debug)]
pub struct RingHold {
    /// Its descriptor; the process has none.
    pub fd: OwnedFd,
    /// `struct io_uring_params` as the kernel filled it.
    pub params: [u64; 15],
    /// How long the thread was stopped, microseconds.
    pub stop_us: u64,
}

/// What became of advice that a process gave on its own memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Advised {
    /// Bytes done, from the first range on.
    pub bytes: u64,
    /// Why it ended before the last range. The range at which it ended may be half done: look at the pagemap.
    pub errno: Option<i32>,
    /// How long the thread was stopped, microseconds.
    pub stop_us: u64,
}

/// Looks for every reason to refuse a process that can be seen without stopping it.
///
/// # Errors
/// The reason.
pub fn preflight(pid: i32) -> Result<(), AttachError> {
    let target = Target::open_to_take(pid)?;
    process::candidates(pid)?;
    if first_thread_has_ended(pid) {
        return Err(AttachError::FirstThreadEnded { pid });
    }
    refuse_without_io_uring(pid)?;
    userfaultfd_device(&target).map(drop)
}

/// Takes hold of a process: makes a userfaultfd in it, copies the descriptor out, and leaves one in it.
///
/// # Errors
/// Why not; the process then goes on as before.
pub fn take_hold(pid: i32) -> Result<Hold, AttachError> {
    let target = Target::open_to_take(pid)?;
    refuse_without_io_uring(pid)?;
    let device = userfaultfd_device(&target)?;
    let high = process::high_descriptor(pid);
    let (taken, stop_us) = in_a_stop(&target, "userfaultfd", move |stopped, pidfd| {
        take(stopped, pid, pidfd, device.as_ref(), high)
    })?;
    let (uffd, keeper_fd, clear_child_tid) = taken;
    Ok(Hold {
        uffd,
        keeper_fd,
        pidfd: target.pidfd,
        clear_child_tid,
        stop_us,
    })
}

fn take(
    stopped: &mut Stopped,
    pid: i32,
    pidfd: BorrowedFd<'_>,
    device: Option<&OwnedFd>,
    high: u64,
) -> Result<(OwnedFd, i32, Option<Addr>), Failure> {
    let scratch = stopped
        .map_scratch(SCRATCH_BYTES)?
        .map_err(|errno| no_scratch(pid, errno))?;
    let flags = bits(libc::O_CLOEXEC | libc::O_NONBLOCK);
    let low = match (stopped.call(libc::SYS_userfaultfd, &[flags])?, device) {
        (Ok(fd), _) => fd,
        // Its user may not make one; whoever may use the device may.
        (Err(libc::EPERM), Some(device)) => {
            let theirs = hand_over(stopped, pid, pidfd, device, scratch)?;
            let arguments = [theirs, fds::USERFAULTFD_IOC_NEW, flags];
            stopped
                .call(libc::SYS_ioctl, &arguments)?
                .map_err(|errno| no_userfaultfd(pid, errno))?
        }
        (Err(errno), _) => return Err(no_userfaultfd(pid, errno).into()),
    };
    stopped.close_later(low);
    let uffd = fds::copy_out(pidfd, low)
        .map_err(|errno| AttachError::kernel(pid, "pidfd_getfd", errno))?;
    let keeper = keep(stopped, pid, low, high)?;
    let cleared = match stopped.call(libc::SYS_prctl, &[PR_GET_TID_ADDRESS, scratch.0])? {
        Ok(_) => stopped.peek(scratch)?,
        // A kernel without it (CONFIG_CHECKPOINT_RESTORE).
        Err(_) => [0],
    };
    let clear_child_tid = (cleared != [0]).then_some(Addr(cleared[0]));
    Ok((uffd, keeper, clear_child_tid))
}

/// Sends the process a descriptor of ours; returns its number there. It is closed before the release.
fn hand_over(
    stopped: &mut Stopped,
    pid: i32,
    pidfd: BorrowedFd<'_>,
    device: &OwnedFd,
    scratch: Addr,
) -> Result<u64, Failure> {
    let refused = |op| move |errno| refuse_descriptor(pid, op, errno);
    let kind = bits(libc::SOCK_STREAM | libc::SOCK_CLOEXEC);
    let arguments = [bits(libc::AF_UNIX), kind, 0, scratch.0];
    stopped
        .call(libc::SYS_socketpair, &arguments)?
        .map_err(refused("socketpair"))?;
    let [pair] = stopped.peek(scratch)?;
    let (ours, theirs) = (pair & u64::from(u32::MAX), pair >> 32);
    stopped.close_later(ours);
    stopped.close_later(theirs);
    let socket = fds::copy_out(pidfd, ours).map_err(refused("pidfd_getfd"))?;
    fds::send(socket.as_fd(), device.as_fd()).map_err(refused("sendmsg"))?;
    // The header (no name, one part, control data), the part, the byte, the control data.
    let (part, byte, control) = (scratch.offset(64), scratch.offset(96), scratch.offset(128));
    stopped.poke(scratch, &[0, 0, part.0, 1, control.0, 24, 0])?;
    stopped.poke(part, &[byte.0, 1])?;
    let how = bits(libc::MSG_CMSG_CLOEXEC | libc::MSG_DONTWAIT);
    stopped
        .call(libc::SYS_recvmsg, &[theirs, scratch.0, how])?
        .map_err(refused("recvmsg"))?;
    match fds::descriptor_in(stopped.peek(control)?) {
        Some(device) => {
            stopped.close_later(device);
            Ok(device)
        }
        // The kernel drops what finds no room in the table.
        None => Err(refuse_descriptor(pid, "recvmsg", libc::EMFILE).into()),
    }
}

/// Leaves a second descriptor in the process, from number `high` on or else anywhere.
fn keep(stopped: &mut Stopped, pid: i32, low: u64, high: u64) -> Result<i32, Failure> {
    let command = bits(libc::F_DUPFD_CLOEXEC);
    let mut kept = stopped.call(libc::SYS_fcntl, &[low, command, high])?;
    if kept.is_err() {
        kept = stopped.call(libc::SYS_fcntl, &[low, command, 0])?;
    }
    let kept = kept.map_err(|errno| refuse_descriptor(pid, "fcntl(F_DUPFD_CLOEXEC)", errno))?;
    stopped.close_on_failure(kept);
    i32::try_from(kept).map_err(|_| AttachError::kernel(pid, "fcntl", libc::ERANGE).into())
}

/// Makes an io_uring with a kernel thread of its own (SQPOLL) in a process, and takes its descriptor out.
///
/// A ring belongs to the thread that made it: at the ring's end that thread is called upon, and whatever call it
/// waits in just then ends early (an `epoll_wait` says EINTR to a program without signal handlers). So it is
/// made by a thread that we make in the process, and that ends at once.
///
/// # Errors
/// Why not; the process then goes on as before.
pub fn make_ring(pid: i32, entries: u32) -> Result<RingHold, AttachError> {
    let target = Target::open(pid)?;
    let (made, stop_us) = in_a_stop(&target, MAKING_A_RING, move |stopped, pidfd| {
        let mut maker = stopped
            .spawn()?
            .map_err(|errno| no_ring(pid, MAKING_A_THREAD, errno))?;
        // The program need not wait for the rest.
        stopped.release();
        let scratch = maker
            .map_scratch(SCRATCH_BYTES)?
            .map_err(|errno| no_scratch(pid, errno))?;
        maker.poke(scratch, &RingParams::request(RING_IDLE_MS).0)?;
        let arguments = [u64::from(entries), scratch.0];
        let ring = maker
            .call(libc::SYS_io_uring_setup, &arguments)?
            .map_err(|errno| no_ring(pid, MAKING_A_RING, errno))?;
        maker.close_later(ring);
        let fd = fds::copy_out(pidfd, ring).map_err(|errno| match errno {
            // The thread that was let go of was the last one.
            libc::ESRCH => AttachError::Exiting { pid },
            other => AttachError::kernel(pid, "pidfd_getfd", other),
        })?;
        Ok((fd, maker.peek(scratch)?))
    })?;
    let (fd, params) = made;
    Ok(RingHold {
        fd,
        params,
        stop_us,
    })
}

/// Closes the descriptor that [`take_hold`] left in a process. A number that is no userfaultfd any more is left
/// alone: the program closed ours and has used the number again.
///
/// # Errors
/// Why the process could not be stopped for it.
pub fn drop_keeper(pid: i32, keeper_fd: i32) -> Result<(), AttachError> {
    let link = std::fs::read_link(format!("/proc/{pid}/fd/{keeper_fd}"));
    if !link.is_ok_and(|link| link.to_string_lossy().ends_with("[userfaultfd]")) {
        return Ok(());
    }
    let target = Target::open(pid)?;
    in_a_stop(&target, "close", move |stopped, _| {
        stopped.close_later(bits(keeper_fd));
        Ok(())
    })
    .map(drop)
}

/// Has a process give `advice` on its own memory: what it may say of itself goes further than what others
/// may say (MADV_FREE, MADV_DONTNEED). Works on a process that a signal has stopped, too.
///
/// Where a userfaultfd reports removals the advice waits until each report is read: another thread than the
/// caller has to read them.
///
/// # Errors
/// Why the process could not be stopped for it. An errno of the advice itself is in the result.
pub fn advise_self(pid: i32, ranges: &[AddrRange], advice: i32) -> Result<Advised, AttachError> {
    let target = Target::open(pid)?;
    let ranges: Arc<[AddrRange]> = ranges.into();
    let (done, stop_us) = in_a_stop(&target, "madvise", move |stopped, _| {
        let longest = ranges.len().clamp(1, RANGES_PER_CALL);
        let scratch = stopped
            .map_scratch(longest as u64 * 16)?
            .map_err(|errno| AttachError::kernel(pid, "mmap", errno))?;
        let mut bytes = 0;
        for part in ranges.chunks(RANGES_PER_CALL) {
            let (done, errno) = advise_part(stopped, scratch, part, advice)?;
            bytes += done;
            if errno.is_some() {
                return Ok((bytes, errno));
            }
        }
        Ok((bytes, None))
    })?;
    let (bytes, errno) = done;
    Ok(Advised {
        bytes,
        errno,
        stop_us,
    })
}

/// Gives advice on as many ranges as fit in one call, else range by range: kernels before 6.14 know no
/// advice to oneself by `process_madvise`, and a range that is refused is named by its own call only.
fn advise_part(
    stopped: &mut Stopped,
    scratch: Addr,
    part: &[AddrRange],
    advice: i32,
) -> Result<(u64, Option<Errno>), Lost> {
    let advice = bits(advice);
    let vectors: Vec<u64> = part.iter().flat_map(|r| [r.start.0, r.len()]).collect();
    stopped.poke(scratch, &vectors)?;
    let whole = [
        register(PIDFD_SELF_PROCESS),
        scratch.0,
        part.len() as u64,
        advice,
        0,
    ];
    let mut done = stopped
        .call(libc::SYS_process_madvise, &whole)?
        .unwrap_or(0);
    let mut seen = 0;
    for range in part {
        seen += range.len();
        if seen <= done {
            continue;
        }
        if let Err(errno) =
            stopped.call(libc::SYS_madvise, &[range.start.0, range.len(), advice])?
        {
            return Ok((done, Some(errno)));
        }
        done = seen;
    }
    Ok((done, None))
}

/// Why work in a stop failed.
#[derive(Debug)]
enum Failure {
    /// The thread is lost; another one may do.
    Lost(Lost),
    /// It will be refused in any thread.
    Refused(AttachError),
}

impl From<Lost> for Failure {
    fn from(lost: Lost) -> Self {
        Self::Lost(lost)
    }
}

impl From<AttachError> for Failure {
    fn from(refused: AttachError) -> Self {
        Self::Refused(refused)
    }
}

/// Stops the thread of the process that minds least and does `work` in it; tries others if it cannot be
/// stopped. `work` gets a pidfd with that thread's descriptors.
fn in_a_stop<T: Send + 'static>(
    target: &Target,
    what: &'static str,
    work: impl Fn(&mut Stopped, BorrowedFd<'_>) -> Result<T, Failure> + Send + Sync + 'static,
) -> Result<(T, u64), AttachError> {
    let pid = target.pid;
    let work = Arc::new(work);
    // A ring's thread would inherit the precedence, and spin with it.
    let boost = what != MAKING_A_RING;
    let mut tried = 0;
    loop {
        let mut last = AttachError::Changed { pid };
        let candidates = process::candidates(pid)?;
        // A leader that has ended has no descriptors to compare with.
        let leader = match candidates.first() {
            Some(&first) if process::is_ending(pid, pid) => first,
            _ => pid,
        };
        for tid in candidates {
            if tid != leader && fds::have_different_descriptors(leader, tid) {
                continue;
            }
            let work = work.clone();
            match in_one_stop(target, tid, boost, move |stopped, pidfd| {
                work(stopped, pidfd)
            }) {
                Ok(done) => return Ok(done),
                Err(Failure::Refused(refused)) => return Err(refused),
                Err(Failure::Lost(lost)) => {
                    last = match lost {
                        Lost::Gone => AttachError::Changed { pid },
                        Lost::DidNotStop => AttachError::Uninterruptible { pid },
                        Lost::ThirtyTwoBit => AttachError::ThirtyTwoBit { pid },
                        Lost::Denied => return Err(process::why_denied(pid)),
                        Lost::Abandoned => return Err(process::why_busy(pid, what)),
                        Lost::NoDescriptor(errno) => {
                            return Err(AttachError::kernel(pid, "open (in holo)", errno));
                        }
                        Lost::Ptrace(errno) => {
                            return Err(AttachError::kernel(pid, "ptrace", errno));
                        }
                    }
                }
            }
            tried += 1;
            if tried == THREADS_TRIED {
                return Err(last);
            }
        }
        if tried == 0 {
            // Every thread has descriptors of its own: there is no table to speak of.
            return Err(last);
        }
    }
}

/// Stops one thread and does `work` in it, with a limit to the time that it takes.
fn in_one_stop<T: Send + 'static>(
    target: &Target,
    tid: i32,
    boost: bool,
    work: impl FnOnce(&mut Stopped, BorrowedFd<'_>) -> Result<T, Failure> + Send + 'static,
) -> Result<(T, u64), Failure> {
    let pid = target.pid;
    let plan = Plan {
        pid,
        tid,
        syscall: target.syscall,
        may_suspend_seccomp: target.may_suspend_seccomp,
        boost,
    };
    let answer = on_a_worker(CALL_PATIENCE, move |agreement| {
        let pidfd = fds::open_thread(pid, tid).map_err(|_| Lost::Gone)?;
        with_stopped(&plan, agreement, |stopped| work(stopped, pidfd.as_fd()))
    });
    match answer {
        Ok(done) => done,
        Err(NoAnswer::TimeUp) => Err(Lost::Abandoned.into()),
        Err(NoAnswer::NoThread(errno)) => {
            Err(AttachError::kernel(pid, "clone (in holo)", errno).into())
        }
    }
}

/// `/dev/userfaultfd`, or `None` when it cannot be had and may not be needed.
fn userfaultfd_device(target: &Target) -> Result<Option<OwnedFd>, AttachError> {
    let pid = target.pid;
    if !fds::kernel_has_userfaultfd() {
        return Err(no_userfaultfd(pid, libc::ENOSYS));
    }
    match fds::open_userfaultfd_device() {
        Ok(device) => Ok(Some(device)),
        Err(_) if process::may_make_userfaultfd(pid) => Ok(None),
        Err(_) => Err(no_userfaultfd(pid, libc::EPERM)),
    }
}

fn no_userfaultfd(pid: i32, errno: Errno) -> AttachError {
    let why = match errno {
        libc::ENOSYS => "this kernel was built without it: boot one with CONFIG_USERFAULTFD=y",
        libc::EPERM => {
            "its user may not make one (vm.unprivileged_userfaultfd is 0) and /dev/userfaultfd, which would do \
             instead, cannot be used: run holo as root on Linux 6.1 or later, allow it the device, or run \
             `sysctl -w vm.unprivileged_userfaultfd=1`"
        }
        other => return refuse_descriptor(pid, "userfaultfd", other),
    };
    AttachError::UserfaultfdOff {
        pid,
        why: why.to_owned(),
    }
}

/// A ring is made at the first eviction. Where none can be had nothing can be evicted, and to serve a process without
/// that does it no good.
fn refuse_without_io_uring(pid: i32) -> Result<(), AttachError> {
    if !fds::kernel_has_io_uring() {
        return Err(no_ring(pid, MAKING_A_RING, libc::ENOSYS));
    }
    if !process::may_make_ring(pid) {
        return Err(no_ring(pid, MAKING_A_RING, libc::EPERM));
    }
    Ok(())
}

fn no_scratch(pid: i32, errno: Errno) -> AttachError {
    match errno {
        libc::ENOMEM if !process::has_address_space(pid) => AttachError::LimitAs {
            pid,
            limit: process::address_space_limit(pid).unwrap_or(0),
        },
        libc::EAGAIN => AttachError::LimitMemlock {
            pid,
            limit: process::locked_limit(pid).unwrap_or(0),
        },
        other => AttachError::kernel(pid, "mmap", other),
    }
}

fn no_ring(pid: i32, op: &'static str, errno: Errno) -> AttachError {
    let why = match errno {
        libc::EAGAIN => return AttachError::LimitNproc { pid },
        _ if op != MAKING_A_RING => return AttachError::kernel(pid, op, errno),
        libc::ENOSYS => {
            "this kernel was built without it: boot one with CONFIG_IO_URING=y".to_owned()
        }
        libc::EPERM => {
            let level = std::fs::read_to_string("/proc/sys/kernel/io_uring_disabled");
            format!(
                "kernel.io_uring_disabled is {}: set it to 0, or put the program's user into \
                 kernel.io_uring_group",
                level.as_deref().map_or("unknown", str::trim)
            )
        }
        other => return refuse_descriptor(pid, op, other),
    };
    AttachError::IoUringOff { pid, why }
}

fn refuse_descriptor(pid: i32, op: &'static str, errno: Errno) -> AttachError {
    match (errno, process::descriptor_limit(pid)) {
        (libc::EMFILE, Some(limit)) => AttachError::LimitNoFile { pid, limit },
        _ => AttachError::kernel(pid, op, errno),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    // What cannot be brought about here: a kernel that lacks a part.
    #[test]
    fn a_kernel_without_a_part_is_named_with_its_option() {
        let error = no_userfaultfd(7, libc::ENOSYS).to_string();
        assert!(error.contains("CONFIG_USERFAULTFD"), "{error}");
        let error = no_ring(7, MAKING_A_RING, libc::ENOSYS).to_string();
        assert!(error.contains("CONFIG_IO_URING"), "{error}");
    }

    #[test]
    fn a_refused_thread_is_a_limit_and_other_errors_keep_their_call() {
        let limit = AttachError::LimitNproc { pid: 7 };
        assert_eq!(no_ring(7, MAKING_A_THREAD, libc::EAGAIN), limit);
        assert_eq!(no_ring(7, MAKING_A_RING, libc::EAGAIN), limit);
        let other = AttachError::kernel(7, MAKING_A_THREAD, libc::EPERM);
        assert_eq!(no_ring(7, MAKING_A_THREAD, libc::EPERM), other);
        let other = AttachError::kernel(7, MAKING_A_RING, libc::ENOMEM);
        assert_eq!(no_ring(7, MAKING_A_RING, libc::ENOMEM), other);
        assert!(other.to_string().contains("errno 12"), "{other}");
    }
}
