//! The verifying half of join method `iam`; what is in this file is pure, without a network.
//!
//! A bot proves its AWS identity with a signed `sts:GetCallerIdentity` request that it does not
//! send. The cluster sends it, so everything that decides *where* and *what* is pinned here: the
//! host must be one of AWS's, the challenge must be signed, and the request that goes out is
//! rebuilt from an allow-list (facts: upstream `lib/auth/join_iam.go`).

mod method;
mod sts;

use std::fmt;
use std::time::{Duration, SystemTime};

use serde_json::Value;
use time::{OffsetDateTime, PrimitiveDateTime, macros::format_description};

pub use method::Iam;

use crate::crypto::same;
use crate::join::verify::glob;

/// The body of every request, byte for byte.
pub const BODY: &str = "Action=GetCallerIdentity&Version=2011-06-15";
/// The longest answer of AWS's that is read, in bytes.
pub const MAX_ANSWER: usize = 64 * 1024;

/// The longest request that is read, in bytes; session tokens take up to a few thousand.
const MAX_REQUEST: usize = 64 * 1024;
const MAX_HEADERS: usize = 64;
/// How far a signature's date may be from now: AWS's own limit.
const MAX_SKEW: Duration = Duration::from_mins(15);
const CHALLENGE_HEADER: &str = "x-teleport-challenge";

/// Headers that are passed on. `host` and `content-length` are written anew.
const PASSED: &[&str] = &[
    "accept",
    "amz-sdk-invocation-id",
    "amz-sdk-request",
    "authorization",
    "content-type",
    "user-agent",
    "x-amz-content-sha256",
    "x-amz-date",
    "x-amz-security-token",
    "x-amz-user-agent",
    CHALLENGE_HEADER,
];

/// Regions whose STS answers at `sts.<region>.amazonaws.com`.
const REGIONS: &[&str] = &[
    "af-south-1",
    "ap-east-1",
    "ap-east-2",
    "ap-northeast-1",
    "ap-northeast-2",
    "ap-northeast-3",
    "ap-south-1",
    "ap-south-2",
    "ap-southeast-1",
    "ap-southeast-2",
    "ap-southeast-3",
    "ap-southeast-4",
    "ap-southeast-5",
    "ap-southeast-6",
    "ap-southeast-7",
    "ca-central-1",
    "ca-west-1",
    "eu-central-1",
    "eu-central-2",
    "eu-north-1",
    "eu-south-1",
    "eu-south-2",
    "eu-west-1",
    "eu-west-2",
    "eu-west-3",
    "il-central-1",
    "me-central-1",
    "me-south-1",
    "mx-central-1",
    "sa-east-1",
    "us-east-1",
    "us-east-2",
    "us-gov-east-1",
    "us-gov-west-1",
    "us-west-1",
    "us-west-2",
];
/// Regions with an endpoint `sts-fips.<region>.amazonaws.com`.
const FIPS_REGIONS: &[&str] = &["us-east-1", "us-east-2", "us-west-1", "us-west-2"];
/// Endpoints outside of these patterns.
const OTHER_HOSTS: &[&str] = &[
    "sts.amazonaws.com",
    "sts.cn-north-1.amazonaws.com.cn",
    "sts.cn-northwest-1.amazonaws.com.cn",
    "sts.us-iso-east-1.c2s.ic.gov",
    "sts.us-iso-west-1.c2s.ic.gov",
    "sts.us-isob-east-1.sc2s.sgov.gov",
];

