//! Accepts connections, and pins who made them.

use std::future::poll_fn;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{self, Poll};
use std::time::{Duration, SystemTime};

use bytes::{Buf as _, BytesMut};
use futures_util::FutureExt as _;
use futures_util::future::BoxFuture;
use futures_util::stream::{self, Stream};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpStream, UnixStream};
use tokio::runtime::Handle;
use tokio_util::either::Either;
use tokio_util::sync::CancellationToken;

use super::authority::Watch;
use super::door::{Arrived, Door};
use super::limits::{Limit, Owner, Permit};
use super::listener::Bound;
use crate::attest::Peer;
use crate::clock::Clock;
use crate::crypto::sha256;
use crate::fsx::read_proc;

/// Connections that one user may hold. Each costs two descriptors of this process.
const CONNECTIONS_PER_USER: usize = 4096;
/// The pause after a failed accept: descriptors may have run out.
const PAUSE: Duration = Duration::from_millis(100);
/// What every client sends first: the preface and the header of a SETTINGS frame (RFC 9113 section 3.4),
/// in bytes; and how long it may take over that. HTTP/2 itself looks after the connection only from then on.
const GREETING: usize = 24 + 9;
const GREETING_WITHIN: Duration = Duration::from_secs(10);
/// How many are fetched from the kernel's queue before one of them is looked at.
const AT_ONCE: usize = 64;
/// Connections of one user that are heard for the first time at once.
const HEARD_AT_ONCE: usize = 4;
/// How long such a place stays empty while more come than can be looked at: that is where a flood would
/// take the processor from the others.
const REST: Duration = Duration::from_millis(1);
/// How long the log is quiet of a flood that it told of.
const QUIET: Duration = Duration::from_secs(10);
/// How much is gathered before it is sent, in bytes.
const GATHERED: usize = 16 * 1024;
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
    let text = read_proc(format!("/proc/{pid}/cgroup"), MAX_CGROUPS).ok()?;
    sha256(&text)
        .first_chunk()
        .map(|digest| u64::from_le_bytes(*digest))
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
    /// What is missing of the greeting, and the end of patience with it.
    greeting: Option<(usize, BoxFuture<'static, ()>)>,
    /// Until what it sent on connecting was read.
    heard: Option<Heard>,
    _permit: Permit,
}

/// Accepts at once whoever connects, and lets users take turns at being heard.
struct Arrivals<'a> {
    bound: &'a Bound,
    clock: Clock,
    shutdown: BoxFuture<'static, ()>,
    over: bool,
    /// The rest of the pause after a failed accept.
    pause: Option<BoxFuture<'static, ()>>,
    door: Door,
    /// Those of each user who are being heard.
    heard: Limit,
    connections: Limit,
    /// When the log told of a flood.
    told: Option<SystemTime>,
}

/// Every connection from now on, until the shutdown: the stream ends when all who had connected by
/// then came out of it. A failed accept is waited out.
pub(super) fn accept(
    bound: &Bound,
    clock: Clock,
    shutdown: CancellationToken,
) -> impl Stream<Item = Connection> + use<'_> {
    let arrivals = Arrivals {
        bound,
        clock,
        shutdown: shutdown.cancelled_owned().boxed(),
        over: false,
        pause: None,
        door: Door::default(),
        heard: Limit::new(HEARD_AT_ONCE),
        connections: Limit::new(CONNECTIONS_PER_USER),
        told: None,
    };
    stream::unfold(arrivals, |mut arrivals| async move {
        let connection = poll_fn(|cx| arrivals.poll_next(cx)).await?;
        Some((connection, arrivals))
    })
}

