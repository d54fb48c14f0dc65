//! What an instance sends, with mistakes in it.

use super::*;
use crate::join::tests::mutilated::{Edit, mutilated};

const HOST: &str = "auth.us-phoenix-1.oraclecloud.com";

#[test]
fn fuzz_certificates_of_instances() {
    let roots = pem::certificates(ROOT).unwrap();
    let signature = PrivateKey::from_pem(KEY)
        .unwrap()
        .sign_rsa_pss(b"challenge")
        .unwrap();
    let real = certificate();
    let claims = Claims::of(&real).unwrap();
    let check = bolero::check!().with_type::<(u8, Vec<Edit>)>();
    check.for_each(|(which, edits)| {
        let mut sent = solution();
        sent.signature.clone_from(&signature);
        match which % 4 {
            0 => sent.cert = mutilated(&sent.cert, edits),
            1 => sent.intermediate = mutilated(&sent.intermediate, edits),
            2 => sent.signature = mutilated(&sent.signature, edits),
            // Armour hides most mistakes; these are in the certificate itself.
            _ => sent.cert = pem::encode("CERTIFICATE", &mutilated(real.der(), edits)).into(),
        }
        let Ok(certificate) = leaf(&sent) else { return };
        let says = Claims::of(&certificate);
        let signed = check_signature(&certificate, "challenge", &sent.signature);
        let chain = intermediates(&sent);
        if trusted(&certificate, &chain, &roots, now()).is_ok() {
            assert_eq!(says, Ok(claims.clone()));
            assert_eq!(certificate.spki(), real.spki());
            if signed.is_ok() {
                assert_eq!(sent.signature, signature);
            }
        }
        assert!(trusted(&certificate, &roots, &[], now()).is_err());
        assert!(check_signature(&certificate, "another", &sent.signature).is_err());
    });
}

#[test]
fn fuzz_questions() {
    let sample = format!(
        "GET {PATH} HTTP/1.1\r\nHost: {HOST}\r\nUser-Agent: a\r\nAuthorization: Signature version=\"1\"\r\nDate: d\r\nX-Other: o\r\nContent-Length: 0\r\n\r\n"
    );
    assert!(Question::read(sample.as_bytes(), PATH, HOST).is_ok());
    bolero::check!().with_type::<Vec<Edit>>().for_each(|edits| {
        let bytes = mutilated(sample.as_bytes(), edits);
        let Ok(question) = Question::read(&bytes, PATH, HOST) else {
            return;
        };
        let named = |name: &str| question.headers.iter().filter(|(it, _)| it == name).count();
        assert_eq!(named("authorization"), 1);
        for never in ["host", "content-length", "transfer-encoding", "connection"] {
            assert_eq!(named(never), 0, "{never}");
        }
        for (name, value) in &question.headers {
            assert!(!value.contains(['\r', '\n', '\0']), "{name}: {value:?}");
        }
    });
}

#[test]
fn fuzz_answers_of_oracles() {
    let real = pem::certificates(ROOT).unwrap();
    let sample = json!({
        "certificates": [STANDARD.encode(&real[0])], "refreshIn": "2026-01-01T00:00:00Z",
    })
    .to_string();
    let chain = pem::certificates(INTERMEDIATE).unwrap();
    bolero::check!().with_type::<Vec<Edit>>().for_each(|edits| {
        let Ok(roots) = read_roots(&mutilated(sample.as_bytes(), edits)) else {
            return;
        };
        assert!(!roots.is_empty());
        // What it does not vouch for is trusted by nobody, however it is written.
        let _either = trusted(&certificate(), &chain, &roots, now());
        assert!(trusted(&certificate(), &[], &roots, now()).is_err());
    });
}

#[test]
fn fuzz_names_of_instances() {
    let pieces = [
        "ocid1",
        ".",
        "instance",
        "oc1",
        "phx",
        "us-phoenix-1",
        "/",
        "@",
        "é",
        "",
    ];
    bolero::check!().with_type::<Vec<u8>>().for_each(|choice| {
        let pick = |at: &u8| pieces[usize::from(*at) % pieces.len()];
        let name: String = choice.iter().map(pick).collect();
        for name in [format!("ocid1.instance.{name}"), name] {
            let regions = [Region::of(&name), Region::of_instance(&name)];
            for region in regions.into_iter().flatten() {
                assert_eq!(region.authority(), HOST);
            }
        }
    });
}
