"""Judges what a Workload API gave against the SPIFFE standard, clause by clause, with OpenSSL and Python's
libraries only; and makes JWT-SVIDs that must not be believed.

usage: conformance.py judge DOCUMENT   what was fetched; prints {"checked": {CLAUSE: COUNT}, "problems": [[CLAUSE, TEXT]]}
       conformance.py forge DOCUMENT   {"database", "trust_domain", "audience"}; prints [[CLAUSE, WHAT, TOKEN, GOOD]]

Clauses have the numbers of docs/reference/spiffe.md.
"""
import base64
import collections
import hmac
import json
import re
import sqlite3
import subprocess
import sys
import tempfile
import time

import jwt
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from cryptography.x509.oid import ExtendedKeyUsageOID, ExtensionOID

DER = serialization.Encoding.DER
SPKI = serialization.PublicFormat.SubjectPublicKeyInfo
ALGORITHMS = {kind + size for kind in ("RS", "ES", "PS") for size in ("256", "384", "512")}

checked = collections.Counter()
problems = []


def check(clause, holds, text):
    checked[clause] += 1
    if not holds:
        problems.append([clause, text])


def der_parts(data):
    """Splits DER values that stand one after the other with nothing between them."""
    parts = []
    while data:
        assert data[0] == 0x30, f"no SEQUENCE but {data[:4].hex()}"
        length, header = data[1], 2
        if length & 0x80:
            header += length & 0x7F
            length = int.from_bytes(data[2:header])
        assert header + length <= len(data), "cut off"
        parts.append(data[: header + length])
        data = data[header + length :]
    return parts


def certificates(encoded):
    return [x509.load_der_x509_certificate(part) for part in der_parts(base64.b64decode(encoded))]


def spiffe_id(text, trust_domain):
    scheme, separator, rest = text.partition("://")
    authority, slash, path = rest.partition("/")
    check("ID-01", (scheme, separator) == ("spiffe", "://") and authority and not set("?#") & set(text), text)
    check("ID-02", not set("@:") & set(authority), text)
    check("ID-03", re.fullmatch(r"[a-z0-9._-]{1,255}", authority) and authority == trust_domain, text)
    segments = path.split("/") if slash else []
    good = all(re.fullmatch(r"[A-Za-z0-9._-]+", part) and part not in (".", "..") for part in segments)
    check("ID-05", good, text)
    check("ID-06", len(text.encode()) <= 2048, f"{len(text)} bytes")
    return segments


def extension(certificate, oid):
    try:
        return certificate.extensions.get_extension_for_oid(oid)
    except x509.ExtensionNotFound:
        return None


def uris(certificate):
    names = extension(certificate, ExtensionOID.SUBJECT_ALTERNATIVE_NAME)
    return names.value.get_values_for_type(x509.UniformResourceIdentifier) if names else []


def usages(certificate):
    usage = extension(certificate, ExtensionOID.KEY_USAGE)
    check("X5-07", usage is not None and usage.critical, "key usage is absent or not critical")
    if usage is None:
        return set()
    names = ("digital_signature", "content_commitment", "key_encipherment", "data_encipherment", "key_agreement",
             "key_cert_sign", "crl_sign")
    return {name for name in names if getattr(usage.value, name)}


def authority(certificate, trust_domain):
    constraints = extension(certificate, ExtensionOID.BASIC_CONSTRAINTS)
    check("X5-04", constraints is not None and constraints.value.ca, "an authority without cA")
    usage = usages(certificate)
    check("X5-05", "key_cert_sign" in usage and usage <= {"key_cert_sign", "crl_sign"}, sorted(usage))
    names = uris(certificate)
    check("X5-06", names == [f"spiffe://{trust_domain}"], f"URI names {names}")
    check("ID-08", names == [f"spiffe://{trust_domain}"], f"URI names {names}")


