// io_uring reads into pages of the pressured region: into registered buffers, which stay pinned, and
// into plain addresses.
//
// Buffers are registered at places that may just be chosen for eviction or away, used for a while, and
// unregistered. No library: the ring is driven by its system calls.
#include "disk.h"
#include <linux/io_uring.h>

#define BUFFERS 8
#define BUFFER 16 // pages
#define DEPTH 16

static char *memory;
static uint32_t *generation;
static uint64_t fixed_reads, plain_reads;
static int disk;

struct ring {
    int fd;
    uint32_t *head, *tail, *mask, *array, *done_head, *done_tail, *done_mask;
    struct io_uring_sqe *entries;
    struct io_uring_cqe *results;
};

static void ring_setup(struct ring *r) {
    struct io_uring_params p = {0};
    r->fd = (int)MUST(syscall(SYS_io_uring_setup, DEPTH, &p));
    size_t submit_bytes = p.sq_off.array + p.sq_entries * sizeof(uint32_t);
    size_t done_bytes = p.cq_off.cqes + p.cq_entries * sizeof(struct io_uring_cqe);
    int shared = MAP_SHARED | MAP_POPULATE;
    char *s = MUST((char *)mmap(NULL, submit_bytes, PROT_READ | PROT_WRITE, shared, r->fd, IORING_OFF_SQ_RING));
    char *c = MUST((char *)mmap(NULL, done_bytes, PROT_READ | PROT_WRITE, shared, r->fd, IORING_OFF_CQ_RING));
    r->entries = MUST((struct io_uring_sqe *)mmap(NULL, p.sq_entries * sizeof(struct io_uring_sqe),
                                                  PROT_READ | PROT_WRITE, shared, r->fd, IORING_OFF_SQES));
    r->head = (uint32_t *)(s + p.sq_off.head);
    r->tail = (uint32_t *)(s + p.sq_off.tail);
    r->mask = (uint32_t *)(s + p.sq_off.ring_mask);
    r->array = (uint32_t *)(s + p.sq_off.array);
    r->done_head = (uint32_t *)(c + p.cq_off.head);
    r->done_tail = (uint32_t *)(c + p.cq_off.tail);
    r->done_mask = (uint32_t *)(c + p.cq_off.ring_mask);
    r->results = (struct io_uring_cqe *)(c + p.cq_off.cqes);
}

static void queue_read(struct ring *r, char *to, size_t bytes, size_t offset, int buffer, uint64_t id) {
    uint32_t tail = *r->tail, slot = tail & *r->mask;
    r->entries[slot] = (struct io_uring_sqe){
        .opcode = buffer < 0 ? IORING_OP_READ : IORING_OP_READ_FIXED,
        .fd = disk, .off = offset, .addr = (uint64_t)to, .len = (uint32_t)bytes,
        .buf_index = (uint16_t)(buffer < 0 ? 0 : buffer), .user_data = id};
    r->array[slot] = slot;
    __atomic_store_n(r->tail, tail + 1, __ATOMIC_RELEASE);
}

static void submit_and_wait(struct ring *r, uint32_t count) {
    for (uint32_t left = count; left;) {
        long n = syscall(SYS_io_uring_enter, r->fd, left, count, IORING_ENTER_GETEVENTS, NULL, 0);
        if (n < 0 && errno != EINTR) fail("io_uring_enter: %s", strerror(errno));
        if (n > 0) left -= (uint32_t)n;
    }
}

static void expect_results(struct ring *r, uint32_t count, size_t bytes) {
    for (uint32_t i = 0; i < count; i++) {
        uint32_t head = *r->done_head;
        while (head == __atomic_load_n(r->done_tail, __ATOMIC_ACQUIRE)) submit_and_wait(r, 0);
        struct io_uring_cqe *result = r->results + (head & *r->done_mask);
        if (result->res != (int32_t)bytes) fail("a ring's read of %zu bytes gave %d", bytes, result->res);
        __atomic_store_n(r->done_head, head + 1, __ATOMIC_RELEASE);
    }
}

static void look(size_t p, const char *when) { check_page(memory + p * PAGE, tag_of(p, generation[p]), when); }

