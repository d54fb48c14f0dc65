//! TPM 2.0 encodings (TCG "TPM 2.0 Library", part 2), as far as attestation needs them: big-endian
//! numbers, byte strings with a length of two bytes in front, and public areas of keys.
//!
//! Written here rather than taken from a crate: the ones there are either bind to the C libraries of
//! TCG, or need a newer compiler than this program, or read foreign bytes by casts in `unsafe` code.

use der::asn1::{Any, BitString, ObjectIdentifier, UintRef};
use der::{Encode as _, Tag};
use x509_cert::spki::{AlgorithmIdentifierOwned, SubjectPublicKeyInfoOwned};

/// Algorithm identifiers (`TPM_ALG_ID`).
pub(crate) mod alg {
    /// RSA keys.
    pub(crate) const RSA: u16 = 0x0001;
    /// AES.
    pub(crate) const AES: u16 = 0x0006;
    /// SHA-256.
    pub(crate) const SHA256: u16 = 0x000b;
    /// Nothing.
    pub(crate) const NULL: u16 = 0x0010;
    /// RSA signatures by PKCS #1 v1.5.
    pub(crate) const RSASSA: u16 = 0x0014;
    /// RSA encryption by PKCS #1 v1.5, a scheme without a hash.
    pub(crate) const RSAES: u16 = 0x0015;
    /// ECDSA signatures.
    pub(crate) const ECDSA: u16 = 0x0018;
    /// Anonymous attestation, a scheme with a counter.
    pub(crate) const ECDAA: u16 = 0x001a;
    /// Keys on elliptic curves.
    pub(crate) const ECC: u16 = 0x0023;
    /// Cipher feedback mode.
    pub(crate) const CFB: u16 = 0x0043;
}

/// The curve NIST P-256 (`TPM_ECC_CURVE`).
pub(crate) const P256: u16 = 0x0003;
const P384: u16 = 0x0004;

const RSA_ENCRYPTION: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.2.840.113549.1.1.1");
const EC_PUBLIC_KEY: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.2.840.10045.2.1");
const PRIME256V1: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.2.840.10045.3.1.7");
const SECP384R1: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.3.132.0.34");

/// The bytes are not the structure that they should be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("malformed TPM structure")]
pub(crate) struct Malformed;

/// Reads structures from bytes; never beyond their end.
#[derive(Debug, Clone)]
pub(crate) struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    /// Reads from the start of `bytes`.
    pub(crate) fn new(bytes: &'a [u8]) -> Self {
        Self(bytes)
    }

    /// The next `count` bytes.
    pub(crate) fn take(&mut self, count: usize) -> Result<&'a [u8], Malformed> {
        let (taken, rest) = self.0.split_at_checked(count).ok_or(Malformed)?;
        self.0 = rest;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], Malformed> {
        self.take(N)?.try_into().map_err(|_source| Malformed)
    }

    /// The next byte.
    pub(crate) fn u8(&mut self) -> Result<u8, Malformed> {
        self.array().map(u8::from_be_bytes)
    }

    /// The next number of two bytes.
    pub(crate) fn u16(&mut self) -> Result<u16, Malformed> {
        self.array().map(u16::from_be_bytes)
    }

    /// The next number of four bytes.
    pub(crate) fn u32(&mut self) -> Result<u32, Malformed> {
        self.array().map(u32::from_be_bytes)
    }

    /// The next byte string with its length in front (`TPM2B_…`).
    pub(crate) fn sized(&mut self) -> Result<&'a [u8], Malformed> {
        let length = self.u16()?;
        self.take(length.into())
    }

    /// What is left.
    pub(crate) fn rest(&self) -> &'a [u8] {
        self.0
    }

    /// Succeeds where nothing is left.
    pub(crate) fn end(&self) -> Result<(), Malformed> {
        self.0.is_empty().then_some(()).ok_or(Malformed)
    }
}

/// Writes structures.
#[derive(Debug, Clone, Default)]
pub(crate) struct Writer(Vec<u8>);

impl Writer {
    /// Appends bytes as they are.
    pub(crate) fn bytes(mut self, bytes: &[u8]) -> Self {
        self.0.extend_from_slice(bytes);
        self
    }

    /// Appends one byte.
    pub(crate) fn u8(self, number: u8) -> Self {
        self.bytes(&[number])
    }

