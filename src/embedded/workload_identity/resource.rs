//! The `workload_identity` resource: its spec as files and the wire have it, checked.
//!
//! Files are read as a cluster reads them: names in `snake_case` or `camelCase`, unknown keys
//! refused. Durations may also be written the Go way (`1h30m`), which a cluster refuses.

use std::collections::BTreeMap;
use std::time::Duration;

use prost_types::value::Kind;
use serde_json::{Map, Value, json};

use super::expression::Expression;
use crate::embedded::desk::metadata;
use crate::embedded::instant::from_wire;
use crate::embedded::store::Resource;
use crate::pb::teleport::workloadidentity::v1 as wire;
use crate::yaml::duration;
use wire::workload_identity_condition::Operator;

/// The kind of the resource.
pub const KIND: &str = "workload_identity";
/// The only version of it.
pub const VERSION: &str = "v1";
/// The longest life of an X.509-SVID that a resource may allow.
pub const MAX_X509_TTL: Duration = Duration::from_hours(14 * 24);
/// The longest life of a JWT-SVID that a resource may allow.
pub const MAX_JWT_TTL: Duration = Duration::from_hours(24);
/// The deepest nesting of JSON that is turned into a message.
const MAX_DEPTH: usize = 32;

/// What is wrong with a resource.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{path}: {problem}")]
pub struct ResourceError {
    /// The place, for example `spec.spiffe.id`.
    pub path: String,
    /// What is wrong there.
    pub problem: String,
}

type Checked<T> = Result<T, ResourceError>;

fn fail<T>(path: &str, problem: impl Into<String>) -> Checked<T> {
    Err(ResourceError {
        path: path.to_owned(),
        problem: problem.into(),
    })
}

/// Reads and checks the `spec` of a file.
///
/// # Errors
/// [`ResourceError`], the first one found.
pub fn spec_from_json(value: &Value) -> Checked<wire::WorkloadIdentitySpec> {
    let mut spec = Object::read("spec", value)?;
    let parsed = wire::WorkloadIdentitySpec {
        rules: spec.section("rules", rules)?,
        spiffe: spec.section("spiffe", spiffe)?,
    };
    spec.finish()?;
    check_spec(&parsed)?;
    Ok(parsed)
}

/// Checks what the wire brought.
///
/// # Errors
/// [`ResourceError`], the first one found.
pub fn check_spec(spec: &wire::WorkloadIdentitySpec) -> Checked<()> {
    let Some(spiffe) = &spec.spiffe else {
        return fail("spec.spiffe", "is required");
    };
    if !spiffe.id.starts_with('/') {
        return fail("spec.spiffe.id", "must begin with \"/\"");
    }
    if let Some(ttl) = spiffe.x509.as_ref().and_then(|x509| x509.maximum_ttl) {
        check_ttl("spec.spiffe.x509.maximum_ttl", ttl, MAX_X509_TTL)?;
    }
    if let Some(ttl) = spiffe.jwt.as_ref().and_then(|jwt| jwt.maximum_ttl) {
        check_ttl("spec.spiffe.jwt.maximum_ttl", ttl, MAX_JWT_TTL)?;
    }
    let rules = spec.rules.as_ref().map(|rules| rules.allow.as_slice());
    for (index, rule) in rules.unwrap_or_default().iter().enumerate() {
        check_rule(&format!("spec.rules.allow[{index}]"), rule)?;
    }
    Ok(())
}

fn check_ttl(path: &str, ttl: prost_types::Duration, most: Duration) -> Checked<()> {
    match Duration::try_from(ttl) {
        Ok(ttl) if ttl <= most => Ok(()),
        _ => fail(
            path,
            format!("must be between 0 and {}", duration::format(most)),
        ),
    }
}

