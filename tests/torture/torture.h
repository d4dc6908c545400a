// What every torture program shares: arguments, a generator, page patterns, one way to fail.
//
// A program is called `PROGRAM SEED MIB SECONDS`, checks every byte that it owns against the
// generator, and exits 0 (all right) or 1 (one line on stderr says what was wrong). On stdout come
// only statements for the driver: `# name=value` (printed in the suite's output), `@name` (the
// program has reached a point and waits for a line on stdin).
//
// What a program compares with (its shadow) lies in shared memory, which holo never takes: a fault
// of the pager cannot make data and witness wrong together.
#ifndef TORTURE_H
#define TORTURE_H
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <sched.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define PAGE 4096UL
#define WORDS (PAGE / sizeof(uint64_t))
#define LEN(a) (sizeof(a) / sizeof((a)[0]))

static uint64_t the_seed;
static size_t the_pages;
static double the_end;

static inline double now_s(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec / 1e9;
}

static inline bool expired(void) { return now_s() >= the_end; }

__attribute__((noreturn, format(printf, 1, 2))) static inline void fail(const char *format, ...) {
    char line[512];
    va_list args;
    va_start(args, format);
    int n = vsnprintf(line, sizeof line - 1, format, args);
    va_end(args);
    if (n > (int)sizeof line - 2) n = (int)sizeof line - 2;
    line[n++] = '\n';
    ssize_t ignored = write(2, line, (size_t)n);
    (void)ignored;
    _exit(1);
}

