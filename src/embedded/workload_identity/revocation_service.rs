//! The service through which agents follow the revocation list, and people and tools revoke.

use std::sync::Arc;

use async_trait::async_trait;
use futures_util::{StreamExt as _, stream};
use serde_json::{Map, Value, json};
use tokio_stream::wrappers::WatchStream;
use tonic::{Request, Response, Status};

use super::revocation::{KIND, Revocation};
use crate::embedded::auth::{Refusal, WhileAllowed, authorize, blocking, caller};
use crate::embedded::desk::{Head, Write, metadata, serve};
use crate::embedded::instant::{from_wire, parse_rfc3339, rfc3339};
use crate::embedded::store::Resource;
use crate::pb::teleport::workloadidentity::v1 as wire;
use wire::workload_identity_revocation_service_server::WorkloadIdentityRevocationService;

type Answer<T> = Result<Response<T>, Status>;

impl Revocation {
    async fn write(
        &self,
        how: Write,
        request: Request<Option<wire::WorkloadIdentityX509Revocation>>,
    ) -> Answer<wire::WorkloadIdentityX509Revocation> {
        serve(&self.state, KIND, request, move |desk, message| {
            let message = message.unwrap_or_default();
            let head = Head {
                kind: message.kind,
                sub_kind: message.sub_kind,
                version: message.version,
                metadata: message.metadata,
            };
            let read = || desk.read(head, spec(message.spec.unwrap_or_default())?);
            desk.write(how, read).map(|made| to_message(&made))
        })
        .await
    }
}

#[async_trait]
impl WorkloadIdentityRevocationService for Revocation {
    async fn create_workload_identity_x509_revocation(
        &self,
        request: Request<wire::CreateWorkloadIdentityX509RevocationRequest>,
    ) -> Answer<wire::WorkloadIdentityX509Revocation> {
        let request = request.map(|request| request.workload_identity_x509_revocation);
        self.write(Write::Create, request).await
    }

    async fn update_workload_identity_x509_revocation(
        &self,
        request: Request<wire::UpdateWorkloadIdentityX509RevocationRequest>,
    ) -> Answer<wire::WorkloadIdentityX509Revocation> {
        let request = request.map(|request| request.workload_identity_x509_revocation);
        self.write(Write::Update, request).await
    }

    async fn upsert_workload_identity_x509_revocation(
        &self,
        request: Request<wire::UpsertWorkloadIdentityX509RevocationRequest>,
    ) -> Answer<wire::WorkloadIdentityX509Revocation> {
        let request = request.map(|request| request.workload_identity_x509_revocation);
        self.write(Write::Upsert, request).await
    }

    async fn get_workload_identity_x509_revocation(
        &self,
        request: Request<wire::GetWorkloadIdentityX509RevocationRequest>,
    ) -> Answer<wire::WorkloadIdentityX509Revocation> {
        serve(&self.state, KIND, request, |desk, request| {
            Ok::<_, Refusal>(to_message(&desk.get(&request.name)?))
        })
        .await
    }

    async fn list_workload_identity_x509_revocations(
        &self,
        request: Request<wire::ListWorkloadIdentityX509RevocationsRequest>,
    ) -> Answer<wire::ListWorkloadIdentityX509RevocationsResponse> {
        serve(&self.state, KIND, request, |desk, request| {
            let wire::ListWorkloadIdentityX509RevocationsRequest {
                page_size,
                page_token,
            } = request;
            let (workload_identity_x509_revocations, next_page_token) =
                desk.page(page_size, &page_token, |one| Ok(to_message(one)))?;
            Ok::<_, Status>(wire::ListWorkloadIdentityX509RevocationsResponse {
                workload_identity_x509_revocations,
                next_page_token,
            })
        })
        .await
    }

    async fn delete_workload_identity_x509_revocation(
        &self,
        request: Request<wire::DeleteWorkloadIdentityX509RevocationRequest>,
    ) -> Answer<()> {
        serve(&self.state, KIND, request, |desk, request| {
            desk.delete(&request.name)
        })
        .await
    }

    type StreamSignedCRLStream = WhileAllowed<wire::StreamSignedCrlResponse>;

    async fn stream_signed_crl(
        &self,
        request: Request<wire::StreamSignedCrlRequest>,
    ) -> Answer<Self::StreamSignedCRLStream> {
        let caller = caller(&request)?;
        let (state, who) = (Arc::clone(&self.state), caller.clone());
        blocking(move || authorize(&state, &who)).await?;
        let lists = WatchStream::new(self.current.clone());
        let messages = lists.flat_map(|lists| {
            let lists = lists.map(|lists| lists.to_vec()).unwrap_or_default();
            let message = |crl| Ok(wire::StreamSignedCrlResponse { crl });
            stream::iter(lists.into_iter().map(message))
        });
        Ok(Response::new(WhileAllowed::new(
            &self.state,
            caller,
            messages,
        )))
    }
}

/// The spec as a file has it.
fn spec(spec: wire::WorkloadIdentityX509RevocationSpec) -> Result<Value, Refusal> {
    let mut given = Map::from_iter([("reason".to_owned(), json!(spec.reason))]);
    if let Some(at) = spec.revoked_at {
        let at = from_wire(at);
        let at =
            at.ok_or_else(|| Refusal::bad_parameter("spec.revoked_at: is no point in time"))?;
        given.insert("revoked_at".to_owned(), rfc3339(at).into());
    }
    Ok(given.into())
}

fn to_message(resource: &Resource) -> wire::WorkloadIdentityX509Revocation {
    let revoked_at = parse_rfc3339(resource.spec_text("/revoked_at"));
    wire::WorkloadIdentityX509Revocation {
        kind: resource.kind.clone(),
        sub_kind: resource.sub_kind.clone(),
        version: resource.version.clone(),
        metadata: Some(metadata(resource)),
        spec: Some(wire::WorkloadIdentityX509RevocationSpec {
            reason: resource.spec_text("/reason").to_owned(),
            revoked_at: revoked_at.map(Into::into),
        }),
    }
}

#[cfg(test)]
mod tests;
