//! The kernel layer: small safe types over the system calls that paging a process needs.
//!
//! The only place of this crate with `unsafe`. It decides nothing: every answer of the kernel goes up
//! as a meaning (see [`errors`]). A target's addresses and everything it can write are claims here:
//! no reference is ever held to memory that another process may change, only atomics are.

pub mod advise;
pub mod arena;
pub mod attach;
mod boost;
pub mod clock;
pub mod errors;
mod fds;
pub mod inherited;
mod inject;
mod mapped;
pub mod maps;
pub mod mem;
pub mod notify;
pub mod pagemap;
mod process;
pub mod procfs;
mod ptrace;
mod quiesce;
mod refuse;
mod restart;
pub mod ring;
pub mod signals;
pub mod spawn;
pub mod table;
pub mod uffd;
mod worker;

#[cfg(test)]
pub(crate) mod testing;

#[cfg(not(all(target_os = "linux", target_arch = "x86_64")))]
compile_error!("holo's kernel layer knows Linux on x86-64 only");

/// A 64-bit number as a length or offset of this process.
pub(crate) const fn usize_of(n: u64) -> usize {
    #[expect(
        clippy::cast_possible_truncation,
        reason = "usize has 64 bits on the only architecture that compiles"
    )]
    let n = n as usize;
    n
}

/// The errno of the call that just failed.
pub(crate) fn errno() -> i32 {
    std::io::Error::last_os_error().raw_os_error().unwrap_or(0)
}
