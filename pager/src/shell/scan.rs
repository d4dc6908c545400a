//! Reading a process's mappings: what is taken, what is left alone, and why.

use holo_proto::{Addr, AddrRange, LeftAlone, PAGE_BYTES};

use crate::sys::maps::{self, MapName, Mapping, ProcMaps, VmFlags};

/// Smaller mappings are not worth a registration each, unless they touch another one: without us the kernel
/// might have melted the two into one, and the program may move that one as a whole.
const MAPPING_MIN_BYTES: u64 = 2 * PAGE_BYTES;
/// Or unless they hold so much together: a program that moves and unmaps pieces of its memory leaves it in
/// thousands of mappings that never melt into one again.
const SMALL_MIN_BYTES: u64 = 1 << 20;

/// Whether a mapping could be paged, as far as `/proc/PID/maps` says.
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

const fn is_small(range: AddrRange) -> bool {
    range.len() < MAPPING_MIN_BYTES
}

/// Sees the mappings of a process in order, and says of each whether it is the rest of a file's data. A
/// static C library keeps words there that the kernel writes with faults forbidden (thread ids).
struct FileData {
    end: Addr,
}

impl FileData {
    const fn new() -> Self {
        Self { end: Addr(0) }
    }

    fn continues_in(&mut self, m: &Mapping<'_>) -> bool {
        let continues = m.range.start == self.end;
        if m.inode != 0 && !m.shared && m.write {
            self.end = m.range.end;
        }
        continues
    }
}

/// The candidates' ranges of a process, in order, into `out`: those whose mapping holds no address of
/// `never`. Cheap, and blind for flags: a locked mapping is found out by a survey, or when the kernel refuses to evict it.
pub(crate) fn candidates(
    text: &mut Vec<u8>,
    maps: &ProcMaps,
    never: &[Addr],
    out: &mut Vec<AddrRange>,
) -> std::io::Result<()> {
    maps.read_into(text)?;
    out.clear();
    let mut data = FileData::new();
    for m in maps::mappings(text) {
        let of_file = data.continues_in(&m);
        let free = !never.iter().any(|&a| m.range.contains(a));
        if is_plain(&m) && free && !(of_file && is_small(m.range)) {
            out.push(m.range);
        }
    }
    let (mut kept, mut last_end) = (0, Addr(0));
    for i in 0..out.len() {
        let range = out[i];
        let next = out.get(i + 1);
        let touches = range.start == last_end || next.is_some_and(|next| next.start == range.end);
        last_end = range.end;
        if touches || !is_small(range) {
            out[kept] = range;
            kept += 1;
        }
    }
    out.truncate(kept);
    Ok(())
}

/// Private anonymous bytes of a process that it shares with fork relatives: these cannot be paged while they are
/// shared. `text` is room for what is read.
///
/// # Errors
/// What the kernel says.
pub(crate) fn shared_bytes(pid: i32, text: &mut Vec<u8>) -> std::io::Result<u64> {
    ProcMaps::open_smaps(pid)?.read_into(text)?;
    let all = maps::smaps(text).filter(|d| d.mapping.is_private_anonymous());
    Ok(all.map(|d| d.shared_bytes).sum())
}

