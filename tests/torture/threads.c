// 100,000 threads are created and joined on three kinds of stacks while other threads evict.
//
// The kernel clears a thread's id at its exit without waiting for anybody: on a page that is gone or
// protected it gives up silently, and pthread_join hangs for ever. Stacks that the program cuts out of
// its own heap lie in memory that looks like data until a thread runs there; and what is unmapped and
// mapped again at the same place may hold stacks at the very addresses that held some before.
#include "torture.h"

#define TOTAL 100000
#define SLOT_BYTES (64UL << 10)
#define SLOTS 64

static struct ballast load;
static volatile int finished;
static __thread uint64_t local_words[32];

static void *short_life(void *argument) {
    uint64_t tag = (uint64_t)argument;
    volatile uint64_t stack_words[64];
    for (size_t i = 0; i < LEN(stack_words); i++) stack_words[i] = mix(tag + i);
    for (size_t i = 0; i < LEN(local_words); i++) local_words[i] = mix(tag ^ i);
    // Some wait for a page of their own: 100,000 waits would test the pager's speed, not the stacks.
    if (tag % 64 == 0) ballast_sweep(load, tag >> 8, 1);
    if ((tag & 15) == 0) sched_yield();
    uint64_t sum = 0;
    for (size_t i = 0; i < LEN(stack_words); i++) {
        if (stack_words[i] != mix(tag + i)) fail("stack word %zu changed", i);
        sum += stack_words[i];
    }
    for (size_t i = 0; i < LEN(local_words); i++)
        if (local_words[i] != mix(tag ^ i)) fail("thread-local word %zu changed", i);
    return (void *)sum;
}

static void create_and_join(pthread_attr_t *attributes, uint64_t tag) {
    pthread_t thread;
    int error = pthread_create(&thread, attributes, short_life, (void *)tag);
    if (error) fail("pthread_create: %s", strerror(error));
    uint64_t want = 0;
    for (size_t i = 0; i < 64; i++) want += mix(tag + i);
    if ((uint64_t)join(thread) != want) fail("a thread returned a wrong sum");
}

static void *default_stacks(void *argument) {
    uint64_t state = mix(the_seed + 1);
    for (size_t i = 0; i < (size_t)argument; i++) create_and_join(NULL, draw(&state));
    return NULL;
}

static void *small_stacks(void *argument) {
    uint64_t state = mix(the_seed + 2);
    pthread_attr_t attributes;
    pthread_attr_init(&attributes);
    for (size_t i = 0; i < (size_t)argument; i++) {
        pthread_attr_setstacksize(&attributes, (16UL + 4 * below(&state, 8)) << 10);
        create_and_join(&attributes, draw(&state));
    }
    return NULL;
}

// Every second slot of one malloc'd block is a stack in turn, the ones between hold data. From time to
// time the block is freed and another is made, in turn by malloc and by mmap, so that plain data turns
// into stacks again and again.
static void *stacks_in_the_heap(void *argument) {
    uint64_t state = mix(the_seed + 3);
    pthread_attr_t attributes;
    pthread_attr_init(&attributes);
    bool mapped = false;
    for (size_t done = 0; done < (size_t)argument;) {
        mapped = !mapped;
        char *block = mapped ? MUST(mmap(NULL, SLOTS * SLOT_BYTES, PROT_READ | PROT_WRITE,
                                         MAP_PRIVATE | MAP_ANONYMOUS, -1, 0))
                             : aligned_alloc(PAGE, SLOTS * SLOT_BYTES);
        if (!block) fail("no memory for stacks");
        uint64_t generation = draw(&state);
        for (size_t p = 0; p < SLOTS * SLOT_BYTES / PAGE; p++)
            fill_page(block + p * PAGE, tag_of(p, generation));
        sleep_us(50000); // the pager sees data here, and may take it
        for (size_t i = 0; i < 2000 && done < (size_t)argument; i++, done++) {
            char *stack = block + (i % (SLOTS / 2)) * 2 * SLOT_BYTES;
            int error = pthread_attr_setstack(&attributes, stack, SLOT_BYTES);
            if (error) fail("pthread_attr_setstack: %s", strerror(error));
            create_and_join(&attributes, draw(&state));
        }
        size_t slot_pages = SLOT_BYTES / PAGE;
        for (size_t p = 0; p < SLOTS * slot_pages; p++)
            if (p / slot_pages % 2 == 1)
                check_page(block + p * PAGE, tag_of(p, generation), "data between stacks");
        if (mapped)
            MUST(munmap(block, SLOTS * SLOT_BYTES));
        else
            free(block);
    }
    return NULL;
}

static void *pressure(void *argument) {
    uint64_t state = mix(the_seed + (uint64_t)argument);
    while (!finished) {
        ballast_sweep(load, below(&state, load.pages), 128);
        sleep_us(1000); // leaves a CPU to the creators
    }
    return NULL;
}

int main(int argc, char **argv) {
    arguments(argc, argv);
    load = ballast(the_pages);
    // SECONDS scales the number of threads here: ten, which is what `make test` asks for, are TOTAL threads.
    size_t total = (size_t)(strtod(argv[3], NULL) / 10.0 * TOTAL);
    pthread_t pressers[2], creators[3];
    for (size_t i = 0; i < LEN(pressers); i++) pressers[i] = spawn(pressure, (void *)(100 + i));
    creators[0] = spawn(default_stacks, (void *)(total * 2 / 5));
    creators[1] = spawn(small_stacks, (void *)(total * 2 / 5));
    creators[2] = spawn(stacks_in_the_heap, (void *)(total / 5));
    for (size_t i = 0; i < LEN(creators); i++) join(creators[i]);
    finished = 1;
    for (size_t i = 0; i < LEN(pressers); i++) join(pressers[i]);
    printf("# threads_joined=%zu\n", total);
    return 0;
}