def leaf(certificate, svid, trust_domain):
    names = uris(certificate)
    check("X5-01", names == [svid["spiffe_id"]], f"URI names {names}")
    check("X5-02", spiffe_id(svid["spiffe_id"], trust_domain), "root path")
    critical = extension(certificate, ExtensionOID.SUBJECT_ALTERNATIVE_NAME).critical
    check("X5-03", critical or len(certificate.subject) > 0, "names are not critical though the subject is empty")
    constraints = extension(certificate, ExtensionOID.BASIC_CONSTRAINTS)
    check("X5-04", constraints is not None and not constraints.value.ca, "a leaf that is an authority")
    usage = usages(certificate)
    check("X5-08", "digital_signature" in usage and not usage & {"key_cert_sign", "crl_sign"}, sorted(usage))
    extended = extension(certificate, ExtensionOID.EXTENDED_KEY_USAGE)
    both = {ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH}
    check("X5-09", extended is not None and both <= set(extended.value), "extended key usage")


def verify(chain, bundle, what):
    """The path, by OpenSSL."""
    with tempfile.NamedTemporaryFile(suffix=".pem") as roots, tempfile.NamedTemporaryFile(suffix=".pem") as rest, \
            tempfile.NamedTemporaryFile(suffix=".pem") as first:
        pem = serialization.Encoding.PEM
        for file, content in ((roots, bundle), (rest, chain[1:]), (first, chain[:1])):
            file.write(b"".join(certificate.public_bytes(pem) for certificate in content))
            file.flush()
        for purpose in ("sslserver", "sslclient"):
            command = ["openssl", "verify", "-x509_strict", "-purpose", purpose, "-CAfile", roots.name]
            command += (["-untrusted", rest.name] if chain[1:] else []) + [first.name]
            result = subprocess.run(command, capture_output=True, text=True)
            check("X5-11", result.returncode == 0, f"{what}: {result.stdout}{result.stderr}")


