//! What the agent does with its identity: one folder per kind, in two shapes.
//!
//! An [`Output`] asks for what it shows and renders it as files; writing, retries, health and metrics
//! are the runner's (`output.rs`). A [`Server`] runs until it is told to stop.

pub mod application;
mod artifacts;
mod authorities;
pub mod database;
mod flags;
pub mod identity;
mod impersonated;
pub mod kubernetes;
pub mod kubernetes_argo_cd;
pub mod kubernetes_v2;
mod lookup;
pub mod output;
mod program;
pub mod reload;
pub mod sockets;
pub mod spiffe_svid;
pub mod ssh_host;
mod svid;
#[cfg(test)]
mod testing;
mod trust;
mod voice;
pub mod workload_identity_api;
pub mod workload_identity_aws_roles_anywhere;
pub mod workload_identity_jwt;
pub mod workload_identity_x509;

use std::fmt;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

pub use sockets::Sockets;
pub use trust::Trust;

use async_trait::async_trait;
use tokio_util::sync::CancellationToken;

use crate::clock::Clock;
use crate::destination::{Destination, DestinationPlan, FileSet};
use crate::health::Reporter;
use crate::identity::Handle;
use crate::telemetry::metrics::Metrics;
use crate::workload::Shelf;
use crate::yaml::{Fields, Tree};

/// The kinds of service, by their YAML `type`.
pub const KINDS: &[&dyn ServiceKind] = &[
    &application::Kind,
    &database::Kind,
    &identity::Kind,
    &kubernetes::Kind,
    &kubernetes_argo_cd::Kind,
    &kubernetes_v2::Kind,
    &spiffe_svid::Kind,
    &ssh_host::Kind,
    &workload_identity_api::Kind,
    &workload_identity_aws_roles_anywhere::Kind,
    &workload_identity_jwt::Kind,
    &workload_identity_x509::Kind,
];

/// Kinds that upstream has, so that one missing here is refused by its name.
pub const UPSTREAM: &[&str] = &[
    "identity",
    "identity/key-agent",
    "application",
    "application-proxy",
    "application-tunnel",
    "beams/vnet",
    "database",
    "database-tunnel",
    "example",
    "kubernetes",
    "kubernetes/v2",
    "kubernetes/argo-cd",
    "spiffe-svid",
    "spiffe-workload-api",
    "ssh-multiplexer",
    "ssh_host",
    "workload-identity-api",
    "workload-identity-aws-roles-anywhere",
    "workload-identity-jwt",
    "workload-identity-x509",
];

/// How long credentials live and how often they are renewed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Lifetime {
    /// Requested life of a credential.
    pub ttl: Duration,
    /// Time between renewals.
    pub interval: Duration,
}

impl Default for Lifetime {
    /// One hour, renewed every 20 minutes.
    fn default() -> Self {
        Self {
            ttl: Duration::from_hours(1),
            interval: Duration::from_mins(20),
        }
    }
}

/// A command line flag of `start <kind>` and `configure <kind>`: data, from which the commands are
/// made.
#[derive(Debug, Clone, Copy)]
pub struct Flag {
    /// Long name without dashes.
    pub name: &'static str,
    /// Dotted path below the service's mapping, for example `selector.name`.
    pub yaml: &'static str,
    /// How the value is read.
    pub value: FlagValue,
    /// Whether the command refuses to run without it.
    pub required: bool,
    /// One line for `--help`.
    pub help: &'static str,
}

/// How a flag's value becomes YAML.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FlagValue {
    /// One text.
    Text,
    /// `--flag` / `--no-flag`.
    Bool,
    /// Repeatable; a list of texts.
    List,
    /// A destination URI, written as a destination section.
    Destination,
    /// `k=v,k2=v2`: a map to one-element lists.
    Labels,
    /// Repeatable; each one more item `name: TEXT` of a list.
    NameSelectors,
    /// Repeatable `k=v,k2=v2`; each one more item `labels: {…}` of a list, after the names.
    LabelSelectors,
}

