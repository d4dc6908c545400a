//! What can be known of a process before it is stopped: whether it can be taken, and by which thread.
//!
//! Everything here is read from `/proc` and may be out of date a moment later; what counts is said by the
//! stop itself. It is read first so that the stop is short, and so that a refusal costs the process nothing.

use std::fs;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use holo_proto::AddrRange;

use super::errors::UffdError;
use super::fds;
use super::inject::{AROUND_BYTES, Syscall};
use super::maps::{MapName, ProcMaps, VmFlags, mappings, smaps};
use super::mem::TargetMem;
use super::procfs::{self, Tasks};
use super::refuse::AttachError;
use super::restart::{Disturbance, disturbance};
use super::uffd::{NOWHERE, Uffd};

/// How long all threads may be in state D before it is called an error: a disk access ends sooner.
const UNINTERRUPTIBLE_PATIENCE: Duration = Duration::from_millis(500);
/// How long a process may be busy starting programs.
const EXEC_PATIENCE: Duration = Duration::from_millis(500);
/// Pause between two looks.
const LOOK_AGAIN: Duration = Duration::from_millis(5);
/// Threads looked at to find a good one.
const THREADS_LOOKED_AT: usize = 256;
/// Descriptors that taking hold opens in the process at once, at most.
const DESCRIPTORS_NEEDED: u64 = 5;
/// Threads that eviction needs in the process at once, at most: the ring's, and the one that makes it or, later, the
/// one that carries requests out.
const THREADS_NEEDED: u64 = 2;
/// Address space that taking hold needs in the process.
const BYTES_NEEDED: u64 = 4096;
/// Numbers tried, from the top down, to find a free one for the descriptor that stays.
const NUMBERS_TRIED: u64 = 64;
/// Longest vdso that is searched for the instruction.
const VDSO_BYTES_MAX: u64 = 64 * 1024;

const PF_EXITING: u64 = 0x4;
const PF_IO_WORKER: u64 = 0x10;
const PF_USER_WORKER: u64 = 0x4000;
const PF_KTHREAD: u64 = 0x0020_0000;

const CAP_SYS_PTRACE: u32 = 19;
const CAP_SYS_ADMIN: u32 = 21;
const CAP_SYS_RESOURCE: u32 = 24;
/// What the first user namespace is called; only there do rights count for the whole machine.
const FIRST_USER_NAMESPACE: &str = "user:[4026531837]";

/// A thread's line in `/proc`.
#[derive(Clone, Copy, Debug)]
pub(super) struct Task {
    pub(super) tid: i32,
    state: u8,
    flags: u64,
}

impl Task {
    fn read(pid: i32, tid: i32) -> Option<Self> {
        let text = fs::read(format!("/proc/{pid}/task/{tid}/stat")).ok()?;
        // The name, in parentheses, may hold anything.
        let end = text.iter().rposition(|&b| b == b')')?;
        let rest = String::from_utf8_lossy(text.get(end + 2..)?).into_owned();
        let mut fields = rest.split(' ');
        let state = *fields.next()?.as_bytes().first()?;
        let flags = fields.nth(5)?.parse().ok()?;
        Some(Self { tid, state, flags })
    }

    fn is_dead(self) -> bool {
        matches!(self.state, b'Z' | b'X' | b'x') || self.flags & PF_EXITING != 0
    }

    /// A thread that the kernel made in the process for io_uring: it runs no code of the program.
    pub(super) fn is_kernels(self) -> bool {
        self.flags & (PF_IO_WORKER | PF_USER_WORKER | PF_KTHREAD) != 0
    }

    /// Whether it can be stopped at all.
    pub(super) fn is_stoppable(self) -> bool {
        !self.is_dead() && !self.is_kernels()
    }

    fn disturbance(self, pid: i32) -> Option<Disturbance> {
        match self.state {
            // Stopped by a signal already.
            b'T' => Some(Disturbance::None),
            b'R' => Some(Disturbance::Time),
            b'S' => Some(match waits_in(pid, self.tid) {
                Some(call) => disturbance(call),
                None => Disturbance::Time,
            }),
            _ => None,
        }
    }
}

