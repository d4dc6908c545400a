// Writes evicted memory to standard error, whose reader is slow: the program waits in write() while its
// source pages come and go. The driver compares every byte.
#include "torture.h"

static struct ballast load;

static void *pressure(void *argument) {
    uint64_t state = mix(the_seed + (uint64_t)argument);
    while (!expired()) ballast_sweep(load, below(&state, load.pages), 512);
    return NULL;
}

// The stream is words mix(seed + i), little-endian, so that the driver can make it without the program.
int main(int argc, char **argv) {
    arguments(argc, argv);
    size_t stream_pages = the_pages / 4;
    load = ballast(the_pages - stream_pages);
    uint64_t *stream = (uint64_t *)region(stream_pages), written = 0;
    for (size_t i = 0; i < stream_pages * WORDS; i++) stream[i] = mix(the_seed + i);
    pthread_t pressers[2];
    for (size_t i = 0; i < LEN(pressers); i++) pressers[i] = spawn(pressure, (void *)(1 + i));
    uint64_t state = mix(the_seed);
    while (!expired() && written < stream_pages * PAGE) {
        size_t bytes = 1 + below(&state, 3 * PAGE);
        if (bytes > stream_pages * PAGE - written) bytes = stream_pages * PAGE - written;
        written += (uint64_t)MUST(write(2, (char *)stream + written, bytes));
    }
    for (size_t i = 0; i < LEN(pressers); i++) join(pressers[i]);
    ballast_sweep(load, 0, load.pages);
    printf("# stream_bytes=%lu\n", written);
    return 0;
}
