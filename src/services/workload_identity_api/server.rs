//! The gRPC server on the socket: which services it has, and what a connection may cost.

use std::convert::Infallible;
use std::io;
use std::pin::{Pin, pin};
use std::sync::{Arc, LazyLock};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use futures_util::FutureExt as _;
use futures_util::future::{BoxFuture, Map};
use http::{HeaderMap, Request, Response};
use hyper::body::{Frame, Incoming, SizeHint};
use hyper::server::conn::http2;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use tokio::sync::mpsc;
use tokio_util::sync::{CancellationToken, WaitForCancellationFutureOwned};
use tonic::Status;
use tonic::body::Body;
use tonic::server::NamedService;
use tonic::service::Routes;
use tonic_health::ServingStatus;
use tonic_health::server::{HealthReporter, HealthService};
use tower::{Service, ServiceExt as _};

use super::door::{Arrived, Door};
use super::gate::Gate;
use super::grpc::{self, MAX_REQUEST};
use super::incoming::{Arrivals, Caller, Connection};
use super::inspect::Inspect;
use super::listener::Bound;
use super::sds::{self, SdsApi};
use super::source::Source;
use super::spiffe::SpiffeApi;
use super::threads::Threads;
use crate::attest::{Limit, Peers, Permit};
use crate::clock::Clock;
use crate::pb;
use crate::pb::envoy::service::secret::v3::secret_discovery_service_server::{
    SERVICE_NAME as SDS, SecretDiscoveryServiceServer,
};
use crate::pb::tbot::inspect::v1::inspect_service_server::InspectServiceServer;
use crate::pb::workload_api::spiffe_workload_api_server::SERVICE_NAME as SPIFFE;

/// Calls and streams that one connection may have open. Each costs memory that a caller decides on.
const STREAMS_PER_CONNECTION: u32 = 1000;
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
/// Calls that one user may have open to the services beside the standard's, which read a request before they look
/// who asks: to health and reflection, to `tbot spiffe-inspect`'s, and to Envoy's, of which each proxy opens a few.
const SIDE_CALLS: usize = 256;
const INSPECT_CALLS: usize = 16;
const SDS_CALLS: usize = 1024;

/// What all connections of the socket are served by.
#[derive(Debug)]
pub(super) struct Server {
    services: Services,
    protocol: http2::Builder<TokioExecutor>,
    arrivals: Arrivals,
    clock: Clock,
    /// Connections begin no new calls any more, and end with those that are open.
    over: CancellationToken,
    /// Nobody waits for anything any more.
    gone: CancellationToken,
}

/// Serves until the source's shutdown, and then until every call has ended. With `explain`, every caller
/// is told what is known about it.
pub(super) async fn serve(
    source: Arc<Source>,
    bound: &Bound,
    health: HealthReporter,
    explain: bool,
) -> io::Result<()> {
    let shutdown = source.shutdown.clone();
    let server = Arc::new(Server::new(source, health, explain));
    let _gone = server.gone.clone().drop_guard();
    let (running, mut ended) = mpsc::channel(1);
    let gate = Gate::new(match bound {
        Bound::Unix(socket) => socket.held(),
        Bound::Tcp(_) => None,
    })?;
    let mut threads = Threads::new(Arc::clone(&server), gate, running);
    let door = Door::open(bound, move |arrived| threads.admit(arrived))?;
    shutdown.cancelled().await;
    // Who had connected by the shutdown is served, then nobody comes any more.
    door.close().await;
    server.over.cancel();
    match ended.recv().await {
        Some(never) => match never {},
        None => Ok(()),
    }
}

impl Server {
    pub(super) fn new(source: Arc<Source>, health: HealthReporter, explain: bool) -> Self {
        let clock = source.clock.clone();
        let beside = Arc::clone(&source);
        let over = CancellationToken::new();
        let ending = over.clone();
        let others: Make = Box::new(move || others(&beside, health, explain, &ending));
        Self {
            services: Services {
                spiffe: SpiffeApi(source),
                others: Arc::new(LazyLock::new(others)),
            },
            protocol: protocol(),
            arrivals: Arrivals::new(clock.clone()),
            clock,
            over,
            gone: CancellationToken::new(),
        }
    }

    pub(super) fn clock(&self) -> &Clock {
        &self.clock
    }

    /// Resolves when what is still open is to be dropped.
    pub(super) async fn gone(&self) {
        self.gone.cancelled().await;
    }

    /// As [`Arrivals::connection`].
    pub(super) fn connection(&self, arrived: Arrived, peers: &mut Peers) -> Option<Connection> {
        self.arrivals.connection(arrived, peers)
    }

    /// As [`Arrivals::dropping`].
    pub(super) fn dropping(&self, uid: Option<u32>, what: &'static str) {
        self.arrivals.dropping(uid, what);
    }

