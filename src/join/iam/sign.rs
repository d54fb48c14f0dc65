//! The signed request, as bytes: everything a cluster checks is fixed here.

use std::time::SystemTime;

use aws_credential_types::Credentials;
use aws_sigv4::http_request::{SignableBody, SignableRequest, SigningSettings, sign};
use aws_sigv4::sign::v4;
use aws_smithy_runtime_api::client::identity::Identity;

use super::super::JoinError;
use super::proof;

/// The only body that clusters accept, byte for byte.
const BODY: &str = "Action=GetCallerIdentity&Version=2011-06-15";

/// Regions with a FIPS endpoint of STS. Those of the government have it under the usual name.
const FIPS_REGIONS: [&str; 6] = [
    "us-east-1",
    "us-east-2",
    "us-gov-east-1",
    "us-gov-west-1",
    "us-west-1",
    "us-west-2",
];

/// Whether the request is to be answered by FIPS-validated software at AWS.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Fips {
    Off,
    On,
    /// The region of [`Fips::On`], with its usual endpoint.
    RegionOnly,
}

/// Where AWS is asked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Endpoint {
    region: String,
    host: String,
}

impl Endpoint {
    /// The regional STS endpoint. With FIPS a region that has no such endpoint is replaced by one
    /// that has.
    pub(super) fn new(region: &str, fips: Fips) -> Self {
        let region = if fips == Fips::Off || FIPS_REGIONS.contains(&region) {
            region
        } else {
            "us-east-1"
        };
        let prefix = if fips == Fips::On && !region.starts_with("us-gov-") {
            "sts-fips"
        } else {
            "sts"
        };
        Self {
            host: format!("{prefix}.{region}.{}", domain(region)),
            region: region.to_owned(),
        }
    }

    #[cfg(test)]
    pub(super) fn host(&self) -> &str {
        &self.host
    }
}

/// The domain of AWS's endpoints in a region: each partition has its own.
pub(crate) fn domain(region: &str) -> &'static str {
    match region.split_once('-') {
        Some(("cn", _)) => "amazonaws.com.cn",
        Some(("us", rest)) if rest.starts_with("iso-") => "c2s.ic.gov",
        Some(("us", rest)) if rest.starts_with("isob-") => "sc2s.sgov.gov",
        _ => "amazonaws.com",
    }
}

/// Signs `challenge` into a request for the caller's identity at `endpoint`, and returns it as
/// HTTP/1.1 bytes. It is sent by the cluster, not here.
pub(super) fn identity_request(
    credentials: &Credentials,
    endpoint: &Endpoint,
    challenge: &str,
    now: SystemTime,
) -> Result<Vec<u8>, JoinError> {
    let host = &endpoint.host;
    let length = BODY.len().to_string();
    let mut headers = vec![
        ("Host", host.clone()),
        ("Accept", "application/json".to_owned()),
        ("Content-Length", length),
        (
            "Content-Type",
            "application/x-www-form-urlencoded".to_owned(),
        ),
        ("X-Teleport-Challenge", challenge.to_owned()),
    ];
    let identity: Identity = credentials.clone().into();
    let parameters = v4::SigningParams::builder()
        .identity(&identity)
        .region(&endpoint.region)
        .name("sts")
        .time(now)
        .settings(SigningSettings::default())
        .build()
        .map_err(|source| proof(&source.to_string()))?
        .into();
    let uri = format!("https://{host}/");
    let lower: Vec<(String, &str)> = headers
        .iter()
        .map(|(name, value)| (name.to_ascii_lowercase(), value.as_str()))
        .collect();
    let signable = SignableRequest::new(
        "POST",
        &uri,
        lower.iter().map(|(name, value)| (name.as_str(), *value)),
        SignableBody::Bytes(BODY.as_bytes()),
    )
    .map_err(|source| proof(&source.to_string()))?;
    let (instructions, _signature) = sign(signable, &parameters)
        .map_err(|source| proof(&source.to_string()))?
        .into_parts();
    let (added, _query) = instructions.into_parts();
    for header in &added {
        headers.push((canonical(header.name()), header.value().to_owned()));
    }
    let mut request = String::from("POST / HTTP/1.1\r\n");
    for (name, value) in &headers {
        if value.contains(['\r', '\n']) {
            return Err(proof("an AWS credential holds a line break"));
        }
        request.push_str(name);
        request.push_str(": ");
        request.push_str(value);
        request.push_str("\r\n");
    }
    request.push_str("\r\n");
    request.push_str(BODY);
    Ok(request.into_bytes())
}