    /// Appends a number of two bytes.
    pub(crate) fn u16(self, number: u16) -> Self {
        self.bytes(&number.to_be_bytes())
    }

    /// Appends a number of four bytes.
    pub(crate) fn u32(self, number: u32) -> Self {
        self.bytes(&number.to_be_bytes())
    }

    /// Appends bytes with their length in front. What is longer than a length can say is cut: no
    /// caller has any, since all that is written comes from a TPM's own answers or from constants.
    pub(crate) fn sized(self, bytes: &[u8]) -> Self {
        let length = u16::try_from(bytes.len()).unwrap_or(u16::MAX);
        let bytes = bytes.get(..length.into()).unwrap_or(bytes);
        self.u16(length).bytes(bytes)
    }

    /// What was written.
    pub(crate) fn done(self) -> Vec<u8> {
        self.0
    }
}

/// A key's public area (`TPMT_PUBLIC`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Public {
    /// The hash of the key's name.
    pub(crate) name_alg: u16,
    /// The attributes (`TPMA_OBJECT`).
    pub(crate) attributes: u32,
    /// The scheme that the key is bound to, and its hash; [`alg::NULL`] for none.
    pub(crate) scheme: (u16, u16),
    /// The key.
    pub(crate) key: Key,
}

/// A public key as a TPM writes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Key {
    /// RSA.
    Rsa {
        /// The key's length.
        bits: u16,
        /// The public exponent.
        exponent: u32,
        /// The modulus, big-endian.
        modulus: Vec<u8>,
    },
    /// A point on a curve.
    Ecc {
        /// The curve (`TPM_ECC_CURVE`).
        curve: u16,
        /// Its first coordinate.
        x: Vec<u8>,
        /// Its second coordinate.
        y: Vec<u8>,
    },
}

impl Public {
    /// Reads a whole public area of an RSA or ECC key.
    pub(crate) fn read(bytes: &[u8]) -> Result<Self, Malformed> {
        let mut reader = Reader::new(bytes);
        let kind = reader.u16()?;
        let name_alg = reader.u16()?;
        let attributes = reader.u32()?;
        reader.sized()?;
        if reader.u16()? != alg::NULL {
            // The length and the mode of the cipher that protects what lies below a storage key.
            reader.take(4)?;
        }
        let scheme = match reader.u16()? {
            alg::NULL => (alg::NULL, alg::NULL),
            alg::RSAES => (alg::RSAES, alg::NULL),
            scheme => (scheme, reader.u16()?),
        };
        let key = match kind {
            alg::RSA => {
                let bits = reader.u16()?;
                let exponent = match reader.u32()? {
                    0 => 65_537,
                    exponent => exponent,
                };
                let modulus = reader.sized()?.to_vec();
                Key::Rsa {
                    bits,
                    exponent,
                    modulus,
                }
            }
            alg::ECC => {
                if scheme.0 == alg::ECDAA {
                    reader.u16()?;
                }
                let curve = reader.u16()?;
                if reader.u16()? != alg::NULL {
                    reader.u16()?;
                }
                let (x, y) = (reader.sized()?.to_vec(), reader.sized()?.to_vec());
                Key::Ecc { curve, x, y }
            }
            _ => return Err(Malformed),
        };
        reader.end()?;
        Ok(Self {
            name_alg,
            attributes,
            scheme,
            key,
        })
    }
}

