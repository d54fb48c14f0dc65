//! A `CreateSession` request, signed with a certificate's key: AWS Signature Version 4 with the
//! changes of the IAM Roles Anywhere user guide ("Signing process"). Pure functions.

use std::time::SystemTime;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use time::OffsetDateTime;
use time::macros::format_description;

use crate::crypto::x509::{self, Certificate};
use crate::crypto::{KeyAlgorithm, KeyError, PrivateKey, sha256_hex};
use crate::query::encoded;

/// The service's name in the scope of a signature.
const SERVICE: &str = "rolesanywhere";
/// The path of the call.
pub(super) const PATH: &str = "/sessions";

/// Why a request cannot be signed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(super) enum SignError {
    /// The SVID is no row of certificates.
    #[error("the SVID's certificates are malformed")]
    Certificate,
    /// AWS takes RSA and ECDSA only.
    #[error("IAM Roles Anywhere takes RSA and ECDSA keys only, and the SVID's is neither")]
    Algorithm,
    /// The key does not sign.
    #[error("signing failed: {0}")]
    Key(#[from] KeyError),
    /// The clock is beyond what a date can say.
    #[error("this machine's clock is beyond the year 9999")]
    Clock,
}

/// Whom a session is asked for, and where.
#[derive(Debug, Clone, Copy)]
pub(super) struct Question<'a> {
    /// The host that is asked, with its port unless that is the usual one.
    pub(super) host: &'a str,
    /// The region that the signature is for.
    pub(super) region: &'a str,
    pub(super) profile: &'a str,
    pub(super) role: &'a str,
    pub(super) trust_anchor: &'a str,
    pub(super) body: &'a str,
}

/// Whom the signature is of.
#[derive(Debug)]
pub(super) struct Signer<'a> {
    /// The leaf, then intermediates, DER, one after the other.
    pub(super) chain: &'a [u8],
    /// The leaf's key, PKCS#8.
    pub(super) key: &'a [u8],
}

/// What is sent besides the body.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Signed {
    /// Path and query.
    pub(super) target: String,
    /// Every header, `host` included, in lower case.
    pub(super) headers: Vec<(&'static str, String)>,
}

/// Signs a question at `now`.
pub(super) fn sign(
    question: &Question<'_>,
    signer: &Signer<'_>,
    now: SystemTime,
) -> Result<Signed, SignError> {
    let key = PrivateKey::from_pkcs8(signer.key)?;
    let algorithm = algorithm(key.algorithm())?;
    let ders = x509::split(signer.chain).ok_or(SignError::Certificate)?;
    let (leaf, intermediates) = ders.split_first().ok_or(SignError::Certificate)?;
    let serial = serial(&Certificate::from_der(leaf).map_err(|_source| SignError::Certificate)?)?;
    let date = date(now)?;
    let mut headers = headers(question, leaf, intermediates, &date);
    let scope = scope(&date, question.region);
    let signature = key.sign(to_sign(algorithm, question, &headers, &date).as_bytes())?;
    let authorization = format!(
        "{algorithm} Credential={serial}/{scope}, SignedHeaders={}, Signature={}",
        names(&headers),
        hex::encode(signature)
    );
    headers.push(("authorization", authorization));
    Ok(Signed {
        target: format!("{PATH}?{}", query(question)),
        headers,
    })
}

fn algorithm(key: KeyAlgorithm) -> Result<&'static str, SignError> {
    match key {
        KeyAlgorithm::EcdsaP256 => Ok("AWS4-X509-ECDSA-SHA256"),
        KeyAlgorithm::Rsa2048 => Ok("AWS4-X509-RSA-SHA256"),
        KeyAlgorithm::Ed25519 => Err(SignError::Algorithm),
    }
}

/// The headers that are signed, sorted by name.
fn headers(
    question: &Question<'_>,
    leaf: &[u8],
    intermediates: &[&[u8]],
    date: &str,
) -> Vec<(&'static str, String)> {
    let mut headers = vec![
        ("content-type", "application/json".to_owned()),
        ("host", question.host.to_owned()),
        ("x-amz-date", date.to_owned()),
        ("x-amz-x509", STANDARD.encode(leaf)),
    ];
    if !intermediates.is_empty() {
        let chain: Vec<String> = intermediates
            .iter()
            .map(|der| STANDARD.encode(der))
            .collect();
        headers.push(("x-amz-x509-chain", chain.join(",")));
    }
    headers
}

