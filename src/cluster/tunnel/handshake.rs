//! The beginning of an SSH connection: the host believed, the bot let in.

use crate::cluster::dial::BoxedIo;
use crate::crypto::ssh::{Holder, sign};
use crate::crypto::ssh_cert::{SignedCertificate, is_signed};
use crate::crypto::ssh_wire::{Reader, Writer};
use crate::ssh::exchange::End;
use crate::ssh::{Connection, ConnectionError, expect, message};

use super::SshIdentity;

/// A user that every certificate of a cluster's users is good for.
const USER: &str = "-teleport-internal-join";

const HOST_KEYS: [&str; 4] = [
    "ssh-ed25519-cert-v01@openssh.com",
    "ecdsa-sha2-nistp256-cert-v01@openssh.com",
    "rsa-sha2-512-cert-v01@openssh.com",
    "rsa-sha2-256-cert-v01@openssh.com",
];

/// Opens a connection as the bot of `identity`.
pub(super) async fn connect(
    io: BoxedIo,
    identity: &SshIdentity,
) -> Result<Connection<BoxedIo>, ConnectionError> {
    let mut connection = Connection::new(io);
    let session = agree(&mut connection, identity).await?;
    log_in(&mut connection, identity, &session).await?;
    Ok(connection)
}

/// Agrees on keys with a host that the identity's authorities vouch for. Returns the session's
/// identifier.
async fn agree(
    connection: &mut Connection<BoxedIo>,
    identity: &SshIdentity,
) -> Result<[u8; 32], ConnectionError> {
    let negotiated = connection.negotiate(End::Client, &HOST_KEYS).await?;
    let half = negotiated.half()?;
    let hello = Writer::message(message::ECDH_INIT).string(&half.public);
    connection.outgoing.send(&hello.0).await?;
    let reply = connection.next().await?;
    let mut reader = expect(&reply, message::ECDH_REPLY, "the host's key")?;
    let (host, their_public, signature) = (reader.string()?, reader.string()?, reader.string()?);
    let agreed = negotiated.agree(half, their_public, host)?;

    let certificate = SignedCertificate::parse(host, Holder::Host)?;
    let plain = negotiated
        .host_key()
        .trim_end_matches("-cert-v01@openssh.com");
    let signed_as = Reader(signature).text()?;
    if signed_as != plain || !is_signed(&certificate.key, &agreed.session, signature) {
        return Err(ConnectionError::Host(
            "it does not hold the key that it shows",
        ));
    }
    if !certificate.is_good(&identity.authorities, identity.clock.now()) {
        return Err(ConnectionError::Host(
            "none of the cluster's authorities vouches for it now",
        ));
    }
    connection.seal(&negotiated, &agreed).await?;
    Ok(agreed.session)
}

/// Logs in with the bot's certificate (RFC 4252 section 7).
async fn log_in(
    connection: &mut Connection<BoxedIo>,
    identity: &SshIdentity,
    session: &[u8; 32],
) -> Result<(), ConnectionError> {
    let ask = Writer::message(message::SERVICE_REQUEST).string("ssh-userauth");
    connection.outgoing.send(&ask.0).await?;
    let reply = connection.next().await?;
    expect(&reply, message::SERVICE_ACCEPT, "leave to log in")?;
    // RSA certificates are named by their key alone; how to sign is said here.
    let algorithm = match Reader(&identity.certificate).text()? {
        "ssh-rsa-cert-v01@openssh.com" => "rsa-sha2-512-cert-v01@openssh.com",
        name => name,
    };
    let request = Writer::message(message::USERAUTH_REQUEST)
        .string(USER)
        .string("ssh-connection")
        .string("publickey")
        .flag(true)
        .string(algorithm)
        .string(&identity.certificate);
    let to_sign = Writer::default().string(session).bytes(&request.0);
    let signature = sign(&identity.key, &to_sign.0)?;
    connection
        .outgoing
        .send(&request.string(signature).0)
        .await?;
    let reply = connection.next().await?;
    match reply.first() {
        Some(&message::USERAUTH_SUCCESS) => Ok(()),
        Some(&message::USERAUTH_FAILURE) => Err(ConnectionError::Refused(
            "it does not accept the bot's certificate".to_owned(),
        )),
        _ => Err(ConnectionError::Unexpected("no answer to the log-in")),
    }
}
