//! The service through which agents read federations, and people and tools write them.

use std::sync::Arc;

use async_trait::async_trait;
use serde_json::{Map, Value, json};
use tonic::{Request, Response, Status};

use super::{KIND, page, to_message};
use crate::embedded::ClusterState;
use crate::embedded::auth::Refusal;
use crate::embedded::desk::{Head, Write, admit_all, serve};
use crate::pb::teleport::machineid::v1 as wire;
use wire::spiffe_federation_service_server::SpiffeFederationService;

/// The federation service of one cluster.
#[derive(Debug, Clone)]
pub(in crate::embedded) struct Federations {
    /// The cluster.
    pub(in crate::embedded) state: Arc<ClusterState>,
}

type Answer<T> = Result<Response<T>, Status>;

#[async_trait]
impl SpiffeFederationService for Federations {
    async fn create_spiffe_federation(
        &self,
        request: Request<wire::CreateSpiffeFederationRequest>,
    ) -> Answer<wire::SpiffeFederation> {
        serve(&self.state, KIND, request, |desk, request| {
            let message = request.spiffe_federation.unwrap_or_default();
            let head = Head {
                kind: message.kind,
                sub_kind: message.sub_kind,
                version: message.version,
                metadata: message.metadata,
            };
            let read = || desk.read(head, spec(message.spec));
            desk.write(Write::Create, read)
                .map(|made| to_message(&made))
        })
        .await
    }

    async fn delete_spiffe_federation(
        &self,
        request: Request<wire::DeleteSpiffeFederationRequest>,
    ) -> Answer<()> {
        serve(&self.state, KIND, request, |desk, request| {
            desk.delete(&request.name)
        })
        .await
    }

    async fn get_spiffe_federation(
        &self,
        request: Request<wire::GetSpiffeFederationRequest>,
    ) -> Answer<wire::SpiffeFederation> {
        serve(&self.state, KIND, request, |desk, request| {
            admit_all(desk.state, desk.caller, KIND, &["read"])?;
            Ok::<_, Refusal>(to_message(&desk.find(&request.name)?))
        })
        .await
    }

    async fn list_spiffe_federations(
        &self,
        request: Request<wire::ListSpiffeFederationsRequest>,
    ) -> Answer<wire::ListSpiffeFederationsResponse> {
        serve(&self.state, KIND, request, |desk, request| {
            admit_all(desk.state, desk.caller, KIND, &["read", "list"])?;
            let store = &desk.state.store;
            store.transaction(|tx| Ok::<_, Refusal>(page(tx, &request)?))
        })
        .await
    }
}

/// The spec as a file has it. What the wire cannot say (`https_spiffe`) is for files alone.
fn spec(spec: Option<wire::SpiffeFederationSpec>) -> Value {
    let source = spec.and_then(|spec| spec.bundle_source).unwrap_or_default();
    let mut given = Map::new();
    if let Some(fixed) = source.r#static {
        given.insert("static".to_owned(), json!({ "bundle": fixed.bundle }));
    }
    if let Some(web) = source.https_web {
        let url = web.bundle_endpoint_url;
        given.insert(
            "https_web".to_owned(),
            json!({ "bundle_endpoint_url": url }),
        );
    }
    json!({ "bundle_source": given })
}

#[cfg(test)]
mod tests;
