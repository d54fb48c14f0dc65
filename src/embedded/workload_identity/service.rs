//! The service that issues SVIDs, in the order of work of a Teleport 18.0.0 cluster: what a caller
//! may do is decided before what it asks for is looked at.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use async_trait::async_trait;
use serde_json::{Map, Value, json};
use tonic::{Request, Response, Status};

use super::attrs::{Attrs, UserFacts};
use super::bundle::issuer;
use super::decision::{Contents, decide};
use super::issue::{self, IssueError};
use super::issuer_override;
use super::resource::{KIND, spec_from_json};
use crate::embedded::ClusterState;
use crate::embedded::access::{Access, matches};
use crate::embedded::auth::{Refusal, blocking, caller};
use crate::embedded::ca::AuthorityType;
use crate::embedded::caller::{Caller, TlsIdentity};
use crate::embedded::desk::{admit, who};
use crate::embedded::store::Resource;
use crate::pb::teleport::workloadidentity::v1 as wire;
use crate::spiffe::{SpiffeId, TrustDomain};
use wire::workload_identity_issuance_service_server::WorkloadIdentityIssuanceService;
use wire::{credential, issue_workload_identities_request, issue_workload_identity_request};

/// What roles select workload identities by.
const LABELS: &str = "workload_identity_labels";
/// The most SVIDs that one request by labels may get.
const MAX_BY_LABELS: usize = 10;

/// The issuing service of one cluster.
#[derive(Debug, Clone)]
pub(super) struct Issuance {
    pub(super) state: Arc<ClusterState>,
}

/// What sort of SVID is asked for.
enum Wish {
    X509 { spki: Vec<u8>, overridden: bool },
    Jwt { audiences: Vec<String> },
}

impl Wish {
    fn x509(params: wire::X509svidParams) -> Self {
        Self::X509 {
            spki: params.public_key,
            overridden: params.use_issuer_overrides,
        }
    }

    fn jwt(params: wire::JwtsvidParams) -> Self {
        Self::Jwt {
            audiences: params.audiences,
        }
    }

    fn missing() -> Refusal {
        Refusal::bad_parameter("credential: is required")
    }
}

/// A resource that the caller may have, and what its SVID holds.
struct Decided {
    resource: Resource,
    spec: wire::WorkloadIdentitySpec,
    contents: Contents,
}

/// One request, once its caller is known.
struct Run<'a> {
    state: &'a ClusterState,
    caller: &'a Caller,
    identity: TlsIdentity,
    access: Access,
    attrs: Attrs,
    requested: Duration,
    now: SystemTime,
}

#[async_trait]
impl WorkloadIdentityIssuanceService for Issuance {
    async fn issue_workload_identity(
        &self,
        request: Request<wire::IssueWorkloadIdentityRequest>,
    ) -> Result<Response<wire::IssueWorkloadIdentityResponse>, Status> {
        let caller = caller(&request)?;
        let state = Arc::clone(&self.state);
        let request = request.into_inner();
        let issue = blocking(move || by_name(&state, &caller, request));
        issue.await.map(Response::new)
    }

    async fn issue_workload_identities(
        &self,
        request: Request<wire::IssueWorkloadIdentitiesRequest>,
    ) -> Result<Response<wire::IssueWorkloadIdentitiesResponse>, Status> {
        let caller = caller(&request)?;
        let state = Arc::clone(&self.state);
        let request = request.into_inner();
        let issue = blocking(move || by_labels(&state, &caller, request));
        issue.await.map(Response::new)
    }
}

fn by_name(
    state: &ClusterState,
    caller: &Caller,
    request: wire::IssueWorkloadIdentityRequest,
) -> Result<wire::IssueWorkloadIdentityResponse, Status> {
    use issue_workload_identity_request::Credential;
    if request.name.is_empty() {
        return Err(Refusal::bad_parameter("name: is required").into());
    }
    let wish = match request.credential {
        Some(Credential::X509SvidParams(params)) => Wish::x509(params),
        Some(Credential::JwtSvidParams(params)) => Wish::jwt(params),
        None => return Err(Wish::missing().into()),
    };
    if !request.scope.is_empty() {
        return Err(Refusal::bad_parameter("scope: this cluster has no scopes").into());
    }
    let attrs = request.workload_attrs.as_ref();
    let run = Run::new(state, caller, &["read"], attrs, request.requested_ttl)?;
    let stored = state
        .store
        .get(KIND, &request.name)
        .map_err(Refusal::from)?;
    let resource = stored
        .ok_or_else(|| Refusal::not_found(format!("{KIND} {:?} is not found", request.name)))?;
    if !run.access.sees(LABELS, &resource.labels) {
        return Err(Refusal::denied(format!(
            "access to {KIND} {:?} denied: no role of yours matches its labels",
            request.name
        ))
        .into());
    }
    let decided = run.decide(resource)?;
    Ok(wire::IssueWorkloadIdentityResponse {
        credential: Some(run.issue(&decided, &wish)?),
    })
}

