// The load under which pagers die: threads that read, write, drop, move, fork and receive direct reads,
// and check every word of what they own.
//
//   load SEED MIB SECONDS [drop] [move] [fork] [direct] [stacks] [storm]
//
// It works until SECONDS have passed or standard input says something (or ends), then checks all that it
// owns once more. `@ready` comes when all memory is filled, `@beat N` while work goes on.
//
//   drop    DONTNEED, FREE, munmap and mmap at the same place
//   move    mremap of a run away and back
//   fork    children that check and rewrite what they share with their parent, and so does the parent
//   direct  O_DIRECT reads into a region that is evicted meanwhile
//   stacks  threads whose stacks lie in memory that was evicted before
//   storm   much more of `drop` than of anything else
//
// Threads own runs of seven pages, so that every 64 KiB has several owners, which do different things.
#include "../torture/torture.h"
#include <poll.h>

#define THREADS 4
#define RUN 7
#define SHARED 48 // pages that a fork compares on both sides
#define DEEPEST 2
#define ALONE_S 1.0 // between two forks: what relatives share cannot be paged
#define DIRECT_PAGES 512
#define DIRECT_RUN 128
#define STACKS 48
#define STACK_BYTES (256UL << 10)
#define STACK_PATTERN_PAGES 32 // lowest part of a stack: never reached by its thread

// What a page holds.
struct state {
    uint64_t tag; // of its pattern; 0: zero
    uint16_t patched; // word index + 1 of one changed word, 0: none
    uint8_t freed; // under FREE: may read zero instead until the next write
};

enum { BEATS = THREADS + 2 };
static bool with_drop, with_move, with_fork, with_direct, with_stacks, with_storm;
static char *memory, *slots, *landing, *stacks;
static struct state *shadow;
static uint64_t *beats; // witness: steps of each thread
static volatile bool stop;
// Held for writing by whoever lets the C library map something: it must not get a place that a thread has
// left for an instant.
static pthread_rwlock_t places = PTHREAD_RWLOCK_INITIALIZER;

static char *at(size_t page) { return memory + page * PAGE; }

static uint64_t patch_of(size_t page, struct state s) { return mix(the_seed ^ page ^ s.tag ^ s.patched); }

static bool looks_like(const void *place, size_t page, struct state s) {
    const uint64_t *words = place;
    for (size_t k = 0; k < WORDS; k++) {
        uint64_t want = s.tag ? word_of(s.tag, k) : 0;
        if (s.patched && s.patched - 1U == k) want = patch_of(page, s);
        if (words[k] != want) return false;
    }
    return true;
}

// Checks the page, which lies at `place` now; one under FREE may turn out to be zero from now on.
static void check_at(const void *place, size_t page, struct state *s, const char *when) {
    if (looks_like(place, page, *s)) return;
    if (s->freed && looks_like(place, page, (struct state){0})) {
        *s = (struct state){0};
        return;
    }
    // It may have been dropped in the middle of the first look.
    if (s->freed && looks_like(place, page, *s)) return;
    const uint64_t *words = place;
    size_t k = 0;
    for (; k < WORDS - 1; k++) {
        uint64_t want = s->tag ? word_of(s->tag, k) : 0;
        if (s->patched && s->patched - 1U == k) want = patch_of(page, *s);
        if (words[k] != want) break;
    }
    fail("WRONG %s: page %zu at %p: word %zu is %#lx, first %#lx last %#lx; want tag %#lx patched %u freed %u%s",
         when, page, place, k, words[k], words[0], words[WORDS - 1], s->tag, s->patched, s->freed,
         page_is_zero(place) ? " (all zero)" : "");
}

static void check(size_t page, const char *when) { check_at(at(page), page, shadow + page, when); }

static void rewrite_at(void *place, size_t page, struct state *s, uint64_t r) {
    *s = (struct state){.tag = tag_of(page, r)};
    fill_page(place, s->tag);
}

