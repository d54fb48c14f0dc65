//! What roles let their holder do: verbs on kinds, and resources by their labels.

use std::collections::BTreeMap;

use serde_json::Value;

use super::pattern::fits;
use super::store::{Resource, StoreError, Tx};

/// The roles of a caller, as they are now; a role that no longer exists grants nothing.
#[derive(Debug)]
pub(super) struct Access {
    roles: Vec<Resource>,
}

impl Access {
    /// Reads the roles with these names.
    pub(super) fn of(tx: &Tx<'_>, names: &[String]) -> Result<Self, StoreError> {
        let mut roles = Vec::new();
        for name in names {
            roles.extend(tx.get("role", name)?);
        }
        Ok(Self { roles })
    }

    /// Whether a role allows `verb` on resources of `kind`, and none denies it.
    pub(super) fn may(&self, kind: &str, verb: &str) -> bool {
        self.rules("allow", kind, verb) && !self.denies(kind, verb)
    }

    /// Whether a role denies `verb` on resources of `kind`: for what everybody may do otherwise.
    pub(super) fn denies(&self, kind: &str, verb: &str) -> bool {
        self.rules("deny", kind, verb)
    }

    fn rules(&self, side: &str, kind: &str, verb: &str) -> bool {
        self.roles.iter().any(|role| {
            let rules = role.spec.pointer(&format!("/{side}/rules"));
            let rules = rules.and_then(Value::as_array).into_iter().flatten();
            rules
                .filter(|rule| lists(rule, "resources", kind))
                .any(|rule| lists(rule, "verbs", verb))
        })
    }

    /// Whether the selector `key` of a role, for example `app_labels`, allows a resource with
    /// these labels, and none denies it or may deny it: what is not understood among denials
    /// denies.
    pub(super) fn sees(&self, key: &str, labels: &BTreeMap<String, String>) -> bool {
        let has = |side: &str, fits: fn(&str, &str) -> bool| {
            self.roles.iter().any(|role| {
                let selector = role.spec.pointer(&format!("/{side}/{key}"));
                let selector = selector.and_then(Value::as_object);
                selector.is_some_and(|selector| {
                    let selector = selector.iter();
                    let selector = selector.map(|(key, values)| (key.clone(), texts(values)));
                    select(&selector.collect(), labels, fits)
                })
            })
        };
        let may_fit = |value: &str, label: &str| fits(value, label) != Some(false);
        has("allow", surely_fits) && !has("deny", may_fit)
    }
}

fn lists(rule: &Value, key: &str, wanted: &str) -> bool {
    let items = rule.get(key).map(texts).unwrap_or_default();
    items.iter().any(|item| item == wanted || item == "*")
}

/// One text or a list of texts.
fn texts(value: &Value) -> Vec<String> {
    match value {
        Value::String(text) => vec![text.clone()],
        Value::Array(items) => items
            .iter()
            .filter_map(|item| item.as_str().map(str::to_owned))
            .collect(),
        _ => Vec::new(),
    }
}

/// Whether all keys of a selector match: one of their values fits the label of that name.
///
/// `*: *` matches everything, an empty selector nothing.
pub(super) fn matches(
    selector: &BTreeMap<String, Vec<String>>,
    labels: &BTreeMap<String, String>,
) -> bool {
    select(selector, labels, surely_fits)
}

fn select(
    selector: &BTreeMap<String, Vec<String>>,
    labels: &BTreeMap<String, String>,
    fits: impl Fn(&str, &str) -> bool,
) -> bool {
    let everything = selector.get("*").is_some_and(|values| *values == ["*"]);
    everything
        || !selector.is_empty()
            && selector.iter().all(|(key, values)| {
                labels
                    .get(key)
                    .is_some_and(|label| values.iter().any(|value| fits(value, label)))
            })
}

fn surely_fits(value: &str, label: &str) -> bool {
    fits(value, label) == Some(true)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    const SELECTOR: &str = "workload_identity_labels";

    fn labels(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
        let pairs = pairs.iter();
        pairs
            .map(|(key, value)| ((*key).to_owned(), (*value).to_owned()))
            .collect()
    }

    #[test]
    fn label_selectors() {
        let labels = labels(&[("env", "dev-1"), ("team", "a")]);
        for (selector, result) in [
            (json!({}), false),
            (json!({"*": "*"}), true),
            (json!({"*": "*", "env": "prod"}), true),
            (json!({"*": "a"}), false),
            (json!({"env": "dev-1"}), true),
            (json!({"env": ["prod", "dev-1"]}), true),
            (json!({"env": "dev"}), false),
            (json!({"env": "dev-*"}), true),
            (json!({"env": "*"}), true),
            (json!({"env": "^dev-[0-9]$"}), true),
            (json!({"env": "^dev-[a-z]$"}), false),
            (json!({"env": "^(dev$"}), false),
            (json!({"env": "d.v-1"}), false),
            (json!({"env": "dev-1", "team": "b"}), false),
            (json!({"env": "dev-1", "team": "*"}), true),
            (json!({"none": "*"}), false),
        ] {
            let parsed = selector.as_object().unwrap().iter();
            let parsed = parsed.map(|(key, values)| (key.clone(), texts(values)));
            assert_eq!(matches(&parsed.collect(), &labels), result, "{selector}");
        }
    }

    #[test]
    fn roles_allow_and_deny() {
        let role = |spec: Value| Resource {
            spec,
            ..Resource::default()
        };
        let allow = role(json!({"allow": {
            "workload_identity_labels": {"*": ["*"]},
            "rules": [{"resources": ["workload_identity"], "verbs": ["read"]}]}}));
        let deny = role(json!({"deny": {
            "workload_identity_labels": {"env": ["prod"]},
            "rules": [{"resources": ["*"], "verbs": ["list"]}]}}));
        let all = role(json!({"allow": {"rules": [{"resources": ["*"], "verbs": ["*"]}]}}));
        let nobody = Access { roles: vec![] };
        assert!(!nobody.may("workload_identity", "read") && !nobody.sees(SELECTOR, &labels(&[])));
        let issuer = Access {
            roles: vec![allow.clone()],
        };
        assert!(
            issuer.may("workload_identity", "read") && !issuer.may("workload_identity", "list")
        );
        assert!(issuer.sees(SELECTOR, &labels(&[])));
        let narrowed = Access {
            roles: vec![allow, deny, all],
        };
        assert!(
            narrowed.may("workload_identity", "read")
                && narrowed.may("workload_identity", "create")
                && !narrowed.may("workload_identity", "list")
        );
        assert!(narrowed.sees(SELECTOR, &labels(&[("env", "dev")])));
        assert!(!narrowed.sees(SELECTOR, &labels(&[("env", "prod")])));
        // Nobody can tell what these deny, so they deny; the same among allowances allows nothing.
        for odd in ["^(prod$", "{{internal.env}}"] {
            let side =
                |side: &str| role(json!({ side: {"workload_identity_labels": {"env": odd}}}));
            let denied = Access {
                roles: vec![narrowed.roles[0].clone(), side("deny")],
            };
            assert!(!denied.sees(SELECTOR, &labels(&[("env", "prod")])), "{odd}");
            assert!(denied.sees(SELECTOR, &labels(&[("team", "a")])), "{odd}");
            let allowed = Access {
                roles: vec![side("allow")],
            };
            assert!(
                !allowed.sees(SELECTOR, &labels(&[("env", "prod")])),
                "{odd}"
            );
        }
    }
}
