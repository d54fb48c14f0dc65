//! Administration over a unix socket in the data directory: one JSON request and answer per
//! HTTP/1 exchange.
//!
//! The socket has mode 0600 in a directory of mode 0700, and the peer must be the server's own
//! user or root besides. Whoever may connect may do everything.

use std::convert::Infallible;
use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt as _, Full, Limited};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tokio::net::{UnixListener, UnixStream};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use super::ca::{self, AuthorityType, Mode, Phase, Step};
use super::listener::refusals;
use super::resources::{self, Applied, ApplyError, CreateError, safe_name};
use super::store::StoreError;
use super::{ClusterState, SERVER_VERSION};
use crate::exchange::ask_for_bytes;

/// The socket's name in the data directory.
const SOCKET: &str = "admin.sock";
/// The largest request or answer.
const MAX_MESSAGE: usize = 16 * 1024 * 1024;
/// For one exchange.
const PATIENCE: Duration = Duration::from_secs(30);

/// What a command asks for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "request", rename_all = "snake_case")]
pub enum Request {
    /// Create resources from files.
    Create {
        /// Name (for messages) and text of each file.
        files: Vec<(String, String)>,
        /// Replace what is there.
        force: bool,
    },
    /// Read one resource, or all of a kind.
    Get {
        /// The kind, also in the plural.
        kind: String,
        /// The name; all if `None`.
        name: Option<String>,
    },
    /// Remove one resource.
    Remove {
        /// The kind, also in the plural.
        kind: String,
        /// The name.
        name: String,
    },
    /// Take a step of the rotation of an authority.
    Rotate {
        /// Its type, for example `host`.
        kind: String,
        /// The phase to go to; the start of a rotation if `None`.
        phase: Option<String>,
        /// Whether phases follow by command instead of by schedule.
        manual: bool,
        /// How long a scheduled rotation takes, in seconds.
        grace: u64,
    },
    /// Tell about the cluster.
    Status,
}

/// What the cluster answers.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "answer", rename_all = "snake_case")]
pub enum Answer {
    /// Resources were created, in the order of the files.
    Created {
        /// What happened to each.
        applied: Vec<Applied>,
    },
    /// Resources as `tctl get` shows them, by name.
    Resources {
        /// The resources.
        resources: Vec<Value>,
    },
    /// A resource was removed.
    Removed {
        /// The line to print.
        message: String,
    },
    /// A step of a rotation was taken.
    Rotated {
        /// The phase that the authority is in now.
        phase: String,
    },
    /// About the cluster.
    Status(Status),
    /// Nothing was changed.
    Refused {
        /// Why: lines for people.
        error: String,
        /// Whether the request was no sensible one: an unknown kind, a file that is wrong.
        #[serde(default)]
        mistaken: bool,
    },
}

/// Why nothing was changed.
#[derive(Debug)]
struct Problem {
    error: String,
    mistaken: bool,
}

impl Problem {
    fn mistake(error: String) -> Self {
        Self {
            error,
            mistaken: true,
        }
    }
}

impl From<String> for Problem {
    fn from(error: String) -> Self {
        Self {
            error,
            mistaken: false,
        }
    }
}

impl From<Problem> for Answer {
    fn from(Problem { error, mistaken }: Problem) -> Self {
        Self::Refused { error, mistaken }
    }
}

/// About a cluster.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// Its name, which is its trust domain too.
    pub cluster: String,
    /// The Teleport version whose protocol it speaks.
    pub version: String,
    /// What agents pin: one for each trusted host authority.
    pub ca_pins: Vec<String>,
    /// The first public address, `host:port`.
    pub public_addr: String,
    /// Types of its authorities, and where the rotation of each stands.
    pub authorities: Vec<(String, String)>,
}

