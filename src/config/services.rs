//! The `services` list: kinds from their registry, names, lifetimes.

use std::collections::{HashMap, HashSet};

use crate::services::{KINDS, Lifetime, ServiceKind, ServicePlan, UPSTREAM, reload};
use crate::yaml::{Fields, Node, Value};

use super::lifetime;
use super::plan::PlannedService;

/// Names of the agent's own tasks in `/readyz`.
const RESERVED: &[&str] = &[
    "ca-rotation",
    "crl-cache",
    "heartbeat",
    "identity",
    "spiffe-trust-bundle-cache",
];

/// Reads both lists of the root; `outputs` is the old name of `services` and comes after it.
pub(super) fn read(root: &mut Fields<'_>, agent: Lifetime, oneshot: bool) -> Vec<PlannedService> {
    let mut names = Names::default();
    let mut services = Vec::new();
    for key in ["services", "outputs"] {
        for (index, node) in items(root, key).into_iter().enumerate() {
            let path = root.path_of(&format!("{key}[{index}]"));
            let Some(mut fields) = Fields::new(node, path, root.problems()) else {
                continue;
            };
            services.extend(service(&mut fields, &mut names, agent, oneshot));
        }
    }
    services
}

/// The items of one list; a plain text there is an empty list upstream, so it only warns.
fn items<'a>(root: &mut Fields<'a>, key: &str) -> Vec<&'a Node> {
    if let Some(node) = root.node(key)
        && let Value::Scalar { .. } = node.value
    {
        root.warn(
            key,
            "text where a list belongs: no service is configured by it",
            Some("begin each service with `- type: …` on its own line"),
        );
        return Vec::new();
    }
    root.list(key).unwrap_or_default()
}

fn service(
    fields: &mut Fields<'_>,
    names: &mut Names,
    agent: Lifetime,
    oneshot: bool,
) -> Option<PlannedService> {
    let kind = kind(fields)?;
    let own = if kind.has_lifetime() {
        lifetime::of_service(fields, oneshot, kind.skips_maximum_ttl())
    } else {
        None
    };
    let configured = fields.string("name");
    let name = names.settle(fields, kind.name(), configured.as_deref());
    let plan = kind.parse(fields);
    let reload = reload::Plan::parse(fields);
    if fields.has("reload")
        && plan
            .as_ref()
            .is_some_and(|plan| plan.destination().is_none())
    {
        fields.error(
            "reload",
            "this service writes no files after which something could be done",
            Some("only outputs have hooks"),
        );
    }
    if let Some(file) = plan.as_deref().and_then(misplaced) {
        fields.error(
            "destination",
            format!("it has no directories, and `{file}` is to be in one"),
            Some("use a directory, or another format"),
        );
    }
    fields.warn_unknown();
    Some(PlannedService {
        name,
        named: configured.is_some(),
        kind: kind.name(),
        lifetime: own.unwrap_or(agent),
        own_lifetime: own.is_some(),
        reload,
        plan: plan?,
    })
}

/// A file that the destination cannot hold.
fn misplaced(plan: &dyn ServicePlan) -> Option<String> {
    if plan.destination()?.has_folders() {
        return None;
    }
    plan.files().into_iter().find(|name| name.contains('/'))
}

fn kind(fields: &mut Fields<'_>) -> Option<&'static dyn ServiceKind> {
    let here: Vec<&str> = KINDS.iter().map(|kind| kind.name()).collect();
    let Some(name) = fields.string("type") else {
        if !fields.has("type") {
            let hint = format!("one of {}", here.join(", "));
            fields.error("type", "`type` is required", Some(&hint));
        }
        return None;
    };
    let found = KINDS.iter().copied().find(|kind| kind.name() == name);
    if found.is_none() {
        fields.unknown_kind("type", "service types", &name, &here, UPSTREAM);
    }
    found
}

/// The names taken so far.
#[derive(Debug, Default)]
struct Names {
    taken: HashSet<String>,
    per_kind: HashMap<&'static str, usize>,
}

impl Names {
    /// The service's name: the configured one, or `<type>-<n>` where `n` counts all services of the
    /// type, named ones included.
    fn settle(&mut self, fields: &Fields<'_>, kind: &'static str, given: Option<&str>) -> String {
        let count = self.per_kind.entry(kind).or_default();
        *count += 1;
        let name = given.map_or_else(
            || format!("{}-{count}", kind.replace(|c| !allowed(c), "-")),
            str::to_owned,
        );
        if given.is_some() {
            if !name.chars().all(allowed) {
                fields.error(
                    "name",
                    format!("{name:?} is no service name"),
                    Some("lower-case letters, digits, `_`, `-` and `+` only"),
                );
            } else if RESERVED.contains(&name.as_str()) {
                fields.error(
                    "name",
                    format!("{name:?} is the name of one of the agent's own tasks"),
                    Some("choose another"),
                );
            }
        }
        if !self.taken.insert(name.clone()) {
            fields.error(
                "name",
                format!("another service is already named {name:?}"),
                Some("unnamed services are called after their type and number"),
            );
        }
        name
    }
}

fn allowed(c: char) -> bool {
    c.is_ascii_lowercase() || c.is_ascii_digit() || matches!(c, '_' | '-' | '+')
}
