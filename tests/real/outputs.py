"""Steps with the outputs for programs: the Go agent's files compared with ours, and what reads them."""
import json
import re
import subprocess
import time
from collections import Counter

from cluster import NAME, PROXY, run, wait
from describe import describe

# The services of the recording in which a Go agent of 18.0.0 wrote 105 files.
SERVICES = """
  - {type: identity, destination: {type: directory, path: OUT/identity}}
  - {type: ssh_host, principals: [node.example.com], destination: {type: directory, path: OUT/ssh_host}}
  - {type: application, app_name: echo, destination: {type: directory, path: OUT/application}}
  - {type: application, app_name: echo, specific_tls_naming: true, destination: {type: directory, path: OUT/application-specific}}
  - {type: database, service: pg, username: alice, database: app, destination: {type: directory, path: OUT/database}}
  - {type: database, format: mongo, service: pg, username: alice, database: app, destination: {type: directory, path: OUT/database-mongo}}
  - {type: database, format: tls, service: pg, username: alice, database: app, destination: {type: directory, path: OUT/database-tls}}
  - {type: database, format: cockroach, service: pg, username: alice, database: app, destination: {type: directory, path: OUT/database-cockroach}}
  - {type: kubernetes, kubernetes_cluster: k1, destination: {type: directory, path: OUT/kubernetes}}
  - {type: kubernetes, kubernetes_cluster: k1, disable_exec_plugin: true, destination: {type: directory, path: OUT/kubernetes-no-exec}}
  - {type: kubernetes/v2, selectors: [{labels: {env: test}}], destination: {type: directory, path: OUT/kubernetes-v2}}
  - {type: workload-identity-x509, selector: {name: example-workload-identity}, destination: {type: directory, path: OUT/x509}}
  - {type: workload-identity-jwt, selector: {name: example-workload-identity}, audiences: [example.com], destination: {type: directory, path: OUT/jwt}}
"""
# Calls of one run of ours with all of them; the Go agent makes 125 to 139.
MOST_CALLS = 40
# What differs because it is meant to; docs/compatibility.md tells why.
MEANT = [("database-cockroach", "cockroach/ca.crt")]


def every_output(t):
    """all outputs by the same YAML from both agents: files, modes, certificates, calls, audit events, warnings"""
    seen = {go: one_run(t, "all-theirs" if go else "all-ours", go) for go in (True, False)}
    problems, notes, equal = [], [], 0
    for folder in re.findall(r"OUT/([\w-]+)", SERVICES):
        theirs, ours = (facts(t, name, folder) for name in ("all-theirs", "all-ours"))
        for file in sorted(theirs.keys() | ours.keys()):
            pair = theirs.get(file), ours.get(file)
            if (folder, file) in MEANT:
                notes.append(f"{folder}/{file} differs as meant" if pair[0] != pair[1] else
                             f"{folder}/{file} differs no more")
            elif pair[0] == pair[1]:
                equal += 1
            else:
                texts = [t.dir / f"{name}.txt" for name in ("theirs", "ours")]
                for path, text in zip(texts, pair):
                    path.write_text(text or "")
                problems.append(f"{folder}/{file}:\n" + run("diff", "-U1", *texts, check=False).stdout)
    notes.append(f"{equal} files are equal")
    for what in ("events", "warnings"):
        theirs, ours = seen[True][what], seen[False][what]
        if set(theirs) != set(ours):
            text = f"{what}: only the Go agent's {sorted(set(theirs) - set(ours))}, only ours {sorted(set(ours) - set(theirs))}"
            (problems if what == "events" else notes).append(text)
        else:
            notes.append(f"{what}: the same {len(theirs)} kinds")
    theirs, ours = (sum(seen[go]["calls"].values()) for go in (True, False))
    notes.append(f"calls: the Go agent {theirs} in {seen[True]['seconds']:.1f} s, ours {ours} in "
                 f"{seen[False]['seconds']:.1f} s: {dict(sorted(seen[False]['calls'].items()))}")
    if ours > MOST_CALLS:
        problems.append(f"{ours} calls, more than {MOST_CALLS}")
    assert not problems, "\n".join(problems + notes)
    return "\n".join(notes)


def one_run(t, name, go):
    t.config(name, f"proxy_server: {PROXY}", services=SERVICES)
    calls, events, begun = t.cluster.calls(), t.cluster.events(), time.monotonic()
    done = run(t.binary(go), "start", "--oneshot", "-c", t.dir / name / "tbot.yaml", env=t.env(), check=False)
    seconds = time.monotonic() - begun
    log = done.stdout + done.stderr
    (t.dir / name / "agent.log").write_text(log)
    assert done.returncode == 0, log[-4000:]
    wait("its last event", lambda: len(t.cluster.events()) > len(events))
    time.sleep(1)
    return {"calls": t.cluster.calls() - calls, "seconds": seconds,
            # Not those of shells that have ended just before.
            "events": Counter(kind(event) for event in t.cluster.events()[len(events):]
                              if not event["event"].startswith("session.")),
            "warnings": Counter(re.sub(r"\S*\d\S*", "N", line) for line in warnings(log))}


