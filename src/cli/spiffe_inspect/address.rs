//! Where the Workload API is that is asked.

use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::os::unix::fs::FileTypeExt as _;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, anyhow, bail};
use tokio::net::{TcpStream, UnixStream};
use tokio_util::either::Either;

/// Where a Workload API is (`SPIFFE_Workload_Endpoint.md` 4).
#[derive(Debug, PartialEq, Eq)]
pub(in crate::cli) enum Address {
    Unix(PathBuf),
    Tcp(SocketAddr),
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unix(path) => write!(f, "unix://{}", path.display()),
            Self::Tcp(address) => write!(f, "tcp://{address}"),
        }
    }
}

impl Address {
    /// Reads `path` (`unix:///path` or `tcp://IP:port`) or else `endpoint`, the value of
    /// `SPIFFE_ENDPOINT_SOCKET`.
    pub(in crate::cli) fn of(path: Option<&str>, endpoint: Option<&str>) -> anyhow::Result<Self> {
        let text = path.or(endpoint).ok_or_else(|| {
            anyhow!(
                "which Workload API? Give --path unix:///path/to.sock, or set \
                 SPIFFE_ENDPOINT_SOCKET"
            )
        })?;
        Self::parse(text)
    }

    fn parse(text: &str) -> anyhow::Result<Self> {
        if let Some(rest) = text.strip_prefix("unix:") {
            let path = rest.strip_prefix("//").unwrap_or(rest);
            if !path.starts_with('/') {
                bail!(
                    "{text:?}: the path must be absolute: write unix:///path/to.sock, with three slashes"
                );
            }
            if path.contains(['?', '#']) {
                bail!("{text:?}: a query or fragment has no meaning here");
            }
            return Ok(Self::Unix(PathBuf::from(path)));
        }
        if let Some(rest) = text.strip_prefix("tcp://") {
            return rest.parse().map(Self::Tcp).map_err(|_source| {
                anyhow!(
                    "{text:?}: write tcp://IP:port, with an IP address and nothing behind the port"
                )
            });
        }
        let remedy = if text.starts_with('/') {
            format!("write unix://{text}")
        } else {
            "write unix:///path/to.sock or tcp://IP:port".to_owned()
        };
        bail!("{text:?} is no address of a Workload API: {remedy}")
    }

    pub(super) async fn connect(&self) -> anyhow::Result<Either<UnixStream, TcpStream>> {
        match self {
            Self::Unix(path) => UnixStream::connect(path)
                .await
                .map(Either::Left)
                .map_err(|source| unreachable_socket(path, &source)),
            Self::Tcp(address) => TcpStream::connect(address)
                .await
                .map(Either::Right)
                .with_context(|| format!("cannot connect to {address}: does tbot listen there?")),
        }
    }
}

fn unreachable_socket(path: &Path, source: &io::Error) -> anyhow::Error {
    let is_socket = path
        .metadata()
        .is_ok_and(|meta| meta.file_type().is_socket());
    let path = path.display();
    let remedy = match source.kind() {
        io::ErrorKind::NotFound => {
            "there is no such socket: is tbot running, with a workload-identity-api service whose \
             `listen` is this path?"
        }
        io::ErrorKind::PermissionDenied => {
            "this user may not reach it: it needs the execute permission on every directory of the \
             path, and the write permission on the socket, which a user who floods it loses for moments"
        }
        io::ErrorKind::ConnectionRefused if is_socket => {
            "nobody answers on it: tbot is not running (`systemctl status tbot`)"
        }
        _ => "it is no socket: name the path that `listen` of the service names",
    };
    anyhow!("cannot connect to {path}: {source}: {remedy}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn what_is_no_socket_is_told_from_one_that_nobody_answers_on() {
        let home = tempfile::tempdir().unwrap();
        let path = home.path().join("w.sock");
        drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
        let told = async |path: &Path| {
            let answer = Address::Unix(path.to_owned()).connect().await;
            answer.err().unwrap().to_string()
        };
        let deserted = told(&path).await;
        assert!(deserted.contains("not running"), "{deserted}");
        let folder = told(home.path()).await;
        assert!(folder.contains("no socket"), "{folder}");
        std::fs::write(home.path().join("file"), "").unwrap();
        let file = told(&home.path().join("file")).await;
        assert!(file.contains("no socket"), "{file}");
    }

    #[test]
    fn addresses_follow_the_standard() {
        for (text, address) in [
            ("unix:///run/w.sock", Address::Unix("/run/w.sock".into())),
            ("unix:/run/w.sock", Address::Unix("/run/w.sock".into())),
            (
                "tcp://127.0.0.1:80",
                Address::Tcp(([127, 0, 0, 1], 80).into()),
            ),
        ] {
            assert_eq!(Address::parse(text).unwrap(), address);
        }
        for (text, hint) in [
            ("/run/w.sock", "write unix:///run/w.sock"),
            ("unix://run/w.sock", "three slashes"),
            ("unix:w.sock", "three slashes"),
            ("unix:///w?x", "query"),
            ("tcp://localhost:80", "IP address"),
            ("tcp://127.0.0.1", "IP address"),
            ("tcp://127.0.0.1:80/x", "IP address"),
            ("http://x", "tcp://IP:port"),
            ("", "tcp://IP:port"),
        ] {
            let error = Address::parse(text).unwrap_err().to_string();
            assert!(error.contains(hint), "{text}: {error}");
        }
    }
}
