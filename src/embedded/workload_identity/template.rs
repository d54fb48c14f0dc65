//! Texts with expressions inside: `/svc/{{ workload.systemd.service }}`.

use super::attrs::Attrs;
use super::expression::{EvalError, Expression, MAX_TEXT, Mode, ParseError, Type, Value};

/// Why a template has no result.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum TemplateError {
    /// An expression does not parse.
    #[error("template expression {expression:?}: {source}")]
    Parse {
        /// Its text.
        expression: String,
        /// What is wrong with it.
        #[source]
        source: ParseError,
    },
    /// The value of an expression is a set, a dictionary or a time.
    #[error("template expression {expression:?} gives a {kind}, a template needs one string")]
    Kind {
        /// Its text.
        expression: String,
        /// The type of its value.
        kind: Type,
    },
    /// An expression has no value for these attributes.
    #[error("template expression {expression:?}: {source}")]
    Eval {
        /// Its text.
        expression: String,
        /// Why.
        #[source]
        source: EvalError,
    },
    /// The result is longer than [`MAX_TEXT`].
    #[error("the rendered text is longer than {MAX_TEXT} bytes")]
    TooLong,
}

/// A parsed template.
#[derive(Debug, Clone, PartialEq)]
pub struct Template(Vec<Part>);

#[derive(Debug, Clone, PartialEq)]
enum Part {
    Literal(String),
    Expression { source: String, parsed: Expression },
}

impl Template {
    /// Parses all expressions of `text`.
    ///
    /// An expression holds no braces; what looks like one but does, is literal text. A blank
    /// expression renders as nothing, an empty one (`{{}}`) is literal.
    ///
    /// # Errors
    /// [`TemplateError::Parse`] or [`TemplateError::Kind`].
    pub fn parse(text: &str) -> Result<Self, TemplateError> {
        let mut parts = Vec::new();
        let mut rest = text;
        while let Some((before, inside, after)) = next(rest) {
            parts.push(Part::Literal(before.to_owned()));
            rest = after;
            if inside.trim().is_empty() {
                continue;
            }
            let source = inside.trim().to_owned();
            let parsed = Expression::parse(&source, Mode::Template).map_err(|error| {
                TemplateError::Parse {
                    expression: source.clone(),
                    source: error,
                }
            })?;
            if !matches!(parsed.kind(), Type::Text | Type::Flag | Type::Integer) {
                return Err(TemplateError::Kind {
                    expression: source,
                    kind: parsed.kind(),
                });
            }
            parts.push(Part::Expression { source, parsed });
        }
        parts.push(Part::Literal(rest.to_owned()));
        Ok(Self(parts))
    }

    /// The text for these attributes.
    ///
    /// # Errors
    /// [`TemplateError`].
    pub fn render(&self, attrs: &Attrs) -> Result<String, TemplateError> {
        let mut text = String::new();
        for part in &self.0 {
            match part {
                Part::Literal(literal) => text.push_str(literal),
                Part::Expression { source, parsed } => {
                    let value = parsed
                        .evaluate(attrs)
                        .map_err(|error| TemplateError::Eval {
                            expression: source.clone(),
                            source: error,
                        })?;
                    match value {
                        Value::Text(value) => text.push_str(&value),
                        Value::Flag(value) => text.push_str(&value.to_string()),
                        Value::Integer(value) => text.push_str(&value.to_string()),
                        _ => {
                            return Err(TemplateError::Kind {
                                expression: source.clone(),
                                kind: parsed.kind(),
                            });
                        }
                    }
                }
            }
            if text.len() > MAX_TEXT {
                return Err(TemplateError::TooLong);
            }
        }
        Ok(text)
    }
}

/// Parses and renders at once.
///
/// # Errors
/// [`TemplateError`].
pub fn render(text: &str, attrs: &Attrs) -> Result<String, TemplateError> {
    Template::parse(text)?.render(attrs)
}

/// The first `{{…}}` with at least one character and no brace inside: what stands before it,
/// inside, and after it.
fn next(text: &str) -> Option<(&str, &str, &str)> {
    let mut from = 0;
    loop {
        let open = from + text.get(from..)?.find("{{")?;
        let inner = text.get(open + 2..)?;
        let length = inner.find(['{', '}'])?;
        let (inside, end) = inner.split_at_checked(length)?;
        match end.strip_prefix("}}") {
            Some(after) if length > 0 => return Some((text.get(..open)?, inside, after)),
            _ => from = open + 1,
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::embedded::workload_identity::attrs::UserFacts;
    use crate::pb::teleport::workloadidentity::v1 as wire;

    fn attrs() -> Attrs {
        let workload = wire::WorkloadAttrs {
            unix: Some(wire::WorkloadAttrsUnix {
                attested: true,
                pid: 7,
                uid: 1000,
                ..Default::default()
            }),
            systemd: Some(wire::WorkloadAttrsSystemd {
                attested: true,
                service: "my-app".into(),
            }),
            ..Default::default()
        };
        Attrs::new(Some(&workload), &UserFacts::default(), &json!(null)).unwrap()
    }

    #[test]
    fn templates_that_render() {
        for (text, result) in [
            ("", ""),
            ("/svc/foo", "/svc/foo"),
            ("/svc/{{workload.systemd.service}}", "/svc/my-app"),
            (
                "{{ workload.systemd.service }}{{workload.unix.uid}}",
                "my-app1000",
            ),
            ("{{workload.unix.gid}}/{{user.is_bot}}", "0/false"),
            ("{{strings.upper(workload.systemd.service)}}", "MY-APP"),
            ("a{{   }}b", "ab"),
            ("a{{}}b", "a{{}}b"),
            ("{{{workload.unix.pid}}}", "{7}"),
            ("{{ {a} }}", "{{ {a} }}"),
            ("{{ open", "{{ open"),
            ("}}é{{workload.unix.pid}}{{", "}}é7{{"),
        ] {
            assert_eq!(render(text, &attrs()).as_deref(), Ok(result), "{text}");
        }
    }

    #[test]
    fn templates_that_do_not() {
        for (text, part) in [
            ("{{nothing}}", "unknown attribute \"nothing\""),
            ("{{set(\"a\")}}", "gives a set"),
            (
                "{{workload.unix.binary_path}}",
                "workload.unix.binary_path is unset",
            ),
            (
                "{{workload.kubernetes.namespace}}",
                "workload.kubernetes.namespace is unset",
            ),
            ("{{workload.kubernetes.labels.app}}", "is unset"),
            ("{{user.labels.app}}", "has no key \"app\""),
            ("{{user.traits.app}}", "has no key \"app\""),
            ("{{sigstore.policy_satisfied(\"a\")}}", "unknown"),
            ("{{a b}}", "character 3"),
        ] {
            let error = render(text, &attrs()).expect_err(text).to_string();
            assert!(error.contains(part), "{text}: {error}");
        }
        let long = "{{workload.systemd.service}}".repeat(MAX_TEXT / 6 + 1);
        assert_eq!(render(&long, &attrs()), Err(TemplateError::TooLong));
    }
}
