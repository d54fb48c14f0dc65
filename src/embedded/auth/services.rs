//! The small services: ping, authorities, roles, preferences, watches.

use tonic::{Request, Response, Status};

use super::watch::Watched;
use super::{Auth, Refusal, WhileAllowed, authorize, blocking, caller, served, user_agent};
use crate::crypto::pem;
use crate::embedded::SERVER_VERSION;
use crate::embedded::ca::AuthorityType;
use crate::embedded::caller::{Caller, TlsIdentity};
use crate::embedded::store::Tx;
use crate::pb::proto::auth_service_server::AuthService;
use crate::pb::proto::{
    Certs, Event, GetClusterCaCertResponse, GetRoleRequest, ListResourcesRequest,
    ListResourcesResponse, PingRequest, PingResponse, UserCertsRequest, Watch,
};
use crate::pb::teleport::clusterconfig::v1::GetAuthPreferenceRequest;
use crate::pb::teleport::clusterconfig::v1::cluster_config_service_server::ClusterConfigService;
use crate::pb::teleport::presence::v1 as presence;
use crate::pb::teleport::presence::v1::presence_service_server::PresenceService;
use crate::pb::teleport::trust::v1 as trust;
use crate::pb::teleport::trust::v1::trust_service_server::TrustService;
use crate::pb::types::{self, CertAuthorityV2, SignatureAlgorithmSuite};

/// Types of authorities that a bigger cluster has and this one does not.
const ABSENT: &[&str] = &[
    "openssh",
    "saml_idp",
    "oidc_idp",
    "okta",
    "awsra",
    "bound_keypair",
];

impl Auth {
    pub(super) async fn authorized(&self, caller: Caller) -> Result<TlsIdentity, Refusal> {
        let state = std::sync::Arc::clone(&self.state);
        blocking(move || authorize(&state, &caller)).await
    }

    fn suite(&self) -> i32 {
        SignatureAlgorithmSuite::from(self.state.authorities.suite()).into()
    }
}

/// The authorities that answer a question for one type.
///
/// An 18.0.0 cluster answers `db` with `db_client` too (its cache selects by prefix), and its
/// agents write both into their files. This one does the same, so that the files are the same.
fn authorities_of(name: &str) -> Result<&'static [AuthorityType], Refusal> {
    Ok(match AuthorityType::from_name(name) {
        Some(AuthorityType::Host) => &[AuthorityType::Host],
        Some(AuthorityType::User) => &[AuthorityType::User],
        Some(AuthorityType::Spiffe) => &[AuthorityType::Spiffe],
        Some(AuthorityType::Jwt) => &[AuthorityType::Jwt],
        Some(AuthorityType::Db) => &[AuthorityType::Db, AuthorityType::DbClient],
        Some(AuthorityType::DbClient) => &[AuthorityType::DbClient],
        Some(AuthorityType::BoundKeypair) => &[AuthorityType::BoundKeypair],
        None if ABSENT.contains(&name) => &[],
        None => {
            let text = format!("{name:?} authority type is not supported");
            return Err(Refusal::bad_parameter(text));
        }
    })
}

pub(super) fn no_secrets(include_key: bool) -> Result<(), Refusal> {
    if include_key {
        let text = "access denied to perform action \"read\" on \"cert_authority\"";
        return Err(Refusal::denied(text));
    }
    Ok(())
}

#[tonic::async_trait]
impl AuthService for Auth {
    async fn ping(&self, request: Request<PingRequest>) -> Result<Response<PingResponse>, Status> {
        let caller = caller(&request)?;
        Ok(Response::new(PingResponse {
            cluster_name: self.state.name.clone(),
            server_version: SERVER_VERSION.to_owned(),
            proxy_public_addr: self.state.public_addr.clone(),
            is_boring: false,
            remote_addr: caller.addr.to_string(),
            load_all_c_as: false,
            signature_algorithm_suite: self.suite(),
        }))
    }

    async fn get_cluster_ca_cert(
        &self,
        _request: Request<()>,
    ) -> Result<Response<GetClusterCaCertResponse>, Status> {
        // Public: agents compare it with their pins before they trust anything.
        let certificates = self.state.authorities.trusted_tls(AuthorityType::Host);
        let pem: Vec<String> = certificates
            .iter()
            .map(|der| pem::encode("CERTIFICATE", der).trim_end().to_owned())
            .collect();
        Ok(Response::new(GetClusterCaCertResponse {
            tlsca: (pem.join("\n") + "\n").into_bytes(),
        }))
    }

    async fn list_resources(
        &self,
        request: Request<ListResourcesRequest>,
    ) -> Result<Response<ListResourcesResponse>, Status> {
        let identity = self.authorized(caller(&request)?).await?;
        let state = std::sync::Arc::clone(&self.state);
        let page = blocking(move || {
            let request = request.into_inner();
            let list = |tx: &Tx<'_>| served::list(&state, tx, &identity.roles, &request);
            state.store.transaction(list)
        });
        Ok(Response::new(page.await?))
    }

