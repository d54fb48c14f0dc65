use std::process::Command;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use der::asn1::{ObjectIdentifier, OctetString};
use serde_json::json;

use super::*;
use crate::crypto::{Suite, pem};
use crate::embedded::ca::{Authorities, AuthorityType};
use crate::embedded::store::Store;
use crate::spiffe::TrustDomain;

fn now() -> SystemTime {
    UNIX_EPOCH + Duration::from_secs(1_795_000_000)
}

fn authorities() -> Authorities {
    let clock = crate::clock::Clock::system();
    let store = Store::in_memory(clock).unwrap();
    Authorities::open(&store, "example.org", Suite::BalancedV1, now()).unwrap()
}

fn id() -> SpiffeId {
    SpiffeId::new(TrustDomain::new("example.org").unwrap(), "/svc/foo").unwrap()
}

fn openssl(args: &[&str]) -> (bool, String) {
    let output = Command::new("openssl").args(args).output().unwrap();
    let text = [output.stdout, output.stderr].concat();
    let text = String::from_utf8_lossy(&text).into_owned();
    (output.status.success(), text)
}

#[test]
fn an_x509_svid_is_what_the_standard_and_a_real_cluster_say() {
    let authority = authorities().get(AuthorityType::Spiffe);
    let signer = authority.signer().unwrap();
    let key = PrivateKey::generate(KeyAlgorithm::EcdsaP256).unwrap();
    let spki = key.public_spki();
    let ttl = Duration::from_hours(1);
    let made = x509(signer, &id(), &Contents::default(), &spki, now(), ttl).unwrap();
    let parsed = x509_cert::Certificate::from_der(&made.cert)
        .unwrap()
        .tbs_certificate;
    let certificate = Certificate::from_der(&made.cert).unwrap();
    assert!(parsed.subject.0.is_empty());
    assert_eq!(parsed.issuer, *signer.issuer().name);
    assert_eq!(certificate.spki(), spki);
    assert_eq!(certificate.uri_sans(), ["spiffe://example.org/svc/foo"]);
    assert_eq!(certificate.not_before(), now() - Duration::from_secs(60));
    assert_eq!(certificate.not_after(), now() + ttl);
    assert!(!certificate.is_ca());
    // Order and criticality as recorded: KU, EKU, BC, AKI, SAN.
    let extensions: Vec<_> = parsed
        .extensions
        .unwrap()
        .into_iter()
        .map(|extension| (extension.extn_id.to_string(), extension.critical))
        .collect();
    let expected = [
        ("2.5.29.15", true),
        ("2.5.29.37", false),
        ("2.5.29.19", true),
        ("2.5.29.35", false),
        ("2.5.29.17", true),
    ];
    assert_eq!(
        extensions,
        expected.map(|(id, critical)| (id.to_owned(), critical))
    );
    assert_eq!(made.serial_number.split(':').count(), 16);
    assert!(made.chain.is_empty());

    let dir = tempfile::tempdir().unwrap();
    let file = |name: &str, der: &[u8]| {
        let path = dir.path().join(name);
        std::fs::write(&path, pem::encode("CERTIFICATE", der)).unwrap();
        path.to_str().unwrap().to_owned()
    };
    let (ca, leaf) = (file("ca", &signer.certificate), file("leaf", &made.cert));
    let at = "1795000100";
    let purpose = ["-purpose", "sslserver"];
    let verify = ["verify", "-x509_strict", "-attime", at, "-CAfile", &ca];
    let (good, text) = openssl(&[&verify[..], &purpose, &[&leaf]].concat());
    assert!(good, "{text}");
    let (_, text) = openssl(&["x509", "-in", &leaf, "-noout", "-text"]);
    for line in [
        "Digital Signature, Key Encipherment, Key Agreement",
        "TLS Web Server Authentication, TLS Web Client Authentication",
        "CA:FALSE",
        "URI:spiffe://example.org/svc/foo",
    ] {
        assert!(text.contains(line), "{line}: {text}");
    }
}

