//! The gate against a small client that does one thing wrong at a time.

use std::collections::BTreeMap;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream};

use super::*;
use crate::clock::Clock;
use crate::crypto::ssh::NewCertificate;
use crate::crypto::ssh_wire::Reader;
use crate::crypto::{KeyAlgorithm, PrivateKey, Suite};
use crate::embedded::store::Store;

/// What the client does other than it should.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fault {
    None,
    /// Its certificate is from somebody else.
    Stranger,
    /// Its certificate is over.
    Expired,
    /// Its certificate does not have the name that bots log in as.
    OtherName,
    /// It shows a host's certificate.
    Host,
    /// It does not hold the key of the certificate.
    Stolen,
    /// It logs in as somebody else.
    Root,
    /// It shows a key without a certificate.
    PlainKey,
    /// It wants a shell.
    Session,
    /// It wants to be led somewhere else.
    Elsewhere,
    /// It goes on without a log-in.
    NoLogin,
}

const NAMES: [&str; 1] = ["localhost"];

fn authorities(now: SystemTime) -> Authorities {
    let store = Store::in_memory(Clock::simulated(now)).unwrap();
    Authorities::open(&store, "root", Suite::BalancedV1, now).unwrap()
}

/// Talks to the gate as a bot until it is let in or refused. Returns the channel's bytes.
async fn knock(
    authorities: &Authorities,
    now: SystemTime,
    fault: Fault,
    io: DuplexStream,
) -> Result<(Connection<DuplexStream>, Channel), ConnectionError> {
    let key = PrivateKey::generate(KeyAlgorithm::EcdsaP256).unwrap();
    let other = PrivateKey::generate(KeyAlgorithm::EcdsaP256).unwrap();
    let user = authorities.get(AuthorityType::User);
    let login = if fault == Fault::OtherName {
        "root"
    } else {
        USER
    };
    let life = Duration::from_hours(1);
    let (from, until) = if fault == Fault::Expired {
        (now - 2 * life, now - life)
    } else {
        (now, now + life)
    };
    let line = NewCertificate {
        holder: if fault == Fault::Host {
            Holder::Host
        } else {
            Holder::User
        },
        spki: &key.public_spki(),
        serial: 1,
        key_id: "bot-example",
        principals: &[login.to_owned()],
        valid_after: from,
        valid_before: until,
        extensions: &BTreeMap::new(),
    }
    .sign(if fault == Fault::Stranger {
        &other
    } else {
        user.ssh_signer().unwrap()
    })
    .unwrap();
    let shown = if fault == Fault::PlainKey {
        wire_of_line(&key.public_ssh_line().unwrap()).unwrap()
    } else {
        wire_of_line(&line).unwrap()
    };
    let signer = if fault == Fault::Stolen { &other } else { &key };

    let mut connection = Connection::new(io);
    let session = agree(&mut connection, authorities, now).await?;
    if fault != Fault::NoLogin {
        let name = if fault == Fault::Root { "root" } else { USER };
        log_in(&mut connection, session, name, &shown, signer).await?;
    }
    let kind = match fault {
        Fault::Session => "session",
        _ => "teleport-transport",
    };
    let ask = Writer::message(message::CHANNEL_OPEN).string(kind).u32(7);
    connection
        .outgoing
        .send(&ask.u32(WINDOW).u32(CHUNK).0)
        .await?;
    let reply = connection.next().await?;
    let mut reader = expect(&reply, message::CHANNEL_OPENED, "")?;
    assert_eq!(reader.u32()?, 7);
    let channel = Channel {
        number: reader.u32()?,
        window: reader.u32()?,
        chunk: reader.u32()?,
    };
    let address = match fault {
        Fault::Elsewhere => "@local-node",
        _ => AUTH,
    };
    let dial = Writer::message(message::CHANNEL_REQUEST)
        .u32(channel.number)
        .string("teleport-transport-dial")
        .flag(true)
        .bytes(format!(r#"{{"address":"{address}","conn_type":""}}"#).as_bytes());
    connection.outgoing.send(&dial.0).await?;
    expect(&connection.next().await?, message::CHANNEL_SUCCESS, "")?;
    Ok((connection, channel))
}

/// Agrees on keys with the gate, which has to be one of the cluster's hosts.
async fn agree(
    connection: &mut Connection<DuplexStream>,
    authorities: &Authorities,
    now: SystemTime,
) -> Result<[u8; 32], ConnectionError> {
    let negotiated = connection.negotiate(End::Client, &HOST_KEYS).await?;
    let half = negotiated.half()?;
    let hello = Writer::message(message::ECDH_INIT).string(&half.public);
    connection.outgoing.send(&hello.0).await?;
    let reply = connection.next().await?;
    let mut reader = expect(&reply, message::ECDH_REPLY, "")?;
    let (host, public, signature) = (reader.string()?, reader.string()?, reader.string()?);
    let agreed = negotiated.agree(half, public, host)?;
    let certificate = SignedCertificate::parse(host, Holder::Host)?;
    let trusted: Vec<Vec<u8>> = authorities
        .trusted_ssh(AuthorityType::Host)
        .iter()
        .map(|line| wire_of_line(line).unwrap())
        .collect();
    assert!(certificate.is_good(&trusted, now));
    assert_eq!(certificate.principals, NAMES);
    assert!(is_signed(&certificate.key, &agreed.session, signature));
    connection.seal(&negotiated, &agreed).await?;
    Ok(agreed.session)
}

/// Logs in with what `shown` is, signing with `signer`.
async fn log_in(
    connection: &mut Connection<DuplexStream>,
    session: [u8; 32],
    name: &str,
    shown: &[u8],
    signer: &PrivateKey,
) -> Result<(), ConnectionError> {
    let ask = Writer::message(message::SERVICE_REQUEST).string("ssh-userauth");
    connection.outgoing.send(&ask.0).await?;
    expect(&connection.next().await?, message::SERVICE_ACCEPT, "")?;
    let request = |method: &str| {
        Writer::message(message::USERAUTH_REQUEST)
            .string(name)
            .string("ssh-connection")
            .string(method)
    };
    connection.outgoing.send(&request("none").0).await?;
    let reply = connection.next().await?;
    let mut methods = expect(&reply, message::USERAUTH_FAILURE, "")?;
    assert_eq!(methods.text()?, "publickey");
    let algorithm = Reader(shown).text()?.to_owned();
    let question = request("publickey").flag(false);
    let question = question.string(&algorithm).string(shown);
    connection.outgoing.send(&question.0).await?;
    let reply = connection.next().await?;
    let refused = ConnectionError::Refused("log-in".to_owned());
    if reply.first() != Some(&message::USERAUTH_KEY_OK) {
        return Err(refused);
    }
    let request = request("publickey").flag(true);
    let request = request.string(&algorithm).string(shown);
    let to_sign = Writer::default().string(session).bytes(&request.0);
    let request = request.string(sign(signer, &to_sign.0)?);
    connection.outgoing.send(&request.0).await?;
    let reply = connection.next().await?;
    if reply.first() != Some(&message::USERAUTH_SUCCESS) {
        return Err(refused);
    }
    Ok(())
}

/// Both ends at once: what the gate says, and what the bot sees.
async fn meet(
    fault: Fault,
) -> (
    Result<(Connection<DuplexStream>, Channel), ConnectionError>,
    Result<(Connection<DuplexStream>, Channel), ConnectionError>,
) {
    let now = Clock::system().now();
    let authorities = authorities(now);
    let names = NAMES.map(str::to_owned);
    let gate = Gate {
        authorities: &authorities,
        names: &names,
        now,
    };
    let (near, far) = tokio::io::duplex(64 * 1024);
    tokio::join!(gate.open(far), knock(&authorities, now, fault, near))
}

#[tokio::test]
async fn a_bot_is_let_through_and_bytes_go_both_ways() {
    let (gate, bot) = meet(Fault::None).await;
    let ((gate, gate_channel), (bot, bot_channel)) = (gate.unwrap(), bot.unwrap());
    let (mut auth, auth_far) = tokio::io::duplex(1024);
    let (mut agent, agent_far) = tokio::io::duplex(1024);
    let carrying = tokio::spawn(async move {
        tokio::join!(
            gate_channel.run(gate, auth_far),
            bot_channel.run(bot, agent_far)
        )
    });
    let sent = vec![42; 3 * 1024 * 1024];
    let expected = sent.clone();
    let writing = tokio::spawn(async move {
        agent.write_all(&sent).await.unwrap();
        agent
    });
    let mut received = vec![0; expected.len()];
    auth.read_exact(&mut received).await.unwrap();
    assert!(received == expected, "the bytes changed");
    let mut agent = writing.await.unwrap();
    auth.write_all(b"hello").await.unwrap();
    drop(auth);
    let mut last = Vec::new();
    agent.read_to_end(&mut last).await.unwrap();
    assert_eq!(last, b"hello");
    let (gate, bot) = carrying.await.unwrap();
    assert!(gate.is_ok() && bot.is_ok(), "{gate:?} {bot:?}");
}

#[tokio::test]
async fn nobody_else_gets_through() {
    for fault in [
        Fault::Stranger,
        Fault::Expired,
        Fault::OtherName,
        Fault::Host,
        Fault::Stolen,
        Fault::Root,
        Fault::PlainKey,
        Fault::Session,
        Fault::Elsewhere,
        Fault::NoLogin,
    ] {
        let (gate, bot) = meet(fault).await;
        assert!(gate.is_err(), "{fault:?} was let in");
        assert!(bot.is_err(), "{fault:?} was told so");
    }
}
