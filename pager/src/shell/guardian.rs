//! The guardian's work: what must not be cut off half-way.
//!
//! Injecting system calls into a process means changing its registers; a tracer that is killed then
//! leaves a wreck. So the guardian injects, and the pager, the one that people and bugs kill, only asks.
//! The guardian has one thread (between injections), which is what makes starting a successor by
//! `clone` safe.

use std::io::ErrorKind;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixDatagram;
use std::sync::{Arc, Barrier};
use std::time::Duration;

use holo_proto::{PageIndex, SubpageMask};

use super::control::{Control, Record, Scalar};
use super::live::{Command, Queue};
use super::post::Post;
use super::refusals::Refusal;
use crate::sys::attach::{self, AttachError};
use crate::sys::mem::TargetMem;
use crate::sys::pagemap::Pagemap;
use crate::sys::uffd::Uffd;
use crate::sys::{clock, procfs, spawn, table};

/// Requests that a ring holds: a batch with eight runs a page.
const RING_ENTRIES: u32 = 256;
/// How long the pager waits for an answer of a guardian that lives. Longer than it may be kept from the CPU
/// (`docs/decisions/0011-precedence.md`).
const PATIENCE_NS: u64 = 60_000_000_000;
/// How often it looks meanwhile, and otherwise, whether that is so.
const LOOK: Duration = Duration::from_millis(50);

/// Room for a question, and so for so many process ids in it.
const ASK_BYTES: usize = 1024;
pub(crate) const SHARERS_MAX: usize = 64;

/// How long a process is kept still: several times what a batch needs until its pages are offered.
const STILL: Duration = Duration::from_millis(5);

/// What the pager asks of the guardian.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Ask {
    /// Make a userfaultfd in the process. Answer: its number here.
    TakeHold { pid: i32 },
    /// Make a ring in the process of this userfaultfd. Answer: the ring's number.
    MakeRing { pid: i32, uffd: i32 },
    /// Stop all threads for an instant. Answer: microseconds.
    Quiesce { pid: i32 },
    /// Keep all threads stopped for some milliseconds, and those of `sharers`. Answer: microseconds.
    HoldStill {
        pid: i32,
        /// Other processes with the same memory; at most [`SHARERS_MAX`].
        sharers: Vec<i32>,
    },
    /// Make subpages of a process dirty while all its threads are stopped, and those of `sharers`. Answer: the mask of
    /// those that are dirty now.
    Redirty {
        pid: i32,
        /// Its memory and its pagemap, as numbers of descriptors that the pager does not close before the answer.
        mem: i32,
        pagemap: i32,
        page: PageIndex,
        mask: SubpageMask,
        /// Other processes with the same memory; at most [`SHARERS_MAX`].
        sharers: Vec<i32>,
    },
    /// Close the descriptor that the process keeps.
    DropKeeper { pid: i32, keeper: i32 },
}

impl Ask {
    fn encode(&self) -> String {
        match self {
            Self::TakeHold { pid } => format!("hold {pid} 0"),
            Self::MakeRing { pid, uffd } => format!("ring {pid} {uffd}"),
            Self::Quiesce { pid } => format!("quiesce {pid} 0"),
            Self::HoldStill { pid, sharers } => format!("still {pid} 0 {}", list(sharers)),
            Self::Redirty {
                pid,
                mem,
                pagemap,
                page,
                mask,
                sharers,
            } => format!(
                "redirty {pid} {mem} {pagemap} {} {} {}",
                page.0,
                mask.0,
                list(sharers)
            ),
            Self::DropKeeper { pid, keeper } => format!("drop {pid} {keeper}"),
        }
    }

    fn decode(text: &str) -> Option<Self> {
        let mut words = text.split(' ');
        let (kind, pid, arg) = (words.next()?, words.next()?, words.next()?);
        let (pid, arg) = (pid.parse().ok()?, arg.parse().ok()?);
        Some(match kind {
            "hold" => Self::TakeHold { pid },
            "ring" => Self::MakeRing { pid, uffd: arg },
            "quiesce" => Self::Quiesce { pid },
            "still" => Self::HoldStill {
                pid,
                sharers: listed(words.next()?)?,
            },
            "redirty" => {
                let (pagemap, page) = (words.next()?, words.next()?);
                let (mask, sharers) = (words.next()?, words.next()?);
                Self::Redirty {
                    pid,
                    mem: arg,
                    pagemap: pagemap.parse().ok()?,
                    page: PageIndex(page.parse().ok()?),
                    mask: SubpageMask(mask.parse().ok()?),
                    sharers: listed(sharers)?,
                }
            }
            "drop" => Self::DropKeeper { pid, keeper: arg },
            _ => return None,
        })
    }
}

