//! The documents in `made/` were signed with OpenSSL's `cms -sign -binary -nodetach -md sha256` by a chain
//! of a root, an issuer and a signer of a hundred years each: `attrs` with signed attributes, `plain`
//! without, `other` by a signer of a name that only looks like Azure's.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;

use super::attested::Document;
use super::*;

mod fuzz;

const ATTRS: &str = include_str!("made/attrs.json");
const PLAIN: &str = include_str!("made/plain.json");
const OTHER: &str = include_str!("made/other.json");
const CHALLENGE: &str = "the-challenge";

fn der(pem: &str) -> Vec<Vec<u8>> {
    pem::certificates(pem).unwrap()
}

fn root() -> Vec<Vec<u8>> {
    der(include_str!("made/root.pem"))
}

fn issuers() -> Vec<Vec<u8>> {
    der(include_str!("made/issuer.pem"))
}

fn now() -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_secs(1_800_000_000)
}

fn verify(document: &str) -> Result<Attested, String> {
    Document::read(document.as_bytes())
        .and_then(|document| document.verify(CHALLENGE, &issuers(), &root(), now()))
        .map_err(|error| error.to_string())
}

#[test]
fn what_azure_signed_is_believed() {
    for document in [ATTRS, PLAIN] {
        let attested = verify(document).unwrap();
        assert_eq!(attested.vm_id, "2c9f8e7a-0000-4000-8000-123456789abc");
        assert_eq!(
            attested.subscription,
            "11111111-2222-3333-4444-555555555555"
        );
    }
    let signer = signer(ATTRS.as_bytes()).unwrap();
    assert_eq!(
        issuer_path(&signer).unwrap(),
        "/pkiops/certs/Test%20Issuer.crt"
    );
    assert_eq!(roots().len(), 5);
}

#[test]
fn what_azure_did_not_sign_is_refused() {
    let error = verify(OTHER).unwrap_err();
    assert!(error.contains("metadata.azure.com.example.org"), "{error}");

    let document = Document::read(ATTRS.as_bytes()).unwrap();
    let refused = |challenge: &str, issuers: &[Vec<u8>], roots: &[Vec<u8>], now| {
        let refused = document.verify(challenge, issuers, roots, now);
        refused.unwrap_err().to_string()
    };
    for challenge in ["", "another"] {
        let error = refused(challenge, &issuers(), &root(), now());
        assert!(
            error.contains("challenge is missing or does not match"),
            "{error}"
        );
    }
    let later = now() + Duration::from_secs(200 * 365 * 86_400);
    for (issuers, roots, now) in [
        (Vec::new(), root(), now()),
        (issuers(), Vec::new(), now()),
        (issuers(), super::roots(), now()),
        (issuers(), root(), later),
        (issuers(), root(), SystemTime::UNIX_EPOCH),
        (vec![b"no certificate".to_vec()], root(), now()),
    ] {
        let error = refused(CHALLENGE, &issuers, &roots, now);
        assert!(error.contains("is not trusted"), "{error}");
    }
}

/// The document with its PKCS #7 data changed.
fn changed(document: &str, change: impl FnOnce(&mut Vec<u8>)) -> String {
    let mut json: Value = serde_json::from_str(document).unwrap();
    let mut der = STANDARD
        .decode(json["signature"].as_str().unwrap())
        .unwrap();
    change(&mut der);
    json["signature"] = STANDARD.encode(der).into();
    json.to_string()
}

#[test]
fn a_document_that_was_changed_does_not_verify() {
    // Everywhere: in what is signed and in what only repeats it.
    let replace = |document: &str, from: &[u8], to: &[u8]| {
        changed(document, |der| {
            let found = |der: &[u8]| der.windows(from.len()).position(|window| window == from);
            assert!(found(der).is_some());
            while let Some(at) = found(der) {
                der[at..at + to.len()].copy_from_slice(to);
            }
        })
    };
    for document in [ATTRS, PLAIN] {
        let moved = replace(document, b"2c9f8e7a", b"deadbeef");
        assert!(
            verify(&moved).unwrap_err().contains("does not verify"),
            "another machine"
        );
        let end = changed(document, |der| *der.last_mut().unwrap() ^= 1);
        assert!(
            verify(&end).unwrap_err().contains("does not verify"),
            "another signature"
        );
        let weak = replace(
            document,
            &[0x60, 0x86, 0x48, 1, 0x65, 3, 4, 2, 1],
            &[0x60, 0x86, 0x48, 1, 0x65, 3, 4, 2, 9],
        );
        assert!(verify(&weak).is_err(), "another algorithm");
    }
}

