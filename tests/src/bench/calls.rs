//! Requests of the kernel that are recognised in a trace.

/// `UFFDIO_COPY`.
pub const COPY: u64 = 0xc028_aa03;
/// `UFFDIO_WAKE`.
pub const WAKE: u64 = 0x8010_aa02;
/// `UFFDIO_WRITEPROTECT`, both to protect and to un-protect.
pub const WRITE_PROTECT: u64 = 0xc018_aa06;
/// `PAGEMAP_SCAN` (Linux 6.7).
pub const PAGEMAP_SCAN: u64 = 0xc060_6610;

/// What a userfaultfd gives for each message.
pub const MESSAGE_BYTES: i64 = 32;

/// Whether a call of this number asks whether something has happened, or waits for it.
#[must_use]
pub fn is_poll(number: i64) -> bool {
    matches!(
        number,
        libc::SYS_poll | libc::SYS_ppoll | libc::SYS_epoll_wait
    )
}
