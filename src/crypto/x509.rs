//! Facts read from X.509 certificates.

use std::time::SystemTime;

use aws_lc_rs::signature::{
    ECDSA_P256_SHA256_ASN1, ECDSA_P384_SHA384_ASN1, ED25519, RSA_PKCS1_2048_8192_SHA256,
    UnparsedPublicKey, VerificationAlgorithm,
};
use der::asn1::ObjectIdentifier;
use der::{Decode as _, Encode as _, Header, SliceReader};
use x509_cert::attr::AttributeTypeAndValue;
use x509_cert::ext::pkix::name::GeneralName;
use x509_cert::ext::pkix::{AuthorityInfoAccessSyntax, BasicConstraints, SubjectAltName};
use x509_cert::name::RdnSequence;

use super::PrivateKey;

/// Common name.
pub const COMMON_NAME: ObjectIdentifier = ObjectIdentifier::new_unwrap("2.5.4.3");
/// Organization: roles in user certificates, the cluster's name in authorities.
pub const ORGANIZATION: ObjectIdentifier = ObjectIdentifier::new_unwrap("2.5.4.10");

/// Organizational unit: Oracle's cloud says there whose an instance is.
pub const ORGANIZATIONAL_UNIT: ObjectIdentifier = ObjectIdentifier::new_unwrap("2.5.4.11");

/// The longest certificate that is read, in bytes. Real ones stay below 4 KiB.
pub const MAX_CERTIFICATE: usize = 64 * 1024;

const CA_ISSUERS: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.3.6.1.5.5.7.48.2");

/// Why a certificate could not be read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum CertificateError {
    /// The bytes are no X.509 certificate.
    #[error("malformed X.509 certificate")]
    Malformed,
    /// The certificate is larger than [`MAX_CERTIFICATE`].
    #[error("X.509 certificate larger than {MAX_CERTIFICATE} bytes")]
    TooLarge,
}

/// A parsed certificate together with its bytes.
#[derive(Debug, Clone)]
pub struct Certificate {
    der: Vec<u8>,
    inner: x509_cert::Certificate,
}

impl Certificate {
    /// Parses DER.
    ///
    /// # Errors
    /// [`CertificateError`].
    pub fn from_der(der: &[u8]) -> Result<Self, CertificateError> {
        if der.len() > MAX_CERTIFICATE {
            return Err(CertificateError::TooLarge);
        }
        let inner =
            x509_cert::Certificate::from_der(der).map_err(|_source| CertificateError::Malformed)?;
        Ok(Self {
            der: der.to_vec(),
            inner,
        })
    }

    /// Parses the first `CERTIFICATE` block of a PEM text.
    ///
    /// # Errors
    /// [`CertificateError`].
    pub fn from_pem(text: &str) -> Result<Self, CertificateError> {
        let ders = super::pem::certificates(text).map_err(|_source| CertificateError::Malformed)?;
        Self::from_der(ders.first().ok_or(CertificateError::Malformed)?)
    }

    /// The certificate's bytes.
    #[must_use]
    pub fn der(&self) -> &[u8] {
        &self.der
    }

    /// Start of validity.
    #[must_use]
    pub fn not_before(&self) -> SystemTime {
        self.inner
            .tbs_certificate
            .validity
            .not_before
            .to_system_time()
    }

    /// End of validity.
    #[must_use]
    pub fn not_after(&self) -> SystemTime {
        self.inner
            .tbs_certificate
            .validity
            .not_after
            .to_system_time()
    }

    /// Serial number, lower-case hex pairs joined by `:`.
    #[must_use]
    pub fn serial(&self) -> String {
        let bytes = self.inner.tbs_certificate.serial_number.as_bytes();
        let bytes = bytes
            .strip_prefix(&[0])
            .filter(|rest| !rest.is_empty())
            .unwrap_or(bytes);
        bytes
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect::<Vec<_>>()
            .join(":")
    }

    /// Every value of one attribute of the subject, in order.
    #[must_use]
    pub fn subject(&self, oid: ObjectIdentifier) -> Vec<String> {
        attributes(&self.inner.tbs_certificate.subject, oid)
    }

    /// The subject's name, DER; empty if it cannot be encoded.
    pub(crate) fn subject_der(&self) -> Vec<u8> {
        let subject = self.inner.tbs_certificate.subject.to_der();
        subject.unwrap_or_default()
    }

    /// Every value of one attribute of the issuer, in order.
    #[must_use]
    pub fn issuer(&self, oid: ObjectIdentifier) -> Vec<String> {
        attributes(&self.inner.tbs_certificate.issuer, oid)
    }

    /// SubjectPublicKeyInfo DER.
    #[must_use]
    pub fn spki(&self) -> Vec<u8> {
        self.inner
            .tbs_certificate
            .subject_public_key_info
            .to_der()
            .unwrap_or_default()
    }

    /// Whether basic constraints say that this is an authority.
    #[must_use]
    pub fn is_ca(&self) -> bool {
        self.inner
            .tbs_certificate
            .get::<BasicConstraints>()
            .ok()
            .flatten()
            .is_some_and(|(_, constraints)| constraints.ca)
    }

    /// The URI names of the subject alternative name extension.
    #[must_use]
    pub fn uri_sans(&self) -> Vec<String> {
        self.sans(|name| match name {
            GeneralName::UniformResourceIdentifier(uri) => Some(uri.to_string()),
            _ => None,
        })
    }