fn list(pids: &[i32]) -> String {
    let pids: Vec<_> = pids.iter().map(i32::to_string).collect();
    pids.join(",")
}

fn listed(text: &str) -> Option<Vec<i32>> {
    let pids = text.split_terminator(',').map(str::parse);
    pids.collect::<Result<_, _>>().ok()
}

/// The pager's end of the line to the guardian.
pub(crate) struct Line {
    post: Post,
    socket: UnixDatagram,
    /// The serving thread's.
    commands: Arc<Queue<Command>>,
    /// Where it rests.
    rest: Arc<Barrier>,
    count: u64,
    next_look_ns: u64,
}

/// Why there is no answer.
enum Unanswered {
    /// A guardian died over it. What it did of it is in the records.
    CutOff,
    No(Refusal),
}

impl Line {
    pub(crate) fn new(
        post: Post,
        socket: UnixDatagram,
        commands: Arc<Queue<Command>>,
    ) -> std::io::Result<Self> {
        socket.set_read_timeout(Some(LOOK))?;
        Ok(Self {
            post,
            socket,
            commands,
            rest: Arc::new(Barrier::new(2)),
            count: clock::monotonic_ns(),
            next_look_ns: 0,
        })
    }

    /// Asks and waits for the answer; asks again where a guardian dies over it.
    pub(crate) fn ask(&mut self, ask: Ask) -> Result<i64, Refusal> {
        let before: Vec<Record> = self.post.control.records().collect();
        loop {
            match self.ask_once(&ask) {
                Ok(value) => return Ok(value),
                Err(Unanswered::No(why)) => return Err(why),
                Err(Unanswered::CutOff) => {
                    if let Some(value) = self.done_before(&ask, &before) {
                        return Ok(value);
                    }
                }
            }
        }
    }

    /// What a guardian finished before it died.
    fn done_before(&self, ask: &Ask, before: &[Record]) -> Option<i64> {
        let mut new = self
            .post
            .control
            .records()
            .filter(|r| before.iter().all(|b| (b.uffd, b.ring) != (r.uffd, r.ring)));
        match *ask {
            Ask::TakeHold { pid } => new.find(|r| r.pid == pid).map(|r| r.uffd.into()),
            Ask::MakeRing { uffd, .. } => new.find(|r| r.uffd == uffd).map(|r| r.ring.into()),
            Ask::Quiesce { .. }
            | Ask::HoldStill { .. }
            | Ask::Redirty { .. }
            | Ask::DropKeeper { .. } => None,
        }
    }

    fn ask_once(&mut self, ask: &Ask) -> Result<i64, Unanswered> {
        let control = self.post.control;
        self.count += 1;
        let text = format!("{} {} {}", self.count, spawn::own_pid(), ask.encode());
        let send = |line: &Self| {
            line.socket.send(text.as_bytes()).map_err(|e| {
                let why = format!("holo's guardian process cannot be asked: {e}");
                Unanswered::No(Refusal::passing(why))
            })
        };
        let mut asked = control.pid(Scalar::GuardianPid);
        send(self)?;
        let mut until = clock::monotonic_ns() + PATIENCE_NS;
        loop {
            let mut buffer = [0; 2048];
            match self.socket.recv(&mut buffer) {
                Ok(len) => {
                    let text = String::from_utf8_lossy(&buffer[..len]).into_owned();
                    let mut parts = text.splitn(3, ' ');
                    let (count, kind) = (parts.next(), parts.next());
                    let rest = parts.next().unwrap_or("");
                    if count.and_then(|c| c.parse().ok()) != Some(self.count) {
                        continue; // an answer to a dead predecessor's question
                    }
                    return match kind {
                        Some("ok") => Ok(rest.parse().unwrap_or(0)),
                        Some("later") => Err(Unanswered::No(Refusal::passing(rest))),
                        _ => Err(Unanswered::No(Refusal::lasting(rest))),
                    };
                }
                // Not yet; or a signal, or this process was stopped and continued.
                Err(e)
                    if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted)
                        && clock::monotonic_ns() < until => {}
                Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {
                    let why = format!(
                        "holo's guardian process {} has not answered for {} s: it is stopped, gets no CPU, or waits for the \
                         process",
                        control.get(Scalar::GuardianPid),
                        PATIENCE_NS / 1_000_000_000
                    );
                    return Err(Unanswered::No(Refusal::passing(why)));
                }
                Err(e) => {
                    let why = format!("holo's guardian process cannot be heard: {e}");
                    return Err(Unanswered::No(Refusal::passing(why)));
                }
            }
            self.look_after_guardian();
            let now = control.pid(Scalar::GuardianPid);
            if control.get(Scalar::AskBegun) == self.count {
                if control.pid(Scalar::AskBegunBy) != now {
                    return Err(Unanswered::CutOff);
                }
            } else if asked != now {
                // It may be on the line still, or lost with the one who took it from there: the next one
                // does it once.
                asked = now;
                until = clock::monotonic_ns() + PATIENCE_NS;
                send(self)?;
            }
        }
    }

    /// Starts a guardian when nobody else is left who could.
    pub(crate) fn look_after_guardian(&mut self) {
        let now = clock::monotonic_ns();
        if now < self.next_look_ns {
            return;
        }
        self.next_look_ns = now + u64::try_from(LOOK.as_nanos()).unwrap_or(u64::MAX);
        if !self.post.is_alone() {
            return;
        }
        // A process is started from this thread alone: whatever lock the other one held, it would
        // hold in there for ever.
        let mut command = Command::Rest(Arc::clone(&self.rest));
        while let Err(back) = self.commands.push(command) {
            command = back;
            std::thread::yield_now();
        }
        self.rest.wait();
        self.post.replace_guardian();
        self.rest.wait();
    }
}

