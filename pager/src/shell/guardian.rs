//! The guardian: it keeps the descriptors when the pager dies, starts the successor, and does what must
//! not be cut off half-way.
//!
//! Injecting system calls into a process means changing its registers; a tracer that is killed then
//! leaves a wreck. So the guardian injects, and the pager, the one that people and bugs kill, only asks.
//! The guardian has one thread (between injections), which is what makes starting a successor by
//! `clone` safe.

use std::os::fd::AsRawFd as _;
use std::os::unix::net::UnixDatagram;
use std::time::Duration;

use super::control::{Control, Record, Scalar};
use crate::sys::advise::PidFd;
use crate::sys::attach::{self, AttachError};
use crate::sys::uffd::Uffd;
use crate::sys::{clock, procfs, spawn, table};

/// Requests that a ring holds: a batch with eight runs a page.
const RING_ENTRIES: u32 = 256;
/// How long the pager waits for an answer before it takes the guardian for dead.
const PATIENCE: Duration = Duration::from_secs(10);

/// What the pager asks of the guardian.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ask {
    /// Make a userfaultfd in the process. Answer: its number here.
    TakeHold { pid: i32 },
    /// Make a ring in the process of this userfaultfd. Answer: the ring's number.
    MakeRing { pid: i32, uffd: i32 },
    /// Stop all threads for an instant. Answer: microseconds.
    Quiesce { pid: i32 },
    /// Close the descriptor that the process keeps.
    DropKeeper { pid: i32, keeper: i32 },
}

impl Ask {
    fn encode(self) -> String {
        match self {
            Self::TakeHold { pid } => format!("hold {pid} 0"),
            Self::MakeRing { pid, uffd } => format!("ring {pid} {uffd}"),
            Self::Quiesce { pid } => format!("quiesce {pid} 0"),
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
            "drop" => Self::DropKeeper { pid, keeper: arg },
            _ => return None,
        })
    }
}

/// The pager's end of the line to the guardian.
pub(crate) struct Line {
    socket: UnixDatagram,
    count: u64,
}

impl Line {
    pub(crate) fn new(socket: UnixDatagram) -> std::io::Result<Self> {
        socket.set_read_timeout(Some(PATIENCE))?;
        Ok(Self {
            socket,
            count: clock::monotonic_ns(),
        })
    }

    /// Asks and waits for the answer.
    pub(crate) fn ask(&mut self, ask: Ask) -> Result<i64, String> {
        self.count += 1;
        let text = format!("{} {}", self.count, ask.encode());
        self.socket
            .send(text.as_bytes())
            .map_err(|e| format!("holo's guardian process cannot be asked: {e}"))?;
        loop {
            let mut buffer = [0; 2048];
            let len = self
                .socket
                .recv(&mut buffer)
                .map_err(|e| format!("holo's guardian process does not answer: {e}"))?;
            let text = String::from_utf8_lossy(&buffer[..len]).into_owned();
            let mut parts = text.splitn(3, ' ');
            let (count, kind, rest) = (parts.next(), parts.next(), parts.next().unwrap_or(""));
            if count.and_then(|c| c.parse().ok()) != Some(self.count) {
                continue; // an answer to a dead predecessor's question
            }
            return match kind {
                Some("ok") => Ok(rest.parse().unwrap_or(0)),
                _ => Err(rest.to_owned()),
            };
        }
    }
}

/// Guards until the pager is done. `successor` runs in each new pager process.
pub(crate) fn guard(
    control: Control,
    line: &UnixDatagram,
    mut pager: i32,
    successor: impl Fn() -> i32,
) -> i32 {
    loop {
        watch_one(control, line, pager);
        if control.get(Scalar::Done) != 0 {
            return 0;
        }
        if !restart(control, &mut pager, &successor) {
            return 1;
        }
    }
}

