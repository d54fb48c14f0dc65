"""Asks a Workload API as a client that nobody here wrote, and has OpenSSL judge what it gives.

usage: svids.py unix:///PATH   asks once, and then for an X.509-SVID again for each line on standard input, as the same
process; says `ok` each time the X.509-SVID chains to the bundle and the JWT-SVID verifies, and ends with what is wrong
otherwise
"""
import subprocess
import sys
import tempfile

from cryptography.hazmat.primitives.serialization import Encoding
from spiffe import JwtSvid, WorkloadApiClient

AUDIENCE = {"example.com"}


def judge_x509(client, directory):
    context = client.fetch_x509_context()
    svid = context.default_svid
    bundle = context.x509_bundle_set.get_bundle_for_trust_domain(svid.spiffe_id.trust_domain)

    def pem(name, certificates):
        path = f"{directory}/{name}"
        with open(path, "wb") as file:
            file.writelines(certificate.public_bytes(Encoding.PEM) for certificate in certificates)
        return path

    command = ["openssl", "verify", "-CAfile", pem("bundle", bundle.x509_authorities)]
    if svid.cert_chain[1:]:
        command += ["-untrusted", pem("chain", svid.cert_chain[1:])]
    subprocess.run([*command, pem("leaf", [svid.leaf])], check=True, stdout=subprocess.DEVNULL)


def judge_jwt(client):
    token = client.fetch_jwt_svid(AUDIENCE)
    keys = client.fetch_jwt_bundles().get_bundle_for_trust_domain(token.spiffe_id.trust_domain)
    JwtSvid.parse_and_validate(token.token, keys, AUDIENCE)


with WorkloadApiClient(sys.argv[1]) as client, tempfile.TemporaryDirectory() as directory:
    judge_x509(client, directory)
    judge_jwt(client)
    print("ok", flush=True)
    for _ in sys.stdin:
        judge_x509(client, directory)
        print("ok", flush=True)
