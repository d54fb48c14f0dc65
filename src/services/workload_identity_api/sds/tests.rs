use std::slice::from_ref;

use bytes::Bytes;
use prost::Message as _;

use super::exchange::{Delta, Exchange, Step, Whole};
use super::secrets::{Names, Resource, Secrets, TYPE_URL, need_svids, select};
use crate::crypto::{KeyAlgorithm, PrivateKey, pem};
use crate::pb::envoy::config::core::v3::data_source::Specifier;
use crate::pb::envoy::config::core::v3::{BuildVersion, DataSource, Node, node};
use crate::pb::envoy::extensions::transport_sockets::tls::v3::{
    Secret, SpiffeCertValidatorConfig, secret::Type,
};
use crate::pb::envoy::service::discovery::v3::{DeltaDiscoveryRequest, DiscoveryRequest};
use crate::pb::envoy::r#type::v3::SemanticVersion;
use crate::pb::google::rpc::Status;
use crate::spiffe::TrustDomain;
use crate::workload::tests::{Authority, DOMAIN, HOUR, message, start};
use crate::workload::{Bundles, Federated, Svid};

const OTHER: &str = "other.example";

fn names(all: &[&str]) -> Names {
    all.iter().map(|&name| name.to_owned()).collect()
}

fn svid(path: &str, chain: &[&[u8]]) -> Svid {
    Svid {
        id: format!("spiffe://{DOMAIN}{path}").parse().unwrap(),
        chain: chain.concat().into(),
        key: Bytes::from_static(b"key"),
        hint: String::new(),
        issued_at: start(),
        not_after: start() + HOUR,
        serial: "01".into(),
        name: "foo".into(),
        revision: String::new(),
    }
}

struct World {
    bundles: Bundles,
    svids: Vec<Svid>,
    own: Authority,
    other: Authority,
}

fn world() -> World {
    let [own, other] = [DOMAIN, OTHER].map(Authority::new);
    let mut bundles = Bundles::from_authority(&message(DOMAIN, &[&own])).unwrap();
    bundles.insert(
        TrustDomain::new(OTHER).unwrap(),
        Federated {
            x509: other.der.clone().into(),
            ..Federated::default()
        },
    );
    let key = PrivateKey::generate(KeyAlgorithm::EcdsaP256).unwrap();
    let leaf = own.leaf(&key, &["spiffe://example.org/a"]);
    World {
        bundles,
        svids: vec![svid("/a", &[&leaf, &own.der]), svid("/b", &[&leaf])],
        own,
        other,
    }
}

fn bytes(source: Option<DataSource>) -> String {
    let Some(Specifier::InlineBytes(bytes)) = source.and_then(|source| source.specifier) else {
        panic!("nothing inline");
    };
    String::from_utf8(bytes).unwrap()
}

/// Trust domains and their bundles as a validation context has them.
fn domains(resource: &Resource) -> Vec<(String, String)> {
    assert_eq!(resource.any.type_url, TYPE_URL);
    let secret = Secret::decode(&resource.any.value[..]).unwrap();
    let Some(Type::ValidationContext(context)) = secret.r#type else {
        panic!("no validation context: {}", secret.name);
    };
    let validator = context.custom_validator_config.unwrap();
    assert_eq!(validator.name, "envoy.tls.cert_validator.spiffe");
    let config = validator.typed_config.unwrap();
    assert!(config.type_url.ends_with(".SPIFFECertValidatorConfig"));
    let config = SpiffeCertValidatorConfig::decode(&config.value[..]).unwrap();
    config
        .trust_domains
        .into_iter()
        .map(|domain| (domain.name, bytes(domain.trust_bundle)))
        .collect()
}

