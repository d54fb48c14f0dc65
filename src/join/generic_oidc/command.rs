//! Runs the program that prints an ID token.

use std::io::{self, Read as _};
use std::os::unix::process::CommandExt as _;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process_group};

use crate::secret::Secret;

/// The longest output that is read, in bytes. Tokens have some 2 KiB.
const MAX_OUTPUT: u64 = 128 * 1024;

/// How often a program that has printed its token is looked at until it ends.
const MOMENT: Duration = Duration::from_millis(10);

/// Why a program gave no token. What it printed is never repeated: it may hold one.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub(super) enum CommandError {
    /// It is not there, or may not be run.
    #[error("cannot run {program}: {source}")]
    Start {
        /// The program.
        program: String,
        /// The system's reason.
        #[source]
        source: io::Error,
    },
    /// It ended with something else than 0.
    #[error("{program} ended with {status}; what it said stands before this line")]
    Failed {
        /// The program.
        program: String,
        /// How it ended.
        status: ExitStatus,
    },
    /// It was killed.
    #[error("{program} did not end within {} s (onboarding.generic_oidc.timeout)", .after.as_secs())]
    TooSlow {
        /// The program.
        program: String,
        /// The limit.
        after: Duration,
    },
    /// What it printed is too long, empty, or no text.
    #[error("{0} has to print an ID token and nothing else to standard output")]
    Output(String),
}

/// The trimmed standard output of `command`, run in `home` with the agent's environment and standard
/// error. After `timeout` it is killed with everything that it started.
pub(super) async fn run(
    command: &[String],
    home: &str,
    timeout: Duration,
) -> Result<Secret<String>, CommandError> {
    let program = command.first().cloned().unwrap_or_default();
    let (words, home) = (command.to_vec(), home.to_owned());
    let ran = tokio::task::spawn_blocking(move || blocking(&words, &home, timeout)).await;
    ran.unwrap_or_else(|source| {
        Err(CommandError::Start {
            program,
            source: source.into(),
        })
    })
}

fn blocking(
    command: &[String],
    home: &str,
    timeout: Duration,
) -> Result<Secret<String>, CommandError> {
    let program = command.first().cloned().unwrap_or_default();
    let failed = |source| CommandError::Start {
        program: program.clone(),
        source,
    };
    let mut child = Command::new(&program)
        .args(command.iter().skip(1))
        .current_dir(home)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .process_group(0)
        .spawn()
        .map_err(failed)?;
    let began = Instant::now();
    let (sender, printed) = mpsc::channel();
    if let Some(stdout) = child.stdout.take() {
        std::thread::spawn(move || {
            let mut bytes = Vec::new();
            let read = stdout.take(MAX_OUTPUT + 1).read_to_end(&mut bytes);
            // Nobody waits any more if it took too long.
            drop(sender.send(read.map(|_| bytes)));
        });
    }
    let Ok(printed) = printed.recv_timeout(timeout) else {
        put_down(&mut child);
        let after = timeout;
        return Err(CommandError::TooSlow { program, after });
    };
    let printed = printed.map_err(failed)?;
    if printed.len() as u64 > MAX_OUTPUT {
        put_down(&mut child);
        return Err(CommandError::Output(program));
    }
    // Its output has ended, so it is about to.
    let status = loop {
        match child.try_wait().map_err(failed)? {
            Some(status) => break status,
            None if began.elapsed() < timeout => std::thread::sleep(MOMENT),
            None => {
                put_down(&mut child);
                let after = timeout;
                return Err(CommandError::TooSlow { program, after });
            }
        }
    };
    if !status.success() {
        return Err(CommandError::Failed { program, status });
    }
    let token = String::from_utf8(printed).ok();
    let token = token.map(|token| Secret::new(token.trim().to_owned()));
    token
        .filter(|token| !token.expose().is_empty())
        .ok_or(CommandError::Output(program))
}

/// Kills it with everything that it started and that did not leave its group.
fn put_down(child: &mut Child) {
    if let Err(error) = kill_process_group(Pid::from_child(child), Signal::KILL) {
        tracing::debug!(%error, "A program that prints a token could not be killed");
    }
    drop(child.wait());
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn told(command: &[&str], timeout: Duration) -> String {
        let command: Vec<String> = command.iter().map(|&word| word.to_owned()).collect();
        match run(&command, "/", timeout).await {
            Ok(token) => token.expose().clone(),
            Err(error) => error.to_string(),
        }
    }

    const LONG: Duration = Duration::from_secs(60);

    #[tokio::test]
    async fn what_it_prints_is_the_token_or_is_not_repeated() {
        assert_eq!(told(&["sh", "-c", "pwd; printf ' '"], LONG).await, "/");
        for (script, complaint) in [
            ("echo secret; exit 3", "sh ended with exit status: 3"),
            ("true", "has to print an ID token"),
            ("printf '\\377secret'", "has to print an ID token"),
            ("yes secret | head -c 200000", "has to print an ID token"),
        ] {
            let text = told(&["sh", "-c", script], LONG).await;
            assert!(text.contains(complaint), "{script}: {text}");
            assert!(!text.contains("secret"), "{script}: {text}");
        }
        let text = told(&["/nowhere/program"], LONG).await;
        assert!(text.starts_with("cannot run /nowhere/program: "), "{text}");
    }

    #[tokio::test]
    async fn one_that_hangs_is_killed() {
        let began = tokio::time::Instant::now();
        let text = told(&["sh", "-c", "sleep 600 & wait"], Duration::from_secs(1)).await;
        assert!(text.contains("did not end within 1 s"), "{text}");
        assert!(began.elapsed() < Duration::from_secs(30));
    }
}
