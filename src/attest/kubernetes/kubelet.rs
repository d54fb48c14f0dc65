//! The kubelet's API: `GET /pods` over HTTP or HTTPS.

use std::io::{self, BufReader, Read};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use bytes::{Buf as _, Bytes};
use http::{HeaderValue, Request, Response, StatusCode};
use http_body_util::{BodyExt as _, Full};
use hyper::body::Incoming;
use rustls::ClientConfig;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::mpsc;
use tokio::time::timeout;

use super::pods::Pods;
use super::settings::{Port, Settings};
use crate::clock::Clock;
use crate::cluster::ClusterError;
use crate::cluster::credential::roots_of;
use crate::cluster::dial::{self, Dialer as _, Tcp};
use crate::cluster::trust::Trust;
use crate::env::Env;
use crate::exchange;
use crate::secret::Secret;

/// The variable that names this node.
const NODE_NAME: &str = "TELEPORT_NODE_NAME";
/// The longest that one list may take.
const PATIENCE: Duration = Duration::from_secs(10);
/// The longest list, in bytes. A pod has 5 to 30 KiB, and a node up to 500 of them.
const MAX_LIST: usize = 64 * 1024 * 1024;
/// The longest token or authority file that is read, in bytes.
const MAX_FILE: u64 = 1024 * 1024;
/// Pieces of a list that wait to be parsed.
const QUEUE: usize = 4;

/// Why there is no list of pods.
#[derive(Debug, thiserror::Error)]
pub(super) enum KubeletError {
    /// The environment does not say where the kubelet is.
    #[error(
        "the environment variable {NODE_NAME} is not set: it has to name this node (in a pod, by the \
         downward API from spec.nodeName)"
    )]
    NoNode,
    /// A file of the configuration cannot be used.
    #[error("{}: {source}", path.display())]
    File {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    /// The client's certificate, or its key, cannot be used.
    #[error("{}: {source}", path.display())]
    Certificate {
        path: PathBuf,
        #[source]
        source: ClusterError,
    },
    /// No connection, or an authority that cannot be used.
    #[error("the kubelet cannot be asked: {0}")]
    Unreachable(#[source] ClusterError),
    /// Somebody else answers, or the kubelet's certificate is of its own making.
    #[error(
        "TLS with the kubelet at {address} failed: {source} (the kubelet of many clusters signs its \
         own certificate: name its authority in `ca_path`, or set `skip_verify`)"
    )]
    Tls {
        address: String,
        #[source]
        source: io::Error,
    },
    /// No TCP connection.
    #[error("the kubelet at {address} cannot be reached: {source}")]
    Refused {
        address: String,
        #[source]
        source: io::Error,
    },
    /// The connection broke, or something else than HTTP is spoken.
    #[error("the kubelet at {address}: {source}")]
    Http {
        address: String,
        #[source]
        source: hyper::Error,
    },
    /// The kubelet does not know the token, or the authority of the certificate.
    #[error("the kubelet at {address} does not accept {shown} (401 Unauthorized)")]
    Unauthorized { address: String, shown: String },
    /// The account may not ask.
    #[error(
        "the kubelet at {address} refuses its list of pods (403 Forbidden): the agent's service \
         account needs a ClusterRole with `get` on `nodes/proxy` (RBAC; `nodes/pods` is enough from \
         Kubernetes 1.33 on)"
    )]
    Forbidden { address: String },
    /// Any other refusal.
    #[error("the kubelet at {address} answered {status} to /pods")]
    Status { address: String, status: StatusCode },
    /// The list is longer than any.
    #[error("the kubelet at {address} sent more than {} MiB for a list of pods", MAX_LIST >> 20)]
    TooLong { address: String },
    /// Something else than a list of pods.
    #[error("the kubelet at {address} sent no list of pods: {source}")]
    NotAList {
        address: String,
        #[source]
        source: serde_json::Error,
    },
    /// No whole answer in time.
    #[error("the kubelet at {address} sent no whole list of pods within {} s", PATIENCE.as_secs())]
    TooSlow { address: String },
}

impl From<ClusterError> for KubeletError {
    fn from(error: ClusterError) -> Self {
        match error {
            ClusterError::Tls { address, source } => Self::Tls { address, source },
            other => Self::Unreachable(other),
        }
    }
}

/// The kubelet of this node.
#[derive(Debug)]
pub(super) struct Kubelet {
    settings: Settings,
    node: Option<String>,
    clock: Clock,
}

impl Kubelet {
    pub(super) fn new(settings: Settings, env: &Env, clock: Clock) -> Self {
        Self {
            settings,
            node: env.get(NODE_NAME).map(str::to_owned),
            clock,
        }
    }

    /// The node's name.
    pub(super) fn node(&self) -> &str {
        self.node.as_deref().unwrap_or_default()
    }

    /// Every pod of the node.
    pub(super) async fn pods(&self) -> Result<Pods, KubeletError> {
        let node = self.node.as_deref().ok_or(KubeletError::NoNode)?;
        let port = self.settings.port();
        // An IPv6 address stands in brackets.
        let address = if node.contains(':') {
            format!("[{node}]:{}", port.number())
        } else {
            format!("{node}:{}", port.number())
        };
        timeout(PATIENCE, Box::pin(self.ask(port, &address)))
            .await
            .unwrap_or(Err(KubeletError::TooSlow { address }))
    }

