//! A resource and attributes to the contents of an SVID, or a refusal with its reason.

use serde_json::{Map, Value};
use tonic::Code;

use super::attrs::Attrs;
use super::expression::EvalError;
use super::resource::struct_to_json;
use super::rules::{self, RuleError};
use super::template::{TemplateError, render};
use crate::pb::teleport::workloadidentity::v1 as wire;

/// The deepest nesting of extra claims.
pub const MAX_CLAIM_DEPTH: usize = 10;
/// The longest label of a DNS name.
const MAX_LABEL: usize = 63;
/// The longest DNS name.
const MAX_DNS_NAME: usize = 253;

/// Why a workload does not get an identity.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Refusal {
    /// The rules do not let the attributes pass.
    #[error("attributes did not pass rule evaluation: {0}")]
    Rules(#[from] RuleError),
    /// A template has no result.
    #[error("templating {field}: {source}")]
    Template {
        /// The field of the resource.
        field: &'static str,
        /// Why.
        #[source]
        source: TemplateError,
    },
    /// A rendered DNS name is none.
    #[error(
        "templating spec.spiffe.x509.dns_sans: {0:?} is not a DNS name of lower-case letters, \
         digits and inner '-', each label starting with a letter"
    )]
    DnsName(String),
    /// Claims nest deeper than [`MAX_CLAIM_DEPTH`].
    #[error("spec.spiffe.jwt.extra_claims nest deeper than {MAX_CLAIM_DEPTH} levels")]
    ClaimDepth,
    /// The resource has no `spec.spiffe`.
    #[error("the workload identity has no spec.spiffe")]
    Malformed,
}

impl Refusal {
    /// The status code that a caller gets.
    #[must_use]
    pub fn code(&self) -> Code {
        match self {
            Self::Rules(RuleError::NoMatch | RuleError::Eval(EvalError::Policies)) => {
                Code::PermissionDenied
            }
            Self::Rules(RuleError::UnknownAttribute(_)) => Code::NotFound,
            Self::Rules(RuleError::NotComparable(_) | RuleError::Malformed)
            | Self::DnsName(_)
            | Self::Malformed => Code::InvalidArgument,
            Self::Rules(_) | Self::Template { .. } | Self::ClaimDepth => Code::Unknown,
        }
    }
}

/// What an SVID is to hold.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Contents {
    /// The path of the SPIFFE ID; not checked yet.
    pub path: String,
    /// The hint for workloads that get several SVIDs.
    pub hint: String,
    /// DNS names of an X.509-SVID.
    pub dns_sans: Vec<String>,
    /// Common name of the subject; empty for none.
    pub common_name: String,
    /// Organization of the subject; empty for none.
    pub organization: String,
    /// Organizational unit of the subject; empty for none.
    pub organizational_unit: String,
    /// Further claims of a JWT-SVID.
    pub extra_claims: Map<String, Value>,
}

/// Decides whether the attributes may have the identity, and what it then holds.
///
/// # Errors
/// [`Refusal`].
pub fn decide(spec: &wire::WorkloadIdentitySpec, attrs: &Attrs) -> Result<Contents, Refusal> {
    let rules = spec.rules.as_ref().map(|rules| rules.allow.as_slice());
    rules::evaluate(rules.unwrap_or_default(), attrs)?;
    let spiffe = spec.spiffe.as_ref().ok_or(Refusal::Malformed)?;
    let filled = |field, text: &str| {
        render(text, attrs).map_err(|source| Refusal::Template { field, source })
    };
    let mut contents = Contents {
        path: filled("spec.spiffe.id", &spiffe.id)?,
        hint: filled("spec.spiffe.hint", &spiffe.hint)?,
        ..Contents::default()
    };
    if let Some(x509) = &spiffe.x509 {
        for name in &x509.dns_sans {
            let name = filled("spec.spiffe.x509.dns_sans", name)?;
            if !is_dns_name(&name) {
                return Err(Refusal::DnsName(name));
            }
            contents.dns_sans.push(name);
        }
        if let Some(subject) = &x509.subject_template {
            let field = "spec.spiffe.x509.subject_template";
            contents.common_name = filled(field, &subject.common_name)?;
            contents.organization = filled(field, &subject.organization)?;
            contents.organizational_unit = filled(field, &subject.organizational_unit)?;
        }
    }
    let claims = spiffe
        .jwt
        .as_ref()
        .and_then(|jwt| jwt.extra_claims.as_ref());
    if let Some(claims) = claims {
        for (name, value) in struct_to_json(claims) {
            contents.extra_claims.insert(name, claim(value, attrs, 1)?);
        }
    }
    Ok(contents)
}

