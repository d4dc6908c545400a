# hangup.py CMD...: a terminal whose session CMD leads goes away; says how CMD ended.
import os, pty, signal, sys

pid, keys = pty.fork()
if pid == 0:
    os.execvp(sys.argv[1], sys.argv[1:] + ["sh", "-c", "echo ready; exec sleep 60"])
# Whoever goes on all the same is ended, though not before the suite's watchdog has seen it (tests/manifest.toml).
signal.signal(signal.SIGALRM, lambda *_: os.killpg(pid, signal.SIGKILL))
signal.alarm(60)
said = b""
while b"ready" not in said:
    said += os.read(keys, 4096)
os.close(keys)
code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
print(128 - code if code < 0 else code)