/// The header's name as HTTP/1.1 usually writes it.
fn canonical(name: &str) -> &'static str {
    match name {
        "authorization" => "Authorization",
        "x-amz-date" => "X-Amz-Date",
        "x-amz-security-token" => "X-Amz-Security-Token",
        _ => "X-Amz-Content-Sha256",
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn endpoint() -> Endpoint {
        Endpoint::new("eu-west-1", Fips::Off)
    }

    fn signed(token: Option<&str>) -> String {
        let credentials =
            Credentials::new("AKID", "secret", token.map(str::to_owned), None, "test");
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(1_700_000_000);
        String::from_utf8(identity_request(&credentials, &endpoint(), "abc+/", now).unwrap())
            .unwrap()
    }

    #[test]
    fn the_request_has_what_a_cluster_checks() {
        let text = signed(Some("session"));
        assert!(text.starts_with("POST / HTTP/1.1\r\nHost: sts.eu-west-1.amazonaws.com\r\n"));
        assert!(text.ends_with("\r\n\r\nAction=GetCallerIdentity&Version=2011-06-15"));
        for line in [
            "Accept: application/json",
            "Content-Length: 43",
            "X-Teleport-Challenge: abc+/",
            "X-Amz-Date: 20231114T221320Z",
            "X-Amz-Security-Token: session",
        ] {
            assert!(text.contains(&format!("{line}\r\n")), "{line} in {text}");
        }
        let authorization = text
            .lines()
            .find(|line| line.starts_with("Authorization: "))
            .unwrap();
        assert!(authorization.contains(
            "SignedHeaders=accept;content-length;content-type;host;x-amz-date;x-amz-security-token;x-teleport-challenge, "
        ), "{authorization}");
        assert!(authorization.contains("Credential=AKID/20231114/eu-west-1/sts/aws4_request, "));
    }

    #[test]
    fn long_lived_credentials_have_no_session_token() {
        assert!(
            !signed(None)
                .to_ascii_lowercase()
                .contains("x-amz-security-token")
        );
    }

    #[test]
    fn a_line_break_cannot_add_a_header() {
        let credentials = Credentials::new("AK\r\nX: y", "secret", None, None, "test");
        assert!(identity_request(&credentials, &endpoint(), "c", SystemTime::UNIX_EPOCH).is_err());
    }

    #[test]
    fn endpoints_follow_partition_and_fips() {
        for (region, fips, host) in [
            ("cn-north-1", Fips::Off, "sts.cn-north-1.amazonaws.com.cn"),
            (
                "us-gov-west-1",
                Fips::Off,
                "sts.us-gov-west-1.amazonaws.com",
            ),
            ("us-iso-east-1", Fips::Off, "sts.us-iso-east-1.c2s.ic.gov"),
            (
                "us-isob-east-1",
                Fips::Off,
                "sts.us-isob-east-1.sc2s.sgov.gov",
            ),
            ("us-east-2", Fips::On, "sts-fips.us-east-2.amazonaws.com"),
            ("us-gov-west-1", Fips::On, "sts.us-gov-west-1.amazonaws.com"),
            ("eu-west-1", Fips::On, "sts-fips.us-east-1.amazonaws.com"),
            ("eu-west-1", Fips::RegionOnly, "sts.us-east-1.amazonaws.com"),
        ] {
            assert_eq!(Endpoint::new(region, fips).host(), host);
        }
    }

    #[test]
    fn the_signature_is_for_the_region_that_is_asked() {
        let credentials = Credentials::new("AKID", "secret", None, None, "test");
        let endpoint = Endpoint::new("eu-west-1", Fips::On);
        let bytes = identity_request(&credentials, &endpoint, "c", SystemTime::UNIX_EPOCH);
        let text = String::from_utf8(bytes.unwrap()).unwrap();
        assert!(
            text.contains("Host: sts-fips.us-east-1.amazonaws.com\r\n"),
            "{text}"
        );
        assert!(text.contains("/us-east-1/sts/aws4_request"), "{text}");
    }
}
