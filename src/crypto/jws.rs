//! Signed JSON: the public keys of a JWK Set (RFC 7517), and tokens that one of them signed (RFC 7515,
//! RFC 7518). What the claims have to say is left to the caller.

use aws_lc_rs::signature::{
    ECDSA_P256_SHA256_FIXED, ECDSA_P384_SHA384_FIXED, ECDSA_P521_SHA512_FIXED, ED25519,
    RSA_PKCS1_2048_8192_SHA256, RSA_PKCS1_2048_8192_SHA384, RSA_PKCS1_2048_8192_SHA512,
    RSA_PSS_2048_8192_SHA256, RSA_PSS_2048_8192_SHA384, RSA_PSS_2048_8192_SHA512,
    UnparsedPublicKey, VerificationAlgorithm,
};
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use der::asn1::UintRef;
use der::{Decode as _, Encode as _};
use serde::Deserialize;
use serde_json::{Map, Value};
use x509_cert::spki::SubjectPublicKeyInfoRef;

use super::sha256;

/// The longest token that is looked at, in bytes.
pub(crate) const MAX_TOKEN: usize = 64 * 1024;

/// Why a token cannot be read; whether it is believed is another question.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum JwsError {
    /// Not three base64url parts of JSON object, JSON object and signature, or too long.
    #[error("not a compact JWS of at most {MAX_TOKEN} bytes")]
    Malformed,
    /// The algorithm is unknown, or one whose key is no public key: `none`, or HMAC.
    #[error("signature algorithm {:?} is not allowed", short(.0))]
    Algorithm(String),
    /// The header names an extension that has to be understood (`crit`); none is.
    #[error("the header wants an unknown extension understood")]
    Critical,
}

/// The beginning of what a token says, for a message about it: whoever made it may write at length.
pub(crate) fn short(text: &str) -> String {
    text.chars().take(40).collect()
}

/// What a public key can be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// RSA of 2048 bits or more.
    Rsa,
    /// ECDSA on P-256.
    P256,
    /// ECDSA on P-384.
    P384,
    /// ECDSA on P-521.
    P521,
    /// Ed25519.
    Ed25519,
}

/// The curves of ECDSA keys: their names, and the bytes of a coordinate.
const CURVES: &[(&str, Kind, usize)] = &[
    ("P-256", Kind::P256, 32),
    ("P-384", Kind::P384, 48),
    ("P-521", Kind::P521, 66),
];

/// A public key that verifies signatures.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct PublicKey {
    /// Its name; empty if the set does not name it.
    kid: String,
    kind: Kind,
    /// The one algorithm that it is for, where the set says so.
    alg: Option<String>,
    /// PKCS#1 for RSA, the uncompressed point for ECDSA, the point for Ed25519: what the crypto
    /// library reads.
    bytes: Vec<u8>,
    jwk: Map<String, Value>,
}

/// An RSA public key (PKCS#1).
#[derive(der::Sequence)]
struct RsaKey<'a> {
    n: UintRef<'a>,
    e: UintRef<'a>,
}

impl PublicKey {
    /// Reads a `SubjectPublicKeyInfo`; the name is computed as upstream does: over PKCS#1 for RSA,
    /// over the SPKI for the others. `None` for what is neither an RSA nor an ECDSA key.
    pub(crate) fn from_spki(spki: &[u8]) -> Option<Self> {
        let info = SubjectPublicKeyInfoRef::from_der(spki).ok()?;
        let bytes = info.subject_public_key.as_bytes()?;
        if let Ok(key) = RsaKey::from_der(bytes) {
            return Self::rsa(encode(&sha256(bytes)), &key);
        }
        let point = bytes.strip_prefix(&[4])?;
        let (x, y) = point.split_at(point.len() / 2);
        let curve = CURVES.iter().find(|(_, _, length)| *length == x.len())?;
        Self::ec(encode(&sha256(spki)), curve, x, y)
    }

    /// Reads an entry of a JWK Set; `None` if it is of an unknown kind, lacks something, or is not
    /// for signatures.
    pub(crate) fn from_jwk(jwk: &Map<String, Value>) -> Option<Self> {
        let text = |name: &str| jwk.get(name).and_then(Value::as_str);
        let bytes = |name: &str| URL_SAFE_NO_PAD.decode(text(name)?).ok();
        let kid = text("kid").unwrap_or_default().to_owned();
        let key = match text("kty")? {
            "RSA" => {
                let (n, e) = (bytes("n")?, bytes("e")?);
                let (n, e) = (UintRef::new(&n).ok()?, UintRef::new(&e).ok()?);
                Self::rsa(kid, &RsaKey { n, e })?
            }
            "EC" => {
                let name = text("crv")?;
                let curve = CURVES.iter().find(|(known, ..)| *known == name)?;
                Self::ec(kid, curve, &bytes("x")?, &bytes("y")?)?
            }
            "OKP" if text("crv")? == "Ed25519" => Self::ed25519(kid, bytes("x")?)?,
            _ => return None,
        };
        let alg = text("alg").map(str::to_owned);
        Some(Self { alg, ..key })
    }