/// The guardian's end of the line, for the one guardian that there is.
pub(crate) fn line(control: Control) -> Option<UnixDatagram> {
    let fd = table::claim(control.fd(Scalar::GuardianLineFd)?)?;
    Some(UnixDatagram::from(fd))
}

/// Does what the pager asks, and says what came of it.
pub(crate) fn answer(control: Control, line: &UnixDatagram) {
    let mut buffer = [0; ASK_BYTES];
    let Ok(len) = line.recv(&mut buffer) else {
        return;
    };
    let text = String::from_utf8_lossy(&buffer[..len]).into_owned();
    let mut parts = text.splitn(3, ' ');
    let mut number = || parts.next().and_then(|n| n.parse::<u64>().ok());
    let (Some(count), Some(asker)) = (number(), number()) else {
        return;
    };
    // A dead pager does not want it any more; a living one asks again when a guardian dies.
    if asker != control.get(Scalar::PagerPid) || count <= control.get(Scalar::AskBegun) {
        return;
    }
    control.set_pid(Scalar::AskBegunBy, spawn::own_pid());
    control.set(Scalar::AskBegun, count);
    let ask = parts.next().unwrap_or("");
    let result = match Ask::decode(ask) {
        Some(ask) => carry_out(control, ask),
        None => Err(Refusal::lasting(format!(
            "holo's guardian does not understand {ask:?}"
        ))),
    };
    control.max(Scalar::StopMaxUs, attach::longest_stop_us());
    control.note_cpu(Scalar::CpuOfGuardian);
    let reply = match result {
        Ok(value) => format!("{count} ok {value}"),
        Err(r) if r.is_passing => format!("{count} later {}", r.why),
        Err(r) => format!("{count} no {}", r.why),
    };
    let _ = line.send(reply.as_bytes());
}

/// At the end of a session: a process that was taken for a pager that did not wait for it keeps nothing.
pub(crate) fn give_back_the_rest(control: Control) {
    for r in control.records().filter(|r| r.keeper >= 0) {
        if procfs::image(r.pid).is_ok_and(|image| image == r.image) {
            let _ = attach::drop_keeper(r.pid, r.keeper);
        }
    }
}

