//! Small facts of `/proc`, read again and again through a kept descriptor without allocating.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;

use holo_proto::{Addr, SUBPAGE_BYTES};

use super::errno;
use super::maps::{decimal, kib};

/// Sizes of an address space, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MemorySample {
    /// Mapped.
    pub size_bytes: u64,
    /// Resident. The kernel counts in batches for each thread: may be off by some hundred KiB a thread.
    pub resident_bytes: u64,
    /// The part of the resident bytes that is of files or shared.
    pub shared_bytes: u64,
}

/// An open `/proc/PID/statm`.
#[derive(Debug)]
pub struct Statm(File);

impl Statm {
    /// Opens it.
    ///
    /// # Errors
    /// ENOENT without such a process.
    pub fn open(pid: i32) -> io::Result<Self> {
        File::open(format!("/proc/{pid}/statm")).map(Self)
    }

    /// The sizes now; one system call. All zero once the address space is gone.
    ///
    /// # Errors
    /// ESRCH once the process is reaped.
    pub fn sample(&self) -> io::Result<MemorySample> {
        let mut text = [0; 256];
        let len = read_at_start(&self.0, &mut text)?;
        let mut numbers = text[..len]
            .split(|&b| b == b' ')
            .map(|word| decimal(word).map_or(0, |(n, _)| n * SUBPAGE_BYTES));
        let mut next = || numbers.next().unwrap_or(0);
        Ok(MemorySample {
            size_bytes: next(),
            resident_bytes: next(),
            shared_bytes: next(),
        })
    }
}

/// An open `/proc/PID/task`, with room for its entries: who lists threads allocates nothing.
#[derive(Debug)]
pub struct Tasks {
    task: File,
    entries: Box<[u64]>,
}

/// Room for the directory entries of one system call: some 2,000.
const ENTRIES_BYTES: usize = 64 << 10;
/// Where threads end without a pause the list is taken as it is, after so many.
const LISTED_MOST: usize = 32;
/// Where `struct linux_dirent64` has the directory's position behind it, its length and its name.
const ENTRY_NEXT_AT: usize = 8;
const ENTRY_LEN_AT: usize = 16;
const ENTRY_NAME_AT: usize = 19;

impl Tasks {
    /// Opens it.
    ///
    /// # Errors
    /// ENOENT without such a process.
    pub fn open(pid: i32) -> io::Result<Self> {
        let task = File::open(format!("/proc/{pid}/task"))?;
        let entries = vec![0; ENTRIES_BYTES / 8].into_boxed_slice();
        Ok(Self { task, entries })
    }

    /// Calls `see` with the id of each thread, of some more than once. A thread that starts or ends meanwhile may be in or
    /// not; zombies are in. After an exec by a thread that is not the leader it lists the new process.
    ///
    /// The kernel goes from thread to thread, and where the one that it stands at has ended the list ends too: who comes after
    /// it is passed over, living or not (seen on 6.18; `proc_task_readdir` and `next_tid` in fs/proc/base.c). There are two such
    /// places: at the last thread named, which is gone then, and at one that ended before it was named, which counts in
    /// the directory's position. So it is listed again until the last one named lives and as many are named as the position says.
    /// With more threads than there is room for, a second call may pass over some.
    ///
    /// # Errors
    /// ESRCH or ENOENT when the process is gone.
    pub fn for_each(&mut self, mut see: impl FnMut(i32)) -> io::Result<()> {
        for _ in 0..LISTED_MOST {
            if self.list(&mut see)? {
                break;
            }
        }
        Ok(())
    }

