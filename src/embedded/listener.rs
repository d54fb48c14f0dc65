//! One TLS port for everything, told apart by what the client's first message asks for (ALPN).
//!
//! | first protocol offered | certificate | served |
//! |---|---|---|
//! | `teleport-auth@…` | host authority, client certificates count | the auth service |
//! | `teleport-proxy-grpc` among them | web | joining only |
//! | `teleport-proxy-ssh-grpc` among them | host authority, client certificates count | SSH to nodes |
//! | `teleport-reversetunnel…` among them | web | SSH, and in it the auth service |
//! | anything else, or none | web | HTTPS, and tunnels to all of the above |
//!
//! A second listener may serve the auth service without looking at ALPN, for agents that are
//! configured with `auth_server`; a third SSH without TLS around it, and then the first one serves
//! joining and HTTPS only, as a proxy does whose ports do not tell protocols apart.
//!
//! Nobody holds a connection for nothing: whoever has no certificate has to call something now and
//! then, whoever has one has to answer pings, and one peer has a share of all connections only.

mod activity;
mod peers;
pub(super) mod refusals;

use std::convert::Infallible;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use futures_util::future::BoxFuture;
use http::{Request, Response};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto;
use rustls::pki_types::CertificateDer;
use rustls::server::Acceptor;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite};
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

use activity::{Activity, Answer};
use peers::Peers;

use super::audit::Audit;
use super::ca::Authorities;
use super::caller::{Caller, Listener, TlsIdentity};
use super::tls::Tls;
use super::tunnel::Gate;
use super::upgrade::Slot;
use super::web::Web;
use crate::clock::Clock;

/// From the first byte to the end of the TLS handshake.
const HANDSHAKE: Duration = Duration::from_secs(10);
/// For the head of a request over HTTP/1, and between two of them; for the preface of HTTP/2.
const HEAD: Duration = Duration::from_secs(30);
/// How long somebody without a certificate may call nothing.
const IDLE: Duration = Duration::from_secs(60);
/// Between two pings over HTTP/2, as Teleport's auth service sends them.
const PING: Duration = Duration::from_secs(60);
/// For the answer to a ping.
const PONG: Duration = Duration::from_secs(20);
/// For calls in flight after the end of the connection was announced.
const DRAIN: Duration = Duration::from_secs(5);
/// Connections at a time: about 50 KiB each when idle.
const MAX_CONNECTIONS: usize = 8192;
/// Connections of one peer at a time; a fleet behind one address is one peer.
const MAX_OF_PEER: usize = 1024;
/// Calls at a time on one connection.
const MAX_STREAMS: u32 = 256;
/// The same for whoever has no certificate.
const MAX_STREAMS_OF_STRANGERS: u32 = 16;
/// Bytes of one call that are on their way before it is read.
const STREAM_WINDOW: u32 = 64 * 1024;
/// Bytes of all calls of a connection that are on their way.
const CONNECTION_WINDOW: u32 = 256 * 1024;
/// The first bytes of HTTP/2 (RFC 9113 section 3.4).
const PREFACE: &[u8; 24] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
/// All headers of one request.
const MAX_HEADERS: u32 = 32 * 1024;
/// Bytes on their way between SSH and the auth service, in each direction.
const TUNNEL_BUFFER: usize = 64 * 1024;
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
    /// SSH to nodes.
    Nodes,
    /// SSH, or to know whether ALPN passes unharmed.
    Ssh,
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
        if protocol == b"teleport-proxy-ssh-grpc" {
            return Route::Nodes;
        }
        if protocol.starts_with(b"teleport-reversetunnel") {
            return Route::Ssh;
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
    pub(super) nodes: Routes,
    pub(super) web: Arc<Web>,
    /// How the proxy's SSH side is reached.
    pub(super) ssh_names: Vec<String>,
    /// Whether the shared port leads to the auth service.
    pub(super) tls_routing: bool,
    pub(super) authorities: Authorities,
    pub(super) clock: Clock,
    pub(super) audit: Audit,
}

/// What is spoken inside of TLS.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Inside {
    Http(Listener),
    Ssh,
}

/// Which socket accepted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Port {
    Shared,
    /// The shared port, inside of a tunnel; there is no tunnel inside of it.
    Tunnel,
    Auth,
    /// SSH without TLS around it.
    Ssh,
}

/// The sockets of a cluster.
#[derive(Debug)]
pub(super) struct Sockets {
    pub(super) shared: TcpListener,
    pub(super) auth: Option<TcpListener>,
    pub(super) ssh: Option<TcpListener>,
}

/// What a connection runs on: TCP, or whatever a test brings.
pub(super) trait Transport: AsyncRead + AsyncWrite + Unpin + Send + 'static {}

impl<T: AsyncRead + AsyncWrite + Unpin + Send + 'static> Transport for T {}

