//! The exchange of keys at the beginning of a connection (RFC 4253 sections 7 and 8, RFC 5656, RFC
//! 8731), but for the question whether the host is believed.

use aws_lc_rs::agreement::{self, ECDH_P256, EphemeralPrivateKey, UnparsedPublicKey, X25519};
use aws_lc_rs::rand::SystemRandom;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use super::packet::{Seal, cipher};
use super::{Connection, ConnectionError, Stream, expect, message};
use crate::crypto::ssh::SshError;
use crate::crypto::ssh_wire::Writer;
use crate::crypto::{random, sha256};

/// What this side calls itself.
const VERSION: &str = "SSH-2.0-tbot";
/// The longest line before the keys, in bytes, and how many there may be.
const MAX_LINE: usize = 512;
const MAX_LINES: usize = 20;

const KEX: [&str; 3] = [
    "curve25519-sha256",
    "curve25519-sha256@libssh.org",
    "ecdh-sha2-nistp256",
];
const CIPHERS: [&str; 2] = ["aes256-gcm@openssh.com", "aes128-gcm@openssh.com"];
/// Offered because a list must not be empty; the ciphers above seal without one.
const MACS: [&str; 2] = ["hmac-sha2-256-etm@openssh.com", "hmac-sha2-256"];
/// By which a client says that it reads the list of signatures a host takes (RFC 8308).
const READS_EXTENSIONS: &str = "ext-info-c";

/// Which end this is: the client's wishes come first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum End {
    /// The one that connected.
    Client,
    /// The one that was connected to.
    Server,
}

impl End {
    /// The client's of the two and the server's.
    fn order<T>(self, ours: T, theirs: T) -> (T, T) {
        match self {
            Self::Client => (ours, theirs),
            Self::Server => (theirs, ours),
        }
    }
}

/// What the two sides have said before any key.
#[derive(Debug)]
pub(crate) struct Negotiated {
    end: End,
    their_version: String,
    our_offer: Vec<u8>,
    their_offer: Vec<u8>,
    chosen: Chosen,
}

/// The half of an exchange that is this side's.
#[derive(Debug)]
pub(crate) struct Half {
    secret: EphemeralPrivateKey,
    algorithm: &'static agreement::Algorithm,
    /// What the peer needs of it.
    pub(crate) public: Vec<u8>,
}

/// What both sides know in the end.
#[derive(Debug)]
pub(crate) struct Agreed {
    /// The shared secret as it is hashed.
    shared: Vec<u8>,
    /// What the host signs; it names the session from then on.
    pub(crate) session: [u8; 32],
}

impl Negotiated {
    /// The algorithm of the host's key.
    pub(crate) fn host_key(&self) -> &'static str {
        self.chosen.host_key
    }

    /// Whether the peer, a client, reads the list of signatures a host takes.
    pub(crate) fn reads_extensions(&self) -> bool {
        self.chosen.reads_extensions
    }

    /// A fresh half of the exchange.
    pub(crate) fn half(&self) -> Result<Half, ConnectionError> {
        let algorithm = if self.chosen.kex == "ecdh-sha2-nistp256" {
            &ECDH_P256
        } else {
            &X25519
        };
        let library = |_source| ConnectionError::Library;
        let secret =
            EphemeralPrivateKey::generate(algorithm, &SystemRandom::new()).map_err(library)?;
        let public = secret.compute_public_key().map_err(library)?;
        Ok(Half {
            secret,
            algorithm,
            public: public.as_ref().to_vec(),
        })
    }

    /// Both halves put together; `host` is the host's key as it is shown.
    pub(crate) fn agree(
        &self,
        half: Half,
        their_public: &[u8],
        host: &[u8],
    ) -> Result<Agreed, ConnectionError> {
        let shared = agreement::agree_ephemeral(
            half.secret,
            UnparsedPublicKey::new(half.algorithm, their_public),
            ConnectionError::Unexpected("an unusable key"),
            |shared| Ok(Writer::default().number(shared).0),
        )?;
        let versions = self.end.order(VERSION, self.their_version.as_str());
        let offers = self
            .end
            .order(self.our_offer.as_slice(), self.their_offer.as_slice());
        let publics = self.end.order(half.public.as_slice(), their_public);
        let exchange = Writer::default()
            .string(versions.0)
            .string(versions.1)
            .string(offers.0)
            .string(offers.1)
            .string(host)
            .string(publics.0)
            .string(publics.1)
            .bytes(&shared);
        Ok(Agreed {
            session: sha256(&exchange.0),
            shared,
        })
    }
}

