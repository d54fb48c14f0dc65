//! The HTTPS side: discovery, joining with a token over HTTP, and documents for relying parties.
//!
//! Paths, JSON members and error bodies are those of the proxy of a Teleport 18.0.0 cluster
//! (`lib/web/apiserver.go`); a leading `/v1` means nothing there and here.

mod host_credentials;

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderValue, Method, Request, Response, StatusCode, header};
use http_body_util::{BodyExt as _, Full, Limited};
use hyper::body::Incoming;
use serde_json::{Value, json};
use tonic::service::Routes;

use super::ca::AuthorityType;
use super::caller::Caller;
use super::workload_identity::bundle;
use super::{ClusterState, MIN_CLIENT_VERSION, SERVER_VERSION};

/// The largest request body: a join request has two public keys.
const MAX_BODY: usize = 64 * 1024;
/// For a request's body to arrive.
const BODY: Duration = Duration::from_secs(10);
/// How long a document for relying parties may be kept, as the bundle's own refresh hint has it: keys are
/// published long before anything is signed with them.
const KEPT: &str = "public, max-age=300";

/// The web side of one cluster.
#[derive(Debug)]
pub(super) struct Web {
    state: Arc<ClusterState>,
    join: Routes,
    ports: Ports,
}

/// Where the proxy listens.
#[derive(Debug, Clone, Copy)]
pub(super) struct Ports {
    /// The shared port.
    pub(super) shared: SocketAddr,
    /// The port for SSH, where the shared one does not lead to the auth service.
    pub(super) ssh: Option<SocketAddr>,
}

/// A refusal as the web API words it: a status and a text.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Refusal(pub(super) StatusCode, pub(super) String);

impl Web {
    /// `join` are the services for joining, `ports` are told to agents.
    pub(super) fn new(state: Arc<ClusterState>, join: Routes, ports: Ports) -> Self {
        Self { state, join, ports }
    }

    pub(super) async fn answer(
        &self,
        request: Request<Incoming>,
        caller: Caller,
    ) -> Response<Full<Bytes>> {
        let head = request.method() == Method::HEAD;
        let kept = is_document(request.uri().path());
        let answer = self.dispatch(request, caller).await;
        let (status, body) = match answer {
            Ok(body) => (StatusCode::OK, body),
            Err(Refusal(status, message)) => (status, json!({"error": {"message": message}})),
        };
        let body = body.to_string();
        let length = HeaderValue::from(body.len());
        let mut response = Response::new(Full::from(if head { String::new() } else { body }));
        *response.status_mut() = status;
        let headers = response.headers_mut();
        headers.insert(header::CONTENT_LENGTH, length);
        let json = HeaderValue::from_static("application/json");
        headers.insert(header::CONTENT_TYPE, json);
        let nosniff = HeaderValue::from_static("nosniff");
        headers.insert(header::X_CONTENT_TYPE_OPTIONS, nosniff);
        if kept && status == StatusCode::OK {
            headers.insert(header::CACHE_CONTROL, HeaderValue::from_static(KEPT));
        }
        response
    }

    async fn dispatch(&self, request: Request<Incoming>, caller: Caller) -> Result<Value, Refusal> {
        let path = request.uri().path();
        let path = path.strip_prefix("/v1").unwrap_or(path);
        if path == "/webapi/host/credentials" {
            expect(request.method(), &[Method::POST])?;
            let body =
                tokio::time::timeout(BODY, Limited::new(request.into_body(), MAX_BODY).collect())
                    .await
                    .map_err(|_elapsed| bad("the request's body did not arrive in time"))?
                    .map_err(|error| bad(&format!("the request's body cannot be read: {error}")))?
                    .to_bytes();
            return host_credentials::join(self.join.clone(), &body, caller).await;
        }
        let value = match path {
            "/webapi/find" => find(&self.state, self.ports),
            "/webapi/ping" => ping(&self.state, self.ports),
            _ if path.starts_with("/webapi/ping/") => ping(&self.state, self.ports),
            _ => document(&self.state, path)?,
        };
        expect(request.method(), &[Method::GET, Method::HEAD])?;
        Ok(value)
    }
}

