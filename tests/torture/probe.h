// Reads and writes that may meet SIGSEGV, for programs that ask whether an address is accessible.
#ifndef PROBE_H
#define PROBE_H
#include "torture.h"
#include <setjmp.h>
#include <signal.h>

static __thread sigjmp_buf probe_jump;
static __thread volatile sig_atomic_t probe_armed;
static __thread volatile int probe_code;

static inline void probe_handler(int signal, siginfo_t *info, void *context) {
    (void)context;
    if (!probe_armed) fail("signal %d at %p, code %d, outside a probe", signal, info->si_addr, info->si_code);
    probe_armed = 0;
    probe_code = info->si_code;
    siglongjmp(probe_jump, 1);
}

// SIGBUS is never an answer: it is caught so that it gets named.
static inline void probe_setup(void) {
    // SA_NODEFER: the jump out of the handler then has no mask to restore, which saves a call.
    struct sigaction act = {.sa_sigaction = probe_handler, .sa_flags = SA_SIGINFO | SA_NODEFER};
    MUST(sigaction(SIGSEGV, &act, NULL));
    MUST(sigaction(SIGBUS, &act, NULL));
}

// False: SIGSEGV. `probe_code` then says why.
static inline bool try_read(const void *address, uint64_t *value) {
    if (sigsetjmp(probe_jump, 0)) return false;
    probe_armed = 1;
    __asm__ volatile("" ::: "memory");
    *value = *(const volatile uint64_t *)address;
    __asm__ volatile("" ::: "memory");
    probe_armed = 0;
    return true;
}

static inline bool try_write(void *address, uint64_t value) {
    if (sigsetjmp(probe_jump, 0)) return false;
    probe_armed = 1;
    __asm__ volatile("" ::: "memory");
    *(volatile uint64_t *)address = value;
    __asm__ volatile("" ::: "memory");
    probe_armed = 0;
    return true;
}
#endif
