//! The verifying half of join method `generic_oidc` (facts: upstream `lib/join/genericoidc`).

mod expression;
mod rules;

use async_trait::async_trait;
use serde_json::{Map, Value, json};

use self::rules::{OPERATORS, RuleError};
use crate::join::verify::oidc::issuers::Issuer;
use crate::join::verify::oidc::{
    Claims, Expected, Source, claims, member, static_jwks, tls_ca, url,
};
use crate::join::verify::{Carrier, Dialogue, Joining, Seen, Verifier, set};
use crate::refusal::Refusal;
use crate::yaml::{Fields, to_json};

/// Lets the issuer be asked without TLS.
const INSECURE: &str = "insecure_allow_http_issuer";
const FIELDS: &str = "must_match_fields";
const ALLOW: &str = "allow_any";

/// Join method `generic_oidc`.
#[derive(Debug)]
pub struct GenericOidc;

#[async_trait]
impl Verifier for GenericOidc {
    fn name(&self) -> &'static str {
        "generic_oidc"
    }

    fn carrier(&self) -> Carrier {
        Carrier::IdToken
    }

    fn read(&self, spec: &mut Fields<'_>, stored: &mut Value) {
        let Some(mut section) = spec.section(self.name()) else {
            let hint = "add `generic_oidc: {issuer: …, audience: …, must_match_fields: {…}}`";
            return spec.error(self.name(), "`generic_oidc` is required", Some(hint));
        };
        let mut normal = json!({});
        let insecure = section.bool(INSECURE).unwrap_or_default();
        if insecure {
            set(&mut normal, INSECURE, true);
        }
        let texts = [
            ("issuer", url(&mut section, "issuer", insecure)),
            ("audience", section.required("audience")),
            ("static_jwks", static_jwks(&mut section)),
            ("tls_ca", tls_ca(&mut section)),
        ];
        for (key, text) in texts {
            if let Some(text) = text {
                set(&mut normal, key, text);
            }
        }
        let mut asks = false;
        if let Some(node) = section.node(FIELDS) {
            let fields = to_json(node);
            if !fields.is_object() || rules::has_list(&fields) {
                section.error(
                    FIELDS,
                    format!("`{FIELDS}` has to be a mapping without lists"),
                    Some(
                        "lists cannot be compared: use `contains` in an expression of `allow_any`",
                    ),
                );
            }
            asks = rules::asks_for_something(&fields);
            set(&mut normal, FIELDS, fields);
        }
        let allow: Vec<Value> = section
            .sections(ALLOW)
            .unwrap_or_default()
            .into_iter()
            .map(|mut rule| read_rule(&mut rule))
            .collect();
        if !asks && allow.is_empty() {
            section.error_here(
                format!("`{FIELDS}` or `{ALLOW}` has to compare a claim"),
                "without it everybody who has an account at the issuer would be let in",
            );
        }
        if !allow.is_empty() {
            set(&mut normal, ALLOW, allow);
        }
        section.finish();
        set(stored, self.name(), normal);
    }

    async fn verify(
        &self,
        joining: &Joining<'_>,
        _dialogue: &mut dyn Dialogue,
        seen: &mut Seen,
    ) -> Result<(), Refusal> {
        let section = &joining.spec[self.name()];
        let issuer = Issuer {
            url: member(section, "issuer").unwrap_or_default().to_owned(),
            authorities: member(section, "tls_ca").map(str::to_owned),
            insecure: section[INSECURE] == true,
        };
        let source = match member(section, "static_jwks") {
            Some(keys) => Source::Static(keys),
            None => Source::Discovery(issuer.clone()),
        };
        let expected = Expected {
            issuer: Some(&issuer.url),
            audience: member(section, "audience").unwrap_or_default(),
            // Providers put other things there; rules can ask for it.
            authorized_party: false,
        };
        let claims = claims(joining, &source, &expected).await?;
        let all = Value::Object(claims.clone());
        seen.metadata = json!({ "claims": all });
        seen.attributes = Some(Map::from_iter([("claims".to_owned(), all)]));
        judge(section, &claims).map_err(|problem| {
            seen.near = Some(problem.clone());
            let text = "id token claims did not match any allow rules";
            Refusal::denied(format!("{text}: {problem}")).context("validating generic_oidc rules")
        })
    }
}