fn by_labels(
    state: &ClusterState,
    caller: &Caller,
    request: wire::IssueWorkloadIdentitiesRequest,
) -> Result<wire::IssueWorkloadIdentitiesResponse, Status> {
    use issue_workload_identities_request::Credential;
    if request.label_selectors.is_empty() {
        return Err(Refusal::bad_parameter("label_selectors: at least one is required").into());
    }
    let wish = match request.credential {
        Some(Credential::X509SvidParams(params)) => Wish::x509(params),
        Some(Credential::JwtSvidParams(params)) => Wish::jwt(params),
        None => return Err(Wish::missing().into()),
    };
    let attrs = request.workload_attrs.as_ref();
    let run = Run::new(
        state,
        caller,
        &["read", "list"],
        attrs,
        request.requested_ttl,
    )?;
    // A key that comes twice counts the last time.
    let selectors = request.label_selectors.into_iter();
    let selector: BTreeMap<_, _> = selectors.map(|one| (one.key, one.values)).collect();
    let mut decided = Vec::new();
    for resource in state.store.list(KIND).map_err(Refusal::from)? {
        if run.access.sees(LABELS, &resource.labels)
            && matches(&selector, &resource.labels)
            && let Ok(one) = run.decide(resource)
        {
            decided.push(one);
        }
        if decided.len() > MAX_BY_LABELS {
            return Err(Refusal::bad_parameter(format!(
                "the label selectors match more than {MAX_BY_LABELS} workload identities: \
                 use more specific ones"
            ))
            .into());
        }
    }
    let credentials = decided.iter().map(|one| run.issue(one, &wish));
    Ok(wire::IssueWorkloadIdentitiesResponse {
        credentials: credentials.collect::<Result<_, _>>()?,
    })
}

impl<'a> Run<'a> {
    fn new(
        state: &'a ClusterState,
        caller: &'a Caller,
        verbs: &[&str],
        workload: Option<&wire::WorkloadAttrs>,
        requested: Option<prost_types::Duration>,
    ) -> Result<Self, Refusal> {
        let (identity, access) = admit(state, caller, KIND, verbs)?;
        let requested = Duration::try_from(requested.unwrap_or_default())
            .map_err(|_negative| Refusal::bad_parameter("requested_ttl: must not be negative"))?;
        let user = state.store.get("user", &identity.user)?;
        let facts = UserFacts {
            name: identity.user.clone(),
            is_bot: !identity.bot_name.is_empty(),
            bot_name: identity.bot_name.clone(),
            bot_instance_id: identity.bot_instance_id.clone(),
            labels: user.map(|user| user.labels).unwrap_or_default(),
            traits: identity.traits.clone(),
        };
        let attrs = Attrs::new(workload, &facts, &identity.join_attributes)
            .map_err(|error| Refusal::bad_parameter(error.to_string()))?;
        Ok(Self {
            state,
            caller,
            identity,
            access,
            attrs,
            requested,
            now: state.clock.now(),
        })
    }

    fn decide(&self, resource: Resource) -> Result<Decided, Status> {
        let spec = spec_from_json(&resource.spec).map_err(|error| {
            let name = &resource.name;
            Refusal::bad_parameter(format!("{KIND} {name:?} is not valid: {error}"))
        })?;
        let contents = decide(&spec, &self.attrs).map_err(|refusal| {
            let text = format!("workload identity failed evaluation: {refusal}");
            Status::new(refusal.code(), text)
        })?;
        Ok(Decided {
            resource,
            spec,
            contents,
        })
    }

