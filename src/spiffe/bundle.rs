//! SPIFFE bundle documents: the keys of one trust domain, for its X.509- and its JWT-SVIDs
//! (`SPIFFE_Trust_Domain_and_Bundle.md` section 4).

use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use serde::Deserialize;
use serde_json::{Map, Value};

use super::jwt::JwtBundle;
use crate::crypto::x509::Certificate;

/// The longest document that is read, in bytes.
pub const MAX_DOCUMENT: usize = 1024 * 1024;
/// The most keys that are looked at. Trust domains have a handful.
const MAX_KEYS: usize = 1024;
/// The values of `kty` that are understood (RFC 7518 section 6, RFC 8037).
const KEY_TYPES: &[&str] = &["RSA", "EC", "OKP"];

/// Why a document is no SPIFFE bundle.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum DocumentError {
    /// It is longer than [`MAX_DOCUMENT`].
    #[error("the document has {0} bytes, more than {MAX_DOCUMENT}")]
    TooLong(usize),
    /// It holds more keys than anybody needs.
    #[error("the document has {0} keys, more than {MAX_KEYS}")]
    TooMany(usize),
    /// It is no JSON object with a list `keys`, or a number in it is none.
    #[error("not a JSON Web Key Set: {0}")]
    Json(String),
    /// An `x5c` holds something else than a certificate; counted from zero.
    #[error("the X.509 entry at position {0} holds no DER certificate in standard base64")]
    Certificate(usize),
}

/// What a bundle document says. A bundle without keys is valid: nothing of its trust domain is to
/// be believed then.
#[derive(Debug, Clone, Default)]
pub struct Document {
    /// The authorities of X.509-SVIDs, each once.
    pub authorities: Vec<Certificate>,
    /// The keys of JWT-SVIDs.
    pub jwt: JwtBundle,
    /// How soon the publisher wants to be asked again; `None` if it does not say.
    pub refresh_hint: Option<Duration>,
    /// Grows with every change; `None` if the publisher does not number its bundles.
    pub sequence: Option<u64>,
}

#[derive(Deserialize)]
struct Outer {
    keys: Vec<Value>,
    #[serde(default)]
    spiffe_refresh_hint: Option<u64>,
    #[serde(default)]
    spiffe_sequence: Option<u64>,
}

impl Document {
    /// Reads a document.
    ///
    /// Entries of an unknown `kty`, without a known `use`, without their key, or without what
    /// identifies it are passed over, as the standard wants; an entry with a damaged certificate
    /// makes the whole unusable, because nobody can tell what it was to be.
    ///
    /// # Errors
    /// [`DocumentError`].
    pub fn parse(text: &[u8]) -> Result<Self, DocumentError> {
        if text.len() > MAX_DOCUMENT {
            return Err(DocumentError::TooLong(text.len()));
        }
        let outer: Outer = serde_json::from_slice(text)
            .map_err(|source| DocumentError::Json(source.to_string()))?;
        if outer.keys.len() > MAX_KEYS {
            return Err(DocumentError::TooMany(outer.keys.len()));
        }
        let mut authorities: Vec<Certificate> = Vec::new();
        let mut jwt = Vec::new();
        for (position, key) in outer.keys.iter().enumerate() {
            let Some(key) = key.as_object().filter(|key| is_understood(key)) else {
                continue;
            };
            match member(key, "use") {
                "x509-svid" => {
                    let Some(found) = certificate(key, position)? else {
                        continue;
                    };
                    if authorities.iter().all(|known| known.der() != found.der()) {
                        authorities.push(found);
                    }
                }
                "jwt-svid" => jwt.push(key),
                _ => {}
            }
        }
        Ok(Self {
            authorities,
            jwt: JwtBundle::from_jwks(jwt),
            refresh_hint: outer.spiffe_refresh_hint.map(Duration::from_secs),
            sequence: outer.spiffe_sequence,
        })
    }