// Writes one word. A page under FREE has to decide here what it is.
static void patch(size_t page, uint64_t r) {
    struct state *s = shadow + page, before = *s;
    if (before.patched) return rewrite_at(at(page), page, s, r);
    s->patched = (uint16_t)(1 + r % WORDS);
    s->freed = 0;
    ((uint64_t *)at(page))[r % WORDS] = patch_of(page, *s);
    if (!before.freed || looks_like(at(page), page, *s)) return;
    struct state zeroed = {.patched = s->patched};
    // The word was written with the old tag in it: zero around it, or wrong.
    const uint64_t *words = (const uint64_t *)at(page);
    for (size_t k = 0; k < WORDS; k++)
        if (words[k] != (k == r % WORDS ? patch_of(page, *s) : 0))
            fail("WRONG page %zu: written after FREE it is neither old nor zero: word %zu is %#lx", page, k, words[k]);
    ((uint64_t *)at(page))[r % WORDS] = patch_of(page, zeroed);
    *s = zeroed;
}

static void map_again(size_t first, size_t count, bool hole) {
    pthread_rwlock_rdlock(&places);
    if (hole) MUST(munmap(at(first), count * PAGE));
    void *again = mmap(at(first), count * PAGE, PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | (hole ? MAP_FIXED_NOREPLACE : MAP_FIXED), -1, 0);
    pthread_rwlock_unlock(&places);
    if (again != at(first)) fail("mapping %p again: %s", (void *)at(first), strerror(errno));
    memset(shadow + first, 0, count * sizeof *shadow);
}

// Each run is either moved or mapped again, never both: what was just mapped is another mapping than its
// neighbour, which holo has registered, and mremap fails half-way across two.
static bool moves(size_t run) { return with_move && run / THREADS % 2; }

static void drop(size_t run, uint64_t r) {
    size_t first = run * RUN + r % RUN, count = 1 + (r >> 8) % (RUN - r % RUN);
    switch (r >> 16 & 3) {
    case 0:
    case 1:
        MUST(madvise(at(first), count * PAGE, MADV_DONTNEED));
        memset(shadow + first, 0, count * sizeof *shadow);
        break;
    case 2:
        if (with_storm) return map_again(first, count, r >> 20 & 1);
        for (size_t p = first; p < first + count; p++) check(p, "before FREE");
        MUST(madvise(at(first), count * PAGE, MADV_FREE));
        for (size_t p = first; p < first + count; p++) shadow[p].freed = 1;
        break;
    default:
        if (!moves(run)) map_again(first, count, r >> 20 & 1);
    }
    if (r >> 24 & 1) check(first, "after a drop");
}

static void move(size_t me, size_t run, uint64_t r) {
    size_t first = run * RUN, bytes = RUN * PAGE;
    char *slot = slots + me * bytes;
    pthread_rwlock_rdlock(&places);
    if (mremap(at(first), bytes, bytes, MREMAP_MAYMOVE | MREMAP_FIXED, slot) != slot)
        fail("mremap: %s", strerror(errno));
    for (size_t i = 0; i < RUN; i++)
        if (r >> i & 1) check_at(slot + i * PAGE, first + i, shadow + first + i, "moved");
    size_t i = (r >> 8) % RUN;
    rewrite_at(slot + i * PAGE, first + i, shadow + first + i, r);
    if (mremap(slot, bytes, bytes, MREMAP_MAYMOVE | MREMAP_FIXED, at(first)) != at(first))
        fail("mremap back: %s", strerror(errno));
    MUST(mmap(slot, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0));
    pthread_rwlock_unlock(&places);
    check(first + (r >> 16) % RUN, "moved back");
}

static size_t own_page(size_t me, uint64_t *draws) {
    size_t runs = the_pages / RUN;
    return (below(draws, runs / THREADS) * THREADS + me) * RUN + below(draws, RUN);
}

