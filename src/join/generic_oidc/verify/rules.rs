//! `must_match_fields` and the conditions of `allow_any` (facts: upstream
//! `lib/join/genericoidc/{field_rules,conditions}.go`).

use serde_json::Value;

use crate::join::verify::oidc::Claims;

/// Why claims do not do.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub(super) enum RuleError {
    /// A claim is missing or different.
    #[error("claim {0}")]
    Differs(String),
    /// The rule cannot be held against these claims; that is said, and nobody is let in.
    #[error("{0}")]
    Unusable(String),
}

fn differs(path: &str, problem: &str) -> RuleError {
    RuleError::Differs(format!("{path:?} {problem}"))
}

/// Whether `fields` compares anything: nulls only say what must not be there.
pub(super) fn asks_for_something(fields: &Value) -> bool {
    match fields {
        Value::Bool(_) | Value::Number(_) | Value::String(_) => true,
        Value::Object(members) => members.values().any(asks_for_something),
        Value::Null | Value::Array(_) => false,
    }
}

/// Whether there is a list somewhere: lists cannot be compared.
pub(super) fn has_list(fields: &Value) -> bool {
    match fields {
        Value::Array(_) => true,
        Value::Object(members) => members.values().any(has_list),
        _ => false,
    }
}

/// Holds every member of `fields` against the claim of the same name, structures inside included.
pub(super) fn must_match(fields: &Value, claims: &Claims, path: &str) -> Result<(), RuleError> {
    for (name, wanted) in fields.as_object().into_iter().flatten() {
        let path = if path.is_empty() {
            name.clone()
        } else {
            format!("{path}.{name}")
        };
        let found = claims.get(name).unwrap_or(&Value::Null);
        match (wanted, found) {
            (Value::Object(_), Value::Object(inside)) => must_match(wanted, inside, &path)?,
            (Value::Array(_), _) => {
                return Err(RuleError::Unusable(format!(
                    "must_match_fields: lists cannot be compared ({path})"
                )));
            }
            (Value::Number(wanted), Value::Number(found)) if wanted.as_f64() == found.as_f64() => {}
            (wanted, found) if wanted == found && !found.is_object() => {}
            (_, Value::Null) => return Err(differs(&path, "is missing")),
            (Value::Null, _) => return Err(differs(&path, "must not be there")),
            _ => return Err(differs(&path, "is different")),
        }
    }
    Ok(())
}

/// The operators of a condition, by their keys.
pub(super) const OPERATORS: [&str; 4] = ["eq", "not_eq", "in", "not_in"];

/// Holds a condition against the claims.
pub(super) fn condition(condition: &Value, claims: &Claims) -> Result<(), RuleError> {
    let attribute = condition["attribute"].as_str().unwrap_or_default();
    let found =
        claim(claims, attribute.split('.')).ok_or_else(|| differs(attribute, "is missing"))?;
    let (operator, values) = OPERATORS
        .iter()
        .find_map(|name| {
            let operand = condition.get(name)?;
            let one = operand.get("value").map(std::slice::from_ref);
            let several = operand.get("values").and_then(Value::as_array);
            Some((*name, one.or(several.map(Vec::as_slice))?))
        })
        .ok_or_else(|| RuleError::Unusable("a condition has no operator".to_owned()))?;
    let mut any = false;
    for value in values {
        any |= matches(found, value.as_str().unwrap_or_default())
            .map_err(|problem| RuleError::Unusable(format!("claim {attribute:?}: {problem}")))?;
    }
    match (operator, any) {
        ("eq" | "in", true) | ("not_eq" | "not_in", false) => Ok(()),
        ("eq" | "in", false) => Err(differs(attribute, "is none of those that are allowed")),
        _ => Err(differs(attribute, "is one that is excluded")),
    }
}

/// The claim at a path.
pub(super) fn claim<'a, 'p>(
    claims: &'a Claims,
    path: impl IntoIterator<Item = &'p str>,
) -> Option<&'a Value> {
    let mut path = path.into_iter();
    let first = claims.get(path.next()?)?;
    path.try_fold(first, |value, name| value.as_object()?.get(name))
}

/// The first whole number that a JSON number may not be told apart from its neighbour.
const UNSAFE: f64 = 9_007_199_254_740_992.0;

