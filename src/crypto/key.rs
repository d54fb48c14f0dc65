//! Private keys: generated, read, written and used, whatever their algorithm.

use std::fmt;
use std::sync::Arc;

use aws_lc_rs::encoding::{
    AsBigEndian as _, AsDer as _, Curve25519SeedBin, EcPrivateKeyBin, Pkcs8V1Der, PublicKeyX509Der,
};
use aws_lc_rs::rand::SystemRandom;
use aws_lc_rs::signature::{
    ECDSA_P256_SHA256_ASN1_SIGNING, EcdsaKeyPair, Ed25519KeyPair, KeyPair as _, RSA_PKCS1_SHA256,
    RSA_PKCS1_SHA512, RSA_PSS_SHA256, RsaKeyPair,
};
use aws_lc_rs::{digest, rsa};
use der::asn1::ObjectIdentifier;
use der::{Decode as _, Encode as _, Tagged as _};
use x509_cert::spki::{AlgorithmIdentifierOwned, SubjectPublicKeyInfoOwned};

use super::{KeyAlgorithm, pem, ssh};
use crate::secret::Secret;

const SHA256_WITH_RSA: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.2.840.113549.1.1.11");
const ECDSA_WITH_SHA256: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.2.840.10045.4.3.2");
const ED25519: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.3.101.112");

/// Why a key could not be made, read or used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum KeyError {
    /// The text is not PEM, or its block is no private key.
    #[error("not a PEM private key")]
    NotAKey,
    /// The key is of an algorithm or size that is not used here.
    #[error("unsupported private key (RSA, ECDSA P-256 and Ed25519 are)")]
    Unsupported,
    /// The crypto library refused; the machine has no randomness or the key is damaged.
    #[error("the crypto library failed")]
    Library,
}

/// SHA-256 of `data`.
#[must_use]
pub fn sha256(data: &[u8]) -> [u8; 32] {
    let mut out = [0; 32];
    out.copy_from_slice(digest::digest(&digest::SHA256, data).as_ref());
    out
}

/// SHA-1 of `data`. For formats that demand it and rely on it for nothing.
#[must_use]
pub fn sha1(data: &[u8]) -> [u8; 20] {
    let mut out = [0; 20];
    out.copy_from_slice(digest::digest(&digest::SHA1_FOR_LEGACY_USE_ONLY, data).as_ref());
    out
}

/// SHA-256 of `data` in lower-case hex.
#[must_use]
pub fn sha256_hex(data: &[u8]) -> String {
    hex::encode(sha256(data))
}

enum Pair {
    Rsa(RsaKeyPair),
    Ecdsa(EcdsaKeyPair),
    Ed25519(Ed25519KeyPair),
}

/// A private key. Cloning shares it; `Debug` shows its algorithm only.
#[derive(Clone)]
pub struct PrivateKey {
    algorithm: KeyAlgorithm,
    pkcs8: Arc<Secret<Vec<u8>>>,
    pair: Arc<Pair>,
}

impl fmt::Debug for PrivateKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PrivateKey({:?}, <redacted>)", self.algorithm)
    }
}

impl PrivateKey {
    /// Makes a new key. RSA takes some hundred milliseconds: off the async threads, please.
    ///
    /// # Errors
    /// [`KeyError::Library`] if the system has no randomness.
    pub fn generate(algorithm: KeyAlgorithm) -> Result<Self, KeyError> {
        let library = |_source| KeyError::Library;
        let pkcs8 = match algorithm {
            KeyAlgorithm::Rsa2048 => {
                let pair = RsaKeyPair::generate(rsa::KeySize::Rsa2048).map_err(library)?;
                let der: Pkcs8V1Der<'_> = pair.as_der().map_err(library)?;
                der.as_ref().to_vec()
            }
            KeyAlgorithm::EcdsaP256 => {
                EcdsaKeyPair::generate_pkcs8(&ECDSA_P256_SHA256_ASN1_SIGNING, &SystemRandom::new())
                    .map_err(library)?
                    .as_ref()
                    .to_vec()
            }
            KeyAlgorithm::Ed25519 => {
                let pair = Ed25519KeyPair::generate().map_err(library)?;
                pair.to_pkcs8v1().map_err(library)?.as_ref().to_vec()
            }
        };
        Self::from_pkcs8(&pkcs8)
    }

