"""A stand-in for AWS IAM Roles Anywhere that believes nothing: it verifies the certificate's chain and
the signature of each CreateSession by the published rules, and notes what it granted.

usage: roles_anywhere.py PORT TRUST_ANCHOR_PEM NOTES
"""
import base64
import datetime
import hashlib
import http.server
import json
import re
import sys
import urllib.parse

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa

PORT, ANCHOR, NOTES = int(sys.argv[1]), sys.argv[2], sys.argv[3]
GRANTED = []


def verify(handler, body):
    """The session's duration and the caller's name, if all is well."""
    authorization = re.fullmatch(
        r"(AWS4-X509-(?:RSA|ECDSA)-SHA256) Credential=(\d+)/(\d{8})/([a-z0-9-]+)/rolesanywhere/"
        r"aws4_request, SignedHeaders=([a-z0-9;-]+), Signature=([0-9a-f]+)",
        handler.headers["Authorization"],
    )
    assert authorization, "authorization"
    algorithm, serial, day, region, signed, signature = authorization.groups()
    date = handler.headers["X-Amz-Date"]
    assert date.startswith(day), "date"
    asked = datetime.datetime.strptime(date, "%Y%m%dT%H%M%SZ").replace(tzinfo=datetime.timezone.utc)
    now = datetime.datetime.now(datetime.timezone.utc)
    assert abs((now - asked).total_seconds()) < 300, "skew"

    leaf = x509.load_der_x509_certificate(base64.b64decode(handler.headers["X-Amz-X509"], validate=True))
    assert leaf.serial_number == int(serial), "serial"
    assert leaf.not_valid_before_utc <= now < leaf.not_valid_after_utc, "validity"
    assert leaf.not_valid_after_utc - now <= datetime.timedelta(minutes=11), "a longer life than needed"
    with open(ANCHOR, "rb") as file:
        anchors = x509.load_pem_x509_certificates(file.read())
    chain = [
        x509.load_der_x509_certificate(base64.b64decode(part, validate=True))
        for part in handler.headers.get("X-Amz-X509-Chain", "").split(",")
        if part
    ]
    current = leaf
    for issuer in chain:
        current.verify_directly_issued_by(issuer)
        current = issuer
    for anchor in anchors:
        if anchor.subject == current.issuer:
            current.verify_directly_issued_by(anchor)
            break
    else:
        raise AssertionError("Untrusted certificate. Insufficient certificate")

    names = signed.split(";")
    assert names == sorted(names), "order"
    required = {"host", "x-amz-date", "x-amz-x509", "content-type"}
    assert required <= set(names), "signed headers"
    assert not chain or "x-amz-x509-chain" in names, "the chain is not signed"
    target = urllib.parse.urlsplit(handler.path)
    query = urllib.parse.parse_qsl(target.query, strict_parsing=True)
    quote = lambda text: urllib.parse.quote(text, safe="-._~")
    canonical = "\n".join(
        [
            "POST",
            target.path,
            "&".join(f"{quote(key)}={quote(value)}" for key, value in sorted(query)),
            *(f"{name}:{' '.join(handler.headers[name].split())}" for name in names),
            "",
            signed,
            hashlib.sha256(body).hexdigest(),
        ]
    )
    text = "\n".join(
        [
            algorithm,
            date,
            f"{day}/{region}/rolesanywhere/aws4_request",
            hashlib.sha256(canonical.encode()).hexdigest(),
        ]
    ).encode()
    key, value = leaf.public_key(), bytes.fromhex(signature)
    if algorithm == "AWS4-X509-RSA-SHA256":
        assert isinstance(key, rsa.RSAPublicKey), "algorithm"
        key.verify(value, text, padding.PKCS1v15(), hashes.SHA256())
    else:
        assert isinstance(key, ec.EllipticCurvePublicKey), "algorithm"
        key.verify(value, text, ec.ECDSA(hashes.SHA256()))
    names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    arns = dict(query)
    assert target.path == "/sessions" and set(arns) == {"profileArn", "roleArn", "trustAnchorArn"}, "query"
    assert region == arns["trustAnchorArn"].split(":")[3], "region"
    return {
        "region": region,
        "id": names.get_values_for_type(x509.UniformResourceIdentifier)[0],
        "role": arns["roleArn"],
        "algorithm": algorithm,
        "seconds": json.loads(body)["durationSeconds"],
    }


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        try:
            granted = verify(self, body)
        except Exception as error:  # whatever is wrong, AWS says no
            return self.answer(403, {"message": f"{type(error).__name__}: {error}"})
        GRANTED.append(granted)
        with open(NOTES, "w", encoding="utf-8") as file:
            json.dump(GRANTED, file)
        ends = datetime.datetime.now(datetime.timezone.utc) + datetime.timedelta(seconds=granted["seconds"])
        number = len(GRANTED)
        credentials = {
            "accessKeyId": f"ASIATEST{number}",
            "secretAccessKey": f"secret/{number}+=",
            "sessionToken": f"token/{number}==",
            "expiration": ends.strftime("%Y-%m-%dT%H:%M:%SZ"),
        }
        self.answer(201, {"credentialSet": [{"credentials": credentials, "roleArn": granted["role"]}]})

    def answer(self, status, message):
        text = json.dumps(message).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)


http.server.ThreadingHTTPServer(("127.0.0.1", PORT), Handler).serve_forever()
