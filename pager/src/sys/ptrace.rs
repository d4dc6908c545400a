//! The ptrace requests that taking hold of a process needs, one function each.
//!
//! ptrace ties a stopped thread to one *thread* of the tracer: everything here has to be called from
//! the thread that called [`seize`]. When that thread ends, the kernel releases what it held.

use std::ffi::{c_long, c_void};
use std::time::{Duration, Instant};

use super::errno;

/// The registers of a thread.
pub(super) type Registers = libc::user_regs_struct;

const PTRACE_GETSIGMASK: u32 = 0x420a;
const PTRACE_SETSIGMASK: u32 = 0x420b;
const PTRACE_GET_SYSCALL_INFO: u32 = 0x420e;
const PTRACE_GET_RSEQ_CONFIGURATION: u32 = 0x420f;
const PTRACE_SET_SYSCALL_USER_DISPATCH_CONFIG: u32 = 0x4210;
const PTRACE_GET_SYSCALL_USER_DISPATCH_CONFIG: u32 = 0x4211;
const PTRACE_EVENT_STOP: i32 = 128;
const PTRACE_EVENT_CLONE: i32 = 3;

/// System call stops carry bit 7, so that they cannot be taken for a breakpoint.
pub(super) const TRACE_SYSCALL_GOOD: usize = 1;
/// A thread that makes another one stops at that, and the new one is traced and stops as well.
pub(super) const TRACE_CLONE: usize = 1 << 3;
/// The thread's process is killed if we die while it is stopped.
pub(super) const EXIT_KILL: usize = 1 << 20;
/// Seccomp filters don't run while we trace. Needs CAP_SYS_ADMIN.
pub(super) const SUSPEND_SECCOMP: usize = 1 << 21;

/// The bits of a register as a signed number: what a system call returns.
pub(super) const fn signed(register: u64) -> i64 {
    i64::from_ne_bytes(register.to_ne_bytes())
}

/// The bits of a signed number as a register holds them.
pub(super) const fn register(number: i64) -> u64 {
    u64::from_ne_bytes(number.to_ne_bytes())
}

/// Flags of the C interface as a register holds them.
pub(super) const fn bits(flags: i32) -> u64 {
    u32::from_ne_bytes(flags.to_ne_bytes()) as u64
}

/// An errno.
pub(super) type Errno = i32;

/// # Safety
/// `data` must be valid for what the request reads or writes.
unsafe fn request(req: u32, tid: i32, addr: usize, data: *mut c_void) -> Result<c_long, Errno> {
    // SAFETY: the caller vouches for `data`; no request that is used here writes through `addr`.
    let r = unsafe { libc::ptrace(req, tid, addr, data) };
    if r < 0 { Err(errno()) } else { Ok(r) }
}

fn plain(req: u32, tid: i32, data: usize) -> Result<(), Errno> {
    let data = std::ptr::without_provenance_mut(data);
    // SAFETY: the requests passed here take a number as data.
    unsafe { request(req, tid, 0, data) }.map(drop)
}

/// Becomes the tracer of a thread without stopping it.
pub(super) fn seize(tid: i32, options: usize) -> Result<(), Errno> {
    plain(libc::PTRACE_SEIZE, tid, options)
}

/// Asks a traced thread to stop.
pub(super) fn interrupt(tid: i32) -> Result<(), Errno> {
    plain(libc::PTRACE_INTERRUPT, tid, 0)
}

/// Replaces the options given to [`seize`].
pub(super) fn set_options(tid: i32, options: usize) -> Result<(), Errno> {
    plain(libc::PTRACE_SETOPTIONS, tid, options)
}

/// Lets a stopped thread run, with `signal` delivered if it stopped at a signal's delivery.
pub(super) fn resume(tid: i32, signal: i32) -> Result<(), Errno> {
    plain(libc::PTRACE_CONT, tid, number(signal))
}

/// Lets a stopped thread run to the next entry or exit of a system call.
pub(super) fn resume_to_syscall(tid: i32, signal: i32) -> Result<(), Errno> {
    plain(libc::PTRACE_SYSCALL, tid, number(signal))
}

/// Lets a stopped thread go for good.
pub(super) fn detach(tid: i32, signal: i32) -> Result<(), Errno> {
    plain(libc::PTRACE_DETACH, tid, number(signal))
}

fn number(signal: i32) -> usize {
    usize::try_from(signal).unwrap_or(0)
}

