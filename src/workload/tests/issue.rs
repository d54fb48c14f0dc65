use tonic::Status;

use super::*;
use crate::cluster::ClusterError;
use crate::pb::teleport::workloadidentity::v1::credential::Credential as Kind;
use crate::pb::teleport::workloadidentity::v1::{Credential, X509svidCredential};
use crate::workload::issue::{accept, leads_to};
use crate::workload::{Bundles, IssueError};

const ID: &str = "spiffe://example.org/svc/foo";

struct World {
    authority: Authority,
    bundles: Bundles,
    key: PrivateKey,
}

fn world() -> World {
    let authority = Authority::new(DOMAIN);
    World {
        bundles: Bundles::from_authority(&message(DOMAIN, &[&authority])).unwrap(),
        key: PrivateKey::generate(KeyAlgorithm::EcdsaP256).unwrap(),
        authority,
    }
}

fn credential(id: &str, hint: &str, cert: Vec<u8>, chain: Vec<Vec<u8>>) -> Credential {
    Credential {
        hint: hint.into(),
        workload_identity_name: "foo".into(),
        spiffe_id: id.into(),
        credential: Some(Kind::X509Svid(X509svidCredential {
            cert,
            chain,
            ..X509svidCredential::default()
        })),
        ..Credential::default()
    }
}

#[test]
fn a_sound_answer_is_taken() {
    let world = world();
    let leaf = world.authority.leaf(&world.key, &[ID]);
    let answer = vec![credential(ID, "a", leaf.clone(), Vec::new())];
    let svids = accept(answer, &world.key, &world.bundles, start()).unwrap();
    assert_eq!(svids[0].id.to_string(), ID);
    assert_eq!(&svids[0].chain[..], leaf);
    assert_eq!(&svids[0].key[..], world.key.pkcs8_der().expose());
    assert_eq!(svids[0].not_after, start() + HOUR);
}

#[test]
fn an_svid_leads_to_its_authority_as_long_as_the_bundle_has_it() {
    let world = world();
    let leaf = world.authority.leaf(&world.key, &[ID]);
    let answer = vec![credential(ID, "", leaf, Vec::new())];
    let svids = accept(answer, &world.key, &world.bundles, start()).unwrap();
    let next = Authority::new(DOMAIN);
    for (authorities, leads) in [
        (&[&world.authority][..], true),
        (&[&next, &world.authority], true),
        (&[&next], false),
    ] {
        let bundles = Bundles::from_authority(&message(DOMAIN, authorities)).unwrap();
        assert_eq!(leads_to(&svids[0], &bundles), leads);
    }
}

#[test]
fn the_age_of_an_svid_is_counted_from_when_it_came() {
    let world = world();
    let backdated = start() - Duration::from_mins(1);
    let leaf = world.authority.leaf_at(&world.key, &[ID], backdated);
    let answer = vec![credential(ID, "", leaf, Vec::new())];
    let svids = accept(answer, &world.key, &world.bundles, start()).unwrap();
    assert_eq!(svids[0].issued_at, start());
}

