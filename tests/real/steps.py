"""The steps, in the order in which they run. Each is a function of the trial; its doc is its line."""
import json
import re
import signal
import time

import joining
import outputs
import ssh
import workload
from cluster import ACCOUNT, AUTH, PROXY, Front, run, wait
from describe import describe

STEPS = []


def step(function):
    STEPS.append(function)
    return function


ROLES = """kind: role
version: v7
metadata: {name: issuer}
spec: {allow: {workload_identity_labels: {example: [getting-started]}, rules: [{resources: [workload_identity], verbs: [list, read]}]}}
---
kind: role
version: v7
metadata: {name: machines}
spec:
  allow:
    logins: [root]
    node_labels: {'*': '*'}
    app_labels: {'*': '*'}
    db_labels: {'*': '*'}
    db_names: ['*']
    db_users: ['*']
    kubernetes_labels: {'*': '*'}
    kubernetes_groups: ['system:masters']
    kubernetes_resources: [{kind: '*', name: '*', namespace: '*', verbs: ['*']}]
    rules:
      - {resources: [node], verbs: [list, read]}
      - {resources: [cert_authority], verbs: [readnosecrets, list, read]}
      - {resources: [host_cert], verbs: [create]}
---
kind: role
version: v7
metadata: {name: bots-admin}
spec: {allow: {rules: [{resources: [bot_instance], verbs: [list, read]}]}}
"""


@step
def guide_resources(t):
    """tctl takes the guide's files: bot, IAM token, workload identity"""
    t.cluster.create(ROLES)
    for name in ("bot", "token", "workload-identity"):
        text = (t.root / f"examples/aws-systemd/{name}.yaml").read_text()
        # The guide's bot has no role, its account is a placeholder.
        t.cluster.create(text.replace("roles: []", "roles: [issuer, machines]").replace("111111111111", ACCOUNT)
                         .replace("/svc/{{workload.systemd.service}}", "/svc/foo"))


@step
def iam_through_the_proxy(t):
    """IAM join through the proxy's TLS routing; identity output in one shot"""
    t.oneshot("proxy", f"proxy_server: {PROXY}")


@step
def iam_direct_with_pin(t):
    """IAM join directly at the auth service, with a CA pin"""
    t.oneshot("direct", f"auth_server: {AUTH}", pins=[t.cluster.pin()])


@step
def iam_behind_a_front(t):
    """IAM join and a renewal behind a load balancer that hides ALPN: the connection is upgraded"""
    front = Front(t.cluster, 8443)
    t.config("front", "proxy_server: localhost:8443")
    agent = t.agent("front", extra={"TBOT_USE_PROXY_ADDR": "yes"})
    wait("the output", (t.dir / "front/identity/identity").exists, 30)
    before = subject(t, "front")
    agent.send_signal(signal.SIGHUP)
    wait("a renewal", lambda: subject(t, "front") != before, 30)
    t.end(agent)
    assert front.passed, "nothing went through the front"


@step
def wrong_pin_is_refused(t):
    """a wrong CA pin: refused, nothing written, exit 1"""
    done = t.oneshot("wrong-pin", f"auth_server: {AUTH}", pins=["sha256:" + "0" * 64], check=False)
    assert done.returncode == 1 and "pin" in done.stderr, done.stderr
    assert not (t.dir / "wrong-pin/identity/identity").exists()


@step
def token_join(t):
    """token join, then renewals with generation counters, ten of them"""
    made = t.cluster.tctl("bots", "add", "by-token", "--roles=machines", "--format=json").stdout
    token = json.loads(made[made.index("{"):])["token_id"]
    t.config("token", f"proxy_server: {PROXY}", onboarding=f"{{join_method: token, token: {token}}}",
             lifetime="credential_ttl: 2m\nrenewal_interval: 1m\n")
    agent = t.agent("token")
    try:
        for generation in range(1, 11):
            reached = lambda: subject(t, "token").get("generation") == str(generation)
            wait(f"generation {generation}", reached, 30)
            agent.send_signal(signal.SIGHUP)
    finally:
        t.end(agent)


