//! Accepts connections, and pins who made them.

use std::io::{self, Read as _};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{self, Poll};
use std::time::Duration;

use futures_util::FutureExt as _;
use futures_util::future::BoxFuture;
use futures_util::stream::{self, Stream};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpStream, UnixStream};
use tokio_util::either::Either;
use tonic::transport::server::Connected;

use super::authority::Watch;
use super::limits::{Limit, Owner, Permit};
use super::listener::Bound;
use crate::attest::Peer;
use crate::clock::Clock;
use crate::crypto::sha256;

/// Connections that one user may hold. Each costs two descriptors of this process.
const CONNECTIONS_PER_USER: usize = 4096;
/// The pause after a failed accept: descriptors may have run out.
const PAUSE: Duration = Duration::from_millis(100);
/// What every client sends first: the preface and the header of a SETTINGS frame (RFC 9113 section 3.4),
/// in bytes; and how long it may take over that. HTTP/2 itself looks after the connection only from then on.
const GREETING: usize = 24 + 9;
const GREETING_WITHIN: Duration = Duration::from_secs(10);
/// The part of a process's list of cgroups that is looked at, in bytes.
const MAX_CGROUPS: u64 = 16 * 1024;

/// Who is at the other end.
#[derive(Debug, Clone)]
pub(super) enum Caller {
    /// A process of this machine, pinned, and its cgroup at connect as a digest.
    Process(Arc<Peer>, Option<u64>),
    /// Somebody whom the kernel cannot name: over TCP, or from another PID namespace.
    Unknown,
}

impl Caller {
    /// The user, if known.
    pub(super) fn user(&self) -> Option<u32> {
        self.owner().user
    }

    /// Whom its connections and calls count for.
    pub(super) fn owner(&self) -> Owner {
        match self {
            Self::Process(peer, cgroup) => Owner {
                user: Some(peer.uid()),
                cgroup: *cgroup,
            },
            Self::Unknown => Owner::default(),
        }
    }

    /// Waits until a known process ended.
    pub(super) async fn gone(&self) {
        match self {
            Self::Process(peer, _) => peer.exited().await,
            Self::Unknown => std::future::pending().await,
        }
    }

    /// The process ID, if known.
    pub(super) fn pid(&self) -> Option<i32> {
        match self {
            Self::Process(peer, _) => Some(peer.pid()),
            Self::Unknown => None,
        }
    }

    /// Whether a known process still runs, and still the program that it connected with.
    pub(super) fn is_unchanged(&self) -> bool {
        match self {
            Self::Process(peer, _) => peer.is_unchanged(),
            Self::Unknown => true,
        }
    }
}

/// A digest of the cgroups that a process is in. They are as good as their names: whoever may make
/// cgroups may have many.
fn cgroup(pid: i32) -> Option<u64> {
    let mut text = Vec::new();
    let file = std::fs::File::open(format!("/proc/{pid}/cgroup")).ok()?;
    file.take(MAX_CGROUPS).read_to_end(&mut text).ok()?;
    sha256(&text)
        .first_chunk()
        .map(|digest| u64::from_le_bytes(*digest))
}

/// An accepted connection.
pub(super) struct Connection {
    io: Either<UnixStream, TcpStream>,
    watch: Watch,
    caller: Caller,
    /// What is missing of the greeting, and the end of patience with it.
    greeting: Option<(usize, BoxFuture<'static, ()>)>,
    _permit: Permit,
}

/// Every connection from now on. A failed accept is waited out: the stream never ends.
pub(super) fn accept(
    bound: &Bound,
    clock: Clock,
) -> impl Stream<Item = io::Result<Connection>> + use<'_> {
    let limit = Limit::new(CONNECTIONS_PER_USER);
    stream::unfold((limit, clock), move |(limit, clock)| async move {
        loop {
            match next(bound, &limit, &clock).await {
                Ok(Some(connection)) => return Some((Ok(connection), (limit, clock))),
                Ok(None) => {}
                Err(source) => {
                    tracing::warn!(%source, "Cannot accept connections to the Workload API");
                    clock.sleep(PAUSE).await;
                }
            }
        }
    })
}

/// The next connection; `None` for one that is of no use.
async fn next(bound: &Bound, limit: &Limit, clock: &Clock) -> io::Result<Option<Connection>> {
    let (io, caller) = match bound {
        Bound::Unix(socket) => {
            let (stream, _) = socket.listener().accept().await?;
            let caller = match Peer::of(&stream) {
                Ok(Some(peer)) => {
                    let cgroup = cgroup(peer.pid());
                    Caller::Process(Arc::new(peer), cgroup)
                }
                Ok(None) => {
                    tracing::debug!("A caller from another PID namespace stays unattested");
                    Caller::Unknown
                }
                Err(error) => {
                    tracing::debug!(%error, "Dropping a connection");
                    return Ok(None);
                }
            };
            (Either::Left(stream), caller)
        }
        Bound::Tcp(listener) => {
            let (stream, _) = listener.accept().await?;
            (Either::Right(stream), Caller::Unknown)
        }
    };
    let Some(permit) = limit.take(caller.owner()) else {
        tracing::warn!(
            uid = caller.user(),
            maximum = CONNECTIONS_PER_USER,
            "Dropping a connection: its user holds too many"
        );
        return Ok(None);
    };
    let clock = clock.clone();
    let patience = async move { clock.sleep(GREETING_WITHIN).await };
    Ok(Some(Connection {
        io,
        watch: Watch::new(),
        caller,
        greeting: Some((GREETING, patience.boxed())),
        _permit: permit,
    }))
}

impl Connection {
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
}

impl Connected for Connection {
    type ConnectInfo = Caller;

    fn connect_info(&self) -> Caller {
        self.caller.clone()
    }
}

impl AsyncRead for Connection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut task::Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if let Some((_, patience)) = &mut self.greeting
            && patience.poll_unpin(cx).is_ready()
        {
            return Poll::Ready(Err(io::ErrorKind::TimedOut.into()));
        }
        let before = buf.filled().len();
        task::ready!(Pin::new(&mut self.io).poll_read(cx, buf))?;
        if let Some(arrived) = buf.filled_mut().get_mut(before..) {
            self.watch.look(arrived);
            if let Some((missing, _)) = &mut self.greeting {
                *missing = missing.saturating_sub(arrived.len());
            }
        }
        if matches!(self.greeting, Some((0, _))) {
            self.greeting = None;
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
        self.same_caller()?;
        Pin::new(&mut self.io).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut task::Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut task::Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(cx)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut task::Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.same_caller()?;
        Pin::new(&mut self.io).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }
}