#[test]
fn an_unsound_answer_is_rejected_whole() {
    let world = world();
    let other_key = PrivateKey::generate(KeyAlgorithm::EcdsaP256).unwrap();
    let stranger = Authority::new(DOMAIN);
    let good = || credential(ID, "", world.authority.leaf(&world.key, &[ID]), Vec::new());
    let foreign = "spiffe://example.com/svc/foo";
    for (problem, bad) in [
        (
            "another key",
            credential(ID, "", world.authority.leaf(&other_key, &[ID]), Vec::new()),
        ),
        (
            "URI names",
            credential(
                ID,
                "",
                world
                    .authority
                    .leaf(&world.key, &["spiffe://example.org/x"]),
                Vec::new(),
            ),
        ),
        (
            "URI names",
            credential(
                ID,
                "",
                world.authority.leaf(&world.key, &[ID, ID]),
                Vec::new(),
            ),
        ),
        (
            "URI names",
            credential(ID, "", world.authority.leaf(&world.key, &[]), Vec::new()),
        ),
        (
            "outside",
            credential(
                foreign,
                "",
                world.authority.leaf(&world.key, &[foreign]),
                Vec::new(),
            ),
        ),
        (
            "spiffe://",
            credential(
                "example.org",
                "",
                world.authority.leaf(&world.key, &["example.org"]),
                Vec::new(),
            ),
        ),
        (
            "authorities",
            credential(ID, "", stranger.leaf(&world.key, &[ID]), Vec::new()),
        ),
        (
            "authorities",
            credential(
                ID,
                "",
                stranger.leaf(&world.key, &[ID]),
                vec![stranger.der.clone()],
            ),
        ),
        (
            "expired",
            credential(
                ID,
                "",
                world.authority.leaf_at(&world.key, &[ID], start() - HOUR),
                Vec::new(),
            ),
        ),
        (
            "not valid yet",
            credential(
                ID,
                "",
                world.authority.leaf_at(&world.key, &[ID], start() + HOUR),
                Vec::new(),
            ),
        ),
        (
            "malformed",
            credential(ID, "", vec![0x30, 0x00], Vec::new()),
        ),
        (
            "intermediate",
            credential(
                ID,
                "",
                world.authority.leaf(&world.key, &[ID]),
                vec![vec![0]],
            ),
        ),
        (
            "no X.509-SVID",
            Credential {
                credential: None,
                ..good()
            },
        ),
    ] {
        let answer = vec![good(), bad];
        match accept(answer, &world.key, &world.bundles, start()) {
            Err(IssueError::Answer(text)) => assert!(text.contains(problem), "{problem}: {text}"),
            other => panic!("{problem}: {other:?}"),
        }
    }
}

#[test]
fn an_overridden_issuer_counts_by_its_key() {
    // The cluster's own key under another name, signed by a hierarchy outside of the bundle.
    let world = world();
    let root = Authority::new("corporate root");
    let issuing = Authority::with_key("issuing", world.authority.key.clone());
    let intermediate = root.cross_sign(&issuing);
    let leaf = issuing.leaf(&world.key, &[ID]);
    let answer = vec![credential(ID, "", leaf.clone(), vec![intermediate.clone()])];
    let svids = accept(answer, &world.key, &world.bundles, start()).unwrap();
    assert_eq!(svids[0].chain, [leaf, intermediate].concat());

    // The same key under another name, signed by itself: clusters send no chain then.
    let answer = vec![credential(
        ID,
        "",
        issuing.leaf(&world.key, &[ID]),
        Vec::new(),
    )];
    let svids = accept(answer, &world.key, &world.bundles, start()).unwrap();
    assert!(leads_to(&svids[0], &world.bundles));
    let foreign = Authority::new("issuing");
    let answer = vec![credential(
        ID,
        "",
        foreign.leaf(&world.key, &[ID]),
        Vec::new(),
    )];
    accept(answer, &world.key, &world.bundles, start()).unwrap_err();
}

#[test]
fn hints_stay_unique_and_order_is_kept() {
    let world = world();
    let ids = [
        "spiffe://example.org/a",
        "spiffe://example.org/b",
        "spiffe://example.org/c",
    ];
    let hints = ["x", "x", ""];
    let answer = ids
        .iter()
        .zip(hints)
        .map(|(id, hint)| {
            credential(
                id,
                hint,
                world.authority.leaf(&world.key, &[id]),
                Vec::new(),
            )
        })
        .collect();
    let svids = accept(answer, &world.key, &world.bundles, start()).unwrap();
    let told: Vec<(String, &str)> = svids
        .iter()
        .map(|s| (s.id.to_string(), s.hint.as_str()))
        .collect();
    assert_eq!(
        told,
        [
            (ids[0].into(), "x"),
            (ids[1].into(), ""),
            (ids[2].into(), "")
        ]
    );
}

#[test]
fn who_fails_the_evaluation_is_refused() {
    let error = |status| IssueError::from(ClusterError::call("IssueWorkloadIdentity")(status));
    let failed = error(Status::unknown("workload identity failed evaluation: x"));
    assert!(matches!(failed, IssueError::Refused(_)), "{failed:?}");
    let trouble = error(Status::unknown("x"));
    assert!(matches!(trouble, IssueError::Unavailable(_)), "{trouble:?}");
}

#[test]
fn nothing_at_all_is_a_refusal() {
    let world = world();
    let none = accept(Vec::new(), &world.key, &world.bundles, start());
    assert!(matches!(none, Err(IssueError::Refused(_))), "{none:?}");
}
