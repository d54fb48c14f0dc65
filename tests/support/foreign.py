"""A client of a Teleport cluster made of nothing but the table of wire facts and gRPC's own library.

Joins by both join protocols, and as the bot asks for certificates, authorities, resources and an
X.509-SVID. Leaves what it got in the directory OUT as PEM files; prints one line for each call.

usage: foreign.py WIRE_FACTS ADDRESS CLUSTER HOST_CA OLD_TOKEN NEW_TOKEN OUT
"""
import base64
import datetime
import pathlib
import sys

import grpc
from cryptography import x509
from cryptography.hazmat.primitives import serialization as form
from cryptography.hazmat.primitives.asymmetric import ec
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf import duration_pb2, empty_pb2, timestamp_pb2

DOMAIN = "teleport.cluster.local"
STANDARD = [duration_pb2, empty_pb2, timestamp_pb2]


class Wire:
    """Messages and calls as the table has them. Packages become messages that hold others, so that one
    file holds all; enumerations become numbers. Neither shows on the wire."""

    def __init__(self, path):
        self.calls, fields = {}, {}
        for line in path.read_text().splitlines():
            kind, name, *rest = line.split("\t")
            if kind == "field":
                fields.setdefault(name, [])
                fields[name].append(rest)
            elif kind == "rpc":
                self.calls[name] = rest
                for message in rest[:2]:
                    if not message.startswith("google."):
                        fields.setdefault(message, [])  # some have no field
            elif kind == "enum":
                fields.setdefault(name, None)
        file = descriptor_pb2.FileDescriptorProto(name="table", syntax="proto3")
        file.dependency.extend(module.DESCRIPTOR.name for module in STANDARD)
        self.file, self.fields, self.nodes = file, fields, {}
        known = {f".{name}" for module in STANDARD for name in (
            f"google.protobuf.{message}" for message in module.DESCRIPTOR.message_types_by_name)}
        for name, rows in fields.items():
            if rows is not None:
                self.node(name)
        for name, rows in fields.items():
            for number, field, type_, label in rows or []:
                self.add(self.node(name), int(number), field, type_, label, known)
        pool = descriptor_pool.Default()
        pool.Add(file)
        self.pool = pool

    def node(self, name):
        if name not in self.nodes:
            parent, _, own = name.rpartition(".")
            place = self.node(parent).nested_type if parent else self.file.message_type
            self.nodes[name] = place.add(name=own)
        return self.nodes[name]

    def add(self, message, number, name, type_, label, known):
        if label.startswith("map<"):
            return  # none of the calls below needs one
        field = message.field.add(name=name, number=number)
        field.label = field.LABEL_REPEATED if label == "repeated" else field.LABEL_OPTIONAL
        if "." not in type_:
            field.type = getattr(field, f"TYPE_{type_.upper()}")
        elif self.fields.get(type_, ()) is None:
            field.type = field.TYPE_INT32
        elif type_ in self.fields or f".{type_}" in known:
            field.type, field.type_name = field.TYPE_MESSAGE, f".{type_}"
        else:
            field.type = field.TYPE_BYTES  # of a package that the table leaves out

    def type(self, name):
        return message_factory.GetMessageClass(self.pool.FindMessageTypeByName(name))

    def __call__(self, channel, call, **values):
        """One unary call."""
        request, answer, direction = self.calls[call]
        assert direction == "unary", call
        method = channel.unary_unary(
            f"/{call}", self.type(request).SerializeToString, self.type(answer).FromString)
        return method(self.type(request)(**values), timeout=30, metadata=[("version", "18.0.0")])

    def stream(self, channel, call, requests):
        request, answer, direction = self.calls[call]
        assert direction == "bidi", call
        method = channel.stream_stream(
            f"/{call}", self.type(request).SerializeToString, self.type(answer).FromString)
        return method(requests, timeout=60, metadata=[("version", "18.0.0")])


class Key:
    def __init__(self):
        self.key = ec.generate_private_key(ec.SECP256R1())
        public = self.key.public_key()
        self.pem = public.public_bytes(form.Encoding.PEM, form.PublicFormat.SubjectPublicKeyInfo)
        self.der = public.public_bytes(form.Encoding.DER, form.PublicFormat.SubjectPublicKeyInfo)
        self.ssh = public.public_bytes(form.Encoding.OpenSSH, form.PublicFormat.OpenSSH)

    def private(self):
        return self.key.private_bytes(
            form.Encoding.PEM, form.PrivateFormat.PKCS8, form.NoEncryption())