/// The id of the thread that a thread stopped at [`Stop::Cloned`] has made.
pub(super) fn made_thread(tid: i32) -> Result<i32, Errno> {
    let mut id: libc::c_ulong = 0;
    // SAFETY: `id` is valid for writes of one long.
    unsafe { request(libc::PTRACE_GETEVENTMSG, tid, 0, (&raw mut id).cast()) }?;
    i32::try_from(id).map_err(|_| libc::ERANGE)
}

/// The registers of a stopped thread.
pub(super) fn registers(tid: i32) -> Result<Registers, Errno> {
    let mut regs = std::mem::MaybeUninit::<Registers>::zeroed();
    // SAFETY: `regs` is valid for writes of one register structure.
    unsafe { request(libc::PTRACE_GETREGS, tid, 0, regs.as_mut_ptr().cast()) }?;
    // SAFETY: zeroed, then filled by the kernel; any bits are valid registers.
    Ok(unsafe { regs.assume_init() })
}

/// Sets the registers of a stopped thread. The floating-point state is not among them.
pub(super) fn set_registers(tid: i32, regs: &Registers) -> Result<(), Errno> {
    let data = (&raw const *regs).cast_mut().cast();
    // SAFETY: `data` is valid for reads of one register structure, and is not written.
    unsafe { request(libc::PTRACE_SETREGS, tid, 0, data) }.map(drop)
}

/// The signals that a stopped thread blocks. In a call with a mask of its own (sigsuspend, ppoll) it is the
/// mask to go back to.
pub(super) fn signal_mask(tid: i32) -> Result<u64, Errno> {
    let mut mask = 0_u64;
    // SAFETY: `mask` is valid for writes of the eight bytes that the address argument names.
    unsafe { request(PTRACE_GETSIGMASK, tid, 8, (&raw mut mask).cast()) }?;
    Ok(mask)
}

/// Sets the signals that a stopped thread blocks. Unlike a thread's own change it hands no pending signal
/// on to another thread.
pub(super) fn set_signal_mask(tid: i32, mask: u64) -> Result<(), Errno> {
    let mut mask = mask;
    // SAFETY: `mask` is valid for reads of the eight bytes that the address argument names.
    unsafe { request(PTRACE_SETSIGMASK, tid, 8, (&raw mut mask).cast()) }.map(drop)
}

/// Where the stopped thread's restartable-sequences area is; `None` without one, or before Linux 5.13.
pub(super) fn rseq_area(tid: i32) -> Option<u64> {
    let mut config = [0_u64; 3];
    let (size, data) = (size_of_val(&config), (&raw mut config).cast());
    // SAFETY: `config` is valid for writes of the size that the address argument names.
    let r = unsafe { request(PTRACE_GET_RSEQ_CONFIGURATION, tid, size, data) };
    (r.is_ok() && config[0] != 0).then_some(config[0])
}

/// A thread's redirection of system calls into signals: mode (0 is off), selector, offset, length.
pub(super) type Dispatch = [u64; 4];

/// The stopped thread's redirection; `None` when it has none, or before Linux 6.4.
pub(super) fn dispatch(tid: i32) -> Option<Dispatch> {
    let mut config: Dispatch = [0; 4];
    let (size, data) = (size_of_val(&config), (&raw mut config).cast());
    // SAFETY: `config` is valid for writes of the size that the address argument names.
    let r = unsafe { request(PTRACE_GET_SYSCALL_USER_DISPATCH_CONFIG, tid, size, data) };
    (r.is_ok() && config[0] != 0).then_some(config)
}

/// Sets the stopped thread's redirection; all zero turns it off.
pub(super) fn set_dispatch(tid: i32, config: &Dispatch) -> Result<(), Errno> {
    let (size, data) = (size_of_val(config), (&raw const *config).cast_mut().cast());
    // SAFETY: `config` is valid for reads of the size that the address argument names, and is not written.
    unsafe { request(PTRACE_SET_SYSCALL_USER_DISPATCH_CONFIG, tid, size, data) }.map(drop)
}

/// What a thread that is stopped at a system call is about to do or has got.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum SyscallStop {
    /// It is about to enter the call with this number.
    Entry(u64),
    /// It is about to leave the call with this result.
    Exit(i64),
    /// It is at no system call.
    None,
}

/// Which system call stop a stopped thread is in. Linux 5.3.
pub(super) fn syscall_stop(tid: i32) -> Result<SyscallStop, Errno> {
    // op u8, pad, arch u32, instruction pointer, stack pointer, then nr and arguments, or the result.
    let mut info = [0_u64; 11];
    let (size, data) = (size_of_val(&info), (&raw mut info).cast());
    // SAFETY: `info` is valid for writes of the size that the address argument names.
    unsafe { request(PTRACE_GET_SYSCALL_INFO, tid, size, data) }?;
    Ok(match info[0] & 0xff {
        1 => SyscallStop::Entry(info[3]),
        2 => SyscallStop::Exit(signed(info[3])),
        _ => SyscallStop::None,
    })
}