def x509_svids(document):
    domain = document["trust_domain"]
    own = f"spiffe://{domain}"
    bundles = {}
    for name, encoded in document["bundles"].items():
        bundles[name] = certificates(encoded)
        check("WL-12", re.fullmatch(r"spiffe://[a-z0-9._-]+", name), name)
        if name == own:
            for certificate in bundles[name]:
                authority(certificate, domain)
    for name in document["federated"]:
        check("WL-12", re.fullmatch(r"spiffe://[a-z0-9._-]+", name) and name != own, name)
    check("WL-13", bundles.get(own), "the own trust domain is missing")
    for svid in document["x509"]:
        check("WL-08", all(svid[name] for name in ("spiffe_id", "chain", "key", "bundle")), "an empty field")
        chain = certificates(svid["chain"])
        key = serialization.load_der_private_key(base64.b64decode(svid["key"]), None)
        pkcs8 = key.private_bytes(DER, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        check("WL-08", len(pkcs8) == len(base64.b64decode(svid["key"])), "the key is not plain PKCS#8")
        same = key.public_key().public_bytes(DER, SPKI) == chain[0].public_key().public_bytes(DER, SPKI)
        check("WL-08", same, "the key is another certificate's")
        leaf(chain[0], svid, domain)
        for certificate in chain[1:]:
            authority(certificate, domain)
        verify(chain, certificates(svid["bundle"]), "by its bundle")
        verify(chain, bundles.get(own, []), "by FetchX509Bundles")
        check("ID-09", uris(chain[0]) == [svid["spiffe_id"]], "the ID is not in the signed part")


def jwk_key(jwk):
    return jwt.PyJWK(jwk | {"alg": {"RSA": "RS256", "EC": "ES256"}[jwk["kty"]]}).key


def jwt_svids(document):
    domain = document["trust_domain"]
    own = f"spiffe://{domain}"
    sets = {}
    for name, encoded in document["jwt_bundles"].items():
        check("WL-12", re.fullmatch(r"spiffe://[a-z0-9._-]+", name), name)
        sets[name] = json.loads(base64.b64decode(encoded))["keys"]
        for jwk in sets[name]:
            check("WL-18", jwk.get("kid") and "x5c" not in jwk and jwk.get("use") in (None, "jwt-svid"), f"{jwk}")
            members = {"RSA": {"n", "e"}, "EC": {"crv", "x", "y"}}[jwk["kty"]] | {"kty", "kid", "use", "alg"}
            check("WL-18", set(jwk) <= members, f"{sorted(jwk)}")
    check("WL-13", sets.get(own), "the own trust domain is missing")
    keys = {jwk["kid"]: jwk for jwk in sets.get(own, [])}
    for svid in document["jwt"]:
        token = svid["svid"]
        parts = token.split(".")
        check("JW-01", len(parts) == 3 and all(re.fullmatch(r"[A-Za-z0-9_-]+", part) for part in parts), token)
        header = jwt.get_unverified_header(token)
        check("JW-02", set(header) <= {"alg", "kid", "typ"}, f"{sorted(header)}")
        check("JW-03", header["alg"] in ALGORITHMS, header["alg"])
        check("JW-04", header.get("kid") in keys, f"kid {header.get('kid')}")
        check("JW-05", header.get("typ") in (None, "JWT", "JOSE"), f"typ {header.get('typ')}")
        claims = jwt.decode(token, jwk_key(keys[header["kid"]]), algorithms=[header["alg"]], audience=svid["asked"][0])
        check("ID-09", True, "the signature covers the claims")
        spiffe_id(claims["sub"], domain)
        check("JW-06", claims["sub"] == svid["spiffe_id"] != "", claims["sub"])
        audience = claims["aud"] if isinstance(claims["aud"], list) else [claims["aud"]]
        check("JW-07", sorted(audience) == sorted(svid["asked"]), f"{audience}")
        check("JW-08", isinstance(claims["exp"], int) and 0 < claims["exp"] - time.time() < 86400, f"{claims['exp']}")
        check("WL-20", {"sub", "aud", "exp"} <= set(svid["valid_claims"]) == set(claims), f"{svid['valid_claims']}")
        check("WL-20", svid["valid_id"] == claims["sub"], svid["valid_id"])


def published(document):
    bundle = document["bundle"]
    domain = document["trust_domain"]
    check("TB-01", isinstance(bundle.get("keys"), list), f"{sorted(bundle)}")
    check("TB-02", isinstance(bundle.get("spiffe_sequence"), int), "no integer sequence")
    check("TB-03", isinstance(bundle.get("spiffe_refresh_hint"), int), "no integer refresh hint")
    check("TB-05", set(bundle) <= {"keys", "spiffe_sequence", "spiffe_refresh_hint"}, f"{sorted(bundle)}")
    kids = []
    for jwk in bundle["keys"]:
        check("TB-04", jwk.get("kty") in ("RSA", "EC") and jwk.get("use") in ("x509-svid", "jwt-svid"), f"{jwk}")
        members = {"RSA": {"n", "e"}, "EC": {"crv", "x", "y"}}[jwk["kty"]] | {"kty", "use"}
        if jwk["use"] == "x509-svid":
            check("TB-05", set(jwk) == members | {"x5c"}, f"{sorted(jwk)}")
            check("X5-13", "kid" not in jwk and len(jwk["x5c"]) == 1, "kid, or not one x5c value")
            certificate = x509.load_der_x509_certificate(base64.b64decode(jwk["x5c"][0], validate=True))
            authority(certificate, domain)
            certificate.verify_directly_issued_by(certificate)
            same = jwk_key(jwk).public_bytes(DER, SPKI) == certificate.public_key().public_bytes(DER, SPKI)
            check("X5-13", same, "the JWK is another key than the certificate's")
        else:
            check("TB-05", set(jwk) == members | {"kid"}, f"{sorted(jwk)}")
            check("JW-10", jwk.get("kid"), "no kid")
            kids.append(jwk.get("kid"))
    check("JW-10", len(set(kids)) == len(kids), f"key IDs {kids}")


def encode(data):
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def as_json(value):
    return encode(json.dumps(value, separators=(",", ":")).encode())


def sign(key, algorithm, data):
    digest = {"256": hashes.SHA256(), "384": hashes.SHA384(), "512": hashes.SHA512()}[algorithm[2:5]]
    if isinstance(key, rsa.RSAPrivateKey):
        pss = padding.PSS(padding.MGF1(digest), digest.digest_size)
        return key.sign(data, padding.PKCS1v15() if algorithm[0] == "R" else pss, digest)
    size = (key.curve.key_size + 7) // 8
    return b"".join(number.to_bytes(size) for number in decode_dss_signature(key.sign(data, ec.ECDSA(digest))))


def key_id(key):
    public = key.public_key()
    if isinstance(key, rsa.RSAPrivateKey):
        data = public.public_bytes(DER, serialization.PublicFormat.PKCS1)
    else:
        data = public.public_bytes(DER, SPKI)
    digest = hashes.Hash(hashes.SHA256())
    digest.update(data)
    return encode(digest.finalize())


def forge(document):
    database = sqlite3.connect(f"file:{document['database']}?mode=ro", uri=True)
    query = "SELECT spec FROM resources WHERE kind = 'authority_keys' AND name = 'spiffe'"
    active = json.loads(database.execute(query).fetchone()[0])["active"]
    load = lambda pem: serialization.load_pem_private_key(pem.encode(), None)
    key, signer = load(active["jwt"][0]), load(active["tls"][0]["key"])
    algorithm = "RS256" if isinstance(key, rsa.RSAPrivateKey) else "ES256"
    kid, audience, now = key_id(key), document["audience"], int(time.time())
    subject = f"spiffe://{document['trust_domain']}/svc/forged"
    good_header = {"alg": algorithm, "kid": kid, "typ": "JWT"}
    good_claims = {"sub": subject, "aud": audience, "exp": now + 300, "iat": now}
    tokens = []

    def without(claims, name):
        return {key: value for key, value in claims.items() if key != name}

    def add(clause, what, header=good_header, claims=good_claims, good=False, by=key, using=None, signature=None):
        signed = f"{as_json(header)}.{as_json(claims)}"
        if signature is None:
            signature = sign(by, using or algorithm, signed.encode())
        tokens.append([clause, what, f"{signed}.{encode(signature)}", good])
        return tokens[-1][2]

    # What is in order.
    token = add("WL-19", "a token in order", good=True)
    add("WL-19", "no type", header=without(good_header, "typ"), good=True)
    add("WL-19", "type JOSE", header=good_header | {"typ": "JOSE"}, good=True)
    add("WL-19", "a list of audiences", claims=good_claims | {"aud": ["there", audience]}, good=True)
    add("WL-19", "ended within the leeway", claims=good_claims | {"exp": now - 20}, good=True)
    add("JW-12", "other claims", claims=good_claims | {"https://example.org/x": [1, {"a": None}]}, good=True)
    if algorithm == "RS256":
        for other in ("RS384", "RS512", "PS256", "PS384", "PS512"):
            add("JW-03", other, header=good_header | {"alg": other}, using=other, good=True)

    # Algorithms.
    for name in ("none", "None", "NONE", "nOnE", ""):
        add("JW-03", f"algorithm {name!r}", header=good_header | {"alg": name}, signature=b"")
    add("JW-03", "no algorithm", header=without(good_header, "alg"))
    add("JW-03", "algorithm is no text", header=good_header | {"alg": ["RS256"]})
    public = key.public_key()
    for what, secret in (("its PEM", public.public_bytes(serialization.Encoding.PEM, SPKI)),
                         ("its DER", public.public_bytes(DER, SPKI)), ("nothing", b"")):
        header = good_header | {"alg": "HS256"}
        data = f"{as_json(header)}.{as_json(good_claims)}".encode()
        mac = hmac.digest(secret, data, "sha256")
        add("JW-03", f"HMAC with the public key: {what}", header=header, signature=mac)
    edwards = ed25519.Ed25519PrivateKey.generate()
    header = good_header | {"alg": "EdDSA"}
    data = f"{as_json(header)}.{as_json(good_claims)}".encode()
    add("JW-03", "EdDSA", header=header, signature=edwards.sign(data))

    # Keys.
    stranger = rsa.generate_private_key(65537, 2048)
    curve = ec.generate_private_key(ec.SECP256R1())
    add("WL-19", "no key ID", header=without(good_header, "kid"))
    add("WL-19", "an empty key ID", header=good_header | {"kid": ""})
    add("WL-19", "an unknown key ID", header=good_header | {"kid": "x" * 43})
    add("WL-19", "a stranger's key under our key ID", by=stranger, using="RS256")
    add("WL-19", "a stranger's key and its key ID", header=good_header | {"kid": key_id(stranger)}, by=stranger)
    add("WL-19", "another kind of key under our key ID", header=good_header | {"alg": "ES256"}, by=curve, using="ES256")
    jwk = {"kty": "RSA", "n": encode(stranger.public_key().public_numbers().n.to_bytes(256)), "e": "AQAB"}
    add("WL-19", "a key of its own", header=good_header | {"jwk": jwk}, by=stranger)
    signing = "RS256" if isinstance(signer, rsa.RSAPrivateKey) else "ES256"
    add("JW-11", "signed by the X.509 authority", header=good_header | {"alg": signing, "kid": key_id(signer)}, by=signer,
        using=signing)
    for domain in ("other.example.org", "example.org", "test.example.orgs"):
        add("JW-11", f"of {domain}, signed by us", claims=good_claims | {"sub": f"spiffe://{domain}/svc/forged"})
        add("WL-21", f"of {domain}, which has no bundle", claims=good_claims | {"sub": f"spiffe://{domain}/svc/forged"})

    # Ends.
    add("JW-09", "no end", claims=without(good_claims, "exp"))
    for end in (None, str(now + 300), [now + 300], True, -1, 0, now - 120, now - 3600):
        add("JW-09", f"end {end!r}", claims=good_claims | {"exp": end})
    add("WL-19", "not valid yet", claims=good_claims | {"nbf": now + 3600})

    # Audiences.
    add("JW-09", "no audience", claims=without(good_claims, "aud"))
    for name in (None, "", [], ["there"], "there", f"{audience} ", audience.upper(), {audience: True}, 1, [[audience]]):
        add("JW-09", f"audience {name!r}", claims=good_claims | {"aud": name})

    # Subjects.
    add("WL-19", "no subject", claims=without(good_claims, "sub"))
    for name in (None, "", 1, "somebody", f"spiffe://{document['trust_domain']}", f"spiffe://{document['trust_domain']}/",
                 subject.upper(), subject.replace("test", "TEST"), subject + "/", subject + "?a", subject + "/../x",
                 subject + "%2e", "https://" + subject.removeprefix("spiffe://"), " " + subject, subject + "/" + "a" * 2048):
        add("WL-19", f"subject {str(name)[:80]!r}", claims=good_claims | {"sub": name})

    # Headers.
    add("JW-05", "another type", header=good_header | {"typ": "at+jwt"})
    add("JW-02", "a critical extension", header=good_header | {"crit": ["exp"]})
    add("JW-02", "an unencoded payload", header=good_header | {"b64": False, "crit": ["b64"]})

    # Forms.
    head, body, signature = token.split(".")
    swapped = as_json(good_claims | {"sub": subject + "x"})
    flipped = ("A" if signature[10] != "A" else "B")
    for what, text in (
        ("other claims under the signature", f"{head}.{swapped}.{signature}"),
        ("another signature", f"{head}.{body}.{signature[:10]}{flipped}{signature[11:]}"),
        ("no signature", f"{head}.{body}."),
        ("half a signature", f"{head}.{body}.{signature[:100]}"),
        ("two parts", f"{head}.{body}"),
        ("four parts", f"{token}.{signature}"),
        ("five parts", f"{head}.{body}.{signature}.{signature}.{signature}"),
        ("blanks", f" {token}"),
        ("a line's end", f"{token}\n"),
        ("padding", f"{head}.{body}.{signature}=="),
        ("JSON", json.dumps({"protected": head, "payload": body, "signature": signature})),
        ("JSON, general", json.dumps({"payload": body, "signatures": [{"protected": head, "signature": signature}]})),
        ("dots", ".."),
        ("one dot", "."),
        ("a word", "token"),
        ("zeros", "\0" * 100),
        ("a header that is a list", f"{as_json([good_header])}.{body}.{signature}"),
        ("claims that are a list", f"{head}.{as_json([good_claims])}.{signature}"),
        ("claims that are no JSON", f"{head}.{encode(b'{')}.{signature}"),
        ("deep claims", f"{head}.{encode(b'[' * 10000)}.{signature}"),
    ):
        tokens.append(["JW-01", what, text, False])
    return tokens


command, path = sys.argv[1:]
with open(path, encoding="utf-8") as file:
    document = json.load(file)
if command == "forge":
    print(json.dumps(forge(document)))
else:
    if "x509" in document:
        x509_svids(document)
        jwt_svids(document)
    if "bundle" in document:
        published(document)
    print(json.dumps({"checked": checked, "problems": [[clause, str(text)] for clause, text in problems]}))
