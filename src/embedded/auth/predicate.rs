//! Filters of lists: the part of Teleport's predicate language that agents send.
//!
//! `name`, `labels["key"]`, `resource.metadata.name` and `resource.metadata.labels["key"]` compared
//! with texts by `==` and `!=`, joined by `&&`, `||` and `!`. A label that is not there is the empty
//! text, as upstream (`lib/services/parser.go`).

use std::collections::BTreeMap;

use crate::expression::{ParseError, Raw, RawKind, parse};

/// A parsed filter.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Predicate(Node);

#[derive(Debug, Clone, PartialEq, Eq)]
enum Node {
    Always(bool),
    Equal {
        left: Term,
        right: Term,
        negated: bool,
    },
    Not(Box<Node>),
    All(Vec<Node>),
    Any(Vec<Node>),
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Term {
    Text(String),
    Name,
    Label(String),
}

impl Predicate {
    /// Reads a filter; empty lets everything through.
    pub(super) fn parse(source: &str) -> Result<Self, ParseError> {
        if source.trim().is_empty() {
            return Ok(Self(Node::Always(true)));
        }
        node(&parse(source)?).map(Self)
    }

    /// Whether a resource with this name and these labels gets through.
    pub(super) fn holds(&self, name: &str, labels: &BTreeMap<String, String>) -> bool {
        self.0.holds(name, labels)
    }
}

impl Node {
    fn holds(&self, name: &str, labels: &BTreeMap<String, String>) -> bool {
        let each = |node: &Self| node.holds(name, labels);
        match self {
            Self::Always(flag) => *flag,
            Self::Equal {
                left,
                right,
                negated,
            } => (left.text(name, labels) == right.text(name, labels)) != *negated,
            Self::Not(operand) => !each(operand),
            Self::All(operands) => operands.iter().all(each),
            Self::Any(operands) => operands.iter().any(each),
        }
    }
}

impl Term {
    fn text<'a>(&'a self, name: &'a str, labels: &'a BTreeMap<String, String>) -> &'a str {
        match self {
            Self::Text(text) => text,
            Self::Name => name,
            Self::Label(key) => labels.get(key).map_or("", String::as_str),
        }
    }
}

fn node(raw: &Raw) -> Result<Node, ParseError> {
    let nodes = |operands: &[Raw]| operands.iter().map(node).collect::<Result<Vec<_>, _>>();
    match &raw.kind {
        RawKind::Equal {
            left,
            right,
            negated,
        } => Ok(Node::Equal {
            left: term(left)?,
            right: term(right)?,
            negated: *negated,
        }),
        RawKind::Not(operand) => Ok(Node::Not(Box::new(node(operand)?))),
        RawKind::All(operands) => Ok(Node::All(nodes(operands)?)),
        RawKind::Any(operands) => Ok(Node::Any(nodes(operands)?)),
        RawKind::Name(name) if matches!(name.as_str(), "true" | "false") => {
            Ok(Node::Always(name == "true"))
        }
        RawKind::Call(callee, _) => Err(ParseError::Unknown {
            at: raw.at,
            what: "function",
            name: callee.dotted().unwrap_or_default().join("."),
        }),
        _ => Err(ParseError::Type {
            at: raw.at,
            problem: "expected a comparison".to_owned(),
        }),
    }
}

fn term(raw: &Raw) -> Result<Term, ParseError> {
    let unknown = |name: String| ParseError::Unknown {
        at: raw.at,
        what: "attribute",
        name,
    };
    match &raw.kind {
        RawKind::Text(text) => Ok(Term::Text(text.clone())),
        RawKind::Index(object, key) => match (object.dotted().as_deref(), &key.kind) {
            (Some(["labels"] | ["resource", "metadata", "labels"]), RawKind::Text(key)) => {
                Ok(Term::Label(key.clone()))
            }
            (names, _) => Err(unknown(format!(
                "{}[…]",
                names.unwrap_or_default().join(".")
            ))),
        },
        _ => match raw.dotted().as_deref() {
            Some(["name"] | ["resource", "metadata", "name"]) => Ok(Term::Name),
            Some(["labels", key] | ["resource", "metadata", "labels", key]) => {
                Ok(Term::Label((*key).to_owned()))
            }
            Some(names) => Err(unknown(names.join("."))),
            None => Err(ParseError::Type {
                at: raw.at,
                problem: "expected a text, a name or a label".to_owned(),
            }),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn holds(source: &str) -> Result<bool, ParseError> {
        let labels = BTreeMap::from([
            ("env".to_owned(), "prod".to_owned()),
            (
                "teleport.internal/discovered-name".to_owned(),
                "k\n\"1\"".to_owned(),
            ),
        ]);
        Predicate::parse(source).map(|predicate| predicate.holds("k1-eks", &labels))
    }

    #[test]
    fn what_clients_send_is_understood() {
        for (source, expected) in [
            ("", true),
            ("  ", true),
            ("true", true),
            ("false", false),
            (r#"name == "k1-eks""#, true),
            (r#"name == "k1""#, false),
            (r#""k1-eks" == name"#, true),
            (r#"name != "k1""#, true),
            (
                r#"(name == "k\n\"1\"") || (labels["teleport.internal/discovered-name"] == "k\n\"1\"")"#,
                true,
            ),
            (r#"labels["env"] == "prod" && name == "k1""#, false),
            (r#"labels.env == "prod""#, true),
            (r#"resource.metadata.labels["env"] == `prod`"#, true),
            (r#"resource.metadata.labels.env == "x""#, false),
            (r#"resource.metadata.name == "k1-eks""#, true),
            (r#"!(labels["env"] == "prod")"#, false),
            (r#"labels["none"] == """#, true),
            (r#"labels["none"] != "x""#, true),
        ] {
            assert_eq!(holds(source), Ok(expected), "{source}");
        }
    }

    #[test]
    fn what_is_not_understood_is_refused() {
        for source in [
            "name",
            r#""x""#,
            "name ==",
            r#"name == "x" )"#,
            r#"kind == "app""#,
            r#"labels[name] == "x""#,
            r#"labels == "x""#,
            r#"search("x")"#,
            r#"name == "x" == true"#,
            "name == 1",
            "name == 'x'",
        ] {
            assert!(holds(source).is_err(), "{source}");
        }
        let deep = format!("{}true{}", "(".repeat(2000), ")".repeat(2000));
        assert_eq!(holds(&deep), Err(ParseError::TooDeep));
        let nots = format!("{}true", "!".repeat(4000));
        assert_eq!(holds(&nots), Err(ParseError::TooDeep));
        let long = format!(r#"name == "{}""#, "x".repeat(5000));
        assert_eq!(holds(&long), Err(ParseError::TooLong));
    }
}
