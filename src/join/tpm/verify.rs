//! The verifying half of join method `tpm`: which TPM an endorsement key or certificate is of, and
//! whether the agent has that TPM at hand (upstream `lib/tpm`, go-attestation).
//!
//! A credential is encrypted to the endorsement key and tied to the name of an attestation key: only
//! the TPM that holds both can open it, so the solution proves the one, and the checks of [`key`] make
//! the other worth something.

mod credential;
mod key;
mod method;

use std::time::SystemTime;

use serde_json::Value;

pub use self::method::Tpm;

use self::credential::{Credential, Unusable};
use crate::crypto::chain::{self, Untrusted, Usage};
use crate::crypto::x509::{self, Certificate, CertificateError};
use crate::crypto::{pem, random, same, sha256_hex};
use crate::join::verify::admitted;

/// The longest of each part that an agent sends, in bytes. Real ones stay below 2 KiB.
const MAX_PART: usize = 8 * 1024;

/// Why a TPM is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum TpmError {
    /// A part is longer than any real one.
    #[error("{0} of more than {MAX_PART} bytes")]
    TooLarge(&'static str),
    /// Neither certificate nor key.
    #[error("either EK cert or EK key must be provided")]
    NoKey,
    /// The certificate cannot be read.
    #[error("parsing EK cert: {0}")]
    Certificate(#[from] CertificateError),
    /// The token wants a certificate.
    #[error(
        "tpm did not provide an EKCert to validate against allowed CAs: the token has ekcert_allowed_cas"
    )]
    NoCertificate,
    /// The certificate is of another authority.
    #[error("verifying EK cert: {0}")]
    Untrusted(#[from] Untrusted),
    /// The attestation key does not do.
    #[error(transparent)]
    Attestation(#[from] key::KeyError),
    /// No credential can be made for the endorsement key.
    #[error(transparent)]
    Unusable(#[from] Unusable),
    /// The credential was not opened.
    #[error("invalid credential activation solution")]
    Solution,
}

/// A TPM, by its endorsement key.
#[derive(Debug, Clone)]
pub(crate) struct Endorsement {
    spki: Vec<u8>,
    certificate: Option<Certificate>,
    /// Whether the certificate leads to one of the token's authorities.
    pub(crate) verified: bool,
}

impl Endorsement {
    /// Reads what an agent sent; a certificate goes before a key.
    pub(crate) fn read(certificate: &[u8], key: &[u8]) -> Result<Self, TpmError> {
        let (certificate, spki) = match (certificate, key) {
            ([], []) => return Err(TpmError::NoKey),
            ([], key) => (None, bounded("EK key", key)?.to_vec()),
            (certificate, _) => {
                let der = ek_der(bounded("EK cert", certificate)?);
                let certificate = Certificate::from_der(der)?;
                let spki = certificate.spki();
                (Some(certificate), spki)
            }
        };
        Ok(Self {
            spki,
            certificate,
            verified: false,
        })
    }

    /// Checks the certificate against the token's authorities (DER), if it has any.
    pub(crate) fn check(
        &mut self,
        authorities: &[Vec<u8>],
        now: SystemTime,
    ) -> Result<(), TpmError> {
        if authorities.is_empty() {
            return Ok(());
        }
        let certificate = self.certificate.as_ref().ok_or(TpmError::NoCertificate)?;
        chain::verify(certificate.der(), &[], authorities, now, Usage::Any)?;
        self.verified = true;
        Ok(())
    }

    /// Hex SHA-256 of the key.
    pub(crate) fn hash(&self) -> String {
        sha256_hex(&self.spki)
    }

    /// The certificate's serial number, hex pairs joined by `:`; empty without a certificate.
    pub(crate) fn serial(&self) -> String {
        self.certificate
            .as_ref()
            .map(Certificate::serial)
            .unwrap_or_default()
    }

    /// Checks the `allow` rules of a token: one of them must match in every key that it has. The error
    /// says in what each differs.
    pub(crate) fn allowed_by(&self, allow: Option<&Value>) -> Result<(), String> {
        admitted(allow, |rule| self.differs(rule))
    }

    /// A rule without a condition lets in nothing.
    fn differs(&self, rule: &Value) -> Vec<&'static str> {
        let wanted = |key: &str| rule.get(key).and_then(Value::as_str);
        let conditions = [
            ("ek_public_hash", wanted("ek_public_hash"), self.hash()),
            (
                "ek_certificate_serial",
                wanted("ek_certificate_serial"),
                self.serial(),
            ),
        ];
        if conditions.iter().all(|(_, wanted, _)| wanted.is_none()) {
            return vec!["ek_public_hash and ek_certificate_serial: it has neither"];
        }
        let missed = conditions
            .into_iter()
            .filter(|(_, wanted, real)| wanted.is_some_and(|wanted| wanted != real));
        missed.map(|(key, _, _)| key).collect()
    }
}

/// What has to come back of a credential.
pub(crate) struct Expected([u8; 32]);

impl Expected {
    /// Checks the attestation key and makes a credential that its TPM alone can open.
    pub(crate) fn challenge(
        endorsement: &Endorsement,
        public: &[u8],
        creation_data: &[u8],
        attest: &[u8],
        signature: &[u8],
    ) -> Result<(Self, Credential), TpmError> {
        let name = key::check(
            bounded("public area", public)?,
            bounded("creation data", creation_data)?,
            bounded("creation attestation", attest)?,
            bounded("creation signature", signature)?,
        )?;
        let secret = random::<32>();
        let credential = Credential::make(&endorsement.spki, &name, &secret)?;
        Ok((Self(secret), credential))
    }

    /// Compares, in a time that says nothing.
    pub(crate) fn check(&self, solution: &[u8]) -> Result<(), TpmError> {
        same(&self.0, solution)
            .then_some(())
            .ok_or(TpmError::Solution)
    }
}

/// The certificate in what a manufacturer stored: without TCG's header (10 01 00 and a length) and
/// without what fills up the place behind it.
pub(crate) fn ek_der(stored: &[u8]) -> &[u8] {
    let content = match stored {
        [0x10, 0x01, 0x00, high, low, rest @ ..] => {
            let length = usize::from(u16::from_be_bytes([*high, *low]));
            rest.get(..length).unwrap_or(rest)
        }
        _ => stored,
    };
    x509::first(content).map_or(content, |(der, _)| der)
}

/// The authorities of `ekcert_allowed_cas`, each a PEM text, as DER.
pub(crate) fn authorities<T: AsRef<str>>(texts: &[T]) -> Result<Vec<Vec<u8>>, String> {
    let mut all = Vec::new();
    for (at, text) in texts.iter().enumerate() {
        let name = format!("ekcert_allowed_cas[{at}]");
        let blocks = pem::decode_all(text.as_ref()).map_err(|error| format!("{name}: {error}"))?;
        if blocks.is_empty() {
            return Err(format!("{name}: no pem block found"));
        }
        for block in blocks {
            if block.label != "CERTIFICATE" {
                return Err(format!("{name}: pem block is not 'CERTIFICATE' type"));
            }
            Certificate::from_der(&block.der).map_err(|error| format!("{name}: {error}"))?;
            all.push(block.der);
        }
    }
    Ok(all)
}

fn bounded<'a>(what: &'static str, bytes: &'a [u8]) -> Result<&'a [u8], TpmError> {
    if bytes.len() > MAX_PART {
        Err(TpmError::TooLarge(what))
    } else {
        Ok(bytes)
    }
}

#[cfg(test)]
mod tests;
