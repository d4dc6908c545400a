// Priority-inheritance locks in evicted pages, by the futex calls themselves.
//
// On a page that is away or protected the kernel answers a PI futex with EFAULT instead of waiting.
// That is a stated limit: it is counted, the page is touched, the call repeated. glibc would abort, so
// the program speaks to the kernel directly. Mutual exclusion must hold all the time.
#include "torture.h"
#include <linux/futex.h>

#define THREADS 4

struct object {
    uint32_t lock;
    uint32_t inside;
    uint64_t count;
    uint64_t body[64];
};

static char *memory;
static size_t objects;
static uint64_t *count; // witness
static uint64_t lock_efault, unlock_efault, kernel_locks;
static struct ballast load;

static struct object *object(size_t i) { return (struct object *)(memory + i * PAGE); }

static void pi_lock(uint32_t *word, uint32_t tid) {
    uint32_t free_word = 0;
    if (__atomic_compare_exchange_n(word, &free_word, tid, false, __ATOMIC_ACQUIRE, __ATOMIC_RELAXED)) return;
    __atomic_fetch_add(&kernel_locks, 1, __ATOMIC_RELAXED);
    while (syscall(SYS_futex, word, FUTEX_LOCK_PI_PRIVATE, 0, NULL, NULL, 0) < 0) {
        if (errno == EFAULT) {
            __atomic_fetch_add(&lock_efault, 1, __ATOMIC_RELAXED);
            __atomic_fetch_or(word, 0, __ATOMIC_RELAXED); // a write by the program does wait
        } else if (errno != EAGAIN && errno != EINTR) {
            fail("FUTEX_LOCK_PI: %s", strerror(errno));
        }
    }
}

static void pi_unlock(uint32_t *word, uint32_t tid) {
    uint32_t mine = tid;
    if (__atomic_compare_exchange_n(word, &mine, 0, false, __ATOMIC_RELEASE, __ATOMIC_RELAXED)) return;
    while (syscall(SYS_futex, word, FUTEX_UNLOCK_PI_PRIVATE, 0, NULL, NULL, 0) < 0) {
        if (errno == EFAULT) {
            __atomic_fetch_add(&unlock_efault, 1, __ATOMIC_RELAXED);
            __atomic_fetch_or(word, 0, __ATOMIC_RELAXED);
        } else if (errno != EAGAIN && errno != EINTR) {
            fail("FUTEX_UNLOCK_PI: %s", strerror(errno));
        }
    }
}

static void *user(void *argument) {
    uint64_t state = mix(the_seed + (uint64_t)argument);
    uint32_t tid = (uint32_t)gettid();
    while (!expired()) {
        uint64_t r = draw(&state);
        // A third of the locks is contended: few objects, long sections.
        bool crowded = r % 3 == 0;
        size_t i = crowded ? (r >> 8) % 4 * (objects / 4) : (r >> 8) % objects;
        struct object *o = object(i);
        pi_lock(&o->lock, tid);
        if (__atomic_exchange_n(&o->inside, 1, __ATOMIC_RELAXED)) fail("two owners of object %zu", i);
        if (o->count != count[i]) fail("object %zu counts %lu, want %lu", i, o->count, count[i]);
        for (size_t k = 0; k < LEN(o->body); k++)
            if (o->body[k] != mix(the_seed + i + k + o->count)) fail("object %zu word %zu", i, k);
        o->count = ++count[i];
        if (crowded) ballast_sweep(load, (r >> 20) % load.pages, 64);
        for (size_t k = 0; k < LEN(o->body); k++) o->body[k] = mix(the_seed + i + k + o->count);
        __atomic_store_n(&o->inside, 0, __ATOMIC_RELAXED);
        pi_unlock(&o->lock, tid);
    }
    return NULL;
}

int main(int argc, char **argv) {
    arguments(argc, argv);
    objects = the_pages / 2;
    memory = region(objects);
    count = witness(objects * sizeof *count);
    load = ballast(the_pages - objects);
    for (size_t i = 0; i < objects; i++)
        for (size_t k = 0; k < LEN(object(i)->body); k++) object(i)->body[k] = mix(the_seed + i + k);
    pthread_t threads[THREADS];
    for (size_t t = 0; t < THREADS; t++) threads[t] = spawn(user, (void *)t);
    for (size_t t = 0; t < THREADS; t++) join(threads[t]);
    for (size_t i = 0; i < objects; i++)
        if (object(i)->count != count[i] || object(i)->lock != 0) fail("end: object %zu", i);
    if (kernel_locks == 0) fail("no lock was ever contended");
    printf("# pi_kernel_locks=%lu\n# pi_efault=%lu\n", kernel_locks, lock_efault + unlock_efault);
    return 0;
}
