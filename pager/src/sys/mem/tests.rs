use super::super::testing::Target;
use super::*;

#[test]
fn resident_bytes_are_read_and_written_whatever_their_protection() {
    let mut target = Target::start();
    let mem = TargetMem::open(target.pid).unwrap();
    let range = target.map(4);
    target.fill(range, 3);
    let mut out = [0; 16384];
    assert_eq!(mem.read(range.start, &mut out), Ok(16384));
    assert_eq!(out, [3; 16384]);
    assert_eq!(mem.write(range.start.offset(10), b"abc"), Ok(3));
    assert_eq!(target.peek(range.start.offset(12)), b'c');
    // PROT_NONE.
    assert_eq!(
        target.syscall(libc::SYS_mprotect, [range.start.0, range.len(), 0, 0, 0]),
        0
    );
    assert_eq!(mem.read(range.start, &mut out), Ok(16384));
    assert_eq!(out[12], b'c');
}

#[test]
fn served_pages_that_are_missing_are_told_and_raise_no_fault() {
    let mut target = Target::start();
    let mem = TargetMem::open(target.pid).unwrap();
    let range = target.map(16);
    target.poke(range.start.offset(2 * 4096), 5);
    target.poke(range.start.offset(3 * 4096), 6);
    let uffd = target.uffd();
    uffd.register(range).unwrap();
    let mut out = [0; 65536];
    assert_eq!(mem.read(range.start, &mut out), Err(MemError::NotResident));
    assert_eq!(mem.write(range.start, b"x"), Err(MemError::NotResident));
    // Stops at the first one that is not there.
    assert_eq!(mem.read(range.start.offset(2 * 4096), &mut out), Ok(8192));
    assert_eq!((out[0], out[4096]), (5, 6));
    assert_eq!(mem.write(range.start.offset(3 * 4096), &out), Ok(4096));
    let slots = [const { std::sync::atomic::AtomicU64::new(0) }; 4];
    assert_eq!(uffd.read_events(&slots), Ok(0));
}

#[test]
fn protected_pages_are_read_and_not_written() {
    let mut target = Target::start();
    let mem = TargetMem::open(target.pid).unwrap();
    let range = target.map(2);
    target.fill(range, 5);
    let uffd = target.uffd();
    uffd.register(range).unwrap();
    uffd.protect(range).unwrap();
    let mut out = [0; 8192];
    assert_eq!(mem.read(range.start, &mut out), Ok(8192));
    assert_eq!(out, [5; 8192]);
    assert_eq!(mem.write(range.start, b"x"), Err(MemError::NotResident));
    let slots = [const { std::sync::atomic::AtomicU64::new(0) }; 4];
    assert_eq!(uffd.read_events(&slots), Ok(0));
}

#[test]
fn unmapped_and_gone_memory_are_told_apart() {
    let mut target = Target::start();
    let mem = TargetMem::open(target.pid).unwrap();
    let range = target.map(1);
    let mut out = [0; 16];
    assert_eq!(mem.read(range.end, &mut out), Err(MemError::NotResident));
    assert_eq!(
        mem.read(Addr(u64::MAX - 100), &mut out),
        Err(MemError::NotResident)
    );
    assert_eq!(mem.read(range.start, &mut []), Ok(0));
    target.end();
    assert_eq!(mem.read(range.start, &mut out), Err(MemError::Gone));
    assert_eq!(mem.write(range.start, &out), Err(MemError::Gone));
    assert_eq!(TargetMem::open(target.pid).map(|_| ()), Err(MemError::Gone));
}

#[test]
fn a_byte_is_written_back_where_there_is_a_page_and_nothing_where_there_is_none() {
    let mut target = Target::start();
    let mem = TargetMem::open(target.pid).unwrap();
    let pagemap = Pagemap::open(target.pid).unwrap();
    let range = target.map(4);
    let (filled, empty) = (range.start.offset(4096), range.start.offset(2 * 4096));
    target.poke(filled, 7);
    // PROT_NONE: a read of what is missing would bring in a page of zeros.
    let bounds = [range.start.0, range.len(), 0, 0, 0];
    assert_eq!(target.syscall(libc::SYS_mprotect, bounds), 0);
    assert_eq!(mem.write_back(&pagemap, filled), Ok(()));
    assert_eq!(mem.write_back(&pagemap, empty), Err(MemError::NotResident));
    let look = pagemap.look_page(empty.page()).unwrap();
    assert!(!look.present.has(empty.subpage().in_page()));
    let mut out = [0];
    assert_eq!(mem.read(filled, &mut out), Ok(1));
    assert_eq!(out, [7]);
}
