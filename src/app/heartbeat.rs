//! Tells the cluster that this bot instance is alive
//! (upstream `lib/tbot/services/heartbeat`, version 18.0.0).

use std::collections::BTreeMap;
use std::time::{Duration, SystemTime};

use tokio_util::sync::CancellationToken;

use crate::backoff::Backoff;
use crate::clock::Clock;
use crate::cluster::client::API_VERSION;
use crate::cluster::feature::{Feature, Versions};
use crate::cluster::{Client, ClusterError};
use crate::crypto::jitter;
use crate::health::{Registry, Snapshot, Status};
use crate::identity::Handle;
use crate::pb::teleport::machineid::v1::{
    BotInstanceHealthStatus, BotInstanceServiceHealth, BotInstanceServiceIdentifier,
    BotInstanceStatusHeartbeat, BotKind, SubmitHeartbeatRequest,
};

/// Time between heartbeats.
const INTERVAL: Duration = Duration::from_mins(30);
/// Attempts of one heartbeat before the next interval is awaited.
const ATTEMPTS: u32 = 5;

/// How long the first heartbeat waits for services that have not reported yet: what it says of them is
/// all that the cluster knows until the next one.
const SETTLING: Duration = Duration::from_secs(30);
/// The longest name of a service, in bytes, as upstream's agent cuts it.
const MAX_NAME: usize = 64;
/// The same of a reason.
const MAX_REASON: usize = 256;

/// What a heartbeat says beside the time.
#[derive(Debug, Clone)]
pub(super) struct Facts {
    pub(super) join_method: &'static str,
    pub(super) one_shot: bool,
    pub(super) started: SystemTime,
    /// How the services are.
    pub(super) registry: Registry,
    /// Their types by their names. What has none there is a task of the agent itself.
    pub(super) types: BTreeMap<String, &'static str>,
}

impl Facts {
    pub(super) async fn submit(
        &self,
        client: &Client,
        clock: &Clock,
        is_startup: bool,
    ) -> Result<(), ClusterError> {
        let now = clock.now();
        let uptime = now.duration_since(self.started).unwrap_or_default();
        client
            .submit_heartbeat(SubmitHeartbeatRequest {
                heartbeat: Some(BotInstanceStatusHeartbeat {
                    recorded_at: Some(now.into()),
                    is_startup,
                    version: API_VERSION.to_owned(),
                    hostname: hostname(),
                    uptime: uptime.try_into().ok(),
                    join_method: self.join_method.to_owned(),
                    one_shot: self.one_shot,
                    architecture: architecture().to_owned(),
                    os: std::env::consts::OS.to_owned(),
                    kind: BotKind::Tbot.into(),
                    ..BotInstanceStatusHeartbeat::default()
                }),
                service_health: health(&self.registry.snapshot(), &self.types),
            })
            .await
    }
}

/// Sends a heartbeat when there is an identity, and every [`INTERVAL`] from then on.
pub(super) async fn run(
    facts: Facts,
    handle: Handle,
    clock: Clock,
    shutdown: CancellationToken,
) -> anyhow::Result<()> {
    let beating = async {
        let mut is_startup = true;
        let mut versions = Versions::default();
        loop {
            if handle.ready().await.is_none() {
                return;
            }
            look(&handle, &mut versions).await;
            if is_startup {
                settled(&facts.registry, &clock).await;
            }
            if beat(&facts, &handle, &clock, is_startup).await {
                is_startup = false;
            }
            clock.sleep(INTERVAL.mul_f64(0.95 + 0.1 * jitter())).await;
        }
    };
    tokio::select! {
        () = beating => {}
        () = shutdown.cancelled() => {}
    }
    shutdown.cancelled().await;
    Ok(())
}

/// Waits until every service has reported, but not for long.
async fn settled(registry: &Registry, clock: &Clock) {
    let mut reports = registry.subscribe();
    tokio::select! {
        _ = reports.wait_for(Snapshot::complete) => {}
        () = clock.sleep(SETTLING) => {}
    }
}

/// The reports as the protocol has them, in the order of their names.
fn health(
    snapshot: &Snapshot,
    types: &BTreeMap<String, &'static str>,
) -> Vec<BotInstanceServiceHealth> {
    let services = snapshot.services.iter();
    services
        .map(|(name, report)| {
            let kind = types
                .get(name)
                .map_or_else(|| format!("internal/{name}"), |&kind| kind.to_owned());
            let status = match report.status {
                Status::Initializing => BotInstanceHealthStatus::Initializing,
                Status::Healthy => BotInstanceHealthStatus::Healthy,
                Status::Unhealthy => BotInstanceHealthStatus::Unhealthy,
            };
            BotInstanceServiceHealth {
                service: Some(BotInstanceServiceIdentifier {
                    r#type: kind,
                    name: cut(name, MAX_NAME),
                }),
                status: status.into(),
                reason: report
                    .reason
                    .as_deref()
                    .map(|reason| cut(reason, MAX_REASON)),
                updated_at: report.updated_at.map(Into::into),
            }
        })
        .collect()
}

