//! What roles give to a certificate, and who may take on which.

use std::collections::BTreeMap;
use std::time::Duration;

use serde_json::Value;

use crate::embedded::pattern::fits;
use crate::embedded::store::{Resource, Tx};
use crate::refusal::Refusal;
use crate::yaml;

/// The longest session under a role that sets no limit, as upstream fills it in.
const DEFAULT_TTL: Duration = Duration::from_hours(30);

/// What a set of roles gives together.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct RoleSet {
    /// Roles by name, in the order they were asked for.
    pub(super) names: Vec<String>,
    /// Logins on SSH servers, sorted.
    pub(super) logins: Vec<String>,
    /// Kubernetes users, sorted.
    pub(super) kubernetes_users: Vec<String>,
    /// Kubernetes groups, sorted.
    pub(super) kubernetes_groups: Vec<String>,
    /// Names of databases, sorted.
    pub(super) database_names: Vec<String>,
    /// Users of databases, sorted.
    pub(super) database_users: Vec<String>,
    /// Databases and their users that are denied by name, where `*` is allowed.
    pub(super) denied_database_names: Vec<String>,
    pub(super) denied_database_users: Vec<String>,
    /// Whether an SSH agent may be forwarded: if any role says so.
    pub(super) forward_agent: bool,
    /// Whether X11 may be forwarded: if any role says so.
    pub(super) forward_x11: bool,
    /// Whether ports may be forwarded: unless no role allows it.
    pub(super) forward_ports: bool,
    /// The longest session: the shortest of the roles' limits.
    pub(super) max_session_ttl: Duration,
}

impl RoleSet {
    /// Loads roles by name; `traits` fill the roles' templates.
    ///
    /// # Errors
    /// Not found, if one of them does not exist.
    pub(super) fn load(
        tx: &Tx<'_>,
        names: &[String],
        traits: &BTreeMap<String, Vec<String>>,
    ) -> Result<Self, Refusal> {
        let mut roles = Vec::new();
        let mut unique: Vec<String> = Vec::new();
        for name in names {
            if unique.contains(name) {
                continue;
            }
            let role = tx
                .get("role", name)?
                .ok_or_else(|| Refusal::not_found(format!("role {name} is not found")))?;
            roles.push(role);
            unique.push(name.clone());
        }
        Ok(Self::of(unique, &roles, traits))
    }

    fn of(names: Vec<String>, roles: &[Resource], traits: &BTreeMap<String, Vec<String>>) -> Self {
        let side = |side: &str, key: &str, otherwise: &[String]| -> Vec<String> {
            roles
                .iter()
                .flat_map(|role| role.spec_texts(&format!("/{side}/{key}")))
                .flat_map(|value| expand(&value, traits).unwrap_or(otherwise.to_vec()))
                .collect()
        };
        // What is not understood among denials denies everything, among allowances nothing.
        let denied = |key: &str| side("deny", key, &["*".to_owned()]);
        let gather = |key: &str| {
            let denied = denied(key);
            let mut allowed = side("allow", key, &[]);
            allowed.retain(|value| !denied.contains(value) && !denied.iter().any(|d| d == "*"));
            allowed.sort();
            allowed.dedup();
            allowed
        };
        let option = |role: &Resource, key: &str| {
            let value = role.spec.pointer(&format!("/options/{key}"));
            value.and_then(Value::as_bool)
        };
        let any = |key: &str| roles.iter().any(|role| option(role, key) == Some(true));
        Self {
            logins: gather("logins"),
            kubernetes_users: gather("kubernetes_users"),
            kubernetes_groups: gather("kubernetes_groups"),
            database_names: gather("db_names"),
            database_users: gather("db_users"),
            denied_database_names: denied("db_names"),
            denied_database_users: denied("db_users"),
            forward_agent: any("forward_agent"),
            forward_x11: any("permit_x11_forwarding"),
            forward_ports: roles
                .iter()
                .any(|role| option(role, "port_forwarding") != Some(false)),
            max_session_ttl: roles
                .iter()
                .map(max_session_ttl)
                .min()
                .unwrap_or(DEFAULT_TTL),
            names,
        }
    }
}

fn max_session_ttl(role: &Resource) -> Duration {
    yaml::duration::parse(role.spec_text("/options/max_session_ttl")).unwrap_or(DEFAULT_TTL)
}