for function in joining.STEPS:
    step(function)


@step
def same_as_the_go_agent(t):
    """the same YAML to both agents: files, modes, certificate fields, authorities are the same"""
    t.oneshot("ours", f"proxy_server: {PROXY}")
    t.oneshot("theirs", f"proxy_server: {PROXY}", go=True)
    same(t, "theirs", "ours")


@step
def tsh_and_tctl_accept_it(t):
    """the identity file serves the real tsh and tctl; tsh ssh reaches a node with it"""
    identity = t.dir / "proxy/identity/identity"
    listed = run(t.cluster.bin / "tsh", "-i", identity, f"--proxy={PROXY}", "ls", "--format=json",
                 env=t.cluster.env).stdout
    assert "local" in [node["spec"]["hostname"] for node in json.loads(listed)], listed
    nodes = run(t.cluster.bin / "tctl", "-i", identity, f"--auth-server={PROXY}", "get", "nodes", "--format=json",
                env=t.cluster.env).stdout
    assert json.loads(nodes), nodes
    said = run(t.cluster.bin / "tsh", "-i", identity, f"--proxy={PROXY}", "ssh", "root@local", "echo", "reached",
               env=t.cluster.env).stdout
    assert said.strip() == "reached", said


for function in (ssh.openssh, ssh.openssh_past_a_renewal, ssh.openssh_behind_a_front,
                 ssh.openssh_while_the_proxy_records, *outputs.STEPS):
    step(function)


@step
def workload_api(t):
    """daemon: both spiffe-inspects agree, X.509 and JWT verify against the published bundle"""
    t.config("daemon", f"proxy_server: {PROXY}", api=True)
    t.daemon = t.agent("daemon")
    socket = f"unix://{t.dir}/daemon/workload.sock"

    def inspect(binary):
        return run(binary, "spiffe-inspect", "--path", socket, check=False, env=t.cluster.env)

    wait("an SVID", lambda: "svc/foo" in inspect(t.tbot).stdout)
    facts = []
    for binary in (t.tbot, t.cluster.bin / "tbot"):
        done = inspect(binary)
        text = done.stdout + done.stderr
        assert "Validation: PASS" in text, text
        facts.append(sorted(set(re.findall(r"spiffe://\S+|#CAs: \d+|#Keys: \d+|PASS|FAIL", text))))
    assert facts[0] == facts[1], facts


for function in workload.STEPS:
    step(function)


@step
def rejoin_keeps_the_instance(t):
    """told to renew, it rejoins with its identity: same bot instance, next generation"""
    before = subject(t, "daemon")
    t.daemon.send_signal(signal.SIGHUP)
    after = wait("a rejoin", lambda: subject(t, "daemon") != before and subject(t, "daemon"), 30)
    assert before["instance"] == after["instance"], (before, after)
    assert int(after["generation"]) == int(before["generation"]) + 1, (before, after)


@step
def bot_instance_is_shown(t):
    """tctl shows our instances and heartbeats as it shows the Go agent's"""
    def heartbeats(host):
        for instance in t.cluster.get("bot_instance"):
            beat = instance["status"].get("initial_heartbeat", {})
            if beat.get("join_method") == host:
                yield instance

    def complete():
        return [i for i in heartbeats("iam") if i["status"]["latest_heartbeats"][-1].get("version")]

    shown = wait("a heartbeat", complete)
    keys = {tuple(sorted(i["status"]["initial_heartbeat"])) for i in shown}
    versions = {i["status"]["initial_heartbeat"]["version"] for i in shown}
    assert not any(version.startswith("0.") for version in versions), versions
    assert len(keys) <= 2, keys


def subject(t, name):
    """What the certificate that the bot keeps says of it: generation and bot instance."""
    path = t.dir / name / "storage/tlscert"
    if not path.exists():
        return {}
    text = run("openssl", "x509", "-noout", "-subject", "-nameopt", "RFC2253,sep_multiline,-esc_msb", "-in", path).stdout
    found = {}
    for key, oid in (("generation", "1.3.9999.1.14"), ("instance", "1.3.9999.2.20")):
        value = re.search(rf"{re.escape(oid)}=#(?:[0-9A-F]{{4}})([0-9A-F]+)", text)
        if value:
            found[key] = bytes.fromhex(value[1]).decode()
    return found


