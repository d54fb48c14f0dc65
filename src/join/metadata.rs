//! Asking the metadata service of a machine's cloud: one plain request over HTTP to an address that only
//! this machine can reach. No proxy is asked and no redirect followed: what comes from elsewhere is none
//! of this machine's.

use bytes::Bytes;
use http::{Request, StatusCode, header};
use http_body_util::Full;

use super::JoinError;
use crate::outbound::{Outbound, OutboundError, Target};

/// Where every cloud has it (link-local, RFC 3927).
pub(super) const LINK_LOCAL: &str = "http://169.254.169.254";
/// The longest answer that is read, in bytes.
const MAX_ANSWER: usize = 256 * 1024;
/// How much of the text of a refusal is repeated.
const MAX_TEXT: usize = 200;

/// Why a metadata service told nothing.
#[derive(Debug, thiserror::Error)]
pub(super) enum MetadataError {
    /// Nobody is there, or it does not answer in time or in HTTP.
    #[error("{0}")]
    Unreachable(#[from] OutboundError),
    /// It sends elsewhere.
    #[error(
        "{url} answered with a redirect: that is a proxy or a captive portal, no metadata service"
    )]
    Redirect {
        /// What was asked.
        url: String,
    },
    /// It refused.
    #[error("{url} answered {status}: {text}")]
    Status {
        /// What was asked.
        url: String,
        /// With which status.
        status: StatusCode,
        /// The beginning of what it says, one line.
        text: String,
    },
    /// It answered with something else than what is documented.
    #[error("{url}: the answer is not as documented: {what}")]
    Answer {
        /// What was asked.
        url: String,
        /// What is wrong.
        what: &'static str,
    },
}

impl MetadataError {
    /// Whether somebody answered at all.
    pub(super) fn is_answer(&self) -> bool {
        !matches!(self, Self::Unreachable(_))
    }
}

/// A metadata service.
#[derive(Debug, Clone)]
pub(super) struct Metadata {
    outbound: Outbound,
    target: Target,
    /// The header that no foreign page can make a browser send.
    header: (&'static str, &'static str),
}

impl Metadata {
    /// The service at `base`, which wants `header`.
    pub(super) fn at(
        base: &str,
        header: (&'static str, &'static str),
    ) -> Result<Self, MetadataError> {
        let target = Target::parse(base).ok_or_else(|| MetadataError::Answer {
            url: base.to_owned(),
            what: "it is no URL of a host",
        })?;
        Ok(Self {
            outbound: Outbound::new()?,
            target,
            header,
        })
    }

    /// The document at `path`, which begins with a slash.
    pub(super) async fn get(&self, path: &str) -> Result<Bytes, MetadataError> {
        let url = || self.target.url(path.split('?').next().unwrap_or_default());
        let request = Request::get(path)
            .header(header::HOST, self.target.authority())
            .header(self.header.0, self.header.1)
            .body(Full::default())
            .map_err(OutboundError::from)?;
        let answer = self
            .outbound
            .send(&self.target, request, MAX_ANSWER)
            .await?;
        if answer.status.is_redirection() {
            return Err(MetadataError::Redirect { url: url() });
        }
        if answer.status != StatusCode::OK {
            let text = String::from_utf8_lossy(&answer.body);
            let text = text.split_whitespace().collect::<Vec<_>>().join(" ");
            return Err(MetadataError::Status {
                url: url(),
                status: answer.status,
                text: text
                    .chars()
                    .filter(|c| !c.is_control())
                    .take(MAX_TEXT)
                    .collect(),
            });
        }
        Ok(answer.body)
    }

    /// The document at `path` as text, without blanks around it.
    pub(super) async fn text(&self, path: &str) -> Result<String, MetadataError> {
        let body = self.get(path).await?;
        let text = std::str::from_utf8(&body)
            .map_err(|_source| self.not_as_documented(path, "no text"))?;
        Ok(text.trim().to_owned())
    }

    /// An answer that cannot be used.
    pub(super) fn not_as_documented(&self, path: &str, what: &'static str) -> MetadataError {
        MetadataError::Answer {
            url: self.target.url(path.split('?').next().unwrap_or_default()),
            what,
        }
    }
}

/// The failure of a join by `method`, with what to look at.
pub(super) fn failed(method: &'static str, error: &MetadataError, cloud: &str) -> JoinError {
    let remedy = if error.is_answer() {
        String::new()
    } else {
        format!(
            ". Does tbot run on {cloud}? In a container, the metadata service may be out of reach: use \
             the host's network, or allow 169.254.169.254 and more than one hop"
        )
    };
    JoinError::Proof {
        method,
        problem: format!("could not reach instance metadata: {error}{remedy}"),
    }
}
