"""Steps in which OpenSSH uses what an identity output has written."""
import os
import re
import signal
import subprocess
import time

from cluster import NAME, PROXY, Front, run, wait

HOST = f"root@local.{NAME}"
SIZE = 50 * 1024 * 1024


class Shell:
    """OpenSSH's programs with the `ssh_config` that agent `name` has written, perhaps changed."""

    def __init__(self, t, name, change=None):
        self.env, self.config = t.env(), t.dir / name / "identity/ssh_config"
        if change:
            text = change(self.config.read_text())
            self.config = t.dir / name / f"changed-{time.monotonic_ns()}.ssh_config"
            self.config.write_text(text)

    def words(self, program, *words):
        return [program, "-F", str(self.config), "-o", "BatchMode=yes", *map(str, words)]

    def ssh(self, *words, **more):
        return run(*self.words("ssh", *words), env=self.env, **more)

    def scp(self, source, target):
        begun = time.monotonic()
        run(*self.words("scp", "-q", source, target), env=self.env)
        return time.monotonic() - begun

    def banner(self):
        """How long the proxy command alone takes to bring the node's first line, in seconds."""
        command = re.search("ProxyCommand (.*)", self.config.read_text())[1]
        for mark, value in (("%r", "root"), ("%h", f"local.{NAME}"), ("%p", "3022")):
            command = command.replace(mark, value)
        begun = time.monotonic()
        child = subprocess.Popen(f"exec {command}", shell=True, env=self.env, stdin=subprocess.PIPE,
                                 stdout=subprocess.PIPE)
        assert child.stdout.readline().startswith(b"SSH-2.0"), "no SSH"
        taken = time.monotonic() - begun
        child.kill()
        child.wait()
        return taken

    def begin(self, *words):
        return subprocess.Popen(self.words("ssh", *words), env=self.env, text=True, bufsize=1,
                                stdin=subprocess.PIPE, stdout=subprocess.PIPE)


def by_go(t):
    """Changes an `ssh_config` so that the Go agent's command is started."""
    return lambda text: re.sub(r"ProxyCommand \S+", f"ProxyCommand '{t.cluster.bin}/tbot'", text)


def reached(shell, where=HOST):
    said = shell.ssh(where, "echo", "reached").stdout
    assert said == "reached\n", said


def openssh(t):
    """OpenSSH with the written ssh_config: commands, 50 MB by scp and sftp, two at a time; strangers are refused"""
    ours, theirs = Shell(t, "proxy"), Shell(t, "proxy", by_go(t))
    data = t.dir / "50-mb"
    data.write_bytes(os.urandom(SIZE))
    taken = {}
    for name, shell in (("ours", ours), ("theirs", theirs)):
        reached(shell)
        begun = time.monotonic()
        for _ in range(5):
            shell.ssh(HOST, "true")
        command = (time.monotonic() - begun) / 5
        up = shell.scp(data, f"{HOST}:{t.dir}/{name}.up")
        down = shell.scp(f"{HOST}:{data}", t.dir / f"{name}.down")
        for copy in ("up", "down"):
            run("cmp", data, t.dir / f"{name}.{copy}")
        first = sorted(shell.banner() for _ in range(9))[4]
        taken[name] = (f"first line {first * 1000:.0f} ms, a command {command:.2f} s, 50 MB up {up:.2f} s, "
                       f"down {down:.2f} s")
    run(*ours.words("sftp", "-q", "-b", "-", HOST), env=ours.env, data=f"get {data} {t.dir}/sftp.down\n")
    run("cmp", data, t.dir / "sftp.down")

    both = [ours.begin(HOST, "cat", data) for _ in range(2)]
    for one in both:
        size = len(one.stdout.buffer.read())
        assert one.wait(60) == 0 and size == SIZE, size

    refused = ours.ssh(f"root@nobody.{NAME}", "true", check=False)
    assert refused.returncode == 255 and "reaching nobody of " in refused.stderr, refused.stderr
    refused = ours.ssh(f"stranger@local.{NAME}", "true", check=False)
    assert refused.returncode == 255 and "Permission denied" in refused.stderr, refused.stderr
    return f"ours: {taken['ours']}; Go agent: {taken['theirs']}"


def openssh_past_a_renewal(t):
    """OpenSSH: a connection stays open while the identity is renewed, and the next one uses the new one"""
    t.config("held", f"proxy_server: {PROXY}")
    agent = t.agent("held")
    identity = t.dir / "held/identity/identity"
    wait("the output", identity.exists, 30)
    wait("its ssh_config", (t.dir / "held/identity/ssh_config").exists, 30)
    shell = Shell(t, "held")
    held = shell.begin(HOST, "cat")

    def echoes(line):
        held.stdin.write(line + "\n")
        held.stdin.flush()
        assert held.stdout.readline() == line + "\n", line

    echoes("before")
    before = identity.read_bytes()
    agent.send_signal(signal.SIGHUP)
    wait("a renewal", lambda: identity.read_bytes() != before, 30)
    echoes("after")
    reached(shell)
    held.stdin.close()
    assert held.wait(30) == 0
    t.end(agent)


def openssh_behind_a_front(t):
    """OpenSSH through a load balancer that hides ALPN: the connection is upgraded"""
    front = Front(t.cluster, 8444)
    upgraded = lambda text: text.replace(f"'{PROXY}'", "'localhost:8444'").replace("--no-connection", "--connection")
    reached(Shell(t, "proxy", upgraded))
    assert front.passed, "nothing went through the front"


def openssh_while_the_proxy_records(t):
    """OpenSSH to a cluster whose proxy records sessions: it logs in by our agent"""
    mode = "kind: session_recording_config\nversion: v2\nmetadata: {{name: session-recording-config}}\nspec: {{mode: {}}}\n"
    t.cluster.create(mode.format("proxy"))
    shell = Shell(t, "proxy")
    try:
        wait("a session that is recorded",
             lambda: shell.ssh(HOST, "echo", "reached", check=False).stdout == "reached\n", 30)
    finally:
        t.cluster.create(mode.format("node"))