/// Why a traced thread stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stop {
    /// We asked for it, or its process is stopped by a signal (SIGSTOP and its like).
    Trap,
    /// At the entry or exit of a system call.
    Syscall,
    /// It has just made a thread. Only if that was asked for.
    Cloned,
    /// A signal is about to be delivered; it is lost unless it is passed on at the resumption.
    Signal(i32),
    /// It has ended, or an exec of another thread took its place.
    Gone,
}

/// How a wait for a stop passes the time between two looks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Pace {
    /// Sleeps: the thread that it waits for may need this CPU, and has less precedence than we have.
    Sleep,
    /// Looks all the time at first, letting others of its precedence run.
    Spin,
}

/// Pause between two looks, at first: a stop takes microseconds.
const FIRST_PAUSE: Duration = Duration::from_micros(10);
/// The pause grows up to this.
const LONGEST_PAUSE: Duration = Duration::from_millis(1);
/// How long a wait looks all the time.
const SPIN: Duration = Duration::from_micros(300);

impl Pace {
    /// Passes some time in a wait that has lasted for `waited`.
    pub(super) fn pause(self, waited: Duration) {
        if self == Self::Spin && waited < SPIN {
            std::thread::yield_now();
        } else {
            std::thread::sleep((waited / 8).clamp(FIRST_PAUSE, LONGEST_PAUSE));
        }
    }
}

/// Waits until a traced thread stops or ends; `None` when `patience` says that it is enough.
///
/// It leaves the wait status in place. So an exit status stays for whoever's child it is, and a signal in
/// delivery survives the death of the tracer. Polls, because a wait that blocks has no time limit.
pub(super) fn wait_for_stop(
    tid: i32,
    pace: Pace,
    mut patience: impl FnMut() -> bool,
) -> Option<Stop> {
    let since = Instant::now();
    loop {
        if let Some(stop) = stop_now(tid) {
            return Some(stop);
        }
        if !patience() {
            return None;
        }
        pace.pause(since.elapsed());
    }
}

/// Takes note of the end of a traced thread that is no leader, so that it can go: an exec in its process
/// waits for that.
pub(super) fn reap(tid: i32) {
    // A wait for ends would take a stop as well.
    if stop_now(tid) != Some(Stop::Gone) {
        return;
    }
    let Ok(id) = libc::id_t::try_from(tid) else {
        return;
    };
    let how = libc::WEXITED | libc::WNOHANG | libc::__WALL;
    // SAFETY: a null pointer is allowed where the caller does not want to know.
    unsafe { libc::waitid(libc::P_PID, id, std::ptr::null_mut(), how) };
}

/// The stop that a traced thread is in, if it is in one.
pub(super) fn stop_now(tid: i32) -> Option<Stop> {
    let mut info = std::mem::MaybeUninit::<libc::siginfo_t>::zeroed();
    let Ok(id) = libc::id_t::try_from(tid) else {
        return Some(Stop::Gone);
    };
    let how = libc::WSTOPPED | libc::WEXITED | libc::WNOHANG | libc::WNOWAIT | libc::__WALL;
    // SAFETY: `info` is valid for writes of one siginfo.
    let r = unsafe { libc::waitid(libc::P_PID, id, info.as_mut_ptr(), how) };
    if r != 0 {
        return (errno() != libc::EINTR).then_some(Stop::Gone);
    }
    // SAFETY: zeroed, then filled by the kernel; any bits are a valid siginfo.
    let info = unsafe { info.assume_init() };
    // SAFETY: waitid fills the child fields, or leaves them zero.
    let pid = unsafe { info.si_pid() };
    if pid == 0 {
        return None;
    }
    if info.si_code != libc::CLD_TRAPPED {
        return match info.si_code {
            // A child of ours that its signal stopped, and not our trap: keep waiting.
            libc::CLD_STOPPED | libc::CLD_CONTINUED => None,
            _ => Some(Stop::Gone),
        };
    }
    // SAFETY: as above, for a status of CLD_TRAPPED.
    let status = unsafe { info.si_status() };
    Some(match (status >> 8, status & 0xff) {
        (PTRACE_EVENT_STOP, _) => Stop::Trap,
        (PTRACE_EVENT_CLONE, _) => Stop::Cloned,
        (0, signal) if signal == libc::SIGTRAP | 0x80 => Stop::Syscall,
        (0, signal) => Stop::Signal(signal),
        // No other event was asked for.
        _ => Stop::Trap,
    })
}
