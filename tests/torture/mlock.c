// Ranges are locked and unlocked while everything around them is evicted.
//
// What mlock has returned for is resident until munlock: mincore says so for every page, all the time.
#include "torture.h"

#define THREADS 3
#define SPAN 24 // pages

static char *memory;
static uint32_t *generation;
static uint64_t locks;

static void look(size_t p, const char *when) { check_page(memory + p * PAGE, tag_of(p, generation[p]), when); }

static void check_resident(size_t first, size_t count, const char *when) {
    unsigned char present[SPAN];
    MUST(mincore(memory + first * PAGE, count * PAGE, present));
    for (size_t i = 0; i < count; i++)
        if (!(present[i] & 1)) fail("%s: locked page %zu is not resident", when, first + i);
}

static void *worker(void *argument) {
    size_t me = (size_t)argument, part = the_pages / THREADS, base = me * part;
    uint64_t state = mix(the_seed + me);
    while (!expired()) {
        size_t count = 1 + below(&state, SPAN), first = base + below(&state, part - SPAN);
        char *at = memory + first * PAGE;
        bool on_fault = draw(&state) % 4 == 0;
        MUST(on_fault ? mlock2(at, count * PAGE, MLOCK_ONFAULT) : mlock(at, count * PAGE));
        // Locked on fault: resident from the first touch on.
        if (on_fault)
            for (size_t i = 0; i < count; i++) look(first + i, "locked on fault");
        check_resident(first, count, "just locked");
        for (int round = 0; round < 4; round++) {
            for (size_t i = 0; i < count; i++) {
                look(first + i, "locked");
                if (draw(&state) & 1) fill_page(at + i * PAGE, tag_of(first + i, ++generation[first + i]));
            }
            for (size_t i = 0, p = base + below(&state, part - 256); i < 256; i++) look(p + i, "elsewhere");
            check_resident(first, count, "under pressure");
        }
        // In two steps: the mapping splits and merges while it is locked.
        size_t half = count / 2;
        if (half) MUST(munlock(at, half * PAGE));
        check_resident(first + half, count - half, "half unlocked");
        MUST(munlock(at + half * PAGE, (count - half) * PAGE));
        __atomic_fetch_add(&locks, 1, __ATOMIC_RELAXED);
    }
    return NULL;
}

int main(int argc, char **argv) {
    arguments(argc, argv);
    memory = region(the_pages);
    generation = witness(the_pages * sizeof *generation);
    for (size_t p = 0; p < the_pages; p++) fill_page(memory + p * PAGE, tag_of(p, 0));
    pthread_t threads[THREADS];
    for (size_t t = 0; t < THREADS; t++) threads[t] = spawn(worker, (void *)t);
    for (size_t t = 0; t < THREADS; t++) join(threads[t]);
    for (size_t p = 0; p < the_pages; p++) look(p, "end");
    printf("# locks=%lu\n", locks);
    return 0;
}
