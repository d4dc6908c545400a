// fill MIB: writes one word into each 4 KiB of fresh memory, once: nothing but first touches. Prints the microseconds.
#include "bench.h"

int main(int argc, char **argv) {
    if (argc != 2) fail("usage: fill MIB");
    size_t bytes = strtoull(argv[1], NULL, 10) << 20;
    uint64_t before = now_ns(), sum = 0;
    char *memory = map_pages(bytes / PAGE);
    for (size_t at = 0; at < bytes; at += SUBPAGE) *(uint64_t *)(memory + at) = at;
    for (size_t at = 0; at < bytes; at += SUBPAGE) sum += *(uint64_t *)(memory + at);
    printf("took %.1f\n", (double)(now_ns() - before) / 1000);
    return sum == 0;
}
