//! Reading a process's mappings: what is taken, what is left alone, and why.

use holo_proto::{Addr, AddrRange, LeftAlone, PAGE_BYTES};

use crate::sys::maps::{self, MapName, Mapping, ProcMaps, VmFlags};

/// Smaller mappings are not worth a registration each.
const MAPPING_MIN_BYTES: u64 = 2 * PAGE_BYTES;
/// Unless they hold so much together: a program that moves and unmaps pieces of its memory leaves it in
/// thousands of mappings that never melt into one again.
const SMALL_MIN_BYTES: u64 = 1 << 20;

/// Whether a mapping could be paged, as far as `/proc/PID/maps` says.
fn is_candidate(m: &Mapping<'_>) -> bool {
    is_plain(m) && m.range.len() >= MAPPING_MIN_BYTES
}

fn is_plain(m: &Mapping<'_>) -> bool {
    m.is_private_anonymous()
        && m.read
        && m.write
        && !m.exec
        && match m.name {
            MapName::Anonymous | MapName::AnonymousNamed(_) | MapName::Heap => true,
            MapName::Stack | MapName::Vdso | MapName::Other(_) => false,
        }
}

/// The candidates' ranges of a process, in order, into `out`: those whose mapping holds no address of
/// `never`. Cheap, and blind for flags: a locked mapping is found out when the kernel refuses it.
pub(crate) fn candidates(
    text: &mut Vec<u8>,
    maps: &ProcMaps,
    never: &[Addr],
    out: &mut Vec<AddrRange>,
) -> std::io::Result<()> {
    maps.read_into(text)?;
    out.clear();
    let free = |r: &AddrRange| !never.iter().any(|&a| r.contains(a));
    out.extend(
        maps::mappings(text)
            .filter(is_candidate)
            .map(|m| m.range)
            .filter(free),
    );
    Ok(())
}

/// Private anonymous bytes of a process that it shares with fork relatives, of which there are `relatives`
/// with itself: these cannot be paged while they are shared. From the difference of size and proportional
/// size, taking each shared page as shared by all of them.
pub(crate) fn shared_bytes(pid: i32, relatives: u64) -> std::io::Result<u64> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/smaps_rollup"))?;
    let kib = |key: &str| -> u64 {
        text.lines()
            .find_map(|l| l.strip_prefix(key))
            .and_then(|l| l.trim().trim_end_matches(" kB").parse().ok())
            .unwrap_or(0)
    };
    let (all, proportional) = (kib("Anonymous:"), kib("Pss_Anon:"));
    let shared = all.saturating_sub(proportional) * relatives / relatives.saturating_sub(1).max(1);
    Ok(shared.min(all) * 1024)
}

/// What a full look at a process's mappings says.
#[derive(Debug, Default)]
pub(crate) struct Survey {
    /// To be registered, and not registered yet: those that [`candidates`] has as well, for whoever lost one of
    /// them, and small ones if there are enough.
    pub(crate) take: Vec<AddrRange>,
    /// Registered to a userfaultfd already.
    pub(crate) registered: Vec<AddrRange>,
    /// Wiped in a fork's child.
    pub(crate) wiped: Vec<AddrRange>,
    /// Left out of a fork's child.
    pub(crate) left_out: Vec<AddrRange>,
    /// Pages that are not taken.
    pub(crate) left: LeftAlone,
    /// Private anonymous bytes in memory that are not taken.
    pub(crate) left_bytes: u64,
}