    /// The authorities' certificates, DER, one after the other: the form of the Workload API.
    #[must_use]
    pub fn x509(&self) -> Bytes {
        let ders = self.authorities.iter().flat_map(Certificate::der);
        ders.copied().collect()
    }
}

fn is_understood(key: &Map<String, Value>) -> bool {
    KEY_TYPES.contains(&member(key, "kty"))
}

/// A member that is text; empty if it is not.
fn member<'a>(key: &'a Map<String, Value>, name: &str) -> &'a str {
    key.get(name).and_then(Value::as_str).unwrap_or_default()
}

/// The first certificate of `x5c`, the only one that counts; `None` without any.
fn certificate(
    key: &Map<String, Value>,
    position: usize,
) -> Result<Option<Certificate>, DocumentError> {
    let first = match key.get("x5c") {
        None | Some(Value::Null) => return Ok(None),
        Some(Value::Array(several)) => match several.first() {
            None => return Ok(None),
            Some(first) => first.as_str(),
        },
        Some(_) => None,
    };
    first
        .and_then(|first| STANDARD.decode(first).ok())
        .and_then(|der| Certificate::from_der(&der).ok())
        .map(Some)
        .ok_or(DocumentError::Certificate(position))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::crypto::pem;
    use crate::identity::fixtures;

    /// A certificate, DER.
    fn authority(name: &str) -> Vec<u8> {
        let pem = fixtures::Authority::new(name).pem;
        pem::certificates(&pem).unwrap().remove(0)
    }

    fn x509(der: &[u8]) -> Value {
        json!({ "use": "x509-svid", "kty": "EC", "x5c": [STANDARD.encode(der)] })
    }

    fn parse(document: &Value) -> Result<Document, DocumentError> {
        Document::parse(document.to_string().as_bytes())
    }

    #[test]
    fn a_real_clusters_document_is_read() {
        // Recorded from a Teleport 18.0.0 cluster, shortened to the kinds of its members.
        let authority = authority("a");
        let n = "7c7iySBY49gsjBEop_45F4K9XKoALgaEnGYO1aUk6cQsO7z8Eyc3PmybcMKg-YgN03s3Wsr81WviMgrEsUoUccL4cNGv-Msv-RwZX_PlRdTnQv5321nMz3Xv6EyFHr0zF5ReMu_4V9T1g4Ze5YAJb6FvdkM8S944dNs5eN_ZrugsMPQx2PN-_UwLifoRXLqSNYdBSJvcVqUd3t1hdM8JpeUhOjzOiokqsQjbTmAoNy65ZQcc1GUCW2JbKYm1bYGrvPsH2FtLvy8NyfbbCr2Qwq69MLc1MS40L8ZD7G31aEN7pWB07LCW7mTg2NkH05apzS667u17kJkFwVkpEYCk7w";
        let document = parse(&json!({
            "keys": [
                x509(&authority),
                { "use": "jwt-svid", "kty": "RSA", "kid": "k", "n": n, "e": "AQAB" },
            ],
            "spiffe_refresh_hint": 300,
        }))
        .unwrap();
        assert_eq!(&document.x509()[..], authority);
        assert_eq!(document.refresh_hint, Some(Duration::from_mins(5)));
        assert_eq!(document.sequence, None);
        let jwks: Value = serde_json::from_slice(&document.jwt.jwks()).unwrap();
        assert_eq!(
            jwks,
            json!({ "keys": [{ "kty": "RSA", "kid": "k", "n": n, "e": "AQAB" }] })
        );
    }

    #[test]
    fn entries_that_say_nothing_to_us_are_passed_over() {
        let authority = authority("a");
        let encoded = STANDARD.encode(&authority);
        for entry in [
            json!(null),
            json!("text"),
            json!({}),
            json!({ "use": "x509-svid", "x5c": [encoded] }),
            json!({ "use": "x509-svid", "kty": "quantum", "x5c": [encoded] }),
            json!({ "use": "x509-svid", "kty": ["EC"], "x5c": [encoded] }),
            json!({ "kty": "EC", "x5c": [encoded] }),
            json!({ "use": "X509-SVID", "kty": "EC", "x5c": [encoded] }),
            json!({ "use": "wit-svid", "kty": "EC", "kid": "w" }),
            json!({ "use": 7, "kty": "EC", "x5c": [encoded] }),
            json!({ "use": "x509-svid", "kty": "EC" }),
            json!({ "use": "x509-svid", "kty": "EC", "x5c": [] }),
            json!({ "use": "jwt-svid", "kty": "RSA", "n": "AQ", "e": "AQAB" }),
            json!({ "use": "jwt-svid", "kty": "RSA", "kid": "", "n": "AQ", "e": "AQAB" }),
            json!({ "use": "jwt-svid", "kty": "RSA", "kid": "k", "e": "AQAB" }),
            json!({ "use": "jwt-svid", "kty": "EC", "kid": "k", "crv": "P-256", "x": "AQ", "y": "AQ" }),
            json!({ "use": "jwt-svid", "kty": "EC", "kid": "k", "crv": "secp256k1", "x": "AQ", "y": "AQ" }),
            json!({ "use": "jwt-svid", "kty": "OKP", "kid": "k", "crv": "Ed25519", "x": "AQ" }),
        ] {
            let document = parse(&json!({ "keys": [entry, x509(&authority)] })).unwrap();
            assert_eq!(&document.x509()[..], authority, "{entry}");
            assert!(document.jwt.is_empty(), "{entry}");
        }
    }

    #[test]
    fn only_the_first_certificate_of_an_entry_counts() {
        let (first, second) = (authority("a"), authority("b"));
        let both = [STANDARD.encode(&first), STANDARD.encode(&second)];
        let entry = json!({ "use": "x509-svid", "kty": "EC", "x5c": both });
        let document = parse(&json!({ "keys": [entry, x509(&first)] })).unwrap();
        assert_eq!(&document.x509()[..], first);
    }

    #[test]
    fn what_is_no_bundle_is_refused() {
        let pem = fixtures::Authority::new("a").pem;
        for bad in [
            json!([]),
            json!({}),
            json!({ "keys": null }),
            json!({ "keys": {} }),
            json!({ "keys": [], "spiffe_sequence": -1 }),
            json!({ "keys": [], "spiffe_sequence": 1.5 }),
            json!({ "keys": [], "spiffe_refresh_hint": "300" }),
            json!({ "keys": [{ "use": "x509-svid", "kty": "EC", "x5c": [pem] }] }),
            json!({ "keys": [{ "use": "x509-svid", "kty": "EC", "x5c": ["MAA="] }] }),
            json!({ "keys": [{ "use": "x509-svid", "kty": "EC", "x5c": [1] }] }),
            json!({ "keys": [{ "use": "x509-svid", "kty": "EC", "x5c": "MAA=" }] }),
            json!({ "keys": vec![json!({}); MAX_KEYS + 1] }),
        ] {
            assert!(parse(&bad).is_err(), "{bad}");
        }
        for bad in ["", "{", "{\"keys\":[],\"keys\":[]}", "{\"keys\":[]} x"] {
            assert!(Document::parse(bad.as_bytes()).is_err(), "{bad}");
        }
        let long = format!("{{\"keys\":[]}}{}", " ".repeat(MAX_DOCUMENT));
        assert!(matches!(
            Document::parse(long.as_bytes()),
            Err(DocumentError::TooLong(_))
        ));
        let deep = format!("{{\"keys\":[{}]}}", "[".repeat(100_000));
        assert!(Document::parse(deep.as_bytes()).is_err());
    }

    #[test]
    fn an_emptied_bundle_is_a_bundle() {
        let document =
            parse(&json!({ "keys": [], "spiffe_sequence": 18_446_744_073_709_551_615_u64 }));
        let document = document.unwrap();
        assert!(document.x509().is_empty() && document.jwt.is_empty());
        assert_eq!(document.sequence, Some(u64::MAX));
    }
}
