# grows.py MIB [LOCKED]: fills so many MiB, of which LOCKED are locked, and says so; then checks them for each line of
# input. "fork" on a line makes a child that goes on in its place until the end of input.
import mmap, os, sys

mib = int(sys.argv[1])
if len(sys.argv) > 2:
    # Locked from the start: it may be taken at any moment.
    MAP_LOCKED = 0x2000
    locked = mmap.mmap(-1, int(sys.argv[2]) << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_LOCKED)
memory = [bytearray(os.urandom(4096) * 256) for _ in range(mib)]
sums = [hash(bytes(m)) for m in memory]
print("filled", os.getpid(), flush=True)
for line in sys.stdin:
    if line == "fork\n" and (child := os.fork()):
        os.waitpid(child, 0)
        sys.exit(0)
    if line == "fork\n":
        for m in memory:
            m[0] ^= 0  # its own from here on
    assert all(hash(bytes(m)) == s for m, s in zip(memory, sums)), "wrong data"
    print("right", os.getpid(), flush=True)
