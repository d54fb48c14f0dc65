//! Connections, and who made them, pinned.

use std::io;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{self, Poll};
use std::time::{Duration, SystemTime};

use bytes::{Buf as _, BytesMut};
use futures_util::FutureExt as _;
use futures_util::future::BoxFuture;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpStream, UnixStream};
use tokio_util::either::Either;

use super::authority::Watch;
use super::door::Arrived;
use super::pace;
use crate::attest::{Limit, Owner, Peer, Peers, Permit};
use crate::clock::Clock;

/// Connections that one user may hold. Each costs a descriptor of this process, and each
/// process that has some costs two.
const CONNECTIONS_PER_USER: usize = 4096;
/// What every client sends first: the preface and the header of a SETTINGS frame (RFC 9113 section 3.4),
/// in bytes; and how long it may take over that. HTTP/2 itself looks after the connection only from then on.
const GREETING: usize = 24 + 9;
const GREETING_WITHIN: Duration = Duration::from_secs(10);
/// How long the log is quiet of a flood that it told of.
const QUIET: Duration = Duration::from_secs(10);
/// How much is gathered before it is sent, in bytes.
const GATHERED: usize = 16 * 1024;

/// Who is at the other end.
#[derive(Debug, Clone)]
pub(super) enum Caller {
    /// A process of this machine, pinned.
    Process(Arc<Peer>),
    /// Somebody whom the kernel cannot name: over TCP, or from another PID namespace. In the latter case, it
    /// tells the user for whom it counts.
    Unknown(Owner),
}

impl Caller {
    /// The user, if known.
    pub(super) fn user(&self) -> Option<u32> {
        self.owner().user
    }

    /// Whom its connections and calls count for.
    pub(super) fn owner(&self) -> Owner {
        match self {
            Self::Process(peer) => peer.owner(),
            Self::Unknown(owner) => *owner,
        }
    }

    /// Waits until a known process ended.
    pub(super) async fn gone(&self) {
        match self {
            Self::Process(peer) => peer.exited().await,
            Self::Unknown(_) => std::future::pending().await,
        }
    }

    /// The process ID, if known.
    pub(super) fn pid(&self) -> Option<i32> {
        match self {
            Self::Process(peer) => Some(peer.pid()),
            Self::Unknown(_) => None,
        }
    }

    /// Whether a known process still runs, and still the program that it connected with.
    pub(super) fn is_unchanged(&self) -> bool {
        match self {
            Self::Process(peer) => peer.is_unchanged(),
            Self::Unknown(_) => true,
        }
    }
}

/// An accepted connection.
pub(super) struct Connection {
    io: Either<UnixStream, TcpStream>,
    /// What HTTP/2 wants sent, until it says that this is all for now. Gathered here, as it then copies
    /// messages of up to 1 KiB: headers, message and trailers of a JWT-SVID go out in one system call
    /// with one look at the caller, not in two.
    waiting: BytesMut,
    watch: Watch,
    caller: Caller,
    greeting: Greeting,
    _permit: Permit,
}

/// How far the first words between client and server are. Clients do not wait for the server's with theirs
/// (RFC 9113 section 3.4), and many send a call with them. So the server's go out with what answers all of that:
/// one system call, and one time for the client to wake up.
enum Greeting {
    /// How many bytes of the client's are missing, and the end of patience with it.
    Missing(usize, BoxFuture<'static, ()>),
    /// The calls that came with it have their turn now.
    Heard,
    Answered,
}

/// Turns those who arrived into connections, as many as each user may hold.
#[derive(Debug)]
pub(super) struct Arrivals {
    clock: Clock,
    connections: Limit,
    /// When the log told of a flood.
    told: Mutex<Option<SystemTime>>,
}

impl Arrivals {
    pub(super) fn new(clock: Clock) -> Self {
        Self {
            clock,
            connections: Limit::new(CONNECTIONS_PER_USER),
            told: Mutex::default(),
        }
    }

    /// The connection, if it is of any use, and its user may have one more. Must run inside the runtime
    /// that will serve it.
    pub(super) fn connection(&self, arrived: Arrived, peers: &mut Peers) -> Option<Connection> {
        if arrived.has_left() {
            return None;
        }
        let (io, caller) = match pinned(arrived, peers) {
            Ok(pinned) => pinned,
            Err(error) => {
                tracing::debug!(error, "Dropping a connection");
                return None;
            }
        };
        let Some(permit) = self.connections.take(caller.owner()) else {
            self.dropping(
                caller.user(),
                "Dropping connections of a user, or of a cgroup, that holds too many",
            );
            return None;
        };
        let clock = self.clock.clone();
        let patience = async move { clock.sleep(GREETING_WITHIN).await };
        Some(Connection {
            io,
            waiting: BytesMut::new(),
            watch: Watch::new(),
            caller,
            greeting: Greeting::Missing(GREETING, patience.boxed()),
            _permit: permit,
        })
    }

