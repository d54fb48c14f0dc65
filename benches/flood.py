"""What a flood by one user does to another one: the 99th percentile of the time that a connection, its
attestation and the first SVID take, in calm, while as many processes of the other user are merely busy, while
they flood a socket that has nothing to do with the agent, and while they flood the agent. Needs root.

usage: flood.py TBOT [SECONDS] [--apart NICE]

With --apart, the caller, the agent, the other socket's server and the flood have a session each, among which
the kernel shares the processors as it does among services and logins (sched(7), autogroup); NICE is that of
the agent's session.
"""
import argparse
import multiprocessing
import os
import pathlib
import signal
import socket
import subprocess
import sys
import tempfile
import time

sys.dont_write_bytecode = True
sys.path.insert(0, str(pathlib.Path(__file__).parent.parent / "tests/support"))
from flood import PREFACE, call, flood  # noqa: E402

NOBODY, FLOODERS, ROUNDS = 65534, 4, 3
ONE = PREFACE + call(1)


def ask(path):
    """One call on a connection of its own; returns when the message is there."""
    with socket.socket(socket.AF_UNIX) as connection:
        # Without a time-out, connecting waits while the socket's queue is full.
        connection.connect(path)
        connection.settimeout(30)
        connection.sendall(ONE)
        heard = b""
        while True:
            more = connection.recv(65536)
            assert more, "hung up on"
            heard += more
            at = 0
            while len(heard) >= at + 9:
                length, kind = int.from_bytes(heard[at:at + 3]), heard[at + 3]
                if kind == 0 and len(heard) >= at + 9 + length:
                    return
                at += 9 + length


def times(path, seconds):
    taken, end = [], time.monotonic() + seconds
    while time.monotonic() < end:
        begun = time.monotonic()
        ask(path)
        taken.append(time.monotonic() - begun)
        time.sleep(0.001)
    return taken


def flooding(path, seconds, apart):
    """Starts the flood as somebody else, who is merely busy without a path."""
    def run():
        end = time.monotonic() + seconds
        if path:
            flood(path, end, *counters)
        while time.monotonic() < end:
            pass

    def lead():
        if apart:
            os.setsid()
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)
        workers = [multiprocessing.Process(target=run) for _ in range(FLOODERS)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    counters = [multiprocessing.Value("L", 0) for _ in range(2)]
    leader = multiprocessing.Process(target=lead)
    leader.start()
    return leader, counters


def decoy(path, apart):
    if apart:
        os.setsid()
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    os.chmod(path, 0o777)
    listener.listen(4096)
    while True:
        listener.accept()[0].close()


def show(name, taken):
    taken.sort()
    p50, p99 = (taken[len(taken) * percent // 100] * 1e3 for percent in (50, 99))
    print(f"{name:<28} {len(taken):6} calls   p50 {p50:8.2f} ms   p99 {p99:8.2f} ms", flush=True)
    return p99


def main(binary, seconds, nice):
    apart = nice is not None
    with tempfile.TemporaryDirectory() as home:
        os.chmod(home, 0o755)
        subprocess.run([binary, "quickstart", "--once", "--dir", home], check=True, stdout=subprocess.DEVNULL)
        config = pathlib.Path(home, "tbot.yaml").read_text()
        address = next(line.split(": ", 1)[1] for line in config.splitlines() if line.startswith("auth_server: "))
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "start_new_session": apart}
        started = [
            subprocess.Popen([binary, "cluster", "serve", "--listen", "127.0.0.1:0", "--auth-listen", address,
                              "--data-dir", f"{home}/cluster"], **quiet),
            subprocess.Popen([binary, "start", "-c", f"{home}/tbot.yaml"], **quiet)]
        if apart:
            pathlib.Path(f"/proc/{started[1].pid}/autogroup").write_text(str(nice))
        elsewhere, ours = f"{home}/decoy.sock", f"{home}/workload.sock"
        sink = multiprocessing.Process(target=decoy, args=(elsewhere, apart))
        sink.start()
        try:
            for _ in range(600):
                try:
                    ask(ours)
                    break
                except (OSError, AssertionError):
                    time.sleep(0.05)
            targets = {"busy processes": None, "flood elsewhere": elsewhere, "flood": ours}
            found = {name: [] for name in ("calm", *targets)}
            counts = {name: [0, 0] for name in targets}
            for _ in range(ROUNDS):
                found["calm"] += times(ours, seconds)
                for name, path in targets.items():
                    leader, counters = flooding(path, seconds + 1, apart)
                    time.sleep(0.5)
                    found[name] += times(ours, seconds)
                    leader.join()
                    counts[name] = [sum(pair) for pair in zip(counts[name], (counter.value for counter in counters))]
            tail = {name: show(name, taken) for name, taken in found.items()}
            for name in targets:
                made, refused = (count / ROUNDS / (seconds + 1) for count in counts[name])
                ratio = tail["flood"] / tail[name]
                print(f"{name:<28} {made:6.0f} connections/s, {refused:6.0f} refused   p99 of the flood ÷ this {ratio:5.2f}")
        finally:
            sink.terminate()
            for process in started:
                process.send_signal(signal.SIGTERM)
                process.wait()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("binary")
    parser.add_argument("seconds", type=float, nargs="?", default=4.0)
    parser.add_argument("--apart", type=int, metavar="NICE")
    arguments = parser.parse_args()
    main(arguments.binary, arguments.seconds, arguments.apart)
