# fills.py [DESCRIPTORS]: opens so many, and fills so many MiB for each number on its input. "fork" makes a child that
# writes to all of it and ends with its parent, "nap" one that sleeps until SIGUSR1 and then looks at it. "userfaultfd"
# opens one. At the end of its input it looks at all of it itself; so it does for "end CODE", and ends with that.
import ctypes, os, signal, sys, time

kept = []
parent = os.getpid()
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])

for _ in range(int(sys.argv[1]) if sys.argv[1:] else 0):
    os.dup(1)

def is_right():
    return all(b == bytes(b[:1]) * len(b) for b in kept)

print("ready", flush=True)
for line in sys.stdin:
    if line == "fork\n":
        child = os.fork()
        if not child:
            for b in kept:
                b[::4096] = b[::4096]
            while os.getppid() == parent:
                time.sleep(0.05)
            os._exit(0)
        print(child, flush=True)
    elif line == "nap\n":
        child = os.fork()
        if not child:
            signal.alarm(60)  # not for ever, should the test fail
            signal.sigwait([signal.SIGUSR1])
            print("child", is_right(), flush=True)
            os._exit(0)
        print(child, flush=True)
    elif line == "userfaultfd\n":
        SYS_userfaultfd, UFFD_USER_MODE_ONLY = 323, 1
        print(ctypes.CDLL(None).syscall(SYS_userfaultfd, UFFD_USER_MODE_ONLY) >= 0, flush=True)
    elif line.startswith("end "):
        print(is_right(), flush=True)
        sys.exit(int(line[4:]))
    else:
        kept.append(bytearray(b"%d" % (len(kept) % 10)) * (int(line) << 20))
        print("filled", flush=True)
print(is_right(), flush=True)
