//! The part of the Kubernetes API that keeps Secrets, strict where a real one is: resource versions,
//! field managers of server-side apply, RBAC, dry runs, types, sizes and names.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::net::Ipv4Addr;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use http_body_util::{BodyExt as _, Full};
use hyper::body::Incoming;
use hyper::{Request, Response};
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio::runtime::Runtime;
use tokio::sync::oneshot;

use super::{Sandbox, SelfSigned};

/// What the API server accepts as a bearer token.
const TOKEN: &str = "token-of-the-service-account-canary";
/// Where tokens are reviewed.
const REVIEWS: &str = "/apis/authentication.k8s.io/v1/tokenreviews";
/// `MaxSecretSize` of Kubernetes.
const MAX_BYTES: usize = 1024 * 1024;

/// What is to happen to the next request of a method.
#[derive(Debug, Clone)]
pub(crate) enum Fault {
    /// It is answered with this code and nothing else happens.
    Answer(u16),
    /// It is never answered.
    Hang,
    /// Someone else changes the Secret's annotations first.
    Touched,
    /// Someone else deletes the Secret first.
    Deleted,
    /// The answer is not what a Kubernetes API answers.
    Nonsense,
}

/// A Secret and who holds which of its fields.
#[derive(Debug, Clone, Default)]
struct Stored {
    fields: BTreeMap<String, Value>,
    /// `manager operation` to fields.
    managers: BTreeMap<String, BTreeSet<String>>,
    version: u64,
    more: Value,
}

/// Everything the API knows; a test may change it while it serves.
#[derive(Debug, Default)]
pub(crate) struct State {
    secrets: BTreeMap<String, Stored>,
    versions: u64,
    /// Verbs that the service account has on Secrets.
    pub(crate) verbs: BTreeSet<&'static str>,
    /// Secrets that it may only read.
    pub(crate) closed: BTreeSet<String>,
    pub(crate) faults: VecDeque<(&'static str, Fault)>,
    /// What a review of a token says: its `audiences` and its `user`.
    pub(crate) reviews: BTreeMap<String, Value>,
    /// The `spec` of every review that was asked for.
    pub(crate) reviewed: Vec<Value>,
    /// The service account's token, if it is another than [`TOKEN`].
    pub(crate) account: Option<String>,
    /// `METHOD path?query` of every request about Secrets.
    pub(crate) requests: Vec<String>,
}

/// A refusal as the API words it.
struct Refusal {
    code: u16,
    reason: &'static str,
    message: String,
    details: Value,
}

/// An API server on a port of its own, over TLS.
pub(crate) struct KubeApi {
    /// Dropped, it ends the server.
    _stop: oneshot::Sender<()>,
    port: u16,
    authority: PathBuf,
    state: Arc<Mutex<State>>,
}

impl KubeApi {
    /// The only namespace there is.
    pub(crate) const NAMESPACE: &'static str = "bots";

    pub(crate) fn start(sandbox: &Sandbox) -> Self {
        let tls = SelfSigned::new(sandbox, "kube", "DNS:localhost,IP:127.0.0.1");
        let acceptor = tls.acceptor(None);
        let state = Arc::new(Mutex::new(State {
            verbs: BTreeSet::from(["get", "create", "patch", "update"]),
            ..State::default()
        }));
        let listener = std::net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        listener.set_nonblocking(true).unwrap();
        let port = listener.local_addr().unwrap().port();
        let served = Arc::clone(&state);
        let (stop, stopped) = oneshot::channel::<()>();
        let serving = async move {
            let listener = TcpListener::from_std(listener).unwrap();
            while let Ok((stream, _)) = listener.accept().await {
                let (acceptor, state) = (acceptor.clone(), Arc::clone(&served));
                tokio::spawn(async move {
                    let stream = acceptor.accept(stream).await?;
                    let service = hyper::service::service_fn(move |request| {
                        answer(Arc::clone(&state), request)
                    });
                    let serving = hyper::server::conn::http1::Builder::new()
                        .serve_connection(TokioIo::new(stream), service);
                    // A client that goes away in the middle is none of the tests' business.
                    drop(serving.await);
                    std::io::Result::Ok(())
                });
            }
        };
        // A runtime of its own: tests have theirs, and stop its clock.
        std::thread::spawn(move || {
            Runtime::new().unwrap().block_on(async {
                tokio::select! {
                    () = serving => {}
                    _ = stopped => {}
                }
            });
        });
        Self {
            _stop: stop,
            port,
            authority: tls.certificate,
            state,
        }
    }