fn carry_out(control: Control, ask: Ask) -> Result<i64, Refusal> {
    match ask {
        Ask::TakeHold { pid } => {
            attach::preflight(pid)?;
            let hold = attach::take_hold(pid)?;
            let uffd = Uffd::from_owned(hold.uffd);
            uffd.handshake().map_err(|e| {
                let _ = attach::drop_keeper(pid, hold.keeper_fd);
                Refusal::lasting(format!(
                    "userfaultfd for process {pid} lacks what holo needs ({e}): run as root (fork \
                     events need CAP_SYS_PTRACE) on Linux 5.15 or later"
                ))
            })?;
            let record = Record {
                uffd: uffd.into_raw_fd(),
                pid,
                pidfd: table::leave(hold.pidfd),
                keeper: hold.keeper_fd,
                inherited: -1,
                ring: -1,
                params: [0; 15],
                clear_tid: hold.clear_child_tid.map_or(0, |a| a.0),
                image: procfs::image(pid).unwrap_or(0),
            };
            if !control.put_record(&record) {
                let _ = attach::drop_keeper(pid, record.keeper);
                table::close(record.uffd);
                table::close(record.pidfd);
                return Err(Refusal::too_many(pid));
            }
            Ok(i64::from(record.uffd))
        }
        Ask::MakeRing { pid, uffd } => {
            let made = attach::make_ring(pid, RING_ENTRIES)?;
            let r = control.record(uffd).ok_or_else(|| not_held(pid))?;
            // What it advises is done to the memory that the process had then: it must be the held one.
            if procfs::image(pid).is_ok_and(|image| image != r.image) {
                return Err(AttachError::Changed { pid }.into());
            }
            let ring = table::leave(made.fd);
            control.put_record(&Record {
                ring,
                params: made.params,
                ..r
            });
            Ok(i64::from(ring))
        }
        Ask::Quiesce { pid } => Ok(i64::try_from(attach::quiesce(pid)?).unwrap_or(i64::MAX)),
        Ask::HoldStill { pid, sharers } => {
            let pids: Vec<i32> = std::iter::once(pid).chain(sharers).collect();
            let stop_us = attach::hold_still(&pids, STILL)?;
            Ok(i64::try_from(stop_us).unwrap_or(i64::MAX))
        }
        Ask::Redirty {
            pid,
            mem,
            pagemap,
            page,
            mask,
            sharers,
        } => {
            let open = (opened(pid, mem, "mem"), opened(pid, pagemap, "pagemap"));
            let (Some(mem), Some(pagemap)) = open else {
                return Err(not_held(pid));
            };
            let (mem, pagemap) = (TargetMem::from_owned(mem), Pagemap::from_owned(pagemap));
            let pids: Vec<i32> = std::iter::once(pid).chain(sharers).collect();
            let done = attach::redirty(&pids, mem, pagemap, page, mask)?;
            Ok(done.0.into())
        }
        Ask::DropKeeper { pid, keeper } => {
            attach::drop_keeper(pid, keeper)?;
            Ok(0)
        }
    }
}

/// What the pager has opened of a process. A pager that has waited too long for an answer may have closed it since,
/// and the number may be another one's.
fn opened(pid: i32, number: i32, what: &str) -> Option<OwnedFd> {
    let fd = table::duplicate(number)?;
    let path = std::fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd())).ok()?;
    let expected = format!("/proc/{pid}/{what}");
    (path.as_os_str() == expected.as_str()).then_some(fd)
}

fn not_held(pid: i32) -> Refusal {
    Refusal::passing(format!("process {pid} is no longer held"))
}

#[cfg(test)]
pub(super) mod tests {
    use super::super::Settings;
    use super::super::control::{CONTROL_WORDS, RECORDS_MAX};
    use super::*;
    use crate::sys::testing;
    use std::collections::BTreeMap;
    use std::os::fd::AsFd;
    use std::path::PathBuf;
    use std::process::Command as Program;
    use std::sync::atomic::AtomicU64;

    /// The control block of a session whose guardian is this process.
    pub(in super::super) fn control() -> Control {
        let words: Vec<AtomicU64> = (0..CONTROL_WORDS).map(|_| AtomicU64::new(0)).collect();
        let control = Control::new(words.leak());
        control.set_pid(Scalar::GuardianPid, spawn::own_pid());
        control
    }

    /// The pager's end of a line, and the guardian's.
    pub(in super::super) fn line_of(control: Control) -> (Line, UnixDatagram) {
        let (pager, guardian) = UnixDatagram::pair().unwrap();
        let settings = Settings {
            local_memory_bytes: 1 << 20,
            store_limit_bytes: 1 << 20,
            attach: None,
            messages_fd: 2,
            report_fd: None,
            crash_at: None,
        };
        let post = Post {
            control,
            settings,
            line: -1,
        };
        let commands = Arc::new(Queue::new().unwrap());
        (Line::new(post, pager, commands).unwrap(), guardian)
    }

    /// Waits for a request; its number and text.
    pub(in super::super) fn heard(guardian: &UnixDatagram) -> (String, String) {
        let mut buffer = [0; 256];
        let len = guardian.recv(&mut buffer).unwrap();
        let text = String::from_utf8_lossy(&buffer[..len]).into_owned();
        let mut parts = text.splitn(3, ' ').map(str::to_owned);
        (parts.next().unwrap(), parts.nth(1).unwrap())
    }

