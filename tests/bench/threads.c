// threads N MIB: its first thread computes and looks at the clock all the time, the others sleep and wake.
//
// Commands: "gap" answers with the longest time, in microseconds, that the first thread was kept from
// looking at the clock since the last "gap". "sleep": all of them sleep from now on.
#include "bench.h"
#include <pthread.h>

static _Atomic bool quiet;

static void *nap(void *unused) {
    (void)unused;
    while (!quiet) usleep(10000);
    for (;;) pause();
    return NULL;
}

// Computes until a command waits; the longest gap meanwhile.
static uint64_t compute(void) {
    struct pollfd command = {.fd = 0, .events = POLLIN};
    uint64_t longest = 0;
    for (uint64_t last = now_ns(), turn = 0;; turn++) {
        uint64_t now = now_ns();
        if (now - last > longest) longest = now - last;
        last = now;
        if (turn % 64 == 0 && poll(&command, 1, 0) > 0) return longest;
    }
}

int main(int argc, char **argv) {
    if (argc != 3) fail("usage: threads N MIB");
    int count = atoi(argv[1]);
    size_t pages = (strtoull(argv[2], NULL, 10) << 20) / PAGE;
    char *memory = map_pages(pages);
    for (size_t i = 0; i < pages * (PAGE / SUBPAGE); i++) fill_subpage(memory + i * SUBPAGE, i, false);
    pthread_attr_t small;
    pthread_attr_init(&small);
    pthread_attr_setstacksize(&small, 65536);
    for (int i = 1; i < count; i++) {
        pthread_t thread;
        if (pthread_create(&thread, &small, nap, NULL) != 0) fail("no thread");
    }
    setvbuf(stdin, NULL, _IONBF, 0); // poll must see what is not read yet
    say("ready");
    for (;;) {
        uint64_t longest = compute();
        char *words[1] = {""};
        next_command(words, 1);
        if (strcmp(words[0], "gap") == 0) {
            printf("gap %.1f\n", (double)longest / 1000);
            fflush(stdout);
        } else if (strcmp(words[0], "sleep") == 0) {
            quiet = true;
            say("asleep");
            for (;;) pause();
        } else {
            fail("unknown command");
        }
    }
}
