//! Why a process cannot be taken, in words for the person who asked.

use std::io;

/// Why a process was not taken. Whatever is said here, the process goes on as if nothing had happened.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AttachError {
    /// No such process, or not any more.
    #[error("there is no process {pid}: it may have ended; `ps -e` lists those that run")]
    NoSuchProcess {
        /// The id that was asked for.
        pid: i32,
    },
    /// The id is a thread's.
    #[error("{tid} is a thread of process {pid}: give the process id {pid} instead")]
    IsAThread {
        /// The id that was asked for.
        tid: i32,
        /// The process it belongs to.
        pid: i32,
    },
    /// The caller itself.
    #[error(
        "process {pid} is holo itself, which cannot page its own memory: give another process id"
    )]
    Myself {
        /// The id that was asked for.
        pid: i32,
    },
    /// A thread of the kernel.
    #[error(
        "process {pid} is a thread of the kernel and has no memory of its own: give a program's process id"
    )]
    KernelThread {
        /// The id that was asked for.
        pid: i32,
    },
    /// A program for the 32-bit instruction set, or one that runs such code now.
    #[error(
        "process {pid} runs 32-bit code; holo pages 64-bit programs only: use a 64-bit build of the program"
    )]
    ThirtyTwoBit {
        /// The id that was asked for.
        pid: i32,
    },
    /// The kernel gives the process no vdso, where the `syscall` instruction is taken from.
    #[error(
        "process {pid} has no vdso, which holo needs to make system calls in it: boot without `vdso=0`, or \
         start the program again"
    )]
    NoVdso {
        /// The id that was asked for.
        pid: i32,
    },
    /// The process ended or is ending.
    #[error("process {pid} is ending or has just ended: there is nothing left to take")]
    Exiting {
        /// The id that was asked for.
        pid: i32,
    },
    /// Its first thread has ended, the others go on.
    #[error(
        "the first thread of process {pid} has ended, and the kernel no longer says how much memory the process has: \
         it cannot be limited; have `main` wait for the other threads (pthread_join) rather than end"
    )]
    FirstThreadEnded {
        /// The id that was asked for.
        pid: i32,
    },
    /// A thread ended, or the process started another program, while it was being taken.
    #[error("process {pid} ended a thread or started another program at that moment: try again")]
    Changed {
        /// The id that was asked for.
        pid: i32,
    },
    /// Another process traces it.
    #[error(
        "process {pid} is traced by process {tracer} (a debugger, strace, or another holo): detach that one, \
         then try again; it can come back afterwards"
    )]
    TracedBy {
        /// The id that was asked for.
        pid: i32,
        /// The tracer.
        tracer: i32,
    },
    /// The rights are missing.
    #[error("no right to take process {pid}: {why}")]
    NotPermitted {
        /// The id that was asked for.
        pid: i32,
        /// Cause and remedy.
        why: String,
    },
    /// No thread of it can be stopped now.
    #[error(
        "no thread of process {pid} can be stopped now: each waits in the kernel, uninterruptibly (state D: a \
         disk, a network file system, a vfork); try again, and look at /proc/{pid}/stack if it stays"
    )]
    Uninterruptible {
        /// The id that was asked for.
        pid: i32,
    },
    /// Its cgroup is frozen.
    #[error("process {pid} is in a frozen cgroup and can run nothing: thaw it, then try again")]
    Frozen {
        /// The id that was asked for.
        pid: i32,
    },
    /// The process serves or registers faults itself, or has opened what it takes to do so.
    #[error(
        "process {pid} uses userfaultfd itself (or another program pages it), and memory can have one such \
         server only: stop that use, or leave the process alone"
    )]
    UsesUserfaultfd {
        /// The id that was asked for.
        pid: i32,
    },
    /// No userfaultfd can be made for it.
    #[error("userfaultfd cannot be had for process {pid}: {why}")]
    UserfaultfdOff {
        /// The id that was asked for.
        pid: i32,
        /// Cause and remedy.
        why: String,
    },
    /// No io_uring can be made in it.
    #[error("io_uring cannot be had in process {pid}: {why}")]
    IoUringOff {
        /// The id that was asked for.
        pid: i32,
        /// Cause and remedy.
        why: String,
    },
    /// It has no descriptor left.
    #[error(
        "process {pid} has all the descriptors open that it may have ({limit}): raise its limit with \
         `prlimit --pid {pid} --nofile=…`, then try again"
    )]
    LimitNoFile {
        /// The id that was asked for.
        pid: i32,
        /// Its RLIMIT_NOFILE.
        limit: u64,
    },
    /// Its user may have no further thread.
    #[error(
        "the user of process {pid} may have no two further threads, which eviction needs: raise the limit with \
         `prlimit --pid {pid} --nproc=…`, or the pids.max of its cgroup, then try again"
    )]
    LimitNproc {
        /// The id that was asked for.
        pid: i32,
    },
    /// It may map nothing more.
    #[error(
        "process {pid} has as much address space as it may have ({limit} bytes), and holo needs a page of it for a \
         moment: raise its limit with `prlimit --pid {pid} --as=…`, then try again"
    )]
    LimitAs {
        /// The id that was asked for.
        pid: i32,
        /// Its RLIMIT_AS, bytes.
        limit: u64,
    },
    /// It locks what it maps, and may lock nothing more.
    #[error(
        "process {pid} locks all that is mapped in it (mlockall), and may lock no more than it has ({limit} bytes): \
         raise its limit with `prlimit --pid {pid} --memlock=…`, then try again; what is locked stays in RAM"
    )]
    LimitMemlock {
        /// The id that was asked for.
        pid: i32,
        /// Its RLIMIT_MEMLOCK, bytes.
        limit: u64,
    },
    /// A seccomp filter stands in the way.
    #[error(
        "process {pid} is under a seccomp filter that may refuse holo's system calls or kill the process for \
         them: run holo with CAP_SYS_ADMIN, and itself without a filter, so that it can suspend the filter for \
         the moment"
    )]
    Seccomp {
        /// The id that was asked for.
        pid: i32,
    },
    /// The memory is another process's, lent until exec.
    #[error(
        "process {pid} runs on the memory of process {owner} until it starts its program (vfork): try again \
         in a moment, or take process {owner}"
    )]
    ForeignMm {
        /// The id that was asked for.
        pid: i32,
        /// Whose memory it is.
        owner: i32,
    },
    /// A thread did not stop, or a call in the process did not end, within the time limit.
    #[error(
        "process {pid} did not finish `{what}` in time; it goes on undisturbed, and what was begun in it is \
         undone when it answers: try again"
    )]
    Busy {
        /// The id that was asked for.
        pid: i32,
        /// What was waited for.
        what: &'static str,
    },
    /// The kernel refused for a reason that holo has no words for.
    #[error("`{op}` for process {pid} failed: {}: see errno {errno} in the call's manual page", io::Error::from_raw_os_error(*.errno))]
    Kernel {
        /// The id that was asked for.
        pid: i32,
        /// The call.
        op: &'static str,
        /// What it said.
        errno: i32,
    },
}

