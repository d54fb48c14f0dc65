//! The client against a small server of the same protocol. Real ones are tried by hand: see
//! `docs/compatibility.md`.

use std::collections::BTreeMap;
use std::time::SystemTime;

use aws_lc_rs::agreement::{self, EphemeralPrivateKey, UnparsedPublicKey, X25519};
use aws_lc_rs::rand::SystemRandom;

use super::*;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream, ReadHalf, WriteHalf};

use crate::crypto::ssh::{Holder, NewCertificate, sign};
use crate::crypto::ssh_cert::is_signed;
use crate::crypto::ssh_cert::tests::certify;
use crate::crypto::{KeyAlgorithm, sha256};
use crate::ssh::packet::{Incoming, Outgoing, Seal, cipher};

/// What the server does other than it should.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fault {
    None,
    NoSsh,
    Endless,
    OldVersion,
    Hang,
    OtherCiphers,
    Stranger,
    Expired,
    OtherKey,
    Idle,
    NoLogin,
    NoChannel,
    NoDial,
    HangUp,
    Disconnect,
    Rekey,
    TooMuch,
}

#[derive(Debug, Clone)]
struct Proxy {
    authority: PrivateKey,
    host: PrivateKey,
    bot: PrivateKey,
    fault: Fault,
}

const NOW: u64 = 1_800_000_000;

fn now() -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_secs(NOW)
}

fn wire(key: &PrivateKey) -> Vec<u8> {
    wire_of_line(&key.public_ssh_line().unwrap()).unwrap()
}

impl Proxy {
    fn new(fault: Fault, algorithm: KeyAlgorithm) -> Self {
        let key = || PrivateKey::generate(algorithm).unwrap();
        Self {
            authority: key(),
            host: key(),
            bot: key(),
            fault,
        }
    }

    fn identity(&self) -> SshIdentity {
        let certificate = NewCertificate {
            holder: Holder::User,
            spki: &self.bot.public_spki(),
            serial: 1,
            key_id: "bot-example",
            principals: &["-teleport-internal-join".to_owned()],
            valid_after: now(),
            valid_before: now() + Duration::from_hours(1),
            extensions: &BTreeMap::new(),
        };
        let line = certificate.sign(&self.authority).unwrap();
        let authorities = [self.authority.public_ssh_line().unwrap()];
        SshIdentity::new(&Clock::simulated(now()), &self.bot, &line, &authorities).unwrap()
    }

    async fn dial(&self) -> io::Result<BoxedIo> {
        let (near, far) = tokio::io::duplex(256 * 1024);
        let proxy = self.clone();
        tokio::spawn(async move { proxy.serve(far).await });
        open(Box::pin(near), &self.identity()).await
    }

    fn certificate(&self) -> Vec<u8> {
        let stranger = PrivateKey::generate(KeyAlgorithm::Ed25519).unwrap();
        match self.fault {
            Fault::Stranger => certify(&self.host, &stranger, 2, (0, u64::MAX)),
            Fault::Expired => certify(&self.host, &self.authority, 2, (0, NOW)),
            _ => certify(&self.host, &self.authority, 2, (0, u64::MAX)),
        }
    }

    async fn serve(self, io: DuplexStream) -> Result<(), ConnectionError> {
        let (mut read, mut write) = tokio::io::split(io);
        let greeting = match self.fault {
            Fault::NoSsh => "HTTP/1.1 400 Bad Request\r\n\r\n<html>\r\n",
            Fault::Endless => "",
            Fault::OldVersion => "SSH-1.5-ancient\r\n",
            _ => "welcome\r\nSSH-2.0-test comment\r\n",
        };
        write.write_all(greeting.as_bytes()).await?;
        if self.fault == Fault::Endless {
            loop {
                write.write_all(&[b'x'; 1024]).await?;
            }
        }
        if self.fault == Fault::NoSsh {
            return Ok(());
        }
        let mut line = Vec::new();
        while line.last() != Some(&b'\n') {
            line.push(read.read_u8().await?);
        }
        let version = String::from_utf8(line).unwrap();
        let mut incoming = Incoming {
            io: read,
            seal: None,
        };
        let mut outgoing = Outgoing {
            io: write,
            seal: None,
        };
        let theirs = incoming.packet().await?;
        if self.fault == Fault::Hang {
            return std::future::pending().await;
        }
        let ours = self.offer();
        outgoing.send(&ours).await?;

        let hello = incoming.packet().await?;
        let their_public = expect(&hello, message::ECDH_INIT, "")?.string()?;
        let secret = EphemeralPrivateKey::generate(&X25519, &SystemRandom::new()).unwrap();
        let public = secret.compute_public_key().unwrap();
        let peer = UnparsedPublicKey::new(&X25519, their_public);
        let shared = agreement::agree_ephemeral(secret, peer, (), |shared| {
            Ok(Writer::default().number(shared).0)
        })
        .unwrap();
        let host = self.certificate();
        let exchange = Writer::default()
            .string(version.trim_end())
            .string("SSH-2.0-test comment")
            .string(&theirs)
            .string(&ours)
            .string(&host)
            .string(their_public)
            .string(&public)
            .bytes(&shared);
        let session = sha256(&exchange.0);
        let signer = if self.fault == Fault::OtherKey {
            &self.bot
        } else {
            &self.host
        };
        let reply = Writer::message(message::ECDH_REPLY)
            .string(&host)
            .string(&public)
            .string(sign(signer, &session).unwrap());
        outgoing.send(&reply.0).await?;
        outgoing.send(&[message::NEW_KEYS]).await?;
        assert_eq!(incoming.packet().await?, [message::NEW_KEYS]);
        let derive = |letter| {
            let seed = Writer::default().bytes(&shared).bytes(&session);
            sha256(&seed.bytes(&[letter]).bytes(&session).0)
        };
        let seal = |key, iv| {
            let aes = cipher("aes256-gcm@openssh.com").unwrap();
            Seal::new(aes, &derive(key), &derive(iv))
        };
        outgoing.seal = seal(b'D', b'B');
        incoming.seal = seal(b'C', b'A');
        if self.fault == Fault::Idle {
            loop {
                outgoing.send(&[message::IGNORE]).await?;
            }
        }

        let ask = Writer::message(message::SERVICE_REQUEST).string("ssh-userauth");
        assert_eq!(incoming.packet().await?, ask.0);
        for idle in [message::EXT_INFO, message::IGNORE, message::SERVICE_ACCEPT] {
            outgoing.send(&[idle]).await?;
        }
        let login = incoming.packet().await?;
        if self.fault == Fault::NoLogin {
            return Ok(outgoing.send(&[message::USERAUTH_FAILURE]).await?);
        }
        self.check(&login, &session)?;
        outgoing.send(&[message::BANNER]).await?;
        outgoing.send(&[message::USERAUTH_SUCCESS]).await?;
        self.channel(incoming, outgoing).await
    }

