//! Accepts connections, and pins who made them.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{self, Poll};
use std::time::Duration;

use futures_util::stream::{self, Stream};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpStream, UnixStream};
use tokio_util::either::Either;
use tonic::transport::server::Connected;

use super::authority::Watch;
use super::limits::{Limit, Permit};
use super::listener::Bound;
use crate::attest::Peer;
use crate::clock::Clock;

/// Connections that one user may hold. Each costs two descriptors of this process.
const CONNECTIONS_PER_USER: usize = 4096;
/// The pause after a failed accept: descriptors may have run out.
const PAUSE: Duration = Duration::from_millis(100);

/// Who is at the other end.
#[derive(Debug, Clone)]
pub(super) enum Caller {
    /// A process of this machine, pinned.
    Process(Arc<Peer>),
    /// Somebody whom the kernel cannot name: over TCP, or from another PID namespace.
    Unknown,
}

impl Caller {
    /// The user, if known.
    pub(super) fn user(&self) -> Option<u32> {
        match self {
            Self::Process(peer) => Some(peer.uid()),
            Self::Unknown => None,
        }
    }

    /// Waits until a known process ended.
    pub(super) async fn gone(&self) {
        match self {
            Self::Process(peer) => peer.exited().await,
            Self::Unknown => std::future::pending().await,
        }
    }

    /// The process ID, if known.
    pub(super) fn pid(&self) -> Option<i32> {
        match self {
            Self::Process(peer) => Some(peer.pid()),
            Self::Unknown => None,
        }
    }

    /// Whether a known process still runs, and still the program that it connected with.
    pub(super) fn is_unchanged(&self) -> bool {
        match self {
            Self::Process(peer) => peer.is_unchanged(),
            Self::Unknown => true,
        }
    }
}

/// An accepted connection.
#[derive(Debug)]
pub(super) struct Connection {
    io: Either<UnixStream, TcpStream>,
    watch: Watch,
    caller: Caller,
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
            match next(bound, &limit).await {
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
async fn next(bound: &Bound, limit: &Limit) -> io::Result<Option<Connection>> {
    let (io, caller) = match bound {
        Bound::Unix(socket) => {
            let (stream, _) = socket.listener().accept().await?;
            let caller = match Peer::of(&stream) {
                Ok(Some(peer)) => Caller::Process(Arc::new(peer)),
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
    let Some(permit) = limit.take(caller.user()) else {
        tracing::warn!(
            uid = caller.user(),
            maximum = CONNECTIONS_PER_USER,
            "Dropping a connection: its user holds too many"
        );
        return Ok(None);
    };
    Ok(Some(Connection {
        io,
        watch: Watch::new(),
        caller,
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
        let before = buf.filled().len();
        task::ready!(Pin::new(&mut self.io).poll_read(cx, buf))?;
        if let Some(arrived) = buf.filled_mut().get_mut(before..) {
            self.watch.look(arrived);
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