impl AttachError {
    /// Whether it passes by itself, as a rule: the process is about to do, or to end, something.
    #[must_use]
    pub const fn is_passing(&self) -> bool {
        match self {
            Self::NoSuchProcess { .. }
            | Self::Exiting { .. }
            | Self::Changed { .. }
            | Self::TracedBy { .. }
            | Self::Uninterruptible { .. }
            | Self::Frozen { .. }
            | Self::ForeignMm { .. }
            | Self::Busy { .. } => true,
            Self::IsAThread { .. }
            | Self::Myself { .. }
            | Self::KernelThread { .. }
            | Self::ThirtyTwoBit { .. }
            | Self::NoVdso { .. }
            | Self::FirstThreadEnded { .. }
            | Self::NotPermitted { .. }
            | Self::UsesUserfaultfd { .. }
            | Self::UserfaultfdOff { .. }
            | Self::IoUringOff { .. }
            | Self::LimitNoFile { .. }
            | Self::LimitNproc { .. }
            | Self::LimitAs { .. }
            | Self::LimitMemlock { .. }
            | Self::Seccomp { .. }
            | Self::Kernel { .. } => false,
        }
    }

    /// An errno without a better meaning.
    pub(super) const fn kernel(pid: i32, op: &'static str, errno: i32) -> Self {
        Self::Kernel { pid, op, errno }
    }
}
