"""py_hash.py SEED MIB SECONDS: threads hash and rewrite blocks of one large bytearray.

hashlib gives the interpreter lock up for large blocks, so that threads really read at the same time.
"""

import hashlib
import random
import sys
import threading

from generator import Clock, content, fail

BLOCK = 65536 + 4096 + 40  # no block begins at a page's edge
THREADS = 3


def main():
    seed, mib, seconds = int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
    count = (mib << 20) // BLOCK
    data = bytearray(count * BLOCK)
    view = memoryview(data)
    generation = [0] * count
    digest = [b""] * count

    def rewrite(b):
        new = content(seed, b, generation[b], BLOCK)
        view[b * BLOCK:(b + 1) * BLOCK] = new
        digest[b] = hashlib.blake2b(new).digest()

    def check(b):
        if hashlib.blake2b(view[b * BLOCK:(b + 1) * BLOCK]).digest() != digest[b]:
            wrong = content(seed, b, generation[b], BLOCK)
            at = next(i for i in range(BLOCK) if wrong[i] != data[b * BLOCK + i])
            fail("block %d, generation %d: byte %d is %d, want %d" % (b, generation[b], at, data[b * BLOCK + at], wrong[at]))

    for b in range(count):
        rewrite(b)
    clock = Clock(seconds)
    stop = threading.Event()

    def work(me):
        draw = random.Random(seed * 1000 + me)
        mine = range(me, count, THREADS)
        while not stop.is_set():
            b = draw.choice(mine)
            check(b)
            if draw.random() < 0.3:
                generation[b] += 1
                rewrite(b)
            clock.checks += 1  # a lost count does no harm

    threads = [threading.Thread(target=work, args=(t,)) for t in range(THREADS)]
    for thread in threads:
        thread.start()
    while clock.goes_on():
        stop.wait(0.05)
    stop.set()
    for thread in threads:
        thread.join()
    for b in range(count):
        check(b)
    clock.close()


main()
