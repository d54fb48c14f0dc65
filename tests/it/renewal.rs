//! The bot's own identity over days of simulated time, against the embedded cluster over TLS in
//! memory: every renewal is a real one, only the clock is not. Joining again, by each of the two
//! join protocols, takes real time: the cluster asks an STS.

mod bound_keypair;
mod svids;

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, SystemTime};

use async_trait::async_trait;
use tbot::clock::Clock;
use tbot::cluster::client::Route;
use tbot::cluster::dial::{BoxedIo, Dialer};
use tbot::cluster::trust::Trust;
use tbot::config::{Overlay, Source, load};
use tbot::crypto::x509::Certificate;
use tbot::crypto::{pem, sha256_hex};
use tbot::destination;
use tbot::embedded::resources::Mode;
use tbot::embedded::{AuthPort, Cluster, Config};
use tbot::env::Env;
use tbot::health::Registry;
use tbot::identity::Handle;
use tbot::identity::bot::{Bot, Settings};
use tbot::identity::store::Store;
use tbot::join::{self, JoinError, JoinMethod, Proof, Prover, Surroundings, TokenSource};
use tbot::pb::teleport::join::v1::{
    ClientParams, IamChallenge, IamChallengeSolution, IamInit, challenge, challenge_solution,
    join_request,
};
use tbot::services::{Context, Lifetime, Service, output};
use tbot::telemetry::metrics::Metrics;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

const RESOURCES: &str = "
kind: role
version: v7
metadata: {name: issuer}
spec: {allow: {workload_identity_labels: {'*': ['*']}, rules: [{resources: [workload_identity], verbs: [read, list]}]}}
---
kind: bot
version: v1
metadata: {name: example}
spec: {roles: [issuer]}
---
kind: token
version: v2
metadata: {name: a-secret-of-the-test}
spec: {roles: [Bot], bot_name: example, join_method: token}
---
kind: token
version: v2
metadata: {name: proof}
spec: {roles: [Bot], bot_name: example, join_method: iam, allow: [{aws_account: '123456789012'}]}
";

/// Connects to the cluster in memory, unless the network is out.
#[derive(Debug)]
struct Network {
    port: AuthPort,
    out: AtomicBool,
    /// Whether the network swallows everything.
    hangs: AtomicBool,
    dials: AtomicUsize,
}

#[async_trait]
impl Dialer for Network {
    async fn dial(&self, _address: &str) -> io::Result<BoxedIo> {
        self.dials.fetch_add(1, Ordering::Relaxed);
        if self.out.load(Ordering::Relaxed) {
            return Err(io::ErrorKind::ConnectionRefused.into());
        }
        if self.hangs.load(Ordering::Relaxed) {
            return std::future::pending().await;
        }
        let (near, far) = tokio::io::duplex(64 * 1024);
        let port = self.port.clone();
        tokio::spawn(async move { port.answer(far).await });
        Ok(Box::pin(near))
    }
}

struct Setup {
    _dir: tempfile::TempDir,
    cluster: Cluster,
    clock: Clock,
    network: Arc<Network>,
    registry: Registry,
    reload: watch::Sender<u64>,
    shutdown: CancellationToken,
}

impl Setup {
    async fn new() -> Self {
        let clock = Clock::simulated(SystemTime::UNIX_EPOCH + Duration::from_secs(1_800_000_000));
        Self::with(clock, |_config| ()).await
    }