#[test]
fn each_name_has_its_resource() {
    let World {
        bundles,
        svids,
        own,
        other,
    } = world();
    let one = |authority: &Authority| pem::encode("CERTIFICATE", &authority.der);
    let own = (DOMAIN.to_owned(), one(&own));
    let other = (OTHER.to_owned(), one(&other));
    let asked = names(&[
        "ROOTCA",
        "ALL",
        "spiffe://example.org",
        "spiffe://other.example",
    ]);
    assert!(!need_svids(&asked, &bundles));
    let found = select(&asked, &[], &bundles).unwrap();
    assert_eq!(domains(&found["ROOTCA"]), *from_ref(&own));
    assert_eq!(domains(&found["spiffe://example.org"]), *from_ref(&own));
    assert_eq!(domains(&found["spiffe://other.example"]), *from_ref(&other));
    assert_eq!(domains(&found["ALL"]), [other, own]);

    let asked = names(&[
        "default",
        "spiffe://example.org/a",
        "spiffe://example.org/b",
    ]);
    assert!(need_svids(&asked, &bundles));
    let found = select(&asked, &svids, &bundles).unwrap();
    for (name, blocks) in [
        ("default", 2),
        ("spiffe://example.org/a", 2),
        ("spiffe://example.org/b", 1),
    ] {
        let secret = Secret::decode(&found[name].any.value[..]).unwrap();
        assert_eq!(secret.name, name);
        let Some(Type::TlsCertificate(certificate)) = secret.r#type else {
            panic!("no certificate: {name}");
        };
        let chain = pem::certificates(&bytes(certificate.certificate_chain)).unwrap();
        assert_eq!(chain.len(), blocks, "a block for each certificate");
        let key = bytes(certificate.private_key);
        assert!(key.starts_with("-----BEGIN PRIVATE KEY-----"), "{key}");
    }

    assert!(need_svids(&Names::new(), &bundles));
    let all: Vec<String> = select(&Names::new(), &svids, &bundles)
        .unwrap()
        .into_keys()
        .collect();
    assert_eq!(
        all,
        [
            "spiffe://example.org",
            "spiffe://example.org/a",
            "spiffe://example.org/b",
            "spiffe://other.example"
        ]
    );
}

#[test]
fn names_that_stand_for_nothing_are_told() {
    let World { bundles, svids, .. } = world();
    let asked = names(&["ROOTCA", "rootca", "spiffe://example.org/c", "spiffe://x"]);
    let error = select(&asked, &svids, &bundles).unwrap_err().to_string();
    assert_eq!(
        error,
        "unknown resource names: rootca, spiffe://example.org/c, spiffe://x"
    );
    assert!(select(&names(&["default"]), &[], &bundles).is_err());
}

/// Resources whose content is a text.
fn secrets(all: &[(&str, &str)]) -> Secrets {
    all.iter()
        .map(|(name, content)| {
            let any = prost_types::Any {
                type_url: TYPE_URL.to_owned(),
                value: content.as_bytes().to_vec(),
            };
            ((*name).to_owned(), Resource { any })
        })
        .collect()
}

fn request(asked: &[&str], nonce: &str, problem: bool) -> DiscoveryRequest {
    DiscoveryRequest {
        resource_names: asked.iter().map(|&name| name.to_owned()).collect(),
        response_nonce: nonce.to_owned(),
        error_detail: problem.then(Status::default),
        ..DiscoveryRequest::default()
    }
}

#[test]
fn the_whole_form_answers_what_is_due() {
    let mut exchange = Whole::default();
    let send = |exchange: &mut Whole, content, must, nonce: &str| {
        exchange
            .respond(&secrets(&[("a", content)]), must, "v".into(), nonce.into())
            .map(|response| response.resources.len())
    };
    assert_eq!(exchange.names(), None);
    // The first request is answered whatever it says of an earlier stream.
    let step = exchange.request(request(&["a"], "old", false)).unwrap();
    assert_eq!(step, Step::Answer);
    assert_eq!(send(&mut exchange, "1", true, "n1"), Some(1));
    for (asked, nonce, problem, step) in [
        (&["a"][..], "n1", false, Step::Nothing),
        (&["a"], "n1", true, Step::Nothing),
        (&["", "a"], "n1", false, Step::Nothing),
        // Of an older response: whatever it says, another request follows.
        (&["b"], "n0", false, Step::Nothing),
        (&["b"], "", false, Step::Nothing),
        (&["a", "b"], "n1", false, Step::Answer),
        (&["b", "a"], "n1", false, Step::Nothing),
        (&["b"], "n1", true, Step::Answer),
    ] {
        let request = request(asked, nonce, problem);
        assert_eq!(
            exchange.request(request).unwrap(),
            step,
            "{asked:?} {nonce} {problem}"
        );
    }
    assert_eq!(exchange.names(), Some(&names(&["b"])));
    // Without a request, only what is new is sent.
    assert_eq!(send(&mut exchange, "1", false, "n2"), None);
    assert_eq!(send(&mut exchange, "2", false, "n2"), Some(1));
    assert_eq!(send(&mut exchange, "2", true, "n3"), Some(1));
    let wrong = DiscoveryRequest {
        type_url: "type.googleapis.com/envoy.config.cluster.v3.Cluster".into(),
        ..request(&["a"], "n3", false)
    };
    let error = exchange.request(wrong).unwrap_err().to_string();
    assert!(
        error.contains("Cluster") && error.contains(TYPE_URL),
        "{error}"
    );
}