fn names(headers: &[(&'static str, String)]) -> String {
    let names: Vec<&str> = headers.iter().map(|(name, _)| *name).collect();
    names.join(";")
}

/// The query, which is sent as it is signed: sorted and encoded.
fn query(question: &Question<'_>) -> String {
    [
        ("profileArn", question.profile),
        ("roleArn", question.role),
        ("trustAnchorArn", question.trust_anchor),
    ]
    .map(|(name, value)| format!("{name}={}", encoded(value)))
    .join("&")
}

/// What the signature is of.
fn to_sign(
    algorithm: &str,
    question: &Question<'_>,
    headers: &[(&'static str, String)],
    date: &str,
) -> String {
    let mut listed = String::new();
    for (name, value) in headers {
        listed.push_str(&format!("{name}:{value}\n"));
    }
    let request = [
        "POST",
        PATH,
        &query(question),
        &listed,
        &names(headers),
        &sha256_hex(question.body.as_bytes()),
    ]
    .join("\n");
    [
        algorithm,
        date,
        &scope(date, question.region),
        &sha256_hex(request.as_bytes()),
    ]
    .join("\n")
}

fn scope(date: &str, region: &str) -> String {
    let day = date.split('T').next().unwrap_or_default();
    format!("{day}/{region}/{SERVICE}/aws4_request")
}

fn date(now: SystemTime) -> Result<String, SignError> {
    OffsetDateTime::from(now)
        .format(format_description!(
            "[year][month][day]T[hour][minute][second]Z"
        ))
        .ok()
        .filter(|text| text.len() == "20060102T150405Z".len())
        .ok_or(SignError::Clock)
}

/// The certificate's serial number, in decimal.
fn serial(leaf: &Certificate) -> Result<String, SignError> {
    let hex: String = leaf.serial().split(':').collect();
    let bytes = hex::decode(hex).map_err(|_source| SignError::Certificate)?;
    Ok(decimal(&bytes))
}

/// A big-endian number in decimal.
fn decimal(bytes: &[u8]) -> String {
    // Least significant digit first.
    let mut digits = vec![0_u32];
    for byte in bytes {
        let mut carry = u32::from(*byte);
        for digit in &mut digits {
            let value = *digit * 256 + carry;
            *digit = value % 10;
            carry = value / 10;
        }
        while carry > 0 {
            digits.push(carry % 10);
            carry /= 10;
        }
    }
    digits
        .iter()
        .rev()
        .filter_map(|digit| char::from_digit(*digit, 10))
        .collect()
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use aws_lc_rs::signature::{
        ECDSA_P256_SHA256_ASN1, RSA_PKCS1_2048_8192_SHA256, UnparsedPublicKey,
        VerificationAlgorithm,
    };
    use x509_cert::der::{Decode as _, Encode as _};

    use super::*;
    use crate::crypto::pem;
    use crate::workload::tests::{Authority, start};

    /// What AWS's own helper (`aws_signing_helper` 1.1.1) sent on 2024-07-06 with an RSA key, as
    /// recorded by the author of `github.com/salrashid123/aws_rolesanywhere_signer`.
    const RECORDED: Question<'_> = Question {
        host: "127.0.0.1:8080",
        region: "us-east-2",
        profile: "arn:aws:rolesanywhere:us-east-2:291738886548:profile/6f4943fb-13d4-4242-89c4-be367595c380",
        role: "arn:aws:iam::291738886548:role/rolesanywhere1",
        trust_anchor: "arn:aws:rolesanywhere:us-east-2:291738886548:trust-anchor/a545a1fc-5d86-4032-8f4c-61cdd6ff92da",
        body: r#"{"durationSeconds":3600}"#,
    };
    const RECORDED_DATE: &str = "20240706T113859Z";

    fn verifies(
        algorithm: &'static dyn VerificationAlgorithm,
        leaf: &[u8],
        text: &str,
        signature: &[u8],
    ) -> bool {
        let leaf = x509_cert::Certificate::from_der(leaf).unwrap();
        let info = leaf.tbs_certificate.subject_public_key_info;
        let key = info.subject_public_key.as_bytes().unwrap().to_vec();
        assert!(info.to_der().is_ok());
        UnparsedPublicKey::new(algorithm, key)
            .verify(text.as_bytes(), signature)
            .is_ok()
    }

    #[test]
    fn what_is_signed_is_what_awss_own_helper_signs() {
        let leaf = pem::certificates(include_str!("recorded.pem"))
            .unwrap()
            .remove(0);
        let signature: String = include_str!("recorded.signature")
            .split_whitespace()
            .collect();
        let signature = hex::decode(signature).unwrap();
        let headers = headers(&RECORDED, &leaf, &[], RECORDED_DATE);
        assert_eq!(names(&headers), "content-type;host;x-amz-date;x-amz-x509");
        let check = |question: &Question<'_>, date: &str| {
            let text = to_sign("AWS4-X509-RSA-SHA256", question, &headers, date);
            verifies(&RSA_PKCS1_2048_8192_SHA256, &leaf, &text, &signature)
        };
        assert!(check(&RECORDED, RECORDED_DATE));
        assert!(!check(&RECORDED, "20240706T113900Z"));
        let other = Question {
            body: "{}",
            ..RECORDED
        };
        assert!(!check(&other, RECORDED_DATE));
        let certificate = Certificate::from_der(&leaf).unwrap();
        assert_eq!(serial(&certificate).unwrap(), "21");
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(1_720_265_939);
        assert_eq!(date(now).unwrap(), RECORDED_DATE);
    }

    #[test]
    fn both_algorithms_sign_what_they_say() {
        let authority = Authority::new("one");
        for (key, name, verifier) in [
            (
                KeyAlgorithm::EcdsaP256,
                "AWS4-X509-ECDSA-SHA256",
                &ECDSA_P256_SHA256_ASN1 as &'static dyn VerificationAlgorithm,
            ),
            (
                KeyAlgorithm::Rsa2048,
                "AWS4-X509-RSA-SHA256",
                &RSA_PKCS1_2048_8192_SHA256,
            ),
        ] {
            let key = PrivateKey::generate(key).unwrap();
            let leaf = authority.leaf(&key, &["spiffe://example.org/x"]);
            let chain = [leaf.clone(), authority.der.clone()].concat();
            let signer = Signer {
                chain: &chain,
                key: key.pkcs8_der().expose(),
            };
            let signed = sign(&RECORDED, &signer, start()).unwrap();
            assert!(signed.target.starts_with(
                "/sessions?profileArn=arn%3Aaws%3Arolesanywhere%3Aus-east-2%3A291738886548%3Aprofile%2F6f"
            ));
            let (last, headers) = signed.headers.split_last().unwrap();
            let [.., ("x-amz-x509", own), ("x-amz-x509-chain", others)] = headers else {
                panic!("{headers:?}");
            };
            assert_eq!(STANDARD.decode(own).unwrap(), leaf);
            assert_eq!(STANDARD.decode(others).unwrap(), authority.der);
            let (start_of, signature) = last.1.split_once(", Signature=").unwrap();
            assert!(
                start_of.starts_with(&format!("{name} Credential=")),
                "{start_of}"
            );
            assert!(start_of.ends_with(
                "/us-east-2/rolesanywhere/aws4_request, SignedHeaders=content-type;host;x-amz-date;x-amz-x509;x-amz-x509-chain"
            ));
            let text = to_sign(name, &RECORDED, headers, &date(start()).unwrap());
            assert!(verifies(
                verifier,
                &leaf,
                &text,
                &hex::decode(signature).unwrap()
            ));
        }
    }

    #[test]
    fn what_aws_does_not_take_is_not_sent() {
        let authority = Authority::new("one");
        let key = PrivateKey::generate(KeyAlgorithm::Ed25519).unwrap();
        let other = PrivateKey::generate(KeyAlgorithm::EcdsaP256).unwrap();
        let leaf = authority.leaf(&other, &["spiffe://example.org/x"]);
        for (chain, key, expected) in [
            (
                leaf.as_slice(),
                key.pkcs8_der().expose().as_slice(),
                SignError::Algorithm,
            ),
            (&[], other.pkcs8_der().expose(), SignError::Certificate),
            (b"x", other.pkcs8_der().expose(), SignError::Certificate),
            (&leaf, b"x", SignError::Key(KeyError::Unsupported)),
        ] {
            let signer = Signer { chain, key };
            assert_eq!(sign(&RECORDED, &signer, start()).unwrap_err(), expected);
        }
    }

    #[test]
    fn serial_numbers_of_any_length_are_written_in_decimal() {
        // Computed with Python's int.from_bytes.
        for (bytes, expected) in [
            (&[][..], "0"),
            (&[0], "0"),
            (&[21], "21"),
            (&[1, 0], "256"),
            (&[0xff; 8], "18446744073709551615"),
            (
                &[0xff; 20],
                "1461501637330902918203684832716283019655932542975",
            ),
        ] {
            assert_eq!(decimal(bytes), expected);
        }
    }
}