    fn offer(&self) -> Vec<u8> {
        let ciphers = match self.fault {
            Fault::OtherCiphers => "arcfour",
            _ => "aes256-ctr,aes256-gcm@openssh.com",
        };
        let plain = wire(&self.host);
        let host_key = match Reader(&plain).text().unwrap() {
            "ssh-rsa" => "rsa-sha2-512",
            name => name,
        };
        let host_key = format!("{host_key}-cert-v01@openssh.com");
        let kex = "sntrup761x25519-sha512,curve25519-sha256";
        let lists = [
            kex, &host_key, ciphers, ciphers, "m", "m", "none", "none", "", "",
        ];
        lists
            .iter()
            .fold(
                Writer::message(message::KEXINIT).bytes(&[0; 16]),
                Writer::string,
            )
            .flag(false)
            .u32(0)
            .0
    }

    /// Whether the bot holds the key of its certificate.
    fn check(&self, login: &[u8], session: &[u8]) -> Result<(), ConnectionError> {
        let mut reader = expect(login, message::USERAUTH_REQUEST, "")?;
        assert_eq!(reader.text()?, "-teleport-internal-join");
        assert_eq!(reader.text()?, "ssh-connection");
        assert_eq!(reader.text()?, "publickey");
        assert!(reader.flag()?);
        assert!(reader.text()?.ends_with("-cert-v01@openssh.com"));
        assert!(!reader.string()?.is_empty());
        let signed = login.len() - reader.0.len();
        let signature = reader.string()?;
        let message = Writer::default().string(session).bytes(&login[..signed]);
        assert!(is_signed(&wire(&self.bot), &message.0, signature));
        Ok(())
    }

