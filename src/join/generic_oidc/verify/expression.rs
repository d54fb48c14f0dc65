//! Expressions of `allow_any`: Teleport's predicate language over `claims` (facts: upstream
//! `lib/join/genericoidc/expression.go`). Claims have no schema, so types show when they are looked at.

use regex::RegexBuilder;
use serde_json::Value;

use super::rules::claim;
use crate::expression::{ParseError, Raw, RawKind, parse};
use crate::join::verify::oidc::Claims;

/// The largest compiled regular expression, in bytes.
const MAX_REGEXP: usize = 256 * 1024;
/// The functions, and the methods of lists.
const FUNCTIONS: &[&str] = &[
    "set",
    "contains",
    "contains_any",
    "contains_all",
    "is_empty",
    "isempty",
    "regexp.match",
    "strings.lower",
    "strings.upper",
];

/// Checks that `source` is an expression over `claims`, as far as that shows without claims.
pub(super) fn check(source: &str) -> Result<(), ParseError> {
    names(&parse(source)?)
}

fn names(raw: &Raw) -> Result<(), ParseError> {
    let unknown = |what, name: String| {
        let at = raw.at;
        Err(ParseError::Unknown { at, what, name })
    };
    match &raw.kind {
        RawKind::Text(_) | RawKind::Integer(_) => Ok(()),
        RawKind::Name(_) | RawKind::Member(..) => match raw.dotted().as_deref() {
            Some(["claims", _, ..] | ["true" | "false"]) => Ok(()),
            Some(path) => unknown("attribute", path.join(".")),
            None => unknown("attribute", "a member of a value".to_owned()),
        },
        RawKind::Index(object, key) => {
            if !matches!(object.kind, RawKind::Name(ref name) if name == "claims") {
                names(object)?;
            }
            names(key)
        }
        RawKind::Call(function, arguments) => {
            let (name, receiver) = callee(function);
            if !FUNCTIONS.contains(&name.as_str()) {
                return unknown("function", name);
            }
            receiver.into_iter().chain(arguments).try_for_each(names)
        }
        RawKind::Not(operand) => names(operand),
        RawKind::All(operands) | RawKind::Any(operands) => operands.iter().try_for_each(names),
        RawKind::Equal { left, right, .. } => names(left).and_then(|()| names(right)),
    }
}

/// The name of what is called, and whose method it is.
fn callee(function: &Raw) -> (String, Option<&Raw>) {
    let path = function.dotted().map(|path| path.join("."));
    match (&function.kind, path) {
        (_, Some(path)) if FUNCTIONS.contains(&path.as_str()) => (path, None),
        (RawKind::Member(object, name), _) => (name.clone(), Some(object)),
        (_, path) => (path.unwrap_or_default(), None),
    }
}

/// The value of `source` for `claims`; anything but a boolean is an error, and so is a claim that is
/// not there.
pub(super) fn evaluate(source: &str, claims: &Claims) -> Result<bool, String> {
    let raw = parse(source).map_err(|error| error.to_string())?;
    flag(&raw, claims)
}

fn flag(raw: &Raw, claims: &Claims) -> Result<bool, String> {
    value(raw, claims)?
        .as_bool()
        .ok_or_else(|| wrong(raw, "a boolean"))
}

fn text(raw: &Raw, claims: &Claims) -> Result<String, String> {
    let found = value(raw, claims)?;
    found
        .as_str()
        .map(str::to_owned)
        .ok_or_else(|| wrong(raw, "a text"))
}

/// The texts of a list; a text alone is a list of one.
fn list(raw: &Raw, claims: &Claims) -> Result<Vec<String>, String> {
    texts(value(raw, claims)?).ok_or_else(|| wrong(raw, "a list of texts"))
}

fn texts(value: Value) -> Option<Vec<String>> {
    match value {
        Value::String(text) => Some(vec![text]),
        Value::Array(items) => {
            let texts = items
                .into_iter()
                .map(|item| item.as_str().map(str::to_owned));
            texts.collect()
        }
        _ => None,
    }
}

fn wrong(raw: &Raw, wanted: &str) -> String {
    format!("character {} of the expression: not {wanted}", raw.at)
}

fn value(raw: &Raw, claims: &Claims) -> Result<Value, String> {
    let absent = |path: &str| format!("field not found: {path}");
    Ok(match &raw.kind {
        RawKind::Text(text) => Value::String(text.clone()),
        RawKind::Integer(number) => Value::from(*number),
        RawKind::Name(_) | RawKind::Member(..) => match raw.dotted().as_deref() {
            Some(["true"]) => Value::Bool(true),
            Some(["false"]) => Value::Bool(false),
            Some(["claims", path @ ..]) => claim(claims, path.iter().copied())
                .cloned()
                .ok_or_else(|| absent(&path.join(".")))?,
            _ => return Err(wrong(raw, "a claim")),
        },
        RawKind::Index(object, key) => {
            let key = text(key, claims)?;
            let found = match &object.kind {
                RawKind::Name(name) if name == "claims" => claims.get(&key).cloned(),
                _ => value(object, claims)?.get(&key).cloned(),
            };
            found.ok_or_else(|| absent(&key))?
        }
        RawKind::Call(function, arguments) => call(raw, function, arguments, claims)?,
        RawKind::Not(operand) => Value::Bool(!flag(operand, claims)?),
        RawKind::All(operands) => {
            for operand in operands {
                if !flag(operand, claims)? {
                    return Ok(Value::Bool(false));
                }
            }
            Value::Bool(true)
        }
        RawKind::Any(operands) => {
            for operand in operands {
                if flag(operand, claims)? {
                    return Ok(Value::Bool(true));
                }
            }
            Value::Bool(false)
        }
        RawKind::Equal {
            left,
            right,
            negated,
        } => {
            let (left, right) = (value(left, claims)?, value(right, claims)?);
            let same = match (&left, &right) {
                (Value::String(_), Value::String(_)) | (Value::Bool(_), Value::Bool(_)) => {
                    left == right
                }
                (Value::Number(left), Value::Number(right)) => left.as_f64() == right.as_f64(),
                _ => return Err(wrong(raw, "a comparison of two values of one type")),
            };
            Value::Bool(same != *negated)
        }
    })
}

