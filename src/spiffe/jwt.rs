//! JWT-SVIDs and the keys that verify them (JWT-SVID.md, SPIFFE Trust Domain and Bundle section 4).

use std::time::{Duration, SystemTime};

use aws_lc_rs::signature::{
    ECDSA_P256_SHA256_FIXED, ECDSA_P384_SHA384_FIXED, ECDSA_P521_SHA512_FIXED,
    RSA_PKCS1_2048_8192_SHA256, RSA_PKCS1_2048_8192_SHA384, RSA_PKCS1_2048_8192_SHA512,
    RSA_PSS_2048_8192_SHA256, RSA_PSS_2048_8192_SHA384, RSA_PSS_2048_8192_SHA512,
    UnparsedPublicKey, VerificationAlgorithm,
};
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use der::asn1::UintRef;
use der::{Decode as _, Encode as _};
use serde::Deserialize;
use serde_json::{Map, Value, json};
use x509_cert::spki::SubjectPublicKeyInfoRef;

use super::{SpiffeId, TrustDomain};
use crate::crypto::{sha256, spki_from_pem};

/// How far two clocks may differ.
const LEEWAY: Duration = Duration::from_mins(1);
/// The longest token that is looked at, in bytes.
const MAX_TOKEN: usize = 64 * 1024;

/// Why a JWT-SVID or a key is not accepted.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum JwtError {
    /// The token is not three base64url parts of JSON, JSON and signature, or is too long.
    #[error("not a compact JWS")]
    Malformed,
    /// The algorithm is not among those that JWT-SVID.md section 2.1 allows.
    #[error("algorithm {0:?} is not allowed for JWT-SVIDs")]
    Algorithm(String),
    /// No key of the subject's trust domain verifies the token.
    #[error("no key of trust domain {0} verifies the token")]
    Untrusted(String),
    /// The token is of another type, or wants an extension understood that JWT-SVIDs do not have.
    #[error("the header asks for what JWT-SVIDs do not have")]
    Header,
    /// The subject is no SPIFFE ID.
    #[error("the subject is no SPIFFE ID")]
    Subject,
    /// The token is for someone else.
    #[error("the token is for another audience")]
    Audience,
    /// The token has no end or is past it.
    #[error("the token has expired, or does not say when it does")]
    Expired,
    /// The token begins later.
    #[error("the token is not valid yet: do the clocks agree?")]
    NotYet,
    /// A public key is of a kind that signs no JWT-SVIDs.
    #[error("unsupported JWT key")]
    Key,
}

/// A key that verifies JWT-SVIDs.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Key {
    kid: String,
    kind: Kind,
    /// PKCS#1 for RSA, the uncompressed point for ECDSA: what the crypto library reads.
    bytes: Vec<u8>,
    jwk: Map<String, Value>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Rsa,
    P256,
    P384,
    P521,
}

/// The JWT keys of one trust domain.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct JwtBundle {
    keys: Vec<Key>,
}

impl JwtBundle {
    /// Reads public keys in PEM, as a cluster's authority lists them.
    pub fn from_pems<'a>(pems: impl IntoIterator<Item = &'a str>) -> Result<Self, JwtError> {
        let keys = pems
            .into_iter()
            .map(|pem| Key::new(&spki_from_pem(pem).map_err(|_source| JwtError::Key)?))
            .collect::<Result<_, _>>()?;
        Ok(Self { keys })
    }

    /// Reads the keys of a JWK Set. Those without a `kid`, and those that sign no JWT-SVIDs, are
    /// passed over.
    #[must_use]
    pub fn from_jwks<'a>(keys: impl IntoIterator<Item = &'a Map<String, Value>>) -> Self {
        let keys = keys.into_iter().filter_map(Key::from_jwk).collect();
        Self { keys }
    }

    /// A JWK Set with `kid` and without `use`, as the Workload API sends it.
    #[must_use]
    pub fn jwks(&self) -> Vec<u8> {
        let keys: Vec<&Map<String, Value>> = self.keys.iter().map(|key| &key.jwk).collect();
        json!({ "keys": keys }).to_string().into_bytes()
    }

    /// How many keys there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.keys.len()
    }

    /// Whether there are no keys: no token of the trust domain is valid then.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.keys.is_empty()
    }
}

/// An RSA public key (PKCS#1).
#[derive(der::Sequence)]
struct RsaKey<'a> {
    n: UintRef<'a>,
    e: UintRef<'a>,
}

/// The curves of JWT-SVIDs: their names, and the bytes of a coordinate.
const CURVES: &[(&str, Kind, usize)] = &[
    ("P-256", Kind::P256, 32),
    ("P-384", Kind::P384, 48),
    ("P-521", Kind::P521, 66),
];

