//! One TLS port for everything, told apart by what the client's first message asks for (ALPN).
//!
//! | first protocol offered | certificate | served |
//! |---|---|---|
//! | `teleport-auth@…` | host authority, client certificates count | the auth service |
//! | `teleport-proxy-grpc` among them | web | joining only |
//! | `teleport-reversetunnel…` among them | web | nothing: a probe, answered and closed |
//! | anything else, or none | web | HTTPS |
//!
//! A second listener may serve the auth service without looking at ALPN, for agents that are
//! configured with `auth_server`.

use std::convert::Infallible;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use http::{Request, Response};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto;
use rustls::pki_types::CertificateDer;
use rustls::server::Acceptor;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio_rustls::LazyConfigAcceptor;
use tokio_rustls::server::TlsStream;
use tokio_util::sync::CancellationToken;
use tonic::Status;
use tonic::body::Body;
use tonic::service::Routes;
use tower::Service as _;

use super::caller::{Caller, Listener, TlsIdentity};
use super::tls::Tls;
use super::web::Web;

/// From the first byte to the end of the TLS handshake.
const HANDSHAKE: Duration = Duration::from_secs(10);
/// For the head of a request over HTTP/1, and between two of them.
const HEAD: Duration = Duration::from_secs(30);
/// Between two pings over HTTP/2, as Teleport's auth service sends them.
const PING: Duration = Duration::from_secs(60);
/// For the answer to a ping.
const PONG: Duration = Duration::from_secs(20);
/// For calls in flight after the shutdown was asked for.
const DRAIN: Duration = Duration::from_secs(5);
/// Connections at a time: about 50 KiB each when idle.
const MAX_CONNECTIONS: usize = 8192;
/// Calls at a time on one connection.
const MAX_STREAMS: u32 = 256;
/// All headers of one request.
const MAX_HEADERS: u32 = 32 * 1024;
/// After the system had no more file descriptors.
const NO_DESCRIPTORS: Duration = Duration::from_millis(100);

/// What a client wants, by the protocols it offers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Route {
    /// The auth service of the cluster with this name.
    Auth,
    /// The auth service of a cluster that is not this one.
    OtherCluster,
    /// Joining through the proxy.
    Join,
    /// To know whether ALPN passes unharmed.
    Probe,
    /// HTTPS.
    Web,
}

/// Decides by the protocols in the client's order; `cluster` is the name of this one.
pub(super) fn route<'a>(offered: impl Iterator<Item = &'a [u8]> + Clone, cluster: &str) -> Route {
    const AUTH: &[u8] = b"teleport-auth@";
    const DOMAIN: &[u8] = b".teleport.cluster.local";
    if let Some(encoded) = offered
        .clone()
        .next()
        .and_then(|first| first.strip_prefix(AUTH))
    {
        let name = encoded
            .strip_suffix(DOMAIN)
            .and_then(|hex| hex::decode(hex).ok());
        return match name {
            Some(name) if name == cluster.as_bytes() => Route::Auth,
            _ => Route::OtherCluster,
        };
    }
    for protocol in offered {
        if protocol == b"teleport-proxy-grpc" {
            return Route::Join;
        }
        if protocol.starts_with(b"teleport-reversetunnel") {
            return Route::Probe;
        }
    }
    Route::Web
}

/// What is served, and with which certificates.
#[derive(Debug)]
pub(super) struct Server {
    pub(super) cluster: String,
    pub(super) tls: Tls,
    pub(super) auth: Routes,
    pub(super) join: Routes,
    pub(super) web: Arc<Web>,
}

/// Which socket accepted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Port {
    Shared,
    Auth,
}

/// What a connection runs on: TCP, or whatever a test brings.
pub(super) trait Transport: AsyncRead + AsyncWrite + Unpin + Send + 'static {}

impl<T: AsyncRead + AsyncWrite + Unpin + Send + 'static> Transport for T {}

