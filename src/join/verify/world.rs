//! Whom a cluster asks about a proof.

use crate::outbound::{Outbound, OutboundError, Target};

/// Why the cluster cannot ask anybody.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum WorldError {
    /// The configured endpoint is no URL with a host.
    #[error("--sts-endpoint {0:?} is not an http or https URL with a host and nothing behind it")]
    Endpoint(String),
    /// No request could ever be sent.
    #[error(transparent)]
    Outbound(#[from] OutboundError),
}

/// Whom a cluster asks about a proof; clones share it.
#[derive(Debug, Clone)]
pub struct World {
    /// Sends requests.
    pub outbound: Outbound,
    /// Asked in place of AWS's STS, whatever the host; only there plain HTTP is possible.
    pub sts: Option<Target>,
}

impl World {
    /// Asks those that are meant, but for `sts`.
    ///
    /// # Errors
    /// [`WorldError`].
    pub fn new(sts: Option<&str>) -> Result<Self, WorldError> {
        let parse =
            |url: &str| Target::parse(url).ok_or_else(|| WorldError::Endpoint(url.to_owned()));
        Ok(Self {
            outbound: Outbound::new()?,
            sts: sts.map(parse).transpose()?,
        })
    }
}