    async fn ask(&self, port: Port, address: &str) -> Result<Pods, KubeletError> {
        match port {
            Port::ReadOnly(_) => {
                let stream = Tcp.dial(address).await;
                let stream = stream.map_err(|source| KubeletError::Refused {
                    address: address.to_owned(),
                    source,
                })?;
                self.exchange(stream, address).await
            }
            Port::Secure(_) => {
                let name = dial::server_name(address)?;
                let stream = dial::tls(&Tcp, address, name, self.tls().await?).await?;
                self.exchange(stream, address).await
            }
        }
    }

    /// Whom to believe and what to show, read anew: authorities are exchanged too.
    async fn tls(&self) -> Result<Arc<ClientConfig>, KubeletError> {
        let roots = match self.settings.authority() {
            Some(path) => Some(roots_of(&[read(&path).await?])?),
            None => None,
        };
        let protocols: &[&[u8]] = &[b"http/1.1"];
        let Some((certificate, key)) = self.settings.certificate() else {
            return Ok(Trust::auth(&self.clock, roots, protocols)?);
        };
        // Read anew too: the kubelet's own client certificate, for one, is exchanged every few months.
        let (chain, key) = (read(&certificate).await?, Secret::new(read(&key).await?));
        let config = Trust::with_certificate(&self.clock, roots, &chain, &key, protocols);
        config.map_err(|source| KubeletError::Certificate {
            path: certificate,
            source,
        })
    }

    async fn exchange<S>(&self, stream: S, address: &str) -> Result<Pods, KubeletError>
    where
        S: AsyncRead + AsyncWrite + Send + Unpin,
    {
        let token = self.settings.token();
        let mut request = Request::get("/pods")
            .header(http::header::HOST, address)
            .header(http::header::ACCEPT, "application/json");
        if let Some(path) = &token {
            request = request.header(http::header::AUTHORIZATION, bearer(path).await?);
        }
        let request = request.body(Full::default()).unwrap_or_default();
        let shown = match (token, self.settings.certificate()) {
            (Some(path), _) => format!("the token in {}", path.display()),
            (None, Some((path, _))) => format!("the certificate in {}", path.display()),
            (None, None) => "questions without a token".to_owned(),
        };
        exchange::ask(stream, request, |response| pods(response, address, shown))
            .await
            .map_err(|source| KubeletError::Http {
                address: address.to_owned(),
                source,
            })?
    }
}

/// The contents of `Authorization`. The token is read each time: Kubernetes exchanges it every hour.
async fn bearer(path: &Path) -> Result<HeaderValue, KubeletError> {
    let token = Secret::new(read(path).await?);
    let mut value = HeaderValue::from_str(&format!("Bearer {}", token.expose().trim())).map_err(
        |_invalid| KubeletError::File {
            path: path.to_owned(),
            source: io::Error::other("not a token: it has characters that none has"),
        },
    )?;
    value.set_sensitive(true);
    Ok(value)
}

async fn read(path: &Path) -> Result<String, KubeletError> {
    let opened = path.to_owned();
    let read = move || {
        let mut text = String::new();
        std::fs::File::open(opened)?
            .take(MAX_FILE)
            .read_to_string(&mut text)?;
        Ok(text)
    };
    tokio::task::spawn_blocking(read)
        .await
        .map_err(io::Error::other)
        .flatten()
        .map_err(|source| KubeletError::File {
            path: path.to_owned(),
            source,
        })
}

/// Reads the answer piece by piece, and keeps only what is used.
async fn pods(
    response: Response<Incoming>,
    address: &str,
    shown: String,
) -> Result<Pods, KubeletError> {
    let address = address.to_owned();
    match response.status() {
        StatusCode::OK => {}
        StatusCode::UNAUTHORIZED => return Err(KubeletError::Unauthorized { address, shown }),
        StatusCode::FORBIDDEN => return Err(KubeletError::Forbidden { address }),
        status => return Err(KubeletError::Status { address, status }),
    }
    let (pieces, queue) = mpsc::channel(QUEUE);
    let parsing = tokio::task::spawn_blocking(move || {
        serde_json::from_reader(BufReader::new(Pieces {
            queue,
            current: Bytes::new(),
        }))
    });
    let mut body = response.into_body();
    let mut length = 0;
    while let Some(frame) = body.frame().await {
        let frame = frame.map_err(|source| KubeletError::Http {
            address: address.clone(),
            source,
        })?;
        let Ok(data) = frame.into_data() else {
            continue;
        };
        length += data.len();
        if length > MAX_LIST {
            return Err(KubeletError::TooLong { address });
        }
        // The parser has found a mistake and reads no further.
        if pieces.send(data).await.is_err() {
            break;
        }
    }
    drop(pieces);
    let parsed = match parsing.await {
        Ok(parsed) => parsed,
        Err(ended) => Err(serde::de::Error::custom(ended)),
    };
    parsed.map_err(|source| KubeletError::NotAList { address, source })
}

/// Pieces that come from elsewhere, as something to read.
struct Pieces {
    queue: mpsc::Receiver<Bytes>,
    current: Bytes,
}

impl Read for Pieces {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while self.current.is_empty() {
            match self.queue.blocking_recv() {
                Some(piece) => self.current = piece,
                None => return Ok(0),
            }
        }
        let length = buffer.len().min(self.current.len());
        self.current
            .copy_to_slice(buffer.get_mut(..length).unwrap_or_default());
        Ok(length)
    }
}
