//! System calls made by a stopped thread of another process, with the instruction that its vdso holds.
//!
//! No code and no data goes into the program's own memory: arguments that need memory lie in a shared
//! page of their own, mapped for the moment. Below the stack pointer there is no safe place: a small
//! stack may end within a few hundred bytes (Go's do), with another thread's data behind it.
//!
//! ```text
//!            SEIZE, INTERRUPT          call                        release
//! running ----------------> trap ----------------> exit of a call ---------> running
//!                             |       ^    | call        ^
//!                             |       +----+             |
//!                             +--------------------------+ (no call was made)
//! ```
//!
//! The registers are put back as they were found, within the thread's own system call if it was in one. From
//! any stop a detached thread leaves the kernel by way of its pending signals, and there the kernel itself
//! decides what becomes of the call (see [`restart`]).
//!
//! While the thread is stopped it blocks all signals, so that none is delivered in the middle; they wait,
//! and are delivered after the release. SIGSTOP and SIGCONT work as ever. If we die in the meantime
//! the process is killed: it must not run on with our registers.

use std::fs::OpenOptions;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use holo_proto::Addr;

use super::boost::Boost;
use super::mem::TargetMem;
use super::process;
use super::ptrace::{self, Dispatch, Errno, Pace, Registers, Stop, SyscallStop, bits};
use super::restart;
use super::worker::Agreement;

/// How long a thread may take to stop. One that can stop does so in microseconds; under load it needs to
/// get a CPU first.
const STOP_PATIENCE: Duration = Duration::from_millis(100);
/// How long a call that cleans up may take once the caller has left.
const CLEANUP_PATIENCE: Duration = Duration::from_secs(1);
/// Pause between two looks at a thread that nobody waits for any more.
const IDLE_PAUSE: Duration = Duration::from_millis(5);

/// `cs` of 64-bit code.
const CS_64_BIT: u64 = 0x33;
/// Where a restartable-sequences area names the sequence that the thread is in.
const RSEQ_CS_AT: u64 = 8;
/// A thread like any other of the process: CLONE_VM, FS, FILES, SIGHAND, THREAD, SYSVSEM.
const SPAWN_FLAGS: u64 = 0x0005_0f00;
/// How often a call is made that a signal cuts short: SIGSTOP and SIGKILL are the only ones.
const CALL_TRIES: usize = 10;
/// The kernel's restart codes begin here: the call has done nothing, and should be made again.
const FIRST_RESTART_CODE: i32 = 512;
/// Bytes of scratch memory are mapped in such units.
const SCRATCH_UNIT: u64 = 4096;
/// Scratch memory goes where no mapping comes by itself: far above programs and their heaps (from 0x5555_5555_4000
/// on), far below what the kernel places from the top (0x7fff_ffff_ffff) downwards. A place for each thread id.
const SCRATCH_FROM: u64 = 0x5a00_0000_0000;
const SCRATCH_EACH: u64 = 1 << 21;

/// Why an injection ended without a result.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Lost {
    /// The thread ended, or an exec took its place.
    Gone,
    /// The rights are missing, or another process traces it.
    Denied,
    /// It did not stop in time.
    DidNotStop,
    /// It runs 32-bit code now.
    ThirtyTwoBit,
    /// The caller's time was up.
    Abandoned,
    /// We may open nothing more, with the errno.
    NoDescriptor(Errno),
    /// A ptrace request failed that cannot fail on a stopped thread.
    Ptrace(Errno),
}

/// Bytes from a `syscall` instruction on that are compared to recognise the memory that it is in.
pub(super) const AROUND_BYTES: usize = 32;

/// A `syscall` instruction in a process's vdso.
#[derive(Clone, Copy, Debug)]
pub(super) struct Syscall {
    /// Its address.
    pub(super) at: Addr,
    /// It and what follows.
    pub(super) bytes: [u8; AROUND_BYTES],
}

