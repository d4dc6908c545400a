// Programs that are odd in one way each. Prints its id (and what else the test needs), then "BAD" if it is
// disturbed, and "ok" once its standard input ended.
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/audit.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <linux/userfaultfd.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/rseq.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

static int ended(void) {
  struct pollfd p = {0, POLLIN, 0};
  char c;
  return poll(&p, 1, 0) > 0 && read(0, &c, 1) <= 0;
}
static void until_the_end(void) {
  char c;
  while (read(0, &c, 1) > 0) {}
}
static int done(int good) {
  puts(good ? "ok" : "BAD");
  return !good;
}
static void hello(void) {
  printf("%d\n", getpid());
  fflush(stdout);
}
static void *waits(void *a) {
  until_the_end();
  done(1);
  fflush(stdout);
  _exit(0);
}
static void *sleeps(void *a) {
  for (;;) pause();
}

// The parent waits in vfork, uninterruptibly, for a child that does not go on.
static int lends_its_memory(void) {
  hello();
  pid_t c = vfork();
  if (c == 0) {
    char line[16];
    (void)!write(1, line, snprintf(line, sizeof line, "%d\n", getpid()));
    char b;
    while (read(0, &b, 1) > 0) {}
    _exit(0);
  }
  return done(c > 0 && waitpid(c, 0, 0) == c);
}
static int serves_itself(void) {
  int u = syscall(SYS_userfaultfd, O_CLOEXEC);
  struct uffdio_api api = {.api = UFFD_API};
  char *m = mmap(0, 65536, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  struct uffdio_register r = {.range = {(uintptr_t)m, 65536}, .mode = UFFDIO_REGISTER_MODE_MISSING};
  if (ioctl(u, UFFDIO_API, &api) || ioctl(u, UFFDIO_REGISTER, &r)) return 3;
  hello();
  until_the_end();
  return done(1);
}
// It has registered nothing as yet.
static int opens_userfaultfd(void) {
  int u = syscall(SYS_userfaultfd, O_CLOEXEC);
  struct uffdio_api api = {.api = UFFD_API};
  if (u < 0 || ioctl(u, UFFDIO_API, &api)) return 3;
  hello();
  until_the_end();
  return done(1);
}
// What its parent, which has ended, would have been served with.
static int inherits_userfaultfd(void) {
  int u = syscall(SYS_userfaultfd, O_CLOEXEC);
  struct uffdio_api api = {.api = UFFD_API};
  if (u < 0 || ioctl(u, UFFDIO_API, &api)) return 3;
  pid_t parent = getpid();
  if (fork()) _exit(0);
  while (getppid() == parent) usleep(1000);
  hello();
  until_the_end();
  return done(1);
}
// Whatever is mapped in it is locked, and it may lock no more.
static int locks_what_it_maps(void) {
  struct rlimit none = {0, 0};
  if (mlockall(MCL_FUTURE) || setrlimit(RLIMIT_MEMLOCK, &none)) return 3;
  hello();
  until_the_end();
  return done(1);
}
// Every call but a few kills it.
static int filtered(void) {
  static const int allowed[] = {SYS_read, SYS_write, SYS_poll, SYS_restart_syscall, SYS_exit_group, SYS_newfstatat, SYS_brk};
  struct sock_filter f[32];
  int n = 0, k = sizeof allowed / sizeof *allowed;
  f[n++] = (struct sock_filter)BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr));
  for (int i = 0; i < k; i++) f[n++] = (struct sock_filter)BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, allowed[i], k - i, 0);
  f[n++] = (struct sock_filter)BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_KILL_PROCESS);
  f[n++] = (struct sock_filter)BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW);
  struct sock_fprog p = {n, f};
  hello();
  if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) || prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &p)) return 3;
  puts("filtered");
  fflush(stdout);
  until_the_end();
  return done(1);
}
static volatile char selector;
static volatile int dispatched;
static void on_sys(int s) {
  selector = 0;
  dispatched++;
}
// Any call made while the selector says "block" is a signal instead.
static int dispatches(void) {
  signal(SIGSYS, on_sys);
  if (prctl(59, 1, 0, 0, &selector)) return 3;
  hello();
  while (!ended()) {
    selector = 1;
    for (volatile int i = 0; i < 2000000; i++) {}
    selector = 0;
  }
  int before = dispatched;
  selector = 1;
  syscall(SYS_getppid);
  return done(before == 0 && dispatched == 1);
}
static volatile long counter, counted[2];
static volatile int over;
static void count(volatile long *own) {
  struct rseq *r = (struct rseq *)((char *)__builtin_thread_pointer() + __rseq_offset);
again:
  // Reads the counter, dawdles, writes it: right only if whoever was interrupted starts anew.
  __asm__ goto volatile(
      ".pushsection __rseq_cs, \"aw\"\n.balign 32\n3: .long 0, 0\n.quad 1f, 2f - 1f, 4f\n.popsection\n"
      "leaq 3b(%%rip), %%rax\nmovq %%rax, 8(%0)\n"
      "1: movq (%1), %%rax\nmovl $20000, %%ecx\n5: decl %%ecx\njnz 5b\nincq %%rax\nmovq %%rax, (%1)\n2:\n"
      ".pushsection __rseq_failure, \"ax\"\n.byte 0x0f, 0xb9, 0x3d\n.long 0x53053053\n4: jmp %l2\n.popsection\n"
      :: "r"(r), "r"(&counter) : "rax", "rcx", "memory", "cc" : again);
  ++*own;
}
static void *counts(void *a) {
  while (!over) count(&counted[1]);
  return 0;
}
static int has_restartable_sequences(void) {
  cpu_set_t one;
  CPU_ZERO(&one);
  CPU_SET(0, &one);
  sched_setaffinity(0, sizeof one, &one);
  pthread_t t;
  pthread_create(&t, 0, counts, 0);
  hello();
  while (!ended()) for (int i = 0; i < 50; i++) count(&counted[0]);
  over = 1;
  pthread_join(t, 0);
  return done(counter == counted[0] + counted[1] && counted[0] > 0);
}
static int without_a_leader(void) {
  pthread_t t;
  pthread_create(&t, 0, waits, 0);
  hello();
  syscall(SYS_exit, 0);
  return 3;
}
// Starts itself anew all the time, now from its first thread, now from another.
static char **again_args;
static void *starts_anew(void *a) {
  if (ended()) { done(1); fflush(stdout); _exit(0); }
  execv("/proc/self/exe", again_args);
  _exit(3);
}
static int restless(int argc, char **argv) {
  long round = argc > 2 ? atol(argv[2]) : 0;
  if (round == 0) hello();
  char next[24];
  snprintf(next, sizeof next, "%ld", round + 1);
  char *args[] = {argv[0], argv[1], next, 0};
  again_args = args;
  pthread_t t;
  for (int i = 0; i < 3; i++) pthread_create(&t, 0, sleeps, 0);
  usleep(round % 7 * 2000);
  if (round % 2) starts_anew(0);
  pthread_create(&t, 0, starts_anew, 0);
  for (;;) pause();
}
// Fills memory, prints where it is, and looks at it when told to.
static int has_memory(void) {
  size_t len = 1 << 20;
  char *m = mmap(0, len, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  madvise(m, len, MADV_NOHUGEPAGE);
  memset(m, 7, len);
  hello();
  printf("%lu\n", (unsigned long)m);
  fflush(stdout);
  until_the_end();
  long full = 0;
  for (size_t i = 0; i < len; i++) full += m[i] == 7;
  printf("%ld\n", full);
  return done(1);
}
static int undumpable(void) {
  prctl(PR_SET_DUMPABLE, 0);
  hello();
  until_the_end();
  return done(1);
}
int main(int argc, char **argv) {
  const char *k = argc > 1 ? argv[1] : "";
  if (!strcmp(k, "lends-its-memory")) return lends_its_memory();
  if (!strcmp(k, "serves-itself")) return serves_itself();
  if (!strcmp(k, "opens-userfaultfd")) return opens_userfaultfd();
  if (!strcmp(k, "inherits-userfaultfd")) return inherits_userfaultfd();
  if (!strcmp(k, "locks-what-it-maps")) return locks_what_it_maps();
  if (!strcmp(k, "filtered")) return filtered();
  if (!strcmp(k, "dispatches")) return dispatches();
  if (!strcmp(k, "restartable-sequences")) return has_restartable_sequences();
  if (!strcmp(k, "without-a-leader")) return without_a_leader();
  if (!strcmp(k, "restless")) return restless(argc, argv);
  if (!strcmp(k, "memory")) return has_memory();
  if (!strcmp(k, "undumpable")) return undumpable();
  return 2;
}
