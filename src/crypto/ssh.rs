//! OpenSSH forms: public key lines, and certificates read and made.

use std::collections::BTreeMap;
use std::time::{Duration, SystemTime};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use der::asn1::{BitString, Null, ObjectIdentifier, Uint, UintRef};
use der::{Decode as _, Encode as _};
use ssh_key::public::{EcdsaPublicKey, Ed25519PublicKey, KeyData, RsaPublicKey};
use ssh_key::{Mpint, PublicKey};
use x509_cert::spki::{
    AlgorithmIdentifierOwned, SubjectPublicKeyInfoOwned, SubjectPublicKeyInfoRef,
};

use super::{KeyAlgorithm, PrivateKey, random};

/// Why an SSH key or certificate could not be read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum SshError {
    /// The text is not a line of the `authorized_keys` form.
    #[error("not an SSH public key or certificate line")]
    Malformed,
    /// The key's algorithm has no SSH form here.
    #[error("unsupported SSH key algorithm")]
    Unsupported,
}

/// The `authorized_keys` line, with newline and without comment, of a SubjectPublicKeyInfo.
///
/// # Errors
/// [`SshError::Unsupported`] for keys other than RSA, P-256 and Ed25519.
pub fn public_line_of_spki(spki: &[u8]) -> Result<String, SshError> {
    let key = PublicKey::new(key_data_of_spki(spki)?, "");
    let line = key.to_openssh().map_err(|_source| SshError::Unsupported)?;
    Ok(format!("{}\n", line.trim_end()))
}

/// The SSH key of a SubjectPublicKeyInfo.
///
/// # Errors
/// [`SshError::Unsupported`] for keys other than RSA, P-256 and Ed25519.
pub fn key_data_of_spki(spki: &[u8]) -> Result<KeyData, SshError> {
    #[derive(der::Sequence)]
    struct RsaKey<'a> {
        n: UintRef<'a>,
        e: UintRef<'a>,
    }
    let unsupported = |_source| SshError::Unsupported;
    let info = SubjectPublicKeyInfoRef::from_der(spki).map_err(unsupported)?;
    let bytes = info
        .subject_public_key
        .as_bytes()
        .ok_or(SshError::Unsupported)?;
    match info.algorithm.oid.to_string().as_str() {
        "1.2.840.113549.1.1.1" => {
            let key = RsaKey::from_der(bytes).map_err(unsupported)?;
            let mpint = |n: UintRef<'_>| {
                Mpint::from_positive_bytes(n.as_bytes()).map_err(|_source| SshError::Unsupported)
            };
            Ok(KeyData::Rsa(RsaPublicKey {
                e: mpint(key.e)?,
                n: mpint(key.n)?,
            }))
        }
        "1.2.840.10045.2.1" => EcdsaPublicKey::from_sec1_bytes(bytes)
            .map(KeyData::Ecdsa)
            .map_err(|_source| SshError::Unsupported),
        "1.3.101.112" => Ed25519PublicKey::try_from(bytes)
            .map(KeyData::Ed25519)
            .map_err(|_source| SshError::Unsupported),
        _ => Err(SshError::Unsupported),
    }
}