    fn issue(&self, decided: &Decided, wish: &Wish) -> Result<wire::Credential, Refusal> {
        let Decided {
            resource,
            spec,
            contents,
        } = decided;
        let parameter = |what: &str| Refusal::bad_parameter(what.to_owned());
        let id = TrustDomain::new(&self.state.name)
            .and_then(|domain| SpiffeId::new(domain, &contents.path))
            .map_err(|error| {
                let path = &contents.path;
                parameter(&format!("parsing SPIFFE ID with path {path:?}: {error}"))
            })?;
        let authority = self.state.authorities.get(AuthorityType::Spiffe);
        let spiffe = spec.spiffe.as_ref();
        let limit = |ttl: Option<prost_types::Duration>| {
            let limit = ttl.and_then(|ttl| Duration::try_from(ttl).ok());
            issue::granted(self.requested, limit)
        };
        let (ttl, credential, details) = match wish {
            Wish::X509 { spki, overridden } => {
                if spki.is_empty() {
                    return Err(parameter("x509_svid_params.public_key: is required"));
                }
                let own = authority.signer()?;
                let instead = if *overridden {
                    issuer_override::instead_of(own, &self.state.store)?
                } else {
                    None
                };
                let signer = instead.as_ref().map_or(own, |instead| &instead.issuer);
                let limits = spiffe.and_then(|spiffe| spiffe.x509.as_ref());
                let left = signer.not_after.duration_since(self.now);
                let ttl =
                    limit(limits.and_then(|x509| x509.maximum_ttl)).min(left.unwrap_or_default());
                let mut svid = issue::x509(signer, &id, contents, spki, self.now, ttl)?;
                svid.chain = instead.map(|instead| instead.chain).unwrap_or_default();
                let details = json!({
                    "svid_type": "x509",
                    "serial_number": svid.serial_number,
                    "dns_sans": nullable(&contents.dns_sans),
                });
                (ttl, credential::Credential::X509Svid(svid), details)
            }
            Wish::Jwt { audiences } => {
                if audiences.is_empty() {
                    return Err(parameter(
                        "jwt_svid_params.audiences: at least one is required",
                    ));
                }
                let limits = spiffe.and_then(|spiffe| spiffe.jwt.as_ref());
                let ttl = limit(limits.and_then(|jwt| jwt.maximum_ttl));
                let issuer = issuer(&self.state.public_addr);
                let key = authority.jwt_signer()?;
                let svid = issue::jwt(key, &issuer, &id, contents, audiences, self.now, ttl)?;
                let details = json!({
                    "svid_type": "jwt",
                    "serial_number": "",
                    "dns_sans": null,
                    "jti": svid.jti,
                });
                (ttl, credential::Credential::JwtSvid(svid), details)
            }
        };
        let mut event = Map::from_iter([
            ("event".to_owned(), json!("spiffe.svid.issued")),
            ("code".to_owned(), json!("TSPIFFE000I")),
            ("spiffe_id".to_owned(), json!(id.to_string())),
            ("hint".to_owned(), json!(contents.hint)),
            ("ip_sans".to_owned(), Value::Null),
            ("workload_identity".to_owned(), json!(resource.name)),
            (
                "workload_identity_revision".to_owned(),
                json!(resource.revision),
            ),
            ("attributes".to_owned(), self.attrs.audit_json()),
        ]);
        if let Value::Object(details) = details {
            event.extend(details);
        }
        event.extend(who(self.caller, &self.identity));
        self.state.audit.emit(event);
        Ok(wire::Credential {
            ttl: prost_types::Duration::try_from(ttl).ok(),
            expires_at: Some((self.now + ttl).into()),
            hint: contents.hint.clone(),
            workload_identity_name: resource.name.clone(),
            workload_identity_revision: resource.revision.clone(),
            spiffe_id: id.to_string(),
            credential: Some(credential),
        })
    }
}

fn nullable(names: &[String]) -> Value {
    if names.is_empty() {
        Value::Null
    } else {
        json!(names)
    }
}

impl From<IssueError> for Refusal {
    fn from(error: IssueError) -> Self {
        match error {
            IssueError::PublicKey => Self::bad_parameter(error.to_string()),
            IssueError::Mint(_) | IssueError::Sign(_) | IssueError::JwtKey => {
                tracing::error!(%error, "an SVID could not be made");
                Self::unknown("the cluster cannot make the SVID; its log tells why")
            }
        }
    }
}

#[cfg(test)]
pub(super) mod tests;
