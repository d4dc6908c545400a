//! A process to try the kernel layer on: a forked child that does single steps on demand.
//!
//! The child runs only system calls and plain memory accesses, as a fork of a process with threads has
//! to. It dies with the test's thread.
#![expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "steps and results, numbers of either sign, travel as words between two halves of one test"
)]

use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use holo_proto::{Addr, AddrRange};
use holo_tests::watchdog::give_up;

use super::advise::PidFd;
use super::arena::SharedWords;
use super::ring::{AdviceRing, RingParams};
use super::uffd::{EVENT_WORDS, Event, Uffd};

/// No step of a test takes this long unless something hangs.
const BOUND: Duration = Duration::from_secs(20);

const OP: usize = 0;
const ARGS: usize = 1;
const RESULT: usize = 7;
const DONE: usize = 8;
/// Words from here on are free for a test; they have the same address in the child.
const SCRATCH: usize = 16;

const OP_SYSCALL: u64 = 0;
const OP_PEEK: u64 = 1;
const OP_POKE: u64 = 2;
const OP_FILL: u64 = 3;
const OP_THREAD: u64 = 4;
const OP_FORK: u64 = 5;

/// Where [`Target::map`] maps: far from what a process has.
const BASE: u64 = 0x10_0000_0000;

pub(crate) struct Target {
    pub(crate) pid: i32,
    pub(crate) pidfd: PidFd,
    control: SharedWords,
    go: OwnedFd,
    issued: u64,
    next_map: u64,
}

impl Target {
    pub(crate) fn start() -> Self {
        let control = SharedWords::create("test-control", 512).unwrap();
        let mut ends = [0; 2];
        // SAFETY: room for two descriptors.
        let r = unsafe { libc::pipe2(ends.as_mut_ptr(), libc::O_CLOEXEC) };
        assert_eq!(r, 0);
        let parent = std::process::id();
        // SAFETY: the child keeps to async-signal-safe steps and never returns.
        let pid = unsafe { libc::fork() };
        assert!(pid >= 0);
        if pid == 0 {
            // SAFETY: passes numbers only.
            unsafe { libc::close(ends[1]) };
            die_with(parent);
            serve(control.words(), ends[0]);
        }
        // SAFETY: just made, owned by nobody else.
        drop(unsafe { OwnedFd::from_raw_fd(ends[0]) });
        // SAFETY: just made, owned by nobody else.
        let go = unsafe { OwnedFd::from_raw_fd(ends[1]) };
        Self {
            pid,
            pidfd: PidFd::open(pid).unwrap(),
            control,
            go,
            issued: 0,
            next_map: BASE,
        }
    }

    fn begin(&mut self, op: u64, args: [u64; 6]) {
        let words = self.control.words();
        assert_eq!(
            words[DONE].load(Ordering::Acquire),
            self.issued,
            "still busy"
        );
        words[OP].store(op, Ordering::Relaxed);
        for (word, arg) in words[ARGS..].iter().zip(args) {
            word.store(arg, Ordering::Relaxed);
        }
        self.issued += 1;
        // SAFETY: reads one byte of a constant.
        let n = unsafe { libc::write(self.go.as_raw_fd(), b"x".as_ptr().cast(), 1) };
        assert_eq!(n, 1);
    }

    /// Whether the last step is done.
    pub(crate) fn is_done(&self) -> bool {
        self.control.words()[DONE].load(Ordering::Acquire) == self.issued
    }

    /// Waits for the last step's result.
    pub(crate) fn finish(&self) -> i64 {
        within("the target's step", || self.is_done().then_some(()));
        self.control.words()[RESULT].load(Ordering::Relaxed) as i64
    }

    pub(crate) fn begin_syscall(&mut self, number: libc::c_long, args: [u64; 5]) {
        let [a, b, c, d, e] = args;
        self.begin(OP_SYSCALL, [number as u64, a, b, c, d, e]);
    }

    /// The result, or a negative errno.
    pub(crate) fn syscall(&mut self, number: libc::c_long, args: [u64; 5]) -> i64 {
        self.begin_syscall(number, args);
        self.finish()
    }

    pub(crate) fn begin_peek(&mut self, at: Addr) {
        self.begin(OP_PEEK, [at.0, 0, 0, 0, 0, 0]);
    }

    pub(crate) fn peek(&mut self, at: Addr) -> u8 {
        self.begin_peek(at);
        self.finish() as u8
    }

    pub(crate) fn begin_poke(&mut self, at: Addr, value: u8) {
        self.begin(OP_POKE, [at.0, u64::from(value), 0, 0, 0, 0]);
    }

    pub(crate) fn poke(&mut self, at: Addr, value: u8) {
        self.begin_poke(at, value);
        self.finish();
    }

    /// Writes `value` into every byte.
    pub(crate) fn fill(&mut self, range: AddrRange, value: u8) {
        self.begin(
            OP_FILL,
            [range.start.0, range.len(), u64::from(value), 0, 0, 0],
        );
        self.finish();
    }

