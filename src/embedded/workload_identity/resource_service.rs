//! The service through which people and tools read and write workload identities.

use std::sync::Arc;

use async_trait::async_trait;
use tonic::{Request, Response, Status};

use super::resource::{KIND, ResourceError, from_message, to_message};
use crate::embedded::ClusterState;
use crate::embedded::auth::Refusal;
use crate::embedded::desk::{Write, serve};
use crate::embedded::store::Resource;
use crate::pb::teleport::workloadidentity::v1 as wire;
use wire::workload_identity_resource_service_server::WorkloadIdentityResourceService;

/// The resource service of one cluster.
#[derive(Debug, Clone)]
pub(super) struct Resources {
    pub(super) state: Arc<ClusterState>,
}

type Answer<T> = Result<Response<T>, Status>;

impl Resources {
    async fn write(
        &self,
        how: Write,
        request: Request<Option<wire::WorkloadIdentity>>,
    ) -> Answer<wire::WorkloadIdentity> {
        serve(&self.state, KIND, request, move |desk, message| {
            let read = || {
                from_message(message.unwrap_or_default())
                    .map_err(|error| Refusal::bad_parameter(error.to_string()))
            };
            message_of(&desk.write(how, read)?)
        })
        .await
    }
}

#[async_trait]
impl WorkloadIdentityResourceService for Resources {
    async fn create_workload_identity(
        &self,
        request: Request<wire::CreateWorkloadIdentityRequest>,
    ) -> Answer<wire::WorkloadIdentity> {
        let request = request.map(|request| request.workload_identity);
        self.write(Write::Create, request).await
    }

    async fn update_workload_identity(
        &self,
        request: Request<wire::UpdateWorkloadIdentityRequest>,
    ) -> Answer<wire::WorkloadIdentity> {
        let request = request.map(|request| request.workload_identity);
        self.write(Write::Update, request).await
    }

    async fn upsert_workload_identity(
        &self,
        request: Request<wire::UpsertWorkloadIdentityRequest>,
    ) -> Answer<wire::WorkloadIdentity> {
        let request = request.map(|request| request.workload_identity);
        self.write(Write::Upsert, request).await
    }

    async fn get_workload_identity(
        &self,
        request: Request<wire::GetWorkloadIdentityRequest>,
    ) -> Answer<wire::WorkloadIdentity> {
        serve(&self.state, KIND, request, |desk, request| {
            message_of(&desk.get(&request.name)?)
        })
        .await
    }

    async fn list_workload_identities(
        &self,
        request: Request<wire::ListWorkloadIdentitiesRequest>,
    ) -> Answer<wire::ListWorkloadIdentitiesResponse> {
        serve(&self.state, KIND, request, |desk, request| {
            let (size, token) = (request.page_size, request.page_token);
            let (workload_identities, next_page_token) = desk.page(size, &token, message_of)?;
            Ok::<_, Status>(wire::ListWorkloadIdentitiesResponse {
                workload_identities,
                next_page_token,
            })
        })
        .await
    }

    async fn delete_workload_identity(
        &self,
        request: Request<wire::DeleteWorkloadIdentityRequest>,
    ) -> Answer<()> {
        serve(&self.state, KIND, request, |desk, request| {
            desk.delete(&request.name)
        })
        .await
    }
}

fn message_of(resource: &Resource) -> Result<wire::WorkloadIdentity, Status> {
    to_message(resource).map_err(|error| damaged(resource, &error))
}

fn damaged(resource: &Resource, error: &ResourceError) -> Status {
    let name = &resource.name;
    tracing::error!(name, %error, "a stored workload identity cannot be read");
    Status::internal(format!(
        "the stored {KIND} {name:?} cannot be read: {error}"
    ))
}

#[cfg(test)]
mod tests;
