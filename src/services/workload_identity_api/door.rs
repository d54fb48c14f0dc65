//! The door: a thread that does nothing but let in who connects.
//!
//! The kernel keeps one queue for all who connect, first come first served. One user who connects faster
//! than it can be answered fills it, and everybody else waits behind, or is turned away (`EAGAIN`). So that
//! queue is emptied at once, whatever else there is to do.

use std::io::{self, ErrorKind};
use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::{UnixListener, UnixStream};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{SocketFlags, accept_with};
use rustix::process::setpriority_process;
use tokio::sync::oneshot;
use tokio::time::Instant;

use super::listener::Bound;
use crate::attest::{Credentials, Peer};
use crate::backoff::{Loudness, Repeated};

/// The pause after a failed accept: descriptors may have run out.
const PAUSE: Timespec = Timespec {
    tv_sec: 0,
    tv_nsec: 100_000_000,
};
/// The pause after one of a crowd came. The next is not far behind it, and would wake this thread, and take the
/// processor from somebody, for itself alone.
const NAP: Timespec = Timespec {
    tv_sec: 0,
    tv_nsec: 300_000,
};
/// The thread's nice value: who floods has many processes, and this one has to be faster than all of them.
pub(super) const PRIORITY: i32 = -15;
/// The thread's stack, in bytes: it calls nothing deep.
const STACK: usize = 128 * 1024;

/// An accepted connection that nothing was done about. Neither kind blocks.
#[derive(Debug)]
pub(super) enum Arrived {
    Local(UnixStream, Credentials),
    Remote(TcpStream),
}

impl Arrived {
    /// The user who connected, if that is known.
    pub(super) fn user(&self) -> Option<u32> {
        match self {
            Self::Local(_, credentials) => Some(credentials.uid),
            Self::Remote(_) => None,
        }
    }

    /// Whether nobody waits for an answer any more.
    pub(super) fn has_left(&self) -> bool {
        match self {
            Self::Local(stream, _) => Peer::has_hung_up(stream),
            Self::Remote(_) => false,
        }
    }
}

/// A door that is open. It closes when this is dropped.
#[derive(Debug)]
pub(super) struct Door {
    /// Its other end hears when this one is closed.
    bell: UnixStream,
    ended: oneshot::Receiver<()>,
}

impl Door {
    /// Starts the thread, which gives everybody who connects to `admit`. That says whether it is one of a crowd.
    pub(super) fn open(
        bound: &Bound,
        mut admit: impl FnMut(Arrived) -> bool + Send + 'static,
    ) -> io::Result<Self> {
        let (bell, rings) = UnixStream::pair()?;
        let (end, ended) = oneshot::channel();
        let entrance = Entrance::of(bound)?;
        std::thread::Builder::new()
            .name("tbot-door".to_owned())
            .stack_size(STACK)
            .spawn(move || {
                // Of this thread alone. Without the right to it, there is only its share.
                let _allowed = setpriority_process(None, PRIORITY);
                entrance.keep(&rings, &mut admit);
                drop(admit);
                // Nobody waits for it if the service was dropped.
                let _told = end.send(());
            })?;
        Ok(Self { bell, ended })
    }

    /// Closes it. Resolves when all who had connected by now are in.
    pub(super) async fn close(self) {
        drop(self.bell);
        // Without an answer, the thread has ended too.
        let _ended = self.ended.await;
    }
}

/// Where they come in. Accepting never waits.
#[derive(Debug)]
enum Entrance {
    Local(UnixListener),
    Remote(TcpListener),
}

impl Entrance {
    fn of(bound: &Bound) -> io::Result<Self> {
        match bound {
            Bound::Unix(socket) => socket.listener().try_clone().map(Self::Local),
            Bound::Tcp(listener) => listener.try_clone().map(Self::Remote),
        }
    }

