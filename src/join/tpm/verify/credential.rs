//! Making a credential that only one TPM can open, and only for one key that is in it (TCG "TPM 2.0
//! Library", part 1, "Credential Protection"; labels and lengths as every TPM's own
//! `TPM2_MakeCredential` has them).

use aws_lc_rs::agreement::{self, ECDH_P256, EphemeralPrivateKey, UnparsedPublicKey};
use aws_lc_rs::cipher::{AES_128, EncryptingKey, EncryptionContext, UnboundCipherKey};
use aws_lc_rs::iv::FixedLength;
use aws_lc_rs::rand::SystemRandom;
use aws_lc_rs::rsa::{OAEP_SHA256_MGF1SHA256, OaepPublicEncryptingKey, PublicEncryptingKey};
use aws_lc_rs::{error::Unspecified, hmac};
use der::Decode as _;
use x509_cert::spki::SubjectPublicKeyInfoRef;

use crate::crypto::tpm::Writer;
use crate::crypto::{random, sha256};

const RSA_ENCRYPTION: &str = "1.2.840.113549.1.1.1";
const EC_PUBLIC_KEY: &str = "1.2.840.10045.2.1";
/// The length of an uncompressed point on P-256 and of its coordinates.
const POINT: usize = 65;
const COORDINATE: usize = 32;

/// A secret wrapped up for one TPM; both parts have their lengths in front.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Credential {
    /// `TPM2B_ID_OBJECT`.
    pub(crate) blob: Vec<u8>,
    /// `TPM2B_ENCRYPTED_SECRET`.
    pub(crate) secret: Vec<u8>,
}

/// The endorsement key is none that credentials can be made for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the endorsement key is neither RSA of 2048 to 8192 bits nor on the curve P-256")]
pub(crate) struct Unusable;

impl From<Unspecified> for Unusable {
    fn from(_: Unspecified) -> Self {
        Self
    }
}

impl Credential {
    /// Wraps `secret` up for the TPM of endorsement key `ek` (SubjectPublicKeyInfo DER) and the key
    /// there of this `name` (algorithm and digest).
    pub(crate) fn make(ek: &[u8], name: &[u8], secret: &[u8]) -> Result<Self, Unusable> {
        let info = SubjectPublicKeyInfoRef::from_der(ek).map_err(|_source| Unusable)?;
        let (seed, wrapped) = match info.algorithm.oid.to_string().as_str() {
            RSA_ENCRYPTION => by_rsa(ek)?,
            EC_PUBLIC_KEY => by_ecdh(info.subject_public_key.as_bytes().ok_or(Unusable)?)?,
            _ => return Err(Unusable),
        };

        let cipher = UnboundCipherKey::new(&AES_128, &kdfa(&seed, b"STORAGE", name, 128)[..16])?;
        let mut identity = Writer::default().sized(secret).done();
        EncryptingKey::cfb128(cipher)?.less_safe_encrypt(
            &mut identity,
            EncryptionContext::Iv128(FixedLength::from([0; 16])),
        )?;
        let key = hmac::Key::new(hmac::HMAC_SHA256, &kdfa(&seed, b"INTEGRITY", b"", 256));
        let integrity = hmac::sign(&key, &[identity.as_slice(), name].concat());
        let object = Writer::default()
            .sized(integrity.as_ref())
            .bytes(&identity)
            .done();
        Ok(Self {
            blob: Writer::default().sized(&object).done(),
            secret: Writer::default().sized(&wrapped).done(),
        })
    }
}

/// A seed, and the same for the holder of an RSA key.
fn by_rsa(ek: &[u8]) -> Result<(Vec<u8>, Vec<u8>), Unusable> {
    // As long as the key of the symmetric cipher of the standard endorsement keys.
    let seed = random::<16>();
    let key = PublicEncryptingKey::from_der(ek).map_err(|_source| Unusable)?;
    let key = OaepPublicEncryptingKey::new(key)?;
    let mut wrapped = vec![0; key.ciphertext_size()];
    let length = key
        .encrypt(
            &OAEP_SHA256_MGF1SHA256,
            &seed,
            &mut wrapped,
            Some(b"IDENTITY\0"),
        )?
        .len();
    wrapped.truncate(length);
    Ok((seed.to_vec(), wrapped))
}

/// A seed agreed on with the holder of a key on P-256, and what the holder needs for that.
fn by_ecdh(ek: &[u8]) -> Result<(Vec<u8>, Vec<u8>), Unusable> {
    let theirs = coordinates(ek)?;
    let key = EphemeralPrivateKey::generate(&ECDH_P256, &SystemRandom::new())?;
    let ours = key.compute_public_key()?;
    let (x, y) = coordinates(ours.as_ref())?;
    let peer = UnparsedPublicKey::new(&ECDH_P256, ek);
    let seed = agreement::agree_ephemeral(key, peer, Unusable, |shared| {
        // KDFe, one round: counter, shared secret, label, both public keys.
        let input = [&[0, 0, 0, 1], shared, b"IDENTITY\0", x, theirs.0].concat();
        Ok(sha256(&input).to_vec())
    })?;
    Ok((seed, Writer::default().sized(x).sized(y).done()))
}

fn coordinates(point: &[u8]) -> Result<(&[u8], &[u8]), Unusable> {
    match point.split_first() {
        Some((4, both)) if point.len() == POINT => {
            both.split_at_checked(COORDINATE).ok_or(Unusable)
        }
        _ => Err(Unusable),
    }
}

/// `KDFa` with SHA-256, one round: enough for 256 bits.
fn kdfa(seed: &[u8], label: &[u8], context: &[u8], bits: u32) -> [u8; 32] {
    let input = [
        &[0, 0, 0, 1],
        label,
        &[0],
        context,
        bits.to_be_bytes().as_slice(),
    ]
    .concat();
    let tag = hmac::sign(&hmac::Key::new(hmac::HMAC_SHA256, seed), &input);
    let mut key = [0; 32];
    key.copy_from_slice(tag.as_ref());
    key
}
