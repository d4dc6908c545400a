// A program that notices every trace of being stopped: each thread repeats one kind of call and checks that no
// call returns early, with an impossible errno, or with EINTR although no handler ran; that every queued signal
// arrives; and that its floating-point registers stay. A second process sends signals and wakes.
//
// busy KIND...   one thread for each KIND, the first one is the main thread. Prints its id, runs until standard
// input ends, prints "ok" and its counts, or "BAD" lines.
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/futex.h>
#include <mqueue.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <sys/msg.h>
#include <sys/prctl.h>
#include <sys/select.h>
#include <sys/sem.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define THREADS 32
struct thread {
  _Atomic int tid;
  const char *kind;
  _Atomic long calls, got[2], sent[2], bad;
  _Atomic unsigned word; // futex
  int pipe[2], pair[2], sem, msg;
  _Atomic long suspended, released; // sigsuspend: waits begun, waits ended by the sender's signal
};
static struct shared {
  struct thread t[THREADS];
  _Atomic int stop, count;
} *sh;
static __thread struct thread *me;
static __thread volatile unsigned long ran_restart, ran_plain, ran_usr1;

static double now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec * 1e6 + t.tv_nsec / 1e3;
}
static void bad(const char *what, ...) {
  if (atomic_fetch_add(&me->bad, 1) > 5) return;
  char line[256];
  int n = snprintf(line, sizeof line, "BAD %s: ", me->kind);
  va_list a;
  va_start(a, what);
  n += vsnprintf(line + n, sizeof line - n - 1, what, a);
  line[n++] = '\n';
  (void)!write(1, line, n);
}
static void on_restart(int s, siginfo_t *i, void *u) {
  ran_restart++;
  if (i->si_code == SI_QUEUE) atomic_fetch_add(&me->got[0], 1);
}
static void on_plain(int s, siginfo_t *i, void *u) {
  ran_plain++;
  if (i->si_code == SI_QUEUE) atomic_fetch_add(&me->got[1], 1);
}
static void on_usr1(int s) { ran_usr1++; }

struct mark { unsigned long restart, plain, usr1; double at; };
static struct mark begin(void) { return (struct mark){ran_restart, ran_plain, ran_usr1, now()}; }
static int any(struct mark m) { return ran_restart != m.restart || ran_plain != m.plain || ran_usr1 != m.usr1; }
static int plain(struct mark m) { return ran_plain != m.plain; }
// A call that the kernel restarts unless a handler without SA_RESTART ran.
static void restartable(struct mark m, long r) {
  if (r < 0 && !(errno == EINTR && plain(m))) bad("errno %d, handlers %lu %lu", errno, ran_restart - m.restart, ran_plain - m.plain);
}
// A call that any handler ends, and that else ends after its time only.
static void timed(struct mark m, int timed_out, int other, double us) {
  double took = now() - m.at;
  if (timed_out) {
    if (took < us - 5) bad("returned after %.0f of %.0f us", took, us);
  } else if (!(other == EINTR && any(m))) bad("errno %d, handlers %lu %lu, after %.0f us", other, ran_restart - m.restart, ran_plain - m.plain, took);
}
static long futex(_Atomic unsigned *w, int op, unsigned v, const struct timespec *t) { return syscall(SYS_futex, w, op, v, t, 0, ~0u); }

