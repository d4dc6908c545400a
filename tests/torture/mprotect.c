// Threads set single subpages to none, read-only and read-write, which splits mappings without any
// event, and check with a SIGSEGV handler that exactly the allowed accesses work.
#include "probe.h"

#define THREADS 3
#define RUN 5

struct state {
    uint32_t generation;
    uint8_t protection; // PROT_* bits
};

static char *memory;
static struct state *shadow;

static void expect_refused(bool worked, size_t page, const char *what) {
    if (worked) fail("%s of page %zu worked with protection %u", what, page, shadow[page].protection);
    if (probe_code != SEGV_ACCERR) fail("%s of page %zu: si_code %d", what, page, probe_code);
}

static void check(size_t page, uint64_t r) {
    char *at = memory + page * PAGE;
    uint64_t tag = tag_of(page, shadow[page].generation), value;
    size_t k = r % WORDS;
    uint64_t *word = (uint64_t *)at + k;
    switch (shadow[page].protection) {
    case PROT_NONE:
        expect_refused(try_read(word, &value), page, "a read");
        expect_refused(try_write(word, 1), page, "a write");
        break;
    case PROT_READ:
        check_page(at, tag, "read-only page");
        expect_refused(try_write(word, 1), page, "a write");
        check_page(at, tag, "read-only page after a refused write");
        break;
    default:
        check_page(at, tag, "writable page");
        if (r >> 63) fill_page(at, tag_of(page, ++shadow[page].generation));
    }
}

static void protect(size_t first, size_t count, uint8_t protection) {
    MUST(mprotect(memory + first * PAGE, count * PAGE, protection));
    for (size_t p = first; p < first + count; p++) shadow[p].protection = protection;
}

static void *worker(void *argument) {
    size_t me = (size_t)argument, runs = the_pages / RUN;
    uint64_t state = mix(the_seed + me);
    static const uint8_t choice[] = {PROT_NONE, PROT_READ, PROT_READ | PROT_WRITE, PROT_READ | PROT_WRITE};
    while (!expired()) {
        size_t first = (below(&state, runs / THREADS) * THREADS + me) * RUN;
        uint64_t r = draw(&state);
        if ((r & 7) == 0) {
            protect(first, RUN, PROT_READ | PROT_WRITE); // lets mappings merge again
        } else {
            size_t at = r >> 8 & 3;
            protect(first + at, 1 + (r >> 12) % (RUN - at), choice[r >> 16 & 3]);
        }
        for (size_t p = first; p < first + RUN; p++) check(p, draw(&state));
    }
    return NULL;
}

int main(int argc, char **argv) {
    arguments(argc, argv);
    probe_setup();
    memory = region(the_pages);
    shadow = witness(the_pages * sizeof *shadow);
    for (size_t p = 0; p < the_pages; p++) {
        shadow[p].protection = PROT_READ | PROT_WRITE;
        fill_page(memory + p * PAGE, tag_of(p, 0));
    }
    pthread_t threads[THREADS];
    for (size_t t = 0; t < THREADS; t++) threads[t] = spawn(worker, (void *)t);
    for (size_t t = 0; t < THREADS; t++) join(threads[t]);
    MUST(mprotect(memory, the_pages * PAGE, PROT_READ));
    for (size_t p = 0; p < the_pages; p++)
        check_page(memory + p * PAGE, tag_of(p, shadow[p].generation), "end");
    return 0;
}
