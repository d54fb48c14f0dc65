//! Parsers of outside bytes against random and mutilated input: what they accept has to hold what they
//! promise. A second for each here; `make fuzz` goes on longer. Parsers that the library keeps to itself
//! have their targets beside their unit tests, `fuzz_…` like these.

use std::time::{Duration, SystemTime};

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use prost::Message as _;
use serde_json::{Value, json};
use tbot::crypto::ssh::{self, SshCertificate};
use tbot::crypto::x509::Certificate;
use tbot::crypto::{KeyAlgorithm, PrivateKey, pem};
use tbot::embedded::instant;
use tbot::embedded::workload_identity::expression::{Expression, Mode};
use tbot::embedded::workload_identity::resource;
use tbot::embedded::workload_identity::template::Template;
use tbot::join::iam::verify::AwsIdentity;
use tbot::join::verify::oidc::keys::KeySet;
use tbot::join::verify::oidc::{self, Expected};
use tbot::pb::teleport::workloadidentity::v1 as wire;
use tbot::spiffe::bundle::Document;
use tbot::spiffe::jwt::{self, JwtBundle};
use tbot::spiffe::{SpiffeId, TrustDomain};
use tbot::websocket::{End, WebSocket};
use tbot::{config, yaml};
use tokio::io::AsyncReadExt as _;

/// A change of a sample: where, what, and how.
type Edit = (u16, u8, u8);

/// A sample with some octets changed, added, doubled or left out.
fn mutilated(sample: &[u8], edits: &[Edit]) -> Vec<u8> {
    let mut bytes = sample.to_vec();
    for (place, octet, how) in edits.iter().take(8) {
        let at = usize::from(*place) % (bytes.len() + 1);
        match how % 5 {
            0 if at < bytes.len() => bytes[at] = *octet,
            1 => bytes.insert(at, *octet),
            2 if at < bytes.len() => drop(bytes.remove(at)),
            3 => bytes.truncate(at),
            _ => {
                let part = bytes[at..].iter().copied().take(usize::from(*octet));
                let part: Vec<u8> = part.collect();
                bytes.splice(at..at, part);
            }
        }
    }
    bytes
}

/// Text of pieces that mean something to a parser.
fn text(pieces: &[&str], choice: &[u8]) -> String {
    let pick = |at: &u8| pieces[usize::from(*at) % pieces.len()];
    choice.iter().map(pick).collect()
}

fn json_part(part: &str) -> Value {
    serde_json::from_slice(&URL_SAFE_NO_PAD.decode(part).unwrap()).unwrap()
}

