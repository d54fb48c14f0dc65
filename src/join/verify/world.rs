//! Whom a cluster asks about a proof.

use std::sync::Arc;

use super::oidc::Web;
use super::oidc::issuers::Issuers;
use super::oidc::used::Used;
use crate::env::Env;
use crate::join::oracle::verify::KnownRoots;
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
    /// The issuers of ID tokens.
    pub issuers: Arc<Issuers>,
    /// The ID tokens that were seen.
    pub used: Arc<Used>,
    /// The roots of what Azure attests (DER), in place of the real ones.
    pub azure_roots: Option<Vec<Vec<u8>>>,
    /// Who certifies the instances of Oracle's regions.
    pub oracle_roots: Arc<KnownRoots>,
    /// The cluster's own environment: whether it runs in a pod.
    pub env: Env,
}

impl World {
    /// Asks those that are meant, but for `sts`, from an empty environment.
    ///
    /// # Errors
    /// [`WorldError`].
    pub fn new(sts: Option<&str>) -> Result<Self, WorldError> {
        let parse =
            |url: &str| Target::parse(url).ok_or_else(|| WorldError::Endpoint(url.to_owned()));
        let outbound = Outbound::new()?;
        let issuers = Issuers::new(Arc::new(Web(outbound.clone())));
        Ok(Self {
            outbound,
            sts: sts.map(parse).transpose()?,
            issuers: Arc::new(issuers),
            used: Arc::default(),
            azure_roots: None,
            oracle_roots: Arc::default(),
            env: Env::default(),
        })
    }
}
