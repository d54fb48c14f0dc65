//! From a plan to a running tree of tasks: the only place that wires components and owns tasks.
//!
//! One path serves three modes: the daemon keeps every service running, a one-shot run makes the
//! same outputs once, a reload makes them run now.

mod heartbeat;
mod notify;
mod pid_file;
mod rotation;
mod supervisor;
mod unit;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, bail};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::clock::Clock;
use crate::cluster::client::Route;
use crate::cluster::dial::Dialer;
use crate::cluster::feature::{Feature, Versions};
use crate::cluster::network::Network;
use crate::cluster::ping::with_port;
use crate::config::{Plan, Server as ClusterAddress};
use crate::destination::Lock;
use crate::diag;
use crate::env::Env;
use crate::health::Registry;
use crate::identity::bot::{Bot, Settings};
use crate::identity::store::Store;
use crate::join::{TokenSource, token_hash};
use crate::services::{Context, Sockets, Trust};
use crate::telemetry::metrics::Metrics;
use crate::telemetry::one_line;
use crate::workload::{Origin, Shelf};

use pid_file::PidFile;
use supervisor::Supervisor;
use unit::Unit;

/// The name under which the bot's own identity reports its health.
const IDENTITY: &str = "identity";

/// Runs what `plan` says: until a signal ends it, or once with `oneshot`. Of `sockets`, those that a
/// service listens on are used instead of new ones.
///
/// # Errors
/// What keeps it from starting, a first join that the cluster refuses, and with `oneshot` any output
/// that failed.
pub async fn run(plan: Plan, sockets: Sockets) -> anyhow::Result<()> {
    let agent = Box::pin(Agent::build(plan, sockets, CancellationToken::new())).await?;
    agent.run().await
}

/// As [`run`] without sockets from elsewhere, and `shutdown` ends it too.
///
/// # Errors
/// As [`run`].
pub async fn run_until(plan: Plan, shutdown: CancellationToken) -> anyhow::Result<()> {
    let agent = Box::pin(Agent::build(plan, Sockets::default(), shutdown)).await?;
    agent.run().await
}

/// A plan whose sockets are bound and whose destinations are ready, before the first network
/// exchange. A service that is not ready does not stop the others; it is tried again.
struct Agent {
    bot: Bot,
    units: Vec<Unit>,
    diag: Vec<diag::Listener>,
    heartbeat: heartbeat::Facts,
    registry: Registry,
    metrics: Metrics,
    clock: Clock,
    reload: watch::Sender<u64>,
    shutdown: CancellationToken,
    /// Time between renewals of the bot's identity.
    interval: Duration,
    oneshot: bool,
    _lock: Option<Box<dyn Lock>>,
    _pid_file: Option<PidFile>,
}

