// More processes at once than one look at descriptors has room for. Each fills memory of its own and checks it until the
// input ends, and at least until the last one has come that far.
#include "torture.h"

#define PROCESSES 100

static size_t pages; // of each process
static uint32_t *ready; // witness: processes that have filled their memory and found it right
static uint32_t *over;  // witness: the input has ended

static void live(size_t number) {
    char *memory = region(pages);
    uint64_t state = mix(the_seed + number);
    for (size_t p = 0; p < pages; p++) fill_page(memory + p * PAGE, tag_of(p, number));
    for (bool told = false;;) {
        bool last = __atomic_load_n(over, __ATOMIC_SEQ_CST) && __atomic_load_n(ready, __ATOMIC_SEQ_CST) == PROCESSES;
        size_t from = below(&state, pages);
        for (size_t i = 0; i < pages; i++) {
            size_t p = (from + i) % pages;
            check_page(memory + p * PAGE, tag_of(p, number), "one of many");
        }
        if (last) return;
        if (!told) __atomic_add_fetch(ready, 1, __ATOMIC_SEQ_CST);
        told = true;
        sleep_us((unsigned)below(&state, 200000));
    }
}

int main(int argc, char **argv) {
    arguments(argc, argv);
    pages = the_pages / PROCESSES;
    ready = witness(sizeof *ready);
    over = witness(sizeof *over);
    pid_t children[PROCESSES];
    for (size_t n = 0; n < PROCESSES; n++) {
        children[n] = MUST(fork());
        if (children[n] == 0) {
            live(n);
            _exit(0);
        }
    }
    while (getchar() != EOF) {}
    __atomic_store_n(over, 1, __ATOMIC_SEQ_CST);
    for (size_t n = 0; n < PROCESSES; n++)
        if (!child_succeeded(children[n])) fail("process %zu failed", n);
    printf("# together=%d\n", *ready);
    return 0;
}
