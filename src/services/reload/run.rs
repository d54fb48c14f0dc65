//! Runs the hooks of an output after its changes: one run at a time, and one more for whatever
//! changed meanwhile.

use std::path::Path;
use std::sync::Arc;

use tokio::sync::watch;

use super::exec::Program;
use super::{HookError, Plan, unit};
use crate::clock::Clock;
use crate::env::Env;
use crate::services::voice::{Part, Voice};
use crate::telemetry::metrics::{Metrics, Outcome};

/// The task's name in the metrics.
const TASK: &str = "output-reload";
/// What a program gets of the agent's environment. The rest may hold join tokens and cloud
/// credentials.
const PASSED: [&str; 10] = [
    "DBUS_SESSION_BUS_ADDRESS",
    "HOME",
    "LANG",
    "LC_ALL",
    "LOGNAME",
    "PATH",
    "TMPDIR",
    "TZ",
    "USER",
    "XDG_RUNTIME_DIR",
];
/// Where programs are found if the agent's own environment does not say.
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// The hooks of one running output.
#[derive(Debug)]
pub(in crate::services) struct Hooks {
    plan: Plan,
    service: Arc<str>,
    environment: Vec<(String, String)>,
    clock: Clock,
    metrics: Metrics,
}

impl Hooks {
    /// The hooks of the output `service`, which writes into `directory` if it is one.
    pub(in crate::services) fn new(
        plan: Plan,
        service: Arc<str>,
        directory: Option<&Path>,
        clock: Clock,
        metrics: Metrics,
    ) -> Self {
        let environment = environment(&Env::of_process(), &service, directory);
        Self {
            plan,
            service,
            environment,
            clock,
            metrics,
        }
    }

    /// Runs every hook, whatever becomes of the others.
    ///
    /// # Errors
    /// What failed, as one line.
    pub(in crate::services) async fn run(&self) -> Result<(), String> {
        let began = self.clock.now();
        let mut problems: Vec<String> = Vec::new();
        let mut note = |outcome: Result<(), HookError>| {
            problems.extend(outcome.err().map(|error| error.to_string()));
        };
        if !self.plan.exec.is_empty() {
            let program = Program {
                command: self.plan.exec.clone(),
                environment: self.environment.clone(),
            };
            note(program.run(self.plan.timeout).await);
        }
        if let Some(signal) = self.plan.signal.clone() {
            let sent = tokio::task::spawn_blocking(move || signal.send());
            let sent = async { sent.await.unwrap_or(Ok(())) };
            note(self.in_time("signal", sent).await);
        }
        if let Some(name) = &self.plan.systemd {
            note(self.in_time("systemd", Box::pin(unit::reload(name))).await);
        }
        let took = self.clock.now().duration_since(began).unwrap_or_default();
        let outcome = if problems.is_empty() {
            Outcome::Succeeded { retries: 0 }
        } else {
            Outcome::Failed
        };
        self.metrics.iteration(&self.service, TASK, outcome, took);
        if problems.is_empty() {
            tracing::info!(service = %self.service, "Told the users of the output to reload");
            Ok(())
        } else {
            Err(format!("reload: {}", problems.join("; ")))
        }
    }

    async fn in_time(
        &self,
        hook: &'static str,
        work: impl Future<Output = Result<(), HookError>>,
    ) -> Result<(), HookError> {
        let after = self.plan.timeout;
        tokio::time::timeout(after, work)
            .await
            .unwrap_or(Err(HookError::TooSlow { hook, after }))
    }
}

/// Runs the hooks after each change of `changes` until its sender is gone, and says what became of
/// it.
pub(in crate::services) async fn follow(
    hooks: &Hooks,
    mut changes: watch::Receiver<u64>,
    voice: &Voice,
) {
    after_changes(&mut changes, move || async move {
        let outcome = hooks.run().await;
        if let Err(error) = &outcome {
            tracing::warn!(
                service = %hooks.service,
                error,
                "What was written stays, but its users were not all told to reload"
            );
        }
        voice.tell(Part::Hooks, outcome.err());
    })
    .await;
}

