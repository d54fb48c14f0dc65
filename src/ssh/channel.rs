//! One channel of a connection: bytes both ways, within the windows (RFC 4254 section 5).

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream, ReadHalf, WriteHalf};
use tokio::sync::{mpsc, watch};

use super::packet::{Incoming, Outgoing};
use super::{Connection, ConnectionError, Stream, message};
use crate::crypto::ssh_wire::{Reader, Writer};

/// How much the peer may send before it hears that it was read, in bytes.
pub(crate) const WINDOW: u32 = 1024 * 1024;
/// The most that is sent or taken in one packet, in bytes.
pub(crate) const CHUNK: u32 = 32 * 1024;

/// The one channel of a connection. This side's number of it is 0.
#[derive(Debug)]
pub(crate) struct Channel {
    /// The peer's number of it.
    pub(crate) number: u32,
    /// How much the peer takes at first, in bytes.
    pub(crate) window: u32,
    /// How much it takes in a packet, in bytes.
    pub(crate) chunk: u32,
}

impl Channel {
    /// Carries bytes both ways until one side ends.
    pub(crate) async fn run<S: Stream>(
        self,
        connection: Connection<S>,
        stream: DuplexStream,
    ) -> Result<(), ConnectionError> {
        let Connection { incoming, outgoing } = connection;
        let (read, write) = tokio::io::split(stream);
        let (replies, to_send) = mpsc::channel(16);
        let (window, taken) = watch::channel(u64::from(self.window));
        tokio::select! {
            ended = receive(incoming, write, replies, &window) => ended,
            ended = self.send(outgoing, read, to_send, taken) => ended,
        }
    }

    /// Sends what the stream's owner writes as far as the peer's window allows, and `replies`.
    async fn send<S: Stream>(
        &self,
        mut outgoing: Outgoing<WriteHalf<S>>,
        mut stream: ReadHalf<DuplexStream>,
        mut replies: mpsc::Receiver<Reply>,
        mut window: watch::Receiver<u64>,
    ) -> Result<(), ConnectionError> {
        let mut sent = 0_u64;
        let mut buffer = vec![0; usize::try_from(self.chunk).unwrap_or_default()];
        loop {
            // What was granted so far, less what was sent: neither is ever taken back.
            let open = window.borrow_and_update().saturating_sub(sent);
            let room = usize::try_from(open)
                .unwrap_or(buffer.len())
                .min(buffer.len());
            let (space, _) = buffer.split_at_mut(room);
            let packet = tokio::select! {
                reply = replies.recv() => match reply {
                    Some(reply) => reply.message(self.number),
                    None => return Ok(()),
                },
                changed = window.changed() => match changed {
                    Ok(()) => continue,
                    Err(_gone) => return Ok(()),
                },
                read = stream.read(space), if room > 0 => {
                    let count = read?;
                    if count == 0 {
                        let close = Writer::message(message::CLOSE).u32(self.number);
                        return Ok(outgoing.send(&close.0).await?);
                    }
                    sent += u64::try_from(count).unwrap_or_default();
                    let data = space.get(..count).unwrap_or_default();
                    Writer::message(message::DATA).u32(self.number).string(data)
                }
            };
            outgoing.send(&packet.0).await?;
        }
    }
}

/// What the receiving half has the sending half say.
#[derive(Debug)]
enum Reply {
    /// So many bytes were read.
    Taken(u32),
    /// A request of the peer's that is not known here.
    GlobalFailure,
    ChannelFailure,
    OpenFailure(u32),
}

impl Reply {
    fn message(self, channel: u32) -> Writer {
        match self {
            Self::Taken(count) => Writer::message(message::WINDOW_ADJUST)
                .u32(channel)
                .u32(count),
            Self::GlobalFailure => Writer::message(message::REQUEST_FAILURE),
            Self::ChannelFailure => Writer::message(message::CHANNEL_FAILURE).u32(channel),
            // Reason 1: prohibited.
            Self::OpenFailure(theirs) => Writer::message(message::CHANNEL_OPEN_FAILURE)
                .u32(theirs)
                .u32(1)
                .string("")
                .string(""),
        }
    }
}

/// Hands what the peer sends to the stream's owner. A peer that is not listened to is held up by
/// its window.
async fn receive<S: Stream>(
    mut incoming: Incoming<ReadHalf<S>>,
    mut stream: WriteHalf<DuplexStream>,
    replies: mpsc::Sender<Reply>,
    window: &watch::Sender<u64>,
) -> Result<(), ConnectionError> {
    let mut open = WINDOW;
    loop {
        let packet = incoming.packet().await?;
        let mut reader = Reader(&packet);
        let reply = match reader.byte()? {
            kind @ (message::DATA | message::EXTENDED_DATA) => {
                let _ours = reader.u32()?;
                if kind == message::EXTENDED_DATA {
                    let _stderr = reader.u32()?;
                }
                let data = reader.string()?;
                let count = u32::try_from(data.len()).unwrap_or(u32::MAX);
                open = open
                    .checked_sub(count)
                    .ok_or(ConnectionError::Unexpected("more than it may send"))?;
                if kind == message::DATA {
                    stream.write_all(data).await?;
                }
                if open > WINDOW / 2 {
                    continue;
                }
                let taken = WINDOW - open;
                open = WINDOW;
                Reply::Taken(taken)
            }
            message::WINDOW_ADJUST => {
                let _ours = reader.u32()?;
                let more = u64::from(reader.u32()?);
                window.send_modify(|window| *window = window.saturating_add(more));
                continue;
            }
            message::GLOBAL_REQUEST => {
                let _name = reader.string()?;
                if !reader.flag()? {
                    continue;
                }
                Reply::GlobalFailure
            }
            message::CHANNEL_REQUEST => {
                let _ours = reader.u32()?;
                let _name = reader.string()?;
                if !reader.flag()? {
                    continue;
                }
                Reply::ChannelFailure
            }
            message::CHANNEL_OPEN => {
                let _kind = reader.string()?;
                Reply::OpenFailure(reader.u32()?)
            }
            // It has nothing more to say; it may still want to hear the rest.
            message::EOF => {
                stream.shutdown().await?;
                continue;
            }
            message::CLOSE | message::DISCONNECT => return Ok(()),
            // New keys in the middle of a connection are not made here: a new connection has some.
            message::KEXINIT => return Err(ConnectionError::Unexpected("it wants new keys")),
            _ => continue,
        };
        if replies.send(reply).await.is_err() {
            return Ok(());
        }
    }
}