static int ep = -1;
static void fpu(void) {
  double x[8], y[8];
  for (int i = 0; i < 8; i++) x[i] = i * 1.25 + me->calls;
  unsigned long spins = 20000, flags;
  long double st = 1.5L;
  __asm__ volatile("movupd (%2),%%xmm0; movupd 16(%2),%%xmm1; movupd 32(%2),%%xmm14; movupd 48(%2),%%xmm15; std\n"
                   "1: pause; dec %0; jnz 1b\n"
                   "pushfq; pop %1; cld; movupd %%xmm0,(%3); movupd %%xmm1,16(%3); movupd %%xmm14,32(%3); movupd %%xmm15,48(%3)\n"
                   : "+r"(spins), "=&r"(flags) : "r"(x), "r"(y) : "xmm0", "xmm1", "xmm14", "xmm15", "memory", "cc");
  if (memcmp(x, y, sizeof x) || !(flags & 0x400) || st != 1.5L) bad("registers changed");
}
static void spin(double us) {
  for (double until = now() + us; now() < until;) {}
}
static void hole(void) {
  static char *area;
  const size_t page = 4096;
  if (!area) area = mmap(0, 3 * page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  char *middle = area + page;
  munmap(middle, page);
  spin(30);
  if (mmap(middle, page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) != middle) bad("mmap %d", errno);
  memset(middle, 0x5a, page);
  spin(100);
  for (size_t i = 0; i < page; i++)
    if (middle[i] != 0x5a) { bad("byte %ld of the middle is %#x", (long)i, middle[i] & 0xff); break; }
}
static void once(void) {
  const char *k = me->kind;
  struct mark m = begin();
  struct timespec ts = {0, 2000000};
  if (!strcmp(k, "nanosleep")) {
    struct timespec rem = {0, 0};
    long r = syscall(SYS_nanosleep, &ts, &rem);
    timed(m, r == 0, errno, 2000);
  } else if (!strcmp(k, "clock_abs")) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    t.tv_nsec += 2000000;
    if (t.tv_nsec >= 1000000000) t.tv_sec++, t.tv_nsec -= 1000000000;
    int r = clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &t, 0);
    timed(m, r == 0, r, 2000);
  } else if (!strcmp(k, "read")) {
    static __thread unsigned next;
    unsigned v;
    long r = read(me->pipe[0], &v, 4);
    restartable(m, r);
    if (r >= 0 && (r != 4 || v != next++)) bad("read %ld, %u", r, v);
  } else if (!strcmp(k, "recv_timeout")) {
    char c;
    long r = recv(me->pair[0], &c, 1, 0);
    timed(m, r < 0 && errno == EAGAIN, r == 1 ? 0 : errno, 4000);
  } else if (!strcmp(k, "poll")) {
    struct pollfd p = {me->pair[0], POLLIN, 0};
    long r = poll(&p, 1, 2);
    timed(m, r == 0, errno, 2000);
  } else if (!strcmp(k, "ppoll")) {
    sigset_t s;
    sigemptyset(&s);
    long r = ppoll(0, 0, &ts, &s);
    timed(m, r == 0, errno, 2000);
  } else if (!strcmp(k, "select")) {
    struct timeval tv = {0, 2000};
    long r = select(0, 0, 0, 0, &tv);
    timed(m, r == 0, errno, 2000);
  } else if (!strcmp(k, "futex_timeout")) {
    unsigned v = me->word;
    long r = futex(&me->word, FUTEX_WAIT, v, &ts);
    if (r < 0 && errno != EAGAIN) timed(m, errno == ETIMEDOUT, errno, 2000);
  } else if (!strcmp(k, "futex")) {
    unsigned v = me->word;
    long r = futex(&me->word, FUTEX_WAIT, v, 0);
    if (r < 0 && errno != EAGAIN) restartable(m, r);
  } else if (!strcmp(k, "epoll")) {
    struct epoll_event e;
    long r = epoll_wait(ep, &e, 1, 3);
    timed(m, r == 0, errno, 3000);
  } else if (!strcmp(k, "epoll_pwait2")) {
    struct epoll_event e;
    sigset_t s;
    sigemptyset(&s);
    long r = syscall(441, ep, &e, 1, &ts, &s, 8);
    timed(m, r == 0, errno, 2000);
  } else if (!strcmp(k, "sigsuspend")) {
    // The sender sends the next SIGUSR1 only after this one was taken: a lost one, or a wait begun anew after the
    // handler ran, stops the count for good.
    sigset_t s;
    pthread_sigmask(SIG_SETMASK, 0, &s);
    sigdelset(&s, SIGUSR1);
    atomic_fetch_add(&me->suspended, 1);
    long r = sigsuspend(&s);
    if (r != -1 || errno != EINTR) bad("sigsuspend %ld errno %d", r, errno);
    if (!any(m)) bad("woken without a signal");
    if (ran_usr1 != m.usr1) atomic_fetch_add(&me->released, 1);
  } else if (!strcmp(k, "pause")) {
    // SIGUSR1 is not blocked here: it may come before the pause, so it is sent again until it is counted.
    atomic_fetch_add(&me->suspended, 1);
    long r = pause();
    if (r != -1 || errno != EINTR) bad("pause %ld errno %d", r, errno);
    if (!any(m)) bad("woken without a signal");
  } else if (!strcmp(k, "sigtimedwait")) {
    sigset_t s;
    sigemptyset(&s);
    sigaddset(&s, SIGUSR2);
    long r = sigtimedwait(&s, 0, &ts);
    if (r != SIGUSR2) timed(m, errno == EAGAIN, errno, 2000);
  } else if (!strcmp(k, "semtimedop")) {
    struct sembuf b = {0, -1, 0};
    long r = semtimedop(me->sem, &b, 1, &ts);
    if (r < 0) timed(m, errno == EAGAIN, errno, 2000);
  } else if (!strcmp(k, "msgrcv")) {
    struct { long type; char c[8]; } x;
    long r = msgrcv(me->msg, &x, 8, 0, 0);
    if (r < 0 && !(errno == EINTR && any(m))) bad("errno %d", errno);
  } else if (!strcmp(k, "fpu")) {
    fpu();
  } else if (!strcmp(k, "hole")) {
    // Leaves a hole for a moment, as who takes memory apart and puts it together does, and fills it again. A
    // mapping that the kernel puts there meanwhile for somebody else is overwritten.
    hole();
  } else if (!strcmp(k, "getpid")) {
    for (int i = 0; i < 1000; i++)
      if (syscall(SYS_getpid) != getpid()) bad("getpid");
  } else if (!strcmp(k, "futex_forever")) {
    if (sh->stop) return;
    futex(&me->word, FUTEX_WAIT, 0, 0);
  } else bad("no such kind");
  atomic_fetch_add(&me->calls, 1);
}
static void *run(void *a) {
  me = a;
  sigset_t s;
  sigemptyset(&s);
  if (!strcmp(me->kind, "sigsuspend")) sigaddset(&s, SIGUSR1);
  sigaddset(&s, SIGUSR2);
  pthread_sigmask(SIG_SETMASK, &s, 0);
  int quiet = !strcmp(me->kind, "futex_forever");
  struct sigevent ev = {.sigev_notify = SIGEV_THREAD_ID, .sigev_signo = SIGRTMIN + (me - sh->t) % 2};
  ev._sigev_un._tid = syscall(SYS_gettid);
  timer_t timer;
  // Two of three threads get a thousand timer signals a second as well, with SA_RESTART or without.
  if ((me - sh->t) % 3 && !quiet) {
    timer_create(CLOCK_MONOTONIC, &ev, &timer);
    struct itimerspec it = {{0, 1000000}, {0, 1000000}};
    timer_settime(timer, 0, &it, 0);
  }
  me->tid = syscall(SYS_gettid);
  while (!sh->stop) once();
  // What was sent before the end has to arrive: give it the time.
  me->word = 1;
  double until = now() + 3e6;
  while (now() < until && (me->got[0] < me->sent[0] || me->got[1] < me->sent[1] || sh->stop < 2)) usleep(1000);
  return 0;
}
static void queue(int pid, struct thread *t, int which) {
  siginfo_t i = {.si_code = SI_QUEUE, .si_signo = SIGRTMIN + which};
  i.si_pid = getpid();
  if (syscall(SYS_rt_tgsigqueueinfo, pid, t->tid, SIGRTMIN + which, &i) == 0) atomic_fetch_add(&t->sent[which], 1);
}
static void sender(int pid) {
  unsigned seed = 1, next[THREADS] = {0};
  long released[THREADS], waited[THREADS] = {0};
  memset(released, -1, sizeof released);
  while (!sh->stop && getppid() == pid) {
    for (int i = 0; i < sh->count; i++) {
      struct thread *t = &sh->t[i];
      const char *k = t->kind;
      if (!t->tid || !strcmp(k, "futex_forever")) continue;
      if (rand_r(&seed) % 5 == 0) queue(pid, t, rand_r(&seed) % 2);
      if (!strcmp(k, "read")) { if (next[i] < t->calls + 3) { (void)!write(t->pipe[1], &next[i], 4); next[i]++; } }
      if (!strncmp(k, "futex", 5) && rand_r(&seed) % 3 == 0) { t->word++; futex(&t->word, FUTEX_WAKE, 9, 0); }
      if (!strcmp(k, "sigsuspend") && t->released != released[i]) { released[i] = t->released; syscall(SYS_tgkill, pid, t->tid, SIGUSR1); waited[i]++; }
      if (!strcmp(k, "pause")) syscall(SYS_tgkill, pid, t->tid, SIGUSR1);
      if (!strcmp(k, "semtimedop") && rand_r(&seed) % 4 == 0) { struct sembuf b = {0, 1, IPC_NOWAIT}; semop(t->sem, &b, 1); }
      if (!strcmp(k, "msgrcv")) { struct { long type; char c[8]; } x = {1, "x"}; msgsnd(t->msg, &x, 8, IPC_NOWAIT); }
    }
    usleep(300);
  }
  // Every wait for SIGUSR1 that was released must have ended.
  for (int i = 0; i < sh->count; i++) {
    struct thread *t = &sh->t[i];
    if (strcmp(t->kind, "sigsuspend") || getppid() != pid) continue;
    usleep(200000);
    if (t->released < waited[i] - 1 || waited[i] < 2) { printf("BAD sigsuspend: %ld of %ld wakes arrived\n", (long)t->released, waited[i]); fflush(stdout); }
  }
  // Threads that wait without a time limit need one more push.
  sh->stop = 2;
  for (int n = 0; n < 2000 && getppid() == pid; n++) {
    for (int i = 0; i < sh->count; i++) {
      struct thread *t = &sh->t[i];
      t->word++;
      futex(&t->word, FUTEX_WAKE, 9, 0);
      struct { long type; char c[8]; } x = {1, "x"};
      msgsnd(t->msg, &x, 8, IPC_NOWAIT);
      (void)!write(t->pipe[1], &next[i], 4);
      next[i]++;
      syscall(SYS_tgkill, pid, t->tid, SIGUSR1);
    }
    usleep(1000);
  }
  _exit(0);
}
static void *watch(void *a) {
  me = &sh->t[THREADS - 1];
  sigset_t all;
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, 0);
  char c;
  while (read(0, &c, 1) > 0) {}
  sh->stop = 1;
  return 0;
}
int main(int argc, char **argv) {
  signal(SIGPIPE, SIG_IGN);
  sh = mmap(0, sizeof *sh, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  sh->count = argc - 1;
  ep = epoll_create1(0);
  for (int i = 0; i < sh->count; i++) {
    struct thread *t = &sh->t[i];
    t->kind = argv[i + 1];
    if (pipe(t->pipe) || socketpair(AF_UNIX, SOCK_STREAM, 0, t->pair)) return 3;
    fcntl(t->pipe[1], F_SETFL, O_NONBLOCK);
    struct timeval tv = {0, 4000};
    setsockopt(t->pair[0], SOL_SOCKET, SO_RCVTIMEO, &tv, sizeof tv);
    t->sem = semget(IPC_PRIVATE, 1, 0600);
    t->msg = msgget(IPC_PRIVATE, 0600);
  }
  struct sigaction a = {.sa_sigaction = on_restart, .sa_flags = SA_SIGINFO | SA_RESTART};
  sigaction(SIGRTMIN, &a, 0);
  a.sa_sigaction = on_plain;
  a.sa_flags = SA_SIGINFO;
  sigaction(SIGRTMIN + 1, &a, 0);
  struct sigaction u = {.sa_handler = on_usr1};
  sigaction(SIGUSR1, &u, 0);
  pthread_t th[THREADS], w;
  int pid = getpid();
  pid_t helper = fork();
  if (helper == 0) { prctl(PR_SET_PDEATHSIG, SIGKILL); sender(pid); }
  pthread_create(&w, 0, watch, 0);
  for (int i = 1; i < sh->count; i++) pthread_create(&th[i], 0, run, &sh->t[i]);
  printf("%d\n", pid);
  fflush(stdout);
  run(&sh->t[0]);
  for (int i = 1; i < sh->count; i++) pthread_join(th[i], 0);
  waitpid(helper, 0, 0);
  long wrong = 0, calls = 0;
  for (int i = 0; i < sh->count; i++) {
    struct thread *t = &sh->t[i];
    wrong += t->bad;
    calls += t->calls;
    for (int s = 0; s < 2; s++)
      if (t->got[s] != t->sent[s]) { printf("BAD %s: %ld signals sent, %ld arrived\n", t->kind, (long)t->sent[s], (long)t->got[s]); wrong++; }
    if (t->calls == 0 && strcmp(t->kind, "futex_forever")) { printf("BAD %s: not one call\n", t->kind); wrong++; }
    semctl(t->sem, 0, IPC_RMID);
    msgctl(t->msg, IPC_RMID, 0);
  }
  printf("%s calls %ld\n", wrong ? "BAD" : "ok", calls);
  return wrong != 0;
}