/// Whether a claim is `wanted`, which is always text in a rule.
fn matches(found: &Value, wanted: &str) -> Result<bool, String> {
    match found {
        Value::String(found) => Ok(found == wanted),
        Value::Bool(found) => {
            let wanted = match wanted {
                "1" | "t" | "T" | "TRUE" | "true" | "True" => true,
                "0" | "f" | "F" | "FALSE" | "false" | "False" => false,
                _ => return Err(format!("it is a boolean, {wanted:?} is none")),
            };
            Ok(*found == wanted)
        }
        Value::Number(found) => {
            let found = found.as_f64().unwrap_or(f64::NAN);
            let wanted: f64 = wanted
                .parse()
                .map_err(|_source| format!("it is a number, {wanted:?} is none"))?;
            if [found, wanted]
                .iter()
                .any(|n| n.fract() == 0.0 && n.abs() >= UNSAFE)
            {
                return Err("integers of this size cannot be safely compared".to_owned());
            }
            #[expect(
                clippy::float_cmp,
                reason = "both were read from text by the same rule"
            )]
            Ok(found == wanted)
        }
        Value::Null | Value::Array(_) | Value::Object(_) => {
            Err("only texts, numbers and booleans can be compared".to_owned())
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn claims() -> Claims {
        json!({
            "org": "acme", "n": 7, "f": 1.5, "yes": true, "nil": null, "list": ["a"],
            "google": {"instance": {"zone": "z1", "number": 123_456_123_456_u64}},
            "large": 9_007_199_254_740_993_u64,
        })
        .as_object()
        .cloned()
        .unwrap()
    }

    #[test]
    fn fields_match_by_type_and_value() {
        for fields in [
            json!({"org": "acme"}),
            json!({"n": 7, "yes": true, "f": 1.5}),
            json!({"n": 7.0}),
            json!({"google": {"instance": {"zone": "z1"}}}),
            json!({"nil": null, "other": null, "org": "acme"}),
        ] {
            assert_eq!(must_match(&fields, &claims(), ""), Ok(()), "{fields}");
        }
        for (fields, path) in [
            (json!({"org": "other"}), "\"org\" is different"),
            (json!({"n": "7"}), "\"n\" is different"),
            (json!({"yes": "true"}), "\"yes\" is different"),
            (json!({"none": "x"}), "\"none\" is missing"),
            (json!({"org": null}), "\"org\" must not be there"),
            (
                json!({"google": {"instance": {"zone": "z2"}}}),
                "\"google.instance.zone\" is different",
            ),
            (json!({"google": "x"}), "\"google\" is different"),
            (json!({"org": {"x": 1}}), "\"org\" is different"),
            (json!({"list": ["a"]}), "lists cannot be compared"),
        ] {
            let problem = must_match(&fields, &claims(), "").unwrap_err().to_string();
            assert!(problem.contains(path), "{fields}: {problem}");
        }
        assert!(asks_for_something(&json!({"a": {"b": false}})));
        assert!(!asks_for_something(&json!({"a": {"b": null}, "c": []})));
        assert!(has_list(&json!({"a": {"b": []}})) && !has_list(&json!({"a": 1})));
    }

    #[test]
    fn conditions_compare_texts_numbers_and_booleans() {
        let check = |value: &Value| condition(value, &claims());
        for good in [
            json!({"attribute": "org", "eq": {"value": "acme"}}),
            json!({"attribute": "google.instance.number", "eq": {"value": "123456123456"}}),
            json!({"attribute": "yes", "not_eq": {"value": "false"}}),
            json!({"attribute": "f", "in": {"values": ["1", "1.5"]}}),
            json!({"attribute": "google.instance.zone", "not_in": {"values": ["z2", "z3"]}}),
        ] {
            assert_eq!(check(&good), Ok(()), "{good}");
        }
        for (bad, complaint) in [
            (
                json!({"attribute": "org", "eq": {"value": "x"}}),
                "none of those",
            ),
            (
                json!({"attribute": "org", "not_eq": {"value": "acme"}}),
                "excluded",
            ),
            (
                json!({"attribute": "none", "not_eq": {"value": "x"}}),
                "is missing",
            ),
            (
                json!({"attribute": "org.x", "eq": {"value": "x"}}),
                "is missing",
            ),
            (
                json!({"attribute": "n", "not_eq": {"value": "x"}}),
                "it is a number",
            ),
            (
                json!({"attribute": "yes", "eq": {"value": "yes"}}),
                "it is a boolean",
            ),
            (
                json!({"attribute": "large", "eq": {"value": "1"}}),
                "safely compared",
            ),
            (
                json!({"attribute": "n", "not_eq": {"value": "9007199254740993"}}),
                "safely compared",
            ),
            (
                json!({"attribute": "list", "eq": {"value": "a"}}),
                "only texts",
            ),
            (json!({"attribute": "org"}), "no operator"),
        ] {
            let problem = check(&bad).unwrap_err().to_string();
            assert!(problem.contains(complaint), "{bad}: {problem}");
        }
    }
}