/// One kind of service.
pub trait ServiceKind: Sync + fmt::Debug {
    /// The YAML `type`.
    fn name(&self) -> &'static str;
    /// Other names of its subcommand.
    fn aliases(&self) -> &'static [&'static str] {
        &[]
    }
    /// Flags of its subcommand.
    fn flags(&self) -> &'static [Flag];
    /// Reads the kind's own keys (not `type`, `name`, `credential_ttl`, `renewal_interval`);
    /// problems go to `fields`, and `None` comes back then.
    fn parse(&self, fields: &mut Fields<'_>) -> Option<Box<dyn ServicePlan>>;
    /// Whether a life above the usual maximum (168 h) is accepted.
    fn skips_maximum_ttl(&self) -> bool {
        false
    }
    /// Whether `credential_ttl` and `renewal_interval` mean something in its section.
    fn has_lifetime(&self) -> bool {
        true
    }
}

/// A configured service that has not touched anything yet.
pub trait ServicePlan: Send + Sync + fmt::Debug {
    /// What logs and metrics call a service without a name, as upstream does
    /// (`identity-output (directory: /opt/x)`).
    fn label(&self) -> String;
    /// Where it writes, for services that write.
    fn destination(&self) -> Option<&Arc<dyn DestinationPlan>>;
    /// The files that it writes, as far as their names are known beforehand: `name` or
    /// `folder/name`. `tbot init` makes them, and refuses a service that names none.
    fn files(&self) -> Vec<String> {
        Vec::new()
    }
    /// The section as written in a configuration file, defaults included, without `type`.
    fn emit(&self) -> Vec<(String, Tree)>;
    /// The running form.
    fn build(&self) -> Service;
}

/// A service's running form.
#[derive(Debug)]
pub enum Service {
    /// Renews files on a timer; runs once with `--oneshot`.
    Output(Box<dyn Output>),
    /// Runs until told to stop; skipped with `--oneshot`.
    Server(Box<dyn Server>),
}

/// A service that turns what the cluster issues into files.
#[async_trait]
pub trait Output: Send + Sync + fmt::Debug {
    /// Where the files go.
    fn destination(&self) -> Arc<dyn Destination>;
    /// Asks the cluster for everything that the files need, and renders them. Writes nothing.
    async fn make(&self, context: &Context) -> anyhow::Result<Made>;
    /// Puts what was made into the destination; for kinds whose files hold more than what is theirs,
    /// the moment to look at the rest.
    async fn write(&self, files: FileSet) -> anyhow::Result<()> {
        Ok(self.destination().write(files).await?)
    }
    /// Waits until what was made last is out of date for another reason than its age (a trust
    /// bundle changed); the output is made again soon then. Dropped and called anew at will, so that
    /// what it has seen belongs into `self`. Returns once for each change, whatever becomes of it.
    async fn changed(&self, _context: &Context) {
        std::future::pending::<()>().await;
    }
    /// Time between renewals, for kinds with a key of their own for it.
    fn interval(&self, lifetime: Lifetime) -> Duration {
        lifetime.interval
    }
}

/// A complete set of files, ready to be written.
#[derive(Debug)]
pub struct Made {
    /// The files.
    pub files: FileSet,
    /// When the credential among them is over. The same moment again means the same credential: a
    /// set that was made of it once more does not put off its renewal.
    pub not_after: SystemTime,
}

/// A service that listens.
#[async_trait]
pub trait Server: Send + Sync + fmt::Debug {
    /// Binds what it listens on. Called before the first network exchange, so that a socket in use
    /// fails early.
    async fn bind(&mut self, context: &Context) -> anyhow::Result<()>;
    /// Serves until `context.shutdown`.
    async fn run(self: Box<Self>, context: Context) -> anyhow::Result<()>;
}

/// What a running service may use: handles only.
#[derive(Debug, Clone)]
pub struct Context {
    /// Time.
    pub clock: Clock,
    /// The bot's own identity, identities derived from it, and clients bound to them.
    pub identity: Handle,
    /// Listening sockets that were passed to this process, or that outlive it.
    pub sockets: Sockets,
    /// Trust bundles and revocations, followed once for all services.
    pub trust: Trust,
    /// What was issued to workloads, across a restart.
    pub shelf: Shelf,
    /// The service's lifetime.
    pub lifetime: Lifetime,
    /// The service's name in logs, metrics and health.
    pub name: Arc<str>,
    /// Where it reports its health.
    pub health: Reporter,
    /// Counters of renewals.
    pub metrics: Metrics,
    /// Ends the service.
    pub shutdown: CancellationToken,
}