impl Agent {
    async fn build(
        plan: Plan,
        sockets: Sockets,
        shutdown: CancellationToken,
    ) -> anyhow::Result<Self> {
        let clock = Clock::system();
        let registry = Registry::new(clock.clone());
        let metrics = Metrics::new();
        let (reload, reloads) = watch::channel(0);

        let missing = plan.for_start();
        let (Some(method), Some(server), Ok(network), []) = (
            plan.onboarding.method,
            &plan.server,
            plan.network,
            missing.as_slice(),
        ) else {
            bail!(missing.join("\n"));
        };

        let join_method = method.method().name();
        let storage = plan.storage.build();
        // First of all: what looks like a leftover may be another agent's work of this moment.
        let lock = storage.lock().context("bot storage")?;
        storage.init().await.context("bot storage")?;
        storage.check_writable().await.context("bot storage")?;
        if !storage.is_persistent() {
            tracing::warn!("The bot's storage does not survive a restart: it joins anew each time");
        }
        let shelf = if plan.oneshot {
            Shelf::default()
        } else {
            let origin = origin(server, plan.onboarding.token.as_ref());
            Shelf::open(Arc::clone(&storage), clock.clone(), origin).await
        };
        let network = Network::new(network, plan.onboarding.trust.clone(), clock.clone());
        let bot = Bot::new(
            Settings {
                method,
                env: Env::of_process(),
                token: plan.onboarding.token,
                route: route(server),
                trust: plan.onboarding.trust,
                use_configured_address: plan.use_proxy_address,
                ttl: plan.lifetime.ttl,
                interval: plan.lifetime.interval,
            },
            clock.clone(),
            Arc::new(network) as Arc<dyn Dialer>,
            Store::open(storage),
            registry.reporter(IDENTITY),
            reloads,
        );

        let trust = Trust::beside(shelf.clone());
        let context = |name: Arc<str>, lifetime| Context {
            clock: clock.clone(),
            identity: bot.handle(),
            sockets: sockets.clone(),
            trust: trust.clone(),
            shelf: shelf.clone(),
            lifetime,
            health: registry.reporter(&*name),
            name,
            metrics: metrics.clone(),
            shutdown: shutdown.clone(),
        };
        let mut units = Vec::new();
        let mut types = BTreeMap::new();
        for service in plan.services {
            let name: Arc<str> = service.name.as_str().into();
            let context = context(Arc::clone(&name), service.lifetime);
            types.insert(service.name, service.kind);
            let unit = Unit::new(service.plan, service.reload, context);
            if plan.oneshot && !unit.is_output() {
                tracing::info!(service = %name, "Skipping a service that cannot run once");
            } else {
                units.push(unit);
            }
        }
        prepare(&mut units).await?;
        sockets.settle();
        let mut diag = Vec::new();
        if let Some(address) = plan.diag_addr.filter(|_| !plan.oneshot) {
            let listener = diag::Listener::tcp(&address)
                .await
                .with_context(|| format!("diag_addr: cannot listen on {address}"))?;
            diag.push(listener);
        }
        if let Some(path) = plan.diag_socket.filter(|_| !plan.oneshot) {
            let listener = diag::Listener::unix(&path)
                .with_context(|| format!("cannot listen on {}", path.display()))?;
            diag.push(listener);
        }
        Ok(Self {
            bot,
            units,
            diag,
            heartbeat: heartbeat::Facts {
                join_method,
                one_shot: plan.oneshot,
                started: clock.now(),
                registry: registry.clone(),
                types,
            },
            registry,
            metrics,
            clock,
            reload,
            shutdown,
            interval: plan.lifetime.interval,
            oneshot: plan.oneshot,
            _lock: lock,
            _pid_file: plan.pid_file.map(PidFile::write).transpose()?,
        })
    }

    async fn run(mut self) -> anyhow::Result<()> {
        self.bot.load().await?;
        if self.oneshot {
            Box::pin(self.once()).await
        } else {
            Box::pin(self.serve()).await
        }
    }

    /// Every output once, each on its own; any failure is the run's.
    async fn once(mut self) -> anyhow::Result<()> {
        self.bot.run_once(&self.shutdown).await?;
        let handle = self.bot.handle();
        let mut running = JoinSet::new();
        for unit in self.units {
            running.spawn(async move { (unit.name(), unit.run_once().await) });
        }
        let mut failed = Vec::new();
        while let Some(ended) = running.join_next().await {
            let (name, result) = ended.context("an output was cut off")?;
            if let Err(error) = result {
                tracing::error!(service = %name, error = one_line(&error), "The output failed");
                failed.push(name.to_string());
            }
        }
        heartbeat::look(&handle, &mut Versions::default()).await;
        let beat = self
            .heartbeat
            .submit(handle.client(), &self.clock, true)
            .await;
        if let Err(error) = handle.lacking().optional(Feature::Heartbeats, beat) {
            tracing::warn!(%error, "The cluster did not take the heartbeat");
        }
        if failed.is_empty() {
            return Ok(());
        }
        failed.sort_unstable();
        bail!(
            "{} of the outputs failed: {}",
            failed.len(),
            failed.join(", ")
        )
    }