/// Whether `path` is that of a document for relying parties.
fn is_document(path: &str) -> bool {
    let path = path.strip_prefix("/v1").unwrap_or(path);
    let documents = [
        bundle::BUNDLE_PATH,
        bundle::KEYS_PATH,
        bundle::DISCOVERY_PATH,
    ];
    documents.contains(&path)
}

/// Documents for relying parties.
fn document(state: &ClusterState, path: &str) -> Result<Value, Refusal> {
    let spiffe = || state.authorities.get(AuthorityType::Spiffe);
    match path {
        bundle::BUNDLE_PATH => Ok(bundle::spiffe_bundle(&spiffe())),
        bundle::KEYS_PATH => Ok(bundle::jwks(&spiffe())),
        bundle::DISCOVERY_PATH => Ok(bundle::openid_configuration(&state.public_addr)),
        _ => Err(Refusal(
            StatusCode::NOT_FOUND,
            format!("there is nothing at {path}"),
        )),
    }
}

fn bad(message: &str) -> Refusal {
    Refusal(StatusCode::BAD_REQUEST, message.to_owned())
}

fn expect(method: &Method, allowed: &[Method]) -> Result<(), Refusal> {
    if allowed.contains(method) {
        return Ok(());
    }
    Err(Refusal(
        StatusCode::METHOD_NOT_ALLOWED,
        format!("{method} is not allowed here"),
    ))
}

/// What `/webapi/find` answers.
pub(super) fn find(state: &ClusterState, ports: Ports) -> Value {
    let auth = json!({
        "type": "",
        "private_key_policy": "",
        "piv_slot": "",
        "piv_pin_cache_ttl": 0,
        "device_trust": {},
        "has_motd": false,
        "default_session_ttl": "0s",
        "signature_algorithm_suite": state.authorities.suite().name(),
    });
    discovery(state, ports, &auth)
}

/// What `/webapi/ping` answers.
pub(super) fn ping(state: &ClusterState, ports: Ports) -> Value {
    let auth = json!({
        "type": "local",
        "second_factor": "otp",
        "preferred_local_mfa": "otp",
        "local": {"name": ""},
        "private_key_policy": "none",
        "piv_slot": "",
        "piv_pin_cache_ttl": 0,
        "device_trust": {"disabled": true},
        "has_motd": false,
        "default_session_ttl": "12h0m0s",
        "signature_algorithm_suite": state.authorities.suite().name(),
    });
    discovery(state, ports, &auth)
}

fn discovery(state: &ClusterState, ports: Ports, auth: &Value) -> Value {
    let listen = ports.shared.to_string();
    let ssh = ports
        .ssh
        .map_or_else(|| listen.clone(), |ssh| ssh.to_string());
    json!({
        "auth": auth,
        "proxy": {
            "kube": {"enabled": false, "listen_addr": listen},
            "ssh": {
                "listen_addr": listen,
                "tunnel_listen_addr": ssh,
                "web_listen_addr": listen,
                "public_addr": state.public_addr,
                "dial_timeout": 30_000_000_000_u64,
            },
            "db": {"postgres_listen_addr": listen, "mysql_listen_addr": listen},
            "tls_routing_enabled": ports.ssh.is_none(),
        },
        "server_version": SERVER_VERSION,
        "min_client_version": MIN_CLIENT_VERSION,
        "auto_update": {
            "tools_version": SERVER_VERSION,
            "tools_auto_update": false,
            "agent_version": SERVER_VERSION,
            "agent_auto_update": false,
            "agent_update_jitter_seconds": 60,
        },
        "cluster_name": state.name,
        "automatic_upgrades": false,
        "edition": "oss",
        "fips": false,
    })
}