    pub(crate) fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    /// A kubeconfig with the service account's token, or another.
    pub(crate) fn kubeconfig(&self, sandbox: &Sandbox, token: Option<&str>) -> PathBuf {
        let config = json!({
            "apiVersion": "v1", "kind": "Config", "current-context": "test",
            "clusters": [{"name": "test", "cluster": {
                "server": format!("https://127.0.0.1:{}", self.port),
                "certificate-authority": self.authority,
            }}],
            "contexts": [{"name": "test", "context": {
                "cluster": "test", "user": "test", "namespace": Self::NAMESPACE,
            }}],
            "users": [{"name": "test", "user": {"token": token.unwrap_or(TOKEN)}}],
        });
        sandbox.write("kubeconfig", config.to_string())
    }

    /// What the kubelet mounts into a pod, and the variables that it sets.
    pub(crate) fn service_account(&self, sandbox: &Sandbox) -> (PathBuf, [(&str, String); 2]) {
        sandbox.write("account/token", TOKEN);
        sandbox.write("account/namespace", Self::NAMESPACE);
        let authority = std::fs::read(&self.authority).unwrap();
        sandbox.write("account/ca.crt", authority);
        let variables = [
            ("KUBERNETES_SERVICE_HOST", "127.0.0.1".to_owned()),
            ("KUBERNETES_SERVICE_PORT", self.port.to_string()),
        ];
        (sandbox.path("account"), variables)
    }

    /// Makes a Secret as someone else, with `more` laid over the object.
    pub(crate) fn put(&self, name: &str, manager: &str, data: &[(&str, &str)], more: Value) {
        let mut state = self.state();
        state.versions += 1;
        let mut stored = Stored {
            version: state.versions,
            more,
            ..Stored::default()
        };
        for (key, value) in data {
            let field = format!("data.{key}");
            let value = json!(STANDARD.encode(value));
            stored.fields.insert(field.clone(), value);
            let held = stored.managers.entry(format!("{manager} Update"));
            held.or_default().insert(field);
        }
        let type_ = stored.more.get("type").cloned();
        stored
            .fields
            .insert("type".to_owned(), type_.unwrap_or(json!("Opaque")));
        state.secrets.insert(name.to_owned(), stored);
    }

    /// Sets a field such as `labels.team` as someone else.
    pub(crate) fn edit(&self, name: &str, manager: &str, field: &str, value: &str) {
        let mut state = self.state();
        state.versions += 1;
        let version = state.versions;
        let stored = state.secrets.get_mut(name).unwrap();
        stored.version = version;
        stored.fields.insert(field.to_owned(), json!(value));
        let held = stored.managers.entry(format!("{manager} Update"));
        held.or_default().insert(field.to_owned());
    }

    /// The names of all Secrets.
    pub(crate) fn names(&self) -> Vec<String> {
        self.state().secrets.keys().cloned().collect()
    }

    /// The decoded data; `None` if there is no such Secret.
    pub(crate) fn data(&self, name: &str) -> Option<BTreeMap<String, String>> {
        let state = self.state();
        let stored = state.secrets.get(name)?;
        let data = stored.fields.iter().filter_map(|(field, value)| {
            let bytes = STANDARD.decode(value.as_str()?).ok()?;
            let key = field.strip_prefix("data.")?;
            Some((key.to_owned(), String::from_utf8_lossy(&bytes).into_owned()))
        });
        Some(data.collect())
    }

    /// The whole object as the API shows it.
    pub(crate) fn object(&self, name: &str) -> Value {
        self.state().secrets[name].object(name)
    }

