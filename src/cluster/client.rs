//! The calls that the agent makes, typed.

use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt as _;
use tokio::sync::watch;
use tonic::metadata::MetadataValue;
use tonic::service::Interceptor;
use tonic::service::interceptor::InterceptedService;
use tonic::{Request, Status, Streaming};

pub use super::channel::Route;
use super::channel::{Channel, connect_lazily};
use super::dial::{self, Dialer, Opening};
use super::events::Events;
use super::{ClusterError, Credential, Disposition};
use crate::crypto::{Suite, pem};
use crate::pb::proto::auth_service_client::AuthServiceClient;
use crate::pb::proto::{
    Certs, GetRoleRequest, ListResourcesRequest, ListResourcesResponse, PingRequest, PingResponse,
    UserCertsRequest, Watch,
};
use crate::pb::teleport::clusterconfig::v1::GetAuthPreferenceRequest;
use crate::pb::teleport::clusterconfig::v1::cluster_config_service_client::ClusterConfigServiceClient;
use crate::pb::teleport::machineid::v1::bot_instance_service_client::BotInstanceServiceClient;
use crate::pb::teleport::machineid::v1::spiffe_federation_service_client::SpiffeFederationServiceClient;
use crate::pb::teleport::machineid::v1::workload_identity_service_client::WorkloadIdentityServiceClient;
use crate::pb::teleport::machineid::v1::{
    JwtsvidRequest, JwtsvidResponse, ListSpiffeFederationsRequest, SignJwtsviDsRequest,
    SignX509sviDsRequest, SpiffeFederation, SubmitHeartbeatRequest, SvidRequest, SvidResponse,
};
use crate::pb::teleport::presence::v1::ListRemoteClustersRequest;
use crate::pb::teleport::presence::v1::presence_service_client::PresenceServiceClient;
use crate::pb::teleport::trust::v1::trust_service_client::TrustServiceClient;
use crate::pb::teleport::trust::v1::{
    GenerateHostCertRequest, GetCertAuthoritiesRequest, GetCertAuthorityRequest,
};
use crate::pb::teleport::workloadidentity::v1::workload_identity_issuance_service_client::WorkloadIdentityIssuanceServiceClient;
use crate::pb::teleport::workloadidentity::v1::workload_identity_revocation_service_client::WorkloadIdentityRevocationServiceClient;
use crate::pb::teleport::workloadidentity::v1::{
    Credential as IssuedCredential, IssueWorkloadIdentitiesRequest, IssueWorkloadIdentityRequest,
    StreamSignedCrlRequest, StreamSignedCrlResponse,
};
use crate::pb::types::{CertAuthorityV2, RoleV6, SignatureAlgorithmSuite};

/// The Teleport API version that this agent speaks. Clusters compare it with their minimum, so it
/// is not the version of this program (reference: upstream's `version` metadata).
pub const API_VERSION: &str = "18.0.0";
/// The user agent of every call.
pub(crate) const USER_AGENT: &str = "tbot/18.0.0";
/// The longest a unary call may take.
const CALL: Duration = Duration::from_secs(30);
/// The largest message that is read, in bytes.
const MAX_MESSAGE: usize = 16 * 1024 * 1024;
/// Pages of a list that are followed before the cluster counts as broken.
const MAX_PAGES: usize = 1000;

/// Adds the API version to every call.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Version;

impl Interceptor for Version {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        request
            .metadata_mut()
            .insert("version", MetadataValue::from_static(API_VERSION));
        Ok(request)
    }
}

/// A channel whose calls carry the API version.
pub(crate) type Versioned = InterceptedService<tonic::transport::Channel, Version>;

