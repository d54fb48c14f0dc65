//! Tells the cluster that this bot instance is alive
//! (upstream `lib/tbot/services/heartbeat`, version 18.0.0).

use std::time::{Duration, SystemTime};

use tokio_util::sync::CancellationToken;

use crate::backoff::Backoff;
use crate::clock::Clock;
use crate::cluster::client::API_VERSION;
use crate::cluster::feature::{Feature, Versions};
use crate::cluster::{Client, ClusterError};
use crate::crypto::jitter;
use crate::identity::Handle;
use crate::pb::teleport::machineid::v1::{
    BotInstanceStatusHeartbeat, BotKind, SubmitHeartbeatRequest,
};

/// Time between heartbeats.
const INTERVAL: Duration = Duration::from_mins(30);
/// Attempts of one heartbeat before the next interval is awaited.
const ATTEMPTS: u32 = 5;

/// What a heartbeat says beside the time.
#[derive(Debug, Clone, Copy)]
pub(super) struct Facts {
    pub(super) join_method: &'static str,
    pub(super) one_shot: bool,
    pub(super) started: SystemTime,
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
                service_health: Vec::new(),
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