/// Why a command does not reach its cluster, or the cluster cannot take commands.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AdminError {
    /// Nobody serves this data directory.
    #[error(
        "no cluster is running in {data_dir} (start one with `tbot cluster serve --data-dir \
         {data_dir}`, or name its directory with --data-dir or TBOT_CLUSTER_DATA_DIR)"
    )]
    NotRunning {
        /// The data directory.
        data_dir: PathBuf,
    },
    /// The socket cannot be used: mostly it is another user's.
    #[error("cannot use the admin socket {path}: {source}")]
    Socket {
        /// The socket.
        path: PathBuf,
        /// The system's reason.
        #[source]
        source: io::Error,
    },
    /// The exchange broke off, or the other side is another version.
    #[error("the cluster behind {path} did not answer properly: {what}")]
    Answer {
        /// The socket.
        path: PathBuf,
        /// What went wrong.
        what: String,
    },
}

/// The serving side.
#[derive(Debug)]
pub(super) struct Server {
    listener: UnixListener,
    path: PathBuf,
    state: Arc<ClusterState>,
}

impl Server {
    /// Binds the socket. The caller holds the data directory's lock, so a socket that is there
    /// was left by a process that is gone.
    pub(super) fn bind(data_dir: &Path, state: Arc<ClusterState>) -> Result<Self, AdminError> {
        let path = data_dir.join(SOCKET);
        let failed = |source| AdminError::Socket {
            path: path.clone(),
            source,
        };
        match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(failed(error)),
            _ => {}
        }
        // The directory is closed to others, so nobody comes in before the mode is set.
        let listener = UnixListener::bind(&path).map_err(failed)?;
        fs::set_permissions(&path, PermissionsExt::from_mode(0o600)).map_err(failed)?;
        Ok(Self {
            listener,
            path,
            state,
        })
    }

    pub(super) async fn serve(self, shutdown: CancellationToken) {
        let mut connections = JoinSet::new();
        loop {
            let accepted = tokio::select! {
                () = shutdown.cancelled() => break,
                accepted = self.listener.accept() => accepted,
                Some(_done) = connections.join_next(), if !connections.is_empty() => continue,
            };
            match accepted {
                Ok((stream, _address)) => {
                    connections.spawn(connection(stream, Arc::clone(&self.state)));
                }
                Err(error) => {
                    tracing::warn!(%error, "cannot accept a command");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            }
        }
        if let Err(error) = fs::remove_file(&self.path) {
            tracing::debug!(%error, "the admin socket could not be removed");
        }
        let done = async { while connections.join_next().await.is_some() {} };
        if tokio::time::timeout(Duration::from_secs(5), done)
            .await
            .is_err()
        {
            connections.shutdown().await;
        }
    }
}

/// Whether a peer with this user id may give commands to a server with `own`.
fn may_command(peer: u32, own: u32) -> bool {
    peer == own || peer == 0
}

async fn connection(stream: UnixStream, state: Arc<ClusterState>) {
    let own = nix::unistd::geteuid().as_raw();
    let uid = match stream.peer_cred() {
        Ok(peer) if may_command(peer.uid(), own) => peer.uid(),
        Ok(peer) => {
            let by = user(&state, peer.uid());
            refused(
                &state,
                "connect",
                "only the server's user and root may",
                &by,
            );
            return;
        }
        Err(error) => {
            tracing::warn!(%error, "refused a command of an unknown user");
            return;
        }
    };
    let service = service_fn(move |request: http::Request<Incoming>| {
        let state = Arc::clone(&state);
        async move {
            let answer = match read(request.into_body()).await {
                Ok(request) => handle(state, request, uid).await,
                Err(error) => Problem::from(error).into(),
            };
            let body = serde_json::to_vec(&answer).unwrap_or_default();
            Ok::<_, Infallible>(http::Response::new(Full::new(Bytes::from(body))))
        }
    });
    let connection = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(PATIENCE)
        .keep_alive(false)
        .serve_connection(TokioIo::new(stream), service);
    match tokio::time::timeout(PATIENCE, connection).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => tracing::debug!(%error, "a command broke off"),
        Err(_elapsed) => tracing::debug!("a command took too long"),
    }
}

