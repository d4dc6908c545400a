/* A buffer that an io_uring has pinned, and what a device does to it: bytes arrive in the page itself, past the
 * page tables, so no protection is in their way and no fault is raised. */
#define _GNU_SOURCE
#include <errno.h>
#include <linux/io_uring.h>
#include <stdint.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

static struct io_uring_params params;
static int ring = -1;
static char *queues;
static struct io_uring_sqe *entries;

/* Pins a buffer; of one process at a time one. */
long pin(void *at, unsigned long len) {
    if (ring < 0) {
        ring = syscall(SYS_io_uring_setup, 4, &params);
        if (ring < 0)
            return -errno;
        unsigned long sq = params.sq_off.array + params.sq_entries * 4;
        unsigned long cq = params.cq_off.cqes + params.cq_entries * sizeof(struct io_uring_cqe);
        queues = mmap(0, sq > cq ? sq : cq, PROT_READ | PROT_WRITE, MAP_SHARED, ring, IORING_OFF_SQ_RING);
        entries = mmap(0, params.sq_entries * sizeof *entries, PROT_READ | PROT_WRITE, MAP_SHARED, ring,
                       IORING_OFF_SQES);
        if (!(params.features & IORING_FEAT_SINGLE_MMAP) || queues == MAP_FAILED || entries == MAP_FAILED)
            return -ENOMEM;
    }
    struct iovec buffer = {at, len};
    long r = syscall(SYS_io_uring_register, ring, IORING_REGISTER_BUFFERS, &buffer, 1);
    return r ? -errno : 0;
}

/* Reads the start of a file into the buffer, at `at`; how many bytes came. */
long read_into_pinned(int file, void *at, unsigned len) {
    unsigned *tail = (unsigned *)(queues + params.sq_off.tail);
    unsigned slot = *tail & (params.sq_entries - 1);
    memset(&entries[slot], 0, sizeof entries[slot]);
    entries[slot].opcode = IORING_OP_READ_FIXED;
    entries[slot].fd = file;
    entries[slot].addr = (uint64_t)at;
    entries[slot].len = len;
    ((unsigned *)(queues + params.sq_off.array))[slot] = slot;
    __atomic_store_n(tail, *tail + 1, __ATOMIC_RELEASE);
    if (syscall(SYS_io_uring_enter, ring, 1, 1, IORING_ENTER_GETEVENTS, 0, 0) != 1)
        return -errno;
    unsigned *head = (unsigned *)(queues + params.cq_off.head);
    struct io_uring_cqe *done = (struct io_uring_cqe *)(queues + params.cq_off.cqes);
    long result = done[*head & (params.cq_entries - 1)].res;
    __atomic_store_n(head, *head + 1, __ATOMIC_RELEASE);
    return result;
}

/* Lets the buffer go. */
long unpin(void) {
    long r = syscall(SYS_io_uring_register, ring, IORING_UNREGISTER_BUFFERS, 0, 0);
    return r ? -errno : 0;
}
