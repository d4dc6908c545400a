// Signal handlers run on alternative stacks in evictable memory, at ever changing places.
//
// The kernel writes the signal frame there by itself; the handler then uses a large part of the stack.
#include "torture.h"
#include <signal.h>

#define THREADS 3
#define STACK_PAGES 16

static char *memory;
static uint32_t *generation;
static uint64_t handled;
static __thread volatile uint64_t in_handler;

__attribute__((noinline)) static uint64_t deep(uint64_t seed, int depth) {
    volatile uint64_t words[256];
    for (size_t i = 0; i < LEN(words); i++) words[i] = mix(seed + i);
    uint64_t below_sum = depth ? deep(seed + 1, depth - 1) : 0, sum = 0;
    for (size_t i = 0; i < LEN(words); i++) {
        if (words[i] != mix(seed + i)) fail("a word on the signal stack changed at depth %d", depth);
        sum += words[i];
    }
    return sum + below_sum;
}

static void handler(int signal, siginfo_t *info, void *context) {
    (void)context;
    uint64_t seed = (uint64_t)(uintptr_t)info->si_value.sival_ptr + (uint64_t)signal;
    uint64_t want = 0;
    for (int d = 0; d <= 8; d++)
        for (uint64_t i = 0; i < 256; i++) want += mix(seed + (uint64_t)(8 - d) + i);
    if (deep(seed, 8) != want) fail("the handler's sum is wrong");
    in_handler++;
    __atomic_fetch_add(&handled, 1, __ATOMIC_RELAXED);
}

// Pages are owned by threads in blocks of a stack's size; blocks serve as data and as stack in turn.
static void *worker(void *argument) {
    size_t me = (size_t)argument, blocks = the_pages / STACK_PAGES;
    uint64_t state = mix(the_seed + me);
    while (!expired()) {
        size_t block = below(&state, blocks / THREADS) * THREADS + me, first = block * STACK_PAGES;
        for (size_t p = first; p < first + STACK_PAGES; p++)
            check_page(memory + p * PAGE, tag_of(p, generation[p]), "data block");
        stack_t stack = {.ss_sp = memory + first * PAGE, .ss_size = STACK_PAGES * PAGE};
        MUST(sigaltstack(&stack, NULL));
        // Between the choice of the stack and the signal it may be evicted again.
        for (int i = 0; i < 3; i++) {
            size_t other = below(&state, blocks / THREADS) * THREADS + me;
            if (other != block)
                for (size_t p = other * STACK_PAGES; p < (other + 1) * STACK_PAGES; p++)
                    check_page(memory + p * PAGE, tag_of(p, generation[p]), "another block");
            uint64_t before = in_handler;
            union sigval value = {.sival_ptr = (void *)(draw(&state) >> 8)};
            int error = pthread_sigqueue(pthread_self(), SIGUSR1, value);
            if (error) fail("pthread_sigqueue: %s", strerror(error));
            uint64_t after = in_handler;
            if (after != before + 1) fail("one signal, but %ld were handled", (long)(after - before));
        }
        stack_t none = {.ss_flags = SS_DISABLE};
        MUST(sigaltstack(&none, NULL));
        for (size_t p = first; p < first + STACK_PAGES; p++)
            fill_page(memory + p * PAGE, tag_of(p, ++generation[p]));
    }
    return NULL;
}

int main(int argc, char **argv) {
    arguments(argc, argv);
    struct sigaction act = {.sa_sigaction = handler, .sa_flags = SA_SIGINFO | SA_ONSTACK};
    MUST(sigaction(SIGUSR1, &act, NULL));
    memory = region(the_pages);
    generation = witness(the_pages * sizeof *generation);
    for (size_t p = 0; p < the_pages; p++) fill_page(memory + p * PAGE, tag_of(p, 0));
    pthread_t threads[THREADS];
    for (size_t t = 0; t < THREADS; t++) threads[t] = spawn(worker, (void *)t);
    for (size_t t = 0; t < THREADS; t++) join(threads[t]);
    for (size_t p = 0; p < the_pages; p++) check_page(memory + p * PAGE, tag_of(p, generation[p]), "end");
    printf("# signals_handled=%lu\n", handled);
    return 0;
}
