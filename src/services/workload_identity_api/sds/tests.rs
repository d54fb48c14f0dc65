use std::slice::from_ref;

use bytes::Bytes;
use prost::Message as _;

use super::exchange::{Delta, Exchange, Invalid, Step, Whole};
use super::secrets::{Names, Resource, Secrets, Selected, TYPE_URL, Wanted, need_svids, select};
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

fn wanted(all: &[&str]) -> Wanted {
    Wanted {
        all: false,
        names: names(all),
    }
}

const EVERYTHING: Wanted = Wanted {
    all: true,
    names: Names::new(),
};

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
    let asked = wanted(&[
        "ROOTCA",
        "ALL",
        "spiffe://example.org",
        "spiffe://other.example",
        "spiffe://gone.example",
    ]);
    assert!(
        !need_svids(&asked),
        "a trust domain that is gone is no SVID"
    );
    let found = select(&asked, &[], &bundles).secrets;
    assert_eq!(domains(&found["ROOTCA"]), *from_ref(&own));
    assert_eq!(domains(&found["spiffe://example.org"]), *from_ref(&own));
    assert_eq!(domains(&found["spiffe://other.example"]), *from_ref(&other));
    assert_eq!(domains(&found["ALL"]), [other, own]);

    let asked = wanted(&[
        "default",
        "spiffe://example.org/a",
        "spiffe://example.org/b",
    ]);
    assert!(need_svids(&asked));
    let found = select(&asked, &svids, &bundles).secrets;
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

    assert!(need_svids(&EVERYTHING));
    let found = |wanted: &Wanted| {
        let names = select(wanted, &svids, &bundles).secrets.into_keys();
        names.collect::<Vec<_>>()
    };
    let all = [
        "spiffe://example.org",
        "spiffe://example.org/a",
        "spiffe://example.org/b",
        "spiffe://other.example",
    ];
    assert_eq!(found(&EVERYTHING), all);
    let more = Wanted {
        all: true,
        names: names(&["default"]),
    };
    assert_eq!(found(&more), [&["default"], &all[..]].concat());
}

#[test]
fn names_that_stand_for_nothing_are_told() {
    let World { bundles, svids, .. } = world();
    let asked = wanted(&["ROOTCA", "rootca", "spiffe://example.org/c", "spiffe://x"]);
    let selected = select(&asked, &svids, &bundles);
    assert_eq!(
        selected.unknown,
        ["rootca", "spiffe://example.org/c", "spiffe://x"]
    );
    assert!(selected.secrets.contains_key("ROOTCA"));
    // One form ends with the names, the other sends the rest and says which are none.
    let error = Whole::default()
        .respond(selected.clone(), true, String::new(), String::new())
        .unwrap_err();
    assert_eq!(
        error.to_string(),
        "unknown resource names: rootca, spiffe://example.org/c, spiffe://x"
    );
    let mut delta = Delta::default();
    let asked: Vec<&str> = asked.names.iter().map(String::as_str).collect();
    delta.request(change(&asked, &[], "")).unwrap();
    let answer = delta.respond(selected.clone(), true, String::new(), String::new());
    let answer = answer.unwrap().unwrap();
    assert_eq!(answer.resources.len(), 1);
    assert_eq!(answer.removed_resources, selected.unknown);
    let again = delta.respond(selected, false, String::new(), String::new());
    assert_eq!(again.unwrap(), None, "told once");

    assert_eq!(
        select(&wanted(&["default"]), &[], &bundles).unknown,
        ["default"]
    );
    let long = vec!["x\n".repeat(5000); 2];
    let text = Invalid::Unknown(long).to_string();
    assert!(text.len() < 700 && !text.contains('\n'), "{text}");
}

