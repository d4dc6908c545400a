# Its first thread ends; then another one fills memory, says so, and ends the process with 7 at the end of the input.
import ctypes
import os
import sys
import threading
import time


def first_has_ended():
    with open(f"/proc/{os.getpid()}/task/{os.getpid()}/stat") as stat:
        return stat.read().rpartition(")")[2].split()[0] == "Z"


def rest():
    # Not before: what was filled by then might be taken.
    while not first_has_ended():
        time.sleep(0.001)
    filled = bytearray(os.urandom(1 << 20)) * 48
    print("filled", len(filled), flush=True)
    sys.stdin.read()
    os._exit(7)


threading.Thread(target=rest).start()
ctypes.CDLL(None).pthread_exit(None)
