//! Who is ready, who is failing and why: one registry that the diagnostics endpoints, the service
//! manager's status line and the heartbeats all read, so that they cannot contradict each other.

use std::collections::BTreeMap;
use std::time::SystemTime;

use tokio::sync::watch;

use crate::clock::Clock;

/// The reason shown for a service whose freshness deadline has passed.
const STALE: &str = "stale: not renewed in time";

/// What is known of one service.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Status {
    /// It has not reported yet. Counts as not healthy.
    Initializing,
    /// It does its work and what it serves is fresh.
    Healthy,
    /// It fails, or what it serves is older than it should be.
    Unhealthy,
}

impl Status {
    /// The word used in JSON and in status lines.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Initializing => "initializing",
            Self::Healthy => "healthy",
            Self::Unhealthy => "unhealthy",
        }
    }
}

/// The last thing a service said of itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Report {
    /// How it is.
    pub status: Status,
    /// Why it is not healthy; one line, without secrets.
    pub reason: Option<String>,
    /// When it reported; `None` until the first report.
    pub updated_at: Option<SystemTime>,
    /// When what it serves becomes too old to be called healthy.
    pub fresh_until: Option<SystemTime>,
}

impl Report {
    const SILENT: Self = Self {
        status: Status::Initializing,
        reason: None,
        updated_at: None,
        fresh_until: None,
    };

    /// The report as it counts at `now`: a healthy service past its deadline is unhealthy.
    ///
    /// A service that never reported stays `initializing`; one that failed keeps its own reason.
    #[must_use]
    pub fn at(&self, now: SystemTime) -> Self {
        match (self.status, self.fresh_until) {
            (Status::Healthy, Some(deadline)) if now >= deadline => Self {
                status: Status::Unhealthy,
                reason: Some(STALE.to_owned()),
                updated_at: Some(deadline),
                fresh_until: Some(deadline),
            },
            _ => self.clone(),
        }
    }
}

/// All services by name, at one moment.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Snapshot {
    /// The reports, in the order of their names.
    pub services: BTreeMap<String, Report>,
}

impl Snapshot {
    /// The same reports as they count at `now`.
    #[must_use]
    pub fn at(&self, now: SystemTime) -> Self {
        Self {
            services: self
                .services
                .iter()
                .map(|(name, report)| (name.clone(), report.at(now)))
                .collect(),
        }
    }

    /// Whether every service is healthy.
    #[must_use]
    pub fn healthy(&self) -> bool {
        self.services
            .values()
            .all(|report| report.status == Status::Healthy)
    }

    /// Whether every service has reported at least once.
    #[must_use]
    pub fn complete(&self) -> bool {
        self.services
            .values()
            .all(|report| report.updated_at.is_some())
    }

    /// The next moment at which a healthy service becomes stale unless it reports again.
    #[must_use]
    pub fn next_deadline(&self) -> Option<SystemTime> {
        self.services
            .values()
            .filter(|report| report.status == Status::Healthy)
            .filter_map(|report| report.fresh_until)
            .min()
    }
}

/// Where services report and the rest of the program reads. Clones share one state.
#[derive(Debug, Clone)]
pub struct Registry {
    clock: Clock,
    state: watch::Sender<Snapshot>,
}

impl Registry {
    /// An empty registry. Healthy, as nothing is missing.
    #[must_use]
    pub fn new(clock: Clock) -> Self {
        Self {
            clock,
            state: watch::Sender::new(Snapshot::default()),
        }
    }

    /// Registers a service as `initializing` and returns its voice.
    ///
    /// Register everything before the first wait: [`Snapshot::complete`] knows only what is
    /// registered. A name that is registered already keeps its last report.
    #[must_use]
    pub fn reporter(&self, name: impl Into<String>) -> Reporter {
        let name = name.into();
        self.state.send_modify(|snapshot| {
            snapshot
                .services
                .entry(name.clone())
                .or_insert(Report::SILENT);
        });
        Reporter {
            name,
            registry: self.clone(),
        }
    }

    /// How everything is now, deadlines applied.
    #[must_use]
    pub fn snapshot(&self) -> Snapshot {
        self.state.borrow().at(self.clock.now())
    }

    /// Follows the reports. Deadlines are not applied: judge what arrives with [`Snapshot::at`].
    #[must_use]
    pub fn subscribe(&self) -> watch::Receiver<Snapshot> {
        self.state.subscribe()
    }
}

/// The voice of one service.
#[derive(Debug, Clone)]
pub struct Reporter {
    name: String,
    registry: Registry,
}