def kind(event):
    return " ".join([event["event"], event["code"], *sorted(fields(event))])


def fields(value, path=""):
    """The names in an event, those inside of others with a dot."""
    for key, inner in value.items():
        if isinstance(inner, dict):
            yield from fields(inner, f"{path}{key}.")
        else:
            yield path + key


def warnings(log):
    for line in log.splitlines():
        found = re.search(r"\b(WARN|ERRO|ERROR)\w*\b\W*(.*)", re.sub(r"\x1b\[\d+m", "", line))
        if found:
            yield found[2]


def facts(t, name, folder):
    """What there is in an output's folder, by file: mode and content."""
    text = describe(t.dir / name / folder)
    text = text.replace(f"/{name}/", "/AGENT/").replace(str(t.cluster.bin / "tbot"), "TBOT").replace(str(t.tbot), "TBOT")
    # What is inside of a kubeconfig: the same PEM texts as in the files beside it.
    text = re.sub(r"LS0tLS1[A-Za-z0-9+/=]+", "<base64 PEM>", text)
    text = re.sub(r"eyJ[\w-]+\.[\w-]+\.[\w-]+", "<jwt>", text)
    files = re.findall(r"(?ms)^==== (\S+) (.*?)(?=^==== |\Z)", text)
    return {file: facts for file, facts in files}


def application(t):
    """a web application behind the proxy, fetched by curl with the files of an application output"""
    for folder, pair in (("application", ("tlscert", "key")), ("application-specific", ("tls.crt", "tls.key"))):
        files = t.dir / "all-ours" / folder
        body = run("curl", "-sS", "--fail", "--cacert", t.cluster.bundle, "--resolve", f"echo.{PROXY}:127.0.0.1",
                   "--cert", files / pair[0], "--key", files / pair[1], f"https://echo.{PROXY}/").stdout
        assert body == "the application\n", body
    without = run("curl", "-s", "-o", "/dev/null", "-w", "%{http_code}", "--cacert", t.cluster.bundle, "--resolve",
                  f"echo.{PROXY}:127.0.0.1", f"https://echo.{PROXY}/").stdout
    assert without != "200", "the application is open to everybody"


def kubernetes(t):
    """kubectl with each kubeconfig, with and without the plugin, through the proxy to a Kubernetes API"""
    for folder in ("kubernetes", "kubernetes-no-exec", "kubernetes-v2"):
        listed = run("kubectl", "--kubeconfig", t.dir / "all-ours" / folder / "kubeconfig.yaml", "get", "namespaces",
                     "-o", "name", env=dict(t.cluster.env, HOME=str(t.dir))).stdout
        assert listed == "namespace/behind-the-proxy\n", f"{folder}: {listed}"


def database(t):
    """a database certificate, taken by the real proxy and its database service"""
    files = t.dir / "all-ours/database-tls"
    shown = run("openssl", "x509", "-noout", "-subject", "-nameopt", "RFC2253,-esc_msb,-dump_unknown", "-in",
                files / "tls.crt").stdout
    assert "1.3.9999.2.1=pg" in shown, shown
    # Nobody serves the database behind it: the database service lets the bot in and says so.
    hello = b"\x00\x03\x00\x00user\x00alice\x00database\x00app\x00\x00"
    hello = (len(hello) + 4).to_bytes(4, "big") + hello
    answers = []
    for pair in (["-cert", files / "tls.crt", "-key", files / "tls.key"], []):
        command = ["openssl", "s_client", "-quiet", "-connect", PROXY, "-alpn", "teleport-postgres", "-servername",
                   PROXY.split(":")[0], *map(str, pair)]
        answers.append(subprocess.run(command, input=hello, capture_output=True, timeout=30).stdout)
    assert b"connection refused" in answers[0] and b"connection refused" not in answers[1], answers


def ssh_host(t):
    """a host certificate that OpenSSH's ssh-keygen reads as one, of the cluster's host authority"""
    shown = run("ssh-keygen", "-L", "-f", t.dir / "all-ours/ssh_host/ssh_host-cert.pub").stdout
    assert "host certificate" in shown and "node.example.com" in shown, shown
    authorities = t.dir / "all-ours/ssh_host/ssh_host-user-ca.pub"
    assert NAME in authorities.read_text(), authorities.read_text()


STEPS = (every_output, application, kubernetes, database, ssh_host)