    async fn with(clock: Clock, change: impl FnOnce(&mut Config)) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let mut config = Config::local(dir.path().join("cluster"), clock.clone());
        change(&mut config);
        config.cluster_name = Some("sim.example.org".to_owned());
        let cluster = Cluster::open(config).await.unwrap();
        let files = [("resources.yaml".to_owned(), RESOURCES.to_owned())];
        cluster
            .state()
            .create(&files, Mode::Create, "test")
            .unwrap();
        let network = Arc::new(Network {
            port: cluster.auth_port(),
            out: AtomicBool::new(false),
            hangs: AtomicBool::new(false),
            dials: AtomicUsize::new(0),
        });
        Self {
            registry: Registry::new(clock.clone()),
            _dir: dir,
            cluster,
            clock,
            network,
            reload: watch::channel(0).0,
            shutdown: CancellationToken::new(),
        }
    }

    /// Starts a bot that keeps its identity in memory.
    async fn start(&self) -> (Handle, tokio::task::JoinHandle<()>) {
        let method = join::method("token").unwrap().read(None);
        self.start_with(method, "a-secret-of-the-test").await
    }

    async fn start_with(
        &self,
        method: Arc<dyn Prover>,
        token: &str,
    ) -> (Handle, tokio::task::JoinHandle<()>) {
        let storage = destination::from_uri("memory://").unwrap().build();
        self.start_in(method, token, storage).await
    }

    async fn start_in(
        &self,
        method: Arc<dyn Prover>,
        token: &str,
        storage: Arc<dyn destination::Destination>,
    ) -> (Handle, tokio::task::JoinHandle<()>) {
        let settings = Settings {
            method,
            env: Env::default(),
            token: Some(TokenSource::new(token.to_owned())),
            route: Route::Direct("memory:3025".to_owned()),
            trust: Trust {
                ca_pins: vec![self.cluster.ca_pin()],
                ..Trust::default()
            },
            use_configured_address: false,
            ttl: Duration::from_hours(1),
            interval: Duration::from_mins(20),
        };
        let mut bot = Bot::new(
            settings,
            self.clock.clone(),
            Arc::clone(&self.network) as Arc<dyn Dialer>,
            Store::open(storage),
            self.registry.reporter("identity"),
            self.reload.subscribe(),
        );
        bot.load().await.unwrap();
        let handle = bot.handle();
        let shutdown = self.shutdown.clone();
        let running = tokio::spawn(async move { bot.run(shutdown).await.unwrap() });
        (handle, running)
    }
}

fn generation(handle: &Handle) -> u64 {
    handle.identity().borrow().as_ref().unwrap().generation()
}

