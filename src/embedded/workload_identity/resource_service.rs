//! The service through which people and tools read and write workload identities.

use std::sync::Arc;

use async_trait::async_trait;
use serde_json::{Map, json};
use tonic::{Request, Response, Status};

use super::resource::{KIND, ResourceError, from_message, to_message};
use super::service::{admit, who};
use crate::embedded::ClusterState;
use crate::embedded::auth::{Refusal, blocking, caller};
use crate::embedded::caller::{Caller, TlsIdentity};
use crate::embedded::instant::rfc3339;
use crate::embedded::resources::view;
use crate::embedded::store::{Put, Resource, StoreError};
use crate::pb::teleport::workloadidentity::v1 as wire;
use wire::workload_identity_resource_service_server::WorkloadIdentityResourceService;

/// The most resources of one page, and how many come if the request does not say.
const PAGE: usize = 1000;

/// The resource service of one cluster.
#[derive(Debug, Clone)]
pub(super) struct Resources {
    pub(super) state: Arc<ClusterState>,
}

type Answer<T> = Result<Response<T>, Status>;

#[async_trait]
impl WorkloadIdentityResourceService for Resources {
    async fn create_workload_identity(
        &self,
        request: Request<wire::CreateWorkloadIdentityRequest>,
    ) -> Answer<wire::WorkloadIdentity> {
        let (caller, state) = (caller(&request)?, Arc::clone(&self.state));
        let message = request.into_inner().workload_identity;
        blocking(move || write(&state, &caller, &["create"], message, |_| Put::Create))
            .await
            .map(Response::new)
    }

    async fn update_workload_identity(
        &self,
        request: Request<wire::UpdateWorkloadIdentityRequest>,
    ) -> Answer<wire::WorkloadIdentity> {
        let (caller, state) = (caller(&request)?, Arc::clone(&self.state));
        let message = request.into_inner().workload_identity;
        let put = |resource: &Resource| Put::Update {
            revision: resource.revision.clone(),
        };
        blocking(move || write(&state, &caller, &["update"], message, put))
            .await
            .map(Response::new)
    }

    async fn upsert_workload_identity(
        &self,
        request: Request<wire::UpsertWorkloadIdentityRequest>,
    ) -> Answer<wire::WorkloadIdentity> {
        let (caller, state) = (caller(&request)?, Arc::clone(&self.state));
        let message = request.into_inner().workload_identity;
        let verbs = &["create", "update"];
        blocking(move || write(&state, &caller, verbs, message, |_| Put::Upsert))
            .await
            .map(Response::new)
    }

    async fn get_workload_identity(
        &self,
        request: Request<wire::GetWorkloadIdentityRequest>,
    ) -> Answer<wire::WorkloadIdentity> {
        let (caller, state) = (caller(&request)?, Arc::clone(&self.state));
        let name = request.into_inner().name;
        blocking(move || {
            admit(&state, &caller, &["read"])?;
            let found = state.store.get(KIND, &name).map_err(Refusal::from)?;
            let resource = found.ok_or_else(|| missing(&name))?;
            to_message(&resource).map_err(|error| damaged(&resource, &error))
        })
        .await
        .map(Response::new)
    }

    async fn list_workload_identities(
        &self,
        request: Request<wire::ListWorkloadIdentitiesRequest>,
    ) -> Answer<wire::ListWorkloadIdentitiesResponse> {
        let (caller, state) = (caller(&request)?, Arc::clone(&self.state));
        let request = request.into_inner();
        blocking(move || {
            admit(&state, &caller, &["read", "list"])?;
            let size = usize::try_from(request.page_size).unwrap_or(0);
            let size = if size == 0 { PAGE } else { size.min(PAGE) };
            // The token is the name that the page begins with.
            let all = state.store.list(KIND).map_err(Refusal::from)?;
            let mut rest = all
                .into_iter()
                .skip_while(|resource| resource.name < request.page_token);
            let page = rest
                .by_ref()
                .take(size)
                .map(|resource| to_message(&resource).map_err(|error| damaged(&resource, &error)));
            Ok(wire::ListWorkloadIdentitiesResponse {
                workload_identities: page.collect::<Result<_, _>>()?,
                next_page_token: rest.next().map(|next| next.name).unwrap_or_default(),
            })
        })
        .await
        .map(Response::new)
    }

    async fn delete_workload_identity(
        &self,
        request: Request<wire::DeleteWorkloadIdentityRequest>,
    ) -> Answer<()> {
        let (caller, state) = (caller(&request)?, Arc::clone(&self.state));
        let name = request.into_inner().name;
        blocking(move || {
            let (identity, _) = admit(&state, &caller, &["delete"])?;
            let gone = state.store.delete(KIND, &name).map_err(Refusal::from)?;
            if !gone {
                return Err(missing(&name).into());
            }
            let resource = Resource {
                name,
                ..Resource::default()
            };
            let (event, code) = ("workload_identity.delete", "WID003I");
            audit(&state, &caller, &identity, (event, code), &resource);
            Ok(())
        })
        .await
        .map(Response::new)
    }
}

fn write(
    state: &ClusterState,
    caller: &Caller,
    verbs: &[&str],
    message: Option<wire::WorkloadIdentity>,
    put: impl FnOnce(&Resource) -> Put,
) -> Result<wire::WorkloadIdentity, Status> {
    let (identity, _) = admit(state, caller, verbs)?;
    let resource = from_message(message.unwrap_or_default())
        .map_err(|error| Refusal::bad_parameter(error.to_string()))?;
    let put = put(&resource);
    let event = match &put {
        Put::Create | Put::Upsert => ("workload_identity.create", "WID001I"),
        Put::Update { .. } => ("workload_identity.update", "WID002I"),
    };
    let written = state.store.put(resource, &put).map_err(|error| {
        let text = error.to_string();
        match error {
            StoreError::Exists { .. } => Status::already_exists(text),
            StoreError::NotFound { .. } => Status::not_found(text),
            StoreError::Conflict { .. } => Status::failed_precondition(text),
            other => Refusal::from(other).into(),
        }
    })?;
    audit(state, caller, &identity, event, &written);
    to_message(&written).map_err(|error| damaged(&written, &error))
}

fn missing(name: &str) -> Refusal {
    Refusal::not_found(format!("{KIND} {name:?} is not found"))
}

fn damaged(resource: &Resource, error: &ResourceError) -> Status {
    let name = &resource.name;
    tracing::error!(name, %error, "a stored workload identity cannot be read");
    Status::internal(format!(
        "the stored {KIND} {name:?} cannot be read: {error}"
    ))
}

fn audit(
    state: &ClusterState,
    caller: &Caller,
    identity: &TlsIdentity,
    (event, code): (&str, &str),
    resource: &Resource,
) {
    let expires = resource
        .expires
        .map_or_else(|| "0001-01-01T00:00:00Z".to_owned(), rfc3339);
    let mut members = Map::from_iter([
        ("event".to_owned(), json!(event)),
        ("code".to_owned(), json!(code)),
        ("name".to_owned(), json!(resource.name)),
        ("expires".to_owned(), json!(expires)),
    ]);
    if !resource.kind.is_empty() {
        members.insert("workload_identity_data".to_owned(), view(resource));
    }
    members.extend(who(caller, identity));
    state.audit.emit(members);
}

#[cfg(test)]
mod tests;