/// The call that a sleeping thread waits in; `None` when it runs, or waits in none.
fn waits_in(pid: i32, tid: i32) -> Option<i64> {
    let text = fs::read_to_string(format!("/proc/{pid}/task/{tid}/syscall")).ok()?;
    let call: i64 = text.split_ascii_whitespace().next()?.parse().ok()?;
    (call >= 0).then_some(call)
}

/// The threads of a process, leader first.
pub(super) fn tasks(pid: i32) -> Vec<Task> {
    let mut tids = Vec::new();
    let listed = Tasks::open(pid).and_then(|mut all| all.for_each(|tid| tids.push(tid)));
    if listed.is_err() {
        return Vec::new();
    }
    tids.sort_unstable_by_key(|&tid| (tid != pid, tid));
    tids.dedup();
    tids.iter()
        .filter_map(|&tid| Task::read(pid, tid))
        .collect()
}

/// Whether a process goes on without its first thread. So it looks for a moment while it ends, too.
#[must_use]
pub fn first_thread_has_ended(pid: i32) -> bool {
    let tasks = tasks(pid);
    let is_dead = |task: &Task| task.tid == pid && task.is_dead();
    tasks.iter().any(is_dead) && tasks.iter().any(|task| task.is_stoppable())
}

/// The threads that can be stopped now, the one that minds least first; waits a moment while there is none.
pub(super) fn candidates(pid: i32) -> Result<Vec<i32>, AttachError> {
    let since = Instant::now();
    loop {
        let tasks = tasks(pid);
        if !tasks.iter().any(|task| task.is_stoppable()) {
            return Err(AttachError::Exiting { pid });
        }
        let mut ranked = Vec::new();
        for task in tasks.iter().filter(|task| task.is_stoppable()) {
            let Some(rank) = task.disturbance(pid) else {
                continue;
            };
            ranked.push((rank, task.tid));
            if rank == Disturbance::None || ranked.len() == THREADS_LOOKED_AT {
                break;
            }
        }
        if !ranked.is_empty() {
            // Stable: the leader stays first among equals.
            ranked.sort_by_key(|&(rank, _)| rank);
            return Ok(ranked.into_iter().map(|(_, tid)| tid).collect());
        }
        if since.elapsed() > UNINTERRUPTIBLE_PATIENCE {
            return Err(AttachError::Uninterruptible { pid });
        }
        std::thread::sleep(LOOK_AGAIN);
    }
}

/// A process that may be taken, as far as can be known from outside.
#[derive(Debug)]
pub(super) struct Target {
    pub(super) pid: i32,
    pub(super) pidfd: OwnedFd,
    /// The instruction that calls are made with.
    pub(super) syscall: Syscall,
    /// A seccomp filter that it has, or is about to get, may be suspended.
    pub(super) may_suspend_seccomp: bool,
}

impl Target {
    /// Looks at a process as every injection needs it; waits for the end of an exec.
    pub(super) fn open(pid: i32) -> Result<Self, AttachError> {
        let since = Instant::now();
        loop {
            let before = procfs::image(pid).ok();
            let error = match Self::look(pid) {
                Err(e @ (AttachError::NoVdso { .. } | AttachError::Exiting { .. })) => e,
                result => return result,
            };
            // Half of what was seen may be of one program, half of the next.
            let execs = !is_ending(pid, pid)
                && (procfs::loads_a_program(pid).unwrap_or(false)
                    || procfs::image(pid).ok() != before);
            if !execs {
                return Err(error);
            }
            if since.elapsed() > EXEC_PATIENCE {
                return Err(AttachError::Changed { pid });
            }
            std::thread::sleep(LOOK_AGAIN);
        }
    }

    fn look(pid: i32) -> Result<Self, AttachError> {
        let pidfd = open_pidfd(pid)?;
        let tasks = tasks(pid);
        if tasks.iter().any(|task| task.flags & PF_KTHREAD != 0) {
            return Err(AttachError::KernelThread { pid });
        }
        let Some(alive) = tasks.iter().find(|task| task.is_stoppable()) else {
            return Err(AttachError::Exiting { pid });
        };
        refuse_if_traced(pid, &tasks)?;
        let mem = open_mem(pid, alive.tid)?;
        let syscall = syscall_instruction(pid, alive.tid, &mem)?;
        let filtered = tasks.iter().any(|task| {
            status_field(pid, task.tid, "Seccomp").is_some_and(|mode| mode.trim() != "0")
        });
        let may_suspend_seccomp = may_suspend_seccomp();
        if filtered && !may_suspend_seccomp {
            return Err(AttachError::Seccomp { pid });
        }
        Ok(Self {
            pid,
            pidfd,
            syscall,
            may_suspend_seccomp,
        })
    }