fn check_rule(path: &str, rule: &wire::WorkloadIdentityRule) -> Checked<()> {
    match (rule.conditions.as_slice(), rule.expression.as_str()) {
        ([], "") => fail(path, "needs conditions or an expression"),
        ([], expression) => Expression::rule(expression)
            .map(drop)
            .or_else(|error| fail(&format!("{path}.expression"), error.to_string())),
        (conditions, "") => {
            for (index, condition) in conditions.iter().enumerate() {
                let path = format!("{path}.conditions[{index}]");
                if condition.attribute.is_empty() {
                    return fail(&format!("{path}.attribute"), "is required");
                }
                if condition.operator.is_none() {
                    return fail(&path, "needs one of eq, not_eq, in, not_in");
                }
            }
            Ok(())
        }
        (_, _) => fail(
            path,
            "has both conditions and an expression, only one may be",
        ),
    }
}

/// The spec as files and `tctl get` write it: names in `snake_case`, zero values left out.
#[must_use]
pub fn spec_to_json(spec: &wire::WorkloadIdentitySpec) -> Value {
    let mut json = Map::new();
    if let Some(rules) = &spec.rules {
        let allow: Vec<Value> = rules.allow.iter().map(rule_to_json).collect();
        let mut section = Map::new();
        put(&mut section, "allow", allow.into());
        json.insert("rules".to_owned(), section.into());
    }
    if let Some(spiffe) = &spec.spiffe {
        let mut section = Map::new();
        put(&mut section, "id", spiffe.id.as_str().into());
        put(&mut section, "hint", spiffe.hint.as_str().into());
        if let Some(x509) = &spiffe.x509 {
            let mut inner = Map::new();
            put(&mut inner, "dns_sans", json!(x509.dns_sans));
            if let Some(subject) = &x509.subject_template {
                let mut names = Map::new();
                put(
                    &mut names,
                    "common_name",
                    subject.common_name.as_str().into(),
                );
                put(
                    &mut names,
                    "organization",
                    subject.organization.as_str().into(),
                );
                let unit = subject.organizational_unit.as_str();
                put(&mut names, "organizational_unit", unit.into());
                inner.insert("subject_template".to_owned(), names.into());
            }
            put(&mut inner, "maximum_ttl", ttl_to_json(x509.maximum_ttl));
            section.insert("x509".to_owned(), inner.into());
        }
        if let Some(jwt) = &spiffe.jwt {
            let mut inner = Map::new();
            if let Some(claims) = &jwt.extra_claims {
                inner.insert("extra_claims".to_owned(), struct_to_json(claims).into());
            }
            put(&mut inner, "maximum_ttl", ttl_to_json(jwt.maximum_ttl));
            section.insert("jwt".to_owned(), inner.into());
        }
        json.insert("spiffe".to_owned(), section.into());
    }
    json.into()
}

/// Inserts `value` unless it says nothing.
fn put(json: &mut Map<String, Value>, key: &str, value: Value) {
    let nothing = match &value {
        Value::Null => true,
        Value::String(text) => text.is_empty(),
        Value::Array(items) => items.is_empty(),
        _ => false,
    };
    if !nothing {
        json.insert(key.to_owned(), value);
    }
}

fn ttl_to_json(ttl: Option<prost_types::Duration>) -> Value {
    ttl.map_or(Value::Null, |ttl| ttl.to_string().into())
}

fn rule_to_json(rule: &wire::WorkloadIdentityRule) -> Value {
    let conditions: Vec<Value> = rule
        .conditions
        .iter()
        .map(|condition| {
            let mut json = Map::new();
            put(&mut json, "attribute", condition.attribute.as_str().into());
            let (name, operand) = match &condition.operator {
                Some(Operator::Eq(eq)) => ("eq", json!({"value": eq.value})),
                Some(Operator::NotEq(not)) => ("not_eq", json!({"value": not.value})),
                Some(Operator::In(list)) => ("in", json!({"values": list.values})),
                Some(Operator::NotIn(list)) => ("not_in", json!({"values": list.values})),
                None => ("", Value::Null),
            };
            put(&mut json, name, operand);
            json.into()
        })
        .collect();
    let mut json = Map::new();
    put(&mut json, "conditions", conditions.into());
    put(&mut json, "expression", rule.expression.as_str().into());
    json.into()
}

