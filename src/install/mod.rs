//! Putting the agent on a machine: the systemd unit and the directories that it needs.
//!
//! [`mod@unit`] is text from facts, [`paths`] finds the facts in a plan, [`apply`] touches the disk.

pub mod apply;
pub mod paths;
pub mod unit;

use std::path::PathBuf;

/// Why an installation failed. Each text says what to do.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum InstallError {
    /// A name that would not survive in a unit file.
    #[error("{what} {value:?}: {rule}")]
    Name {
        /// Which one.
        what: &'static str,
        /// What was given.
        value: String,
        /// What is allowed.
        rule: &'static str,
    },
    /// A unit of that name is there and differs.
    #[error(
        "{path} exists and differs: compare it with the output without --write, then add --force to replace it"
    )]
    Differs {
        /// The unit.
        path: PathBuf,
    },
    /// The operating system refused.
    #[error("cannot {action} {path}: {source}")]
    Io {
        /// What was attempted.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// The cause.
        #[source]
        source: std::io::Error,
    },
}
