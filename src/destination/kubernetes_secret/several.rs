//! Secrets that another program finds by their labels, such as Argo CD's clusters: each file of a set
//! is the manifest of one, named like it.
//!
//! The reader edits them too. So each is read, changed where the manifest says something, and replaced
//! under the version that was read; what others put there stays.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::path::Path;
use std::sync::Arc;

use async_trait::async_trait;
use k8s_openapi::ByteString;
use k8s_openapi::api::core::v1::Secret as Object;
use kube::api::{ObjectMeta, PostParams};

use super::client::{self, Access, Connection, Verb, Way, answered, get};
use super::object::{MANAGER, OPAQUE, check_size, own, suitable};
use super::place::{ATTEMPTS, Refusal};
use super::{name_problem, namespace_problem};
use crate::destination::{Destination, DestinationError, DestinationPlan, FileSet, Lock};
use crate::env::Env;
use crate::secret::Secret;
use crate::yaml::{Fields, Tree};

/// What RBAC has to grant.
const VERBS: &str = "get, create, update";
/// The namespace where nothing names one.
const NAMESPACE: &str = "default";
/// How the operation is recorded that replaces an object.
const OPERATION: &str = "Update";
/// The name after the prefix of a Secret that is never made, to see whether one could be.
const WRITE_TEST: &str = "write-test";

/// The file that stands for a Secret with these labels, annotations and data.
pub(crate) fn manifest(
    labels: BTreeMap<String, String>,
    annotations: BTreeMap<String, String>,
    data: BTreeMap<String, Vec<u8>>,
) -> Result<Secret<Vec<u8>>, serde_json::Error> {
    let data = data
        .into_iter()
        .map(|(key, value)| (key, ByteString(value)));
    let object = Object {
        metadata: ObjectMeta {
            labels: Some(labels),
            annotations: Some(annotations),
            ..ObjectMeta::default()
        },
        data: Some(data.collect()),
        ..Object::default()
    };
    Ok(Secret::new(serde_json::to_vec(&object)?))
}

/// Where they are: the keys `secret_namespace` and `secret_name_prefix` of a service.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Secrets {
    namespace: Option<String>,
    prefix: String,
}

impl Secrets {
    /// Reads the keys; problems go to `fields`.
    pub(crate) fn read(fields: &mut Fields<'_>, default_prefix: &str) -> Option<Self> {
        let namespace = fields.string("secret_namespace");
        let prefix = fields.string("secret_name_prefix");
        let secrets = Self {
            namespace,
            prefix: prefix.unwrap_or_else(|| default_prefix.to_owned()),
        };
        let namespace = secrets.namespace.as_deref().and_then(namespace_problem);
        // The longest and the plainest of all names.
        let name = name_problem(&secrets.name(&"0".repeat(16)));
        let problems = [
            ("secret_namespace", namespace),
            ("secret_name_prefix", name),
        ];
        let mut good = true;
        for (key, problem) in problems {
            if let Some(problem) = problem {
                fields.error(key, problem, None);
                good = false;
            }
        }
        good.then_some(secrets)
    }

    /// The name of the Secret that ends in `suffix`.
    pub(crate) fn name(&self, suffix: &str) -> String {
        format!("{}.{suffix}", self.prefix)
    }
}

impl fmt::Display for Secrets {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("kubernetes secrets: ")?;
        if let Some(namespace) = &self.namespace {
            write!(f, "{namespace}/")?;
        }
        f.write_str(&self.name("*"))
    }
}

impl DestinationPlan for Secrets {
    fn key(&self) -> String {
        let namespace = self.namespace.as_deref().unwrap_or_default();
        format!("kubernetes-secret://{namespace}/{}", self.name("*"))
    }

    /// The keys, for the service's own section.
    fn emit(&self) -> Tree {
        Tree::map([
            ("secret_namespace", self.namespace.as_ref().map(Tree::text)),
            ("secret_name_prefix", Some(Tree::text(&self.prefix))),
        ])
    }

    fn has_folders(&self) -> bool {
        false
    }

    fn build(&self) -> Arc<dyn Destination> {
        let env = Env::of_process();
        let namespace = self.namespace.as_deref().or(env.get("POD_NAMESPACE"));
        let way = Way {
            namespace: Some(namespace.unwrap_or(NAMESPACE).to_owned()),
            ..Way::default()
        };
        Arc::new(Several {
            secrets: self.clone(),
            connection: Connection::new(way, env, VERBS),
        })
    }
}

/// The Secrets at work.
struct Several {
    secrets: Secrets,
    connection: Connection,
}

impl fmt::Debug for Several {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Several").field(&self.secrets).finish()
    }
}

