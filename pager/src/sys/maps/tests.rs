use std::fmt::Write as _;

use proptest::prelude::*;

use super::super::testing::Target;
use super::*;

/// A name as a process can make the kernel print it: paths with any byte but newline and NUL (the kernel
/// prints a newline as `\012`), deleted or not, and the kernel's own names.
fn odd_name() -> impl Strategy<Value = Vec<u8>> {
    let path = proptest::collection::vec(
        prop_oneof![
            4 => any::<u8>().prop_filter("printed raw", |b| !matches!(b, 0 | b'\n')).prop_map(|b| vec![b]),
            1 => Just(b"\\012".to_vec()),
            1 => Just(b" (deleted)".to_vec()),
            1 => Just(b"7f00-7f01 rw-p 0 00:00 0 [heap]".to_vec()),
            1 => Just(b"VmFlags: lo".to_vec()),
        ],
        0..12,
    )
    .prop_map(|parts| [b"/".as_slice(), &parts.concat()].concat());
    prop_oneof![
        path,
        Just(Vec::new()),
        Just(b"[heap]".to_vec()),
        Just(b"[stack]".to_vec()),
        Just(b"[vdso]".to_vec()),
        Just(b"[vvar]".to_vec()),
        Just(b"[anon:my arena]".to_vec()),
        Just(b"anon_inode:[io_uring]".to_vec()),
        Just(b"/memfd:x (deleted)".to_vec()),
    ]
}

#[derive(Clone, Debug)]
struct Line {
    start: u64,
    pages: u64,
    perms: [bool; 4],
    offset: u64,
    inode: u64,
    name: Vec<u8>,
}

fn line() -> impl Strategy<Value = Line> {
    (
        0..1_u64 << 43,
        1..1_u64 << 20,
        any::<[bool; 4]>(),
        0..1_u64 << 40,
        prop_oneof![Just(0), any::<u64>()],
        odd_name(),
    )
        .prop_map(|(page, pages, perms, offset, inode, name)| Line {
            start: page * 4096,
            pages,
            perms,
            offset: offset * 4096,
            inode,
            name,
        })
}

/// Prints as the kernel does: the name is padded to column 73.
fn print(line: &Line, out: &mut Vec<u8>) {
    let [r, w, x, s] = line.perms;
    let mut head = String::new();
    write!(
        head,
        "{:08x}-{:08x} {}{}{}{} {:08x} fe:00 {} ",
        line.start,
        line.start + line.pages * 4096,
        if r { 'r' } else { '-' },
        if w { 'w' } else { '-' },
        if x { 'x' } else { '-' },
        if s { 's' } else { 'p' },
        line.offset,
        line.inode,
    )
    .unwrap();
    if !line.name.is_empty() {
        while head.len() < 73 {
            head.push(' ');
        }
    }
    out.extend(head.as_bytes());
    out.extend(&line.name);
    out.push(b'\n');
}

fn check(got: &Mapping<'_>, line: &Line) {
    assert_eq!(
        got.range,
        AddrRange::new(line.start, line.start + line.pages * 4096)
    );
    assert_eq!([got.read, got.write, got.exec, got.shared], line.perms);
    assert_eq!((got.offset, got.inode), (line.offset, line.inode));
    let want = match line.name.as_slice() {
        b"" => MapName::Anonymous,
        b"[heap]" => MapName::Heap,
        b"[stack]" => MapName::Stack,
        b"[vdso]" => MapName::Vdso,
        b"[anon:my arena]" => MapName::AnonymousNamed(b"my arena"),
        other => MapName::Other(other),
    };
    assert_eq!(got.name, want);
}

proptest! {
    #[test]
    fn every_printed_mapping_is_parsed_back(lines in proptest::collection::vec(line(), 0..8)) {
        let mut text = Vec::new();
        for line in &lines {
            print(line, &mut text);
        }
        let got: Vec<_> = mappings(&text).collect();
        prop_assert_eq!(got.len(), lines.len());
        for (got, line) in got.iter().zip(&lines) {
            check(got, line);
        }
    }

    #[test]
    fn every_printed_detail_is_parsed_back(
        lines in proptest::collection::vec((line(), 0..1_u64 << 30, any::<bool>(), any::<bool>()), 0..8)
    ) {
        let mut text = Vec::new();
        for (line, kb, served, locked) in &lines {
            print(line, &mut text);
            let mut rest = format!("Size: {:12} kB\nRss: {kb:12} kB\nPss: 1 kB\n", line.pages * 4);
            writeln!(rest, "Shared_Clean: {:6} kB\nShared_Dirty: {:6} kB", kb / 4, kb / 2).unwrap();
            writeln!(rest, "Private_Dirty: 1 kB\nAnonymous: {:9} kB", kb / 2).unwrap();
            writeln!(rest, "Locked: {:9} kB\nTHPeligible:    0\nProtectionKey:  0", kb / 4).unwrap();
            let (um, lo) = (if *served { "um uw " } else { "" }, if *locked { "lo " } else { "" });
            writeln!(rest, "VmFlags: rd wr mr mw me {um}{lo}ac sd ").unwrap();
            text.extend(rest.as_bytes());
        }
        let got: Vec<_> = smaps(&text).collect();
        prop_assert_eq!(got.len(), lines.len());
        for (got, (line, kb, served, locked)) in got.iter().zip(&lines) {
            check(&got.mapping, line);
            prop_assert_eq!(got.rss_bytes, kb * 1024);
            prop_assert_eq!(got.anonymous_bytes, kb / 2 * 1024);
            prop_assert_eq!(got.locked_bytes, kb / 4 * 1024);
            prop_assert_eq!(got.shared_bytes, (kb / 4 + kb / 2) * 1024);
            prop_assert_eq!(got.flags.has(VmFlags::UFFD_MISSING.with(VmFlags::UFFD_WP)), *served);
            prop_assert_eq!(got.flags.has(VmFlags::LOCKED), *locked);
            prop_assert!(got.flags.has(VmFlags::SOFT_DIRTY));
            prop_assert!(!got.flags.has(VmFlags::WIPE_ON_FORK));
        }
    }

    #[test]
    fn any_bytes_are_survived(text in proptest::collection::vec(any::<u8>(), 0..200)) {
        let _ = mappings(&text).count();
        let _ = smaps(&text).count();
    }
}

