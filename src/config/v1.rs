//! The format before v2 (`version: v1`, or no `version` at all), turned into a v2 tree, so that
//! everything after it is judged by one validator. Values keep their places in the file.
//!
//! Upstream: `lib/tbot/config/migrate.go`.

use crate::yaml::{Fields, Key, Node, Problem, Problems, Severity, Value};

const V2: &str = "v2";

/// Keys that mean the same in both versions.
const SHARED: [&str; 8] = [
    "onboarding",
    "debug",
    "auth_server",
    "certificate_ttl",
    "renewal_interval",
    "oneshot",
    "fips",
    "diag_addr",
];

/// What a v1 destination could render; `ssh_host_cert` alone has an option.
const TEMPLATES: [&str; 8] = [
    "ssh_client",
    "identity",
    "tls",
    "tls_cas",
    "mongo",
    "cockroach",
    "kubernetes",
    HOST_CERTIFICATE,
];
const HOST_CERTIFICATE: &str = "ssh_host_cert";

/// Whether `tree` says, by its version or by having none, that it is of the old format.
pub(super) fn is(tree: &Node) -> bool {
    tree.get("version").is_none_or(|version| {
        version.value == Value::Null || matches!(version.text(), Some("" | "v1"))
    })
}

/// The v2 tree. A file with keys that only v2 has is one that lacks its `version: v2`: that is
/// reported, and the rest is left to be judged as what it was meant to be.
pub(super) fn convert(tree: &mut Node, problems: &Problems) {
    let Some(mut root) = Fields::new(tree, "", problems) else {
        return;
    };
    root.ignore("version");
    let v2_only = ["services", "outputs", "proxy_server", "credential_ttl"];
    if !root.has("destinations")
        && let Some(key) = v2_only.into_iter().find(|key| root.has(key))
    {
        root.error(
            "version",
            format!("`{key}` is a key of version v2, which the file does not name"),
            Some("write `version: v2` as its first line"),
        );
        tree.set("version", Node::made_text(V2));
        return;
    }
    let mut entries = vec![entry("version", Node::made_text(V2))];
    for key in SHARED {
        if let Some(node) = root.node(key) {
            entries.push(entry(key, node.clone()));
        }
    }
    if let Some(mut storage) = root.section("storage") {
        if let Some(storage) = destination(&mut storage, "storage") {
            entries.push(entry("storage", storage));
        }
        storage.finish();
    }
    let mut services = Vec::new();
    for mut fields in root.sections("destinations").unwrap_or_default() {
        services.extend(service(&mut fields));
        fields.finish();
    }
    entries.push(entry("services", Node::made(Value::Sequence(services))));
    root.finish();
    tree.value = Value::Mapping(entries);
}

/// The service's `type`; what is wrong with it is wrong with the destination as a whole.
fn kind(fields: &Fields<'_>, name: &str) -> Node {
    Node {
        span: fields.span(),
        ..Node::made_text(name)
    }
}

fn entry(key: &str, node: Node) -> (Key, Node) {
    (Key::made(key), node)
}

/// One v1 destination as the service that it was in truth.
fn service(fields: &mut Fields<'_>) -> Option<Node> {
    let target = destination(fields, "destination");
    let templates = templates(fields);
    let host = templates.iter().find(|(name, _)| name == HOST_CERTIFICATE);
    let app = fields.node("app");
    let database = fields.section("database");
    let cluster = fields.node("kubernetes_cluster");
    let kinds = [
        (app.is_some(), "app"),
        (database.is_some(), "database"),
        (cluster.is_some(), "kubernetes_cluster"),
        (host.is_some(), HOST_CERTIFICATE),
    ];
    let named: Vec<&str> = kinds
        .iter()
        .filter(|(is, _)| *is)
        .map(|(_, name)| *name)
        .collect();
    if let [first, second, ..] = named.as_slice() {
        fields.error(
            second,
            format!("a destination is for one thing: it names `{first}` and `{second}`"),
            Some("give each a destination of its own"),
        );
        return None;
    }
    let has = |name: &str| templates.iter().any(|(template, _)| template == name);
    let mut made = Made::default();
    let permitted: &[&str] = if let Some(app) = app {
        made.set("type", kind(fields, "application"));
        made.set("app_name", app.clone());
        if has("tls") {
            made.set("specific_tls_naming", flag(true));
        }
        &["tls_cas", "tls", "identity"]
    } else if let Some(mut database) = database {
        made.set("type", kind(fields, "database"));
        for key in ["service", "database", "username"] {
            if let Some(node) = database.node(key) {
                made.set(key, node.clone());
            }
        }
        database.finish();
        let formats: Vec<&str> = ["mongo", "cockroach", "tls"]
            .into_iter()
            .filter(|name| has(name))
            .collect();
        match formats.as_slice() {
            [] => {}
            [format] => made.set("format", Node::made_text(*format)),
            [first, second, ..] => fields.error(
                "configs",
                format!("a database has one format: `{first}` and `{second}` are named"),
                Some("give each a destination of its own"),
            ),
        }
        &["tls_cas", "identity", "mongo", "cockroach", "tls"]
    } else if let Some(cluster) = cluster {
        made.set("type", kind(fields, "kubernetes"));
        made.set("kubernetes_cluster", cluster.clone());
        &["tls_cas", "identity", "kubernetes"]
    } else if let Some((_, principals)) = host {
        made.set("type", kind(fields, "ssh_host"));
        made.set(
            "principals",
            principals
                .clone()
                .unwrap_or_else(|| Node::made(Value::Null)),
        );
        &[HOST_CERTIFICATE]
    } else {
        made.set("type", kind(fields, "identity"));
        if let Some(cluster) = fields.node("cluster") {
            made.set("cluster", cluster.clone());
        }
        &["tls_cas", "identity", "ssh_client"]
    };
    for (name, _) in &templates {
        if !permitted.contains(&name.as_str()) {
            let hint = format!("those that fit: {}", permitted.join(", "));
            fields.error(
                "configs",
                format!("`{name}` does not fit this destination"),
                Some(&hint),
            );
        }
    }
    made.set("destination", target?);
    if let Some(roles) = fields.node("roles") {
        made.set("roles", roles.clone());
    }
    Some(Node {
        span: fields.span(),
        value: Value::Mapping(made.0),
    })
}