    /// Looks at a process as the first taking needs it, in addition.
    pub(super) fn open_to_take(pid: i32) -> Result<Self, AttachError> {
        let target = Self::open(pid)?;
        if is_frozen(pid) {
            return Err(AttachError::Frozen { pid });
        }
        refuse_borrowed_memory(pid)?;
        refuse_without_descriptors(pid)?;
        refuse_without_address_space(pid)?;
        refuse_without_threads(pid)?;
        refuse_if_it_uses_userfaultfd(pid, target.pidfd.as_fd())?;
        Ok(target)
    }
}

fn open_pidfd(pid: i32) -> Result<OwnedFd, AttachError> {
    if pid <= 0 {
        return Err(AttachError::NoSuchProcess { pid });
    }
    if u32::try_from(pid) == Ok(std::process::id()) {
        return Err(AttachError::Myself { pid });
    }
    let leader = status_field(pid, pid, "Tgid").and_then(|text| text.trim().parse().ok());
    if let Some(leader) = leader.filter(|&leader: &i32| leader != pid) {
        return Err(AttachError::IsAThread {
            tid: pid,
            pid: leader,
        });
    }
    fds::open_process(pid).map_err(|errno| match errno {
        libc::ESRCH | libc::EINVAL | libc::ENOENT => AttachError::NoSuchProcess { pid },
        other => AttachError::kernel(pid, "pidfd_open", other),
    })
}

/// Whether a thread is under a seccomp filter; also where that cannot be known.
pub(super) fn is_filtered(pid: i32, tid: i32) -> bool {
    let Ok(text) = fs::read(format!("/proc/{pid}/task/{tid}/status")) else {
        return true;
    };
    // A kernel that has none says nothing of them.
    field(&String::from_utf8_lossy(&text), "Seccomp").is_some_and(|mode| mode.trim() != "0")
}

/// A line of a thread's status file, behind its name and colon. The id may be a thread's, too.
fn status_field(pid: i32, tid: i32, name: &str) -> Option<String> {
    let text = fs::read(format!("/proc/{pid}/task/{tid}/status")).ok()?;
    field(&String::from_utf8_lossy(&text), name)
}

fn field(text: &str, name: &str) -> Option<String> {
    text.lines()
        .find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))
        .map(str::to_owned)
}

fn refuse_if_traced(pid: i32, tasks: &[Task]) -> Result<(), AttachError> {
    match tasks.iter().find_map(|task| tracer_of(pid, task.tid)) {
        // A thread of ours that was left alone when its time was up, and has not let go yet.
        Some(tracer) if fs::exists(format!("/proc/self/task/{tracer}")).unwrap_or(false) => {
            Err(AttachError::Busy {
                pid,
                what: "what was begun before",
            })
        }
        Some(tracer) => Err(AttachError::TracedBy { pid, tracer }),
        None => Ok(()),
    }
}

/// Who traces a thread.
fn tracer_of(pid: i32, tid: i32) -> Option<i32> {
    let tracer = status_field(pid, tid, "TracerPid")?.trim().parse().ok()?;
    (tracer != 0).then_some(tracer)
}

/// A process's memory, through a thread that lives; asks for the same rights as tracing does.
fn open_mem(pid: i32, tid: i32) -> Result<TargetMem, AttachError> {
    let path = format!("/proc/{pid}/task/{tid}/mem");
    let mem = fs::OpenOptions::new().read(true).write(true).open(path);
    match mem.map_err(|e| e.raw_os_error()) {
        Ok(mem) => Ok(TargetMem::from_owned(OwnedFd::from(mem))),
        Err(Some(libc::EACCES | libc::EPERM)) => Err(not_permitted(pid)),
        Err(_) => Err(AttachError::Exiting { pid }),
    }
}

