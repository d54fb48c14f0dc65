//! Resource files as `tctl create` takes them: several YAML documents, each a kind, its metadata
//! and its spec.
//!
//! [`parse`] checks a whole file and reports everything that is wrong with it at once, with
//! places. What it accepts is what a Teleport 18.0.0 cluster accepts, with two differences: an
//! expiry in the past is refused instead of ignored, and so is a rule that this cluster would not
//! enforce. [`apply`](apply()) writes parsed resources and everything that follows from them.

mod apply;
mod bot;
mod issuer_override;
mod lock;
mod reconcile;
mod revocation;
mod role;
mod served;
mod spiffe_federation;
mod token;
mod user;
mod workload_identity;

use std::time::SystemTime;

use serde_json::{Map, Value, json};

use super::instant::{parse_rfc3339, rfc3339};
use super::store::Resource;
use crate::join::verify::set;
use crate::yaml::{self, Fields, Node, Problems, Severity};

pub use apply::{Applied, ApplyError, Mode, SPENT_BY, apply, remove, seed, spent};
pub(super) use apply::{Verb, event};
pub use bot::user_name as bot_user_name;
pub use reconcile::{Change, reconcile};
pub(in crate::embedded) use role::labels as selector;
pub use served::is_label_key;
pub use token::safe_name;

/// A resource file that cannot be used.
#[derive(Debug, thiserror::Error)]
#[error("{lines}")]
pub struct Rejected {
    /// One line for each problem: `file:line:column: error: kind "name" path: cause (remedy)`.
    pub lines: String,
}

/// Why the resources of a file were not created; nothing was changed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CreateError {
    /// The file is wrong.
    #[error(transparent)]
    Rejected(#[from] Rejected),
    /// The cluster refused or failed.
    #[error(transparent)]
    Apply(#[from] ApplyError),
}

/// What the cluster knows about one kind of resource.
struct Kind {
    name: &'static str,
    /// Versions that are read; the first one is the default.
    versions: &'static [&'static str],
    /// Checks the spec and writes defaults and normal forms into `resource.spec`, which holds the
    /// spec of the file.
    check: fn(&mut Fields<'_>, &mut Resource),
}

/// The kinds that files may hold, by name.
const KINDS: &[Kind] = &[
    Kind {
        name: "app",
        versions: &["v3"],
        check: served::check_app,
    },
    Kind {
        name: "bot",
        versions: &["v1"],
        check: bot::check,
    },
    Kind {
        name: "db",
        versions: &["v3"],
        check: served::check_database,
    },
    Kind {
        name: "kube_cluster",
        versions: &["v3"],
        check: served::check_kube_cluster,
    },
    Kind {
        name: "lock",
        versions: &["v2"],
        check: lock::check,
    },
    Kind {
        name: "node",
        versions: &["v2"],
        check: served::check_node,
    },
    Kind {
        name: "role",
        versions: &["v8", "v7", "v6", "v5", "v4", "v3"],
        check: role::check,
    },
    Kind {
        name: "spiffe_federation",
        versions: &["v1"],
        check: spiffe_federation::check,
    },
    Kind {
        name: "token",
        versions: &["v2"],
        check: token::check,
    },
    Kind {
        name: "user",
        versions: &["v2"],
        check: user::check,
    },
    Kind {
        name: "workload_identity",
        versions: &["v1"],
        check: workload_identity::check,
    },
    Kind {
        name: "workload_identity_x509_issuer_override",
        versions: &["v1"],
        check: issuer_override::check,
    },
    Kind {
        name: "workload_identity_x509_revocation",
        versions: &["v1"],
        check: revocation::check,
    },
];

/// Kinds that the cluster makes by itself: they can be read, but not created from files.
const DERIVED: &[&str] = &["bot_instance"];

/// Every kind that may be read by people, and the short forms that `tctl` knows.
const ALIASES: &[(&str, &str)] = &[
    ("apps", "app"),
    ("bots", "bot"),
    ("bot_instances", "bot_instance"),
    ("databases", "db"),
    ("dbs", "db"),
    ("kube_clusters", "kube_cluster"),
    ("locks", "lock"),
    ("nodes", "node"),
    ("roles", "role"),
    ("spiffe_federations", "spiffe_federation"),
    ("tokens", "token"),
    ("users", "user"),
    ("workload_identities", "workload_identity"),
    (
        "workload_identity_x509_issuer_overrides",
        "workload_identity_x509_issuer_override",
    ),
    (
        "workload_identity_x509_revocations",
        "workload_identity_x509_revocation",
    ),
];

/// The kind that `word` names, also in the plural; `None` if there is no such kind to be read.
///
/// Authorities are not among them: their specs hold private keys.
#[must_use]
pub fn readable_kind(word: &str) -> Option<&'static str> {
    let word = ALIASES
        .iter()
        .find(|(alias, _)| *alias == word)
        .map_or(word, |(_, kind)| kind);
    readable_kinds().find(|kind| *kind == word)
}

