//! Listening sockets that outlive one process of the agent: those of systemd's socket units, and those
//! that its file descriptor store keeps over a restart (`sd_listen_fds(3)`, `sd_pid_notify_with_fds(3)`).
//!
//! A connection that arrives while nobody accepts waits in the socket's queue, so that neither an
//! upgrade nor a crash of the agent refuses one.

use std::ffi::OsStr;
use std::io::{self, IoSlice};
use std::os::fd::{AsFd, AsRawFd as _, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::MetadataExt as _;
use std::os::unix::net::{UnixDatagram, UnixListener};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use nix::sys::socket::sockopt::{AcceptConn, SockType};
use nix::sys::socket::{ControlMessage, MsgFlags, SockType as Type, UnixAddr, getsockopt, sendmsg};
use rustix::process::{PidfdFlags, PidfdGetfdFlags, getpid, pidfd_getfd, pidfd_open};
use sd_notify::NotifyState;

use crate::env::Env;

/// The first descriptor that systemd passes (`SD_LISTEN_FDS_START`).
const FIRST: RawFd = 3;
/// More than that many were not meant.
const MAXIMUM: RawFd = 256;
/// What names of stored sockets begin with. Device and inode of the file follow: the kernel does not
/// tell them of a socket, and another file may stand at its path by now.
const STORED: &str = "tbot-";

/// Whether the descriptors were taken: their numbers mean something else afterwards.
static TAKEN: AtomicBool = AtomicBool::new(false);

/// The sockets that this process was given or left in keeping. Clones share them.
#[derive(Debug, Clone, Default)]
pub struct Sockets(Arc<Shared>);

#[derive(Debug, Default)]
struct Shared {
    given: Mutex<Vec<Given>>,
    /// Where systemd takes what it is to keep; `None` if it keeps nothing.
    store: Option<PathBuf>,
}

/// A listening stream socket.
#[derive(Debug)]
struct Given {
    socket: OwnedFd,
    name: String,
    address: Address,
    claimed: bool,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Address {
    Unix(PathBuf),
    Tcp(std::net::SocketAddr),
}

impl std::fmt::Display for Address {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Unix(path) => write!(f, "unix://{}", path.display()),
            Self::Tcp(address) => write!(f, "tcp://{address}"),
        }
    }
}

/// Device and inode of a file.
pub(super) type FileId = (u64, u64);

/// Which file stands at `path` now.
pub(super) fn file_at(path: &Path) -> Option<FileId> {
    let meta = std::fs::symlink_metadata(path).ok()?;
    Some((meta.dev(), meta.ino()))
}

fn stored_name((device, inode): FileId) -> String {
    format!("{STORED}{device}-{inode}")
}

/// The file of a socket that an earlier process of the agent stored.
fn stored_file(name: &str) -> Option<FileId> {
    let (device, inode) = name.strip_prefix(STORED)?.split_once('-')?;
    Some((device.parse().ok()?, inode.parse().ok()?))
}

impl Sockets {
    /// Takes what systemd passed to this process, once. A variable that is meant for another process
    /// (`LISTEN_PID`) counts for nothing.
    #[must_use]
    pub fn of_process(env: &Env) -> Self {
        let number = |name| env.get(name).and_then(|text| text.parse::<RawFd>().ok());
        let mut given = Vec::new();
        if number("LISTEN_PID") == Some(getpid().as_raw_nonzero().get())
            && let Some(count) = number("LISTEN_FDS").filter(|count| (1..=MAXIMUM).contains(count))
            && !TAKEN.swap(true, Ordering::Relaxed)
        {
            let names: Vec<&str> = env
                .get("LISTEN_FDNAMES")
                .map(|names| names.split(':').collect())
                .unwrap_or_default();
            for (index, number) in (FIRST..FIRST + count).enumerate() {
                let name = names.get(index).copied().unwrap_or("unknown").to_owned();
                match taken(number, name) {
                    Ok(socket) => given.push(socket),
                    Err(error) => tracing::warn!(
                        descriptor = number,
                        error,
                        "A descriptor that systemd passed is of no use"
                    ),
                }
            }
        }
        let keeps = number("FDSTORE").is_some_and(|count| count > 0);
        let store = env.get("NOTIFY_SOCKET").filter(|_| keeps);
        Self(Arc::new(Shared {
            given: Mutex::new(given),
            store: store.map(PathBuf::from),
        }))
    }

