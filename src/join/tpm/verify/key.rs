//! What a new attestation key must be: made inside a TPM, bound to it for good, and able to sign
//! nothing but what the TPM itself says. Without that, anyone could forge what such a key attests.

use aws_lc_rs::signature::{
    ECDSA_P256_SHA256_FIXED, RSA_PKCS1_2048_8192_SHA256, RsaPublicKeyComponents, UnparsedPublicKey,
};

use crate::crypto::sha256;
use crate::crypto::tpm::{Key, Malformed, P256, Public, Reader, alg};

/// What only a TPM writes at the start of what it signs (`TPM_GENERATED_VALUE`).
const GENERATED: u32 = 0xff54_4347;
/// `TPM_ST_ATTEST_CREATION`.
const CREATION: u16 = 0x801a;
/// Bits of `TPMA_OBJECT`.
const FIXED_TPM: u32 = 1 << 1;
const FIXED_PARENT: u32 = 1 << 4;
const SENSITIVE_DATA_ORIGIN: u32 = 1 << 5;
const RESTRICTED: u32 = 1 << 16;
const DECRYPT: u32 = 1 << 17;
const SIGN: u32 = 1 << 18;
const MIN_RSA_BITS: u16 = 2048;

/// Why an attestation key is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(crate) enum KeyError {
    /// A part is not the structure that it should be.
    #[error("malformed {0}")]
    Malformed(&'static str),
    /// The algorithm is none of those that are trusted.
    #[error(
        "the attestation key must be RSA of at least {MIN_RSA_BITS} bits (RSASSA) or P-256 (ECDSA), with SHA-256"
    )]
    Algorithm,
    /// The key's attributes allow it to leave the TPM or to have come from elsewhere.
    #[error(
        "the attestation key is not limited to attestation: it has to be fixedTPM, fixedParent, sensitiveDataOrigin, restricted and sign, and not decrypt"
    )]
    Attributes,
    /// The attestation does not begin as one of a TPM does, or attests something else.
    #[error("the creation attestation was not produced by a TPM for a creation")]
    NotCreation,
    /// The attestation is of another creation.
    #[error("the creation attestation does not belong to the creation data")]
    CreationData,
    /// The attestation names another key.
    #[error("the creation attestation refers to a different key")]
    Name,
    /// The signature is not the key's.
    #[error("the signature of the creation attestation does not verify")]
    Signature,
}

/// Checks what an agent sent of its new key; gives the key's name, algorithm and digest.
pub(crate) fn check(
    public: &[u8],
    creation_data: &[u8],
    attest: &[u8],
    signature: &[u8],
) -> Result<Vec<u8>, KeyError> {
    let malformed = |what| move |_: Malformed| KeyError::Malformed(what);
    let key = Public::read(public).map_err(malformed("public area"))?;
    read_creation_data(creation_data).map_err(malformed("creation data"))?;
    let attested = Attested::read(attest).map_err(malformed("creation attestation"))?;

    if key.name_alg != alg::SHA256 {
        return Err(KeyError::Algorithm);
    }
    let wanted = FIXED_TPM | FIXED_PARENT | SENSITIVE_DATA_ORIGIN | RESTRICTED | SIGN;
    if key.attributes & (wanted | DECRYPT) != wanted {
        return Err(KeyError::Attributes);
    }
    if attested.magic != GENERATED || attested.kind != CREATION {
        return Err(KeyError::NotCreation);
    }
    let (name, creation_hash) = attested
        .creation()
        .map_err(malformed("creation attestation"))?;
    if creation_hash != sha256(creation_data) {
        return Err(KeyError::CreationData);
    }
    let real = [alg::SHA256.to_be_bytes().as_slice(), &sha256(public)].concat();
    if name != real {
        return Err(KeyError::Name);
    }
    verify(&key, attest, signature)?;
    Ok(real)
}

/// `TPMS_ATTEST` without what is the same for all kinds and not looked at.
struct Attested<'a> {
    magic: u32,
    kind: u16,
    what: Reader<'a>,
}

impl<'a> Attested<'a> {
    fn read(bytes: &'a [u8]) -> Result<Self, Malformed> {
        let mut reader = Reader::new(bytes);
        let magic = reader.u32()?;
        let kind = reader.u16()?;
        // Signer, the caller's data, clock (time, two counters, a flag) and firmware version.
        reader.sized()?;
        reader.sized()?;
        reader.take(8 + 4 + 4 + 1 + 8)?;
        Ok(Self {
            magic,
            kind,
            what: reader,
        })
    }

    /// The created key's name and the hash of its creation data.
    fn creation(mut self) -> Result<(&'a [u8], &'a [u8]), Malformed> {
        let (name, hash) = (self.what.sized()?, self.what.sized()?);
        self.what.end()?;
        Ok((name, hash))
    }
}

/// `TPMS_CREATION_DATA`; only its form is looked at, its hash is in the attestation.
fn read_creation_data(bytes: &[u8]) -> Result<(), Malformed> {
    let mut reader = Reader::new(bytes);
    for _ in 0..reader.u32()? {
        reader.u16()?;
        let length = reader.u8()?;
        reader.take(length.into())?;
    }
    reader.sized()?;
    reader.u8()?;
    reader.u16()?;
    // The parent's name and qualified name, and the caller's data.
    for _ in 0..3 {
        reader.sized()?;
    }
    reader.end()
}

fn verify(public: &Public, attest: &[u8], signature: &[u8]) -> Result<(), KeyError> {
    let malformed = |_: Malformed| KeyError::Malformed("signature");
    let mut reader = Reader::new(signature);
    let scheme = (
        reader.u16().map_err(malformed)?,
        reader.u16().map_err(malformed)?,
    );
    if scheme != public.scheme {
        return Err(KeyError::Algorithm);
    }
    let outcome = match (&public.key, scheme) {
        (
            Key::Rsa {
                bits,
                exponent,
                modulus,
            },
            (alg::RSASSA, alg::SHA256),
        ) if *bits >= MIN_RSA_BITS => {
            let bytes = reader.sized().map_err(malformed)?;
            RsaPublicKeyComponents {
                n: modulus,
                e: &exponent
                    .to_be_bytes()
                    .into_iter()
                    .skip_while(|byte| *byte == 0)
                    .collect::<Vec<_>>(),
            }
            .verify(&RSA_PKCS1_2048_8192_SHA256, attest, bytes)
        }
        (Key::Ecc { curve: P256, x, y }, (alg::ECDSA, alg::SHA256)) => {
            let r = reader.sized().map_err(malformed)?;
            let s = reader.sized().map_err(malformed)?;
            let fixed = |number: &[u8]| {
                let missing = 32_usize.checked_sub(number.len());
                missing.map(|missing| [vec![0; missing], number.to_vec()].concat())
            };
            let [Some(x), Some(y), Some(r), Some(s)] = [x.as_slice(), y, r, s].map(fixed) else {
                return Err(KeyError::Malformed("signature"));
            };
            UnparsedPublicKey::new(&ECDSA_P256_SHA256_FIXED, [vec![4], x, y].concat())
                .verify(attest, &[r, s].concat())
        }
        _ => return Err(KeyError::Algorithm),
    };
    reader.end().map_err(malformed)?;
    outcome.map_err(|_source| KeyError::Signature)
}
