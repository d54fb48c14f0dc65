"""Verifies a JWT-SVID as a relying party would, with the keys that the cluster publishes.

usage: jwt_svid.py URL_OF_KEYS CA_FILE TOKEN_FILE AUDIENCE; prints the subject.
"""
import ssl
import sys

import jwt

url, authority, path, audience = sys.argv[1:]
keys = jwt.PyJWKClient(url, ssl_context=ssl.create_default_context(cafile=authority))
with open(path, encoding="ascii") as file:
    token = file.read()
assert token == token.strip(), "blanks around the token"
key = keys.get_signing_key_from_jwt(token)
claims = jwt.decode(
    token,
    key.key,
    algorithms=["RS256", "ES256"],
    audience=audience,
    options={"require": ["exp", "iat", "sub", "aud"]},
)
print(claims["sub"])
