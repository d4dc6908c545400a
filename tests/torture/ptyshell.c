// A small shell with job control: runs one command on a terminal of its own, types ^Z at it again and
// again, looks that the whole job has stopped, and puts it back to the foreground.
//
// ptyshell ROUNDS COMMAND...: exit code of the command; 1 with a line on stderr when job control fails.
#include "torture.h"
#include <dirent.h>
#include <signal.h>
#include <sys/ioctl.h>
#include <termios.h>

// Says whether every thread of every process of the group is stopped, and how many processes there are.
static bool group_stopped(pid_t group, int *processes) {
    DIR *proc = opendir("/proc");
    struct dirent *entry;
    bool stopped = true;
    *processes = 0;
    while ((entry = readdir(proc))) {
        char path[300], line[512], state;
        int pid = atoi(entry->d_name), parent, of_group;
        if (pid <= 0) continue;
        snprintf(path, sizeof path, "/proc/%d/stat", pid);
        int fd = open(path, O_RDONLY | O_CLOEXEC);
        if (fd < 0) continue;
        ssize_t n = read(fd, line, sizeof line - 1);
        close(fd);
        if (n <= 0) continue;
        line[n] = 0;
        char *after_name = strrchr(line, ')');
        if (!after_name || sscanf(after_name + 2, "%c %d %d", &state, &parent, &of_group) != 3) continue;
        if (of_group != group || state == 'Z') continue;
        ++*processes;
        if (state != 'T') stopped = false;
    }
    closedir(proc);
    return stopped;
}

static int shell(int terminal, int master, int rounds, char **command) {
    setsid();
    MUST(ioctl(terminal, TIOCSCTTY, 0));
    signal(SIGTTOU, SIG_IGN); // the shell itself changes the foreground job from the background
    pid_t job = MUST(fork());
    if (job == 0) {
        setpgid(0, 0);
        tcsetpgrp(terminal, getpid());
        signal(SIGTTOU, SIG_DFL);
        close(master);
        // Standard input is the terminal, the outputs stay the driver's.
        dup2(terminal, 0);
        close(terminal);
        execvp(command[0], command);
        fail("%s: %s", command[0], strerror(errno));
    }
    setpgid(job, job);
    int status;
    for (int round = 0; round < rounds; round++) {
        sleep_us(300000 + (unsigned)(mix((uint64_t)round) % 700000));
        MUST(tcsetpgrp(terminal, job));
        MUST(write(master, "\032", 1));
        if (MUST(waitpid(job, &status, WUNTRACED)) != job) fail("waitpid");
        if (WIFEXITED(status) || WIFSIGNALED(status)) {
            // Ended before the key was typed: that is not an error of the job.
            printf("# pty_stops=%d\n", round);
            return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
        }
        MUST(tcsetpgrp(terminal, getpid()));
        int processes = 0;
        double give_up = now_s() + 10;
        while (!group_stopped(job, &processes) && now_s() < give_up) sleep_us(10000);
        if (!group_stopped(job, &processes)) fail("^Z number %d: a process of the job still runs after 10 s", round);
        sleep_us((unsigned)(mix(round + 99) % 400000));
        if (!group_stopped(job, &processes)) fail("^Z number %d: a process of the job runs again by itself", round);
        MUST(tcsetpgrp(terminal, job));
        MUST(kill(-job, SIGCONT));
    }
    if (MUST(waitpid(job, &status, 0)) != job) fail("waitpid");
    printf("# pty_stops=%d\n", rounds);
    return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
}

int main(int argc, char **argv) {
    if (argc < 3) fail("usage: ptyshell ROUNDS COMMAND...");
    int master = MUST(posix_openpt(O_RDWR | O_NOCTTY | O_CLOEXEC));
    MUST(grantpt(master));
    MUST(unlockpt(master));
    int terminal = MUST(open(ptsname(master), O_RDWR | O_NOCTTY));
    pid_t leader = MUST(fork());
    if (leader == 0) {
        int code = shell(terminal, master, atoi(argv[1]), argv + 2);
        fflush(stdout);
        _exit(code);
    }
    close(terminal);
    // What the terminal echoes is read away, or the job would block in its own output one day.
    for (char buffer[256];;) {
        if (read(master, buffer, sizeof buffer) < 0 && errno != EINTR) break;
    }
    int status;
    MUST(waitpid(leader, &status, 0));
    return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
}
