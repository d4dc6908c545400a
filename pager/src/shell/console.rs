//! The pager's console: an abstract Unix socket, by the process id of the target (of `holo-exec`, for a command
//! under it), on which `holo detach` and `holo status` speak to the pager of a process. No file is left behind.
//!
//! One request a connection, one line that names a process; one JSON line back. Only root and the pager's own user
//! are heard. Anybody can take such a name, so only root and the asker's own user are believed.

use std::io::{BufRead as _, BufReader, ErrorKind, Read as _, Write as _};
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};
use std::time::Duration;

use super::control::{Control, Scalar};
use crate::sys::table::{self, Peer};
use crate::sys::{clock, procfs, spawn};

/// How long one peer may take to say what it wants.
const PATIENCE: Duration = Duration::from_millis(200);
/// Of an error of a program, as the system's logs want it before a message: syslog(3).
const LOG_PRIORITY: &str = "<11>";
/// Requests heard in one look.
const REQUESTS: usize = 4;

fn name(pid: i32) -> std::io::Result<SocketAddr> {
    SocketAddr::from_abstract_name(format!("holo-pager.{pid}"))
}

/// What can be asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum What {
    Detach,
    Status,
}

/// A request, with the way back.
pub(crate) struct Request {
    pub(crate) what: What,
    /// The process that it is about.
    pub(crate) pid: i32,
    pub(crate) reply: Reply,
}

/// The way back to whoever asked.
pub(crate) struct Reply(UnixStream);

impl Reply {
    pub(crate) fn send(mut self, json: &str) {
        self.write(&format!("{json}\n"));
    }

    pub(crate) fn refuse(self, why: &str) {
        self.send(&serde_json::json!({ "error": why }).to_string());
    }

    fn write(&mut self, text: &str) {
        // Whoever asked may have gone.
        let _ = self.0.write_all(text.as_bytes());
    }
}

/// The listening end.
pub(crate) struct Console {
    listener: UnixListener,
    waiting: Vec<Reply>,
}

impl Console {
    /// Listens for the pager of `pid`.
    ///
    /// # Errors
    /// AddrInUse: the process is held by another pager.
    pub(crate) fn open(pid: i32) -> std::io::Result<Self> {
        Self::listen(&name(pid)?)
    }

    /// Listens where nobody asks: the name is taken.
    pub(crate) fn open_aside(pid: i32) -> std::io::Result<Self> {
        let aside = format!("holo-pager.{pid}.{}", clock::monotonic_ns());
        Self::listen(&SocketAddr::from_abstract_name(aside)?)
    }

    fn listen(at: &SocketAddr) -> std::io::Result<Self> {
        let listener = UnixListener::bind_addr(at)?;
        listener.set_nonblocking(true)?;
        Ok(Self::from(listener))
    }

    pub(crate) fn from_owned(fd: OwnedFd) -> Self {
        Self::from(UnixListener::from(fd))
    }

    fn from(listener: UnixListener) -> Self {
        Self {
            listener,
            waiting: Vec::new(),
        }
    }

    pub(crate) fn as_raw_fd(&self) -> i32 {
        self.listener.as_raw_fd()
    }

    /// What was asked since the last look.
    pub(crate) fn requests(&self) -> impl Iterator<Item = Request> + '_ {
        std::iter::from_fn(|| self.listener.accept().ok())
            .take(REQUESTS)
            .filter_map(|(stream, _)| Self::read(stream))
    }

    fn read(stream: UnixStream) -> Option<Request> {
        stream.set_read_timeout(Some(PATIENCE)).ok()?;
        stream.set_write_timeout(Some(PATIENCE)).ok()?;
        if !table::peer(stream.as_raw_fd())?.is_trusted() {
            Reply(stream).refuse("only root and the user that runs the pager may ask");
            return None;
        }
        let mut line = String::new();
        BufReader::new((&stream).take(256))
            .read_line(&mut line)
            .ok()?;
        let reply = Reply(stream);
        let (what, pid) = line.trim().split_once(' ').unwrap_or_default();
        let what = match what {
            "detach" => Some(What::Detach),
            "status" => Some(What::Status),
            _ => None,
        };
        let (Some(what), Ok(pid)) = (what, pid.parse()) else {
            reply.refuse("unknown request: pager and command line are of different versions");
            return None;
        };
        Some(Request { what, pid, reply })
    }

    /// Keeps whoever asked waiting until the pager is done.
    pub(crate) fn reply_at_end(&mut self, reply: Reply) {
        self.waiting.push(reply);
    }

    /// The end: answers those who wait for it, and those who are about to ask, and lets go of the name. Whoever
    /// has read a whole line finds the name free; should this pager die before it is, whoever asked has read
    /// all but the end of the line, and reads that when nobody is left (see [`Scalar::Done`]).
    pub(crate) fn finish(mut self, control: Control, json: &str) {
        let late: Vec<Request> = self.requests().collect();
        for request in late {
            self.waiting.push(request.reply);
        }
        let mut waiting = std::mem::take(&mut self.waiting);
        for r in &mut waiting {
            r.write(json);
        }
        control.set(Scalar::Done, 1);
        let own = self.as_raw_fd();
        drop(self);
        // One that took over listens on a descriptor of its own beside the first one's.
        if let Some(first) = control.fd(Scalar::ConsoleFd).filter(|&n| n != own) {
            table::close(first);
        }
        for mut r in waiting {
            r.write("\n");
        }
    }
}