    /// Whether nobody was passed over, of as many as there is room for.
    fn list(&mut self, see: &mut impl FnMut(i32)) -> io::Result<bool> {
        let fd = self.task.as_raw_fd();
        // SAFETY: moves the descriptor's position only, which `&mut self` owns.
        if unsafe { libc::lseek(fd, 0, libc::SEEK_SET) } < 0 {
            return Err(io::Error::last_os_error());
        }
        let (mut is_whole, mut named) = (true, 0);
        loop {
            let (entries, room) = (self.entries.as_mut_ptr(), size_of_val(&*self.entries));
            // SAFETY: the buffer is valid for writes of its size during the call.
            let got = unsafe { libc::syscall(libc::SYS_getdents64, fd, entries, room) };
            let len = match usize::try_from(got) {
                Ok(0) => return Ok(is_whole),
                Ok(len) => len,
                Err(_) if errno() == libc::EINTR => continue,
                Err(_) => return Err(io::Error::last_os_error()),
            };
            let byte = |i: usize| self.entries[i / 8].to_le_bytes()[i % 8];
            let (mut at, mut last, mut position) = (0, None, 0);
            while at + ENTRY_NAME_AT < len {
                let mut name = (at + ENTRY_NAME_AT..len).map(byte).take_while(|&b| b != 0);
                let tid = name.try_fold(0_i32, |n, b| {
                    if !b.is_ascii_digit() {
                        return None;
                    }
                    n.checked_mul(10)?.checked_add(i32::from(b - b'0'))
                });
                if let Some(tid) = tid.filter(|&tid| tid > 0) {
                    see(tid);
                    last = Some(tid);
                }
                named += 1;
                position = self.entries[(at + ENTRY_NEXT_AT) / 8];
                let step = usize::from(byte(at + ENTRY_LEN_AT))
                    | usize::from(byte(at + ENTRY_LEN_AT + 1)) << 8;
                if step == 0 {
                    break;
                }
                at += step;
            }
            let has_ended =
                |tid| robust_list_of(tid).is_err_and(|e| e.raw_os_error() == Some(libc::ESRCH));
            is_whole &= position == named && !last.is_some_and(has_ended);
        }
    }
}

/// Where the thread keeps its list of robust futexes; in the same mapping its thread id is cleared at its
/// exit with faults forbidden. `None` when it has none.
///
/// # Errors
/// ESRCH when it is gone, EPERM without ptrace access.
pub fn robust_list_of(tid: i32) -> io::Result<Option<Addr>> {
    let mut head = 0_u64;
    let mut len = 0_usize;
    // SAFETY: both words are valid for writes during the call.
    let r = unsafe { libc::syscall(libc::SYS_get_robust_list, tid, &raw mut head, &raw mut len) };
    if r != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok((head != 0).then_some(Addr(head)))
}

/// The letter of what a process does: `R`, `S`, `D`, `T` (stopped), `t` (stopped by a tracer), `Z`...
///
/// # Errors
/// ENOENT without such a process.
pub fn state_of(pid: i32) -> io::Result<u8> {
    let invalid = || io::ErrorKind::InvalidData.into();
    let file = File::open(format!("/proc/{pid}/stat"))?;
    let mut text = [0; 1024];
    let len = read_at_start(&file, &mut text)?;
    let end = text[..len].iter().rposition(|&b| b == b')');
    // Behind ") ".
    end.and_then(|end| text[..len].get(end + 2).copied())
        .ok_or_else(invalid)
}

/// The process of a thread.
///
/// # Errors
/// ENOENT without such a thread.
pub fn process_of(tid: i32) -> io::Result<i32> {
    let text = std::fs::read_to_string(format!("/proc/{tid}/status"))?;
    let line = text.lines().find_map(|l| l.strip_prefix("Tgid:"));
    let pid = line.and_then(|l| l.trim().parse().ok());
    pid.ok_or_else(|| io::ErrorKind::InvalidData.into())
}

/// Whether a thread waits though it is in no system call: in a fault, then.
///
/// # Errors
/// ENOENT without such a thread, EPERM without ptrace access to it.
pub fn waits_outside_calls(tid: i32) -> io::Result<bool> {
    let text = std::fs::read_to_string(format!("/proc/{tid}/syscall"))?;
    Ok(text.split_ascii_whitespace().next() == Some("-1"))
}

/// The pid namespace of a process, by its name.
///
/// # Errors
/// ENOENT without such a process, EACCES without ptrace access to it.
pub fn pid_namespace(pid: &str) -> io::Result<std::path::PathBuf> {
    std::fs::read_link(format!("/proc/{pid}/ns/pid"))
}

/// When the process or thread started, in clock ticks since boot: with its id a name that is never reused.
///
/// # Errors
/// ENOENT without such a process.
pub fn start_time(pid: i32) -> io::Result<u64> {
    stat_fields(pid, [22]).map(|[ticks]| ticks)
}