impl Server {
    /// Serves until `shutdown`; then waits a few seconds for calls in flight.
    pub(super) async fn serve(self: Arc<Self>, sockets: Sockets, shutdown: CancellationToken) {
        let Sockets { shared, auth, ssh } = sockets;
        let limit = Arc::new(Semaphore::new(MAX_CONNECTIONS));
        let peers = Peers::new(MAX_OF_PEER);
        let mut connections = JoinSet::new();
        loop {
            let (accepted, port) = tokio::select! {
                () = shutdown.cancelled() => break,
                accepted = shared.accept() => (accepted, Port::Shared),
                accepted = accept(auth.as_ref()) => (accepted, Port::Auth),
                accepted = accept(ssh.as_ref()) => (accepted, Port::Ssh),
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
            let Some(admission) = peers.admit(peer.ip()) else {
                tracing::warn!(%peer, limit = MAX_OF_PEER, "too many connections of one peer");
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
                drop((permit, admission));
            });
        }
        drop((shared, auth, ssh));
        let drained = async { while connections.join_next().await.is_some() {} };
        if tokio::time::timeout(DRAIN, drained).await.is_err() {
            connections.shutdown().await;
        }
    }

    /// Answers one connection until it ends.
    pub(super) async fn connection(
        self: &Arc<Self>,
        stream: impl Transport,
        peer: SocketAddr,
        port: Port,
        shutdown: CancellationToken,
    ) -> io::Result<()> {
        if port == Port::Ssh {
            return self.ssh(stream, peer, shutdown).await;
        }
        let handshake = Box::pin(self.handshake(stream, port));
        let Some((listener, stream)) = tokio::time::timeout(HANDSHAKE, handshake)
            .await
            .map_err(|_elapsed| io::Error::from(io::ErrorKind::TimedOut))??
        else {
            return Ok(());
        };
        let listener = match listener {
            Inside::Ssh => return self.ssh(stream, peer, shutdown).await,
            Inside::Http(listener) => listener,
        };
        let caller = |identity| Caller {
            addr: peer,
            listener,
            identity,
        };
        match listener {
            Listener::Web => {
                let (web, caller, slot) = (Arc::clone(&self.web), caller(None), Slot::default());
                let tunnels = (port == Port::Shared).then(|| slot.clone());
                let service = service_fn(move |mut request: Request<Incoming>| {
                    let (web, caller) = (Arc::clone(&web), caller.clone());
                    let tunnel = tunnels.as_ref().and_then(|slot| slot.answer(&mut request));
                    async move {
                        Ok::<_, Infallible>(match tunnel {
                            Some(answer) => answer,
                            None => web.answer(request, caller).await,
                        })
                    }
                });
                let http2 = stream.get_ref().1.alpn_protocol() == Some(b"h2");
                self.run(stream, http2, service, None, &shutdown).await?;
                match slot.take().await? {
                    Some(tunnel) => self.inside(tunnel, peer, Port::Tunnel, shutdown).await,
                    None => Ok(()),
                }
            }
            Listener::ProxyJoin => {
                let service = grpc(self.join.clone(), Ok(caller(None)), self.audit.clone());
                self.run(stream, true, service, None, &shutdown).await
            }
            Listener::Auth | Listener::Nodes => {
                let chain = stream.get_ref().1.peer_certificates().unwrap_or_default();
                let identity = self.identity(chain);
                let known = identity.as_ref().ok().and_then(Option::as_ref);
                let known_until = known.map(|identity| identity.expires);
                let routes = match listener {
                    Listener::Nodes => &self.nodes,
                    _ => &self.auth,
                };
                let service = grpc(routes.clone(), identity.map(caller), self.audit.clone());
                self.run(stream, true, service, known_until, &shutdown)
                    .await
            }
        }
    }

    /// Lets a bot through to the auth service.
    async fn ssh(
        self: &Arc<Self>,
        stream: impl Transport,
        peer: SocketAddr,
        shutdown: CancellationToken,
    ) -> io::Result<()> {
        let gate = Gate {
            authorities: &self.authorities,
            names: &self.ssh_names,
            now: self.clock.now(),
        };
        let (connection, channel) = Box::pin(gate.open(stream)).await?;
        let (near, far) = tokio::io::duplex(TUNNEL_BUFFER);
        let (carried, answered) = tokio::join!(
            channel.run(connection, far),
            self.inside(near, peer, Port::Auth, shutdown),
        );
        answered?;
        Ok(carried?)
    }