/// A stored resource as the wire shows it.
///
/// # Errors
/// [`ResourceError`] if the store holds what this program would not have written.
pub fn to_message(resource: &Resource) -> Checked<wire::WorkloadIdentity> {
    Ok(wire::WorkloadIdentity {
        kind: KIND.to_owned(),
        sub_kind: resource.sub_kind.clone(),
        version: resource.version.clone(),
        metadata: Some(metadata(resource)),
        spec: Some(spec_from_json(&resource.spec)?),
        scope: String::new(),
    })
}

/// A resource from the wire, checked, to be stored.
///
/// # Errors
/// [`ResourceError`], the first one found.
pub fn from_message(message: wire::WorkloadIdentity) -> Checked<Resource> {
    if message.kind != KIND {
        return fail("kind", format!("must be {KIND:?}"));
    }
    if message.version != VERSION {
        return fail("version", format!("must be {VERSION:?}"));
    }
    if !message.scope.is_empty() {
        return fail("scope", "this cluster has no scopes");
    }
    let metadata = message.metadata.unwrap_or_default();
    if metadata.name.is_empty() {
        return fail("metadata.name", "is required");
    }
    let Some(spec) = message.spec else {
        return fail("spec", "is required");
    };
    check_spec(&spec)?;
    let expires = match metadata.expires.map(from_wire) {
        None => None,
        Some(Some(time)) => Some(time),
        Some(None) => return fail("metadata.expires", "is no point in time"),
    };
    Ok(Resource {
        kind: KIND.to_owned(),
        sub_kind: message.sub_kind,
        version: message.version,
        name: metadata.name,
        description: metadata.description,
        labels: metadata.labels.into_iter().collect::<BTreeMap<_, _>>(),
        expires,
        revision: metadata.revision,
        spec: spec_to_json(&spec),
        status: Value::Null,
    })
}

/// The members of a protobuf struct as JSON; whole numbers become integers.
#[must_use]
pub fn struct_to_json(value: &prost_types::Struct) -> Map<String, Value> {
    let members = value.fields.iter();
    members
        .map(|(name, value)| (name.clone(), value_to_json(value)))
        .collect()
}

fn value_to_json(value: &prost_types::Value) -> Value {
    match &value.kind {
        None | Some(Kind::NullValue(_)) => Value::Null,
        Some(Kind::BoolValue(flag)) => json!(flag),
        Some(Kind::NumberValue(number)) => number_to_json(*number),
        Some(Kind::StringValue(text)) => json!(text),
        Some(Kind::ListValue(list)) => list.values.iter().map(value_to_json).collect(),
        Some(Kind::StructValue(members)) => struct_to_json(members).into(),
    }
}

#[expect(
    clippy::cast_possible_truncation,
    clippy::float_cmp,
    reason = "only numbers that are whole and that a double holds exactly"
)]
fn number_to_json(number: f64) -> Value {
    const EXACT: f64 = 9_007_199_254_740_992.0;
    if number.trunc() == number && number.abs() < EXACT {
        json!(number as i64)
    } else {
        json!(number)
    }
}

fn json_to_value(path: &str, value: &Value, depth: usize) -> Checked<prost_types::Value> {
    if depth > MAX_DEPTH {
        return fail(path, "nests too deep");
    }
    let kind = match value {
        Value::Null => Kind::NullValue(0),
        Value::Bool(flag) => Kind::BoolValue(*flag),
        Value::Number(number) => match number.as_f64() {
            Some(number) => Kind::NumberValue(number),
            None => return fail(path, "is a number too large"),
        },
        Value::String(text) => Kind::StringValue(text.clone()),
        Value::Array(items) => Kind::ListValue(prost_types::ListValue {
            values: items
                .iter()
                .map(|item| json_to_value(path, item, depth + 1))
                .collect::<Checked<_>>()?,
        }),
        Value::Object(members) => Kind::StructValue(json_to_struct(path, members, depth + 1)?),
    };
    Ok(prost_types::Value { kind: Some(kind) })
}

fn json_to_struct(
    path: &str,
    members: &Map<String, Value>,
    depth: usize,
) -> Checked<prost_types::Struct> {
    let fields = members
        .iter()
        .map(|(name, value)| Ok((name.clone(), json_to_value(path, value, depth)?)));
    Ok(prost_types::Struct {
        fields: fields.collect::<Checked<_>>()?,
    })
}

