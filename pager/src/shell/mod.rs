//! The pager as processes: guardian, pager, successor; what a command line starts.
//!
//! ```text
//!  holo-exec (waits for the command)         holo attach (returns when the process is held)
//!      |  fork                                   |  fork, own session
//!      v                                         v
//!  guardian --clone(CLONE_FILES)--> pager --- control thread: watches, scans, matches children (watch)
//!   |  ^   injects for the pager      |   \-- serving thread: the core and nothing else (serve)
//!   |  |   starts the successor       |
//!   v  |                              |
//!  warden: starts the next guardian   |
//!      +--- one descriptor table -----+---- memfds: control block, map, journal, notes, frames, store
//! ```
//!
//! Everything that a successor needs is in the memfds, whose numbers are in the [`control`] block.

#![forbid(unsafe_code)]
#![allow(
    clippy::wildcard_enum_match_arm,
    reason = "operations and signals that concern nobody here are passed over together"
)]

mod console;
mod control;
mod dying;
mod family;
mod guardian;
mod keepers;
mod killing;
mod limits;
mod live;
mod post;
mod refusals;
mod report;
mod scan;
mod serve;
mod watch;

use std::io;
use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd};
use std::os::unix::net::UnixDatagram;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use holo_proto::{PAGE_BYTES, Report, SpaceId};

use crate::core::{
    Childhood, Config, Core, EVENT_WORDS, JOURNAL_SLOTS, JOURNAL_WORDS, Map, MapError, Memory,
    NOTE_WORDS, Nanos, SlotState, Words,
};
use crate::store::EmbeddedStore;
use crate::store::api::StoreError;
use crate::sys::arena::{SharedBytes, SharedWords};
use crate::sys::{clock, signals, spawn, table};
use console::Console;
use control::{CONTROL_WORDS, Control, RECORDS_MAX, Scalar};
use guardian::Line;
use keepers::Keepers;
use live::{Command, Live, Queue};
use post::Post;
use serve::LiveCore;
use watch::Watch;

pub use console::request;
pub use dying::Crash;
pub use report::{progress, summary};

/// Descriptors that the pager may need: a dozen for each process that is held, and its own.
const DESCRIPTORS_MOST: u64 = 12 * RECORDS_MAX as u64 + 1024;
/// Page buffers: 8 MiB.
const FRAMES: u16 = 128;
/// A drop beyond this is not written down by subpage.
const LARGE_DROP_BYTES: u64 = 8 << 20;
/// So long a process may change its mappings without a pause while something waits for one, nanoseconds: four times
/// what it is kept still then.
const RESTLESS_NS: u64 = 20_000_000;
/// Words of the map: 8 GiB of address space in the file, taken as used; maps 16 TiB of a process.
const MAP_WORDS: u64 = 1 << 30;
/// How long a new pager waits for its dead predecessor to be wholly gone.
const PREDECESSOR_NS: u64 = 5_000_000_000;

/// What a session is started with.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Bytes that the processes may keep in RAM together.
    pub local_memory_bytes: u64,
    /// Most bytes that the store may use.
    pub store_limit_bytes: u64,
    /// Attach to this process at once; else the session waits for [`Session::watch`].
    pub attach: Option<i32>,
    /// Where messages go: a descriptor number of this process, kept open by the session. After an attach a pipe or
    /// socket is let go of, and messages go to the system's log.
    pub messages_fd: i32,
    /// Where the report goes at the end: a descriptor number of this process, kept open by the session.
    pub report_fd: Option<i32>,
    /// Where the pager dies (`HOLO_CRASH_AT`).
    pub crash_at: Option<Crash>,
}

/// A running guardian and pager, as the command line that started them sees it.
pub struct Session {
    control: Control,
    alive: OwnedFd,
    keepers: Option<Keepers>,
}