/// A number for what a process runs: where its code and its stack begin. The same in all processes that
/// share memory and in a fork's child; another one after an exec, unless addresses are not randomized. 0
/// without an address space.
///
/// # Errors
/// ENOENT without such a process.
pub fn image(pid: i32) -> io::Result<u64> {
    let [code, code_end, stack] = stat_fields(pid, [26, 27, 28])?;
    Ok(code ^ code_end.rotate_left(21) ^ stack.rotate_left(42))
}

/// Whether an exec is under way: the memory of the new program is there, but its code has no place yet. Its
/// vdso comes before that.
///
/// # Errors
/// ENOENT without such a process.
pub fn loads_a_program(pid: i32) -> io::Result<bool> {
    let [code] = stat_fields(pid, [26])?;
    Ok(code == 0)
}

/// Whether two processes run on the same memory; false when that cannot be known.
#[must_use]
pub fn share_memory(one: i32, other: i32) -> bool {
    super::fds::share_memory(one, other)
}

/// Ids of all processes, in no order.
///
/// # Errors
/// `/proc` cannot be read.
pub fn everyone() -> io::Result<Vec<i32>> {
    let entries = std::fs::read_dir("/proc")?;
    Ok(entries
        .filter_map(|entry| pid_of(entry.ok()?.file_name().as_encoded_bytes()))
        .collect())
}

/// The parent of a process, as its id.
///
/// # Errors
/// ENOENT without such a process.
pub fn parent_of(pid: i32) -> io::Result<i32> {
    let [parent] = stat_fields(pid, [4])?;
    i32::try_from(parent).map_err(|_| io::ErrorKind::InvalidData.into())
}

/// How much of an address space is pinned for long (`VmPin`): RDMA, registered io_uring buffers, VFIO.
#[derive(Debug)]
pub struct PinCount(File);

impl PinCount {
    /// What is read at once: more than a status is long, but for a process of very many groups.
    const TEXT_BYTES: usize = 16 << 10;

    /// Of the process `pid`, by one of its threads that lives.
    ///
    /// # Errors
    /// ENOENT without such a process; `InvalidData` if none of its threads has memory.
    pub fn open(pid: i32) -> io::Result<Self> {
        for task in std::fs::read_dir(format!("/proc/{pid}/task"))? {
            let count = File::open(task?.path().join("status")).map(Self);
            if let Some(count) = count.ok().filter(|c| c.bytes().is_ok()) {
                return Ok(count);
            }
        }
        Err(io::ErrorKind::InvalidData.into())
    }

    /// Bytes, now.
    ///
    /// # Errors
    /// ESRCH if the thread has ended, `InvalidData` if it is about to.
    pub fn bytes(&self) -> io::Result<u64> {
        let mut text = [0; Self::TEXT_BYTES];
        let len = self.0.read_at(&mut text, 0)?;
        text[..len]
            .split(|&b| b == b'\n')
            .find_map(|line| line.strip_prefix(b"VmPin:"))
            .map(|rest| kib(rest.trim_ascii_start()))
            .ok_or_else(|| io::ErrorKind::InvalidData.into())
    }
}

/// The children of processes.
#[derive(Debug)]
pub struct Children;

impl Children {
    /// Ids of the children of all threads of `pid`, in no order. Children that fork meanwhile may be missing.
    ///
    /// Reads `/proc/PID/task/*/children`; on kernels built without it, the parent of every process.
    ///
    /// # Errors
    /// ENOENT without such a process.
    pub fn list(pid: i32) -> io::Result<Vec<i32>> {
        let mut all = Vec::new();
        for task in std::fs::read_dir(format!("/proc/{pid}/task"))? {
            match std::fs::read(task?.path().join("children")) {
                Ok(text) => all.extend(text.split(|&b| b == b' ').filter_map(pid_of)),
                // The thread ended, or the kernel has no such file.
                Err(e) if e.kind() == io::ErrorKind::NotFound => return Self::list_by_parent(pid),
                Err(e) => return Err(e),
            }
        }
        Ok(all)
    }

    fn list_by_parent(pid: i32) -> io::Result<Vec<i32>> {
        let mut all = everyone()?;
        // One that ended meanwhile is no child.
        all.retain(|&id| parent_of(id).is_ok_and(|parent| parent == pid));
        Ok(all)
    }
}

