//! One service from its preparation to its end. Whatever goes wrong with it, a panic included, is
//! told and tried again here, so that no service can stop another.

use std::any::Any;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::Duration;

use anyhow::anyhow;
use futures_util::FutureExt as _;
use tokio::time::Instant;

use crate::backoff::{Backoff, Loudness, Repeated};
use crate::crypto::jitter;
use crate::services::{Context, Service, ServicePlan, output, reload};
use crate::telemetry::one_line;

/// The first and the longest wait before a service that failed is started again.
const RESTART: (Duration, Duration) = (Duration::from_secs(1), Duration::from_mins(1));

/// A service of the plan, with what it may use.
pub(super) struct Unit {
    plan: Box<dyn ServicePlan>,
    hooks: Option<reload::Plan>,
    context: Context,
    /// The service with its destination made or its socket bound; `None` if that has to be done.
    prepared: Option<Service>,
}

impl Unit {
    pub(super) fn new(
        plan: Box<dyn ServicePlan>,
        hooks: Option<reload::Plan>,
        context: Context,
    ) -> Self {
        Self {
            plan,
            hooks,
            context,
            prepared: None,
        }
    }

    pub(super) fn name(&self) -> Arc<str> {
        Arc::clone(&self.context.name)
    }

    /// Whether it makes something once. What only listens cannot run once.
    pub(super) fn is_output(&self) -> bool {
        matches!(self.plan.build(), Service::Output(_))
    }

    /// Makes the destination or binds the socket. A unit that fails here can still be run: it tries
    /// again.
    pub(super) async fn prepare(&mut self) -> anyhow::Result<()> {
        let outcome = guarded(prepared(self.plan.as_ref(), &self.context)).await;
        match outcome {
            Ok(service) => {
                self.prepared = Some(service);
                Ok(())
            }
            Err(error) => {
                self.context.health.unhealthy(one_line(&error));
                Err(error)
            }
        }
    }

    /// Runs until the agent stops, starting over after every failure.
    pub(super) async fn run(mut self) {
        let (clock, shutdown) = (self.context.clock.clone(), self.context.shutdown.clone());
        let mut backoff = Backoff::new(RESTART.0, RESTART.1);
        let mut row = Repeated::default();
        loop {
            let began = clock.now();
            let Err(error) = guarded(self.live()).await else {
                // It was told to stop, or the identity that it waits for will never come.
                return shutdown.cancelled().await;
            };
            if clock.now().duration_since(began).unwrap_or_default() > RESTART.1 {
                backoff.reset();
                row = Repeated::default();
            }
            let wait = backoff.next_wait(jitter());
            let (service, error) = (&*self.context.name, one_line(&error));
            let retry_in = format!("{:.1}s", wait.as_secs_f64());
            match row.failed(Instant::now(), &error) {
                Loudness::Warn => {
                    tracing::warn!(service, error, retry_in, "The service failed");
                }
                Loudness::Debug => {
                    tracing::debug!(service, error, retry_in, "The service failed again");
                }
            }
            self.context.health.unhealthy(error);
            tokio::select! {
                () = clock.sleep(wait) => {}
                () = shutdown.cancelled() => return,
            }
        }
    }

    async fn live(&mut self) -> anyhow::Result<()> {
        let service = match self.prepared.take() {
            Some(service) => service,
            None => prepared(self.plan.as_ref(), &self.context).await?,
        };
        match service {
            Service::Output(output) => {
                output::run(output, self.hooks.clone(), self.context.clone()).await;
                Ok(())
            }
            Service::Server(server) => {
                server.run(self.context.clone()).await?;
                if self.context.shutdown.is_cancelled() {
                    Ok(())
                } else {
                    Err(anyhow!("it ended by itself"))
                }
            }
        }
    }

    /// Makes the output once. A service that only listens has nothing to make.
    pub(super) async fn run_once(mut self) -> anyhow::Result<()> {
        let health = self.context.health.clone();
        let outcome = guarded(async {
            let service = match self.prepared.take() {
                Some(service) => service,
                None => prepared(self.plan.as_ref(), &self.context).await?,
            };
            match service {
                Service::Output(output) => {
                    output::run_once(output, self.hooks.take(), self.context).await
                }
                Service::Server(_) => Ok(()),
            }
        })
        .await;
        if let Err(error) = &outcome {
            health.unhealthy(one_line(error));
        }
        outcome
    }
}

async fn prepared(plan: &dyn ServicePlan, context: &Context) -> anyhow::Result<Service> {
    let mut service = plan.build();
    match &mut service {
        Service::Output(output) => output.destination().init().await?,
        Service::Server(server) => server.bind(context).await?,
    }
    Ok(service)
}

/// Does `work`; a panic in it is an error like any other.
async fn guarded<T>(work: impl Future<Output = anyhow::Result<T>>) -> anyhow::Result<T> {
    AssertUnwindSafe(work)
        .catch_unwind()
        .await
        .unwrap_or_else(|panic| Err(anyhow!("it panicked: {}", message(panic.as_ref()))))
}

