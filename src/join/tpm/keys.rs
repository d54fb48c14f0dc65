//! The two keys of an attestation: the endorsement key, which says which TPM this is, and an
//! attestation key made for one join.
//!
//! Choices are upstream's (go-attestation): the RSA endorsement key where there is one, with its
//! certificate where the manufacturer stored one. Other than there, nothing is left in the TPM:
//! the attestation key is a primary key of the null hierarchy, which needs no password and no parent.

use super::chip::{Chip, ChipError, Created, Hierarchy};
use crate::crypto::tpm::{P256, Public, Writer, alg};
use crate::crypto::x509::Certificate;
use crate::crypto::{random, sha256_hex};

/// Where manufacturers put things (TCG "Registry of reserved TPM 2.0 handles and localities").
mod place {
    pub(super) const RSA_CERTIFICATE: u32 = 0x01c0_0002;
    pub(super) const RSA_NONCE: u32 = 0x01c0_0003;
    pub(super) const ECC_CERTIFICATE: u32 = 0x01c0_000a;
    pub(super) const ECC_NONCE: u32 = 0x01c0_000b;
    pub(super) const RSA_KEY: u32 = 0x8101_0001;
    pub(super) const ECC_KEY: u32 = 0x8101_0002;
}

/// Fixed to TPM and parent, made inside, restricted, decrypts; used by policy (TCG "EK Credential
/// Profile", templates L-1 and L-2).
const EK_ATTRIBUTES: u32 = 0x0003_00b2;
/// `PolicySecret(TPM_RH_ENDORSEMENT)`, the policy of those templates.
const EK_POLICY: [u8; 32] = [
    0x83, 0x71, 0x97, 0x67, 0x44, 0x84, 0xb3, 0xf8, 0x1a, 0x90, 0xcc, 0x8d, 0x46, 0xa5, 0xd7, 0x24,
    0xfd, 0x52, 0xd7, 0x6e, 0x06, 0x52, 0x0b, 0x64, 0xf2, 0xa1, 0xda, 0x1b, 0x33, 0x14, 0x69, 0xaa,
];
/// Fixed to TPM and parent, made inside, restricted, signs, used with its empty password, outside of the
/// lockout.
const AK_ATTRIBUTES: u32 = 0x0005_0472;
const RSA_BYTES: usize = 256;
const P256_BYTES: usize = 32;

/// Why a TPM cannot attest.
#[derive(Debug, thiserror::Error)]
pub enum KeysError {
    /// The TPM did not do what it was asked for.
    #[error(transparent)]
    Chip(#[from] ChipError),
    /// What it gave is no key that can be used.
    #[error("the TPM's {0} is malformed")]
    Malformed(&'static str),
    /// What the cluster sent is no credential.
    #[error("the cluster's credential is malformed")]
    Credential,
    /// The certificate in it is for another key.
    #[error(
        "the endorsement certificate in the TPM is not for the key that its standard template makes, nor for the persistent one: the TPM's firmware or its seed was changed after it was certified"
    )]
    Foreign,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Rsa,
    Ecc,
}

/// The endorsement key: which TPM this is.
#[derive(Debug)]
pub(super) struct Endorsement {
    kind: Kind,
    /// The key, SubjectPublicKeyInfo DER.
    pub(super) spki: Vec<u8>,
    /// The manufacturer's certificate, DER, where the TPM has one.
    pub(super) certificate: Option<Certificate>,
}

impl Endorsement {
    /// Finds out which key the TPM has.
    pub(super) fn of(chip: &mut Chip) -> Result<Self, KeysError> {
        match Self::of_kind(chip, Kind::Rsa) {
            Err(KeysError::Chip(error)) if error.is_unsupported() => Self::of_kind(chip, Kind::Ecc),
            other => other,
        }
    }

    fn of_kind(chip: &mut Chip, kind: Kind) -> Result<Self, KeysError> {
        if let Some(certificate) = certificate(chip, kind.certificate())? {
            return Ok(Self {
                kind,
                spki: certificate.spki(),
                certificate: Some(certificate),
            });
        }
        let (_, spki) = kind.create(chip)?;
        Ok(Self {
            kind,
            spki,
            certificate: None,
        })
    }

    /// Hex SHA-256 of the key: what `ek_public_hash` of a rule is compared with.
    pub(super) fn hash(&self) -> String {
        sha256_hex(&self.spki)
    }

    /// The handle of the key itself: the persistent one, or one made anew.
    pub(super) fn load(&self, chip: &mut Chip) -> Result<u32, KeysError> {
        let persistent = match self.kind {
            Kind::Rsa => place::RSA_KEY,
            Kind::Ecc => place::ECC_KEY,
        };
        if let Some(public) = chip.read_public(persistent)? {
            let spki = Public::read(&public).and_then(|public| public.key.spki());
            if spki.is_ok_and(|spki| spki == self.spki) {
                return Ok(persistent);
            }
        }
        let (created, spki) = self.kind.create(chip)?;
        if spki == self.spki {
            Ok(created.handle)
        } else {
            Err(KeysError::Foreign)
        }
    }
}

