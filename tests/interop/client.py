"""A workload in Python, which obeys the same lines as the one in Go (go/main.go), but for `wit`. Its library
knows no hints and makes no TLS connections."""
import json
import sys
import threading

import grpc
from spiffe import JwtSource, SpiffeId, WorkloadApiClient, X509Source


def x509(client):
    svids = client.fetch_x509_svids()
    with X509Source(workload_api_client=client, timeout_in_seconds=30) as source:
        assert source.svid.spiffe_id == svids[0].spiffe_id
    return {"ids": [str(svid.spiffe_id) for svid in svids]}


def bundles(client):
    keys = client.fetch_jwt_bundles()
    reply = {}
    for bundle in client.fetch_x509_bundles().bundles:
        jwt = keys.get_bundle_for_trust_domain(bundle.trust_domain)
        reply[bundle.trust_domain.name] = [len(bundle.x509_authorities), len(jwt.jwt_authorities) if jwt else 0]
    return reply


def jwt(client, audience, subject):
    subject = None if subject == "-" else SpiffeId(subject)
    with JwtSource(workload_api_client=client, timeout_in_seconds=30) as source:
        svids = source.fetch_svids({audience}, subject)
        for svid in svids:
            bundle = source.get_bundle_for_trust_domain(svid.spiffe_id.trust_domain)
            type(svid).parse_and_validate(svid.token, bundle, {audience})
            assert client.validate_jwt_svid(svid.token, audience).spiffe_id == svid.spiffe_id
    return {"ids": [str(svid.spiffe_id) for svid in svids], "token": svids[0].token}


class Watcher:
    def __init__(self):
        self.lock = threading.Lock()
        self.seen = {"serials": [], "authorities": [], "bundles": [], "keys": [], "errors": []}

    def begin(self, client):
        self.client = client
        client.stream_x509_contexts(self.x509, lambda error: self.add("errors", "x509 " + code(error)))
        client.stream_jwt_bundles(self.jwt, lambda error: self.add("errors", "jwt " + code(error)))
        return {}

    def add(self, name, value):
        with self.lock:
            self.seen[name].append(value)

    def x509(self, context):
        svid = context.default_svid
        bundle = context.x509_bundle_set.get_bundle_for_trust_domain(svid.spiffe_id.trust_domain)
        self.add("serials", str(svid.leaf.serial_number))
        self.add("authorities", len(bundle.x509_authorities))
        self.add("bundles", len(bundle.x509_authorities))

    def jwt(self, bundles):
        for bundle in bundles.bundles:
            self.add("keys", len(bundle.jwt_authorities))


def code(error):
    """The name of the gRPC status behind an error, as Go spells it."""
    while error is not None:
        if isinstance(error, grpc.RpcError):
            return "".join(word.capitalize() for word in error.code().name.split("_"))
        error = error.__cause__ or error.__context__
    return "Unknown"


watcher = Watcher()
for line in sys.stdin:
    command, *words = line.split()
    try:
        if command == "watched":
            with watcher.lock:
                print(json.dumps(watcher.seen), flush=True)
            continue
        client = WorkloadApiClient(socket_path=words[0])
        if command == "watch":
            reply = watcher.begin(client)
        else:
            with client:
                match command:
                    case "x509":
                        reply = x509(client)
                    case "bundles":
                        reply = bundles(client)
                    case "jwt":
                        reply = jwt(client, *words[1:])
                    case "validate":
                        reply = {"id": str(client.validate_jwt_svid(words[2], words[1]).spiffe_id)}
    except Exception as error:
        reply = {"error": code(error), "text": f"{type(error).__name__}: {error}"}
    print(json.dumps(reply), flush=True)