#[test]
fn what_is_no_document_is_refused() {
    let large = format!(
        "{{\"encoding\":\"pkcs7\",\"signature\":\"{}\"}}",
        "A".repeat(100_000)
    );
    for bad in [
        "",
        "{}",
        "[]",
        "no JSON",
        r#"{"encoding":"pkcs7","signature":"!"}"#,
        r#"{"encoding":"pkcs7","signature":""}"#,
        r#"{"encoding":"pkcs7","signature":"MAA="}"#,
        r#"{"encoding":"pkcs8","signature":"MAA="}"#,
        &large,
    ] {
        assert!(verify(bad).is_err(), "{bad:.40}");
    }
    let whole: Value = serde_json::from_str(ATTRS).unwrap();
    let length = STANDARD
        .decode(whole["signature"].as_str().unwrap())
        .unwrap()
        .len();
    for end in (0..length).step_by(97) {
        let part = changed(ATTRS, |der| der.truncate(end));
        assert!(verify(&part).is_err(), "{end}");
    }
}

#[test]
fn tokens_that_come_alone_have_to_be_new() {
    let check = |issued: u64| {
        let claims = json!({"iat": issued});
        check_age(claims.as_object().unwrap(), now()).map_err(|error| error.to_string())
    };
    let now = 1_800_000_000;
    for good in [now, now - 600, now + 30] {
        assert_eq!(check(good), Ok(()), "{good}");
    }
    assert!(check(now - 601).unwrap_err().contains("601 s ago"));
    assert!(check(now + 31).unwrap_err().contains("future"));
    assert!(check_age(&Map::new(), self::now()).is_err());
}

#[test]
fn a_tenant_that_nobody_verified_is_a_uuid() {
    let tenant = "66666666-7777-8888-9999-aaaaaaaaaaaa";
    assert!(is_tenant(tenant));
    for other in [
        "",
        "common",
        "organizations",
        "66666666-7777-8888-9999-aaaaaaaaaaa",
        &tenant.replace('a', "/"),
    ] {
        assert!(!is_tenant(other), "{other}");
    }
}

#[test]
fn every_key_of_a_rule_has_to_match() {
    let place = Place {
        subscription: "S".to_owned(),
        resource_group: "Group".to_owned(),
    };
    let near = |rule: Value| admit(Some(&json!([rule])), "T", &place).err();
    for good in [
        json!({"subscription": "S"}),
        json!({"tenant": "T"}),
        json!({"subscription": "S", "tenant": "T", "resource_groups": ["other", "GROUP"]}),
    ] {
        assert_eq!(near(good.clone()), None, "{good}");
    }
    for (bad, differs) in [
        (json!({"subscription": "R"}), "subscription"),
        (json!({"subscription": "s"}), "subscription"),
        (json!({"tenant": "U"}), "tenant"),
        (json!({"subscription": "S", "tenant": "U"}), "tenant"),
        (
            json!({"subscription": "S", "resource_groups": ["other"]}),
            "resource_groups",
        ),
        (
            json!({"resource_groups": ["Group"]}),
            "subscription and tenant",
        ),
        (json!({}), "subscription and tenant"),
        (json!("all"), "subscription and tenant"),
    ] {
        assert!(near(bad.clone()).unwrap().contains(differs), "{bad}");
    }
    assert!(admit(None, "T", &place).is_err());
}

mod whole {
    //! Both halves of the proof against each other, with the keys of a tenant that is made here.

    use std::sync::Arc;

    use base64::engine::general_purpose::URL_SAFE_NO_PAD;

    use super::*;
    use crate::crypto::jws::PublicKey;
    use crate::crypto::{KeyAlgorithm, PrivateKey};
    use crate::join::verify::oidc::issuers::{Fetch, FetchError, Issuers};
    use crate::pb::teleport::join::v1::{AzureInit, join_request};

    const TENANT: &str = "66666666-7777-8888-9999-aaaaaaaaaaaa";
    const SUBSCRIPTION: &str = "11111111-2222-3333-4444-555555555555";

    /// The documents of a tenant.
    #[derive(Debug)]
    struct Tenant(Value);

