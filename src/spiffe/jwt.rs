//! JWT-SVIDs and the keys that verify them (JWT-SVID.md, SPIFFE Trust Domain and Bundle section 4).

use std::time::{Duration, SystemTime};

use serde_json::{Map, Value, json};

use super::{SpiffeId, TrustDomain};
use crate::crypto::jws::{JwsError, Kind, PublicKey, Token, short};
use crate::crypto::spki_from_pem;

/// How far two clocks may differ.
const LEEWAY: Duration = Duration::from_mins(1);

/// Why a JWT-SVID or a key is not accepted.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum JwtError {
    /// The token is not three base64url parts of JSON, JSON and signature, or is too long.
    #[error("not a compact JWS")]
    Malformed,
    /// The algorithm is not among those that JWT-SVID.md section 2.1 allows.
    #[error("algorithm {:?} is not allowed for JWT-SVIDs", short(.0))]
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

/// The JWT keys of one trust domain.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct JwtBundle {
    keys: Vec<PublicKey>,
}

impl JwtBundle {
    /// Reads public keys in PEM, as a cluster's authority lists them.
    pub fn from_pems<'a>(pems: impl IntoIterator<Item = &'a str>) -> Result<Self, JwtError> {
        let keys = pems
            .into_iter()
            .map(|pem| {
                let spki = spki_from_pem(pem).map_err(|_source| JwtError::Key)?;
                PublicKey::from_spki(&spki).ok_or(JwtError::Key)
            })
            .collect::<Result<_, _>>()?;
        Ok(Self { keys })
    }

    /// Reads the keys of a JWK Set. Those without a `kid`, and those that sign no JWT-SVIDs, are
    /// passed over.
    #[must_use]
    pub fn from_jwks<'a>(keys: impl IntoIterator<Item = &'a Map<String, Value>>) -> Self {
        let keys = keys.into_iter().filter_map(PublicKey::from_jwk);
        let keys = keys.filter(|key| !key.kid().is_empty() && key.kind() != Kind::Ed25519);
        Self {
            keys: keys.collect(),
        }
    }

    /// A JWK Set with `kid` and without `use`, as the Workload API sends it.
    #[must_use]
    pub fn jwks(&self) -> Vec<u8> {
        let keys: Vec<&Map<String, Value>> = self.keys.iter().map(PublicKey::jwk).collect();
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
    let token = Token::parse(token)?;
    if token.header.alg == "EdDSA" || token.header.alg == "Ed25519" {
        return Err(JwtError::Algorithm(token.header.alg));
    }
    // JWT-SVID.md 2.3.
    if !matches!(token.header.typ.as_deref(), None | Some("JWT" | "JOSE")) {
        return Err(JwtError::Header);
    }
    let claims = &token.claims;
    let id: SpiffeId = claims
        .get("sub")
        .and_then(Value::as_str)
        .and_then(|sub| sub.parse().ok())
        .ok_or(JwtError::Subject)?;
    let untrusted = || JwtError::Untrusted(id.trust_domain().to_string());
    let keys = &bundle(id.trust_domain()).ok_or_else(untrusted)?.keys;
    keys.iter()
        .filter(|key| token.header.kid.as_deref() == Some(key.kid()))
        .find(|key| token.is_signed_by(key))
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
        claims: token.claims,
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

impl From<JwsError> for JwtError {
    fn from(error: JwsError) -> Self {
        match error {
            JwsError::Malformed => Self::Malformed,
            JwsError::Algorithm(name) => Self::Algorithm(name),
            JwsError::Critical => Self::Header,
        }
    }
}

#[cfg(test)]
mod tests {
    use base64::Engine as _;
    use base64::engine::general_purpose::URL_SAFE_NO_PAD;

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
            json!({ "alg": "RS256", "kid": bundle(key).keys[0].kid(), "typ": "JWT" }),
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
            let header = json!({ "alg": alg, "kid": bundle.keys[0].kid() });
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
