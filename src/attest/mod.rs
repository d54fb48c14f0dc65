//! Who is asking: the peer pinned at accept, and the attestors that describe it.
//!
//! [`Peer`] is the pinned process, [`Peers`] pins each once, [`Plan`] the configured attestors, [`Attestors`] runs
//! them: `unix` first and in any case, the others each for itself and at the same time. [`Attested`] is what they found.

mod attested;
mod container;
pub mod docker;
pub mod kubernetes;
mod limits;
mod peer;
mod peers;
mod plan;
pub mod podman;
mod program;
mod runner;
pub mod sigstore;
pub mod systemd;
pub mod unix;

use std::fmt;
use std::sync::Arc;

use async_trait::async_trait;

pub use attested::{Attested, Process};
pub use limits::{Limit, Owner, Permit};
pub use peer::{Credentials, Peer, PeerError};
pub use peers::Peers;
pub use plan::Plan;
pub use program::tell_what_is_hidden;
pub use runner::{Attestors, Gone};

use crate::pb::teleport::workloadidentity::v1::WorkloadAttrs;
use crate::yaml::{Fields, Tree};

/// The attestors, in the order in which what they find is told. `unix` always runs first, those that
/// [read others](Attestor::reads_others) last.
pub const ATTESTORS: &[&dyn AttestorKind] = &[
    &unix::Kind,
    &kubernetes::Kind,
    &podman::Kind,
    &docker::Kind,
    &systemd::Kind,
    &sigstore::Kind,
];

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

impl AttestError {
    /// What an attestor has to say of a peer that it could not describe.
    fn of<E: fmt::Display>(attestor: &'static str, peer: &Peer) -> impl FnOnce(E) -> Self {
        let pid = peer.pid();
        move |problem| Self {
            attestor,
            pid,
            problem: problem.to_string(),
        }
    }
}

/// Describes a pinned peer.
#[async_trait]
pub trait Attestor: Send + Sync + fmt::Debug {
    /// The YAML key of its kind.
    fn name(&self) -> &'static str;
    /// Adds what it finds to `attributes`. The caller makes sure afterwards that the peer still
    /// lives, so that what was found by its process ID was about it.
    async fn attest(&self, peer: &Peer, attributes: &mut WorkloadAttrs) -> Result<(), AttestError>;
    /// Whether it goes by what other attestors find: it runs after them then. The others run at the
    /// same time, and see of each other nothing.
    fn reads_others(&self) -> bool {
        false
    }
    /// Hears that nothing was issued to a process with these attributes: what was remembered of them
    /// may be out of date.
    fn nothing_issued(&self, attributes: &WorkloadAttrs) {
        let _ = attributes;
    }
    /// The kind's section with the configured values.
    fn emit(&self) -> Tree;
}
