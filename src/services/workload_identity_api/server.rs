//! The gRPC server on the socket: which services it has, and what a connection may cost.

use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use futures_util::FutureExt as _;
use futures_util::future::BoxFuture;
use hyper::body::{Frame, SizeHint};
use tonic::Status;
use tonic::body::Body;
use tonic::server::NamedService;
use tonic_health::ServingStatus;
use tonic_health::server::{HealthReporter, HealthService};
use tower::Service;

use super::incoming::{self, Caller};
use super::inspect::Inspect;
use super::limits::{Limit, Permit};
use super::listener::Bound;
use super::sds::{self, SdsApi};
use super::source::Source;
use super::spiffe::SpiffeApi;
use crate::pb;
use crate::pb::envoy::service::secret::v3::secret_discovery_service_server::{
    SERVICE_NAME as SDS, SecretDiscoveryServiceServer,
};
use crate::pb::tbot::inspect::v1::inspect_service_server::InspectServiceServer;
use crate::pb::workload_api::spiffe_workload_api_server::SERVICE_NAME as SPIFFE;

/// Calls and streams that one connection may have open. Each costs memory that a caller decides on.
const STREAMS_PER_CONNECTION: u32 = 1000;
/// The largest request, in bytes; the largest that has a meaning carries one token.
const MAX_REQUEST: usize = 64 * 1024;
/// The most that a call's headers may come to, in bytes, as HTTP/2 counts them: gRPC's own few, and what
/// proxies and tracing add.
const HEADERS: u32 = 16 * 1024;
/// The largest frame, in bytes: the smallest maximum that HTTP/2 allows.
const FRAME: u32 = 16 * 1024;
/// Streams that a client may reset before they were looked at. One that keeps doing so is after nothing
/// but work for us, and is told to go away.
const RESETS: usize = 20;
/// A connection from which nothing came for so long is asked whether anybody is there, and closed if no
/// answer comes in time.
const SILENCE: (Duration, Duration) = (Duration::from_secs(60), Duration::from_secs(20));
/// Calls of one user to the services beside the standard's: they need no identity and hold no secret.
const SIDE_CALLS: usize = 256;

/// Serves until the source's shutdown, and then until every call has ended. With `explain`, every caller
/// is told what is known about it.
pub(super) async fn serve(
    source: Arc<Source>,
    bound: &Bound,
    health: HealthReporter,
    explain: bool,
) -> Result<(), tonic::transport::Error> {
    let (clock, shutdown) = (source.clock.clone(), source.shutdown.clone());
    let limit = Limit::new(SIDE_CALLS);
    let spiffe = SpiffeApi(Arc::clone(&source));
    let inspect = InspectServiceServer::new(Inspect {
        source: Arc::clone(&source),
        everybody: explain,
    })
    .max_decoding_message_size(MAX_REQUEST);
    let sds = SecretDiscoveryServiceServer::new(SdsApi(source))
        .max_decoding_message_size(sds::MAX_REQUEST);
    let health = tonic_health::pb::health_server::HealthServer::new(
        HealthService::from_health_reporter(health),
    )
    .max_decoding_message_size(MAX_REQUEST);
    let mut router = tonic::transport::Server::builder()
        .max_concurrent_streams(Some(STREAMS_PER_CONNECTION))
        .http2_max_header_list_size(HEADERS)
        .max_frame_size(FRAME)
        .http2_max_pending_accept_reset_streams(Some(RESETS))
        .http2_keepalive_interval(Some(SILENCE.0))
        .http2_keepalive_timeout(Some(SILENCE.1))
        // The rule is the standard's, for its own service: each of its methods, also one that is not
        // served, asks for the header first. No other service knows of it.
        .add_service(spiffe)
        .add_service(sds)
        .add_service(inspect)
        .add_service(Counted::new(health, &limit));
    let reflection = || {
        tonic_reflection::server::Builder::configure()
            .register_encoded_file_descriptor_set(pb::SERVED)
            .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
    };
    match (reflection().build_v1(), reflection().build_v1alpha()) {
        (Ok(v1), Ok(v1alpha)) => {
            router = router
                .add_service(Counted::new(v1, &limit))
                .add_service(Counted::new(v1alpha, &limit));
        }
        (Err(error), _) | (_, Err(error)) => {
            tracing::warn!(%error, "The server cannot describe itself");
        }
    }
    router
        .serve_with_incoming_shutdown(
            incoming::accept(bound, clock, shutdown),
            // Who had connected by the shutdown is served, then nobody comes any more.
            std::future::pending(),
        )
        .await
}

/// What is told to clients that ask for the health of the server or of one of its services.
pub(super) async fn tell(health: &HealthReporter, serves: bool) {
    let status = if serves {
        ServingStatus::Serving
    } else {
        ServingStatus::NotServing
    };
    for service in ["", SPIFFE, SDS] {
        health.set_service_status(service, status).await;
    }
}

/// A service of which each user may have so many calls open.
#[derive(Debug, Clone)]
struct Counted<S> {
    service: S,
    limit: Limit,
}

impl<S> Counted<S> {
    fn new(service: S, limit: &Limit) -> Self {
        Self {
            service,
            limit: limit.clone(),
        }
    }
}

impl<S: NamedService> NamedService for Counted<S> {
    const NAME: &'static str = S::NAME;
}

impl<S> Service<http::Request<Body>> for Counted<S>
where
    S: Service<http::Request<Body>, Response = http::Response<Body>>,
    S::Future: Send + 'static,
    S::Error: Send + 'static,
{
    type Response = http::Response<Body>;
    type Error = S::Error;
    type Future = BoxFuture<'static, Result<Self::Response, Self::Error>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.service.poll_ready(cx)
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        let caller = request.extensions().get::<Caller>();
        let owner = caller.map(Caller::owner).unwrap_or_default();
        let Some(permit) = self.limit.take(owner) else {
            let refusal = Status::unavailable("this user has too many calls open: close some");
            return std::future::ready(Ok(refusal.into_http())).boxed();
        };
        let answer = self.service.call(request);
        async move {
            let answer = answer.await?;
            Ok(answer.map(|body| {
                Body::new(Held {
                    body,
                    _permit: permit,
                })
            }))
        }
        .boxed()
    }
}

/// A response that counts until its end.
struct Held {
    body: Body,
    _permit: Permit,
}

impl hyper::body::Body for Held {
    type Data = bytes::Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: std::pin::Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<bytes::Bytes>, Status>>> {
        std::pin::Pin::new(&mut self.body).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
