//! What is refused, token by token.

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use serde_json::json;

use super::*;
use crate::crypto::jws::PublicKey;
use crate::crypto::{KeyAlgorithm, PrivateKey};

pub(super) const NOW: SystemTime = SystemTime::UNIX_EPOCH;
const ISSUER: &str = "https://issuer.example.com";
const SECOND: Duration = Duration::from_secs(1);

/// A key of an issuer.
pub(super) struct Signer {
    key: PrivateKey,
    kid: String,
}

impl Signer {
    pub(super) fn new(kid: &str) -> Self {
        Self {
            key: PrivateKey::generate(KeyAlgorithm::Rsa2048).unwrap(),
            kid: kid.to_owned(),
        }
    }

    pub(super) fn jwk(&self) -> Value {
        let key = PublicKey::from_spki(&self.key.public_spki()).unwrap();
        let mut jwk = key.jwk().clone();
        jwk.insert("kid".to_owned(), json!(self.kid));
        Value::Object(jwk)
    }

    pub(super) fn set(&self) -> Value {
        json!({ "keys": [self.jwk()] })
    }

    fn sign(&self, header: &Value, claims: &Value) -> String {
        let part = |value: &Value| URL_SAFE_NO_PAD.encode(value.to_string());
        let signed = format!("{}.{}", part(header), part(claims));
        let signature = URL_SAFE_NO_PAD.encode(self.key.sign(signed.as_bytes()).unwrap());
        format!("{signed}.{signature}")
    }

    pub(super) fn token(&self, claims: &Value) -> String {
        self.sign(&json!({"alg": "RS256", "kid": self.kid}), claims)
    }
}

/// Claims of a token for `audience` that lives from 100 s to 400 s.
pub(super) fn claims(issuer: &str, audience: &Value) -> Value {
    json!({"iss": issuer, "sub": "job", "aud": audience, "iat": 100, "nbf": 100, "exp": 400})
}

fn expected() -> Expected<'static> {
    Expected {
        issuer: Some(ISSUER),
        audience: "us",
        authorized_party: true,
    }
}

fn parsed(set: &Value) -> KeySet {
    KeySet::parse(set.to_string().as_bytes()).unwrap()
}

#[test]
fn claims_count_for_issuer_audience_and_time() {
    let signer = Signer::new("k");
    let keys = parsed(&signer.set());
    let check = |claims: &Value, at: u32| {
        let token = signer.token(claims);
        verify(&token, &keys, &expected(), NOW + at * SECOND).map_err(|e| e.to_string())
    };
    let good = claims(ISSUER, &json!("us"));
    for at in [90, 100, 399, 409] {
        let found = check(&good, at).unwrap();
        assert_eq!(text(&found, "sub"), Some("job"));
        assert_eq!(expiry(&found), Some(NOW + 400 * SECOND));
    }
    let with = |name: &str, value: Value| {
        let mut claims = good.clone();
        claims[name] = value;
        claims
    };
    let without = |name: &str| {
        let mut claims = good.clone();
        claims.as_object_mut().unwrap().remove(name);
        claims
    };
    assert!(check(&without("nbf"), 100).is_ok());
    assert!(check(&with("azp", json!("us")), 100).is_ok());
    let several = with("aud", json!(["them", "us"]));
    let ours = {
        let mut claims = several.clone();
        claims["azp"] = json!("us");
        claims
    };
    assert!(check(&ours, 100).is_ok());
    for (claims, at, complaint) in [
        (good.clone(), 410, "it expired 10 s ago"),
        (good.clone(), 89, "it is valid only 11 s from now"),
        (with("nbf", json!(200)), 150, "it is valid only 50 s"),
        (with("iat", json!(200)), 150, "it is valid only 50 s"),
        (without("exp"), 150, "\"exp\" is missing"),
        (
            with("exp", json!("400")),
            150,
            "\"exp\" is missing or malformed",
        ),
        (
            with("exp", json!(-1)),
            150,
            "\"exp\" is missing or malformed",
        ),
        (
            with("exp", json!(1e300)),
            150,
            "\"exp\" is missing or malformed",
        ),
        (
            with("nbf", json!(null)),
            150,
            "\"nbf\" is missing or malformed",
        ),
        (without("iat"), 150, "\"iat\" is missing"),
        (without("sub"), 150, "\"sub\" is missing"),
        (with("sub", json!("")), 150, "\"sub\" is missing"),
        (without("iss"), 150, "\"iss\" is missing"),
        (
            with("iss", json!("https://issuer.example.com/")),
            150,
            "issued by",
        ),
        (
            with("iss", json!("https://evil.example.com")),
            150,
            "issued by",
        ),
        (without("aud"), 150, "its audience is []"),
        (
            with("aud", json!("them")),
            150,
            "its audience is [\"them\"], but it has to be \"us\"",
        ),
        (with("aud", json!({"us": 1})), 150, "its audience is []"),
        (several, 150, "it has several audiences"),
        (with("azp", json!("them")), 150, "authorized party"),
    ] {
        let problem = check(&claims, at).unwrap_err();
        assert!(problem.contains(complaint), "{claims}: {problem}");
    }
}

