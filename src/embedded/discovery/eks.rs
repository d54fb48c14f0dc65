//! The two calls of AWS's EKS API that discovery makes, signed.

use std::collections::BTreeMap;
use std::time::SystemTime;

use aws_credential_types::Credentials;
use aws_sigv4::http_request::{SignableBody, SignableRequest, SigningSettings, sign};
use aws_sigv4::sign::v4;
use aws_smithy_runtime_api::client::identity::Identity;
use bytes::Bytes;
use http::{Request, StatusCode, header};
use http_body_util::Full;
use serde::Deserialize;
use serde::de::DeserializeOwned;

use crate::outbound::{Outbound, OutboundError, Target};
use crate::query::encoded;

/// The largest answer, in bytes: a description has a few KiB.
const MAX_ANSWER: usize = 1024 * 1024;
/// The most pages of names in one region, 100 names each.
const MAX_PAGES: usize = 100;
/// The longest name of an EKS cluster.
const MAX_NAME: usize = 100;

/// Why AWS did not tell.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub(super) enum EksError {
    /// Nobody says who asks; give the machine a role, or set a profile or keys.
    #[error(
        "no AWS credentials: {0} (attach a role that may eks:ListClusters and \
         eks:DescribeCluster, or set a profile or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY)"
    )]
    Credentials(String),
    /// The credentials cannot sign.
    #[error("the request cannot be signed: {0}")]
    Sign(String),
    /// No answer.
    #[error(transparent)]
    Outbound(#[from] OutboundError),
    /// AWS refused; the role needs `eks:ListClusters` and `eks:DescribeCluster`.
    #[error("AWS answered {status}: {reason}")]
    Refused {
        /// The status.
        status: StatusCode,
        /// AWS's words, cut.
        reason: String,
    },
    /// The answer is not what the API says.
    #[error("AWS answered something that is not understood: {0}")]
    Answer(String),
}

/// One region, and who asks.
pub(super) struct Eks {
    pub(super) outbound: Outbound,
    /// Where to ask instead of AWS.
    pub(super) target: Option<Target>,
    pub(super) credentials: Credentials,
    pub(super) region: String,
    pub(super) now: SystemTime,
}

/// A cluster as AWS describes it.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub(super) struct Cluster {
    pub(super) name: String,
    pub(super) arn: String,
    /// For example `ACTIVE`.
    pub(super) status: String,
    #[serde(default)]
    pub(super) tags: Option<BTreeMap<String, String>>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Names {
    clusters: Vec<String>,
    next_token: Option<String>,
}

#[derive(Deserialize)]
struct Description {
    cluster: Cluster,
}

impl Eks {
    /// All clusters of the region, and those that could not be described.
    pub(super) async fn all(&self) -> Result<(Vec<Cluster>, Vec<(String, EksError)>), EksError> {
        let mut found = Vec::new();
        let mut failed = Vec::new();
        for name in self.names().await? {
            match self.describe(&name).await {
                Ok(cluster) => found.extend(cluster),
                Err(error) => failed.push((name, error)),
            }
        }
        Ok((found, failed))
    }

    async fn names(&self) -> Result<Vec<String>, EksError> {
        let mut names = Vec::new();
        let mut path = "/clusters?maxResults=100".to_owned();
        for _ in 0..MAX_PAGES {
            let Some(page) = self.get::<Names>(&path).await? else {
                return Err(EksError::Answer("there is no list of clusters".to_owned()));
            };
            names.extend(page.clusters.into_iter().filter(|name| is_name(name)));
            match page.next_token.filter(|token| !token.is_empty()) {
                None => return Ok(names),
                Some(token) => {
                    path = format!("/clusters?maxResults=100&nextToken={}", encoded(&token));
                }
            }
        }
        // Half a list would look as if the rest were gone.
        Err(EksError::Answer(format!(
            "more than {MAX_PAGES} pages of clusters"
        )))
    }