    /// Serves one connection until it ends.
    pub(super) async fn serve(self: Arc<Self>, connection: Connection) {
        let services = ForCaller {
            services: self.services.clone(),
            caller: connection.caller().clone(),
        };
        let io = TokioIo::new(connection);
        let mut serving = pin!(self.protocol.serve_connection(io, services));
        let ended = tokio::select! {
            biased;
            ended = &mut serving => ended,
            () = self.over.cancelled() => {
                serving.as_mut().graceful_shutdown();
                serving.await
            }
        };
        if let Err(error) = ended {
            tracing::debug!(%error, "A connection ended");
        }
    }
}

/// HTTP/2, as far as it is the same for everybody.
fn protocol() -> http2::Builder<TokioExecutor> {
    let mut server = http2::Builder::new(TokioExecutor::new());
    server
        .timer(TokioTimer::new())
        .max_concurrent_streams(STREAMS_PER_CONNECTION)
        .max_header_list_size(HEADERS)
        .max_frame_size(FRAME)
        .max_pending_accept_reset_streams(RESETS)
        .keep_alive_interval(SILENCE.0)
        .keep_alive_timeout(SILENCE.1)
        // Nobody asks a gRPC server for the date.
        .auto_date_header(false);
    server
}

/// The services beside the standard's.
fn others(
    source: &Arc<Source>,
    health: HealthReporter,
    explain: bool,
    over: &CancellationToken,
) -> Routes {
    let aside = Limits::new(SIDE_CALLS, over);
    let inspect = InspectServiceServer::new(Inspect {
        source: Arc::clone(source),
        everybody: explain,
    })
    .max_decoding_message_size(MAX_REQUEST);
    let sds = SecretDiscoveryServiceServer::new(SdsApi(Arc::clone(source)))
        .max_decoding_message_size(sds::MAX_REQUEST);
    let health = tonic_health::pb::health_server::HealthServer::new(
        HealthService::from_health_reporter(health),
    )
    .max_decoding_message_size(MAX_REQUEST);
    let mut routes = Routes::new(Counted::new(sds, &Limits::new(SDS_CALLS, over)))
        .add_service(Counted::new(inspect, &Limits::new(INSPECT_CALLS, over)))
        .add_service(Counted::new(health, &aside));
    let reflection = || {
        tonic_reflection::server::Builder::configure()
            .register_encoded_file_descriptor_set(pb::SERVED)
            .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
    };
    match (reflection().build_v1(), reflection().build_v1alpha()) {
        (Ok(v1), Ok(v1alpha)) => {
            routes = routes
                .add_service(Counted::new(
                    v1.max_decoding_message_size(MAX_REQUEST),
                    &aside,
                ))
                .add_service(Counted::new(
                    v1alpha.max_decoding_message_size(MAX_REQUEST),
                    &aside,
                ));
        }
        (Err(error), _) | (_, Err(error)) => {
            tracing::warn!(%error, "The server cannot describe itself");
        }
    }
    routes.prepare()
}

/// Every service of the socket.
#[derive(Debug, Clone)]
struct Services {
    spiffe: SpiffeApi,
    /// Made when the first call needs them: most agents serve nothing but SVIDs, and reading the
    /// descriptions of all messages is as much work as a handshake.
    others: Arc<LazyLock<Routes, Make>>,
}

type Make = Box<dyn FnOnce() -> Routes + Send>;

/// The services for one connection.
///
/// Calls of the standard's service go to it directly. A server of tonic's brings each of them through
/// seven layers that box the call and its body anew; that was a fifth of the instructions of a call.
#[derive(Debug)]
struct ForCaller {
    services: Services,
    caller: Caller,
}

/// How a call that cannot fail ends.
type Infallibly = fn(Response<Body>) -> Result<Response<Body>, Infallible>;

impl hyper::service::Service<Request<Incoming>> for ForCaller {
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = Map<BoxFuture<'static, Response<Body>>, Infallibly>;

    fn call(&self, mut request: Request<Incoming>) -> Self::Future {
        let patience = patience(request.headers());
        let (caller, services) = (self.caller.clone(), self.services.clone());
        // The rule of a header is the standard's, for its own service: each of its methods, also one that
        // is not served, asks for the header first. No other service knows of it.
        let answer = if service_of(request.uri().path()) == Some(SPIFFE) {
            services.spiffe.answer(caller, request).boxed()
        } else {
            request.extensions_mut().insert(caller);
            let others = Routes::clone(&services.others);
            let answer = others.oneshot(request.map(Body::new));
            answer.map(|Ok(response)| response).boxed()
        };
        let answer = match patience {
            None => answer,
            Some(patience) => tokio::time::timeout(patience, answer)
                .map(|answer| {
                    let late = |_elapsed| Status::deadline_exceeded("Timeout expired").into_http();
                    answer.unwrap_or_else(late)
                })
                .boxed(),
        };
        answer.map(Ok)
    }
}

