//! What a thread can do without: rights and files. Linux keeps both for each thread.

pub(crate) const CAP_SYS_ADMIN: u32 = 21;

/// Runs `work` as the unprivileged user.
pub(crate) fn privilege<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    on_a_thread(move || {
        let nobody = 65534;
        // The bare calls: the C library's change all threads.
        // SAFETY: touches no memory of ours.
        let r = unsafe { libc::syscall(libc::SYS_setresgid, nobody, nobody, nobody) };
        assert_eq!(r, 0);
        // SAFETY: as above.
        let r = unsafe { libc::syscall(libc::SYS_setresuid, nobody, nobody, nobody) };
        assert_eq!(r, 0);
        work()
    })
}

/// Runs `work` without one capability.
pub(crate) fn capability<T: Send + 'static>(
    number: u32,
    work: impl FnOnce() -> T + Send + 'static,
) -> T {
    on_a_thread(move || {
        // Version 3 of the interface, for the calling thread.
        let header = [0x2008_0522_u32, 0];
        let mut sets = [0_u32; 6];
        // SAFETY: both arrays have the interface's sizes.
        let r = unsafe { libc::syscall(libc::SYS_capget, header.as_ptr(), sets.as_mut_ptr()) };
        assert_eq!(r, 0);
        // Effective and permitted, lower half.
        sets[0] &= !(1 << number);
        sets[1] &= !(1 << number);
        // SAFETY: as above.
        let r = unsafe { libc::syscall(libc::SYS_capset, header.as_ptr(), sets.as_ptr()) };
        assert_eq!(r, 0);
        work()
    })
}

/// Runs `work` where `path` is another, useless device.
pub(crate) fn file<T: Send + 'static>(
    path: &'static str,
    work: impl FnOnce() -> T + Send + 'static,
) -> T {
    on_a_thread(move || {
        // SAFETY: touches no memory of ours; affects the calling thread.
        let r = unsafe { libc::unshare(libc::CLONE_NEWNS | libc::CLONE_FS) };
        assert_eq!(r, 0);
        let mount = |from: &str, to: &str, flags| {
            let (from, to) = (std::ffi::CString::new(from), std::ffi::CString::new(to));
            let (from, to) = (from.unwrap(), to.unwrap());
            let none = std::ptr::null();
            // SAFETY: the strings live until the call returns.
            let r = unsafe { libc::mount(from.as_ptr(), to.as_ptr(), none, flags, none.cast()) };
            assert_eq!(r, 0, "{}", std::io::Error::last_os_error());
        };
        mount("none", "/", libc::MS_REC | libc::MS_PRIVATE);
        mount("/dev/null", path, libc::MS_BIND);
        work()
    })
}

/// Runs `work` where so few descriptors can be opened.
pub(crate) fn descriptors<T: Send + 'static>(
    free: usize,
    work: impl FnOnce() -> T + Send + 'static,
) -> T {
    on_a_thread(move || {
        // A table of its own, which the threads that it starts share.
        // SAFETY: touches no memory of ours; affects the calling thread.
        let r = unsafe { libc::unshare(libc::CLONE_FILES) };
        assert_eq!(r, 0);
        let one = std::fs::File::open("/dev/null").unwrap();
        let mut full: Vec<_> = std::iter::from_fn(|| one.try_clone().ok()).collect();
        full.truncate(full.len() - free);
        work()
    })
}

fn on_a_thread<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    match std::thread::spawn(work).join() {
        Ok(result) => result,
        Err(panic) => std::panic::resume_unwind(panic),
    }
}