/// What a full look at a process's mappings says.
#[derive(Debug, Default)]
pub(crate) struct Survey {
    /// To be registered, and not registered yet: those that [`candidates`] has as well, for whoever lost one of
    /// them, and small ones if there are enough, or if they touch a registered one.
    pub(crate) take: Vec<AddrRange>,
    /// Registered to a userfaultfd already.
    pub(crate) registered: Vec<AddrRange>,
    /// Wiped in a fork's child.
    pub(crate) wiped: Vec<AddrRange>,
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
    let mut small = Vec::new();
    let mut data = FileData::new();
    for d in maps::smaps(&text) {
        let m = &d.mapping;
        let pages = d.rss_bytes.div_ceil(PAGE_BYTES);
        let of_file = data.continues_in(m);
        if d.flags.has(VmFlags::WIPE_ON_FORK) {
            s.wiped.push(m.range);
        }
        // Also where it was locked after it was registered. (Its bytes still count against the budget: a survey is made only
        // where that is exceeded, and could not take back later what it said of them.)
        let is_locked = d.flags.has(VmFlags::LOCKED);
        if is_locked {
            s.left.locked += pages;
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
        if is_locked {
            // Counted.
        } else if m.shared {
            s.left.shared += pages;
        } else if m.inode != 0 {
            s.left.file += pages;
        } else if never.iter().any(|&a| m.range.contains(a)) || matches!(m.name, MapName::Stack) {
            s.left.stack += pages;
        } else if is_plain(m) && !is_odd && !is_small(m.range) {
            s.take.push(m.range);
            continue;
        } else if is_plain(m) && !is_odd && !of_file {
            small.push((m.range, d.anonymous_bytes));
            continue;
        }
        s.left_bytes += d.anonymous_bytes;
    }
    let enough = small.iter().map(|&(_, bytes)| bytes).sum::<u64>() >= SMALL_MIN_BYTES;
    for (range, bytes) in small {
        if enough || touches(&s.registered, range) {
            s.take.push(range);
        } else {
            s.left_bytes += bytes;
        }
    }
    Ok(s)
}

/// Whether one of `ranges`, which are in order, ends where `range` begins, or begins where it ends.
fn touches(ranges: &[AddrRange], range: AddrRange) -> bool {
    let after = ranges.partition_point(|r| r.start < range.start);
    let before = after.checked_sub(1).map(|i| ranges[i]);
    before.is_some_and(|r| r.end == range.start)
        || ranges.get(after).is_some_and(|r| r.start == range.end)
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
    fn what_a_fork_shares_is_counted_page_by_page_whatever_else_runs() {
        let mut target = Target::start();
        let (ours, own) = (target.map(64), target.map(64));
        target.fill(ours, 1);
        target.fill(own, 1);
        let mut text = Vec::new();
        let mut shared = |pid| shared_bytes(pid, &mut text).unwrap();
        let before = shared(target.pid);
        target.begin_fork();
        target.finish();
        let both = shared(target.pid);
        assert!(both >= before + (128 << 12), "{before} {both}");
        // Written by one of the two, it is of each alone.
        target.fill(own, 2);
        let after = shared(target.pid);
        assert!(
            after + (64 << 12) <= both && after >= before + (64 << 12),
            "{before} {both} {after}"
        );
        target.end();
    }

    #[test]
    fn what_is_locked_counts_as_left_alone_also_where_it_is_registered() {
        let mut target = Target::start();
        let range = target.map(64);
        target.fill(range, 1);
        let uffd = target.uffd();
        uffd.register(range).unwrap();
        let before = survey(target.pid, &[]).unwrap();
        target.begin_syscall(libc::SYS_mlock, [range.start.0, range.len(), 0, 0, 0]);
        assert_eq!(target.finish(), 0);
        let after = survey(target.pid, &[]).unwrap();
        assert!(after.registered.contains(&range));
        assert_eq!(after.left.locked, before.left.locked + 64 / 16);
    }

    #[test]
    fn a_small_mapping_that_touches_another_is_a_candidate() {
        let mut target = Target::start();
        let (range, alone) = (target.map(64), target.map(4));
        let part = |first: u64, end: u64| {
            let at = |i| range.start.0 + i * 4096;
            AddrRange::new(at(first), at(end))
        };
        let uffd = target.uffd();
        let maps = ProcMaps::open(target.pid).unwrap();
        let (mut text, mut out) = (Vec::new(), Vec::new());
        let mut inside = |never: &[Addr]| {
            candidates(&mut text, &maps, never, &mut out).unwrap();
            assert!(!out.contains(&alone));
            out.retain(|r| r.overlaps(range));
            out.clone()
        };
        assert_eq!(inside(&[]), [range]);
        uffd.register(part(0, 40)).unwrap();
        uffd.register(part(44, 64)).unwrap();
        let pieces = [part(0, 40), part(40, 44), part(44, 64)];
        assert_eq!(inside(&[]), pieces);
        assert_eq!(inside(&[part(40, 44).start]), [part(0, 40)]);
        let s = survey(target.pid, &[]).unwrap();
        assert!(s.take.contains(&part(40, 44)) && !s.take.contains(&alone));
        assert!(s.registered.contains(&part(0, 40)) && s.registered.contains(&part(44, 64)));
        uffd.register(part(40, 44)).unwrap();
        assert_eq!(inside(&[]), [range]);
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
