//! The embedded cluster: one node that speaks a Teleport cluster's own wire protocol.
//!
//! It shares no agent logic, only the crypto primitives, the generated messages and the verifying
//! halves of the join methods, so that a shared mistake cannot hide.
//!
//! - [`Cluster`]: a data directory opened and its sockets bound; [`ClusterState`]: what its
//!   services share.
//! - [`store`]: resources in SQLite, with revisions, expiry and transactions.
//! - [`resources`]: resource files, checked and applied as `tctl create` does.
//! - [`discovery`]: EKS clusters that become resources.
//! - `federation`: the trust bundles of other trust domains.
//! - `desk`: resources read and written over gRPC, by whom a role lets.
//! - [`workload_identity`]: who may have which SVID, and the making of it.
//! - [`audit`]: one JSON line for each join, certificate, refusal and administrative change.
//! - [`auth`]: joins, certificates, authorities and what else agents call.
//! - [`ca`]: the authorities, and the making of certificates.
//! - [`caller`]: who calls, by certificate and listener.
//! - `transport`: SSH to nodes, for whoever has a role that sees them.
//! - [`admin`]: commands over a unix socket in the data directory.
//! - [`instant`]: points in time as resources and audit lines write them.

mod access;
pub mod admin;
pub mod audit;
pub mod auth;
pub mod ca;
pub mod caller;
mod cluster;
mod desk;
pub mod discovery;
mod federation;
mod files;
pub mod instant;
mod listener;
mod pattern;
pub mod resources;
pub mod store;
mod tls;
mod transport;
mod tunnel;
mod upgrade;
mod web;
pub mod workload_identity;

use std::time::Duration;

pub use cluster::{AuthPort, Cluster, ClusterError, Config};
pub use tls::TlsError;

use crate::clock::Clock;
use crate::env::Env;
use audit::Audit;
use ca::{Authorities, Authority, AuthorityType, RotationError, Step};
use serde_json::json;
use store::Store;

/// The version this cluster claims to have: the one whose protocol it speaks.
pub const SERVER_VERSION: &str = "18.0.0";
/// The oldest client version it accepts, by Teleport's rule: the major before, pre-releases too.
pub const MIN_CLIENT_VERSION: &str = "17.0.0-aa";
/// How often expired resources are removed. They do not count from the moment they expire; this
/// only frees the space and tells listeners.
const SWEEP: Duration = Duration::from_secs(60);

/// What the services of one cluster share.
#[derive(Debug)]
pub struct ClusterState {
    /// The cluster's name, which is also its trust domain.
    pub name: String,
    /// The first public address, `host:port`.
    pub public_addr: String,
    /// The program's clock.
    pub clock: Clock,
    /// All resources.
    pub store: Store,
    /// The audit log.
    pub audit: Audit,
    /// The authorities.
    pub authorities: Authorities,
    /// Where the join method `iam` asks instead of AWS, for tests and private endpoints.
    pub sts_endpoint: Option<String>,
    /// The environment of the process.
    pub env: Env,
}

impl ClusterState {
    /// Takes a step of the rotation of an authority. `by` is for the audit log.
    ///
    /// # Errors
    /// [`RotationError`]; nothing has changed then.
    pub fn rotate(
        &self,
        kind: AuthorityType,
        step: Step,
        by: &str,
    ) -> Result<Authority, RotationError> {
        let now = self.clock.now();
        let authority = self.authorities.rotate(&self.store, kind, step, now)?;
        // A Teleport cluster has no event for this; name and code are our own.
        self.audit.emit(json!({
            "event": "cert_authority.rotate",
            "code": "TCA00I",
            "type": kind.name(),
            "phase": authority.phase().name(),
            "mode": step.mode.name(),
            "user": by,
        }));
        Ok(authority)
    }

    /// Creates the resources of files, given as name and text, as `tctl create` would: all of them
    /// or none. `by` is for the audit log.
    ///
    /// The error's text is made for people: places in the files, causes and remedies.
    pub fn create(
        &self,
        files: &[(String, String)],
        mode: resources::Mode,
        by: &str,
    ) -> Result<Vec<resources::Applied>, resources::CreateError> {
        let now = self.clock.now();
        // A file that is read at every start gets old; whoever creates something just now would
        // be surprised.
        let judged = (mode != resources::Mode::Ensure).then_some(now);
        let parsed = resources::parse_files(files, judged)?;
        Ok(resources::apply(
            &self.store,
            &self.audit,
            parsed,
            mode,
            by,
            now,
        )?)
    }
}
