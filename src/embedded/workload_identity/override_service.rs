//! The service through which people and tools put SVIDs under another hierarchy: the request for a
//! certificate of the cluster's own key, and the override that holds what its authority answered.

use std::sync::Arc;

use async_trait::async_trait;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Value, json};
use tonic::{Request, Response, Status};
use x509_cert::name::RdnSequence;

use super::issuer_override::KIND;
use crate::embedded::ClusterState;
use crate::embedded::auth::Refusal;
use crate::embedded::ca::{AuthorityType, mint};
use crate::embedded::desk::{Desk, Head, Write, admit, metadata, serve};
use crate::embedded::store::Resource;
use crate::pb::teleport::workloadidentity::v1 as wire;
use wire::CsrCreationMode;
use wire::x509_issuer_override_spec::Override;
use wire::x509_overrides_service_server::X509OverridesService;

/// What a role has to allow `create` on for requests of certificates.
const REQUEST: &str = "workload_identity_x509_issuer_override_csr";

/// The service of one cluster.
#[derive(Debug, Clone)]
pub(super) struct Overrides {
    pub(super) state: Arc<ClusterState>,
}

type Answer<T> = Result<Response<T>, Status>;

impl Overrides {
    async fn write(
        &self,
        how: Write,
        request: Request<Option<wire::X509IssuerOverride>>,
    ) -> Answer<wire::X509IssuerOverride> {
        serve(&self.state, KIND, request, move |desk, message| {
            let message = message.unwrap_or_default();
            let head = Head {
                kind: message.kind,
                sub_kind: message.sub_kind,
                version: message.version,
                metadata: message.metadata,
            };
            let read = || desk.read(head, spec(&message.spec.unwrap_or_default()));
            desk.write(how, read).map(|made| to_message(&made))
        })
        .await
    }
}

#[async_trait]
impl X509OverridesService for Overrides {
    async fn sign_x509_issuer_csr(
        &self,
        request: Request<wire::SignX509IssuerCsrRequest>,
    ) -> Answer<wire::SignX509IssuerCsrResponse> {
        serve(&self.state, KIND, request, |desk, request| {
            sign(&desk, &request)
        })
        .await
    }

    async fn create_x509_issuer_override(
        &self,
        request: Request<wire::CreateX509IssuerOverrideRequest>,
    ) -> Answer<wire::X509IssuerOverride> {
        let request = request.map(|request| request.x509_issuer_override);
        self.write(Write::Create, request).await
    }

    async fn update_x509_issuer_override(
        &self,
        request: Request<wire::UpdateX509IssuerOverrideRequest>,
    ) -> Answer<wire::X509IssuerOverride> {
        let request = request.map(|request| request.x509_issuer_override);
        self.write(Write::Update, request).await
    }

    async fn upsert_x509_issuer_override(
        &self,
        request: Request<wire::UpsertX509IssuerOverrideRequest>,
    ) -> Answer<wire::X509IssuerOverride> {
        let request = request.map(|request| request.x509_issuer_override);
        self.write(Write::Upsert, request).await
    }

    async fn get_x509_issuer_override(
        &self,
        request: Request<wire::GetX509IssuerOverrideRequest>,
    ) -> Answer<wire::X509IssuerOverride> {
        serve(&self.state, KIND, request, |desk, request| {
            Ok::<_, Refusal>(to_message(&desk.get(&request.name)?))
        })
        .await
    }

    async fn list_x509_issuer_overrides(
        &self,
        request: Request<wire::ListX509IssuerOverridesRequest>,
    ) -> Answer<wire::ListX509IssuerOverridesResponse> {
        serve(&self.state, KIND, request, |desk, request| {
            let (size, token) = (request.page_size, request.page_token);
            let (x509_issuer_overrides, next_page_token) =
                desk.page(size, &token, |one| Ok(to_message(one)))?;
            Ok::<_, Status>(wire::ListX509IssuerOverridesResponse {
                x509_issuer_overrides,
                next_page_token,
            })
        })
        .await
    }

    async fn delete_x509_issuer_override(
        &self,
        request: Request<wire::DeleteX509IssuerOverrideRequest>,
    ) -> Answer<()> {
        serve(&self.state, KIND, request, |desk, request| {
            desk.delete(&request.name)
        })
        .await
    }
}

/// A request for another certificate of the key that one of the cluster's own is for: the one that
/// signs, or one that a rotation has made and will sign with.
fn sign(
    desk: &Desk<'_>,
    request: &wire::SignX509IssuerCsrRequest,
) -> Result<wire::SignX509IssuerCsrResponse, Refusal> {
    admit(desk.state, desk.caller, REQUEST, &["create"])?;
    let authority = desk.state.authorities.get(AuthorityType::Spiffe);
    let mut all = authority.active.tls.iter().chain(&authority.additional.tls);
    let found = all.find(|one| one.certificate == request.issuer);
    let issuer = found.ok_or_else(|| {
        Refusal::not_found("issuer: is no certificate of the cluster's SPIFFE authority")
    })?;
    let issuer = issuer.issuer();
    let csr = match request.csr_creation_mode() {
        CsrCreationMode::Empty => mint::request(&RdnSequence::default(), issuer.key)?,
        CsrCreationMode::Same => mint::request(issuer.name, issuer.key)?,
        CsrCreationMode::Unspecified => {
            let text = "csr_creation_mode: must say whether the subject is to be empty or the same";
            return Err(Refusal::bad_parameter(text));
        }
    };
    Ok(wire::SignX509IssuerCsrResponse { csr })
}

/// The spec as a file has it.
fn spec(spec: &wire::X509IssuerOverrideSpec) -> Value {
    let text = |der: &Vec<u8>| STANDARD.encode(der);
    let one = |one: &Override| {
        let chain: Vec<String> = one.chain.iter().map(text).collect();
        json!({ "issuer": text(&one.issuer), "chain": chain })
    };
    let overrides: Vec<Value> = spec.overrides.iter().map(one).collect();
    json!({ "overrides": overrides })
}

fn to_message(resource: &Resource) -> wire::X509IssuerOverride {
    let der = |text: &Value| STANDARD.decode(text.as_str().unwrap_or_default());
    let one = |one: &Value| Override {
        issuer: one
            .get("issuer")
            .map(der)
            .and_then(Result::ok)
            .unwrap_or_default(),
        chain: list(one, "chain")
            .filter_map(|text| der(text).ok())
            .collect(),
    };
    wire::X509IssuerOverride {
        kind: resource.kind.clone(),
        sub_kind: resource.sub_kind.clone(),
        version: resource.version.clone(),
        metadata: Some(metadata(resource)),
        spec: Some(wire::X509IssuerOverrideSpec {
            overrides: list(&resource.spec, "overrides").map(one).collect(),
        }),
    }
}

fn list<'a>(json: &'a Value, key: &str) -> impl Iterator<Item = &'a Value> {
    json.get(key)
        .and_then(Value::as_array)
        .into_iter()
        .flatten()
}

#[cfg(test)]
mod tests;
