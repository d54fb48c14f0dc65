//! The one runner of outputs: check the destination, make, write, again and again; after a write
//! that changed something, the hooks.
//!
//! What is due when is decided by [`Schedule`], which knows no clock. What was written last stays
//! until something newer is complete.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use async_trait::async_trait;
use tokio::sync::watch;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::reload::{self, Hooks};
use super::voice::{Part, Voice};
use super::{Context, Made, Output};
use crate::backoff::{Backoff, Loudness, Repeated};
use crate::clock::Clock;
use crate::crypto::jitter;
use crate::destination::{Destination, FileSet};
use crate::renewal::{self, fresh_until};
use crate::telemetry::metrics::{Metrics, Outcome};
use crate::telemetry::one_line;

/// Attempts of one round, as upstream makes them.
const ATTEMPTS: u32 = 5;
/// The first and the longest wait between the attempts of a round: 1, 2, 4, 8 s.
const BETWEEN_ATTEMPTS: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(8));
/// The first wait after a failed round. It doubles up to the interval.
const AFTER_ROUND: Duration = Duration::from_mins(1);
/// The longest that an output which is out of date waits to be made again: changes come in rows, and
/// to every agent at the same moment.
const AFTER_CHANGE: Duration = Duration::from_secs(5);
/// How long hooks that run when the agent stops may go on.
const LAST_HOOKS: Duration = Duration::from_secs(5);
/// The task's name in the metrics.
const TASK: &str = "output-renewal";

/// Renews an output until the agent stops, and runs its `hooks` after every change. Failures are
/// reported and tried again, never returned.
pub async fn run(output: Box<dyn Output>, hooks: Option<reload::Plan>, context: Context) {
    if context.identity.ready().await.is_none() {
        return;
    }
    let voice = Voice::new(context.health.clone());
    let hooks = hooks.map(|plan| hooks_of(plan, output.as_ref(), &context));
    let (written, changes) = watch::channel(0);
    let clock = context.clock.clone();
    let driver = Driver {
        clock: clock.clone(),
        schedule: Schedule::new(clock.now(), output.interval(context.lifetime)),
        name: Arc::clone(&context.name),
        voice: voice.clone(),
        metrics: context.metrics.clone(),
        reload: context.identity.reloads(),
        shutdown: context.shutdown.clone(),
    };
    let shutdown = context.shutdown.clone();
    let renewal = Renewal {
        output,
        context,
        written: hooks.is_some().then_some(written),
    };
    let renew = async {
        driver.run(&renewal).await;
        // Nothing more will be written.
        drop(renewal);
    };
    let tell = async {
        let Some(hooks) = &hooks else { return };
        tokio::select! {
            () = reload::follow(hooks, changes, &voice) => {}
            () = async { shutdown.cancelled().await; clock.sleep(LAST_HOOKS).await } => {}
        }
    };
    tokio::join!(renew, tell);
}

/// Makes an output once, and runs its `hooks` if that changed something.
///
/// # Errors
/// Why it could not be made, in which case what was there before is still there; or which hook
/// failed, and what was made stays.
pub async fn run_once(
    output: Box<dyn Output>,
    hooks: Option<reload::Plan>,
    context: Context,
) -> anyhow::Result<()> {
    let voice = Voice::new(context.health.clone());
    let clock = context.clock.clone();
    let hooks = hooks.map(|plan| hooks_of(plan, output.as_ref(), &context));
    let (written, changes) = watch::channel(0);
    let started = clock.now();
    let renewal = Renewal {
        output,
        context,
        written: hooks.is_some().then_some(written),
    };
    match renewal.attempt().await {
        Ok(not_after) => {
            voice
                .reporter()
                .fresh_until(fresh_until(started, not_after));
            voice.tell(Part::Files, None);
        }
        Err(error) => {
            voice.tell(Part::Files, Some(one_line(&error)));
            return Err(error);
        }
    }
    if let Some(hooks) = hooks.filter(|_| changes.has_changed().unwrap_or(false))
        && let Err(error) = hooks.run().await
    {
        voice.tell(Part::Hooks, Some(error.clone()));
        anyhow::bail!(error);
    }
    Ok(())
}

fn hooks_of(plan: reload::Plan, output: &dyn Output, context: &Context) -> Hooks {
    Hooks::new(
        plan,
        Arc::clone(&context.name),
        output.destination().directory(),
        context.clock.clone(),
        context.metrics.clone(),
    )
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
    /// Counts the writes that changed something, where there are hooks.
    written: Option<watch::Sender<u64>>,
}

#[async_trait]
impl Renew for Renewal {
    async fn attempt(&self) -> anyhow::Result<SystemTime> {
        let destination = self.output.destination();
        destination.check_writable().await?;
        let Made { files, not_after } = self.output.make(&self.context).await?;
        let Some(written) = &self.written else {
            self.output.write(files).await?;
            return Ok(not_after);
        };
        let changes = differs(destination.as_ref(), &files).await;
        self.output.write(files).await?;
        if changes {
            written.send_modify(|count| *count += 1);
        }
        Ok(not_after)
    }