impl Server {
    /// Serves until `shutdown`; then waits a few seconds for calls in flight.
    pub(super) async fn serve(
        self: Arc<Self>,
        shared: TcpListener,
        auth: Option<TcpListener>,
        shutdown: CancellationToken,
    ) {
        let limit = Arc::new(Semaphore::new(MAX_CONNECTIONS));
        let mut connections = JoinSet::new();
        loop {
            let (accepted, port) = tokio::select! {
                () = shutdown.cancelled() => break,
                accepted = shared.accept() => (accepted, Port::Shared),
                accepted = accept(auth.as_ref()) => (accepted, Port::Auth),
                Some(_done) = connections.join_next(), if !connections.is_empty() => continue,
            };
            let (stream, peer) = match accepted {
                Ok(accepted) => accepted,
                Err(error) => {
                    tracing::warn!(%error, "cannot accept a connection");
                    tokio::time::sleep(NO_DESCRIPTORS).await;
                    continue;
                }
            };
            let Ok(permit) = Arc::clone(&limit).try_acquire_owned() else {
                tracing::warn!(%peer, limit = MAX_CONNECTIONS, "too many connections, refused one");
                continue;
            };
            let server = Arc::clone(&self);
            let shutdown = shutdown.clone();
            connections.spawn(async move {
                // Without it small answers wait; where it fails, they do.
                drop(stream.set_nodelay(true));
                if let Err(error) = server.connection(stream, peer, port, shutdown).await {
                    tracing::debug!(%peer, %error, "connection ended");
                }
                drop(permit);
            });
        }
        drop((shared, auth));
        let drained = async { while connections.join_next().await.is_some() {} };
        if tokio::time::timeout(DRAIN, drained).await.is_err() {
            connections.shutdown().await;
        }
    }

    /// Answers one connection until it ends.
    pub(super) async fn connection(
        &self,
        stream: impl Transport,
        peer: SocketAddr,
        port: Port,
        shutdown: CancellationToken,
    ) -> io::Result<()> {
        let handshake = Box::pin(self.handshake(stream, port));
        let Some((listener, stream)) = tokio::time::timeout(HANDSHAKE, handshake)
            .await
            .map_err(|_elapsed| io::Error::from(io::ErrorKind::TimedOut))??
        else {
            return Ok(());
        };
        let caller = |identity| Caller {
            addr: peer,
            listener,
            identity,
        };
        match listener {
            Listener::Web => {
                let (web, caller) = (Arc::clone(&self.web), caller(None));
                let service = service_fn(move |request: Request<Incoming>| {
                    let (web, caller) = (Arc::clone(&web), caller.clone());
                    async move { Ok::<_, Infallible>(web.answer(request, caller).await) }
                });
                run(stream, service, &shutdown).await
            }
            Listener::ProxyJoin => {
                let service = grpc(self.join.clone(), Ok(caller(None)));
                run(stream, service, &shutdown).await
            }
            Listener::Auth => {
                let chain = stream.get_ref().1.peer_certificates().unwrap_or_default();
                let caller = self.identity(chain).map(caller);
                run(stream, grpc(self.auth.clone(), caller), &shutdown).await
            }
        }
    }