    /// How many requests of a method were made since the last look.
    pub(crate) fn count(&self, method: &str) -> usize {
        let state = self.state();
        let of_method = |line: &&String| line.starts_with(method);
        state.requests.iter().filter(of_method).count()
    }
}

impl Stored {
    fn object(&self, name: &str) -> Value {
        let mut object = json!({
            "apiVersion": "v1", "kind": "Secret",
            "metadata": {
                "name": name, "namespace": KubeApi::NAMESPACE, "uid": "1",
                "resourceVersion": self.version.to_string(),
            },
        });
        for (field, value) in &self.fields {
            if let Some(key) = field.strip_prefix("data.") {
                object["data"][key] = value.clone();
            } else if let Some((map, key)) = in_metadata(field) {
                object["metadata"][map][key] = value.clone();
            } else {
                object[field] = value.clone();
            }
        }
        if let Some(more) = self.more.as_object() {
            for (key, value) in more {
                match value.as_object() {
                    Some(inner) => {
                        for (name, value) in inner {
                            object[key][name] = value.clone();
                        }
                    }
                    None => object[key] = value.clone(),
                }
            }
        }
        let managers = self.managers.iter().map(|(who, fields)| {
            let (manager, operation) = who.split_once(' ').unwrap();
            let mut held = json!({});
            for field in fields {
                if let Some(key) = field.strip_prefix("data.") {
                    held["f:data"][format!("f:{key}")] = json!({});
                } else if let Some((map, key)) = in_metadata(field) {
                    held["f:metadata"][format!("f:{map}")][format!("f:{key}")] = json!({});
                } else {
                    held[format!("f:{field}")] = json!({});
                }
            }
            json!({
                "manager": manager, "operation": operation, "apiVersion": "v1",
                "time": "2026-01-01T00:00:00Z", "fieldsType": "FieldsV1", "fieldsV1": held,
            })
        });
        object["metadata"]["managedFields"] = managers.collect();
        object
    }
}

/// The map of the metadata that a flat field is in, and its key there.
fn in_metadata(field: &str) -> Option<(&str, &str)> {
    let (map, key) = field.split_once('.')?;
    ["labels", "annotations"]
        .contains(&map)
        .then_some((map, key))
}

fn refusal(code: u16, reason: &'static str, message: impl Into<String>) -> Refusal {
    Refusal {
        code,
        reason,
        message: message.into(),
        details: json!({"kind": "secrets"}),
    }
}

impl State {
    fn allowed(&self, verb: &str, name: &str) -> Result<(), Refusal> {
        if self.verbs.contains(verb) && (verb == "get" || !self.closed.contains(name)) {
            return Ok(());
        }
        Err(refusal(
            403,
            "Forbidden",
            format!(
                "secrets \"{name}\" is forbidden: User \"system:serviceaccount:bots:tbot\" cannot \
                 {verb} resource \"secrets\" in API group \"\" in the namespace \"bots\""
            ),
        ))
    }

    /// `TokenReview`, as the API reference describes it.
    fn review(&mut self, sent: &Value) -> Value {
        let spec = &sent["spec"];
        self.reviewed.push(spec.clone());
        let list = |value: &Value| value.as_array().cloned().unwrap_or_default();
        let wanted = list(&spec["audiences"]);
        let known = spec["token"].as_str().and_then(|it| self.reviews.get(it));
        let status = match known {
            None => json!({"error": "[invalid bearer token, token lookup failed]", "user": {}}),
            Some(known) => {
                let common: Vec<Value> = list(&known["audiences"])
                    .into_iter()
                    .filter(|audience| wanted.contains(audience))
                    .collect();
                if common.is_empty() && !wanted.is_empty() {
                    let error = "[invalid bearer token, token audiences are invalid]";
                    json!({"error": error, "user": {}})
                } else {
                    json!({"authenticated": true, "audiences": common, "user": known["user"]})
                }
            }
        };
        json!({
            "kind": "TokenReview", "apiVersion": "authentication.k8s.io/v1",
            "metadata": {}, "spec": {"token": "hidden"}, "status": status,
        })
    }

    fn get(&self, name: &str) -> Result<Value, Refusal> {
        self.allowed("get", name)?;
        let stored = self
            .secrets
            .get(name)
            .ok_or_else(|| refusal(404, "NotFound", format!("secrets \"{name}\" not found")))?;
        Ok(stored.object(name))
    }

