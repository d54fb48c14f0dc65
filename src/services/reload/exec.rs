//! Hook `exec`: runs a program, without a shell and without the agent's environment.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt as _;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

use rustix::process::{Pid, PidfdFlags, Signal, kill_process_group, pidfd_open};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use super::HookError;

/// A program with its arguments and all of its environment.
#[derive(Debug, Clone)]
pub(super) struct Program {
    pub(super) command: Vec<String>,
    pub(super) environment: Vec<(String, String)>,
}

/// A running program. Killed with everything it started unless it was seen to end.
struct Running {
    child: Child,
    ended: bool,
}

impl Drop for Running {
    fn drop(&mut self) {
        if !self.ended {
            self.kill();
            // Mostly too early; whoever inherits the child waits for it then.
            drop(self.child.try_wait());
        }
    }
}

impl Program {
    /// Runs it to its end, and kills it with everything it started after `timeout`. What it writes
    /// goes where the agent's log goes.
    pub(super) async fn run(&self, timeout: Duration) -> Result<(), HookError> {
        let name = self.command.first().cloned().unwrap_or_default();
        let program = self.clone();
        let start = tokio::task::spawn_blocking(move || program.start());
        let failed = |source| HookError::Start {
            program: name.clone(),
            source,
        };
        let running = start.await.map_err(|source| failed(source.into()))?;
        let mut running = running.map_err(failed)?;
        match tokio::time::timeout(timeout, running.end()).await {
            Ok(Ok(status)) if status.success() => Ok(()),
            Ok(Ok(status)) => Err(HookError::Failed {
                program: name,
                status,
            }),
            Ok(Err(source)) => Err(failed(source)),
            Err(_elapsed) => {
                // It is dead within a moment, but a process may be slow to die.
                drop(tokio::task::spawn_blocking(move || running.put_down()));
                Err(HookError::TooSlow {
                    hook: "exec",
                    after: timeout,
                })
            }
        }
    }

    fn start(&self) -> io::Result<Running> {
        let (program, arguments) = self
            .command
            .split_first()
            .ok_or(io::ErrorKind::InvalidInput)?;
        let child = Command::new(program)
            .args(arguments)
            .env_clear()
            .envs(self.environment.iter().cloned())
            .stdin(Stdio::null())
            .process_group(0)
            .spawn()?;
        Ok(Running {
            child,
            ended: false,
        })
    }
}

impl Running {
    /// Kills it with everything that it started and that did not leave its group.
    fn kill(&self) {
        // The group is named after the child, which nobody has waited for: it is no other group.
        if let Err(error) = kill_process_group(Pid::from_child(&self.child), Signal::KILL) {
            tracing::debug!(%error, "A program of a hook could not be killed");
        }
    }

    /// Kills it and waits until it is dead.
    fn put_down(mut self) {
        self.kill();
        self.ended = self.child.wait().is_ok();
    }

    #[expect(
        deprecated,
        reason = "the replacement is unsafe only for types whose descriptor may change; an OwnedFd \
                  keeps one open for its whole life, and this crate has no unsafe code"
    )]
    async fn end(&mut self) -> io::Result<ExitStatus> {
        let pidfd: OwnedFd = pidfd_open(Pid::from_child(&self.child), PidfdFlags::empty())?;
        let pidfd = AsyncFd::with_interest(pidfd, Interest::READABLE)?;
        loop {
            let mut readable = pidfd.readable().await?;
            if let Some(status) = self.child.try_wait()? {
                self.ended = true;
                return Ok(status);
            }
            readable.clear_ready();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    fn program(command: &[&str]) -> Program {
        Program {
            command: command.iter().map(|&word| word.to_owned()).collect(),
            environment: vec![
                ("PATH".to_owned(), "/usr/bin:/bin".to_owned()),
                ("TBOT_OUTPUT".to_owned(), "x".to_owned()),
            ],
        }
    }

    async fn told(command: &[&str], timeout: Duration) -> String {
        let ended = program(command).run(timeout).await;
        ended.map_or_else(|error| error.to_string(), |()| "done".to_owned())
    }

    const LONG: Duration = Duration::from_secs(60);

    #[tokio::test]
    async fn how_it_ends_is_told() {
        assert_eq!(told(&["true"], LONG).await, "done");
        assert_eq!(
            told(&["false"], LONG).await,
            "exec: false ended with exit status: 1"
        );
        let text = told(&["sh", "-c", "kill -9 $$"], LONG).await;
        assert!(text.starts_with("exec: sh ended with signal: 9"), "{text}");
        for missing in ["/nowhere/x", "no-such-program"] {
            let text = told(&[missing], LONG).await;
            assert!(
                text.starts_with(&format!("exec: cannot start {missing}: ")),
                "{text}"
            );
        }
    }

    #[tokio::test]
    async fn arguments_are_no_shells_and_the_environment_is_what_is_given() {
        let base = tempfile::tempdir().unwrap();
        let out = base.path().join("out");
        let script = "printf '%s\\n' \"$1\" > \"$0\"; env >> \"$0\"";
        let words = ["sh", "-c", script, out.to_str().unwrap(), "$(id); *"];
        assert_eq!(told(&words, LONG).await, "done");
        let text = std::fs::read_to_string(out).unwrap();
        assert!(text.starts_with("$(id); *\n"), "{text}");
        let mut names: Vec<&str> = text
            .lines()
            .skip(1)
            .filter_map(|line| line.split_once('=').map(|(name, _)| name))
            .filter(|name| !["PWD", "OLDPWD", "SHLVL", "_"].contains(name))
            .collect();
        names.sort_unstable();
        assert_eq!(names, ["PATH", "TBOT_OUTPUT"]);
    }

    fn runs(pid: &str) -> bool {
        // A zombie that nobody waited for has no program any more.
        std::fs::read_link(Path::new("/proc").join(pid).join("exe")).is_ok()
    }

    #[tokio::test]
    async fn one_that_hangs_is_killed_with_all_it_started() {
        let base = tempfile::tempdir().unwrap();
        let pids = base.path().join("pids");
        let script = "sleep 600 & echo $$ $! > \"$0\"; wait";
        let began = tokio::time::Instant::now();
        let text = told(
            &["sh", "-c", script, pids.to_str().unwrap()],
            Duration::from_secs(2),
        )
        .await;
        assert_eq!(text, "exec: not done within 2 s");
        assert!(began.elapsed() < Duration::from_secs(30));
        let pids = std::fs::read_to_string(pids).unwrap();
        let pids: Vec<&str> = pids.split_whitespace().collect();
        assert_eq!(pids.len(), 2);
        let gone = async {
            while pids.iter().any(|pid| runs(pid)) {
                tokio::task::yield_now().await;
            }
        };
        tokio::time::timeout(LONG, gone).await.unwrap();
    }

    #[tokio::test]
    async fn what_it_leaves_in_the_background_does_not_hold_it_up() {
        let began = tokio::time::Instant::now();
        assert_eq!(told(&["sh", "-c", "sleep 30 & exit 0"], LONG).await, "done");
        assert!(began.elapsed() < Duration::from_secs(25));
    }
}
