//! `kind: role`: options, and what is allowed and denied.
//!
//! The keys that this cluster decides by are checked; others that a Teleport cluster knows (node
//! labels, …) mean nothing here and are kept as they are, so that role files of a bigger cluster
//! can be used.

use std::collections::BTreeMap;
use std::time::Duration;

use serde_json::{Value, json};

use super::{Resource, set};
use crate::embedded::pattern::is_clear;
use crate::yaml::{self, Fields};

/// What patterns may look like.
const PATTERNS: &str = "write a text, a text with `*`, or a `^regular expression$`";
/// Sessions of a role that says nothing else, as a cluster fills it in.
const DEFAULT_TTL: &str = "30h0m0s";

/// The labels by which this cluster decides who may see what.
const SELECTORS: &[&str] = &[
    "app_labels",
    "db_labels",
    "kubernetes_labels",
    "node_labels",
    "workload_identity_labels",
];

/// What `allow` and `deny` may hold beside what this cluster decides by (upstream
/// `api/types/role.go` and its JSON names). Kept as it is; anything else is a misspelling, and a
/// misspelt denial would deny nothing.
const KEPT: &[&str] = &[
    "account_assignments",
    "aws_role_arns",
    "azure_identities",
    "beam_labels",
    "beam_labels_expression",
    "cluster_labels",
    "cluster_labels_expression",
    "db_names",
    "db_permissions",
    "db_roles",
    "db_service_labels",
    "db_service_labels_expression",
    "db_users",
    "desktop_groups",
    "gcp_service_accounts",
    "github_permissions",
    "group_labels",
    "group_labels_expression",
    "host_groups",
    "host_sudoers",
    "join_sessions",
    "kubernetes_groups",
    "kubernetes_resources",
    "kubernetes_users",
    "logins",
    "mcp",
    "namespaces",
    "request",
    "require_session_join",
    "review_requests",
    "spiffe",
    "windows_desktop_labels",
    "windows_desktop_labels_expression",
    "windows_desktop_logins",
];

/// Options that are kept as they are, for the same reason.
const KEPT_OPTIONS: &[&str] = &[
    "cert_extensions",
    "cert_format",
    "client_idle_timeout",
    "create_db_user",
    "create_db_user_mode",
    "create_desktop_user",
    "create_host_user",
    "create_host_user_default_shell",
    "create_host_user_mode",
    "desktop_clipboard",
    "desktop_directory_sharing",
    "device_trust_mode",
    "disconnect_expired_cert",
    "enhanced_recording",
    "forward_agent",
    "idp",
    "lock",
    "max_connections",
    "max_kubernetes_connections",
    "max_sessions",
    "mfa_verification_interval",
    "permit_x11_forwarding",
    "pin_source_ip",
    "port_forwarding",
    "record_session",
    "request_access",
    "request_prompt",
    "require_session_mfa",
    "ssh_file_copy",
    "ssh_port_forwarding",
    "web_terminal_clipboard_mode",
];

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

pub(super) fn check(fields: &mut Fields<'_>, resource: &mut Resource) {
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
        for key in KEPT_OPTIONS {
            options.ignore(key);
        }
        options.finish();
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
    for key in SELECTORS {
        if let Some(labels) = labels(&mut fields, key) {
            set(conditions, key, json!(labels));
        }
        let expression = format!("{key}_expression");
        if fields.string(&expression).is_some() {
            fields.error(
                &expression,
                "label expressions are not supported by this cluster",
                Some(&format!("use `{key}`")),
            );
        }
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
        let roles = impersonate.strings("roles").unwrap_or_default();
        if let Some(odd) = roles.iter().find(|role| !is_clear(role)) {
            let what = format!("{odd:?} is no pattern that this cluster understands");
            impersonate.error("roles", what, Some(PATTERNS));
        }
        if impersonate.string("where").is_some() {
            impersonate.error(
                "where",
                "conditions of impersonation are not supported by this cluster",
                Some("remove it"),
            );
        }
        if deny && !impersonate.has("roles") && !impersonate.has("users") {
            impersonate.error_here("denies nothing", "list `roles` or `users`");
        }
        impersonate.finish();
    }
    for key in KEPT {
        fields.ignore(key);
    }
    fields.finish();
}

/// Labels with one value or a list of values each; a list in any case afterwards.
pub(in crate::embedded) fn labels(
    fields: &mut Fields<'_>,
    key: &str,
) -> Option<BTreeMap<String, Vec<String>>> {
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
        if let Some(odd) = values.iter().find(|value| !is_clear(value)) {
            let what = format!("{odd:?} is no pattern that this cluster understands");
            section.error(name, what, Some(PATTERNS));
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
