"""A hostile caller: four processes that connect, ask for SVIDs in heaps, and hang up without reading, over
and over. Prints how many connections it made, and how often it was not permitted to.

usage: flood.py SOCKET SECONDS
"""
import multiprocessing
import socket
import struct
import sys
import time


def frame(kind, flags, stream, payload=b""):
    return struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream) + payload


def literal(name, value):
    return b"\0" + bytes([len(name)]) + name + bytes([len(value)]) + value


HEADERS = b"".join(literal(name, value) for name, value in (
    (b":method", b"POST"), (b":scheme", b"http"), (b":authority", b"localhost"), (b":path", b"/SpiffeWorkloadAPI/FetchX509SVID"),
    (b"content-type", b"application/grpc"), (b"te", b"trailers"), (b"workload.spiffe.io", b"true")))
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(4, 0, 0)


def call(stream):
    return frame(1, 4, stream, HEADERS) + frame(0, 1, stream, b"\0\0\0\0\0")


BYTES = PREFACE + b"".join(call(stream) for stream in range(1, 100, 2))


def flood(path, end, made, refused):
    while time.monotonic() < end:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(1)
            try:
                connection.connect(path)
            except PermissionError:
                counter = refused
            except OSError:
                continue  # Whoever finds no place in the queue has lost nothing, and does not rest.
            else:
                counter = made
                try:
                    connection.sendall(BYTES)
                except OSError:
                    pass
        with counter.get_lock():
            counter.value += 1


def main(path, seconds):
    counters = [multiprocessing.Value("L", 0) for _ in range(2)]
    end = time.monotonic() + seconds
    workers = [multiprocessing.Process(target=flood, args=(path, end, *counters)) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    print(*(counter.value for counter in counters))


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]))
