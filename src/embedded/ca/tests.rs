use std::time::UNIX_EPOCH;

use super::*;
use crate::clock::Clock;
use crate::crypto::KeyAlgorithm;
use crate::embedded::caller::oid;

fn now() -> SystemTime {
    UNIX_EPOCH + Duration::from_hours(500_000)
}

fn store() -> Store {
    Store::in_memory(Clock::simulated(now())).unwrap()
}

fn user_certificate(authorities: &Authorities, name: x509_cert::name::RdnSequence) -> Vec<u8> {
    let key = PrivateKey::generate(KeyAlgorithm::EcdsaP256).unwrap();
    let authority = authorities.get(AuthorityType::User);
    Template {
        serial: mint::serial(),
        subject: name,
        not_before: now() - BACKDATE,
        not_after: now() + Duration::from_hours(1),
        spki: &key.public_spki(),
        key_usage: leaf_usage(&key.public_spki()),
        extended: &[SERVER_AUTH, CLIENT_AUTH],
        authority: false,
        names: Vec::new(),
    }
    .sign(authority.signer().unwrap().issuer())
    .unwrap()
}

#[tokio::test(start_paused = true)]
async fn the_second_start_finds_what_the_first_made() {
    let store = store();
    let first = Authorities::open(&store, "example.org", Suite::BalancedV1, now()).unwrap();
    let second = Authorities::open(&store, "example.org", Suite::Legacy, now()).unwrap();
    for kind in AuthorityType::ALL {
        assert_eq!(first.message(kind), second.message(kind), "{kind:?}");
        assert_eq!(first.trusted_tls(kind), second.trusted_tls(kind));
    }
    assert_eq!(first.host_pin(), second.host_pin());
    assert!(first.host_pin().starts_with("sha256:"));
    assert_eq!(first.host_pin().len(), 7 + 64);
}

#[tokio::test(start_paused = true)]
async fn a_damaged_authority_stops_the_start_and_is_not_replaced() {
    let store = store();
    Authorities::open(&store, "example.org", Suite::BalancedV1, now()).unwrap();
    let mut host = store.get(KIND, "host").unwrap().unwrap();
    host.spec["active"]["tls"][0]["key"] = "junk".into();
    store.put(host, &Put::Upsert).unwrap();
    let error = Authorities::open(&store, "example.org", Suite::BalancedV1, now()).unwrap_err();
    assert_eq!(
        error.to_string(),
        "the stored host authority is damaged: its active keys"
    );
}

#[tokio::test(start_paused = true)]
async fn keys_follow_the_suite_and_no_call_shows_a_private_one() {
    let authorities = Authorities::open(&store(), "example.org", Suite::BalancedV1, now()).unwrap();
    let host = authorities.get(AuthorityType::Host);
    assert_eq!(
        host.signer().unwrap().key.algorithm(),
        KeyAlgorithm::EcdsaP256
    );
    assert_eq!(
        host.ssh_signer().unwrap().algorithm(),
        KeyAlgorithm::Ed25519
    );
    assert!(host.jwt_signer().is_err());
    let spiffe = authorities.get(AuthorityType::Spiffe);
    assert_eq!(
        spiffe.jwt_signer().unwrap().algorithm(),
        KeyAlgorithm::Rsa2048
    );
    let db = authorities.get(AuthorityType::Db);
    assert_eq!(db.signer().unwrap().key.algorithm(), KeyAlgorithm::Rsa2048);
    for kind in AuthorityType::ALL {
        let message = format!("{:?}", authorities.message(kind));
        assert!(!message.contains("PRIVATE"), "{message}");
        let keys = authorities.message(kind).spec.unwrap().active_keys.unwrap();
        assert!(keys.tls.iter().all(|key| key.key.is_empty()));
        assert!(keys.ssh.iter().all(|key| key.private_key.is_empty()));
        assert!(keys.jwt.iter().all(|key| key.private_key.is_empty()));
    }
}