    /// Starts a thread that reads one byte at `at` and ends.
    pub(crate) fn peek_by_thread(&mut self, at: Addr) -> i64 {
        let stack = self.map(16);
        self.fill(stack, 0);
        self.begin(OP_THREAD, [stack.end.0, at.0, 0, 0, 0, 0]);
        self.finish()
    }

    /// Begins a fork, whose child does nothing; [`Target::finish`] gives its pid. It ends with the target.
    pub(crate) fn begin_fork(&mut self) {
        self.begin(OP_FORK, [0; 6]);
    }

    /// A fresh private anonymous mapping of so many subpages, 64 KiB-aligned, without huge pages, with a
    /// gap before the next one.
    pub(crate) fn map(&mut self, subpages: u64) -> AddrRange {
        let at = self.next_map;
        let len = subpages * 4096;
        self.next_map = (at + len).next_multiple_of(1 << 20) + (1 << 20);
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE;
        let got = self.begin_mmap(at, len, flags);
        assert_eq!(got, at as i64);
        assert_eq!(
            self.madvise(AddrRange::new(at, at + len), libc::MADV_NOHUGEPAGE),
            0
        );
        AddrRange::new(at, at + len)
    }

    fn begin_mmap(&mut self, at: u64, len: u64, flags: i32) -> i64 {
        let prot = (libc::PROT_READ | libc::PROT_WRITE) as u64;
        // The sixth argument, an offset, is ignored for anonymous memory.
        self.syscall(libc::SYS_mmap, [at, len, prot, flags as u64, u64::MAX])
    }

    pub(crate) fn madvise(&mut self, range: AddrRange, advice: i32) -> i64 {
        self.syscall(
            libc::SYS_madvise,
            [range.start.0, range.len(), advice as u64, 0, 0],
        )
    }

    /// A userfaultfd of the target, handshake done.
    pub(crate) fn uffd(&mut self) -> Uffd {
        let flags = (libc::O_CLOEXEC | libc::O_NONBLOCK) as u64;
        let number = self.syscall(libc::SYS_userfaultfd, [flags, 0, 0, 0, 0]);
        let uffd = Uffd::from_owned(self.pidfd.get_fd(i32::try_from(number).unwrap()).unwrap());
        uffd.handshake().unwrap();
        uffd
    }

    /// A polled ring of the target, of 8 entries.
    pub(crate) fn ring(&mut self) -> AdviceRing {
        let scratch = &self.control.words()[SCRATCH..SCRATCH + 15];
        for (word, value) in scratch.iter().zip(RingParams::request(2).0) {
            word.store(value, Ordering::Relaxed);
        }
        let at = scratch.as_ptr().addr() as u64;
        let number = self.syscall(libc::SYS_io_uring_setup, [8, at, 0, 0, 0]);
        let fd = self.pidfd.get_fd(i32::try_from(number).unwrap()).unwrap();
        let mut params = RingParams([0; 15]);
        let scratch = &self.control.words()[SCRATCH..];
        for (value, word) in params.0.iter_mut().zip(scratch) {
            *value = word.load(Ordering::Relaxed);
        }
        let ring = AdviceRing::map(fd, &params).unwrap();
        ring.limit_workers().unwrap();
        ring
    }

    /// Ends the target and reaps it.
    pub(crate) fn end(&mut self) {
        let _ = self.pidfd.send_signal(libc::SIGKILL);
        // SAFETY: no status is wanted; the child is ours and not reaped elsewhere.
        unsafe { libc::waitpid(self.pid, std::ptr::null_mut(), 0) };
    }
}

impl Drop for Target {
    fn drop(&mut self) {
        self.end();
    }
}

/// Waits for something that has to come.
pub(crate) fn within<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let start = Instant::now();
    loop {
        if let Some(found) = look() {
            return found;
        }
        if start.elapsed() >= BOUND {
            give_up(&format!("waited too long for {what}"));
        }
        std::thread::sleep(Duration::from_micros(100));
    }
}

/// Waits until a message can be read, without reading it.
pub(crate) fn wait_readable(uffd: &Uffd) {
    let mut poll = libc::pollfd {
        fd: uffd.as_fd().as_raw_fd(),
        events: libc::POLLIN,
        revents: 0,
    };
    let bound = i32::try_from(BOUND.as_millis()).unwrap();
    // SAFETY: one valid entry.
    let ready = unsafe { libc::poll(&raw mut poll, 1, bound) };
    if ready != 1 {
        give_up("no event");
    }
}

/// Reads the next message.
pub(crate) fn next_event(uffd: &Uffd) -> Event {
    let slots = [const { AtomicU64::new(0) }; EVENT_WORDS];
    wait_readable(uffd);
    assert_eq!(uffd.read_events(&slots), Ok(1));
    Event::decode(&slots.map(AtomicU64::into_inner)).unwrap()
}

/// Lets a thread (0: this one) run on one CPU only.
pub(crate) fn pin_to_cpu(tid: i32, cpu: u32) {
    let cpus = 1_u64 << cpu;
    // SAFETY: one word of CPU bits, read during the call.
    let r = unsafe { libc::sched_setaffinity(tid, 8, (&raw const cpus).cast()) };
    assert_eq!(r, 0);
}

