"""A real Teleport 18 and what it needs, on a loopback of its own."""
import http.server
import json
import os
import re
import socket
import ssl
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from pathlib import Path

ACCOUNT, ROLE, SESSION = "123456789012", "teleport-bot-role", "i-0abc123"
NAME, PROXY, AUTH = "real.example.org", "example.teleport.sh:3080", "localhost:3025"
MOTO, DIAGNOSTICS = "http://127.0.0.1:5555", "127.0.0.1:3434"
STS = ("sts.us-east-1.amazonaws.com", "sts.amazonaws.com")


def wait(what, check, seconds=60):
    """The first true answer of `check`; an AssertionError that names `what` if there is none."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        answer = check()
        if answer:
            return answer
        time.sleep(0.1)
    raise AssertionError(f"{what}: not within {seconds} s")


def run(*command, env=None, check=True, data=None):
    done = subprocess.run([str(c) for c in command], env=env, input=data, capture_output=True, text=True)
    if check and done.returncode:
        raise AssertionError(f"{' '.join(map(str, command))}: exit {done.returncode}\n{done.stdout}{done.stderr}")
    return done


class Cluster:
    def __init__(self, binaries, directory, venv_python, issuers, documents):
        """`issuers` are names of OIDC issuers; `documents` gives what one of them answers under a path."""
        self.issuers, StsFront.documents = tuple(issuers), staticmethod(documents)
        self.bin, self.dir, self.python = Path(binaries), Path(directory), venv_python
        self.children = []
        self.bundle = self.dir / "bundle.pem"
        self.env = dict(os.environ, SSL_CERT_FILE=str(self.bundle))

    # Start and stop.

    def start(self):
        self.names()
        self.certificates()
        self.spawn("moto", self.python.parent / "moto_server", "-H", "127.0.0.1", "-p", "5555",
                   env=dict(os.environ, INITIAL_NO_AUTH_ACTION_COUNT="1000"))
        wait("moto", lambda: answers(f"{MOTO}/moto-api/"))
        support = Path(__file__).parent.parent / "support/aws_identity.py"
        keys = run(self.python, support, MOTO, ROLE, SESSION).stdout.split()
        self.aws = dict(zip(("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"), keys),
                        AWS_REGION="us-east-1")
        self.sts_front()
        self.behind_the_proxy()
        self.configure()
        self.teleport = self.up()

    def up(self):
        child = self.spawn("teleport", self.bin / "teleport", "start", "-c", self.dir / "teleport.yaml",
                           "--diag-addr", DIAGNOSTICS,
                           # In 18.0.0 the method bound_keypair is an experiment, without its first half.
                           env=dict(self.env, TELEPORT_UNSTABLE_BOUND_KEYPAIR_JOINING_EXPERIMENT="1"))
        wait("the proxy", lambda: answers(f"https://{PROXY}/webapi/ping"), 90)
        wait("the auth service", lambda: self.tctl("status", check=False).returncode == 0)
        listed = lambda: PROXY in self.tctl("get", "proxies", check=False).stdout
        wait("the proxy in the cluster's own list", listed)
        return child

    def down(self):
        self.teleport.terminate()
        self.teleport.wait()

    def stop(self):
        for child in reversed(self.children):
            if child.poll() is None:
                child.terminate()
        for child in self.children:
            try:
                child.wait(20)
            except subprocess.TimeoutExpired:
                child.kill()

    def spawn(self, name, *command, env=None):
        log = open(self.dir / f"{name}.log", "ab")
        child = subprocess.Popen([str(c) for c in command], env=env or self.env, stdout=log, stderr=log)
        self.children.append(child)
        return child

    # Its parts.

    def names(self):
        hosts = self.dir / "hosts"
        names = ("localhost", *STS, *self.issuers, PROXY.split(":")[0])
        hosts.write_text("".join(f"127.0.0.1 {name}\n" for name in names))
        run("mount", "--bind", hosts, "/etc/hosts")
        run("ip", "link", "set", "lo", "up")

    def certificates(self):
        d = self.dir
        run("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days",
            "2", "-keyout", d / "ca.key", "-out", d / "ca.crt", "-subj", "/CN=roots of the trial")
        for name, sans in (("sts", (*STS, *self.issuers)), ("web", (PROXY.split(":")[0], "*." + PROXY.split(":")[0], "localhost"))):
            names = ",".join(f"DNS:{san}" for san in sans)
            run("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days",
                "2", "-CA", d / "ca.crt", "-CAkey", d / "ca.key", "-keyout", d / f"{name}.key", "-out",
                d / f"{name}.crt", "-subj", f"/CN={name}", "-addext", f"subjectAltName={names}", "-addext",
                "basicConstraints=critical,CA:FALSE")
        self.bundle.write_text((d / "ca.crt").read_text())
        os.environ["SSL_CERT_FILE"] = str(self.bundle)

    def sts_front(self):
        """TLS before moto; answers as JSON where the caller accepts it, as AWS does and moto does not."""
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 443), StsFront)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self.dir / "sts.crt", self.dir / "sts.key")
        server.socket = context.wrap_socket(server.socket, server_side=True)
        threading.Thread(target=server.serve_forever, daemon=True).start()

    def behind_the_proxy(self):
        """A web application, and a Kubernetes API that has one namespace."""
        (self.dir / "kubeconfig").write_text(
            "apiVersion: v1\nkind: Config\ncurrent-context: k1\n"
            "clusters: [{name: k1, cluster: {server: 'https://127.0.0.1:6443', insecure-skip-tls-verify: true}}]\n"
            "users: [{name: u, user: {token: t}}]\ncontexts: [{name: k1, context: {cluster: k1, user: u}}]\n")
        for port, handler in ((8099, Application), (6443, Kubernetes)):
            server = http.server.ThreadingHTTPServer(("127.0.0.1", port), handler)
            if handler is Kubernetes:
                context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
                context.load_cert_chain(self.dir / "web.crt", self.dir / "web.key")
                server.socket = context.wrap_socket(server.socket, server_side=True)
            threading.Thread(target=server.serve_forever, daemon=True).start()

    def configure(self, mode="multiplex"):
        """One port for everything, or (`separate`) ports for SSH and tunnels of their own."""
        d = self.dir
        ports = "  listen_addr: 127.0.0.1:3023\n  tunnel_listen_addr: 127.0.0.1:3024\n" if mode == "separate" else ""
        (d / "teleport.yaml").write_text(f"""version: v3
