"""What the Python programs share: contents from a seed, time, beats, one way to fail."""

import hashlib
import os
import sys
import time


def content(seed, key, generation, size):
    """The bytes that belong to (key, generation); a wrong one of either gives other bytes."""
    name = b"%d/%d/%d" % (seed, key, generation)
    kind = hashlib.blake2b(name, digest_size=2).digest()
    if kind[0] < 24:
        return kind[1:] * size  # one byte repeated: a store keeps such pages as a word
    if kind[0] < 96:
        line = b"record %s value %s\n" % (name, hashlib.blake2b(name, digest_size=8).hexdigest().encode())
        return (line * (size // len(line) + 1))[:size]  # compressible
    return hashlib.shake_128(name).digest(size)


def fail(text):
    sys.stdout.flush()
    os.write(2, (text + "\n").encode())
    os._exit(1)


class Clock:
    """The time that a program is to run, and a line of progress now and then."""

    def __init__(self, seconds):
        self.end = time.monotonic() + seconds
        self.next_beat = time.monotonic()
        self.checks = 0

    def goes_on(self):
        now = time.monotonic()
        if now >= self.next_beat:
            self.next_beat = now + 0.25
            print("@beat %d" % self.checks, flush=True)
        return now < self.end

    def close(self):
        if self.checks == 0:
            fail("nothing was checked")
        print("# checks=%d" % self.checks, flush=True)
