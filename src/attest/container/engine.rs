//! The HTTP API of a container engine on a unix socket.

use std::collections::HashMap;
use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use bytes::Bytes;
use http::{Request, Response, StatusCode};
use http_body_util::Full;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use tokio::net::UnixStream;

use crate::exchange::{self, ExchangeError};
use crate::yaml::Tree;

/// The longest a request may take, connecting included.
const PATIENCE: Duration = Duration::from_secs(1);
/// The longest answer, in bytes. A container with hundreds of mounts and labels has 100 KiB.
const MAX_ANSWER: usize = 4 * 1024 * 1024;
/// How much of an engine's own words are repeated, in characters.
const MAX_REASON: usize = 300;

/// Why an engine did not tell.
#[derive(Debug, thiserror::Error)]
pub(crate) enum EngineError {
    /// Nobody listens on the socket, or it may not be used.
    #[error("{}: {source} ({})", socket.display(), hint(source))]
    Unreachable {
        socket: PathBuf,
        #[source]
        source: io::Error,
    },
    /// No answer in time.
    #[error("{}: {path}: no answer within {} s", socket.display(), PATIENCE.as_secs())]
    TooSlow { socket: PathBuf, path: String },
    /// Something else than an engine listens, or it was cut off.
    #[error("{}: {path}: {source}", socket.display())]
    Exchange {
        socket: PathBuf,
        path: String,
        #[source]
        source: ExchangeError,
    },
    /// The engine knows no such object.
    #[error("{}: the engine does not know {path}: {reason}", socket.display())]
    Unknown {
        socket: PathBuf,
        path: String,
        reason: String,
    },
    /// The engine refused.
    #[error("{}: {path}: the engine answered {status}: {reason}", socket.display())]
    Refused {
        socket: PathBuf,
        path: String,
        status: StatusCode,
        reason: String,
    },
    /// The answer is not what this API gives.
    #[error("{}: {path}: not the expected answer: {source}", socket.display())]
    Answer {
        socket: PathBuf,
        path: String,
        #[source]
        source: serde_json::Error,
    },
}

fn hint(source: &io::Error) -> &'static str {
    match source.kind() {
        io::ErrorKind::NotFound => "does the engine run, and can the agent see its socket?",
        io::ErrorKind::PermissionDenied => "let the agent's user use it, by its group for example",
        io::ErrorKind::ConnectionRefused => "the engine does not run",
        _ => "is it the engine's socket?",
    }
}

/// Where an engine listens: `unix://` and an absolute path.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Address(PathBuf);

/// How a container was made, as far as it is used. Docker and Podman tell it alike.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub(crate) struct Config {
    /// The image's name.
    #[serde(default)]
    pub(crate) image: String,
    pub(crate) labels: Option<HashMap<String, String>>,
}

/// Whether a container runs.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub(crate) struct State {
    /// Its first process; 0 if there is none.
    #[serde(default)]
    pub(crate) pid: i32,
}

impl Address {
    /// The section of an attestor that asks this engine.
    pub(crate) fn emit(&self) -> Tree {
        Tree::map([
            ("enabled", Some(Tree::Bool(true))),
            ("addr", Some(Tree::text(self.to_string()))),
        ])
    }

    /// Reads a configured address; the error says what is wrong and what to write.
    pub(crate) fn parse(text: &str) -> Result<Self, String> {
        let form = "write unix:// and an absolute path, as unix:///run/engine.sock";
        let path = text
            .strip_prefix("unix://")
            .ok_or_else(|| format!("{text:?} is no address of a unix socket: {form}"))?;
        if path.starts_with('/') && path.len() > 1 {
            return Ok(Self(PathBuf::from(path)));
        }
        Err(format!(
            "{text:?} has a host, {:?}, where none belongs; is a slash missing before the path? {form}",
            path.split('/').next().unwrap_or_default()
        ))
    }

    fn socket(&self) -> &Path {
        &self.0
    }

    /// The answer to `GET <path>`, as JSON. Only success counts as an answer.
    pub(crate) async fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T, EngineError> {
        let response = self.ask(path).await?;
        serde_json::from_slice(response.body()).map_err(|source| EngineError::Answer {
            socket: self.0.clone(),
            path: path.to_owned(),
            source,
        })
    }

    /// The answer to `GET <path>`, whatever it holds. Only success counts as an answer.
    pub(crate) async fn ask(&self, path: &str) -> Result<Response<Bytes>, EngineError> {
        let (socket, asked) = (self.0.clone(), path.to_owned());
        let Ok(answer) = tokio::time::timeout(PATIENCE, self.exchange(path)).await else {
            return Err(EngineError::TooSlow {
                socket,
                path: asked,
            });
        };
        let response = answer?;
        match response.status() {
            StatusCode::OK => Ok(response),
            StatusCode::NOT_FOUND => Err(EngineError::Unknown {
                socket,
                path: asked,
                reason: reason(response.body()),
            }),
            status => Err(EngineError::Refused {
                socket,
                path: asked,
                status,
                reason: reason(response.body()),
            }),
        }
    }

    async fn exchange(&self, path: &str) -> Result<Response<Bytes>, EngineError> {
        let stream = UnixStream::connect(self.socket()).await.map_err(|source| {
            EngineError::Unreachable {
                socket: self.0.clone(),
                source,
            }
        })?;
        let request = Request::get(path)
            .header(http::header::HOST, "localhost")
            .body(Full::default())
            .unwrap_or_default();
        exchange::ask_for_bytes(stream, request, MAX_ANSWER)
            .await
            .map_err(|source| EngineError::Exchange {
                socket: self.0.clone(),
                path: path.to_owned(),
                source,
            })
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "unix://{}", self.0.display())
    }
}

/// What the engine gives as the reason of a refusal.
fn reason(body: &[u8]) -> String {
    #[derive(Deserialize)]
    struct Refusal {
        message: String,
    }
    let text = serde_json::from_slice::<Refusal>(body).map_or_else(
        |_not_json| String::from_utf8_lossy(body).into_owned(),
        |refusal| refusal.message,
    );
    let words: Vec<&str> = text.split_whitespace().collect();
    words.join(" ").chars().take(MAX_REASON).collect()
}

#[cfg(test)]
mod tests;