/// Why no session could be started.
#[derive(Debug, thiserror::Error)]
pub enum SessionError {
    /// A system call failed.
    #[error("{what}: {source}")]
    System {
        /// What was tried.
        what: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
    /// The process cannot be held, in words.
    #[error("{0}")]
    Refused(String),
    /// The pager died before it was ready.
    #[error("holo's pager could not start; see its message above")]
    NotStarted,
}

fn failed(what: &'static str) -> impl FnOnce(io::Error) -> SessionError {
    move |source| SessionError::System { what, source }
}

impl Session {
    /// Starts guardian and pager and waits until they are ready (and, for an attach, hold the process).
    ///
    /// # Errors
    /// In words for the user; nothing is left running then.
    pub fn start(settings: &Settings) -> Result<Self, SessionError> {
        let words = SharedWords::create("holo-control", CONTROL_WORDS)
            .map_err(failed("cannot make shared memory"))?;
        let control = Control::new(words.leak());
        control.set(Scalar::Budget, settings.local_memory_bytes);
        control.set(Scalar::StartedNs, clock::monotonic_ns());
        control.set_pid(Scalar::StarterPid, spawn::own_pid());
        if let Some(pid) = settings.attach {
            control.set_pid(Scalar::RootPid, pid);
        }
        let (alive, theirs) = spawn::pipe().map_err(failed("cannot make a pipe"))?;
        let (answer, answer_theirs) = spawn::pipe().map_err(failed("cannot make a pipe"))?;
        // Whoever attaches does not stay.
        let (keepers, keepers_theirs) = match settings.attach {
            None => {
                let (ours, theirs) = Keepers::new().map_err(failed("cannot make a socket"))?;
                (Some(ours), Some(theirs))
            }
            Some(_) => (None, None),
        };
        let settings = settings.clone();
        let guardian = spawn::spawn(move || {
            control.set_fd(Scalar::KeepersFd, keepers_theirs.map_or(-1, table::leave));
            // The reading ends stay behind: they would keep nothing alive, but are not ours.
            control.set_fd(Scalar::AliveFd, table::leave(theirs));
            control.set_fd(Scalar::MessagesFd, settings.messages_fd);
            control.set_fd(Scalar::ReportFd, settings.report_fd.unwrap_or(-1));
            guardian_main(control, &settings, answer_theirs)
        })
        .map_err(failed("cannot start the pager's guardian"))?;
        let refusal = spawn::read_to_end(answer);
        let session = Self {
            control,
            alive,
            keepers,
        };
        // Twice, by a pager that died over it and its successor.
        if refusal.starts_with(b"ready") {
            if session.keepers.is_none() {
                // Whoever attaches ends in a moment.
                control.add(Scalar::CpuOfDead, clock::process_cpu_ns());
            }
            return Ok(session);
        }
        let _ = spawn::wait(guardian, true);
        let text = String::from_utf8_lossy(&refusal).into_owned();
        Err(if text.is_empty() {
            SessionError::NotStarted
        } else {
            SessionError::Refused(text)
        })
    }

    /// Watches this process and its children from now on.
    pub fn watch(&self, pid: i32) {
        self.control.set(Scalar::StartedNs, clock::monotonic_ns());
        self.control.set_pid(Scalar::RootPid, pid);
    }

    /// Becomes readable when pager, guardian and warden are all gone.
    #[must_use]
    pub fn alive_fd(&self) -> i32 {
        self.alive.as_raw_fd()
    }

    /// Becomes readable when there is something for [`Session::keep`], or everybody is gone; -1 for an attach.
    #[must_use]
    pub fn keepers_fd(&self) -> i32 {
        self.keepers.as_ref().map_or(-1, Keepers::as_raw_fd)
    }

    /// Keeps what the pager sent: without it a fork's child would read zeros for what is away, should pager,
    /// guardian and warden die at once, until [`Session::kill_held`].
    pub fn keep(&mut self) {
        if let Some(keepers) = &mut self.keepers {
            keepers.take();
        }
    }

    /// Stops this process, whose command this signal stopped, until it is continued itself or the command is.
    pub fn stop_with_command(&self, signal: i32) {
        self.control.set(Scalar::StarterStopped, 1);
        signals::stop_by(signal);
        self.control.set(Scalar::StarterStopped, 0);
    }

    /// Kills all processes that are held, after everybody who could serve them died; says which.
    #[must_use]
    pub fn kill_held(&self) -> Vec<i32> {
        killing::kill_held(self.control)
    }

    /// The report so far.
    #[must_use]
    pub fn report(&self, exit_code: Option<i32>) -> Report {
        report::build(self.control, exit_code, clock::process_cpu_ns())
    }