    /// Reads an unencrypted PKCS#8 document.
    ///
    /// # Errors
    /// [`KeyError::Unsupported`] for other algorithms or damaged documents.
    pub fn from_pkcs8(der: &[u8]) -> Result<Self, KeyError> {
        let (algorithm, pair) =
            if let Ok(pair) = EcdsaKeyPair::from_pkcs8(&ECDSA_P256_SHA256_ASN1_SIGNING, der) {
                (KeyAlgorithm::EcdsaP256, Pair::Ecdsa(pair))
            } else if let Ok(pair) = Ed25519KeyPair::from_pkcs8_maybe_unchecked(der) {
                (KeyAlgorithm::Ed25519, Pair::Ed25519(pair))
            } else if let Ok(pair) = RsaKeyPair::from_pkcs8(der) {
                (KeyAlgorithm::Rsa2048, Pair::Rsa(pair))
            } else {
                return Err(KeyError::Unsupported);
            };
        Ok(Self {
            algorithm,
            pkcs8: Arc::new(Secret::new(der.to_vec())),
            pair: Arc::new(pair),
        })
    }

    /// Reads the first block of a PEM text: PKCS#8 (`PRIVATE KEY`) or PKCS#1 (`RSA PRIVATE KEY`).
    ///
    /// # Errors
    /// [`KeyError::NotAKey`] or [`KeyError::Unsupported`].
    pub fn from_pem(text: &str) -> Result<Self, KeyError> {
        let block = pem::decode_all(text)
            .map_err(|_source| KeyError::NotAKey)?
            .into_iter()
            .next()
            .ok_or(KeyError::NotAKey)?;
        match block.label.as_str() {
            "PRIVATE KEY" => Self::from_pkcs8(&block.der),
            "RSA PRIVATE KEY" => {
                let pair =
                    RsaKeyPair::from_der(&block.der).map_err(|_source| KeyError::Unsupported)?;
                let der: Pkcs8V1Der<'_> = pair.as_der().map_err(|_source| KeyError::Library)?;
                Self::from_pkcs8(der.as_ref())
            }
            _ => Err(KeyError::NotAKey),
        }
    }

    /// The PEM form that a cluster's own agent writes: PKCS#1 for RSA, PKCS#8 for the others.
    #[must_use]
    pub fn to_pem(&self) -> Secret<String> {
        Secret::new(match self.algorithm {
            KeyAlgorithm::Rsa2048 => pem::encode("RSA PRIVATE KEY", &self.pkcs1()),
            KeyAlgorithm::EcdsaP256 | KeyAlgorithm::Ed25519 => {
                pem::encode("PRIVATE KEY", self.pkcs8.expose())
            }
        })
    }

    /// The unencrypted PKCS#8 document.
    #[must_use]
    pub fn pkcs8_der(&self) -> &Secret<Vec<u8>> {
        &self.pkcs8
    }

    /// The algorithm.
    #[must_use]
    pub fn algorithm(&self) -> KeyAlgorithm {
        self.algorithm
    }