#[tokio::test(start_paused = true)]
async fn authorities_have_the_recorded_form() {
    let authorities = Authorities::open(&store(), "example.org", Suite::BalancedV1, now()).unwrap();
    for kind in AuthorityType::ALL {
        for der in authorities.trusted_tls(kind) {
            let certificate = Certificate::from_der(&der).unwrap();
            assert!(certificate.is_ca() && certificate.is_signed_by(&certificate));
            assert_eq!(certificate.subject(ORGANIZATION), ["example.org"]);
            assert_eq!(certificate.subject(COMMON_NAME), ["example.org"]);
            let serial = &certificate.subject(oid::SERIAL_NUMBER)[0];
            let hex = certificate.serial().replace(':', "");
            assert_eq!(*serial, u128::from_str_radix(&hex, 16).unwrap().to_string());
            let life = certificate.not_after().duration_since(now()).unwrap();
            assert_eq!(life, Duration::from_mins(5_256_000));
            let spiffe = ["spiffe://example.org".to_owned()];
            let expected: &[String] = if kind == AuthorityType::Spiffe {
                &spiffe
            } else {
                &[]
            };
            assert_eq!(certificate.uri_sans(), expected);
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_host_certificate_names_the_internal_domain() {
    let authorities = Authorities::open(&store(), "example.org", Suite::BalancedV1, now()).unwrap();
    let host = authorities
        .host_identity(&["localhost".to_owned()], now())
        .unwrap();
    let certificate = Certificate::from_der(&host.certificate).unwrap();
    assert!(certificate.is_for(&host.key));
    assert_eq!(
        certificate.dns_sans(),
        [
            "teleport.cluster.local",
            "*.teleport.cluster.local",
            "localhost"
        ]
    );
    // A host certificate is nobody's identity.
    assert_eq!(authorities.identity(&[&host.certificate], now()), Ok(None));
}

#[tokio::test(start_paused = true)]
async fn identities_are_read_from_our_own_certificates_only() {
    let authorities = Authorities::open(&store(), "example.org", Suite::BalancedV1, now()).unwrap();
    let others = Authorities::open(&store(), "example.org", Suite::BalancedV1, now()).unwrap();
    let name = |extra: &[(der::asn1::ObjectIdentifier, &str)]| {
        let mut subject = Subject::default()
            .set(oid::LOCALITY, &["root".to_owned(), "a".to_owned()])
            .unwrap()
            .one(oid::POSTAL_CODE, r#"{"team":["a","b"]}"#)
            .unwrap()
            .set(
                ORGANIZATION,
                &["two".to_owned(), "one".to_owned(), "two".to_owned()],
            )
            .unwrap()
            .one(COMMON_NAME, "bot-example")
            .unwrap();
        for (oid, value) in extra {
            subject = subject.one(*oid, value).unwrap();
        }
        subject.finish()
    };
    let good = user_certificate(
        &authorities,
        name(&[
            (oid::CLUSTER, "example.org"),
            (oid::RENEWABLE, "true"),
            (oid::GENERATION, "7"),
            (oid::BOT_NAME, "example"),
            (oid::BOT_INSTANCE, "i"),
            (oid::JOIN_ATTRIBUTES, r#"{"meta":{}}"#),
        ]),
    );
    let identity = authorities.identity(&[&good], now()).unwrap().unwrap();
    assert_eq!(identity.user, "bot-example");
    assert_eq!(identity.roles, ["one", "two"]);
    assert_eq!(identity.logins, ["a", "root"]);
    assert_eq!(identity.traits["team"], ["a", "b"]);
    assert_eq!(identity.generation, 7);
    assert!(identity.renewable && !identity.disallow_reissue);
    assert_eq!(identity.bot_name, "example");
    assert_eq!(identity.join_attributes, serde_json::json!({"meta": {}}));

    assert_eq!(authorities.identity(&[] as &[&[u8]], now()), Ok(None));
    assert_eq!(others.identity(&[&good], now()), Ok(None));
    let late = now() + Duration::from_hours(2);
    assert_eq!(authorities.identity(&[&good], late), Ok(None));
    assert_eq!(
        authorities.identity(&[&good, &good], now()),
        Err(IdentityError::Chain)
    );
    assert_eq!(authorities.identity(&[b"junk"], now()), Ok(None));
    for (extra, error) in [
        (
            (oid::ORGANIZATIONAL_UNIT, "usage:kube"),
            IdentityError::Restricted,
        ),
        (
            (oid::GENERATION, "-1"),
            IdentityError::Malformed("generation"),
        ),
        (
            (oid::JOIN_ATTRIBUTES, "{"),
            IdentityError::Malformed("join attributes"),
        ),
    ] {
        let certificate = user_certificate(&authorities, name(&[extra]));
        assert_eq!(authorities.identity(&[certificate], now()), Err(error));
    }
    let nobody = Subject::default().one(ORGANIZATION, "x").unwrap().finish();
    let nobody = user_certificate(&authorities, nobody);
    assert_eq!(
        authorities.identity(&[nobody], now()),
        Err(IdentityError::Malformed("user name"))
    );
}
