//! Where identities are written: a trait, and one folder per kind.
//!
//! Every kind passes the same contract test (`contract.rs`).

#[cfg(test)]
mod contract;
mod directory;
mod kubernetes_secret;
mod memory;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::sync::Arc;

use async_trait::async_trait;

pub(crate) use crate::query::unescape;
pub(crate) use kubernetes_secret::{Secrets, label_problem, manifest, namespace_problem};

use crate::secret::Secret;
use crate::yaml::{Fields, Tree};

/// The kinds of destination, by their YAML `type`.
pub const KINDS: &[&dyn DestinationKind] = &[
    &directory::Directory,
    &kubernetes_secret::KubernetesSecret,
    &memory::Memory,
];

/// Reads the section under `key` of `fields`; problems go to `fields`, and `None` comes back then.
/// Its absence is a problem.
pub fn read(fields: &mut Fields<'_>, key: &str) -> Option<Arc<dyn DestinationPlan>> {
    let Some(mut section) = fields.section(key) else {
        if !fields.has(key) {
            fields.error(
                key,
                "no destination is configured",
                Some("write `type: directory` and a `path` below it"),
            );
        }
        return None;
    };
    let name = section.string("type").unwrap_or_default();
    let Some(kind) = KINDS.iter().find(|kind| kind.name() == name) else {
        let here: Vec<&str> = KINDS.iter().map(|kind| kind.name()).collect();
        section.unknown_kind("type", "destination types", &name, &here, &[]);
        return None;
    };
    let plan = kind.parse(&mut section);
    section.finish();
    plan
}

/// Reads a command line form such as `/path`, `file:///path`, `kubernetes-secret:///name` or
/// `memory://`.
///
/// # Errors
/// What is wrong with it, as text for the user.
pub fn from_uri(uri: &str) -> Result<Arc<dyn DestinationPlan>, String> {
    KINDS
        .iter()
        .find_map(|kind| kind.parse_uri(uri))
        .unwrap_or_else(|| {
            Err(format!(
                "{uri:?} is no destination: write a path, `file:///path`, \
                 `kubernetes-secret:///name` or `memory://`"
            ))
        })
}

/// Splits a URI at the end of its scheme; `None` if it has none.
fn scheme(uri: &str) -> Option<(&str, &str)> {
    let (scheme, rest) = uri.split_once(':')?;
    let mut bytes = scheme.bytes();
    let named = bytes.next().is_some_and(|b| b.is_ascii_alphabetic())
        && bytes.all(|b| b.is_ascii_alphanumeric() || b"+-.".contains(&b));
    named.then_some((scheme, rest))
}

/// One kind of destination.
pub trait DestinationKind: Sync + fmt::Debug {
    /// The YAML `type`.
    fn name(&self) -> &'static str;
    /// Reads the kind's own keys; problems go to `fields`, and `None` comes back then.
    fn parse(&self, fields: &mut Fields<'_>) -> Option<Arc<dyn DestinationPlan>>;
    /// Reads a command line form (`/path`, `file:///path`, `memory://` …); `None` if the scheme
    /// is another kind's.
    fn parse_uri(&self, uri: &str) -> Option<Result<Arc<dyn DestinationPlan>, String>>;
}

/// A configured destination that has not touched anything yet.
pub trait DestinationPlan: Send + Sync + fmt::Debug + fmt::Display {
    /// What two services must not share, for example `file:///opt/machine-id`.
    fn key(&self) -> String;
    /// The section as written in a configuration file, defaults included.
    fn emit(&self) -> Tree;
    /// Whether it holds files in a directory below (`cockroach/ca.crt`).
    fn has_folders(&self) -> bool {
        true
    }
    /// The destination itself. Touches nothing before [`Destination::init`].
    fn build(&self) -> Arc<dyn Destination>;
    /// Makes it ready for an agent that another user runs (`tbot init`). Blocks.
    fn prepare(&self, _how: &Preparation) -> Result<(), DestinationError> {
        Err(DestinationError::Unsuitable {
            path: self.to_string(),
            problem: "only a directory can be prepared; this needs no `tbot init`".to_owned(),
        })
    }
}

/// How a destination is made ready for an agent that another user runs. Users and groups are names
/// or numbers.
#[derive(Debug, Clone, Default)]
pub struct Preparation {
    /// What the agent will write: `name` or `folder/name`. What is missing is made, empty.
    pub files: BTreeSet<String>,
    /// Who the agent runs as.
    pub bot_user: Option<String>,
    /// Who reads what it writes.
    pub reader_user: Option<String>,
    /// `user:group` to own everything; the bot's by default.
    pub owner: Option<String>,
    /// Whether everything that no agent writes is removed.
    pub clean: bool,
}

/// A set of files, by name, that a reader sees whole or not at all where the kind allows it.
pub type FileSet = BTreeMap<String, Secret<Vec<u8>>>;

/// Why a destination failed. The text names the path or object and the remedy.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DestinationError {
    /// The operating system refused an operation on a path.
    #[error("{action} {path}: {source}")]
    Io {
        /// What was attempted, for example `create`.
        action: &'static str,
        /// The path.
        path: String,
        /// The cause.
        #[source]
        source: std::io::Error,
    },
    /// The destination is not what the configuration asks for (symlink, owner, mode, type), or the
    /// service that keeps it refuses. The text holds nothing of its content.
    #[error("{path}: {problem}")]
    Unsuitable {
        /// The path or object.
        path: String,
        /// What is wrong and what to do.
        problem: String,
    },
    /// Another process holds the lock.
    #[error("{path} is in use by another process: is another tbot running on the same storage?")]
    Locked {
        /// The lock's path.
        path: String,
    },
}

/// Holds a destination's lock; dropping it releases the lock.
pub trait Lock: Send + Sync {}

/// A place that holds named files.
#[async_trait]
pub trait Destination: Send + Sync + fmt::Debug {
    /// Creates what is missing and checks that writing will work.
    async fn init(&self) -> Result<(), DestinationError>;
    /// Proves that the destination can be written right now, before anything is asked of a cluster.
    async fn check_writable(&self) -> Result<(), DestinationError>;
    /// Replaces the named files as one set; other files stay. A reader sees the old or the new set.
    async fn write(&self, files: FileSet) -> Result<(), DestinationError>;
    /// Reads one file; `None` if it is not there.
    async fn read(&self, name: &str) -> Result<Option<Secret<Vec<u8>>>, DestinationError>;
    /// Takes the lock that keeps a second process off the destination; `None` where there is none.
    /// Comes before [`Destination::init`], which tidies up, and makes what the lock needs itself.
    fn lock(&self) -> Result<Option<Box<dyn Lock>>, DestinationError>;
    /// Whether the content survives the process.
    fn is_persistent(&self) -> bool;
    /// The directory, for texts that name it (`ssh_config`); `None` for other kinds.
    fn directory(&self) -> Option<&std::path::Path>;
}
