//! The owner of every long-running task: starts them, listens to signals, ends them in time.

use std::time::Duration;

use anyhow::{Context as _, anyhow};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use super::notify;

/// How long tasks may take to end once they were told to.
const DRAIN: Duration = Duration::from_secs(10);

/// Tasks by name, ended together.
pub(super) struct Supervisor {
    tasks: JoinSet<(String, anyhow::Result<()>)>,
    shutdown: CancellationToken,
}

impl Supervisor {
    pub(super) fn new(shutdown: CancellationToken) -> Self {
        Self {
            tasks: JoinSet::new(),
            shutdown,
        }
    }

    /// Starts a task that is to run until shutdown.
    pub(super) fn start(
        &mut self,
        name: &str,
        task: impl Future<Output = anyhow::Result<()>> + Send + 'static,
    ) {
        let name = name.to_owned();
        self.tasks.spawn(async move { (name, task.await) });
    }

    /// Runs until SIGTERM or SIGINT, or until a task ends by itself. SIGHUP and SIGUSR1 renew
    /// everything now.
    pub(super) async fn run(mut self, reload: watch::Sender<u64>) -> anyhow::Result<()> {
        let mut signals = Signals::listen()?;
        let result = loop {
            tokio::select! {
                biased;
                () = self.shutdown.cancelled() => break Ok(()),
                ended = self.tasks.join_next() => break why(ended),
                asked = signals.next() => match asked {
                    Asked::Stop(name) => {
                        tracing::info!(signal = name, "Stopping");
                        break Ok(());
                    }
                    Asked::Reload(name) => {
                        tracing::info!(signal = name, "Renewing everything now");
                        notify::reloading();
                        reload.send_modify(|count| *count += 1);
                        notify::ready();
                    }
                },
            }
        };
        notify::stopping();
        self.shutdown.cancel();
        let drained = timeout(DRAIN, async {
            while self.tasks.join_next().await.is_some() {}
        })
        .await;
        if drained.is_err() {
            tracing::warn!("Some tasks did not end within 10 s and are cut off");
        }
        result
    }
}

/// Why the program ends when a task ended before it was told to.
fn why(
    ended: Option<Result<(String, anyhow::Result<()>), tokio::task::JoinError>>,
) -> anyhow::Result<()> {
    match ended {
        Some(Ok((_, Err(error)))) => Err(error),
        Some(Ok((name, Ok(())))) => Err(anyhow!("{name} ended by itself")),
        Some(Err(panic)) => Err(anyhow!("a task panicked: {panic}")),
        None => Ok(()),
    }
}

enum Asked {
    Stop(&'static str),
    Reload(&'static str),
}

struct Signals {
    terminate: Signal,
    interrupt: Signal,
    hangup: Signal,
    user1: Signal,
}

impl Signals {
    fn listen() -> anyhow::Result<Self> {
        let listen = |kind| signal(kind).context("cannot listen to signals");
        Ok(Self {
            terminate: listen(SignalKind::terminate())?,
            interrupt: listen(SignalKind::interrupt())?,
            hangup: listen(SignalKind::hangup())?,
            user1: listen(SignalKind::user_defined1())?,
        })
    }

    async fn next(&mut self) -> Asked {
        tokio::select! {
            _ = self.terminate.recv() => Asked::Stop("SIGTERM"),
            _ = self.interrupt.recv() => Asked::Stop("SIGINT"),
            _ = self.hangup.recv() => Asked::Reload("SIGHUP"),
            _ = self.user1.recv() => Asked::Reload("SIGUSR1"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_task_that_ends_by_itself_ends_the_program() {
        let mut tasks = Supervisor::new(CancellationToken::new());
        let shutdown = tasks.shutdown.clone();
        tasks.start("patient", async move {
            shutdown.cancelled().await;
            Ok(())
        });
        tasks.start("broken", async { Err(anyhow!("the socket is gone")) });
        let (reload, _receiver) = watch::channel(0);
        let error = tasks.run(reload).await.unwrap_err();
        assert_eq!(error.to_string(), "the socket is gone");
    }
}