/// A JSON object being read key by key.
struct Object<'a> {
    path: String,
    members: &'a Map<String, Value>,
    known: Vec<&'a str>,
}

impl<'a> Object<'a> {
    fn read(path: &str, value: &'a Value) -> Checked<Self> {
        match value {
            Value::Object(members) => Ok(Self {
                path: path.to_owned(),
                members,
                known: Vec::new(),
            }),
            _ => fail(path, "must be a mapping"),
        }
    }

    /// The value under `name`, or under its `camelCase` form; `null` counts as absent.
    fn take(&mut self, name: &str) -> (String, Option<&'a Value>) {
        let mut found = None;
        for (key, value) in self.members {
            if *key == name || *key == camel(name) {
                self.known.push(key);
                found = Some(value).filter(|value| !value.is_null());
            }
        }
        (format!("{}.{name}", self.path), found)
    }

    fn text(&mut self, name: &str) -> Checked<String> {
        match self.take(name) {
            (_, None) => Ok(String::new()),
            (_, Some(Value::String(text))) => Ok(text.clone()),
            (path, Some(_)) => fail(&path, "must be a string"),
        }
    }

    fn list<T>(
        &mut self,
        name: &str,
        read: impl Fn(&str, &'a Value) -> Checked<T>,
    ) -> Checked<Vec<T>> {
        match self.take(name) {
            (_, None) => Ok(Vec::new()),
            (path, Some(Value::Array(items))) => items
                .iter()
                .enumerate()
                .map(|(index, item)| read(&format!("{path}[{index}]"), item))
                .collect(),
            (path, Some(_)) => fail(&path, "must be a list"),
        }
    }

    fn texts(&mut self, name: &str) -> Checked<Vec<String>> {
        self.list(name, |path, item| match item {
            Value::String(text) => Ok(text.clone()),
            _ => fail(path, "must be a string"),
        })
    }

    fn section<T>(
        &mut self,
        name: &str,
        read: impl Fn(&mut Object<'a>) -> Checked<T>,
    ) -> Checked<Option<T>> {
        let (path, Some(value)) = self.take(name) else {
            return Ok(None);
        };
        let mut object = Object::read(&path, value)?;
        let parsed = read(&mut object)?;
        object.finish()?;
        Ok(Some(parsed))
    }

    fn ttl(&mut self, name: &str) -> Checked<Option<prost_types::Duration>> {
        let (path, value) = self.take(name);
        let Some(value) = value else { return Ok(None) };
        let ttl = value.as_str().and_then(|text| duration::parse(text).ok());
        match ttl.and_then(|ttl| prost_types::Duration::try_from(ttl).ok()) {
            Some(ttl) => Ok(Some(ttl)),
            None => fail(&path, "must be a duration such as \"3600s\" or \"1h30m\""),
        }
    }

    fn finish(&self) -> Checked<()> {
        let known = |key: &str| self.known.contains(&key);
        match self.members.keys().find(|key| !known(key)) {
            Some(key) => fail(&format!("{}.{key}", self.path), "is not a known key"),
            None => Ok(()),
        }
    }
}

fn camel(name: &str) -> String {
    let mut parts = name.split('_');
    let mut camel = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        let mut characters = part.chars();
        camel.extend(characters.next().map(|first| first.to_ascii_uppercase()));
        camel.push_str(characters.as_str());
    }
    camel
}

fn rules(section: &mut Object<'_>) -> Checked<wire::WorkloadIdentityRules> {
    let allow = section.list("allow", |path, value| {
        let mut rule = Object::read(path, value)?;
        let parsed = wire::WorkloadIdentityRule {
            conditions: rule.list("conditions", condition)?,
            expression: rule.text("expression")?,
        };
        rule.finish()?;
        Ok(parsed)
    })?;
    Ok(wire::WorkloadIdentityRules { allow })
}

fn condition(path: &str, value: &Value) -> Checked<wire::WorkloadIdentityCondition> {
    let mut condition = Object::read(path, value)?;
    let attribute = condition.text("attribute")?;
    let one = |operand: &mut Object<'_>| operand.text("value");
    let many = |operand: &mut Object<'_>| operand.texts("values");
    let eq = condition.section("eq", one)?;
    let not_eq = condition.section("not_eq", one)?;
    let within = condition.section("in", many)?;
    let not_in = condition.section("not_in", many)?;
    let mut operators = [
        eq.map(|value| Operator::Eq(wire::WorkloadIdentityConditionEq { value })),
        not_eq.map(|value| Operator::NotEq(wire::WorkloadIdentityConditionNotEq { value })),
        within.map(|values| Operator::In(wire::WorkloadIdentityConditionIn { values })),
        not_in.map(|values| Operator::NotIn(wire::WorkloadIdentityConditionNotIn { values })),
    ]
    .into_iter()
    .flatten();
    let operator = operators.next();
    if operators.next().is_some() {
        return fail(path, "needs exactly one of eq, not_eq, in, not_in");
    }
    condition.finish()?;
    Ok(wire::WorkloadIdentityCondition {
        attribute,
        operator,
    })
}

fn spiffe(section: &mut Object<'_>) -> Checked<wire::WorkloadIdentitySpiffe> {
    Ok(wire::WorkloadIdentitySpiffe {
        id: section.text("id")?,
        hint: section.text("hint")?,
        x509: section.section("x509", |x509| {
            Ok(wire::WorkloadIdentitySpiffex509 {
                dns_sans: x509.texts("dns_sans")?,
                subject_template: x509.section("subject_template", |subject| {
                    Ok(wire::X509DistinguishedNameTemplate {
                        common_name: subject.text("common_name")?,
                        organization: subject.text("organization")?,
                        organizational_unit: subject.text("organizational_unit")?,
                    })
                })?,
                maximum_ttl: x509.ttl("maximum_ttl")?,
            })
        })?,
        jwt: section.section("jwt", |jwt| {
            let (path, claims) = jwt.take("extra_claims");
            let extra_claims = match claims {
                None => None,
                Some(Value::Object(members)) => Some(json_to_struct(&path, members, 0)?),
                Some(_) => return fail(&path, "must be a mapping"),
            };
            Ok(wire::WorkloadIdentitySpiffejwt {
                extra_claims,
                maximum_ttl: jwt.ttl("maximum_ttl")?,
            })
        })?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_spec_of_the_guide_round_trips() {
        for spec in [
            json!({"spiffe": {"id": "/svc/foo"}}),
            json!({
                "rules": {"allow": [
                    {"conditions": [
                        {"attribute": "user.name", "eq": {"value": "x"}},
                        {"attribute": "user.name", "not_eq": {"value": "y"}},
                        {"attribute": "user.name", "in": {"values": ["x"]}},
                        {"attribute": "user.name", "not_in": {"values": ["y"]}},
                    ]},
                    {"expression": "user.is_bot"},
                ]},
                "spiffe": {
                    "id": "/svc/{{user.name}}", "hint": "h",
                    "x509": {
                        "dns_sans": ["a.b"],
                        "subject_template": {"common_name": "c", "organization": "o",
                                             "organizational_unit": "u"},
                        "maximum_ttl": "3600s",
                    },
                    "jwt": {"extra_claims": {"a": [1, 0.5, true, null, {"b": "c"}]},
                            "maximum_ttl": "0.500s"},
                },
            }),
        ] {
            assert_eq!(spec_to_json(&spec_from_json(&spec).unwrap()), spec);
        }
    }

    #[test]
    fn other_spellings_are_understood() {
        let spec = json!({"spiffe": {"id": "/a", "x509": {"dnsSans": ["a"], "maximumTtl": "1h30m"},
                                     "hint": null}});
        assert_eq!(
            spec_to_json(&spec_from_json(&spec).unwrap()),
            json!({"spiffe": {"id": "/a", "x509": {"dns_sans": ["a"], "maximum_ttl": "5400s"}}})
        );
    }

    #[test]
    fn bad_specs() {
        let rule = |rule: Value| json!({"spiffe": {"id": "/a"}, "rules": {"allow": [rule]}});
        let x509 = |x509: Value| json!({"spiffe": {"id": "/a", "x509": x509}});
        let jwt = |jwt: Value| json!({"spiffe": {"id": "/a", "jwt": jwt}});
        let is = |operator: Value| {
            let mut condition = operator;
            condition["attribute"] = json!("user.name");
            rule(json!({"conditions": [condition]}))
        };
        let first = "spec.rules.allow[0]";
        for (spec, path) in [
            (json!([]), "spec"),
            (json!({}), "spec.spiffe"),
            (json!({"spiffe": {}}), "spec.spiffe.id"),
            (json!({"spiffe": {"id": "svc"}}), "spec.spiffe.id"),
            (json!({"spiffe": {"id": 1}}), "spec.spiffe.id"),
            (
                json!({"spiffe": {"id": "/a", "idd": ""}}),
                "spec.spiffe.idd",
            ),
            (x509(json!({"dns_sans": "a"})), "spec.spiffe.x509.dns_sans"),
            (
                x509(json!({"dns_sans": [1]})),
                "spec.spiffe.x509.dns_sans[0]",
            ),
            (
                x509(json!({"maximum_ttl": 3600})),
                "spec.spiffe.x509.maximum_ttl",
            ),
            (
                x509(json!({"maximum_ttl": "337h"})),
                "spec.spiffe.x509.maximum_ttl",
            ),
            (
                jwt(json!({"maximum_ttl": "25h"})),
                "spec.spiffe.jwt.maximum_ttl",
            ),
            (
                jwt(json!({"maximum_ttl": "-1s"})),
                "spec.spiffe.jwt.maximum_ttl",
            ),
            (
                jwt(json!({"extra_claims": []})),
                "spec.spiffe.jwt.extra_claims",
            ),
            (rule(json!({})), first),
            (
                rule(json!({"expression": "nothing"})),
                "spec.rules.allow[0].expression",
            ),
            (
                rule(json!({"expression": "user.name"})),
                "spec.rules.allow[0].expression",
            ),
            (
                rule(json!({"expression": "true", "conditions": [
                    {"attribute": "user.name", "eq": {"value": ""}}]})),
                first,
            ),
            (
                rule(json!({"conditions": [{"eq": {"value": "a"}}]})),
                "spec.rules.allow[0].conditions[0].attribute",
            ),
            (is(json!({})), "spec.rules.allow[0].conditions[0]"),
            (
                is(json!({"eq": {"value": "a"}, "in": {"values": []}})),
                "spec.rules.allow[0].conditions[0]",
            ),
            (
                is(json!({"equals": {"value": "a"}})),
                "spec.rules.allow[0].conditions[0].equals",
            ),
        ] {
            assert_eq!(spec_from_json(&spec).unwrap_err().path, path, "{spec}");
        }
    }

    #[test]
    fn a_stored_resource_and_its_message_are_the_same() {
        let resource = Resource {
            kind: KIND.into(),
            version: VERSION.into(),
            name: "example".into(),
            labels: BTreeMap::from([("example".into(), "getting-started".into())]),
            revision: "r".into(),
            spec: json!({"spiffe": {"id": "/svc/foo"}}),
            ..Resource::default()
        };
        let message = to_message(&resource).unwrap();
        assert_eq!(from_message(message.clone()).unwrap(), resource);
        for (change, path) in [
            (
                wire::WorkloadIdentity {
                    kind: "x".into(),
                    ..message.clone()
                },
                "kind",
            ),
            (
                wire::WorkloadIdentity {
                    version: "v2".into(),
                    ..message.clone()
                },
                "version",
            ),
            (
                wire::WorkloadIdentity {
                    metadata: None,
                    ..message.clone()
                },
                "metadata.name",
            ),
            (
                wire::WorkloadIdentity {
                    spec: None,
                    ..message.clone()
                },
                "spec",
            ),
            (
                wire::WorkloadIdentity {
                    scope: "/s".into(),
                    ..message
                },
                "scope",
            ),
        ] {
            assert_eq!(from_message(change).unwrap_err().path, path);
        }
    }
}