fn encode(bytes: &[u8]) -> String {
    URL_SAFE_NO_PAD.encode(bytes)
}

impl Key {
    fn new(spki: &[u8]) -> Result<Self, JwtError> {
        let info = SubjectPublicKeyInfoRef::from_der(spki).map_err(|_source| JwtError::Key)?;
        let bytes = info.subject_public_key.as_bytes().ok_or(JwtError::Key)?;
        // The key ID is computed, not sent: over PKCS#1 for RSA, over the SPKI for the others.
        if let Ok(key) = RsaKey::from_der(bytes) {
            return Self::rsa(encode(&sha256(bytes)), &key).ok_or(JwtError::Key);
        }
        let point = bytes.strip_prefix(&[4]).ok_or(JwtError::Key)?;
        let (x, y) = point.split_at(point.len() / 2);
        let curve = CURVES.iter().find(|(_, _, length)| *length == x.len());
        let curve = curve.ok_or(JwtError::Key)?;
        Self::ec(encode(&sha256(spki)), curve, x, y).ok_or(JwtError::Key)
    }

    /// A key of a JWK Set; `None` if it lacks something, or signs no JWT-SVIDs.
    fn from_jwk(jwk: &Map<String, Value>) -> Option<Self> {
        let text = |name: &str| jwk.get(name).and_then(Value::as_str);
        let bytes = |name: &str| URL_SAFE_NO_PAD.decode(text(name)?).ok();
        let kid = text("kid").filter(|kid| !kid.is_empty())?.to_owned();
        match text("kty")? {
            "RSA" => {
                let (n, e) = (bytes("n")?, bytes("e")?);
                let (n, e) = (UintRef::new(&n).ok()?, UintRef::new(&e).ok()?);
                Self::rsa(kid, &RsaKey { n, e })
            }
            "EC" => {
                let name = text("crv")?;
                let curve = CURVES.iter().find(|(known, ..)| *known == name)?;
                Self::ec(kid, curve, &bytes("x")?, &bytes("y")?)
            }
            _ => None,
        }
    }

    fn rsa(kid: String, key: &RsaKey<'_>) -> Option<Self> {
        let (n, e) = (encode(key.n.as_bytes()), encode(key.e.as_bytes()));
        let jwk = [("kty", "RSA".to_owned()), ("n", n), ("e", e)];
        let bytes = key.to_der().ok()?;
        Some(Self::of(kid, Kind::Rsa, bytes, jwk))
    }

    fn ec(
        kid: String,
        (name, kind, length): &(&str, Kind, usize),
        x: &[u8],
        y: &[u8],
    ) -> Option<Self> {
        if x.len() != *length || y.len() != *length {
            return None;
        }
        let jwk = [
            ("kty", "EC".to_owned()),
            ("crv", (*name).to_owned()),
            ("x", encode(x)),
            ("y", encode(y)),
        ];
        Some(Self::of(kid, *kind, [&[4], x, y].concat(), jwk))
    }

