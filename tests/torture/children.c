// Programs that are sensitive to what lives in a process run as children: `unshare -Ur true`, and a
// fork that makes a user namespace by itself.
#include "torture.h"
#include <spawn.h>

extern char **environ;
static struct ballast load;

static void *pressure(void *argument) {
    uint64_t state = mix(the_seed + (uint64_t)argument);
    while (!expired()) ballast_sweep(load, below(&state, load.pages), 512);
    return NULL;
}

int main(int argc, char **argv) {
    arguments(argc, argv);
    load = ballast(the_pages);
    pthread_t presser = spawn(pressure, (void *)1);
    size_t rounds = 0;
    do {
        pid_t child;
        if (rounds % 4 == 3) {
            // A forked child shares the image, and everything that the parent's ring is not.
            child = MUST(fork());
            if (child == 0) {
                if (unshare(CLONE_NEWUSER)) fail("unshare in a forked child: %s", strerror(errno));
                ballast_sweep(load, rounds % load.pages, 64);
                _exit(0);
            }
        } else {
            char *command[] = {"unshare", "-Ur", "true", NULL};
            int error = posix_spawnp(&child, command[0], NULL, NULL, command, environ);
            if (error) fail("unshare: %s", strerror(error));
        }
        if (!child_succeeded(child)) fail("child %zu failed", rounds);
        rounds++;
    } while (!expired());
    join(presser);
    ballast_sweep(load, 0, load.pages);
    printf("# children=%zu\n", rounds);
    return 0;
}