// One side after a fork: it has its own record of what it shares, and changes and checks that.
static void one_side(const size_t *pages, struct state *own, uint64_t *draws, const char *who) {
    for (int round = 0; round < 4 && !(round && stop); round++) {
        for (size_t i = 0; i < SHARED; i++) {
            uint64_t r = draw(draws);
            if ((r & 7) < 4 || round == 3) check_at(at(pages[i]), pages[i], own + i, who);
            else if ((r & 7) < 6) rewrite_at(at(pages[i]), pages[i], own + i, r);
            else if ((r & 7) == 6) {
                MUST(madvise(at(pages[i]), PAGE, MADV_DONTNEED));
                own[i] = (struct state){0};
            }
        }
        sleep_us((unsigned)below(draws, 20000));
    }
}

static void fork_once(size_t me, uint64_t *draws, int depth, const size_t *given, struct state *states) {
    size_t pages[SHARED];
    struct state own[SHARED];
    for (size_t i = 0; i < SHARED; i++) {
        pages[i] = given ? given[i] : own_page(me, draws);
        // A page drawn twice would have two records.
        for (size_t j = 0; !given && j < i; j++)
            if (pages[j] == pages[i]) pages[i] = own_page(me, draws), j = SIZE_MAX;
        own[i] = given ? states[i] : shadow[pages[i]];
    }
    pid_t child = MUST(fork());
    if (child == 0) {
        uint64_t mine = *draws ^ 0xc4117d;
        one_side(pages, own, &mine, "child");
        if (depth < DEEPEST && (mine & 3) == 0) fork_once(me, &mine, depth + 1, pages, own);
        one_side(pages, own, &mine, "child");
        _exit(0);
    }
    one_side(pages, own, draws, depth == 1 ? "parent" : "child that is a parent");
    int status = 0;
    while (waitpid(child, &status, 0) < 0) {
        if (errno != EINTR) fail("waiting for child %d: %s", child, strerror(errno));
    }
    if (status != 0) fail("child %d failed: %s %d", child, WIFSIGNALED(status) ? "signal" : "exit code",
                          WIFSIGNALED(status) ? WTERMSIG(status) : WEXITSTATUS(status));
    for (size_t i = 0; i < SHARED; i++) {
        check_at(at(pages[i]), pages[i], own + i, "after the child");
        if (given) states[i] = own[i];
        else shadow[pages[i]] = own[i];
    }
}

static void *worker(void *argument) {
    size_t me = (size_t)argument;
    uint64_t draws = mix(the_seed + me);
    double next_fork = now_s() + ALONE_S / 2;
    while (!stop) {
        size_t page = own_page(me, &draws), run = page / RUN;
        uint64_t r = draw(&draws);
        unsigned kind = r >> 56 & 31;
        r &= 0x00ffffffffffffff;
        if (with_storm && kind < 16) drop(run, r);
        else if (with_drop && kind < 3) drop(run, r);
        else if (kind == 3 && moves(run)) move(me, run, r);
        else if (with_fork && me == 0 && kind == 4 && now_s() >= next_fork) {
            fork_once(me, &draws, 1, NULL, NULL);
            next_fork = now_s() + ALONE_S;
        }
        else if (kind < 10) rewrite_at(at(page), page, shadow + page, r);
        else if (kind < 14) patch(page, r);
        else if (kind < 26) check(page, "later");
        else
            for (size_t p = run * RUN; p < run * RUN + RUN; p++) check(p, "later, the whole run");
        __atomic_add_fetch(beats + me, 1, __ATOMIC_RELAXED);
    }
    return NULL;
}

// Direct reads land in pages that are on their way out: the bytes must be the file's.
static void *reader(void *argument) {
    (void)argument;
    int file = scratch_file("direct", O_DIRECT);
    uint64_t draws = mix(the_seed + 77);
    for (size_t p = 0; p < DIRECT_PAGES; p++) fill_page(landing + p % DIRECT_RUN * PAGE, tag_of(p, 0xd13ec7)),
        MUST(pwrite(file, landing + p % DIRECT_RUN * PAGE, PAGE, (off_t)(p * PAGE)));
    while (!stop) {
        size_t block = below(&draws, DIRECT_PAGES - DIRECT_RUN), to = below(&draws, DIRECT_PAGES - DIRECT_RUN);
        ssize_t got = MUST(pread(file, landing + to * PAGE, DIRECT_RUN * PAGE, (off_t)(block * PAGE)));
        for (size_t i = 0; i < (size_t)got / PAGE; i++)
            check_page(landing + (to + i) * PAGE, tag_of(block + i, 0xd13ec7), "WRONG direct read");
        __atomic_add_fetch(beats + THREADS, 1, __ATOMIC_RELAXED);
    }
    return NULL;
}