    /// The DNS names of the subject alternative name extension.
    #[must_use]
    pub fn dns_sans(&self) -> Vec<String> {
        self.sans(|name| match name {
            GeneralName::DnsName(dns) => Some(dns.to_string()),
            _ => None,
        })
    }

    /// The IP addresses of the subject alternative name extension.
    #[must_use]
    pub fn ip_sans(&self) -> Vec<String> {
        self.sans(|name| match name {
            GeneralName::IpAddress(octets) => {
                let bytes = octets.as_bytes();
                let v4 = <[u8; 4]>::try_from(bytes).map(std::net::IpAddr::from);
                let address =
                    v4.or_else(|_| <[u8; 16]>::try_from(bytes).map(std::net::IpAddr::from));
                address.ok().map(|address| address.to_string())
            }
            _ => None,
        })
    }

    /// Where its issuer's certificate can be fetched (authority information access).
    #[must_use]
    pub fn issuer_urls(&self) -> Vec<String> {
        let access = self
            .inner
            .tbs_certificate
            .get::<AuthorityInfoAccessSyntax>();
        let access = access.ok().flatten().map(|(_, access)| access.0);
        access
            .into_iter()
            .flatten()
            .filter(|entry| entry.access_method == CA_ISSUERS)
            .filter_map(|entry| match entry.access_location {
                GeneralName::UniformResourceIdentifier(url) => Some(url.to_string()),
                _ => None,
            })
            .collect()
    }

    /// Whether the certificate certifies the public half of `key`.
    #[must_use]
    pub fn is_for(&self, key: &PrivateKey) -> bool {
        self.spki() == key.public_spki()
    }

    /// Whether `issuer` signed this certificate: names match and the signature verifies.
    /// Validity and constraints are not looked at.
    #[must_use]
    pub fn is_signed_by(&self, issuer: &Self) -> bool {
        self.inner.tbs_certificate.issuer == issuer.inner.tbs_certificate.subject
            && self.is_signed_with_key_of(issuer)
    }

    /// Whether the signature verifies with `issuer`'s key, whatever name it was made under.
    #[must_use]
    pub(crate) fn is_signed_with_key_of(&self, issuer: &Self) -> bool {
        let algorithm: &dyn VerificationAlgorithm =
            match self.inner.signature_algorithm.oid.to_string().as_str() {
                "1.2.840.113549.1.1.11" => &RSA_PKCS1_2048_8192_SHA256,
                "1.2.840.10045.4.3.2" => &ECDSA_P256_SHA256_ASN1,
                "1.2.840.10045.4.3.3" => &ECDSA_P384_SHA384_ASN1,
                "1.3.101.112" => &ED25519,
                _ => return false,
            };
        let info = &issuer.inner.tbs_certificate.subject_public_key_info;
        let (Some(key), Ok(message), Some(signature)) = (
            info.subject_public_key.as_bytes(),
            self.inner.tbs_certificate.to_der(),
            self.inner.signature.as_bytes(),
        ) else {
            return false;
        };
        UnparsedPublicKey::new(algorithm, key)
            .verify(&message, signature)
            .is_ok()
    }

    fn sans(&self, pick: impl Fn(&GeneralName) -> Option<String>) -> Vec<String> {
        self.inner
            .tbs_certificate
            .get::<SubjectAltName>()
            .ok()
            .flatten()
            .map(|(_, names)| names.0.iter().filter_map(pick).collect())
            .unwrap_or_default()
    }
}

/// Takes DER certificates that stand one after the other apart; `None` if the bytes are no such row.
pub(crate) fn split(mut bytes: &[u8]) -> Option<Vec<&[u8]>> {
    let mut all = Vec::new();
    while !bytes.is_empty() {
        let (one, rest) = first(bytes)?;
        all.push(one);
        bytes = rest;
    }
    Some(all)
}

/// The DER value at the start of `bytes`, and what follows it.
pub(crate) fn first(bytes: &[u8]) -> Option<(&[u8], &[u8])> {
    let mut reader = SliceReader::new(bytes).ok()?;
    let header = Header::decode(&mut reader).ok()?;
    let length = (header.encoded_len().ok()? + header.length).ok()?;
    bytes.split_at_checked(usize::try_from(length).ok()?)
}

fn attributes(name: &RdnSequence, oid: ObjectIdentifier) -> Vec<String> {
    name.0
        .iter()
        .flat_map(|rdn| rdn.0.iter())
        .filter(|attribute| attribute.oid == oid)
        .filter_map(text)
        .collect()
}

/// The text of an attribute, whichever of ASN.1's string types it uses.
fn text(attribute: &AttributeTypeAndValue) -> Option<String> {
    std::str::from_utf8(attribute.value.value())
        .ok()
        .map(str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn certificates_are_taken_apart() {
        let one = [0x30, 0x02, 0x05, 0x00];
        let two = [one, one].concat();
        assert_eq!(split(&two).unwrap(), [one, one]);
        assert_eq!(split(&[]).unwrap(), Vec::<&[u8]>::new());
        for bad in [
            &[0x30][..],
            &[0x30, 0x05, 0x00],
            &[0x30, 0x80, 0x00],
            &[0x30, 0x84, 0xff, 0xff, 0xff, 0xff],
        ] {
            assert!(split(bad).is_none(), "{bad:?}");
        }
    }
}
