//! Asking a bundle endpoint (`SPIFFE_Federation.md` section 5).

use std::fmt;
use std::time::SystemTime;

use async_trait::async_trait;
use bytes::Bytes;
use http::{Request, StatusCode, header};
use http_body_util::Full;

use super::source::{Endpoint, SourceError};
use super::verify;
use crate::outbound::{Outbound, OutboundError};
use crate::spiffe::SpiffeId;
use crate::spiffe::bundle::MAX_DOCUMENT;

/// How many redirects are followed.
const REDIRECTS: usize = 5;

/// Why there is no document.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub(in crate::embedded) enum FetchError {
    #[error(transparent)]
    Exchange(#[from] OutboundError),
    #[error("{url} answered {status}")]
    Status {
        /// Who answered.
        url: String,
        /// What.
        status: StatusCode,
    },
    #[error("a redirect leads nowhere: {0}")]
    Redirect(#[source] SourceError),
    #[error("more than {REDIRECTS} redirects")]
    Redirects,
    #[error("the answer is not UTF-8")]
    Utf8,
    #[error(
        "no bundle vouches for {0}: give `initial_bundle`, or federate with its trust domain first"
    )]
    Nobody(SpiffeId),
    #[error("the trust bundle of the endpoint's trust domain cannot be used: {0}")]
    Authorities(#[source] rustls::Error),
}

/// How the endpoint proves who it is.
#[derive(Debug, Clone)]
pub(in crate::embedded) enum Profile {
    /// By a certificate for its host name.
    Web,
    /// By an X.509-SVID.
    Spiffe {
        /// Whom it has to be.
        id: SpiffeId,
        /// Who may have issued the SVID (DER).
        authorities: Vec<Vec<u8>>,
        /// When.
        now: SystemTime,
    },
}

/// Who asks endpoints.
#[async_trait]
pub(in crate::embedded) trait Fetch: Send + Sync + fmt::Debug {
    /// The document of an endpoint.
    async fn fetch(&self, endpoint: Endpoint, profile: Profile) -> Result<String, FetchError>;
}

/// Asks over the network.
#[derive(Debug)]
pub(in crate::embedded) struct Network;

#[async_trait]
impl Fetch for Network {
    async fn fetch(&self, endpoint: Endpoint, profile: Profile) -> Result<String, FetchError> {
        let outbound = match &profile {
            // Anew each time: the roots of a site change, and this is read once in minutes.
            Profile::Web => Outbound::new()?,
            Profile::Spiffe {
                id,
                authorities,
                now,
            } => {
                if authorities.is_empty() {
                    return Err(FetchError::Nobody(id.clone()));
                }
                let tls = verify::client(id, authorities, *now);
                Outbound::with(tls.map_err(FetchError::Authorities)?)
            }
        };
        let body = follow(&outbound, endpoint).await?;
        String::from_utf8(body.into()).map_err(|_source| FetchError::Utf8)
    }
}

/// Follows redirects, each to an endpoint that proves the same; where they lead is not remembered.
async fn follow(outbound: &Outbound, mut endpoint: Endpoint) -> Result<Bytes, FetchError> {
    for _ in 0..=REDIRECTS {
        let request = Request::get(&endpoint.path)
            .header(header::HOST, endpoint.target.authority())
            .header(header::ACCEPT, "application/json")
            .body(Full::default())
            .map_err(OutboundError::from)?;
        let answer = outbound
            .send(&endpoint.target, request, MAX_DOCUMENT)
            .await?;
        match (answer.status.as_u16(), answer.location) {
            (200, _) => return Ok(answer.body),
            (301 | 302 | 303 | 307 | 308, Some(location)) => {
                endpoint = endpoint
                    .redirected(&location)
                    .map_err(FetchError::Redirect)?;
            }
            _ => {
                return Err(FetchError::Status {
                    url: endpoint.target.url(&endpoint.path),
                    status: answer.status,
                });
            }
        }
    }
    Err(FetchError::Redirects)
}

#[cfg(test)]
mod tests;