impl Key {
    /// The key as SubjectPublicKeyInfo DER; none for a curve other than P-256 and P-384.
    pub(crate) fn spki(&self) -> Result<Vec<u8>, Malformed> {
        let (algorithm, key) = match self {
            Self::Rsa { modulus, .. } if modulus.is_empty() => return Err(Malformed),
            Self::Rsa {
                exponent, modulus, ..
            } => {
                let exponent = exponent.to_be_bytes();
                let numbers = [modulus.as_slice(), exponent.as_slice()].map(|number| {
                    UintRef::new(number)
                        .and_then(|number| number.to_der())
                        .map_err(|_source| Malformed)
                });
                let [modulus, exponent] = numbers;
                let both = [modulus?, exponent?].concat();
                let key = Any::new(Tag::Sequence, both)
                    .and_then(|sequence| sequence.to_der())
                    .map_err(|_source| Malformed)?;
                ((RSA_ENCRYPTION, Any::null()), key)
            }
            Self::Ecc { curve, x, y } => {
                let (oid, length) = match *curve {
                    P256 => (PRIME256V1, 32),
                    P384 => (SECP384R1, 48),
                    _ => return Err(Malformed),
                };
                let curve = Any::encode_from(&oid).map_err(|_source| Malformed)?;
                let point = [vec![4], padded(x, length)?, padded(y, length)?].concat();
                ((EC_PUBLIC_KEY, curve), point)
            }
        };
        SubjectPublicKeyInfoOwned {
            algorithm: AlgorithmIdentifierOwned {
                oid: algorithm.0,
                parameters: Some(algorithm.1),
            },
            subject_public_key: BitString::from_bytes(&key).map_err(|_source| Malformed)?,
        }
        .to_der()
        .map_err(|_source| Malformed)
    }
}

/// A coordinate without leading zeros, brought to its length again.
fn padded(number: &[u8], length: usize) -> Result<Vec<u8>, Malformed> {
    let missing = length.checked_sub(number.len()).ok_or(Malformed)?;
    Ok([vec![0; missing], number.to_vec()].concat())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::crypto::{KeyAlgorithm, PrivateKey};

    fn public(kind: u16, rest: impl FnOnce(Writer) -> Writer) -> Vec<u8> {
        let head = Writer::default()
            .u16(kind)
            .u16(alg::SHA256)
            .u32(7)
            .sized(b"");
        rest(head.u16(alg::NULL)).done()
    }

    #[test]
    fn keys_become_the_encoding_that_everyone_else_writes() {
        let key = PrivateKey::generate(KeyAlgorithm::EcdsaP256).unwrap();
        let spki = key.public_spki();
        let point = &spki[spki.len() - 64..];
        let ecc = Key::Ecc {
            curve: P256,
            x: point[..32].to_vec(),
            y: point[32..].to_vec(),
        };
        assert_eq!(ecc.spki().unwrap(), spki);

        let key = PrivateKey::generate(KeyAlgorithm::Rsa2048).unwrap();
        let spki = key.public_spki();
        // …, modulus (256 bytes), INTEGER of three bytes 65537.
        let modulus = &spki[spki.len() - 5 - 256..spki.len() - 5];
        let rsa = Key::Rsa {
            bits: 2048,
            exponent: 65_537,
            modulus: modulus.to_vec(),
        };
        assert_eq!(rsa.spki().unwrap(), spki);
    }

    #[test]
    fn public_areas_are_read_to_their_end_and_no_further() {
        let rsa = public(alg::RSA, |area| {
            area.u16(alg::RSASSA)
                .u16(alg::SHA256)
                .u16(2048)
                .u32(0)
                .sized(&[9; 256])
        });
        let read = Public::read(&rsa).unwrap();
        assert_eq!(read.scheme, (alg::RSASSA, alg::SHA256));
        assert_eq!(read.attributes, 7);
        assert!(matches!(
            read.key,
            Key::Rsa {
                exponent: 65_537,
                ..
            }
        ));
        let ecc = public(alg::ECC, |area| {
            area.u16(alg::NULL)
                .u16(P256)
                .u16(alg::NULL)
                .sized(&[1; 31])
                .sized(&[2; 32])
        });
        assert_eq!(Public::read(&ecc).unwrap().key.spki().unwrap().len(), 91);

        for whole in [&rsa, &ecc] {
            for end in 0..whole.len() {
                assert_eq!(Public::read(&whole[..end]), Err(Malformed), "{end}");
            }
            assert_eq!(
                Public::read(&[whole.as_slice(), &[0]].concat()),
                Err(Malformed)
            );
        }
        // A symmetric cipher is no key of these.
        assert_eq!(Public::read(&public(0x0025, |area| area)), Err(Malformed));
        let long = Key::Ecc {
            curve: P256,
            x: vec![1; 33],
            y: vec![1; 32],
        };
        assert_eq!(long.spki(), Err(Malformed));
        let unknown = Key::Ecc {
            curve: 0x10,
            x: vec![1; 32],
            y: vec![1; 32],
        };
        assert_eq!(unknown.spki(), Err(Malformed));
    }
}
