//! Where the Workload API listens: a unix socket, or TCP for trials; ours, or one that systemd passed.

use std::fmt;
use std::io;
use std::net::{SocketAddr, TcpListener};
use std::os::unix::fs::FileTypeExt as _;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use tokio::net::{UnixSocket, UnixStream};

use super::gate;
use super::permissions::Permissions;
use crate::fsx::SocketFile;
use crate::services::sockets::{FileId, Sockets, file_at};

/// The longest path that fits a socket address (`sun_path` with its final zero), in bytes.
const MAX_PATH: usize = 107;
/// Connections that may wait to be accepted, as many as the kernel allows by default: callers of a
/// moment in which the agent is being replaced.
const BACKLOG: u32 = 4096;

/// Why the API cannot listen. Nothing was changed on disk, except that a socket nobody answers on
/// may be gone.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub(super) enum ListenError {
    /// The directory for the socket is not there.
    #[error(
        "cannot listen on {}: its directory does not exist: create it with `mkdir -p {}`, owned by \
         the user that runs tbot", path.display(), directory.display()
    )]
    NoDirectory { path: PathBuf, directory: PathBuf },
    /// Another process answers on the socket.
    #[error(
        "cannot listen on {}: it is in use by another process: is another tbot running?",
        path.display()
    )]
    InUse { path: PathBuf },
    /// Something else stands at the path, and is left there.
    #[error(
        "cannot listen on {}: something that is not a socket is there: move it away or choose \
         another path", path.display()
    )]
    NotASocket { path: PathBuf },
    /// The path does not fit a socket address.
    #[error("cannot listen on {}: a socket's path has at most {MAX_PATH} bytes", path.display())]
    TooLong { path: PathBuf },
    /// Mode or owner, as configured, cannot be set.
    #[error("cannot listen on {}: {problem}", path.display())]
    Permissions { path: PathBuf, problem: String },
    /// The user that runs the agent may not create the socket, or another refusal of the system.
    #[error("cannot listen on {address}: {action}: {source}")]
    Io {
        address: String,
        action: &'static str,
        #[source]
        source: io::Error,
    },
}

/// A parsed `listen` key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Listen {
    /// `unix:///path`.
    Unix(PathBuf),
    /// `tcp://host:port`.
    Tcp(String),
}

impl fmt::Display for Listen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unix(path) => write!(f, "unix://{}", path.display()),
            Self::Tcp(address) => write!(f, "tcp://{address}"),
        }
    }
}

impl Listen {
    /// Reads a URI the way upstream does, and says what the user may not expect.
    pub(super) fn parse(text: &str) -> Result<(Self, Option<String>), String> {
        if let Some(address) = text
            .strip_prefix("tcp://")
            .or_else(|| text.strip_prefix("//"))
        {
            let port = address
                .rsplit_once(':')
                .map(|(_, port)| port.parse::<u16>());
            return match port {
                Some(Ok(_)) => Ok((Self::Tcp(address.to_owned()), None)),
                _ => Err(format!("{text:?} has no port: write tcp://host:port")),
            };
        }
        let Some(rest) = text.strip_prefix("unix:") else {
            return Err(format!(
                "{text:?} is neither unix:///path nor tcp://host:port"
            ));
        };
        let (host, path) = match rest.strip_prefix("//") {
            Some(rest) => rest.split_at(rest.find('/').unwrap_or(rest.len())),
            None => ("", rest),
        };
        if !path.starts_with('/') || path == "/" {
            return Err(format!("{text:?} names no absolute path"));
        }
        let warning = (!host.is_empty())
            .then(|| format!("{host:?} is taken as a host and dropped: the socket is {path}"));
        Ok((Self::Unix(PathBuf::from(path)), warning))
    }