async fn read(body: Incoming) -> Result<Request, String> {
    let body = Limited::new(body, MAX_MESSAGE)
        .collect()
        .await
        .map_err(|error| format!("the request cannot be read: {error}"))?;
    serde_json::from_slice(&body.to_bytes())
        .map_err(|error| format!("the request is not understood: {error}"))
}

async fn handle(state: Arc<ClusterState>, request: Request, uid: u32) -> Answer {
    // SQLite waits for the disk.
    tokio::task::spawn_blocking(move || answer(&state, request, uid))
        .await
        .unwrap_or_else(|error| Problem::from(format!("the command failed: {error}")).into())
}

pub(super) fn answer(state: &ClusterState, request: Request, uid: u32) -> Answer {
    let by = user(state, uid);
    let refused = |method: &str, error: &str| refused(state, method, error, &by);
    let result = match request {
        Request::Create { files, force } => {
            let mode = if force {
                resources::Mode::Force
            } else {
                resources::Mode::Create
            };
            state
                .create(&files, mode, &by)
                .map(|applied| Answer::Created { applied })
                .map_err(|error| {
                    // The lines about a file quote it, names of tokens included.
                    match &error {
                        CreateError::Rejected(_) => {
                            refused("create", "a file was rejected");
                            Problem::mistake(error.to_string())
                        }
                        CreateError::Apply(cause) => {
                            refused("create", &cause.to_string());
                            error.to_string().into()
                        }
                    }
                })
        }
        Request::Get { kind, name } => known(&kind).and_then(|kind| get(state, kind, name)),
        Request::Remove { kind, name } => known(&kind).and_then(|kind| {
            resources::remove(&state.store, &state.audit, kind, &name, &by)
                .map(|message| Answer::Removed { message })
                .map_err(|error| {
                    let shown = match kind {
                        "token" => safe_name(&name, kind),
                        _ => name.clone(),
                    };
                    match error {
                        ApplyError::Store(StoreError::NotFound { .. }) => {
                            refused("remove", &format!("{kind} {shown:?} is not found"));
                            missing(kind, &name).into()
                        }
                        other => {
                            refused("remove", &other.to_string());
                            other.to_string().into()
                        }
                    }
                })
        }),
        Request::Rotate {
            kind,
            phase,
            manual,
            grace,
        } => rotate(state, &kind, phase.as_deref(), manual, grace, &by)
            .inspect_err(|problem| refused("rotate", &problem.error)),
        Request::Status => Ok(Answer::Status(status(state))),
    };
    result.unwrap_or_else(Answer::from)
}

/// Writes a refused command into the audit log.
fn refused(state: &ClusterState, method: &str, error: &str, by: &str) {
    let (event, code) = refusals::EVENT;
    state.audit.emit(json!({
        "event": event,
        "code": code,
        "success": false,
        "method": format!("admin/{method}"),
        "error": error,
        "user": by,
    }));
}

/// How audit events name a peer of the socket.
fn user(state: &ClusterState, uid: u32) -> String {
    format!("uid-{uid}.{}", state.name)
}

fn known(kind: &str) -> Result<&'static str, Problem> {
    resources::readable_kind(kind).ok_or_else(|| {
        let all: Vec<&str> = resources::readable_kinds().collect();
        Problem::mistake(format!(
            "{kind:?} is no kind of resource here (kinds are {})",
            all.join(", ")
        ))
    })
}

fn rotate(
    state: &ClusterState,
    kind: &str,
    phase: Option<&str>,
    manual: bool,
    grace: u64,
    by: &str,
) -> Result<Answer, Problem> {
    let all = |names: Vec<&str>| names.join(", ");
    let known = AuthorityType::from_name(kind).ok_or_else(|| {
        let names = AuthorityType::ALL.iter().map(|kind| kind.name()).collect();
        Problem::mistake(format!(
            "{kind:?} is no authority of this cluster (types are {})",
            all(names)
        ))
    })?;
    let to = match phase {
        None => Phase::Init,
        Some(name) => Phase::from_name(name).ok_or_else(|| {
            let names = Phase::ALL.iter().map(|phase| phase.name()).collect();
            Problem::mistake(format!(
                "{name:?} is no phase of a rotation (phases are {})",
                all(names)
            ))
        })?,
    };
    let step = Step {
        to,
        mode: if manual || phase.is_some() {
            Mode::Manual
        } else {
            Mode::Auto
        },
        grace: Duration::from_secs(grace),
    };
    let authority = state
        .rotate(known, step, by)
        .map_err(|error| error.to_string())?;
    Ok(Answer::Rotated {
        phase: authority.phase().name().to_owned(),
    })
}