#[test]
fn a_provider_may_put_other_things_into_azp_and_pinned_keys_tell_the_issuer() {
    let signer = Signer::new("k");
    let keys = parsed(&signer.set());
    let mut claims = claims("https://elsewhere.example.com", &json!("us"));
    claims["azp"] = json!("12345");
    let loose = Expected {
        issuer: None,
        audience: "us",
        authorized_party: false,
    };
    let now = NOW + 150 * SECOND;
    assert!(verify(&signer.token(&claims), &keys, &loose, now).is_ok());
}

#[test]
fn signatures_of_others_and_of_secrets_are_refused() {
    let (signer, other) = (Signer::new("k"), Signer::new("k"));
    let now = NOW + 150 * SECOND;
    let good = claims(ISSUER, &json!("us"));
    let refused = |token: &str, set: &Value| {
        let keys = parsed(set);
        verify(token, &keys, &expected(), now)
            .unwrap_err()
            .to_string()
    };
    let set = signer.set();
    let problem = refused(&other.token(&good), &set);
    assert!(problem.contains("not the issuer's"), "{problem}");
    let token = signer.token(&good);
    let (head, rest) = token.split_once('.').unwrap();
    let (_, signature) = rest.split_once('.').unwrap();
    let mut forged = good.clone();
    forged["sub"] = json!("admin");
    let body = URL_SAFE_NO_PAD.encode(forged.to_string());
    let problem = refused(&format!("{head}.{body}.{signature}"), &set);
    assert!(problem.contains("not the issuer's"), "{problem}");
    let renamed = signer.sign(&json!({"alg": "RS256", "kid": "other"}), &good);
    assert!(refused(&renamed, &set).contains("no key \"other\""));
    // Whoever takes the algorithm from the token would take the public key for a shared secret.
    let public = signer.key.public_pem();
    for alg in ["HS256", "HS384", "HS512"] {
        let head = URL_SAFE_NO_PAD.encode(json!({"alg": alg, "kid": "k"}).to_string());
        let body = URL_SAFE_NO_PAD.encode(good.to_string());
        let signed = format!("{head}.{body}");
        let key = aws_lc_rs::hmac::Key::new(aws_lc_rs::hmac::HMAC_SHA256, public.as_bytes());
        let tag = aws_lc_rs::hmac::sign(&key, signed.as_bytes());
        let token = format!("{signed}.{}", URL_SAFE_NO_PAD.encode(tag.as_ref()));
        assert!(refused(&token, &set).contains("not allowed"), "{alg}");
    }
    let unsigned = signer.sign(&json!({"alg": "none"}), &good);
    let (unsigned, _) = unsigned.rsplit_once('.').unwrap();
    assert!(refused(&format!("{unsigned}."), &set).contains("\"none\" is not allowed"));
    let long = signer.token(&json!({"x": "a".repeat(70_000)}));
    assert!(refused(&long, &set).contains("not a compact JWS"));
}

#[test]
fn a_token_without_a_key_id_needs_one_key_that_fits() {
    let (signer, other) = (Signer::new("k"), Signer::new("l"));
    let now = NOW + 150 * SECOND;
    let token = signer.sign(&json!({"alg": "RS256"}), &claims(ISSUER, &json!("us")));
    let check = |set: &Value| verify(&token, &parsed(set), &expected(), now).map(|_| ());
    assert!(check(&signer.set()).is_ok());
    let both = json!({"keys": [signer.jwk(), other.jwk()]});
    assert!(matches!(
        check(&both),
        Err(OidcError::Keys(KeysError::Unnamed))
    ));
}

#[test]
fn key_sets_are_bounded_and_hold_keys_for_signatures() {
    let jwk = Signer::new("k").jwk();
    let with = |name: &str, value: Value| {
        let mut jwk = jwk.clone();
        jwk[name] = value;
        json!({"keys": [jwk]})
    };
    for set in [
        with("use", json!("sig")),
        with("alg", json!("RS256")),
        with("key_ops", json!(["verify"])),
    ] {
        assert!(KeySet::parse(set.to_string().as_bytes()).is_ok(), "{set}");
    }
    for (set, complaint) in [
        (with("use", json!("enc")).to_string(), "no usable key"),
        (
            with("key_ops", json!(["sign"])).to_string(),
            "no usable key",
        ),
        (with("kty", json!("oct")).to_string(), "no usable key"),
        (json!({"keys": []}).to_string(), "no usable key"),
        (json!({"keys": [1, null]}).to_string(), "no usable key"),
        (json!({"keys": vec![&jwk; 257]}).to_string(), "longer than"),
        (" ".repeat(keys::MAX_SET + 1), "longer than"),
        ("<html>".to_owned(), "no JSON Web Key Set"),
        ("{}".to_owned(), "no JSON Web Key Set"),
    ] {
        let problem = KeySet::parse(set.as_bytes()).unwrap_err().to_string();
        assert!(problem.contains(complaint), "{problem}");
    }
}