    /// Sends back what comes, with a small window.
    async fn channel(
        self,
        mut incoming: Incoming<ReadHalf<DuplexStream>>,
        mut outgoing: Outgoing<WriteHalf<DuplexStream>>,
    ) -> Result<(), ConnectionError> {
        const SMALL: u32 = 5000;
        let ask = incoming.packet().await?;
        let mut reader = expect(&ask, message::CHANNEL_OPEN, "")?;
        assert_eq!(reader.text()?, "teleport-transport");
        if self.fault == Fault::NoChannel {
            let refusal = Writer::message(message::CHANNEL_OPEN_FAILURE).u32(0).u32(3);
            let refusal = refusal.string("not here").string("");
            return Ok(outgoing.send(&refusal.0).await?);
        }
        // Peers ask whether anybody is there.
        let alive = Writer::message(message::GLOBAL_REQUEST)
            .string("keepalive")
            .flag(true);
        outgoing.send(&alive.0).await?;
        assert_eq!(incoming.packet().await?, [message::REQUEST_FAILURE]);
        let opened = Writer::message(message::CHANNEL_OPENED).u32(0).u32(7);
        outgoing.send(&opened.u32(SMALL).u32(1000).0).await?;
        let dial = incoming.packet().await?;
        let mut reader = expect(&dial, message::CHANNEL_REQUEST, "")?;
        assert_eq!(
            (reader.u32()?, reader.text()?),
            (7, "teleport-transport-dial")
        );
        assert!(reader.flag()?);
        assert_eq!(reader.0, DESTINATION.as_bytes());
        if self.fault == Fault::NoDial {
            let reason = Writer::message(message::EXTENDED_DATA).u32(0).u32(1);
            outgoing
                .send(&[message::CHANNEL_FAILURE, 0, 0, 0, 0])
                .await?;
            return Ok(outgoing.send(&reason.string("auth is away\n").0).await?);
        }
        outgoing
            .send(&[message::CHANNEL_SUCCESS, 0, 0, 0, 0])
            .await?;
        let last = match self.fault {
            Fault::HangUp => return Ok(()),
            Fault::Disconnect => Some(vec![message::DISCONNECT, 0, 0, 0, 2]),
            Fault::Rekey => Some(self.offer()),
            _ => None,
        };
        if let Some(last) = last {
            outgoing.send(&last).await?;
            return std::future::pending().await;
        }
        if self.fault == Fault::TooMuch {
            let data = vec![0; 30_000];
            let data = Writer::message(message::DATA).u32(0).string(data);
            loop {
                outgoing.send(&data.0).await?;
            }
        }
        let mut granted = SMALL;
        let mut window = WINDOW;
        loop {
            let packet = incoming.packet().await?;
            let mut reader = Reader(&packet);
            match reader.byte()? {
                message::DATA => {
                    assert_eq!(reader.u32()?, 7);
                    let data = reader.string()?;
                    assert!(data.len() <= 1000, "more than a packet may hold");
                    let count = u32::try_from(data.len()).unwrap();
                    granted = granted.checked_sub(count).expect("within the window");
                    window = window.checked_sub(count).expect("the client reads");
                    let back = Writer::message(message::DATA).u32(0).string(data);
                    outgoing.send(&back.0).await?;
                    if granted < 1000 {
                        let more = Writer::message(message::WINDOW_ADJUST).u32(0);
                        outgoing.send(&more.u32(SMALL - granted).0).await?;
                        granted = SMALL;
                    }
                }
                message::WINDOW_ADJUST => {
                    assert_eq!(reader.u32()?, 7);
                    window += reader.u32()?;
                }
                message::CLOSE => return Ok(()),
                other => panic!("message {other}"),
            }
        }
    }
}

#[tokio::test]
async fn bytes_go_both_ways_within_the_windows() {
    for algorithm in [
        KeyAlgorithm::Rsa2048,
        KeyAlgorithm::EcdsaP256,
        KeyAlgorithm::Ed25519,
    ] {
        let proxy = Proxy::new(Fault::None, algorithm);
        let (mut read, mut write) = tokio::io::split(proxy.dial().await.unwrap());
        let sent: Vec<u8> = (0..3_000_000_u32).map(|n| n.to_le_bytes()[0]).collect();
        let copy = sent.clone();
        let writing = tokio::spawn(async move {
            write.write_all(&copy).await.unwrap();
            write.flush().await.unwrap();
            write
        });
        let mut back = vec![0; sent.len()];
        read.read_exact(&mut back).await.unwrap();
        assert!(back == sent, "the bytes changed");
        drop(writing.await.unwrap());
    }
}

#[tokio::test(start_paused = true)]
async fn a_proxy_that_is_not_one_or_refuses_is_named_with_its_fault() {
    for (fault, text) in [
        (Fault::NoSsh, "it does not speak SSH"),
        (Fault::Endless, "it does not speak SSH"),
        (Fault::OldVersion, "it does not speak SSH"),
        (Fault::Hang, "no answer within 20 s"),
        (
            Fault::OtherCiphers,
            "no cipher in common; it offers arcfour",
        ),
        (
            Fault::Stranger,
            "none of the cluster's authorities vouches for it",
        ),
        (
            Fault::Expired,
            "none of the cluster's authorities vouches for it now",
        ),
        (Fault::OtherKey, "it does not hold the key that it shows"),
        (Fault::Idle, "nothing but idle messages"),
        (Fault::NoLogin, "it does not accept the bot's certificate"),
        (Fault::NoChannel, "the proxy opens no channel: not here"),
        (
            Fault::NoDial,
            "does not reach the auth service: auth is away",
        ),
    ] {
        let proxy = Proxy::new(fault, KeyAlgorithm::Ed25519);
        let Err(error) = proxy.dial().await else {
            panic!("{fault:?} was not noticed");
        };
        assert!(error.to_string().contains(text), "{fault:?}: {error}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_tunnel_that_ends_ends_the_stream() {
    for fault in [Fault::HangUp, Fault::Disconnect, Fault::Rekey] {
        let mut stream = Proxy::new(fault, KeyAlgorithm::Ed25519)
            .dial()
            .await
            .unwrap();
        let mut buffer = Vec::new();
        assert_eq!(
            stream.read_to_end(&mut buffer).await.unwrap(),
            0,
            "{fault:?}"
        );
    }
    // A peer that sends without being read fills its window, not the memory.
    let mut stream = Proxy::new(Fault::TooMuch, KeyAlgorithm::Ed25519)
        .dial()
        .await
        .unwrap();
    tokio::time::sleep(Duration::from_secs(60)).await;
    let mut first = [0; 1000];
    stream.read_exact(&mut first).await.unwrap();
}