    /// The public key as SubjectPublicKeyInfo DER.
    ///
    /// # Panics
    /// Never for a key that this type accepted.
    #[must_use]
    #[expect(clippy::expect_used, reason = "an accepted key has a public half")]
    pub fn public_spki(&self) -> Vec<u8> {
        let der: PublicKeyX509Der<'_> = match self.pair.as_ref() {
            Pair::Rsa(pair) => pair.public_key().as_der(),
            Pair::Ecdsa(pair) => pair.public_key().as_der(),
            Pair::Ed25519(pair) => pair.public_key().as_der(),
        }
        .expect("public key of an accepted pair");
        der.as_ref().to_vec()
    }

    /// The public key as PEM the way join requests carry it: `RSA PUBLIC KEY` (PKCS#1) for RSA,
    /// `PUBLIC KEY` (PKIX) for the others.
    #[must_use]
    pub fn public_pem(&self) -> String {
        match self.pair.as_ref() {
            Pair::Rsa(pair) => pem::encode("RSA PUBLIC KEY", pair.public_key().as_ref()),
            Pair::Ecdsa(_) | Pair::Ed25519(_) => pem::encode("PUBLIC KEY", &self.public_spki()),
        }
    }

    /// The public key as an `authorized_keys` line with its newline and no comment.
    ///
    /// # Errors
    /// [`KeyError::Unsupported`] never happens for keys made here.
    pub fn public_ssh_line(&self) -> Result<String, KeyError> {
        ssh::public_line_of_spki(&self.public_spki()).map_err(|_source| KeyError::Unsupported)
    }

    /// Signs for X.509: SHA-256 with PKCS#1 v1.5 or ECDSA (DER), or Ed25519.
    ///
    /// # Errors
    /// [`KeyError::Library`] if the system has no randomness.
    pub fn sign(&self, message: &[u8]) -> Result<Vec<u8>, KeyError> {
        let library = |_source| KeyError::Library;
        let random = SystemRandom::new();
        match self.pair.as_ref() {
            Pair::Rsa(pair) => {
                let mut out = vec![0; pair.public_modulus_len()];
                pair.sign(&RSA_PKCS1_SHA256, &random, message, &mut out)
                    .map_err(library)?;
                Ok(out)
            }
            Pair::Ecdsa(pair) => Ok(pair
                .sign(&random, message)
                .map_err(library)?
                .as_ref()
                .to_vec()),
            Pair::Ed25519(pair) => Ok(pair.sign(message).as_ref().to_vec()),
        }
    }

    /// Signs with RSA-PSS and SHA-256, with a salt as long as the digest.
    ///
    /// # Errors
    /// [`KeyError::Unsupported`] if this is no RSA key.
    pub fn sign_rsa_pss(&self, message: &[u8]) -> Result<Vec<u8>, KeyError> {
        let Pair::Rsa(pair) = self.pair.as_ref() else {
            return Err(KeyError::Unsupported);
        };
        let mut out = vec![0; pair.public_modulus_len()];
        pair.sign(&RSA_PSS_SHA256, &SystemRandom::new(), message, &mut out)
            .map_err(|_source| KeyError::Library)?;
        Ok(out)
    }

    /// Signs with RSA PKCS#1 v1.5 and SHA-512, as SSH's `rsa-sha2-512` wants.
    ///
    /// # Errors
    /// [`KeyError::Unsupported`] if this is no RSA key.
    pub fn sign_rsa_sha512(&self, message: &[u8]) -> Result<Vec<u8>, KeyError> {
        let Pair::Rsa(pair) = self.pair.as_ref() else {
            return Err(KeyError::Unsupported);
        };
        let mut out = vec![0; pair.public_modulus_len()];
        pair.sign(&RSA_PKCS1_SHA512, &SystemRandom::new(), message, &mut out)
            .map_err(|_source| KeyError::Library)?;
        Ok(out)
    }

    /// The signature algorithm identifier that goes with [`PrivateKey::sign`].
    #[must_use]
    pub fn signature_algorithm(&self) -> AlgorithmIdentifierOwned {
        let (oid, parameters) = match self.algorithm {
            KeyAlgorithm::Rsa2048 => (SHA256_WITH_RSA, Some(der::asn1::Null.into())),
            KeyAlgorithm::EcdsaP256 => (ECDSA_WITH_SHA256, None),
            KeyAlgorithm::Ed25519 => (ED25519, None),
        };
        AlgorithmIdentifierOwned { oid, parameters }
    }

    /// The number or seed that the key is, big-endian, as long as the algorithm has it; `None` for
    /// RSA, whose keys are several numbers.
    pub(super) fn private_number(&self) -> Option<Secret<Vec<u8>>> {
        match self.pair.as_ref() {
            Pair::Rsa(_) => None,
            Pair::Ecdsa(pair) => {
                let number: EcPrivateKeyBin<'_> = pair.private_key().as_be_bytes().ok()?;
                Some(Secret::new(number.as_ref().to_vec()))
            }
            Pair::Ed25519(pair) => {
                let seed: Curve25519SeedBin<'_> = pair.seed().ok()?.as_be_bytes().ok()?;
                Some(Secret::new(seed.as_ref().to_vec()))
            }
        }
    }

    /// The public half as the algorithm writes it: a point, or PKCS#1 for RSA.
    pub(super) fn public_point(&self) -> &[u8] {
        match self.pair.as_ref() {
            Pair::Rsa(pair) => pair.public_key().as_ref(),
            Pair::Ecdsa(pair) => pair.public_key().as_ref(),
            Pair::Ed25519(pair) => pair.public_key().as_ref(),
        }
    }

    /// The PKCS#1 document inside the PKCS#8 one.
    #[expect(clippy::expect_used, reason = "the crypto library wrote the document")]
    fn pkcs1(&self) -> Vec<u8> {
        #[derive(der::Sequence)]
        struct PrivateKeyInfo {
            version: u8,
            algorithm: AlgorithmIdentifierOwned,
            key: der::asn1::OctetString,
        }
        PrivateKeyInfo::from_der(self.pkcs8.expose())
            .expect("PKCS#8 of an accepted pair")
            .key
            .into_bytes()
    }
}