/// Reads a process's smaps. `never` are addresses whose mapping must not be taken.
///
/// # Errors
/// What the kernel says; NotFound for a process whose memory is gone already.
pub(crate) fn survey(pid: i32, never: &[Addr]) -> std::io::Result<Survey> {
    let mut text = Vec::new();
    ProcMaps::open_smaps(pid)?.read_into(&mut text)?;
    if text.is_empty() {
        return Err(std::io::ErrorKind::NotFound.into());
    }
    let mut s = Survey::default();
    let (mut small, mut small_bytes) = (Vec::new(), 0);
    let mut data_end = Addr(0);
    for d in maps::smaps(&text) {
        let m = &d.mapping;
        let pages = d.rss_bytes.div_ceil(PAGE_BYTES);
        // The rest of a file's data: a static C library keeps words there that the kernel writes with
        // faults forbidden (thread ids).
        let of_file = m.range.start == data_end;
        if m.inode != 0 && !m.shared && m.write {
            data_end = m.range.end;
        }
        if d.flags.has(VmFlags::WIPE_ON_FORK) {
            s.wiped.push(m.range);
        }
        if d.flags.has(VmFlags::DONT_COPY) {
            s.left_out.push(m.range);
        }
        if d.flags.has(VmFlags::UFFD_MISSING) {
            s.registered.push(m.range);
            continue;
        }
        let is_odd = [
            VmFlags::HUGETLB,
            VmFlags::IO,
            VmFlags::PFN_MAP,
            VmFlags::GROWS_DOWN,
            VmFlags::WIPE_ON_FORK,
            VmFlags::DONT_COPY,
        ]
        .iter()
        .any(|&flag| d.flags.has(flag));
        if d.flags.has(VmFlags::LOCKED) {
            s.left.locked += pages;
        } else if m.shared {
            s.left.shared += pages;
        } else if m.inode != 0 {
            s.left.file += pages;
        } else if never.iter().any(|&a| m.range.contains(a)) || matches!(m.name, MapName::Stack) {
            s.left.stack += pages;
        } else if is_candidate(m) && !is_odd {
            s.take.push(m.range);
            continue;
        } else if is_plain(m) && !is_odd && !of_file {
            small_bytes += d.anonymous_bytes;
            small.push(m.range);
            continue;
        }
        s.left_bytes += d.anonymous_bytes;
    }
    if small_bytes < SMALL_MIN_BYTES {
        s.left_bytes += small_bytes;
    } else {
        s.take.append(&mut small);
    }
    Ok(s)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::testing::{Target, next_event};
    use crate::sys::uffd::Event;

    #[test]
    fn a_mapping_that_is_not_registered_is_found_by_every_survey_until_it_is() {
        let mut target = Target::start();
        let (range, small) = (target.map(64), target.map(4));
        let uffd = target.uffd();
        let found = |target: &Target| {
            let s = survey(target.pid, &[]).unwrap();
            assert!(!s.take.contains(&small));
            (s.take.contains(&range), s.registered.contains(&range))
        };
        assert_eq!(found(&target), (true, false));
        assert_eq!(found(&target), (true, false));
        uffd.register(range).unwrap();
        assert_eq!(found(&target), (false, true));
        // It goes and comes back at the same place.
        let prot = u64::from((libc::PROT_READ | libc::PROT_WRITE).cast_unsigned());
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED;
        let flags = u64::from(flags.cast_unsigned());
        target.begin_syscall(
            libc::SYS_mmap,
            [range.start.0, range.len(), prot, flags, u64::MAX],
        );
        assert_eq!(next_event(&uffd), Event::Unmap(range));
        assert_eq!(target.finish().cast_unsigned(), range.start.0);
        assert_eq!(found(&target), (true, false));
    }

    #[test]
    fn small_mappings_are_taken_when_there_are_enough_of_them() {
        let mut target = Target::start();
        let mut small = Vec::new();
        while small.len() < 15 {
            let range = target.map(16);
            target.fill(range, 1);
            small.push(range);
        }
        let taken = |target: &Target| survey(target.pid, &[]).unwrap();
        let before = taken(&target);
        assert!(small.iter().all(|r| !before.take.contains(r)));
        while small.len() < 32 {
            let range = target.map(16);
            target.fill(range, 1);
            small.push(range);
        }
        let after = taken(&target);
        assert!(small.iter().all(|r| after.take.contains(r)));
        assert!(after.left_bytes < before.left_bytes);
    }
}
