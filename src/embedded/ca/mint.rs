//! Making X.509 certificates: one encoder for authorities, users, hosts and SVIDs.
//!
//! Fields come in the order of the certificates of a Teleport 18.0.0 cluster: key usage, extended
//! key usage, basic constraints, subject key identifier, authority key identifier, names.

use std::time::SystemTime;

use der::asn1::{
    Any, BitString, GeneralizedTime, Ia5String, ObjectIdentifier, OctetString, PrintableString,
    SetOfVec, UtcTime,
};
use der::flagset::FlagSet;
use der::oid::AssociatedOid;
use der::{DateTime, Decode as _, Encode, Tag};
use x509_cert::attr::AttributeTypeAndValue;
use x509_cert::ext::Extension;
use x509_cert::ext::pkix::name::GeneralName;
use x509_cert::ext::pkix::{
    AuthorityKeyIdentifier, BasicConstraints, ExtendedKeyUsage, KeyUsage, KeyUsages,
    SubjectAltName, SubjectKeyIdentifier,
};
use x509_cert::name::{RdnSequence, RelativeDistinguishedName};
use x509_cert::request::{self, CertReq, CertReqInfo};
use x509_cert::serial_number::SerialNumber;
use x509_cert::spki::SubjectPublicKeyInfoOwned;
use x509_cert::time::{Time, Validity};
use x509_cert::{Certificate, TbsCertificate, Version};

use crate::crypto::{KeyError, PrivateKey, random, sha256};

/// Extended key usage of TLS servers.
pub const SERVER_AUTH: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.3.6.1.5.5.7.3.1");
/// Extended key usage of TLS clients.
pub const CLIENT_AUTH: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.3.6.1.5.5.7.3.2");

/// Why a certificate could not be made.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MintError {
    /// A field has no DER form: a name with impossible characters, a time before 1970.
    #[error("a field of the certificate cannot be encoded: {0}")]
    Encode(#[from] der::Error),
    /// The authority's key does not sign.
    #[error("the certificate cannot be signed: {0}")]
    Sign(#[from] KeyError),
}

/// What a certificate says, apart from its issuer.
#[derive(Debug, Clone)]
pub struct Template<'a> {
    /// Serial number, positive; see [`serial`].
    pub serial: [u8; 16],
    /// The subject name; see [`Subject`].
    pub subject: RdnSequence,
    /// Start of validity, cut to whole seconds.
    pub not_before: SystemTime,
    /// End of validity, cut to whole seconds.
    pub not_after: SystemTime,
    /// The certified key, SubjectPublicKeyInfo DER.
    pub spki: &'a [u8],
    /// Key usage, always critical.
    pub key_usage: FlagSet<KeyUsages>,
    /// Extended key usages; left out if empty.
    pub extended: &'a [ObjectIdentifier],
    /// Whether the certificate is an authority; it then carries a subject key identifier.
    pub authority: bool,
    /// Subject alternative names; left out if empty, critical if the subject is empty
    /// (RFC 5280 section 4.2.1.6).
    pub names: Vec<GeneralName>,
}

/// Who signs: a name and a key, with the key's identifier if the authority has one.
#[derive(Debug, Clone, Copy)]
pub struct Issuer<'a> {
    /// The authority's subject name.
    pub name: &'a RdnSequence,
    /// The authority's subject key identifier.
    pub key_id: Option<&'a [u8]>,
    /// The authority's key.
    pub key: &'a PrivateKey,
}

/// 128 random bits as a positive serial number.
#[must_use]
pub fn serial() -> [u8; 16] {
    let mut bytes = random::<16>();
    let [first, ..] = &mut bytes;
    *first = *first & 0x7f | 0x40;
    bytes
}

impl Template<'_> {
    /// Signs a certificate and returns its DER.
    ///
    /// # Errors
    /// [`MintError`]; nothing is remembered of a certificate that could not be made.
    pub fn sign(&self, issuer: Issuer<'_>) -> Result<Vec<u8>, MintError> {
        let algorithm = issuer.key.signature_algorithm();
        let tbs = TbsCertificate {
            version: Version::V3,
            serial_number: SerialNumber::new(&self.serial)?,
            signature: algorithm.clone(),
            issuer: issuer.name.clone(),
            validity: Validity {
                not_before: time(self.not_before)?,
                not_after: time(self.not_after)?,
            },
            subject: self.subject.clone(),
            subject_public_key_info: SubjectPublicKeyInfoOwned::from_der(self.spki)?,
            issuer_unique_id: None,
            subject_unique_id: None,
            extensions: Some(self.extensions(issuer.key_id)?),
        };
        let signature = issuer.key.sign(&tbs.to_der()?)?;
        let certificate = Certificate {
            tbs_certificate: tbs,
            signature_algorithm: algorithm,
            signature: BitString::from_bytes(&signature)?,
        };
        Ok(certificate.to_der()?)
    }

    fn extensions(&self, authority: Option<&[u8]>) -> Result<Vec<Extension>, MintError> {
        let mut list = vec![extension(&KeyUsage(self.key_usage), true)?];
        if !self.extended.is_empty() {
            list.push(extension(&ExtendedKeyUsage(self.extended.to_vec()), false)?);
        }
        let constraints = BasicConstraints {
            ca: self.authority,
            path_len_constraint: None,
        };
        list.push(extension(&constraints, true)?);
        if self.authority {
            let id = OctetString::new(key_id(self.spki)?)?;
            list.push(extension(&SubjectKeyIdentifier(id), false)?);
        }
        if let Some(id) = authority {
            let id = AuthorityKeyIdentifier {
                key_identifier: Some(OctetString::new(id)?),
                authority_cert_issuer: None,
                authority_cert_serial_number: None,
            };
            list.push(extension(&id, false)?);
        }
        if !self.names.is_empty() {
            let critical = self.subject.0.is_empty();
            list.push(extension(&SubjectAltName(self.names.clone()), critical)?);
        }
        Ok(list)
    }
}