    fn of(
        kid: String,
        kind: Kind,
        bytes: Vec<u8>,
        jwk: impl IntoIterator<Item = (&'static str, String)>,
    ) -> Self {
        let members = jwk.into_iter().chain([("kid", kid.clone())]);
        let jwk = members
            .map(|(name, text)| (name.to_owned(), Value::String(text)))
            .collect();
        Self {
            kid,
            kind,
            bytes,
            jwk,
        }
    }
}

#[derive(Deserialize)]
struct Header {
    alg: String,
    kid: Option<String>,
    typ: Option<String>,
    crit: Option<Value>,
}

/// A verified JWT-SVID.
#[derive(Debug, Clone, PartialEq)]
pub struct JwtSvid {
    /// Whom it names.
    pub id: SpiffeId,
    /// All of its claims.
    pub claims: Map<String, Value>,
    /// When it ends, which is among them.
    pub expires: SystemTime,
}

impl JwtSvid {
    /// Whether `audience` is among those that it is meant for.
    #[must_use]
    pub fn is_for(&self, audience: &str) -> bool {
        match self.claims.get("aud") {
            Some(Value::String(one)) => one == audience,
            Some(Value::Array(several)) => several.iter().any(|one| one == audience),
            _ => false,
        }
    }
}

/// Verifies a token for `audience` with the keys that `bundle` has for its trust domain.
pub fn validate<'a>(
    token: &str,
    audience: &str,
    now: SystemTime,
    bundle: impl FnOnce(&TrustDomain) -> Option<&'a JwtBundle>,
) -> Result<JwtSvid, JwtError> {
    if token.len() > MAX_TOKEN {
        return Err(JwtError::Malformed);
    }
    let (signed, signature) = token.rsplit_once('.').ok_or(JwtError::Malformed)?;
    let (header, payload) = signed.split_once('.').ok_or(JwtError::Malformed)?;
    let header: Header = json_part(header)?;
    let (kind, algorithm) = algorithm(&header.alg)?;
    // JWT-SVID.md 2.3, RFC 7515 4.1.11: whoever does not know an extension refuses the token.
    if header.crit.is_some() || !matches!(header.typ.as_deref(), None | Some("JWT" | "JOSE")) {
        return Err(JwtError::Header);
    }
    let claims: Map<String, Value> = json_part(payload)?;
    let id: SpiffeId = claims
        .get("sub")
        .and_then(Value::as_str)
        .and_then(|sub| sub.parse().ok())
        .ok_or(JwtError::Subject)?;
    let untrusted = || JwtError::Untrusted(id.trust_domain().to_string());
    let keys = &bundle(id.trust_domain()).ok_or_else(untrusted)?.keys;
    let signature = URL_SAFE_NO_PAD
        .decode(signature)
        .map_err(|_source| JwtError::Malformed)?;
    keys.iter()
        .filter(|key| key.kind == kind && header.kid.as_ref() == Some(&key.kid))
        .find(|key| {
            UnparsedPublicKey::new(algorithm, &key.bytes)
                .verify(signed.as_bytes(), &signature)
                .is_ok()
        })
        .ok_or_else(untrusted)?;
    let expires = claims.get("exp").and_then(time).ok_or(JwtError::Expired)?;
    if expires <= now - LEEWAY {
        return Err(JwtError::Expired);
    }
    if let Some(begins) = claims.get("nbf")
        && time(begins).is_none_or(|begins| begins > now + LEEWAY)
    {
        return Err(JwtError::NotYet);
    }
    let svid = JwtSvid {
        id,
        claims,
        expires,
    };
    if !svid.is_for(audience) {
        return Err(JwtError::Audience);
    }
    Ok(svid)
}

/// A `NumericDate` (RFC 7519 2).
fn time(seconds: &Value) -> Option<SystemTime> {
    let since = Duration::try_from_secs_f64(seconds.as_f64()?).ok()?;
    SystemTime::UNIX_EPOCH.checked_add(since)
}

fn json_part<T: serde::de::DeserializeOwned>(part: &str) -> Result<T, JwtError> {
    let bytes = URL_SAFE_NO_PAD
        .decode(part)
        .map_err(|_source| JwtError::Malformed)?;
    serde_json::from_slice(&bytes).map_err(|_source| JwtError::Malformed)
}

