//! The one runner of outputs: check the destination, make, write, again and again.
//!
//! What is due when is decided by [`Schedule`], which knows no clock. What was written last stays
//! until something newer is complete.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use async_trait::async_trait;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::{Context, Made, Output};
use crate::backoff::{Backoff, Loudness, Repeated};
use crate::clock::Clock;
use crate::crypto::jitter;
use crate::health::Reporter;
use crate::renewal::{self, fresh_until};
use crate::telemetry::metrics::{Metrics, Outcome};
use crate::telemetry::one_line;

/// Attempts of one round, as upstream makes them.
const ATTEMPTS: u32 = 5;
/// The first and the longest wait between the attempts of a round: 1, 2, 4, 8 s.
const BETWEEN_ATTEMPTS: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(8));
/// The first wait after a failed round. It doubles up to the interval.
const AFTER_ROUND: Duration = Duration::from_mins(1);
/// The task's name in the metrics.
const TASK: &str = "output-renewal";

/// Renews an output until the agent stops. Failures are reported and tried again, never returned.
pub async fn run(output: Box<dyn Output>, context: Context) {
    if context.identity.ready().await.is_none() {
        return;
    }
    let driver = Driver {
        clock: context.clock.clone(),
        schedule: Schedule::new(context.clock.now(), context.lifetime.interval),
        name: Arc::clone(&context.name),
        health: context.health.clone(),
        metrics: context.metrics.clone(),
        reload: context.identity.reloads(),
        shutdown: context.shutdown.clone(),
    };
    driver.run(&Renewal { output, context }).await;
}

/// Makes an output once.
///
/// # Errors
/// Why it could not be made; what was there before is still there.
pub async fn run_once(output: Box<dyn Output>, context: Context) -> anyhow::Result<()> {
    let (health, clock) = (context.health.clone(), context.clock.clone());
    let started = clock.now();
    let renewal = Renewal { output, context };
    match renewal.attempt().await {
        Ok(not_after) => {
            health.fresh_until(fresh_until(started, not_after));
            health.healthy();
            Ok(())
        }
        Err(error) => {
            health.unhealthy(one_line(&error));
            Err(error)
        }
    }
}

/// Something that is renewed. A trait so that a test can fail without a cluster.
#[async_trait]
trait Renew: Send + Sync {
    /// Renews once and returns when the result is over.
    async fn attempt(&self) -> anyhow::Result<SystemTime>;
    /// Waits until it has to be renewed before it is due.
    async fn changed(&self) {
        std::future::pending::<()>().await;
    }
}

struct Renewal {
    output: Box<dyn Output>,
    context: Context,
}

#[async_trait]
impl Renew for Renewal {
    async fn attempt(&self) -> anyhow::Result<SystemTime> {
        let destination = self.output.destination();
        destination.check_writable().await?;
        let Made { files, not_after } = self.output.make(&self.context).await?;
        destination.write(files).await?;
        Ok(not_after)
    }

    async fn changed(&self) {
        self.output.changed(&self.context).await;
    }
}

/// What to do now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Step {
    /// Renew.
    Renew,
    /// Nothing until then.
    Wait(SystemTime),
}

/// When the next renewal is due.
#[derive(Debug, Clone)]
struct Schedule {
    interval: Duration,
    due: SystemTime,
    attempts: Backoff,
    rounds: Backoff,
}

impl Schedule {
    /// Due at once.
    fn new(now: SystemTime, interval: Duration) -> Self {
        Self {
            interval,
            due: now,
            attempts: Backoff::new(BETWEEN_ATTEMPTS.0, BETWEEN_ATTEMPTS.1),
            rounds: Backoff::new(AFTER_ROUND.min(interval), interval),
        }
    }

    /// What to do at `now`. A date further off than any wait means that the clock was set back.
    fn next(&self, now: SystemTime) -> Step {
        if self.due <= now || self.due > now + self.interval.max(BETWEEN_ATTEMPTS.1) {
            Step::Renew
        } else {
            Step::Wait(self.due)
        }
    }