/// Why ptrace access was refused, in words.
fn not_permitted(pid: i32) -> AttachError {
    let effective = |ids: &str| ids.split_ascii_whitespace().nth(1)?.parse().ok();
    let theirs: Option<u32> = status_field(pid, pid, "Uid").and_then(|ids| effective(&ids));
    let ours: Option<u32> = own_status_field("Uid").and_then(|ids| effective(&ids));
    let yama = fs::read_to_string("/proc/sys/kernel/yama/ptrace_scope");
    let yama = yama.as_deref().map_or("0", str::trim);
    let why = match (theirs, ours) {
        (Some(theirs), Some(ours)) if theirs != ours && ours != 0 => format!(
            "it belongs to user {theirs} and holo runs as user {ours}: run holo as that user or as root"
        ),
        _ if yama == "3" => {
            "kernel.yama.ptrace_scope is 3, so no process may be taken until the next boot".to_owned()
        }
        _ if yama != "0" => format!(
            "kernel.yama.ptrace_scope is {yama}: run holo as root, start the program with holo-exec, or set it \
             to 0"
        ),
        (_, Some(ours)) if ours != 0 => {
            "the program forbids it (it has more rights than you, or made itself undumpable): run holo as root"
                .to_owned()
        }
        _ => "holo lacks CAP_SYS_PTRACE over it (a container, a user namespace or a security module): run holo \
              as root outside of containers"
            .to_owned(),
    };
    AttachError::NotPermitted { pid, why }
}

/// Why a thread could not be traced although it looked as if it could.
pub(super) fn why_denied(pid: i32) -> AttachError {
    let tasks = tasks(pid);
    if let Err(traced) = refuse_if_traced(pid, &tasks) {
        return traced;
    }
    let Some(alive) = tasks.iter().find(|task| task.is_stoppable()) else {
        return AttachError::Exiting { pid };
    };
    match open_mem(pid, alive.tid) {
        // A thread that ends is refused like one of somebody else.
        Ok(_) | Err(AttachError::Exiting { .. }) => AttachError::Changed { pid },
        Err(refused) => refused,
    }
}

/// Why a stopped thread did not get on.
pub(super) fn why_busy(pid: i32, what: &'static str) -> AttachError {
    if is_frozen(pid) {
        AttachError::Frozen { pid }
    } else {
        AttachError::Busy { pid, what }
    }
}

/// Whether the process looks as if it may make a userfaultfd without help.
pub(super) fn may_make_userfaultfd(pid: i32) -> bool {
    let open = fs::read_to_string("/proc/sys/vm/unprivileged_userfaultfd");
    open.is_ok_and(|open| open.trim() == "1")
        || has_capability(status_field(pid, pid, "CapEff"), CAP_SYS_PTRACE)
}

/// Finds a `syscall` instruction in the vdso.
fn syscall_instruction(pid: i32, tid: i32, mem: &TargetMem) -> Result<Syscall, AttachError> {
    // Through a thread: a leader that ended shows no mappings.
    let text = fs::read(format!("/proc/{pid}/task/{tid}/maps"))
        .map_err(|_| AttachError::Exiting { pid })?;
    if text.is_empty() {
        return Err(AttachError::Exiting { pid });
    }
    let vdso: Option<AddrRange> = mappings(&text)
        .find(|mapping| mapping.name == MapName::Vdso)
        .map(|mapping| mapping.range);
    let Some(vdso) = vdso else {
        return Err(AttachError::NoVdso { pid });
    };
    let mut image = vec![0; super::usize_of(vdso.len().min(VDSO_BYTES_MAX))];
    let read = mem
        .read(vdso.start, &mut image)
        .map_err(|_| AttachError::Exiting { pid })?;
    image.truncate(read);
    match image.get(..5) {
        Some([0x7f, b'E', b'L', b'F', 2]) => {}
        Some([0x7f, b'E', b'L', b'F', 1]) => return Err(AttachError::ThirtyTwoBit { pid }),
        _ => return Err(AttachError::NoVdso { pid }),
    }
    // Whatever it is part of: the processor decodes from where it is sent.
    let found = image.windows(AROUND_BYTES).enumerate();
    let mut found = found.filter(|(_, bytes)| bytes.starts_with(&[0x0f, 0x05]));
    let (at, bytes) = found.next().ok_or(AttachError::NoVdso { pid })?;
    Ok(Syscall {
        at: vdso.start.offset(at as u64),
        bytes: bytes.try_into().map_err(|_| AttachError::NoVdso { pid })?,
    })
}

