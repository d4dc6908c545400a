//! What this process was started with and has changed for itself, and a command that it runs is to find as it
//! was: ignored SIGPIPE and SIGCHLD, closed standard streams.

use std::io;
use std::os::unix::process::CommandExt as _;
use std::process::Command;
use std::sync::atomic::{AtomicU8, Ordering};

/// Standard streams; the bit of each that was closed is its number's.
const STREAMS: u8 = 3;
const PIPE_IGNORED: u8 = 1 << STREAMS;

static AT_START: AtomicU8 = AtomicU8::new(0);

/// Rust ignores SIGPIPE and opens closed streams before `main`, so this is called before that.
extern "C" fn look() {
    let mut seen = 0;
    for n in 0..STREAMS {
        // SAFETY: asks for flags of a number; changes nothing.
        if unsafe { libc::fcntl(i32::from(n), libc::F_GETFD) } < 0 {
            seen |= 1 << n;
        }
    }
    if is_ignored(libc::SIGPIPE) {
        seen |= PIPE_IGNORED;
    }
    AT_START.store(seen, Ordering::Relaxed);
}

// SAFETY: the section holds addresses of functions that the C library calls once each, before `main`.
#[unsafe(link_section = ".init_array")]
#[used]
static LOOK: extern "C" fn() = look;

fn is_ignored(signal: i32) -> bool {
    let mut action = std::mem::MaybeUninit::<libc::sigaction>::zeroed();
    // SAFETY: changes nothing; the structure is valid for the write.
    if unsafe { libc::sigaction(signal, std::ptr::null(), action.as_mut_ptr()) } != 0 {
        return false;
    }
    // SAFETY: filled by the call, and zeroed before.
    unsafe { action.assume_init() }.sa_sigaction == libc::SIG_IGN
}

/// What was found at the start.
#[derive(Clone, Copy, Debug)]
pub struct Inherited {
    at_start: u8,
    children_ignored: bool,
}

impl Inherited {
    /// Notes it, and takes SIGCHLD back: where it is ignored nobody can be waited for.
    #[must_use]
    pub fn take() -> Self {
        let children_ignored = is_ignored(libc::SIGCHLD);
        if children_ignored {
            // SAFETY: the default disposition runs no code.
            unsafe { libc::signal(libc::SIGCHLD, libc::SIG_DFL) };
        }
        Self {
            at_start: AT_START.load(Ordering::Relaxed),
            children_ignored,
        }
    }

    /// Lets the command begin with it.
    pub fn restore_in(self, command: &mut Command) {
        let restore = move || {
            let ignored = [
                (libc::SIGPIPE, self.at_start & PIPE_IGNORED != 0),
                (libc::SIGCHLD, self.children_ignored),
            ];
            for (signal, _) in ignored.into_iter().filter(|&(_, ignored)| ignored) {
                // SAFETY: the disposition "ignore" runs no code.
                if unsafe { libc::signal(signal, libc::SIG_IGN) } == libc::SIG_ERR {
                    return Err(io::Error::last_os_error());
                }
            }
            for n in (0..STREAMS).filter(|n| self.at_start & 1 << n != 0) {
                // SAFETY: what Rust's start put there, in a process that only starts the command.
                unsafe { libc::close(i32::from(n)) };
            }
            Ok(())
        };
        // SAFETY: between fork and exec it makes async-signal-safe calls only, and allocates nothing.
        unsafe { command.pre_exec(restore) };
    }
}
