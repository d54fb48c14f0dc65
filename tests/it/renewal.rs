//! The bot's own identity over days of simulated time, against the embedded cluster over TLS in
//! memory: every renewal is a real one, only the clock is not.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, SystemTime};

use async_trait::async_trait;
use tbot::clock::Clock;
use tbot::cluster::client::Route;
use tbot::cluster::dial::{BoxedIo, Dialer};
use tbot::cluster::trust::Trust;
use tbot::destination;
use tbot::embedded::resources::Mode;
use tbot::embedded::{AuthPort, Cluster, Config};
use tbot::health::Registry;
use tbot::identity::Handle;
use tbot::identity::bot::{Bot, Settings};
use tbot::identity::store::Store;
use tbot::join::{self, TokenSource};
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
";

/// Connects to the cluster in memory, unless the network is out.
#[derive(Debug)]
struct Network {
    port: AuthPort,
    out: AtomicBool,
    dials: AtomicUsize,
}

#[async_trait]
impl Dialer for Network {
    async fn dial(&self, _address: &str) -> io::Result<BoxedIo> {
        self.dials.fetch_add(1, Ordering::Relaxed);
        if self.out.load(Ordering::Relaxed) {
            return Err(io::ErrorKind::ConnectionRefused.into());
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
        let dir = tempfile::tempdir().unwrap();
        let clock = Clock::simulated(SystemTime::UNIX_EPOCH + Duration::from_secs(1_800_000_000));
        let mut config = Config::local(dir.path().join("cluster"), clock.clone());
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
        let settings = Settings {
            method: join::method("token").unwrap(),
            token: Some(TokenSource::new("a-secret-of-the-test".to_owned())),
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
            Store::open(destination::from_uri("memory://").unwrap().build()),
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
        (20..=200).contains(&attempts),
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