    async fn get_role(
        &self,
        request: Request<GetRoleRequest>,
    ) -> Result<Response<types::RoleV6>, Status> {
        let identity = self.authorized(caller(&request)?).await?;
        let name = request.into_inner().name;
        if !identity.roles.contains(&name) {
            let text = "access denied to perform action \"read\" on \"role\"";
            return Err(Refusal::denied(text).into());
        }
        let store = self.state.store.clone();
        let role = blocking(move || {
            store
                .get("role", &name)?
                .ok_or_else(|| Refusal::not_found(format!("role {name} is not found")))
        })
        .await?;
        let impersonate = role.spec_texts("/allow/impersonate/roles");
        Ok(Response::new(types::RoleV6 {
            kind: role.kind,
            sub_kind: role.sub_kind,
            version: role.version,
            metadata: Some(types::Metadata {
                name: role.name,
                namespace: "default".to_owned(),
                description: role.description,
                labels: role.labels.into_iter().collect(),
                revision: role.revision,
                ..types::Metadata::default()
            }),
            spec: Some(types::RoleSpecV6 {
                allow: Some(types::RoleConditions {
                    impersonate: Some(types::ImpersonateConditions { roles: impersonate }),
                }),
            }),
        }))
    }

    async fn generate_user_certs(
        &self,
        request: Request<UserCertsRequest>,
    ) -> Result<Response<Certs>, Status> {
        let (caller, agent) = (caller(&request)?, user_agent(&request));
        let auth = self.clone();
        let certs =
            blocking(move || auth.user_certs(&caller, &agent, &request.into_inner())).await?;
        Ok(Response::new(certs))
    }

    type WatchEventsStream = WhileAllowed<Event>;

    async fn watch_events(
        &self,
        request: Request<Watch>,
    ) -> Result<Response<Self::WatchEventsStream>, Status> {
        let caller = caller(&request)?;
        self.authorized(caller.clone()).await?;
        let watched = Watched::new(&request.into_inner(), &self.state.name)?;
        let events = watched.follow(&self.state);
        Ok(Response::new(WhileAllowed::new(
            &self.state,
            caller,
            events,
        )))
    }
}

#[tonic::async_trait]
impl TrustService for Auth {
    async fn generate_host_cert(
        &self,
        request: Request<trust::GenerateHostCertRequest>,
    ) -> Result<Response<trust::GenerateHostCertResponse>, Status> {
        let identity = self.authorized(caller(&request)?).await?;
        let auth = self.clone();
        let made = blocking(move || auth.host_cert(&identity, &request.into_inner()));
        Ok(Response::new(trust::GenerateHostCertResponse {
            ssh_certificate: made.await?,
        }))
    }

    async fn get_cert_authority(
        &self,
        request: Request<trust::GetCertAuthorityRequest>,
    ) -> Result<Response<CertAuthorityV2>, Status> {
        self.authorized(caller(&request)?).await?;
        let request = request.into_inner();
        no_secrets(request.include_key)?;
        let found = authorities_of(&request.r#type)?
            .first()
            .filter(|_| request.domain == self.state.name)
            .ok_or_else(|| {
                let text = format!(
                    "cert authority {}/{} is not found",
                    request.r#type, request.domain
                );
                Refusal::not_found(text)
            })?;
        Ok(Response::new(self.state.authorities.message(*found)))
    }

    async fn get_cert_authorities(
        &self,
        request: Request<trust::GetCertAuthoritiesRequest>,
    ) -> Result<Response<trust::GetCertAuthoritiesResponse>, Status> {
        self.authorized(caller(&request)?).await?;
        let request = request.into_inner();
        no_secrets(request.include_key)?;
        let found = authorities_of(&request.r#type)?;
        Ok(Response::new(trust::GetCertAuthoritiesResponse {
            cert_authorities_v2: found
                .iter()
                .map(|kind| self.state.authorities.message(*kind))
                .collect(),
        }))
    }
}

#[tonic::async_trait]
impl ClusterConfigService for Auth {
    async fn get_auth_preference(
        &self,
        request: Request<GetAuthPreferenceRequest>,
    ) -> Result<Response<types::AuthPreferenceV2>, Status> {
        self.authorized(caller(&request)?).await?;
        Ok(Response::new(types::AuthPreferenceV2 {
            kind: "cluster_auth_preference".to_owned(),
            sub_kind: String::new(),
            version: "v2".to_owned(),
            metadata: Some(types::Metadata {
                name: "cluster-auth-preference".to_owned(),
                namespace: "default".to_owned(),
                ..types::Metadata::default()
            }),
            spec: Some(types::AuthPreferenceSpecV2 {
                r#type: "local".to_owned(),
                second_factor: "otp".to_owned(),
                signature_algorithm_suite: self.suite(),
            }),
        }))
    }
}

#[tonic::async_trait]
impl PresenceService for Auth {
    async fn list_remote_clusters(
        &self,
        request: Request<presence::ListRemoteClustersRequest>,
    ) -> Result<Response<presence::ListRemoteClustersResponse>, Status> {
        self.authorized(caller(&request)?).await?;
        // One node: no other cluster is connected.
        Ok(Response::new(
            presence::ListRemoteClustersResponse::default(),
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn authorities_are_told_apart_from_unknown_ones() {
        assert_eq!(
            authorities_of("db").unwrap(),
            [AuthorityType::Db, AuthorityType::DbClient]
        );
        assert_eq!(authorities_of("openssh").unwrap(), []);
        let error = authorities_of("app_client").unwrap_err().to_string();
        assert_eq!(error, "\"app_client\" authority type is not supported");
    }
}
