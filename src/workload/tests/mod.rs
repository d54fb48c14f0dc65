//! An authority to test against, and the tests of the parts that need one.

mod bundle;
mod cache;
mod crl;
mod issue;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use serde_json::{Value, json};

use super::Bundles;
use super::jwt::JwtSvid;
use crate::crypto::{KeyAlgorithm, PrivateKey};
use crate::embedded::ca::mint::{Issuer, Subject, Template, serial, uri};
use crate::pb::types::{CaKeySet, CertAuthoritySpecV2, CertAuthorityV2, TlsKeyPair};
use crate::spiffe::TrustDomain;
use crate::spiffe::jwt::JwtBundle;
use x509_cert::ext::pkix::KeyUsages;
use x509_cert::name::RdnSequence;

/// The time at which every test begins.
pub(crate) fn start() -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_secs(1_795_252_502)
}

pub(crate) const HOUR: Duration = Duration::from_hours(1);
pub(crate) const DOMAIN: &str = "example.org";

/// A certificate authority.
#[derive(Debug)]
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

/// A key that signs JWT-SVIDs.
#[derive(Debug)]
pub(crate) struct TokenKey(PrivateKey);

impl TokenKey {
    pub(crate) fn new() -> Self {
        Self(PrivateKey::generate(KeyAlgorithm::Rsa2048).unwrap())
    }

    fn bundle(&self) -> JwtBundle {
        JwtBundle::from_pems([self.0.public_pem().as_str()]).unwrap()
    }

    /// Bundles of [`DOMAIN`] in which it is.
    pub(crate) fn bundles(&self) -> Arc<Bundles> {
        let domain = TrustDomain::new(DOMAIN).unwrap();
        let authority = Authority::new(DOMAIN).der.into();
        let bundles = Bundles::restored(domain, &authority, self.bundle(), BTreeMap::new());
        Arc::new(bundles.unwrap())
    }

    /// A JWT-SVID for `audiences`.
    pub(crate) fn token(&self, path: &str, audiences: &[&str], not_after: SystemTime) -> JwtSvid {
        let keys: Value = serde_json::from_slice(&self.bundle().jwks()).unwrap();
        let id = format!("spiffe://{DOMAIN}{path}");
        let expires = not_after.duration_since(SystemTime::UNIX_EPOCH).unwrap();
        let header = json!({ "alg": "RS256", "kid": keys["keys"][0]["kid"], "typ": "JWT" });
        let claims = json!({ "sub": id, "aud": audiences, "exp": expires.as_secs() });
        let part = |value: &Value| URL_SAFE_NO_PAD.encode(value.to_string());
        let signed = format!("{}.{}", part(&header), part(&claims));
        let signature = URL_SAFE_NO_PAD.encode(self.0.sign(signed.as_bytes()).unwrap());
        JwtSvid {
            id: id.parse().unwrap(),
            token: format!("{signed}.{signature}"),
            hint: String::new(),
            not_after: SystemTime::UNIX_EPOCH + Duration::from_secs(expires.as_secs()),
        }
    }
}
