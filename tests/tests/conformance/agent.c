/* A process that does single steps on demand, on threads of its own.
 *
 * A line on its input names a thread, a step's number and what to do: "THREAD STEP WHAT ARGUMENTS". When the
 * step is done the line "STEP RESULT..." comes back. Thread 0 is the one that reads the lines, so a process that is
 * asked for nothing else has one thread. A fork's child goes on in the same way, over pipes that the answer names.
 *
 * Its own data, stacks and code are never served by a userfaultfd: only what the test maps is. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <unistd.h>

enum { THREADS = 8, LINE = 4096, STACK = 65536, STACKS = 16 };

struct worker {
    pthread_t thread;
    int started, full;
    pthread_mutex_t lock;
    pthread_cond_t changed;
    char line[LINE];
};

static struct worker workers[THREADS];
static int out = 1;
static char stacks[STACKS][STACK] __attribute__((aligned(64)));
static int stacks_used;
static volatile uint32_t end_threads;

/* In pinned.c. */
long pin(void *at, unsigned long len);
long read_into_pinned(int file, void *at, unsigned len);
long unpin(void);

static void serve(int in);

static void answer(const char *step, long result) {
    char text[64];
    int n = snprintf(text, sizeof text, "%s %ld\n", step, result);
    if (write(out, text, n) != n)
        _exit(3);
}

static long call(char **rest) {
    long a[7] = {0};
    for (int i = 0; i < 7; i++) {
        char *word = strsep(rest, " ");
        if (!word)
            break;
        a[i] = (long)strtoull(word, 0, 0);
    }
    long r = syscall(a[0], a[1], a[2], a[3], a[4], a[5], a[6]);
    return r == -1 ? -errno : r;
}

static uint64_t number(char **rest) {
    char *word = strsep(rest, " ");
    return word ? strtoull(word, 0, 0) : 0;
}

/* Moves a mapping there and back, so often. */
static long swing(uint64_t here, uint64_t there, uint64_t len, uint64_t rounds) {
    int flags = MREMAP_MAYMOVE | MREMAP_FIXED;
    for (; rounds > 0; rounds--)
        if (mremap((void *)here, len, len, flags, (void *)there) == MAP_FAILED ||
            mremap((void *)there, len, len, flags, (void *)here) == MAP_FAILED)
            return -errno;
    return 0;
}

/* How many bytes are not `value`. */
static long differing(volatile uint8_t *at, uint64_t len, uint8_t value) {
    long n = 0;
    for (uint64_t i = 0; i < len; i++)
        n += at[i] != value;
    return n;
}

/* Empties every CPU's list of pages on their way to or within the LRU: a FREE from another CPU does not mark
 * a page that waits on one, and a reclaim passes it by. MADV_COLD drains the list of its CPU. */
static long drain_cpu_lists(void) {
    cpu_set_t before, one;
    sched_getaffinity(0, sizeof before, &before);
    char *page = mmap(0, 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    for (int cpu = 0; cpu < CPU_SETSIZE; cpu++) {
        if (!CPU_ISSET(cpu, &before))
            continue;
        CPU_ZERO(&one);
        CPU_SET(cpu, &one);
        if (sched_setaffinity(0, sizeof one, &one) || madvise(page, 4096, MADV_COLD))
            return -errno;
    }
    munmap(page, 4096);
    sched_setaffinity(0, sizeof before, &before);
    return 0;
}

/* Ends when told, touching no memory that could be served. */
static int wait_for_the_end(void *unused) {
    (void)unused;
    while (!end_threads)
        syscall(SYS_futex, &end_threads, 0 /* FUTEX_WAIT */, 0, 0, 0, 0);
    syscall(SYS_exit, 0);
    return 0;
}

/* A thread whose id the kernel clears at `tid` when it ends. */
static long thread_with_tid_at(uint64_t tid) {
    int flags = CLONE_VM | CLONE_FS | CLONE_FILES | CLONE_SIGHAND | CLONE_THREAD | CLONE_SYSVSEM |
                CLONE_PARENT_SETTID | CLONE_CHILD_CLEARTID;
    char *stack = stacks[stacks_used++ % STACKS];
    return clone(wait_for_the_end, stack + STACK, flags, 0, (void *)tid, 0, (void *)tid);
}

static int do_nothing(void *unused) {
    (void)unused;
    for (;;)
        pause();
    return 0;
}

/* Reads messages of a userfaultfd one by one into 32-byte slots, until it is killed. */
static void read_into_slots(int uffd, uint64_t slots, uint64_t count, uint64_t first) {
    for (uint64_t i = first;; i++) {
        struct { int fd; short events, revents; } poll = {uffd, 1, 0};
        uint64_t at = slots + i % count * 32;
        while (read(uffd, (void *)at, 32) != 32)
            syscall(SYS_poll, &poll, 1, 1000);
    }
}

/* Drops a range over and over, and counts how often that came back. Until word 1 is set. */
static long drop_and_count(uint64_t at, uint64_t len, volatile uint64_t *words) {
    while (!__atomic_load_n(&words[1], __ATOMIC_ACQUIRE))
        if (madvise((void *)at, len, MADV_DONTNEED) == 0)
            __atomic_fetch_add(&words[0], 1, __ATOMIC_RELEASE);
    return 0;
}

/* The child serves in the parent's place; the parent answers with the child's id and its own ends of the pipes. */
static void fork_off(const char *step) {
    int to[2], from[2];
    if (pipe2(to, O_CLOEXEC) || pipe2(from, O_CLOEXEC)) {
        answer(step, -errno);
        return;
    }
    long child = fork();
    if (child == 0) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        for (int i = 0; i < THREADS; i++)
            workers[i].started = 0;
        close(to[1]);
        close(from[0]);
        out = from[1];
        serve(to[0]);
        _exit(0);
    }
    close(to[0]);
    close(from[1]);
    char text[128];
    int n = snprintf(text, sizeof text, "%s %ld %d %d\n", step, child < 0 ? (long)-errno : child, to[1], from[0]);
    if (write(out, text, n) != n)
        _exit(3);
}

