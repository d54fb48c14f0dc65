"""A connection in the hands of another process than the one that made it.

usage: successor.py TARGET NEAR [AGENT]

A process connects to TARGET and hands the connection to a child, which listens on NEAR and speaks for
whoever connects there. Prints the first one's process ID. With AGENT, the process ID of the one that
listens on TARGET, that one is held while the first process ends and another takes its ID.
"""
import os
import signal
import socket
import sys
import threading

target, near = sys.argv[1:3]
agent = int(sys.argv[3]) if len(sys.argv) > 3 else None
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


def speak(far):
    signal.alarm(300)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(near)
    listener.listen()
    client, _ = listener.accept()
    threading.Thread(target=pump, args=(client, far)).start()
    pump(far, client)


def caller():
    far = socket.socket(socket.AF_UNIX)
    far.connect(target)
    if os.fork() == 0:
        speak(far)
        os._exit(0)
    if agent is None:
        signal.pause()


if agent is not None:
    os.kill(agent, signal.SIGSTOP)
first = os.fork()
if first == 0:
    caller()
    os._exit(0)
print("first", first, flush=True)
if agent is None:
    signal.pause()
os.waitpid(first, 0)
while True:
    with open("/proc/sys/kernel/ns_last_pid", "w") as last:
        last.write(str(first - 1))
    heir = os.fork()
    if heir == 0:
        signal.alarm(300)
        signal.pause()
    if heir == first:
        break
    os.kill(heir, signal.SIGKILL)
    os.waitpid(heir, 0)
print("taken over", flush=True)
os.kill(agent, signal.SIGCONT)
signal.pause()