impl Reporter {
    /// The name it reports under.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The service does its work.
    pub fn healthy(&self) {
        self.set(Status::Healthy, None);
    }

    /// The service fails. `reason` is shown to operators: one line, no secrets.
    pub fn unhealthy(&self, reason: impl Into<String>) {
        self.set(Status::Unhealthy, Some(reason.into()));
    }

    /// What the service serves is fresh until `deadline`; past it the service counts as unhealthy
    /// even if it says nothing more. Kept across reports until it is set again.
    pub fn fresh_until(&self, deadline: SystemTime) {
        self.modify(|report| report.fresh_until = Some(deadline));
    }

    fn set(&self, status: Status, reason: Option<String>) {
        let now = self.registry.clock.now();
        self.modify(|report| {
            report.status = status;
            report.reason = reason;
            report.updated_at = Some(now);
        });
    }

    fn modify(&self, change: impl FnOnce(&mut Report)) {
        self.registry.state.send_modify(|snapshot| {
            change(
                snapshot
                    .services
                    .entry(self.name.clone())
                    .or_insert(Report::SILENT),
            );
        });
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    const T0: SystemTime = SystemTime::UNIX_EPOCH;

    fn at(seconds: u64) -> SystemTime {
        T0 + Duration::from_secs(seconds)
    }

    #[test]
    fn a_report_counts_until_its_deadline() {
        let report = |status, fresh_until| Report {
            status,
            reason: (status == Status::Unhealthy).then(|| "disk full".to_owned()),
            updated_at: Some(at(0)),
            fresh_until,
        };
        for (case, seen, want, reason) in [
            (
                "no deadline",
                (Status::Healthy, None),
                Status::Healthy,
                None,
            ),
            (
                "before it",
                (Status::Healthy, Some(at(11))),
                Status::Healthy,
                None,
            ),
            (
                "at it",
                (Status::Healthy, Some(at(10))),
                Status::Unhealthy,
                Some(STALE),
            ),
            (
                "after it",
                (Status::Healthy, Some(at(9))),
                Status::Unhealthy,
                Some(STALE),
            ),
            (
                "failing anyway",
                (Status::Unhealthy, Some(at(9))),
                Status::Unhealthy,
                Some("disk full"),
            ),
            (
                "silent",
                (Status::Initializing, Some(at(9))),
                Status::Initializing,
                None,
            ),
        ] {
            let judged = report(seen.0, seen.1).at(at(10));
            assert_eq!(judged.status, want, "{case}");
            assert_eq!(judged.reason.as_deref(), reason, "{case}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn initializing_is_neither_healthy_nor_complete() {
        let clock = Clock::simulated(at(100));
        let registry = Registry::new(clock.clone());
        assert!(registry.snapshot().healthy() && registry.snapshot().complete());

        let identity = registry.reporter("identity");
        let output = registry.reporter("identity-output-1");
        assert!(!registry.snapshot().healthy() && !registry.snapshot().complete());

        identity.healthy();
        output.unhealthy("no space left on device");
        let snapshot = registry.snapshot();
        assert!(snapshot.complete() && !snapshot.healthy());
        assert_eq!(
            snapshot.services["identity-output-1"].reason.as_deref(),
            Some("no space left on device")
        );

        output.healthy();
        assert!(registry.snapshot().healthy());
        assert_eq!(
            registry.snapshot().services["identity-output-1"].reason,
            None
        );
    }

    #[tokio::test(start_paused = true)]
    async fn silence_past_the_deadline_is_unhealthy_until_the_next_report() {
        let clock = Clock::simulated(at(0));
        let registry = Registry::new(clock.clone());
        let reporter = registry.reporter("identity");
        reporter.healthy();
        reporter.fresh_until(at(60));
        assert_eq!(registry.snapshot().next_deadline(), Some(at(60)));

        clock.sleep_until(at(61)).await;
        assert!(!registry.snapshot().healthy());

        reporter.fresh_until(at(120));
        reporter.healthy();
        assert!(registry.snapshot().healthy());
    }

    #[tokio::test(start_paused = true)]
    async fn followers_see_each_report() {
        let registry = Registry::new(Clock::simulated(at(0)));
        let reporter = registry.reporter("identity");
        let mut reports = registry.subscribe();
        reporter.unhealthy("cluster away");
        reports.changed().await.unwrap();
        assert_eq!(
            reports.borrow_and_update().services["identity"].status,
            Status::Unhealthy
        );
    }
}