/// A channel to `address` that connects when it is first used and carries the API version.
///
/// What `tls` believes depends on the `opening`, so the two are chosen together, once.
pub(crate) fn versioned(
    dialer: Arc<dyn Dialer>,
    address: &str,
    opening: Opening,
    name: rustls::pki_types::ServerName<'static>,
    tls: Arc<rustls::ClientConfig>,
) -> Result<Versioned, ClusterError> {
    let address = address.to_owned();
    let channel = connect_lazily(move || {
        let (dialer, address, name, tls) = (
            Arc::clone(&dialer),
            address.clone(),
            name.clone(),
            Arc::clone(&tls),
        );
        async move {
            let dialer = dialer.as_ref();
            match opening {
                Opening::Plain => dial::tls(dialer, &address, name, tls).await,
                Opening::Upgraded => dial::tls_upgraded(dialer, &address, name, tls).await,
            }
        }
    })?;
    Ok(InterceptedService::new(channel, Version))
}

/// Calls to a cluster's auth service, as one identity.
#[derive(Debug, Clone)]
pub struct Client {
    channel: Arc<Channel>,
}

/// Makes a typed client of a generated one over the current channel.
macro_rules! over {
    ($self:ident, $client:ident) => {
        $client::with_interceptor($self.channel.current()?, Version)
            .max_decoding_message_size(MAX_MESSAGE)
    };
}

pub mod resources;

impl Client {
    /// A client that follows `credential`. Connects when it is first used.
    pub fn new(
        dialer: Arc<dyn Dialer>,
        route: Route,
        credential: watch::Receiver<Option<Arc<Credential>>>,
    ) -> Self {
        Self {
            channel: Arc::new(Channel::new(dialer, route, credential)),
        }
    }

    /// Whether TLS with the auth service failed because one side does not take the other's
    /// certificate: for an identity that worked before, the authorities of one of them were
    /// replaced. Forgotten when the identity is replaced.
    pub fn is_certificate_refused(&self) -> bool {
        self.channel.is_certificate_refused()
    }

    /// Asks the auth service who it is.
    pub async fn ping(&self) -> Result<PingResponse, ClusterError> {
        unary(
            "Ping",
            over!(self, AuthServiceClient).ping(timed(PingRequest {})),
        )
        .await
    }

    /// Asks for certificates as the bot.
    pub async fn generate_user_certs(
        &self,
        request: UserCertsRequest,
    ) -> Result<Certs, ClusterError> {
        unary(
            "GenerateUserCerts",
            over!(self, AuthServiceClient).generate_user_certs(timed(request)),
        )
        .await
    }

    /// The host authority's TLS certificates, one PEM text each.
    pub async fn host_authorities(&self) -> Result<Vec<String>, ClusterError> {
        const METHOD: &str = "GetClusterCACert";
        let text = String::from_utf8(
            unary(
                METHOD,
                over!(self, AuthServiceClient).get_cluster_ca_cert(timed(())),
            )
            .await?
            .tlsca,
        )
        .unwrap_or_default();
        let ders = pem::certificates(&text).map_err(|source| ClusterError::Answer {
            call: METHOD,
            problem: source.to_string(),
        })?;
        Ok(ders
            .iter()
            .map(|der| pem::encode("CERTIFICATE", der))
            .collect())
    }

    /// One role.
    pub async fn role(&self, name: &str) -> Result<RoleV6, ClusterError> {
        let request = GetRoleRequest {
            name: name.to_owned(),
        };
        unary(
            "GetRole",
            over!(self, AuthServiceClient).get_role(timed(request)),
        )
        .await
    }

    /// Opens a stream of changes. It has no deadline.
    pub async fn watch(&self, request: Watch) -> Result<Events, ClusterError> {
        const CALL: &str = "WatchEvents";
        let events = opened(CALL, over!(self, AuthServiceClient).watch_events(request)).await?;
        Ok(events
            .map(|event| event.map_err(ClusterError::call(CALL)))
            .boxed())
    }

    /// The cluster's signature algorithm suite. A cluster without the newer call for it says it in
    /// its answer to a ping.
    pub async fn suite(&self) -> Result<Suite, ClusterError> {
        let preference = unary(
            "GetAuthPreference",
            over!(self, ClusterConfigServiceClient)
                .get_auth_preference(timed(GetAuthPreferenceRequest {})),
        )
        .await;
        let number = match preference {
            Ok(preference) => preference
                .spec
                .map_or(0, |spec| spec.signature_algorithm_suite),
            Err(error) if error.disposition() == Disposition::Unsupported => {
                self.ping().await?.signature_algorithm_suite
            }
            Err(error) => return Err(error),
        };
        Ok(SignatureAlgorithmSuite::try_from(number).map_or(Suite::Legacy, Suite::from))
    }

