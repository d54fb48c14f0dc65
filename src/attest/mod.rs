//! Who is asking: the peer pinned at accept, and the attestors that describe it.

use std::fmt;
use std::sync::Arc;

use async_trait::async_trait;

use crate::pb::teleport::workloadidentity::v1::WorkloadAttrs;
use crate::yaml::{Fields, Tree};

/// The attestors, in the order in which they run. `unix` always runs first.
pub const ATTESTORS: &[&dyn AttestorKind] = &[];

/// One kind of attestor: a key below `attestors` in a service's configuration.
pub trait AttestorKind: Sync + fmt::Debug {
    /// The YAML key.
    fn name(&self) -> &'static str;
    /// Reads the kind's section (`None` if the section is absent); `None` comes back if the
    /// attestor is not enabled or has problems.
    fn parse(&self, section: Option<Fields<'_>>) -> Option<Arc<dyn Attestor>>;
    /// The section as written in a configuration file, defaults included.
    fn emit(&self, configured: Option<&dyn Attestor>) -> Tree;
}

/// Why an attestor could not describe a peer. Except for `unix`, this is a warning and the
/// attributes stay unset.
#[derive(Debug, thiserror::Error)]
#[error("{attestor} attestation of process {pid}: {problem}")]
pub struct AttestError {
    /// The attestor.
    pub attestor: &'static str,
    /// The peer's process ID.
    pub pid: i32,
    /// What went wrong.
    pub problem: String,
}

/// Describes a pinned peer.
#[async_trait]
pub trait Attestor: Send + Sync + fmt::Debug {
    /// The YAML key of its kind.
    fn name(&self) -> &'static str;
    /// Adds what it finds to `attributes`.
    async fn attest(&self, pid: i32, attributes: &mut WorkloadAttrs) -> Result<(), AttestError>;
}
