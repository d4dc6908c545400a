// Chains of forks, five deep: parent and child rewrite what they shared, and both stay right.
//
// Each level keeps its own row of generations. MADV_WIPEONFORK memory reads zero in the child,
// MADV_DONTFORK memory is absent there. While a process forks, a thread of it counts in single pages:
// the child must hold one moment of each of them, and keep it.
#include "probe.h"

#define DEPTH 5
#define COUNTED 64 // pages with a running counter, for each level
#define SPECIAL 32 // pages of WIPEONFORK and of DONTFORK memory

static char *memory, *counted, *wiped, *hidden;
static uint32_t *generation; // witness, [level][page]
static volatile int counting;
static uint64_t *counts; // witness: what the counting thread of a level wrote last, [level][page]

static uint32_t *row(size_t level) { return generation + level * the_pages; }

// Which level wrote a page is part of its tag: a page of the other side is a wrong page.
static uint64_t page_tag(size_t page, uint32_t stamp) { return tag_of(page, stamp); }

static void rewrite(size_t level, size_t page) {
    uint32_t stamp = (row(level)[page] & 0x00ffffff) + 1;
    row(level)[page] = (uint32_t)(level + 1) << 24 | stamp;
    fill_page(memory + page * PAGE, page_tag(page, row(level)[page]));
}

static void check_all(size_t level, const char *when) {
    for (size_t p = 0; p < the_pages; p++) check_page(memory + p * PAGE, page_tag(p, row(level)[p]), when);
}

static uint64_t *counter_of(size_t level, size_t i) {
    return (uint64_t *)(counted + (level * COUNTED + i) * PAGE) + 8 * (i % 64);
}

static void *counter(void *argument) {
    size_t level = (size_t)argument;
    uint64_t state = mix(the_seed + level), *count = counts + level * COUNTED;
    while (counting) {
        size_t i = below(&state, COUNTED);
        // Announce, write: at any moment the page holds count or count - 1.
        uint64_t next = __atomic_add_fetch(count + i, 1, __ATOMIC_SEQ_CST);
        __atomic_store_n(counter_of(level, i), next, __ATOMIC_SEQ_CST);
    }
    return NULL;
}

// In the child: memory that fork treats specially.
static void check_special(void) {
    uint64_t value;
    for (size_t i = 0; i < SPECIAL; i++) {
        check_zero(wiped + i * PAGE, "WIPEONFORK in the child");
        if (try_read(hidden + i * PAGE, &value)) fail("DONTFORK page %zu reads %#lx in the child", i, value);
        if (probe_code != SEGV_MAPERR) fail("DONTFORK page %zu: si_code %d", i, probe_code);
    }
}

static void fill_special(void) {
    for (size_t i = 0; i < SPECIAL; i++) fill_page(wiped + i * PAGE, tag_of(i, 0x3193d));
}

static void level_down(size_t level, uint64_t seed) {
    uint64_t state = mix(seed + level);
    for (size_t i = 0; i < the_pages / 8; i++) rewrite(level, below(&state, the_pages));
    if (level + 1 == DEPTH) return check_all(level, "deepest");
    memcpy(row(level + 1), row(level), the_pages * sizeof *generation);
    uint64_t least[COUNTED], *count = counts + level * COUNTED;
    counting = 1;
    pthread_t thread = spawn(counter, (void *)level);
    sleep_us((unsigned)below(&state, 3000));
    for (size_t i = 0; i < COUNTED; i++) least[i] = *(volatile uint64_t *)counter_of(level, i);
    pid_t child = MUST(fork());
    if (child == 0) {
        uint64_t held[COUNTED];
        for (size_t i = 0; i < COUNTED; i++) {
            held[i] = *(volatile uint64_t *)counter_of(level, i);
            if (held[i] < least[i] || held[i] > __atomic_load_n(count + i, __ATOMIC_SEQ_CST))
                fail("child's counter %zu is %lu, at least %lu, at most %lu", i, held[i], least[i], count[i]);
        }
        check_special();
        fill_special();
        // Odd levels read everything first, even ones write first.
        if (level & 1) check_all(level + 1, "child at once");
        level_down(level + 1, seed);
        check_all(level + 1, "child after its own child");
        for (size_t i = 0; i < COUNTED; i++)
            if (*(volatile uint64_t *)counter_of(level, i) != held[i]) fail("child's counter %zu moved", i);
        for (size_t i = 0; i < SPECIAL; i++)
            check_page(wiped + i * PAGE, tag_of(i, 0x3193d), "rewritten WIPEONFORK memory");
        _exit(0);
    }
    for (size_t i = 0; i < the_pages / 8; i++) rewrite(level, below(&state, the_pages));
    check_all(level, "parent beside its child");
    counting = 0;
    join(thread);
    if (!child_succeeded(child)) fail("the child of level %zu failed", level);
    check_all(level, "parent after its child");
    for (size_t i = 0; i < COUNTED; i++)
        if (*(volatile uint64_t *)counter_of(level, i) > count[i]) fail("counter %zu ran ahead", i);
    for (size_t i = 0; i < SPECIAL; i++)
        check_page(wiped + i * PAGE, tag_of(i, 0x3193d), "the parent's WIPEONFORK memory");
}

int main(int argc, char **argv) {
    arguments(argc, argv);
    probe_setup();
    memory = region(the_pages);
    counted = region(DEPTH * COUNTED);
    wiped = region(SPECIAL);
    hidden = region(SPECIAL);
    generation = witness(DEPTH * the_pages * sizeof *generation);
    counts = witness(DEPTH * COUNTED * sizeof *counts);
    MUST(madvise(wiped, SPECIAL * PAGE, MADV_WIPEONFORK));
    for (size_t i = 0; i < SPECIAL; i++) fill_page(hidden + i * PAGE, tag_of(i, 0x41dde));
    for (size_t p = 0; p < the_pages; p++) rewrite(0, p);
    size_t chains = 0;
    do {
        fill_special();
        // A child has no DONTFORK memory of its own: only the first level's fork can show its absence,
        // the deeper ones inherit it.
        MUST(madvise(hidden, SPECIAL * PAGE, MADV_DONTFORK));
        for (size_t i = 0; i < SPECIAL; i++)
            check_page(hidden + i * PAGE, tag_of(i, 0x41dde), "the parent's DONTFORK memory");
        level_down(0, the_seed + ++chains);
    } while (!expired());
    printf("# fork_chains=%zu\n", chains);
    return 0;
}