/// What is needed to stop one thread; gathered before the stop.
#[derive(Debug)]
pub(super) struct Plan {
    pub(super) pid: i32,
    pub(super) tid: i32,
    pub(super) syscall: Syscall,
    /// The thread's seccomp filter may be suspended, also one that it gets meanwhile.
    pub(super) may_suspend_seccomp: bool,
    /// Give the stopped thread precedence. Threads that it makes meanwhile would inherit it.
    pub(super) boost: bool,
}

/// One stopped thread. Dropping it puts everything back and lets it go.
#[derive(Debug)]
pub(super) struct Stopped {
    tid: i32,
    mem: TargetMem,
    syscall_at: Addr,
    /// What the thread goes on with.
    saved: Registers,
    mask: u64,
    /// How its seccomp filter is suspended, if it is.
    filter_option: usize,
    /// The restartable sequence that it was stopped in: where that is noted, and the note.
    sequence: Option<(Addr, u64)>,
    dispatch: Option<Dispatch>,
    since: Instant,
    agreement: Agreement,
    /// Let go, or lost.
    released: bool,
    /// Descriptors in the process that must not stay, lowest first.
    temporary: Vec<u64>,
    /// Descriptors that stay if the work counts.
    lasting: Vec<u64>,
    scratch: Option<(Addr, u64)>,
    cleaning: bool,
    boost: Option<Boost>,
    /// The thread that it was made to make.
    made: Option<i32>,
    /// It is none of the program's threads: it ends instead of going on.
    ours: bool,
    stop_us: u64,
}

/// Stops the thread, lets `work` make calls in it, puts everything back and lets it go. Returns the result
/// with the microseconds from asking the thread to stop until it was let go.
///
/// Must be called on a thread that ends soon after: a thread that does not stop in time is let go by that
/// end only. When `work` fails, or the caller has left, the lasting descriptors are closed as well.
pub(super) fn with_stopped<T, E: From<Lost>>(
    plan: &Plan,
    agreement: &Agreement,
    work: impl FnOnce(&mut Stopped) -> Result<T, E>,
) -> Result<(T, u64), E> {
    let mut stopped = Stopped::stop(plan, agreement)?;
    let mut outcome = work(&mut stopped);
    if outcome.is_ok() && !agreement.commit() {
        outcome = Err(Lost::Abandoned.into());
    }
    if outcome.is_ok() {
        stopped.lasting.clear();
    }
    let stop_us = stopped.release();
    note_stop(stop_us);
    outcome.map(|value| (value, stop_us))
}

static LONGEST_STOP_US: AtomicU64 = AtomicU64::new(0);

/// The longest time for which this process has kept threads of another one stopped, whatever came of it,
/// microseconds.
#[must_use]
pub fn longest_stop_us() -> u64 {
    LONGEST_STOP_US.load(Ordering::Relaxed)
}

/// A stop has ended.
pub(super) fn note_stop(stop_us: u64) {
    LONGEST_STOP_US.fetch_max(stop_us, Ordering::Relaxed);
}

