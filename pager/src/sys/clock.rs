//! The clocks that the pager's shell reads; cores are handed times.

/// Nanoseconds of CLOCK_MONOTONIC.
#[must_use]
pub fn monotonic_ns() -> u64 {
    read(libc::CLOCK_MONOTONIC)
}

/// CPU time of this process, nanoseconds.
#[must_use]
pub fn process_cpu_ns() -> u64 {
    read(libc::CLOCK_PROCESS_CPUTIME_ID)
}

fn read(clock: libc::clockid_t) -> u64 {
    let mut t = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: `t` is valid for the write; these clocks exist on every Linux, so it is always filled.
    unsafe { libc::clock_gettime(clock, &raw mut t) };
    let part = |n: i64| u64::try_from(n).unwrap_or(0);
    part(t.tv_sec) * 1_000_000_000 + part(t.tv_nsec)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clocks_go_forward_with_work() {
        let (wall, cpu) = (monotonic_ns(), process_cpu_ns());
        while process_cpu_ns() == cpu {
            std::hint::spin_loop();
        }
        assert!(monotonic_ns() > wall);
    }
}