/// A message to the user, where it can be taken at once: a pager never waits for a pipe that a target may have
/// filled.
pub(crate) fn message(control: Control, text: &str) {
    let Some(fd) = control.fd(Scalar::MessagesFd) else {
        return;
    };
    if control.get(Scalar::MessagesLogged) != 0 {
        spawn::write_at_once(fd, format!("{LOG_PRIORITY}holo: {text}\n").as_bytes());
    } else if spawn::poll_writable(fd) {
        spawn::write_at_once(fd, format!("holo: {text}\n").as_bytes());
    }
}

/// After an attach: whoever reads what the command line said, to its end, must not wait for ours, which comes with
/// the process's. A file or a terminal is kept for messages; in the place of a pipe or a socket comes the system's
/// log, where the reason of a killed process is looked for: the kernel's, else the log daemon's, else nothing.
pub(crate) fn let_go_of_streams(control: Control) {
    let Some(fd) = control.fd(Scalar::MessagesFd) else {
        return;
    };
    if table::has_a_reader(fd) {
        let log = table::open_log();
        control.set(Scalar::MessagesLogged, u64::from(log.is_some()));
        table::put_in_place(log, fd);
    }
}

/// Who has the name for a process.
pub(crate) fn holder(pid: i32) -> Option<Peer> {
    let stream = UnixStream::connect_addr(&name(pid).ok()?).ok()?;
    table::peer(stream.as_raw_fd())
}

/// Sends one request about `pid` to its pager and returns its line; waits as long as the pager takes. A pager
/// that dies over it is asked again: its successor knows nothing of the question; so is one that was asked
/// too slowly, and has hung up. The line is empty if the pager has ended meanwhile.
///
/// The pager listens by the id of that process, or of one that it descends from.
///
/// # Errors
/// ConnectionRefused: no pager holds the process. PermissionDenied: whoever listens is not to be believed.
pub fn request(pid: i32, request: &str) -> std::io::Result<String> {
    let line = format!("{request} {pid}\n");
    let ancestors = std::iter::successors(Some(pid), |&p| procfs::parent_of(p).ok());
    for id in ancestors.take_while(|&id| id > 1) {
        match ask_until_heard(id, &line) {
            Err(e) if e.kind() == ErrorKind::ConnectionRefused => {}
            // Not the process's own name: it may have to do with something else.
            Err(e) if e.kind() == ErrorKind::PermissionDenied && id != pid => {}
            result => return result,
        }
    }
    Err(ErrorKind::ConnectionRefused.into())
}

fn ask_until_heard(id: i32, request: &str) -> std::io::Result<String> {
    let mut heard = false;
    loop {
        match ask(id, request) {
            Ok(line) if !line.is_empty() => return Ok(line),
            Ok(_) => {}
            Err(e) if matches!(e.kind(), ErrorKind::ConnectionReset | ErrorKind::BrokenPipe) => {}
            Err(e) if heard && e.kind() == ErrorKind::ConnectionRefused => return Ok(String::new()),
            Err(e) => return Err(e),
        }
        heard = true;
    }
}

fn ask(id: i32, request: &str) -> std::io::Result<String> {
    let mut stream = UnixStream::connect_addr(&name(id)?)?;
    let peer = table::peer(stream.as_raw_fd()).ok_or(ErrorKind::ConnectionReset)?;
    if !peer.is_trusted() {
        let (pid, uid) = (peer.pid, peer.uid);
        let text = format!(
            "process {pid} of user {uid} listens in the place of holo's pager for process {id}; only root and your \
             own user are believed"
        );
        return Err(std::io::Error::new(ErrorKind::PermissionDenied, text));
    }
    // It may refuse without having heard it.
    let sent = stream.write_all(request.as_bytes());
    let mut line = String::new();
    let read = BufReader::new(stream).read_line(&mut line);
    if line.is_empty() {
        sent?;
        read?;
    }
    Ok(line)
}