impl Stopped {
    fn stop(plan: &Plan, agreement: &Agreement) -> Result<Self, Lost> {
        let tid = plan.tid;
        let mut options = ptrace::TRACE_SYSCALL_GOOD;
        if plan.may_suspend_seccomp {
            options |= ptrace::SUSPEND_SECCOMP;
        }
        let mut seized = ptrace::seize(tid, options);
        let refused = matches!(seized, Err(libc::EINVAL | libc::EPERM));
        if refused && options & ptrace::SUSPEND_SECCOMP != 0 {
            // A kernel without it, or a user namespace.
            options &= !ptrace::SUSPEND_SECCOMP;
            seized = ptrace::seize(tid, options);
        }
        seized.map_err(|errno| match errno {
            libc::EPERM | libc::EACCES => Lost::Denied,
            other => lost(other),
        })?;
        let since = Instant::now();
        stop_at_trap(tid, || {
            since.elapsed() < STOP_PATIENCE && !agreement.is_abandoned()
        })?;
        // Only now: until it stopped it may have started another program, with other memory.
        let path = format!("/proc/{}/task/{tid}/mem", plan.pid);
        let mem = OpenOptions::new().read(true).write(true).open(path);
        let mem = TargetMem::from_owned(OwnedFd::from(mem.map_err(no_room)?));
        let mut there = [0; AROUND_BYTES];
        let read = mem
            .read(plan.syscall.at, &mut there)
            .map_err(|_| Lost::Gone)?;
        if read != there.len() || there != plan.syscall.bytes {
            return Err(Lost::Gone);
        }
        // It may have got a filter since it was looked at: what it forbids kills.
        let suspended = options & ptrace::SUSPEND_SECCOMP != 0;
        if !suspended && process::is_filtered(plan.pid, tid) {
            return Err(Lost::Gone);
        }
        let mut saved = ptrace::registers(tid).map_err(lost)?;
        if saved.cs != CS_64_BIT {
            let _ = ptrace::detach(tid, 0);
            return Err(Lost::ThirtyTwoBit);
        }
        restart::make_restartable(&mut saved);
        let mask = ptrace::signal_mask(tid).map_err(lost)?;
        let mut stopped = Self {
            tid,
            mem,
            syscall_at: plan.syscall.at,
            saved,
            mask,
            filter_option: options & ptrace::SUSPEND_SECCOMP,
            sequence: None,
            dispatch: ptrace::dispatch(tid),
            since,
            agreement: agreement.clone(),
            released: false,
            temporary: Vec::with_capacity(8),
            lasting: Vec::with_capacity(1),
            scratch: None,
            cleaning: false,
            boost: None,
            made: None,
            ours: false,
            stop_us: 0,
        };
        stopped.sequence = stopped.restartable_sequence();
        stopped.prepare(options).map_err(lost)?;
        if plan.boost {
            stopped.boost = Boost::stopped_thread(tid);
        }
        Ok(stopped)
    }

    fn prepare(&self, options: usize) -> Result<(), Errno> {
        ptrace::set_options(self.tid, options | ptrace::EXIT_KILL)?;
        ptrace::set_signal_mask(self.tid, u64::MAX)?;
        if self.dispatch.is_some() {
            ptrace::set_dispatch(self.tid, &[0; 4])?;
        }
        Ok(())
    }

    /// The restartable sequence that the thread is in the middle of, if any. A thread that was stopped there
    /// has to start it anew. The kernel sees to that, but forgets the sequence as soon as the thread runs
    /// elsewhere, as it does for us.
    fn restartable_sequence(&self) -> Option<(Addr, u64)> {
        if ptrace::signed(self.saved.orig_rax) >= 0 {
            // System calls are forbidden in one.
            return None;
        }
        let at = Addr(ptrace::rseq_area(self.tid)?).offset(RSEQ_CS_AT);
        let [noted] = self.words(at)?;
        if noted == 0 {
            return None;
        }
        // Version and flags, start, length, where to go on.
        let [_, start, len, _] = self.words(Addr(noted))?;
        (self.saved.rip.wrapping_sub(start) < len).then_some((at, noted))
    }

    fn words<const N: usize>(&self, at: Addr) -> Option<[u64; N]> {
        let mut out = [0; N];
        let mut bytes = [0_u8; 64];
        let bytes = bytes.get_mut(..N * 8)?;
        if self.mem.read(at, bytes).ok()? != bytes.len() {
            return None;
        }
        for (word, part) in out.iter_mut().zip(bytes.chunks_exact(8)) {
            *word = u64::from_ne_bytes(part.try_into().ok()?);
        }
        Some(out)
    }

    const fn pace(&self) -> Pace {
        match self.boost {
            Some(_) => Pace::Spin,
            None => Pace::Sleep,
        }
    }