    /// Makes the whole object or replaces it (`verb`), as `POST` and `PUT` do.
    fn replace(
        &mut self,
        name: &str,
        body: &Value,
        manager: &str,
        verb: &str,
        dry: bool,
    ) -> Result<Value, Refusal> {
        self.allowed(verb, name)?;
        if body["metadata"]["name"] != name || body["metadata"]["namespace"] != KubeApi::NAMESPACE {
            return Err(refusal(400, "BadRequest", "the name is another"));
        }
        let asked = body["metadata"]["resourceVersion"].as_str();
        let mut next = match (verb, self.secrets.get(name)) {
            ("create", None) if asked.is_some() => {
                let message = "resourceVersion should not be set on objects to be created";
                return Err(refusal(400, "BadRequest", message));
            }
            ("create", None) => Stored::default(),
            ("create", Some(_)) => {
                let message = format!("secrets \"{name}\" already exists");
                return Err(refusal(409, "AlreadyExists", message));
            }
            (_, None) => {
                let message = format!("secrets \"{name}\" not found");
                return Err(refusal(404, "NotFound", message));
            }
            (_, Some(live)) => {
                if asked.is_some_and(|asked| asked != live.version.to_string()) {
                    return Err(changed(name));
                }
                live.clone()
            }
        };
        let sent = flatten(body);
        let set: BTreeSet<String> = sent
            .iter()
            .filter(|(field, value)| next.fields.get(*field) != Some(value))
            .map(|(field, _)| field.clone())
            .collect();
        for held in next.managers.values_mut() {
            held.retain(|field| sent.contains_key(field) && !set.contains(field));
        }
        let own = next.managers.entry(format!("{manager} Update"));
        own.or_default().extend(set);
        let before = std::mem::replace(&mut next.fields, sent);
        valid(&next, (verb != "create").then_some(&before))?;
        next.version = self.versions + 1;
        let shown = next.object(name);
        if !dry {
            self.versions += 1;
            self.secrets.insert(name.to_owned(), next);
        }
        Ok(shown)
    }