fn call(raw: &Raw, function: &Raw, arguments: &[Raw], claims: &Claims) -> Result<Value, String> {
    let (name, receiver) = callee(function);
    let all: Vec<&Raw> = receiver.into_iter().chain(arguments).collect();
    if name == "set" {
        let mut flat = Vec::new();
        for argument in arguments {
            flat.extend(list(argument, claims)?);
        }
        return Ok(Value::from(flat));
    }
    Ok(match (name.as_str(), all.as_slice()) {
        ("contains", [whole, item]) => {
            Value::Bool(list(whole, claims)?.contains(&text(item, claims)?))
        }
        ("contains_any", [whole, some]) => {
            let (whole, some) = (list(whole, claims)?, list(some, claims)?);
            Value::Bool(some.iter().any(|item| whole.contains(item)))
        }
        ("contains_all", [whole, some]) => {
            let (whole, some) = (list(whole, claims)?, list(some, claims)?);
            Value::Bool(!some.is_empty() && some.iter().all(|item| whole.contains(item)))
        }
        ("is_empty" | "isempty", [whole]) => Value::Bool(list(whole, claims)?.is_empty()),
        ("regexp.match", [whole, pattern]) => {
            let pattern = anchored(text(pattern, claims)?);
            let compiled = RegexBuilder::new(&pattern).size_limit(MAX_REGEXP).build();
            let compiled = compiled.map_err(|_source| wrong(raw, "a regular expression"))?;
            Value::Bool(
                list(whole, claims)?
                    .iter()
                    .any(|text| compiled.is_match(text)),
            )
        }
        ("strings.lower", [one]) => Value::String(text(one, claims)?.to_lowercase()),
        ("strings.upper", [one]) => Value::String(text(one, claims)?.to_uppercase()),
        _ => return Err(wrong(raw, "a call with as many arguments as it takes")),
    })
}

/// Upstream's rule for patterns: `^a regular expression$`, or else a text in which `*` stands for
/// anything. Either way the whole of the claim has to fit.
fn anchored(pattern: String) -> String {
    if pattern.starts_with('^') && pattern.ends_with('$') {
        return pattern;
    }
    let parts: Vec<_> = pattern.split('*').map(regex::escape).collect();
    format!("^{}$", parts.join("(?s:.*)"))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn claims() -> Claims {
        json!({
            "org": {"id": "abc", "http://acme/": {"name": "acme"}}, "name": "Acme", "n": 1,
            "groups": ["dev", "ops"], "ok": true,
        })
        .as_object()
        .cloned()
        .unwrap()
    }

    #[test]
    fn claims_are_compared_looked_up_and_searched() {
        for (source, expected) in [
            (r#"claims.name == "Acme""#, true),
            (r#"claims.name != "Acme""#, false),
            (
                r#"claims.org["http://acme/"]["name"] == "acme" && claims.org.id == "abc""#,
                true,
            ),
            (r#"claims["name"] == "Acme""#, true),
            ("claims.n == 1", true),
            ("claims.ok && !(claims.n == 2)", true),
            (r#"contains(claims.groups, "ops")"#, true),
            (r#"set(claims.groups).contains("x") || claims.ok"#, true),
            (r#"set("dev", "x").contains_any(claims.groups)"#, true),
            (r#"contains_all(claims.groups, set("dev", "x"))"#, false),
            ("is_empty(set())", true),
            (r#"regexp.match(claims.groups, "^o.*$")"#, true),
            (r#"regexp.match(claims.groups, "o*")"#, true),
            (r#"regexp.match(claims.groups, "o")"#, false),
            (r#"regexp.match(claims.groups, "^o")"#, false),
            (r#"strings.lower(claims.name) == "acme""#, true),
        ] {
            assert_eq!(check(source), Ok(()), "{source}");
            assert_eq!(evaluate(source, &claims()), Ok(expected), "{source}");
        }
    }

    #[test]
    fn what_cannot_be_told_lets_nobody_in() {
        for (source, complaint) in [
            (r#"claims.other == "x""#, "field not found: other"),
            (r#"claims.org.none.x == "x""#, "field not found: org.none.x"),
            (r#"claims.n == "1""#, "one type"),
            ("claims.name", "not a boolean"),
            (r#"contains(claims.n, "x")"#, "not a list"),
            (
                r#"regexp.match(claims.name, "^($")"#,
                "not a regular expression",
            ),
            (r#"contains("x")"#, "as many arguments"),
        ] {
            assert_eq!(check(source), Ok(()), "{source}");
            let problem = evaluate(source, &claims()).unwrap_err();
            assert!(problem.contains(complaint), "{source}: {problem}");
        }
        for source in [
            "",
            "claims",
            "user.name == \"x\"",
            "now()",
            "claims.a ==",
            "claims.a.b()",
        ] {
            assert!(check(source).is_err(), "{source}");
        }
    }
}