    fn identity(&self, chain: &[CertificateDer<'_>]) -> Result<Option<TlsIdentity>, Status> {
        self.tls
            .identity(chain)
            .map_err(|error| Status::permission_denied(error.to_string()))
    }

    async fn handshake<S: Transport>(
        &self,
        stream: S,
        port: Port,
    ) -> io::Result<Option<(Listener, TlsStream<S>)>> {
        let start = LazyConfigAcceptor::new(Acceptor::default(), stream).await?;
        let route = match port {
            Port::Auth => Route::Auth,
            Port::Shared => {
                let hello = start.client_hello();
                let offered: Vec<&[u8]> = hello.alpn().into_iter().flatten().collect();
                route(offered.into_iter(), &self.cluster)
            }
        };
        let (listener, config) = match route {
            Route::Auth => (Some(Listener::Auth), self.tls.auth()?),
            Route::Join => (Some(Listener::ProxyJoin), self.tls.join()),
            Route::Web => (Some(Listener::Web), self.tls.web()),
            Route::Probe => (None, self.tls.probe()),
            Route::OtherCluster => return Ok(None),
        };
        let stream = start.into_stream(config).await?;
        let Some(listener) = listener else {
            let mut stream = stream;
            return tokio::io::AsyncWriteExt::shutdown(&mut stream)
                .await
                .map(|()| None);
        };
        Ok(Some((listener, stream)))
    }
}

async fn accept(listener: Option<&TcpListener>) -> io::Result<(TcpStream, SocketAddr)> {
    match listener {
        Some(listener) => listener.accept().await,
        None => std::future::pending().await,
    }
}

/// gRPC calls with their caller; without one, every call is refused for the reason given.
fn grpc(
    routes: Routes,
    caller: Result<Caller, Status>,
) -> impl hyper::service::Service<
    Request<Incoming>,
    Response = Response<Body>,
    Error = Infallible,
    Future: Send,
> {
    service_fn(move |mut request: Request<Incoming>| {
        let mut routes = routes.clone();
        let caller = caller.clone();
        async move {
            match caller {
                Ok(caller) => {
                    request.extensions_mut().insert(caller);
                    let Ok(response) = routes.call(request).await;
                    Ok(response)
                }
                Err(status) => Ok(status.into_http()),
            }
        }
    })
}

async fn run<S, B>(
    stream: TlsStream<impl Transport>,
    service: S,
    shutdown: &CancellationToken,
) -> io::Result<()>
where
    S: hyper::service::Service<
            Request<Incoming>,
            Response = Response<B>,
            Error = Infallible,
            Future: Send + 'static,
        > + Send
        + 'static,
    B: hyper::body::Body<Data: Send, Error: std::error::Error + Send + Sync> + Send + 'static,
{
    let mut builder = auto::Builder::new(TokioExecutor::new());
    builder
        .http1()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD)
        .max_buf_size(MAX_HEADERS as usize);
    builder
        .http2()
        .timer(TokioTimer::new())
        .keep_alive_interval(PING)
        .keep_alive_timeout(PONG)
        .max_concurrent_streams(MAX_STREAMS)
        .max_header_list_size(MAX_HEADERS);
    let connection = builder.serve_connection(TokioIo::new(stream), service);
    let mut connection = std::pin::pin!(connection);
    let result = tokio::select! {
        result = connection.as_mut() => result,
        () = shutdown.cancelled() => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    result.map_err(io::Error::other)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_protocol_decides() {
        let mine = "teleport-auth@726f6f74.teleport.cluster.local";
        let cases: &[(&[&str], Route)] = &[
            (&[], Route::Web),
            (&["h2", "http/1.1"], Route::Web),
            (&[mine, "h2"], Route::Auth),
            (&[mine], Route::Auth),
            (&["h2", mine], Route::Web),
            (
                &["teleport-auth@6f74686572.teleport.cluster.local", "h2"],
                Route::OtherCluster,
            ),
            (&["teleport-auth@root", "h2"], Route::OtherCluster),
            (
                &["teleport-auth@zz.teleport.cluster.local"],
                Route::OtherCluster,
            ),
            (&["teleport-proxy-grpc", "h2"], Route::Join),
            (&["h2", "teleport-proxy-grpc"], Route::Join),
            (
                &["teleport-reversetunnelv2", "teleport-reversetunnel"],
                Route::Probe,
            ),
            (&["teleport-reversetunnel"], Route::Probe),
            (&["teleport-proxy-grpc-mtls"], Route::Web),
        ];
        for (offered, expected) in cases {
            let offered = offered.iter().map(|protocol| protocol.as_bytes());
            assert_eq!(route(offered.clone(), "root"), *expected, "{expected:?}");
        }
    }
}