static void perform(char *line) {
    char *step = strsep(&line, " "), *what = strsep(&line, " ");
    char **rest = &line;
    if (!step || !what)
        _exit(4);
    long result = 0;
    if (!strcmp(what, "call")) {
        result = call(rest);
    } else if (!strcmp(what, "peek")) {
        result = *(volatile uint8_t *)number(rest);
    } else if (!strcmp(what, "poke")) {
        volatile uint8_t *at = (void *)number(rest);
        *at = number(rest);
    } else if (!strcmp(what, "word")) {
        result = *(volatile uint32_t *)number(rest);
    } else if (!strcmp(what, "words")) { /* AT WORD... */
        volatile uint64_t *at = (void *)number(rest);
        while (*rest)
            *at++ = number(rest);
    } else if (!strcmp(what, "text")) { /* AT TEXT */
        char *at = (void *)number(rest);
        strcpy(at, *rest ? *rest : "");
    } else if (!strcmp(what, "fill")) {
        void *at = (void *)number(rest);
        uint64_t len = number(rest);
        memset(at, (int)number(rest), len);
    } else if (!strcmp(what, "differing")) {
        void *at = (void *)number(rest);
        uint64_t len = number(rest);
        result = differing(at, len, number(rest));
    } else if (!strcmp(what, "swing")) {
        uint64_t here = number(rest), there = number(rest), len = number(rest);
        result = swing(here, there, len, number(rest));
    } else if (!strcmp(what, "drain")) {
        result = drain_cpu_lists();
    } else if (!strcmp(what, "tid")) {
        result = syscall(SYS_gettid);
    } else if (!strcmp(what, "fork")) {
        fork_off(step);
        return;
    } else if (!strcmp(what, "share_descriptors")) {
        char *stack = stacks[stacks_used++ % STACKS];
        result = clone(do_nothing, stack + STACK, CLONE_FILES | SIGCHLD, 0);
    } else if (!strcmp(what, "thread_with_tid_at")) {
        result = thread_with_tid_at(number(rest));
    } else if (!strcmp(what, "end_threads")) {
        end_threads = 1;
        syscall(SYS_futex, &end_threads, 1 /* FUTEX_WAKE */, 1000, 0, 0, 0);
    } else if (!strcmp(what, "read_into_slots")) {
        int uffd = number(rest);
        uint64_t slots = number(rest), count = number(rest);
        read_into_slots(uffd, slots, count, number(rest));
    } else if (!strcmp(what, "drop_and_count")) {
        uint64_t at = number(rest), len = number(rest);
        result = drop_and_count(at, len, (void *)number(rest));
    } else if (!strcmp(what, "pin")) {
        uint64_t at = number(rest);
        result = pin((void *)at, number(rest));
    } else if (!strcmp(what, "read_into_pinned")) {
        int file = number(rest);
        uint64_t at = number(rest);
        result = read_into_pinned(file, (void *)at, number(rest));
    } else if (!strcmp(what, "unpin")) {
        result = unpin();
    } else {
        _exit(5);
    }
    answer(step, result);
}

static void *work(void *argument) {
    struct worker *me = argument;
    for (;;) {
        pthread_mutex_lock(&me->lock);
        while (!me->full)
            pthread_cond_wait(&me->changed, &me->lock);
        pthread_mutex_unlock(&me->lock);
        /* Given back before the step is done: its answer may bring the next line at once. */
        char line[LINE];
        strcpy(line, me->line);
        pthread_mutex_lock(&me->lock);
        me->full = 0;
        pthread_cond_broadcast(&me->changed);
        pthread_mutex_unlock(&me->lock);
        perform(line);
    }
    return 0;
}

static void hand_over(int i, const char *line) {
    struct worker *w = &workers[i];
    if (!w->started) {
        pthread_mutex_init(&w->lock, 0);
        pthread_cond_init(&w->changed, 0);
        w->full = 0;
        w->started = 1;
        if (pthread_create(&w->thread, 0, work, w))
            _exit(6);
    }
    pthread_mutex_lock(&w->lock);
    while (w->full)
        pthread_cond_wait(&w->changed, &w->lock);
    strcpy(w->line, line);
    w->full = 1;
    pthread_cond_broadcast(&w->changed);
    pthread_mutex_unlock(&w->lock);
}

static void serve(int in) {
    char line[LINE];
    for (;;) {
        int n = 0;
        while (n < LINE - 1) {
            if (read(in, line + n, 1) != 1)
                return;
            if (line[n] == '\n')
                break;
            n++;
        }
        line[n] = 0;
        char *rest = line;
        int thread = atoi(strsep(&rest, " "));
        if (thread == 0)
            perform(rest);
        else
            hand_over(thread, rest);
    }
}

int main(void) {
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    serve(0);
    _exit(0);
}
