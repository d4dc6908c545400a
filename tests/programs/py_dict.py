"""py_dict.py SEED THOUSANDS SECONDS: a dictionary of small objects, looked up, changed and collected.

Small objects lie all over the heap; the cyclic collector and the dictionary's growth walk all of them.
"""

import gc
import random
import sys

from generator import Clock, fail

MASK = (1 << 64) - 1


def mix(x):
    x = (x + 0x9E3779B97F4A7C15) & MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    return x ^ (x >> 27)


def value(seed, key, generation):
    number = mix(seed ^ (key << 20) ^ generation)
    return [generation, number, "%x" % number, (key, number & 0xFFFF)]


def main():
    seed, count, seconds = int(sys.argv[1]), int(sys.argv[2]) * 1000, float(sys.argv[3])
    draw = random.Random(seed)
    table = {key: value(seed, key, 0) for key in range(count)}

    def check(key):
        entry = table.get(key)
        if entry is None or entry != value(seed, key, entry[0]):
            fail("key %d holds %r" % (key, entry))

    clock = Clock(seconds)
    generations = {}  # of the keys that were ever changed
    while clock.goes_on():
        for _ in range(2000):
            key = draw.randrange(count)
            check(key)
            if table[key][0] != generations.get(key, 0):
                fail("key %d is of generation %d, want %d" % (key, table[key][0], generations.get(key, 0)))
            action = draw.random()
            if action < 0.1:
                generation = generations.get(key, 0) + 1
                generations[key] = generation
                table[key] = value(seed, key, generation)
            elif action < 0.15:
                del table[key]
                table[key] = value(seed, key, generations.get(key, 0))
            clock.checks += 1
        choice = draw.random()
        if choice < 0.02:
            gc.collect()
        elif choice < 0.04:
            table = dict(table)  # a new table beside the old one
    if len(table) != count:
        fail("%d keys, want %d" % (len(table), count))
    for key in range(count):
        check(key)
    clock.close()


main()