    /// Answers a connection inside of a connection; boxed because of that.
    fn inside(
        self: &Arc<Self>,
        stream: impl Transport,
        peer: SocketAddr,
        port: Port,
        shutdown: CancellationToken,
    ) -> BoxFuture<'static, io::Result<()>> {
        let server = Arc::clone(self);
        Box::pin(async move { server.connection(stream, peer, port, shutdown).await })
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
    ) -> io::Result<Option<(Inside, TlsStream<S>)>> {
        let start = LazyConfigAcceptor::new(Acceptor::default(), stream).await?;
        let route = match port {
            Port::Auth => Route::Auth,
            Port::Shared | Port::Tunnel | Port::Ssh => {
                let hello = start.client_hello();
                let offered: Vec<&[u8]> = hello.alpn().into_iter().flatten().collect();
                route(offered.into_iter(), &self.cluster)
            }
        };
        let http = Inside::Http;
        let (inside, config) = match route {
            Route::Auth if self.leads_to_auth(port) => (http(Listener::Auth), self.tls.auth()?),
            Route::Ssh if self.leads_to_auth(port) => (Inside::Ssh, self.tls.ssh()),
            // Whoever comes through a tunnel has seen a web certificate outside; here the proxy
            // shows that it belongs to a cluster.
            Route::Join if port == Port::Tunnel => (http(Listener::ProxyJoin), self.tls.auth()?),
            Route::Join => (http(Listener::ProxyJoin), self.tls.join()),
            Route::Nodes => (http(Listener::Nodes), self.tls.auth()?),
            Route::Web => (http(Listener::Web), self.tls.web()),
            Route::Auth | Route::Ssh | Route::OtherCluster => return Ok(None),
        };
        Ok(Some((inside, start.into_stream(config).await?)))
    }

    fn leads_to_auth(&self, port: Port) -> bool {
        self.tls_routing || port == Port::Auth
    }

    /// Serves HTTP until the peer ends it, does nothing for too long, or `shutdown`. The caller is
    /// known by a certificate until `known_until`.
    async fn run<S, B>(
        &self,
        mut stream: TlsStream<impl Transport>,
        http2: bool,
        service: S,
        known_until: Option<SystemTime>,
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
        B: hyper::body::Body<Data: Send, Error: std::error::Error + Send + Sync>
            + Send
            + Unpin
            + 'static,
    {
        let activity = Activity::new();
        let calls = activity.clone();
        let service = service_fn(move |request| {
            let (call, answer) = (calls.begin(), service.call(request));
            async move {
                let Ok(answer) = answer.await;
                Ok::<_, Infallible>(answer.map(|body| Answer { body, _call: call }))
            }
        });
        // The HTTP library waits for the preface as long as it takes.
        let mut first = Vec::new();
        if http2 {
            let mut preface = PREFACE.to_owned();
            tokio::time::timeout(HEAD, stream.read_exact(&mut preface)).await??;
            first.extend(preface);
        }
        let (reader, writer) = tokio::io::split(stream);
        let stream = tokio::io::join(io::Cursor::new(first).chain(reader), writer);
        let builder = builder(http2, known_until.is_some());
        let connection = builder.serve_connection_with_upgrades(TokioIo::new(stream), service);
        let mut connection = std::pin::pin!(connection);
        let idle = async {
            if let Some(until) = known_until {
                self.clock.sleep_until(until).await;
            }
            activity.idle(IDLE).await;
        };
        let ended = tokio::select! {
            ended = connection.as_mut() => ended,
            () = shutdown.cancelled() => {
                connection.as_mut().graceful_shutdown();
                connection.await
            }
            () = idle => {
                connection.as_mut().graceful_shutdown();
                tokio::time::timeout(DRAIN, connection).await?
            }
        };
        ended.map_err(io::Error::other)
    }
}

async fn accept(listener: Option<&TcpListener>) -> io::Result<(TcpStream, SocketAddr)> {
    match listener {
        Some(listener) => listener.accept().await,
        None => std::future::pending().await,
    }
}

/// How HTTP is spoken with somebody who is `known` by a certificate, or is not.
fn builder(http2: bool, known: bool) -> auto::Builder<TokioExecutor> {
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
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .max_concurrent_streams(if known {
            MAX_STREAMS
        } else {
            MAX_STREAMS_OF_STRANGERS
        })
        .max_header_list_size(MAX_HEADERS);
    if http2 {
        builder.http2_only()
    } else {
        builder.http1_only()
    }
}

/// gRPC calls with their caller; without one, every call is refused for the reason given.
fn grpc(
    routes: Routes,
    caller: Result<Caller, Status>,
    audit: Audit,
) -> impl hyper::service::Service<
    Request<Incoming>,
    Response = Response<Body>,
    Error = Infallible,
    Future: Send,
> {
    service_fn(move |mut request: Request<Incoming>| {
        let mut routes = routes.clone();
        let (caller, audit) = (caller.clone(), audit.clone());
        async move {
            let path = request.uri().path().to_owned();
            let (caller, response) = match caller {
                Ok(caller) => {
                    request.extensions_mut().insert(caller.clone());
                    let Ok(response) = routes.call(request).await;
                    (Some(caller), response)
                }
                Err(status) => (None, status.into_http()),
            };
            // Refusals have no body, so that their status is among the headers.
            if let Some(status) = Status::from_header_map(response.headers()) {
                refusals::note(&audit, &path, caller.as_ref(), &status);
            }
            Ok(response)
        }
    })
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
                Route::Ssh,
            ),
            (&["teleport-reversetunnel"], Route::Ssh),
            (&["teleport-proxy-ssh-grpc", "h2"], Route::Nodes),
            (&["teleport-proxy-grpc-mtls"], Route::Web),
        ];
        for (offered, expected) in cases {
            let offered = offered.iter().map(|protocol| protocol.as_bytes());
            assert_eq!(route(offered.clone(), "root"), *expected, "{expected:?}");
        }
    }
}