    /// The unix socket that was passed for `path`, or under the name of the service; and whether it is
    /// the agent's own, which an earlier process left in keeping.
    pub(super) fn unix(
        &self,
        path: &Path,
        service: &str,
    ) -> Option<io::Result<(UnixListener, bool)>> {
        let socket = self.claim(|given| match &given.address {
            Address::Unix(at) => match stored_file(&given.name) {
                Some(file) => at == path && file_at(path) == Some(file),
                None => at == path || given.name == service,
            },
            Address::Tcp(_) => false,
        })?;
        Some(socket.and_then(|(socket, stored)| {
            let listener = UnixListener::from(socket);
            listener.set_nonblocking(true)?;
            Ok((listener, stored))
        }))
    }

    /// The TCP socket that was passed for one of `addresses`, or under the name of the service.
    pub(super) fn tcp(
        &self,
        addresses: &[std::net::SocketAddr],
        service: &str,
    ) -> Option<io::Result<std::net::TcpListener>> {
        let socket = self.claim(|given| match &given.address {
            Address::Tcp(at) => addresses.contains(at) || given.name == service,
            Address::Unix(_) => false,
        })?;
        Some(socket.and_then(|(socket, _stored)| {
            let listener = std::net::TcpListener::from(socket);
            listener.set_nonblocking(true)?;
            Ok(listener)
        }))
    }

    /// A handle on the first socket that fits, and whether it was stored. The socket itself stays here: a
    /// service that starts anew finds it again.
    fn claim(&self, fits: impl Fn(&Given) -> bool) -> Option<io::Result<(OwnedFd, bool)>> {
        let mut given = self.given();
        let found = given.iter_mut().find(|given| fits(given))?;
        found.claimed = true;
        let stored = stored_file(&found.name).is_some();
        tracing::info!(
            address = %found.address,
            name = found.name,
            stored,
            "Listening on a socket that systemd passed"
        );
        Some(found.socket.try_clone().map(|socket| (socket, stored)))
    }

    /// Leaves a socket that was bound at `path` in systemd's keeping. `false` if systemd keeps none:
    /// then its file has to go with the process.
    pub(super) fn keep(&self, path: &Path, listener: &impl AsFd) -> bool {
        let Some((store, file)) = self.0.store.as_ref().zip(file_at(path)) else {
            return false;
        };
        let name = stored_name(file);
        let kept = listener
            .as_fd()
            .try_clone_to_owned()
            .and_then(|socket| send(store.as_os_str(), &name, &socket).map(|()| socket));
        match kept {
            Ok(socket) => {
                self.given().push(Given {
                    socket,
                    name,
                    address: Address::Unix(path.to_owned()),
                    claimed: true,
                });
                true
            }
            Err(error) => {
                tracing::warn!(%error, "systemd cannot keep the socket over a restart");
                false
            }
        }
    }

    /// Lets go of what no service asked for, once all had the chance: what an earlier process stored
    /// is closed and its file removed, a socket unit that nobody serves is told.
    pub fn settle(&self) {
        let mut given = self.given();
        for given in given.extract_if(.., |given| !given.claimed) {
            let (address, name) = (&given.address, &given.name);
            let Some(file) = stored_file(name) else {
                tracing::warn!(
                    %address,
                    name,
                    "systemd passed a socket that no service listens on: callers that connect to it \
                     wait in vain; let its path equal a service's `listen`, or remove the socket unit"
                );
                continue;
            };
            tracing::info!(%address, "Closing a socket that was kept and that no service listens on");
            let state = format!("FDSTOREREMOVE=1\nFDNAME={name}");
            if let Err(error) = sd_notify::notify(&[NotifyState::Custom(&state)]) {
                tracing::debug!(%error, "systemd could not be told");
            }
            if let Address::Unix(path) = address
                && file_at(path) == Some(file)
                && let Err(error) = std::fs::remove_file(path)
            {
                tracing::debug!(%address, %error, "Cannot remove the socket");
            }
        }
    }

