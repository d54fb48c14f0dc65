//! Identities for tests, signed by a throw-away authority.

use std::time::{Duration, SystemTime};

use der::asn1::{BitString, ObjectIdentifier, OctetString};
use der::{Decode as _, Encode as _};
use x509_cert::ext::Extension;
use x509_cert::serial_number::SerialNumber;
use x509_cert::spki::SubjectPublicKeyInfoOwned;
use x509_cert::time::Validity;
use x509_cert::{Certificate, TbsCertificate, Version};

use super::Identity;
use crate::crypto::ssh::{Holder, NewCertificate};
use crate::crypto::{KeyAlgorithm, PrivateKey, pem, random};

/// Where the certificates of these identities begin to be valid.
pub(crate) fn start() -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_secs(1_700_000_000)
}

/// A cluster's authority.
#[derive(Debug)]
pub(crate) struct Authority {
    pub(crate) cluster: String,
    pub(crate) key: PrivateKey,
    pub(crate) pem: String,
}

impl Authority {
    pub(crate) fn new(cluster: &str) -> Self {
        Self::with(cluster, None)
    }

    /// One whose certificate is sound but for an extension, which TLS reads and nobody else.
    pub(crate) fn unusable(cluster: &str) -> Self {
        let extension = Extension {
            extn_id: ObjectIdentifier::new_unwrap("2.5.29.17"),
            critical: false,
            extn_value: OctetString::new([0x05, 0x00]).unwrap(),
        };
        Self::with(cluster, Some(vec![extension]))
    }

    fn with(cluster: &str, extensions: Option<Vec<Extension>>) -> Self {
        let key = PrivateKey::generate(KeyAlgorithm::EcdsaP256).unwrap();
        let name = format!("O={cluster},CN={cluster}");
        let pem = certificate(
            &key,
            &name,
            &key,
            &name,
            (start(), Duration::from_hours(1000)),
            extensions,
        );
        Self {
            cluster: cluster.to_owned(),
            key,
            pem,
        }
    }

    pub(crate) fn ssh_line(&self) -> String {
        self.key.public_ssh_line().unwrap()
    }

    /// A renewable identity of the bot `example`, valid for an hour from `from`.
    pub(crate) fn identity(&self, key: PrivateKey, generation: u64, from: SystemTime) -> Identity {
        self.identity_of(
            "bot-example",
            key,
            generation,
            (from, Duration::from_hours(1)),
        )
    }

    /// The same of any user, for any time.
    pub(crate) fn identity_of(
        &self,
        user: &str,
        key: PrivateKey,
        generation: u64,
        (from, life): (SystemTime, Duration),
    ) -> Identity {
        let attribute = |oid: &str, text: &str| {
            let length = u8::try_from(text.len()).unwrap();
            format!("{oid}=#0c{length:02x}{}", hex::encode(text))
        };
        let subject = format!(
            "{},{},O=role,CN={user}",
            attribute("1.3.9999.1.14", &generation.to_string()),
            attribute("1.3.9999.1.13", "true"),
        );
        let issuer = format!("O={0},CN={0}", self.cluster);
        let tls = certificate(&key, &subject, &self.key, &issuer, (from, life), None);
        let ssh = NewCertificate {
            holder: Holder::User,
            spki: &key.public_spki(),
            serial: 1,
            key_id: user,
            principals: &["root".to_owned(), "-teleport-internal-join".to_owned()],
            valid_after: from,
            valid_before: from + life,
            extensions: &std::collections::BTreeMap::new(),
        }
        .sign(&self.key)
        .unwrap();
        Identity::new(key, tls, vec![self.pem.clone()], ssh, vec![self.ssh_line()]).unwrap()
    }
}

fn certificate(
    key: &PrivateKey,
    subject: &str,
    signer: &PrivateKey,
    issuer: &str,
    (from, life): (SystemTime, Duration),
    extensions: Option<Vec<Extension>>,
) -> String {
    let tbs = TbsCertificate {
        version: Version::V3,
        serial_number: SerialNumber::new(&[&[0x40][..], &random::<8>()].concat()).unwrap(),
        signature: signer.signature_algorithm(),
        issuer: issuer.parse().unwrap(),
        validity: Validity {
            not_before: from.try_into().unwrap(),
            not_after: (from + life).try_into().unwrap(),
        },
        subject: subject.parse().unwrap(),
        subject_public_key_info: SubjectPublicKeyInfoOwned::from_der(&key.public_spki()).unwrap(),
        issuer_unique_id: None,
        subject_unique_id: None,
        extensions,
    };
    let signature = signer.sign(&tbs.to_der().unwrap()).unwrap();
    let certificate = Certificate {
        tbs_certificate: tbs,
        signature_algorithm: signer.signature_algorithm(),
        signature: BitString::from_bytes(&signature).unwrap(),
    };
    pem::encode("CERTIFICATE", &certificate.to_der().unwrap())
}
