// A second process on the same memory (CLONE_VM without CLONE_THREAD) goes on when the first has exited.
//
// The first process is the one that the pager took hold of: its pid is gone, the memory is not. The
// second tells the driver on stdout when it has checked everything.
#include "torture.h"
#include <linux/futex.h>
#include <signal.h>

static char *memory;
static uint32_t *generation;
static double second_seconds;

static void check_all(const char *when) {
    for (size_t p = 0; p < the_pages; p++) check_page(memory + p * PAGE, tag_of(p, generation[p]), when);
}

static void work(uint64_t *state, double seconds) {
    for (double end = now_s() + seconds; now_s() < end;)
        for (int i = 0; i < 64; i++) {
            size_t p = below(state, the_pages);
            check_page(memory + p * PAGE, tag_of(p, generation[p]), "in turn");
            if (draw(state) & 1) fill_page(memory + p * PAGE, tag_of(p, ++generation[p]));
        }
}

static int second(void *argument) {
    pid_t first = (pid_t)(intptr_t)argument;
    // No thread library here: the first process's thread-local memory is shared until it has gone.
    while (syscall(SYS_getppid) == first) syscall(SYS_sched_yield);
    uint64_t state = mix(the_seed + 2);
    work(&state, second_seconds);
    check_all("second process");
    static const char line[] = "# second_process=1\n";
    syscall(SYS_write, 1, line, sizeof line - 1);
    syscall(SYS_exit_group, 0);
    return 0;
}

int main(int argc, char **argv) {
    arguments(argc, argv);
    second_seconds = strtod(argv[3], NULL) / 2;
    memory = region(the_pages);
    generation = witness(the_pages * sizeof *generation);
    for (size_t p = 0; p < the_pages; p++) fill_page(memory + p * PAGE, tag_of(p, 0));
    uint64_t state = mix(the_seed + 1);
    work(&state, second_seconds);
    // The second process's stack is plain memory as well.
    char *stack = region(64);
    MUST(clone(second, stack + 64 * PAGE, CLONE_VM | CLONE_FS | CLONE_FILES | SIGCHLD, (void *)(intptr_t)getpid()));
    _exit(0);
}
