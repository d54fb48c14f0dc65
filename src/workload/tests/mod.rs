//! An authority to test against, and the tests of the parts that need one.

mod bundle;
mod cache;
mod crl;
mod issue;

use std::time::{Duration, SystemTime};

use crate::crypto::{KeyAlgorithm, PrivateKey};
use crate::embedded::ca::mint::{Issuer, Subject, Template, serial, uri};
use crate::pb::types::{CaKeySet, CertAuthoritySpecV2, CertAuthorityV2, TlsKeyPair};
use x509_cert::ext::pkix::KeyUsages;
use x509_cert::name::RdnSequence;

/// The time at which every test begins.
pub(crate) fn start() -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_secs(1_795_252_502)
}

pub(crate) const HOUR: Duration = Duration::from_hours(1);
pub(crate) const DOMAIN: &str = "example.org";

/// A certificate authority.
pub(crate) struct Authority {
    name: RdnSequence,
    key: PrivateKey,
    pub(crate) der: Vec<u8>,
}

impl Authority {
    pub(crate) fn new(name: &str) -> Self {
        Self::with_key(name, PrivateKey::generate(KeyAlgorithm::EcdsaP256).unwrap())
    }

    fn with_key(name: &str, key: PrivateKey) -> Self {
        let name = subject(name);
        let der = template(&name, &key.public_spki(), &[], true)
            .sign(Issuer {
                name: &name,
                key_id: None,
                key: &key,
            })
            .unwrap();
        Self { name, key, der }
    }

    /// A certificate of `key` with these URI names, valid for an hour from [`start`].
    pub(crate) fn leaf(&self, key: &PrivateKey, uris: &[&str]) -> Vec<u8> {
        self.leaf_at(key, uris, start())
    }

    pub(crate) fn leaf_at(&self, key: &PrivateKey, uris: &[&str], from: SystemTime) -> Vec<u8> {
        let spki = key.public_spki();
        let subject = subject("workload");
        let template = Template {
            not_before: from,
            not_after: from + HOUR,
            ..template(&subject, &spki, uris, false)
        };
        template.sign(self.issuer()).unwrap()
    }

    /// Another authority's certificate, signed by this one.
    fn cross_sign(&self, other: &Self) -> Vec<u8> {
        let spki = other.key.public_spki();
        template(&other.name, &spki, &[], true)
            .sign(self.issuer())
            .unwrap()
    }

    fn issuer(&self) -> Issuer<'_> {
        Issuer {
            name: &self.name,
            key_id: None,
            key: &self.key,
        }
    }
}

fn subject(name: &str) -> RdnSequence {
    let organization = crate::crypto::x509::ORGANIZATION;
    Subject::default().one(organization, name).unwrap().finish()
}

fn template<'a>(
    name: &RdnSequence,
    spki: &'a [u8],
    uris: &[&str],
    authority: bool,
) -> Template<'a> {
    Template {
        serial: serial(),
        subject: name.clone(),
        not_before: start(),
        not_after: start() + HOUR,
        spki,
        key_usage: KeyUsages::DigitalSignature.into(),
        extended: &[],
        authority,
        names: uris.iter().map(|name| uri(name).unwrap()).collect(),
    }
}

/// The SPIFFE authority as the cluster sends it: one active key, the others additional.
pub(crate) fn message(domain: &str, authorities: &[&Authority]) -> CertAuthorityV2 {
    let keys = |authorities: &[&Authority]| CaKeySet {
        tls: authorities
            .iter()
            .map(|authority| TlsKeyPair {
                cert: crate::crypto::pem::encode("CERTIFICATE", &authority.der).into_bytes(),
                ..TlsKeyPair::default()
            })
            .collect(),
        ..CaKeySet::default()
    };
    let (active, additional) = authorities.split_at(1);
    CertAuthorityV2 {
        spec: Some(CertAuthoritySpecV2 {
            r#type: "spiffe".into(),
            cluster_name: domain.into(),
            active_keys: Some(keys(active)),
            additional_trusted_keys: Some(keys(additional)),
            ..CertAuthoritySpecV2::default()
        }),
        ..CertAuthorityV2::default()
    }
}
