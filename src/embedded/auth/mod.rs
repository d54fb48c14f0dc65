//! The auth service: joins, certificates, authorities and what else an 18.0 cluster's agent calls.
//!
//! [`routes`] are the services behind mutual TLS, and what the proxy offers to whoever has no
//! certificate yet. Every call carries its [`Caller`] as an extension, put there
//! by the listener.

mod attempt;
mod authorize;
mod certificate;
mod heartbeat;
mod host_certs;
mod instance;
mod join;
mod join_v1;
mod locks;
mod predicate;
mod refusal;
mod roles;
mod served;
mod services;
mod user_certs;
mod version;
mod watch;

use std::sync::Arc;

use tonic::service::Routes;
use tonic::{Request, Status};

pub use authorize::{WhileAllowed, authorize};
pub(super) use version::checked;

pub use crate::refusal::Refusal;

use super::ClusterState;
use super::caller::Caller;
use super::federation::Federations;
use crate::join::verify::{World, WorldError};
use crate::pb::proto::auth_service_server::AuthServiceServer;
use crate::pb::proto::join_service_server::JoinServiceServer;
use crate::pb::teleport::clusterconfig::v1::cluster_config_service_server::ClusterConfigServiceServer;
use crate::pb::teleport::join::v1::join_service_server::JoinServiceServer as JoinV1Server;
use crate::pb::teleport::machineid::v1::bot_instance_service_server::BotInstanceServiceServer;
use crate::pb::teleport::machineid::v1::spiffe_federation_service_server::SpiffeFederationServiceServer;
use crate::pb::teleport::presence::v1::presence_service_server::PresenceServiceServer;
use crate::pb::teleport::trust::v1::trust_service_server::TrustServiceServer;
use attempt::Joins;

/// The services of one cluster; clones share their state.
#[derive(Debug, Clone)]
struct Auth {
    state: Arc<ClusterState>,
    world: World,
    joins: Arc<Joins>,
}

impl Auth {
    fn new(state: &Arc<ClusterState>) -> Result<Self, WorldError> {
        Ok(Self {
            state: Arc::clone(state),
            world: World {
                env: state.env.clone(),
                ..World::new(state.sts_endpoint.as_deref())?
            },
            joins: Arc::default(),
        })
    }
}

/// The largest request of somebody whom nobody knows yet, in bytes. Real ones have a few KiB.
const MAX_JOIN: usize = 64 * 1024;
/// The largest request for certificates: two public keys and names of roles.
const MAX_CERTS: usize = 64 * 1024;
/// The largest heartbeat: a few lines and the health of each service.
const MAX_HEARTBEAT: usize = 64 * 1024;
/// The largest question about something that has a name.
const MAX_QUESTION: usize = 16 * 1024;

/// The largest federation: the bundle of a big trust domain may stand in it.
const MAX_FEDERATION: usize = 1024 * 1024;

/// How much of a client's description of itself is kept, in characters.
const MAX_AGENT: usize = 256;

/// What the auth side serves.
#[derive(Debug, Clone)]
pub struct AuthRoutes {
    /// The services behind mutual TLS. Calls without a certificate may ping, read the host
    /// authority and join.
    pub auth: Routes,
    /// Joining through the proxy. As on an 18.0 proxy, client versions are not looked at here.
    pub join: Routes,
}

/// The services of one cluster, with or without the newer join service, which came after version
/// 18.0.
///
/// # Errors
/// [`WorldError::Endpoint`] if the configured STS endpoint is no URL.
pub fn routes(
    state: &Arc<ClusterState>,
    join_v1: bool,
    trust_v1: bool,
) -> Result<AuthRoutes, WorldError> {
    let auth = Auth::new(state)?;
    let join = JoinServiceServer::new(auth.clone()).max_decoding_message_size(MAX_JOIN);
    let stream = JoinV1Server::new(auth.clone()).max_decoding_message_size(MAX_JOIN);
    let heartbeats = BotInstanceServiceServer::new(auth.clone());
    let presence = PresenceServiceServer::new(auth.clone());
    let config = ClusterConfigServiceServer::new(auth.clone());
    let federations = SpiffeFederationServiceServer::new(Federations {
        state: Arc::clone(state),
    });
    let trust = TrustServiceServer::new(auth.clone());
    let auth = AuthServiceServer::new(auth);
    let mut routes = AuthRoutes {
        auth: Routes::default()
            .add_service(checked(auth.max_decoding_message_size(MAX_CERTS)))
            .add_service(checked(join.clone()))
            .add_service(checked(heartbeats.max_decoding_message_size(MAX_HEARTBEAT)))
            .add_service(checked(config.max_decoding_message_size(MAX_QUESTION)))
            .add_service(checked(
                federations.max_decoding_message_size(MAX_FEDERATION),
            ))
            .add_service(checked(presence.max_decoding_message_size(MAX_QUESTION))),
        join: Routes::default().add_service(join),
    };
    if trust_v1 {
        let trust = trust.max_decoding_message_size(MAX_QUESTION);
        routes.auth = routes.auth.add_service(checked(trust));
    }
    if join_v1 {
        routes.auth = routes.auth.add_service(checked(stream.clone()));
        routes.join = routes.join.add_service(stream);
    }
    Ok(routes)
}

/// The caller of a request.
pub(super) fn caller<T>(request: &Request<T>) -> Result<Caller, Status> {
    request
        .extensions()
        .get::<Caller>()
        .cloned()
        .ok_or_else(|| Status::internal("the listener did not say who calls"))
}

/// The client's program, for the audit log; the beginning of it if it is long.
fn user_agent<T>(request: &Request<T>) -> String {
    request
        .metadata()
        .get("user-agent")
        .and_then(|value| value.to_str().ok())
        .unwrap_or_default()
        .chars()
        .take(MAX_AGENT)
        .collect()
}

/// Runs work that waits for the disk or signs off the async threads.
pub(super) async fn blocking<T, E>(
    work: impl FnOnce() -> Result<T, E> + Send + 'static,
) -> Result<T, E>
where
    T: Send + 'static,
    E: From<Refusal> + Send + 'static,
{
    tokio::task::spawn_blocking(work)
        .await
        .map_err(|_cancelled| Refusal::unavailable("the cluster is shutting down"))?
}

#[cfg(test)]
mod tests;
