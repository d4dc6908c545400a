# disposed.py IGNORED BLOCKED CMD...: runs CMD with these signals ignored and these blocked (numbers, commas).
import os, signal, sys

numbers = lambda text: [int(n) for n in text.split(",") if n]
ignored, blocked, command = numbers(sys.argv[1]), numbers(sys.argv[2]), sys.argv[3:]
# Python ignores these two itself.
for n in (signal.SIGPIPE, signal.SIGXFSZ):
    signal.signal(n, signal.SIG_DFL)
for n in ignored:
    signal.signal(n, signal.SIG_IGN)
# Without this the exec leaves Python's handler of SIGINT in the mask of what was caught.
if signal.SIGINT not in ignored:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
signal.pthread_sigmask(signal.SIG_BLOCK, blocked)
os.execvp(command[0], command)
