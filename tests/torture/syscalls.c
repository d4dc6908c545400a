// System calls read and write evicted memory: pipes, files, sockets, small structures, futexes.
//
// The kernel must wait for the page as the program would: EFAULT or a short transfer that a program
// would not see without holo is a failure.
#include "torture.h"
#include <linux/futex.h>
#include <poll.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/uio.h>

#define WORKERS 3
#define SPAN 12 // pages a transfer at most

struct share {
    char *memory;
    size_t pages;
    uint32_t *generation;
    uint64_t seed;
    int pipe[2], stream[2], packets[2], file;
    uint64_t transfers;
};

static char *page_at(struct share *s, size_t p) { return s->memory + p * PAGE; }
static void refill(struct share *s, size_t p) { fill_page(page_at(s, p), tag_of(s->seed + p, ++s->generation[p])); }
static void look(struct share *s, size_t p, const char *when) { check_page(page_at(s, p), tag_of(s->seed + p, s->generation[p]), when); }

struct transfer {
    int fd;
    char *from;
    size_t bytes;
};

static void *send_all(void *argument) {
    struct transfer *t = argument;
    for (size_t done = 0; done < t->bytes;) done += (size_t)MUST(write(t->fd, t->from + done, t->bytes - done));
    return NULL;
}

// Pages [from, from + count) go through the descriptors to [to, to + count): the copy must be equal.
static void through(struct share *s, int out, int in, size_t from, size_t to, size_t count, const char *name) {
    struct transfer t = {out, page_at(s, from), count * PAGE};
    pthread_t sender = spawn(send_all, &t);
    for (size_t done = 0; done < t.bytes;) {
        ssize_t n = MUST(read(in, page_at(s, to) + done, t.bytes - done));
        if (n == 0) fail("%s ended early", name);
        done += (size_t)n;
    }
    join(sender);
    for (size_t i = 0; i < count; i++) {
        look(s, from + i, name);
        check_page(page_at(s, to + i), tag_of(s->seed + from + i, s->generation[from + i]), name);
        refill(s, to + i);
    }
}

static void by_file(struct share *s, size_t from, size_t to, size_t count) {
    struct iovec parts[SPAN];
    for (size_t i = 0; i < count; i++) parts[i] = (struct iovec){page_at(s, from + i), PAGE};
    if (MUST(pwritev(s->file, parts, (int)count, 0)) != (ssize_t)(count * PAGE)) fail("short pwritev");
    if (MUST(pread(s->file, page_at(s, to), count * PAGE, 0)) != (ssize_t)(count * PAGE)) fail("short pread");
    for (size_t i = 0; i < count; i++) {
        check_page(page_at(s, to + i), tag_of(s->seed + from + i, s->generation[from + i]), "file");
        refill(s, to + i);
    }
}

// Datagrams, received into pieces of several pages.
static void by_packet(struct share *s, size_t from, size_t to) {
    struct iovec out = {page_at(s, from) + 100, 3000};
    struct iovec in[3] = {{page_at(s, to) + 4000, 96}, {page_at(s, to + 1), 2000}, {page_at(s, to + 2) + 8, 1000}};
    struct msghdr message = {.msg_iov = &out, .msg_iovlen = 1};
    if (MUST(sendmsg(s->packets[0], &message, 0)) != 3000) fail("short sendmsg");
    message = (struct msghdr){.msg_iov = in, .msg_iovlen = 3};
    if (MUST(recvmsg(s->packets[1], &message, 0)) != 3000) fail("short recvmsg");
    char *source = page_at(s, from) + 100;
    for (size_t i = 0, done = 0; i < 3; done += in[i++].iov_len) {
        size_t n = in[i].iov_len < 3000 - done ? in[i].iov_len : 3000 - done;
        if (memcmp(in[i].iov_base, source + done, n)) fail("a datagram differs");
    }
    for (size_t i = 0; i < 3; i++) refill(s, to + i);
}

// Pages handed to a pipe by reference: the pipe holds them while memory is evicted.
static void by_splice(struct share *s, size_t from, size_t to) {
    struct iovec part = {page_at(s, from), PAGE};
    if (MUST(vmsplice(s->pipe[1], &part, 1, 0)) != (ssize_t)PAGE) fail("short vmsplice");
    for (size_t i = 0; i < 128; i++) look(s, (from + 64 + i) % s->pages, "while the pipe holds a page");
    if (MUST(read(s->pipe[0], page_at(s, to), PAGE)) != (ssize_t)PAGE) fail("short read of a spliced page");
    check_page(page_at(s, to), tag_of(s->seed + from, s->generation[from]), "spliced");
    refill(s, to);
}