    /// Makes a system call in the thread. The outer error means that the thread is lost, the inner one is
    /// the call's errno.
    pub(super) fn call(
        &mut self,
        number: i64,
        arguments: &[u64],
    ) -> Result<Result<u64, Errno>, Lost> {
        let mut result = self.call_once(number, arguments)?;
        for _ in 1..CALL_TRIES {
            if result.is_err_and(|errno| errno >= FIRST_RESTART_CODE) {
                result = self.call_once(number, arguments)?;
            }
        }
        Ok(result.map_err(|errno| match errno {
            FIRST_RESTART_CODE.. => libc::EINTR,
            errno => errno,
        }))
    }

    fn call_once(&mut self, number: i64, arguments: &[u64]) -> Result<Result<u64, Errno>, Lost> {
        if self.released {
            return Err(Lost::Gone);
        }
        if self.agreement.is_abandoned() && !self.cleaning {
            return Err(Lost::Abandoned);
        }
        let argument = |i: usize| arguments.get(i).copied().unwrap_or(0);
        let mut regs = self.saved;
        regs.rax = ptrace::register(number);
        regs.rdi = argument(0);
        regs.rsi = argument(1);
        regs.rdx = argument(2);
        regs.r10 = argument(3);
        regs.r8 = argument(4);
        regs.r9 = argument(5);
        regs.rip = self.syscall_at.0;
        // In no system call: else the kernel would restart ours on the way out.
        regs.orig_rax = u64::MAX;
        self.request(ptrace::set_registers(self.tid, &regs))?;
        self.request(ptrace::resume_to_syscall(self.tid, 0))?;
        let result = self.run_to_exit()?;
        Ok(u64::try_from(result).map_err(|_| i32::try_from(-result).unwrap_or(i32::MAX)))
    }

    fn run_to_exit(&mut self) -> Result<i64, Lost> {
        let begun = Instant::now();
        let mut hurried = false;
        loop {
            let (agreement, cleaning) = (&self.agreement, self.cleaning);
            let stop = ptrace::wait_for_stop(self.tid, self.pace(), || {
                if hurried {
                    // Its registers are ours: it must not be left, however long it takes.
                    std::thread::sleep(IDLE_PAUSE);
                    return true;
                }
                if cleaning {
                    return begun.elapsed() < CLEANUP_PATIENCE;
                }
                !agreement.is_abandoned()
            });
            match stop {
                None => {
                    hurried = true;
                    self.request(ptrace::interrupt(self.tid))?;
                }
                Some(Stop::Gone) => {
                    self.released = true;
                    return Err(Lost::Gone);
                }
                Some(Stop::Syscall) => match self.request(ptrace::syscall_stop(self.tid))? {
                    SyscallStop::Exit(result) => {
                        return Ok(result);
                    }
                    SyscallStop::Entry(_) | SyscallStop::None => {
                        self.request(ptrace::resume_to_syscall(self.tid, 0))?;
                    }
                },
                Some(Stop::Cloned) => {
                    self.made = Some(self.request(ptrace::made_thread(self.tid))?);
                    self.request(ptrace::resume_to_syscall(self.tid, 0))?;
                }
                // Not even entered: the thread is in a frozen cgroup.
                Some(Stop::Trap) if hurried => {
                    return Err(Lost::Abandoned);
                }
                // The process was stopped by a signal, before us or meanwhile: this thread still runs for us.
                Some(Stop::Trap) => self.request(ptrace::resume_to_syscall(self.tid, 0))?,
                // Only SIGSTOP comes through the mask: it stops the process when it is passed on.
                Some(Stop::Signal(signal)) => {
                    self.request(ptrace::resume_to_syscall(self.tid, signal))?;
                }
            }
        }
    }

    fn request<T>(&mut self, result: Result<T, Errno>) -> Result<T, Lost> {
        result.map_err(|errno| {
            let lost = lost(errno);
            if lost == Lost::Gone {
                self.released = true;
            }
            lost
        })
    }