/// Why a proof is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum IamError {
    /// The bytes are not the one HTTP/1.1 request that is accepted.
    #[error("malformed sts identity request: {0}")]
    Malformed(&'static str),
    /// The request asks for something else than `/`.
    #[error("unexpected sts identity request URI: {0:?}")]
    Target(String),
    /// The request is not a POST.
    #[error("unexpected sts identity request method: {0:?}")]
    Method(String),
    /// The request is for a host that is none of AWS's.
    #[error(
        "IAM join request uses unknown STS host {0:?}. It is either an attempt to impersonate an \
         AWS account, or a region newer than this program: use the endpoint of another region \
         (AWS_REGION)"
    )]
    Host(String),
    /// The challenge is missing, another one, or not signed.
    #[error("sts identity request does not include challenge header or it does not match")]
    Challenge,
    /// The `Authorization` header is no SigV4 signature.
    #[error("sts identity request has a malformed Authorization header: {0}")]
    Authorization(&'static str),
    /// The challenge is there but the signature does not cover it.
    #[error(
        "sts identity request auth header {CHALLENGE_HEADER:?} does not include in signed headers"
    )]
    Unsigned,
    /// The signature covers a header that this cluster does not pass on.
    #[error("sts identity request signs the header {0:?}, which is not passed on to AWS")]
    Header(String),
    /// The body is not the constant.
    #[error("sts request body does not match the expected {BODY:?}")]
    Body,
    /// The signature's date is too far from the cluster's clock.
    #[error(
        "sts identity request was signed at {date}, more than 15 minutes from this cluster's time: \
         set the clock of the agent's machine"
    )]
    Skew {
        /// The date in the request.
        date: String,
    },
    /// AWS refused the signature.
    #[error("aws sts api returned status: {status:?} body: {body:?}")]
    Refused {
        /// The status line.
        status: String,
        /// The beginning of the answer.
        body: String,
    },
    /// AWS's answer is neither the JSON nor the XML that is expected.
    #[error("cannot read the answer of the aws sts api")]
    Answer,
    /// AWS's answer lacks the account or the ARN.
    #[error("received empty AWS account ID or ARN from the sts API")]
    Empty,
    /// The identity is real, but no rule of the token lets it in.
    #[error("instance {0} did not match any allow rules")]
    NoRule(String),
}

/// A checked request, ready to be sent to AWS.
#[derive(Clone, PartialEq, Eq)]
pub struct StsRequest {
    /// One of AWS's hosts, lower case, without a port.
    pub host: String,
    /// The headers that go out besides `host` and `content-length`, names in lower case.
    pub headers: Vec<(String, String)>,
}

impl fmt::Debug for StsRequest {
    /// Signatures and session tokens are not shown.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names: Vec<&str> = self.headers.iter().map(|(name, _)| name.as_str()).collect();
        write!(f, "StsRequest({}, {names:?})", self.host)
    }
}

impl StsRequest {
    /// Checks the request that a bot made in answer to `challenge`.
    ///
    /// # Errors
    /// The first [`IamError`] that applies.
    pub fn parse(bytes: &[u8], challenge: &str, now: SystemTime) -> Result<Self, IamError> {
        let (head, body) = split(bytes)?;
        let mut lines = head.split("\r\n");
        request_line(lines.next().unwrap_or_default())?;
        let headers = lines.map(header).collect::<Result<Vec<_>, _>>()?;
        if headers.len() > MAX_HEADERS {
            return Err(IamError::Malformed("too many headers"));
        }
        let one = |name: &str| {
            let mut values = headers.iter().filter(|(known, _)| known == name);
            match (values.next(), values.next()) {
                (found, None) => Ok(found.map(|(_, value)| value.as_str())),
                _ => Err(IamError::Malformed("a header that matters is repeated")),
            }
        };
        for name in [
            "transfer-encoding",
            "connection",
            "upgrade",
            "expect",
            "trailer",
        ] {
            if one(name)?.is_some() {
                return Err(IamError::Malformed(
                    "a header changes how the request is read",
                ));
            }
        }
        let host = one("host")?.unwrap_or_default();
        if !is_sts_host(host) {
            return Err(IamError::Host(host.to_owned()));
        }
        if !one(CHALLENGE_HEADER)?.is_some_and(|given| same(given.as_bytes(), challenge.as_bytes()))
        {
            return Err(IamError::Challenge);
        }
        let signed = signed_headers(one("authorization")?.unwrap_or_default())?;
        if !signed.contains(&CHALLENGE_HEADER) {
            return Err(IamError::Unsigned);
        }
        let known =
            |name: &str| PASSED.contains(&name) || ["host", "content-length"].contains(&name);
        if let Some(unknown) = signed.iter().find(|name| !known(name)) {
            return Err(IamError::Header((*unknown).to_owned()));
        }
        let length = one("content-length")?.unwrap_or_default();
        if body != BODY.as_bytes() || length != BODY.len().to_string() {
            return Err(IamError::Body);
        }
        check_date(one("x-amz-date")?.unwrap_or_default(), now)?;
        let mut passed = Vec::new();
        for name in PASSED {
            if let Some(value) = one(name)? {
                passed.push(((*name).to_owned(), value.to_owned()));
            }
        }
        Ok(Self {
            host: host.to_owned(),
            headers: passed,
        })
    }
}