#[test]
fn fuzz_spiffe_ids() {
    const PIECES: &[&str] = &[
        "spiffe://",
        "SPIFFE://",
        "td",
        "a",
        "/",
        "//",
        ".",
        "..",
        "-",
        "_",
        "%2f",
        "?",
        "#",
        "@",
        ":",
        "A",
        "\u{e9}",
        "0",
        "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    ];
    bolero::check!().with_type::<Vec<u8>>().for_each(|choice| {
        let text = text(PIECES, choice);
        if let Ok(id) = text.parse::<SpiffeId>() {
            assert_eq!(id.to_string(), text);
            assert!(text.len() <= 2048);
            let domain = TrustDomain::new(id.trust_domain().name()).unwrap();
            assert_eq!(SpiffeId::new(domain, id.path()), Ok(id));
        }
    });
}

#[test]
fn fuzz_jwt_svids() {
    let key = PrivateKey::generate(KeyAlgorithm::EcdsaP256).unwrap();
    let bundle = JwtBundle::from_pems([key.public_pem().as_str()]).unwrap();
    let keys: Value = serde_json::from_slice(&bundle.jwks()).unwrap();
    let part = |value: &Value| URL_SAFE_NO_PAD.encode(value.to_string());
    let header = json!({"alg": "RS256", "kid": keys["keys"][0]["kid"], "typ": "JWT"});
    let claims = json!({"sub": "spiffe://td/a", "aud": ["x"], "exp": 100, "nbf": 0});
    let sample = format!("{}.{}.{}", part(&header), part(&claims), "A".repeat(86));
    let now = SystemTime::UNIX_EPOCH;
    bolero::check!().with_type::<Vec<Edit>>().for_each(|edits| {
        // Nothing is signed, so nothing may be believed.
        let token = String::from_utf8_lossy(&mutilated(sample.as_bytes(), edits)).into_owned();
        assert!(jwt::validate(&token, "x", now, |_| Some(&bundle)).is_err());
        // The same inside of the parts, where it still is base64.
        let inner = mutilated(claims.to_string().as_bytes(), edits);
        let token = format!(
            "{}.{}.{}",
            part(&header),
            URL_SAFE_NO_PAD.encode(inner),
            "A".repeat(86)
        );
        assert!(jwt::validate(&token, "x", now, |_| Some(&bundle)).is_err());
    });
    assert_eq!(json_part(&part(&header)), header);
}

#[test]
fn fuzz_id_tokens() {
    let key = PrivateKey::generate(KeyAlgorithm::EcdsaP256).unwrap();
    let bundle = JwtBundle::from_pems([key.public_pem().as_str()]).unwrap();
    let published = bundle.jwks();
    let keys = KeySet::parse(&published).unwrap();
    let part = |value: &Value| URL_SAFE_NO_PAD.encode(value.to_string());
    let header = json!({"alg": "ES256", "typ": "JWT"});
    let claims = json!({"iss": "https://i", "sub": "a", "aud": ["x"], "exp": 100, "iat": 0});
    let expected = Expected {
        issuer: Some("https://i"),
        audience: "x",
        authorized_party: true,
    };
    let check = |token: &str| oidc::verify(token, &keys, &expected, SystemTime::UNIX_EPOCH);
    bolero::check!().with_type::<Vec<Edit>>().for_each(|edits| {
        // Nothing is signed, so nothing may be believed, whatever the claims say.
        let inner = mutilated(claims.to_string().as_bytes(), edits);
        let inner = URL_SAFE_NO_PAD.encode(inner);
        let token = format!("{}.{inner}.{}", part(&header), "A".repeat(86));
        assert!(check(&token).is_err());
        let outer = mutilated(token.as_bytes(), edits);
        assert!(check(&String::from_utf8_lossy(&outer)).is_err());
        // An issuer's keys are read or refused.
        drop(KeySet::parse(&mutilated(&published, edits)));
    });
}

#[test]
fn fuzz_bundle_documents() {
    let key = PrivateKey::generate(KeyAlgorithm::EcdsaP256).unwrap();
    let bundle = JwtBundle::from_pems([key.public_pem().as_str()]).unwrap();
    let mut keys: Value = serde_json::from_slice(&bundle.jwks()).unwrap();
    keys["keys"][0]["use"] = "jwt-svid".into();
    keys["keys"]
        .as_array_mut()
        .unwrap()
        .push(json!({"kty": "EC", "use": "x509-svid", "x5c": [AUTHORITY]}));
    keys["spiffe_sequence"] = 7.into();
    keys["spiffe_refresh_hint"] = 300.into();
    let sample = keys.to_string();
    let whole = Document::parse(sample.as_bytes()).unwrap();
    assert_eq!((whole.authorities.len(), whole.jwt.len()), (1, 1));
    bolero::check!().with_type::<Vec<Edit>>().for_each(|edits| {
        let text = mutilated(sample.as_bytes(), edits);
        let Ok(document) = Document::parse(&text) else {
            return;
        };
        let length: usize = document.authorities.iter().map(|one| one.der().len()).sum();
        assert_eq!(document.x509().len(), length);
        // What is served to workloads names each key.
        let served: Value = serde_json::from_slice(&document.jwt.jwks()).unwrap();
        for key in served["keys"].as_array().unwrap() {
            assert!(key["kid"].as_str().is_some_and(|kid| !kid.is_empty()));
        }
    });
}

#[test]
fn fuzz_certificates() {
    let sample = base64::engine::general_purpose::STANDARD
        .decode(AUTHORITY)
        .unwrap();
    assert!(Certificate::from_der(&sample).is_ok());
    bolero::check!().with_type::<Vec<Edit>>().for_each(|edits| {
        let der = mutilated(&sample, edits);
        let Ok(certificate) = Certificate::from_der(&der) else {
            return;
        };
        assert_eq!(certificate.der(), der);
        let facts = (
            certificate.not_before(),
            certificate.not_after(),
            certificate.serial(),
            certificate.uri_sans(),
            certificate.dns_sans(),
            certificate.ip_sans(),
            certificate.spki(),
            certificate.is_ca(),
        );
        let again = Certificate::from_pem(&pem::encode("CERTIFICATE", &der)).unwrap();
        assert_eq!(again.serial(), facts.2);
        // A changed octet breaks the signature, unless it is outside of what is signed.
        if certificate.is_signed_by(&certificate) {
            assert_eq!(
                certificate.spki(),
                Certificate::from_der(&sample).unwrap().spki()
            );
        }
    });
}

#[test]
fn fuzz_pem() {
    let sample = pem::encode("CERTIFICATE", &[7; 100])
        + "text between\n"
        + &pem::encode("X509 CRL", &[9; 40]);
    bolero::check!()
        .with_type::<(Vec<u8>, Vec<Edit>)>()
        .for_each(|(der, edits)| {
            let one = pem::decode_all(&pem::encode("PRIVATE KEY", der)).unwrap();
            assert_eq!(one.len(), 1);
            assert_eq!(one[0].der, *der);
            let text = String::from_utf8_lossy(&mutilated(sample.as_bytes(), edits)).into_owned();
            if let Ok(blocks) = pem::decode_all(&text) {
                let written: String = blocks
                    .iter()
                    .map(|block| pem::encode(&block.label, &block.der))
                    .collect();
                let again = pem::decode_all(&written).unwrap();
                assert!(
                    blocks
                        .iter()
                        .zip(&again)
                        .all(|(a, b)| a.label == b.label && a.der == b.der)
                );
            }
        });
}

#[test]
fn fuzz_yaml() {
    const PIECES: &[&str] = &[
        "a",
        ": ",
        "\n",
        "  ",
        "- ",
        "[",
        "]",
        "{",
        "}",
        ", ",
        "\"",
        "'",
        "&x ",
        "*x",
        "|\n",
        ">-\n",
        "#",
        "---\n",
        "!!str ",
        "? ",
        "\t",
        "null",
        "1e3",
        "version: v2\n",
        "services:\n",
        "outputs:\n",
        "  - type: identity\n",
        "auth_server: a:1\n",
        "\\x",
        "\u{0}",
        "destination: {type: directory, path: /x}\n",
    ];
    bolero::check!().with_type::<Vec<u8>>().for_each(|choice| {
        let text = text(PIECES, choice);
        if let Ok(nodes) = yaml::parse_all(&text) {
            for node in &nodes {
                // JSON of a tree is a tree again, and the same one.
                let written = yaml::to_json(node);
                let read = yaml::parse(&written.to_string()).expect("JSON is YAML");
                assert_eq!(yaml::to_json(&read), written, "{text:?}");
            }
        }
        let source = config::Source {
            name: "fuzz.yaml".into(),
            text,
        };
        drop(config::load(
            Some(&source),
            &config::Overlay::default(),
            &tbot::env::Env::default(),
        ));
    });
}

#[test]
fn fuzz_durations() {
    const PIECES: &[&str] = &[
        "1",
        "0",
        "9",
        ".",
        "5",
        "h",
        "m",
        "s",
        "ms",
        "us",
        "\u{b5}s",
        "ns",
        "-",
        "+",
        " ",
        "d",
        "99999999999999999999",
    ];
    bolero::check!()
        .with_type::<(Vec<u8>, u32)>()
        .for_each(|(choice, seconds)| {
            if let Ok(duration) = yaml::duration::parse(&text(PIECES, choice)) {
                let written = yaml::duration::format(duration);
                assert_eq!(
                    yaml::duration::parse(&written).ok(),
                    Some(duration),
                    "{written}"
                );
            }
            let whole = Duration::from_secs((*seconds).into());
            assert_eq!(
                yaml::duration::parse(&yaml::duration::format(whole)).ok(),
                Some(whole)
            );
        });
}

#[test]
fn fuzz_times() {
    const PIECES: &[&str] = &[
        "2026",
        "-",
        "11",
        "21",
        "T",
        ":",
        "59",
        "60",
        "Z",
        "+",
        "00",
        ".",
        "999999999999",
        "9999",
        "0000",
        " ",
    ];
    bolero::check!().with_type::<Vec<u8>>().for_each(|choice| {
        if let Some(time) = instant::parse_rfc3339(&text(PIECES, choice)) {
            let written = instant::rfc3339(time);
            let read = instant::parse_rfc3339(&written).expect("what it wrote");
            assert_eq!(instant::rfc3339(read), written);
        }
    });
}

#[test]
fn fuzz_ssh_lines() {
    let key = PrivateKey::generate(KeyAlgorithm::Ed25519).unwrap();
    let line = ssh::public_line_of_spki(&key.public_spki()).unwrap();
    let sample = ssh::wire_of_line(&line).unwrap();
    bolero::check!().with_type::<Vec<Edit>>().for_each(|edits| {
        let octets = mutilated(&sample, edits);
        if let Ok(line) = ssh::line_of_wire(&octets) {
            assert_eq!(ssh::wire_of_line(&line).unwrap(), octets);
        }
        let text = String::from_utf8_lossy(&mutilated(line.as_bytes(), edits)).into_owned();
        if let Ok(spki) = ssh::spki_of_public_line(&text) {
            let again = ssh::public_line_of_spki(&spki).unwrap();
            assert_eq!(ssh::spki_of_public_line(&again).unwrap(), spki);
        }
        assert!(
            SshCertificate::parse(&text).is_err(),
            "a key is no certificate"
        );
    });
}

#[test]
fn fuzz_websocket_frames() {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    // A text, a ping, an unmasked message in two fragments, a close frame.
    let sample =
        b"\x82\x03abc\x89\x01x\x02\x7e\x00\x02de\x80\x83\x01\x02\x03\x04fgh\x88\x02\x03\xe8";
    bolero::check!()
        .with_type::<(Vec<Edit>, bool)>()
        .for_each(|(edits, server)| {
            let octets = mutilated(sample, edits);
            let end = if *server { End::Server } else { End::Client };
            let mut heard = Vec::new();
            let read = runtime.block_on(async {
                let mut stream =
                    WebSocket::new(tokio::io::join(&octets[..], tokio::io::sink()), end);
                stream.read_to_end(&mut heard).await
            });
            assert!(
                heard.len() <= octets.len(),
                "{read:?}: {} of {}",
                heard.len(),
                octets.len()
            );
        });
}

#[test]
fn fuzz_expressions_and_templates() {
    const PIECES: &[&str] = &[
        "workload.unix.uid",
        "user.name",
        "user.traits",
        "==",
        "!=",
        "&&",
        "||",
        "!",
        "(",
        ")",
        "\"a\"",
        "1",
        "set(",
        "contains(",
        ",",
        "[",
        "]",
        ".",
        "{{",
        "}}",
        " ",
        "-",
        "\"",
        "\\",
        "\u{e9}",
        "strings.upper(",
        "ifelse(",
        "true",
        "9223372036854775808",
    ];
    bolero::check!().with_type::<Vec<u8>>().for_each(|choice| {
        let text = text(PIECES, choice);
        drop(Expression::rule(&text));
        drop(Expression::parse(&text, Mode::Template));
        drop(Template::parse(&text));
    });
}

#[test]
fn fuzz_workload_identity_messages() {
    let resource = wire::WorkloadIdentity {
        kind: resource::KIND.into(),
        version: resource::VERSION.into(),
        metadata: Some(tbot::pb::teleport::header::v1::Metadata {
            name: "n".into(),
            ..Default::default()
        }),
        spec: Some(wire::WorkloadIdentitySpec {
            spiffe: Some(wire::WorkloadIdentitySpiffe {
                id: "/svc/{{user.name}}".into(),
                hint: "h".into(),
                ..Default::default()
            }),
            rules: Some(wire::WorkloadIdentityRules {
                allow: vec![wire::WorkloadIdentityRule {
                    expression: "user.is_bot".into(),
                    ..Default::default()
                }],
            }),
        }),
        ..Default::default()
    };
    let sample = resource.encode_to_vec();
    bolero::check!().with_type::<Vec<Edit>>().for_each(|edits| {
        let Ok(message) = wire::WorkloadIdentity::decode(&*mutilated(&sample, edits)) else {
            return;
        };
        if let Ok(stored) = resource::from_message(message) {
            let shown = resource::to_message(&stored).expect("what was checked");
            let again = resource::from_message(shown).expect("what was shown");
            assert_eq!(again.spec, stored.spec);
        }
    });
}

#[test]
fn fuzz_answers_of_sts() {
    let xml = "<GetCallerIdentityResponse xmlns=\"https://sts.amazonaws.com/doc/2011-06-15/\"><GetCallerIdentityResult>\
        <Arn>arn:aws:sts::1:assumed-role/r/i</Arn><Account>1</Account></GetCallerIdentityResult></GetCallerIdentityResponse>";
    let json = json!({"GetCallerIdentityResponse": {"GetCallerIdentityResult": {"Account": "1", "Arn": "arn:aws:sts::1:assumed-role/r/i"}}});
    bolero::check!().with_type::<Vec<Edit>>().for_each(|edits| {
        for sample in [xml, &json.to_string()] {
            let body = mutilated(sample.as_bytes(), edits);
            if let Ok(caller) = AwsIdentity::read("200 OK", true, &body) {
                assert!(!caller.account.is_empty() && !caller.arn.is_empty());
            }
            let refused = AwsIdentity::read("403 Forbidden", false, &body)
                .unwrap_err()
                .to_string();
            assert!(refused.len() < 8192 && !refused.contains('\0'));
        }
    });
}

/// An authority, DER in base64.
const AUTHORITY: &str = "MIIBnTCCAUKgAwIBAgIUd/IZYrpUR6HGcMcFT3z5IvGkL/0wCgYIKoZIzj0EAwIwDTELMAkGA1UECgwCdGQwIBcN\
    MjYxMTIxMjA0NDEyWhgPMjEyNjEwMjgyMDQ0MTJaMA0xCzAJBgNVBAoMAnRkMFkwEwYHKoZIzj0CAQYIKoZIzj0D\
    AQcDQgAEuoTvgB2uK9rpSjFrsCyYV++i8tGroM3eUpmT0CuCXhlI3LmO2y+iMk5P0r0YmCtytmhBmB63CQ5uNlDu\
    CcJKk6N+MHwwHQYDVR0OBBYEFCGK16Xsm7WtJm6Lh6Yzw7tl5uL9MB8GA1UdIwQYMBaAFCGK16Xsm7WtJm6Lh6Yz\
    w7tl5uL9MA8GA1UdEwEB/wQFMAMBAf8wGQYDVR0RAQH/BA8wDYYLc3BpZmZlOi8vdGQwDgYDVR0PAQH/BAQDAgEG\
    MAoGCCqGSM49BAMCA0kAMEYCIQCSMIoySGJDG4+8lE8net1vWT7J5PVGluO5pZ4v1HxH1AIhANNvrdtz/zTLuzNX\
    uxTl3eNj6H0dlvAOwb0PeCdQcsHF";
