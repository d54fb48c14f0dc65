//! A session of the instance with its region's authority, and the question that the cluster puts there in
//! the instance's place. Requests are signed as Oracle documents ("Request Signatures", draft-cavage).

use std::time::SystemTime;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use http::{Request, StatusCode, header};
use http_body_util::Full;
use serde_json::{Value, json};
use time::OffsetDateTime;
use time::macros::format_description;

use super::verify::{Claims, PATH, Region};
use crate::crypto::x509::Certificate;
use crate::crypto::{KeyAlgorithm, PrivateKey, pem, sha256, sha256_hex};
use crate::outbound::{Outbound, Target};

/// Where an instance exchanges its certificate for a session.
const FEDERATION: &str = "/v1/x509";
/// The longest answer that is read, in bytes.
const MAX_ANSWER: usize = 256 * 1024;

/// Who the instance is.
pub(super) struct Identity<'a> {
    pub(super) region: Region,
    /// PEM.
    pub(super) certificate: &'a str,
    /// PEM.
    pub(super) intermediate: &'a str,
    pub(super) key: &'a PrivateKey,
}

impl Identity<'_> {
    /// The question whose authorities certify instances, signed by a session: an HTTP/1.1 request.
    pub(super) async fn question(&self, now: SystemTime) -> Result<Vec<u8>, String> {
        let session = tokio::task::spawn_blocking(|| PrivateKey::generate(KeyAlgorithm::Rsa2048))
            .await
            .map_err(|error| error.to_string())?
            .map_err(|error| error.to_string())?;
        let token = self.session(&session, now).await?;
        let (host, date) = (self.region.authority(), date(now));
        let headers = [
            ("date", date.as_str()),
            ("(request-target)", &format!("get {PATH}")),
            ("host", &host),
        ];
        let authorization = sign(&session, &format!("ST${token}"), &headers)?;
        let lines = [
            format!("GET {PATH} HTTP/1.1"),
            format!("Host: {host}"),
            format!("User-Agent: tbot/{}", env!("CARGO_PKG_VERSION")),
            format!("Authorization: {authorization}"),
            format!("Date: {date}"),
        ];
        Ok((lines.join("\r\n") + "\r\n\r\n").into_bytes())
    }

    /// Exchanges the certificate for a token that speaks for the key of a session.
    async fn session(&self, session: &PrivateKey, now: SystemTime) -> Result<String, String> {
        let certificate = Certificate::from_pem(self.certificate)
            .map_err(|error| format!("the instance's certificate: {error}"))?;
        let claims = Claims::of(&certificate)?;
        let fingerprint = sha256_hex(certificate.der());
        let fingerprint: Vec<&str> = fingerprint
            .as_bytes()
            .chunks(2)
            .filter_map(|pair| std::str::from_utf8(pair).ok())
            .collect();
        let key_id = format!(
            "{}/fed-x509-sha256/{}",
            claims.tenancy,
            fingerprint.join(":")
        );

        let intermediates = pem::certificates(self.intermediate)
            .map_err(|error| format!("the intermediate certificates: {error}"))?;
        let body = json!({
            "fingerprintAlgorithm": "SHA256",
            "certificate": STANDARD.encode(certificate.der()),
            "publicKey": STANDARD.encode(session.public_spki()),
            "intermediateCertificates":
                intermediates.iter().map(|der| STANDARD.encode(der)).collect::<Vec<_>>(),
        })
        .to_string();
        let (date, length) = (date(now), body.len().to_string());
        let digest = STANDARD.encode(sha256(body.as_bytes()));
        let headers = [
            ("date", date.as_str()),
            ("(request-target)", &format!("post {FEDERATION}")),
            ("content-length", &length),
            ("content-type", "application/json"),
            ("x-content-sha256", &digest),
        ];
        let target = Target::https(&self.region.authority());
        let mut request = Request::post(FEDERATION).header(header::HOST, target.authority());
        for (name, value) in headers.iter().filter(|(name, _)| !name.starts_with('(')) {
            request = request.header(*name, *value);
        }
        let request = request
            .header(header::AUTHORIZATION, sign(self.key, &key_id, &headers)?)
            .body(Full::from(body))
            .map_err(|error| error.to_string())?;
        let outbound = Outbound::new().map_err(|error| error.to_string())?;
        let answer = outbound
            .send(&target, request, MAX_ANSWER)
            .await
            .map_err(|error| error.to_string())?;
        if answer.status != StatusCode::OK {
            return Err(format!(
                "{} answered {} to the instance's certificate: is the clock right?",
                target.url(FEDERATION),
                answer.status
            ));
        }
        token(&answer.body)
            .ok_or_else(|| format!("{} answered without a token", target.url(FEDERATION)))
    }
}

/// The token in an answer; it becomes part of a header.
fn token(answer: &[u8]) -> Option<String> {
    let answer: Value = serde_json::from_slice(answer).ok()?;
    let token = answer.get("token")?.as_str()?;
    let graphic = !token.is_empty() && token.bytes().all(|b| b.is_ascii_graphic());
    graphic.then(|| token.to_owned())
}

/// The value of `Authorization` for a request with these headers, in this order.
fn sign(key: &PrivateKey, key_id: &str, headers: &[(&str, &str)]) -> Result<String, String> {
    let lines: Vec<String> = headers
        .iter()
        .map(|(name, value)| format!("{name}: {value}"))
        .collect();
    let names: Vec<&str> = headers.iter().map(|(name, _)| *name).collect();
    let signature = key
        .sign(lines.join("\n").as_bytes())
        .map_err(|error| error.to_string())?;
    Ok(format!(
        "Signature version=\"1\",headers=\"{}\",keyId=\"{key_id}\",algorithm=\"rsa-sha256\",signature=\"{}\"",
        names.join(" "),
        STANDARD.encode(signature)
    ))
}

/// A date as HTTP writes it.
fn date(now: SystemTime) -> String {
    let format = format_description!(
        "[weekday repr:short], [day] [month repr:short] [year] [hour]:[minute]:[second] GMT"
    );
    OffsetDateTime::from(now)
        .format(&format)
        .unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::join::tests::mutilated::{Edit, mutilated};

    #[test]
    fn fuzz_answers_with_a_token() {
        const SAMPLE: &[u8] = br#"{"token":"eyJ.a-b_c.d"}"#;
        assert_eq!(token(SAMPLE).as_deref(), Some("eyJ.a-b_c.d"));
        bolero::check!().with_type::<Vec<Edit>>().for_each(|edits| {
            if let Some(token) = token(&mutilated(SAMPLE, edits)) {
                let header = format!("Signature keyId=\"ST${token}\"");
                assert!(http::HeaderValue::from_str(&header).is_ok(), "{token:?}");
            }
        });
    }

    #[test]
    fn requests_are_signed_as_documented() {
        let key = PrivateKey::generate(KeyAlgorithm::Rsa2048).unwrap();
        let headers = [("date", "D"), ("(request-target)", "get /p")];
        let text = sign(&key, "k", &headers).unwrap();
        let signature = STANDARD.encode(key.sign(b"date: D\n(request-target): get /p").unwrap());
        assert_eq!(
            text,
            format!(
                "Signature version=\"1\",headers=\"date (request-target)\",keyId=\"k\",algorithm=\"rsa-sha256\",signature=\"{signature}\""
            )
        );
    }

    #[test]
    fn dates_are_those_of_http() {
        let then = SystemTime::UNIX_EPOCH + Duration::from_secs(784_111_777);
        assert_eq!(date(then), "Sun, 06 Nov 1994 08:49:37 GMT");
    }
}
