# Its first thread ends; another one fills memory, says so, and ends the process with 7 at the end of the input.
import ctypes
import os
import sys
import threading


def rest():
    filled = bytearray(os.urandom(1 << 20)) * 48
    print("filled", len(filled), flush=True)
    sys.stdin.read()
    os._exit(7)


threading.Thread(target=rest).start()
ctypes.CDLL(None).pthread_exit(None)