fn change(add: &[&str], remove: &[&str], nonce: &str) -> DeltaDiscoveryRequest {
    let texts = |all: &[&str]| all.iter().map(|&name| name.to_owned()).collect();
    DeltaDiscoveryRequest {
        type_url: TYPE_URL.to_owned(),
        resource_names_subscribe: texts(add),
        resource_names_unsubscribe: texts(remove),
        response_nonce: nonce.to_owned(),
        ..DeltaDiscoveryRequest::default()
    }
}

#[test]
fn the_delta_form_sends_what_changed() {
    let mut exchange = Delta::default();
    let respond = |exchange: &mut Delta, all: &[(&str, &str)], must| {
        let response = exchange.respond(&secrets(all), must, "v".into(), "n".into())?;
        let changed: Vec<String> = response.resources.into_iter().map(|r| r.name).collect();
        Some((changed.join(","), response.removed_resources.join(",")))
    };
    let told = |changed: &str, removed: &str| Some((changed.to_owned(), removed.to_owned()));
    let step = exchange.request(change(&["a", "b"], &[], "")).unwrap();
    assert_eq!(step, Step::Answer);
    let first = [("a", "1"), ("b", "1")];
    assert_eq!(respond(&mut exchange, &first, true), told("a,b", ""));
    let step = exchange.request(change(&[], &[], "n")).unwrap();
    assert_eq!(step, Step::Nothing, "an acknowledgement");
    assert_eq!(respond(&mut exchange, &first, false), None);
    let second = [("a", "1"), ("b", "2")];
    assert_eq!(respond(&mut exchange, &second, false), told("b", ""));
    // Asked for again: sent again, though it is the same.
    let step = exchange.request(change(&["a"], &[], "")).unwrap();
    assert_eq!(step, Step::Answer);
    assert_eq!(respond(&mut exchange, &second, true), told("a", ""));
    let step = exchange.request(change(&[], &["a"], "")).unwrap();
    assert_eq!(step, Step::Nothing);
    assert_eq!(exchange.names(), Some(&names(&["b"])));
    assert_eq!(respond(&mut exchange, &[("b", "2")], false), None);
    assert_eq!(respond(&mut exchange, &[], false), told("", "b"));
    // Whoever lets go of the last name gets nothing more, whatever it acknowledges.
    for request in [change(&[], &["b"], ""), change(&[], &[], "n")] {
        assert_eq!(exchange.request(request).unwrap(), Step::Nothing);
        assert_eq!(exchange.names(), None);
    }
    exchange.request(change(&["a"], &[], "")).unwrap();
    assert_eq!(exchange.names(), Some(&names(&["a"])));
    // `*` and no name at all mean everything.
    let mut exchange = Delta::default();
    exchange.request(change(&["*"], &[], "")).unwrap();
    assert_eq!(exchange.names(), Some(&Names::new()));
}

#[test]
fn versions_follow_the_content() {
    let [one, same, other] = ["1", "1", "2"].map(|content| secrets(&[("a", content)]));
    assert_eq!(one["a"].version(), same["a"].version());
    assert_ne!(one["a"].version(), other["a"].version());
}

#[test]
fn an_envoy_tells_its_version() {
    let node = |major_number, minor_number| Node {
        user_agent_version_type: Some(node::UserAgentVersionType::UserAgentBuildVersion(
            BuildVersion {
                version: Some(SemanticVersion {
                    major_number,
                    minor_number,
                    patch: 0,
                }),
            },
        )),
        ..Node::default()
    };
    assert_eq!(super::envoy_version(&node(1, 17)), Some((1, 17)));
    assert_eq!(super::envoy_version(&Node::default()), None);
    assert!((1, 17) < super::FIRST_ENVOY && (2, 0) > super::FIRST_ENVOY);
}
