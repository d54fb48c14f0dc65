"""A connection in the hands of a stranger: two processes that are not related, one of which connects to
TARGET twice and passes both connections to the other one (SCM_RIGHTS), which is another user. That one
speaks for whoever connects to NEAR.1 and NEAR.2. Prints the process ID of the one that connected; it ends
on SIGUSR1.

usage: rights.py TARGET NEAR
"""
import os
import signal
import socket
import sys
import threading

target, near = sys.argv[1:3]
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


def speak(listener, far):
    client, _ = listener.accept()
    threading.Thread(target=pump, args=(client, far), daemon=True).start()
    pump(far, client)


ours, theirs = socket.socketpair()
if os.fork() == 0:
    signal.alarm(300)
    ours.close()
    listeners = []
    for number in "12":
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(f"{near}.{number}")
        listener.listen()
        listeners.append(listener)
    os.setgid(65534)
    os.setuid(65534)
    _, received, _, _ = socket.recv_fds(theirs, 16, 2)
    threads = [
        threading.Thread(target=speak, args=(listener, socket.socket(fileno=far)))
        for listener, far in zip(listeners, received)]
    for thread in threads:
        thread.start()
    theirs.sendall(b"listening")
    for thread in threads:
        thread.join()
    os._exit(0)

caller = os.fork()
if caller == 0:
    signal.alarm(300)
    signal.signal(signal.SIGUSR1, lambda *_: os._exit(0))
    connections = []
    for _ in range(2):
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(target)
        connections.append(connection)
    socket.send_fds(ours, [b"x"], [connection.fileno() for connection in connections])
    for connection in connections:
        connection.close()
    while True:
        signal.pause()
ours.recv(16)
print("caller", caller, flush=True)
os.waitpid(caller, 0)
print("ended", flush=True)
signal.pause()
