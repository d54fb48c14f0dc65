//! Envoy's secret discovery service, version 3: the same SVIDs and bundles, in Envoy's words.
//!
//! `secrets.rs` says what the names stand for, `exchange.rs` what is due on a stream, `session.rs`
//! waits for whatever changes it. No security header is asked for: Envoy sends none.

mod exchange;
mod secrets;
mod session;
#[cfg(test)]
mod tests;

use std::sync::Arc;

use futures_util::StreamExt as _;
use futures_util::stream::{self, BoxStream};
use tonic::{Request, Response, Status, Streaming};

use self::exchange::{Delta, Exchange, Whole};
use self::session::Session;
use super::source::Source;
use crate::pb::envoy::config::core::v3::Node;
use crate::pb::envoy::config::core::v3::node::UserAgentVersionType;
use crate::pb::envoy::service::discovery::v3::{
    DeltaDiscoveryRequest, DeltaDiscoveryResponse, DiscoveryRequest, DiscoveryResponse,
};
use crate::pb::envoy::service::secret::v3::secret_discovery_service_server::SecretDiscoveryService;

/// The largest request, in bytes. An Envoy lists every extension that it was built with.
pub(super) const MAX_REQUEST: usize = 256 * 1024;
/// The first Envoy with the validator that bundles are made for.
const FIRST_ENVOY: (u32, u32) = (1, 18);

/// The server.
#[derive(Debug)]
pub(super) struct SdsApi(pub(super) Arc<Source>);

type Messages<M> = BoxStream<'static, Result<M, Status>>;

impl SdsApi {
    /// A stream that speaks one of the two forms.
    fn stream<E: Exchange>(
        &self,
        request: Request<Streaming<E::Request>>,
    ) -> Result<Response<Messages<E::Response>>, Status> {
        let (caller, permit) = self
            .0
            .admit(request.extensions())
            .map_err(|status| *status)?;
        let requests = request.into_inner();
        let session = Session::<E, _>::new(Arc::clone(&self.0), caller, permit, requests);
        let responses = stream::unfold(Some(session), |session| async move {
            let mut session = session?;
            match session.next().await {
                Some(Ok(response)) => Some((Ok(response), Some(session))),
                Some(Err(status)) => Some((Err(*status), None)),
                None => None,
            }
        });
        Ok(Response::new(responses.boxed()))
    }
}

#[tonic::async_trait]
impl SecretDiscoveryService for SdsApi {
    type StreamSecretsStream = Messages<DiscoveryResponse>;
    type DeltaSecretsStream = Messages<DeltaDiscoveryResponse>;

    async fn stream_secrets(
        &self,
        request: Request<Streaming<DiscoveryRequest>>,
    ) -> Result<Response<Self::StreamSecretsStream>, Status> {
        self.stream::<Whole>(request)
    }

    async fn delta_secrets(
        &self,
        request: Request<Streaming<DeltaDiscoveryRequest>>,
    ) -> Result<Response<Self::DeltaSecretsStream>, Status> {
        self.stream::<Delta>(request)
    }

    async fn fetch_secrets(
        &self,
        request: Request<DiscoveryRequest>,
    ) -> Result<Response<DiscoveryResponse>, Status> {
        let (caller, permit) = self
            .0
            .admit(request.extensions())
            .map_err(|status| *status)?;
        let request = request.into_inner();
        if let Some((major, minor)) = request.node.as_ref().and_then(envoy_version)
            && (major, minor) < FIRST_ENVOY
        {
            return Err(Status::invalid_argument(format!(
                "Envoy {major}.{minor} has no SPIFFE validator: use {}.{} or later",
                FIRST_ENVOY.0, FIRST_ENVOY.1
            )));
        }
        let requests = stream::iter([Ok(request)]).chain(stream::pending());
        let source = Arc::clone(&self.0);
        let mut session = Session::<Whole, _>::new(source, caller, permit, requests.boxed());
        match session.next().await {
            Some(Ok(response)) => Ok(Response::new(DiscoveryResponse {
                // There is no stream on which it could be referred to.
                version_info: String::new(),
                nonce: String::new(),
                ..response
            })),
            Some(Err(status)) => Err(*status),
            None => Err(Status::aborted("the calling process has ended")),
        }
    }
}

/// The version that a node tells of itself, if it does.
fn envoy_version(node: &Node) -> Option<(u32, u32)> {
    let Some(UserAgentVersionType::UserAgentBuildVersion(build)) = &node.user_agent_version_type
    else {
        return None;
    };
    let version = build.version.as_ref()?;
    Some((version.major_number, version.minor_number))
}
