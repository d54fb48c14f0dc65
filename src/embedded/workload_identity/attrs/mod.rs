//! Attributes: what is known of the workload, of the calling user and of how it joined.
//!
//! A tree that follows the schema of the protocol's messages. A message that was not sent is
//! absent, which conditions and expressions treat differently, so the tree keeps the difference;
//! a field that was not sent inside of a message that was is its zero value, as in protobuf.

pub mod schema;

use std::collections::{BTreeMap, HashMap};

use serde_json::{Map, json};

use crate::pb::teleport::workloadidentity::v1 as wire;
use schema::{ATTRS, Field, JOIN, Kind, field};

/// The value of an attribute.
#[derive(Debug, Clone, PartialEq)]
pub enum Value {
    /// A string.
    Text(String),
    /// A boolean.
    Flag(bool),
    /// A number.
    Integer(i64),
    /// Strings by string.
    Map(BTreeMap<String, String>),
    /// A list of strings.
    List(Vec<String>),
    /// Lists of strings by name.
    Traits(BTreeMap<String, Vec<String>>),
    /// What only the audit log shows.
    Opaque(serde_json::Value),
    /// The fields of a message that were sent.
    Message(BTreeMap<&'static str, Value>),
}

/// What the tree holds at a path of the schema.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Found<'a> {
    /// This value.
    Value(&'a Value),
    /// The zero value: every message on the way was sent, the field was not.
    Zero,
    /// Nothing: a message on the way was not sent.
    Unset,
}

/// Facts about the calling user.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct UserFacts {
    /// The user's name, for a bot `bot-<name>`.
    pub name: String,
    /// Whether the user is a bot.
    pub is_bot: bool,
    /// The bot's name; empty for people.
    pub bot_name: String,
    /// The bot instance, a UUID; empty for people.
    pub bot_instance_id: String,
    /// Labels of the user resource.
    pub labels: BTreeMap<String, String>,
    /// Traits by name.
    pub traits: BTreeMap<String, Vec<String>>,
}

/// A join attribute in the caller's certificate is not of the type that the protocol says.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the join attribute {path} of the caller's certificate cannot be read")]
pub struct AttrsError {
    /// The attribute, dotted.
    pub path: String,
}

/// All attributes of one request.
#[derive(Debug, Clone, PartialEq)]
pub struct Attrs(Value);

impl Attrs {
    /// Puts together what the agent sent about the workload, the user, and the join attributes of
    /// the certificate (a JSON object with the protocol's field names, or `null`).
    ///
    /// # Errors
    /// [`AttrsError`]; join attributes that the protocol does not know are left out.
    pub fn new(
        workload: Option<&wire::WorkloadAttrs>,
        user: &UserFacts,
        join: &serde_json::Value,
    ) -> Result<Self, AttrsError> {
        let mut root = Fields::default();
        if let Some(workload) = workload {
            root.set("workload", workload_value(workload));
        }
        let mut facts = Fields::default();
        facts.text("name", &user.name);
        facts.flag("is_bot", user.is_bot);
        facts.text("bot_name", &user.bot_name);
        facts.text("bot_instance_id", &user.bot_instance_id);
        facts.map("labels", user.labels.iter());
        if !user.traits.is_empty() {
            facts.set("traits", Value::Traits(user.traits.clone()));
        }
        root.set("user", facts.message());
        if !join.is_null() {
            root.set("join", from_json(Kind::Message(JOIN), join, "join")?);
        }
        Ok(Self(root.message()))
    }