static void *sleeper(void *argument) {
    volatile uint64_t local = mix((uint64_t)argument);
    // Long enough for an eviction to meet this thread's control block.
    for (int i = 0; i < 20 && !stop; i++) sleep_us(20000);
    if (local != mix((uint64_t)argument)) fail("WRONG stack of thread %zu", (size_t)argument);
    return argument;
}

static void *stacker(void *argument) {
    (void)argument;
    for (size_t i = 0; !stop; i = (i + 1) % STACKS) {
        char *stack = stacks + i * STACK_BYTES;
        pthread_attr_t attributes;
        pthread_t thread;
        pthread_attr_init(&attributes);
        pthread_attr_setstack(&attributes, stack, STACK_BYTES);
        pthread_rwlock_wrlock(&places);
        int error = pthread_create(&thread, &attributes, sleeper, (void *)i);
        pthread_rwlock_unlock(&places);
        if (error) fail("pthread_create: %s", strerror(error));
        if (join(thread) != (void *)i) fail("WRONG value from thread %zu", i);
        for (size_t p = 0; p < STACK_PATTERN_PAGES; p++)
            check_page(stack + p * PAGE, tag_of(i * 64 + p, 0x57ac), "WRONG end of a stack");
        __atomic_add_fetch(beats + THREADS + 1, 1, __ATOMIC_RELAXED);
    }
    return NULL;
}

static bool asked(int argc, char **argv, const char *name) {
    for (int i = 4; i < argc; i++)
        if (strcmp(argv[i], name) == 0) return true;
    return false;
}

static void say_beat(void) {
    uint64_t sum = 0;
    for (size_t i = 0; i < BEATS; i++) sum += __atomic_load_n(beats + i, __ATOMIC_RELAXED);
    printf("@beat %lu\n", sum);
    fflush(stdout);
}

int main(int argc, char **argv) {
    arguments(argc, argv);
    with_drop = asked(argc, argv, "drop"), with_move = asked(argc, argv, "move");
    with_fork = asked(argc, argv, "fork"), with_direct = asked(argc, argv, "direct");
    with_stacks = asked(argc, argv, "stacks"), with_storm = asked(argc, argv, "storm");
    the_pages -= the_pages % (RUN * THREADS);
    memory = region(the_pages);
    slots = MUST(mmap(NULL, THREADS * RUN * PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    shadow = witness(the_pages * sizeof *shadow);
    beats = witness(BEATS * sizeof *beats);
    pthread_t threads[BEATS];
    size_t started = 0;
    if (with_stacks) {
        stacks = region(STACKS * STACK_BYTES / PAGE);
        for (size_t i = 0; i < STACKS; i++)
            for (size_t p = 0; p < STACK_BYTES / PAGE; p++)
                fill_page(stacks + i * STACK_BYTES + p * PAGE, tag_of(i * 64 + p, 0x57ac));
    }
    for (size_t p = 0; p < the_pages; p++) rewrite_at(at(p), p, shadow + p, p);
    printf("@ready\n");
    fflush(stdout);
    for (size_t t = 0; t < THREADS; t++) threads[started++] = spawn(worker, (void *)t);
    if (with_direct) {
        landing = region(DIRECT_PAGES);
        threads[started++] = spawn(reader, NULL);
    }
    if (with_stacks) threads[started++] = spawn(stacker, NULL);
    struct pollfd input = {.fd = 0, .events = POLLIN};
    while (!expired() && poll(&input, 1, 100) == 0) say_beat();
    stop = true;
    for (size_t t = 0; t < started; t++) join(threads[t]);
    for (size_t p = 0; p < the_pages; p++) check(p, "at the end");
    say_beat();
    printf("# checked=%zu\n", the_pages);
    return 0;
}