    /// `None` if the cluster has gone since it was listed.
    async fn describe(&self, name: &str) -> Result<Option<Cluster>, EksError> {
        let path = format!("/clusters/{name}");
        let found = self.get::<Description>(&path).await?;
        Ok(found.map(|found| found.cluster))
    }

    /// `None` if AWS knows of no such thing.
    async fn get<T: DeserializeOwned>(&self, path: &str) -> Result<Option<T>, EksError> {
        let target = self
            .target
            .clone()
            .unwrap_or_else(|| Target::https(&host(&self.region)));
        let request = self.signed(&target, path)?;
        let answer = self.outbound.send(&target, request, MAX_ANSWER).await?;
        match answer.status {
            StatusCode::OK => serde_json::from_slice(&answer.body)
                .map(Some)
                .map_err(|source| EksError::Answer(source.to_string())),
            StatusCode::NOT_FOUND => Ok(None),
            status => Err(EksError::Refused {
                status,
                reason: reason(&answer.body),
            }),
        }
    }

    fn signed(&self, target: &Target, path: &str) -> Result<Request<Full<Bytes>>, EksError> {
        let failed = |source: &dyn std::error::Error| EksError::Sign(source.to_string());
        let identity: Identity = self.credentials.clone().into();
        let parameters = v4::SigningParams::builder()
            .identity(&identity)
            .region(&self.region)
            .name("eks")
            .time(self.now)
            .settings(SigningSettings::default())
            .build()
            .map_err(|source| failed(&source))?
            .into();
        let host = target.authority();
        let url = target.url(path);
        let headers = [("host", host.as_str())].into_iter();
        let signable = SignableRequest::new("GET", &url, headers, SignableBody::Bytes(b""))
            .map_err(|source| failed(&source))?;
        let (instructions, _signature) = sign(signable, &parameters)
            .map_err(|source| failed(&source))?
            .into_parts();
        let mut request = Request::get(path)
            .header(header::HOST, &host)
            .header(header::ACCEPT, "application/json");
        let (added, _query) = instructions.into_parts();
        for header in &added {
            request = request.header(header.name(), header.value());
        }
        Ok(request.body(Full::default()).map_err(OutboundError::from)?)
    }
}

/// The API's host in a region.
fn host(region: &str) -> String {
    let suffix = if region.starts_with("cn-") {
        "amazonaws.com.cn"
    } else {
        "amazonaws.com"
    };
    format!("eks.{region}.{suffix}")
}

/// Names as EKS allows them; they stand in paths.
fn is_name(name: &str) -> bool {
    (1..=MAX_NAME).contains(&name.len())
        && name
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_')
}

/// The message of an error, or the beginning of whatever it is, on one line.
fn reason(body: &[u8]) -> String {
    const LONGEST: usize = 300;
    let text = String::from_utf8_lossy(body);
    let json = serde_json::from_slice::<serde_json::Value>(body).unwrap_or_default();
    let message = json.get("message").or_else(|| json.get("Message"));
    let message = message.and_then(serde_json::Value::as_str);
    let printable = |c: char| if c.is_control() { ' ' } else { c };
    message
        .unwrap_or(&text)
        .chars()
        .take(LONGEST)
        .map(printable)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_goes_into_a_url_is_plain() {
        for (name, good) in [
            ("a", true),
            ("Prod_1-x", true),
            ("", false),
            ("a/b", false),
            ("..", false),
            ("a?b", false),
            ("a\nb", false),
        ] {
            assert_eq!(is_name(name), good, "{name:?}");
        }
        assert!(!is_name(&"x".repeat(101)));
        assert_eq!(host("eu-west-1"), "eks.eu-west-1.amazonaws.com");
        assert_eq!(host("cn-north-1"), "eks.cn-north-1.amazonaws.com.cn");
    }

    #[test]
    fn reasons_are_short_lines() {
        assert_eq!(reason(br#"{"message":"not\nyou"}"#), "not you");
        assert_eq!(reason(b"<html>"), "<html>");
        assert_eq!(reason(&[b'x'; 1000]).len(), 300);
    }
}