    fn given(&self) -> MutexGuard<'_, Vec<Given>> {
        self.0.given.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Makes descriptor `number` ours, if it is a listening socket, closed in programs that this one
/// starts. What is anything else is left alone: the number may be one of our own.
fn taken(number: RawFd, name: String) -> Result<Given, String> {
    let own = pidfd_open(getpid(), PidfdFlags::empty());
    let socket = own
        .and_then(|own| pidfd_getfd(own, number, PidfdGetfdFlags::empty()))
        .map_err(|error| format!("it cannot be taken over: {error}"))?;
    if getsockopt(&socket, AcceptConn) != Ok(true)
        || getsockopt(&socket, SockType) != Ok(Type::Stream)
    {
        return Err(
            "it is no listening stream socket: the unit needs ListenStream= and Accept=no"
                .to_owned(),
        );
    }
    let address = address(&socket).ok_or("it is neither a unix socket with a path nor TCP")?;
    nix::unistd::close(number).map_err(|error| error.to_string())?;
    Ok(Given {
        socket,
        name,
        address,
        claimed: false,
    })
}

fn address(socket: &OwnedFd) -> Option<Address> {
    // Each family refuses to read the other's address.
    let unix = UnixListener::from(socket.try_clone().ok()?).local_addr();
    if let Ok(address) = unix {
        return address
            .as_pathname()
            .map(|path| Address::Unix(path.to_owned()));
    }
    let tcp = std::net::TcpListener::from(socket.try_clone().ok()?);
    tcp.local_addr().ok().map(Address::Tcp)
}

/// Gives systemd a descriptor to keep, under a name.
fn send(store: &OsStr, name: &str, socket: &OwnedFd) -> io::Result<()> {
    let bytes = store.as_bytes();
    let address = match bytes.strip_prefix(b"@") {
        Some(name) => UnixAddr::new_abstract(name)?,
        None => UnixAddr::new(bytes)?,
    };
    let text = format!("FDSTORE=1\nFDNAME={name}\n");
    let sender = UnixDatagram::unbound()?;
    sendmsg(
        sender.as_raw_fd(),
        &[IoSlice::new(text.as_bytes())],
        &[ControlMessage::ScmRights(&[socket.as_raw_fd()])],
        MsgFlags::empty(),
        Some(&address),
    )?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use nix::cmsg_space;
    use nix::sys::socket::{ControlMessageOwned, recvmsg};

    use super::*;

    fn given(listener: UnixListener, name: &str) -> Given {
        let socket = OwnedFd::from(listener);
        Given {
            address: address(&socket).unwrap(),
            socket,
            name: name.to_owned(),
            claimed: false,
        }
    }

    fn sockets(given: Vec<Given>, store: Option<PathBuf>) -> Sockets {
        Sockets(Arc::new(Shared {
            given: Mutex::new(given),
            store,
        }))
    }

    #[test]
    fn a_socket_is_found_by_its_path_or_by_the_service_s_name() {
        let dir = tempfile::tempdir().unwrap();
        let [one, two] = ["one", "two"].map(|name| dir.path().join(name));
        let sockets = sockets(
            vec![
                given(UnixListener::bind(&one).unwrap(), "tbot.socket"),
                given(UnixListener::bind(&two).unwrap(), "api"),
            ],
            None,
        );
        let address = |path: &Path, service| {
            let (found, stored) = sockets.unix(path, service)?.unwrap();
            assert!(!stored);
            Some(
                found
                    .local_addr()
                    .unwrap()
                    .as_pathname()
                    .unwrap()
                    .to_owned(),
            )
        };
        assert_eq!(address(&one, "api"), Some(one.clone()));
        assert_eq!(address(&one, "api"), Some(one.clone()), "again");
        assert_eq!(address(Path::new("/other"), "api"), Some(two.clone()));
        assert_eq!(address(Path::new("/other"), "x"), None);
        assert!(sockets.tcp(&[], "api").is_none(), "another family");
        sockets.settle();
        assert_eq!(sockets.given().len(), 2);
    }

    #[test]
    fn a_stored_socket_counts_as_long_as_its_file_is_there() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("w.sock");
        let listener = UnixListener::bind(&path).unwrap();
        let name = stored_name(file_at(&path).unwrap());
        assert_eq!(stored_file(&name), file_at(&path));
        let sockets = sockets(vec![given(listener, &name)], None);
        std::fs::rename(&path, dir.path().join("elsewhere")).unwrap();
        assert!(sockets.unix(&path, "api").is_none());
        let _other = UnixListener::bind(&path).unwrap();
        assert!(sockets.unix(&path, "api").is_none());
        std::fs::rename(dir.path().join("elsewhere"), &path).unwrap();
        let (_listener, stored) = sockets.unix(&path, "api").unwrap().unwrap();
        assert!(stored);
    }