    async fn changed(&self) {
        self.output.changed(&self.context).await;
    }
}

/// Whether writing `files` will change what is there. What cannot be read counts as different.
async fn differs(destination: &dyn Destination, files: &FileSet) -> bool {
    for (name, content) in files {
        match destination.read(name).await {
            Ok(Some(old)) if old == *content => {}
            _ => return true,
        }
    }
    false
}

/// What to do now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Step {
    /// Renew.
    Renew,
    /// Nothing until then.
    Wait(SystemTime),
}

/// When the next renewal is due.
#[derive(Debug, Clone)]
pub(crate) struct Schedule {
    interval: Duration,
    due: SystemTime,
    /// The first failure since the last success.
    failing_since: Option<SystemTime>,
    attempts: Backoff,
    rounds: Backoff,
    /// What was written last.
    written: Option<Credential>,
}

/// A credential that was written.
#[derive(Debug, Clone, Copy)]
struct Credential {
    /// When it was asked for.
    issued: SystemTime,
    /// When it is over.
    not_after: SystemTime,
    /// When its renewal is due.
    due: SystemTime,
}

impl Schedule {
    /// Due at once.
    pub(crate) fn new(now: SystemTime, interval: Duration) -> Self {
        Self {
            interval,
            due: now,
            failing_since: None,
            attempts: Backoff::new(BETWEEN_ATTEMPTS.0, BETWEEN_ATTEMPTS.1),
            rounds: Backoff::new(AFTER_ROUND.min(interval), interval),
            written: None,
        }
    }

    /// What to do at `now`. A date further off than any wait means that the clock was set back.
    pub(crate) fn next(&self, now: SystemTime) -> Step {
        if self.due <= now || self.due > now + self.interval.max(BETWEEN_ATTEMPTS.1) {
            Step::Renew
        } else {
            Step::Wait(self.due)
        }
    }

    /// A renewal began at `started` and its result is over at `not_after`: the next is due after
    /// the interval, or at two thirds of the life if that is sooner, a little earlier by `random`
    /// so that not everyone comes at once. A credential that was only written again is due when it
    /// was, so that changes which keep coming do not put its renewal off. Returns until when what
    /// is written is fresh.
    pub(crate) fn succeeded(
        &mut self,
        started: SystemTime,
        not_after: SystemTime,
        random: f64,
    ) -> SystemTime {
        let same = |known: &Credential| known.not_after == not_after && known.due > started;
        let written = self.written.filter(same).unwrap_or_else(|| Credential {
            issued: started,
            not_after,
            // A credential that is over already is no reason to hurry more than after a failure.
            due: renewal::due(started, not_after, self.interval, random)
                .max(started + BETWEEN_ATTEMPTS.0),
        });
        self.written = Some(written);
        self.due = written.due;
        self.failing_since = None;
        self.attempts.reset();
        self.rounds.reset();
        fresh_until(written.issued, not_after)
    }

    /// A renewal failed at `now`. Says whether that ended the round.
    pub(crate) fn failed(&mut self, now: SystemTime, random: f64) -> bool {
        let since = *self.failing_since.get_or_insert(now);
        let ended = self.attempts.failures() + 1 >= ATTEMPTS;
        let wait = if ended {
            self.attempts.reset();
            let slack = self
                .written
                .map(|written| fresh_until(written.issued, written.not_after))
                .and_then(|fresh| fresh.duration_since(now).ok())
                .unwrap_or_default();
            let failing = now.duration_since(since).unwrap_or_default();
            let patience = renewal::patience(failing, slack.min(self.interval), random);
            self.rounds.next_wait(random).max(patience)
        } else {
            self.attempts.next_wait(random)
        };
        self.due = now + wait;
        ended
    }

    /// Everything is to be renewed now.
    pub(crate) fn reload(&mut self, now: SystemTime) {
        self.due = now;
        self.failing_since = None;
        self.attempts.reset();
    }

    /// What is written went out of date: it is to be made again soon, earlier by `random`.
    fn changed(&mut self, now: SystemTime, random: f64) {
        self.due = self.due.min(now + AFTER_CHANGE.mul_f64(random));
    }
}

/// Follows the schedule.
struct Driver {
    clock: Clock,
    schedule: Schedule,
    name: Arc<str>,
    voice: Voice,
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
                    () = renew.changed() => self.schedule.changed(self.clock.now(), jitter()),
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
                    let fresh = self.schedule.succeeded(started, not_after, jitter());
                    self.voice.reporter().fresh_until(fresh);
                    self.voice.tell(Part::Files, None);
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
                    match row.failed(Instant::now(), &error) {
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
                        self.voice.tell(Part::Files, Some(error));
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
