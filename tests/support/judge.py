"""A workload and its relying party: holds the Workload API's stream of X.509-SVIDs open, and says what it
thinks of what it holds whenever it is asked.

For each line on standard input, LEAF and one or several JWKS (files): the chain of the X.509-SVID that was
pushed last goes to LEAF as PEM, for others to judge; a JWT-SVID that is fetched now has to verify with
every one of the key sets. Prints the serial number of the X.509-SVID and the key ID of the JWT-SVID, or
what is wrong.

usage: SPIFFE_ENDPOINT_SOCKET=unix:///path judge.py
"""
import json
import queue
import sys

import jwt
from cryptography.hazmat.primitives.serialization import Encoding
from spiffe import WorkloadApiClient

AUDIENCE = "audience.example.org"


def judge(client, svid, leaf, *key_sets):
    with open(leaf, "wb") as file:
        for certificate in svid.cert_chain:
            file.write(certificate.public_bytes(Encoding.PEM))
    token = client.fetch_jwt_svid(audience={AUDIENCE}).token
    kid = jwt.get_unverified_header(token)["kid"]
    for path in key_sets:
        with open(path) as file:
            keys = {key["kid"]: key for key in json.load(file)["keys"]}
        assert kid in keys, f"{path} does not have the key {kid}"
        claims = jwt.decode(token, jwt.PyJWK(keys[kid]).key, algorithms=["RS256"], audience=AUDIENCE)
        assert claims["sub"] == str(svid.spiffe_id), claims
    return f"{svid.leaf.serial_number} {kid}"


pushed = queue.Queue()
with WorkloadApiClient() as client:
    handler = client.stream_x509_contexts(pushed.put, pushed.put, retry_connect=False)
    svid = None
    for line in sys.stdin:
        try:
            while svid is None or not pushed.empty():
                update = pushed.get(timeout=60)
                if isinstance(update, Exception):
                    raise update
                svid = update.default_svid
            print(judge(client, svid, *line.split()), flush=True)
        except Exception as error:
            print(f"{type(error).__name__}: {error}".replace("\n", " "), flush=True)
    handler.cancel()
