//! Reaching the auth service through a proxy whose ports do not tell protocols apart: a channel of
//! an SSH connection to the proxy's tunnel port (upstream `lib/reversetunnelclient/transport.go`).
//!
//! The client is a small one of our own, for the one provider of cryptography that this program
//! has; `docs/adr/0009-ssh-tunnel.md` tells why. What goes through the channel is TLS with the auth
//! service, end to end: this layer is only let through by the proxy, nothing is entrusted to it.

mod handshake;
mod packet;

use std::io;
use std::time::Duration;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream, ReadHalf, WriteHalf};
use tokio::sync::{mpsc, watch};
use tokio::time::timeout;

use super::dial::BoxedIo;
use crate::clock::Clock;
use crate::crypto::PrivateKey;
use crate::crypto::ssh::{SshError, wire_of_line};
use crate::crypto::ssh_wire::{Reader, Writer};
use handshake::{Connection, expect};
use packet::{Incoming, Outgoing};

/// From the first byte to the open channel.
const OPEN: Duration = Duration::from_secs(20);
/// For the reason of a refusal to arrive after it.
const REASON: Duration = Duration::from_secs(2);
/// How much the peer may send before it hears that it was read, in bytes.
const WINDOW: u32 = 1024 * 1024;
/// The most that is sent or taken in one packet, in bytes.
const CHUNK: u32 = 32 * 1024;
/// What is asked of the proxy: any of the cluster's auth services.
const DESTINATION: &str = r#"{"address":"@remote-auth-server","conn_type":""}"#;

/// Message numbers (RFC 4250 section 4.1).
mod message {
    pub(super) const DISCONNECT: u8 = 1;
    pub(super) const IGNORE: u8 = 2;
    pub(super) const UNIMPLEMENTED: u8 = 3;
    pub(super) const DEBUG: u8 = 4;
    pub(super) const SERVICE_REQUEST: u8 = 5;
    pub(super) const SERVICE_ACCEPT: u8 = 6;
    pub(super) const EXT_INFO: u8 = 7;
    pub(super) const KEXINIT: u8 = 20;
    pub(super) const NEW_KEYS: u8 = 21;
    pub(super) const ECDH_INIT: u8 = 30;
    pub(super) const ECDH_REPLY: u8 = 31;
    pub(super) const USERAUTH_REQUEST: u8 = 50;
    pub(super) const USERAUTH_FAILURE: u8 = 51;
    pub(super) const USERAUTH_SUCCESS: u8 = 52;
    pub(super) const BANNER: u8 = 53;
    pub(super) const GLOBAL_REQUEST: u8 = 80;
    pub(super) const REQUEST_FAILURE: u8 = 82;
    pub(super) const CHANNEL_OPEN: u8 = 90;
    pub(super) const CHANNEL_OPENED: u8 = 91;
    pub(super) const CHANNEL_OPEN_FAILURE: u8 = 92;
    pub(super) const WINDOW_ADJUST: u8 = 93;
    pub(super) const DATA: u8 = 94;
    pub(super) const EXTENDED_DATA: u8 = 95;
    pub(super) const EOF: u8 = 96;
    pub(super) const CLOSE: u8 = 97;
    pub(super) const CHANNEL_REQUEST: u8 = 98;
    pub(super) const CHANNEL_SUCCESS: u8 = 99;
    pub(super) const CHANNEL_FAILURE: u8 = 100;
}

/// What the bot shows to the proxy, and whom it believes there.
#[derive(Debug, Clone)]
pub(crate) struct SshIdentity {
    clock: Clock,
    key: PrivateKey,
    /// The bot's certificate in its binary form.
    certificate: Vec<u8>,
    /// Keys of the cluster's authorities in their binary forms.
    authorities: Vec<Vec<u8>>,
}

impl SshIdentity {
    /// From the parts of an identity: lines as `authorized_keys` has them. An authority that cannot
    /// be read vouches for nobody. `clock` says what is valid.
    ///
    /// # Errors
    /// [`SshError::Malformed`] if the certificate is no line.
    pub(crate) fn new(
        clock: &Clock,
        key: &PrivateKey,
        certificate: &str,
        authorities: &[String],
    ) -> Result<Self, SshError> {
        let authorities = authorities.iter().map(|line| wire_of_line(line));
        Ok(Self {
            clock: clock.clone(),
            key: key.clone(),
            certificate: wire_of_line(certificate)?,
            authorities: authorities.filter_map(Result::ok).collect(),
        })
    }
}

