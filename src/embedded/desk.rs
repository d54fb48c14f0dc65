//! Resources over gRPC: read and written by whom a role lets.
//!
//! What comes is checked as a file of `tbot cluster create` is, and recorded by the same events.
//! Unlike there, a bot calls with its certificate, and its roles say what it may (`allow.rules`).

use std::sync::Arc;

use prost_types::Timestamp;
use serde_json::{Map, Value, json};
use tonic::{Request, Response, Status};

use super::ClusterState;
use super::access::Access;
use super::auth::{Refusal, authorize, blocking, caller};
use super::caller::{Caller, TlsIdentity};
use super::instant::{from_wire, rfc3339};
use super::resources::{self, Verb};
use super::store::{Put, Resource, StoreError};
use crate::pb::teleport::header::v1::Metadata;

/// The most resources of one page, and how many come if the request does not say.
const PAGE: usize = 1000;
/// The size from which on a page is full, in bytes: clients read messages of 4 MiB.
const FULL_PAGE: usize = 1024 * 1024;

/// The parts of a message that all resources have.
#[derive(Debug, Default)]
pub(super) struct Head {
    pub(super) kind: String,
    pub(super) sub_kind: String,
    pub(super) version: String,
    pub(super) metadata: Option<Metadata>,
}

/// How a resource is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Write {
    /// There must be none yet.
    Create,
    /// Its revision must be the one that is there.
    Update,
    /// Whatever is there.
    Upsert,
}

/// What one caller does with resources of one kind. All of it waits for the disk.
#[derive(Debug)]
pub(super) struct Desk<'a> {
    pub(super) state: &'a ClusterState,
    pub(super) caller: &'a Caller,
    pub(super) kind: &'static str,
}

