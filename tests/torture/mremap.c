// One thread moves, grows and shrinks mappings while another touches the new place.
//
// A mover owns a set of blocks and a landing place that always holds a block's worth of old data. The
// toucher reads the landing place all the time: it must see the old block or the new one whole word by
// whole word, never zero, never a third thing. It also writes as soon as it sees the new block.
#include "torture.h"
#include <stdatomic.h>

#define PAIRS 2
#define BLOCK 160 // pages; ten units of 64 KiB, mapped at addresses that are not multiples of it

struct pair {
    size_t blocks;
    char **where;           // address of each block
    uint64_t *generation;   // witness, [block][page]
    uint64_t *touched;      // witness, [block][page]: the toucher's own word
    char *reserve;          // 3 blocks of address space: landing place in the middle
    uint64_t seed;
    _Atomic uint64_t round; // odd: a move into the landing place may be under way
    _Atomic uint64_t acknowledged;
    _Atomic size_t landed;  // the block that lands in this round
    _Atomic size_t previous;
    _Atomic bool over;
};

// The last word of a page is the toucher's: it counts its visits.
static uint64_t id_of(struct pair *p, size_t block, size_t page) {
    return p->seed % 1000003 * 1000000007UL + block * BLOCK + page;
}

static uint64_t want_word(struct pair *p, size_t block, size_t page, size_t k) {
    return word_of(tag_of(id_of(p, block, page), p->generation[block * BLOCK + page]), k);
}

static void write_page(struct pair *p, size_t block, size_t page) {
    uint64_t *words = (uint64_t *)(p->where[block] + page * PAGE);
    p->generation[block * BLOCK + page]++;
    for (size_t k = 0; k < WORDS - 1; k++) words[k] = want_word(p, block, page, k);
}

static void check_block_page(struct pair *p, size_t block, size_t page, const char *when) {
    uint64_t *words = (uint64_t *)(p->where[block] + page * PAGE);
    size_t wrong = 0, zeros = 0, first = 0, last = 0;
    uint64_t seen = 0;
    for (size_t k = 0; k < WORDS - 1; k++) {
        uint64_t got = words[k];
        if (got == want_word(p, block, page, k)) continue;
        if (wrong++ == 0) first = k, seen = got;
        last = k;
        zeros += got == 0;
    }
    if (wrong)
        fail("%s: block %zu page %zu at %p, content %lu: %zu words are wrong, %zu of them zero, from word %zu "
             "(%#lx, now %#lx, want %#lx) to word %zu (%#lx, want %#lx)",
             when, block, page, (void *)words, p->generation[block * BLOCK + page], wrong, zeros, first,
             seen, words[first], want_word(p, block, page, first), last, words[last],
             want_word(p, block, page, last));
    if (words[WORDS - 1] != p->touched[block * BLOCK + page])
        fail("%s: block %zu page %zu at %p: touched %lu times, want %lu", when, block, page,
             (void *)words, words[WORDS - 1], p->touched[block * BLOCK + page]);
}

static char *landing(struct pair *p) { return p->reserve + BLOCK * PAGE; }

static void *toucher(void *argument) {
    struct pair *p = argument;
    uint64_t state = mix(p->seed + 77), served = 0;
    while (!p->over) {
        uint64_t round = p->round;
        if (round == served || !(round & 1)) continue;
        size_t new = p->landed, old = p->previous;
        // Both the old and the new content are fixed while the round lasts: the mover waits for us.
        for (size_t seen_new = 0; seen_new == 0;) {
            size_t page = below(&state, BLOCK), k = below(&state, WORDS - 1);
            uint64_t got = __atomic_load_n((uint64_t *)(landing(p) + page * PAGE) + k, __ATOMIC_RELAXED);
            bool is_new = got == want_word(p, new, page, k);
            bool is_old = got == want_word(p, old, page, k);
            if (!is_new && !is_old)
                fail("landing page %zu word %zu is %#lx, neither block %zu (%#lx) nor block %zu (%#lx)",
                     page, k, got, new, want_word(p, new, page, k), old, want_word(p, old, page, k));
            if (is_new && !is_old) seen_new = 1;
        }
        for (int i = 0; i < 40; i++) {
            size_t page = below(&state, BLOCK);
            p->touched[new * BLOCK + page]++;
            ((volatile uint64_t *)(landing(p) + page * PAGE))[WORDS - 1]++;
        }
        served = round;
        p->acknowledged = round;
    }
    return NULL;
}

// Held while a hole is open that must be filled again, and while the kernel chooses an address: it
// would choose the hole.
static pthread_mutex_t address_space = PTHREAD_MUTEX_INITIALIZER;

static char *fresh_place(size_t pages) {
    pthread_mutex_lock(&address_space);
    char *place = region(pages);
    pthread_mutex_unlock(&address_space);
    return place;
}

