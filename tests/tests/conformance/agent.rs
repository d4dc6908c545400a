//! A process that does single steps on demand, on threads of its own.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::{BufRead as _, BufReader, Read, Write};
use std::os::fd::{AsRawFd as _, RawFd};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::thread;

use holo_pager::sys::advise::PidFd;
use holo_pager::sys::attach::make_ring;
use holo_pager::sys::ring::{AdviceRing, RingParams};
use holo_pager::sys::uffd::Uffd;
use holo_proto::{Addr, AddrRange, SUBPAGE_BYTES};

use crate::support::{within, word};

/// The thread of an agent that reads its lines. Who asks nothing of the others has one thread.
pub(crate) const MAIN: usize = 0;
/// Threads of an agent for what may wait.
pub(crate) const A: usize = 1;
pub(crate) const B: usize = 2;
pub(crate) const C: usize = 3;
/// The one that the helpers below use for their own purposes; nothing that waits runs there.
const HELPER: usize = 7;

/// Where agents map: far from what a process has.
const FIRST_MAPPING: u64 = 0x10_0000_0000;
/// The agent's program, built once and gone from the disk.
fn program() -> &'static File {
    static PROGRAM: OnceLock<File> = OnceLock::new();
    PROGRAM.get_or_init(|| {
        let name = format!("holo-conformance-{}", std::process::id());
        let folder = std::env::temp_dir().join(name);
        fs::create_dir_all(&folder).unwrap();
        let sources = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/conformance");
        let built = Command::new("cc")
            .args(["-O1", "-Wall", "-Wextra", "-Werror", "-pthread", "-o"])
            .arg(folder.join("agent"))
            .args([sources.join("agent.c"), sources.join("pinned.c")])
            .status();
        let opened = File::open(folder.join("agent"));
        fs::remove_dir_all(&folder).unwrap();
        assert!(built.unwrap().success());
        opened.unwrap()
    })
}

/// What agents answered to steps.
type Answers = Arc<Mutex<HashMap<u64, Vec<i64>>>>;

/// A process that does single steps. Killed when dropped, and its children with it.
pub(crate) struct Agent {
    pub(crate) pid: i32,
    pub(crate) pidfd: PidFd,
    /// None of a fork's child, which its parent ends.
    child: Option<Child>,
    to: Mutex<Box<dyn Write + Send>>,
    answers: Answers,
    steps: AtomicU64,
    next_mapping: AtomicU64,
}

/// A step that was begun.
pub(crate) struct Step<'a> {
    agent: &'a Agent,
    number: u64,
    what: String,
}

impl Step<'_> {
    pub(crate) fn is_done(&self) -> bool {
        self.agent
            .answers
            .lock()
            .unwrap()
            .contains_key(&self.number)
    }

    /// Waits for its result.
    #[track_caller]
    pub(crate) fn finish(self) -> i64 {
        self.finish_with_all()[0]
    }

    #[track_caller]
    fn finish_with_all(self) -> Vec<i64> {
        within(&self.what, || {
            self.agent.answers.lock().unwrap().remove(&self.number)
        })
    }
}

impl Agent {
    pub(crate) fn start() -> Self {
        let path = format!("/proc/{}/fd/{}", std::process::id(), program().as_raw_fd());
        let mut child = Command::new(path)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let (to, from) = (child.stdin.take().unwrap(), child.stdout.take().unwrap());
        let pid = i32::try_from(child.id()).unwrap();
        let mut agent = Self::over(pid, Box::new(to), from, FIRST_MAPPING);
        agent.child = Some(child);
        // It is only half started when the command says so.
        agent.run(MAIN, "tid");
        agent
    }

    fn over(
        pid: i32,
        to: Box<dyn Write + Send>,
        from: impl Read + Send + 'static,
        next_mapping: u64,
    ) -> Self {
        let answers = Answers::default();
        let heard = Arc::clone(&answers);
        // Ends with the agent, which has the only other end.
        thread::spawn(move || {
            for line in BufReader::new(from).lines().map_while(Result::ok) {
                let mut numbers = line.split(' ').map(|n| n.parse::<i64>().unwrap());
                let step = numbers.next().unwrap().cast_unsigned();
                heard.lock().unwrap().insert(step, numbers.collect());
            }
        });
        Self {
            pid,
            pidfd: PidFd::open(pid).unwrap(),
            child: None,
            to: Mutex::new(to),
            answers,
            steps: AtomicU64::new(1),
            next_mapping: AtomicU64::new(next_mapping),
        }
    }

