//! Reaching the auth service through a proxy whose ports do not tell protocols apart: a channel of
//! an SSH connection to the proxy's tunnel port (upstream `lib/reversetunnelclient/transport.go`).
//!
//! The client is a small one of our own, for the one provider of cryptography that this program
//! has; `docs/adr/0009-ssh-tunnel.md` tells why. What goes through the channel is TLS with the auth
//! service, end to end: this layer is only let through by the proxy, nothing is entrusted to it.

mod handshake;

use std::io;
use std::time::Duration;

use tokio::time::timeout;

use super::dial::BoxedIo;
use crate::clock::Clock;
use crate::crypto::PrivateKey;
use crate::crypto::ssh::{SshError, wire_of_line};
use crate::crypto::ssh_wire::{Reader, Writer};
use crate::ssh::channel::{CHUNK, Channel, WINDOW};
use crate::ssh::{Connection, ConnectionError, expect, message};

/// From the first byte to the open channel.
const OPEN: Duration = Duration::from_secs(20);
/// For the reason of a refusal to arrive after it.
const REASON: Duration = Duration::from_secs(2);
/// What is asked of the proxy: any of the cluster's auth services.
const DESTINATION: &str = r#"{"address":"@remote-auth-server","conn_type":""}"#;

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

/// Opens a channel to the auth service over `io`, a connection to a proxy's tunnel port. Dropping
/// the channel ends the connection.
pub(crate) async fn open(io: BoxedIo, identity: &SshIdentity) -> io::Result<BoxedIo> {
    let opening = async {
        let mut connection = handshake::connect(io, identity).await?;
        let channel = open_channel(&mut connection).await?;
        Ok::<_, ConnectionError>((connection, channel))
    };
    let (connection, channel) = timeout(OPEN, opening)
        .await
        .map_err(|_elapsed| {
            let problem = format!("SSH: no answer within {} s", OPEN.as_secs());
            io::Error::new(io::ErrorKind::TimedOut, problem)
        })?
        .map_err(|error| match error {
            ConnectionError::NoSsh => {
                io::Error::other(format!("{error}; is it the proxy's tunnel port?"))
            }
            error => error.into(),
        })?;
    let (near, far) = tokio::io::duplex(64 * 1024);
    // It ends when either side does, and with the stream that is returned.
    tokio::spawn(async move {
        if let Err(error) = channel.run(connection, far).await {
            tracing::debug!(%error, "The SSH tunnel ended");
        }
    });
    Ok(Box::pin(near))
}

/// Opens the channel that leads to the auth service.
async fn open_channel(connection: &mut Connection<BoxedIo>) -> Result<Channel, ConnectionError> {
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
    let mut channel = Channel {
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
            _ => return Err(ConnectionError::Unexpected("no answer to the dial")),
        }
    }
}

/// What the peer writes of a refusal, as far as it comes.
async fn reason(connection: &mut Connection<BoxedIo>) -> String {
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

fn refused(what: &str, reason: &str) -> ConnectionError {
    let reason: String = reason.trim().chars().take(256).collect();
    if reason.is_empty() {
        ConnectionError::Refused(what.to_owned())
    } else {
        ConnectionError::Refused(format!("{what}: {reason}"))
    }
}

#[cfg(test)]
mod tests;
