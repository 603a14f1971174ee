"""A person at a terminal: asks, stops an answer with Ctrl-C, asks again, and leaves with Ctrl-D."""
import os
import pty
import re
import select
import sys
import time

binary, grpc = sys.argv[1:]
pid, terminal = pty.fork()
if pid == 0:
    os.execv(binary, [binary, "chat", "--grpc", grpc, "--max-tokens", "2000"])

seen = ""


def until(pattern, seconds=100):
    """Reads until the pattern stands in what is new, and forgets what is before its end."""
    global seen
    end = time.monotonic() + seconds
    while not (found := re.search(pattern, seen, re.S)):
        assert time.monotonic() < end, f"no {pattern!r} in {seen!r}"
        if select.select([terminal], [], [], 0.5)[0]:
            seen += os.read(terminal, 65536).decode(errors="replace")
    seen = seen[found.end() :]
    return found


def say(text):
    os.write(terminal, text.encode())


until(r"Ctrl-D or /quit ends.*?> ")
say("Write a very long story of the wind and its thousand journeys.\r")
until(r"thousand journeys\..*?\n.*?\w")  # the answer has begun
say("\x03")
until(r"\[stopped\].*?(\d+) token\(s\), the first after [\d.]+ s.*?> ")
say("/new\r")
until(r"/new.*?> ")
say("What is two plus\\\r")
until(r"… ")
say("two?\r")
until(r"tok/s.*?> ")
say("\x04")
_, status = os.waitpid(pid, 0)
assert os.waitstatus_to_exitcode(status) == 0, status
print("the person has left")