/// The text itself, or the trait's values for `{{internal.name}}` and `{{external.name}}`. `None`
/// for other templates.
fn expand(value: &str, traits: &BTreeMap<String, Vec<String>>) -> Option<Vec<String>> {
    if !value.contains("{{") {
        return Some(vec![value.to_owned()]);
    }
    let name = value
        .trim()
        .strip_prefix("{{")
        .and_then(|rest| rest.strip_suffix("}}"))
        .map(str::trim)
        .and_then(|inner| {
            inner
                .strip_prefix("internal.")
                .or(inner.strip_prefix("external."))
        })?;
    let plain = |c: char| c.is_alphanumeric() || "-_.".contains(c);
    name.chars()
        .all(plain)
        .then(|| traits.get(name).cloned().unwrap_or_default())
}

/// Whether who holds `own` roles may take on the role `wanted`: allowed by one, denied by none.
pub(super) fn may_impersonate(own: &[Resource], wanted: &str) -> bool {
    let listed = |side: &str, otherwise: bool| {
        own.iter().any(|role| {
            role.spec_texts(&format!("/{side}/impersonate/roles"))
                .iter()
                .any(|name| fits(name, wanted).unwrap_or(otherwise))
        })
    };
    listed("allow", false) && !listed("deny", true)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn role(spec: Value) -> Resource {
        Resource {
            kind: "role".to_owned(),
            spec,
            ..Resource::default()
        }
    }

    #[test]
    fn roles_add_up_denials_win_and_the_shortest_session_counts() {
        let traits = BTreeMap::from([("logins".to_owned(), vec!["alice".to_owned()])]);
        let roles = [
            role(json!({
                "allow": {"logins": ["root", "{{internal.logins}}", "{{regexp(x)}}"],
                    "kubernetes_groups": ["system:masters"]},
                "options": {"max_session_ttl": "12h0m0s"},
            })),
            role(json!({
                "allow": {"logins": ["root", "backup"], "db_names": ["*"]},
                "deny": {"logins": ["backup"]},
                "options": {"max_session_ttl": "30m", "forward_agent": true},
            })),
        ];
        let set = RoleSet::of(Vec::new(), &roles, &traits);
        assert_eq!(set.logins, ["alice", "root"]);
        assert_eq!(set.kubernetes_groups, ["system:masters"]);
        assert_eq!(set.database_names, ["*"]);
        assert_eq!(set.max_session_ttl, Duration::from_mins(30));
        assert!(set.forward_agent && set.forward_ports && !set.forward_x11);
        let odd = role(json!({
            "allow": {"logins": ["root"], "db_names": ["x"]},
            "deny": {"logins": ["{{regexp.replace(x)}}"], "db_names": ["{{internal.nothing}}"]},
        }));
        let odd = RoleSet::of(Vec::new(), &[odd], &traits);
        assert!(odd.logins.is_empty(), "a denial that nobody understands");
        assert_eq!(odd.database_names, ["x"]);
        let none = RoleSet::of(Vec::new(), &[role(json!({}))], &traits);
        assert_eq!(none.max_session_ttl, DEFAULT_TTL);
        assert!(none.logins.is_empty());
    }

    #[test]
    fn impersonation_needs_an_allowance_and_no_denial() {
        let own = |spec| may_impersonate(&[role(spec)], "x");
        assert!(own(json!({"allow": {"impersonate": {"roles": ["x"]}}})));
        assert!(own(json!({"allow": {"impersonate": {"roles": ["*"]}}})));
        assert!(!own(json!({"allow": {"impersonate": {"roles": ["y"]}}})));
        assert!(!own(json!({"allow": {"impersonate": {}}})));
        assert!(!own(json!({
            "allow": {"impersonate": {"roles": ["*"]}},
            "deny": {"impersonate": {"roles": ["x"]}}
        })));
        assert!(own(json!({"allow": {"impersonate": {"roles": ["^[x]$"]}}})));
        for odd in ["x*", "^(x$", "{{regexp.match(\"y\")}}"] {
            assert!(
                !own(json!({
                    "allow": {"impersonate": {"roles": ["*"]}},
                    "deny": {"impersonate": {"roles": [odd]}}
                })),
                "{odd}"
            );
        }
    }
}