    /// Every authority of one type (`host`, `user`, `db` …), leaf clusters included, without keys.
    pub async fn cert_authorities(&self, kind: &str) -> Result<Vec<CertAuthorityV2>, ClusterError> {
        let request = GetCertAuthoritiesRequest {
            r#type: kind.to_owned(),
            include_key: false,
        };
        Ok(unary(
            "GetCertAuthorities",
            over!(self, TrustServiceClient).get_cert_authorities(timed(request)),
        )
        .await?
        .cert_authorities_v2)
    }

    /// A certificate for the key of an SSH server, as a line of the `authorized_keys` form.
    pub async fn generate_host_cert(
        &self,
        request: GenerateHostCertRequest,
    ) -> Result<String, ClusterError> {
        const METHOD: &str = "GenerateHostCert";
        let answer = unary(
            METHOD,
            over!(self, TrustServiceClient).generate_host_cert(timed(request)),
        )
        .await?;
        String::from_utf8(answer.ssh_certificate).map_err(|_source| ClusterError::Answer {
            call: METHOD,
            problem: "the certificate is not text".into(),
        })
    }

    /// One cluster's authority of one type, without keys.
    pub async fn cert_authority(
        &self,
        kind: &str,
        cluster: &str,
    ) -> Result<CertAuthorityV2, ClusterError> {
        let request = GetCertAuthorityRequest {
            r#type: kind.to_owned(),
            domain: cluster.to_owned(),
            include_key: false,
        };
        unary(
            "GetCertAuthority",
            over!(self, TrustServiceClient).get_cert_authority(timed(request)),
        )
        .await
    }

    /// The names of the leaf clusters, in the cluster's order.
    pub async fn remote_clusters(&self) -> Result<Vec<String>, ClusterError> {
        const METHOD: &str = "ListRemoteClusters";
        let mut names = Vec::new();
        let mut page_token = String::new();
        for _ in 0..MAX_PAGES {
            let request = ListRemoteClustersRequest {
                page_size: 0,
                page_token,
            };
            let page = unary(
                METHOD,
                over!(self, PresenceServiceClient).list_remote_clusters(timed(request)),
            )
            .await?;
            names.extend(
                page.remote_clusters
                    .into_iter()
                    .filter_map(|c| Some(c.metadata?.name)),
            );
            if page.next_page_token.is_empty() {
                return Ok(names);
            }
            page_token = page.next_page_token;
        }
        Err(endless(METHOD))
    }

    /// One page of resources.
    async fn list_resources(
        &self,
        query: ListResourcesRequest,
    ) -> Result<ListResourcesResponse, ClusterError> {
        unary(
            "ListResources",
            over!(self, AuthServiceClient).list_resources(timed(query)),
        )
        .await
    }

    /// Every federated trust domain that the cluster knows.
    pub async fn spiffe_federations(&self) -> Result<Vec<SpiffeFederation>, ClusterError> {
        const METHOD: &str = "ListSPIFFEFederations";
        let mut all = Vec::new();
        let mut page_token = String::new();
        for _ in 0..MAX_PAGES {
            let request = ListSpiffeFederationsRequest {
                page_size: 100,
                page_token,
            };
            let page = unary(
                METHOD,
                over!(self, SpiffeFederationServiceClient).list_spiffe_federations(timed(request)),
            )
            .await?;
            all.extend(page.spiffe_federations);
            if page.next_page_token.is_empty() {
                return Ok(all);
            }
            page_token = page.next_page_token;
        }
        Err(endless(METHOD))
    }