#[test]
fn names_without_an_end_are_refused() {
    let long = "x".repeat(300 * 1024);
    let asked = Whole::default().request(request(&[&long], "", false));
    assert_eq!(asked, Err(Invalid::Names));
    let mut delta = Delta::default();
    let mut more = (0..).map(|n| format!("{n}{}", "x".repeat(10_000)));
    let refused = (0..100).find_map(|_| {
        let name = more.next().unwrap();
        delta.request(change(&[&name], &[], "")).err()
    });
    assert_eq!(refused, Some(Invalid::Names));
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

fn selected(all: &[(&str, &str)]) -> Selected {
    Selected {
        secrets: secrets(all),
        unknown: Vec::new(),
    }
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
            .respond(selected(&[("a", content)]), must, "v".into(), nonce.into())
            .unwrap()
            .map(|response| response.resources.len())
    };
    assert!(exchange.wanted().is_empty());
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
    assert_eq!(exchange.wanted(), &wanted(&["b"]));
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

#[test]
fn no_names_are_everything_until_there_were_some() {
    let asked = |exchange: &mut Whole, names: &[&str]| {
        let step = exchange.request(request(names, "n", false)).unwrap();
        (step, exchange.wanted().clone())
    };
    let mut exchange = Whole::default();
    let answer = |exchange: &mut Whole| {
        let response = exchange.respond(selected(&[]), true, "v".into(), "n".into());
        assert!(response.unwrap().is_some());
    };
    assert_eq!(asked(&mut exchange, &[]), (Step::Answer, EVERYTHING));
    answer(&mut exchange);
    assert_eq!(asked(&mut exchange, &[]), (Step::Nothing, EVERYTHING));
    let one = (Step::Answer, wanted(&["a"]));
    assert_eq!(asked(&mut exchange, &["a"]), one);
    answer(&mut exchange);
    let none = (Step::Nothing, Wanted::default());
    assert_eq!(asked(&mut exchange, &[]), none, "it lets go of the last");
    assert_eq!(asked(&mut exchange, &["*"]), (Step::Answer, EVERYTHING));
    let both = Wanted {
        all: true,
        names: names(&["a"]),
    };
    assert_eq!(asked(&mut exchange, &["*", "a"]), (Step::Answer, both));
    assert_eq!(asked(&mut exchange, &["a"]), one);
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
        let response = exchange.respond(selected(all), must, "v".into(), "n".into());
        let response = response.unwrap()?;
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
    assert_eq!(exchange.wanted(), &wanted(&["b"]));
    assert_eq!(respond(&mut exchange, &[("b", "2")], false), None);
    assert_eq!(respond(&mut exchange, &[], false), told("", "b"));
    // Whoever lets go of the last name gets nothing more, whatever it acknowledges.
    for request in [change(&[], &["b"], ""), change(&[], &[], "n")] {
        assert_eq!(exchange.request(request).unwrap(), Step::Nothing);
        assert!(exchange.wanted().is_empty());
    }
    exchange.request(change(&["a"], &[], "")).unwrap();
    assert_eq!(exchange.wanted(), &wanted(&["a"]));
}

#[test]
fn a_delta_stream_may_ask_for_everything_and_for_names_besides() {
    for first in [change(&[], &[], ""), change(&["*"], &[], "")] {
        let mut exchange = Delta::default();
        let mut ask = |change, all: &[(&str, &str)]| {
            let must = exchange.request(change).unwrap() == Step::Answer;
            let response = exchange.respond(selected(all), must, "v".into(), "n".into());
            let response = response.unwrap()?;
            let changed: Vec<String> = response.resources.into_iter().map(|r| r.name).collect();
            Some((changed.join(","), response.removed_resources.join(",")))
        };
        let told = |changed: &str, removed: &str| Some((changed.to_owned(), removed.to_owned()));
        let (all, more) = (
            [("a", "1"), ("b", "1")],
            [("a", "1"), ("b", "1"), ("c", "1")],
        );
        assert_eq!(ask(first, &all), told("a,b", ""));
        // One more; nothing of the others is taken away.
        assert_eq!(ask(change(&["c"], &[], ""), &more), told("c", ""));
        assert_eq!(ask(change(&["b"], &[], ""), &more), told("b", ""));
        // Let go of by name: it is told whether everything holds it.
        assert_eq!(ask(change(&[], &["c"], ""), &all), told("", "c"));
        assert_eq!(ask(change(&[], &["b"], ""), &all), told("b", ""));
        // Let go of everything but one.
        assert_eq!(ask(change(&["b"], &["*"], ""), &all[1..]), told("b", ""));
        assert_eq!(ask(change(&[], &[], "n"), &all[1..]), None);
    }
}

#[test]
fn what_a_client_kept_of_an_earlier_stream_is_taken_back_if_it_is_gone() {
    let mut exchange = Delta::default();
    let kept = ["a", "gone", "not asked for"].map(|name| (name.to_owned(), "1".to_owned()));
    let first = DeltaDiscoveryRequest {
        initial_resource_versions: kept.into(),
        ..change(&["a", "gone"], &[], "")
    };
    exchange.request(first).unwrap();
    let answer = exchange.respond(selected(&[("a", "1")]), true, "v".into(), "n".into());
    assert_eq!(answer.unwrap().unwrap().removed_resources, ["gone"]);
}

/// Resources that a client may have or ask for. The last two are not part of everything.
const UNIVERSE: [&str; 5] = ["a", "b", "c", "alias", "other alias"];

/// What there is, by name: a content, or nothing.
type There = [u8; UNIVERSE.len()];

fn pick(wanted: &Wanted, there: There) -> Selected {
    let is_wanted = |at: usize, name: &str| (wanted.all && at < 3) || wanted.names.contains(name);
    let mut found = Selected::default();
    for (at, (name, content)) in UNIVERSE.into_iter().zip(there).enumerate() {
        if content != 0 && is_wanted(at, name) {
            found
                .secrets
                .extend(secrets(&[(name, &content.to_string())]));
        } else if wanted.names.contains(name) {
            found.unknown.push(name.to_owned());
        }
    }
    found
}

/// The names whose bits are set, and everything for the highest.
fn chosen(bits: u8) -> Vec<&'static str> {
    let names = UNIVERSE.into_iter().chain(["*"]).enumerate();
    names
        .filter(|(at, _)| bits & (1 << at) != 0)
        .map(|(_, name)| name)
        .collect()
}

