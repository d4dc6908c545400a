//! Fork children's userfaultfds, kept by `holo-exec` as well.
//!
//! A process that was taken keeps a descriptor of its userfaultfd itself. A fork's child has none: when
//! pager, guardian and warden die at once the kernel forgets its registrations, and what is away of it reads
//! zero until `holo-exec` has killed it. So every child's descriptor is sent to `holo-exec`, which only
//! has it: the child waits at the next page that is away.

use std::io;
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::os::unix::net::UnixStream;

use super::family;
use crate::sys::table;
use crate::sys::uffd::Uffd;

/// What `holo-exec` keeps.
pub(crate) struct Keepers {
    socket: UnixStream,
    kept: Vec<Uffd>,
}

impl Keepers {
    /// With the end that descriptors are sent from ([`table::send`]).
    pub(crate) fn new() -> io::Result<(Self, OwnedFd)> {
        let (socket, theirs) = UnixStream::pair()?;
        let kept = Vec::new();
        Ok((Self { socket, kept }, theirs.into()))
    }

    /// Readable when something was sent, or nobody is left who could.
    pub(crate) fn as_raw_fd(&self) -> i32 {
        self.socket.as_raw_fd()
    }

    /// Takes what was sent, and drops what is of address spaces that are gone.
    pub(crate) fn take(&mut self) {
        while let Some(fd) = table::receive(&self.socket) {
            self.kept.retain(|uffd| !family::is_gone(uffd));
            // A pager that takes over sends all of them again: its predecessor may have died over one.
            if !self.kept.iter().any(|uffd| table::are_the_same(uffd, &fd)) {
                self.kept.push(Uffd::from_owned(fd));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::testing::Target;

    #[test]
    fn each_is_kept_once_and_until_its_process_has_ended() {
        let (mut keepers, theirs) = Keepers::new().unwrap();
        let (mut first, mut second) = (Target::start(), Target::start());
        let (one, other) = (first.uffd(), second.uffd());
        let send = |uffd: &Uffd| assert!(table::send(theirs.as_raw_fd(), uffd.as_raw_fd()));
        keepers.take();
        assert!(keepers.kept.is_empty());
        send(&one);
        send(&one);
        keepers.take();
        send(&one);
        keepers.take();
        assert_eq!(keepers.kept.len(), 1);
        send(&other);
        keepers.take();
        assert_eq!(keepers.kept.len(), 2);
        first.end();
        send(&other);
        keepers.take();
        assert_eq!(keepers.kept.len(), 1);
        assert!(table::are_the_same(&keepers.kept[0], &other));
        assert_ne!(keepers.kept[0].as_raw_fd(), other.as_raw_fd());
        drop(theirs);
        keepers.take();
        assert_eq!(keepers.kept.len(), 1);
    }

    #[test]
    fn sending_waits_for_nobody() {
        let (keepers, theirs) = Keepers::new().unwrap();
        let uffd = Target::start().uffd();
        let send = || table::send(theirs.as_raw_fd(), uffd.as_raw_fd());
        // Until there is no room.
        while send() {}
        drop(keepers);
        assert!(!send());
    }
}