/// The head, without the empty line that ends it, and the body.
fn split(bytes: &[u8]) -> Result<(&str, &[u8]), IamError> {
    if bytes.len() > MAX_REQUEST {
        return Err(IamError::Malformed("it is too long"));
    }
    let end = bytes
        .windows(4)
        .position(|window| window == b"\r\n\r\n")
        .ok_or(IamError::Malformed("its head does not end"))?;
    let (head, rest) = bytes.split_at(end);
    let head = std::str::from_utf8(head)
        .ok()
        .filter(|head| head.is_ascii())
        .ok_or(IamError::Malformed("its head is not ASCII"))?;
    Ok((head, rest.get(4..).unwrap_or_default()))
}

fn request_line(line: &str) -> Result<(), IamError> {
    let mut parts = line.split(' ');
    let (Some(method), Some(target), Some(version), None) =
        (parts.next(), parts.next(), parts.next(), parts.next())
    else {
        return Err(IamError::Malformed("its first line"));
    };
    if version != "HTTP/1.1" {
        return Err(IamError::Malformed("it is not HTTP/1.1"));
    }
    if target != "/" {
        return Err(IamError::Target(target.to_owned()));
    }
    if method != "POST" {
        return Err(IamError::Method(method.to_owned()));
    }
    Ok(())
}

/// One header: a token, `:`, and visible characters. Folded lines are refused.
fn header(line: &str) -> Result<(String, String), IamError> {
    let (name, value) = line
        .split_once(':')
        .ok_or(IamError::Malformed("a header without a colon"))?;
    let token = |b: u8| b.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&b);
    if name.is_empty() || !name.bytes().all(token) {
        return Err(IamError::Malformed("a header's name"));
    }
    let value = value.trim_matches([' ', '\t']);
    if !value
        .bytes()
        .all(|b| b.is_ascii_graphic() || b == b' ' || b == b'\t')
    {
        return Err(IamError::Malformed("a header's value"));
    }
    Ok((name.to_ascii_lowercase(), value.to_owned()))
}

/// Whether `host` is, letter for letter, an STS endpoint of AWS's.
#[must_use]
pub fn is_sts_host(host: &str) -> bool {
    let region_of = |prefix: &str| {
        host.strip_prefix(prefix)
            .and_then(|rest| rest.strip_suffix(".amazonaws.com"))
    };
    OTHER_HOSTS.contains(&host)
        || region_of("sts.").is_some_and(|region| REGIONS.contains(&region))
        || region_of("sts-fips.").is_some_and(|region| FIPS_REGIONS.contains(&region))
}

/// The names that a SigV4 `Authorization` header says it covers.
fn signed_headers(header: &str) -> Result<Vec<&str>, IamError> {
    let rest = header
        .strip_prefix("AWS4-HMAC-SHA256 ")
        .ok_or(IamError::Authorization("it is not AWS4-HMAC-SHA256"))?;
    let parts: Vec<(&str, &str)> = rest
        .split(',')
        .map(|part| {
            part.trim()
                .split_once('=')
                .filter(|(_, value)| !value.contains('='))
                .ok_or(IamError::Authorization("a part is not name=value"))
        })
        .collect::<Result<_, _>>()?;
    if parts.len() != 3 {
        return Err(IamError::Authorization("it has not three parts"));
    }
    let part = |name: &'static str| {
        let found = parts.iter().find(|(known, _)| *known == name);
        found
            .map(|(_, value)| *value)
            .filter(|value| !value.is_empty())
    };
    let credential = part("Credential").ok_or(IamError::Authorization("no Credential"))?;
    if credential.split('/').count() != 5 {
        return Err(IamError::Authorization("the Credential has not five parts"));
    }
    part("Signature").ok_or(IamError::Authorization("no Signature"))?;
    let signed = part("SignedHeaders").ok_or(IamError::Authorization("no SignedHeaders"))?;
    Ok(signed.split(';').collect())
}

