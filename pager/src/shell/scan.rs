//! Reading a process's mappings: what is taken, what is left alone, and why.

use holo_proto::{Addr, AddrRange, LeftAlone, PAGE_BYTES};

use crate::sys::maps::{self, MapName, Mapping, ProcMaps, VmFlags};

/// Smaller mappings are not worth a registration, and hold the small words that the kernel writes with
/// faults forbidden (thread ids in a static C library's data).
pub(crate) const MAPPING_MIN_BYTES: u64 = 2 * PAGE_BYTES;

/// Whether a mapping could be paged, as far as `/proc/PID/maps` says.
pub(crate) fn is_candidate(m: &Mapping<'_>) -> bool {
    m.is_private_anonymous()
        && m.read
        && m.write
        && !m.exec
        && m.range.len() >= MAPPING_MIN_BYTES
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
    /// To be registered.
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
pub(crate) fn survey(pid: i32, never: &[Addr]) -> std::io::Result<Survey> {
    let mut text = Vec::new();
    ProcMaps::open_smaps(pid)?.read_into(&mut text)?;
    let mut s = Survey::default();
    for d in maps::smaps(&text) {
        let m = &d.mapping;
        let pages = d.rss_bytes.div_ceil(PAGE_BYTES);
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
        let odd = [
            VmFlags::HUGETLB,
            VmFlags::IO,
            VmFlags::PFN_MAP,
            VmFlags::GROWS_DOWN,
            VmFlags::WIPE_ON_FORK,
            VmFlags::DONT_COPY,
        ];
        if d.flags.has(VmFlags::LOCKED) {
            s.left.locked += pages;
        } else if m.shared {
            s.left.shared += pages;
        } else if m.inode != 0 {
            s.left.file += pages;
        } else if never.iter().any(|&a| m.range.contains(a)) || matches!(m.name, MapName::Stack) {
            s.left.stack += pages;
        } else if is_candidate(m) && !odd.iter().any(|&f| d.flags.has(f)) {
            s.take.push(m.range);
            continue;
        }
        s.left_bytes += d.anonymous_bytes;
    }
    Ok(s)
}
