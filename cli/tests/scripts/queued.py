# queued.py SIGNAL COUNT: says with which values a signal that queues came so many times.
import ctypes, signal, sys

number, count = int(sys.argv[1]), int(sys.argv[2])
signal.pthread_sigmask(signal.SIG_BLOCK, [number])
print("ready", flush=True)
libc = ctypes.CDLL(None)
wanted, info = ctypes.create_string_buffer(128), ctypes.create_string_buffer(128)
libc.sigemptyset(wanted)
libc.sigaddset(wanted, number)
for _ in range(count):
    libc.sigwaitinfo(wanted, info)
    code = int.from_bytes(info[8:12], "little", signed=True)
    print("queued" if code == -1 else code, int.from_bytes(info[24:28], "little"), flush=True)
