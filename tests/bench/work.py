"""work.py hash|dict|sort SCALE: a fixed amount of work; prints the microseconds that it took."""

import hashlib
import random
import sys
import time


def hashes(scale):
    data = bytearray(scale << 20)
    digest = b""
    for _ in range(3):
        for at in range(0, len(data), 65536):
            digest = hashlib.blake2b(digest + data[at:at + 65536]).digest()
            data[at:at + len(digest)] = digest


def dictionary(scale):
    table = {}
    for i in range(scale * 1000):
        table["key %d" % (i * 7919 % (scale * 1000))] = [i, str(i)]
    total = sum(entry[0] for entry in table.values())
    if total != scale * 1000 * (scale * 1000 - 1) // 2:
        sys.exit("wrong sum")


def sort(scale):
    draw = random.Random(7)
    lines = ["%016x" % draw.getrandbits(64) for _ in range(scale * 1000)]
    lines.sort()
    if any(a > b for a, b in zip(lines, lines[1:])):
        sys.exit("not sorted")


before = time.monotonic()
{"hash": hashes, "dict": dictionary, "sort": sort}[sys.argv[1]](int(sys.argv[2]))
print("took %.1f" % ((time.monotonic() - before) * 1e6))