/// Does `work` on resources of `kind` for the caller of a request, off the async threads.
pub(super) async fn serve<Q, T, E>(
    state: &Arc<ClusterState>,
    kind: &'static str,
    request: Request<Q>,
    work: impl FnOnce(Desk<'_>, Q) -> Result<T, E> + Send + 'static,
) -> Result<Response<T>, Status>
where
    Q: Send + 'static,
    T: Send + 'static,
    E: From<Refusal> + Into<Status> + Send + 'static,
{
    let (caller, state) = (caller(&request)?, Arc::clone(state));
    let done = blocking(move || {
        let desk = Desk {
            state: &state,
            caller: &caller,
            kind,
        };
        work(desk, request.into_inner())
    });
    done.await.map(Response::new).map_err(Into::into)
}

/// Lets a caller through whose roles allow each of `verbs` on resources of `kind`.
pub(super) fn admit(
    state: &ClusterState,
    caller: &Caller,
    kind: &str,
    verbs: &[&str],
) -> Result<(TlsIdentity, Access), Refusal> {
    let (identity, access) = known(state, caller)?;
    match verbs.iter().find(|verb| !access.may(kind, verb)) {
        None => Ok((identity, access)),
        Some(verb) => Err(Refusal::denied(format!(
            "access denied to perform action {verb:?} on {kind:?}: give the bot a role that allows it"
        ))),
    }
}

/// Lets every caller through unless a role denies one of `verbs` on resources of `kind`: what
/// all roles of a Teleport cluster allow without saying so.
pub(super) fn admit_all(
    state: &ClusterState,
    caller: &Caller,
    kind: &str,
    verbs: &[&str],
) -> Result<(), Refusal> {
    let (_, access) = known(state, caller)?;
    match verbs.iter().find(|verb| access.denies(kind, verb)) {
        None => Ok(()),
        Some(verb) => Err(Refusal::denied(format!(
            "access denied to perform action {verb:?} on {kind:?}: a role of the bot denies it"
        ))),
    }
}

fn known(state: &ClusterState, caller: &Caller) -> Result<(TlsIdentity, Access), Refusal> {
    let identity = authorize(state, caller)?;
    let access = state
        .store
        .transaction(|tx| Access::of(tx, &identity.roles))?;
    Ok((identity, access))
}

impl Desk<'_> {
    /// A resource as a message brought it, checked.
    pub(super) fn read(&self, head: Head, spec: Value) -> Result<Resource, Refusal> {
        if head.kind != self.kind {
            let text = format!("kind: must be {:?}, not {:?}", self.kind, head.kind);
            return Err(Refusal::bad_parameter(text));
        }
        let metadata = head.metadata.unwrap_or_default();
        let expires = match metadata.expires.map(from_wire) {
            None => Value::Null,
            Some(Some(time)) => rfc3339(time).into(),
            Some(None) => {
                let text = "metadata.expires: is no point in time";
                return Err(Refusal::bad_parameter(text));
            }
        };
        let mut parts = Map::from_iter([
            ("name".to_owned(), json!(metadata.name)),
            ("description".to_owned(), json!(metadata.description)),
            ("labels".to_owned(), json!(metadata.labels)),
            ("expires".to_owned(), expires),
        ]);
        parts.retain(|_, value| !value.is_null());
        let document = json!({
            "kind": head.kind,
            "sub_kind": head.sub_kind,
            "version": head.version,
            "metadata": parts,
            "spec": spec,
        });
        // JSON is YAML, so this is a file with one document.
        let now = Some(self.state.clock.now());
        let parsed = resources::parse("request", &document.to_string(), now);
        let mut parsed = parsed.map_err(|error| Refusal::bad_parameter(error.to_string()))?;
        let resource = parsed.pop();
        let mut resource =
            resource.ok_or_else(|| Refusal::bad_parameter("there is no resource"))?;
        resource.revision = metadata.revision;
        Ok(resource)
    }

    /// Writes the resource that `read` brings, if the caller may.
    pub(super) fn write<E: Into<Status>>(
        &self,
        how: Write,
        read: impl FnOnce() -> Result<Resource, E>,
    ) -> Result<Resource, Status> {
        let verbs: &[&str] = match how {
            Write::Create => &["create"],
            Write::Update => &["update"],
            Write::Upsert => &["create", "update"],
        };
        let (identity, _) = admit(self.state, self.caller, self.kind, verbs)?;
        let resource = read().map_err(Into::into)?;
        let put = match how {
            Write::Create => Put::Create,
            Write::Update => Put::Update {
                revision: resource.revision.clone(),
            },
            Write::Upsert => Put::Upsert,
        };
        let written = self.state.store.put(resource, &put).map_err(status)?;
        let verb = match how {
            Write::Create | Write::Upsert => Verb::Create,
            Write::Update => Verb::Update,
        };
        self.record(&identity, verb, &written);
        Ok(written)
    }

    /// The resource of this name, if the caller may read it.
    pub(super) fn get(&self, name: &str) -> Result<Resource, Refusal> {
        admit(self.state, self.caller, self.kind, &["read"])?;
        self.find(name)
    }

    /// The resource of this name, whoever asks.
    pub(super) fn find(&self, name: &str) -> Result<Resource, Refusal> {
        let found = self.state.store.get(self.kind, name)?;
        found.ok_or_else(|| self.missing(name))
    }

    /// One page by name, and the token of the next one: the name that it begins with.
    pub(super) fn page<M: prost::Message>(
        &self,
        size: i32,
        token: &str,
        message: impl Fn(&Resource) -> Result<M, Status>,
    ) -> Result<(Vec<M>, String), Status> {
        admit(self.state, self.caller, self.kind, &["read", "list"])?;
        let most = match usize::try_from(size) {
            Ok(0) | Err(_) => PAGE,
            Ok(size) => size.min(PAGE),
        };
        let (mut page, mut next, mut bytes) = (Vec::new(), String::new(), 0);
        let mut problem = None;
        self.state
            .store
            .transaction(|tx| {
                tx.each_from(self.kind, token, |resource| {
                    if page.len() == most || bytes >= FULL_PAGE {
                        next = resource.name;
                        return false;
                    }
                    match message(&resource) {
                        Ok(message) => {
                            bytes += message.encoded_len();
                            page.push(message);
                        }
                        Err(status) => problem = Some(status),
                    }
                    problem.is_none()
                })
            })
            .map_err(Refusal::from)?;
        match problem {
            None => Ok((page, next)),
            Some(status) => Err(status),
        }
    }

    /// Removes the resource of this name, if the caller may.
    pub(super) fn delete(&self, name: &str) -> Result<(), Refusal> {
        let (identity, _) = admit(self.state, self.caller, self.kind, &["delete"])?;
        if !self.state.store.delete(self.kind, name)? {
            return Err(self.missing(name));
        }
        let gone = Resource {
            kind: self.kind.to_owned(),
            name: name.to_owned(),
            ..Resource::default()
        };
        self.record(&identity, Verb::Delete, &gone);
        Ok(())
    }

    fn missing(&self, name: &str) -> Refusal {
        Refusal::not_found(format!("{} {name:?} is not found", self.kind))
    }

    fn record(&self, identity: &TlsIdentity, verb: Verb, resource: &Resource) {
        let event = resources::event(resource, verb, &identity.user);
        if let Some(Value::Object(mut event)) = event {
            event.extend(who(self.caller, identity));
            self.state.audit.emit(event);
        }
    }
}

fn status(error: StoreError) -> Status {
    let text = error.to_string();
    match error {
        StoreError::Exists { .. } => Status::already_exists(text),
        StoreError::NotFound { .. } => Status::not_found(text),
        StoreError::Conflict { .. } => Status::failed_precondition(text),
        other => Refusal::from(other).into(),
    }
}

/// Who calls, as audit events say it.
pub(super) fn who(caller: &Caller, identity: &TlsIdentity) -> Map<String, Value> {
    let kind = if identity.bot_name.is_empty() { 1 } else { 2 };
    let mut members = Map::from_iter([("user_kind".to_owned(), json!(kind))]);
    for (key, text) in [
        ("addr.remote", caller.addr.to_string()),
        ("user", identity.user.clone()),
        ("impersonator", identity.impersonator.clone()),
        ("bot_name", identity.bot_name.clone()),
        ("bot_instance_id", identity.bot_instance_id.clone()),
    ] {
        if !text.is_empty() {
            members.insert(key.to_owned(), json!(text));
        }
    }
    members
}

/// The metadata of a resource on the wire.
pub(super) fn metadata(resource: &Resource) -> Metadata {
    Metadata {
        name: resource.name.clone(),
        description: resource.description.clone(),
        labels: resource.labels.clone().into_iter().collect(),
        expires: resource.expires.map(Timestamp::from),
        revision: resource.revision.clone(),
        ..Metadata::default()
    }
}