#[tokio::test(start_paused = true)]
async fn a_day_of_renewals_never_leaves_a_gap() {
    let setup = Setup::new().await;
    let (handle, running) = setup.start().await;
    handle.ready().await.unwrap();
    assert_eq!(generation(&handle), 1);
    for minute in 0..24 * 60 {
        tokio::time::sleep(Duration::from_mins(1)).await;
        let identity = handle.identity().borrow().clone().unwrap();
        let left = identity.not_after().duration_since(setup.clock.now());
        assert!(
            left.is_ok_and(|left| left > Duration::from_mins(20)),
            "minute {minute}: used past two thirds of its life"
        );
    }
    // Every 18 to 20 minutes, one step of the counter each.
    let generation = generation(&handle);
    assert!(
        (72..=81).contains(&generation),
        "{generation} generations in a day"
    );
    setup.shutdown.cancel();
    running.await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn an_outage_shorter_than_the_identity_is_not_felt() {
    let setup = Setup::new().await;
    let (handle, running) = setup.start().await;
    handle.ready().await.unwrap();
    setup.network.out.store(true, Ordering::Relaxed);
    // Renewals are due from minute 18 on; the identity lasts for an hour.
    let before = setup.network.dials.load(Ordering::Relaxed);
    for _ in 0..50 {
        tokio::time::sleep(Duration::from_mins(1)).await;
        let identity = handle.identity().borrow().clone().unwrap();
        assert!(identity.is_valid(setup.clock.now()));
    }
    let attempts = setup.network.dials.load(Ordering::Relaxed) - before;
    assert!(
        (8..=100).contains(&attempts),
        "{attempts} attempts in half an hour"
    );
    assert!(!setup.registry.snapshot().at(setup.clock.now()).healthy());

    setup.network.out.store(false, Ordering::Relaxed);
    tokio::time::sleep(Duration::from_mins(2)).await;
    assert_eq!(generation(&handle), 2);
    assert!(setup.registry.snapshot().at(setup.clock.now()).healthy());
    setup.shutdown.cancel();
    running.await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_reload_renews_at_once() {
    let setup = Setup::new().await;
    let (handle, running) = setup.start().await;
    handle.ready().await.unwrap();
    let mut identity = handle.identity();
    identity.mark_unchanged();
    setup.reload.send_modify(|count| *count += 1);
    identity.changed().await.unwrap();
    assert_eq!(generation(&handle), 2);
    setup.shutdown.cancel();
    running.await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_cluster_with_the_older_join_service_only_is_joined_and_renewed_just_so() {
    let clock = Clock::simulated(SystemTime::UNIX_EPOCH + Duration::from_secs(1_800_000_000));
    let setup = Setup::with(clock, |config| config.join_v1 = false).await;
    let (handle, running) = setup.start().await;
    handle.ready().await.unwrap();
    tokio::time::sleep(Duration::from_mins(21)).await;
    assert_eq!(generation(&handle), 2);
    setup.shutdown.cancel();
    running.await.unwrap();
}

/// Method `iam` with a signature that nobody looks at.
#[derive(Debug)]
struct Unsigned;

#[async_trait]
impl Prover for Unsigned {
    fn method(&self) -> &'static dyn JoinMethod {
        join::method("iam").unwrap()
    }

    async fn prepare(&self, _around: &Surroundings<'_>) -> Result<Box<dyn Proof>, JoinError> {
        Ok(Box::new(Self))
    }
}

#[async_trait]
impl Proof for Unsigned {
    fn opening(&self, client_params: ClientParams) -> join_request::Payload {
        join_request::Payload::IamInit(IamInit {
            client_params: Some(client_params),
        })
    }

    async fn solve(
        &mut self,
        challenge: challenge::Payload,
        now: SystemTime,
    ) -> Result<Option<challenge_solution::Payload>, JoinError> {
        let challenge::Payload::IamChallenge(IamChallenge { challenge }) = challenge else {
            return Ok(None);
        };
        let now = time::OffsetDateTime::from(now);
        let date = time::macros::format_description!("[year][month][day]T[hour][minute][second]Z");
        let request = format!(
            "POST / HTTP/1.1\r\nHost: sts.us-east-1.amazonaws.com\r\n\
             Accept: application/json\r\nAuthorization: AWS4-HMAC-SHA256 \
             Credential=a/b/c/d/e, SignedHeaders=host;x-teleport-challenge, Signature=ab\r\n\
             Content-Length: 43\r\nX-Amz-Date: {}\r\nX-Teleport-Challenge: {challenge}\r\n\r\n\
             Action=GetCallerIdentity&Version=2011-06-15",
            now.format(date).unwrap(),
        );
        let solution = IamChallengeSolution {
            sts_identity_request: request.into_bytes(),
        };
        Ok(Some(challenge_solution::Payload::IamChallengeSolution(
            solution,
        )))
    }
}

/// An STS that knows everybody as one role of one account.
async fn sts() -> String {
    const ANSWER: &str = "<GetCallerIdentityResponse><GetCallerIdentityResult>\
        <Arn>arn:aws:sts::123456789012:assumed-role/r/i</Arn><Account>123456789012</Account>\
        </GetCallerIdentityResult></GetCallerIdentityResponse>";
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let endpoint = format!("http://{}", listener.local_addr().unwrap());
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let mut asked = Vec::new();
            while !asked.ends_with(b"Version=2011-06-15") {
                if stream.read_buf(&mut asked).await.unwrap() == 0 {
                    break;
                }
            }
            let head = format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n", ANSWER.len());
            let answer = format!("{head}Connection: close\r\n\r\n{ANSWER}");
            stream.write_all(answer.as_bytes()).await.unwrap();
        }
    });
    endpoint
}

