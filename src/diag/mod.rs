//! The diagnostics HTTP service on `diag_addr`: liveness, readiness and metrics.
//!
//! Paths, bodies and codes are those of Teleport's agent since it reports health. Plain HTTP
//! without authentication: bind it to the loopback address or a pod's own. Nothing secret is in
//! what it answers, and what a peer can make it hold is bounded.

use std::convert::Infallible;
use std::fmt;
use std::fs::Permissions;
use std::io;
use std::os::unix::fs::{FileTypeExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::header::{CONNECTION, CONTENT_TYPE, HeaderValue};
use http::{Request, Response, StatusCode};
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use serde_json::{Map, Value, json};
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio_util::either::Either;
use tokio_util::sync::CancellationToken;

use crate::clock::rfc3339;
use crate::health::{Registry, Report, Snapshot, Status};
use crate::telemetry::metrics::{self, Metrics};

/// Connections served at once; more wait in the listener's queue. Probes and one scraper need few.
const MAX_CONNECTIONS: usize = 64;

/// A request has to arrive within this time.
const READ_TIMEOUT: Duration = Duration::from_secs(10);

/// The longest `/wait` holds a request. Below the 30 s at which upstream cuts the connection, so
/// that a client gets an answer it can act on.
const MAX_WAIT: Duration = Duration::from_secs(25);

/// The longest a connection lives, whatever its peer does or does not read.
const MAX_CONNECTION: Duration = Duration::from_secs(40);

/// Where diagnostics are asked for.
#[derive(Debug)]
pub enum Listener {
    /// `diag_addr`.
    Tcp(TcpListener),
    /// The socket for a managed updater, for the agent's own user (mode 0600).
    Unix(UnixListener, PathBuf),
}

impl Listener {
    /// Binds `host:port`.
    pub async fn tcp(address: &str) -> io::Result<Self> {
        TcpListener::bind(address).await.map(Self::Tcp)
    }

    /// Binds a socket at `path`; one that an ended agent left there is replaced.
    pub fn unix(path: &Path) -> io::Result<Self> {
        let is_socket = std::fs::symlink_metadata(path).is_ok_and(|m| m.file_type().is_socket());
        if is_socket && std::os::unix::net::UnixStream::connect(path).is_err() {
            std::fs::remove_file(path)?;
        }
        let listener = UnixListener::bind(path)?;
        std::fs::set_permissions(path, Permissions::from_mode(0o600))?;
        Ok(Self::Unix(listener, path.to_owned()))
    }

    async fn accept(&self) -> io::Result<Either<TcpStream, UnixStream>> {
        match self {
            Self::Tcp(listener) => listener
                .accept()
                .await
                .map(|(stream, _)| Either::Left(stream)),
            Self::Unix(listener, _) => listener
                .accept()
                .await
                .map(|(stream, _)| Either::Right(stream)),
        }
    }
}

impl fmt::Display for Listener {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(listener) => match listener.local_addr() {
                Ok(address) => write!(f, "http://{address}"),
                Err(_) => f.write_str("http://?"),
            },
            Self::Unix(_, path) => write!(f, "unix://{}", path.display()),
        }
    }
}

/// Answers on `listener` until `shutdown`. Open requests are dropped then.
pub async fn serve(
    listener: Listener,
    registry: Registry,
    metrics: Metrics,
    shutdown: CancellationToken,
) {
    let diagnostics = Diagnostics { registry, metrics };
    let slots = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    let mut connections = JoinSet::new();
    loop {
        let accepted = async {
            let slot = Arc::clone(&slots).acquire_owned().await;
            (slot, listener.accept().await)
        };
        let (slot, accepted) = tokio::select! {
            accepted = accepted => accepted,
            Some(_) = connections.join_next() => continue,
            () = shutdown.cancelled() => return,
        };
        match accepted {
            Ok(stream) => {
                let diagnostics = diagnostics.clone();
                connections.spawn(async move {
                    diagnostics.connection(stream).await;
                    drop(slot);
                });
            }
            // Out of descriptors, for example: the listener stays, so wait for better times.
            Err(error) => {
                tracing::warn!(%error, "Cannot accept a diagnostics connection");
                tokio::time::sleep(Duration::from_secs(1)).await;
            }
        }
    }
}

#[derive(Clone)]
struct Diagnostics {
    registry: Registry,
    metrics: Metrics,
}

