//! The ways to a cluster, tried on the real binary: through a load balancer that hides ALPN, through
//! a forward proxy, to the address that the proxy advertises, to a proxy configured as an auth
//! service.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use tbot::clock::Clock;
use tbot::cluster::dial::{self, Tcp};
use tbot::cluster::trust::Trust;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, copy_bidirectional};
use tokio::net::{TcpListener, TcpStream};
use tokio::runtime::Runtime;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::ServerConfig;
use tokio_rustls::rustls::pki_types::pem::PemObject as _;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer};

use crate::common::{Cluster, OutputText as _, Process, Sandbox, eventually, free_port};

const RESOURCES: &str = r"
kind: role
version: v7
metadata: {name: issuer}
spec: {allow: {workload_identity_labels: {'*': ['*']}}}
---
kind: bot
version: v1
metadata: {name: example}
spec: {roles: [issuer]}
";

/// A name that is no loopback's: forward proxies are not used for those.
const ELSEWHERE: &str = "cluster.test.invalid";

/// A certificate that the agents trust, for `localhost` and [`ELSEWHERE`].
pub(crate) struct Web {
    pub(crate) certificate: PathBuf,
    key: PathBuf,
}

impl Web {
    pub(crate) fn new(sandbox: &Sandbox) -> Self {
        let (certificate, key) = (sandbox.path("web.crt"), sandbox.path("web.key"));
        let mut openssl = sandbox.command("openssl");
        openssl
            .args([
                "req",
                "-x509",
                "-newkey",
                "ec",
                "-pkeyopt",
                "ec_paramgen_curve:P-256",
            ])
            .args(["-nodes", "-days", "2", "-subj", "/CN=web"])
            .args(["-addext", "basicConstraints=critical,CA:FALSE"])
            .args([
                "-addext",
                &format!("subjectAltName=DNS:localhost,DNS:{ELSEWHERE}"),
            ])
            .arg("-keyout")
            .arg(&key)
            .arg("-out")
            .arg(&certificate);
        openssl.output().unwrap().success();
        Self { certificate, key }
    }

    fn arguments(&self) -> [&str; 4] {
        [
            "--tls-cert",
            self.certificate.to_str().unwrap(),
            "--tls-key",
            self.key.to_str().unwrap(),
        ]
    }

    pub(crate) fn acceptor(&self) -> TlsAcceptor {
        let certificate = CertificateDer::from_pem_file(&self.certificate).unwrap();
        let key = PrivateKeyDer::from_pem_file(&self.key).unwrap();
        let config = ServerConfig::builder()
            .with_no_client_auth()
            .with_single_cert(vec![certificate], key)
            .unwrap();
        TlsAcceptor::from(Arc::new(config))
    }
}

/// Something on the way, in threads of its own.
pub(crate) struct Middle {
    _runtime: Runtime,
    pub(crate) port: u16,
    connections: Arc<AtomicUsize>,
    seen: Arc<Mutex<Vec<String>>>,
}

impl Middle {
    /// Answers each connection on a port of its own with `serve`.
    pub(crate) fn start<F>(
        serve: impl Fn(TcpStream, Arc<Mutex<Vec<String>>>) -> F + Send + Sync + 'static,
    ) -> Self
    where
        F: Future<Output = std::io::Result<()>> + Send + 'static,
    {
        Self::start_at(0, serve)
    }

    /// The same on `port`.
    pub(crate) fn start_at<F>(
        port: u16,
        serve: impl Fn(TcpStream, Arc<Mutex<Vec<String>>>) -> F + Send + Sync + 'static,
    ) -> Self
    where
        F: Future<Output = std::io::Result<()>> + Send + 'static,
    {
        let runtime = Runtime::new().unwrap();
        let bind = TcpListener::bind(SocketAddr::from(([127, 0, 0, 1], port)));
        let listener = runtime.block_on(bind).unwrap();
        let port = listener.local_addr().unwrap().port();
        let connections = Arc::new(AtomicUsize::new(0));
        let seen = Arc::new(Mutex::new(Vec::new()));
        let (count, log) = (Arc::clone(&connections), Arc::clone(&seen));
        runtime.spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                count.fetch_add(1, Ordering::Relaxed);
                tokio::spawn(serve(stream, Arc::clone(&log)));
            }
        });
        Self {
            _runtime: runtime,
            port,
            connections,
            seen,
        }
    }

    /// Ends TLS without ALPN, as load balancers for HTTP do, and passes HTTP/1.1 on over TLS of its
    /// own to `target`. Keeps the first line of each connection.
    fn load_balancer(web: &Web, target: String) -> Self {
        let acceptor = web.acceptor();
        Self::start(move |stream, log| {
            let (acceptor, target) = (acceptor.clone(), target.clone());
            async move {
                let mut near = acceptor.accept(stream).await?;
                let trust = Trust {
                    insecure: true,
                    ..Trust::default()
                };
                let config = trust.web(&Clock::system(), &[b"http/1.1"]).unwrap();
                let name = dial::server_name(&target).unwrap();
                let mut far = dial::tls(&Tcp, &target, name, config).await.unwrap();
                let mut first = Vec::new();
                while !first.ends_with(b"\r\n") {
                    first.push(near.read_u8().await?);
                }
                log.lock()
                    .unwrap()
                    .push(String::from_utf8_lossy(&first).trim().to_owned());
                far.write_all(&first).await?;
                copy_bidirectional(&mut near, &mut far).await.map(drop)
            }
        })
    }

    /// Passes bytes on to `target`.
    fn pass_through(target: String) -> Self {
        Self::start(move |mut near, _log| {
            let target = target.clone();
            async move {
                let mut far = TcpStream::connect(target).await?;
                copy_bidirectional(&mut near, &mut far).await.map(drop)
            }
        })
    }

    /// A forward proxy: every host is at `target`. Keeps the heads of its requests.
    fn forward_proxy(target: String) -> Self {
        Self::start(move |mut near, log| {
            let target = target.clone();
            async move {
                let mut head = Vec::new();
                while !head.ends_with(b"\r\n\r\n") {
                    head.push(near.read_u8().await?);
                }
                let head = String::from_utf8_lossy(&head).into_owned();
                let knows = head.to_lowercase().contains("proxy-authorization: basic");
                log.lock().unwrap().push(head);
                if !knows {
                    return near.write_all(b"HTTP/1.1 407 Who are you\r\n\r\n").await;
                }
                near.write_all(b"HTTP/1.1 200 Connected\r\n\r\n").await?;
                let mut far = TcpStream::connect(target).await?;
                copy_bidirectional(&mut near, &mut far).await.map(drop)
            }
        })
    }

    fn connections(&self) -> usize {
        self.connections.load(Ordering::Relaxed)
    }

    pub(crate) fn seen(&self) -> Vec<String> {
        self.seen.lock().unwrap().clone()
    }
}

