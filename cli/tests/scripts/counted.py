# counted.py: has 4 MiB of shared memory and 2 MiB of locked memory, and 64 MiB of one mapping of which it fills the first
# half; says "filled". For a line of input it fills the second half and says "full", for the next one it looks at all of
# it and says "right", for the last one it ends.
import mmap, sys

MIB, PAGE = 1 << 20, 4096
MAP_LOCKED = 0x2000
OWN = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS

shared = mmap.mmap(-1, 4 * MIB, flags=mmap.MAP_SHARED | mmap.MAP_ANONYMOUS)
shared[::PAGE] = b"s" * (len(shared) // PAGE)
locked = mmap.mmap(-1, 2 * MIB, flags=OWN | MAP_LOCKED)
memory = mmap.mmap(-1, 64 * MIB, flags=OWN)

def content(page):
    # It compresses well, and no two pages are alike.
    return (b"This is page %08d. " % page * 200)[:PAGE]

def fill(pages):
    for page in pages:
        memory[page * PAGE : (page + 1) * PAGE] = content(page)

pages = len(memory) // PAGE
fill(range(pages // 2))
print("filled", flush=True)
sys.stdin.readline()
fill(range(pages // 2, pages))
print("full", flush=True)
sys.stdin.readline()
assert all(memory[p * PAGE : (p + 1) * PAGE] == content(p) for p in range(pages))
print("right", flush=True)
sys.stdin.readline()