    /// Issues an SVID for one workload identity, by name.
    pub async fn issue_workload_identity(
        &self,
        request: IssueWorkloadIdentityRequest,
    ) -> Result<IssuedCredential, ClusterError> {
        const METHOD: &str = "IssueWorkloadIdentity";
        unary(
            METHOD,
            over!(self, WorkloadIdentityIssuanceServiceClient)
                .issue_workload_identity(timed(request)),
        )
        .await?
        .credential
        .ok_or(ClusterError::Answer {
            call: METHOD,
            problem: "it holds no credential".into(),
        })
    }

    /// Issues SVIDs for every workload identity that labels select.
    pub async fn issue_workload_identities(
        &self,
        request: IssueWorkloadIdentitiesRequest,
    ) -> Result<Vec<IssuedCredential>, ClusterError> {
        Ok(unary(
            "IssueWorkloadIdentities",
            over!(self, WorkloadIdentityIssuanceServiceClient)
                .issue_workload_identities(timed(request)),
        )
        .await?
        .credentials)
    }

    /// Signs an X.509-SVID by its path, which clusters up to version 18 do.
    pub async fn sign_x509_svid(&self, svid: SvidRequest) -> Result<SvidResponse, ClusterError> {
        const METHOD: &str = "SignX509SVIDs";
        let request = SignX509sviDsRequest { svids: vec![svid] };
        unary(
            METHOD,
            over!(self, WorkloadIdentityServiceClient).sign_x509svi_ds(timed(request)),
        )
        .await?
        .svids
        .pop()
        .ok_or(ClusterError::Answer {
            call: METHOD,
            problem: "it holds no SVID".into(),
        })
    }

    /// Signs JWT-SVIDs by their paths, which clusters up to version 18 do. The answers are in the
    /// order of the requests.
    pub async fn sign_jwt_svids(
        &self,
        svids: Vec<JwtsvidRequest>,
    ) -> Result<Vec<JwtsvidResponse>, ClusterError> {
        Ok(unary(
            "SignJWTSVIDs",
            over!(self, WorkloadIdentityServiceClient)
                .sign_jwtsvi_ds(timed(SignJwtsviDsRequest { svids })),
        )
        .await?
        .svids)
    }

    /// Opens the stream of signed certificate revocation lists. It has no deadline.
    pub async fn signed_crl(&self) -> Result<Streaming<StreamSignedCrlResponse>, ClusterError> {
        opened(
            "StreamSignedCRL",
            over!(self, WorkloadIdentityRevocationServiceClient)
                .stream_signed_crl(StreamSignedCrlRequest {}),
        )
        .await
    }

    /// Tells the cluster that this bot instance is alive.
    pub async fn submit_heartbeat(
        &self,
        request: SubmitHeartbeatRequest,
    ) -> Result<(), ClusterError> {
        unary(
            "SubmitHeartbeat",
            over!(self, BotInstanceServiceClient).submit_heartbeat(timed(request)),
        )
        .await
        .map(drop)
    }

    /// This authenticated channel itself, for a bot that joins again.
    pub(crate) fn for_join(&self) -> Result<Versioned, ClusterError> {
        Ok(InterceptedService::new(self.channel.current()?, Version))
    }
}

/// A request with the deadline of a unary call.
pub(crate) fn timed<T>(message: T) -> Request<T> {
    let mut request = Request::new(message);
    request.set_timeout(CALL);
    request
}

/// The answer of a unary call within [`CALL`]. tonic's own deadline ends where the answer's headers
/// arrive; a peer that sends those and then nothing is not waited for either.
pub(crate) async fn unary<T>(
    method: &'static str,
    call: impl Future<Output = Result<tonic::Response<T>, Status>>,
) -> Result<T, ClusterError> {
    tracing::debug!(call = method, "Calling the cluster");
    let late = |_elapsed| {
        let problem = format!("no complete answer within {} s", CALL.as_secs());
        Err(Status::deadline_exceeded(problem))
    };
    // The call's state is some kilobytes: boxed, so that its callers' futures stay small.
    let answer = tokio::time::timeout(CALL, Box::pin(call)).await;
    let answer = answer.unwrap_or_else(late);
    answer
        .map(tonic::Response::into_inner)
        .map_err(ClusterError::call(method))
}