fn algorithm(name: &str) -> Result<(Kind, &'static dyn VerificationAlgorithm), JwtError> {
    Ok(match name {
        "RS256" => (Kind::Rsa, &RSA_PKCS1_2048_8192_SHA256),
        "RS384" => (Kind::Rsa, &RSA_PKCS1_2048_8192_SHA384),
        "RS512" => (Kind::Rsa, &RSA_PKCS1_2048_8192_SHA512),
        "PS256" => (Kind::Rsa, &RSA_PSS_2048_8192_SHA256),
        "PS384" => (Kind::Rsa, &RSA_PSS_2048_8192_SHA384),
        "PS512" => (Kind::Rsa, &RSA_PSS_2048_8192_SHA512),
        "ES256" => (Kind::P256, &ECDSA_P256_SHA256_FIXED),
        "ES384" => (Kind::P384, &ECDSA_P384_SHA384_FIXED),
        "ES512" => (Kind::P521, &ECDSA_P521_SHA512_FIXED),
        other => return Err(JwtError::Algorithm(other.to_owned())),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::crypto::{KeyAlgorithm, PrivateKey};

    const NOW: SystemTime = SystemTime::UNIX_EPOCH;

    fn bundle(key: &PrivateKey) -> JwtBundle {
        JwtBundle::from_pems([key.public_pem().as_str()]).unwrap()
    }

    fn token(key: &PrivateKey, header: &Value, claims: &Value) -> String {
        let part = |value: &Value| URL_SAFE_NO_PAD.encode(value.to_string());
        let signed = format!("{}.{}", part(header), part(claims));
        let signature = URL_SAFE_NO_PAD.encode(key.sign(signed.as_bytes()).unwrap());
        format!("{signed}.{signature}")
    }

    fn good(key: &PrivateKey) -> (Value, Value) {
        (
            json!({ "alg": "RS256", "kid": bundle(key).keys[0].kid, "typ": "JWT" }),
            json!({ "sub": "spiffe://td/a", "aud": "x", "exp": 100 }),
        )
    }

    #[test]
    fn a_token_is_accepted_for_its_audience_and_time_only() {
        let key = PrivateKey::generate(KeyAlgorithm::Rsa2048).unwrap();
        let bundle = bundle(&key);
        let (header, claims) = good(&key);
        let check = |header: &Value, claims: &Value, now| {
            validate(&token(&key, header, claims), "x", now, |_| Some(&bundle))
        };
        let accepted = check(&header, &claims, NOW).unwrap();
        assert_eq!(accepted.id.to_string(), "spiffe://td/a");
        assert!(
            check(
                &header,
                &json!({"sub": "spiffe://td/a", "aud": ["y", "x"], "exp": 1e2}),
                NOW
            )
            .is_ok()
        );
        let late = NOW + Duration::from_secs(160);
        assert_eq!(check(&header, &claims, late), Err(JwtError::Expired));
        for (claims, why) in [
            (
                json!({"sub": "spiffe://td/a", "aud": "y", "exp": 100}),
                JwtError::Audience,
            ),
            (
                json!({"sub": "spiffe://td/a", "exp": 100}),
                JwtError::Audience,
            ),
            (
                json!({"sub": "spiffe://td/a", "aud": "x"}),
                JwtError::Expired,
            ),
            (
                json!({"sub": "td/a", "aud": "x", "exp": 100}),
                JwtError::Subject,
            ),
            (
                json!({"sub": "spiffe://td/a", "aud": "x", "exp": 100, "nbf": 61}),
                JwtError::NotYet,
            ),
            (
                json!({"sub": "spiffe://td/a", "aud": "x", "exp": 100, "nbf": "0"}),
                JwtError::NotYet,
            ),
        ] {
            assert_eq!(check(&header, &claims, NOW), Err(why));
        }
        for (name, value) in [
            ("typ", json!("at+jwt")),
            ("crit", json!(["exp"])),
            ("crit", json!([])),
        ] {
            let mut header = header.clone();
            header[name] = value;
            assert_eq!(check(&header, &claims, NOW), Err(JwtError::Header));
        }
        for alg in ["none", "HS256", "EdDSA", ""] {
            let header = json!({ "alg": alg, "kid": bundle.keys[0].kid });
            assert_eq!(
                check(&header, &claims, NOW),
                Err(JwtError::Algorithm(alg.to_owned()))
            );
        }
        let untrusted = Err(JwtError::Untrusted("td".to_owned()));
        assert_eq!(check(&json!({ "alg": "RS256" }), &claims, NOW), untrusted);
        let text = token(&key, &header, &claims);
        assert_eq!(validate(&text, "x", NOW, |_| None), untrusted);
        let tampered = text.replacen('.', ".e30", 1);
        assert!(validate(&tampered, "x", NOW, |_| Some(&bundle)).is_err());
        assert_eq!(
            validate("a.b", "x", NOW, |_| None),
            Err(JwtError::Malformed)
        );
    }

    #[test]
    fn a_key_set_that_was_sent_verifies_what_the_keys_signed() {
        let now = NOW;
        for (algorithm, alg) in [
            (KeyAlgorithm::Rsa2048, "RS256"),
            (KeyAlgorithm::EcdsaP256, "ES256"),
        ] {
            let key = PrivateKey::generate(algorithm).unwrap();
            let sent: Value = serde_json::from_slice(&bundle(&key).jwks()).unwrap();
            let sent: Vec<_> = sent["keys"].as_array().unwrap().iter().collect();
            let read = JwtBundle::from_jwks(sent.iter().filter_map(|key| key.as_object()));
            assert_eq!(read, bundle(&key));
            if alg == "RS256" {
                let (header, claims) = good(&key);
                let token = token(&key, &header, &claims);
                assert!(validate(&token, "x", now, |_| Some(&read)).is_ok());
            }
        }
    }

    #[test]
    fn key_sets_carry_computed_key_ids() {
        for algorithm in [KeyAlgorithm::Rsa2048, KeyAlgorithm::EcdsaP256] {
            let key = PrivateKey::generate(algorithm).unwrap();
            let jwks: Value = serde_json::from_slice(&bundle(&key).jwks()).unwrap();
            assert_eq!(jwks["keys"][0]["kid"].as_str().unwrap().len(), 43);
            assert!(jwks["keys"][0].get("use").is_none());
        }
        let key = PrivateKey::generate(KeyAlgorithm::Ed25519).unwrap();
        assert_eq!(
            JwtBundle::from_pems([key.public_pem().as_str()]),
            Err(JwtError::Key)
        );
    }
}
