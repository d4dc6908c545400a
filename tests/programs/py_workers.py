"""py_workers.py SEED MIB SECONDS: forked workers check what they share with the parent and change it.

Reading an object writes its reference count: each side copies pages that the other still uses. The
parent goes on changing its data while the workers read theirs.
"""

import hashlib
import multiprocessing
import random
import sys

from generator import Clock, content, fail

WORKERS = 4
SIZE = 9000


def digest_of(blocks):
    total = hashlib.blake2b()
    for block in blocks:
        total.update(block)
    return total.digest()


def worker(seed, number, blocks, generation, pipe):
    draw = random.Random(seed * 100 + number)
    for key, block in enumerate(blocks):
        if block != content(seed, key, generation[key], SIZE):
            fail("worker %d: block %d of generation %d differs" % (number, key, generation[key]))
    # From here on this is the worker's own data: nobody else may see it.
    for key in draw.sample(range(len(blocks)), len(blocks) // 10):
        generation[key] += 1000 + number
        blocks[key] = content(seed, key, generation[key], SIZE)
    own = [content(seed + number + 1, key, 0, SIZE) for key in range(len(blocks) // 10)]
    for key, block in enumerate(blocks):
        if block != content(seed, key, generation[key], SIZE):
            fail("worker %d: changed block %d differs" % (number, key))
    for key, block in enumerate(own):
        if block != content(seed + number + 1, key, 0, SIZE):
            fail("worker %d: own block %d differs" % (number, key))
    pipe.send((generation, digest_of(blocks)))
    pipe.close()


def main():
    seed, mib, seconds = int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
    fork = multiprocessing.get_context("fork")
    draw = random.Random(seed)
    count = (mib << 20) // SIZE
    generation = [0] * count
    blocks = [content(seed, key, 0, SIZE) for key in range(count)]
    clock = Clock(seconds)
    rounds = 0
    while clock.goes_on() or rounds == 0:
        workers = []
        for number in range(WORKERS):
            receiver, sender = fork.Pipe(duplex=False)
            child = fork.Process(target=worker, args=(seed, number, blocks, generation, sender))
            child.start()
            sender.close()
            workers.append((child, receiver))
            # Each worker starts from another state.
            for key in draw.sample(range(count), count // 20):
                if blocks[key] != content(seed, key, generation[key], SIZE):
                    fail("the parent's block %d differs" % key)
                generation[key] += 1
                blocks[key] = content(seed, key, generation[key], SIZE)
        for number, (child, receiver) in enumerate(workers):
            try:
                its_generation, its_digest = receiver.recv()
            except EOFError:
                fail("worker %d said nothing" % number)
            child.join()
            if child.exitcode != 0:
                fail("worker %d ended with %r" % (number, child.exitcode))
            if its_digest != digest_of(content(seed, key, g, SIZE) for key, g in enumerate(its_generation)):
                fail("worker %d computed something else" % number)
            clock.checks += count
        rounds += 1
    for key in range(count):
        if blocks[key] != content(seed, key, generation[key], SIZE):
            fail("end: block %d differs" % key)
    print("# worker_rounds=%d" % rounds)
    clock.close()


main()