    /// Waits until the pager has counted everything of the watched process, which ended, at most
    /// `patience_ns`. Children of it may live on, and the pager with them.
    pub fn settle(&self, patience_ns: u64) {
        let until = clock::monotonic_ns() + patience_ns;
        while clock::monotonic_ns() < until
            && self.control.get(Scalar::RootGone) == 0
            && !self.gone()
        {
            spawn::poll_readable(&[self.alive_fd()], Some(500_000));
        }
    }

    /// Pager, guardian and warden have all ended.
    #[must_use]
    pub fn gone(&self) -> bool {
        spawn::poll_readable(&[self.alive_fd()], Some(0)) != 0
    }

    /// The pager's process id now.
    #[must_use]
    pub fn pager_pid(&self) -> i32 {
        self.control.pid(Scalar::PagerPid)
    }
}

/// The guardian's process.
fn guardian_main(control: Control, settings: &Settings, answer: OwnedFd) -> i32 {
    spawn::leave_session();
    // The caller's folder is not ours to keep busy.
    let _ = std::env::set_current_dir("/");
    spawn::ignore_terminal_signals();
    // Whatever else was inherited (a pipe that somebody reads to its end) is not the pager's to hold.
    let mut keep = vec![settings.messages_fd, table::number_of(&answer)];
    keep.extend(settings.report_fd);
    keep.extend(control.fd(Scalar::AliveFd));
    keep.extend(control.fd(Scalar::KeepersFd));
    table::close_all_but(&keep);
    table::null_standard_streams(&keep);
    spawn::set_name(c"holo-guardian");
    limits::leave_memory_cgroup();
    // Both take privilege; without it the pager is as mortal as its target.
    let _ = std::fs::write("/proc/self/oom_score_adj", "-1000");
    spawn::lock_memory();
    spawn::raise_descriptor_limit(DESCRIPTORS_MOST);
    control.set_pid(Scalar::GuardianPid, spawn::own_pid());
    let Ok((pager_end, guardian_end)) = UnixDatagram::pair() else {
        return 1;
    };
    let line = table::leave(pager_end.into());
    control.set_fd(Scalar::LineFd, line);
    control.set_fd(Scalar::GuardianLineFd, table::leave(guardian_end.into()));
    control.set_fd(Scalar::AnswerFd, table::leave(answer));
    let post = Post {
        control,
        settings: settings.clone(),
        line,
    };
    post.begin()
}

/// The pager's process: the first one (`dead` is 0), or the successor of one that died.
fn pager_main(post: &Post, dead: i32) -> i32 {
    let control = post.control;
    let me = spawn::own_pid();
    if !control.replace_pid(Scalar::PagerPid, dead, me) {
        return 0;
    }
    let first = dead == 0;
    if first {
        control.set_pid(Scalar::TableCleanedBy, me);
    } else {
        control.inherit_cpu(Scalar::CpuOfPager);
        control.add(Scalar::Takeovers, 1);
    }
    // Whoever can be seen is counted.
    spawn::set_name(c"holo-pager");
    spawn::lock_memory();
    dying::die_of_panics(control);
    dying::arm(control, post.settings.crash_at);
    match run_pager(post, first) {
        Ok(()) => {
            control.set(Scalar::Done, 1);
            0
        }
        Err(why) => {
            if control.fd(Scalar::AnswerFd).is_some() {
                say(control, &why);
            } else {
                killing::give_up(control, &why);
            }
            control.set(Scalar::Done, 1);
            1
        }
    }
}

/// Tells the command line that waits for the start.
fn say(control: Control, text: &str) {
    if let Some(fd) = control.fd(Scalar::AnswerFd) {
        spawn::write_at_once(fd, text.as_bytes());
        control.set_fd(Scalar::AnswerFd, -1);
        table::close(fd);
    }
}

struct Opened {
    memory: Memory<'static>,
    frames: SharedBytes,
    store: SharedBytes,
}

/// Makes the memory that outlives the pager, or takes it over.
fn open_memory(control: Control, settings: &Settings, first: bool) -> io::Result<Opened> {
    let words = |s: Scalar, name: &str, count: u64| -> io::Result<Words<'static>> {
        let shared = if first {
            let fd = SharedWords::create(name, count)?;
            control.set_fd(s, fd.as_fd().as_raw_fd());
            fd
        } else {
            SharedWords::from_fd(take(control, s)?)?
        };
        Ok(shared.leak())
    };
    let bytes = |s: Scalar, name: &str, count: u64| -> io::Result<SharedBytes> {
        if first {
            let made = SharedBytes::create(name, count)?;
            control.set_fd(s, made.as_fd().as_raw_fd());
            return Ok(made);
        }
        let until = clock::monotonic_ns() + PREDECESSOR_NS;
        let number = control.fd(s).ok_or(io::ErrorKind::NotFound)?;
        loop {
            // Refused while the predecessor is not wholly gone.
            let fd = table::duplicate(number).ok_or(io::ErrorKind::NotFound)?;
            match SharedBytes::from_fd(fd) {
                Err(e)
                    if e.kind() == io::ErrorKind::ResourceBusy && clock::monotonic_ns() < until =>
                {
                    spawn::poll_readable(&[], Some(1_000_000));
                }
                result => return result,
            }
        }
    };
    let map = words(Scalar::MapFd, "holo-map", MAP_WORDS)?;
    let other = words(
        Scalar::JournalFd,
        "holo-journal",
        (JOURNAL_WORDS + NOTE_WORDS) as u64,
    )?;
    let (journal, notes) = other.split_at(JOURNAL_WORDS);
    for w in other {
        w.store(w.load(Ordering::Acquire), Ordering::Release); // resident: a read must not fault here
    }
    Ok(Opened {
        memory: Memory {
            map,
            journal,
            notes,
        },
        frames: bytes(
            Scalar::FramesFd,
            "holo-frames",
            u64::from(FRAMES) * PAGE_BYTES,
        )?,
        store: bytes(
            Scalar::StoreFd,
            "holo-store",
            settings.store_limit_bytes + (4 << 20),
        )?,
    })
}

