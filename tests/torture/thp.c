// Memory in huge pages: evicting must free memory, not only lower the resident count.
//
// Fills a MADV_HUGEPAGE region and stops at a checkpoint, where the driver compares free memory with a
// bare run; then goes on to read and write it all.
#include "torture.h"

#define HUGE_PAGES 512UL

static uint32_t *generation;
static char *memory;

// Contents that a store keeps as one word: the store must not eat what the eviction frees.
static uint64_t filler(size_t page) { return mix(the_seed ^ page ^ (uint64_t)generation[page] << 40); }

static void fill(size_t page) {
    uint64_t *words = (uint64_t *)(memory + page * PAGE);
    for (size_t k = 0; k < WORDS; k++) words[k] = filler(page);
}

static void look(size_t page, const char *when) {
    uint64_t *words = (uint64_t *)(memory + page * PAGE);
    for (size_t k = 0; k < WORDS; k++)
        if (words[k] != filler(page)) fail("%s: page %zu word %zu is %#lx, want %#lx", when, page, k, words[k], filler(page));
}

static unsigned long huge_kib(void) {
    char line[256];
    unsigned long total = 0, one;
    FILE *file = fopen("/proc/self/smaps_rollup", "r");
    if (!file) fail("smaps_rollup: %s", strerror(errno));
    while (fgets(line, sizeof line, file))
        if (sscanf(line, "AnonHugePages: %lu kB", &one) == 1) total += one;
    fclose(file);
    return total;
}

int main(int argc, char **argv) {
    arguments(argc, argv);
    double seconds = strtod(argv[3], NULL);
    char *raw = region(the_pages + HUGE_PAGES);
    memory = (char *)(((uintptr_t)raw + HUGE_PAGES * PAGE - 1) & ~(HUGE_PAGES * PAGE - 1));
    generation = witness(the_pages * sizeof *generation);
    MUST(madvise(memory, the_pages * PAGE, MADV_HUGEPAGE));
    unsigned long most = 0;
    for (size_t p = 0; p < the_pages; p++) {
        fill(p);
        if (p % (the_pages / 16) == 0 && huge_kib() > most) most = huge_kib();
    }
    printf("# huge_kib=%lu\n", most);
    checkpoint("filled");
    for (size_t p = 0; p < the_pages; p++) look(p, "after the checkpoint");
    uint64_t state = mix(the_seed);
    for (double end = now_s() + seconds; now_s() < end;) {
        size_t p = below(&state, the_pages);
        look(p, "in turn");
        if (draw(&state) & 1) {
            generation[p]++;
            fill(p);
        }
    }
    for (size_t p = 0; p < the_pages; p++) look(p, "end");
    return 0;
}
