// evict MIB: the kernel's part of an eviction, alone, in nanoseconds for each 64 KiB page.
//
// Does to memory of its own, in batches of 16 pages, what a pager does to that of another process: protect,
// read through /proc, FREE, un-protect, PAGEOUT, look. It keeps nothing, and nobody else touches the pages:
// a pager that stores the bytes cannot be faster than the sum. FREE is called by the thread itself; a
// pager has it done by a ring in the target.
#include "bench.h"
#include <linux/userfaultfd.h>
#include <sys/ioctl.h>
#include <sys/uio.h>

#ifndef MADV_PAGEOUT
#define MADV_PAGEOUT 21
#endif

enum { BATCH = 16 };
enum part { PROTECT, READ, FREE, UNPROTECT, PAGEOUT, LOOK, PARTS };
static const char *const names[PARTS] = {"protect", "read", "free", "unprotect", "pageout", "look"};

static uint64_t spent[PARTS], last;

static void lap(enum part part) {
    uint64_t now = now_ns();
    spent[part] += now - last;
    last = now;
}

static void protect(int uffd, const char *at, uint64_t mode) {
    struct uffdio_writeprotect wp = {.range = {.start = (uintptr_t)at, .len = PAGE}, .mode = mode};
    MUST(ioctl(uffd, UFFDIO_WRITEPROTECT, &wp));
}

int main(int argc, char **argv) {
    if (argc != 2) fail("usage: evict MIB");
    size_t pages = (strtoull(argv[1], NULL, 10) << 20) / PAGE / BATCH * BATCH;
    char *base = map_pages(pages);
    for (size_t i = 0; i < pages * (PAGE / SUBPAGE); i++) fill_subpage(base + i * SUBPAGE, i, false);
    int uffd = (int)MUST(syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK));
    struct uffdio_api api = {.api = UFFD_API, .features = UFFD_FEATURE_PAGEFAULT_FLAG_WP};
    MUST(ioctl(uffd, UFFDIO_API, &api));
    struct uffdio_register all = {
        .range = {.start = (uintptr_t)base, .len = pages * PAGE},
        .mode = UFFDIO_REGISTER_MODE_MISSING | UFFDIO_REGISTER_MODE_WP,
    };
    MUST(ioctl(uffd, UFFDIO_REGISTER, &all));
    int memory = MUST(open("/proc/self/mem", O_RDONLY | O_CLOEXEC));
    int pagemap = MUST(open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC));
    int self = (int)MUST(syscall(SYS_pidfd_open, getpid(), 0));
    static char frames[BATCH][65536];
    memset(frames, 1, sizeof frames);
    size_t gone = 0;
    for (size_t first = 0; first < pages; first += BATCH) {
        char *batch = base + first * PAGE;
        struct iovec ranges[BATCH];
        uint64_t entries[BATCH][PAGE / SUBPAGE];
        last = now_ns();
        for (int i = 0; i < BATCH; i++) protect(uffd, batch + i * PAGE, UFFDIO_WRITEPROTECT_MODE_WP);
        lap(PROTECT);
        for (int i = 0; i < BATCH; i++)
            if (pread(memory, frames[i], PAGE, (off_t)(uintptr_t)(batch + i * PAGE)) != (ssize_t)PAGE)
                fail("a short read");
        lap(READ);
        for (int i = 0; i < BATCH; i++) {
            MUST(madvise(batch + i * PAGE, PAGE, MADV_FREE));
            ranges[i] = (struct iovec){.iov_base = batch + i * PAGE, .iov_len = PAGE};
        }
        lap(FREE);
        for (int i = 0; i < BATCH; i++) protect(uffd, batch + i * PAGE, 0);
        lap(UNPROTECT);
        MUST(syscall(SYS_process_madvise, self, ranges, BATCH, MADV_PAGEOUT, 0));
        lap(PAGEOUT);
        for (int i = 0; i < BATCH; i++)
            if (pread(pagemap, entries[i], sizeof entries[i],
                      (off_t)((uintptr_t)(batch + i * PAGE) / SUBPAGE * 8)) != (ssize_t)sizeof entries[i])
                fail("a short look");
        lap(LOOK);
        for (int i = 0; i < BATCH; i++)
            for (size_t k = 0; k < PAGE / SUBPAGE; k++) gone += entries[i][k] >> 63 == 0;
    }
    for (int part = 0; part < PARTS; part++)
        printf("%s %.1f\n", names[part], (double)spent[part] / (double)pages);
    printf("gone %.4f\n", (double)gone / (double)(pages * (PAGE / SUBPAGE)));
    return 0;
}
