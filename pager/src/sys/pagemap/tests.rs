use super::super::testing::Target;
use super::*;

fn at(range: AddrRange, i: u64) -> Addr {
    range.start.offset(i * SUBPAGE_BYTES)
}

#[test]
fn a_look_tells_missing_zero_written_protected_and_shared_subpages() {
    let mut target = Target::start();
    let pagemap = Pagemap::open(target.pid).unwrap();
    let range = target.map(16);
    target.peek(at(range, 1));
    target.poke(at(range, 2), 1);
    target.poke(at(range, 3), 1);
    let uffd = target.uffd();
    uffd.register(range).unwrap();
    uffd.protect(AddrRange {
        start: at(range, 3),
        end: at(range, 4),
    })
    .unwrap();
    let look = pagemap.look_page(range.start.page()).unwrap();
    let want = PageLook {
        present: SubpageMask(0b1110),
        zero: SubpageMask(0b0010),
        protected: SubpageMask(0b1000),
        exclusive: SubpageMask(0b1100),
        ..PageLook::default()
    };
    assert_eq!(look, want);
    uffd.unregister(range).unwrap();
    target.begin_fork();
    target.finish();
    let look = pagemap.look_page(range.start.page()).unwrap();
    assert_eq!(look.exclusive, SubpageMask::NONE);
    assert_eq!(look.present.minus(look.zero), SubpageMask(0b1100));
    // A write takes a copy of its own.
    target.poke(at(range, 2), 2);
    let look = pagemap.look_page(range.start.page()).unwrap();
    assert_eq!(look.exclusive, SubpageMask(0b0100));
}

#[test]
fn shared_memory_is_told() {
    let mut target = Target::start();
    let pagemap = Pagemap::open(target.pid).unwrap();
    let flags = (libc::MAP_SHARED | libc::MAP_ANONYMOUS) as u64;
    let prot = (libc::PROT_READ | libc::PROT_WRITE) as u64;
    let start = target.syscall(libc::SYS_mmap, [0, 1 << 20, prot, flags, u64::MAX]);
    let page = PageIndex(u64::try_from(start).unwrap().div_ceil(65536));
    target.fill(page.range(), 1);
    let look = pagemap.look_page(page).unwrap();
    assert_eq!(
        (look.present, look.file_or_shared),
        (SubpageMask::ALL, SubpageMask::ALL)
    );
}

#[test]
fn both_ways_to_scan_agree() {
    let mut target = Target::start();
    let pagemap = Pagemap::open(target.pid).unwrap();
    let range = target.map(2048);
    for i in [0, 1, 2, 5, 6, 511, 512, 513, 1030, 2047] {
        target.poke(at(range, i), 1);
    }
    for i in [3, 7, 514] {
        target.peek(at(range, i));
    }
    let mut by_ioctl = [PresentRun::default(); 32];
    let mut by_reading = by_ioctl;
    let first = pagemap.scan_by_ioctl(range, &mut by_ioctl).unwrap();
    let second = pagemap.scan_by_reading(range, &mut by_reading).unwrap();
    assert_eq!(first, second);
    assert_eq!(first.1, range.end);
    assert_eq!(by_ioctl, by_reading);
    let runs: Vec<_> = by_ioctl[..first.0]
        .iter()
        .map(|run| {
            let first = (run.range().start.0 - range.start.0) / SUBPAGE_BYTES;
            (first, run.range().len() / SUBPAGE_BYTES, run.zero())
        })
        .collect();
    assert_eq!(
        runs,
        [
            (0, 3, false),
            (3, 1, true),
            (5, 2, false),
            (7, 1, true),
            (511, 3, false),
            (514, 1, true),
            (1030, 1, false),
            (2047, 1, false),
        ]
    );
    assert!(by_ioctl.iter().all(|run| !run.file_or_shared()));
}

#[test]
fn a_scan_goes_on_where_its_room_ended() {
    let mut target = Target::start();
    let pagemap = Pagemap::open(target.pid).unwrap();
    let range = target.map(64);
    for i in (0..64).step_by(2) {
        target.poke(at(range, i), 1);
    }
    for by_ioctl in [true, false] {
        let mut seen = Vec::new();
        let mut rest = range;
        let mut calls = 0;
        while !rest.is_empty() {
            let mut out = [PresentRun::default(); 5];
            let (count, walked_to) = if by_ioctl {
                pagemap.scan_by_ioctl(rest, &mut out)
            } else {
                pagemap.scan_by_reading(rest, &mut out)
            }
            .unwrap();
            assert!(walked_to > rest.start);
            seen.extend(out[..count].iter().map(|run| run.range().start));
            rest.start = walked_to;
            calls += 1;
        }
        let want: Vec<_> = (0..64).step_by(2).map(|i| at(range, i)).collect();
        assert_eq!(seen, want);
        assert!(calls >= 7, "{calls}");
    }
    assert_eq!(
        pagemap.scan_present(range, &mut []).unwrap(),
        (0, range.start)
    );
}

#[test]
fn a_gone_address_space_is_an_error() {
    let mut target = Target::start();
    let pagemap = Pagemap::open(target.pid).unwrap();
    let range = target.map(16);
    target.end();
    let gone = |e: io::Error| e.raw_os_error() == Some(libc::ESRCH);
    assert!(pagemap.look_page(range.start.page()).is_err_and(gone));
    assert!(pagemap.look_range(range, &mut [0; 16]).is_err_and(gone));
    let mut out = [PresentRun::default(); 4];
    assert!(pagemap.scan_by_reading(range, &mut out).is_err_and(gone));
    assert!(pagemap.scan_present(range, &mut out).is_err_and(gone));
}
