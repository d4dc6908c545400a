# attaches.py HOLO: a descendant of it attaches holo to it, and detaches it. What becomes an orphan among its descendants
# becomes its child: so are holo's own processes all the time. Says "right" when all of them have ended.
import ctypes, json, os, subprocess, sys, time

PR_SET_CHILD_SUBREAPER = 36
assert ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) == 0
memory = [bytearray(os.urandom(4096) * 256) for _ in range(48)]
sums = [hash(bytes(m)) for m in memory]
me = str(os.getpid())

def check():
    assert all(hash(bytes(m)) == s for m, s in zip(memory, sums)), "wrong data"

def holo(*words):
    # With a shell in between.
    said = subprocess.run(["sh", "-c", '"$@"; exit $?', "sh", sys.argv[1], *words], capture_output=True, text=True)
    assert said.returncode == 0, said.stderr
    return said.stdout

def status():
    return json.loads(holo("status", me, "--json"))

holo("attach", me, "--local-memory", "16M")
while status()["pages_evicted"] < 256:
    time.sleep(0.01)
check()
with open(f"/proc/{me}/task/{me}/children") as children:
    names = [open(f"/proc/{child}/comm").read().strip() for child in children.read().split()]
assert "holo-guardian" in names, names
# Its commands share nothing with it and are small.
assert status()["processes"] == 1, status()
holo("detach", me)
check()
while True:
    try:
        os.wait()
    except ChildProcessError:
        break
print("right")
