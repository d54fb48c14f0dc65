"""Verifies a JWT-SVID as a relying party of OpenID Connect would: with what the issuer publishes.

usage: jwt_svid.py URL_OF_ISSUER CA_FILE TOKEN_FILE AUDIENCE; prints the subject.
"""
import json
import ssl
import sys
import urllib.request

import jwt

issuer, authority, path, audience = sys.argv[1:]
context = ssl.create_default_context(cafile=authority)
with urllib.request.urlopen(f"{issuer}/.well-known/openid-configuration", context=context) as answer:
    discovered = json.load(answer)
assert discovered["issuer"] == issuer, discovered
keys = jwt.PyJWKClient(discovered["jwks_uri"], ssl_context=context)
with open(path, encoding="ascii") as file:
    token = file.read()
assert token == token.strip(), "blanks around the token"
key = keys.get_signing_key_from_jwt(token)
claims = jwt.decode(
    token,
    key.key,
    algorithms=discovered["id_token_signing_alg_values_supported"],
    audience=audience,
    issuer=issuer,
    options={"require": ["iss", "exp", "iat", "sub", "aud", "jti"]},
)
assert set(discovered["claims"]) <= set(claims), claims
print(claims["sub"])