fn claim(value: Value, attrs: &Attrs, depth: usize) -> Result<Value, Refusal> {
    if depth > MAX_CLAIM_DEPTH {
        return Err(Refusal::ClaimDepth);
    }
    Ok(match value {
        Value::String(text) => {
            let field = "spec.spiffe.jwt.extra_claims";
            let text = render(&text, attrs);
            Value::String(text.map_err(|source| Refusal::Template { field, source })?)
        }
        Value::Array(items) => items
            .into_iter()
            .map(|item| claim(item, attrs, depth + 1))
            .collect::<Result<_, _>>()?,
        Value::Object(members) => Value::Object(
            members
                .into_iter()
                .map(|(name, value)| Ok((name, claim(value, attrs, depth + 1)?)))
                .collect::<Result<_, Refusal>>()?,
        ),
        other => other,
    })
}

/// Whether every label is one of RFC 1035 as Kubernetes has it: a lower-case letter, then
/// letters, digits and `-`, not ending in `-`.
fn is_dns_name(name: &str) -> bool {
    let label = |label: &str| {
        label.len() <= MAX_LABEL
            && label.starts_with(|c: char| c.is_ascii_lowercase())
            && !label.ends_with('-')
            && label
                .bytes()
                .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
    };
    name.len() <= MAX_DNS_NAME && name.split('.').all(label)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::embedded::workload_identity::attrs::UserFacts;
    use crate::embedded::workload_identity::resource::spec_from_json;

    fn decided(spiffe: &Value, rules: &Value) -> Result<Contents, Refusal> {
        let user = UserFacts {
            name: "bot-x".into(),
            ..UserFacts::default()
        };
        let attrs = Attrs::new(None, &user, &json!(null)).unwrap();
        let spec = spec_from_json(&json!({"spiffe": spiffe, "rules": rules})).unwrap();
        decide(&spec, &attrs)
    }

    #[test]
    fn everything_is_rendered() {
        let contents = decided(
            &json!({
                "id": "/u/{{user.name}}",
                "hint": "h-{{user.name}}",
                "x509": {
                    "dns_sans": ["{{user.name}}.svc.local", "a1.b"],
                    "subject_template": {
                        "common_name": "{{user.name}}", "organization": "o",
                        "organizational_unit": "{{ }}",
                    },
                },
                "jwt": {"extra_claims": {
                    "who": "{{user.name}}", "n": 3, "half": 0.5, "no": null,
                    "list": ["{{user.name}}", {"deep": "{{user.is_bot}}"}],
                }},
            }),
            &json!({}),
        )
        .unwrap();
        assert_eq!(contents.path, "/u/bot-x");
        assert_eq!(contents.hint, "h-bot-x");
        assert_eq!(contents.dns_sans, ["bot-x.svc.local", "a1.b"]);
        assert_eq!(contents.common_name, "bot-x");
        assert_eq!(contents.organization, "o");
        assert_eq!(contents.organizational_unit, "");
        assert_eq!(
            Value::Object(contents.extra_claims),
            json!({"who": "bot-x", "n": 3, "half": 0.5, "no": null,
                   "list": ["bot-x", {"deep": "false"}]})
        );
    }

    #[test]
    fn refusals_and_their_codes() {
        let condition = |attribute: &str| json!({"allow": [{"conditions": [{"attribute": attribute, "eq": {"value": "x"}}]}]});
        let id = json!({"id": "/a"});
        let expression = |text: &str| json!({"allow": [{"expression": text}]});
        let mut deep = json!("x");
        for _ in 0..10 {
            deep = json!({ "d": deep });
        }
        for (spiffe, rules, code) in [
            (id.clone(), condition("user.name"), Code::PermissionDenied),
            (id.clone(), condition("user.shoe"), Code::NotFound),
            (id.clone(), condition("user.labels"), Code::InvalidArgument),
            (
                id.clone(),
                expression("join.iam.arn == \"\""),
                Code::Unknown,
            ),
            (
                id,
                expression("sigstore.policy_satisfied(\"a\")"),
                Code::PermissionDenied,
            ),
            (json!({"id": "/{{join.iam.arn}}"}), json!({}), Code::Unknown),
            (json!({"id": "/{{nothing}}"}), json!({}), Code::Unknown),
            (
                json!({"id": "/a", "x509": {"dns_sans": ["{{user.name}}_"]}}),
                json!({}),
                Code::InvalidArgument,
            ),
            (
                json!({"id": "/a", "jwt": {"extra_claims": {"a": deep}}}),
                json!({}),
                Code::Unknown,
            ),
        ] {
            let refusal = decided(&spiffe, &rules).unwrap_err();
            assert_eq!(refusal.code(), code, "{spiffe} {rules}: {refusal}");
        }
    }

    #[test]
    fn dns_names() {
        let longest = "a".repeat(MAX_LABEL);
        for (name, valid) in [
            ("a", true),
            ("a-b.c1", true),
            (longest.as_str(), true),
            ("", false),
            ("A", false),
            ("1a", false),
            ("a-", false),
            ("-a", false),
            ("*.a", false),
            ("a_b", false),
            ("a.", false),
            ("a..b", false),
            (&format!("{longest}a"), false),
            (&["a"; 200].join("."), false),
        ] {
            assert_eq!(is_dns_name(name), valid, "{name}");
        }
    }
}