/// Fields first, then whether one of the rules lets them in. What is said names claims, not what they
/// have to be.
fn judge(section: &Value, claims: &Claims) -> Result<(), String> {
    let fields = &section[FIELDS];
    let asks = rules::asks_for_something(fields);
    if !fields.is_null() {
        rules::must_match(fields, claims, "").map_err(|error| format!("{FIELDS}: {error}"))?;
    }
    let Some(allow) = section[ALLOW].as_array() else {
        return if asks {
            Ok(())
        } else {
            Err("the token has no rules".to_owned())
        };
    };
    let mut last = String::new();
    for (index, rule) in allow.iter().enumerate() {
        match judge_rule(rule, claims) {
            Ok(()) => return Ok(()),
            Err(RuleError::Differs(problem)) => last = format!("{ALLOW}[{index}]: claim {problem}"),
            // A rule that nobody understands is to be mended, not passed over.
            Err(RuleError::Unusable(problem)) => {
                return Err(format!("{ALLOW}[{index}]: {problem}"));
            }
        }
    }
    Err(last)
}

fn judge_rule(rule: &Value, claims: &Claims) -> Result<(), RuleError> {
    if let Some(source) = member(rule, "expression") {
        return match expression::evaluate(source, claims) {
            Ok(true) => Ok(()),
            Ok(false) => Err(RuleError::Differs("the expression is false".to_owned())),
            Err(problem) => Err(RuleError::Unusable(problem)),
        };
    }
    let conditions = rule["conditions"].as_array().filter(|all| !all.is_empty());
    let conditions =
        conditions.ok_or_else(|| RuleError::Unusable("it asks for nothing".to_owned()))?;
    conditions
        .iter()
        .try_for_each(|condition| rules::condition(condition, claims))
}

fn read_rule(rule: &mut Fields<'_>) -> Value {
    let source = rule.string("expression");
    if let Some(Err(error)) = source.as_deref().map(expression::check) {
        rule.error("expression", error.to_string(), None);
    }
    let conditions: Vec<Value> = rule
        .sections("conditions")
        .unwrap_or_default()
        .into_iter()
        .map(|mut condition| read_condition(&mut condition))
        .collect();
    if source.is_some() != conditions.is_empty() {
        rule.error_here(
            "a rule needs `conditions` or `expression`, and not both",
            "write one of them",
        );
    }
    rule.warn_unknown();
    match source {
        Some(source) => json!({ "expression": source }),
        None => json!({ "conditions": conditions }),
    }
}

fn read_condition(condition: &mut Fields<'_>) -> Value {
    let mut stored = json!({});
    if let Some(attribute) = condition.required("attribute") {
        set(&mut stored, "attribute", attribute);
    }
    let mut operators = 0;
    for name in OPERATORS {
        let Some(mut operand) = condition.section(name) else {
            continue;
        };
        operators += 1;
        let operand = if name.ends_with("in") {
            let values = operand.strings("values").unwrap_or_default();
            if values.is_empty() {
                operand.error("values", "`values` must not be empty", None);
            }
            operand.finish();
            json!({ "values": values })
        } else {
            let value = operand.string("value").unwrap_or_default();
            operand.finish();
            json!({ "value": value })
        };
        set(&mut stored, name, operand);
    }
    if operators != 1 {
        condition.error_here(
            "a condition needs exactly one of `eq`, `not_eq`, `in` and `not_in`",
            "write `eq: {value: …}`, for example",
        );
    }
    condition.warn_unknown();
    stored
}
