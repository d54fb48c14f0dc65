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
use crate::spiffe::{SpiffeId, TrustDomain};
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

/// Names of resources.
pub(super) type Names = BTreeSet<String>;

/// What a client asks for.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Wanted {
    /// Everything there is, each thing under its ID.
    pub(super) all: bool,
    /// These, whatever else.
    pub(super) names: Names,
}

impl Wanted {
    /// Whether nothing at all is asked for.
    pub(super) fn is_empty(&self) -> bool {
        !self.all && self.names.is_empty()
    }
}

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

/// What is asked for, as far as there is anything.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Selected {
    pub(super) secrets: Secrets,
    /// Names that stand for nothing.
    pub(super) unknown: Vec<String>,
}

/// Whether `wanted` can only be answered with SVIDs. Bundles alone are for everyone, as in the calls of
/// the standard.
pub(super) fn need_svids(wanted: &Wanted) -> bool {
    // An ID without a path is that of a trust domain, which may be gone.
    let may_be_svid = |name: &String| name == DEFAULT || name.parse::<SpiffeId>().is_ok();
    wanted.all || wanted.names.iter().any(may_be_svid)
}

/// Every resource that is `wanted`.
pub(super) fn select(wanted: &Wanted, svids: &[Svid], bundles: &Bundles) -> Selected {
    let mut names = wanted.names.clone();
    if wanted.all {
        names.extend(svids.iter().map(|svid| svid.id.to_string()));
        names.insert(bundles.trust_domain().id());
        names.extend(bundles.federated_x509().map(|(domain, _)| domain.id()));
    }
    let mut selected = Selected::default();
    for name in names {
        let content = bundle(&name, bundles).or_else(|| svid(&name, svids).map(certificate));
        match content {
            Some(content) => {
                let resource = Resource::of(&name, content);
                selected.secrets.insert(name, resource);
            }
            None => selected.unknown.push(name),
        }
    }
    selected
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
