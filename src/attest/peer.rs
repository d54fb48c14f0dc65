//! The process at the other end of a unix socket, pinned when its connection was accepted.
//!
//! A process ID alone names whoever holds it *now*. The pidfd taken here names one process for
//! good: as long as it reports that the process lives, `/proc/<pid>` and every answer about that
//! ID are about the process that connected.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::OnceLock;

use nix::errno::Errno;
use nix::sys::socket::getsockopt;
use nix::sys::socket::sockopt::{PeerCredentials, PeerPidfd};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::net::UnixStream;

/// Why a peer could not be pinned. The connection is of no use then.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PeerError {
    /// The process ended before it could be looked at.
    #[error("process {pid} ended before it could be identified")]
    Gone {
        /// Its former process ID.
        pid: i32,
    },
    /// The kernel refused to say who connected, or to give a handle on that process.
    #[error("cannot identify the process at the other end: {action}: {source}")]
    Unknown {
        /// The system call.
        action: &'static str,
        /// The cause.
        #[source]
        source: io::Error,
    },
}

/// A process that connected, pinned by a pidfd. IDs are those of the moment of `connect(2)`.
#[derive(Debug)]
pub struct Peer {
    pid: i32,
    uid: u32,
    gid: u32,
    pidfd: AsyncFd<OwnedFd>,
}

impl Peer {
    /// Pins the process that connected `stream`. `None` means that the kernel cannot name it: it
    /// lives in another PID namespace.
    ///
    /// Must run inside the runtime that will wait for the peer.
    pub fn of(stream: &UnixStream) -> Result<Option<Self>, PeerError> {
        let credentials = getsockopt(stream, PeerCredentials).map_err(unknown("SO_PEERCRED"))?;
        let pid = credentials.pid();
        if pid <= 0 {
            return Ok(None);
        }
        let pidfd = match getsockopt(stream, PeerPidfd) {
            Ok(pidfd) => pidfd,
            // Linux before 6.5 has no such option.
            Err(Errno::ENOPROTOOPT) => {
                tell_fallback();
                open_checked(pid)?
            }
            // The process is reaped (kernels before 6.16), so nothing can be told about it.
            Err(Errno::ESRCH | Errno::EINVAL | Errno::ENODATA) => {
                return Err(PeerError::Gone { pid });
            }
            Err(source) => return Err(unknown("SO_PEERPIDFD")(source)),
        };
        Self::pinned(pid, credentials.uid(), credentials.gid(), pidfd).map(Some)
    }

    /// Pins a running process by its ID, for callers that know it is the right one.
    pub fn open(pid: i32, uid: u32, gid: u32) -> Result<Self, PeerError> {
        Self::pinned(pid, uid, gid, open_checked(pid)?)
    }

    #[expect(
        deprecated,
        reason = "the replacement is unsafe only for types whose descriptor may change; an OwnedFd \
                  keeps one open for its whole life, and this crate has no unsafe code"
    )]
    fn pinned(pid: i32, uid: u32, gid: u32, pidfd: OwnedFd) -> Result<Self, PeerError> {
        let pidfd = AsyncFd::with_interest(pidfd, Interest::READABLE).map_err(|source| {
            PeerError::Unknown {
                action: "epoll on a pidfd",
                source,
            }
        })?;
        Ok(Self {
            pid,
            uid,
            gid,
            pidfd,
        })
    }

    /// The process ID.
    pub fn pid(&self) -> i32 {
        self.pid
    }

    /// The effective user ID at connect.
    pub fn uid(&self) -> u32 {
        self.uid
    }

    /// The effective group ID at connect.
    pub fn gid(&self) -> u32 {
        self.gid
    }

    /// The handle itself, for calls that take one instead of an ID.
    pub fn pidfd(&self) -> &OwnedFd {
        self.pidfd.get_ref()
    }

    /// Whether the process still runs. What was read about its ID before a `true` was about it.
    pub fn is_alive(&self) -> bool {
        !has_exited(self.pidfd.get_ref())
    }

    /// Waits until the process has ended.
    pub async fn exited(&self) {
        loop {
            match self.pidfd.readable().await {
                Ok(mut guard) => {
                    if !self.is_alive() {
                        return;
                    }
                    guard.clear_ready();
                }
                // The runtime is shutting down: nobody is left to be served.
                Err(_) => return,
            }
        }
    }
}

