//! The beginning of an SSH connection: keys agreed on, the host believed, the bot let in.

use std::io;

use aws_lc_rs::agreement::{self, ECDH_P256, EphemeralPrivateKey, UnparsedPublicKey, X25519};
use aws_lc_rs::rand::SystemRandom;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, ReadHalf, WriteHalf};

use super::packet::{Incoming, Outgoing, Seal, cipher};
use super::{SshIdentity, TunnelError, message};
use crate::cluster::dial::BoxedIo;
use crate::crypto::ssh::{SshError, sign};
use crate::crypto::ssh_host::{HostCertificate, is_signed};
use crate::crypto::ssh_wire::{Reader, Writer};
use crate::crypto::{random, sha256};

/// What this side calls itself.
const VERSION: &str = "SSH-2.0-tbot";
/// A user that every certificate of a cluster's users is good for.
const USER: &str = "-teleport-internal-join";
/// The longest line before the keys, in bytes, and how many there may be.
const MAX_LINE: usize = 512;
const MAX_LINES: usize = 20;
/// Messages without consequence that are passed over in a row.
const MAX_IDLE: usize = 100;

const KEX: [&str; 3] = [
    "curve25519-sha256",
    "curve25519-sha256@libssh.org",
    "ecdh-sha2-nistp256",
];
const HOST_KEYS: [&str; 4] = [
    "ssh-ed25519-cert-v01@openssh.com",
    "ecdsa-sha2-nistp256-cert-v01@openssh.com",
    "rsa-sha2-512-cert-v01@openssh.com",
    "rsa-sha2-256-cert-v01@openssh.com",
];
const CIPHERS: [&str; 2] = ["aes256-gcm@openssh.com", "aes128-gcm@openssh.com"];
/// Offered because a list must not be empty; the ciphers above seal without one.
const MACS: [&str; 2] = ["hmac-sha2-256-etm@openssh.com", "hmac-sha2-256"];

/// Both directions of a connection.
pub(super) struct Connection {
    pub(super) incoming: Incoming<ReadHalf<BoxedIo>>,
    pub(super) outgoing: Outgoing<WriteHalf<BoxedIo>>,
}

impl Connection {
    /// Opens a connection as the bot of `identity`.
    pub(super) async fn open(io: BoxedIo, identity: &SshIdentity) -> Result<Self, TunnelError> {
        let (read, write) = tokio::io::split(io);
        let mut connection = Self {
            incoming: Incoming {
                io: read,
                seal: None,
            },
            outgoing: Outgoing {
                io: write,
                seal: None,
            },
        };
        let session = connection.agree(identity).await?;
        connection.log_in(identity, &session).await?;
        Ok(connection)
    }

    /// The next message that has a consequence here.
    pub(super) async fn next(&mut self) -> Result<Vec<u8>, TunnelError> {
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
        Err(TunnelError::Unexpected("nothing but idle messages"))
    }

    /// Agrees on keys with a host that the identity's authorities vouch for. Returns the session's
    /// identifier.
    async fn agree(&mut self, identity: &SshIdentity) -> Result<[u8; 32], TunnelError> {
        let greeting = format!("{VERSION}\r\n");
        self.outgoing.io.write_all(greeting.as_bytes()).await?;
        self.outgoing.io.flush().await?;
        let their_version = self.greeting().await?;
        let ours = offer();
        self.outgoing.send(&ours).await?;
        let theirs = self.next().await?;
        let chosen = Chosen::of(&theirs)?;
        if chosen.guessed_wrong {
            self.next().await?;
        }

        let algorithm = if chosen.kex == "ecdh-sha2-nistp256" {
            &ECDH_P256
        } else {
            &X25519
        };
        let library = |_source| TunnelError::Library;
        let secret =
            EphemeralPrivateKey::generate(algorithm, &SystemRandom::new()).map_err(library)?;
        let public = secret.compute_public_key().map_err(library)?;
        let hello = Writer::message(message::ECDH_INIT).string(&public);
        self.outgoing.send(&hello.0).await?;
        let reply = self.next().await?;
        let mut reader = expect(&reply, message::ECDH_REPLY, "the host's key")?;
        let (host, their_public, signature) =
            (reader.string()?, reader.string()?, reader.string()?);
        let shared = agreement::agree_ephemeral(
            secret,
            UnparsedPublicKey::new(algorithm, their_public),
            TunnelError::Unexpected("an unusable key"),
            |shared| Ok(Writer::default().number(shared).0),
        )?;
        let exchange = Writer::default()
            .string(VERSION)
            .string(their_version)
            .string(&ours)
            .string(&theirs)
            .string(host)
            .string(&public)
            .string(their_public)
            .bytes(&shared);
        let session = sha256(&exchange.0);

        let certificate = HostCertificate::parse(host)?;
        let plain = chosen.host_key.trim_end_matches("-cert-v01@openssh.com");
        let signed_as = Reader(signature).text()?;
        if signed_as != plain || !is_signed(&certificate.key, &session, signature) {
            return Err(TunnelError::Host("it does not hold the key that it shows"));
        }
        if !certificate.is_good(&identity.authorities, identity.clock.now()) {
            return Err(TunnelError::Host(
                "none of the cluster's authorities vouches for it now",
            ));
        }

        self.outgoing.send(&[message::NEW_KEYS]).await?;
        let derive = |letter: u8| {
            let seed = Writer::default().bytes(&shared).bytes(&session);
            sha256(&seed.bytes(&[letter]).bytes(&session).0)
        };
        let seal = |name, key, iv| {
            let algorithm = cipher(name).ok_or(TunnelError::Library)?;
            Seal::new(algorithm, &derive(key), &derive(iv)).ok_or(TunnelError::Library)
        };
        self.outgoing.seal = Some(seal(chosen.sending, b'C', b'A')?);
        let reply = self.next().await?;
        expect(&reply, message::NEW_KEYS, "new keys")?;
        self.incoming.seal = Some(seal(chosen.receiving, b'D', b'B')?);
        Ok(session)
    }