// Fails with errno's text when a call that must work does not.
#define MUST(call)                                                                                 \
    ({                                                                                             \
        __typeof__(call) must_result = (call);                                                     \
        if (must_result == (__typeof__(call))-1)                                                   \
            fail("%s:%d: %s: %s", __FILE__, __LINE__, #call, strerror(errno));                     \
        must_result;                                                                               \
    })

static inline void arguments(int argc, char **argv) {
    if (argc < 4) fail("usage: %s SEED MIB SECONDS", argv[0]);
    the_seed = strtoull(argv[1], NULL, 0);
    the_pages = strtoull(argv[2], NULL, 0) << 20 >> 12;
    the_end = now_s() + strtod(argv[3], NULL);
    if (the_pages == 0) fail("MIB must be at least 1");
}

// The finalizer of splitmix64: every bit of the result depends on every bit of `x`.
static inline uint64_t mix(uint64_t x) {
    x += 0x9e3779b97f4a7c15ULL;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ULL;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebULL;
    return x ^ (x >> 31);
}

static inline uint64_t draw(uint64_t *state) { return mix(*state += 0x632be59bd9b4e019ULL); }
static inline uint64_t below(uint64_t *state, uint64_t limit) { return draw(state) % limit; }

// The tag of one content of one page: a stale page carries another generation, a misplaced one
// another index.
static inline uint64_t tag_of(uint64_t page, uint64_t generation) {
    return mix(the_seed ^ mix(page) ^ (generation * 0xd6e8feb86659fd93ULL)) | 1ULL << 63;
}

// Word `k` of the page with this tag. A store treats same-filled, compressible and random pages
// differently, so all of these occur.
static inline uint64_t word_of(uint64_t tag, size_t k) {
    switch (tag & 7) {
    case 0: return tag;
    case 1: return k == 0 || k == WORDS - 1 ? tag : 0;
    case 2:
    case 3: return tag + (k & 7);
    default: return mix(tag + k * 0x2545f4914f6cdd1dULL);
    }
}

static inline void fill_page(void *page, uint64_t tag) {
    uint64_t *words = page;
    for (size_t k = 0; k < WORDS; k++) words[k] = word_of(tag, k);
}

// Number of words that differ from the pattern; `*first` is the first of them.
static inline size_t wrong_words(const void *page, uint64_t tag, size_t *first) {
    const uint64_t *words = page;
    size_t wrong = 0;
    for (size_t k = 0; k < WORDS; k++)
        if (words[k] != word_of(tag, k) && wrong++ == 0) *first = k;
    return wrong;
}

static inline bool page_is(const void *page, uint64_t tag) {
    size_t first;
    return wrong_words(page, tag, &first) == 0;
}

static inline bool page_is_zero(const void *page) {
    const uint64_t *words = page;
    uint64_t any = 0;
    for (size_t k = 0; k < WORDS; k++) any |= words[k];
    return any == 0;
}

static inline void check_page(const void *page, uint64_t tag, const char *when) {
    size_t first = 0;
    size_t wrong = wrong_words(page, tag, &first);
    if (wrong == 0) return;
    uint64_t seen = ((const volatile uint64_t *)page)[first];
    fail("%s: page %p: %zu of %lu words wrong, word %zu is %#lx, want %#lx%s", when, page, wrong,
         WORDS, first, seen, word_of(tag, first), page_is_zero(page) ? " (all zero)" : "");
}

static inline void check_zero(const void *page, const char *when) {
    const uint64_t *words = page;
    for (size_t k = 0; k < WORDS; k++)
        if (words[k] != 0) fail("%s: page %p: word %zu is %#lx, want zero", when, page, k, words[k]);
}

// Private anonymous memory: what holo pages.
static inline char *region(size_t pages) {
    return MUST((char *)mmap(NULL, pages * PAGE, PROT_READ | PROT_WRITE,
                             MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
}

// Shared anonymous memory: what holo leaves alone; for shadows and for flags between processes.
static inline void *witness(size_t bytes) {
    return MUST(mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0));
}

static inline pthread_t spawn(void *(*body)(void *), void *argument) {
    pthread_t thread;
    int error = pthread_create(&thread, NULL, body, argument);
    if (error) fail("pthread_create: %s", strerror(error));
    return thread;
}

static inline void *join(pthread_t thread) {
    void *result;
    int error = pthread_join(thread, &result);
    if (error) fail("pthread_join: %s", strerror(error));
    return result;
}

static inline void sleep_us(unsigned us) {
    struct timespec t = {us / 1000000, (long)(us % 1000000) * 1000};
    while (nanosleep(&t, &t) < 0 && errno == EINTR) {}
}

// Waits for a child and says whether it ended with exit code 0.
static inline bool child_succeeded(pid_t child) {
    int status;
    while (waitpid(child, &status, 0) < 0)
        if (errno != EINTR) fail("waitpid %d: %s", child, strerror(errno));
    return WIFEXITED(status) && WEXITSTATUS(status) == 0;
}

// A file for this run's data, in the driver's scratch directory (on a disk that knows O_DIRECT).
static inline int scratch_file(const char *name, int flags) {
    const char *folder = getenv("TORTURE_DIR");
    char path[512];
    snprintf(path, sizeof path, "%s/%s-%d", folder ? folder : "/var/tmp", name, getpid());
    int fd = MUST(open(path, O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC | flags, 0600));
    MUST(unlink(path));
    return fd;
}

// Tells the driver that a point is reached and waits for its answer.
static inline void checkpoint(const char *name) {
    char line[64];
    printf("@%s\n", name);
    fflush(stdout);
    if (!fgets(line, sizeof line, stdin)) fail("checkpoint %s: the driver closed stdin", name);
}

// Touches a region page by page so that whatever else the program owns gets evicted. Its content
// is checked on the way.
struct ballast {
    char *memory;
    size_t pages;
};

static inline struct ballast ballast(size_t pages) {
    struct ballast b = {region(pages), pages};
    for (size_t p = 0; p < pages; p++) fill_page(b.memory + p * PAGE, tag_of(p, 0xba11a57));
    return b;
}

static inline void ballast_sweep(struct ballast b, size_t from, size_t count) {
    for (size_t i = 0; i < count; i++) {
        size_t p = (from + i) % b.pages;
        check_page(b.memory + p * PAGE, tag_of(p, 0xba11a57), "ballast");
    }
}
#endif