def phase(t, kind, name):
    """Puts the authority into a phase. Where the agent has to hurry, it renews by itself at once: a phase came
    before the one before was followed, or all is taken back. Otherwise it has a whole interval."""
    output = t.dir / "daemon/identity/tlscert"
    before = output.read_bytes()
    t.cluster.tctl("auth", "rotate", "--manual", f"--type={kind}", f"--phase={name}")
    if kind in ("host", "user", "db") and name in ("update_clients", "rollback"):
        wait(f"{kind}, {name}: a renewal of its own", lambda: output.read_bytes() != before, 60)
    t.still_serves(f"{kind}, {name}")


@step
def rotations(t):
    """rotation of every authority through its phases, and a rollback, while the agent runs"""
    for kind in ("user", "spiffe", "jwt", "db", "host"):
        for name in ("init", "update_clients", "update_servers", "standby"):
            phase(t, kind, name)
    for name in ("init", "update_clients", "rollback", "standby"):
        phase(t, "user", name)


@step
def rushed_rotation(t):
    """all phases at once, so that the agent's certificates are of no use: it joins anew by itself"""
    for name in ("init", "update_clients", "update_servers", "standby"):
        t.cluster.tctl("auth", "rotate", "--manual", "--type=user", f"--phase={name}")
    t.still_serves("after it")


@step
def restart_and_outage(t):
    """the cluster goes away and comes back: SVIDs are served throughout, then renewed"""
    workload = t.holder(f"unix://{t.dir}/daemon/workload.sock")
    t.cluster.down()
    for _ in range(10):
        workload.stdin.write("again\n")
        workload.stdin.flush()
        assert workload.stdout.readline() == "ok\n", "an SVID while the cluster was away"
    t.cluster.teleport = t.cluster.up()
    before = (t.dir / "daemon/identity/tlscert").read_bytes()
    t.daemon.send_signal(signal.SIGHUP)
    wait("a renewal", lambda: (t.dir / "daemon/identity/tlscert").read_bytes() != before, 90)


@step
def ten_minutes_away(t):
    """the cluster is away for ten minutes: SVIDs are served throughout, then everything is renewed by itself"""
    log = t.dir / "daemon/agent.log"
    told = len(log.read_text())
    workload = t.holder(f"unix://{t.dir}/daemon/workload.sock")
    t.cluster.down()
    away = time.monotonic()
    t.daemon.send_signal(signal.SIGHUP)
    while time.monotonic() - away < 600:
        workload.stdin.write("again\n")
        workload.stdin.flush()
        assert workload.stdout.readline() == "ok\n", "an SVID while the cluster was away"
        time.sleep(5)
    before = (t.dir / "daemon/identity/tlscert").read_bytes()
    t.cluster.teleport = t.cluster.up()
    back = time.monotonic()
    wait("a renewal", lambda: (t.dir / "daemon/identity/tlscert").read_bytes() != before, 1200)
    t.still_serves("after it")
    lines = len(log.read_text()[told:].splitlines())
    return f"renewed {time.monotonic() - back:.0f} s after it was back; {lines} lines in the log"


# Left out unless named.
ten_minutes_away.long = True


@step
def locks(t):
    """a lock is told with its remedy; after it is lifted the agent renews again"""
    t.cluster.tctl("lock", "--user=bot-example", "--message=maintenance")
    log = t.dir / "daemon/agent.log"

    def told():
        t.daemon.send_signal(signal.SIGHUP)
        time.sleep(1)
        return "lock" in log.read_text()

    wait("the lock in the log", told)
    for lock in t.cluster.get("locks"):
        t.cluster.tctl("rm", f"lock/{lock['metadata']['name']}")
    before = subject(t, "daemon")

    def renewed():
        # By itself it asks again within five minutes.
        t.daemon.send_signal(signal.SIGHUP)
        time.sleep(1)
        return subject(t, "daemon") != before

    wait("a renewal", renewed, 30)
    t.end(t.daemon)


