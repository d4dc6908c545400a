// touch floor|plain 4|64 random|text PAGES: touches pages in random order and measures each touch.
//
// plain: fills its pages when told to, and somebody else evicts them. floor: its pages were never there;
// a process of its own, one thread, answers each fault from a hot buffer, and does nothing else: the least
// that a handler outside the program can do. With 4 each 64 KiB page holds one subpage, so that 4 KiB come
// back at a fault, with 64 all of them.
//
// Commands, a line each, answered by one line:
//   ballast MIB       fills and drops so much other memory: what was there before is the older
//   fill              plain: gives all pages their contents
//   resident          counts the pages that are in memory
//   pin CPU           runs on this CPU only; -1: on all
//   touch N PAUSE_US DROP FILE
//                     touches the next N pages, pausing (awake) before each; writes those that waited for a
//                     page, in nanoseconds of 32 bits, to FILE; DROP 1: gives the pages back afterwards
//   sleep             for ever, without reading another line
#include "bench.h"
#include <linux/userfaultfd.h>
#include <sys/ioctl.h>

static char *base;
static size_t pages, next_page, copy_bytes;
static bool text, is_floor;
static uint32_t *order;

static void handle_faults(int uffd) {
    prctl(PR_SET_NAME, "floor-handler");
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    char *hot = map_pages(1);
    for (size_t i = 0; i < PAGE / SUBPAGE; i++) fill_subpage(hot + i * SUBPAGE, i, text);
    MUST(mlockall(MCL_CURRENT | MCL_FUTURE));
    struct pollfd wait = {.fd = uffd, .events = POLLIN};
    for (;;) {
        struct uffd_msg message;
        if (poll(&wait, 1, -1) < 0) fail("poll");
        if (read(uffd, &message, sizeof message) != (ssize_t)sizeof message) continue;
        if (message.event != UFFD_EVENT_PAGEFAULT) continue;
        struct uffdio_copy copy = {
            .dst = message.arg.pagefault.address & ~(copy_bytes - 1),
            .src = (uintptr_t)hot,
            .len = copy_bytes,
        };
        if (ioctl(uffd, UFFDIO_COPY, &copy) < 0 && errno != EEXIST) fail("UFFDIO_COPY");
    }
}

static void start_floor(void) {
    int uffd = (int)MUST(syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK));
    struct uffdio_api api = {.api = UFFD_API};
    MUST(ioctl(uffd, UFFDIO_API, &api));
    struct uffdio_register all = {
        .range = {.start = (uintptr_t)base, .len = pages * PAGE},
        .mode = UFFDIO_REGISTER_MODE_MISSING,
    };
    MUST(ioctl(uffd, UFFDIO_REGISTER, &all));
    pid_t handler = MUST(fork());
    if (handler == 0) handle_faults(uffd);
    printf("ready %d\n", handler);
    fflush(stdout);
}

static bool is_resident(size_t page) {
    unsigned char seen;
    MUST(mincore(base + page * PAGE, SUBPAGE, &seen));
    return seen & 1;
}

static void touch(size_t count, uint64_t pause_ns, bool drop, const char *file) {
    uint32_t *waited = calloc(count, sizeof *waited);
    size_t measured = 0, first = next_page;
    for (; next_page < first + count && next_page < pages; next_page++) {
        size_t page = order[next_page];
        bool waits = !is_resident(page);
        for (uint64_t until = now_ns() + pause_ns; pause_ns > 0 && now_ns() < until;) {}
        uint64_t before = now_ns();
        uint64_t word = *(volatile uint64_t *)(base + page * PAGE);
        uint64_t took = now_ns() - before;
        if (!is_floor && word != first_word(page * (PAGE / SUBPAGE))) fail("a page came back wrong");
        if (waits) waited[measured++] = took < UINT32_MAX ? (uint32_t)took : UINT32_MAX;
    }
    if (drop)
        for (size_t k = first; k < next_page; k++)
            MUST(madvise(base + order[k] * PAGE, PAGE, MADV_DONTNEED));
    int out = MUST(open(file, O_CREAT | O_TRUNC | O_WRONLY, 0600));
    size_t bytes = measured * sizeof *waited;
    if (write(out, waited, bytes) != (ssize_t)bytes) fail("the file takes no more");
    close(out);
    free(waited);
    printf("touched %zu\n", measured);
    fflush(stdout);
}

static void pin(int cpu) {
    cpu_set_t set;
    CPU_ZERO(&set);
    for (int i = 0; i < CPU_SETSIZE; i++)
        if (cpu < 0 || i == cpu) CPU_SET(i, &set);
    MUST(sched_setaffinity(0, sizeof set, &set));
    say("pinned");
}

int main(int argc, char **argv) {
    if (argc != 5) fail("usage: touch floor|plain 4|64 random|text PAGES");
    is_floor = strcmp(argv[1], "floor") == 0;
    copy_bytes = strcmp(argv[2], "4") == 0 ? SUBPAGE : PAGE;
    text = strcmp(argv[3], "text") == 0;
    pages = strtoull(argv[4], NULL, 10);
    base = map_pages(pages);
    order = calloc(pages, sizeof *order);
    uint64_t state = 7;
    for (size_t i = 0; i < pages; i++) {
        size_t j = draw(&state) % (i + 1);
        order[i] = order[j];
        order[j] = (uint32_t)i;
    }
    if (is_floor) {
        start_floor();
    } else {
        say("ready");
    }
    for (;;) {
        char *words[6] = {"", "0", "0", "0", "", NULL};
        next_command(words, 6);
        if (strcmp(words[0], "ballast") == 0) {
            size_t bytes = strtoull(words[1], NULL, 10) << 20;
            char *ballast = map_pages(bytes / PAGE);
            for (size_t at = 0; at < bytes; at += SUBPAGE) fill_subpage(ballast + at, at, false);
            usleep(100000);
            munmap(ballast, bytes);
            say("dropped");
        } else if (strcmp(words[0], "fill") == 0) {
            for (size_t i = 0; i < pages; i++)
                for (size_t k = 0; k < copy_bytes / SUBPAGE; k++)
                    fill_subpage(base + i * PAGE + k * SUBPAGE, i * (PAGE / SUBPAGE) + k, text);
            say("filled");
        } else if (strcmp(words[0], "resident") == 0) {
            size_t count = 0;
            for (size_t i = next_page; i < pages; i++) count += is_resident(order[i]);
            printf("resident %zu\n", count);
            fflush(stdout);
        } else if (strcmp(words[0], "pin") == 0) {
            pin(atoi(words[1]));
        } else if (strcmp(words[0], "touch") == 0) {
            touch(strtoull(words[1], NULL, 10), strtoull(words[2], NULL, 10) * 1000,
                  words[3][0] == '1', words[4]);
        } else if (strcmp(words[0], "sleep") == 0) {
            for (;;) pause();
        } else {
            fail("unknown command");
        }
    }
}