/// A stream, once its headers are there. How long that may take is the caller's to say.
async fn opened<T>(
    method: &'static str,
    call: impl Future<Output = Result<tonic::Response<T>, Status>>,
) -> Result<T, ClusterError> {
    tracing::debug!(call = method, "Calling the cluster");
    call.await
        .map(tonic::Response::into_inner)
        .map_err(ClusterError::call(method))
}

fn endless(call: &'static str) -> ClusterError {
    ClusterError::Answer {
        call,
        problem: format!("the list does not end after {MAX_PAGES} pages"),
    }
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use bytes::Bytes;
    use futures_util::stream;
    use http_body_util::StreamBody;
    use hyper::body::Frame;
    use hyper_util::rt::{TokioExecutor, TokioIo};
    use tonic::Code;
    use tonic::transport::Endpoint;

    use super::*;

    type Body = stream::BoxStream<'static, Result<Frame<Bytes>, Infallible>>;

    /// A peer that answers every call with this.
    async fn answering(
        status: u16,
        kind: &'static str,
        body: fn() -> Body,
    ) -> tonic::transport::Channel {
        let connector = tower::service_fn(move |_: http::Uri| async move {
            let (ours, theirs) = tokio::io::duplex(64 * 1024);
            let service = hyper::service::service_fn(move |_request| async move {
                let response = http::Response::builder()
                    .status(status)
                    .header("content-type", kind)
                    .body(StreamBody::new(body()));
                Ok::<_, Infallible>(response.unwrap())
            });
            let server = hyper::server::conn::http2::Builder::new(TokioExecutor::new())
                .serve_connection(TokioIo::new(theirs), service);
            tokio::spawn(server);
            Ok::<_, Infallible>(TokioIo::new(ours))
        });
        let endpoint = Endpoint::from_static("http://localhost");
        endpoint.connect_with_connector(connector).await.unwrap()
    }

    const GRPC: &str = "application/grpc";

    fn silence() -> Body {
        stream::pending().boxed()
    }

    fn page() -> Body {
        let page = Bytes::from_static(b"<html>Please log in</html>");
        stream::once(async { Ok(Frame::data(page)) }).boxed()
    }

    /// The beginning of a message of 64 MiB, and zeros without an end.
    fn flood() -> Body {
        let head = Bytes::from_static(&[0, 4, 0, 0, 0]);
        let zeros = stream::repeat_with(|| Ok(Frame::data(Bytes::from_static(&[0; 16 * 1024]))));
        stream::once(async { Ok(Frame::data(head)) })
            .chain(zeros)
            .boxed()
    }

    #[tokio::test(start_paused = true)]
    async fn answers_that_are_none_are_named_and_neither_awaited_nor_kept() {
        let silent = silence as fn() -> Body;
        for (case, status, kind, body, codes) in [
            ("silence", 200, GRPC, silent, &[Code::DeadlineExceeded][..]),
            ("64 MiB", 200, GRPC, flood, &[Code::OutOfRange]),
            ("a login page", 200, "text/html", page, &[Code::Internal]),
            (
                "a way elsewhere",
                302,
                "text/html",
                page,
                &[Code::Internal, Code::Unknown],
            ),
        ] {
            let channel = answering(status, kind, body).await;
            let mut client = AuthServiceClient::new(channel).max_decoding_message_size(MAX_MESSAGE);
            let began = tokio::time::Instant::now();
            let answer = unary("Ping", client.ping(timed(PingRequest {}))).await;
            let error = answer.unwrap_err();
            let code = error.code().unwrap();
            assert!(codes.contains(&code), "{case}: {code:?}: {error}");
            assert_eq!(error.disposition(), Disposition::Retry, "{case}");
            assert!(error.to_string().starts_with("Ping: "), "{case}: {error}");
            assert!(began.elapsed() <= 2 * CALL, "{case}");
        }
    }
}
