//! The proxy's SSH side: a channel to the auth service, for agents that reach it in no other way
//! (upstream `lib/reversetunnel/srv.go`, `lib/reversetunnelclient/transport.go`).
//!
//! It lets through whoever one of the cluster's user authorities vouches for. What goes through is TLS
//! with the auth service, which decides everything else.

use std::time::{Duration, SystemTime};

use serde::Deserialize;

use super::ca::{Authorities, AuthorityError, AuthorityType};
use crate::crypto::ssh::{Holder, sign, wire_of_line};
use crate::crypto::ssh_cert::{SignedCertificate, is_signed};
use crate::crypto::ssh_wire::Writer;
use crate::ssh::channel::{CHUNK, Channel, WINDOW};
use crate::ssh::exchange::{End, Negotiated};
use crate::ssh::{Connection, ConnectionError, Stream, expect, message};

/// From the first byte to the open channel.
const OPEN: Duration = Duration::from_secs(20);
/// The user that bots log in as; every certificate of a user is good for it.
const USER: &str = "-teleport-internal-join";
/// What the one host key is called where a certificate is shown with it.
const HOST_KEYS: [&str; 1] = ["ecdsa-sha2-nistp256-cert-v01@openssh.com"];
/// Signatures that are taken of users (RFC 8308 section 3.1).
const USER_SIGNATURES: &str = "ssh-ed25519-cert-v01@openssh.com,\
    ecdsa-sha2-nistp256-cert-v01@openssh.com,rsa-sha2-512-cert-v01@openssh.com,\
    rsa-sha2-256-cert-v01@openssh.com,rsa-sha2-512,rsa-sha2-256,ssh-ed25519,ecdsa-sha2-nistp256";
/// Attempts to log in: one without a key, then keys.
const MAX_LOGINS: usize = 8;
/// What a channel may lead to: any auth service of the cluster.
const AUTH: &str = "@remote-auth-server";

/// Who comes in, and where the proxy is reached.
#[derive(Debug)]
pub(super) struct Gate<'a> {
    /// Whom it believes, and who vouches for it.
    pub(super) authorities: &'a Authorities,
    /// The proxy's names.
    pub(super) names: &'a [String],
    /// Now.
    pub(super) now: SystemTime,
}

/// What a bot asks its channel to lead to.
#[derive(Debug, Deserialize)]
struct Dial {
    address: String,
}

impl Gate<'_> {
    /// Lets a bot in, up to a channel that is to be connected with the auth service.
    pub(super) async fn open<S: Stream>(
        &self,
        io: S,
    ) -> Result<(Connection<S>, Channel), ConnectionError> {
        let opening = async {
            let mut connection = Connection::new(io);
            let session = self.agree(&mut connection).await?;
            self.log_in(&mut connection, &session).await?;
            let channel = open_channel(&mut connection).await?;
            Ok((connection, channel))
        };
        tokio::time::timeout(OPEN, opening)
            .await
            .map_err(|_elapsed| ConnectionError::Unexpected("nothing in time"))?
    }

    /// Agrees on keys. Returns the session's identifier.
    async fn agree<S: Stream>(
        &self,
        connection: &mut Connection<S>,
    ) -> Result<[u8; 32], ConnectionError> {
        let host = self
            .authorities
            .ssh_host_identity(self.names, self.now)
            .map_err(damaged)?;
        let negotiated = connection.negotiate(End::Server, &HOST_KEYS).await?;
        let half = negotiated.half()?;
        let public = half.public.clone();
        let hello = connection.next().await?;
        let their_public = expect(&hello, message::ECDH_INIT, "no key")?.string()?;
        let agreed = negotiated.agree(half, their_public, &host.certificate)?;
        let reply = Writer::message(message::ECDH_REPLY)
            .string(&host.certificate)
            .string(&public)
            .string(sign(&host.key, &agreed.session)?);
        connection.outgoing.send(&reply.0).await?;
        connection.seal(&negotiated, &agreed).await?;
        tell_signatures(connection, &negotiated).await?;
        Ok(agreed.session)
    }

    /// Has the bot prove who it is (RFC 4252 section 7).
    async fn log_in<S: Stream>(
        &self,
        connection: &mut Connection<S>,
        session: &[u8; 32],
    ) -> Result<(), ConnectionError> {
        let ask = connection.next().await?;
        let service = expect(&ask, message::SERVICE_REQUEST, "no log-in")?.text()?;
        let accept = Writer::message(message::SERVICE_ACCEPT).string(service);
        connection.outgoing.send(&accept.0).await?;
        for _ in 0..MAX_LOGINS {
            let request = connection.next().await?;
            let reply = match self.judge(&request, session)? {
                Login::Accepted => {
                    let success = [message::USERAUTH_SUCCESS];
                    return Ok(connection.outgoing.send(&success).await?);
                }
                Login::Possible(algorithm, key) => Writer::message(message::USERAUTH_KEY_OK)
                    .string(algorithm)
                    .string(key),
                Login::Refused => Writer::message(message::USERAUTH_FAILURE)
                    .string("publickey")
                    .flag(false),
            };
            connection.outgoing.send(&reply.0).await?;
        }
        Err(ConnectionError::Refused("nobody could log in".to_owned()))
    }

    fn judge<'a>(&self, request: &'a [u8], session: &[u8]) -> Result<Login<'a>, ConnectionError> {
        let mut reader = expect(request, message::USERAUTH_REQUEST, "no log-in")?;
        let (user, service, method) = (reader.text()?, reader.text()?, reader.text()?);
        if user != USER || service != "ssh-connection" || method != "publickey" {
            return Ok(Login::Refused);
        }
        let is_signature = reader.flag()?;
        let (algorithm, shown) = (reader.text()?, reader.string()?);
        let Some(certificate) = self.known(shown) else {
            return Ok(Login::Refused);
        };
        if !is_signature {
            return Ok(Login::Possible(algorithm, shown));
        }
        let unsigned = request.len() - reader.0.len();
        let signature = reader.string()?;
        let message = Writer::default()
            .string(session)
            .bytes(request.get(..unsigned).unwrap_or_default());
        Ok(if is_signed(&certificate.key, &message.0, signature) {
            Login::Accepted
        } else {
            Login::Refused
        })
    }

    /// The certificate in `wire`, if a user authority vouches for it now.
    fn known(&self, wire: &[u8]) -> Option<SignedCertificate> {
        let trusted = self.authorities.trusted_ssh(AuthorityType::User);
        let trusted: Vec<Vec<u8>> = trusted
            .iter()
            .filter_map(|line| wire_of_line(line).ok())
            .collect();
        SignedCertificate::parse(wire, Holder::User)
            .ok()
            .filter(|certificate| certificate.is_good(&trusted, self.now))
            .filter(|certificate| certificate.principals.iter().any(|name| name == USER))
    }
}