fn missing(kind: &str, name: &str) -> String {
    format!("{kind} {name:?} is not found (list them with `tbot cluster get {kind}`)")
}

fn get(state: &ClusterState, kind: &str, name: Option<String>) -> Result<Answer, Problem> {
    let found = match name {
        None => state.store.list(kind),
        Some(name) => match state.store.get(kind, &name) {
            Ok(None) => return Err(missing(kind, &name).into()),
            Ok(Some(found)) => Ok(vec![found]),
            Err(error) => Err(error),
        },
    };
    let found = found.map_err(|error| error.to_string())?;
    Ok(Answer::Resources {
        resources: found.iter().map(resources::view).collect(),
    })
}

fn status(state: &ClusterState) -> Status {
    let types = AuthorityType::ALL;
    Status {
        cluster: state.name.clone(),
        version: SERVER_VERSION.to_owned(),
        ca_pins: state.authorities.host_pins(),
        public_addr: state.public_addr.clone(),
        authorities: types
            .iter()
            .map(|kind| {
                let stands = ca::describe(&state.authorities.get(*kind));
                (kind.name().to_owned(), stands)
            })
            .collect(),
    }
}

/// Asks the cluster that is served from `data_dir`.
pub async fn ask(data_dir: &Path, request: &Request) -> Result<Answer, AdminError> {
    let path = data_dir.join(SOCKET);
    let stream = UnixStream::connect(&path)
        .await
        .map_err(|source| match source.kind() {
            io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => AdminError::NotRunning {
                data_dir: data_dir.to_owned(),
            },
            _ => AdminError::Socket {
                path: path.clone(),
                source,
            },
        })?;
    let failed = |what: String| AdminError::Answer {
        path: path.clone(),
        what,
    };
    tokio::time::timeout(PATIENCE, exchange(stream, request))
        .await
        .map_err(|_elapsed| failed(format!("nothing came for {} s", PATIENCE.as_secs())))?
        .map_err(|error| failed(error.to_string()))
}

async fn exchange(
    stream: UnixStream,
    request: &Request,
) -> Result<Answer, Box<dyn std::error::Error + Send + Sync>> {
    let body = Full::new(Bytes::from(serde_json::to_vec(request)?));
    let request = http::Request::post("/v1/admin")
        .header("host", "tbot")
        .body(body)?;
    let answer = ask_for_bytes(stream, request, MAX_MESSAGE).await?;
    Ok(serde_json::from_slice(answer.body())?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_root_and_the_servers_user_command() {
        for (peer, own, allowed) in [
            (0, 0, true),
            (0, 5, true),
            (5, 5, true),
            (6, 5, false),
            (5, 0, false),
        ] {
            assert_eq!(may_command(peer, own), allowed, "{peer} {own}");
        }
    }

    #[tokio::test]
    async fn a_command_without_a_cluster_says_what_to_do() {
        let dir = tempfile::tempdir().unwrap();
        let error = ask(dir.path(), &Request::Status).await.unwrap_err();
        assert!(
            error.to_string().contains("tbot cluster serve --data-dir"),
            "{error}"
        );
        // A socket that nobody listens on is the same.
        drop(UnixListener::bind(dir.path().join(SOCKET)).unwrap());
        let error = ask(dir.path(), &Request::Status).await.unwrap_err();
        assert!(matches!(error, AdminError::NotRunning { .. }), "{error}");
    }
}
