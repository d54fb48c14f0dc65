//! What systemd is told: ready, status, reloading, stopping, and that the agent is alive
//! (`sd_notify(3)`). Without a notify socket all of it does nothing.

use std::time::Duration;

use sd_notify::NotifyState;
use tokio_util::sync::CancellationToken;

use crate::clock::{Clock, rfc3339};
use crate::health::Registry;
use crate::identity::Handle;

/// How long readiness waits for the first identity. After it the unit counts as started, so that an
/// unreachable cluster does not hold up a boot; the status line says what is missing.
const PATIENCE: Duration = Duration::from_secs(30);
/// How often the status line is brought up to date.
const STATUS: Duration = Duration::from_secs(10);

/// Tells systemd about the agent until `shutdown`.
pub(super) async fn run(
    handle: Handle,
    registry: Registry,
    clock: Clock,
    shutdown: CancellationToken,
) -> anyhow::Result<()> {
    let telling = async {
        tokio::select! {
            _ = handle.ready() => {}
            () = clock.sleep(PATIENCE) => {}
        }
        ready();
        let interval = sd_notify::watchdog_enabled().map_or(STATUS, |limit| STATUS.min(limit / 3));
        loop {
            tell(&[
                NotifyState::Status(&status(&handle, &registry, &clock)),
                NotifyState::Watchdog,
            ]);
            clock.sleep(interval).await;
        }
    };
    tokio::select! {
        () = telling => {}
        () = shutdown.cancelled() => {}
    }
    Ok(())
}

/// One line for `systemctl status`.
fn status(handle: &Handle, registry: &Registry, clock: &Clock) -> String {
    let identity = handle.identity();
    let held = identity.borrow().as_ref().map_or_else(
        || "joining".to_owned(),
        |identity| {
            format!(
                "{} in {}, valid until {}",
                identity.user(),
                identity.cluster(),
                rfc3339(identity.not_after())
            )
        },
    );
    let snapshot = registry.snapshot().at(clock.now());
    let failing: Vec<&str> = snapshot
        .services
        .iter()
        .filter(|(_, report)| report.status == crate::health::Status::Unhealthy)
        .map(|(name, _)| name.as_str())
        .collect();
    if failing.is_empty() {
        held
    } else {
        format!("{held}; failing: {}", failing.join(", "))
    }
}

/// The service has started, or has reloaded.
pub(super) fn ready() {
    tell(&[NotifyState::Ready]);
}

/// The service renews everything because it was asked to.
pub(super) fn reloading() {
    match NotifyState::monotonic_usec_now() {
        Ok(now) => tell(&[NotifyState::Reloading, now]),
        Err(_error) => tell(&[NotifyState::Reloading]),
    }
}

/// The service is on its way out.
pub(super) fn stopping() {
    tell(&[NotifyState::Stopping]);
}

fn tell(state: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(state) {
        tracing::debug!(%error, "systemd could not be told");
    }
}
