// O_DIRECT reads put bytes into pages chosen for eviction: the device writes, no page table sees it.
//
// Synchronous reads and kernel aio. Half of the reads fill only a part of a page while the thread, or
// another one, writes the rest of it: both must be there afterwards.
#include "disk.h"
#include <linux/aio_abi.h>

#define THREADS 3
#define BLOCK 20 // pages a block that belongs to one thread
#define SECTOR 512UL

static char *memory;
static uint32_t *generation;
static int disk;
static uint64_t reads;

static char *page_at(size_t p) { return memory + p * PAGE; }
static void refill(size_t p) { fill_page(page_at(p), tag_of(p, ++generation[p])); }

// A helper that keeps writing the first half of a page while a device writes the second.
struct half {
    _Atomic(uint64_t *) words;
    _Atomic uint64_t seed;
    _Atomic bool stop;
    _Atomic bool busy;
};

static void *half_writer(void *argument) {
    struct half *h = argument;
    while (!h->stop) {
        h->busy = true;
        uint64_t *words = h->words;
        if (words)
            for (size_t k = 0; k < WORDS / 2; k++) ((volatile uint64_t *)words)[k] = h->seed + k;
        h->busy = false;
    }
    return NULL;
}

static void whole_pages(aio_context_t aio, uint64_t *state, size_t first) {
    size_t at = below(state, BLOCK), count = 1 + below(state, BLOCK - at);
    size_t offset = below(state, DISK_PAGES - count) * PAGE;
    char *to = page_at(first + at);
    if (draw(state) & 1) {
        if (MUST(pread(disk, to, count * PAGE, (off_t)offset)) != (ssize_t)(count * PAGE)) fail("short direct read");
    } else {
        struct iocb request = {.aio_lio_opcode = IOCB_CMD_PREAD, .aio_fildes = (uint32_t)disk,
                               .aio_buf = (uint64_t)to, .aio_nbytes = count * PAGE, .aio_offset = (int64_t)offset};
        struct iocb *requests[] = {&request};
        struct io_event event;
        if (MUST(syscall(SYS_io_submit, aio, 1, requests)) != 1) fail("io_submit took nothing");
        // While the device works, the rest of the block is used.
        for (size_t i = 0; i < at; i++) check_page(page_at(first + i), tag_of(first + i, generation[first + i]), "beside aio");
        if (MUST(syscall(SYS_io_getevents, aio, 1, 1, &event, NULL)) != 1) fail("io_getevents gave nothing");
        if (event.res != (int64_t)(count * PAGE)) fail("aio read: %ld", (long)event.res);
    }
    check_disk_bytes(to, offset, count * PAGE, "direct read");
    for (size_t i = 0; i < count; i++) refill(first + at + i);
}

static void half_page(struct half *h, uint64_t *state, size_t p) {
    uint64_t *words = (uint64_t *)page_at(p), seed = draw(state);
    size_t offset = below(state, DISK_PAGES * PAGE / SECTOR - 8) * SECTOR;
    for (size_t k = 0; k < WORDS / 2; k++) words[k] = seed + k;
    h->seed = seed;
    h->words = words;
    if (MUST(pread(disk, words + WORDS / 2, PAGE / 2, (off_t)offset)) != (ssize_t)(PAGE / 2)) fail("short direct read of half a page");
    h->words = NULL;
    while (h->busy) {} // it may be in the middle of its loop
    check_disk_bytes((char *)(words + WORDS / 2), offset, PAGE / 2, "direct read beside a writer");
    for (size_t k = 0; k < WORDS / 2; k++)
        if (words[k] != seed + k) fail("word %zu written beside a direct read is %#lx, want %#lx", k, words[k], seed + k);
    refill(p);
}

static void *reader(void *argument) {
    size_t me = (size_t)argument, blocks = the_pages / BLOCK;
    uint64_t state = mix(the_seed + me);
    aio_context_t aio = 0;
    MUST(syscall(SYS_io_setup, 8, &aio));
    static struct half halves[THREADS];
    pthread_t helper = spawn(half_writer, halves + me);
    while (!expired()) {
        size_t first = (below(&state, blocks / THREADS) * THREADS + me) * BLOCK;
        for (size_t i = 0; i < BLOCK; i++) check_page(page_at(first + i), tag_of(first + i, generation[first + i]), "before");
        if (draw(&state) & 1) whole_pages(aio, &state, first);
        else half_page(halves + me, &state, first + below(&state, BLOCK));
        for (size_t i = 0; i < BLOCK; i++) check_page(page_at(first + i), tag_of(first + i, generation[first + i]), "after");
        __atomic_fetch_add(&reads, 1, __ATOMIC_RELAXED);
    }
    halves[me].stop = true;
    join(helper);
    MUST(syscall(SYS_io_destroy, aio));
    return NULL;
}

int main(int argc, char **argv) {
    arguments(argc, argv);
    disk = disk_file();
    memory = region(the_pages);
    generation = witness(the_pages * sizeof *generation);
    for (size_t p = 0; p < the_pages; p++) refill(p);
    pthread_t threads[THREADS];
    for (size_t t = 0; t < THREADS; t++) threads[t] = spawn(reader, (void *)t);
    for (size_t t = 0; t < THREADS; t++) join(threads[t]);
    for (size_t p = 0; p < the_pages; p++) check_page(page_at(p), tag_of(p, generation[p]), "end");
    printf("# direct_reads=%lu\n", reads);
    return 0;
}