    /// Server-side apply, as `sigs.k8s.io/structured-merge-diff` decides it for maps of scalars.
    fn apply(
        &mut self,
        name: &str,
        body: &Value,
        manager: &str,
        force: bool,
        dry: bool,
    ) -> Result<Value, Refusal> {
        self.allowed("patch", name)?;
        if manager.is_empty() {
            return Err(refusal(400, "BadRequest", "fieldManager is required"));
        }
        if body["apiVersion"] != "v1" || body["kind"] != "Secret" {
            return Err(refusal(400, "BadRequest", "not a v1 Secret"));
        }
        if !body["metadata"]["managedFields"].is_null() {
            return Err(refusal(400, "BadRequest", "managedFields must be nil"));
        }
        let asked = body["metadata"]["resourceVersion"].as_str();
        let mut next = match self.secrets.get(name) {
            Some(live) => {
                if asked.is_some_and(|asked| asked != live.version.to_string()) {
                    return Err(changed(name));
                }
                live.clone()
            }
            None => {
                self.allowed("create", name)?;
                if asked.is_some() {
                    return Err(changed(name));
                }
                Stored::default()
            }
        };
        let applied = flatten(body);
        let me = format!("{manager} Apply");
        let conflicts: Vec<Value> = applied
            .iter()
            .flat_map(|(field, value)| {
                let differs = next.fields.get(field).is_some_and(|live| live != value);
                next.managers
                    .iter()
                    .filter(|(who, held)| differs && **who != me && held.contains(field))
                    .map(|(who, _)| {
                        let manager = who.split(' ').next().unwrap_or_default();
                        json!({
                            "reason": "FieldManagerConflict", "field": format!(".{field}"),
                            "message": format!("conflict with \"{manager}\" using v1"),
                        })
                    })
                    .collect::<Vec<_>>()
            })
            .collect();
        if !conflicts.is_empty() && !force {
            let mut refused = refusal(
                409,
                "Conflict",
                format!("Apply failed with {} conflict(s)", conflicts.len()),
            );
            refused.details["causes"] = Value::Array(conflicts);
            return Err(refused);
        }
        // What was held and is not sent goes, unless someone else holds it too.
        for field in next.managers.remove(&me).unwrap_or_default() {
            let held = next.managers.values().any(|held| held.contains(&field));
            if !applied.contains_key(&field) && !held {
                next.fields.remove(&field);
            }
        }
        let before = self.secrets.get(name).map(|live| live.fields.clone());
        next.managers.insert(me, applied.keys().cloned().collect());
        next.fields.extend(applied);
        valid(&next, before.as_ref())?;
        next.version = self.versions + 1;
        let shown = next.object(name);
        if !dry {
            self.versions += 1;
            self.secrets.insert(name.to_owned(), next);
        }
        Ok(shown)
    }
}

fn changed(name: &str) -> Refusal {
    refusal(
        409,
        "Conflict",
        format!(
            "Operation cannot be fulfilled on secrets \"{name}\": the object has been modified; \
             please apply your changes to the latest version and try again"
        ),
    )
}

/// The fields of a Secret that managers hold, flat.
fn flatten(body: &Value) -> BTreeMap<String, Value> {
    let mut fields = BTreeMap::new();
    let maps = [
        ("data", &body["data"]),
        ("labels", &body["metadata"]["labels"]),
        ("annotations", &body["metadata"]["annotations"]),
    ];
    for (prefix, map) in maps {
        for (key, value) in map.as_object().into_iter().flatten() {
            fields.insert(format!("{prefix}.{key}"), value.clone());
        }
    }
    for key in ["type", "immutable"] {
        if !body[key].is_null() {
            fields.insert(key.to_owned(), body[key].clone());
        }
    }
    fields
}

/// What validation of a Secret refuses.
fn valid(next: &Stored, before: Option<&BTreeMap<String, Value>>) -> Result<(), Refusal> {
    let invalid = |message: String| {
        Err(refusal(
            422,
            "Invalid",
            format!("Secret is invalid: {message}"),
        ))
    };
    let mut total = 0;
    for (field, value) in &next.fields {
        if let Some(key) = field.strip_prefix("data.") {
            let plain = |b: u8| b.is_ascii_alphanumeric() || b"-._".contains(&b);
            if key.is_empty() || !key.bytes().all(plain) || key.starts_with("..") {
                return invalid(format!("data[{key}]: a valid config key must consist of …"));
            }
            total += STANDARD.decode(value.as_str().unwrap()).unwrap().len();
        }
    }
    if total > MAX_BYTES {
        return invalid(format!(
            "data: Too long: may not be more than {MAX_BYTES} bytes"
        ));
    }
    let Some(before) = before else { return Ok(()) };
    if before.get("type") != next.fields.get("type") {
        return invalid("type: Invalid value: field is immutable".to_owned());
    }
    let data = |fields: &BTreeMap<String, Value>| -> Vec<(String, Value)> {
        let all = fields.clone().into_iter();
        all.filter(|(field, _)| field.starts_with("data."))
            .collect()
    };
    if next.more["immutable"] == true && data(before) != data(&next.fields) {
        return invalid("data: Forbidden: field is immutable when `immutable` is set".to_owned());
    }
    Ok(())
}

async fn answer(
    state: Arc<Mutex<State>>,
    request: Request<Incoming>,
) -> Result<Response<Full<Bytes>>, hyper::Error> {
    let (head, body) = request.into_parts();
    let body = body.collect().await?.to_bytes();
    let method = head.method.as_str();
    let bearer = head.headers.get("authorization");
    let account = state.lock().unwrap().account.clone();
    let expected = format!("Bearer {}", account.as_deref().unwrap_or(TOKEN));
    let known = bearer.is_some_and(|value| value == &expected);
    let path = head.uri.path();
    if let Some(discovery) = discovery(path) {
        return Ok(response(200, &discovery));
    }
    let query: BTreeMap<&str, &str> = head
        .uri
        .query()
        .unwrap_or_default()
        .split('&')
        .filter_map(|pair| pair.split_once('='))
        .collect();
    let fault = {
        let mut state = state.lock().unwrap();
        let line = format!("{method} {}", head.uri);
        state.requests.push(line);
        match state.faults.front() {
            Some((of, _)) if *of == method => state.faults.pop_front().map(|(_, fault)| fault),
            _ => None,
        }
    };
    if matches!(fault, Some(Fault::Hang)) {
        return std::future::pending().await;
    }
    if matches!(fault, Some(Fault::Nonsense)) {
        let body = Full::new(Bytes::from_static(b"{\"data\": \"hunter2-canary\"}"));
        return Ok(Response::new(body));
    }
    let prefix = "/api/v1/namespaces/";
    let sent: Value = serde_json::from_slice(&body).unwrap_or_default();
    let mut steps: Vec<&str> = path
        .strip_prefix(prefix)
        .map(|rest| rest.split('/').collect())
        .unwrap_or_default();
    if method == "POST" {
        steps.extend(sent["metadata"]["name"].as_str());
    }
    let outcome = match steps.as_slice() {
        _ if !known => Err(refusal(401, "Unauthorized", "Unauthorized")),
        _ if method == "POST" && path == REVIEWS => match fault {
            Some(Fault::Answer(code)) => Err(refusal(code, "Forbidden", "no reviews for you")),
            _ => Ok(state.lock().unwrap().review(&sent)),
        },
        [namespace, "secrets", name] => {
            let mut state = state.lock().unwrap();
            match fault {
                Some(Fault::Answer(code)) => Err(refusal(code, "", format!("fault {code}"))),
                Some(Fault::Touched) => {
                    state.versions += 1;
                    let version = state.versions;
                    state.secrets.get_mut(*name).unwrap().version = version;
                    Ok(())
                }
                Some(Fault::Deleted) => {
                    state.secrets.remove(*name);
                    Ok(())
                }
                _ => Ok(()),
            }
            .and_then(|()| {
                if method == "GET" && *namespace != KubeApi::NAMESPACE {
                    return Err(refusal(
                        404,
                        "NotFound",
                        format!("secrets \"{name}\" not found"),
                    ));
                }
                if *namespace != KubeApi::NAMESPACE {
                    let mut refused = refusal(
                        404,
                        "NotFound",
                        format!("namespaces \"{namespace}\" not found"),
                    );
                    refused.details = json!({"kind": "namespaces", "name": namespace});
                    return Err(refused);
                }
                let kind = head.headers.get("content-type");
                let dry = query.get("dryRun") == Some(&"All");
                let manager = query.get("fieldManager").unwrap_or(&"");
                match method {
                    "GET" => state.get(name),
                    "POST" => state.replace(name, &sent, manager, "create", dry),
                    "PUT" => state.replace(name, &sent, manager, "update", dry),
                    "PATCH" if kind.is_some_and(|kind| kind == "application/apply-patch+yaml") => {
                        let force = query.get("force") == Some(&"true");
                        state.apply(name, &sent, manager, force, dry)
                    }
                    _ => Err(refusal(405, "MethodNotAllowed", "no such method here")),
                }
            })
        }
        _ => Err(refusal(404, "NotFound", "no such path here")),
    };
    Ok(match outcome {
        Ok(object) => response(200, &object),
        Err(refused) => response(
            refused.code,
            &json!({
                "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure",
                "code": refused.code, "reason": refused.reason, "message": refused.message,
                "details": refused.details,
            }),
        ),
    })
}

/// What `kubectl` asks for before it asks for a Secret.
fn discovery(path: &str) -> Option<Value> {
    match path {
        "/version" => Some(json!({"major": "1", "minor": "33", "gitVersion": "v1.33.0"})),
        "/api" => Some(json!({"kind": "APIVersions", "versions": ["v1"]})),
        "/apis" => Some(json!({"kind": "APIGroupList", "apiVersion": "v1", "groups": []})),
        "/api/v1" => Some(json!({
            "kind": "APIResourceList", "groupVersion": "v1", "resources": [{
                "name": "secrets", "singularName": "secret", "namespaced": true,
                "kind": "Secret", "verbs": ["get", "patch"],
            }],
        })),
        _ => None,
    }
}

fn response(code: u16, body: &Value) -> Response<Full<Bytes>> {
    Response::builder()
        .status(code)
        .header("content-type", "application/json")
        .body(Full::new(Bytes::from(body.to_string())))
        .unwrap()
}
