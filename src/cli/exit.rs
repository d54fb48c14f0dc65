//! How a command ends: the exit codes, and the one place where errors become text.

use std::io::{IsTerminal as _, Write as _};
use std::process::ExitCode;

use super::args::LogFormat;
use crate::telemetry::one_line;

/// What the shell sees. Upstream ends with 1 for everything; here a mistake of the caller can be
/// told from a failure of the world.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Exit {
    /// The command did what was asked.
    Success = 0,
    /// Something failed while it ran: a cluster, a disk, another process.
    Runtime = 1,
    /// The command line or the configuration is wrong; nothing was done.
    Usage = 2,
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        Self::from(exit as u8)
    }
}

/// Why a command ended early.
#[derive(Debug)]
pub(super) enum Failure {
    /// A wrong command line or configuration: one line for each problem.
    Usage(Vec<String>),
    /// Anything else, with its chain of causes.
    Runtime(anyhow::Error),
}

impl Failure {
    /// One usage problem.
    pub(super) fn usage(line: impl Into<String>) -> Self {
        Self::Usage(vec![line.into()])
    }

    /// The exit code that goes with it.
    pub(super) fn exit(&self) -> Exit {
        match self {
            Self::Usage(_) => Exit::Usage,
            Self::Runtime(_) => Exit::Runtime,
        }
    }

    /// The text for standard error, without the leading `ERROR: `: a line for each usage problem,
    /// one line from the outermost cause to the root for anything else.
    fn text(&self) -> String {
        match self {
            Self::Usage(lines) => lines.join("\n"),
            Self::Runtime(error) => one_line(error),
        }
    }

    /// Writes the error to standard error: as events of the log where that is JSON, else with its
    /// first word red on a terminal.
    pub(super) fn print(&self, log: LogFormat) {
        // Before the log is set up there is nothing to write events to.
        if log == LogFormat::Json && tracing::dispatcher::has_been_set() {
            for line in self.text().lines() {
                tracing::error!("{line}");
            }
            return;
        }
        let mut stderr = std::io::stderr().lock();
        let label = if stderr.is_terminal() {
            "\u{1b}[31mERROR: \u{1b}[0m"
        } else {
            "ERROR: "
        };
        // There is nobody left to tell if standard error is gone.
        let _written = writeln!(stderr, "{label}{}", self.text());
    }
}

impl std::fmt::Display for Failure {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.text())
    }
}

/// A mistake of the caller that is noticed after the command line has been read, among other
/// errors; alone it becomes [`Failure::Usage`].
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(super) struct Mistake(pub(super) String);

impl<E: Into<anyhow::Error>> From<E> for Failure {
    fn from(error: E) -> Self {
        match error.into().downcast::<Mistake>() {
            Ok(Mistake(text)) => Self::usage(text),
            Err(error) => Self::Runtime(error),
        }
    }
}

/// Writes to standard output. A reader that went away (`tbot … | head -1`) is no failure.
pub(super) fn print(text: &str) -> Result<(), Failure> {
    let mut stdout = std::io::stdout().lock();
    match stdout
        .write_all(text.as_bytes())
        .and_then(|()| stdout.flush())
    {
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => Err(error.into()),
        Ok(()) | Err(_) => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use anyhow::Context as _;

    use super::*;

    #[test]
    fn causes_stand_in_one_line() {
        let error = Err::<(), _>(anyhow::anyhow!("connection refused"))
            .context("cannot reach example.com:443")
            .context("joining")
            .unwrap_err();
        let failure = Failure::Runtime(error);
        assert_eq!(
            failure.text(),
            "joining: cannot reach example.com:443: connection refused"
        );
        assert_eq!(failure.exit(), Exit::Runtime);
    }

    #[test]
    fn mistakes_are_told_from_failures() {
        let failure = Failure::from(Mistake("write KIND/NAME".to_owned()));
        assert_eq!(failure.exit(), Exit::Usage);
        assert_eq!(failure.text(), "write KIND/NAME");
        let failure = Failure::from(anyhow::anyhow!("write KIND/NAME"));
        assert_eq!(failure.exit(), Exit::Runtime);
    }

    #[test]
    fn a_cause_already_told_is_not_repeated() {
        let inner = anyhow::anyhow!("no route").context("dial: no route (is it up?)");
        assert_eq!(Failure::Runtime(inner).text(), "dial: no route (is it up?)");
    }
}