    /// The peer's version, after the lines that may stand before it.
    async fn greeting(&mut self) -> Result<String, TunnelError> {
        for number in 0..MAX_LINES {
            let mut line = Vec::new();
            loop {
                match self.incoming.io.read_u8().await {
                    Ok(b'\n') => break,
                    Ok(byte) if line.len() < MAX_LINE => line.push(byte),
                    // It said something else than SSH before it went.
                    Ok(_) => return Err(TunnelError::NoSsh),
                    Err(_ended) if number > 0 => return Err(TunnelError::NoSsh),
                    Err(source) => return Err(source.into()),
                }
            }
            if line.last() == Some(&b'\r') {
                line.pop();
            }
            if line.starts_with(b"SSH-") {
                return String::from_utf8(line)
                    .ok()
                    .filter(|line| line.starts_with("SSH-2.0-"))
                    .ok_or(TunnelError::NoSsh);
            }
        }
        Err(TunnelError::NoSsh)
    }

    /// Logs in with the bot's certificate (RFC 4252 section 7).
    async fn log_in(
        &mut self,
        identity: &SshIdentity,
        session: &[u8; 32],
    ) -> Result<(), TunnelError> {
        let ask = Writer::message(message::SERVICE_REQUEST).string("ssh-userauth");
        self.outgoing.send(&ask.0).await?;
        let reply = self.next().await?;
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
        self.outgoing.send(&request.string(signature).0).await?;
        let reply = self.next().await?;
        match reply.first() {
            Some(&message::USERAUTH_SUCCESS) => Ok(()),
            Some(&message::USERAUTH_FAILURE) => Err(TunnelError::Refused(
                "it does not accept the bot's certificate".to_owned(),
            )),
            _ => Err(TunnelError::Unexpected("no answer to the log-in")),
        }
    }
}

/// What the peer says when it ends the connection.
fn disconnected(mut reader: Reader<'_>) -> TunnelError {
    let reason = reader.u32().and_then(|_code| reader.text());
    let text: String = reason.unwrap_or_default().chars().take(256).collect();
    TunnelError::Refused(format!("it ended the connection: {text}"))
}

/// The rest of a message that has to be of kind `number`.
pub(super) fn expect<'a>(
    packet: &'a [u8],
    number: u8,
    what: &'static str,
) -> Result<Reader<'a>, TunnelError> {
    let mut reader = Reader(packet);
    if reader.byte()? == number {
        Ok(reader)
    } else {
        Err(TunnelError::Unexpected(what))
    }
}

/// The algorithms of this side (RFC 4253 section 7.1).
fn offer() -> Vec<u8> {
    let lists: [&[&str]; 10] = [
        &KEX,
        &HOST_KEYS,
        &CIPHERS,
        &CIPHERS,
        &MACS,
        &MACS,
        &["none"],
        &["none"],
        &[],
        &[],
    ];
    let cookie: [u8; 16] = random();
    lists
        .iter()
        .fold(
            Writer::message(message::KEXINIT).bytes(&cookie),
            |written, names| written.string(names.join(",")),
        )
        .flag(false)
        .u32(0)
        .0
}

/// The algorithms that both sides have, the first of ours in each list.
#[derive(Debug)]
struct Chosen {
    kex: &'static str,
    host_key: &'static str,
    sending: &'static str,
    receiving: &'static str,
    /// Whether the peer has sent a message for other algorithms than these.
    guessed_wrong: bool,
}

impl Chosen {
    fn of(theirs: &[u8]) -> Result<Self, TunnelError> {
        let mut reader = expect(theirs, message::KEXINIT, "no algorithms")?;
        reader.0 = reader.0.get(16..).ok_or(SshError::Malformed)?;
        let mut guesses = Vec::new();
        let mut pick = |ours: &[&'static str], what: &'static str| {
            let names = reader.text()?;
            let guess = names.split(',').next().unwrap_or_default();
            let chosen = ours
                .iter()
                .copied()
                .find(|name| names.split(',').any(|other| other == *name))
                .ok_or_else(|| TunnelError::NothingInCommon {
                    what,
                    theirs: names.chars().take(512).collect(),
                })?;
            guesses.push(guess == chosen);
            Ok::<_, TunnelError>(chosen)
        };
        let kex = pick(&KEX, "key exchange")?;
        let host_key = pick(&HOST_KEYS, "host key")?;
        let sending = pick(&CIPHERS, "cipher")?;
        let receiving = pick(&CIPHERS, "cipher")?;
        for _macs_compressions_languages in 0..6 {
            reader.string()?;
        }
        let follows = reader.flag()?;
        Ok(Self {
            kex,
            host_key,
            sending,
            receiving,
            guessed_wrong: follows && guesses.iter().take(2).any(|right| !right),
        })
    }
}

impl From<TunnelError> for io::Error {
    fn from(error: TunnelError) -> Self {
        match error {
            TunnelError::Io(source) => source,
            other => Self::other(other),
        }
    }
}