fn message(panic: &(dyn Any + Send)) -> &str {
    panic
        .downcast_ref::<&str>()
        .copied()
        .or_else(|| panic.downcast_ref::<String>().map(String::as_str))
        .unwrap_or("for an unknown reason")
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};
    use std::time::SystemTime;

    use async_trait::async_trait;
    use tokio::sync::watch;
    use tokio_util::sync::CancellationToken;

    use super::*;
    use crate::clock::Clock;
    use crate::cluster::client::Route;
    use crate::cluster::dial::Tcp;
    use crate::cluster::trust::Trust;
    use crate::destination::{Destination, DestinationPlan, from_uri};
    use crate::health::{Registry, Status};
    use crate::identity::Handle;
    use crate::services::{Lifetime, Made, Output, Server};
    use crate::telemetry::metrics::Metrics;
    use crate::yaml::Tree;

    /// What goes wrong with the fake service.
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    enum Fault {
        Bind,
        Run,
        Panic,
        End,
    }

    /// A server that fails so many times before it works, or an output that panics.
    #[derive(Debug, Clone)]
    struct Fake {
        fault: Fault,
        failures: u32,
        starts: Arc<AtomicU32>,
        output: bool,
    }

    impl Fake {
        fn new(fault: Fault, failures: u32) -> Self {
            Self {
                fault,
                failures,
                starts: Arc::default(),
                output: false,
            }
        }

        fn fails(&self, at: Fault) -> bool {
            self.fault == at && self.starts.load(Ordering::Relaxed) <= self.failures
        }
    }

    impl ServicePlan for Fake {
        fn label(&self) -> String {
            "fake".to_owned()
        }
        fn destination(&self) -> Option<&Arc<dyn DestinationPlan>> {
            None
        }
        fn emit(&self) -> Vec<(String, Tree)> {
            Vec::new()
        }
        fn build(&self) -> Service {
            if self.output {
                Service::Output(Box::new(self.clone()))
            } else {
                Service::Server(Box::new(self.clone()))
            }
        }
    }

    #[async_trait]
    impl Server for Fake {
        async fn bind(&mut self, _context: &Context) -> anyhow::Result<()> {
            self.starts.fetch_add(1, Ordering::Relaxed);
            anyhow::ensure!(!self.fails(Fault::Bind), "the socket is in use");
            Ok(())
        }
        async fn run(self: Box<Self>, context: Context) -> anyhow::Result<()> {
            anyhow::ensure!(!self.fails(Fault::Run), "the socket is gone");
            assert!(!self.fails(Fault::Panic), "a mistake of the program");
            if self.fails(Fault::End) {
                return Ok(());
            }
            context.health.healthy();
            context.shutdown.cancelled().await;
            Ok(())
        }
    }

    #[async_trait]
    impl Output for Fake {
        fn destination(&self) -> Arc<dyn Destination> {
            from_uri("memory://").unwrap().build()
        }
        async fn make(&self, _context: &Context) -> anyhow::Result<Made> {
            panic!("a mistake of the program");
        }
    }

    fn unit(fake: Fake) -> (Unit, Registry, CancellationToken) {
        let clock = Clock::simulated(SystemTime::UNIX_EPOCH);
        let registry = Registry::new(clock.clone());
        let shutdown = CancellationToken::new();
        let identity = Handle::new(
            clock.clone(),
            Arc::new(Tcp),
            Route::Direct("nowhere:3025".to_owned()),
            Trust::default(),
            false,
            watch::channel(None).1,
            watch::channel(None).1,
            watch::channel(0).1,
        );
        let context = Context {
            clock,
            identity,
            sockets: crate::services::Sockets::default(),
            trust: crate::services::Trust::default(),
            shelf: crate::workload::Shelf::default(),
            lifetime: Lifetime::default(),
            name: "fake".into(),
            health: registry.reporter("fake"),
            metrics: Metrics::new(),
            shutdown: shutdown.clone(),
        };
        (Unit::new(Box::new(fake), None, context), registry, shutdown)
    }

    fn report(registry: &Registry) -> (Status, Option<String>) {
        let report = registry.snapshot().services["fake"].clone();
        (report.status, report.reason)
    }

    #[tokio::test(start_paused = true)]
    async fn a_service_that_fails_in_any_way_is_told_and_started_again() {
        for (fault, reason) in [
            (Fault::Bind, "the socket is in use"),
            (Fault::Run, "the socket is gone"),
            (Fault::Panic, "it panicked: a mistake of the program"),
            (Fault::End, "it ended by itself"),
        ] {
            let (mut unit, registry, shutdown) = unit(Fake::new(fault, 3));
            assert_eq!(unit.prepare().await.is_err(), fault == Fault::Bind);
            let running = tokio::spawn(unit.run());
            tokio::time::sleep(Duration::from_millis(100)).await;
            assert_eq!(
                report(&registry),
                (Status::Unhealthy, Some(reason.to_owned()))
            );
            tokio::time::sleep(Duration::from_secs(30)).await;
            assert_eq!(report(&registry).0, Status::Healthy, "{fault:?}");
            shutdown.cancel();
            running.await.unwrap();
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_service_that_never_works_is_left_in_peace_and_stops_at_once() {
        let fake = Fake::new(Fault::Bind, u32::MAX);
        let starts = Arc::clone(&fake.starts);
        let (unit, _registry, shutdown) = unit(fake);
        let running = tokio::spawn(unit.run());
        tokio::time::sleep(Duration::from_hours(1)).await;
        let tried = starts.load(Ordering::Relaxed);
        assert!((60..=130).contains(&tried), "{tried} starts in an hour");
        let asked = tokio::time::Instant::now();
        shutdown.cancel();
        running.await.unwrap();
        assert_eq!(asked.elapsed(), Duration::ZERO);
    }

    #[tokio::test(start_paused = true)]
    async fn an_output_that_panics_once_is_a_failed_output() {
        let mut fake = Fake::new(Fault::Panic, 1);
        fake.output = true;
        let (unit, registry, _shutdown) = unit(fake);
        assert!(unit.is_output());
        let error = unit.run_once().await.unwrap_err();
        assert_eq!(error.to_string(), "it panicked: a mistake of the program");
        assert_eq!(report(&registry).0, Status::Unhealthy);
    }
}