/// An agent with one output, whose cluster is at `server` (`proxy_server: …`).
struct Agent<'a> {
    sandbox: &'a Sandbox,
    process: Process,
}

impl<'a> Agent<'a> {
    fn start(
        sandbox: &'a Sandbox,
        web: &Web,
        server: &str,
        token: &str,
        set: impl FnOnce(&mut Command),
    ) -> Self {
        let config = format!(
            "version: v2\n{server}\nonboarding: {{join_method: token, token: {token}}}\n\
             storage: {{type: directory, path: {}}}\noutputs:\n  - {{type: identity, \
             destination: {{type: directory, path: {}}}}}\n",
            sandbox.path("bot").display(),
            sandbox.path("out").display(),
        );
        let path = sandbox.write("agent.yaml", config);
        let mut command = sandbox.tbot(["start", "--debug", "-c"]);
        command.arg(path).env("SSL_CERT_FILE", &web.certificate);
        set(&mut command);
        Self {
            process: sandbox.spawn("agent", command),
            sandbox,
        }
    }

    /// Waits until it has joined, written its output, and renewed.
    fn lives(&mut self) {
        let certificate = || std::fs::read(self.sandbox.path("out/tlscert"));
        let process = &mut self.process;
        let first = eventually("the output is written", || {
            process.check_running();
            certificate()
        });
        process.signal("HUP");
        process.wait_for_log("generation:2");
        eventually("the output is new", || match certificate() {
            Ok(now) if now != first => Ok(()),
            other => Err(format!("{other:?}")),
        });
    }
}

#[test]
fn a_load_balancer_that_hides_alpn_is_passed_through() {
    let sandbox = Sandbox::new();
    let web = Web::new(&sandbox);
    let cluster = Cluster::start_with(&sandbox, RESOURCES, free_port(), &web.arguments());
    let front = Middle::load_balancer(&web, cluster.proxy());
    let server = format!("proxy_server: localhost:{}", front.port);
    let token = cluster.invite("example", "10m");
    let mut agent = Agent::start(&sandbox, &web, &server, &token, |command| {
        // The cluster advertises an address behind the front.
        command.env("TBOT_USE_PROXY_ADDR", "yes");
    });
    agent.lives();
    agent.process.wait_for_log("hides ALPN");
    let upgrades = |line: &&String| line.starts_with("GET /webapi/connectionupgrade ");
    // One to join, one as the bot.
    assert!(
        front.seen().iter().filter(upgrades).count() >= 2,
        "{:?}",
        front.seen()
    );
}