/// Every kind that may be read by people.
pub fn readable_kinds() -> impl Iterator<Item = &'static str> {
    KINDS
        .iter()
        .map(|kind| kind.name)
        .chain(DERIVED.iter().copied())
}

/// Reads all documents of `text`, which came from `file` (any name, for messages).
///
/// Expiries that are past by `now` are refused; none are if it is `None`.
pub fn parse(file: &str, text: &str, now: Option<SystemTime>) -> Result<Vec<Resource>, Rejected> {
    let documents = yaml::parse_all(text).map_err(|problem| Rejected {
        lines: problem.render(file),
    })?;
    let mut resources = Vec::new();
    let mut lines = Vec::new();
    for node in documents
        .iter()
        .filter(|node| node.value != yaml::Value::Null)
    {
        // What the agent's configuration only warns of, a cluster refuses: a misspelt key in a rule must
        // not widen it.
        let problems = Problems::strict();
        let resource = document(node, &problems, now);
        let title = title(node);
        for mut problem in problems.into_sorted() {
            problem.path = match problem.path.as_str() {
                "" => title.clone(),
                path => format!("{title} {path}"),
            };
            if problem.severity == Severity::Warning {
                tracing::warn!("{}", problem.render(file));
                continue;
            }
            lines.push(problem.render(file));
        }
        resources.extend(resource);
    }
    if !lines.is_empty() {
        return Err(Rejected {
            lines: lines.join("\n"),
        });
    }
    if resources.is_empty() {
        return Err(Rejected {
            lines: format!("{file}: error: there is no resource in this file"),
        });
    }
    Ok(resources)
}

/// Reads several files, given as name and text; reports what is wrong with any of them.
pub fn parse_files(
    files: &[(String, String)],
    now: Option<SystemTime>,
) -> Result<Vec<Resource>, Rejected> {
    let mut resources = Vec::new();
    let mut lines = Vec::new();
    for (file, text) in files {
        match parse(file, text, now) {
            Ok(parsed) => resources.extend(parsed),
            Err(rejected) => lines.push(rejected.lines),
        }
    }
    if lines.is_empty() {
        Ok(resources)
    } else {
        let lines = lines.join("\n");
        Err(Rejected { lines })
    }
}

/// The resource as `tctl get` shows it.
#[must_use]
pub fn view(resource: &Resource) -> Value {
    let mut metadata = Map::new();
    metadata.insert("name".to_owned(), resource.name.clone().into());
    if !resource.description.is_empty() {
        metadata.insert(
            "description".to_owned(),
            resource.description.clone().into(),
        );
    }
    if !resource.labels.is_empty() {
        metadata.insert("labels".to_owned(), json!(resource.labels));
    }
    if let Some(expires) = resource.expires {
        metadata.insert("expires".to_owned(), rfc3339(expires).into());
    }
    if !resource.revision.is_empty() {
        metadata.insert("revision".to_owned(), resource.revision.clone().into());
    }
    let mut view = Map::from_iter([
        ("kind".to_owned(), resource.kind.clone().into()),
        ("metadata".to_owned(), metadata.into()),
        ("spec".to_owned(), resource.spec.clone()),
        ("version".to_owned(), resource.version.clone().into()),
    ]);
    if !resource.sub_kind.is_empty() {
        view.insert("sub_kind".to_owned(), resource.sub_kind.clone().into());
    }
    if !resource.status.is_null() {
        view.insert("status".to_owned(), resource.status.clone());
    }
    view.into()
}

/// `kind "name"`, for messages; as much of it as the document tells.
fn title(node: &Node) -> String {
    let text = |node: &Node, key| node.get(key).and_then(Node::text).map(str::to_owned);
    let kind = text(node, "kind").unwrap_or_else(|| "resource".to_owned());
    let name = node
        .get("metadata")
        .and_then(|metadata| text(metadata, "name"));
    match name {
        Some(name) => format!("{kind} {name:?}"),
        None => kind,
    }
}

