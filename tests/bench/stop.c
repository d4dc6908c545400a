// stop PID: stops one thread with ptrace, reads its registers and lets it go; prints the microseconds.
//
// The least that an injection can take: holo does this and lets the thread make a system call or two.
#include "bench.h"
#include <sys/ptrace.h>
#include <sys/user.h>
#include <sys/wait.h>

int main(int argc, char **argv) {
    if (argc != 2) fail("usage: stop PID");
    pid_t pid = atoi(argv[1]);
    int status;
    struct user_regs_struct registers;
    MUST(ptrace(PTRACE_SEIZE, pid, NULL, NULL));
    uint64_t before = now_ns();
    MUST(ptrace(PTRACE_INTERRUPT, pid, NULL, NULL));
    MUST(waitpid(pid, &status, __WALL));
    MUST(ptrace(PTRACE_GETREGS, pid, NULL, &registers));
    MUST(ptrace(PTRACE_DETACH, pid, NULL, NULL));
    printf("stop %.1f\n", (double)(now_ns() - before) / 1000);
    return 0;
}