// Small structures that the kernel writes, each at the end of one page or across an edge.
static void small(struct share *s, size_t p) {
    struct stat *status = (struct stat *)(page_at(s, p + 1) - sizeof(struct stat) / 2);
    MUST(fstat(s->file, status));
    if (!S_ISREG(status->st_mode)) fail("fstat wrote nonsense");
    int *fds = (int *)(page_at(s, p + 2) - sizeof(int));
    MUST(pipe(fds));
    struct pollfd *polls = (struct pollfd *)(page_at(s, p + 3) - sizeof(struct pollfd));
    polls[0] = (struct pollfd){fds[0], POLLIN, 0};
    polls[1] = (struct pollfd){fds[1], POLLOUT, 0};
    if (MUST(poll(polls, 2, 1000)) != 1 || polls[1].revents != POLLOUT || polls[0].revents) fail("poll wrote nonsense");
    close(fds[0]);
    close(fds[1]);
    struct timespec *time = (struct timespec *)(page_at(s, p + 4) - 8);
    MUST(syscall(SYS_clock_gettime, CLOCK_MONOTONIC, time));
    if (time->tv_nsec < 0 || time->tv_nsec > 999999999) fail("clock_gettime wrote nonsense");
    for (size_t i = 0; i < 5; i++) refill(s, p + i);
}

struct pong {
    pthread_mutex_t mutex;
    pthread_cond_t turned;
    uint64_t turn;
};

static void *pong(void *argument) {
    struct pong *g = argument;
    pthread_mutex_lock(&g->mutex);
    for (uint64_t i = 0; i < 20; i++) {
        while (g->turn != 2 * i + 1) pthread_cond_wait(&g->turned, &g->mutex);
        g->turn++;
        pthread_cond_signal(&g->turned);
    }
    pthread_mutex_unlock(&g->mutex);
    return NULL;
}

// A mutex and a condition variable in evictable memory.
static void ping(struct share *s, size_t p) {
    struct pong *g = (struct pong *)(page_at(s, p) + 512);
    memset(g, 0, sizeof *g);
    pthread_mutex_init(&g->mutex, NULL);
    pthread_cond_init(&g->turned, NULL);
    pthread_t other = spawn(pong, g);
    pthread_mutex_lock(&g->mutex);
    for (uint64_t i = 0; i < 20; i++) {
        while (g->turn != 2 * i) pthread_cond_wait(&g->turned, &g->mutex);
        g->turn++;
        pthread_cond_signal(&g->turned);
        if (i % 4 == 0) look(s, (p + 17 + i * 5) % s->pages == p ? p + 1 : (p + 17 + i * 5) % s->pages, "between turns");
    }
    pthread_mutex_unlock(&g->mutex);
    join(other);
    refill(s, p);
}

static void *worker(void *argument) {
    struct share *s = argument;
    uint64_t state = mix(s->seed);
    while (!expired()) {
        size_t count = 1 + below(&state, SPAN);
        size_t from = below(&state, s->pages / 2 - 2 * SPAN), to = s->pages / 2 + below(&state, s->pages / 2 - 2 * SPAN);
        switch (below(&state, 7)) {
        case 0: through(s, s->pipe[1], s->pipe[0], from, to, count, "pipe"); break;
        case 1: through(s, s->stream[0], s->stream[1], from, to, count, "socket"); break;
        case 2: by_file(s, from, to, count); break;
        case 3: by_packet(s, from, to); break;
        case 4: by_splice(s, from, to); break;
        case 5: small(s, to); break;
        default: ping(s, to);
        }
        s->transfers++;
    }
    for (size_t p = 0; p < s->pages; p++) look(s, p, "end");
    return NULL;
}

int main(int argc, char **argv) {
    arguments(argc, argv);
    static struct share shares[WORKERS];
    pthread_t threads[WORKERS];
    uint64_t total = 0;
    for (size_t t = 0; t < WORKERS; t++) {
        struct share *s = shares + t;
        s->pages = the_pages / WORKERS;
        s->memory = region(s->pages);
        s->generation = witness(s->pages * sizeof *s->generation);
        s->seed = mix(the_seed + t);
        MUST(pipe2(s->pipe, O_CLOEXEC));
        MUST(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, s->stream));
        MUST(socketpair(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0, s->packets));
        s->file = scratch_file("syscalls", 0);
        for (size_t p = 0; p < s->pages; p++) refill(s, p);
    }
    for (size_t t = 0; t < WORKERS; t++) threads[t] = spawn(worker, shares + t);
    for (size_t t = 0; t < WORKERS; t++) {
        join(threads[t]);
        total += shares[t].transfers;
    }
    printf("# transfers=%lu\n", total);
    return 0;
}