    /// Begins a step on one of its threads.
    pub(crate) fn begin(&self, thread: usize, what: &str) -> Step<'_> {
        let number = self.steps.fetch_add(1, Ordering::Relaxed);
        let line = format!("{thread} {number} {what}\n");
        self.to.lock().unwrap().write_all(line.as_bytes()).unwrap();
        Step {
            agent: self,
            number,
            what: what.to_owned(),
        }
    }

    #[track_caller]
    pub(crate) fn run(&self, thread: usize, what: &str) -> i64 {
        self.begin(thread, what).finish()
    }

    /// Begins a system call, whose result is negative for an errno.
    pub(crate) fn begin_call(
        &self,
        thread: usize,
        number: libc::c_long,
        arguments: &[u64],
    ) -> Step<'_> {
        let words: Vec<String> = arguments.iter().map(|a| format!(" {a:#x}")).collect();
        self.begin(thread, &format!("call {number}{}", words.concat()))
    }

    #[track_caller]
    pub(crate) fn call(&self, number: libc::c_long, arguments: &[u64]) -> i64 {
        self.begin_call(HELPER, number, arguments).finish()
    }

    pub(crate) fn begin_peek(&self, thread: usize, at: Addr) -> Step<'_> {
        self.begin(thread, &format!("peek {at}"))
    }

    pub(crate) fn begin_poke(&self, thread: usize, at: Addr, value: u8) -> Step<'_> {
        self.begin(thread, &format!("poke {at} {value}"))
    }

    #[track_caller]
    pub(crate) fn peek(&self, at: Addr) -> u8 {
        u8::try_from(self.begin_peek(HELPER, at).finish()).unwrap()
    }

    #[track_caller]
    pub(crate) fn poke(&self, at: Addr, value: u8) {
        self.begin_poke(HELPER, at, value).finish();
    }

    /// Writes every byte, and sees to it that a FREE can act on the pages.
    #[track_caller]
    pub(crate) fn fill(&self, range: AddrRange, value: u8) {
        let (at, len) = (range.start, range.len());
        self.run(HELPER, &format!("fill {at} {len} {value}"));
        self.drain();
    }

    /// Every byte of the range has this value.
    #[track_caller]
    pub(crate) fn holds(&self, range: AddrRange, value: u8) -> bool {
        let (at, len) = (range.start, range.len());
        self.run(HELPER, &format!("differing {at} {len} {value}")) == 0
    }

    /// Empties every CPU's list of pages on their way.
    #[track_caller]
    pub(crate) fn drain(&self) {
        assert_eq!(self.run(HELPER, "drain"), 0);
    }

    /// Writes words to memory of its own, for structures that a call reads.
    pub(crate) fn words(&self, at: Addr, words: &[u64]) {
        let words: Vec<String> = words.iter().map(|a| format!(" {a:#x}")).collect();
        self.run(HELPER, &format!("words {at}{}", words.concat()));
    }

    pub(crate) fn tid(&self, thread: usize) -> i32 {
        i32::try_from(self.run(thread, "tid")).unwrap()
    }

    /// A fresh private anonymous mapping of so many subpages, page-aligned, without huge pages, with a gap of
    /// 1 MiB at least on both sides.
    pub(crate) fn map(&self, subpages: u64) -> AddrRange {
        let range = self.room(subpages);
        self.map_at(HELPER, range);
        let (at, len) = (range.start.0, range.len());
        let advised = self.call(libc::SYS_madvise, &[at, len, word(libc::MADV_NOHUGEPAGE)]);
        assert_eq!(advised, 0);
        range
    }

    /// A place that nothing else is mapped at.
    pub(crate) fn room(&self, subpages: u64) -> AddrRange {
        let len = subpages * SUBPAGE_BYTES;
        let step = len.next_multiple_of(1 << 20) + (2 << 20);
        let at = self.next_mapping.fetch_add(step, Ordering::Relaxed);
        AddrRange::new(at, at + len)
    }

    /// Maps private anonymous memory at a place, also over what is there.
    #[track_caller]
    pub(crate) fn map_at(&self, thread: usize, range: AddrRange) {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED;
        let prot = word(libc::PROT_READ | libc::PROT_WRITE);
        let arguments = [range.start.0, range.len(), prot, word(flags), u64::MAX];
        let got = self.begin_call(thread, libc::SYS_mmap, &arguments).finish();
        assert_eq!(got.cast_unsigned(), range.start.0);
    }

    #[track_caller]
    pub(crate) fn protect(&self, range: AddrRange, prot: i32) {
        let arguments = [range.start.0, range.len(), word(prot)];
        assert_eq!(self.call(libc::SYS_mprotect, &arguments), 0);
    }

    pub(crate) fn begin_madvise(&self, thread: usize, range: AddrRange, advice: i32) -> Step<'_> {
        let arguments = [range.start.0, range.len(), word(advice)];
        self.begin_call(thread, libc::SYS_madvise, &arguments)
    }

    #[track_caller]
    pub(crate) fn madvise(&self, range: AddrRange, advice: i32) -> i64 {
        self.begin_madvise(HELPER, range, advice).finish()
    }

    pub(crate) fn begin_unmap(&self, thread: usize, range: AddrRange) -> Step<'_> {
        self.begin_call(thread, libc::SYS_munmap, &[range.start.0, range.len()])
    }

    /// Moves a whole mapping to another place.
    pub(crate) fn begin_move(&self, thread: usize, from: AddrRange, to: Addr) -> Step<'_> {
        let flags = word(libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED);
        let arguments = [from.start.0, from.len(), from.len(), flags, to.0];
        self.begin_call(thread, libc::SYS_mremap, &arguments)
    }

    /// A userfaultfd of it, handshake done, and its number there.
    pub(crate) fn uffd(&self) -> (Uffd, RawFd) {
        self.uffd_with(0)
    }

    /// The same with more features.
    pub(crate) fn uffd_with(&self, features: u64) -> (Uffd, RawFd) {
        let flags = word(libc::O_CLOEXEC | libc::O_NONBLOCK);
        let number = RawFd::try_from(self.call(libc::SYS_userfaultfd, &[flags])).unwrap();
        let uffd = Uffd::from_owned(self.pidfd.get_fd(number).unwrap());
        uffd.handshake_with(features).unwrap();
        (uffd, number)
    }

    /// A fresh mapping that is served, filled with 1.
    pub(crate) fn served(&self, uffd: &Uffd, subpages: u64) -> AddrRange {
        let range = self.map(subpages);
        self.fill(range, 1);
        uffd.register(range).unwrap();
        range
    }

    /// A ring in it, made as the pager makes one.
    pub(crate) fn ring(&self) -> AdviceRing {
        let hold = make_ring(self.pid, 8).unwrap();
        let ring = AdviceRing::map(hold.fd, &RingParams(hold.params)).unwrap();
        ring.limit_workers().unwrap();
        ring
    }

    /// A descriptor of another process or of this one, in this agent.
    pub(crate) fn take_descriptor(&self, pid: i32, number: RawFd) -> u64 {
        let process = self.call(libc::SYS_pidfd_open, &[word(pid), 0]);
        assert!(process >= 0, "pidfd_open: {process}");
        let process = process.cast_unsigned();
        let taken = self.call(libc::SYS_pidfd_getfd, &[process, word(number), 0]);
        assert!(taken >= 0, "pidfd_getfd: {taken}");
        assert_eq!(self.call(libc::SYS_close, &[process]), 0);
        taken.cast_unsigned()
    }

    pub(crate) fn begin_fork(&self, thread: usize) -> Step<'_> {
        self.begin(thread, "fork")
    }

    /// The child of a fork that is done, which does steps as well.
    #[track_caller]
    pub(crate) fn child_of(&self, fork: Step<'_>) -> Self {
        let answer = fork.finish_with_all();
        let [pid, to, from] = answer[..] else {
            panic!("{answer:?} of a fork");
        };
        let end = |number: i64| {
            let number = RawFd::try_from(number).unwrap();
            let end = self.pidfd.get_fd(number).unwrap();
            assert_eq!(self.call(libc::SYS_close, &[word(number)]), 0);
            File::from(end)
        };
        let pid = i32::try_from(pid).unwrap();
        let next = self.next_mapping.load(Ordering::Relaxed);
        Self::over(pid, Box::new(end(to)), end(from), next)
    }

    /// Forks where no userfaultfd has to be told.
    pub(crate) fn fork(&self) -> Self {
        self.child_of(self.begin_fork(HELPER))
    }

    /// Waits until a thread sleeps in this kernel function.
    #[track_caller]
    pub(crate) fn wait_until_in(&self, tid: i32, function: &str) {
        let path = format!("/proc/{}/task/{tid}/wchan", self.pid);
        within(&format!("a thread in {function}"), || {
            fs::read_to_string(&path)
                .is_ok_and(|text| text.contains(function))
                .then_some(())
        });
    }

    /// Whether it has a thread of this id.
    pub(crate) fn has_thread(&self, tid: i64) -> bool {
        Path::new(&format!("/proc/{}/task/{tid}", self.pid)).exists()
    }

    /// Kills it and waits for its end.
    pub(crate) fn kill(&self) {
        self.pidfd.send_signal(libc::SIGKILL).unwrap();
        within("the end of a process", || {
            self.pidfd.has_exited().then_some(())
        });
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        let _ = self.pidfd.send_signal(libc::SIGKILL);
        if let Some(child) = &mut self.child {
            let _ = child.wait();
        }
    }
}
