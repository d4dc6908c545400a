// Owners of robust mutexes die while the mutexes' pages are under eviction.
//
// At a thread's exit the kernel walks the robust list without waiting for faults: a mutex whose page
// is away at that moment is not marked, nor are those behind it in the list. That is a stated limit;
// such mutexes are counted. What a mutex guards must be right in every case, and nothing may hang.
#include "torture.h"

#define OWNERS 3
#define HELD 24

struct guarded {
    pthread_mutex_t mutex;
    uint64_t before; // equal to `after` outside of the critical section
    uint64_t body[400];
    uint64_t after;
};

static struct guarded *objects; // one a page
static uint64_t *updates;       // witness: completed updates of each object
static struct ballast load;
static uint64_t deaths, recovered, unrecovered;

static struct guarded *object(size_t i) { return (struct guarded *)((char *)objects + i * PAGE); }

static void make_mutex(pthread_mutex_t *mutex) {
    pthread_mutexattr_t attributes;
    pthread_mutexattr_init(&attributes);
    pthread_mutexattr_setrobust(&attributes, PTHREAD_MUTEX_ROBUST);
    memset(mutex, 0, sizeof *mutex);
    if (pthread_mutex_init(mutex, &attributes)) fail("pthread_mutex_init");
}

static void write_object(size_t i) {
    struct guarded *o = object(i);
    uint64_t n = ++updates[i];
    o->before = n;
    for (size_t k = 0; k < LEN(o->body); k++) o->body[k] = mix(the_seed + i * 1000 + k + n);
    o->after = n;
}

static void check_object(size_t i, const char *when) {
    struct guarded *o = object(i);
    uint64_t n = updates[i];
    if (o->before != n || o->after != n)
        fail("%s: object %zu has %lu/%lu, want %lu", when, i, o->before, o->after, n);
    for (size_t k = 0; k < LEN(o->body); k++)
        if (o->body[k] != mix(the_seed + i * 1000 + k + n)) fail("%s: object %zu word %zu", when, i, k);
}

struct owner {
    size_t first, count, held[HELD], held_count;
    uint64_t state;
};

// Locks some objects, changes them, waits for the pages to grow cold, and exits with the locks.
static void *dying(void *argument) {
    struct owner *me = argument;
    me->held_count = 1 + below(&me->state, HELD);
    for (size_t h = 0; h < me->held_count; h++) {
        size_t i = me->first + (h * 97 + below(&me->state, 90)) % me->count;
        int error = pthread_mutex_lock(&object(i)->mutex);
        if (error == EDEADLK || error == EBUSY) fail("object %zu was still locked: %s", i, strerror(error));
        if (error == EOWNERDEAD) fail("object %zu had been recovered already", i);
        if (error) fail("pthread_mutex_lock: %s", strerror(error));
        check_object(i, "inside");
        write_object(i);
        me->held[h] = i;
    }
    if (draw(&me->state) & 1) sleep_us((unsigned)below(&me->state, 20000));
    return NULL;
}

static void *owner_line(void *argument) {
    struct owner *me = argument;
    while (!expired()) {
        me->held_count = 0;
        join(spawn(dying, me));
        for (size_t h = 0; h < me->held_count; h++) {
            size_t i = me->held[h];
            __atomic_fetch_add(&deaths, 1, __ATOMIC_RELAXED);
            check_object(i, "after the owner's death");
            int error = pthread_mutex_trylock(&object(i)->mutex);
            if (error == EOWNERDEAD) {
                __atomic_fetch_add(&recovered, 1, __ATOMIC_RELAXED);
                if (pthread_mutex_consistent(&object(i)->mutex)) fail("pthread_mutex_consistent");
                if (pthread_mutex_unlock(&object(i)->mutex)) fail("pthread_mutex_unlock");
            } else if (error == EBUSY) {
                __atomic_fetch_add(&unrecovered, 1, __ATOMIC_RELAXED);
                make_mutex(&object(i)->mutex);
            } else {
                fail("object %zu: the dead owner's mutex says %s", i, error ? strerror(error) : "free");
            }
            // The mutex must work again, whatever happened to it.
            if (pthread_mutex_lock(&object(i)->mutex)) fail("relock of object %zu", i);
            write_object(i);
            if (pthread_mutex_unlock(&object(i)->mutex)) fail("unlock of object %zu", i);
        }
    }
    return NULL;
}

static void *pressure(void *argument) {
    (void)argument;
    uint64_t state = mix(the_seed + 9);
    while (!expired()) ballast_sweep(load, below(&state, load.pages), 512);
    return NULL;
}

int main(int argc, char **argv) {
    arguments(argc, argv);
    size_t count = the_pages / 2;
    objects = (struct guarded *)region(count);
    updates = witness(count * sizeof *updates);
    load = ballast(the_pages - count);
    for (size_t i = 0; i < count; i++) {
        make_mutex(&object(i)->mutex);
        write_object(i);
    }
    static struct owner owners[OWNERS];
    pthread_t lines[OWNERS], presser = spawn(pressure, NULL);
    for (size_t t = 0; t < OWNERS; t++) {
        // A part of its own for each line: only the dead can hold its mutexes.
        owners[t] = (struct owner){.first = t * (count / OWNERS), .count = count / OWNERS, .state = mix(the_seed + t)};
        lines[t] = spawn(owner_line, owners + t);
    }
    for (size_t t = 0; t < OWNERS; t++) join(lines[t]);
    join(presser);
    for (size_t i = 0; i < count; i++) check_object(i, "end");
    if (deaths != recovered + unrecovered) fail("%lu deaths, %lu + %lu accounted", deaths, recovered, unrecovered);
    printf("# robust_deaths=%lu\n# robust_unrecovered=%lu\n", deaths, unrecovered);
    return 0;
}
