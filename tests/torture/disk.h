// A file of generated content on a disk, opened with O_DIRECT, and the comparison with it.
#ifndef DISK_H
#define DISK_H
#include "torture.h"

#define DISK_PAGES 2048UL // 8 MiB

static inline uint64_t disk_tag(size_t page) { return tag_of(page, 0xd15c); }

// Skipping is not allowed: where the scratch directory knows no O_DIRECT this fails by name.
static inline int disk_file(void) {
    int fd = scratch_file("direct", O_DIRECT);
    char *buffer = aligned_alloc(PAGE, 64 * PAGE);
    for (size_t p = 0; p < DISK_PAGES; p += 64) {
        for (size_t i = 0; i < 64; i++) fill_page(buffer + i * PAGE, disk_tag(p + i));
        if (MUST(pwrite(fd, buffer, 64 * PAGE, (off_t)(p * PAGE))) != (ssize_t)(64 * PAGE)) fail("short write of the disk file");
    }
    free(buffer);
    return fd;
}

// Compares `bytes` at `memory` with the file's bytes from `offset` on.
static inline void check_disk_bytes(const char *memory, size_t offset, size_t bytes, const char *when) {
    for (size_t i = 0; i < bytes; i += sizeof(uint64_t)) {
        uint64_t seen, want = word_of(disk_tag((offset + i) / PAGE), (offset + i) % PAGE / sizeof(uint64_t));
        memcpy(&seen, memory + i, sizeof seen);
        if (seen != want)
            fail("%s: byte %zu of a read of %zu at %p (file offset %zu) is %#lx, want %#lx", when, i, bytes,
                 (const void *)memory, offset, seen, want);
    }
}
#endif