teleport: {{nodename: local, data_dir: {d}/data, log: {{output: stderr, severity: INFO}}}}
auth_service: {{enabled: yes, cluster_name: {NAME}, listen_addr: 127.0.0.1:3025, proxy_listener_mode: {mode}}}
ssh_service: {{enabled: yes, listen_addr: 127.0.0.1:3022, labels: {{env: test}}}}
app_service: {{enabled: yes, apps: [{{name: echo, uri: "http://127.0.0.1:8099", labels: {{env: test}}}}]}}
db_service: {{enabled: yes, databases: [{{name: pg, protocol: postgres, uri: "localhost:5432", static_labels: {{env: test}}}}]}}
kubernetes_service: {{enabled: yes, listen_addr: 127.0.0.1:3026, kubeconfig_file: {d}/kubeconfig, labels: {{env: test}}}}
proxy_service:
  enabled: yes
{ports}  web_listen_addr: 127.0.0.1:3080
  public_addr: ["{PROXY}", "localhost:3080"]
  https_keypairs: [{{key_file: {d}/web.key, cert_file: {d}/web.crt}}]
""")

    # What its administrator does.

    def tctl(self, *command, check=True, data=None):
        return run(self.bin / "tctl", "-c", self.dir / "teleport.yaml", *command, env=self.env, check=check, data=data)

    def create(self, text):
        path = self.dir / "resource.yaml"
        path.write_text(text)
        self.tctl("create", "-f", path)

    def pin(self):
        return re.search(r"CA pins?: *(sha256:[0-9a-f]+)", self.tctl("status").stdout)[1]

    def get(self, kind):
        return json.loads(self.tctl("get", kind, "--format=json").stdout)

    def events(self):
        """The audit log so far."""
        lines = [line for log in sorted(self.dir.glob("data/log/events.log")) for line in log.read_text().splitlines()]
        return [json.loads(line) for line in lines]

    def calls(self):
        """How often each call was made of the auth service; those of its own proxy and node aside."""
        with urllib.request.urlopen(f"http://{DIAGNOSTICS}/metrics") as answer:
            text = answer.read().decode()
        counts = Counter()
        for labels, count in re.findall(r"(?m)^grpc_server_started_total{(.*?)} (\S+)", text):
            method, service = (re.search(rf'{key}="(.*?)"', labels)[1] for key in ("grpc_method", "grpc_service"))
            counts[f"{service}/{method}"] += int(float(count))
        return counts


class Front:
    """A load balancer that ends TLS, offers no ALPN, and opens its own TLS to the proxy."""

    def __init__(self, cluster, port):
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(cluster.dir / "web.crt", cluster.dir / "web.key")
        self.listener = context.wrap_socket(socket.create_server(("127.0.0.1", port)), server_side=True)
        self.passed = 0
        threading.Thread(target=self.serve, daemon=True).start()

    def serve(self):
        while True:
            try:
                near, _ = self.listener.accept()
            except (OSError, ssl.SSLError):
                continue
            host, port = PROXY.split(":")
            context = ssl.create_default_context()
            far = context.wrap_socket(socket.create_connection((host, int(port))), server_hostname=host)
            self.passed += 1
            for one, other in ((near, far), (far, near)):
                threading.Thread(target=pump, args=(one, other), daemon=True).start()


def pump(source, sink):
    try:
        while data := source.recv(65536):
            sink.sendall(data)
        sink.shutdown(socket.SHUT_WR)
    except OSError:
        pass


class Application(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.answer("text/plain", "the application\n")

    def answer(self, kind, text):
        data = text.encode()
        self.send_response(200)
        self.send_header("content-type", kind)
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


class Kubernetes(Application):
    """As much of a Kubernetes API as Teleport's service and `kubectl get namespaces` ask for."""

    ANSWERS = {
        "/version": {"major": "1", "minor": "33", "gitVersion": "v1.33.0"},
        "/api": {"kind": "APIVersions", "versions": ["v1"]},
        "/apis": {"kind": "APIGroupList", "apiVersion": "v1", "groups": []},
        "/api/v1": {"kind": "APIResourceList", "groupVersion": "v1", "resources": [
            {"name": "namespaces", "singularName": "namespace", "namespaced": False, "kind": "Namespace",
             "verbs": ["get", "list"], "shortNames": ["ns"]}]},
        "/api/v1/namespaces": {"kind": "NamespaceList", "apiVersion": "v1", "metadata": {}, "items": [
            {"kind": "Namespace", "apiVersion": "v1", "metadata": {"name": "behind-the-proxy"}}]},
    }

    def do_GET(self):
        found = self.ANSWERS.get(self.path.split("?")[0])
        if not found:
            return self.send_error(404)
        self.answer("application/json", json.dumps(found))

    def do_POST(self):
        """May somebody do something? Yes."""
        self.rfile.read(int(self.headers.get("content-length", 0)))
        kind, version = "SelfSubjectAccessReview", "authorization.k8s.io/v1"
        review = {"kind": kind, "apiVersion": version, "metadata": {}, "spec": {}, "status": {"allowed": True}}
        self.answer("application/json", json.dumps(review))


class StsFront(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        found = self.documents(self.headers.get("host", ""), self.path)
        self.answer(200 if found else 404, json.dumps(found))

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("content-length", 0)))
        request = urllib.request.Request(MOTO + self.path, body, dict(self.headers), method="POST")
        try:
            with urllib.request.urlopen(request) as answer:
                status, text = answer.status, answer.read().decode()
        except urllib.error.HTTPError as refusal:
            status, text = refusal.code, refusal.read().decode()
        if "json" in self.headers.get("accept", ""):
            text = json.dumps(as_json(status, text))
        self.answer(status, text)

    def answer(self, status, text):
        data = text.encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


def as_json(status, xml):
    def value(name):
        found = re.search(f"<{name}>(.*?)</{name}>", xml, re.S)
        return found[1] if found else ""

    if status != 200:
        return {"Error": {"Code": value("Code"), "Message": value("Message")}}
    caller = {name: value(name) for name in ("Account", "Arn", "UserId")}
    return {"GetCallerIdentityResponse": {"GetCallerIdentityResult": caller}}


def answers(url):
    try:
        with urllib.request.urlopen(url, context=None if url.startswith("http:") else ssl.create_default_context()):
            return True
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False