#[test]
fn a_proxy_without_tls_routing_is_passed_by_ssh() {
    let sandbox = Sandbox::new();
    let web = Web::new(&sandbox);
    let listen = format!("127.0.0.1:{}", free_port());
    let mut arguments = web.arguments().to_vec();
    arguments.extend(["--tunnel-listen", &listen]);
    let cluster = Cluster::start_with(&sandbox, RESOURCES, free_port(), &arguments);
    let token = cluster.invite("example", "10m");
    let server = format!("proxy_server: {}", cluster.proxy());
    let mut agent = Agent::start(&sandbox, &web, &server, &token, |_| {});
    agent.lives();
    // OpenSSH believes the host by the authority in the output, and is not let in as anybody.
    let file = |name: &str| sandbox.path("out").join(name).display().to_string();
    let mut ssh = sandbox.command("ssh");
    ssh.args(["-v", "-F", "none", "-l", "root", "-o", "BatchMode=yes"])
        .args(["-o", "StrictHostKeyChecking=yes"])
        .args(["-o", "HostKeyAlias=localhost"])
        .args(["-o", &format!("UserKnownHostsFile={}", file("known_hosts"))])
        .args(["-o", &format!("CertificateFile={}", file("key-cert.pub"))])
        .args(["-i", &file("key")])
        .args(["-p", listen.rsplit(':').next().unwrap()])
        .args(["127.0.0.1", "true"]);
    let shown = ssh.output().unwrap();
    let log = String::from_utf8_lossy(&shown.stderr);
    assert!(
        log.contains("Host 'localhost' is known and matches the ECDSA-CERT host certificate"),
        "{log}"
    );
    assert!(log.contains("Permission denied (publickey)"), "{log}");
}

#[test]
fn the_variable_of_upgrades_goes_before_the_probe() {
    let sandbox = Sandbox::new();
    let web = Web::new(&sandbox);
    let cluster = Cluster::start_with(&sandbox, RESOURCES, free_port(), &web.arguments());
    let front = Middle::load_balancer(&web, cluster.proxy());
    let address = format!("localhost:{}", front.port);
    let token = cluster.invite("example", "10m");
    let mut agent = Agent::start(
        &sandbox,
        &web,
        &format!("proxy_server: {address}"),
        &token,
        |command| {
            command.env("TBOT_USE_PROXY_ADDR", "yes").env(
                "TELEPORT_TLS_ROUTING_CONN_UPGRADE",
                format!("{address}=yes"),
            );
        },
    );
    agent.lives();
    assert!(!agent.process.log().contains("hides ALPN"), "no probe");
}

#[test]
fn a_forward_proxy_carries_everything() {
    let sandbox = Sandbox::new();
    let web = Web::new(&sandbox);
    let cluster = Cluster::start_with(&sandbox, RESOURCES, free_port(), &web.arguments());
    let forward = Middle::forward_proxy(cluster.proxy());
    let token = cluster.invite("example", "10m");
    let server = format!("proxy_server: {ELSEWHERE}:3080");
    let mut agent = Agent::start(&sandbox, &web, &server, &token, |command| {
        command
            .env("TBOT_USE_PROXY_ADDR", "yes")
            .env("NO_PROXY", "other.test.invalid")
            .env(
                "HTTPS_PROXY",
                format!("http://bot:hunter%32@127.0.0.1:{}", forward.port),
            );
    });
    agent.lives();
    let seen = forward.seen();
    assert!(seen.len() >= 4, "{seen:?}");
    for head in &seen {
        assert!(
            head.starts_with("CONNECT cluster.test.invalid:3080 HTTP/1.1\r\n"),
            "{head}"
        );
        // base64 of bot:hunter2
        assert!(head.contains("Basic Ym90Omh1bnRlcjI="), "{head}");
    }
    assert!(
        !agent.process.log().contains("hunter"),
        "{}",
        agent.process.log()
    );
}

#[test]
fn a_forward_proxy_that_is_not_understood_ends_the_start() {
    let sandbox = Sandbox::new();
    let web = Web::new(&sandbox);
    let mut agent = Agent::start(&sandbox, &web, "proxy_server: x:1", "t", |command| {
        command.env("HTTPS_PROXY", "socks5://bot:hunter2@127.0.0.1:1080");
    });
    assert!(!agent.process.wait().success());
    let log = agent.process.log();
    assert!(
        log.contains("HTTPS_PROXY") && log.contains("http://host:port"),
        "{log}"
    );
    assert!(!log.contains("hunter2"), "{log}");
}

#[test]
fn agents_connect_where_the_proxy_wants_them_to() {
    let sandbox = Sandbox::new();
    let web = Web::new(&sandbox);
    let port = free_port();
    let listen = format!("127.0.0.1:{port}");
    let advertised = Middle::pass_through(listen.clone());
    let public = format!("localhost:{}", advertised.port);
    let cluster = Cluster::start_at(&sandbox, RESOURCES, port, &public, &web.arguments());
    let token = cluster.invite("example", "10m");
    let server = format!("proxy_server: localhost:{port}");
    let mut agent = Agent::start(&sandbox, &web, &server, &token, |_| {});
    agent.lives();
    assert!(advertised.connections() > 0, "{}", agent.process.log());
    // Nobody listens there any more: the configured address serves as well.
    drop(advertised);
    agent.process.signal("HUP");
    agent.process.wait_for_log("generation:3");
}

#[test]
fn a_proxy_that_is_called_an_auth_service_is_told_and_used() {
    let sandbox = Sandbox::new();
    let web = Web::new(&sandbox);
    let cluster = Cluster::start_with(&sandbox, RESOURCES, free_port(), &web.arguments());
    let token = cluster.invite("example", "10m");
    let server = format!("auth_server: {}", cluster.proxy());
    let mut agent = Agent::start(&sandbox, &web, &server, &token, |_| {});
    agent.lives();
    agent
        .process
        .wait_for_log("auth_server is the address of a proxy");
}