/// The SubjectPublicKeyInfo of an `authorized_keys` line; a comment is allowed, options are not.
///
/// # Errors
/// [`SshError::Malformed`], or [`SshError::Unsupported`] for keys other than RSA, P-256 and
/// Ed25519.
pub fn spki_of_public_line(line: &str) -> Result<Vec<u8>, SshError> {
    #[derive(der::Sequence)]
    struct RsaKey {
        n: Uint,
        e: Uint,
    }
    let unsupported = |_source| SshError::Unsupported;
    let key = PublicKey::from_openssh(line.trim()).map_err(|_source| SshError::Malformed)?;
    let (oid, parameters, bits) = match key.key_data() {
        KeyData::Rsa(key) => {
            let uint = |number: &Mpint| {
                let bytes = number.as_positive_bytes().ok_or(SshError::Malformed)?;
                Uint::new(bytes).map_err(unsupported)
            };
            let key = RsaKey {
                n: uint(&key.n)?,
                e: uint(&key.e)?,
            };
            let bits = key.to_der().map_err(unsupported)?;
            ("1.2.840.113549.1.1.1", Some(Null.into()), bits)
        }
        KeyData::Ecdsa(key @ EcdsaPublicKey::NistP256(_)) => {
            let curve = ObjectIdentifier::new_unwrap("1.2.840.10045.3.1.7");
            let bits = key.as_sec1_bytes().to_vec();
            ("1.2.840.10045.2.1", Some((&curve).into()), bits)
        }
        KeyData::Ed25519(key) => ("1.3.101.112", None, key.0.to_vec()),
        _ => return Err(SshError::Unsupported),
    };
    SubjectPublicKeyInfoOwned {
        algorithm: AlgorithmIdentifierOwned {
            oid: ObjectIdentifier::new_unwrap(oid),
            parameters,
        },
        subject_public_key: BitString::from_bytes(&bits).map_err(unsupported)?,
    }
    .to_der()
    .map_err(unsupported)
}

/// The line, with newline and without comment, of a public key or certificate in SSH's binary form
/// (RFC 4253 section 6.6). Only the name of its algorithm is looked at.
///
/// # Errors
/// [`SshError::Malformed`] if it does not begin with a name.
pub fn line_of_wire(wire: &[u8]) -> Result<String, SshError> {
    let rest = after_first_string(wire).ok_or(SshError::Malformed)?;
    let name = wire
        .get(4..wire.len() - rest.len())
        .and_then(|name| std::str::from_utf8(name).ok())
        .filter(|name| !name.is_empty() && name.bytes().all(|byte| byte.is_ascii_graphic()))
        .ok_or(SshError::Malformed)?;
    Ok(format!("{name} {}\n", STANDARD.encode(wire)))
}

/// The binary form of a public key or certificate line; a comment is passed over.
///
/// # Errors
/// [`SshError::Malformed`] if the second word is not base64.
pub fn wire_of_line(line: &str) -> Result<Vec<u8>, SshError> {
    let word = line.split_whitespace().nth(1).ok_or(SshError::Malformed)?;
    STANDARD.decode(word).map_err(|_source| SshError::Malformed)
}

/// What matters of an SSH certificate.
#[derive(Debug, Clone)]
pub struct SshCertificate {
    inner: ssh_key::Certificate,
}

impl SshCertificate {
    /// Reads an `authorized_keys` certificate line.
    ///
    /// # Errors
    /// [`SshError::Malformed`].
    pub fn parse(line: &str) -> Result<Self, SshError> {
        ssh_key::Certificate::from_openssh(line.trim())
            .map(|inner| Self { inner })
            .map_err(|_source| SshError::Malformed)
    }

    /// The names that the certificate is good for.
    #[must_use]
    pub fn principals(&self) -> &[String] {
        self.inner.valid_principals()
    }

    /// End of validity.
    #[must_use]
    pub fn valid_before(&self) -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_secs(self.inner.valid_before())
    }

    /// Whether the certificate was made for the public half of `key`.
    #[must_use]
    pub fn is_for(&self, key: &PrivateKey) -> bool {
        key_data_of_spki(&key.public_spki()).is_ok_and(|data| *self.inner.public_key() == data)
    }
}

/// Whom an SSH certificate is for (OpenSSH `PROTOCOL.certkeys`, field `type`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum Holder {
    /// Somebody who logs in.
    User = 1,
    /// A server.
    Host = 2,
}

/// A certificate to be made (OpenSSH `PROTOCOL.certkeys`).
///
/// It is encoded here because `ssh-key`'s builder verifies what it signed with a second
/// crypto provider, which this program does not carry.
#[derive(Debug, Clone)]
pub struct NewCertificate<'a> {
    /// Whom it is for.
    pub holder: Holder,
    /// The certified key as SubjectPublicKeyInfo DER.
    pub spki: &'a [u8],
    /// Serial number.
    pub serial: u64,
    /// Key ID: the user's name; empty for hosts.
    pub key_id: &'a str,
    /// Names that the certificate is good for.
    pub principals: &'a [String],
    /// Start of validity.
    pub valid_after: SystemTime,
    /// End of validity.
    pub valid_before: SystemTime,
    /// Extensions by name; an empty value is written as a flag.
    pub extensions: &'a BTreeMap<String, String>,
}

