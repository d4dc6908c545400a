// MAP_FIXED over parts of a mapping: anonymous memory, files, shared memory and reservations come and
// go in its middle, while the neighbours keep their data.
#include "probe.h"

#define THREADS 3
#define RUN 11

enum kind { DATA, ZERO, FILE_COPY, SHARED, RESERVED };
struct state {
    uint32_t generation; // of DATA; of SHARED: page of the shared object
    uint8_t kind;
};

static char *memory;
static struct state *shadow;
static int file, object; // a file on disk, a memfd

static void check(size_t page, const char *when) {
    char *at = memory + page * PAGE;
    uint64_t value;
    switch (shadow[page].kind) {
    case DATA: check_page(at, tag_of(page, shadow[page].generation), when); break;
    case ZERO: check_zero(at, when); break;
    case FILE_COPY: check_page(at, tag_of(page, 0xf11e), when); break;
    case SHARED: check_page(at, tag_of(page, 0x5a4ed), when); break;
    case RESERVED:
        if (try_read(at, &value)) fail("%s: a reserved page was readable", when);
    }
}

static void rewrite(size_t page) {
    shadow[page].kind = DATA;
    fill_page(memory + page * PAGE, tag_of(page, ++shadow[page].generation));
}

static void replace(size_t first, size_t count, enum kind kind) {
    int protection = kind == RESERVED ? PROT_NONE : PROT_READ | PROT_WRITE;
    int flags = MAP_FIXED | (kind == SHARED ? MAP_SHARED : MAP_PRIVATE);
    int fd = kind == FILE_COPY ? file : kind == SHARED ? object : -1;
    if (fd < 0) flags |= MAP_ANONYMOUS | MAP_NORESERVE;
    char *at = memory + first * PAGE;
    if (MUST(mmap(at, count * PAGE, protection, flags, fd, fd < 0 ? 0 : (off_t)(first * PAGE))) != at)
        fail("MAP_FIXED went elsewhere");
    for (size_t p = first; p < first + count; p++) shadow[p].kind = kind;
}

static void *worker(void *argument) {
    size_t me = (size_t)argument, runs = the_pages / RUN;
    uint64_t state = mix(the_seed + me);
    static const enum kind choice[] = {ZERO, ZERO, ZERO, ZERO, FILE_COPY, SHARED, RESERVED, ZERO};
    while (!expired()) {
        size_t first = (below(&state, runs / THREADS) * THREADS + me) * RUN;
        uint64_t r = draw(&state);
        if (r & 1) {
            size_t at = (r >> 8) % RUN;
            replace(first + at, 1 + (r >> 16) % (RUN - at), choice[r >> 24 & 7]);
        } else {
            // Back to one mapping of plain memory, so that the number of mappings stays bounded.
            for (size_t p = first; p < first + RUN; p++)
                if (shadow[p].kind != DATA && shadow[p].kind != ZERO) replace(p, 1, ZERO);
        }
        for (size_t p = first; p < first + RUN; p++) {
            check(p, "after");
            if (shadow[p].kind <= FILE_COPY && (draw(&state) & 1)) rewrite(p);
        }
    }
    return NULL;
}

int main(int argc, char **argv) {
    arguments(argc, argv);
    probe_setup();
    memory = region(the_pages);
    shadow = witness(the_pages * sizeof *shadow);
    file = scratch_file("mapfixed", 0);
    object = MUST(memfd_create("torture", MFD_CLOEXEC));
    static char page[PAGE];
    for (size_t p = 0; p < the_pages; p++) {
        fill_page(page, tag_of(p, 0xf11e));
        MUST(pwrite(file, page, PAGE, (off_t)(p * PAGE)));
        fill_page(page, tag_of(p, 0x5a4ed));
        MUST(pwrite(object, page, PAGE, (off_t)(p * PAGE)));
    }
    for (size_t p = 0; p < the_pages; p++) rewrite(p);
    pthread_t threads[THREADS];
    for (size_t t = 0; t < THREADS; t++) threads[t] = spawn(worker, (void *)t);
    for (size_t t = 0; t < THREADS; t++) join(threads[t]);
    for (size_t p = 0; p < the_pages; p++) check(p, "end");
    return 0;
}