    /// Maps memory for arguments in the process, shared so that it never melts into a mapping of its own.
    /// Unmapped at the release. Once only.
    ///
    /// Not where the kernel would put it: that may be a hole that another thread has made for a moment, to fill it
    /// again with `MAP_FIXED`, and then what is written here is written into its memory.
    pub(super) fn map_scratch(&mut self, bytes: u64) -> Result<Result<Addr, Errno>, Lost> {
        let bytes = bytes.next_multiple_of(SCRATCH_UNIT);
        let prot = libc::PROT_READ | libc::PROT_WRITE;
        let flags = libc::MAP_SHARED | libc::MAP_ANONYMOUS;
        let nowhere = u64::MAX;
        let place = SCRATCH_FROM + u64::from(self.tid.unsigned_abs()) * SCRATCH_EACH;
        let apart = flags | libc::MAP_FIXED_NOREPLACE;
        let arguments = [place, bytes, bits(prot), bits(apart), nowhere, 0];
        let mut mapped = self.call(libc::SYS_mmap, &arguments)?;
        if mapped == Err(libc::EEXIST) {
            // The program has put something there itself: then the kernel chooses after all.
            let arguments = [0, bytes, bits(prot), bits(flags), nowhere, 0];
            mapped = self.call(libc::SYS_mmap, &arguments)?;
        }
        let mapped = mapped.map(Addr);
        if let Ok(at) = mapped {
            self.scratch = Some((at, bytes));
        }
        Ok(mapped)
    }

    /// Writes words into the scratch memory.
    pub(super) fn poke(&self, at: Addr, words: &[u64]) -> Result<(), Lost> {
        let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_ne_bytes()).collect();
        match self.mem.write(at, &bytes) {
            Ok(written) if written == bytes.len() => Ok(()),
            _ => Err(Lost::Gone),
        }
    }

    /// Reads words from the scratch memory.
    pub(super) fn peek<const N: usize>(&self, at: Addr) -> Result<[u64; N], Lost> {
        let mut out = [0; N];
        for (i, word) in (0_u64..).zip(out.iter_mut()) {
            [*word] = self.words(at.offset(i * 8)).ok_or(Lost::Gone)?;
        }
        Ok(out)
    }

    /// Notes a descriptor of the process to be closed before the release.
    pub(super) fn close_later(&mut self, fd: u64) {
        self.temporary.push(fd);
    }

    /// Notes a descriptor of the process to be closed if the work fails.
    pub(super) fn close_on_failure(&mut self, fd: u64) {
        self.lasting.push(fd);
    }

    /// Has the thread make another one, to make calls in while this one goes on. The new thread runs no
    /// instruction of the program, needs no stack, blocks all signals, and ends when it is dropped.
    pub(super) fn spawn(&mut self) -> Result<Result<Self, Errno>, Lost> {
        let options = ptrace::TRACE_SYSCALL_GOOD | ptrace::EXIT_KILL | self.filter_option;
        // First: a thread that was made and cannot be let go of takes its process with it when we end.
        let mem = self.mem.as_fd().try_clone_to_owned().map_err(no_room)?;
        self.request(ptrace::set_options(self.tid, options | ptrace::TRACE_CLONE))?;
        if let Err(errno) = self.call(libc::SYS_clone, &[SPAWN_FLAGS])? {
            return Ok(Err(errno));
        }
        let tid = self.made.take().ok_or(Lost::Gone)?;
        // It is on its way to its first stop: whatever happens, it must not be left before.
        match ptrace::wait_for_stop(tid, Pace::Sleep, || true) {
            Some(Stop::Gone) | None => return Err(Lost::Gone),
            Some(Stop::Trap | Stop::Syscall | Stop::Cloned | Stop::Signal(_)) => {}
        }
        Ok(Ok(Self {
            tid,
            mem: TargetMem::from_owned(mem),
            syscall_at: self.syscall_at,
            saved: self.saved,
            mask: u64::MAX,
            sequence: None,
            dispatch: None,
            since: Instant::now(),
            agreement: self.agreement.clone(),
            released: false,
            temporary: Vec::with_capacity(8),
            lasting: Vec::new(),
            scratch: None,
            cleaning: false,
            boost: None,
            made: None,
            ours: true,
            stop_us: 0,
            filter_option: self.filter_option,
        }))
    }

    /// Closes what must not stay, puts everything back and lets the thread go; returns the length of the stop.
    pub(super) fn release(&mut self) -> u64 {
        if !self.released {
            self.cleaning = true;
            let _ = self.clean_up();
            if self.ours {
                let _ = self.end();
            } else {
                let _ = self.put_back();
            }
            self.released = true;
            self.stop_us = u64::try_from(self.since.elapsed().as_micros()).unwrap_or(u64::MAX);
        }
        self.stop_us
    }

    /// Ends a thread that is ours.
    fn end(&mut self) -> Result<(), Lost> {
        match self.call(libc::SYS_exit, &[0]) {
            Err(Lost::Gone) => {
                ptrace::reap(self.tid);
                Ok(())
            }
            Err(lost) => Err(lost),
            Ok(_) => Err(Lost::Gone),
        }
    }

    fn clean_up(&mut self) -> Result<(), Lost> {
        let mut fds = std::mem::take(&mut self.temporary);
        fds.append(&mut self.lasting);
        fds.sort_unstable();
        // Neighbours go in one call; between others a descriptor of the program may lie.
        for run in fds.chunk_by(|a, b| a + 1 == *b) {
            let (Some(&first), Some(&last)) = (run.first(), run.last()) else {
                continue;
            };
            if first < last && self.call(libc::SYS_close_range, &[first, last, 0])?.is_ok() {
                continue;
            }
            for &fd in run {
                let _ = self.call(libc::SYS_close, &[fd])?;
            }
        }
        if let Some((at, bytes)) = self.scratch.take() {
            let _ = self.call(libc::SYS_munmap, &[at.0, bytes])?;
        }
        Ok(())
    }

    fn put_back(&mut self) -> Result<(), Lost> {
        self.boost = None;
        if let Some((at, noted)) = self.sequence {
            let _ = self.mem.write(at, &noted.to_ne_bytes());
        }
        if let Some(dispatch) = self.dispatch {
            self.request(ptrace::set_dispatch(self.tid, &dispatch))?;
        }
        self.request(ptrace::set_signal_mask(self.tid, self.mask))?;
        let saved = self.saved;
        self.request(ptrace::set_registers(self.tid, &saved))?;
        self.request(ptrace::detach(self.tid, 0))
    }
}