fn pid_of(text: &[u8]) -> Option<i32> {
    let (number, rest) = decimal(text)?;
    rest.is_empty().then(|| i32::try_from(number).ok())?
}

/// Fields by number (from 1, at least 4) of `/proc/PID/stat`; the name, field 2, may hold anything.
fn stat_fields<const N: usize>(pid: i32, numbers: [usize; N]) -> io::Result<[u64; N]> {
    let file = File::open(format!("/proc/{pid}/stat"))?;
    let mut text = [0; 1024];
    let len = read_at_start(&file, &mut text)?;
    let text = &text[..len];
    let rest = text
        .iter()
        .rposition(|&b| b == b')')
        // Behind ") " comes field 3.
        .and_then(|end| text.get(end + 2..));
    let mut fields = [0; N];
    for (field, number) in fields.iter_mut().zip(numbers) {
        *field = rest
            .and_then(|rest| rest.split(|&b| b == b' ').nth(number - 3))
            .and_then(decimal)
            .map(|(n, _)| n)
            .ok_or(io::ErrorKind::InvalidData)?;
    }
    Ok(fields)
}

fn read_at_start(file: &File, out: &mut [u8]) -> io::Result<usize> {
    loop {
        match file.read_at(out, 0) {
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            result => return result,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::Ordering::SeqCst;
    use std::sync::atomic::{AtomicBool, AtomicI32};

    use super::super::testing::Target;
    use super::*;

    fn me() -> i32 {
        i32::try_from(std::process::id()).unwrap()
    }

    #[test]
    fn touched_memory_shows_in_statm() {
        // A process that does nothing but this.
        let mut target = Target::start();
        let statm = Statm::open(target.pid).unwrap();
        let before = statm.sample().unwrap();
        let range = target.map(4096);
        target.fill(range, 1);
        let after = statm.sample().unwrap();
        assert!(after.resident_bytes >= before.resident_bytes + (15 << 20));
        assert!(after.size_bytes >= after.resident_bytes);
        assert!(after.shared_bytes > 0);
        target.end();
    }

    #[test]
    fn a_list_that_passed_over_nobody_is_not_taken_again() {
        let mut target = Target::start();
        let mut tasks = Tasks::open(target.pid).unwrap();
        for _ in 0..2 {
            let mut seen = Vec::new();
            tasks.for_each(|tid| seen.push(tid)).unwrap();
            assert_eq!(seen, [target.pid]);
        }
        target.end();
        assert!(tasks.for_each(|_| ()).is_err());
    }

    #[test]
    fn every_thread_is_listed_each_time() {
        // Room for all entries, and for some of them.
        let mut few = Tasks::open(me()).unwrap();
        few.entries = vec![0; 512].into_boxed_slice();
        let mut rooms = [Tasks::open(me()).unwrap(), few];
        let (stop, wait) = std::sync::mpsc::channel::<()>();
        let wait = std::sync::Arc::new(std::sync::Mutex::new(wait));
        let (ids, got_ids) = std::sync::mpsc::channel();
        let threads: Vec<_> = (0..300)
            .map(|_| {
                let (wait, ids) = (wait.clone(), ids.clone());
                std::thread::spawn(move || {
                    // SAFETY: passes nothing.
                    ids.send(unsafe { libc::gettid() }).unwrap();
                    let _ = wait.lock().unwrap().recv();
                })
            })
            .collect();
        let want: Vec<i32> = got_ids.iter().take(300).collect();
        for i in [0, 0, 1, 1] {
            let mut seen = Vec::new();
            rooms[i].for_each(|tid| seen.push(tid)).unwrap();
            assert!(want.iter().all(|tid| seen.contains(tid)));
            assert!(seen.contains(&me()));
        }
        drop(stop);
        for thread in threads {
            thread.join().unwrap();
        }
    }

    #[test]
    fn no_thread_is_passed_over_while_others_end() {
        const CREATORS: usize = 4;
        static LIVES: [AtomicI32; CREATORS] = [const { AtomicI32::new(0) }; CREATORS];
        static STOP: AtomicBool = AtomicBool::new(false);
        let creators: Vec<_> = (0..CREATORS)
            .map(|i| {
                std::thread::spawn(move || {
                    let mut draw = 0x9e37_79b9_u64 + i as u64;
                    while !STOP.load(SeqCst) {
                        draw = draw.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(1);
                        let life = std::time::Duration::from_micros(draw >> 33 & 127);
                        let thread = std::thread::spawn(move || {
                            // SAFETY: passes nothing.
                            LIVES[i].store(unsafe { libc::gettid() }, SeqCst);
                            let began = std::time::Instant::now();
                            while began.elapsed() < life {
                                std::hint::spin_loop();
                            }
                            LIVES[i].store(0, SeqCst);
                        });
                        thread.join().unwrap();
                    }
                })
            })
            .collect();
        let mut tasks = Tasks::open(me()).unwrap();
        let who = || LIVES.each_ref().map(|tid| tid.load(SeqCst));
        let (mut lived, mut passed_over) = (0, 0);
        let began = std::time::Instant::now();
        while lived < 100_000 && began.elapsed().as_secs() < 20 {
            let before = who();
            let mut seen = Vec::with_capacity(64);
            tasks.for_each(|tid| seen.push(tid)).unwrap();
            for (tid, after) in before.into_iter().zip(who()) {
                if tid != 0 && tid == after {
                    lived += 1;
                    passed_over += u32::from(!seen.contains(&tid));
                }
            }
        }
        STOP.store(true, SeqCst);
        creators.into_iter().for_each(|c| c.join().unwrap());
        assert!(lived > 10_000, "{lived}");
        assert_eq!(passed_over, 0, "of {lived}");
    }

    #[test]
    fn a_thread_has_its_robust_list_in_its_own_memory() {
        // SAFETY: passes nothing.
        let tid = unsafe { libc::gettid() };
        let at = robust_list_of(tid).unwrap().unwrap();
        let local = 0_u8;
        // glibc keeps it in the thread's descriptor, next to its stack.
        assert!(at.0.abs_diff((&raw const local).addr() as u64) < 16 << 20);
        assert!(robust_list_of(i32::MAX).is_err());
    }

    #[test]
    fn a_child_is_found_and_has_a_start_time() {
        let mut child = std::process::Command::new("sleep")
            .arg("100")
            .spawn()
            .unwrap();
        let id = i32::try_from(child.id()).unwrap();
        let listed = Children::list(me());
        let by_parent = Children::list_by_parent(me());
        let started = start_time(id);
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(listed.unwrap().contains(&id));
        assert!(by_parent.unwrap().contains(&id));
        assert!(started.unwrap() >= start_time(me()).unwrap());
        assert!(start_time(id).is_err());
    }

    #[test]
    fn a_name_that_looks_like_fields_does_not_confuse() {
        let mut target = Target::start();
        let (parent, start) = (
            parent_of(target.pid).unwrap(),
            start_time(target.pid).unwrap(),
        );
        assert_eq!(parent, me());
        let range = target.map(1);
        for (at, byte) in (0..).zip(b") R 1 2 3) 4") {
            target.poke(range.start.offset(at), *byte);
        }
        let name = u64::try_from(libc::PR_SET_NAME).unwrap();
        target.syscall(libc::SYS_prctl, [name, range.start.0, 0, 0, 0]);
        assert_eq!(parent_of(target.pid).unwrap(), parent);
        assert_eq!(start_time(target.pid).unwrap(), start);
    }

    #[test]
    fn a_child_that_has_not_started_a_program_has_its_parents_image() {
        let target = Target::start();
        let mine = image(me()).unwrap();
        assert_ne!(mine, 0);
        assert_eq!(image(target.pid).unwrap(), mine);
        assert!(!share_memory(me(), target.pid));
        let mut other = std::process::Command::new("sleep")
            .arg("100")
            .spawn()
            .unwrap();
        let id = i32::try_from(other.id()).unwrap();
        let (listed, theirs) = (everyone(), image(id));
        other.kill().unwrap();
        other.wait().unwrap();
        assert!(listed.unwrap().contains(&id));
        assert_ne!(theirs.unwrap(), mine);
    }

    #[test]
    fn nothing_is_pinned_here() {
        assert_eq!(PinCount::open(me()).unwrap().bytes().unwrap(), 0);
        assert!(PinCount::open(i32::MAX).is_err());
    }
}
