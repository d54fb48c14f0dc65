"""Tries this agent on a real Teleport cluster; README.md says how.

usage: run.py BINARIES [--tbot PATH] [--keep DIR] [STEP…]
"""
import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

INSIDE = "TBOT_TRIAL_INSIDE"
ROOT = Path(__file__).resolve().parent.parent.parent
if INSIDE not in os.environ:
    os.environ[INSIDE] = "1"
    os.execvp("unshare", ["unshare", "--mount", "--net", "--propagation=private", sys.executable, *sys.argv])

import joining  # noqa: E402
from cluster import Cluster, run, wait  # noqa: E402
from steps import STEPS  # noqa: E402


class Trial:
    """Where the agents of a trial live, and how they are started."""

    def __init__(self, cluster, directory, tbot):
        self.cluster, self.dir, self.tbot, self.root = cluster, directory, tbot, ROOT
        self.daemon = None

    def config(self, name, server, pins=(), onboarding="{join_method: iam, token: example-bot}", lifetime="",
               api=False, services=None):
        """Writes NAME/tbot.yaml with an identity output and perhaps the Workload API, or with `services`."""
        folder = self.dir / name
        folder.mkdir(parents=True, exist_ok=True)
        pinned = onboarding[:-1] + f", ca_pins: {list(pins)}}}" if pins else onboarding
        services = services and services.strip("\n").replace("OUT", str(folder)) + "\n" or (
            f"  - {{type: identity, destination: {{type: directory, path: {folder}/identity}}}}\n")
        if api:
            services += (f"  - type: workload-identity-api\n    listen: unix://{folder}/workload.sock\n"
                         "    selector: {name: example-workload-identity}\n")
        (folder / "tbot.yaml").write_text(
            f"version: v2\n{server}\nonboarding: {pinned}\n{lifetime}"
            f"storage: {{type: directory, path: {folder}/storage}}\nservices:\n{services}")
        return folder / "tbot.yaml"

    def binary(self, go):
        return self.cluster.bin / "tbot" if go else self.tbot

    def env(self):
        return dict(self.cluster.env, **self.cluster.aws)

    def oneshot(self, name, server, go=False, check=True, **more):
        config = self.config(name, server, **more)
        return run(self.binary(go), "start", "--oneshot", "-c", config, env=self.env(), check=check)

    def agent(self, name, go=False, extra=None):
        log = open(self.dir / name / "agent.log", "ab")
        child = subprocess.Popen([self.binary(go), "start", "-c", self.dir / name / "tbot.yaml"],
                                 env=dict(self.env(), **(extra or {})), stdout=log, stderr=log)
        self.cluster.children.append(child)
        return child

    def end(self, agent):
        agent.send_signal(signal.SIGTERM)
        assert agent.wait(30) in (0, -signal.SIGTERM), "the agent did not end cleanly"

    def svids(self, socket):
        return run(self.cluster.python, ROOT / "tests/real/svids.py", socket, check=False, data="")

    def holder(self, socket):
        """A workload that asks again, as the same process, each time it is told to."""
        asking = subprocess.Popen([self.cluster.python, ROOT / "tests/real/svids.py", socket], text=True,
                                  stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.cluster.children.append(asking)
        assert asking.stdout.readline() == "ok\n", "the first SVIDs"
        return asking

    def still_serves(self, when):
        """The daemon's SVIDs chain to its bundles, and its identity is one that tsh can use."""
        assert self.daemon.poll() is None, f"{when}: the agent ended"
        socket = f"unix://{self.dir}/daemon/workload.sock"
        wait(f"{when}: SVIDs that verify", lambda: self.svids(socket).returncode == 0, 30)
        used = lambda: run(self.cluster.bin / "tsh", "-i", self.dir / "daemon/identity/identity",
                           "--proxy=example.teleport.sh:3080", "ls", check=False,
                           env=self.cluster.env).returncode == 0
        wait(f"{when}: an identity that tsh can use", used, 60)


def main():
    options = argparse.ArgumentParser(usage=__doc__)
    options.add_argument("binaries", type=Path)
    options.add_argument("steps", nargs="*", metavar="STEP")
    options.add_argument("--tbot", type=Path, default=ROOT / "target/debug/tbot")
    options.add_argument("--keep", type=Path)
    chosen = options.parse_intermixed_args()
    directory = chosen.keep or Path(tempfile.mkdtemp(prefix="tbot-real-"))
    directory.mkdir(parents=True, exist_ok=True)
    venv = Path(os.environ.get("TBOT_TEST_VENV", ROOT / "target/venv")) / "bin/python"
    cluster = Cluster(chosen.binaries.resolve(), directory, venv, joining.hosts(), joining.document)
    known = {function.__name__: function for function in STEPS}
    unknown = set(chosen.steps) - set(known)
    if unknown:
        options.error(f"no such step: {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    failed = 0
    try:
        cluster.start()
        trial = Trial(cluster, directory, chosen.tbot.resolve())
        for name, function in known.items():
            if name not in chosen.steps if chosen.steps else hasattr(function, "long"):
                continue
            begun = time.monotonic()
            try:
                note = function(trial)
                outcome = "ok  "
            except Exception:  # any failure is one of the step
                failed += 1
                outcome = "FAIL"
                note = traceback.format_exc()
            print(f"{outcome} {function.__doc__} ({name}, {time.monotonic() - begun:.1f} s)", flush=True)
            if note:
                print("     " + note.strip().replace("\n", "\n     "), flush=True)
    finally:
        cluster.stop()
        if not chosen.keep:
            shutil.rmtree(directory, ignore_errors=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