/// Answers one pager until it ends.
fn watch_one(control: Control, line: &UnixDatagram, pager: i32) {
    // Without a pidfd it is gone already.
    let Ok(pidfd) = PidFd::open(pager) else {
        return;
    };
    control.set_fd(Scalar::GuardianWatchFd, pidfd.as_raw_fd());
    loop {
        let ready = spawn::poll_readable(&[pidfd.as_raw_fd(), line.as_raw_fd()], None);
        if ready & 2 != 0 {
            answer(control, line);
        }
        if ready & 1 != 0 {
            return;
        }
    }
}

fn restart(control: Control, pager: &mut i32, successor: &impl Fn() -> i32) -> bool {
    let _ = spawn::wait(*pager, true);
    if control.get(Scalar::Ready) == 0 {
        return false; // it died before there was anything to take over
    }
    control.add(Scalar::CpuOfDead, control.get(Scalar::CpuOfPager));
    control.set(Scalar::CpuOfPager, 0);
    control.add(Scalar::Takeovers, 1);
    control.set(Scalar::GuardianWatchFd, 0);
    match spawn::spawn_sharing_descriptors(successor) {
        Ok(pid) => {
            *pager = pid;
            control.set_pid(Scalar::PagerPid, pid);
            true
        }
        Err(_) => false,
    }
}

fn answer(control: Control, line: &UnixDatagram) {
    let mut buffer = [0; 256];
    let Ok(len) = line.recv(&mut buffer) else {
        return;
    };
    let text = String::from_utf8_lossy(&buffer[..len]).into_owned();
    let Some((count, ask)) = text.split_once(' ') else {
        return;
    };
    let result = match Ask::decode(ask) {
        Some(ask) => carry_out(control, ask),
        None => Err(format!("holo's guardian does not understand {ask:?}")),
    };
    let reply = match result {
        Ok(value) => format!("{count} ok {value}"),
        Err(text) => format!("{count} no {text}"),
    };
    let _ = line.send(reply.as_bytes());
}

fn carry_out(control: Control, ask: Ask) -> Result<i64, String> {
    let text = |e: AttachError| e.to_string();
    match ask {
        Ask::TakeHold { pid } => {
            attach::preflight(pid).map_err(text)?;
            let hold = attach::take_hold(pid).map_err(text)?;
            let uffd = Uffd::from_owned(hold.uffd);
            uffd.handshake().map_err(|e| {
                let _ = attach::drop_keeper(pid, hold.keeper_fd);
                format!(
                    "userfaultfd for process {pid} lacks what holo needs ({e}): run as root (fork \
                     events need CAP_SYS_PTRACE) on Linux 5.7 or later"
                )
            })?;
            control.max(Scalar::StopMaxUs, hold.stop_us);
            let record = Record {
                uffd: uffd.into_raw_fd(),
                pid,
                pidfd: table::leave(hold.pidfd),
                keeper: hold.keeper_fd,
                ring: -1,
                params: [0; 15],
                clear_tid: hold.clear_child_tid.map_or(0, |a| a.0),
                image: procfs::image(pid).unwrap_or(0),
            };
            if !control.put_record(&record) {
                table::close(record.uffd);
                table::close(record.pidfd);
                return Err("more processes than holo can hold at once".to_owned());
            }
            Ok(i64::from(record.uffd))
        }
        Ask::MakeRing { pid, uffd } => {
            let made = attach::make_ring(pid, RING_ENTRIES).map_err(text)?;
            control.max(Scalar::StopMaxUs, made.stop_us);
            let ring = table::leave(made.fd);
            match control.record(uffd) {
                Some(r) => {
                    control.put_record(&Record {
                        ring,
                        params: made.params,
                        ..r
                    });
                    Ok(i64::from(ring))
                }
                None => {
                    table::close(ring);
                    Err("the process is no longer held".to_owned())
                }
            }
        }
        Ask::Quiesce { pid } => attach::quiesce(pid)
            .map(|us| i64::try_from(us).unwrap_or(i64::MAX))
            .map_err(text),
        Ask::DropKeeper { pid, keeper } => {
            attach::drop_keeper(pid, keeper).map(|()| 0).map_err(text)
        }
    }
}