/// Reads a public key given as PEM in either form of [`PrivateKey::public_pem`], whatever its
/// label says, and returns its SubjectPublicKeyInfo DER.
///
/// # Errors
/// [`KeyError::NotAKey`] if neither form fits.
pub fn spki_from_pem(text: &str) -> Result<Vec<u8>, KeyError> {
    let block = pem::decode_all(text)
        .map_err(|_source| KeyError::NotAKey)?
        .into_iter()
        .next()
        .ok_or(KeyError::NotAKey)?;
    if SubjectPublicKeyInfoOwned::from_der(&block.der).is_ok() {
        return Ok(block.der);
    }
    der::asn1::AnyRef::from_der(&block.der)
        .and_then(|pkcs1| pkcs1.tag().assert_eq(der::Tag::Sequence))
        .map_err(|_source| KeyError::NotAKey)?;
    SubjectPublicKeyInfoOwned {
        algorithm: AlgorithmIdentifierOwned {
            oid: ObjectIdentifier::new_unwrap("1.2.840.113549.1.1.1"),
            parameters: Some(der::asn1::Null.into()),
        },
        subject_public_key: der::asn1::BitString::from_bytes(&block.der)
            .map_err(|_source| KeyError::NotAKey)?,
    }
    .to_der()
    .map_err(|_source| KeyError::NotAKey)
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
    fn every_algorithm_round_trips_through_pem() {
        for algorithm in ALL {
            let key = PrivateKey::generate(algorithm).unwrap();
            let text = key.to_pem();
            let label = if algorithm == KeyAlgorithm::Rsa2048 {
                "-----BEGIN RSA PRIVATE KEY-----"
            } else {
                "-----BEGIN PRIVATE KEY-----"
            };
            assert!(text.expose().starts_with(label));
            let again = PrivateKey::from_pem(text.expose()).unwrap();
            assert_eq!(again.algorithm(), algorithm);
            assert_eq!(again.public_spki(), key.public_spki());
        }
    }

    #[test]
    fn public_pem_gives_back_the_spki() {
        for algorithm in ALL {
            let key = PrivateKey::generate(algorithm).unwrap();
            assert_eq!(spki_from_pem(&key.public_pem()).unwrap(), key.public_spki());
        }
        assert_eq!(spki_from_pem("x"), Err(KeyError::NotAKey));
        assert_eq!(
            spki_from_pem(&pem::encode("PUBLIC KEY", b"junk")),
            Err(KeyError::NotAKey)
        );
    }

    #[test]
    fn debug_shows_no_key() {
        let key = PrivateKey::generate(KeyAlgorithm::EcdsaP256).unwrap();
        assert_eq!(format!("{key:?}"), "PrivateKey(EcdsaP256, <redacted>)");
    }

    #[test]
    fn junk_is_refused() {
        assert_eq!(PrivateKey::from_pem("").unwrap_err(), KeyError::NotAKey);
        assert_eq!(
            PrivateKey::from_pem(&pem::encode("PRIVATE KEY", b"junk")).unwrap_err(),
            KeyError::Unsupported
        );
        assert_eq!(
            PrivateKey::from_pem(&pem::encode("CERTIFICATE", b"junk")).unwrap_err(),
            KeyError::NotAKey
        );
    }
}