impl NewCertificate<'_> {
    /// Signs with the authority's key and returns the `authorized_keys` line with its newline.
    ///
    /// # Errors
    /// [`SshError::Unsupported`] for keys without an SSH form.
    pub fn sign(&self, authority: &PrivateKey) -> Result<String, SshError> {
        let key = key_data_of_spki(self.spki)?;
        let name = format!("{}-cert-v01@openssh.com", key.algorithm().as_str());
        let plain = PublicKey::new(key, "")
            .to_bytes()
            .map_err(|_source| SshError::Unsupported)?;
        let signer = PublicKey::new(key_data_of_spki(&authority.public_spki())?, "")
            .to_bytes()
            .map_err(|_source| SshError::Unsupported)?;
        let mut wire = Wire::default();
        wire.string(name.as_bytes());
        wire.string(&random::<32>());
        wire.0
            .extend(after_first_string(&plain).ok_or(SshError::Unsupported)?);
        wire.0.extend(self.serial.to_be_bytes());
        wire.0.extend((self.holder as u32).to_be_bytes());
        wire.string(self.key_id.as_bytes());
        let mut principals = Wire::default();
        for principal in self.principals {
            principals.string(principal.as_bytes());
        }
        wire.string(&principals.0);
        wire.0.extend(seconds(self.valid_after).to_be_bytes());
        wire.0.extend(seconds(self.valid_before).to_be_bytes());
        wire.string(b"");
        let mut extensions = Wire::default();
        for (name, value) in self.extensions {
            extensions.string(name.as_bytes());
            let mut data = Wire::default();
            if !value.is_empty() {
                data.string(value.as_bytes());
            }
            extensions.string(&data.0);
        }
        wire.string(&extensions.0);
        wire.string(b"");
        wire.string(&signer);
        let signature = sign(authority, &wire.0)?;
        wire.string(&signature);
        let body = STANDARD.encode(&wire.0);
        Ok(format!("{name} {body}\n"))
    }
}

/// SSH's length-prefixed strings (RFC 4251 section 5).
#[derive(Default)]
struct Wire(Vec<u8>);

impl Wire {
    fn string(&mut self, bytes: &[u8]) {
        let length = u32::try_from(bytes.len()).unwrap_or(u32::MAX);
        self.0.extend(length.to_be_bytes());
        self.0.extend(bytes);
    }
}

fn after_first_string(bytes: &[u8]) -> Option<&[u8]> {
    let (length, rest) = bytes.split_first_chunk::<4>()?;
    rest.get(usize::try_from(u32::from_be_bytes(*length)).ok()?..)
}

fn seconds(time: SystemTime) -> u64 {
    time.duration_since(SystemTime::UNIX_EPOCH)
        .map_or(0, |since| since.as_secs())
}

/// A signature in SSH's wire form: the algorithm's name and its blob.
pub(crate) fn sign(key: &PrivateKey, message: &[u8]) -> Result<Vec<u8>, SshError> {
    let unsupported = |_source| SshError::Unsupported;
    let (name, blob) = match key.algorithm() {
        KeyAlgorithm::Rsa2048 => (
            "rsa-sha2-512",
            key.sign_rsa_sha512(message).map_err(unsupported)?,
        ),
        KeyAlgorithm::EcdsaP256 => (
            "ecdsa-sha2-nistp256",
            ecdsa_wire(&key.sign(message).map_err(unsupported)?).ok_or(SshError::Unsupported)?,
        ),
        KeyAlgorithm::Ed25519 => ("ssh-ed25519", key.sign(message).map_err(unsupported)?),
    };
    let mut wire = Wire::default();
    wire.string(name.as_bytes());
    wire.string(&blob);
    Ok(wire.0)
}