impl Arrivals<'_> {
    fn poll_next(&mut self, cx: &mut task::Context<'_>) -> Poll<Option<Connection>> {
        self.door.watch(cx);
        self.over = self.over || self.shutdown.poll_unpin(cx).is_ready();
        let mut more = false;
        if self.over {
            self.door.close();
        } else if !self.door.is_kept() {
            more = self.fetch(cx);
        }
        if let Some(Owner { user, .. }) = self.door.refused() {
            self.tell(user, "Dropping connections of a user of whom too many wait");
        }
        for _ in 0..AT_ONCE {
            let (heard, door) = (&self.heard, &self.door);
            let Some((arrived, heard)) = door.next(|user| Heard::begin(user, heard, door)) else {
                if self.over && self.door.is_empty() && !self.door.is_kept() {
                    return Poll::Ready(None);
                }
                if more {
                    break;
                }
                return Poll::Pending;
            };
            if let Some(connection) = self.connection(arrived, heard) {
                return Poll::Ready(Some(connection));
            }
        }
        // Not for ever: others have something to do too.
        cx.waker().wake_by_ref();
        Poll::Pending
    }

    /// Fetches those who wait in the kernel's queue; says whether there may be more.
    fn fetch(&mut self, cx: &mut task::Context<'_>) -> bool {
        if let Some(pause) = &mut self.pause {
            if pause.poll_unpin(cx).is_pending() {
                return false;
            }
            self.pause = None;
        }
        for _ in 0..AT_ONCE {
            match accept_one(self.bound, cx) {
                Poll::Pending => return false,
                Poll::Ready(Ok(arrived)) => {
                    self.door.enter(arrived);
                }
                Poll::Ready(Err(source)) => {
                    tracing::warn!(%source, "Cannot accept connections to the Workload API");
                    let clock = self.clock.clone();
                    self.pause = Some(async move { clock.sleep(PAUSE).await }.boxed());
                    return true;
                }
            }
        }
        if let Bound::Unix(socket) = self.bound {
            self.door.keep(socket.plain());
        }
        true
    }

    /// The connection, if it is of any use, and its user may have one more.
    fn connection(&mut self, arrived: Arrived, heard: Heard) -> Option<Connection> {
        if arrived.has_left() {
            return None;
        }
        let (io, caller) = match arrived {
            Arrived::Local(stream) => {
                let pinned = Peer::of(&stream).map_err(|error| error.to_string());
                let ready = pinned.and_then(|peer| {
                    stream
                        .set_nonblocking(true)
                        .and_then(|()| UnixStream::from_std(stream))
                        .map(|stream| (stream, peer))
                        .map_err(|error| error.to_string())
                });
                match ready {
                    Ok((stream, Some(peer))) => {
                        let cgroup = cgroup(peer.pid());
                        let caller = Caller::Process(Arc::new(peer), cgroup);
                        (Either::Left(stream), caller)
                    }
                    Ok((stream, None)) => {
                        tracing::debug!("A caller from another PID namespace stays unattested");
                        (Either::Left(stream), Caller::Unknown)
                    }
                    Err(error) => {
                        tracing::debug!(error, "Dropping a connection");
                        return None;
                    }
                }
            }
            Arrived::Remote(stream) => (Either::Right(stream), Caller::Unknown),
        };
        let Some(permit) = self.connections.take(caller.owner()) else {
            self.tell(
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
            greeting: Some((GREETING, patience.boxed())),
            heard: Some(heard),
            _permit: permit,
        })
    }

    /// Warns of a flood, not of each drop of it.
    fn tell(&mut self, uid: Option<u32>, what: &'static str) {
        let now = self.clock.now();
        let quiet = self.told.is_some_and(|told| now < told + QUIET);
        if !quiet {
            self.told = Some(now);
            tracing::warn!(uid, maximum = CONNECTIONS_PER_USER, "{what}");
        }
    }
}

/// Whoever waits longest in the kernel's queue.
fn accept_one(bound: &Bound, cx: &mut task::Context<'_>) -> Poll<io::Result<Arrived>> {
    match bound {
        Bound::Unix(socket) => match socket.plain().accept() {
            Ok((stream, _)) => Poll::Ready(Ok(Arrived::Local(stream))),
            // This one says when to come again.
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                let (stream, _) = task::ready!(socket.listener().poll_accept(cx))?;
                Poll::Ready(stream.into_std().map(Arrived::Local))
            }
            Err(error) => Poll::Ready(Err(error)),
        },
        Bound::Tcp(listener) => {
            let (stream, _) = task::ready!(listener.poll_accept(cx))?;
            Poll::Ready(Ok(Arrived::Remote(stream)))
        }
    }
}

/// Being heard for the first time. Of each user, so many are at once; it lasts until what was sent on
/// connecting is read, so that none holds up another by saying nothing.
#[derive(Debug)]
struct Heard {
    permit: Option<Permit>,
    door: Door,
}

impl Heard {
    fn begin(user: Option<u32>, limit: &Limit, door: &Door) -> Option<Self> {
        let permit = limit.take(Owner { user, cgroup: None })?;
        Some(Self {
            permit: Some(permit),
            door: door.clone(),
        })
    }
}

impl Drop for Heard {
    fn drop(&mut self) {
        let permit = self.permit.take();
        let door = self.door.clone();
        // What this one asked for stands in the runtime's queue now. The user's next one is heard when that
        // had its turn, and what others wait for; while there are too many, after a moment of rest too.
        let Ok(runtime) = Handle::try_current() else {
            return;
        };
        runtime.spawn(async move {
            if door.is_kept() {
                tokio::time::sleep(REST).await;
            } else {
                tokio::task::yield_now().await;
            }
            drop(permit);
            door.knock();
        });
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
        if let Some((_, patience)) = &mut self.greeting
            && patience.poll_unpin(cx).is_ready()
        {
            return Poll::Ready(Err(io::ErrorKind::TimedOut.into()));
        }
        let before = buf.filled().len();
        let read = Pin::new(&mut self.io).poll_read(cx, buf);
        if read.is_pending() {
            self.heard = None;
        }
        task::ready!(read)?;
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
        if self.waiting.len() >= GATHERED {
            task::ready!(self.poll_send(cx))?;
        }
        self.waiting.extend_from_slice(buf);
        Poll::Ready(Ok(buf.len()))
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut task::Context<'_>) -> Poll<io::Result<()>> {
        self.poll_send(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut task::Context<'_>) -> Poll<io::Result<()>> {
        task::ready!(self.poll_send(cx))?;
        Pin::new(&mut self.io).poll_shutdown(cx)
    }
}
