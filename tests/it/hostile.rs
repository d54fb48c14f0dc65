//! Somebody else where the cluster should be: between the agent and the cluster, or in its place. Each
//! is refused whole, the message names the peer and the fault, and what the agent holds stays.
//!
//! What lies inside of an answer is tried where it is judged: `identity::material`, `identity::bot`,
//! `join::tests`, `cluster::client`.

use std::time::{Duration, Instant};

use bytes::Bytes;
use futures_util::StreamExt as _;
use http_body_util::StreamBody;
use hyper::body::{Frame, Incoming};
use hyper_util::rt::{TokioExecutor, TokioIo};
use tbot::clock::Clock;
use tbot::cluster::dial::{self, Tcp};
use tbot::cluster::trust::Trust;
use tbot::websocket;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWriteExt as _, copy, sink};

use crate::bad_input::{RESOURCES, assert_refused, once, output, snapshot, start};
use crate::common::{Cluster, OutputText as _, Process, Sandbox, eventually, free_port};
use crate::dialling::{Middle, Web};

/// Ends TLS with a certificate of its own, passes everything on to `target`, and keeps what it hears
/// from agents.
fn listener_between(web: &Web, target: String) -> Middle {
    let acceptor = web.acceptor();
    Middle::start(move |stream, log| {
        let (acceptor, target) = (acceptor.clone(), target.clone());
        async move {
            let (mut from_agent, mut to_agent) = tokio::io::split(acceptor.accept(stream).await?);
            let trust = Trust {
                insecure: true,
                ..Trust::default()
            };
            let config = trust.web(&Clock::system(), &[b"h2"]).unwrap();
            let name = dial::server_name(&target).unwrap();
            let cluster = dial::tls(&Tcp, &target, name, config).await.unwrap();
            let (mut from_cluster, mut to_cluster) = tokio::io::split(cluster);
            let there = async {
                let mut bytes = [0; 4096];
                loop {
                    let count = from_agent.read(&mut bytes).await?;
                    if count == 0 {
                        return to_cluster.shutdown().await;
                    }
                    let heard = String::from_utf8_lossy(&bytes[..count]).into_owned();
                    log.lock().unwrap().push(heard);
                    to_cluster.write_all(&bytes[..count]).await?;
                }
            };
            let back = async { copy(&mut from_cluster, &mut to_agent).await.map(drop) };
            tokio::try_join!(there, back).map(drop)
        }
    })
}

#[test]
fn whoever_stands_between_hears_no_token_if_there_are_pins_and_is_told_of_if_not() {
    let sandbox = Sandbox::new();
    let web = Web::new(&sandbox);
    let cluster = Cluster::start(&sandbox, RESOURCES);
    let between = listener_between(&web, cluster.auth());
    let token = cluster.invite("example", "10m");
    let pinned = cluster
        .config(&token, "bot")
        .replace(&cluster.auth(), &format!("127.0.0.1:{}", between.port))
        + "outputs:\n"
        + &output(&sandbox.path("out"));
    let pins = format!("ca_pins: [\"{}\"]", cluster.pin());
    let open = pinned.replace(&pins, "");
    assert_ne!(pinned, open);

    // It shows the cluster's own authorities, but cannot prove to be of the cluster.
    let refused = once(&sandbox, &pinned);
    let address = format!("127.0.0.1:{}", between.port);
    assert_refused(
        &refused,
        &[&format!("TLS with {address} failed"), "certificate"],
    );
    assert!(!between.seen().is_empty(), "it was not asked for anything");
    assert!(
        !between.seen().concat().contains(&token),
        "it heard the token"
    );
    assert!(cluster.events("bot.join").is_empty());
    assert!(!sandbox.path("bot/tlscert").exists());

    // Without pins the same peer is believed, which is said.
    let believed = once(&sandbox, &open);
    let text = believed.text();
    assert!(
        text.contains("Joining without verifying the auth service"),
        "{text}"
    );
    assert!(text.contains(&address), "{text}");
    assert!(
        between.seen().concat().contains(&token),
        "nothing was overheard"
    );
    // From then on, the bot knows the cluster.
    assert_refused(&believed, &["the outputs failed"]);
    assert!(!sandbox.path("out/tlscert").exists());
}

/// An agent that has joined and written, and whose cluster is gone.
struct Orphan<'a> {
    sandbox: &'a Sandbox,
    agent: Process,
    port: u16,
}

impl<'a> Orphan<'a> {
    fn new(sandbox: &'a Sandbox) -> Self {
        let port = free_port();
        let mut cluster = Cluster::start_with(sandbox, RESOURCES, port, &[]);
        let token = cluster.invite("example", "10m");
        let config = cluster.config(&token, "bot") + "outputs:\n" + &output(&sandbox.path("out"));
        let mut agent = start(sandbox, "agent", &config);
        agent.wait_for_log("Wrote the output");
        cluster.stop();
        Self {
            sandbox,
            agent,
            port,
        }
    }