#[test]
fn maps_and_smaps_of_a_process_agree() {
    let mut target = Target::start();
    let range = target.map(16);
    target.fill(AddrRange::new(range.start.0, range.start.0 + 4 * 4096), 1);
    let uffd = target.uffd();
    uffd.register(range).unwrap();
    let other = target.map(16);
    assert_eq!(target.madvise(other, libc::MADV_WIPEONFORK), 0);
    let (mut long, mut short) = (Vec::new(), Vec::new());
    ProcMaps::open_smaps(target.pid)
        .unwrap()
        .read_into(&mut long)
        .unwrap();
    let maps = ProcMaps::open(target.pid).unwrap();
    maps.read_into(&mut short).unwrap();
    let details: Vec<_> = smaps(&long).collect();
    assert!(details.len() > 10, "{}", details.len());
    let plain: Vec<_> = mappings(&short).collect();
    assert!(details.iter().map(|d| d.mapping).eq(plain));
    let at = |range: AddrRange| *details.iter().find(|d| d.mapping.range == range).unwrap();
    let served = VmFlags::UFFD_MISSING.with(VmFlags::UFFD_WP);
    let first = at(range);
    assert!(first.flags.has(served) && !first.flags.has(VmFlags::WIPE_ON_FORK));
    assert!(first.mapping.is_private_anonymous() && first.mapping.write && !first.mapping.exec);
    assert_eq!((first.rss_bytes, first.anonymous_bytes), (16384, 16384));
    let second = at(other);
    assert!(!second.flags.has(served) && second.flags.has(VmFlags::WIPE_ON_FORK));
    assert_eq!(second.rss_bytes, 0);
    let named = |name| details.iter().find(|d| d.mapping.name == name);
    let stack = named(MapName::Stack).unwrap();
    assert!(stack.flags.has(VmFlags::GROWS_DOWN) && stack.rss_bytes > 0);
    assert!(!stack.mapping.is_private_anonymous());
    assert!(named(MapName::Vdso).is_some_and(|d| d.mapping.exec));
    target.end();
    maps.read_into(&mut short).unwrap();
    assert!(short.is_empty());
}

/// The subpages `first..first + count` of a range.
fn sub(range: AddrRange, first: u64, count: u64) -> AddrRange {
    let start = range.start.0 + first * 4096;
    AddrRange::new(start, start + count * 4096)
}

fn protect(target: &mut Target, range: AddrRange, prot: i32) {
    let arguments = [
        range.start.0,
        range.len(),
        u64::from(prot.cast_unsigned()),
        0,
        0,
    ];
    assert_eq!(target.syscall(libc::SYS_mprotect, arguments), 0);
}