/// A pidfd becomes readable when its process ends. A failing poll counts as ended.
fn has_exited(pidfd: &OwnedFd) -> bool {
    let mut fds = [PollFd::new(pidfd, PollFlags::IN)];
    let now = Timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    loop {
        match poll(&mut fds, Some(&now)) {
            Ok(ready) => return ready > 0,
            Err(rustix::io::Errno::INTR) => {}
            Err(_) => return true,
        }
    }
}

/// Opens a pidfd by ID and checks by the start time that the ID named one process all the while.
fn open_checked(pid: i32) -> Result<OwnedFd, PeerError> {
    let gone = || PeerError::Gone { pid };
    let before = start_time(pid).ok_or_else(gone)?;
    let id = Pid::from_raw(pid).ok_or_else(gone)?;
    let pidfd = pidfd_open(id, PidfdFlags::empty()).map_err(|source| match source {
        rustix::io::Errno::SRCH => gone(),
        other => PeerError::Unknown {
            action: "pidfd_open",
            source: other.into(),
        },
    })?;
    if start_time(pid) != Some(before) || has_exited(&pidfd) {
        return Err(gone());
    }
    Ok(pidfd)
}

/// Field 22 of `/proc/<pid>/stat`: clock ticks from boot to the start of the process.
fn start_time(pid: i32) -> Option<u64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    parse_start_time(&stat)
}

fn parse_start_time(stat: &str) -> Option<u64> {
    // The command name stands in parentheses and may hold anything, parentheses included.
    let (_, rest) = stat.rsplit_once(')')?;
    rest.split_ascii_whitespace().nth(19)?.parse().ok()
}

fn tell_fallback() {
    static TOLD: OnceLock<()> = OnceLock::new();
    TOLD.get_or_init(|| {
        tracing::warn!(
            "This kernel has no SO_PEERPIDFD (Linux 6.5): callers are pinned by pidfd_open and \
             their start time instead"
        );
    });
}

fn unknown(action: &'static str) -> impl Fn(Errno) -> PeerError {
    move |source| PeerError::Unknown {
        action,
        source: source.into(),
    }
}

impl AsFd for Peer {
    fn as_fd(&self) -> std::os::fd::BorrowedFd<'_> {
        self.pidfd.get_ref().as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn start_times_survive_odd_command_names() {
        let fields = "S 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 4242 20";
        for name in ["cat", "a b", "((x) y)", ") S 1 ("] {
            let stat = format!("77 ({name}) {fields}");
            assert_eq!(parse_start_time(&stat), Some(4242), "{name}");
        }
        for bad in [
            "",
            "77 cat S",
            "77 (cat) S 1 2",
            "77 (cat) S 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 x",
        ] {
            assert_eq!(parse_start_time(bad), None, "{bad}");
        }
    }

    #[tokio::test]
    async fn the_other_end_of_a_socket_is_pinned() {
        let (ours, _theirs) = UnixStream::pair().unwrap();
        let peer = Peer::of(&ours).unwrap().unwrap();
        assert_eq!(peer.pid(), i32::try_from(std::process::id()).unwrap());
        assert_eq!(peer.uid(), nix::unistd::geteuid().as_raw());
        assert_eq!(peer.gid(), nix::unistd::getegid().as_raw());
        assert!(peer.is_alive());
    }

    #[tokio::test]
    async fn an_exit_is_noticed() {
        let mut child = tokio::process::Command::new("cat")
            .stdin(std::process::Stdio::piped())
            .stdout(std::process::Stdio::null())
            .spawn()
            .unwrap();
        let pid = i32::try_from(child.id().unwrap()).unwrap();
        let peer = Peer::open(pid, 0, 0).unwrap();
        assert!(peer.is_alive());
        drop(child.stdin.take());
        peer.exited().await;
        assert!(!peer.is_alive());
        child.wait().await.unwrap();
        assert!(!peer.is_alive(), "a reaped process stays dead");
        assert!(matches!(Peer::open(pid, 0, 0), Err(PeerError::Gone { .. })));
    }
}