/// The service that a call is for: `/<service>/<method>`.
fn service_of(path: &str) -> Option<&str> {
    let (service, _) = path.strip_prefix('/')?.split_once('/')?;
    Some(service)
}

/// How long the client waits, if it says so: up to eight digits and a unit.
fn patience(headers: &HeaderMap) -> Option<Duration> {
    let text = headers.get("grpc-timeout")?.to_str().ok()?;
    let (number, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
    let number = Some(number).filter(|text| {
        (1..=8).contains(&text.len()) && text.bytes().all(|byte| byte.is_ascii_digit())
    });
    let number = number?.parse().ok()?;
    Some(match unit {
        "H" => Duration::from_secs(number * 3600),
        "M" => Duration::from_secs(number * 60),
        "S" => Duration::from_secs(number),
        "m" => Duration::from_millis(number),
        "u" => Duration::from_micros(number),
        "n" => Duration::from_nanos(number),
        _ => return None,
    })
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

/// How many calls each user may have open, and until when.
#[derive(Debug, Clone)]
struct Limits {
    calls: Limit,
    over: CancellationToken,
}

impl Limits {
    fn new(maximum: usize, over: &CancellationToken) -> Self {
        Self {
            calls: Limit::new(maximum),
            over: over.clone(),
        }
    }
}

/// A service whose calls are limited.
#[derive(Debug, Clone)]
struct Counted<S> {
    service: S,
    limits: Limits,
}

impl<S> Counted<S> {
    fn new(service: S, limits: &Limits) -> Self {
        Self {
            service,
            limits: limits.clone(),
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
        let Some(permit) = self.limits.calls.take(owner) else {
            let refusal = Status::unavailable("this user has too many calls open: close some");
            return std::future::ready(Ok(refusal.into_http())).boxed();
        };
        let over = Box::pin(self.limits.over.clone().cancelled_owned());
        let answer = self.service.call(request);
        async move {
            let answer = answer.await?;
            Ok(answer.map(|body| {
                Body::new(Held {
                    body: Some(body),
                    over,
                    _permit: permit,
                })
            }))
        }
        .boxed()
    }
}

/// A response that counts until its end. Some would have none: who watches the server's health is told when that
/// is over.
struct Held {
    /// `None` after the end.
    body: Option<Body>,
    over: Pin<Box<WaitForCancellationFutureOwned>>,
    _permit: Permit,
}

impl hyper::body::Body for Held {
    type Data = bytes::Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<bytes::Bytes>, Status>>> {
        let Some(body) = &mut self.body else {
            return Poll::Ready(None);
        };
        if let Poll::Ready(frame) = Pin::new(body).poll_frame(cx) {
            return Poll::Ready(frame);
        }
        ready!(self.over.as_mut().poll(cx));
        self.body = None;
        let stopping = Status::unavailable("the agent is stopping");
        Poll::Ready(Some(Ok(grpc::trailers(&stopping))))
    }

    fn is_end_stream(&self) -> bool {
        self.body.as_ref().is_none_or(Body::is_end_stream)
    }

    fn size_hint(&self) -> SizeHint {
        self.body.as_ref().map(Body::size_hint).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clients_say_how_long_they_wait() {
        for (text, waited) in [
            ("1S", Some(Duration::from_secs(1))),
            ("99999999H", Some(Duration::from_secs(99_999_999 * 3600))),
            ("2M", Some(Duration::from_secs(120))),
            ("30m", Some(Duration::from_millis(30))),
            ("30u", Some(Duration::from_micros(30))),
            ("0n", Some(Duration::ZERO)),
            ("123456789S", None),
            ("S", None),
            ("", None),
            ("+1S", None),
            ("1s", None),
            ("1\u{e4}", None),
        ] {
            let mut headers = HeaderMap::new();
            if let Ok(value) = text.parse() {
                headers.insert("grpc-timeout", value);
            }
            assert_eq!(patience(&headers), waited, "{text}");
        }
        assert_eq!(patience(&HeaderMap::new()), None);
    }

    #[test]
    fn calls_name_their_service() {
        for (path, service) in [
            ("/SpiffeWorkloadAPI/FetchX509SVID", Some(SPIFFE)),
            ("/SpiffeWorkloadAPI/", Some(SPIFFE)),
            ("/SpiffeWorkloadAPI", None),
            ("/SpiffeWorkloadAPI2/x", Some("SpiffeWorkloadAPI2")),
            ("SpiffeWorkloadAPI/x", None),
            ("*", None),
            ("", None),
        ] {
            assert_eq!(service_of(path), service, "{path}");
        }
    }
}