    /// Starts to listen for the service of this name: on a socket that was passed for it, else on one
    /// of its own with these permissions.
    pub(super) async fn bind(
        &self,
        permissions: &Permissions,
        sockets: &Sockets,
        service: &str,
    ) -> Result<Bound, ListenError> {
        let failed = |action| {
            move |source| ListenError::Io {
                address: self.to_string(),
                action,
                source,
            }
        };
        match self {
            Self::Unix(path) => match sockets.unix(path, service) {
                Some(passed) => {
                    let (socket, stored) = passed
                        .and_then(|(listener, stored)| Ok((Socket::passed(listener)?, stored)))
                        .map_err(failed("take over the socket that systemd passed"))?;
                    if let Some(Err(source)) = socket.held().map(|file| gate::reopen(&file)) {
                        tracing::warn!(
                            path = %path.display(), %source,
                            "Users who flooded the socket when an agent ended may be barred from it still"
                        );
                    }
                    if stored {
                        // They may have changed since the process that bound it.
                        permissions
                            .apply(path)
                            .map_err(|problem| ListenError::Permissions {
                                path: path.clone(),
                                problem,
                            })?;
                    } else if *permissions != Permissions::default() {
                        tracing::warn!(
                            path = %path.display(),
                            "The socket is a socket unit's and keeps the mode and the owner that the \
                             unit gives it (SocketMode=, SocketUser=): `socket` has no effect"
                        );
                    }
                    Ok(Bound::Unix(socket))
                }
                None => Ok(Bound::Unix(Socket::bind(path, permissions, sockets).await?)),
            },
            Self::Tcp(address) => {
                let addresses: Vec<SocketAddr> = tokio::net::lookup_host(address)
                    .await
                    .map_err(failed("resolve"))?
                    .collect();
                if addresses.iter().all(|address| address.ip().is_loopback()) {
                    tracing::warn!(
                        address,
                        "The Workload API listens on TCP: callers cannot be told apart, and every \
                         process of this machine is served"
                    );
                } else {
                    tracing::error!(
                        address,
                        "The Workload API listens on TCP beyond this machine, without TLS: whoever \
                         reaches the port gets the private keys of this identity; listen on a unix \
                         socket, or on 127.0.0.1 for trials"
                    );
                }
                let listener = match sockets.tcp(&addresses, service) {
                    Some(listener) => {
                        listener.map_err(failed("take over the socket that systemd passed"))?
                    }
                    None => TcpListener::bind(&addresses[..]).map_err(failed("bind"))?,
                };
                let ready = listener.set_nonblocking(true);
                ready.map_err(failed("listen"))?;
                Ok(Bound::Tcp(listener))
            }
        }
    }
}

/// A listener. Accepting from it never waits.
#[derive(Debug)]
pub(super) enum Bound {
    Unix(Socket),
    Tcp(TcpListener),
}

/// A listening unix socket. Its file goes with it, unless the socket outlives this process.
#[derive(Debug)]
pub(super) struct Socket {
    listener: UnixListener,
    /// What stood at its path when it was bound or taken over.
    held: Option<Arc<SocketFile>>,
    file: Option<(PathBuf, FileId)>,
}

impl Socket {
    fn passed(listener: UnixListener) -> io::Result<Self> {
        listener.set_nonblocking(true)?;
        let address = listener.local_addr()?;
        let held = address.as_pathname().and_then(|path| {
            let held = SocketFile::hold(path);
            if let Err(source) = &held {
                tracing::warn!(
                    path = %path.display(), %source,
                    "Cannot hold the socket's file: users who flood it will not be barred from it"
                );
            }
            held.ok()
        });
        Ok(Self {
            listener,
            held: held.map(Arc::new),
            file: None,
        })
    }

    fn of(mut self, file: Option<(PathBuf, FileId)>) -> Self {
        self.file = file;
        self
    }

    async fn bind(
        path: &Path,
        permissions: &Permissions,
        sockets: &Sockets,
    ) -> Result<Self, ListenError> {
        let io = |action| {
            move |source| ListenError::Io {
                address: path.display().to_string(),
                action,
                source,
            }
        };
        if path.as_os_str().len() > MAX_PATH {
            return Err(ListenError::TooLong {
                path: path.to_owned(),
            });
        }
        if let Some(directory) = path.parent()
            && !directory.is_dir()
        {
            return Err(ListenError::NoDirectory {
                path: path.to_owned(),
                directory: directory.to_owned(),
            });
        }
        remove_stale(path).await?;
        let socket = UnixSocket::new_stream().map_err(io("socket"))?;
        socket.bind(path).map_err(io("bind"))?;
        // Nobody can connect before its owner and its mode are right.
        if let Err(problem) = permissions.apply(path) {
            // What was bound a moment ago is ours to remove.
            let _removed = std::fs::remove_file(path);
            return Err(ListenError::Permissions {
                path: path.to_owned(),
                problem,
            });
        }
        let listener = socket.listen(BACKLOG).map_err(io("listen"))?;
        let file = file_at(path).map(|file| (path.to_owned(), file));
        let stays = sockets.keep(path, &listener);
        let socket = listener.into_std().and_then(Self::passed);
        let socket = socket.map_err(io("listen"))?;
        Ok(socket.of(file.filter(|_| !stays)))
    }

    pub(super) fn listener(&self) -> &UnixListener {
        &self.listener
    }

