"""Asks a workload's socket for one thing and prints what a step looks at.

usage: asks.py domains x509|jwt SOCKET    the trust domains whose bundles there are
       asks.py watch SOCKET               for each message of an X.509 stream its SVID's serial and the revoked ones
       asks.py secrets SOCKET [NAME…]     names and forms of Envoy's secrets; exit code 3 if they are refused
       asks.py bundle FILE                the certificate in FILE as a SPIFFE bundle
"""
import base64
import json
import sys

import grpc
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from spiffe import WorkloadApiClient

SECRET = "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.Secret"


def domains(kind, socket):
    with WorkloadApiClient(socket) as client:
        bundles = client.fetch_x509_bundles() if kind == "x509" else client.fetch_jwt_bundles()
        print(*(bundle.trust_domain.name for bundle in bundles.bundles))


def watch(socket):
    call = channel(socket).unary_stream("/SpiffeWorkloadAPI/FetchX509SVID")
    for message in call(b"", metadata=(("workload.spiffe.io", "true"),)):
        svids = [dict(fields(value))[2] for number, value in fields(message) if number == 1]
        lists = [x509.load_der_x509_crl(value) for number, value in fields(message) if number == 2]
        leaf = svids[0][:4 + int.from_bytes(svids[0][2:4], "big")]
        print(json.dumps({"serial": pairs(x509.load_der_x509_certificate(leaf).serial_number),
                          "revoked": [pairs(entry.serial_number) for one in lists for entry in one]}), flush=True)


def secrets(socket, *names):
    request = b"".join(field(3, name) for name in names) + field(4, SECRET)
    call = channel(socket).unary_unary("/envoy.service.secret.v3.SecretDiscoveryService/FetchSecrets")
    try:
        response = call(request, timeout=10)
    except grpc.RpcError as error:
        print(error.code(), error.details(), file=sys.stderr)
        sys.exit(3)
    seen = []
    for number, value in fields(response):
        if number == 4:
            seen.append(("type", value.decode()))
        if number == 2:
            resource = dict(fields(value))
            secret = dict(fields(resource[2]))
            form = min(set(secret) - {1})
            seen.append((secret[1].decode(), resource[1].decode(), form, sorted(dict(fields(secret[form])))))
    print(*sorted(seen), sep="\n")


def bundle(path):
    with open(path, "rb") as file:
        certificate = x509.load_pem_x509_certificate(file.read())
    numbers = certificate.public_key().public_numbers()
    part = lambda number: base64.urlsafe_b64encode(number.to_bytes(32, "big")).rstrip(b"=").decode()
    key = {"kty": "EC", "crv": "P-256", "x": part(numbers.x), "y": part(numbers.y)}
    der = base64.b64encode(certificate.public_bytes(Encoding.DER)).decode()
    print(json.dumps({"keys": [{"use": "x509-svid", **key, "x5c": [der]}, {"use": "jwt-svid", "kid": "partner", **key}],
                      "spiffe_refresh_hint": 300}))


def channel(socket):
    return grpc.insecure_channel(socket.replace("unix://", "unix:"))


def pairs(number):
    """Hex with an even number of digits, as revocations are named."""
    digits = f"{number:x}"
    return digits.zfill(len(digits) + len(digits) % 2)


def field(number, text):
    return bytes([number << 3 | 2, len(text)]) + text.encode()


def fields(data):
    """The fields of a message in which every field has a length."""
    at = 0

    def number():
        nonlocal at
        value, shift = 0, 0
        while True:
            byte = data[at]
            at += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    while at < len(data):
        tag = number()
        assert tag & 7 == 2, f"wire type {tag & 7}"
        length = number()
        yield tag >> 3, data[at:at + length]
        at += length


if __name__ == "__main__":
    {"domains": domains, "watch": watch, "secrets": secrets, "bundle": bundle}[sys.argv[1]](*sys.argv[2:])
