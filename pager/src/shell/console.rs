//! The pager's console: an abstract Unix socket, by the process id of the target, on which `holo detach`
//! and `holo status` speak to the pager of a process. No file is left behind.
//!
//! One request a connection, one line; one JSON line back. Only root and the pager's own user are heard.

use std::io::{BufRead as _, BufReader, ErrorKind, Read as _, Write as _};
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};
use std::time::Duration;

use super::control::{Control, Scalar};
use crate::sys::{spawn, table};

/// How long one peer may take to say what it wants.
const PATIENCE: Duration = Duration::from_millis(200);
/// Of an error of a program, as the system's logs want it before a message: syslog(3).
const LOG_PRIORITY: &str = "<11>";
/// Requests heard in one look.
const REQUESTS: usize = 4;

fn name(pid: i32) -> std::io::Result<SocketAddr> {
    SocketAddr::from_abstract_name(format!("holo-pager.{pid}"))
}

/// A request, with the way back.
pub(crate) enum Request {
    Detach(Reply),
    Status(Reply),
}

/// The way back to whoever asked.
pub(crate) struct Reply(UnixStream);

impl Reply {
    pub(crate) fn send(mut self, json: &str) {
        self.write(&format!("{json}\n"));
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
        let listener = UnixListener::bind_addr(&name(pid)?)?;
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
        let me = std::os::unix::fs::MetadataExt::uid(&std::fs::metadata("/proc/self").ok()?);
        let peer = table::peer_uid(stream.as_raw_fd())?;
        if peer != 0 && peer != me {
            Reply(stream).send("{\"error\":\"only root and the pager's own user may ask\"}");
            return None;
        }
        stream.set_read_timeout(Some(PATIENCE)).ok()?;
        stream.set_write_timeout(Some(PATIENCE)).ok()?;
        let mut line = String::new();
        BufReader::new((&stream).take(256))
            .read_line(&mut line)
            .ok()?;
        let reply = Reply(stream);
        match line.trim() {
            "detach" => Some(Request::Detach(reply)),
            "status" => Some(Request::Status(reply)),
            _ => {
                reply.send("{\"error\":\"unknown request\"}");
                None
            }
        }
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
            let (Request::Detach(reply) | Request::Status(reply)) = request;
            self.waiting.push(reply);
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

/// Sends one request to the pager of `pid` and returns its line; waits as long as the pager takes. A pager
/// that dies over it is asked again: its successor knows nothing of the question; so is one that was asked
/// too slowly, and has hung up. The line is empty if the pager has ended meanwhile.
///
/// # Errors
/// ConnectionRefused: no pager holds the process.
pub fn request(pid: i32, request: &str) -> std::io::Result<String> {
    let mut heard = false;
    loop {
        match ask(pid, request) {
            Ok(line) if !line.is_empty() => return Ok(line),
            Ok(_) => {}
            Err(e) if matches!(e.kind(), ErrorKind::ConnectionReset | ErrorKind::BrokenPipe) => {}
            Err(e) if heard && e.kind() == ErrorKind::ConnectionRefused => return Ok(String::new()),
            Err(e) => return Err(e),
        }
        heard = true;
    }
}

fn ask(pid: i32, request: &str) -> std::io::Result<String> {
    let mut stream = UnixStream::connect_addr(&name(pid)?)?;
    stream.write_all(format!("{request}\n").as_bytes())?;
    let mut line = String::new();
    BufReader::new(stream).read_line(&mut line)?;
    Ok(line)
}