#[test]
fn fuzz_a_delta_client_has_what_it_asked_for_whatever_happens() {
    let check = bolero::check!().with_type::<Vec<(u8, u8, u8)>>();
    check.for_each(|steps| {
        let (mut exchange, mut there) = (Delta::default(), [1; UNIVERSE.len()]);
        let (mut held, mut asked) = (Secrets::new(), Wanted::default());
        for (at, (what, add, remove)) in steps.iter().take(30).enumerate() {
            let mut must = false;
            if what % 2 == 0 || at == 0 {
                let (add, remove) = (chosen(*add), chosen(*remove));
                let step = exchange.request(change(&add, &remove, "")).unwrap();
                must = step == Step::Answer;
                asked.all |= add.contains(&"*") || (at == 0 && add.is_empty());
                asked.names.extend(add.iter().map(|&name| name.to_owned()));
                asked.names.remove("*");
                for name in remove {
                    asked.names.remove(name);
                    asked.all &= name != "*";
                }
                // What may be part of everything is kept until it is told.
                let all = asked.all;
                held.retain(|name, _| all || asked.names.contains(name));
            } else {
                there[usize::from(*add) % UNIVERSE.len()] = remove % 3;
            }
            assert_eq!(exchange.wanted(), &asked);
            if asked.is_empty() {
                assert!(held.is_empty());
                continue;
            }
            let selected = pick(&asked, there);
            let due = selected.secrets.clone();
            let response = exchange.respond(selected, must, String::new(), String::new());
            let response = response.unwrap();
            assert!(response.is_some() || !must, "an answer was due");
            for resource in response.iter().flat_map(|response| &response.resources) {
                let any = resource.resource.clone().unwrap();
                held.insert(resource.name.clone(), Resource { any });
            }
            for name in response
                .iter()
                .flat_map(|response| &response.removed_resources)
            {
                held.remove(name);
            }
            assert_eq!(held, due);
        }
    });
}

#[test]
fn fuzz_a_client_of_the_whole_form_has_what_it_asked_for_whatever_happens() {
    let check = bolero::check!().with_type::<Vec<(u8, u8, u8, Option<String>)>>();
    check.for_each(|steps| {
        let (mut exchange, mut there) = (Whole::default(), [1; UNIVERSE.len()]);
        let (mut held, mut nonce) = (Secrets::new(), String::new());
        for (at, (what, names, content, problem)) in steps.iter().take(30).enumerate() {
            let mut must = false;
            if what % 2 == 0 || at == 0 {
                let stale = what % 16 == 2;
                let request = DiscoveryRequest {
                    error_detail: problem.clone().map(|message| Status {
                        message,
                        ..Status::default()
                    }),
                    ..request(&chosen(*names), if stale { "stale" } else { &nonce }, false)
                };
                let before = exchange.wanted().clone();
                must = exchange.request(request).unwrap() == Step::Answer;
                if stale && !nonce.is_empty() {
                    assert_eq!((exchange.wanted(), must), (&before, false));
                }
            } else {
                there[usize::from(*names) % UNIVERSE.len()] = content % 3;
            }
            if exchange.wanted().is_empty() {
                continue;
            }
            let selected = pick(exchange.wanted(), there);
            let (due, unknown) = (selected.secrets.clone(), selected.unknown.clone());
            match exchange.respond(selected, must, String::new(), at.to_string()) {
                Err(problem) => {
                    assert_eq!(problem, Invalid::Unknown(unknown));
                    return;
                }
                Ok(None) => assert!(!must, "an answer was due"),
                Ok(Some(response)) => {
                    nonce = response.nonce;
                    let names = due.keys().cloned();
                    let all = response.resources.into_iter().map(|any| Resource { any });
                    held = names.zip(all).collect();
                }
            }
            assert_eq!(held, due);
        }
    });
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