impl<S: Stream> Connection<S> {
    /// Tells the peer what this side can do and hears the same of it; of `host_keys` the first that
    /// fits is taken.
    pub(crate) async fn negotiate(
        &mut self,
        end: End,
        host_keys: &[&'static str],
    ) -> Result<Negotiated, ConnectionError> {
        let greeting = format!("{VERSION}\r\n");
        self.outgoing.io.write_all(greeting.as_bytes()).await?;
        self.outgoing.io.flush().await?;
        let their_version = self.greeting().await?;
        let our_offer = offer(host_keys);
        self.outgoing.send(&our_offer).await?;
        let their_offer = self.next().await?;
        let chosen = Chosen::of(end, host_keys, &their_offer)?;
        if chosen.guessed_wrong {
            self.next().await?;
        }
        Ok(Negotiated {
            end,
            their_version,
            our_offer,
            their_offer,
            chosen,
        })
    }

    /// Seals everything from here on, in both directions.
    pub(crate) async fn seal(
        &mut self,
        negotiated: &Negotiated,
        agreed: &Agreed,
    ) -> Result<(), ConnectionError> {
        let derive = |letter: u8| {
            let seed = Writer::default()
                .bytes(&agreed.shared)
                .bytes(&agreed.session);
            sha256(&seed.bytes(&[letter]).bytes(&agreed.session).0)
        };
        let seal = |name, (key, iv)| {
            let algorithm = cipher(name).ok_or(ConnectionError::Library)?;
            Seal::new(algorithm, &derive(key), &derive(iv)).ok_or(ConnectionError::Library)
        };
        let (ours, theirs) = negotiated.end.order((b'C', b'A'), (b'D', b'B'));
        self.outgoing.send(&[message::NEW_KEYS]).await?;
        self.outgoing.seal = Some(seal(negotiated.chosen.sending, ours)?);
        let reply = self.next().await?;
        expect(&reply, message::NEW_KEYS, "new keys")?;
        self.incoming.seal = Some(seal(negotiated.chosen.receiving, theirs)?);
        Ok(())
    }

    /// The peer's version, after the lines that may stand before it.
    async fn greeting(&mut self) -> Result<String, ConnectionError> {
        for number in 0..MAX_LINES {
            let mut line = Vec::new();
            loop {
                match self.incoming.io.read_u8().await {
                    Ok(b'\n') => break,
                    Ok(byte) if line.len() < MAX_LINE => line.push(byte),
                    // It said something else than SSH before it went.
                    Ok(_) => return Err(ConnectionError::NoSsh),
                    Err(_ended) if number > 0 => return Err(ConnectionError::NoSsh),
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
                    .ok_or(ConnectionError::NoSsh);
            }
        }
        Err(ConnectionError::NoSsh)
    }
}

/// The algorithms of this side (RFC 4253 section 7.1).
fn offer(host_keys: &[&str]) -> Vec<u8> {
    let lists: [&[&str]; 10] = [
        &KEX,
        host_keys,
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

/// The algorithms that both sides have, the client's first choice in each list.
#[derive(Debug)]
struct Chosen {
    kex: &'static str,
    host_key: &'static str,
    sending: &'static str,
    receiving: &'static str,
    reads_extensions: bool,
    /// Whether the peer has sent a message for other algorithms than these.
    guessed_wrong: bool,
}

impl Chosen {
    fn of(end: End, host_keys: &[&'static str], theirs: &[u8]) -> Result<Self, ConnectionError> {
        let mut reader = expect(theirs, message::KEXINIT, "no algorithms")?;
        reader.0 = reader.0.get(16..).ok_or(SshError::Malformed)?;
        let mut guesses = Vec::new();
        let mut pick = |ours: &[&'static str], what: &'static str| {
            let names = reader.text()?;
            let find = |name| ours.iter().copied().find(|other| *other == name);
            let chosen = match end {
                End::Client => ours
                    .iter()
                    .copied()
                    .find(|name| names.split(',').any(|other| other == *name)),
                End::Server => names.split(',').find_map(find),
            };
            let chosen = chosen.ok_or_else(|| ConnectionError::NothingInCommon {
                what,
                theirs: names.chars().take(512).collect(),
            })?;
            guesses.push(names.split(',').next() == Some(chosen));
            Ok::<_, ConnectionError>((chosen, names))
        };
        let (kex, extensions) = pick(&KEX, "key exchange")?;
        let (host_key, _) = pick(host_keys, "host key")?;
        let (to_server, _) = pick(&CIPHERS, "cipher")?;
        let (to_client, _) = pick(&CIPHERS, "cipher")?;
        for _macs_compressions_languages in 0..6 {
            reader.string()?;
        }
        let follows = reader.flag()?;
        let (sending, receiving) = end.order(to_server, to_client);
        Ok(Self {
            kex,
            host_key,
            sending,
            receiving,
            reads_extensions: extensions.split(',').any(|name| name == READS_EXTENSIONS),
            guessed_wrong: follows && guesses.iter().take(2).any(|right| !right),
        })
    }
}