/// What becomes of an attempt to log in.
#[derive(Debug)]
enum Login<'a> {
    Accepted,
    /// The key would do; its algorithm and the key as they were shown.
    Possible(&'a str, &'a [u8]),
    Refused,
}

/// Without this, some clients sign with RSA and SHA-1, or not at all.
async fn tell_signatures<S: Stream>(
    connection: &mut Connection<S>,
    negotiated: &Negotiated,
) -> Result<(), ConnectionError> {
    if negotiated.reads_extensions() {
        let extensions = Writer::message(message::EXT_INFO)
            .u32(1)
            .string("server-sig-algs")
            .string(USER_SIGNATURES);
        connection.outgoing.send(&extensions.0).await?;
    }
    Ok(())
}

/// Waits for a channel, and for the request that says where it leads.
async fn open_channel<S: Stream>(
    connection: &mut Connection<S>,
) -> Result<Channel, ConnectionError> {
    let ask = connection.next().await?;
    let mut reader = expect(&ask, message::CHANNEL_OPEN, "no channel")?;
    let kind = reader.text()?;
    let channel = Channel {
        number: reader.u32()?,
        window: reader.u32()?,
        chunk: reader.u32()?.clamp(1, CHUNK),
    };
    if kind != "teleport-transport" {
        // Reason 3: an unknown kind of channel.
        let refusal = Writer::message(message::CHANNEL_OPEN_FAILURE)
            .u32(channel.number)
            .u32(3)
            .string("only teleport-transport is served here")
            .string("");
        connection.outgoing.send(&refusal.0).await?;
        return Err(ConnectionError::Refused(format!(
            "a channel of kind {kind:?}"
        )));
    }
    let opened = Writer::message(message::CHANNEL_OPENED)
        .u32(channel.number)
        .u32(0)
        .u32(WINDOW)
        .u32(CHUNK);
    connection.outgoing.send(&opened.0).await?;
    let request = connection.next().await?;
    let mut reader = expect(&request, message::CHANNEL_REQUEST, "no dial")?;
    let _ours = reader.u32()?;
    let name = reader.text()?;
    let _wants_reply = reader.flag()?;
    let leads_here = name == "teleport-transport-dial"
        && serde_json::from_slice::<Dial>(reader.0).is_ok_and(|dial| dial.address == AUTH);
    let reply = |number| Writer::message(number).u32(channel.number);
    if leads_here {
        connection
            .outgoing
            .send(&reply(message::CHANNEL_SUCCESS).0)
            .await?;
        return Ok(channel);
    }
    // The reason is read from where programs write their errors.
    let reason = format!("only {AUTH} is reached through this cluster's tunnel\n");
    let told = reply(message::EXTENDED_DATA).u32(1).string(reason);
    for refusal in [reply(message::CHANNEL_FAILURE), told] {
        connection.outgoing.send(&refusal.0).await?;
    }
    Err(ConnectionError::Refused(
        "a channel to somewhere else".to_owned(),
    ))
}

fn damaged(error: AuthorityError) -> ConnectionError {
    ConnectionError::Refused(error.to_string())
}

#[cfg(test)]
mod tests;