/// ECDSA's DER signature as SSH's pair of mpints (RFC 5656 section 3.1.2).
fn ecdsa_wire(signature: &[u8]) -> Option<Vec<u8>> {
    #[derive(der::Sequence)]
    struct Pair<'a> {
        r: UintRef<'a>,
        s: UintRef<'a>,
    }
    let pair = Pair::from_der(signature).ok()?;
    let mut wire = Wire::default();
    for number in [pair.r, pair.s] {
        wire.string(
            Mpint::from_positive_bytes(number.as_bytes())
                .ok()?
                .as_bytes(),
        );
    }
    Some(wire.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_algorithm_has_a_line_and_signs_certificates() {
        for algorithm in [
            KeyAlgorithm::Rsa2048,
            KeyAlgorithm::EcdsaP256,
            KeyAlgorithm::Ed25519,
        ] {
            let authority = PrivateKey::generate(algorithm).unwrap();
            let subject = PrivateKey::generate(KeyAlgorithm::EcdsaP256).unwrap();
            assert!(
                subject
                    .public_ssh_line()
                    .unwrap()
                    .starts_with("ecdsa-sha2-nistp256 ")
            );
            let line = NewCertificate {
                holder: Holder::User,
                spki: &subject.public_spki(),
                serial: 7,
                key_id: "bot-example",
                principals: &["root".to_owned()],
                valid_after: SystemTime::UNIX_EPOCH + Duration::from_secs(100),
                valid_before: SystemTime::UNIX_EPOCH + Duration::from_secs(200),
                extensions: &[("permit-pty", ""), ("teleport-traits", "null")]
                    .map(|(name, value)| (name.to_owned(), value.to_owned()))
                    .into(),
            }
            .sign(&authority)
            .unwrap();
            let facts = SshCertificate::parse(&line).unwrap();
            assert_eq!(facts.principals(), ["root"]);
            assert!(facts.is_for(&subject));
            assert!(!facts.is_for(&authority));
            assert_eq!(
                facts.valid_before(),
                SystemTime::UNIX_EPOCH + Duration::from_secs(200)
            );
        }
    }

    #[test]
    fn lines_give_back_the_key() {
        for algorithm in [
            KeyAlgorithm::Rsa2048,
            KeyAlgorithm::EcdsaP256,
            KeyAlgorithm::Ed25519,
        ] {
            let key = PrivateKey::generate(algorithm).unwrap();
            let line = key.public_ssh_line().unwrap();
            assert_eq!(spki_of_public_line(&line), Ok(key.public_spki()));
            let commented = format!("{} me@home", line.trim_end());
            assert_eq!(spki_of_public_line(&commented), Ok(key.public_spki()));
        }
        for junk in ["", "ssh-rsa", "ssh-rsa AAAA", "-----BEGIN PUBLIC KEY-----"] {
            assert_eq!(
                spki_of_public_line(junk),
                Err(SshError::Malformed),
                "{junk}"
            );
        }
    }

    #[test]
    fn binary_forms_round_trip() {
        let key = PrivateKey::generate(KeyAlgorithm::EcdsaP256).unwrap();
        let line = key.public_ssh_line().unwrap();
        let wire = wire_of_line(&line).unwrap();
        assert_eq!(line_of_wire(&wire).unwrap(), line);
        for junk in [
            &b""[..],
            b"\0\0\0\x07",
            b"\0\0\0\0rest",
            b"\0\0\0\x03a\nbrest",
            b"\xff\xff\xff\xffssh-rsa",
        ] {
            assert_eq!(line_of_wire(junk), Err(SshError::Malformed), "{junk:?}");
        }
        for junk in ["", "ssh-rsa", "ssh-rsa ?"] {
            assert_eq!(wire_of_line(junk), Err(SshError::Malformed), "{junk}");
        }
    }

    #[test]
    fn junk_is_refused() {
        assert_eq!(
            SshCertificate::parse("x y z").unwrap_err(),
            SshError::Malformed
        );
        assert_eq!(public_line_of_spki(b"junk"), Err(SshError::Unsupported));
    }
}