def pem(der):
    return x509.load_der_x509_certificate(der).public_bytes(form.Encoding.PEM)


def expires(minutes=60):
    at = timestamp_pb2.Timestamp()
    at.FromDatetime(datetime.datetime.now(datetime.timezone.utc) + datetime.timedelta(minutes=minutes))
    return at


def connect(address, name, roots, key=None, chain=None):
    credentials = grpc.ssl_channel_credentials(roots, key, chain)
    return grpc.secure_channel(address, credentials, [("grpc.ssl_target_name_override", name)])


def main(facts, address, cluster, host_ca, old_token, new_token, out):
    wire, out = Wire(pathlib.Path(facts)), pathlib.Path(out)
    stranger = connect(address, DOMAIN, pathlib.Path(host_ca).read_bytes())
    answer = wire(stranger, "proto.AuthService/Ping")
    assert answer.ClusterName == cluster, answer
    print("Ping", answer.ServerVersion)

    key = Key()
    certs = wire(
        stranger, "proto.JoinService/RegisterUsingToken", Token=old_token, Role="Bot",
        PublicTLSKey=key.pem, PublicSSHKey=key.ssh, Expires=expires())
    (out / "old.pem").write_bytes(certs.TLS)
    (out / "user-ca.pem").write_bytes(b"".join(certs.TLSCACerts))
    print("RegisterUsingToken", len(certs.TLSCACerts), len(certs.SSHCACerts))

    key, say = Key(), wire.type("teleport.join.v1.JoinRequest")
    wire_form = base64.b64decode(key.ssh.split()[1])
    requests = [
        say(client_init={"join_method": "token", "token_name": new_token, "system_role": "Bot"}),
        say(token_init={"client_params": {"bot_params": {
            "public_keys": {"public_tls_key": key.der, "public_ssh_key": wire_form},
            "expires": expires()}}}),
    ]
    answers = list(wire.stream(stranger, "teleport.join.v1.JoinService/Join", iter(requests)))
    assert answers[0].init.join_method == "token", answers
    certificates = answers[-1].result.bot_result.certificates
    bot = pem(certificates.tls_cert)
    (out / "new.pem").write_bytes(bot)
    print("Join", answers[0].init.signature_algorithm_suite)

    roots = b"".join(pem(der) for der in certificates.tls_ca_certs)
    name = f"{cluster.encode().hex()}.{DOMAIN}"
    channel = connect(address, name, roots, key.private(), bot)
    print("Ping as bot", wire(channel, "proto.AuthService/Ping").ClusterName)
    for kind in ["host", "user", "db", "spiffe"]:
        answer = wire(
            channel, "teleport.trust.v1.TrustService/GetCertAuthorities", type=kind, include_key=False)
        found = [(ca.Spec.Type, ca.Spec.ClusterName) for ca in answer.cert_authorities_v2]
        assert (kind, cluster) in found, found
        print("GetCertAuthorities", kind)

    issued = Key()
    certs = wire(
        channel, "proto.AuthService/GenerateUserCerts", Username="bot-example", Expires=expires(),
        RouteToCluster=cluster, RoleRequests=["issuer"], UseRoleRequests=True,
        SSHPublicKey=issued.ssh, TLSPublicKey=issued.pem)
    (out / "issued.pem").write_bytes(certs.TLS)
    (out / "issued-cert.pub").write_bytes(certs.SSH)
    print("GenerateUserCerts")

    role = connect(address, name, roots, issued.private(), certs.TLS)
    try:
        answer = wire(
            role, "proto.AuthService/ListResources", ResourceType="node", Limit=10,
            Namespace="default")
        print("ListResources", len(answer.Resources))
    except grpc.RpcError as error:
        assert error.code() == grpc.StatusCode.UNIMPLEMENTED, error
        print("ListResources is not there")
    workload = Key()
    answer = wire(
        role, "teleport.workloadidentity.v1.WorkloadIdentityIssuanceService/IssueWorkloadIdentity",
        name="foo", x509_svid_params={"public_key": workload.der}, workload_attrs={})
    (out / "svid.pem").write_bytes(pem(answer.credential.x509_svid.cert))
    print("IssueWorkloadIdentity", answer.credential.spiffe_id)

    # Whoever has not proved anything gets nothing else.
    try:
        wire(stranger, "proto.AuthService/GenerateUserCerts", Username="bot-example")
        raise AssertionError("a stranger got certificates")
    except grpc.RpcError as error:
        print("refused", error.code().name)


main(*sys.argv[1:])
