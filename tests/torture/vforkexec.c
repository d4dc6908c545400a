// vfork and posix_spawn from a program under eviction; the new program is this one again.
//
// Between vfork and exec the child runs on the parent's memory: what it writes there the parent sees.
// The exec'd image has an address space of its own and checks that.
#include "torture.h"
#include <spawn.h>

extern char **environ;
static struct ballast load;
static char *self;

static void *pressure(void *argument) {
    uint64_t state = mix(the_seed + (uint64_t)argument);
    while (!expired()) ballast_sweep(load, below(&state, load.pages), 512);
    return NULL;
}

int main(int argc, char **argv) {
    arguments(argc, argv);
    self = argv[0];
    if (argc == 5) { // the exec'd image: argv[4] is the word its parent chose
        struct ballast own = ballast(the_pages);
        ballast_sweep(own, 0, own.pages);
        return strtoull(argv[4], NULL, 10) == mix(the_seed) ? 0 : 1;
    }
    load = ballast(the_pages);
    pthread_t presser = spawn(pressure, (void *)1);
    uint64_t state = mix(the_seed + 2);
    size_t rounds = 0;
    char *scratch = region(64);
    do {
        uint64_t seed = draw(&state) >> 8;
        size_t p = below(&state, 64);
        char seed_text[32], word_text[32];
        snprintf(seed_text, sizeof seed_text, "%lu", seed);
        snprintf(word_text, sizeof word_text, "%lu", mix(seed));
        char *arguments_of_child[] = {self, seed_text, "2", "0", word_text, NULL};
        pid_t child;
        if (rounds & 1) {
            int error = posix_spawn(&child, self, NULL, NULL, arguments_of_child, environ);
            if (error) fail("posix_spawn: %s", strerror(error));
        } else {
            volatile uint64_t *shared = (volatile uint64_t *)(scratch + p * PAGE);
            *shared = seed;
            child = vfork();
            if (child < 0) fail("vfork: %s", strerror(errno));
            if (child == 0) {
                *shared = *shared + 1;
                execv(self, arguments_of_child);
                _exit(111);
            }
            if (*shared != seed + 1) fail("the vfork child's write is not there");
        }
        if (!child_succeeded(child)) fail("the new program of round %zu failed", rounds);
        rounds++;
    } while (!expired());
    join(presser);
    ballast_sweep(load, 0, load.pages);
    printf("# new_programs=%zu\n", rounds);
    return 0;
}
