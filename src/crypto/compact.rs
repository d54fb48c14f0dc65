//! Compact JWS (RFC 7515) with the keys of this program: RS256, ES256 or `EdDSA`. The key decides
//! which, never the header of who signed.

use aws_lc_rs::signature::{
    ECDSA_P256_SHA256_FIXED, ED25519, RSA_PKCS1_2048_8192_SHA256, UnparsedPublicKey,
    VerificationAlgorithm,
};
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use der::Decode as _;
use der::asn1::UintRef;
use serde::Deserialize;
use serde_json::json;
use x509_cert::spki::SubjectPublicKeyInfoRef;

use super::{KeyAlgorithm, KeyError, PrivateKey, sha256};

/// The longest document that is looked at, in bytes.
const MAX: usize = 64 * 1024;
/// The bytes of a coordinate on P-256.
const P256: usize = 32;

/// Why a signed document is not accepted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub(crate) enum JwsError {
    /// It is not three base64url parts, is too long, or its header asks for an extension.
    #[error("not a compact JWS")]
    Malformed,
    /// Its algorithm is not the one that goes with the key.
    #[error("its algorithm is not the one of the key")]
    Algorithm,
    /// The key did not sign it.
    #[error("its signature is not by this key")]
    Signature,
    /// The public key is of a kind that signs nothing here.
    #[error("the key is not RSA, ECDSA P-256 or Ed25519")]
    Key,
}

/// Signs `payload` as a JWT would be, with `kid` in the header if there is one.
///
/// # Errors
/// [`KeyError::Library`] if the system has no randomness.
pub(crate) fn sign(
    key: &PrivateKey,
    kid: Option<&str>,
    payload: &[u8],
) -> Result<String, KeyError> {
    let mut header = json!({"alg": algorithm_of(key.algorithm()), "typ": "JWT"});
    if let (Some(kid), Some(header)) = (kid, header.as_object_mut()) {
        header.insert("kid".to_owned(), json!(kid));
    }
    let signed = format!(
        "{}.{}",
        URL_SAFE_NO_PAD.encode(header.to_string()),
        URL_SAFE_NO_PAD.encode(payload)
    );
    let mut signature = key.sign(signed.as_bytes())?;
    if key.algorithm() == KeyAlgorithm::EcdsaP256 {
        signature = fixed(&signature).ok_or(KeyError::Library)?;
    }
    Ok(format!("{signed}.{}", URL_SAFE_NO_PAD.encode(signature)))
}

/// The `kid` of a public key (SubjectPublicKeyInfo DER): the hash of the PKCS#1 form for RSA, of
/// the whole for others (upstream `lib/jwt/jwk.go`).
pub(crate) fn key_id(spki: &[u8]) -> String {
    let hash = match PublicKey::read(spki) {
        Ok(PublicKey {
            alg: "RS256",
            bytes,
            ..
        }) => sha256(&bytes),
        _ => sha256(spki),
    };
    URL_SAFE_NO_PAD.encode(hash)
}

/// A document in its parts, not verified.
#[derive(Debug)]
pub(crate) struct Jws<'a> {
    alg: String,
    kid: Option<String>,
    signed: &'a str,
    payload: Vec<u8>,
    signature: Vec<u8>,
}

#[derive(Deserialize)]
struct Header {
    alg: String,
    kid: Option<String>,
    crit: Option<serde_json::Value>,
}

impl<'a> Jws<'a> {
    /// Takes a document apart.
    ///
    /// # Errors
    /// [`JwsError::Malformed`].
    pub(crate) fn parse(text: &'a str) -> Result<Self, JwsError> {
        if text.len() > MAX {
            return Err(JwsError::Malformed);
        }
        let bytes = |part: &str| {
            let decoded = URL_SAFE_NO_PAD.decode(part);
            decoded.map_err(|_source| JwsError::Malformed)
        };
        let (signed, signature) = text.rsplit_once('.').ok_or(JwsError::Malformed)?;
        let (header, payload) = signed.split_once('.').ok_or(JwsError::Malformed)?;
        let header: Header =
            serde_json::from_slice(&bytes(header)?).map_err(|_source| JwsError::Malformed)?;
        // RFC 7515 4.1.11: whoever does not know an extension refuses the document.
        if header.crit.is_some() {
            return Err(JwsError::Malformed);
        }
        Ok(Self {
            alg: header.alg,
            kid: header.kid,
            signed,
            payload: bytes(payload)?,
            signature: bytes(signature)?,
        })
    }

    /// The name of the key that its header claims.
    pub(crate) fn kid(&self) -> Option<&str> {
        self.kid.as_deref()
    }

    /// What the owner of the key (SubjectPublicKeyInfo DER) signed.
    ///
    /// # Errors
    /// [`JwsError`]; nothing of the document counts then.
    pub(crate) fn verify(&self, spki: &[u8]) -> Result<&[u8], JwsError> {
        let key = PublicKey::read(spki)?;
        if self.alg != key.alg {
            return Err(JwsError::Algorithm);
        }
        UnparsedPublicKey::new(key.algorithm, &key.bytes)
            .verify(self.signed.as_bytes(), &self.signature)
            .map_err(|_source| JwsError::Signature)?;
        Ok(&self.payload)
    }
}

/// A public key as the crypto library reads it, and its algorithm in both spellings.
struct PublicKey {
    alg: &'static str,
    algorithm: &'static dyn VerificationAlgorithm,
    bytes: Vec<u8>,
}

