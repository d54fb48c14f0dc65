//! The numbers this process publishes, under the names that dashboards for Teleport's agent know.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use prometheus_client::encoding::text::encode;
use prometheus_client::encoding::{EncodeLabelSet, EncodeMetric, MetricEncoder};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets, linear_buckets};
use prometheus_client::registry::Registry;

/// The media type of [`Metrics::render`]'s text (`OpenMetrics` 1.0).
pub const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// Which loop an iteration belongs to.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Task {
    service: String,
    name: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Build {
    version: &'static str,
}

/// How one iteration of a task ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// It succeeded after this many retries.
    Succeeded {
        /// 0 if the first try did.
        retries: u32,
    },
    /// It was given up until the next interval.
    Failed,
}

/// A counter whose published name has no `_total` suffix, as its name upstream has none.
#[derive(Debug, Clone, Default)]
struct BareCounter(Counter);

impl EncodeMetric for BareCounter {
    fn encode(&self, mut encoder: MetricEncoder<'_>) -> Result<(), std::fmt::Error> {
        encoder.encode_gauge(&i64::try_from(self.0.get()).unwrap_or(i64::MAX))
    }

    fn metric_type(&self) -> MetricType {
        MetricType::Unknown
    }
}

impl prometheus_client::metrics::TypedMetric for BareCounter {
    const TYPE: MetricType = MetricType::Unknown;
}

/// All metrics of the process. Clones share the same numbers.
#[derive(Debug, Clone)]
pub struct Metrics {
    registry: Arc<Mutex<Registry>>,
    iterations: Family<Task, Counter>,
    failed: Family<Task, BareCounter>,
    successful: Family<Task, Histogram, fn() -> Histogram>,
    duration: Family<Task, Histogram, fn() -> Histogram>,
}

impl Default for Metrics {
    fn default() -> Self {
        Self::new()
    }
}

impl Metrics {
    /// A registry with every metric at zero.
    #[must_use]
    pub fn new() -> Self {
        let mut registry = Registry::default();
        let iterations = Family::default();
        let failed = Family::default();
        let successful: Family<_, _, fn() -> Histogram> =
            Family::new_with_constructor(|| Histogram::new(linear_buckets(0.0, 1.0, 6)));
        let duration: Family<_, _, fn() -> Histogram> =
            Family::new_with_constructor(|| Histogram::new(exponential_buckets(0.1, 1.75, 6)));
        registry.register(
            "tbot_task_iterations",
            "Iterations of a task, however they ended",
            iterations.clone(),
        );
        registry.register(
            "tbot_task_iterations_failed",
            "Iterations of a task that were given up",
            failed.clone(),
        );
        registry.register(
            "tbot_task_iterations_successful",
            "Retries that a successful iteration of a task needed",
            successful.clone(),
        );
        registry.register(
            "tbot_task_iteration_duration_seconds",
            "Duration of an iteration of a task, retries included",
            duration.clone(),
        );
        let build: Family<Build, ConstGauge<i64>, fn() -> ConstGauge<i64>> =
            Family::new_with_constructor(|| ConstGauge::new(1));
        drop(build.get_or_create(&Build {
            version: env!("CARGO_PKG_VERSION"),
        }));
        registry.register("teleport_build_info", "The version that runs", build);
        Self {
            registry: Arc::new(Mutex::new(registry)),
            iterations,
            failed,
            successful,
            duration,
        }
    }

    /// Counts one iteration of the task `name` (`output-renewal`, `bot-identity-renewal`, …) of
    /// `service`, which took `took` with its retries.
    pub fn iteration(&self, service: &str, name: &str, outcome: Outcome, took: Duration) {
        let task = Task {
            service: service.to_owned(),
            name: name.to_owned(),
        };
        self.iterations.get_or_create(&task).inc();
        self.duration
            .get_or_create(&task)
            .observe(took.as_secs_f64());
        match outcome {
            Outcome::Succeeded { retries } => {
                self.successful
                    .get_or_create(&task)
                    .observe(f64::from(retries));
            }
            Outcome::Failed => {
                self.failed.get_or_create(&task).0.inc();
            }
        }
    }

    /// Adds metrics of another component: `add` registers what it counts itself.
    pub fn register(&self, add: impl FnOnce(&mut Registry)) {
        if let Ok(mut registry) = self.registry.lock() {
            add(&mut registry);
        }
    }

    /// Everything as text of type [`CONTENT_TYPE`].
    #[must_use]
    pub fn render(&self) -> String {
        let mut text = String::new();
        if let Ok(registry) = self.registry.lock()
            && encode(&mut text, &registry).is_err()
        {
            // A metric that cannot be written must not cost the others their scrape.
            text.push_str("# EOF\n");
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_labels_are_those_that_dashboards_know() {
        let metrics = Metrics::new();
        let service = "identity-output \"x\"\n";
        metrics.iteration(
            service,
            "output-renewal",
            Outcome::Succeeded { retries: 2 },
            Duration::from_millis(120),
        );
        metrics.iteration(
            service,
            "output-renewal",
            Outcome::Failed,
            Duration::from_secs(9),
        );
        let text = metrics.render();
        let labels = r#"service="identity-output \"x\"\n",name="output-renewal""#;
        for line in [
            format!("tbot_task_iterations_total{{{labels}}} 2"),
            format!("tbot_task_iterations_failed{{{labels}}} 1"),
            format!("tbot_task_iterations_successful_bucket{{le=\"1.0\",{labels}}} 0"),
            format!("tbot_task_iterations_successful_bucket{{le=\"2.0\",{labels}}} 1"),
            format!("tbot_task_iterations_successful_bucket{{le=\"5.0\",{labels}}} 1"),
            format!("tbot_task_iterations_successful_count{{{labels}}} 1"),
            format!("tbot_task_iteration_duration_seconds_bucket{{le=\"0.1\",{labels}}} 0"),
            format!("tbot_task_iteration_duration_seconds_bucket{{le=\"+Inf\",{labels}}} 2"),
            format!(
                "teleport_build_info{{version=\"{}\"}} 1",
                env!("CARGO_PKG_VERSION")
            ),
            "# EOF".to_owned(),
        ] {
            assert!(text.lines().any(|l| l == line), "{line} is not in:\n{text}");
        }
        assert_eq!(text.matches("_bucket{").count(), 7 + 7);
    }
}
