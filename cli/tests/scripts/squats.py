# squats.py USER PID: listens as USER in the place of holo's pager for PID, and tells whoever asks nonsense. With more
# words after PID "self": for itself, and then becomes that command.
import os, socket, sys

user, pid, command = int(sys.argv[1]), sys.argv[2], sys.argv[3:]
own = str(os.getpid()) if pid == "self" else pid
ready, told = os.pipe()
if not command or os.fork() == 0:
    os.setresuid(user, user, user)
    s = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    s.bind("\0holo-pager." + own)
    s.listen()
    if command:
        os.write(told, b"x")
    else:
        print("listening", os.getpid(), flush=True)
    while not command or os.getppid() == int(own):
        s.settimeout(0.1)
        try:
            asker = s.accept()[0]
        except TimeoutError:
            continue
        try:
            asker.sendall(b'{"error": "nonsense"}\n')
        except OSError:
            pass  # it did not wait for that
    sys.exit(0)
os.read(ready, 1)
os.execvp(command[0], command)