    #[test]
    fn what_is_asked_is_understood() {
        let redirty = |sharers: Vec<i32>| Ask::Redirty {
            pid: 7,
            mem: 5000,
            pagemap: 5001,
            page: PageIndex(u64::MAX >> 16),
            mask: SubpageMask::ALL,
            sharers,
        };
        let most = redirty(vec![4_194_303; SHARERS_MAX]);
        assert!(40 + most.encode().len() <= ASK_BYTES);
        let asks = [
            Ask::TakeHold { pid: 7 },
            Ask::MakeRing { pid: 7, uffd: 5000 },
            Ask::Quiesce { pid: 7 },
            Ask::HoldStill {
                pid: 7,
                sharers: vec![8, 9],
            },
            Ask::DropKeeper { pid: 7, keeper: 3 },
            redirty(Vec::new()),
            redirty(vec![8]),
            most,
        ];
        for ask in asks {
            assert_eq!(Ask::decode(&ask.encode()), Some(ask));
        }
        assert_eq!(Ask::decode("redirty 7 5000 1 1"), None);
        assert_eq!(Ask::decode("redirty 7 5000 5001 1 1 8,x"), None);
    }

    #[test]
    fn a_descriptor_that_is_another_ones_by_now_is_not_taken() {
        let pid = spawn::own_pid();
        let mem = TargetMem::open(pid).unwrap();
        let number = mem.as_fd().as_raw_fd();
        assert!(opened(pid, number, "mem").is_some());
        assert!(opened(pid, number, "pagemap").is_none());
        assert!(opened(pid + 1, number, "mem").is_none());
    }

    #[test]
    fn a_signal_while_it_waits_for_the_answer_is_none() {
        let (mut line, guardian) = line_of(control());
        let (tid, told) = std::sync::mpsc::channel();
        let asker = std::thread::spawn(move || {
            tid.send(testing::own_tid()).unwrap();
            line.ask(Ask::Quiesce { pid: 1 })
        });
        let tid = told.recv().unwrap();
        let (count, _) = heard(&guardian);
        // It may be about to wait only: more than once.
        for _ in 0..10 {
            testing::interrupt(tid);
            std::thread::sleep(Duration::from_millis(2));
        }
        guardian.send(format!("{count} ok 7").as_bytes()).unwrap();
        assert_eq!(asker.join().unwrap(), Ok(7));
    }

    #[test]
    fn what_nobody_waited_for_is_given_back() {
        let control = control();
        let mut target = testing::Target::start();
        let keeper = target.syscall(libc::SYS_userfaultfd, [0; 5]);
        let keeper = i32::try_from(keeper).unwrap();
        let record = Record {
            uffd: 5000,
            pid: target.pid,
            keeper,
            image: procfs::image(target.pid).unwrap(),
            ..Record::default()
        };
        let is_open = || std::fs::exists(format!("/proc/{}/fd/{keeper}", record.pid)).unwrap();
        // Another program by now: left alone.
        control.put_record(&Record {
            image: record.image + 1,
            ..record
        });
        give_back_the_rest(control);
        assert!(is_open());
        control.put_record(&record);
        give_back_the_rest(control);
        assert!(!is_open());
    }

    #[test]
    fn a_process_for_which_there_is_no_room_keeps_nothing() {
        let control = control();
        for uffd in 5000..5000 + i32::try_from(RECORDS_MAX).unwrap() {
            let r = Record {
                uffd,
                ..Record::default()
            };
            assert!(control.put_record(&r));
        }
        let mut sleeper = Program::new("sleep").arg("1000").spawn().unwrap();
        let pid = i32::try_from(sleeper.id()).unwrap();
        testing::within("the program", || {
            let name = std::fs::read_to_string(format!("/proc/{pid}/comm")).unwrap();
            (name == "sleep\n" && procfs::state_of(pid).unwrap() == b'S').then_some(())
        });
        let descriptors = || -> BTreeMap<PathBuf, PathBuf> {
            let all = std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap();
            all.map(|entry| entry.unwrap().path())
                .map(|at| (at.clone(), std::fs::read_link(at).unwrap()))
                .collect()
        };
        let before = descriptors();
        let refused = carry_out(control, Ask::TakeHold { pid });
        let after = descriptors();
        sleeper.kill().unwrap();
        sleeper.wait().unwrap();
        assert_eq!(refused, Err(Refusal::too_many(pid)));
        assert_eq!(after, before);
    }
}
