// What the programs of the benchmarks share: a clock, errors, page contents, lines from the driver.
#ifndef BENCH_H
#define BENCH_H
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define SUBPAGE 4096UL
#define PAGE 65536UL

static inline uint64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

#define MUST(call)                                                                                 \
    ({                                                                                             \
        __typeof__(call) must_result = (call);                                                     \
        if (must_result == (__typeof__(call))-1) {                                                 \
            fprintf(stderr, "%s:%d: %s: %s\n", __FILE__, __LINE__, #call, strerror(errno));        \
            _exit(1);                                                                              \
        }                                                                                          \
        must_result;                                                                               \
    })

__attribute__((noreturn)) static inline void fail(const char *why) {
    fprintf(stderr, "%s\n", why);
    _exit(1);
}

// The finalizer of splitmix64.
static inline uint64_t mix(uint64_t x) {
    x += 0x9e3779b97f4a7c15ULL;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ULL;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebULL;
    return x ^ (x >> 31);
}

static inline uint64_t draw(uint64_t *state) { return mix(*state += 0x632be59bd9b4e019ULL); }

// The first word of the subpage with this number: what a touch checks.
static inline uint64_t first_word(uint64_t number) { return mix(number) | 1; }

// A subpage that LZ4 cannot shrink, or one of text-like records that it shrinks to about a third.
static inline void fill_subpage(void *subpage, uint64_t number, bool text) {
    uint64_t *words = subpage;
    uint64_t state = number;
    if (text) {
        char *at = subpage, *end = at + SUBPAGE;
        while (at < end) {
            char line[80];
            int n = snprintf(line, sizeof line, "record %06u of kind %c: state=ok owner=%08x\n",
                             (unsigned)(draw(&state) % 1000000), 'a' + (int)(draw(&state) % 4),
                             (unsigned)draw(&state));
            size_t take = (size_t)n < (size_t)(end - at) ? (size_t)n : (size_t)(end - at);
            memcpy(at, line, take);
            at += take;
        }
    } else {
        for (size_t k = 1; k < SUBPAGE / sizeof *words; k++) words[k] = draw(&state);
    }
    words[0] = first_word(number);
}

// Whole 64 KiB pages of private anonymous memory, without huge pages: what is measured are small ones.
static inline char *map_pages(size_t pages) {
    size_t length = pages * PAGE;
    char *raw = MUST((char *)mmap(NULL, length + PAGE, PROT_READ | PROT_WRITE,
                                  MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    char *base = (char *)(((uintptr_t)raw + PAGE - 1) & ~(PAGE - 1));
    MUST(madvise(raw, length + PAGE, MADV_NOHUGEPAGE));
    return base;
}

static inline void say(const char *text) {
    printf("%s\n", text);
    fflush(stdout);
}

// The next command's words; ends the program when the driver has gone.
static inline int next_command(char **words, int most) {
    static char line[1024];
    if (fgets(line, sizeof line, stdin) == NULL) exit(0);
    int count = 0;
    for (char *word = strtok(line, " \n"); word != NULL && count < most; word = strtok(NULL, " \n"))
        words[count++] = word;
    return count;
}
#endif