/// Empties every CPU's list of pages on their way into or within the LRU: while a page waits on one, a
/// FREE from another CPU does not mark it and a reclaim passes it by. MADV_COLD drains its CPU's list.
pub(crate) fn drain_cpu_lists() {
    let cpus = std::thread::available_parallelism().unwrap().get();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let prot = libc::PROT_READ | libc::PROT_WRITE;
            let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
            // SAFETY: a new mapping at a place that the kernel chooses.
            let page = unsafe { libc::mmap(std::ptr::null_mut(), 4096, prot, flags, -1, 0) };
            assert_ne!(page, libc::MAP_FAILED);
            for cpu in 0..u32::try_from(cpus).unwrap() {
                pin_to_cpu(0, cpu);
                // SAFETY: the page mapped above; the advice changes no byte.
                let r = unsafe { libc::madvise(page, 4096, libc::MADV_COLD) };
                assert_eq!(r, 0);
            }
            // SAFETY: the page mapped above, used by nobody else.
            unsafe { libc::munmap(page, 4096) };
        });
    });
}

/// The calling thread's id, for [`interrupt`].
pub(crate) fn own_tid() -> i32 {
    // SAFETY: returns a number.
    unsafe { libc::gettid() }
}

/// Has whatever call a thread of this process waits in end early, as any signal with a handler does.
pub(crate) fn interrupt(tid: i32) {
    extern "C" fn nothing(_: libc::c_int) {}
    let handler: extern "C" fn(libc::c_int) = nothing;
    // SAFETY: the handler does nothing.
    unsafe { libc::signal(libc::SIGUSR2, handler as libc::sighandler_t) };
    // SAFETY: a signal to a thread of this process.
    let r = unsafe { libc::syscall(libc::SYS_tgkill, std::process::id(), tid, libc::SIGUSR2) };
    assert_eq!(r, 0);
}

/// Makes sure that a forked child ends with its parent, also when that ended already.
fn die_with(parent: u32) {
    // SAFETY: passes numbers only.
    unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) };
    if std::os::unix::process::parent_id() != parent {
        // SAFETY: ends this process at once.
        unsafe { libc::_exit(0) };
    }
}

/// The child's life.
fn serve(words: &[AtomicU64], go: i32) -> ! {
    loop {
        let mut byte = 0_u8;
        // SAFETY: room for one byte.
        if unsafe { libc::read(go, (&raw mut byte).cast(), 1) } != 1 {
            // SAFETY: ends this process at once.
            unsafe { libc::_exit(0) };
        }
        let arg = |i: usize| words[ARGS + i].load(Ordering::Relaxed);
        let at = || std::ptr::with_exposed_provenance_mut::<u8>(arg(0) as usize);
        let result = match words[OP].load(Ordering::Relaxed) {
            OP_SYSCALL => {
                // SAFETY: the test asks for calls that are right in this process, whose memory is its own.
                let r = unsafe {
                    libc::syscall(
                        arg(0) as libc::c_long,
                        arg(1),
                        arg(2),
                        arg(3),
                        arg(4),
                        arg(5),
                        0,
                    )
                };
                if r == -1 {
                    -i64::from(super::errno())
                } else {
                    r
                }
            }
            // SAFETY: the test names memory that it mapped in this process.
            OP_PEEK => i64::from(unsafe { std::ptr::read_volatile(at()) }),
            OP_POKE => {
                // SAFETY: the test names memory that it mapped in this process.
                unsafe { std::ptr::write_volatile(at(), arg(1) as u8) };
                0
            }
            OP_FILL => {
                // SAFETY: the test names memory that it mapped in this process.
                unsafe { std::ptr::write_bytes(at(), arg(2) as u8, arg(1) as usize) };
                0
            }
            OP_THREAD => {
                let flags = libc::CLONE_VM
                    | libc::CLONE_FS
                    | libc::CLONE_FILES
                    | libc::CLONE_SIGHAND
                    | libc::CLONE_THREAD
                    | libc::CLONE_SYSVSEM;
                let byte = std::ptr::with_exposed_provenance_mut(arg(1) as usize);
                // SAFETY: a stack of the target's own, and a function that keeps to memory accesses.
                let r = unsafe { libc::clone(touch, at().cast(), flags, byte) };
                i64::from(r)
            }
            OP_FORK => {
                let parent = std::process::id();
                // SAFETY: both sides keep to async-signal-safe steps.
                let r = unsafe { libc::fork() };
                if r == 0 {
                    die_with(parent);
                    loop {
                        // SAFETY: passes nothing.
                        unsafe { libc::pause() };
                    }
                }
                i64::from(r)
            }
            _ => -1,
        };
        words[RESULT].store(result as u64, Ordering::Relaxed);
        words[DONE].fetch_add(1, Ordering::Release);
    }
}

extern "C" fn touch(at: *mut libc::c_void) -> libc::c_int {
    // SAFETY: the test names memory that it mapped in this process.
    libc::c_int::from(unsafe { std::ptr::read_volatile(at.cast::<u8>()) })
}