#[tokio::test]
async fn joining_again_keeps_the_instance_by_either_protocol() {
    for join_v1 in [true, false] {
        let sts = sts().await;
        let setup = Setup::with(Clock::system(), |config| {
            config.join_v1 = join_v1;
            config.sts_endpoint = Some(sts);
        })
        .await;
        let (handle, running) = setup.start_with(Arc::new(Unsigned), "proof").await;
        let first = handle.ready().await.unwrap();
        let mut identity = handle.identity();
        for generation in 2..5 {
            identity.mark_unchanged();
            setup.reload.send_modify(|count| *count += 1);
            identity.changed().await.unwrap();
            let again = identity.borrow_and_update().clone().unwrap();
            assert_eq!(again.generation(), generation, "newer service: {join_v1}");
            assert_eq!(again.instance_id(), first.instance_id());
            assert_ne!(again.tls().spki(), first.tls().spki(), "the key was kept");
        }
        setup.shutdown.cancel();
        running.await.unwrap();
    }
}

#[tokio::test(start_paused = true)]
async fn a_stop_does_not_wait_for_a_cluster_that_never_answers() {
    let setup = Setup::new().await;
    setup.network.hangs.store(true, Ordering::Relaxed);
    let (_handle, running) = setup.start().await;
    tokio::time::sleep(Duration::from_secs(5)).await;
    assert_eq!(setup.network.dials.load(Ordering::Relaxed), 1);
    let asked = tokio::time::Instant::now();
    setup.shutdown.cancel();
    running.await.unwrap();
    assert_eq!(asked.elapsed(), Duration::ZERO);
}

#[tokio::test(start_paused = true)]
async fn a_cluster_that_lists_no_authorities_has_identity_outputs_all_the_same() {
    let clock = Clock::simulated(SystemTime::UNIX_EPOCH + Duration::from_secs(1_800_000_000));
    for trust_v1 in [true, false] {
        let setup = Setup::with(clock.clone(), |config| config.trust_v1 = trust_v1).await;
        let (handle, running) = setup.start().await;
        handle.ready().await.unwrap();
        let out = tempfile::tempdir().unwrap();
        let out = out.path().canonicalize().unwrap();
        let source = Source {
            name: "tbot.yaml".to_owned(),
            text: format!(
                "version: v2\nservices: [{{type: identity, ssh_config: off, \
                 destination: {{type: directory, path: {}}}}}]",
                out.display()
            ),
        };
        let loaded = load(Some(&source), &Overlay::default(), &Env::default()).unwrap();
        let Service::Output(output) = loaded.plan.services[0].plan.build() else {
            panic!("an identity is an output");
        };
        let context = Context {
            clock: setup.clock.clone(),
            identity: handle.clone(),
            lifetime: Lifetime::default(),
            name: "out".into(),
            health: setup.registry.reporter("out"),
            metrics: Metrics::new(),
            sockets: tbot::services::Sockets::default(),
            trust: tbot::services::Trust::default(),
            shelf: tbot::workload::Shelf::default(),
            shutdown: setup.shutdown.clone(),
        };
        output::run_once(output, None, context).await.unwrap();
        let pin = |name: &str| {
            let text = std::fs::read_to_string(out.join(name)).unwrap();
            let ders = pem::certificates(&text).unwrap();
            assert_eq!(ders.len(), 1, "{name}");
            let certificate = Certificate::from_der(&ders[0]).unwrap();
            format!("sha256:{}", sha256_hex(&certificate.spki()))
        };
        assert_eq!(pin("teleport-host-ca.crt"), setup.cluster.ca_pin());
        assert_ne!(pin("teleport-user-ca.crt"), setup.cluster.ca_pin());
        let databases = std::fs::read(out.join("teleport-database-ca.crt")).unwrap();
        assert_eq!(databases.is_empty(), !trust_v1);
        setup.shutdown.cancel();
        running.await.unwrap();
    }
}