    fn rsa(kid: String, key: &RsaKey<'_>) -> Option<Self> {
        let (n, e) = (encode(key.n.as_bytes()), encode(key.e.as_bytes()));
        let jwk = [("kty", "RSA".to_owned()), ("n", n), ("e", e)];
        Some(Self::of(kid, Kind::Rsa, key.to_der().ok()?, jwk))
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

    fn ed25519(kid: String, x: Vec<u8>) -> Option<Self> {
        if x.len() != 32 {
            return None;
        }
        let jwk = [
            ("kty", "OKP".to_owned()),
            ("crv", "Ed25519".to_owned()),
            ("x", encode(&x)),
        ];
        Some(Self::of(kid, Kind::Ed25519, x, jwk))
    }

    fn of(
        kid: String,
        kind: Kind,
        bytes: Vec<u8>,
        jwk: impl IntoIterator<Item = (&'static str, String)>,
    ) -> Self {
        let named = Some(("kid", kid.clone())).filter(|(_, kid)| !kid.is_empty());
        let jwk = jwk
            .into_iter()
            .chain(named)
            .map(|(name, text)| (name.to_owned(), Value::String(text)))
            .collect();
        Self {
            kid,
            kind,
            alg: None,
            bytes,
            jwk,
        }
    }

    /// Its name in the set; empty if it has none.
    pub(crate) fn kid(&self) -> &str {
        &self.kid
    }

    /// What it is.
    pub(crate) fn kind(&self) -> Kind {
        self.kind
    }

    /// The key alone, with its name, as an entry of a JWK Set.
    pub(crate) fn jwk(&self) -> &Map<String, Value> {
        &self.jwk
    }
}

/// The header of a token.
#[derive(Debug, Clone, Deserialize)]
pub(crate) struct Header {
    /// The algorithm, as sent.
    pub(crate) alg: String,
    /// The name of the key.
    #[serde(default)]
    pub(crate) kid: Option<String>,
    /// The type of the token.
    #[serde(default)]
    pub(crate) typ: Option<String>,
    #[serde(default)]
    crit: Option<Value>,
}

/// A token in its three parts; nothing in it is to be believed before [`Token::is_signed_by`].
pub(crate) struct Token<'a> {
    /// The first part.
    pub(crate) header: Header,
    /// The second.
    pub(crate) claims: Map<String, Value>,
    kind: Kind,
    algorithm: &'static dyn VerificationAlgorithm,
    signed: &'a str,
    signature: Vec<u8>,
}

impl<'a> Token<'a> {
    /// Takes a compact token apart. An algorithm that is not allowed is found here, before any key
    /// is looked at.
    ///
    /// # Errors
    /// [`JwsError`].
    pub(crate) fn parse(token: &'a str) -> Result<Self, JwsError> {
        if token.len() > MAX_TOKEN {
            return Err(JwsError::Malformed);
        }
        let (signed, signature) = token.rsplit_once('.').ok_or(JwsError::Malformed)?;
        let (header, payload) = signed.split_once('.').ok_or(JwsError::Malformed)?;
        let header: Header = json(header)?;
        let (kind, algorithm) =
            algorithm(&header.alg).ok_or_else(|| JwsError::Algorithm(header.alg.clone()))?;
        // RFC 7515 4.1.11: whoever does not know an extension refuses the token.
        if header.crit.is_some() {
            return Err(JwsError::Critical);
        }
        let claims = json(payload)?;
        let signature = URL_SAFE_NO_PAD
            .decode(signature)
            .map_err(|_source| JwsError::Malformed)?;
        Ok(Self {
            header,
            claims,
            kind,
            algorithm,
            signed,
            signature,
        })
    }

    /// Whether `key` is of the kind that the token's algorithm needs, and made its signature.
    pub(crate) fn is_signed_by(&self, key: &PublicKey) -> bool {
        self.suits(key)
            && UnparsedPublicKey::new(self.algorithm, &key.bytes)
                .verify(self.signed.as_bytes(), &self.signature)
                .is_ok()
    }