    /// Warns of a flood, not of each drop of it.
    pub(super) fn dropping(&self, uid: Option<u32>, what: &'static str) {
        let now = self.clock.now();
        let mut told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
        if told.is_none_or(|told| now >= told + QUIET) {
            *told = Some(now);
            tracing::warn!(uid, maximum = CONNECTIONS_PER_USER, "{what}");
        }
    }
}

/// Who connected, pinned, and the stream as this runtime waits for it.
fn pinned(
    arrived: Arrived,
    peers: &mut Peers,
) -> Result<(Either<UnixStream, TcpStream>, Caller), String> {
    let problem = |error: io::Error| error.to_string();
    match arrived {
        Arrived::Local(stream, credentials) => {
            let peer = peers.pin(&stream, credentials);
            let caller = match peer.map_err(|error| error.to_string())? {
                Some(peer) => Caller::Process(peer),
                None => {
                    tracing::debug!("A caller from another PID namespace stays unattested");
                    Caller::Unknown(Owner {
                        user: Some(credentials.uid),
                        cgroup: None,
                    })
                }
            };
            let stream = UnixStream::from_std(stream).map_err(problem)?;
            Ok((Either::Left(stream), caller))
        }
        Arrived::Remote(stream) => {
            // Without it, the end of an answer may wait for the client's system to confirm its beginning.
            let _quick = stream.set_nodelay(true);
            let stream = TcpStream::from_std(stream).map_err(problem)?;
            Ok((Either::Right(stream), Caller::Unknown(Owner::default())))
        }
    }
}

impl Connection {
    /// Who made it.
    pub(super) fn caller(&self) -> &Caller {
        &self.caller
    }

    /// Whatever waited here to be sent was for the program that connected, and for no other.
    fn same_caller(&self) -> io::Result<()> {
        if self.caller.is_unchanged() {
            return Ok(());
        }
        tracing::debug!(
            pid = self.caller.pid(),
            "Closing a connection: its process has ended, or runs another program"
        );
        Err(io::ErrorKind::ConnectionAborted.into())
    }

    /// Sends what waits, to the program that connected and to no other.
    fn poll_send(&mut self, cx: &mut task::Context<'_>) -> Poll<io::Result<()>> {
        while !self.waiting.is_empty() {
            self.same_caller()?;
            let sent = task::ready!(Pin::new(&mut self.io).poll_write(cx, &self.waiting))?;
            if sent == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            self.waiting.advance(sent);
        }
        // Connections are idle most of the time, and keep no room for then.
        self.waiting = BytesMut::new();
        Pin::new(&mut self.io).poll_flush(cx)
    }
}

impl AsyncRead for Connection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut task::Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if let Greeting::Missing(_, patience) = &mut self.greeting
            && patience.poll_unpin(cx).is_ready()
        {
            return Poll::Ready(Err(io::ErrorKind::TimedOut.into()));
        }
        pace::worked();
        let before = buf.filled().len();
        task::ready!(Pin::new(&mut self.io).poll_read(cx, buf))?;
        if let Some(arrived) = buf.filled_mut().get_mut(before..) {
            self.watch.look(arrived);
            if let Greeting::Missing(missing, _) = &mut self.greeting {
                *missing = missing.saturating_sub(arrived.len());
            }
        }
        if matches!(self.greeting, Greeting::Missing(0, _)) {
            self.greeting = Greeting::Heard;
        }
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Connection {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut task::Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        if self.waiting.len() >= GATHERED {
            task::ready!(self.poll_send(cx))?;
        }
        self.waiting.extend_from_slice(buf);
        Poll::Ready(Ok(buf.len()))
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut task::Context<'_>) -> Poll<io::Result<()>> {
        match self.greeting {
            Greeting::Missing(..) => return Poll::Ready(Ok(())),
            Greeting::Heard => {
                self.greeting = Greeting::Answered;
                cx.waker().wake_by_ref();
                return Poll::Ready(Ok(()));
            }
            Greeting::Answered => {}
        }
        self.poll_send(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut task::Context<'_>) -> Poll<io::Result<()>> {
        task::ready!(self.poll_send(cx))?;
        Pin::new(&mut self.io).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read as _, Write as _};
    use std::os::unix::net::UnixStream;

    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    use super::*;
    use crate::attest::Credentials;

    #[tokio::test]
    async fn what_is_said_first_waits_for_the_greeting_and_goes_out_with_the_first_answer() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        theirs.set_nonblocking(true).unwrap();
        let credentials = Credentials::of(&ours).unwrap();
        let arrived = Arrived::Local(ours, credentials);
        let arrivals = Arrivals::new(Clock::system());
        let mut connection = arrivals.connection(arrived, &mut Peers::default()).unwrap();
        let mut heard = [0; 64];
        connection.write_all(b"settings").await.unwrap();
        connection.flush().await.unwrap();
        for part in [GREETING - 1, 1] {
            assert!(theirs.read(&mut heard).is_err(), "{part}");
            theirs.write_all(&vec![b'x'; part]).unwrap();
            let mut read = vec![0; part];
            connection.read_exact(&mut read).await.unwrap();
            connection.flush().await.unwrap();
        }
        assert!(theirs.read(&mut heard).is_err(), "calls have their turn");
        connection.write_all(b"answer").await.unwrap();
        connection.flush().await.unwrap();
        let count = theirs.read(&mut heard).unwrap();
        assert_eq!(&heard[..count], b"settingsanswer");
        connection.write_all(b"more").await.unwrap();
        connection.flush().await.unwrap();
        let count = theirs.read(&mut heard).unwrap();
        assert_eq!(&heard[..count], b"more", "at once from then on");
    }
}
