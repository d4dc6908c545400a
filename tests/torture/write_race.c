// Threads write the page that is being evicted: single words, blind and after a read, and atomic
// counters that all threads share.
//
// A page is 64 slots of one cache line. One word of a slot belongs to one thread and carries a
// generation; slot 63 is a counter of everybody; the other words never change.
#include "torture.h"

#define THREADS 4
#define SLOTS 64
#define SHARED_SLOT 63

static char *memory;
static uint8_t *generation; // [page][slot]
static uint32_t *counter;   // [page]

static uint64_t background(size_t page, size_t word) { return mix(the_seed + page * WORDS + word); }
static size_t active_word(size_t page, size_t slot) { return slot * 8 + (page + slot) % 8; }

static uint64_t value(size_t page, size_t slot, uint8_t gen) {
    return gen == 0 ? background(page, active_word(page, slot))
                    : mix(the_seed ^ (page << 20) ^ (slot << 8) ^ gen);
}

static uint64_t *cell(size_t page, size_t slot) {
    return (uint64_t *)(memory + page * PAGE) + active_word(page, slot);
}

static void *writer(void *argument) {
    size_t me = (size_t)argument;
    uint64_t state = mix(the_seed + me);
    size_t sweep = below(&state, the_pages);
    while (!expired()) {
        for (int i = 0; i < 200; i++) {
            uint64_t r = draw(&state);
            // Mostly anywhere, sometimes a small hot set, sometimes straight on.
            size_t page = (r & 7) < 5    ? (r >> 16) % the_pages
                          : (r & 7) == 5 ? (r >> 16) % 64
                                         : (sweep = (sweep + 1) % the_pages);
            size_t slot = (r >> 8 & 15) * THREADS + me;
            if (slot == SHARED_SLOT || (r >> 40 & 3) == 0) {
                __atomic_fetch_add(cell(page, SHARED_SLOT), 1, __ATOMIC_RELAXED);
                __atomic_fetch_add(counter + page, 1, __ATOMIC_RELAXED);
                continue;
            }
            uint8_t *gen = generation + page * SLOTS + slot;
            bool blind = (r >> 42 & 3) == 0;
            if (!blind) {
                uint64_t seen = __atomic_load_n(cell(page, slot), __ATOMIC_RELAXED);
                if (seen != value(page, slot, *gen))
                    fail("thread %zu: page %zu at %p slot %zu is %#lx, want %#lx (generation %u)", me,
                         page, (void *)(memory + page * PAGE), slot, seen, value(page, slot, *gen), *gen);
            }
            if (blind || r >> 63) {
                *gen = *gen == 255 ? 1 : *gen + 1;
                __atomic_store_n(cell(page, slot), value(page, slot, *gen), __ATOMIC_RELAXED);
            }
        }
    }
    return NULL;
}

int main(int argc, char **argv) {
    arguments(argc, argv);
    memory = region(the_pages);
    generation = witness(the_pages * SLOTS);
    counter = witness(the_pages * sizeof *counter);
    for (size_t p = 0; p < the_pages; p++)
        for (size_t k = 0; k < WORDS; k++)
            ((uint64_t *)(memory + p * PAGE))[k] = background(p, k);
    pthread_t threads[THREADS];
    for (size_t t = 0; t < THREADS; t++) threads[t] = spawn(writer, (void *)t);
    for (size_t t = 0; t < THREADS; t++) join(threads[t]);
    for (size_t p = 0; p < the_pages; p++)
        for (size_t k = 0; k < WORDS; k++) {
            size_t slot = k / 8;
            uint64_t want = background(p, k);
            if (k == active_word(p, slot))
                want = slot == SHARED_SLOT ? want + counter[p] : value(p, slot, generation[p * SLOTS + slot]);
            uint64_t seen = ((uint64_t *)(memory + p * PAGE))[k];
            if (seen != want) fail("end: page %zu word %zu is %#lx, want %#lx", p, k, seen, want);
        }
    return 0;
}