impl Several {
    async fn with<T, F: Future<Output = Result<T, String>>>(
        &self,
        work: impl FnOnce(Access) -> F,
    ) -> Result<T, DestinationError> {
        let outcome = self.connection.with(work).await;
        outcome.map_err(|problem| DestinationError::Unsuitable {
            path: self.secrets.to_string(),
            problem,
        })
    }
}

/// Reads the Secret, changes what is to be changed and replaces it; begins anew if someone else was
/// faster.
async fn put(access: &Access, name: &str, content: &Secret<Vec<u8>>) -> Result<(), String> {
    let wanted: Object = serde_json::from_slice(content.expose())
        .map_err(|_unreadable| "the file is no manifest of a Secret".to_owned())?;
    let mut last = String::new();
    for _ in 0..ATTEMPTS {
        let live = get(access, name).await?;
        let exists = live.is_some();
        let next = merged(live, &wanted, name, &access.namespace)?;
        match replace(access, &next, exists, false).await {
            Ok(()) => return Ok(()),
            Err(Refusal::Stale(problem)) => last = problem,
            Err(Refusal::Final(problem)) => return Err(problem),
        }
    }
    Err(last)
}

/// Replaces `object`, or makes it; `dry` keeps nothing.
async fn replace(access: &Access, object: &Object, exists: bool, dry: bool) -> Result<(), Refusal> {
    let params = PostParams {
        dry_run: dry,
        field_manager: Some(MANAGER.to_owned()),
    };
    let name = object.metadata.name.as_deref().unwrap_or_default();
    let (verb, sent) = if exists {
        let sent = answered(access.api.replace(name, &params, object)).await;
        (Verb::Update, sent)
    } else {
        (
            Verb::Make,
            answered(access.api.create(&params, object)).await,
        )
    };
    match sent.map_err(Refusal::Final)? {
        Ok(_kept) => Ok(()),
        Err(kube::Error::Api(status)) => {
            let problem = client::refused(&status, verb, access);
            // It was there when it was read, or was not.
            let stale = status.code == 409 || (status.code == 404 && exists);
            Err(if stale {
                Refusal::Stale(problem)
            } else {
                Refusal::Final(problem)
            })
        }
        Err(error) => Err(Refusal::Final(client::unanswered(&error))),
    }
}

/// The object to send: `live` with what `wanted` says, and without what earlier manifests said and
/// this one does not.
fn merged(
    live: Option<Object>,
    wanted: &Object,
    name: &str,
    namespace: &str,
) -> Result<Object, String> {
    let mut next = match live {
        Some(live) => {
            suitable(&live)?;
            live
        }
        None => Object {
            metadata: ObjectMeta {
                name: Some(name.to_owned()),
                namespace: Some(namespace.to_owned()),
                ..ObjectMeta::default()
            },
            type_: Some(OPAQUE.to_owned()),
            ..Object::default()
        },
    };
    let [labels, annotations, data] = [
        ["f:metadata", "f:labels"].as_slice(),
        &["f:metadata", "f:annotations"],
        &["f:data"],
    ]
    .map(|path| {
        let own = own(&next, OPERATION, path);
        own.into_iter().map(str::to_owned).collect::<BTreeSet<_>>()
    });
    update(
        &mut next.metadata.labels,
        &labels,
        wanted.metadata.labels.as_ref(),
    );
    update(
        &mut next.metadata.annotations,
        &annotations,
        wanted.metadata.annotations.as_ref(),
    );
    update(&mut next.data, &data, wanted.data.as_ref());
    check_size(None, next.data.as_ref().unwrap_or(&BTreeMap::new()))?;
    Ok(next)
}

/// Takes the `own` entries out of `map` and puts the `wanted` ones in.
fn update<V: Clone>(
    map: &mut Option<BTreeMap<String, V>>,
    own: &BTreeSet<String>,
    wanted: Option<&BTreeMap<String, V>>,
) {
    let map = map.get_or_insert_default();
    map.retain(|key, _| !own.contains(key));
    let wanted = wanted.into_iter().flatten();
    map.extend(wanted.map(|(key, value)| (key.clone(), value.clone())));
}

#[async_trait]
impl Destination for Several {
    async fn init(&self) -> Result<(), DestinationError> {
        self.check_writable().await
    }

    /// Makes a Secret without keeping it: the way, the credentials, the namespace and the right to
    /// make one are asked. What the names are is not known yet.
    async fn check_writable(&self) -> Result<(), DestinationError> {
        let name = self.secrets.name(WRITE_TEST);
        self.with(async |access| {
            let test = merged(None, &Object::default(), &name, &access.namespace)?;
            match replace(&access, &test, false, true).await {
                Ok(()) | Err(Refusal::Stale(_)) => Ok(()),
                Err(Refusal::Final(problem)) => Err(problem),
            }
        })
        .await
    }