// Moves block `b` over the landing place, while the toucher looks.
static void land(struct pair *p, size_t b, size_t *resident, uint64_t *state) {
    size_t old = *resident;
    p->landed = b;
    p->previous = old;
    p->round++;
    if (draw(state) & 1) sched_yield();
    char *from = p->where[b];
    if (draw(state) & 1) {
        char *at = MUST((char *)mremap(from, BLOCK * PAGE, BLOCK * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, landing(p)));
        if (at != landing(p)) fail("mremap went to %p", (void *)at);
    } else {
        MUST((char *)mremap(from, BLOCK * PAGE, BLOCK * PAGE,
                            MREMAP_MAYMOVE | MREMAP_FIXED | MREMAP_DONTUNMAP, landing(p)));
        for (size_t i = 0; i < BLOCK; i += 1 + below(state, 9)) check_zero(from + i * PAGE, "left by DONTUNMAP");
        MUST(munmap(from, BLOCK * PAGE));
    }
    p->where[b] = landing(p);
    while (p->acknowledged != p->round) sched_yield();
    p->round++;
    *resident = b;
    // The old block was overwritten by the move: make it anew elsewhere.
    p->where[old] = fresh_place(BLOCK);
    for (size_t i = 0; i < BLOCK; i++) {
        p->touched[old * BLOCK + i] = 0;
        write_page(p, old, i);
    }
}

// Cuts a block's end off and grows it again, in place or elsewhere: the new end reads zero.
static void grow_and_shrink(struct pair *p, size_t b, uint64_t *state) {
    size_t cut = 1 + below(state, BLOCK - 1);
    char *at = p->where[b];
    MUST((char *)mremap(at, BLOCK * PAGE, cut * PAGE, 0));
    pthread_mutex_lock(&address_space);
    at = MUST((char *)mremap(at, cut * PAGE, BLOCK * PAGE, MREMAP_MAYMOVE));
    pthread_mutex_unlock(&address_space);
    p->where[b] = at;
    for (size_t i = 0; i < cut; i++) check_block_page(p, b, i, "kept by shrink and growth");
    for (size_t i = cut; i < BLOCK; i++) {
        check_zero(at + i * PAGE, "grown");
        p->touched[b * BLOCK + i] = 0;
        write_page(p, b, i);
    }
}

// Moves pages out of the middle of a block and back.
static void move_part(struct pair *p, size_t b, uint64_t *state) {
    size_t from = below(state, BLOCK - 1), count = 1 + below(state, BLOCK - from);
    char *aside = fresh_place(count), *at = p->where[b] + from * PAGE;
    pthread_mutex_lock(&address_space);
    MUST((char *)mremap(at, count * PAGE, count * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, aside));
    for (size_t i = 0; i < count; i += 1 + below(state, 5)) {
        char *home = p->where[b];
        p->where[b] = aside - from * PAGE; // the part's pages as seen from the block's start
        check_block_page(p, b, from + i, "moved aside");
        if (draw(state) & 1) write_page(p, b, from + i);
        p->where[b] = home;
    }
    MUST((char *)mremap(aside, count * PAGE, count * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, at));
    pthread_mutex_unlock(&address_space);
}

static void *mover(void *argument) {
    struct pair *p = argument;
    uint64_t state = mix(p->seed);
    size_t resident = 0;
    while (!expired()) {
        size_t b = below(&state, p->blocks);
        if (b == resident) continue;
        for (size_t i = 0; i < BLOCK; i++)
            if ((draw(&state) & 3) == 0) check_block_page(p, b, i, "before");
        switch (below(&state, 3)) {
        case 0: land(p, b, &resident, &state); break;
        case 1: grow_and_shrink(p, b, &state); break;
        default: move_part(p, b, &state);
        }
        for (size_t i = 0; i < BLOCK; i++) check_block_page(p, b, i, "after");
        write_page(p, b, below(&state, BLOCK));
    }
    p->over = true;
    for (size_t b = 0; b < p->blocks; b++)
        for (size_t i = 0; i < BLOCK; i++) check_block_page(p, b, i, "end");
    return NULL;
}

// All that the kernel chooses an address for is mapped before anybody opens a hole.
static void begin(struct pair *p, size_t number) {
    p->blocks = the_pages / PAIRS / BLOCK;
    if (p->blocks < 3) fail("too small");
    p->seed = mix(the_seed + number);
    p->where = witness(p->blocks * sizeof *p->where);
    p->generation = witness(p->blocks * BLOCK * sizeof *p->generation);
    p->touched = witness(p->blocks * BLOCK * sizeof *p->touched);
    p->reserve = MUST((char *)mmap(NULL, 3 * BLOCK * PAGE, PROT_NONE,
                                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    for (size_t b = 0; b < p->blocks; b++) {
        p->where[b] = b == 0 ? MUST((char *)mmap(landing(p), BLOCK * PAGE, PROT_READ | PROT_WRITE,
                                                 MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0))
                             : fresh_place(BLOCK);
        for (size_t k = 0; k < BLOCK; k++) write_page(p, b, k);
    }
}

int main(int argc, char **argv) {
    arguments(argc, argv);
    static struct pair pairs[PAIRS];
    pthread_t movers[PAIRS], touchers[PAIRS];
    for (size_t i = 0; i < PAIRS; i++) begin(pairs + i, i);
    pthread_mutex_lock(&address_space); // for the stacks
    for (size_t i = 0; i < PAIRS; i++) {
        touchers[i] = spawn(toucher, pairs + i);
        movers[i] = spawn(mover, pairs + i);
    }
    pthread_mutex_unlock(&address_space);
    for (size_t i = 0; i < PAIRS; i++) {
        join(movers[i]);
        join(touchers[i]);
    }
    return 0;
}