    #[test]
    fn what_nobody_asks_for_is_let_go() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("w.sock");
        let listener = UnixListener::bind(&path).unwrap();
        let name = stored_name(file_at(&path).unwrap());
        let sockets = sockets(vec![given(listener, &name)], None);
        sockets.settle();
        assert!(!path.exists());
        assert!(sockets.given().is_empty());
    }

    #[test]
    fn systemd_is_given_the_socket_under_the_name_of_its_file() {
        let dir = tempfile::tempdir().unwrap();
        let [store, path] = ["notify", "w.sock"].map(|name| dir.path().join(name));
        let manager = UnixDatagram::bind(&store).unwrap();
        let listener = UnixListener::bind(&path).unwrap();
        assert!(!sockets(Vec::new(), None).keep(&path, &listener));
        let sockets = sockets(Vec::new(), Some(store));
        assert!(sockets.keep(&path, &listener));
        let mut text = [0; 128];
        let mut space = cmsg_space!([RawFd; 1]);
        let mut slices = [io::IoSliceMut::new(&mut text)];
        let message = recvmsg::<()>(
            manager.as_raw_fd(),
            &mut slices,
            Some(&mut space),
            MsgFlags::empty(),
        )
        .unwrap();
        let rights = message.cmsgs().unwrap().next();
        assert!(matches!(rights, Some(ControlMessageOwned::ScmRights(fds)) if fds.len() == 1));
        let length = message.bytes;
        let name = stored_name(file_at(&path).unwrap());
        assert_eq!(
            std::str::from_utf8(&text[..length]).unwrap(),
            format!("FDSTORE=1\nFDNAME={name}\n")
        );
        // The service may start anew within the process.
        assert!(sockets.unix(&path, "api").is_some());
    }

    #[test]
    fn variables_for_another_process_count_for_nothing() {
        let env = |pid: &str| {
            Env::from_iter([
                ("LISTEN_PID", pid),
                ("LISTEN_FDS", "1"),
                ("FDSTORE", "0"),
                ("NOTIFY_SOCKET", "/x"),
            ])
        };
        for pid in ["1", "", "x", "-1"] {
            let sockets = Sockets::of_process(&env(pid));
            assert!(sockets.given().is_empty(), "{pid}");
            assert!(sockets.0.store.is_none());
        }
    }

    #[test]
    fn what_is_no_listening_socket_is_left_alone() {
        let (one, _other) = std::os::unix::net::UnixStream::pair().unwrap();
        let error = taken(one.as_raw_fd(), "x".to_owned()).unwrap_err();
        assert!(error.contains("Accept=no"), "{error}");
        // Still open.
        one.peer_addr().unwrap();
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("w.sock");
        let listener = UnixListener::bind(&path).unwrap();
        let number = std::os::fd::IntoRawFd::into_raw_fd(listener);
        let taken = taken(number, "x".to_owned()).unwrap();
        assert_eq!(taken.address, Address::Unix(path));
    }
}
