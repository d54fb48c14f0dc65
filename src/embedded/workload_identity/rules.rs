//! Rules: which attributes let a workload have an identity.
//!
//! Conditions and expressions treat what was not attested differently, as a Teleport 18.0.0
//! cluster does: a condition reads it as empty, so `not_eq` passes; an expression fails.

use super::attrs::schema::Kind;
use super::attrs::{Attrs, Found, Value, resolve};
use super::expression::{self, EvalError, Expression, ParseError};
use crate::pb::teleport::workloadidentity::v1 as wire;
use wire::workload_identity_condition::Operator;

/// Why rules do not let attributes pass.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum RuleError {
    /// No rule passes.
    #[error("no matching rule found")]
    NoMatch,
    /// A condition names an attribute that does not exist.
    #[error("no attribute is called {0:?}")]
    UnknownAttribute(String),
    /// A condition names something that is not one string, bool or number.
    #[error("the attribute {0:?} cannot be compared in a condition")]
    NotComparable(String),
    /// A rule has neither conditions nor an expression, or a condition has no operator.
    #[error("a rule needs conditions with an operator each, or an expression")]
    Malformed,
    /// An expression does not parse.
    #[error("rule expression: {0}")]
    Parse(#[from] ParseError),
    /// An expression has no value for these attributes.
    #[error("rule expression: {0}")]
    Eval(#[from] EvalError),
}

/// Passes if there are no rules, or one of them passes. The first error ends the search.
///
/// # Errors
/// [`RuleError`].
pub fn evaluate(rules: &[wire::WorkloadIdentityRule], attrs: &Attrs) -> Result<(), RuleError> {
    if rules.is_empty() {
        return Ok(());
    }
    for rule in rules {
        if passes(rule, attrs)? {
            return Ok(());
        }
    }
    Err(RuleError::NoMatch)
}

fn passes(rule: &wire::WorkloadIdentityRule, attrs: &Attrs) -> Result<bool, RuleError> {
    if !rule.expression.is_empty() {
        let value = Expression::rule(&rule.expression)?.evaluate(attrs)?;
        return Ok(value == expression::Value::Flag(true));
    }
    if rule.conditions.is_empty() {
        return Err(RuleError::Malformed);
    }
    for condition in &rule.conditions {
        if !holds(condition, attrs)? {
            return Ok(false);
        }
    }
    Ok(true)
}

fn holds(condition: &wire::WorkloadIdentityCondition, attrs: &Attrs) -> Result<bool, RuleError> {
    let value = comparable(&condition.attribute, attrs)?;
    match &condition.operator {
        Some(Operator::Eq(eq)) => Ok(value == eq.value),
        Some(Operator::NotEq(not)) => Ok(value != not.value),
        Some(Operator::In(list)) => Ok(list.values.contains(&value)),
        Some(Operator::NotIn(list)) => Ok(!list.values.contains(&value)),
        None => Err(RuleError::Malformed),
    }
}

/// The attribute as text; what was not sent is its zero value.
fn comparable(attribute: &str, attrs: &Attrs) -> Result<String, RuleError> {
    let names: Vec<&str> = attribute.split('.').collect();
    let found = resolve(&names).map_err(RuleError::UnknownAttribute)?;
    let refuse = || RuleError::NotComparable(attribute.to_owned());
    let zero = match (found.kind, found.rest.as_slice()) {
        (Kind::Text, []) => "",
        (Kind::Flag, []) => "false",
        (Kind::Integer, []) => "0",
        _ => return Err(refuse()),
    };
    match attrs.find(&found.names) {
        Found::Zero | Found::Unset => Ok(zero.to_owned()),
        Found::Value(Value::Text(text)) => Ok(text.clone()),
        Found::Value(Value::Flag(flag)) => Ok(flag.to_string()),
        Found::Value(Value::Integer(number)) => Ok(number.to_string()),
        Found::Value(_) => Err(refuse()),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value as Json, json};

    use super::*;
    use crate::embedded::workload_identity::attrs::UserFacts;
    use crate::embedded::workload_identity::resource::spec_from_json;

    fn attrs() -> Attrs {
        let workload = wire::WorkloadAttrs {
            unix: Some(wire::WorkloadAttrsUnix {
                attested: true,
                pid: 7,
                uid: 1000,
                ..Default::default()
            }),
            ..Default::default()
        };
        let join = json!({"iam": {"account": "123456789012"}, "gitlab": {"runner_id": -1}});
        Attrs::new(Some(&workload), &UserFacts::default(), &join).unwrap()
    }

    fn rules(allow: &Json) -> Vec<wire::WorkloadIdentityRule> {
        let spec = json!({"spiffe": {"id": "/a"}, "rules": {"allow": allow}});
        spec_from_json(&spec).unwrap().rules.unwrap().allow
    }

    fn one(attribute: &str, operator: &str, value: &Json) -> Json {
        let operand = if value.is_array() {
            json!({"values": value})
        } else {
            json!({"value": value})
        };
        json!({"attribute": attribute, operator: operand})
    }

    #[test]
    fn no_rules_let_everything_pass() {
        assert_eq!(evaluate(&[], &attrs()), Ok(()));
    }

    #[test]
    fn conditions() {
        let text = |attribute: &str| RuleError::UnknownAttribute(attribute.into());
        let not = |attribute: &str| RuleError::NotComparable(attribute.into());
        for (condition, result) in [
            (one("workload.unix.uid", "eq", &json!("1000")), Ok(())),
            (
                one("workload.unix.uid", "eq", &json!("1001")),
                Err(RuleError::NoMatch),
            ),
            (
                one("workload.unix.uid", "not_eq", &json!("1000")),
                Err(RuleError::NoMatch),
            ),
            (one("workload.unix.pid", "in", &json!(["1", "7"])), Ok(())),
            (
                one("workload.unix.pid", "in", &json!(["1"])),
                Err(RuleError::NoMatch),
            ),
            (
                one("workload.unix.pid", "not_in", &json!(["7"])),
                Err(RuleError::NoMatch),
            ),
            (one("workload.unix.attested", "eq", &json!("true")), Ok(())),
            (one("join.gitlab.runner_id", "eq", &json!("-1")), Ok(())),
            // Nothing attested: zero values, so negations pass.
            (
                one("workload.systemd.attested", "eq", &json!("false")),
                Ok(()),
            ),
            (
                one("workload.systemd.service", "not_eq", &json!("web")),
                Ok(()),
            ),
            (
                one(
                    "workload.kubernetes.container.image",
                    "not_in",
                    &json!(["x"]),
                ),
                Ok(()),
            ),
            (one("workload.unix.gid", "eq", &json!("0")), Ok(())),
            (one("workload.unix.binary_path", "eq", &json!("")), Ok(())),
            // Unknown and unusable attributes end the evaluation.
            (
                one("workload.unix.shoe", "not_eq", &json!("x")),
                Err(text("workload.unix.shoe")),
            ),
            (one("nothing", "eq", &json!("x")), Err(text("nothing"))),
            (
                one("workload.unix", "eq", &json!("x")),
                Err(not("workload.unix")),
            ),
            (
                one("user.labels", "eq", &json!("x")),
                Err(not("user.labels")),
            ),
            (
                one("workload.kubernetes.labels.x", "eq", &json!("x")),
                Err(not("workload.kubernetes.labels.x")),
            ),
            (
                one("user.traits.x", "eq", &json!("x")),
                Err(not("user.traits.x")),
            ),
            (
                one("join.circleci.context_ids", "eq", &json!("x")),
                Err(not("join.circleci.context_ids")),
            ),
            (
                one("workload.sigstore.payloads", "eq", &json!("x")),
                Err(not("workload.sigstore.payloads")),
            ),
            (
                one("user.name.x", "eq", &json!("x")),
                Err(not("user.name.x")),
            ),
        ] {
            let rules = rules(&json!([{"conditions": [condition]}]));
            assert_eq!(evaluate(&rules, &attrs()), result, "{condition}");
        }
    }

    #[test]
    fn conditions_are_all_needed_and_one_rule_is_enough() {
        let yes = one("workload.unix.uid", "eq", &json!("1000"));
        let no = one("workload.unix.uid", "eq", &json!("0"));
        let both = rules(&json!([{"conditions": [yes, no]}]));
        assert_eq!(evaluate(&both, &attrs()), Err(RuleError::NoMatch));
        let second = rules(&json!([{"conditions": [no]}, {"conditions": [yes]}]));
        assert_eq!(evaluate(&second, &attrs()), Ok(()));
    }

    #[test]
    fn an_error_ends_the_search_unless_a_rule_passed_before() {
        let fails = json!({"expression": "workload.kubernetes.attested"});
        let yes = json!({"expression": "workload.unix.attested"});
        assert_eq!(
            evaluate(&rules(&json!([fails, yes])), &attrs()),
            Err(RuleError::Eval(EvalError::Unset(
                "workload.kubernetes.attested".into()
            )))
        );
        assert_eq!(evaluate(&rules(&json!([yes, fails])), &attrs()), Ok(()));
        let policy = rules(&json!([{"expression": "sigstore.policy_satisfied(\"a\")"}]));
        assert_eq!(
            evaluate(&policy, &attrs()),
            Err(RuleError::Eval(EvalError::Policies))
        );
    }

    #[test]
    fn malformed_rules_let_nobody_pass() {
        let empty = wire::WorkloadIdentityRule::default();
        assert_eq!(evaluate(&[empty], &attrs()), Err(RuleError::Malformed));
        let rule = wire::WorkloadIdentityRule {
            conditions: vec![wire::WorkloadIdentityCondition {
                attribute: "user.name".into(),
                operator: None,
            }],
            expression: String::new(),
        };
        assert_eq!(evaluate(&[rule], &attrs()), Err(RuleError::Malformed));
    }
}