    /// The file of the socket, if it has one.
    pub(super) fn held(&self) -> Option<Arc<SocketFile>> {
        self.held.clone()
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        // Another process may have taken the path over; its socket stays.
        if let Some((path, file)) = &self.file
            && file_at(path) == Some(*file)
            && let Err(source) = std::fs::remove_file(path)
        {
            tracing::debug!(path = %path.display(), %source, "Cannot remove the socket");
        }
    }
}

/// Removes a socket that a process left behind: one on which nobody answers.
async fn remove_stale(path: &Path) -> Result<(), ListenError> {
    let io = |action| {
        move |source| ListenError::Io {
            address: path.display().to_string(),
            action,
            source,
        }
    };
    let meta = match std::fs::symlink_metadata(path) {
        Ok(meta) => meta,
        Err(source) if source.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(source) => return Err(io("stat")(source)),
    };
    if !meta.file_type().is_socket() {
        return Err(ListenError::NotASocket {
            path: path.to_owned(),
        });
    }
    match UnixStream::connect(path).await {
        Err(source) if source.kind() == io::ErrorKind::ConnectionRefused => {
            std::fs::remove_file(path).map_err(io("remove the stale socket"))?;
            tracing::info!(path = %path.display(), "Removed a socket that nobody answers on");
            Ok(())
        }
        Err(source) if source.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(source) if source.kind() == io::ErrorKind::PermissionDenied => {
            Err(io("connect")(source))
        }
        // A full queue is an answer too.
        Ok(_) | Err(_) => Err(ListenError::InUse {
            path: path.to_owned(),
        }),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    #[test]
    fn addresses_are_read_as_upstream_reads_them() {
        for (text, written, warns) in [
            ("unix:///opt/x.sock", "unix:///opt/x.sock", false),
            ("unix:/opt/x.sock", "unix:///opt/x.sock", false),
            ("unix://run/x.sock", "unix:///x.sock", true),
            ("tcp://127.0.0.1:8080", "tcp://127.0.0.1:8080", false),
            ("tcp://[::1]:0", "tcp://[::1]:0", false),
            ("//localhost:1", "tcp://localhost:1", false),
        ] {
            let (listen, warning) = Listen::parse(text).unwrap();
            assert_eq!(listen.to_string(), written);
            assert_eq!(warning.is_some(), warns, "{text}");
        }
        for text in [
            "",
            "/opt/x.sock",
            "127.0.0.1:1",
            "localhost:1",
            "http://x",
            "unix://",
            "unix:///",
            "unix://x.sock",
            "unix:x.sock",
            "tcp://host",
            "tcp://host:x",
            "tcp://host:65536",
        ] {
            assert!(Listen::parse(text).is_err(), "{text}");
        }
    }

    async fn bind(path: &Path) -> Result<Socket, ListenError> {
        Socket::bind(path, &Permissions::default(), &Sockets::default()).await
    }

    #[tokio::test]
    async fn the_socket_is_open_to_all_and_goes_with_its_owner() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("w.sock");
        let socket = bind(&path).await.unwrap();
        let mode = std::fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o777);
        drop(socket);
        assert!(!path.exists());
    }

    #[tokio::test]
    async fn a_stale_socket_is_replaced_and_a_live_one_is_not() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("w.sock");
        drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
        assert!(path.exists(), "std leaves the file");
        let live = bind(&path).await.unwrap();
        let error = bind(&path).await.unwrap_err();
        assert!(matches!(error, ListenError::InUse { .. }), "{error}");
        drop(live);
    }

    #[tokio::test]
    async fn what_is_no_socket_stays() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("w.sock");
        std::fs::write(&path, "precious").unwrap();
        let error = bind(&path).await.unwrap_err();
        assert!(matches!(error, ListenError::NotASocket { .. }), "{error}");
        assert_eq!(std::fs::read(&path).unwrap(), b"precious");
    }

    #[tokio::test]
    async fn a_missing_directory_comes_with_its_remedy() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("a/b/w.sock");
        let error = bind(&path).await.unwrap_err().to_string();
        let remedy = format!("`mkdir -p {}`", path.parent().unwrap().display());
        assert!(error.contains(&remedy), "{error}");
    }

    #[tokio::test]
    async fn a_path_that_does_not_fit_is_told() {
        let path = PathBuf::from(format!("/tmp/{}", "x".repeat(MAX_PATH)));
        let error = bind(&path).await.unwrap_err();
        assert!(matches!(error, ListenError::TooLong { .. }), "{error}");
    }

    #[tokio::test]
    async fn the_socket_of_a_successor_stays() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("w.sock");
        let first = bind(&path).await.unwrap();
        std::fs::rename(&path, directory.path().join("old.sock")).unwrap();
        let second = bind(&path).await.unwrap();
        drop(first);
        assert!(path.exists());
        drop(second);
        assert!(!path.exists());
    }
}
