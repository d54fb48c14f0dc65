//! Thirty days of an agent's parts against the embedded cluster over TLS in memory, with a rotation
//! of an authority every day: only the clock is not real. What is held is judged with the keys that
//! the cluster trusts at that moment, whether the agent knows them yet or not.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, SystemTime};

use async_trait::async_trait;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::super::rotation;
use crate::clock::Clock;
use crate::cluster::Client;
use crate::cluster::client::Route;
use crate::cluster::dial::{BoxedIo, Dialer};
use crate::cluster::trust::Trust;
use crate::config::{Overlay, Source, load};
use crate::crypto::pem;
use crate::crypto::x509::Certificate;
use crate::destination::{Destination, from_uri};
use crate::embedded::ca::{AuthorityType, GRACE, Mode, Phase, Step};
use crate::embedded::{AuthPort, Cluster, Config, resources};
use crate::env::Env;
use crate::health::Registry;
use crate::identity::bot::{Bot, Settings};
use crate::identity::store::Store;
use crate::identity::{Handle, Request};
use crate::join::{self, TokenSource};
use crate::services::{self, Context, Lifetime, Output, Service, output};
use crate::telemetry::metrics::Metrics;
use crate::workload::{
    Access, Cache, ClusterIssuer, IssueError, Selector, State, Subscription, bundle,
};

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
kind: workload_identity
version: v1
metadata: {name: foo, labels: {env: test}}
spec: {spiffe: {id: /svc/foo}}
";

const LIFETIME: Lifetime = Lifetime {
    ttl: Duration::from_hours(12),
    interval: Duration::from_hours(4),
};
const LOOK: Duration = Duration::from_mins(20);
const LOOKS_A_DAY: u32 = 24 * 3;
const DAYS: u32 = 30;

/// The authority of each day.
const ROTATED: [AuthorityType; 5] = [
    AuthorityType::Host,
    AuthorityType::User,
    AuthorityType::Spiffe,
    AuthorityType::Jwt,
    AuthorityType::Db,
];

/// Connects to the cluster in memory.
#[derive(Debug)]
struct Memory {
    port: AuthPort,
    open: Arc<AtomicUsize>,
}

#[async_trait]
impl Dialer for Memory {
    async fn dial(&self, _address: &str) -> io::Result<BoxedIo> {
        let (near, far) = tokio::io::duplex(64 * 1024);
        let (port, open) = (self.port.clone(), Arc::clone(&self.open));
        open.fetch_add(1, Ordering::Relaxed);
        tokio::spawn(async move {
            drop(port.answer(far).await);
            open.fetch_sub(1, Ordering::Relaxed);
        });
        Ok(Box::pin(near))
    }
}

/// Issues with the roles of the bot.
#[derive(Debug)]
struct AsBot(Handle);

#[async_trait]
impl Access for AsBot {
    async fn client(&self) -> Result<Client, IssueError> {
        let request = Request {
            ttl: LIFETIME.ttl,
            ..Request::default()
        };
        let derived = self.0.derived(&request).await;
        derived.map_err(|error| IssueError::Unavailable(error.to_string()))
    }
}

/// What an agent holds, and the cluster that judges it.
struct World {
    clock: Clock,
    cluster: Cluster,
    handle: Handle,
    files: Arc<dyn Destination>,
    svids: Subscription,
    generation: u64,
}

impl World {
    /// Everything that is held verifies now and is in the first two thirds of its life.
    async fn look(&mut self, what: &str) {
        let authorities = &self.cluster.state().authorities;
        let trusted = |kind| -> Vec<Certificate> {
            let ders = authorities.trusted_tls(kind);
            ders.iter()
                .map(|der| Certificate::from_der(der).unwrap())
                .collect()
        };
        let now = self.clock.now();
        let judge = |name: &str, leaf: &Certificate, kind| {
            let what = format!("{what}: {name}");
            let signed = trusted(kind).iter().any(|ca| leaf.is_signed_by(ca));
            assert!(signed, "{what}: nobody trusts who signed it");
            assert!(leaf.not_before() <= now, "{what}: not valid yet");
            let left = leaf.not_after().duration_since(now).unwrap_or_default();
            assert!(left > LIFETIME.ttl / 3, "{what}: {left:?} are left");
        };

        let identity = self.handle.identity().borrow().clone().unwrap();
        judge("the bot", identity.tls(), AuthorityType::User);
        assert!(identity.generation() >= self.generation, "{what}");
        self.generation = identity.generation();

        let read = async |name: &str| {
            let bytes = self.files.read(name).await.unwrap().unwrap();
            String::from_utf8(bytes.expose().clone()).unwrap()
        };
        let leaf = Certificate::from_pem(&read("tlscert").await).unwrap();
        judge("the output", &leaf, AuthorityType::User);
        let hosts = pem::certificates(&read("teleport-host-ca.crt").await).unwrap();
        let host = authorities.get(AuthorityType::Host);
        let shown = &host.server_signer().unwrap().certificate;
        assert!(hosts.contains(shown), "{what}: the output cannot connect");

        let State::Ready(svids) = self.svids.state().borrow().clone() else {
            panic!("{what}: no SVID");
        };
        assert_eq!(svids.len(), 1, "{what}");
        let leaf = Certificate::from_der(&svids[0].chain).unwrap();
        judge("the SVID", &leaf, AuthorityType::Spiffe);
    }

    fn rotate(&self, kind: AuthorityType, to: Phase) {
        let step = Step {
            to,
            mode: Mode::Manual,
            grace: GRACE,
        };
        self.cluster.state().rotate(kind, step, "test").unwrap();
    }
}

