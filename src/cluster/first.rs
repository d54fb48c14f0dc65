//! The first connection to a cluster, without certificates: whom to believe there, and what the
//! cluster says of itself.

use std::sync::Arc;

use rustls::RootCertStore;
use rustls::pki_types::ServerName;

use super::client::{Route, Versioned, timed, unary, versioned};
use super::credential::{API_DOMAIN, roots_of};
use super::dial::{Dialer, Opening, server_name};
use super::trust::{Trust, check_pins};
use super::{ClusterError, ping};
use crate::clock::Clock;
use crate::crypto::Suite;
use crate::pb::proto::auth_service_client::AuthServiceClient;
use crate::pb::proto::{PingRequest, PingResponse};
use crate::pb::types::SignatureAlgorithmSuite;

/// An unauthenticated connection on which a bot may join.
#[derive(Debug)]
pub(crate) struct First {
    /// Where to call.
    pub(crate) channel: Versioned,
    /// The cluster's version, such as `18.0.0`.
    pub(crate) version: String,
    /// The suite that the cluster announced.
    pub(crate) suite: Suite,
}

impl First {
    /// Connects as nobody. An auth address at which a proxy answers is used as a proxy's.
    pub(crate) async fn contact(
        clock: &Clock,
        dialer: &Arc<dyn Dialer>,
        route: &Route,
        trust: &Trust,
    ) -> Result<Self, ClusterError> {
        let address = route.address();
        match route {
            Route::Proxy(_) => Self::proxy(clock, dialer, address, trust).await,
            // Whoever is to be found there is named: nobody else will do.
            Route::Direct(_) if trust.names_authority() => {
                Self::auth(clock, dialer, address, trust).await
            }
            Route::Direct(_) if dialer.is_proxy(address, false).await => {
                Self::proxy(clock, dialer, address, trust).await
            }
            Route::Direct(_) => match Self::auth(clock, dialer, address, trust).await {
                Err(error @ (ClusterError::Tls { .. } | ClusterError::Call { .. }))
                    if !dialer.is_proxy(address, true).await =>
                {
                    Err(error)
                }
                Err(ClusterError::Tls { .. } | ClusterError::Call { .. }) => {
                    Self::proxy(clock, dialer, address, trust).await
                }
                other => other,
            },
        }
    }

    async fn proxy(
        clock: &Clock,
        dialer: &Arc<dyn Dialer>,
        address: &str,
        trust: &Trust,
    ) -> Result<Self, ClusterError> {
        const PROTOCOLS: &[&[u8]] = &[b"teleport-proxy-grpc", b"h2"];
        let endpoints = ping::find(clock, dialer.as_ref(), trust, address).await?;
        let (opening, tls) = if dialer.probe(address).await {
            (Opening::Upgraded, trust.behind_upgrade(clock, PROTOCOLS)?)
        } else {
            (Opening::Plain, trust.web(clock, PROTOCOLS)?)
        };
        let name = server_name(address)?;
        Ok(Self {
            channel: versioned(Arc::clone(dialer), address, opening, name, tls)?,
            version: endpoints.server_version,
            suite: endpoints.suite,
        })
    }

    async fn auth(
        clock: &Clock,
        dialer: &Arc<dyn Dialer>,
        address: &str,
        trust: &Trust,
    ) -> Result<Self, ClusterError> {
        let connect = |roots| {
            let name = ServerName::try_from(API_DOMAIN)
                .map_err(|_source| ClusterError::Trust(API_DOMAIN.to_owned()))?;
            let tls = Trust::auth(clock, roots, &[b"h2"])?;
            versioned(Arc::clone(dialer), address, Opening::Plain, name, tls)
        };
        let channel = connect(first_roots(clock, trust, address, &connect).await?)?;
        let mut client = AuthServiceClient::new(channel.clone());
        let answer = unary("Ping", client.ping(timed(PingRequest {}))).await?;
        Ok(Self {
            channel,
            suite: suite_of(&answer),
            version: answer.server_version,
        })
    }
}

/// Whom to believe at an auth service: pinned authorities, those of a file, or anyone.
async fn first_roots(
    clock: &Clock,
    trust: &Trust,
    address: &str,
    connect: &impl Fn(Option<RootCertStore>) -> Result<Versioned, ClusterError>,
) -> Result<Option<RootCertStore>, ClusterError> {
    if trust.insecure {
        tracing::warn!(
            address,
            "Joining without verifying the auth service, as configured (insecure)"
        );
        return Ok(None);
    }
    if !trust.ca_pins.is_empty() {
        let mut client = AuthServiceClient::new(connect(None)?);
        let shown = unary("GetClusterCACert", client.get_cluster_ca_cert(timed(()))).await?;
        let text = String::from_utf8_lossy(&shown.tlsca);
        return roots_of(&check_pins(&text, &trust.ca_pins, clock.now())?).map(Some);
    }
    if let Some(path) = &trust.ca_path {
        let text = std::fs::read_to_string(path).map_err(|source| {
            ClusterError::Trust(format!("ca_path: cannot read {}: {source}", path.display()))
        })?;
        let roots = roots_of(&[text])?;
        if roots.is_empty() {
            return Err(ClusterError::Trust(format!(
                "ca_path: {} holds no certificate",
                path.display()
            )));
        }
        return Ok(Some(roots));
    }
    tracing::warn!(
        address,
        "Joining without verifying the auth service: set onboarding.ca_pins, or use proxy_server"
    );
    Ok(None)
}

/// The suite of a Ping's answer.
pub(crate) fn suite_of(answer: &PingResponse) -> Suite {
    SignatureAlgorithmSuite::try_from(answer.signature_algorithm_suite)
        .map_or(Suite::Legacy, Suite::from)
}
