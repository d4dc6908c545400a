// Threads give single subpages back by DONTNEED, FREE and munmap, and look what is there afterwards.
//
// DONTNEED and a new mapping read zero. A page under FREE reads as before or as zero, whole, until it
// is written; from the first write on it must stay what it is then. Threads own runs of seven pages, so
// that every 64 KiB unit has several owners.
#include "torture.h"
#include <sys/mman.h>

#define THREADS 4
#define RUN 7

enum base { ZERO, DATA };
struct state {
    uint32_t generation; // of DATA
    uint8_t base;
    uint8_t freed; // may fall from `base` to zero until the next write
    uint16_t patched; // word index + 1 of one changed word, 0: none
};

static char *memory;
static struct state *shadow;

static uint64_t patch_of(size_t page, struct state s) { return mix(the_seed ^ page ^ (uint64_t)s.generation << 32 ^ s.patched); }

// Whether the page looks like this state, taking its base from `base`.
static bool looks_like(size_t page, struct state s, enum base base) {
    const uint64_t *words = (const uint64_t *)(memory + page * PAGE);
    uint64_t tag = tag_of(page, s.generation);
    for (size_t k = 0; k < WORDS; k++) {
        uint64_t want = base == DATA ? word_of(tag, k) : 0;
        if (s.patched && s.patched - 1U == k) want = patch_of(page, s);
        if (words[k] != want) return false;
    }
    return true;
}

static void check(size_t page, const char *when) {
    struct state *s = shadow + page;
    if (looks_like(page, *s, s->base)) return;
    if (s->freed) {
        if (looks_like(page, (struct state){0}, ZERO)) {
            *s = (struct state){.generation = s->generation, .base = ZERO}; // dropped: zero from now on
            return;
        }
        // The drop may come between two of our looks, never within one page twice: look again.
        if (looks_like(page, *s, s->base)) return;
    }
    const uint64_t *words = (const uint64_t *)(memory + page * PAGE);
    fail("%s: page %zu at %p: words %#lx %#lx %#lx, want base %u generation %u patch %u freed %u", when, page,
         (const void *)words, words[0], words[1], words[WORDS - 1], s->base, s->generation, s->patched, s->freed);
}

static void rewrite(size_t page) {
    struct state *s = shadow + page;
    *s = (struct state){.generation = s->generation + 1, .base = DATA};
    fill_page(memory + page * PAGE, tag_of(page, s->generation));
}

// Writes one word. If the page was under FREE this is where it has to decide what it is.
static void patch(size_t page, uint64_t r) {
    struct state *s = shadow + page;
    struct state before = *s;
    if (before.patched) return rewrite(page);
    s->patched = 1 + r % WORDS;
    s->freed = 0;
    *((uint64_t *)(memory + page * PAGE) + r % WORDS) = patch_of(page, *s);
    if (!before.freed) return;
    if (looks_like(page, *s, before.base)) return;
    if (!looks_like(page, *s, ZERO)) fail("page %zu written after FREE is neither old nor zero", page);
    s->base = ZERO;
}

static void drop_run(size_t first, size_t count, uint64_t r) {
    char *at = memory + first * PAGE;
    if (r & 1) MUST(munmap(at, count * PAGE));
    void *again = mmap(at, count * PAGE, PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | (r & 1 ? MAP_FIXED_NOREPLACE : MAP_FIXED), -1, 0);
    if (again != at) fail("mapping %p again: %s", (void *)at, strerror(errno));
    for (size_t p = first; p < first + count; p++) shadow[p] = (struct state){.generation = shadow[p].generation};
}

static void *worker(void *argument) {
    size_t me = (size_t)argument, runs = the_pages / RUN;
    uint64_t state = mix(the_seed + me);
    while (!expired()) {
        size_t run = below(&state, runs / THREADS) * THREADS + me;
        uint64_t r = draw(&state);
        size_t page = run * RUN + r % RUN;
        switch (r >> 16 & 15) {
        case 0:
        case 1:
        case 2:
            MUST(madvise(memory + page * PAGE, PAGE, MADV_DONTNEED));
            shadow[page] = (struct state){.generation = shadow[page].generation};
            if (r >> 63) check(page, "after DONTNEED");
            break;
        case 3:
        case 4:
        case 5:
            check(page, "before FREE");
            MUST(madvise(memory + page * PAGE, PAGE, MADV_FREE));
            shadow[page].freed = 1;
            break;
        case 6:
            drop_run(run * RUN, 1 + r % RUN, r >> 20);
            if (r >> 63) check(run * RUN, "after a new mapping");
            break;
        case 7:
        case 8:
            patch(page, r >> 24);
            break;
        case 9:
        case 10:
        case 11:
        case 12:
            rewrite(page);
            break;
        default:
            for (size_t p = run * RUN; p < run * RUN + RUN; p++) check(p, "later");
        }
    }
    return NULL;
}

int main(int argc, char **argv) {
    arguments(argc, argv);
    memory = region(the_pages);
    shadow = witness(the_pages * sizeof *shadow);
    for (size_t p = 0; p < the_pages; p++) rewrite(p);
    pthread_t threads[THREADS];
    for (size_t t = 0; t < THREADS; t++) threads[t] = spawn(worker, (void *)t);
    for (size_t t = 0; t < THREADS; t++) join(threads[t]);
    for (size_t p = 0; p < the_pages; p++) check(p, "end");
    return 0;
}