/// A line of the calling thread's status file: rights belong to threads.
fn own_status_field(name: &str) -> Option<String> {
    let text = fs::read_to_string("/proc/thread-self/status").ok()?;
    field(&text, name)
}

fn may_suspend_seccomp() -> bool {
    has_capability(own_status_field("CapEff"), CAP_SYS_ADMIN)
        && own_status_field("Seccomp").is_some_and(|mode| mode.trim() == "0")
}

fn has_capability(set: Option<String>, number: u32) -> bool {
    set.and_then(|hex| u64::from_str_radix(hex.trim(), 16).ok())
        .is_some_and(|set| set >> number & 1 == 1)
}

/// Whether the process's cgroup is frozen, in either hierarchy, where they are mounted as usual.
fn is_frozen(pid: i32) -> bool {
    let groups = fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap_or_default();
    groups.lines().any(|line| {
        let mut parts = line.splitn(3, ':').skip(1);
        let (Some(controllers), Some(path)) = (parts.next(), parts.next()) else {
            return false;
        };
        let says = |file: String, word: &str| {
            fs::read_to_string(file).is_ok_and(|text| text.lines().any(|line| line == word))
        };
        if controllers.is_empty() {
            ["/sys/fs/cgroup", "/sys/fs/cgroup/unified"]
                .iter()
                .any(|root| says(format!("{root}{path}/cgroup.events"), "frozen 1"))
        } else {
            controllers.split(',').any(|name| name == "freezer")
                && says(
                    format!("/sys/fs/cgroup/freezer{path}/freezer.state"),
                    "FROZEN",
                )
        }
    })
}

/// Refuses the child of a vfork: its memory is its parent's until it starts its program.
fn refuse_borrowed_memory(pid: i32) -> Result<(), AttachError> {
    let Ok(owner) = procfs::parent_of(pid) else {
        return Err(AttachError::Exiting { pid });
    };
    let lends = |task: &Task| {
        task.state == b'D'
            && waits_in(owner, task.tid).is_some_and(|call| {
                [libc::SYS_vfork, libc::SYS_clone, libc::SYS_clone3].contains(&call)
            })
    };
    if fds::share_memory(pid, owner) && tasks(owner).iter().any(lends) {
        return Err(AttachError::ForeignMm { pid, owner });
    }
    Ok(())
}

/// One of the process's limits, by its name in `/proc`; the greatest number for none.
fn limit_of(pid: i32, name: &str) -> Option<u64> {
    let text = fs::read_to_string(format!("/proc/{pid}/limits")).ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix(name))?;
    let soft = line.split_ascii_whitespace().next()?;
    Some(soft.parse().unwrap_or(u64::MAX))
}

/// How many descriptors the process may have.
pub(super) fn descriptor_limit(pid: i32) -> Option<u64> {
    limit_of(pid, "Max open files")
}

/// How many bytes the process may map.
pub(super) fn address_space_limit(pid: i32) -> Option<u64> {
    limit_of(pid, "Max address space")
}

/// How many bytes the process may lock.
pub(super) fn locked_limit(pid: i32) -> Option<u64> {
    limit_of(pid, "Max locked memory")
}

fn table_size(pid: i32) -> Option<u64> {
    status_field(pid, pid, "FDSize")?.trim().parse().ok()
}

fn refuse_without_descriptors(pid: i32) -> Result<(), AttachError> {
    let (Some(limit), Some(table)) = (descriptor_limit(pid), table_size(pid)) else {
        return Ok(());
    };
    if table.saturating_add(DESCRIPTORS_NEEDED) <= limit {
        // The table can grow: no need to count.
        return Ok(());
    }
    let Ok(open) = fs::read_dir(format!("/proc/{pid}/fd")) else {
        return Ok(());
    };
    let below = |name: &str| name.parse().is_ok_and(|fd: u64| fd < limit);
    let used = open
        .filter_map(|entry| entry.ok()?.file_name().to_str().map(below))
        .filter(|&below| below)
        .count() as u64;
    if used + DESCRIPTORS_NEEDED > limit {
        return Err(AttachError::LimitNoFile { pid, limit });
    }
    Ok(())
}