    /// A renewal began at `started` and its result is over at `not_after`: the next is due after
    /// the interval, or at two thirds of the life if that is sooner, a little earlier by `random`
    /// so that not everyone comes at once.
    fn succeeded(&mut self, started: SystemTime, not_after: SystemTime, random: f64) {
        self.due = renewal::due(started, not_after, self.interval, random);
        self.attempts.reset();
        self.rounds.reset();
    }

    /// A renewal failed at `now`. Says whether that ended the round.
    fn failed(&mut self, now: SystemTime, random: f64) -> bool {
        let ended = self.attempts.failures() + 1 >= ATTEMPTS;
        let wait = if ended {
            self.attempts.reset();
            self.rounds.next_wait(random)
        } else {
            self.attempts.next_wait(random)
        };
        self.due = now + wait;
        ended
    }

    /// Everything is to be renewed now.
    fn reload(&mut self, now: SystemTime) {
        self.due = now;
        self.attempts.reset();
    }
}

/// Follows the schedule.
struct Driver {
    clock: Clock,
    schedule: Schedule,
    name: Arc<str>,
    health: Reporter,
    metrics: Metrics,
    reload: watch::Receiver<u64>,
    shutdown: CancellationToken,
}

impl Driver {
    async fn run(mut self, renew: &dyn Renew) {
        let shutdown = self.shutdown.clone();
        tokio::select! {
            () = shutdown.cancelled() => {}
            () = self.follow(renew) => {}
        }
    }

    async fn follow(&mut self, renew: &dyn Renew) {
        let mut row = Repeated::default();
        let mut retries = 0;
        let mut began = self.clock.now();
        let mut reloads = true;
        loop {
            if let Step::Wait(until) = self.schedule.next(self.clock.now()) {
                tokio::select! {
                    () = self.clock.sleep_until(until) => {}
                    changed = self.reload.changed(), if reloads => {
                        reloads = changed.is_ok();
                        if reloads {
                            retries = 0;
                            self.schedule.reload(self.clock.now());
                        }
                    }
                    () = renew.changed() => {
                        retries = 0;
                        self.schedule.reload(self.clock.now());
                    }
                }
                continue;
            }
            // A reload that comes from here on is for the next renewal.
            self.reload.mark_unchanged();
            let started = self.clock.now();
            if retries == 0 {
                began = started;
            }
            match renew.attempt().await {
                Ok(not_after) => {
                    self.schedule.succeeded(started, not_after, jitter());
                    self.health.fresh_until(fresh_until(started, not_after));
                    self.health.healthy();
                    self.count(Outcome::Succeeded { retries }, began);
                    retries = 0;
                    if let Some(failures) = row.recovered() {
                        tracing::info!(service = %self.name, failures, "The output is fresh again");
                    } else {
                        tracing::info!(service = %self.name, "Wrote the output");
                    }
                }
                Err(error) => {
                    let ended = self.schedule.failed(self.clock.now(), jitter());
                    let error = one_line(&error);
                    match row.failed() {
                        Loudness::Warn => tracing::warn!(
                            service = %self.name,
                            error,
                            "The output could not be renewed; what was written stays, trying again"
                        ),
                        Loudness::Debug => tracing::debug!(
                            service = %self.name,
                            error,
                            "The output still could not be renewed"
                        ),
                    }
                    retries += 1;
                    if ended {
                        self.health.unhealthy(error);
                        self.count(Outcome::Failed, began);
                        retries = 0;
                    }
                }
            }
        }
    }

    fn count(&self, outcome: Outcome, began: SystemTime) {
        let took = self.clock.now().duration_since(began).unwrap_or_default();
        self.metrics.iteration(&self.name, TASK, outcome, took);
    }
}

#[cfg(test)]
#[path = "output_tests.rs"]
mod tests;
