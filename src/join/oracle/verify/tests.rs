//! The certificates in `made/` were made with OpenSSL, for a hundred years: a root, an intermediate
//! authority and an instance whose names are formed as Oracle's are.

use std::time::Duration;

use super::*;
use crate::crypto::{KeyAlgorithm, PrivateKey};
use crate::pb::teleport::join::v1::{OracleInit, join_request};

mod fuzz;

const ROOT: &str = include_str!("made/root.pem");
const INTERMEDIATE: &str = include_str!("made/inter.pem");
const LEAF: &str = include_str!("made/leaf.pem");
const KEY: &str = include_str!("made/leaf.key");

fn now() -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_secs(1_800_000_000)
}

fn certificate() -> Certificate {
    Certificate::from_pem(LEAF).unwrap()
}

fn solution() -> OracleChallengeSolution {
    OracleChallengeSolution {
        cert: LEAF.into(),
        intermediate: INTERMEDIATE.into(),
        signature: vec![1],
        signed_root_ca_req: vec![1],
    }
}

#[test]
fn an_instance_signs_with_the_key_of_its_certificate() {
    let key = PrivateKey::from_pem(KEY).unwrap();
    let signature = key.sign_rsa_pss(b"challenge").unwrap();
    check_signature(&certificate(), "challenge", &signature).unwrap();

    let stranger = PrivateKey::generate(KeyAlgorithm::Rsa2048).unwrap();
    for (challenge, signature) in [
        ("another", signature.clone()),
        ("", key.sign_rsa_pss(b"").unwrap()),
        ("challenge", stranger.sign_rsa_pss(b"challenge").unwrap()),
        // The older padding proves as much, but is not what was asked for.
        ("challenge", key.sign(b"challenge").unwrap()),
        ("challenge", Vec::new()),
        ("challenge", vec![0; 10_000]),
    ] {
        let refused = check_signature(&certificate(), challenge, &signature);
        assert!(
            matches!(refused, Err(OracleError::Signature)),
            "{challenge:?}"
        );
    }
    let small = PrivateKey::generate(KeyAlgorithm::EcdsaP256).unwrap();
    assert!(small.sign_rsa_pss(b"challenge").is_err());
}

#[test]
fn only_the_regions_authorities_certify_instances() {
    let (root, intermediate) = (
        pem::certificates(ROOT).unwrap(),
        pem::certificates(INTERMEDIATE).unwrap(),
    );
    trusted(&certificate(), &intermediate, &root, now()).unwrap();
    let claims = Claims::of(&certificate()).unwrap();
    assert_eq!(claims.instance, "ocid1.instance.oc1.phx.me");
    assert_eq!(claims.tenancy, "ocid1.tenancy.oc1..t");

    let later = now() + Duration::from_secs(200 * 365 * 86_400);
    for (intermediates, roots, now) in [
        (&[][..], root.as_slice(), now()),
        (&intermediate, &[], now()),
        (&intermediate, &[certificate().der().to_vec()], now()),
        (&intermediate, &root, later),
        (&intermediate, &root, SystemTime::UNIX_EPOCH),
    ] {
        let refused = trusted(&certificate(), intermediates, roots, now);
        assert!(matches!(refused, Err(OracleError::Untrusted(_))));
    }
}

#[tokio::test]
async fn an_instance_of_a_known_region_joins_without_a_question_to_oracle() {
    let world = World::new(None).unwrap();
    let claims = Claims::of(&certificate()).unwrap();
    let region = Region::of_instance(&claims.instance).unwrap();
    let known = &world.oracle_roots;
    known.learn(region, pem::certificates(ROOT).unwrap(), now());
    let opening = join_request::Payload::OracleInit(OracleInit::default());
    let joining = Joining {
        token: "t",
        spec: &Value::Null,
        status: &Value::Null,
        bot: "b",
        instance: None,
        suite: crate::crypto::Suite::default(),
        state_keys: &[],
        lost: None,
        lock: None,
        cluster: "c",
        address: std::net::Ipv4Addr::LOCALHOST.into(),
        again: false,
        now: now(),
        opening: &opening,
        challenge: "challenge",
        world: &world,
    };
    let host = region.authority();
    let signed = |challenge: &str, host: &str| OracleChallengeSolution {
        signature: PrivateKey::from_pem(KEY)
            .unwrap()
            .sign_rsa_pss(challenge.as_bytes())
            .unwrap(),
        signed_root_ca_req: format!(
            "GET {PATH} HTTP/1.1\r\nHost: {host}\r\nAuthorization: x\r\n\r\n"
        )
        .into(),
        ..solution()
    };
    verify(
        &joining,
        &signed("challenge", &host),
        &certificate(),
        &claims,
    )
    .await
    .unwrap();
    // All else is looked at as ever.
    for (challenge, host) in [("another", host.as_str()), ("challenge", "evil.example")] {
        let sent = signed(challenge, host);
        let refused = verify(&joining, &sent, &certificate(), &claims).await;
        let refused = refused.unwrap_err();
        assert!(
            matches!(refused, OracleError::Signature | OracleError::Question(_)),
            "{refused}"
        );
    }
}

#[test]
fn every_part_of_a_solution_is_needed_and_bounded() {
    assert!(leaf(&solution()).is_ok());
    let parts: [fn(&mut OracleChallengeSolution) -> &mut Vec<u8>; 4] = [
        |it| &mut it.cert,
        |it| &mut it.intermediate,
        |it| &mut it.signature,
        |it| &mut it.signed_root_ca_req,
    ];
    for part in parts {
        let mut missing = solution();
        part(&mut missing).clear();
        assert!(matches!(leaf(&missing), Err(OracleError::Missing(_))));
        let mut large = solution();
        part(&mut large).resize(MAX_PART + 1, b' ');
        assert!(matches!(leaf(&large), Err(OracleError::TooLarge(_))));
    }
    for no_certificate in [&b"\xff"[..], b"x", KEY.as_bytes()] {
        let mut solution = solution();
        solution.cert = no_certificate.to_vec();
        assert!(matches!(leaf(&solution), Err(OracleError::Certificate(_))));
    }
}

#[test]
fn answers_of_oracles_are_read_as_documented() {
    let answer =
        json!({"certificates": [STANDARD.encode("der")], "refreshIn": "2026-01-01T00:00:00Z"});
    assert_eq!(read_roots(answer.to_string().as_bytes()).unwrap(), [b"der"]);
    for bad in [
        "",
        "{}",
        r#"{"certificates":[]}"#,
        r#"{"certificates":["!"]}"#,
        r#"{"certificates":[7]}"#,
    ] {
        assert!(read_roots(bad.as_bytes()).is_err(), "{bad}");
    }
}