    /// What is at `path`, a list of field names of the schema.
    #[must_use]
    pub fn find(&self, path: &[&'static str]) -> Found<'_> {
        let mut at = &self.0;
        for (index, name) in path.iter().enumerate() {
            let Value::Message(fields) = at else {
                return Found::Unset;
            };
            match fields.get(name) {
                Some(value) => at = value,
                None if index + 1 == path.len() => return Found::Zero,
                None => return Found::Unset,
            }
        }
        Found::Value(at)
    }

    /// The attributes as an audit event shows them: fields with zero values left out, without
    /// what Sigstore attested, which is large and says nothing to a reader.
    #[must_use]
    pub fn audit_json(&self) -> serde_json::Value {
        let mut value = to_json(&self.0);
        if let Some(workload) = value.get_mut("workload").and_then(|w| w.as_object_mut()) {
            workload.remove("sigstore");
        }
        value
    }
}

/// A message under construction: zero values are left out.
#[derive(Default)]
struct Fields(BTreeMap<&'static str, Value>);

impl Fields {
    fn set(&mut self, name: &'static str, value: Value) {
        self.0.insert(name, value);
    }

    fn text(&mut self, name: &'static str, text: &str) {
        if !text.is_empty() {
            self.set(name, Value::Text(text.to_owned()));
        }
    }

    fn flag(&mut self, name: &'static str, flag: bool) {
        if flag {
            self.set(name, Value::Flag(true));
        }
    }

    fn integer(&mut self, name: &'static str, number: impl Into<i64>) {
        let number = number.into();
        if number != 0 {
            self.set(name, Value::Integer(number));
        }
    }

    fn map<'a>(
        &mut self,
        name: &'static str,
        entries: impl IntoIterator<Item = (&'a String, &'a String)>,
    ) {
        let map: BTreeMap<_, _> = entries
            .into_iter()
            .map(|(key, value)| (key.clone(), value.clone()))
            .collect();
        if !map.is_empty() {
            self.set(name, Value::Map(map));
        }
    }

    fn message(self) -> Value {
        Value::Message(self.0)
    }
}

fn workload_value(attrs: &wire::WorkloadAttrs) -> Value {
    let mut workload = Fields::default();
    if let Some(unix) = &attrs.unix {
        let mut fields = Fields::default();
        fields.flag("attested", unix.attested);
        fields.integer("pid", unix.pid);
        fields.integer("gid", unix.gid);
        fields.integer("uid", unix.uid);
        fields.text("binary_path", unix.binary_path());
        fields.text("binary_hash", unix.binary_hash());
        workload.set("unix", fields.message());
    }
    if let Some(kubernetes) = &attrs.kubernetes {
        let mut fields = Fields::default();
        fields.flag("attested", kubernetes.attested);
        fields.text("namespace", &kubernetes.namespace);
        fields.text("pod_name", &kubernetes.pod_name);
        fields.text("service_account", &kubernetes.service_account);
        fields.text("pod_uid", &kubernetes.pod_uid);
        fields.map("labels", &kubernetes.labels);
        if let Some(container) = &kubernetes.container {
            let none = HashMap::new();
            let (name, image) = (&container.name, &container.image);
            fields.set(
                "container",
                container_value(name, image, &none, &container.image_digest),
            );
        }
        workload.set("kubernetes", fields.message());
    }
    if let Some(podman) = &attrs.podman {
        let mut fields = Fields::default();
        fields.flag("attested", podman.attested);
        if let Some(it) = &podman.container {
            let container = container_value(&it.name, &it.image, &it.labels, &it.image_digest);
            fields.set("container", container);
        }
        if let Some(it) = &podman.pod {
            let mut pod = Fields::default();
            pod.text("name", &it.name);
            pod.map("labels", &it.labels);
            fields.set("pod", pod.message());
        }
        workload.set("podman", fields.message());
    }
    if let Some(docker) = &attrs.docker {
        let mut fields = Fields::default();
        fields.flag("attested", docker.attested);
        if let Some(it) = &docker.container {
            let container = container_value(&it.name, &it.image, &it.labels, &it.image_digest);
            fields.set("container", container);
        }
        workload.set("docker", fields.message());
    }
    if let Some(systemd) = &attrs.systemd {
        let mut fields = Fields::default();
        fields.flag("attested", systemd.attested);
        fields.text("service", &systemd.service);
        workload.set("systemd", fields.message());
    }
    if let Some(sigstore) = &attrs.sigstore {
        let mut fields = Fields::default();
        fields.set(
            "payloads",
            Value::Opaque(json!({"payload_count": sigstore.payloads.len()})),
        );
        workload.set("sigstore", fields.message());
    }
    workload.message()
}

fn container_value(
    name: &str,
    image: &str,
    labels: &HashMap<String, String>,
    digest: &str,
) -> Value {
    let mut fields = Fields::default();
    fields.text("name", name);
    fields.text("image", image);
    fields.map("labels", labels);
    fields.text("image_digest", digest);
    fields.message()
}

/// Reads what a field of `kind` may hold. Depth is bounded by the schema.
fn from_json(kind: Kind, value: &serde_json::Value, path: &str) -> Result<Value, AttrsError> {
    let malformed = || AttrsError {
        path: path.to_owned(),
    };
    let texts = |value: &serde_json::Value| -> Option<Vec<String>> {
        let texts = value.as_array()?.iter();
        texts.map(|text| Some(text.as_str()?.to_owned())).collect()
    };
    Ok(match kind {
        Kind::Text => Value::Text(value.as_str().ok_or_else(malformed)?.to_owned()),
        Kind::Flag => Value::Flag(value.as_bool().ok_or_else(malformed)?),
        // JSON of protobuf writes 64-bit numbers as strings.
        Kind::Integer => Value::Integer(
            value
                .as_i64()
                .or_else(|| value.as_str()?.parse().ok())
                .ok_or_else(malformed)?,
        ),
        Kind::List => Value::List(texts(value).ok_or_else(malformed)?),
        Kind::Map => {
            let entries = value.as_object().ok_or_else(malformed)?.iter();
            let entries = entries.map(|(key, text)| Some((key.clone(), text.as_str()?.to_owned())));
            Value::Map(entries.collect::<Option<_>>().ok_or_else(malformed)?)
        }
        Kind::Traits => {
            let entries = value.as_object().ok_or_else(malformed)?.iter();
            let entries = entries.map(|(key, list)| Some((key.clone(), texts(list)?)));
            Value::Traits(entries.collect::<Option<_>>().ok_or_else(malformed)?)
        }
        Kind::Opaque => Value::Opaque(value.clone()),
        Kind::Message(fields) => {
            let mut message = BTreeMap::new();
            for (name, value) in value.as_object().ok_or_else(malformed)? {
                let Some(Field { name, kind }) = field(fields, name) else {
                    continue;
                };
                if !value.is_null() {
                    message.insert(*name, from_json(*kind, value, &format!("{path}.{name}"))?);
                }
            }
            Value::Message(message)
        }
    })
}

fn to_json(value: &Value) -> serde_json::Value {
    match value {
        Value::Text(text) => json!(text),
        Value::Flag(flag) => json!(flag),
        Value::Integer(number) => json!(number),
        Value::Map(map) => json!(map),
        Value::List(list) => json!(list),
        Value::Traits(traits) => traits
            .iter()
            .map(|(key, values)| json!({"key": key, "values": values}))
            .collect(),
        Value::Opaque(value) => value.clone(),
        Value::Message(fields) => {
            let members: Map<_, _> = fields
                .iter()
                .filter(|(_, value)| !is_zero(value))
                .map(|(name, value)| ((*name).to_owned(), to_json(value)))
                .collect();
            serde_json::Value::Object(members)
        }
    }
}

fn is_zero(value: &Value) -> bool {
    match value {
        Value::Text(text) => text.is_empty(),
        Value::Flag(flag) => !flag,
        Value::Integer(number) => *number == 0,
        Value::Map(map) => map.is_empty(),
        Value::List(list) => list.is_empty(),
        Value::Traits(traits) => traits.is_empty(),
        Value::Opaque(_) | Value::Message(_) => false,
    }
}

/// A dotted path, resolved as far as fields of messages go.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Resolved<'p> {
    /// The names that the schema knows.
    pub names: Vec<&'static str>,
    /// The type of the last one.
    pub kind: Kind,
    /// What is left of the path.
    pub rest: Vec<&'p str>,
}

/// Resolves the names of a dotted path.
///
/// # Errors
/// The path up to the first name that the schema does not know.
pub fn resolve<'p>(path: &[&'p str]) -> Result<Resolved<'p>, String> {
    let mut names: Vec<&'static str> = Vec::new();
    let mut kind = Kind::Message(ATTRS);
    let mut rest = path.iter();
    while let Kind::Message(fields) = kind {
        let Some(name) = rest.next() else { break };
        let Some(found) = field(fields, name) else {
            let known = names.iter().map(|known| format!("{known}."));
            return Err(known.chain([(*name).to_owned()]).collect());
        };
        names.push(found.name);
        kind = found.kind;
    }
    Ok(Resolved {
        names,
        kind,
        rest: rest.copied().collect(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_audit_event_shows_what_a_real_cluster_recorded() {
        let user = UserFacts {
            name: "bot-example".into(),
            is_bot: true,
            bot_name: "example".into(),
            labels: BTreeMap::from([
                ("teleport.internal/bot".into(), "example".into()),
                ("teleport.internal/bot-generation".into(), "0".into()),
            ]),
            ..UserFacts::default()
        };
        let arn = "arn:aws:sts::123456789012:assumed-role/teleport-bot-role/i-0abc123";
        let join = json!({
            "iam": {"account": "123456789012", "arn": arn},
            "meta": {"join_method": "iam", "join_token_name": "example-bot"},
        });
        let attrs = Attrs::new(None, &user, &join).unwrap();
        assert_eq!(
            attrs.audit_json(),
            json!({
                "join": join,
                "user": {
                    "bot_name": "example",
                    "is_bot": true,
                    "labels": {
                        "teleport.internal/bot": "example",
                        "teleport.internal/bot-generation": "0",
                    },
                    "name": "bot-example",
                },
            })
        );
    }

    #[test]
    fn every_field_of_the_workload_arrives_under_its_name() {
        let labels = HashMap::from([("k".to_owned(), "v".to_owned())]);
        let container = wire::WorkloadAttrsDockerContainer {
            name: "n".into(),
            image: "i".into(),
            labels: labels.clone(),
            image_digest: "d".into(),
        };
        let workload = wire::WorkloadAttrs {
            unix: Some(wire::WorkloadAttrsUnix {
                attested: true,
                pid: 1,
                gid: 2,
                uid: u32::MAX,
                binary_path: Some("p".into()),
                binary_hash: Some("h".into()),
            }),
            kubernetes: Some(wire::WorkloadAttrsKubernetes {
                attested: true,
                namespace: "ns".into(),
                pod_name: "pn".into(),
                service_account: "sa".into(),
                pod_uid: "pu".into(),
                labels: labels.clone(),
                container: Some(wire::WorkloadAttrsKubernetesContainer {
                    name: "n".into(),
                    image: "i".into(),
                    image_digest: "d".into(),
                }),
            }),
            podman: Some(wire::WorkloadAttrsPodman {
                attested: true,
                container: Some(wire::WorkloadAttrsPodmanContainer {
                    name: "n".into(),
                    ..Default::default()
                }),
                pod: Some(wire::WorkloadAttrsPodmanPod {
                    name: "pod".into(),
                    labels,
                }),
            }),
            docker: Some(wire::WorkloadAttrsDocker {
                attested: true,
                container: Some(container),
            }),
            systemd: Some(wire::WorkloadAttrsSystemd {
                attested: true,
                service: "web".into(),
            }),
            sigstore: Some(wire::WorkloadAttrsSigstore { payloads: vec![] }),
        };
        let attrs = Attrs::new(Some(&workload), &UserFacts::default(), &json!(null)).unwrap();
        assert_eq!(
            attrs.audit_json()["workload"],
            json!({
                "unix": {"attested": true, "pid": 1, "gid": 2, "uid": u32::MAX,
                         "binary_path": "p", "binary_hash": "h"},
                "kubernetes": {"attested": true, "namespace": "ns", "pod_name": "pn",
                               "service_account": "sa", "pod_uid": "pu", "labels": {"k": "v"},
                               "container": {"name": "n", "image": "i", "image_digest": "d"}},
                "podman": {"attested": true, "container": {"name": "n"},
                           "pod": {"name": "pod", "labels": {"k": "v"}}},
                "docker": {"attested": true,
                           "container": {"name": "n", "image": "i", "labels": {"k": "v"},
                                         "image_digest": "d"}},
                "systemd": {"attested": true, "service": "web"},
            })
        );
    }

    #[test]
    fn unset_messages_and_zero_fields_differ() {
        let workload = wire::WorkloadAttrs {
            unix: Some(wire::WorkloadAttrsUnix::default()),
            ..Default::default()
        };
        let attrs = Attrs::new(Some(&workload), &UserFacts::default(), &json!(null)).unwrap();
        assert_eq!(attrs.find(&["workload", "unix", "pid"]), Found::Zero);
        assert_eq!(
            attrs.find(&["workload", "systemd", "service"]),
            Found::Unset
        );
        assert_eq!(attrs.find(&["join", "iam", "arn"]), Found::Unset);
        assert!(matches!(attrs.find(&["user"]), Found::Value(_)));
    }

    #[test]
    fn join_attributes_are_read_by_the_schema() {
        let join = json!({
            "gitlab": {"runner_id": "12", "ref_protected": true, "ref": null, "unheard_of": 1},
            "circleci": {"context_ids": ["a"]},
            "generic_oidc": {"claims": {"a": [1]}},
        });
        let attrs = Attrs::new(None, &UserFacts::default(), &join).unwrap();
        assert_eq!(
            attrs.find(&["join", "gitlab", "runner_id"]),
            Found::Value(&Value::Integer(12))
        );
        assert_eq!(attrs.find(&["join", "gitlab", "ref"]), Found::Zero);
        assert_eq!(
            attrs.audit_json()["join"]["generic_oidc"]["claims"],
            json!({"a": [1]})
        );
        for (join, path) in [
            (json!({"iam": {"arn": 1}}), "join.iam.arn"),
            (json!({"iam": []}), "join.iam"),
            (
                json!({"gitlab": {"ref_protected": "x"}}),
                "join.gitlab.ref_protected",
            ),
            (json!([]), "join"),
        ] {
            let error = Attrs::new(None, &UserFacts::default(), &join).unwrap_err();
            assert_eq!(error.path, path);
        }
    }

    #[test]
    fn paths_resolve_to_leaves_and_leftovers() {
        let found = resolve(&["workload", "kubernetes", "labels", "app"]).unwrap();
        assert_eq!(found.names, ["workload", "kubernetes", "labels"]);
        assert_eq!((found.kind, found.rest), (Kind::Map, vec!["app"]));
        assert_eq!(resolve(&["join", "nomad", "x"]).unwrap_err(), "join.nomad");
        assert!(matches!(
            resolve(&["workload"]).unwrap().kind,
            Kind::Message(_)
        ));
    }
}