fn check_date(date: &str, now: SystemTime) -> Result<(), IamError> {
    let format = format_description!("[year][month][day]T[hour][minute][second]Z");
    let skew = || IamError::Skew {
        date: date.to_owned(),
    };
    let signed = PrimitiveDateTime::parse(date, format)
        .map_err(|_source| skew())?
        .assume_utc();
    let apart = (OffsetDateTime::from(now) - signed).unsigned_abs();
    if apart > MAX_SKEW {
        Err(skew())
    } else {
        Ok(())
    }
}

/// An AWS identity that AWS itself confirmed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AwsIdentity {
    /// The account, twelve digits.
    pub account: String,
    /// The ARN; for roles `arn:aws:sts::<account>:assumed-role/<role>/<session>`.
    pub arn: String,
}

impl AwsIdentity {
    /// Reads AWS's answer: JSON as AWS sends it to who accepts it, or XML.
    ///
    /// # Errors
    /// [`IamError::Refused`] for any status but 200, [`IamError::Answer`], [`IamError::Empty`].
    pub fn read(status: &str, is_success: bool, body: &[u8]) -> Result<Self, IamError> {
        let text = String::from_utf8_lossy(body);
        if !is_success {
            return Err(IamError::Refused {
                status: status.to_owned(),
                body: text
                    .chars()
                    .filter(|c| !c.is_control())
                    .take(1024)
                    .collect(),
            });
        }
        let (account, arn) = if text.trim_start().starts_with('<') {
            let document = roxmltree::Document::parse(&text).map_err(|_source| IamError::Answer)?;
            let element = |name: &str| {
                let result = document
                    .descendants()
                    .find(|node| node.tag_name().name() == "GetCallerIdentityResult")?;
                let found = result
                    .children()
                    .find(|node| node.tag_name().name() == name)?;
                found.text().map(|text| text.trim().to_owned())
            };
            (element("Account"), element("Arn"))
        } else {
            let document: Value =
                serde_json::from_slice(body).map_err(|_source| IamError::Answer)?;
            let result = document
                .pointer("/GetCallerIdentityResponse/GetCallerIdentityResult")
                .cloned()
                .unwrap_or_default();
            let member = |name: &str| result.get(name).and_then(Value::as_str).map(str::to_owned);
            (member("Account"), member("Arn"))
        };
        match (account, arn) {
            (Some(account), Some(arn)) if !account.is_empty() && !arn.is_empty() => {
                Ok(Self { account, arn })
            }
            _ => Err(IamError::Empty),
        }
    }

    /// Checks the `allow` rules of a token: one of them must match in every key that it has.
    ///
    /// # Errors
    /// [`IamError::NoRule`].
    pub fn check(&self, allow: &Value) -> Result<(), IamError> {
        let rules = allow.as_array().map(Vec::as_slice).unwrap_or_default();
        if rules.iter().any(|rule| self.matches(rule)) {
            Ok(())
        } else {
            Err(IamError::NoRule(self.arn.clone()))
        }
    }

    /// A rule with a key that is not known here matches nothing: it would let in too many.
    fn matches(&self, rule: &Value) -> bool {
        let Some(rule) = rule.as_object().filter(|rule| !rule.is_empty()) else {
            return false;
        };
        rule.iter()
            .all(|(key, value)| match (key.as_str(), value.as_str()) {
                ("aws_account", Some(account)) => account == self.account,
                ("aws_arn", Some(pattern)) => glob(pattern, &self.arn),
                _ => false,
            })
    }
}

#[cfg(test)]
mod tests;