fn take(control: Control, s: Scalar) -> io::Result<OwnedFd> {
    control
        .fd(s)
        .and_then(table::duplicate)
        .ok_or_else(|| io::ErrorKind::NotFound.into())
}

/// Why a successor cannot take over.
#[derive(Debug, thiserror::Error)]
enum Unrecoverable {
    #[error("the map of its memory is lost: {0}")]
    Map(#[from] MapError),
    #[error("the store is lost: {0}")]
    Store(#[from] StoreError),
}

fn run_pager(post: &Post, first: bool) -> Result<(), String> {
    let (control, settings) = (post.control, &post.settings);
    let system = |what: &str| {
        let what = what.to_owned();
        move |e: io::Error| format!("{what}: {e}")
    };
    // What is open now, before anything of ours is: the predecessors', and what is known by number.
    let inherited = if first {
        Vec::new()
    } else {
        post.take_table();
        table::open_numbers().map_err(system("cannot list descriptors"))?
    };
    let opened = open_memory(control, settings, first).map_err(|e| {
        let why = match e.raw_os_error() {
            Some(libc::EAGAIN) => {
                "; it is locked into RAM, and `ulimit -l` is too low for that: raise it, or run as root"
            }
            _ => "",
        };
        format!("cannot make the pager's memory: {e}{why}")
    })?;
    let config = Config {
        budget_bytes: control.get(Scalar::Budget),
        frames: FRAMES,
        tracked_pages: tracked_pages(settings.local_memory_bytes),
        large_drop_bytes: LARGE_DROP_BYTES,
        restless_ns: RESTLESS_NS,
        childhood: Childhood {
            new_ns: 100_000_000,
            young_ns: 1_000_000_000,
            small_bytes: (settings.local_memory_bytes / 16).min(4 << 20),
        },
        crash: dying::crash,
    };
    let arena = opened.store;
    let limit = settings.store_limit_bytes;
    let core = if first {
        let store = EmbeddedStore::create(arena, limit);
        Core::create(opened.memory, store, config).map_err(|e| e.to_string())?
    } else {
        close_what_the_dead_left(control, opened.memory, &inherited);
        control.set_pid(Scalar::TableCleanedBy, spawn::own_pid());
        recover(control, opened.memory, arena, limit, config).map_err(|e| e.to_string())?
    };
    let console = if first {
        let console = open_console(control, settings.attach)?;
        control.set_fd(Scalar::ConsoleFd, console.as_raw_fd());
        console
    } else {
        Console::from_owned(
            take(control, Scalar::ConsoleFd).map_err(system("the console is lost"))?,
        )
    };
    let bells = || -> io::Result<_> { Ok((Arc::new(Queue::new()?), Arc::new(Queue::new()?))) };
    let (commands, errands) = bells().map_err(system("cannot make a bell"))?;
    let socket = table::duplicate(post.line).ok_or("the line to the guardian is lost")?;
    let line = Line::new(
        post.clone(),
        UnixDatagram::from(socket),
        Arc::clone(&commands),
    )
    .map_err(system("the line to the guardian"))?;
    // Before it has anything to serve: what a thread that cannot be started would have served would be closed.
    let (hand_over, taken_over) = channel();
    let serving = start_serving(taken_over, &commands, control)
        .map_err(system("cannot start the serving thread"))?;
    let mut live = Live::new(
        opened.frames,
        journal_slots(&core),
        Arc::clone(&errands),
        control.fd(Scalar::KeepersFd),
    );
    let recovered = if first {
        Vec::new()
    } else {
        take_over_targets(control, &core, &mut live)
    };
    let mut watch = Watch::new(control, Arc::clone(&commands), errands, line, console);
    let _ = hand_over.send((core, live));
    for (space, uffd, away) in recovered {
        watch.adopt_recovered(space, uffd, away);
    }
    watch.finish_what_was_begun();
    control.set(Scalar::Ready, 1);
    if control.fd(Scalar::AnswerFd).is_some() {
        if settings.attach.is_some() {
            watch.attach_first();
        }
        if let Some(why) = watch.refusal.take() {
            control.set(Scalar::Ready, 0);
            let _ = commands.push(live::Command::Finish);
            let _ = serving.join();
            return Err(why);
        }
        if settings.attach.is_some() {
            console::let_go_of_streams(control);
        }
        say(control, "ready");
    }
    watch.run();
    let _ = commands.push(live::Command::Finish);
    let _ = serving.join();
    control.set(Scalar::CpuOfPager, clock::process_cpu_ns());
    let json = serde_json::to_string(&report::build(control, None, 0)).unwrap_or_default();
    if let Some(fd) = settings.report_fd {
        if let Err(e) = spawn::write_all(fd, format!("{json}\n").as_bytes()) {
            let root = control.pid(Scalar::RootPid);
            watch.message(&format!("cannot write the report of process {root}: {e}"));
        }
    }
    watch.finish(&json);
    Ok(())
}

/// Starts the serving thread, which waits for what it is to serve. Where there is no room for a thread it is tried again:
/// a predecessor's processes wait for it.
fn start_serving(
    taken_over: Receiver<(LiveCore, Live)>,
    commands: &Arc<Queue<Command>>,
    control: Control,
) -> io::Result<JoinHandle<()>> {
    let taken_over = Arc::new(Mutex::new(taken_over));
    let mut tries = 0;
    loop {
        let (taken_over, commands) = (Arc::clone(&taken_over), Arc::clone(commands));
        let started = std::thread::Builder::new()
            .name("holo-serve".to_owned())
            .spawn(move || {
                let handed = taken_over.lock().map(|handed| handed.recv());
                if let Ok(Ok((core, live))) = handed {
                    serve::serve(core, live, &commands, control);
                }
            });
        match started {
            Err(e) if post::may_pass(&e) && tries < post::STARTS => {
                tries += 1;
                spawn::poll_readable(&[], Some(post::START_AGAIN_NS));
            }
            other => return other,
        }
    }
}

/// The console under the id that people know: the process that is attached, or the command line that runs a
/// command.
fn open_console(control: Control, attach: Option<i32>) -> Result<Console, String> {
    let id = attach.unwrap_or_else(|| control.pid(Scalar::StarterPid));
    let cannot = |e: io::Error| format!("cannot listen for requests: {e}");
    let holder = match Console::open(id) {
        Err(e) if e.kind() == io::ErrorKind::AddrInUse => console::holder(id),
        opened => return opened.map_err(cannot),
    };
    let stranger = holder.filter(|h| !h.is_trusted()).map(|h| {
        let (pid, uid) = (h.pid, h.uid);
        format!("process {pid} of user {uid} listens in the place of holo's pager for process {id}")
    });
    match (stranger, attach) {
        (Some(who), Some(_)) => Err(format!("{who}: end that one first")),
        (None, Some(_)) => Err(format!(
            "process {id} is held by holo already: `holo detach {id}` lets go of it first"
        )),
        // No reason not to run a command.
        (who, None) => {
            let console = Console::open_aside(id).map_err(cannot)?;
            let why = who.unwrap_or_else(|| "an earlier pager lives on under that id".to_owned());
            console::message(control, &format!("`holo status {id}` will not work: {why}"));
            Ok(console)
        }
    }
}

/// Room to keep the replacement order of all pages that can be resident, and some.
fn tracked_pages(budget_bytes: u64) -> usize {
    usize::try_from(budget_bytes / PAGE_BYTES * 2)
        .unwrap_or(usize::MAX)
        .clamp(4096, 1 << 20)
}

fn journal_slots(core: &LiveCore) -> Words<'static> {
    core.journal_slots()
}

fn recover(
    control: Control,
    memory: Memory<'static>,
    arena: SharedBytes,
    limit: u64,
    config: Config,
) -> Result<LiveCore, Unrecoverable> {
    let now = Nanos(clock::monotonic_ns());
    let mut core = Core::recover(memory, config, now, |live| {
        EmbeddedStore::recover(arena, limit, live.iter().copied()).map_err(Unrecoverable::from)
    })?;
    core.set_stats(control.stats());
    Ok(core)
}

/// The predecessor's other descriptors are in the shared table: closed, so that they don't pile up. What
/// is known by number stays, and so does what the journal says of forks that nobody has answered.
fn close_what_the_dead_left(control: Control, memory: Memory<'static>, inherited: &[i32]) {
    let mut keep: Vec<i32> = Vec::new();
    for s in [
        Scalar::MapFd,
        Scalar::JournalFd,
        Scalar::FramesFd,
        Scalar::StoreFd,
        Scalar::ConsoleFd,
        Scalar::LineFd,
        Scalar::GuardianLineFd,
        Scalar::GuardianWatchFd,
        Scalar::GuardianWardenFd,
        Scalar::WardenWatchFd,
        Scalar::AliveFd,
        Scalar::KeepersFd,
        Scalar::MessagesFd,
        Scalar::ReportFd,
        Scalar::AnswerFd,
    ] {
        keep.extend(control.fd(s));
    }
    for r in control.records() {
        keep.extend([r.uffd, r.pidfd, r.ring]);
    }
    let number = |w: u64| i32::try_from(w & 0xffff_ffff).unwrap_or(-1);
    for slot in 0..JOURNAL_SLOTS {
        // Word 1 of a fork's message is its descriptor; of others it is harmlessly kept.
        let at = JOURNAL_WORDS - (JOURNAL_SLOTS - slot) * EVENT_WORDS;
        keep.push(number(memory.journal[at + 1].load(Ordering::Acquire)));
    }
    if let Ok(map) = Map::recover(memory.map) {
        for space in map.spaces() {
            if map.state(space) != SlotState::Free {
                keep.push(number(map.owner_word(space)));
            }
        }
    }
    for &n in inherited {
        if n > 2 && !keep.contains(&n) {
            table::close(n);
        }
    }
}

/// Takes over the descriptors of every space; returns which, with the number of each userfaultfd.
fn take_over_targets(
    control: Control,
    core: &LiveCore,
    live: &mut Live,
) -> Vec<(SpaceId, i32, bool)> {
    let mut found = Vec::new();
    let map = core.map();
    for space in map.spaces() {
        let Ok(number) = i32::try_from(map.owner_word(space)) else {
            continue;
        };
        let Some(fd) = table::claim(number) else {
            continue;
        };
        let uffd = crate::sys::uffd::Uffd::from_owned(fd);
        let record = control.record(number);
        if record.is_none_or(|r| r.keeper < 0) {
            live.have_kept(number);
        }
        let parts = record.and_then(|r| watch::parts(r.pid));
        let ring = record
            .filter(|r| r.ring >= 0)
            .and_then(|r| watch::map_ring(&r))
            .map(Box::new);
        // Nobody has read a message since the map was written.
        let away = core.is_away(space) && family::is_calm(&uffd);
        live.quiet_wait[usize::from(space.0)] = true;
        live.targets[usize::from(space.0)] = Some(Box::new(live::Target::new(uffd, parts, ring)));
        found.push((space, number, away));
    }
    found
}