    /// Asks it to renew; it names the peer and the fault, and keeps what it has.
    fn meets(&mut self, texts: &[&str]) {
        let held = || ["bot", "out"].map(|dir| snapshot(&self.sandbox.path(dir)));
        let before = held();
        let log = self.agent.log().len();
        self.agent.signal("HUP");
        let address = format!("127.0.0.1:{}", self.port);
        eventually("the identity is not renewed", || {
            let log = self.agent.log().split_off(log);
            let told = |line: &&str| {
                line.contains("could not be renewed")
                    && line.contains(&address)
                    && texts.iter().all(|text| line.contains(text))
            };
            log.lines().find(told).map(drop).ok_or(log.clone())
        });
        self.agent.check_running();
        assert_eq!(held(), before);
    }
}

#[test]
fn what_is_held_outlives_whatever_stands_in_the_place_of_the_cluster() {
    let sandbox = Sandbox::new();
    let web = Web::new(&sandbox);
    let mut orphan = Orphan::new(&sandbox);
    orphan.meets(&["cannot reach", "Connection refused"]);

    let portal = Middle::start_at(orphan.port, |mut stream, _log| async move {
        let page = "HTTP/1.1 302 Found\r\nLocation: http://portal.invalid/\r\n\r\n";
        stream.write_all(page.as_bytes()).await?;
        stream.shutdown().await
    });
    orphan.meets(&["TLS with"]);
    drop(portal);

    let acceptor = web.acceptor();
    let stranger = Middle::start_at(orphan.port, move |stream, _log| {
        let acceptor = acceptor.clone();
        async move { acceptor.accept(stream).await.map(drop) }
    });
    orphan.meets(&["TLS with", "certificate"]);
    drop(stranger);

    let mut openssl = sandbox.command("openssl");
    openssl
        .args([
            "s_server",
            "-www",
            "-tls1_1",
            "-cipher",
            "DEFAULT@SECLEVEL=0",
        ])
        .args(["-accept", &format!("127.0.0.1:{}", orphan.port)])
        .args(["-cert", "web.crt", "-key", "web.key"]);
    let mut old = sandbox.spawn("old", openssl);
    old.wait_for_log("ACCEPT");
    orphan.meets(&["TLS with", "ProtocolVersion"]);
}

#[test]
fn pages_where_the_proxy_should_be_are_named_and_not_read_for_ever() {
    const JSON: &str = "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n\r\n";
    let sandbox = Sandbox::new();
    let web = Web::new(&sandbox);
    for (case, answer, endless, said) in [
        (
            "a login page",
            "HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Length: 13\r\n\r\n<html></html>",
            false,
            "is there a login page in front?",
        ),
        (
            "a redirect",
            "HTTP/1.1 302 Found\r\nLocation: https://portal.invalid/\r\nContent-Length: 0\r\n\r\n",
            false,
            "answered 302",
        ),
        ("no end", JSON, true, "the answer has more than"),
        ("half an answer", JSON, false, "is not the expected JSON"),
        (
            "no HTTP",
            "220 mail.invalid ESMTP\r\n",
            false,
            "invalid HTTP",
        ),
    ] {
        let acceptor = web.acceptor();
        let page = Middle::start(move |stream, _log| {
            let acceptor = acceptor.clone();
            async move {
                let mut stream = acceptor.accept(stream).await?;
                let mut head = Vec::new();
                while !head.ends_with(b"\r\n\r\n") {
                    head.push(stream.read_u8().await?);
                }
                stream.write_all(answer.as_bytes()).await?;
                if endless {
                    loop {
                        stream.write_all(&[b' '; 4096]).await?;
                    }
                }
                stream.shutdown().await
            }
        });
        let config = format!(
            "version: v2\nproxy_server: localhost:{}\nonboarding: {{join_method: token, token: x}}\n\
             storage: {{type: memory}}\noutputs:\n{}",
            page.port,
            output(&sandbox.path("out")),
        );
        let path = sandbox.write("page.yaml", config);
        let began = Instant::now();
        let mut command = sandbox.tbot(["start", "--oneshot", "-c"]);
        command.arg(path).env("SSL_CERT_FILE", &web.certificate);
        let refused = command.output().unwrap();
        let address = format!("localhost:{}", page.port);
        assert_refused(&refused, &[&address, said]);
        assert!(began.elapsed() < Duration::from_secs(30), "{case}");
    }
}

/// Reads whatever comes, and says nothing.
async fn silence(mut stream: impl AsyncRead + Unpin) -> std::io::Result<()> {
    copy(&mut stream, &mut sink()).await.map(drop)
}

/// The head of an HTTP request.
async fn head(stream: &mut (impl AsyncRead + Unpin)) -> std::io::Result<String> {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(stream.read_u8().await?);
    }
    Ok(String::from_utf8_lossy(&head).into_owned())
}