#[test]
fn a_mapping_is_found_as_it_is_now() {
    let mut target = Target::start();
    let range = target.map(16);
    let maps = ProcMaps::open(target.pid).unwrap();
    let found = |plain, writable| {
        Ok(Some(Found {
            range,
            plain,
            writable,
        }))
    };
    assert_eq!(maps.find(range.start), found(true, true));
    assert_eq!(
        maps.find(sub(range, 15, 1).start.offset(4095)),
        found(true, true)
    );
    // In a gap: the next one above.
    assert_eq!(maps.find(Addr(range.start.0 - 1)), found(true, true));
    for (prot, plain, writable) in [
        (libc::PROT_NONE, false, false),
        (libc::PROT_READ, false, false),
        (
            libc::PROT_READ | libc::PROT_WRITE | libc::PROT_EXEC,
            false,
            true,
        ),
        (libc::PROT_READ | libc::PROT_WRITE, true, true),
    ] {
        protect(&mut target, range, prot);
        assert_eq!(
            maps.find(range.start),
            found(plain, writable),
            "protection {prot}"
        );
    }
    // Memory of the C library's file and memory that is shared, of which the steps' words are some.
    let mut text = Vec::new();
    maps.read_into(&mut text).unwrap();
    let mut others = 0;
    for m in mappings(&text).filter(|m| m.read && m.write && (m.inode != 0 || m.shared)) {
        let range = m.range;
        assert_eq!(
            maps.find(range.start),
            Ok(Some(Found {
                range,
                plain: false,
                writable: true
            }))
        );
        others += 1;
    }
    assert!(others > 1, "{others}");
    // Above the highest one.
    assert_eq!(maps.find(Addr((1 << 47) - 4096)), Ok(None));
    let long = ProcMaps::open_smaps(target.pid).unwrap();
    assert_eq!(long.find(range.start), Err(MapsError::Unsupported));
    target.end();
    assert_eq!(maps.find(range.start), Err(MapsError::Gone));
}

#[test]
fn a_range_is_widened_to_the_plain_mappings_that_it_lies_in() {
    let mut target = Target::start();
    let range = target.map(32);
    let maps = ProcMaps::open(target.pid).unwrap();
    let whole = Ok(Some(range));
    assert_eq!(maps.plain_around(range), whole);
    assert_eq!(maps.plain_around(sub(range, 3, 1)), whole);
    assert_eq!(maps.plain_around(sub(range, 0, 31)), whole);
    assert_eq!(maps.plain_around(sub(range, 1, 31)), whole);
    // Two mappings: each alone, or both.
    let (low, high) = (sub(range, 0, 16), sub(range, 16, 16));
    assert_eq!(target.madvise(high, libc::MADV_DONTFORK), 0);
    assert_eq!(maps.plain_around(sub(range, 2, 14)), Ok(Some(low)));
    assert_eq!(maps.plain_around(sub(range, 16, 2)), Ok(Some(high)));
    assert_eq!(maps.plain_around(sub(range, 15, 2)), whole);
    // One that is not plain in it, or a hole; beside it neither matters.
    let odd = sub(range, 24, 1);
    protect(&mut target, odd, libc::PROT_READ);
    assert_eq!(maps.plain_around(range), Ok(None));
    assert_eq!(maps.plain_around(sub(range, 24, 2)), Ok(None));
    assert_eq!(maps.plain_around(sub(range, 23, 2)), Ok(None));
    assert_eq!(
        maps.plain_around(sub(range, 14, 3)),
        Ok(Some(sub(range, 0, 24)))
    );
    let unmap = [odd.start.0, odd.len(), 0, 0, 0];
    assert_eq!(target.syscall(libc::SYS_munmap, unmap), 0);
    assert_eq!(maps.plain_around(range), Ok(None));
    assert_eq!(maps.plain_around(sub(range, 24, 2)), Ok(None));
    assert_eq!(maps.plain_around(sub(range, 23, 2)), Ok(None));
    assert_eq!(
        maps.plain_around(sub(range, 14, 3)),
        Ok(Some(sub(range, 0, 24)))
    );
    // More mappings than are looked at.
    let many = target.map(80);
    for i in (0..80).step_by(2) {
        assert_eq!(target.madvise(sub(many, i, 1), libc::MADV_DONTFORK), 0);
    }
    assert_eq!(maps.plain_around(many), Ok(None));
    assert_eq!(
        maps.plain_around(sub(many, 0, 64)),
        Ok(Some(sub(many, 0, 64)))
    );
    target.end();
    assert_eq!(maps.plain_around(range), Err(MapsError::Gone));
}

#[test]
fn a_file_with_an_odd_name_is_one_mapping() {
    use std::os::unix::ffi::OsStrExt;
    let dir = std::env::temp_dir().join(format!("holo-maps-{}", std::process::id()));
    std::fs::create_dir(&dir).unwrap();
    let path = dir.join(std::ffi::OsStr::from_bytes(b"a b\n1-2 rw-p \xff (deleted)"));
    std::fs::write(&path, [1; 4096]).unwrap();
    let file = File::options().read(true).write(true).open(&path).unwrap();
    let map = super::super::mapped::Mapped::shared(std::os::fd::AsFd::as_fd(&file), 0, 4096, 0);
    std::fs::remove_dir_all(&dir).unwrap();
    let map = map.unwrap();
    let mut text = Vec::new();
    ProcMaps::open(i32::try_from(std::process::id()).unwrap())
        .unwrap()
        .read_into(&mut text)
        .unwrap();
    let at = holo_proto::Addr(map.as_ptr().addr() as u64);
    let found = mappings(&text).find(|m| m.range.contains(at)).unwrap();
    let MapName::Other(name) = found.name else {
        panic!("{found:?}");
    };
    assert!(
        name.ends_with(b"/a b\\0121-2 rw-p \xff (deleted) (deleted)"),
        "{found:?}"
    );
    assert!(found.shared && found.inode != 0);
}
