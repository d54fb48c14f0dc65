//! SSH as far as one channel needs it, for either end: packets, an exchange of keys, bytes both ways
//! (RFC 4253, RFC 4254).
//!
//! Who may talk to whom is decided by those who use it: the agent's tunnel through a proxy, and the
//! proxy of the embedded cluster. `docs/adr/0009-ssh-tunnel.md` tells why this is no library.

pub(crate) mod channel;
pub(crate) mod exchange;
pub(crate) mod message;
pub(crate) mod packet;

use std::io;

use tokio::io::{AsyncRead, AsyncWrite, ReadHalf, WriteHalf};

use crate::crypto::ssh::SshError;
use crate::crypto::ssh_wire::Reader;
use packet::{Incoming, Outgoing};

/// Messages without consequence that are passed over in a row.
const MAX_IDLE: usize = 100;

/// A byte stream that SSH is spoken over.
pub(crate) trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin> Stream for T {}

/// Why no connection came about, or why one ended.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ConnectionError {
    /// The connection failed.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// The peer speaks something else.
    #[error("it does not speak SSH")]
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
    /// The peer refused, or was refused.
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

impl From<ConnectionError> for io::Error {
    fn from(error: ConnectionError) -> Self {
        match error {
            ConnectionError::Io(source) => source,
            other => Self::other(other),
        }
    }
}

/// Both directions of a connection.
#[derive(Debug)]
pub(crate) struct Connection<S> {
    pub(crate) incoming: Incoming<ReadHalf<S>>,
    pub(crate) outgoing: Outgoing<WriteHalf<S>>,
}

impl<S: Stream> Connection<S> {
    /// Over `io`, from its first byte on.
    pub(crate) fn new(io: S) -> Self {
        let (read, write) = tokio::io::split(io);
        Self {
            incoming: Incoming {
                io: read,
                seal: None,
            },
            outgoing: Outgoing {
                io: write,
                seal: None,
            },
        }
    }

    /// The next message that has a consequence here.
    pub(crate) async fn next(&mut self) -> Result<Vec<u8>, ConnectionError> {
        for _ in 0..MAX_IDLE {
            let packet = self.incoming.packet().await?;
            let mut reader = Reader(&packet);
            match reader.byte()? {
                message::DISCONNECT => return Err(disconnected(reader)),
                message::IGNORE
                | message::UNIMPLEMENTED
                | message::DEBUG
                | message::EXT_INFO
                | message::BANNER => {}
                message::GLOBAL_REQUEST => {
                    let _name = reader.string()?;
                    if reader.flag()? {
                        self.outgoing.send(&[message::REQUEST_FAILURE]).await?;
                    }
                }
                _ => return Ok(packet),
            }
        }
        Err(ConnectionError::Unexpected("nothing but idle messages"))
    }
}

/// What the peer says when it ends the connection.
fn disconnected(mut reader: Reader<'_>) -> ConnectionError {
    let reason = reader.u32().and_then(|_code| reader.text());
    let text: String = reason.unwrap_or_default().chars().take(256).collect();
    ConnectionError::Refused(format!("it ended the connection: {text}"))
}

/// The rest of a message that has to be of kind `number`.
pub(crate) fn expect<'a>(
    packet: &'a [u8],
    number: u8,
    what: &'static str,
) -> Result<Reader<'a>, ConnectionError> {
    let mut reader = Reader(packet);
    if reader.byte()? == number {
        Ok(reader)
    } else {
        Err(ConnectionError::Unexpected(what))
    }
}