    #[async_trait]
    impl Fetch for Tenant {
        async fn get(&self, _: &Issuer, url: &str, _: usize) -> Result<Vec<u8>, FetchError> {
            let base = format!("{ISSUER}/{TENANT}");
            let document = if url == format!("{base}/.well-known/openid-configuration") {
                json!({"issuer": format!("{base}/"), "jwks_uri": "https://login.windows.net/keys"})
            } else {
                assert_eq!(url, "https://login.windows.net/keys");
                self.0.clone()
            };
            Ok(document.to_string().into_bytes())
        }
    }

    /// A machine that answers with what it is given.
    struct Machine(Option<AzureChallengeSolution>);

    #[async_trait]
    impl Dialogue for Machine {
        async fn ask(
            &mut self,
            asked: challenge::Payload,
        ) -> Result<challenge_solution::Payload, Refusal> {
            let challenge::Payload::AzureChallenge(asked) = asked else {
                panic!("{asked:?}");
            };
            assert_eq!(asked.challenge, CHALLENGE);
            let solution = self.0.take().expect("one question");
            Ok(challenge_solution::Payload::AzureChallengeSolution(
                solution,
            ))
        }
    }

    fn machine(subscription: &str) -> String {
        format!(
            "/subscriptions/{subscription}/resourceGroups/web/providers/Microsoft.Compute/virtualMachines/vm"
        )
    }

    async fn join(document: &str, machine: &str, spec: Value) -> Result<Seen, Refusal> {
        let key = PrivateKey::generate(KeyAlgorithm::Rsa2048).unwrap();
        let mut jwk = PublicKey::from_spki(&key.public_spki())
            .unwrap()
            .jwk()
            .clone();
        jwk.insert("kid".to_owned(), "k".into());
        let issued = 1_800_000_000 - 3600;
        let claims = json!({
            "iss": format!("{ISSUER}/{TENANT}/"), "aud": AUDIENCE, "sub": "s", "tid": TENANT,
            "iat": issued, "exp": issued + 86_400, "xms_mirid": machine,
        });
        let part = |value: &Value| URL_SAFE_NO_PAD.encode(value.to_string());
        let signed = format!(
            "{}.{}",
            part(&json!({"alg": "RS256", "kid": "k"})),
            part(&claims)
        );
        let signature = URL_SAFE_NO_PAD.encode(key.sign(signed.as_bytes()).unwrap());

        let mut world = World::new(None).unwrap();
        world.azure_roots = Some(root());
        world.issuers = Arc::new(Issuers::new(Arc::new(Tenant(json!({"keys": [jwk]})))));
        let opening = join_request::Payload::AzureInit(AzureInit::default());
        let joining = Joining {
            token: "t",
            spec: &json!({"azure": {"allow": [spec]}}),
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
            challenge: CHALLENGE,
            world: &world,
        };
        let mut dialogue = Machine(Some(AzureChallengeSolution {
            attested_data: document.into(),
            intermediate: issuers().concat(),
            access_token: format!("{signed}.{signature}"),
        }));
        let mut seen = Seen::default();
        Azure
            .verify(&joining, &mut dialogue, &mut seen)
            .await
            .map(|()| seen)
    }

    #[tokio::test]
    async fn an_attested_machine_joins_by_an_older_token_of_its_own_subscription() {
        let rule =
            json!({"subscription": SUBSCRIPTION, "tenant": TENANT, "resource_groups": ["WEB"]});
        let seen = join(ATTRS, &machine(SUBSCRIPTION), rule.clone())
            .await
            .unwrap();
        assert_eq!(
            seen.metadata,
            json!({"subscription": SUBSCRIPTION, "resource_group": "web", "tenant": TENANT})
        );
        assert_eq!(Value::Object(seen.attributes.unwrap()), seen.metadata);

        for (document, machine, rule, expected) in [
            (
                ATTRS,
                machine("another"),
                rule.clone(),
                "subscription ID mismatch",
            ),
            (
                OTHER,
                machine(SUBSCRIPTION),
                rule.clone(),
                "does not match allow-list",
            ),
            ("", machine(SUBSCRIPTION), rule.clone(), "issued 3600 s ago"),
            (
                "{}",
                machine(SUBSCRIPTION),
                rule,
                "unsupported signature type",
            ),
            (
                ATTRS,
                machine(SUBSCRIPTION),
                json!({"subscription": "S"}),
                "2c9f8e7a-0000-4000-8000-123456789abc did not match any allow rules in token t",
            ),
        ] {
            let refused = join(document, &machine, rule)
                .await
                .unwrap_err()
                .to_string();
            assert!(refused.contains(expected), "{refused}");
        }
    }
}