/// A bot that keeps its identity in memory.
fn new_bot(
    cluster: &Cluster,
    clock: &Clock,
    network: Memory,
    registry: &Registry,
    reloads: watch::Receiver<u64>,
) -> Bot {
    let settings = Settings {
        method: join::method("token").unwrap().read(None),
        env: Env::default(),
        token: Some(TokenSource::new("a-secret-of-the-test".to_owned())),
        route: Route::Direct("memory:3025".to_owned()),
        trust: Trust {
            ca_pins: vec![cluster.ca_pin()],
            ..Trust::default()
        },
        use_configured_address: false,
        ttl: LIFETIME.ttl,
        interval: LIFETIME.interval,
    };
    Bot::new(
        settings,
        clock.clone(),
        Arc::new(network),
        Store::open(from_uri("memory://").unwrap().build()),
        registry.reporter("identity"),
        reloads,
    )
}

/// An identity output that keeps its files in memory.
fn identity_output() -> Box<dyn Output> {
    let source = Source {
        name: "tbot.yaml".to_owned(),
        text: "version: v2\nservices: [{type: identity, ssh_config: off, \
               destination: {type: memory}}]\n"
            .to_owned(),
    };
    let loaded = load(Some(&source), &Overlay::default(), &Env::default()).unwrap();
    match loaded.plan.services[0].plan.build() {
        Service::Output(output) => output,
        Service::Server(_) => panic!("an identity is an output"),
    }
}

#[tokio::test(start_paused = true)]
async fn thirty_days_with_a_rotation_each_leave_no_gap() {
    let clock = Clock::simulated(SystemTime::UNIX_EPOCH + Duration::from_secs(1_800_000_000));
    let dir = tempfile::tempdir().unwrap();
    let config = Config::local(dir.path().join("cluster"), clock.clone());
    let cluster = Cluster::open(config).await.unwrap();
    let files = [("resources.yaml".to_owned(), RESOURCES.to_owned())];
    let state = cluster.state();
    state
        .create(&files, resources::Mode::Create, "test")
        .unwrap();

    let open = Arc::new(AtomicUsize::new(0));
    let network = Memory {
        port: cluster.auth_port(),
        open: Arc::clone(&open),
    };
    let registry = Registry::new(clock.clone());
    let (reload, reloads) = watch::channel(0);
    let bot = new_bot(&cluster, &clock, network, &registry, reloads);
    let handle = bot.handle();
    let shutdown = CancellationToken::new();
    let mut tasks = tokio::task::JoinSet::new();
    let stop = shutdown.clone();
    tasks.spawn(async move { bot.run(stop).await.unwrap() });
    let own = handle.ready().await.unwrap();
    let follower = rotation::run(
        handle.clone(),
        clock.clone(),
        reload,
        LIFETIME.interval,
        shutdown.clone(),
    );
    tasks.spawn(async move { follower.await.unwrap() });

    let identity = identity_output();
    let files = identity.destination();
    let context = Context {
        clock: clock.clone(),
        identity: handle.clone(),
        lifetime: LIFETIME,
        name: "out".into(),
        health: registry.reporter("out"),
        metrics: Metrics::new(),
        sockets: services::Sockets::default(),
        trust: services::Trust::default(),
        shelf: crate::workload::Shelf::default(),
        shutdown: shutdown.clone(),
    };
    tasks.spawn(output::run(identity, None, context));

    let (bundles, followed) = watch::channel(None);
    let (client, name, time) = (
        handle.client().clone(),
        own.cluster().to_owned(),
        clock.clone(),
    );
    tasks.spawn(async move { bundle::follow(&client, &name, &time, &bundles).await });
    let issuer = ClusterIssuer::new(
        Arc::new(AsBot(handle.clone())),
        followed.clone(),
        clock.clone(),
    );
    let cache = Cache::new(Arc::new(issuer), clock.clone(), LIFETIME.interval);
    let keeper = cache.clone();
    tasks.spawn(async move { keeper.run().await });
    let (renewer, mut changes) = (cache.clone(), followed);
    tasks.spawn(async move {
        while changes.changed().await.is_ok() {
            renewer.renew_all();
        }
    });
    let selector = Selector::Name("foo".to_owned());
    let mut svids = cache.subscribe(&selector, LIFETIME.ttl, &Arc::default());
    let ready = |state: &State| matches!(state, State::Ready(_));
    drop(svids.state().wait_for(ready).await.unwrap());
    clock.sleep(LOOK).await;

    let mut world = World {
        clock: clock.clone(),
        cluster,
        handle,
        files,
        svids,
        generation: 1,
    };
    for (day, kind) in (0..DAYS).zip(ROTATED.into_iter().cycle()) {
        let mut phases = [
            Phase::Init,
            Phase::UpdateClients,
            Phase::UpdateServers,
            Phase::Standby,
        ]
        .into_iter();
        for look in 0..LOOKS_A_DAY {
            let what = format!("day {day}, {}, {} h", kind.name(), look / 3);
            // Six hours for each phase.
            if look % (LOOKS_A_DAY / 4) == 0
                && let Some(phase) = phases.next()
            {
                world.rotate(kind, phase);
                world.look(&what).await;
            }
            clock.sleep(LOOK).await;
            world.look(&what).await;
            assert!(
                registry.snapshot().at(clock.now()).healthy(),
                "{what}: not healthy"
            );
        }
        // Nothing piles up: one entry, and connections that somebody uses.
        assert_eq!(cache.len(), 1, "day {day}");
        let open = open.load(Ordering::Relaxed);
        assert!(open <= 10, "day {day}: {open} connections are open");
    }
    // One step of the counter every four hours or sooner.
    assert!(
        world.generation > u64::from(DAYS * 6),
        "{}",
        world.generation
    );
    shutdown.cancel();
    tasks.shutdown().await;
}
