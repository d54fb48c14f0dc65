"""Steps about what workloads get beside their own SVID: federated bundles, revocations, Envoy's form of all of it."""
import json
import subprocess

from cluster import PROXY, run, wait

PARTNER = "partner.example.org"


def federation(t):
    """a federated trust domain reaches open streams, X.509 and JWT keys, and goes again"""
    socket = f"unix://{t.dir}/daemon/workload.sock"
    made = ask(t, "bundle", partner(t)).stdout.strip()
    t.cluster.create(f"kind: spiffe_federation\nversion: v1\nmetadata: {{name: {PARTNER}}}\n"
                     f"spec: {{bundle_source: {{static: {{bundle: {json.dumps(made)}}}}}}}\n")
    known = lambda: [PARTNER in ask(t, "domains", kind, socket).stdout.split() for kind in ("x509", "jwt")]
    wait("the partner's bundles", lambda: all(known()), 30)
    t.cluster.tctl("rm", f"spiffe_federation/{PARTNER}")
    wait("the partner's end", lambda: not any(known()), 30)


def revocation(t):
    """a revoked SVID is on the list that an open stream pushes"""
    watch = subprocess.Popen([*asking(t), "watch", f"unix://{t.dir}/daemon/workload.sock"], text=True,
                             stdout=subprocess.PIPE)
    t.cluster.children.append(watch)
    serial = json.loads(watch.stdout.readline())["serial"]
    t.cluster.tctl("workload-identity", "revocations", "add", "--type", "x509", "--serial", serial, "--reason",
                   "compromised")
    while serial not in json.loads(watch.stdout.readline())["revoked"]:
        pass
    watch.terminate()


def envoy_secrets(t):
    """Envoy's secrets have the names and forms that the Go agent gives them"""
    t.config("go-sds", f"proxy_server: {PROXY}", api=True)
    agent = t.agent("go-sds", go=True)
    theirs, ours = (f"unix://{t.dir}/{name}/workload.sock" for name in ("go-sds", "daemon"))
    wait("the Go agent's secrets", lambda: ask(t, "secrets", theirs).returncode == 0)
    for names in ([], ["default"], ["ROOTCA"], ["ALL"], ["default", "ROOTCA"], ["spiffe://nobody/x"]):
        one, other = (ask(t, "secrets", socket, *names) for socket in (theirs, ours))
        assert (one.returncode, one.stdout) == (other.returncode, other.stdout), (names, one, other)
    t.end(agent)


STEPS = [federation, revocation, envoy_secrets]


def partner(t):
    """An authority of another trust domain."""
    file = t.dir / "partner.pem"
    run("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-keyout",
        t.dir / "partner.key", "-subj", "/O=partner", "-days", "2", "-addext", f"subjectAltName=URI:spiffe://{PARTNER}",
        "-addext", "keyUsage=critical,keyCertSign,cRLSign", "-out", file)
    return file


def asking(t):
    return [t.cluster.python, t.root / "tests/real/asks.py"]


def ask(t, *words):
    return run(*asking(t), *words, check=False)