/// Whether the process may map the little that holo needs for a moment.
pub(super) fn has_address_space(pid: i32) -> bool {
    let mapped = status_field(pid, pid, "VmSize");
    let mapped = mapped.and_then(|kib| kib.trim().strip_suffix(" kB")?.parse::<u64>().ok());
    let (Some(mapped), Some(limit)) = (mapped, address_space_limit(pid)) else {
        return true;
    };
    mapped * 1024 + BYTES_NEEDED <= limit
}

fn refuse_without_address_space(pid: i32) -> Result<(), AttachError> {
    if has_address_space(pid) {
        return Ok(());
    }
    let limit = address_space_limit(pid).unwrap_or(0);
    Err(AttachError::LimitAs { pid, limit })
}

/// A ring is made at the first eviction only, long after the process was taken: where it is known now that it
/// cannot be, the process is not taken at all.
fn refuse_without_threads(pid: i32) -> Result<(), AttachError> {
    if is_over_its_threads(pid) || groups_over_their_threads(pid) {
        return Err(AttachError::LimitNproc { pid });
    }
    Ok(())
}

/// RLIMIT_NPROC counts all threads of a user, and neither root's nor those of whoever may exceed limits.
fn is_over_its_threads(pid: i32) -> bool {
    let user = |pid| {
        let ids = status_field(pid, pid, "Uid")?;
        ids.split_ascii_whitespace().next()?.parse::<u32>().ok()
    };
    let (Some(limit), Some(uid)) = (limit_of(pid, "Max processes"), user(pid)) else {
        return false;
    };
    if uid == 0 || has_right(pid, CAP_SYS_RESOURCE) || has_right(pid, CAP_SYS_ADMIN) {
        return false;
    }
    let is_over = |threads: Option<u64>| threads.is_none_or(|n| n + THREADS_NEEDED > limit);
    if !is_over(threads_of_all()) {
        // No need to count the user's own.
        return false;
    }
    let everyone = procfs::everyone().unwrap_or_default();
    let threads = everyone.into_iter().filter_map(|other| {
        let text = fs::read(format!("/proc/{other}/status")).ok()?;
        let text = String::from_utf8_lossy(&text).into_owned();
        let owner = field(&text, "Uid")?;
        let owner: u32 = owner.split_ascii_whitespace().next()?.parse().ok()?;
        let threads: u64 = field(&text, "Threads")?.trim().parse().ok()?;
        (owner == uid).then_some(threads)
    });
    is_over(Some(threads.sum()))
}

/// Threads on the whole machine.
fn threads_of_all() -> Option<u64> {
    let text = fs::read_to_string("/proc/loadavg").ok()?;
    let (_, all) = text.split_ascii_whitespace().nth(3)?.split_once('/')?;
    all.parse().ok()
}

/// Whether its control group, or one around it, may have no further threads. Where they are mounted as usual.
fn groups_over_their_threads(pid: i32) -> bool {
    let number = |file: PathBuf| fs::read_to_string(file).ok()?.trim().parse::<u64>().ok();
    let is_over = |folder: &Path| {
        let (Some(most), Some(now)) = (
            number(folder.join("pids.max")),
            number(folder.join("pids.current")),
        ) else {
            return false; // none, or no limit ("max")
        };
        now + THREADS_NEEDED > most
    };
    let groups = fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap_or_default();
    groups.lines().any(|line| {
        let mut parts = line.splitn(3, ':').skip(1);
        let (Some(controllers), Some(path)) = (parts.next(), parts.next()) else {
            return false;
        };
        let tops: &[&str] = if controllers.is_empty() {
            &["/sys/fs/cgroup", "/sys/fs/cgroup/unified"]
        } else if controllers.split(',').any(|name| name == "pids") {
            &["/sys/fs/cgroup/pids"]
        } else {
            &[]
        };
        tops.iter().any(|top| {
            let group = PathBuf::from(format!("{top}{path}"));
            let around = group.ancestors().take_while(|at| at.starts_with(top));
            around.into_iter().any(is_over)
        })
    })
}