    /// Everything, until a signal or a failure that cannot be outlived.
    async fn serve(self) -> anyhow::Result<()> {
        let handle = self.bot.handle();
        let mut tasks = Supervisor::new(self.shutdown.clone());
        let shutdown = self.shutdown.clone();
        tasks.start(IDENTITY, async move { Ok(self.bot.run(shutdown).await?) });
        for unit in self.units {
            tasks.start(&unit.name(), async move {
                unit.run().await;
                Ok(())
            });
        }
        for listener in self.diag {
            tracing::info!(%listener, "Diagnostics are served");
            let (registry, metrics) = (self.registry.clone(), self.metrics.clone());
            let shutdown = self.shutdown.clone();
            tasks.start("diagnostics", async move {
                diag::serve(listener, registry, metrics, shutdown).await;
                Ok(())
            });
        }
        tasks.start(
            "heartbeat",
            heartbeat::run(
                self.heartbeat,
                handle.clone(),
                self.clock.clone(),
                self.shutdown.clone(),
            ),
        );
        tasks.start(
            "ca-rotation",
            rotation::run(
                handle.clone(),
                self.clock.clone(),
                self.reload.clone(),
                self.interval,
                self.shutdown.clone(),
            ),
        );
        tasks.start(
            "notify",
            notify::run(
                handle,
                self.registry.clone(),
                self.clock.clone(),
                self.shutdown.clone(),
            ),
        );
        tasks.run(self.reload).await
    }
}

/// Prepares every unit. One that is not ready runs all the same and tries again; only if none is
/// ready there is nothing to join for, and what is wrong is the run's error.
async fn prepare(units: &mut [Unit]) -> anyhow::Result<()> {
    let mut problems = Vec::new();
    for unit in &mut *units {
        if let Err(error) = unit.prepare().await {
            problems.push(error.context(unit.name().to_string()));
        }
    }
    if problems.len() == units.len() && !problems.is_empty() {
        let all: Vec<String> = problems.iter().map(one_line).collect();
        bail!("{}", all.join("; "));
    }
    for error in problems {
        tracing::warn!(
            error = one_line(&error),
            "A service is not ready; the others start without it, and it is tried again"
        );
    }
    Ok(())
}

fn route(server: &ClusterAddress) -> Route {
    match server {
        ClusterAddress::Proxy(address) => Route::Proxy(with_port(address, "443")),
        ClusterAddress::Auth(address) => Route::Direct(with_port(address, "3025")),
    }
}

/// What tells SVIDs of this bot of this cluster from others in the same storage.
fn origin(server: &ClusterAddress, token: Option<&TokenSource>) -> Origin {
    let token = token.and_then(|token| token.resolve().ok());
    Origin {
        server: match route(server) {
            Route::Proxy(address) | Route::Direct(address) => address,
        },
        token: token.as_ref().map(token_hash).unwrap_or_default(),
    }
}

#[cfg(test)]
mod tests {
    mod fleet;
    mod month;

    use std::path::Path;

    use super::*;
    use crate::config::{Overlay, Source, load};
    use crate::destination::from_uri;
    use crate::env::Env;

    fn plan(storage: &Path) -> Plan {
        let text = format!(
            "version: v2\nauth_server: localhost:1\nonboarding: {{join_method: token, token: x}}\n\
             storage: {{type: directory, path: {}}}\n",
            storage.display()
        );
        let source = Source {
            name: "tbot.yaml".to_owned(),
            text,
        };
        load(Some(&source), &Overlay::default(), &Env::default())
            .unwrap()
            .plan
    }

    #[tokio::test]
    async fn nothing_is_tidied_in_a_storage_that_another_agent_works_in() {
        let base = tempfile::tempdir().unwrap();
        let storage = base.path().canonicalize().unwrap().join("bot");
        let other = from_uri(storage.to_str().unwrap()).unwrap().build();
        let lock = other.lock().unwrap();
        // The other agent is in the middle of a write.
        let work = [".tbot-draft-0123456789abcdef", ".tbot-set"];
        for folder in work {
            std::fs::create_dir(storage.join(folder)).unwrap();
            std::fs::write(storage.join(folder).join("key"), "new").unwrap();
        }
        let refused = Box::pin(run(plan(&storage), Sockets::default()))
            .await
            .unwrap_err();
        assert!(one_line(&refused).contains("in use"), "{refused:#}");
        for folder in work {
            assert!(storage.join(folder).join("key").exists(), "{folder}");
        }
        assert!(!storage.join(".write-test").exists());

        // Left behind, it is tidied by the next.
        drop(lock);
        Agent::build(plan(&storage), Sockets::default(), CancellationToken::new())
            .await
            .unwrap();
        for folder in work {
            assert!(!storage.join(folder).exists(), "{folder}");
        }
        assert!(storage.join("key").exists());
    }
}
