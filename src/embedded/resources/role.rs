//! `kind: role`: options, and what is allowed and denied.
//!
//! The keys that this cluster decides by are checked; others (logins, node labels, …) mean
//! nothing here and are kept as they are, so that role files of a bigger cluster can be used.

use std::collections::BTreeMap;
use std::time::{Duration, SystemTime};

use serde_json::{Value, json};

use super::{Resource, set, whole};
use crate::yaml::{self, Fields};

/// Sessions of a role that says nothing else, as a cluster fills it in.
const DEFAULT_TTL: &str = "30h0m0s";

/// The options of a role as a Teleport 18.0.0 cluster fills them in.
pub(super) fn options(max_session_ttl: &str) -> Value {
    json!({
        "cert_format": "standard",
        "create_db_user": false,
        "create_desktop_user": false,
        "desktop_clipboard": true,
        "desktop_directory_sharing": true,
        "enhanced_recording": ["command", "network"],
        "forward_agent": false,
        "max_session_ttl": max_session_ttl,
        "pin_source_ip": false,
        "record_session": {"default": "best_effort", "desktop": true},
        "ssh_file_copy": true,
    })
}

pub(super) fn check(fields: &mut Fields<'_>, resource: &mut Resource, _now: SystemTime) {
    let mut ttl = None;
    if let Some(mut options) = fields.section("options") {
        ttl = options.duration("max_session_ttl");
        if ttl.is_some_and(|ttl| ttl.is_zero()) {
            options.error(
                "max_session_ttl",
                "no session can last 0s",
                Some("leave it out for 30h"),
            );
        }
    }
    let mut all = options(&ttl.map_or_else(|| DEFAULT_TTL.to_owned(), yaml::duration::format));
    if let (Value::Object(all), Some(Value::Object(given))) =
        (&mut all, resource.spec.get("options"))
    {
        for (key, value) in given.iter().filter(|(key, _)| *key != "max_session_ttl") {
            all.insert(key.clone(), value.clone());
        }
    }
    set(&mut resource.spec, "options", all);
    for side in ["allow", "deny"] {
        let mut conditions = resource
            .spec
            .get_mut(side)
            .map(Value::take)
            .unwrap_or_default();
        if let Some(section) = fields.section(side) {
            check_conditions(section, side == "deny", &mut conditions);
        }
        if conditions.is_null() {
            conditions = json!({});
        }
        set(&mut resource.spec, side, conditions);
    }
}

fn check_conditions(mut fields: Fields<'_>, deny: bool, conditions: &mut Value) {
    const LABELS: &str = "workload_identity_labels";
    if let Some(labels) = labels(&mut fields, LABELS) {
        set(conditions, LABELS, json!(labels));
    }
    let expression = "workload_identity_labels_expression";
    if fields.string(expression).is_some() {
        fields.error(
            expression,
            "label expressions are not supported by this cluster",
            Some("use `workload_identity_labels`"),
        );
    }
    for mut rule in fields.sections("rules").unwrap_or_default() {
        for key in ["resources", "verbs"] {
            if rule.strings(key).is_none_or(|items| items.is_empty()) {
                rule.error(key, format!("`{key}` must list at least one"), None);
            }
        }
        rule.ignore("actions");
        if rule.string("where").is_some() {
            rule.error(
                "where",
                "conditions of rules are not supported by this cluster",
                Some("they would be ignored, which is not safe; remove the rule or the condition"),
            );
        }
        rule.finish();
    }
    if let Some(mut impersonate) = fields.section("impersonate") {
        let _users = impersonate.strings("users");
        let _roles = impersonate.strings("roles");
        if impersonate.string("where").is_some() {
            impersonate.error(
                "where",
                "conditions of impersonation are not supported by this cluster",
                Some("remove it"),
            );
        }
        if deny && !impersonate.has("roles") && !impersonate.has("users") {
            whole(&impersonate, "denies nothing", "list `roles` or `users`");
        }
        impersonate.finish();
    }
}

/// Labels with one value or a list of values each; a list in any case afterwards.
fn labels(fields: &mut Fields<'_>, key: &str) -> Option<BTreeMap<String, Vec<String>>> {
    let mut section = fields.section(key)?;
    let mut labels = BTreeMap::new();
    for name in section.keys() {
        let values = match section.node(name).map(|node| &node.value) {
            Some(yaml::Value::Sequence(_)) => section.strings(name).unwrap_or_default(),
            _ => section.string(name).into_iter().collect(),
        };
        if values.is_empty() {
            section.error(
                name,
                "a label without values matches nothing",
                Some("write `'*'`"),
            );
        }
        if name == "*" && values != ["*"] {
            section.error(
                name,
                "the key `*` goes with the value `*` only",
                Some("write `'*': '*'` for everything"),
            );
        }
        labels.insert(name.to_owned(), values);
    }
    Some(labels)
}

/// The name of [`preset`].
pub(super) const PRESET: &str = "wildcard-workload-identity-issuer";

/// The role that a new cluster has: whoever holds it may issue every workload identity.
pub(super) fn preset() -> Resource {
    Resource {
        kind: "role".to_owned(),
        version: "v7".to_owned(),
        name: PRESET.to_owned(),
        description: "Issue any workload identity".to_owned(),
        labels: BTreeMap::from([(
            "teleport.internal/resource-type".to_owned(),
            "preset".to_owned(),
        )]),
        spec: json!({
            "allow": {
                "workload_identity_labels": {"*": ["*"]},
                "rules": [{"resources": ["workload_identity"], "verbs": ["read", "list"]}],
            },
            "deny": {},
            "options": options(&yaml::duration::format(Duration::from_hours(30))),
        }),
        ..Resource::default()
    }
}
