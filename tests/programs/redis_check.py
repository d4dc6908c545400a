"""redis_check.py SOCKET STATE SEED KEYS PHASE [SECONDS]: fills a Redis server and compares every value.

STATE is a file with the generation of every key, so that phases and servers can follow each other.
Phases: fill, churn (overwrites, and BGSAVE while writing), verify, reload (DEBUG RELOAD), snapshot
(BGSAVE while writing; STATE.snapshot then says what the file must hold), load (reads and overwrites
with a beat), stop.
"""

import array
import os
import random
import socket
import sys
import time

from generator import Clock, content, fail

PIPELINE = 64
HASH_EVERY, LIST_EVERY = 7, 11


class Redis:
    """One connection: commands out, replies in."""

    def __init__(self, path, patience):
        until = time.monotonic() + patience
        while True:
            self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            try:
                self.socket.connect(path)
                break
            except OSError as error:
                self.socket.close()
                if time.monotonic() > until:
                    fail("no server at %s: %s" % (path, error))
                time.sleep(0.05)
        self.file = self.socket.makefile("rb", 1 << 16)
        # A server that still reads its file answers every command with an error.
        while True:
            self.send((b"PING",))
            if self.file.readline() == b"+PONG\r\n":
                break
            if time.monotonic() > until:
                fail("the server does not become ready")
            time.sleep(0.05)

    def send(self, *commands):
        out = []
        for command in commands:
            out.append(b"*%d\r\n" % len(command))
            for part in command:
                out.append(b"$%d\r\n%s\r\n" % (len(part), part))
        self.socket.sendall(b"".join(out))

    def reply(self):
        line = self.file.readline()
        if not line.endswith(b"\r\n"):
            fail("the server closed the connection")
        kind, rest = line[:1], line[1:-2]
        if kind == b"-":
            fail("the server says %s" % rest.decode())
        if kind == b"+":
            return rest
        if kind == b":":
            return int(rest)
        if kind == b"$":
            size = int(rest)
            return None if size < 0 else self.file.read(size + 2)[:-2]
        if kind == b"*":
            return [self.reply() for _ in range(int(rest))]
        fail("not a reply: %r" % line)

    def call(self, *command):
        self.send(command)
        return self.reply()

    def info(self, name):
        for line in self.call(b"INFO", b"persistence").decode().split("\r\n"):
            if line.startswith(name + ":"):
                return line.split(":", 1)[1]
        fail("INFO has no " + name)


class Keys:
    """What the server must hold."""

    def __init__(self, redis, state, seed, count):
        self.redis, self.state, self.seed, self.count = redis, state, seed, count
        self.generation = array.array("L", bytes(8 * count))
        if os.path.exists(state):
            with open(state, "rb") as file:
                self.generation = array.array("L", file.read())

    def save(self, name):
        with open(name, "wb") as file:
            file.write(self.generation.tobytes())

    def value(self, key):
        size = 100 + (key * 2654435761 + self.seed) % 6000
        return content(self.seed, key, self.generation[key], size)

    def pieces(self, key):
        """A hash's or a list's members: many small allocations."""
        value = self.value(key)
        step = len(value) // 20 + 1
        return [value[i:i + step] for i in range(0, len(value), step)]

    def write_commands(self, key):
        name = b"key:%d" % key
        if key % HASH_EVERY == 0:
            fields = [part for i, piece in enumerate(self.pieces(key)) for part in (b"f%d" % i, piece)]
            return [(b"DEL", name), (b"HSET", name, *fields)]
        if key % LIST_EVERY == 0:
            return [(b"DEL", name), (b"RPUSH", name, *self.pieces(key))]
        return [(b"SET", name, self.value(key))]

    def read_command(self, key):
        name = b"key:%d" % key
        if key % HASH_EVERY == 0:
            return (b"HGETALL", name)
        if key % LIST_EVERY == 0:
            return (b"LRANGE", name, b"0", b"-1")
        return (b"GET", name)

    def write(self, keys):
        commands = [command for key in keys for command in self.write_commands(key)]
        self.redis.send(*commands)
        for _ in commands:
            self.redis.reply()

    def check(self, keys, when):
        self.redis.send(*[self.read_command(key) for key in keys])
        for key in keys:
            got = self.redis.reply()
            if key % HASH_EVERY == 0:
                pairs = dict(zip(got[0::2], got[1::2]))
                want = {b"f%d" % i: piece for i, piece in enumerate(self.pieces(key))}
                right = pairs == want
            elif key % LIST_EVERY == 0:
                right = got == self.pieces(key)
            else:
                right = got == self.value(key)
            if not right:
                fail("%s: key %d, generation %d: %.80r" % (when, key, self.generation[key], got))

    def check_all(self, when):
        if self.redis.call(b"DBSIZE") != self.count:
            fail("%s: DBSIZE is %r, want %d" % (when, self.redis.call(b"DBSIZE"), self.count))
        for start in range(0, self.count, PIPELINE):
            self.check(range(start, min(start + PIPELINE, self.count)), when)

    def overwrite(self, draw, count):
        keys = draw.sample(range(self.count), count)
        for key in keys:
            self.generation[key] += 1
        self.write(keys)


def background_save(keys, draw):
    """BGSAVE, and overwrites as long as it lasts: the child must write what was there at the fork."""
    redis = keys.redis
    redis.call(b"BGSAVE")
    at_fork = array.array("L", keys.generation)
    writes = 0
    while redis.info("rdb_bgsave_in_progress") != "0" or writes < 10:
        keys.overwrite(draw, 32)
        keys.check(draw.sample(range(keys.count), 32), "while saving")
        writes += 1
    if redis.info("rdb_last_bgsave_status") != "ok":
        fail("BGSAVE failed")
    return at_fork


def main():
    path, state, seed, count, phase = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), sys.argv[5]
    seconds = float(sys.argv[6]) if len(sys.argv) > 6 else 0
    redis = Redis(path, 60)
    keys = Keys(redis, state, seed, count)
    draw = random.Random("%d %s" % (seed, phase))
    if phase == "fill":
        for start in range(0, count, PIPELINE):
            keys.write(range(start, min(start + PIPELINE, count)))
        keys.check_all("filled")
    elif phase == "churn":
        clock = Clock(seconds)
        saves = 0
        while clock.goes_on() or saves < 2:
            background_save(keys, draw)
            saves += 1
            # A tenth of the keys.
            for _ in range(count // 1000):
                keys.overwrite(draw, 32)
                keys.check(draw.sample(range(count), 64), "in turn")
                clock.checks += 64
        keys.check_all("churned")
        print("# background_saves=%d" % saves)
    elif phase == "verify":
        keys.check_all("verify")
    elif phase == "reload":
        redis.call(b"DEBUG", b"RELOAD")
        keys.check_all("reloaded")
    elif phase == "snapshot":
        at_fork = background_save(keys, draw)
        with open(state + ".snapshot", "wb") as file:
            file.write(at_fork.tobytes())
    elif phase == "load":
        # Until the driver says so on standard input, or the time is over.
        import select
        clock = Clock(seconds)
        while clock.goes_on() and not select.select([sys.stdin], [], [], 0)[0]:
            keys.overwrite(draw, 16)
            keys.check(draw.sample(range(count), 64), "under load")
            clock.checks += 64
        keys.check_all("after the load")
        clock.close()
    elif phase == "stop":
        redis.send((b"SHUTDOWN", b"NOSAVE"))
        if redis.file.readline() not in (b"", b"+OK\r\n"):
            fail("the server does not stop")
        return
    else:
        fail("no phase " + phase)
    keys.save(state)


main()
