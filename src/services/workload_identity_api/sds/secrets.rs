//! What stands behind the names that an Envoy asks for.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;

use bytes::Bytes;
use prost::Message as _;
use prost_types::Any;

use crate::crypto::{pem, sha256_hex, x509};
use crate::pb::envoy::config::core::v3::data_source::Specifier;
use crate::pb::envoy::config::core::v3::{DataSource, TypedExtensionConfig};
use crate::pb::envoy::extensions::transport_sockets::tls::v3::spiffe_cert_validator_config::TrustDomain as Domain;
use crate::pb::envoy::extensions::transport_sockets::tls::v3::{
    CertificateValidationContext, Secret, SpiffeCertValidatorConfig, TlsCertificate, secret::Type,
};
use crate::spiffe::TrustDomain;
use crate::workload::{Bundles, Svid};

/// The type of every resource here.
pub(super) const TYPE_URL: &str =
    "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.Secret";
/// The validator's name and the type of its configuration.
const VALIDATOR: &str = "envoy.tls.cert_validator.spiffe";
const VALIDATOR_TYPE_URL: &str =
    "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.SPIFFECertValidatorConfig";

/// The first SVID, whatever its ID.
const DEFAULT: &str = "default";
/// The own trust domain's bundle.
const ROOT: &str = "ROOTCA";
/// Every bundle, each for its trust domain.
const ALL: &str = "ALL";

/// Names that were asked for; none means everything there is.
pub(super) type Names = BTreeSet<String>;

/// Resources by their names.
pub(super) type Secrets = BTreeMap<String, Resource>;

/// An encoded resource.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Resource {
    pub(super) any: Any,
}

impl Resource {
    fn of(name: &str, content: Type) -> Self {
        let secret = Secret {
            name: name.to_owned(),
            r#type: Some(content),
        };
        Self {
            any: Any {
                type_url: TYPE_URL.to_owned(),
                value: secret.encode_to_vec(),
            },
        }
    }

    /// The same content has the same version, also in another process of the agent.
    pub(super) fn version(&self) -> String {
        sha256_hex(&self.any.value).chars().take(32).collect()
    }
}

/// Names that stand for nothing here.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("unknown resource names: {}", .0.join(", "))]
pub(super) struct Unknown(Vec<String>);

/// Whether `names` can only be answered with SVIDs. Bundles alone are for everyone, as in the calls of
/// the standard.
pub(super) fn need_svids(names: &Names, bundles: &Bundles) -> bool {
    names.is_empty() || names.iter().any(|name| bundle(name, bundles).is_none())
}

/// Every resource that `names` stand for.
pub(super) fn select(names: &Names, svids: &[Svid], bundles: &Bundles) -> Result<Secrets, Unknown> {
    if names.is_empty() {
        let all = svids.iter().map(|svid| svid.id.to_string());
        let own = bundles.trust_domain().id();
        let federated = bundles.federated_x509().map(|(domain, _)| domain.id());
        let names = all.chain([own]).chain(federated).collect();
        return select(&names, svids, bundles);
    }
    let mut found = Secrets::new();
    let mut unknown = Vec::new();
    for name in names {
        let content = bundle(name, bundles).or_else(|| svid(name, svids).map(certificate));
        match content {
            Some(content) => drop(found.insert(name.clone(), Resource::of(name, content))),
            None => unknown.push(name.clone()),
        }
    }
    if unknown.is_empty() {
        Ok(found)
    } else {
        Err(Unknown(unknown))
    }
}

fn svid<'a>(name: &str, svids: &'a [Svid]) -> Option<&'a Svid> {
    match name {
        DEFAULT => svids.first(),
        id => svids.iter().find(|svid| svid.id.to_string() == id),
    }
}

/// The validation context that `name` stands for, if it is one of a bundle.
fn bundle(name: &str, bundles: &Bundles) -> Option<Type> {
    let own = (bundles.trust_domain(), bundles.local());
    let domains: Vec<(&TrustDomain, &Bytes)> = match name {
        ROOT => vec![own],
        ALL => bundles.federated_x509().chain([own]).collect(),
        id if id == own.0.id() => vec![own],
        id => bundles
            .federated_x509()
            .filter(|(domain, _)| domain.id() == id)
            .collect(),
    };
    (!domains.is_empty()).then(|| validation(&domains))
}

fn certificate(svid: &Svid) -> Type {
    Type::TlsCertificate(TlsCertificate {
        certificate_chain: Some(inline(certificates(&svid.chain))),
        private_key: Some(inline(pem::encode("PRIVATE KEY", &svid.key))),
    })
}

fn validation(domains: &[(&TrustDomain, &Bytes)]) -> Type {
    let config = SpiffeCertValidatorConfig {
        trust_domains: domains
            .iter()
            .map(|(domain, bundle)| Domain {
                name: domain.name().to_owned(),
                trust_bundle: Some(inline(certificates(bundle))),
            })
            .collect(),
    };
    Type::ValidationContext(CertificateValidationContext {
        custom_validator_config: Some(TypedExtensionConfig {
            name: VALIDATOR.to_owned(),
            typed_config: Some(Any {
                type_url: VALIDATOR_TYPE_URL.to_owned(),
                value: config.encode_to_vec(),
            }),
        }),
    })
}

/// A block for each certificate. The bytes are those of certificates that were read before.
fn certificates(ders: &[u8]) -> String {
    let mut text = String::new();
    for der in x509::split(ders).unwrap_or_default() {
        let _written = write!(text, "{}", pem::encode("CERTIFICATE", der));
    }
    text
}

fn inline(text: String) -> DataSource {
    DataSource {
        specifier: Some(Specifier::InlineBytes(text.into_bytes())),
    }
}