/// A request (PKCS#10) for a certificate with this subject for `key`, which signs it; DER. It asks for
/// no extensions: those of an authority are its issuer's business.
///
/// # Errors
/// [`MintError`] if the key cannot sign.
pub fn request(subject: &RdnSequence, key: &PrivateKey) -> Result<Vec<u8>, MintError> {
    let info = CertReqInfo {
        version: request::Version::V1,
        subject: subject.clone(),
        public_key: SubjectPublicKeyInfoOwned::from_der(&key.public_spki())?,
        attributes: SetOfVec::new(),
    };
    let signature = key.sign(&info.to_der()?)?;
    let request = CertReq {
        info,
        algorithm: key.signature_algorithm(),
        signature: BitString::from_bytes(&signature)?,
    };
    Ok(request.to_der()?)
}

/// The key identifier of a SubjectPublicKeyInfo: the first 160 bits of SHA-256 over the key's
/// bits (RFC 7093 section 2, method 1).
///
/// # Errors
/// [`MintError::Encode`] if `spki` is no key.
pub fn key_id(spki: &[u8]) -> Result<Vec<u8>, MintError> {
    let info = SubjectPublicKeyInfoOwned::from_der(spki)?;
    let mut id = sha256(info.subject_public_key.raw_bytes()).to_vec();
    id.truncate(20);
    Ok(id)
}

/// A URI name.
///
/// # Errors
/// [`MintError::Encode`] if `uri` is not ASCII.
pub fn uri(uri: &str) -> Result<GeneralName, MintError> {
    Ok(GeneralName::UniformResourceIdentifier(Ia5String::new(uri)?))
}

/// A DNS name.
///
/// # Errors
/// [`MintError::Encode`] if `name` is not ASCII.
pub fn dns(name: &str) -> Result<GeneralName, MintError> {
    Ok(GeneralName::DnsName(Ia5String::new(name)?))
}

/// A subject name under construction; attributes keep the order in which they are added.
#[derive(Debug, Clone, Default)]
pub struct Subject(RdnSequence);

impl Subject {
    /// Adds one attribute in a component of its own, unless `value` is empty.
    ///
    /// # Errors
    /// [`MintError::Encode`] if the value is too long.
    pub fn one(self, oid: ObjectIdentifier, value: &str) -> Result<Self, MintError> {
        if value.is_empty() {
            return Ok(self);
        }
        self.set(oid, &[value.to_owned()])
    }

    /// Adds all values of one attribute in one component, in DER's order and each once; nothing
    /// if there are none.
    ///
    /// # Errors
    /// [`MintError::Encode`] if a value is too long.
    pub fn set(mut self, oid: ObjectIdentifier, values: &[String]) -> Result<Self, MintError> {
        if values.is_empty() {
            return Ok(self);
        }
        let mut set: SetOfVec<AttributeTypeAndValue> = SetOfVec::new();
        for value in values {
            let value = string(value)?;
            if set.iter().all(|known| known.value != value) {
                set.insert(AttributeTypeAndValue { oid, value })?;
            }
        }
        self.0.0.push(RelativeDistinguishedName(set));
        Ok(self)
    }

    /// The name.
    #[must_use]
    pub fn finish(self) -> RdnSequence {
        self.0
    }
}

/// `PrintableString` where the characters allow it, else `UTF8String`.
fn string(value: &str) -> der::Result<Any> {
    match PrintableString::new(value) {
        Ok(_) => Any::new(Tag::PrintableString, value.as_bytes()),
        Err(_) => Any::new(Tag::Utf8String, value.as_bytes()),
    }
}

/// `UTCTime` up to 2049 and `GeneralizedTime` after (RFC 5280 section 4.1.2.5).
pub(in crate::embedded) fn time(time: SystemTime) -> der::Result<Time> {
    let date = DateTime::try_from(time)?;
    Ok(if date.year() <= UtcTime::MAX_YEAR {
        Time::UtcTime(UtcTime::from_date_time(date)?)
    } else {
        Time::GeneralTime(GeneralizedTime::from_date_time(date))
    })
}

/// An extension for certificates and revocation lists.
pub(in crate::embedded) fn extension<T: Encode + AssociatedOid>(
    value: &T,
    critical: bool,
) -> der::Result<Extension> {
    Ok(Extension {
        extn_id: T::OID,
        critical,
        extn_value: OctetString::new(value.to_der()?)?,
    })
}