/// Whether a thread of the process may make an io_uring, as far as settings say: the kernel asks the same.
pub(super) fn may_make_ring(pid: i32) -> bool {
    let read = |name| fs::read_to_string(format!("/proc/sys/kernel/{name}")).unwrap_or_default();
    let group = read("io_uring_group").trim().parse::<u32>().ok();
    // Its real, effective, saved and file system group: the kernel looks at the last.
    let own = status_field(pid, pid, "Gid").unwrap_or_default();
    let others = status_field(pid, pid, "Groups").unwrap_or_default();
    let own = own.split_ascii_whitespace().nth(3);
    let mut all = own.into_iter().chain(others.split_ascii_whitespace());
    match read("io_uring_disabled").trim() {
        "1" => {
            has_right(pid, CAP_SYS_ADMIN)
                || group.is_some_and(|group| all.any(|id| id.parse() == Ok(group)))
        }
        "2" => false,
        _ => true,
    }
}

/// Whether the process has a right over the whole machine.
fn has_right(pid: i32, capability: u32) -> bool {
    let namespace = fs::read_link(format!("/proc/{pid}/ns/user"));
    namespace.is_ok_and(|name| name.as_os_str() == FIRST_USER_NAMESPACE)
        && has_capability(status_field(pid, pid, "CapEff"), capability)
}

/// The number from which the descriptor that stays is to be looked for: high, so that the program's own
/// stay as low as they would be, but within the table that it has. A larger table has to be made with all
/// threads looking on, which takes milliseconds.
pub(super) fn high_descriptor(pid: i32) -> u64 {
    let limit = descriptor_limit(pid).unwrap_or(64);
    let top = table_size(pid).unwrap_or(64).min(limit);
    (top.saturating_sub(NUMBERS_TRIED)..top)
        .rev()
        .find(|fd| fs::symlink_metadata(format!("/proc/{pid}/fd/{fd}")).is_err())
        .unwrap_or(top / 2)
}

fn refuse_if_it_uses_userfaultfd(pid: i32, pidfd: BorrowedFd<'_>) -> Result<(), AttachError> {
    if userfaultfds(pid).any(|number| serves_its_memory(pid, pidfd, number)) {
        return Err(AttachError::UsesUserfaultfd { pid });
    }
    let mut text = Vec::new();
    let Ok(()) = ProcMaps::open_smaps(pid).and_then(|maps| maps.read_into(&mut text)) else {
        return Ok(());
    };
    let served = smaps(&text).any(|mapping| {
        [VmFlags::UFFD_MISSING, VmFlags::UFFD_WP, VmFlags::UFFD_MINOR]
            .iter()
            .any(|&flag| mapping.flags.has(flag))
    });
    if served {
        return Err(AttachError::UsesUserfaultfd { pid });
    }
    Ok(())
}

/// Numbers of the userfaultfds that a process has open.
fn userfaultfds(pid: i32) -> impl Iterator<Item = i32> {
    let open = fs::read_dir(format!("/proc/{pid}/fd"));
    open.into_iter().flatten().filter_map(|entry| {
        let entry = entry.ok()?;
        let link = fs::read_link(entry.path()).ok()?;
        let number = entry.file_name().to_str()?.parse().ok()?;
        link.to_string_lossy()
            .ends_with("[userfaultfd]")
            .then_some(number)
    })
}

/// Whether a userfaultfd that a process has open may be somebody's who serves its memory. A child has what its
/// parent had, also after the parent's end, and also what we left in the parent.
fn serves_its_memory(pid: i32, pidfd: BorrowedFd<'_>, number: i32) -> bool {
    if fds::is_one_of_ours(pid, number) {
        return false;
    }
    match fds::copy_out(pidfd, u64::try_from(number).unwrap_or(u64::MAX)) {
        Ok(copy) => Uffd::from_owned(copy).unprotect(NOWHERE, false) != Err(UffdError::Gone),
        // An exec has closed it, or the end.
        Err(errno) => !matches!(errno, libc::EBADF | libc::ESRCH),
    }
}

/// Whether there is such a process, and it is not us.
pub(super) fn exists(pid: i32) -> Result<(), AttachError> {
    open_pidfd(pid).map(drop)
}

/// Whether a thread sleeps where no signal wakes it.
pub(super) fn sleeps_deeply(pid: i32, tid: i32) -> bool {
    Task::read(pid, tid).is_some_and(|task| task.state == b'D')
}

/// Whether a thread has ended or is about to.
pub(super) fn is_ending(pid: i32, tid: i32) -> bool {
    Task::read(pid, tid).is_none_or(|task| !task.is_stoppable())
}