/// The beginning of `text` that has at most `most` bytes, in one line.
fn cut(text: &str, most: usize) -> String {
    let line = text.replace(char::is_control, " ");
    line.get(..line.floor_char_boundary(most))
        .unwrap_or_default()
        .to_owned()
}

/// Looks at the cluster's version. One that does not answer will be asked again.
pub(super) async fn look(handle: &Handle, versions: &mut Versions) {
    match handle.client().ping().await {
        Ok(answer) => {
            versions.look(&answer.server_version);
        }
        Err(error) => tracing::debug!(%error, "The cluster does not tell its version"),
    }
}

/// One heartbeat with its attempts; whether the cluster has it.
async fn beat(facts: &Facts, handle: &Handle, clock: &Clock, is_startup: bool) -> bool {
    let mut backoff = Backoff::new(Duration::from_secs(1), Duration::from_secs(8));
    loop {
        let answer = facts.submit(handle.client(), clock, is_startup).await;
        match handle.lacking().optional(Feature::Heartbeats, answer) {
            // A cluster without heartbeats is not told about them again and again.
            Ok(Some(()) | None) => return true,
            Err(error) if backoff.failures() + 1 >= ATTEMPTS => {
                tracing::warn!(%error, "The cluster did not take the heartbeat");
                return false;
            }
            Err(error) => {
                tracing::debug!(%error, "The cluster did not take the heartbeat");
                clock.sleep(backoff.next_wait(jitter())).await;
            }
        }
    }
}

fn hostname() -> String {
    nix::unistd::gethostname()
        .ok()
        .and_then(|name| name.into_string().ok())
        .unwrap_or_default()
}

/// The machine's architecture by Go's names, which the cluster knows.
fn architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use BotInstanceHealthStatus::{Healthy, Initializing, Unhealthy};

    use super::*;

    fn at(seconds: u64) -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_secs(seconds)
    }

    #[tokio::test(start_paused = true)]
    async fn every_service_is_told_of_as_it_is_now() {
        let clock = Clock::simulated(at(100));
        let registry = Registry::new(clock.clone());
        let identity = registry.reporter("identity");
        identity.healthy();
        identity.fresh_until(at(160));
        registry.reporter("api").healthy();
        let _silent = registry.reporter("later");
        let long = format!("{}{}", "n".repeat(63), "\u{e9}");
        let failing = registry.reporter(long.clone());
        failing.unhealthy(format!("no space\nleft\u{7}{}", "\u{e9}".repeat(200)));
        clock.sleep_until(at(170)).await;

        let types = BTreeMap::from([
            ("api".to_owned(), "workload-identity-api"),
            (long, "identity"),
            ("later".to_owned(), "database"),
        ]);
        let told = health(&registry.snapshot(), &types);
        let lines: Vec<_> = told
            .iter()
            .map(|health| {
                let service = health.service.clone().unwrap();
                let since = health.updated_at.map(|at| at.seconds);
                (service.r#type, service.name, health.status(), since)
            })
            .collect();
        let line = |kind: &str, name: &str, status, since| {
            (kind.to_owned(), name.to_owned(), status, since)
        };
        assert_eq!(
            lines,
            [
                line("workload-identity-api", "api", Healthy, Some(100)),
                line("internal/identity", "identity", Unhealthy, Some(160)),
                line("database", "later", Initializing, None),
                line("identity", &"n".repeat(63), Unhealthy, Some(100)),
            ]
        );
        let reasons: Vec<_> = told.into_iter().map(|health| health.reason).collect();
        assert_eq!(reasons[0], None);
        assert_eq!(reasons[1].as_deref(), Some("stale: not renewed in time"));
        let reason = reasons[3].as_deref().unwrap();
        assert!(reason.starts_with("no space left \u{e9}"), "{reason}");
        assert_eq!(reason.len(), 256);
    }

    #[tokio::test(start_paused = true)]
    async fn services_have_a_moment_to_report() {
        let clock = Clock::simulated(at(0));
        let registry = Registry::new(clock.clone());
        let reporter = registry.reporter("output");
        settled(&registry, &clock).await;
        assert_eq!(clock.now(), at(SETTLING.as_secs()), "nobody reported");
        reporter.unhealthy("no");
        settled(&registry, &clock).await;
        assert_eq!(clock.now(), at(SETTLING.as_secs()));
    }
}
