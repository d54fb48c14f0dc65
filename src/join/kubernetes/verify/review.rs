//! Asking a Kubernetes API server whose token it is: `TokenReview`, with the service account of the pod
//! that this cluster runs in (Kubernetes API reference, `authentication.k8s.io/v1`).

use std::path::{Path, PathBuf};

use bytes::Bytes;
use http::{Request, StatusCode, header};
use http_body_util::Full;
use serde::Deserialize;
use serde_json::{Value, json};

use super::Account;
use crate::crypto::jws::Token;
use crate::env::Env;
use crate::outbound::{Outbound, Target, trusting};
use crate::refusal::Refusal;

/// Where Kubernetes mounts what a pod needs to reach its API server.
const MOUNTED: &str = "/var/run/secrets/kubernetes.io/serviceaccount";
/// The group of every service account.
const GROUP: &str = "system:serviceaccounts";
/// Where a review says which pod the token was made for.
const POD: &str = "authentication.kubernetes.io/pod-name";
/// From this version on, tokens are bound to pods.
const BOUND_SINCE: (u32, u32) = (1, 22);
/// The largest answer that is read, in bytes: users may have many groups.
const MOST: usize = 256 * 1024;

/// The API server of the Kubernetes cluster that this cluster runs in.
#[derive(Debug, Clone)]
pub(crate) struct ApiServer {
    target: Target,
    mounted: PathBuf,
}

#[derive(Deserialize)]
struct Review {
    status: Option<Status>,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct Status {
    authenticated: bool,
    error: String,
    audiences: Vec<String>,
    user: User,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct User {
    username: String,
    groups: Vec<String>,
    extra: serde_json::Map<String, Value>,
}

#[derive(Deserialize)]
struct Version {
    #[serde(rename = "gitVersion")]
    git: String,
}

impl ApiServer {
    /// The one that a pod's environment names.
    ///
    /// # Errors
    /// This is no pod.
    pub(crate) fn of(env: &Env) -> Result<Self, Refusal> {
        let port = env.get("KUBERNETES_SERVICE_PORT");
        let port = port.and_then(|port| port.parse().ok());
        let place = env.get("KUBERNETES_SERVICE_HOST").zip(port);
        let (host, port) = place.ok_or_else(|| {
            Refusal::unavailable(
                "this cluster does not run in a Kubernetes pod and cannot ask its API server: use \
                 `type: static_jwks` or `type: oidc` in the token",
            )
        })?;
        Ok(Self::at(host, port, Path::new(MOUNTED)))
    }

    /// One at another place, reached with the service account that is mounted at `mounted`.
    pub(crate) fn at(host: &str, port: u16, mounted: &Path) -> Self {
        Self {
            target: Target::https_at(host, port),
            mounted: mounted.to_owned(),
        }
    }

    /// Whose `token` it is, if it is for `cluster` or for the API server itself.
    ///
    /// # Errors
    /// The API server does not vouch for it, or cannot be asked.
    pub(crate) async fn review(&self, token: &str, cluster: &str) -> Result<Account, Refusal> {
        let own = self.mounted("token").await?;
        let own = own.trim();
        let authority = self.mounted("ca.crt").await?;
        let config = trusting(&authority).map_err(|problem| {
            let path = self.mounted.join("ca.crt");
            Refusal::unavailable(format!("{}: {problem}", path.display()))
        })?;
        let server = Server {
            outbound: Outbound::with(config),
            target: &self.target,
            own,
        };
        let audiences = audiences(own, cluster);
        let mut spec = json!({"token": token});
        if let (false, Some(spec)) = (audiences.is_empty(), spec.as_object_mut()) {
            spec.insert("audiences".to_owned(), json!(audiences));
        }
        let question = json!({
            "apiVersion": "authentication.k8s.io/v1",
            "kind": "TokenReview",
            "spec": spec,
        });
        let path = "/apis/authentication.k8s.io/v1/tokenreviews";
        let review: Review = server.ask("TokenReview", path, Some(&question)).await?;
        let status = review.status.unwrap_or_default();
        if !status.authenticated {
            let why = shortened(&status.error);
            return Err(Refusal::denied(format!(
                "kubernetes failed to validate token: {why}"
            )));
        }
        // A server that knows nothing of audiences says none: it has judged the token by its own.
        let wanted = |audience: &String| audiences.contains(audience);
        if !status.audiences.is_empty() && !status.audiences.iter().any(wanted) {
            return Err(Refusal::denied(format!(
                "kubernetes failed to validate token: it is not for {audiences:?}"
            )));
        }
        let user = status.user;
        let pods = user.extra.get(POD).and_then(Value::as_array);
        let pod = pods.and_then(|pods| pods.first()).and_then(Value::as_str);
        let account = Account::of(&user.username, pod.map(shortened))?;
        if !user.groups.iter().any(|group| group == GROUP) {
            return Err(Refusal::bad_parameter(format!(
                "token user '{}' does not belong to the '{GROUP}' group",
                account.subject
            )));
        }
        if account.pod.is_none() {
            let version: Version = server.ask("version check", "/version", None).await?;
            if binds(&version.git) {
                return Err(Refusal::bad_parameter(format!(
                    "legacy SA tokens are not accepted as kubernetes version {} supports bound tokens: \
                     mount a projected token",
                    shortened(&version.git)
                )));
            }
        }
        Ok(account)
    }

    /// A file of the mounted service account, read each time: the kubelet replaces it.
    async fn mounted(&self, name: &str) -> Result<String, Refusal> {
        let path = self.mounted.join(name);
        tokio::fs::read_to_string(&path).await.map_err(|source| {
            Refusal::unavailable(format!(
                "cannot read {}, with which the Kubernetes API server is asked: {source}",
                path.display()
            ))
        })
    }
}

/// An API server and how it is asked.
struct Server<'a> {
    outbound: Outbound,
    target: &'a Target,
    own: &'a str,
}

impl Server<'_> {
    /// Posts `question`, or gets without one, and reads the answer.
    async fn ask<T: for<'de> Deserialize<'de>>(
        &self,
        what: &str,
        path: &str,
        question: Option<&Value>,
    ) -> Result<T, Refusal> {
        let doing = format!("error during the Kubernetes {what}");
        let failed = |text: String| Refusal::unavailable(text).context(&doing);
        let method = if question.is_some() { "POST" } else { "GET" };
        let body = question.map(Value::to_string).unwrap_or_default();
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header(header::HOST, self.target.authority())
            .header(header::AUTHORIZATION, format!("Bearer {}", self.own))
            .header(header::ACCEPT, "application/json")
            .header(header::CONTENT_TYPE, "application/json")
            .header(header::CONTENT_LENGTH, body.len())
            .body(Full::new(Bytes::from(body)))
            .map_err(|error| failed(error.to_string()))?;
        let answer = self.outbound.send(self.target, request, MOST).await;
        let answer = answer.map_err(|error| failed(error.to_string()))?;
        if !answer.status.is_success() {
            let message = serde_json::from_slice::<Value>(&answer.body).unwrap_or_default();
            let message = message.get("message").and_then(Value::as_str);
            let message = shortened(message.unwrap_or_default());
            let remedy = match answer.status {
                StatusCode::FORBIDDEN | StatusCode::UNAUTHORIZED => {
                    ": bind the ClusterRole `system:auth-delegator` to this cluster's service account"
                }
                _ => "",
            };
            // It names this cluster's own account: not for strangers.
            tracing::warn!(status = %answer.status, message, "The Kubernetes API server refused a {what}{remedy}");
            return Err(failed(format!("it answered {}", answer.status)));
        }
        serde_json::from_slice(&answer.body)
            .map_err(|_source| failed("the answer is not what an API server answers".to_owned()))
    }
}