/// Why no tunnel could be opened, or why one ended.
#[derive(Debug, thiserror::Error)]
pub(crate) enum TunnelError {
    /// The connection failed.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// Whoever answers does not speak SSH. Is it the proxy's tunnel port?
    #[error("it does not speak SSH; is it the proxy's tunnel port?")]
    NoSsh,
    /// The two sides know none of the same algorithms.
    #[error("no {what} in common; it offers {theirs}")]
    NothingInCommon {
        /// For what.
        what: &'static str,
        /// The peer's list.
        theirs: String,
    },
    /// The host is not one of the cluster's.
    #[error("the SSH host is not believed: {0}")]
    Host(&'static str),
    /// The peer refused.
    #[error("SSH: {0}")]
    Refused(String),
    /// A message that has no place where it came, or lacks a part.
    #[error("SSH: it answered with something else than expected ({0})")]
    Unexpected(&'static str),
    /// A message or certificate that cannot be read.
    #[error("SSH: {0}")]
    Ssh(#[from] SshError),
    /// The crypto library refused.
    #[error("SSH: the crypto library refused")]
    Library,
}

/// Opens a channel to the auth service over `io`, a connection to a proxy's tunnel port. Dropping
/// the channel ends the connection.
pub(crate) async fn open(io: BoxedIo, identity: &SshIdentity) -> io::Result<BoxedIo> {
    let opening = async {
        let mut connection = Connection::open(io, identity).await?;
        let channel = Channel::open(&mut connection).await?;
        Ok::<_, TunnelError>((connection, channel))
    };
    let (connection, channel) = timeout(OPEN, opening).await.map_err(|_elapsed| {
        let problem = format!("SSH: no answer within {} s", OPEN.as_secs());
        io::Error::new(io::ErrorKind::TimedOut, problem)
    })??;
    let (near, far) = tokio::io::duplex(64 * 1024);
    // It ends when either side does, and with the stream that is returned.
    tokio::spawn(async move {
        if let Err(error) = channel.run(connection, far).await {
            tracing::debug!(%error, "The SSH tunnel ended");
        }
    });
    Ok(Box::pin(near))
}

/// The one channel of a connection.
#[derive(Debug)]
struct Channel {
    /// The peer's number of it; ours is 0.
    number: u32,
    /// How much the peer takes at first.
    window: u32,
    /// How much it takes in a packet.
    chunk: u32,
}

impl Channel {
    async fn open(connection: &mut Connection) -> Result<Self, TunnelError> {
        let ask = Writer::message(message::CHANNEL_OPEN)
            .string("teleport-transport")
            .u32(0)
            .u32(WINDOW)
            .u32(CHUNK);
        connection.outgoing.send(&ask.0).await?;
        let reply = connection.next().await?;
        if reply.first() == Some(&message::CHANNEL_OPEN_FAILURE) {
            let mut reader = Reader(reply.get(9..).unwrap_or_default());
            let text = reader.text().unwrap_or_default();
            return Err(refused("the proxy opens no channel", text));
        }
        let mut reader = expect(&reply, message::CHANNEL_OPENED, "an open channel")?;
        let _ours = reader.u32()?;
        let mut channel = Self {
            number: reader.u32()?,
            window: reader.u32()?,
            chunk: reader.u32()?.clamp(1, CHUNK),
        };
        let dial = Writer::message(message::CHANNEL_REQUEST)
            .u32(channel.number)
            .string("teleport-transport-dial")
            .flag(true)
            .bytes(DESTINATION.as_bytes());
        connection.outgoing.send(&dial.0).await?;
        loop {
            let reply = connection.next().await?;
            let mut reader = Reader(&reply);
            match reader.byte()? {
                message::CHANNEL_SUCCESS => return Ok(channel),
                message::CHANNEL_FAILURE => {
                    let reason = timeout(REASON, reason(connection)).await;
                    let reason = reason.unwrap_or_default();
                    return Err(refused(
                        "the proxy does not reach the auth service",
                        &reason,
                    ));
                }
                message::WINDOW_ADJUST => {
                    let _ours = reader.u32()?;
                    channel.window = channel.window.saturating_add(reader.u32()?);
                }
                _ => return Err(TunnelError::Unexpected("no answer to the dial")),
            }
        }
    }

    /// Carries bytes both ways until one side ends.
    async fn run(self, connection: Connection, stream: DuplexStream) -> Result<(), TunnelError> {
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
    async fn send(
        &self,
        mut outgoing: Outgoing<WriteHalf<BoxedIo>>,
        mut stream: ReadHalf<DuplexStream>,
        mut replies: mpsc::Receiver<Reply>,
        mut window: watch::Receiver<u64>,
    ) -> Result<(), TunnelError> {
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
async fn receive(
    mut incoming: Incoming<ReadHalf<BoxedIo>>,
    mut stream: WriteHalf<DuplexStream>,
    replies: mpsc::Sender<Reply>,
    window: &watch::Sender<u64>,
) -> Result<(), TunnelError> {
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
                    .ok_or(TunnelError::Unexpected("more than it may send"))?;
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
            message::EOF | message::CLOSE | message::DISCONNECT => return Ok(()),
            // New keys in the middle of a connection are not made here: a new connection has some.
            message::KEXINIT => return Err(TunnelError::Unexpected("it wants new keys")),
            _ => continue,
        };
        if replies.send(reply).await.is_err() {
            return Ok(());
        }
    }
}

/// What the peer writes of a refusal, as far as it comes.
async fn reason(connection: &mut Connection) -> String {
    while let Ok(packet) = connection.next().await {
        let mut reader = Reader(&packet);
        if reader.byte() == Ok(message::EXTENDED_DATA) {
            let text = reader.u32().and_then(|_ours| reader.u32());
            let text = text.and_then(|_stderr| reader.string()).unwrap_or_default();
            return String::from_utf8_lossy(text).into_owned();
        }
    }
    String::new()
}

fn refused(what: &str, reason: &str) -> TunnelError {
    let reason: String = reason.trim().chars().take(256).collect();
    if reason.is_empty() {
        TunnelError::Refused(what.to_owned())
    } else {
        TunnelError::Refused(format!("{what}: {reason}"))
    }
}

#[cfg(test)]
mod tests;