impl Drop for Stopped {
    fn drop(&mut self) {
        self.release();
    }
}

/// Asks a traced thread to stop and waits until it is at a trap, passing on signals that it meets before.
pub(super) fn stop_at_trap(tid: i32, mut patience: impl FnMut() -> bool) -> Result<(), Lost> {
    ptrace::interrupt(tid).map_err(lost)?;
    loop {
        match ptrace::wait_for_stop(tid, Pace::Sleep, &mut patience) {
            None => return Err(Lost::DidNotStop),
            Some(Stop::Gone) => return Err(Lost::Gone),
            Some(Stop::Trap) => return Ok(()),
            Some(Stop::Syscall | Stop::Cloned) => ptrace::resume(tid, 0).map_err(lost)?,
            Some(Stop::Signal(signal)) => {
                // A stop for a signal uses up the request to stop.
                ptrace::interrupt(tid).map_err(lost)?;
                ptrace::resume(tid, signal).map_err(lost)?;
            }
        }
    }
}

/// What it means that a thread's memory cannot be opened.
fn no_room(error: std::io::Error) -> Lost {
    match error.raw_os_error() {
        Some(errno @ (libc::EMFILE | libc::ENFILE)) => Lost::NoDescriptor(errno),
        _ => Lost::Gone,
    }
}

/// What a failed ptrace request means: a stopped thread can always be killed.
const fn lost(errno: Errno) -> Lost {
    match errno {
        libc::ESRCH => Lost::Gone,
        other => Lost::Ptrace(other),
    }
}