/// A proxy that upgrades connections, in which nothing is ever said.
fn mute_tunnel(web: &Web) -> Middle {
    const FOUND: &str = r#"{"proxy": {"tls_routing_enabled": true}, "cluster_name": "c"}"#;
    let acceptor = web.acceptor();
    Middle::start(move |stream, log| {
        let acceptor = acceptor.clone();
        async move {
            let mut stream = acceptor.accept(stream).await?;
            let head = head(&mut stream).await?;
            if head.starts_with("GET /webapi/find ") {
                let answer = format!(
                    "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n{FOUND}",
                    FOUND.len()
                );
                stream.write_all(answer.as_bytes()).await?;
                return stream.shutdown().await;
            }
            let key = head
                .lines()
                .filter_map(|line| line.split_once(": "))
                .find(|(name, _)| name.eq_ignore_ascii_case("sec-websocket-key"))
                .map(|(_, key)| websocket::accept(key.trim()))
                .unwrap();
            log.lock().unwrap().push(head);
            let answer = format!(
                "HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\
                 Sec-WebSocket-Protocol: alpn-ping\r\nSec-WebSocket-Accept: {key}\r\n\r\n"
            );
            stream.write_all(answer.as_bytes()).await?;
            silence(stream).await
        }
    })
}

/// An auth service that answers calls whose path has `kind` in it with empty messages and no end, and
/// others with one.
fn endless(web: &Web, kind: &'static str) -> Middle {
    let acceptor = web.acceptor();
    Middle::start(move |stream, log| {
        let acceptor = acceptor.clone();
        async move {
            let stream = acceptor.accept(stream).await?;
            let service = hyper::service::service_fn(move |request: http::Request<Incoming>| {
                let endless = request.uri().path().contains(kind);
                log.lock().unwrap().push(request.uri().path().to_owned());
                let message = Frame::data(Bytes::from_static(&[0; 5]));
                let mut trailers = http::HeaderMap::new();
                trailers.insert("grpc-status", http::HeaderValue::from_static("0"));
                let body = if endless {
                    let messages = Bytes::from_static(&[0; 5 * 1000]);
                    futures_util::stream::repeat_with(move || Frame::data(messages.clone())).boxed()
                } else {
                    futures_util::stream::iter([message, Frame::trailers(trailers)]).boxed()
                };
                let answer = http::Response::builder()
                    .header("content-type", "application/grpc")
                    .body(StreamBody::new(body.map(Ok::<_, std::io::Error>)));
                async { answer }
            });
            hyper::server::conn::http2::Builder::new(TokioExecutor::new())
                .serve_connection(TokioIo::new(stream), service)
                .await
                .map_err(std::io::Error::other)
        }
    })
}

#[test]
fn peers_that_stop_halfway_or_never_stop_are_given_up_and_named() {
    // The beginning of a ServerHello of 118 bytes.
    const HALF: [u8; 9] = [0x16, 3, 3, 0, 0x7a, 2, 0, 0, 0x76];
    let sandbox = Sandbox::new();
    let web = Web::new(&sandbox);
    let half = Middle::start(|mut stream, _log| async move {
        stream.write_all(&HALF).await?;
        silence(stream).await
    });
    let acceptor = web.acceptor();
    let mute = Middle::start(move |stream, _log| {
        let acceptor = acceptor.clone();
        async move { silence(acceptor.accept(stream).await?).await }
    });
    let tunnel = mute_tunnel(&web);
    let joins = endless(&web, "JoinService");
    let peers = [
        ("half", &half, "failed: no answer within 20 s"),
        ("mute", &mute, "Ping: no complete answer within 30 s"),
        ("tunnel", &tunnel, "failed: no answer within 20 s"),
        (
            "joins",
            &joins,
            "an unknown kind instead of a first message",
        ),
    ];
    // All at once: each is waited for as long as its deadline says.
    let mut agents = peers.map(|(name, peer, _)| {
        let server = if name == "tunnel" {
            format!("proxy_server: localhost:{}", peer.port)
        } else {
            format!("auth_server: localhost:{}", peer.port)
        };
        let config = format!(
            "version: v2\n{server}\nonboarding: {{join_method: token, token: x}}\n\
             storage: {{type: memory}}\noutputs:\n{}",
            output(&sandbox.path("out")),
        );
        let path = sandbox.write(&format!("{name}.yaml"), config);
        let mut command = sandbox.tbot(["start", "-c"]);
        command
            .arg(path)
            .env("SSL_CERT_FILE", &web.certificate)
            .env("TELEPORT_TLS_ROUTING_CONN_UPGRADE", "yes");
        sandbox.spawn(name, command)
    });
    for ((name, peer, said), agent) in peers.iter().zip(&mut agents) {
        let address = format!("localhost:{}", peer.port);
        eventually(&format!("{name} is given up"), || {
            agent.check_running();
            let log = agent.log();
            let told = |line: &&str| line.contains(said) && line.contains(&address);
            log.lines().find(told).map(drop).ok_or(log.clone())
        });
    }
    assert!(!tunnel.seen().is_empty(), "no WebSocket was opened");
    for mut agent in agents {
        agent.signal("TERM");
        assert!(agent.wait().success(), "{}", agent.log());
    }
}
