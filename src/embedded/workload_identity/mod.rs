//! Workload identity: who may have which SVID, and the making of it.
//!
//! - [`attrs`]: what is known of a workload, its agent's user and its join.
//! - [`expression`]: the language of rules and templates.
//! - [`template`]: texts with expressions inside.
//! - [`rules`]: conditions and expressions that let a workload through.
//! - [`decision`]: a resource and attributes to the contents of an SVID, or a refusal.
//! - [`resource`]: the `workload_identity` resource: read, checked, stored.
//! - [`issue`]: the making of X.509- and JWT-SVIDs.
//! - `issuer_override`: SVIDs as part of another hierarchy.
//! - [`bundle`]: the trust bundle and the JWT keys, for the web side.

pub mod attrs;
pub mod bundle;
pub mod decision;
pub mod expression;
pub mod issue;
pub(in crate::embedded) mod issuer_override;
mod override_service;
pub mod resource;
mod resource_service;
mod revocation;
mod revocation_service;
pub mod rules;
mod service;
pub mod template;

#[cfg(test)]
pub(in crate::embedded) use service::tests::{caller_with, state as a_cluster, with};

use std::sync::Arc;

use tonic::service::Routes;

use super::ClusterState;
use super::auth::checked;
use crate::pb::teleport::workloadidentity::v1 as wire;
use wire::workload_identity_issuance_service_server::WorkloadIdentityIssuanceServiceServer;
use wire::workload_identity_resource_service_server::WorkloadIdentityResourceServiceServer;
use wire::workload_identity_revocation_service_server::WorkloadIdentityRevocationServiceServer;
use wire::x509_overrides_service_server::X509OverridesServiceServer;

/// The largest request for SVIDs: attributes of a workload, of which signatures of its image are
/// the largest part.
const MAX_ISSUANCE: usize = 1024 * 1024;
/// The largest workload identity, revocation or set of overrides.
const MAX_RESOURCE: usize = 256 * 1024;

/// Adds the services of workload identity to those behind mutual TLS.
///
/// Starts a task that keeps the revocation list signed; it ends with the routes.
pub fn add_services(routes: Routes, state: &Arc<ClusterState>) -> Routes {
    let issuance = WorkloadIdentityIssuanceServiceServer::new(service::Issuance {
        state: Arc::clone(state),
    });
    let resources = WorkloadIdentityResourceServiceServer::new(resource_service::Resources {
        state: Arc::clone(state),
    });
    let revocation = revocation::Revocation::start(state);
    let revocation = WorkloadIdentityRevocationServiceServer::new(revocation);
    let overrides = X509OverridesServiceServer::new(override_service::Overrides {
        state: Arc::clone(state),
    });
    routes
        .add_service(checked(issuance.max_decoding_message_size(MAX_ISSUANCE)))
        .add_service(checked(overrides.max_decoding_message_size(MAX_RESOURCE)))
        .add_service(checked(resources.max_decoding_message_size(MAX_RESOURCE)))
        .add_service(checked(revocation.max_decoding_message_size(MAX_RESOURCE)))
}
