//! The auth service: joins, certificates, authorities and what else an 18.0 cluster's agent calls.
//!
//! [`auth_routes`] are the services behind mutual TLS, [`proxy_join_routes`] what the proxy offers
//! to whoever has no certificate yet. Every call carries its [`Caller`] as an extension, put there
//! by the listener.

mod authorize;
mod certificate;
mod instance;
mod join;
mod locks;
mod refusal;
mod roles;
mod services;
mod sts;
mod user_certs;
mod version;

use std::sync::Arc;

use tonic::service::Routes;
use tonic::{Request, Status};

pub use authorize::authorize;
pub use refusal::Refusal;
pub use sts::StsError;
pub(super) use version::check as check_version;

use super::ClusterState;
use super::caller::Caller;
use crate::pb::proto::auth_service_server::AuthServiceServer;
use crate::pb::proto::join_service_server::JoinServiceServer;
use crate::pb::teleport::clusterconfig::v1::cluster_config_service_server::ClusterConfigServiceServer;
use crate::pb::teleport::machineid::v1::bot_instance_service_server::BotInstanceServiceServer;
use crate::pb::teleport::machineid::v1::spiffe_federation_service_server::SpiffeFederationServiceServer;
use crate::pb::teleport::presence::v1::presence_service_server::PresenceServiceServer;
use crate::pb::teleport::trust::v1::trust_service_server::TrustServiceServer;
use sts::Sts;

/// The services of one cluster; clones share their state.
#[derive(Debug, Clone)]
struct Auth {
    state: Arc<ClusterState>,
    sts: Sts,
}

impl Auth {
    fn new(state: &Arc<ClusterState>) -> Result<Self, StsError> {
        Ok(Self {
            state: Arc::clone(state),
            sts: Sts::new(state.sts_endpoint.as_deref())?,
        })
    }
}

/// The services behind mutual TLS. Calls without a certificate may ping, read the host authority
/// and join.
///
/// # Errors
/// [`StsError::Endpoint`] if the configured STS endpoint is no URL.
pub fn auth_routes(state: &Arc<ClusterState>) -> Result<Routes, StsError> {
    let auth = Auth::new(state)?;
    let check = version::check;
    Ok(Routes::default()
        .add_service(AuthServiceServer::with_interceptor(auth.clone(), check))
        .add_service(JoinServiceServer::with_interceptor(auth.clone(), check))
        .add_service(ClusterConfigServiceServer::with_interceptor(
            auth.clone(),
            check,
        ))
        .add_service(BotInstanceServiceServer::with_interceptor(
            auth.clone(),
            check,
        ))
        .add_service(SpiffeFederationServiceServer::with_interceptor(
            auth.clone(),
            check,
        ))
        .add_service(PresenceServiceServer::with_interceptor(auth.clone(), check))
        .add_service(TrustServiceServer::with_interceptor(auth, check)))
}

/// The largest request of somebody whom nobody knows yet, in bytes. Real ones have a few KiB.
const MAX_JOIN_REQUEST: usize = 128 * 1024;

/// Joining through the proxy. As on an 18.0 proxy, client versions are not looked at here.
///
/// # Errors
/// As [`auth_routes`].
pub fn proxy_join_routes(state: &Arc<ClusterState>) -> Result<Routes, StsError> {
    let service =
        JoinServiceServer::new(Auth::new(state)?).max_decoding_message_size(MAX_JOIN_REQUEST);
    Ok(Routes::default().add_service(service))
}

/// The caller of a request.
fn caller<T>(request: &Request<T>) -> Result<Caller, Status> {
    request
        .extensions()
        .get::<Caller>()
        .cloned()
        .ok_or_else(|| Status::internal("the listener did not say who calls"))
}

/// The client's program, for the audit log.
fn user_agent<T>(request: &Request<T>) -> String {
    request
        .metadata()
        .get("user-agent")
        .and_then(|value| value.to_str().ok())
        .unwrap_or_default()
        .to_owned()
}

/// Runs work that waits for the disk or signs off the async threads.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, Refusal> + Send + 'static,
) -> Result<T, Refusal> {
    tokio::task::spawn_blocking(work)
        .await
        .map_err(|_cancelled| Refusal::unavailable("the cluster is shutting down"))?
}

#[cfg(test)]
mod tests;