    /// Each for itself: one that cannot be written keeps no other from it.
    async fn write(&self, files: FileSet) -> Result<(), DestinationError> {
        self.with(async |access| {
            let mut problems = Vec::new();
            for (name, content) in &files {
                if let Err(problem) = put(&access, name, content).await {
                    problems.push(format!("{name}: {problem}"));
                }
            }
            if problems.is_empty() {
                return Ok(());
            }
            Err(format!(
                "{} of {} not written: {}",
                problems.len(),
                files.len(),
                problems.join("; ")
            ))
        })
        .await
    }

    /// The manifest of what is there, with what others added.
    async fn read(&self, name: &str) -> Result<Option<Secret<Vec<u8>>>, DestinationError> {
        self.with(async |access| {
            let Some(found) = get(&access, name).await? else {
                return Ok(None);
            };
            let data = found.data.unwrap_or_default();
            let file = manifest(
                found.metadata.labels.unwrap_or_default(),
                found.metadata.annotations.unwrap_or_default(),
                data.into_iter()
                    .map(|(key, value)| (key, value.0))
                    .collect(),
            );
            file.map(Some).map_err(|error| error.to_string())
        })
        .await
    }

    fn lock(&self) -> Result<Option<Box<dyn Lock>>, DestinationError> {
        Ok(None)
    }

    fn is_persistent(&self) -> bool {
        false
    }

    fn directory(&self) -> Option<&Path> {
        None
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn wanted(keys: &[&str]) -> Object {
        let of = |value: &str| {
            keys.iter()
                .map(|key| ((*key).into(), value.into()))
                .collect()
        };
        let data = keys.iter().map(|key| ((*key).into(), b"new".to_vec()));
        let file = manifest(of("new"), of("new"), data.collect()).unwrap();
        serde_json::from_slice(file.expose()).unwrap()
    }

    #[test]
    fn a_new_one_is_what_the_manifest_says() {
        let made = merged(None, &wanted(&["name"]), "p.1", "ns").unwrap();
        assert_eq!(
            serde_json::to_value(made).unwrap(),
            json!({
                "apiVersion": "v1", "kind": "Secret", "type": "Opaque",
                "metadata": {"name": "p.1", "namespace": "ns", "labels": {"name": "new"},
                             "annotations": {"name": "new"}},
                "data": {"name": "bmV3"},
            })
        );
    }

    #[test]
    fn what_others_added_stays_and_what_this_agent_gave_up_goes() {
        let all = json!({"name": "b2xk", "project": "b2xk", "shared": "b2xk", "theirs": "b2xk"});
        let held = |keys: &[&str]| {
            let fields: BTreeMap<_, _> = keys
                .iter()
                .map(|key| (format!("f:{key}"), json!({})))
                .collect();
            json!({"f:data": fields, "f:metadata": {"f:labels": fields, "f:annotations": fields}})
        };
        let live: Object = serde_json::from_value(json!({
            "metadata": {
                "name": "p.1", "resourceVersion": "7", "labels": all, "annotations": all,
                "managedFields": [
                    {"manager": "tbot", "operation": "Update", "fieldsV1": held(&["name", "project", "shared"])},
                    {"manager": "argocd", "operation": "Update", "fieldsV1": held(&["shared", "theirs"])},
                ],
            },
            "data": all, "type": "Opaque",
        }))
        .unwrap();
        let next = merged(
            Some(live.clone()),
            &wanted(&["name", "server"]),
            "p.1",
            "ns",
        )
        .unwrap();
        let left = ["name", "server", "shared", "theirs"];
        let labels: Vec<_> = next.metadata.labels.iter().flatten().collect();
        let keys = |of: Option<&BTreeMap<String, String>>| -> Vec<String> {
            of.unwrap().keys().cloned().collect()
        };
        assert_eq!(keys(next.metadata.labels.as_ref()), left);
        assert_eq!(keys(next.metadata.annotations.as_ref()), left);
        let data = next.data.as_ref().unwrap();
        assert_eq!(data.keys().collect::<Vec<_>>(), left);
        assert_eq!(
            labels.iter().filter(|(_, value)| *value == "new").count(),
            2
        );
        assert_eq!(next.metadata.resource_version.as_deref(), Some("7"));

        let immutable = Object {
            immutable: Some(true),
            ..live
        };
        let refused = merged(Some(immutable), &wanted(&[]), "p.1", "ns").unwrap_err();
        assert!(refused.contains("immutable"), "{refused}");
    }
}