async fn after_changes<R: Future<Output = ()>>(
    changes: &mut watch::Receiver<u64>,
    mut run: impl FnMut() -> R,
) {
    while changes.changed().await.is_ok() {
        run().await;
    }
}

fn environment(env: &Env, service: &str, directory: Option<&Path>) -> Vec<(String, String)> {
    let mut all: Vec<(String, String)> = PASSED
        .iter()
        .filter_map(|&name| Some((name.to_owned(), env.get(name)?.to_owned())))
        .collect();
    if env.get("PATH").is_none() {
        all.push(("PATH".to_owned(), PATH.to_owned()));
    }
    all.push(("TBOT_OUTPUT".to_owned(), service.to_owned()));
    if let Some(directory) = directory.and_then(Path::to_str) {
        all.push(("TBOT_DESTINATION".to_owned(), directory.to_owned()));
    }
    all
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;
    use std::time::Duration;

    use super::*;

    #[test]
    fn programs_get_no_secrets() {
        let env: Env = [
            ("PATH", "/bin"),
            ("HOME", "/root"),
            ("TELEPORT_BOT_TOKEN", "hunter2"),
            ("AWS_SECRET_ACCESS_KEY", "hunter2"),
            ("TBOT_CONFIG", "hunter2"),
        ]
        .into_iter()
        .collect();
        let given = environment(&env, "web", Some(Path::new("/opt/x")));
        let given: Vec<String> = given
            .into_iter()
            .map(|(name, value)| format!("{name}={value}"))
            .collect();
        assert_eq!(
            given,
            [
                "HOME=/root",
                "PATH=/bin",
                "TBOT_OUTPUT=web",
                "TBOT_DESTINATION=/opt/x"
            ]
        );
        let bare = environment(&Env::default(), "web", None);
        assert_eq!(bare.len(), 2);
        assert_eq!(bare[0], ("PATH".to_owned(), PATH.to_owned()));
    }

    #[tokio::test(start_paused = true)]
    async fn changes_during_a_run_make_one_more() {
        let (changed, mut changes) = watch::channel(0_u64);
        let runs = Cell::new(0);
        let change = async {
            tokio::time::sleep(Duration::from_secs(1)).await;
            changed.send_modify(|count| *count += 1);
            // The first run is under way.
            for _ in 0..5 {
                tokio::time::sleep(Duration::from_secs(1)).await;
                changed.send_modify(|count| *count += 1);
            }
            assert_eq!(runs.get(), 1);
            tokio::time::sleep(Duration::from_secs(60)).await;
            assert_eq!(runs.get(), 2);
            // The last change of all is not lost either.
            changed.send_modify(|count| *count += 1);
            drop(changed);
        };
        let follow = after_changes(&mut changes, || async {
            runs.set(runs.get() + 1);
            tokio::time::sleep(Duration::from_secs(10)).await;
        });
        tokio::join!(change, follow);
        assert_eq!(runs.get(), 3);
    }

    #[tokio::test]
    async fn one_hook_that_fails_does_not_keep_another_from_its_work() {
        let base = tempfile::tempdir().unwrap();
        let mark = base.path().join("mark");
        let plan = Plan {
            exec: vec!["touch".to_owned(), mark.to_str().unwrap().to_owned()],
            signal: Some(super::super::SignalPlan {
                pid_file: base.path().join("none.pid"),
                signal: "HUP",
            }),
            systemd: None,
            timeout: Duration::from_secs(30),
        };
        let metrics = Metrics::new();
        let hooks = |plan| Hooks::new(plan, "web".into(), None, Clock::system(), metrics.clone());
        let error = hooks(plan.clone()).run().await.unwrap_err();
        assert!(error.starts_with("reload: signal: "), "{error}");
        assert!(mark.exists());
        let alone = Plan {
            signal: None,
            ..plan
        };
        hooks(alone).run().await.unwrap();
        let text = metrics.render();
        for (name, count) in [("iterations_total", 2), ("iterations_failed", 1)] {
            let line =
                format!("tbot_task_{name}{{service=\"web\",name=\"output-reload\"}} {count}");
            assert!(text.contains(&line), "{line} in {text}");
        }
    }
}