#[test]
fn a_subject_and_dns_names_are_written() {
    let authority = authorities().get(AuthorityType::Spiffe);
    let key = PrivateKey::generate(KeyAlgorithm::Ed25519).unwrap();
    let contents = Contents {
        common_name: "cn".into(),
        organization: "o".into(),
        organizational_unit: "ou".into(),
        dns_sans: vec!["a.b".into()],
        ..Contents::default()
    };
    let spki = key.public_spki();
    let life = Duration::from_hours(24 * 365 * 20);
    let signer = authority.signer().unwrap();
    let made = x509(signer, &id(), &contents, &spki, now(), life).unwrap();
    let certificate = Certificate::from_der(&made.cert).unwrap();
    assert_eq!(certificate.subject(COMMON_NAME), ["cn"]);
    assert_eq!(certificate.subject(ORGANIZATION), ["o"]);
    assert_eq!(certificate.subject(oid::ORGANIZATIONAL_UNIT), ["ou"]);
    assert_eq!(certificate.uri_sans().len(), 1);
    assert_eq!(
        certificate.not_after(),
        signer.not_after,
        "no life after the authority"
    );
    let parsed = x509_cert::Certificate::from_der(&made.cert)
        .unwrap()
        .tbs_certificate;
    let names = parsed.extensions.unwrap().pop().unwrap();
    assert_eq!(names.extn_id, ObjectIdentifier::new_unwrap("2.5.29.17"));
    assert!(!names.critical);
    let text = OctetString::into_bytes(names.extn_value);
    assert!(text.windows(3).any(|window| window == b"a.b"));
    assert!(matches!(
        x509(signer, &id(), &contents, b"junk", now(), life),
        Err(IssueError::PublicKey)
    ));
}

#[test]
fn a_jwt_svid_is_what_the_standard_and_a_real_cluster_say() {
    let authority = authorities().get(AuthorityType::Spiffe);
    let key = authority.jwt_signer().unwrap();
    let ttl = Duration::from_hours(1);
    let extra = json!({"sub": "mine", "exp": 1, "nbf": 5, "x": {"y": 1}});
    let contents = Contents {
        extra_claims: extra.as_object().unwrap().clone(),
        ..Contents::default()
    };
    let issuer = "https://example.org/workload-identity";
    let token_for = |audiences: &[&str]| {
        let audiences: Vec<_> = audiences.iter().map(|text| (*text).to_owned()).collect();
        jwt(key, issuer, &id(), &contents, &audiences, now(), ttl).unwrap()
    };
    let made = token_for(&["a"]);
    let parts: Vec<_> = made.jwt.split('.').collect();
    let [header, claims, signature] = parts.as_slice() else {
        panic!("not compact");
    };
    let decode = |part: &str| URL_SAFE_NO_PAD.decode(part).unwrap();
    let json_of = |part: &str| serde_json::from_slice::<Value>(&decode(part)).unwrap();
    let kid = key_id(&key.public_spki());
    assert_eq!(
        json_of(header),
        json!({"alg": "RS256", "kid": kid, "typ": "JWT"})
    );
    assert_eq!(
        json_of(claims),
        json!({"sub": "spiffe://example.org/svc/foo", "aud": "a", "exp": 1_795_003_600,
               "iat": 1_795_000_000, "jti": made.jti, "iss": issuer, "nbf": 5, "x": {"y": 1}})
    );
    assert_eq!(made.jti.len(), 32);
    let two = token_for(&["a", "b"]);
    let claims = json_of(two.jwt.split('.').nth(1).unwrap());
    assert_eq!(claims["aud"], json!(["a", "b"]));

    let dir = tempfile::tempdir().unwrap();
    let file = |name: &str, bytes: &[u8]| {
        let path = dir.path().join(name);
        std::fs::write(&path, bytes).unwrap();
        path.to_str().unwrap().to_owned()
    };
    let public = pem::encode("PUBLIC KEY", &key.public_spki());
    let (public, signature) = (
        file("key", public.as_bytes()),
        file("sig", &decode(signature)),
    );
    let signed = file("text", made.jwt.rsplit_once('.').unwrap().0.as_bytes());
    let verify = [
        "dgst",
        "-sha256",
        "-verify",
        &public,
        "-signature",
        &signature,
        &signed,
    ];
    let (good, text) = openssl(&verify);
    assert!(good, "{text}");
}

#[test]
fn tokens_are_signed_with_rsa_only() {
    let key = PrivateKey::generate(KeyAlgorithm::EcdsaP256).unwrap();
    let ttl = Duration::from_secs(1);
    let audiences = ["a".to_owned()];
    let made = jwt(
        &key,
        "",
        &id(),
        &Contents::default(),
        &audiences,
        now(),
        ttl,
    );
    assert!(matches!(made, Err(IssueError::JwtKey)));
}

#[test]
fn lives() {
    let hours = Duration::from_hours;
    for (requested, maximum, result) in [
        (0, None, 1),
        (2, None, 2),
        (25, None, 24),
        (25, Some(48), 25),
        (2, Some(1), 1),
        (2, Some(0), 2),
    ] {
        assert_eq!(granted(hours(requested), maximum.map(hours)), hours(result));
    }
}
