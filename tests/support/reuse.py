"""Callers that come one after the other, of two users by turns, where there are few process IDs: each asks
for its SVID, whose path has to end in its own user and process ID.

usage: reuse.py TARGET COUNT
"""
import os
import re
import socket
import sys

sys.dont_write_bytecode = True
from flood import PREFACE, call  # noqa: E402

USERS = (0, 65534)
target, count = sys.argv[1], int(sys.argv[2])


def served():
    """The user and the process ID that the SVID names."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(30)
        connection.connect(target)
        connection.sendall(PREFACE + call(1))
        heard = b""
        while not (found := re.search(rb"spiffe://[^/]+/unix/(\d+)/(\d+)\x12", heard)):
            more = connection.recv(65536)
            if not more:
                raise OSError(f"hung up after {heard!r}")
            heard += more
        return tuple(map(int, found.groups()))


# The IDs below 300 are given out once: they are for what starts with the machine.
while (passing := os.fork()) < 300:
    if passing == 0:
        os._exit(0)
    os.waitpid(passing, 0)
os.waitpid(passing, 0)
seen, wrong = set(), 0
for number in range(count):
    user = USERS[number % 2]
    caller = os.fork()
    if caller == 0:
        os.setgid(user)
        os.setuid(user)
        try:
            found = served()
        except OSError as error:
            found = str(error)
        own = (user, os.getpid())
        if found != own:
            print("wrong:", found, "for", own, flush=True)
        os._exit(found != own)
    seen.add(caller)
    _, status = os.waitpid(caller, 0)
    wrong += status != 0
print(f"{count} callers, {len(seen)} process IDs, {wrong} wrong", flush=True)