impl PublicKey {
    fn read(spki: &[u8]) -> Result<Self, JwsError> {
        let info = SubjectPublicKeyInfoRef::from_der(spki).map_err(|_source| JwsError::Key)?;
        let bits = info.subject_public_key.as_bytes().ok_or(JwsError::Key)?;
        let (kind, algorithm): (_, &'static dyn VerificationAlgorithm) =
            match (info.algorithm.oid.to_string().as_str(), bits.len()) {
                ("1.2.840.113549.1.1.1", _) => (KeyAlgorithm::Rsa2048, &RSA_PKCS1_2048_8192_SHA256),
                ("1.2.840.10045.2.1", 65) => (KeyAlgorithm::EcdsaP256, &ECDSA_P256_SHA256_FIXED),
                ("1.3.101.112", P256) => (KeyAlgorithm::Ed25519, &ED25519),
                _ => return Err(JwsError::Key),
            };
        Ok(Self {
            alg: algorithm_of(kind),
            algorithm,
            bytes: bits.to_vec(),
        })
    }
}

fn algorithm_of(key: KeyAlgorithm) -> &'static str {
    match key {
        KeyAlgorithm::Rsa2048 => "RS256",
        KeyAlgorithm::EcdsaP256 => "ES256",
        KeyAlgorithm::Ed25519 => "EdDSA",
    }
}

/// An ECDSA signature as JWS wants it (RFC 7518 3.4): two numbers of fixed length instead of DER.
fn fixed(signature: &[u8]) -> Option<Vec<u8>> {
    #[derive(der::Sequence)]
    struct Numbers<'a> {
        r: UintRef<'a>,
        s: UintRef<'a>,
    }
    let Numbers { r, s } = Numbers::from_der(signature).ok()?;
    let mut out = Vec::with_capacity(2 * P256);
    for number in [r.as_bytes(), s.as_bytes()] {
        out.resize(out.len() + P256.checked_sub(number.len())?, 0);
        out.extend_from_slice(number);
    }
    Some(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: [KeyAlgorithm; 3] = [
        KeyAlgorithm::Rsa2048,
        KeyAlgorithm::EcdsaP256,
        KeyAlgorithm::Ed25519,
    ];

    #[test]
    fn every_key_verifies_what_it_signed_and_nothing_else() {
        let keys: Vec<_> = ALL
            .iter()
            .map(|algorithm| PrivateKey::generate(*algorithm).unwrap())
            .collect();
        for (index, key) in keys.iter().enumerate() {
            // Numbers of a signature that begin with zeros come up in a few hundred.
            let rounds = if key.algorithm() == KeyAlgorithm::Rsa2048 {
                2
            } else {
                600
            };
            for round in 0..rounds {
                let text = sign(key, Some("k"), format!("p{round}").as_bytes()).unwrap();
                let jws = Jws::parse(&text).unwrap();
                assert_eq!(jws.kid(), Some("k"));
                let payload = jws.verify(&key.public_spki()).unwrap();
                assert_eq!(payload, format!("p{round}").as_bytes());
            }
            let text = sign(key, None, b"p").unwrap();
            for (other, stranger) in keys.iter().enumerate() {
                let verdict = Jws::parse(&text)
                    .unwrap()
                    .verify(&stranger.public_spki())
                    .map(<[u8]>::to_vec);
                if other == index {
                    assert_eq!(verdict.unwrap(), b"p");
                } else {
                    assert_eq!(verdict.unwrap_err(), JwsError::Algorithm);
                }
            }
            let same_kind = PrivateKey::generate(key.algorithm()).unwrap();
            let jws = Jws::parse(&text).unwrap();
            assert_eq!(
                jws.verify(&same_kind.public_spki()),
                Err(JwsError::Signature)
            );
        }
    }

    #[test]
    fn the_header_does_not_choose_the_algorithm() {
        let key = PrivateKey::generate(KeyAlgorithm::Ed25519).unwrap();
        let text = sign(&key, None, b"payload").unwrap();
        let (_, rest) = text.split_once('.').unwrap();
        for alg in ["none", "HS256", "ES256", "RS256", "eddsa", ""] {
            let header = URL_SAFE_NO_PAD.encode(json!({"alg": alg}).to_string());
            let forged = format!("{header}.{rest}");
            let jws = Jws::parse(&forged).unwrap();
            assert_eq!(
                jws.verify(&key.public_spki()),
                Err(JwsError::Algorithm),
                "{alg}"
            );
        }
    }

    #[test]
    fn what_is_no_jws_is_refused() {
        let key = PrivateKey::generate(KeyAlgorithm::Ed25519).unwrap();
        let good = sign(&key, None, b"payload").unwrap();
        let crit = URL_SAFE_NO_PAD.encode(r#"{"alg":"EdDSA","crit":["b64"]}"#);
        let (_, rest) = good.split_once('.').unwrap();
        let long = format!("{good}{}", "A".repeat(MAX));
        for text in [
            "",
            "a",
            "a.b",
            "a.b.c",
            "..",
            &format!("{good}.x"),
            &format!("{good}="),
            &format!("{crit}.{rest}"),
            &long,
        ] {
            assert_eq!(
                Jws::parse(text).unwrap_err(),
                JwsError::Malformed,
                "{text:.80}"
            );
        }
        assert_eq!(
            Jws::parse(&good).unwrap().verify(b"junk"),
            Err(JwsError::Key)
        );
    }
}