    fn accept(&self) -> io::Result<Arrived> {
        let accepted = accept_with(
            self.descriptor(),
            SocketFlags::CLOEXEC | SocketFlags::NONBLOCK,
        )?;
        match self {
            Self::Local(_) => {
                let stream = UnixStream::from(accepted);
                let credentials = Credentials::of(&stream)?;
                Ok(Arrived::Local(stream, credentials))
            }
            Self::Remote(_) => Ok(Arrived::Remote(TcpStream::from(accepted))),
        }
    }

    fn descriptor(&self) -> BorrowedFd<'_> {
        match self {
            Self::Local(listener) => listener.as_fd(),
            Self::Remote(listener) => listener.as_fd(),
        }
    }

    /// Lets everybody in until the bell's other end is closed, and then those who had come by then.
    fn keep(&self, rings: &UnixStream, admit: &mut impl FnMut(Arrived) -> bool) {
        let (mut closing, mut crowd) = (false, false);
        let mut failures = Repeated::default();
        loop {
            match self.accept() {
                Ok(arrived) => {
                    failures.recovered();
                    crowd |= admit(arrived);
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    if closing {
                        return;
                    }
                    if std::mem::take(&mut crowd) {
                        closing = rung(&mut [PollFd::new(rings, PollFlags::IN)], Some(&NAP));
                        continue;
                    }
                    let mut either = [
                        PollFd::new(rings, PollFlags::IN),
                        PollFd::from_borrowed_fd(self.descriptor(), PollFlags::IN),
                    ];
                    closing = rung(&mut either, None);
                }
                Err(source) => {
                    if let Loudness::Warn = failures.failed(Instant::now(), &source) {
                        tracing::warn!(%source, "Cannot accept connections to the Workload API");
                    }
                    if closing {
                        return;
                    }
                    closing = rung(&mut [PollFd::new(rings, PollFlags::IN)], Some(&PAUSE));
                }
            }
        }
    }
}

/// Waits for one of `descriptors`; says whether the first of them, the bell, is one.
fn rung(descriptors: &mut [PollFd<'_>], patience: Option<&Timespec>) -> bool {
    match poll(descriptors, patience) {
        Ok(_) => descriptors
            .first()
            .is_some_and(|bell| !bell.revents().is_empty()),
        Err(_) => false,
    }
}

#[cfg(test)]
mod tests {
    use std::net::Shutdown;
    use std::sync::mpsc;

    use super::*;
    use crate::services::Sockets;
    use crate::services::workload_identity_api::listener::Listen;
    use crate::services::workload_identity_api::permissions::Permissions;

    #[tokio::test]
    async fn whoever_had_connected_when_the_door_closes_is_let_in() {
        let home = tempfile::tempdir().unwrap();
        let path = home.path().join("s");
        let listen = Listen::Unix(path.clone());
        let (open, sockets) = (Permissions::default(), Sockets::default());
        let bound = listen.bind(&open, &sockets, "api").await.unwrap();
        let (admit, admitted) = mpsc::channel();
        let admit = move |arrived| admit.send(arrived).is_err();
        let door = Door::open(&bound, admit).unwrap();
        let callers: Vec<_> = (0..300)
            .map(|_| UnixStream::connect(&path).unwrap())
            .collect();
        door.close().await;
        let own = Some(nix::unistd::geteuid().as_raw());
        let users: Vec<_> = admitted.iter().map(|arrived| arrived.user()).collect();
        assert_eq!(users, vec![own; callers.len()]);
    }

    #[tokio::test]
    async fn who_hung_up_is_known_before_anything_is_done_for_it() {
        let home = tempfile::tempdir().unwrap();
        let path = home.path().join("s");
        let listener = UnixListener::bind(&path).unwrap();
        let caller = UnixStream::connect(&path).unwrap();
        let stream = listener.accept().unwrap().0;
        let credentials = Credentials::of(&stream).unwrap();
        let arrived = Arrived::Local(stream, credentials);
        assert!(!arrived.has_left());
        // Not closed: a process that another test starts has a copy for a moment.
        caller.shutdown(Shutdown::Both).unwrap();
        assert!(arrived.has_left());
    }
}