@step
def separate_ports(t):
    """a proxy without TLS routing: IAM join, SSH tunnel, renewals, OpenSSH through the proxy's SSH port"""
    t.cluster.down()
    t.cluster.configure("separate")
    t.cluster.teleport = t.cluster.up()
    t.config("separate", f"proxy_server: {PROXY}")
    agent = t.agent("separate")
    wait("its ssh_config", (t.dir / "separate/identity/ssh_config").exists, 60)
    for generation in ("2", "3"):
        agent.send_signal(signal.SIGHUP)
        wait(f"generation {generation}", lambda: subject(t, "separate").get("generation") == generation, 30)
    text = (t.dir / "separate/identity/ssh_config").read_text()
    assert "--no-tls-routing" in text and "'example.teleport.sh:3023'" in text, text
    wait("a node", lambda: ssh.Shell(t, "separate").ssh(ssh.HOST, "true", check=False).returncode == 0)
    t.end(agent)
    t.cluster.down()
    t.cluster.configure()
    t.cluster.teleport = t.cluster.up()


@step
def go_agent_on_our_cluster(t):
    """the Go agent joins our embedded cluster by IAM, directly and through the proxy (SSH), writes its identity and serves an SVID"""
    d = t.dir / "embedded"
    d.mkdir()
    (d / "resources.yaml").write_text("---\n".join(
        (t.root / f"examples/aws-systemd/{name}.yaml").read_text().replace("111111111111", ACCOUNT)
        .replace("/svc/{{workload.systemd.service}}", "/svc/foo") for name in ("bot", "token", "workload-identity")))
    server = t.cluster.spawn("embedded", t.tbot, "cluster", "serve", "--data-dir", d / "cluster", "--listen",
                             "127.0.0.1:4080", "--auth-listen", "127.0.0.1:4025", "--cluster-name",
                             "ours.example.org", "--resources",
                             d / "resources.yaml", "--public-addr", "localhost:4080",
                             "--tls-cert", t.cluster.dir / "web.crt", "--tls-key", t.cluster.dir / "web.key")
    wait("our cluster", lambda: run("curl", "-sf", "--cacert", t.cluster.bundle,
                                    "https://localhost:4080/webapi/ping", check=False).returncode == 0)
    told = run(t.tbot, "cluster", "--data-dir", d / "cluster", "status").stdout
    pins = re.findall("sha256:[0-9a-f]+", told)
    direct = "auth_server: localhost:4025"
    # The Go agent of 18.0 goes through a proxy by SSH, ours by TLS routing.
    through_proxy = "proxy_server: localhost:4080"
    for way, at, pinned in (("direct", direct, pins), ("proxy", through_proxy, ())):
        for go in (True, False):
            t.oneshot(f"{'go' if go else 'ours'}-on-ours-{way}", at, go=go, pins=pinned)
        same(t, f"go-on-ours-{way}", f"ours-on-ours-{way}")
    t.config("go-api", direct, pins=pins, api=True)
    agent = t.agent("go-api", go=True)
    socket = f"unix://{t.dir}/go-api/workload.sock"
    wait("an SVID from the Go agent", lambda: "spiffe://ours.example.org/svc/foo" in run(
        t.tbot, "spiffe-inspect", "--path", socket, check=False, env=t.cluster.env).stdout)
    t.end(agent)
    server.terminate()


def same(t, theirs, ours):
    """Fails with the difference between what two agents wrote, the path of their program aside."""
    for name in (theirs, ours):
        text = describe(t.dir / name / "identity").replace(f"/{name}/", "/AGENT/")
        text = re.sub(r"ProxyCommand \S+ ssh-proxy-command", "ProxyCommand TBOT ssh-proxy-command", text)
        (t.dir / f"{name}.txt").write_text(text)
    differs = run("diff", "-u", t.dir / f"{theirs}.txt", t.dir / f"{ours}.txt", check=False).stdout
    assert not differs, differs