impl Diagnostics {
    async fn connection(&self, stream: Either<TcpStream, UnixStream>) {
        let service = service_fn(|request: Request<Incoming>| async move {
            Ok::<_, Infallible>(self.answer(request.uri().path()).await)
        });
        let connection = hyper::server::conn::http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(READ_TIMEOUT)
            .max_buf_size(16 * 1024)
            .keep_alive(false)
            .serve_connection(TokioIo::new(stream), service);
        match tokio::time::timeout(MAX_CONNECTION, connection).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::debug!(%error, "A diagnostics connection failed"),
            Err(_) => tracing::debug!("A diagnostics connection took too long"),
        }
    }

    async fn answer(&self, path: &str) -> Response<Full<Bytes>> {
        match path {
            "/livez" => text(StatusCode::OK, "text/plain; charset=utf-8", "OK"),
            "/metrics" => text(StatusCode::OK, metrics::CONTENT_TYPE, self.metrics.render()),
            "/readyz" => overall(&self.registry.snapshot()),
            "/wait" => {
                self.wait(Snapshot::complete).await;
                overall(&self.registry.snapshot())
            }
            _ => {
                if let Some(name) = path.strip_prefix("/readyz/") {
                    one(&self.registry.snapshot(), name)
                } else if let Some(name) = path.strip_prefix("/wait/") {
                    self.wait(|snapshot| {
                        let report = snapshot.services.get(name);
                        report.is_none_or(|report| report.updated_at.is_some())
                    })
                    .await;
                    one(&self.registry.snapshot(), name)
                } else {
                    text(
                        StatusCode::NOT_FOUND,
                        "text/plain; charset=utf-8",
                        "not found: /livez, /readyz, /readyz/<service>, /wait, /wait/<service> and /metrics are here\n",
                    )
                }
            }
        }
    }

    /// Waits for a report that satisfies `enough`, or for patience to end.
    async fn wait(&self, enough: impl FnMut(&Snapshot) -> bool) {
        let mut reports = self.registry.subscribe();
        // Told by the answer in either case.
        drop(tokio::time::timeout(MAX_WAIT, reports.wait_for(enough)).await);
    }
}

fn overall(snapshot: &Snapshot) -> Response<Full<Bytes>> {
    let healthy = snapshot.healthy();
    let services: Map<_, _> = snapshot
        .services
        .iter()
        .map(|(name, report)| (name.clone(), service(report)))
        .collect();
    let status = if healthy {
        Status::Healthy
    } else {
        Status::Unhealthy
    };
    status_json(
        healthy,
        &json!({"status": status.as_str(), "services": services}),
    )
}

fn one(snapshot: &Snapshot, name: &str) -> Response<Full<Bytes>> {
    match snapshot.services.get(name) {
        Some(report) => status_json(report.status == Status::Healthy, &service(report)),
        None => body(
            StatusCode::NOT_FOUND,
            &json!({"error": format!("Service named {name:?} not found.")}),
        ),
    }
}

fn service(report: &Report) -> Value {
    let mut object = Map::new();
    object.insert("status".into(), report.status.as_str().into());
    if let Some(reason) = report.reason.as_ref().filter(|reason| !reason.is_empty()) {
        object.insert("reason".into(), reason.clone().into());
    }
    object.insert("updated_at".into(), report.updated_at.map(rfc3339).into());
    object.into()
}

fn status_json(healthy: bool, value: &Value) -> Response<Full<Bytes>> {
    let status = if healthy {
        StatusCode::OK
    } else {
        StatusCode::SERVICE_UNAVAILABLE
    };
    body(status, value)
}

fn body(status: StatusCode, value: &Value) -> Response<Full<Bytes>> {
    text(status, "application/json", format!("{value:#}"))
}