    /// Whether `key` can have signed a token of this algorithm.
    pub(crate) fn suits(&self, key: &PublicKey) -> bool {
        let meant = key.alg.as_ref().is_none_or(|alg| *alg == self.header.alg);
        meant && key.kind == self.kind
    }
}

fn encode(bytes: &[u8]) -> String {
    URL_SAFE_NO_PAD.encode(bytes)
}

fn json<T: serde::de::DeserializeOwned>(part: &str) -> Result<T, JwsError> {
    let bytes = URL_SAFE_NO_PAD
        .decode(part)
        .map_err(|_source| JwsError::Malformed)?;
    serde_json::from_slice(&bytes).map_err(|_source| JwsError::Malformed)
}

fn algorithm(name: &str) -> Option<(Kind, &'static dyn VerificationAlgorithm)> {
    Some(match name {
        "RS256" => (Kind::Rsa, &RSA_PKCS1_2048_8192_SHA256),
        "RS384" => (Kind::Rsa, &RSA_PKCS1_2048_8192_SHA384),
        "RS512" => (Kind::Rsa, &RSA_PKCS1_2048_8192_SHA512),
        "PS256" => (Kind::Rsa, &RSA_PSS_2048_8192_SHA256),
        "PS384" => (Kind::Rsa, &RSA_PSS_2048_8192_SHA384),
        "PS512" => (Kind::Rsa, &RSA_PSS_2048_8192_SHA512),
        "ES256" => (Kind::P256, &ECDSA_P256_SHA256_FIXED),
        "ES384" => (Kind::P384, &ECDSA_P384_SHA384_FIXED),
        "ES512" => (Kind::P521, &ECDSA_P521_SHA512_FIXED),
        "EdDSA" | "Ed25519" => (Kind::Ed25519, &ED25519),
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::crypto::{KeyAlgorithm, PrivateKey};

    fn part(value: &Value) -> String {
        encode(value.to_string().as_bytes())
    }

    #[test]
    fn only_signatures_by_public_keys_are_looked_at() {
        let claims = part(&json!({}));
        for alg in ["none", "None", "HS256", "HS512", "", "RS1", "rs256"] {
            let token = format!("{}.{claims}.", part(&json!({"alg": alg})));
            let refused = Token::parse(&token).map(|_| ()).unwrap_err();
            assert_eq!(refused, JwsError::Algorithm(alg.to_owned()));
        }
        let long = JwsError::Algorithm("\u{1}".repeat(20_000)).to_string();
        assert!(long.len() < 1000, "{} bytes", long.len());
        for header in [
            json!({"alg": "RS256", "crit": []}),
            json!({"alg": "RS256", "crit": ["b64"]}),
        ] {
            let token = format!("{}.{claims}.", part(&header));
            assert_eq!(Token::parse(&token).map(|_| ()), Err(JwsError::Critical));
        }
    }

    #[test]
    fn what_is_no_token_is_malformed() {
        let header = part(&json!({"alg": "RS256"}));
        let deep = "[".repeat(1000) + &"]".repeat(1000);
        for token in [
            String::new(),
            "a.b".to_owned(),
            format!("{header}.{}", part(&json!({}))),
            format!("{header}.{}.?", part(&json!({}))),
            format!("{header}.{}.", part(&json!([]))),
            format!(
                "{header}.{}.",
                encode(format!("{{\"a\":{deep}}}").as_bytes())
            ),
            format!("{}.{}.", part(&json!({"kid": "x"})), part(&json!({}))),
            format!("{header}.{}.", "A".repeat(MAX_TOKEN)),
        ] {
            assert_eq!(Token::parse(&token).map(|_| ()), Err(JwsError::Malformed));
        }
    }

    #[test]
    fn a_key_verifies_what_it_signed_and_only_for_its_algorithm() {
        let sign = |key: &PrivateKey, alg: &str| {
            let signed = format!("{}.{}", part(&json!({"alg": alg})), part(&json!({"a": 1})));
            let signature = encode(&key.sign(signed.as_bytes()).unwrap());
            format!("{signed}.{signature}")
        };
        let key = PrivateKey::generate(KeyAlgorithm::Rsa2048).unwrap();
        let public = PublicKey::from_spki(&key.public_spki()).unwrap();
        let token = sign(&key, "RS256");
        assert!(Token::parse(&token).unwrap().is_signed_by(&public));
        // The same bytes under another algorithm are no signature.
        for alg in ["PS256", "RS512", "ES256", "EdDSA"] {
            let token = sign(&key, alg);
            assert!(
                !Token::parse(&token).unwrap().is_signed_by(&public),
                "{alg}"
            );
        }
        let mut jwk = public.jwk().clone();
        jwk.insert("alg".to_owned(), json!("RS512"));
        let other = PublicKey::from_jwk(&jwk).unwrap();
        assert!(!Token::parse(&token).unwrap().is_signed_by(&other));
    }

    #[test]
    fn keys_of_sets_are_read_or_passed_over() {
        let x = encode(&[7; 32]);
        let read = |jwk: Value| PublicKey::from_jwk(jwk.as_object().unwrap()).map(|key| key.kind());
        assert_eq!(
            read(json!({"kty": "OKP", "crv": "Ed25519", "x": x})),
            Some(Kind::Ed25519)
        );
        for jwk in [
            json!({"kty": "oct", "k": x}),
            json!({"kty": "OKP", "crv": "X25519", "x": x}),
            json!({"kty": "OKP", "crv": "Ed25519", "x": "AA"}),
            json!({"kty": "EC", "crv": "P-384", "x": x, "y": x}),
            json!({"kty": "EC", "crv": "secp256k1", "x": x, "y": x}),
            json!({"kty": "RSA", "n": x}),
            json!({}),
        ] {
            assert_eq!(read(jwk.clone()), None, "{jwk}");
        }
    }
}