impl Kind {
    fn certificate(self) -> u32 {
        match self {
            Self::Rsa => place::RSA_CERTIFICATE,
            Self::Ecc => place::ECC_CERTIFICATE,
        }
    }

    /// Makes the endorsement key; it is the same each time.
    fn create(self, chip: &mut Chip) -> Result<(Created, Vec<u8>), KeysError> {
        let nonce = match self {
            Self::Rsa => chip.read_nv(place::RSA_NONCE)?,
            Self::Ecc => chip.read_nv(place::ECC_NONCE)?,
        };
        let template = self.endorsement_template(&nonce.unwrap_or_default());
        let created = chip.create_primary(Hierarchy::Endorsement, &template)?;
        let spki = Public::read(&created.public)
            .and_then(|public| public.key.spki())
            .map_err(|_malformed| KeysError::Malformed("endorsement key"))?;
        Ok((created, spki))
    }

    /// The standard template; few manufacturers add a nonce.
    fn endorsement_template(self, nonce: &[u8]) -> Vec<u8> {
        let head = Writer::default()
            .u16(self.algorithm())
            .u16(alg::SHA256)
            .u32(EK_ATTRIBUTES)
            .sized(&EK_POLICY)
            .u16(alg::AES)
            .u16(128)
            .u16(alg::CFB)
            .u16(alg::NULL);
        self.unique(head, nonce)
    }

    /// An attestation key that no other join has.
    fn attestation_template(self) -> Vec<u8> {
        let head = Writer::default()
            .u16(self.algorithm())
            .u16(alg::SHA256)
            .u32(AK_ATTRIBUTES)
            .sized(b"")
            .u16(alg::NULL)
            .u16(self.signature())
            .u16(alg::SHA256);
        self.unique(head, &random::<32>())
    }

    /// The rest of a template: size or curve, and what makes the key differ from others.
    fn unique(self, head: Writer, nonce: &[u8]) -> Vec<u8> {
        let filled = |length: usize| {
            let mut bytes = nonce.to_vec();
            bytes.resize(length, 0);
            bytes
        };
        match self {
            Self::Rsa => head.u16(2048).u32(0).sized(&filled(RSA_BYTES)),
            Self::Ecc => head
                .u16(P256)
                .u16(alg::NULL)
                .sized(&filled(P256_BYTES))
                .sized(&[0; P256_BYTES]),
        }
        .done()
    }

    fn algorithm(self) -> u16 {
        match self {
            Self::Rsa => alg::RSA,
            Self::Ecc => alg::ECC,
        }
    }

    fn signature(self) -> u16 {
        match self {
            Self::Rsa => alg::RSASSA,
            Self::Ecc => alg::ECDSA,
        }
    }
}

/// A certificate in NV memory. One that does not parse is as good as none: the key still speaks for
/// the TPM, and a token that wants a certificate refuses it.
fn certificate(chip: &mut Chip, index: u32) -> Result<Option<Certificate>, KeysError> {
    let Some(content) = chip.read_nv(index)? else {
        return Ok(None);
    };
    let certificate = Certificate::from_der(super::verify::ek_der(&content));
    if let Err(error) = &certificate {
        tracing::warn!(%error, "The endorsement certificate in the TPM cannot be read");
    }
    Ok(certificate.ok())
}

/// An attestation key in the TPM and what it says of itself.
#[derive(Debug)]
pub(super) struct Attestation {
    /// Where the key is loaded.
    pub(super) handle: u32,
    /// `TPMT_PUBLIC`.
    pub(super) public: Vec<u8>,
    /// `TPMS_CREATION_DATA`.
    pub(super) creation_data: Vec<u8>,
    /// `TPMS_ATTEST`.
    pub(super) attest: Vec<u8>,
    /// `TPMT_SIGNATURE`.
    pub(super) signature: Vec<u8>,
}

impl Attestation {
    /// Makes a key and has it attest its own creation.
    pub(super) fn create(chip: &mut Chip) -> Result<Self, KeysError> {
        let (kind, created) = match Self::key(chip, Kind::Rsa) {
            Err(error) if error.is_unsupported() => (Kind::Ecc, Self::key(chip, Kind::Ecc)?),
            other => (Kind::Rsa, other?),
        };
        let (attest, signature) = chip.certify_creation(&created, kind.signature())?;
        Ok(Self {
            handle: created.handle,
            public: created.public,
            creation_data: created.creation_data,
            attest,
            signature,
        })
    }

    fn key(chip: &mut Chip, kind: Kind) -> Result<Created, ChipError> {
        chip.create_primary(Hierarchy::Null, &kind.attestation_template())
    }
}
