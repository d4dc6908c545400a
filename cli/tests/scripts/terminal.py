# terminal.py CMD...: what a job that CMD runs sees of a terminal, and a shell of the job, line by line.
#
# Plays the shell and whoever types; the job is this script again, as `CMD... terminal.py --job`.
import fcntl, os, pty, signal, struct, sys, termios, time

def say(*words):
    # At once: a handler may come in between.
    os.write(1, (" ".join(map(str, words)) + "\n").encode())

def size(fd):
    return struct.unpack("HHHH", fcntl.ioctl(fd, termios.TIOCGWINSZ, b"\0" * 8))[:2]

def job():
    signal.signal(signal.SIGINT, lambda *_: say("interrupted"))
    signal.signal(signal.SIGWINCH, lambda *_: say("resized", *size(0)))
    signal.signal(signal.SIGCONT, lambda *_: say("continued"))
    say("terminal", *map(os.isatty, range(3)), *size(0), os.ttyname(0) == os.ttyname(2))
    say("foreground", os.getpgrp() == os.tcgetpgrp(0), "leader", os.getsid(0) == os.getpid())
    while line := sys.stdin.readline():
        say("read", line.strip())
        if line == "wait\n":
            # A read that has begun in the foreground goes on when the shell takes the terminal.
            while os.tcgetpgrp(0) == os.getpgrp():
                time.sleep(0.01)
    say("end of input")

class Shell:
    def __init__(self, command):
        if os.getsid(0) != os.getpid():
            os.setsid()
        self.keys, self.terminal = pty.openpty()
        fcntl.ioctl(self.terminal, termios.TIOCSCTTY, 0)
        mode = termios.tcgetattr(self.terminal)
        mode[1] &= ~termios.OPOST
        mode[3] &= ~termios.ECHO
        termios.tcsetattr(self.terminal, termios.TCSANOW, mode)
        self.resize(31, 99)
        signal.signal(signal.SIGTTOU, signal.SIG_IGN)
        self.text = b""
        self.job = os.fork()
        if self.job == 0:
            os.setpgid(0, 0)
            os.tcsetpgrp(self.terminal, os.getpid())
            signal.signal(signal.SIGTTOU, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            for n in range(3):
                os.dup2(self.terminal, n)
            os.execvp(command[0], command)

    def resize(self, rows, columns):
        fcntl.ioctl(self.terminal, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def type(self, keys):
        os.write(self.keys, keys)

    def hear(self, wanted):
        """The next line of the job, which begins so."""
        while True:
            while b"\n" in self.text:
                line, self.text = self.text.split(b"\n", 1)
                line = line.decode()
                say("job:" if line.startswith(wanted) else "job, unexpected:", line)
                if line.startswith(wanted):
                    return
            self.text += os.read(self.keys, 4096)

    def await_job(self):
        _, status = os.waitpid(self.job, os.WUNTRACED)
        if os.WIFSTOPPED(status):
            self.await_all_stopped()
            os.tcsetpgrp(self.terminal, os.getpgrp())
            say("stopped by", os.WSTOPSIG(status))
        else:
            code = os.waitstatus_to_exitcode(status)
            say("ended with", 128 - code if code < 0 else code)

    def await_all_stopped(self):
        """Every process of the job."""
        while True:
            states = []
            for pid in filter(str.isdigit, os.listdir("/proc")):
                try:
                    fields = open(f"/proc/{pid}/stat").read().rsplit(")", 1)[1].split()
                except OSError:
                    continue
                if int(fields[2]) == self.job:
                    states.append(fields[0])
            if states and all(s == "T" for s in states):
                return
            time.sleep(0.01)

    def carry_on(self, in_front):
        if in_front:
            os.tcsetpgrp(self.terminal, self.job)
        os.killpg(self.job, signal.SIGCONT)

def shell(command):
    signal.alarm(60)  # ends this script, and with it the terminal
    s = Shell(command)
    s.hear("terminal")
    s.hear("foreground")
    s.type(b"some words\n")
    s.hear("read")
    s.resize(50, 120)
    s.hear("resized")
    s.type(b"\x03")
    s.hear("interrupted")
    s.type(b"\x1a")
    s.await_job()
    s.carry_on(in_front=True)
    s.hear("continued")
    s.type(b"more words\n")
    s.hear("read")
    # In the background it may not read.
    s.type(b"wait\n")
    s.hear("read")
    os.tcsetpgrp(s.terminal, os.getpgrp())
    s.await_job()
    s.carry_on(in_front=True)
    s.hear("continued")
    s.type(b"at last\n")
    s.hear("read")
    s.type(b"\x04")
    s.hear("end of input")
    s.await_job()

if sys.argv[1:] == ["--job"]:
    job()
else:
    shell(sys.argv[1:] + ["/usr/bin/python3", __file__, "--job"])