/// Entries of a mapping that is being made.
#[derive(Default)]
struct Made(Vec<(Key, Node)>);

impl Made {
    fn set(&mut self, key: &str, node: Node) {
        self.0.push(entry(key, node));
    }
}

fn flag(value: bool) -> Node {
    Node::made(Value::Scalar {
        text: value.to_string(),
        quoted: false,
    })
}

/// `directory: /path`, `directory: {path: …}`, `memory: true` or `memory: {}` as a v2 destination.
fn destination(fields: &mut Fields<'_>, called: &str) -> Option<Node> {
    let directory = fields.node("directory");
    fields.ignore("memory");
    // `memory: {}` and `memory: true` are both on; `memory: false` is neither.
    let memory = fields.has("memory")
        && match fields.node("memory").map(|node| &node.value) {
            Some(Value::Mapping(_)) => true,
            _ => fields.bool("memory")?,
        };
    let hint = "write `directory: /path` or `memory: true`";
    match (directory, memory) {
        (Some(directory), false) => {
            let mut made = vec![entry("type", Node::made_text("directory"))];
            match &directory.value {
                Value::Mapping(entries) => made.extend(entries.iter().cloned()),
                Value::Null | Value::Scalar { .. } | Value::Sequence(_) => {
                    made.push(entry("path", directory.clone()));
                }
            }
            Some(Node {
                span: directory.span,
                value: Value::Mapping(made),
            })
        }
        (None, true) => {
            let made = vec![entry("type", Node::made_text("memory"))];
            Some(Node::made(Value::Mapping(made)))
        }
        (Some(_), true) => {
            let message = format!("a {called} is a directory or memory, not both");
            fields.error("memory", message, Some(hint));
            None
        }
        (None, false) => {
            let message = format!("a {called} needs `directory` or `memory`");
            fields.error("directory", message, Some(hint));
            None
        }
    }
}

/// A name under `configs`, with the principals of `ssh_host_cert`.
type Template = (String, Option<Node>);

fn templates(fields: &mut Fields<'_>) -> Vec<Template> {
    let mut found: Vec<Template> = Vec::new();
    let items = fields.list("configs").unwrap_or_default();
    for (index, item) in items.into_iter().enumerate() {
        let read = template(item).and_then(|read| {
            if found.iter().any(|(name, _)| *name == read.0) {
                return Err((
                    format!("`{}` stands there twice", read.0),
                    "remove one".to_owned(),
                ));
            }
            Ok(read)
        });
        match read {
            Ok(read) => found.push(read),
            Err((message, hint)) => fields.problems().push(Problem {
                severity: Severity::Error,
                span: Some(item.span),
                path: fields.path_of(&format!("configs[{index}]")),
                message,
                hint: Some(hint),
            }),
        }
    }
    found
}

/// One item of `configs`, or what is wrong and what to write.
fn template(item: &Node) -> Result<Template, (String, String)> {
    let nothing = Node::made(Value::Null);
    let (name, options) = match &item.value {
        Value::Scalar { text, .. } => (text, &nothing),
        Value::Mapping(entries) if let [(name, options)] = entries.as_slice() => {
            (&name.text, options)
        }
        Value::Mapping(_) | Value::Null | Value::Sequence(_) => {
            let hint = "write one name for each `-`";
            return Err(("must name one template".to_owned(), hint.to_owned()));
        }
    };
    if !TEMPLATES.contains(&name.as_str()) {
        let hint = format!("one of {}", TEMPLATES.join(", "));
        return Err((format!("{name:?} is no template"), hint));
    }
    if name == HOST_CERTIFICATE {
        return match options.get("principals") {
            Some(list) if matches!(&list.value, Value::Sequence(names) if !names.is_empty()) => {
                Ok((name.clone(), Some(list.clone())))
            }
            Some(_) | None => Err((
                format!("`{name}` needs principals"),
                "list the host names under `principals`".to_owned(),
            )),
        };
    }
    let bare = match &options.value {
        Value::Null => true,
        Value::Mapping(entries) => entries.is_empty(),
        Value::Scalar { .. } | Value::Sequence(_) => false,
    };
    if !bare {
        let hint = "v2 has them as keys of the service";
        return Err((
            format!("the options of `{name}` are not converted"),
            hint.to_owned(),
        ));
    }
    Ok((name.clone(), None))
}