static void refill(size_t p) { fill_page(memory + p * PAGE, tag_of(p, ++generation[p])); }

// One registration: places at random, many reads into them, comparisons between and after.
static void registered(struct ring *r, uint64_t *state) {
    struct iovec places[BUFFERS];
    size_t first[BUFFERS], stripe = the_pages / 2 / BUFFERS;
    for (size_t b = 0; b < BUFFERS; b++) {
        first[b] = b * stripe + below(state, stripe - BUFFER);
        places[b] = (struct iovec){memory + first[b] * PAGE, BUFFER * PAGE};
    }
    MUST(syscall(SYS_io_uring_register, r->fd, IORING_REGISTER_BUFFERS, places, BUFFERS));
    for (size_t b = 0; b < BUFFERS; b++)
        for (size_t i = 0; i < BUFFER; i++) look(first[b] + i, "just registered");
    for (size_t round = 0; round < 6; round++) {
        size_t offsets[BUFFERS];
        for (size_t b = 0; b < BUFFERS; b++) {
            offsets[b] = below(state, DISK_PAGES - BUFFER) * PAGE;
            queue_read(r, places[b].iov_base, BUFFER * PAGE, offsets[b], (int)b, b);
        }
        submit_and_wait(r, BUFFERS);
        expect_results(r, BUFFERS, BUFFER * PAGE);
        // Compared at once, or after other memory had to come in.
        for (size_t i = 0; i < below(state, 2) * 512; i++) look(the_pages / 2 + below(state, the_pages / 2), "elsewhere");
        for (size_t b = 0; b < BUFFERS; b++) check_disk_bytes(places[b].iov_base, offsets[b], BUFFER * PAGE, "registered buffer");
        fixed_reads += BUFFERS;
    }
    MUST(syscall(SYS_io_uring_register, r->fd, IORING_UNREGISTER_BUFFERS, NULL, 0));
    for (size_t b = 0; b < BUFFERS; b++)
        for (size_t i = 0; i < BUFFER; i++) refill(first[b] + i);
}

static void plain(struct ring *r, uint64_t *state) {
    size_t first[DEPTH], offsets[DEPTH], stripe = the_pages / 2 / DEPTH;
    for (size_t i = 0; i < DEPTH; i++) {
        first[i] = i * stripe + below(state, stripe - 4);
        offsets[i] = below(state, DISK_PAGES - 4) * PAGE;
        queue_read(r, memory + first[i] * PAGE, 4 * PAGE, offsets[i], -1, i);
    }
    submit_and_wait(r, DEPTH);
    expect_results(r, DEPTH, 4 * PAGE);
    for (size_t i = 0; i < DEPTH; i++) {
        check_disk_bytes(memory + first[i] * PAGE, offsets[i], 4 * PAGE, "plain ring read");
        for (size_t k = 0; k < 4; k++) refill(first[i] + k);
    }
    plain_reads += DEPTH;
}

// The other half of the region belongs to this thread: it keeps the pressure up.
static void *pressure(void *argument) {
    (void)argument;
    uint64_t state = mix(the_seed + 5);
    while (!expired()) {
        size_t at = the_pages / 2 + below(&state, the_pages / 2 - 256);
        for (size_t i = 0; i < 256; i++) look(at + i, "under pressure");
    }
    return NULL;
}

int main(int argc, char **argv) {
    arguments(argc, argv);
    disk = disk_file();
    memory = region(the_pages);
    generation = witness(the_pages * sizeof *generation);
    for (size_t p = 0; p < the_pages; p++) refill(p);
    struct ring ring;
    ring_setup(&ring);
    pthread_t presser = spawn(pressure, NULL);
    uint64_t state = mix(the_seed);
    while (!expired()) {
        // The registered half is looked at as well, or its pages would never be far from memory.
        for (size_t i = 0, at = below(&state, the_pages / 2 - 256); i < 256; i++) look(at + i, "between");
        if (draw(&state) & 1) registered(&ring, &state);
        else plain(&ring, &state);
    }
    join(presser);
    close(ring.fd);
    for (size_t p = 0; p < the_pages; p++) look(p, "end");
    printf("# ring_reads=%lu\n", fixed_reads + plain_reads);
    return 0;
}