fn document(node: &Node, problems: &Problems, now: Option<SystemTime>) -> Option<Resource> {
    let mut top = Fields::new(node, "", problems)?;
    let kind = kind(&mut top)?;
    let version = top.one_of("version", kind.versions);
    if version.is_none() && !top.has("version") {
        top.error(
            "version",
            "`version` is required",
            Some(&format!("write `version: {}`", kind.versions.first()?)),
        );
    }
    let sub_kind = top.string("sub_kind").unwrap_or_default();
    // Read back from a cluster; the cluster itself knows better.
    top.ignore("status");
    let mut resource = Resource {
        kind: kind.name.to_owned(),
        sub_kind,
        version: version.unwrap_or_default(),
        ..Resource::default()
    };
    match top.section("metadata") {
        Some(fields) => metadata(fields, &mut resource),
        None if top.has("metadata") => {}
        None => top.error(
            "metadata",
            "`metadata` with a `name` is required",
            Some("a name identifies the resource among its kind"),
        ),
    }
    match top.section("spec") {
        Some(mut fields) => {
            resource.spec = top.node("spec").map_or(Value::Null, yaml::to_json);
            (kind.check)(&mut fields, &mut resource);
            fields.finish();
            if let (Some(expires), Some(now)) = (resource.expires, now)
                && expires <= now
            {
                top.error_here(
                    format!("the expiry {} is in the past", rfc3339(expires)),
                    "it would be gone at once; write a later time or leave it out",
                );
            }
        }
        None if top.has("spec") => {}
        None => top.error("spec", "`spec` is required", None),
    }
    top.finish();
    (!problems.has_errors()).then_some(resource)
}

fn kind(top: &mut Fields<'_>) -> Option<&'static Kind> {
    let word = top.required("kind")?;
    if let Some(kind) = KINDS.iter().find(|kind| kind.name == word) {
        return Some(kind);
    }
    let names = || KINDS.iter().map(|kind| kind.name);
    let all = names().collect::<Vec<_>>().join(", ");
    if DERIVED.contains(&word.as_str()) {
        let hint = format!("it appears with its bot; files may hold {all}");
        top.error(
            "kind",
            format!("a `{word}` is made by the cluster itself"),
            Some(&hint),
        );
        return None;
    }
    if word == "sigstore_policy" {
        let hint = "Teleport's own open-source clusters refuse it too; without policies, rules that \
                    ask `sigstore.policy_satisfied` let nobody pass";
        let message =
            format!("{word:?} is not supported by this cluster: it verifies no signatures");
        top.error("kind", message, Some(hint));
        return None;
    }
    let near = yaml::nearest(&word, names())
        .map(|near| format!("did you mean `{near}`? "))
        .unwrap_or_default();
    top.error(
        "kind",
        format!("{word:?} is not supported by this cluster"),
        Some(&format!("{near}supported are {all}")),
    );
    None
}

fn metadata(mut fields: Fields<'_>, resource: &mut Resource) {
    if let Some(name) = fields.required("name") {
        if let Some(problem) = bad_name(&name) {
            fields.error(
                "name",
                problem,
                Some("use letters, digits, `-`, `_` and `.`"),
            );
        }
        resource.name = name;
    }
    resource.description = fields.string("description").unwrap_or_default();
    resource.labels = fields
        .string_map("labels")
        .unwrap_or_default()
        .into_iter()
        .collect();
    resource.expires = time(&mut fields, "expires");
    fields.ignore("revision");
    fields.ignore("id");
    if let Some(namespace) = fields.string("namespace")
        && namespace != "default"
    {
        fields.error(
            "namespace",
            format!("there is no namespace {namespace:?}"),
            Some("leave it out"),
        );
    }
    fields.finish();
}

/// A point in time under `key`; anything else is reported.
fn time(fields: &mut Fields<'_>, key: &str) -> Option<SystemTime> {
    let text = fields.string(key)?;
    let parsed = parse_rfc3339(&text);
    if parsed.is_none() {
        fields.error(
            key,
            format!("{text:?} is no point in time"),
            Some("write it as \"2030-01-31T12:00:00Z\""),
        );
    }
    parsed
}

/// Why `name` cannot name a resource.
fn bad_name(name: &str) -> Option<String> {
    const LONGEST: usize = 256;
    if name.len() > LONGEST {
        return Some(format!(
            "the name has {} bytes, more than {LONGEST}",
            name.len()
        ));
    }
    if name.trim() != name {
        return Some("the name starts or ends with a space".to_owned());
    }
    name.chars()
        .find(|c| c.is_control() || "\\\"'<>|*?".contains(*c))
        .map(|c| format!("the name holds the character {c:?}"))
}

#[cfg(test)]
mod tests;