fn text(
    status: StatusCode,
    media: &'static str,
    content: impl Into<Bytes>,
) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(content.into()));
    *response.status_mut() = status;
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static(media));
    headers.insert(CONNECTION, HeaderValue::from_static("close"));
    response
}

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;
    use std::time::SystemTime;

    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    use super::*;
    use crate::clock::Clock;

    struct Service {
        address: SocketAddr,
        registry: Registry,
        metrics: Metrics,
        shutdown: CancellationToken,
        ended: tokio::task::JoinHandle<()>,
    }

    async fn start() -> Service {
        let clock = Clock::simulated(SystemTime::UNIX_EPOCH + Duration::from_secs(1_700_000_000));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let (registry, metrics) = (Registry::new(clock), Metrics::new());
        let shutdown = CancellationToken::new();
        Service {
            address: listener.local_addr().unwrap(),
            ended: tokio::spawn(serve(
                Listener::Tcp(listener),
                registry.clone(),
                metrics.clone(),
                shutdown.clone(),
            )),
            registry,
            metrics,
            shutdown,
        }
    }

    async fn get(address: SocketAddr, path: &str) -> (u16, String, String) {
        let mut stream = TcpStream::connect(address).await.unwrap();
        let request = format!("GET {path} HTTP/1.1\r\nHost: x\r\n\r\n");
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        let (head, body) = answer.split_once("\r\n\r\n").unwrap();
        let code = head.split(' ').nth(1).unwrap().parse().unwrap();
        (code, head.to_lowercase(), body.to_owned())
    }

    #[tokio::test]
    async fn readiness_says_who_is_missing_and_why() {
        let service = start().await;
        let identity = service.registry.reporter("identity");
        let output = service.registry.reporter("identity-output-1");
        identity.healthy();

        let (code, head, body) = get(service.address, "/readyz").await;
        assert_eq!(code, 503);
        assert!(head.contains("content-type: application/json"));
        assert_eq!(
            serde_json::from_str::<Value>(&body).unwrap(),
            json!({"status": "unhealthy", "services": {
                "identity": {"status": "healthy", "updated_at": "2023-11-14T22:13:20Z"},
                "identity-output-1": {"status": "initializing", "updated_at": null},
            }})
        );
        assert!(
            body.starts_with("{\n  \"") && !body.ends_with('\n'),
            "{body}"
        );

        output.unhealthy("no space left on device");
        let (code, _, body) = get(service.address, "/readyz/identity-output-1").await;
        assert_eq!(code, 503);
        assert!(
            body.contains("\"reason\": \"no space left on device\""),
            "{body}"
        );
        assert_eq!(get(service.address, "/readyz/identity").await.0, 200);

        output.healthy();
        assert_eq!(get(service.address, "/readyz").await.0, 200);
    }

    #[tokio::test]
    async fn unknown_names_and_paths_are_not_found() {
        let service = start().await;
        for path in ["/readyz/nope", "/wait/nope"] {
            let (code, _, body) = get(service.address, path).await;
            assert_eq!(code, 404);
            assert_eq!(
                serde_json::from_str::<Value>(&body).unwrap(),
                json!({"error": "Service named \"nope\" not found."})
            );
        }
        for path in ["/", "/debug/pprof/", "/readyzz"] {
            assert_eq!(get(service.address, path).await.0, 404, "{path}");
        }
    }

    #[tokio::test]
    async fn liveness_and_metrics_always_answer() {
        let service = start().await;
        let _silent = service.registry.reporter("identity");
        let (code, _, body) = get(service.address, "/livez").await;
        assert_eq!((code, body.as_str()), (200, "OK"));
        service.metrics.iteration(
            "heartbeat",
            "submit-heartbeat",
            metrics::Outcome::Failed,
            Duration::ZERO,
        );
        let (code, head, body) = get(service.address, "/metrics").await;
        assert_eq!(code, 200);
        assert!(head.contains("openmetrics-text"));
        assert!(body.contains("tbot_task_iterations_failed{"), "{body}");
    }

    #[tokio::test]
    async fn wait_answers_when_everyone_has_reported() {
        let service = start().await;
        let first = service.registry.reporter("a");
        let second = service.registry.reporter("b");
        first.healthy();
        let waiting = tokio::spawn(get(service.address, "/wait"));
        let of_one = get(service.address, "/wait/a").await;
        assert_eq!(of_one.0, 200);
        assert!(!waiting.is_finished());
        second.unhealthy("away");
        assert_eq!(waiting.await.unwrap().0, 503);
    }

    #[tokio::test]
    async fn a_crowd_of_silent_peers_does_not_end_the_service_and_shutdown_does() {
        let service = start().await;
        let mut silent = Vec::new();
        for _ in 0..MAX_CONNECTIONS {
            silent.push(TcpStream::connect(service.address).await.unwrap());
        }
        let waiting = tokio::spawn(get(service.address, "/livez"));
        drop(silent);
        assert_eq!(waiting.await.unwrap().0, 200);
        service.shutdown.cancel();
        service.ended.await.unwrap();
    }

    #[tokio::test]
    async fn huge_requests_are_refused() {
        let service = start().await;
        let (code, _, _) = get(service.address, &format!("/{}", "x".repeat(70_000))).await;
        assert!((400..500).contains(&code), "{code}");
    }
}