/// Whom the token may be for: `cluster`, and whom our own is for, which is what this API server takes.
/// Empty if our own is for nobody in particular: then the server knows nothing of audiences.
fn audiences(own: &str, cluster: &str) -> Vec<String> {
    let own = Token::parse(own).ok();
    let mut audiences: Vec<String> = match own.as_ref().and_then(|own| own.claims.get("aud")) {
        Some(Value::String(one)) => vec![one.clone()],
        Some(Value::Array(several)) => several
            .iter()
            .filter_map(|one| one.as_str().map(str::to_owned))
            .collect(),
        _ => Vec::new(),
    };
    if !audiences.is_empty() && !audiences.iter().any(|one| one == cluster) {
        audiences.insert(0, cluster.to_owned());
    }
    audiences
}

/// Whether a server of this version (`v1.31.2+k3s1`) makes tokens that are bound to pods. One whose
/// version cannot be read is taken for a new one.
fn binds(version: &str) -> bool {
    let mut parts = version.trim_start_matches('v').split(['.', '-', '+']);
    let mut number = || parts.next().and_then(|part| part.parse::<u32>().ok());
    match (number(), number()) {
        (Some(major), Some(minor)) => (major, minor) >= BOUND_SINCE,
        _ => true,
    }
}

/// What a server said, in an error: one line, no longer than a line.
pub(super) fn shortened(text: &str) -> String {
    const MOST: usize = 253 + 64;
    text.chars()
        .filter(|c| !c.is_control())
        .take(MOST)
        .collect()
}

#[cfg(test)]
#[path = "review_tests.rs"]
mod tests;
