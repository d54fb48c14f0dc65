//! A syntax tree to a checked one: names resolved, types known.

use super::functions::{FUNCTIONS, Function, METHODS, RULE_FUNCTIONS, Signature};
use super::{Mode, ParseError, Type, Value};
use crate::embedded::workload_identity::attrs::resolve;
use crate::embedded::workload_identity::attrs::schema::Kind;
use crate::expression::{Raw, RawKind};

/// A checked node.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Node {
    Literal(Value),
    /// A leaf; in templates an empty string counts as unset.
    Attribute {
        path: Vec<&'static str>,
        kind: Type,
        filled: bool,
    },
    /// One entry of a map of strings.
    Label {
        path: Vec<&'static str>,
        key: Box<Node>,
    },
    /// One trait: its set of values, or its only value.
    Trait {
        path: Vec<&'static str>,
        key: Box<Node>,
        single: bool,
    },
    /// One entry of a dictionary.
    Index(Box<Node>, Box<Node>),
    Not(Box<Node>),
    All(Vec<Node>),
    Any(Vec<Node>),
    Equal {
        left: Box<Node>,
        right: Box<Node>,
        negated: bool,
    },
    Call(Function, Vec<Node>),
}

type Typed = (Node, Type);

pub(super) fn check(raw: &Raw, mode: Mode) -> Result<Typed, ParseError> {
    Checker { mode }.value(raw)
}

fn wrong<T>(at: usize, problem: impl Into<String>) -> Result<T, ParseError> {
    Err(ParseError::Type {
        at,
        problem: problem.into(),
    })
}

fn unknown(at: usize, what: &'static str, name: impl Into<String>) -> ParseError {
    ParseError::Unknown {
        at,
        what,
        name: name.into(),
    }
}

struct Checker {
    mode: Mode,
}

impl Checker {
    fn value(&self, raw: &Raw) -> Result<Typed, ParseError> {
        match &raw.kind {
            RawKind::Text(text) => Ok((Node::Literal(Value::Text(text.clone())), Type::Text)),
            RawKind::Integer(number) => Ok((Node::Literal(Value::Integer(*number)), Type::Integer)),
            RawKind::Name(name) if matches!(name.as_str(), "true" | "false") => {
                Ok((Node::Literal(Value::Flag(name == "true")), Type::Flag))
            }
            RawKind::Name(_) | RawKind::Member(..) => match raw.dotted() {
                Some(path) => self.attribute(raw.at, &path),
                None => self.member(raw),
            },
            RawKind::Index(object, key) => self.index(object, key),
            RawKind::Call(callee, arguments) => self.call(callee, arguments),
            RawKind::Not(operand) => Ok((
                Node::Not(Box::new(self.typed(operand, Type::Flag)?)),
                Type::Flag,
            )),
            RawKind::All(operands) => Ok((Node::All(self.flags(operands)?), Type::Flag)),
            RawKind::Any(operands) => Ok((Node::Any(self.flags(operands)?), Type::Flag)),
            RawKind::Equal {
                left,
                right,
                negated,
            } => self.equal(left, right, *negated),
        }
    }

    fn typed(&self, raw: &Raw, want: Type) -> Result<Node, ParseError> {
        let (node, kind) = self.value(raw)?;
        if kind == want {
            return Ok(node);
        }
        wrong(raw.at, format!("expected a {want}, this is a {kind}"))
    }

    fn flags(&self, operands: &[Raw]) -> Result<Vec<Node>, ParseError> {
        let operands = operands.iter();
        operands.map(|raw| self.typed(raw, Type::Flag)).collect()
    }

    fn equal(&self, left: &Raw, right: &Raw, negated: bool) -> Result<Typed, ParseError> {
        let (left_node, kind) = self.value(left)?;
        if !matches!(kind, Type::Text | Type::Integer | Type::Flag) {
            return wrong(left.at, format!("a {kind} cannot be compared"));
        }
        let node = Node::Equal {
            left: Box::new(left_node),
            right: Box::new(self.typed(right, kind)?),
            negated,
        };
        Ok((node, Type::Flag))
    }

    fn attribute(&self, at: usize, names: &[&str]) -> Result<Typed, ParseError> {
        let found = resolve(names).map_err(|name| unknown(at, "attribute", name))?;
        let filled = self.mode == Mode::Template;
        let leaf = |kind| {
            let path = found.names.clone();
            (Node::Attribute { path, kind, filled }, kind)
        };
        match (found.kind, found.rest.as_slice()) {
            (Kind::Text, []) => Ok(leaf(Type::Text)),
            (Kind::Flag, []) => Ok(leaf(Type::Flag)),
            (Kind::Integer, []) => Ok(leaf(Type::Integer)),
            (Kind::Traits, []) if self.mode == Mode::Rule => Ok(leaf(Type::Dict)),
            (kind @ (Kind::Map | Kind::Traits), [key]) => {
                let key = Node::Literal(Value::Text((*key).to_owned()));
                Ok(self.entry(found.names, kind, key))
            }
            (Kind::Map | Kind::Traits, []) => {
                wrong(at, format!("{} needs a key: [\"…\"]", names.join(".")))
            }
            (Kind::Message(_), _) => wrong(at, format!("{} is not one attribute", names.join("."))),
            _ => Err(unknown(at, "attribute", names.join("."))),
        }
    }

    fn entry(&self, path: Vec<&'static str>, kind: Kind, key: Node) -> Typed {
        let key = Box::new(key);
        if kind == Kind::Map {
            return (Node::Label { path, key }, Type::Text);
        }
        let single = self.mode == Mode::Template;
        let kind = if single { Type::Text } else { Type::Set };
        (Node::Trait { path, key, single }, kind)
    }

    fn member(&self, raw: &Raw) -> Result<Typed, ParseError> {
        let RawKind::Member(object, name) = &raw.kind else {
            return wrong(raw.at, "expected a value");
        };
        let (node, kind) = self.value(object)?;
        if kind != Type::Dict {
            return wrong(raw.at, format!("a {kind} has no element {name:?}"));
        }
        let key = Node::Literal(Value::Text(name.clone()));
        Ok((Node::Index(Box::new(node), Box::new(key)), Type::Set))
    }

    fn index(&self, object: &Raw, key: &Raw) -> Result<Typed, ParseError> {
        let key = self.typed(key, Type::Text)?;
        if let Some(names) = object.dotted() {
            let found = resolve(&names).map_err(|name| unknown(object.at, "attribute", name))?;
            if matches!(found.kind, Kind::Map | Kind::Traits) && found.rest.is_empty() {
                return Ok(self.entry(found.names, found.kind, key));
            }
        }
        let (node, kind) = self.value(object)?;
        if kind != Type::Dict {
            return wrong(object.at, format!("a {kind} has no elements"));
        }
        Ok((Node::Index(Box::new(node), Box::new(key)), Type::Set))
    }

    fn call(&self, callee: &Raw, arguments: &[Raw]) -> Result<Typed, ParseError> {
        if let Some(names) = callee.dotted() {
            let name = names.join(".");
            match name.as_str() {
                "ifelse" => return self.ifelse(callee.at, arguments),
                "choose" => return self.choose(callee.at, arguments),
                "option" => return wrong(callee.at, "option() stands inside of choose() only"),
                _ => {}
            }
            let more = match self.mode {
                Mode::Rule => RULE_FUNCTIONS,
                Mode::Template => &[],
            };
            let ways: Vec<_> = FUNCTIONS
                .iter()
                .chain(more)
                .filter(|way| way.name == name)
                .collect();
            if !ways.is_empty() {
                let arguments = self.all(arguments)?;
                return choose_way(callee.at, &name, &ways, arguments);
            }
        }
        let RawKind::Member(object, name) = &callee.kind else {
            let name = callee.dotted().unwrap_or_default().join(".");
            return Err(unknown(callee.at, "function", name));
        };
        // An unknown dotted name is more likely a misspelt function than a method of nothing.
        let receiver = self.value(object).map_err(|error| match callee.dotted() {
            Some(names) if matches!(error, ParseError::Unknown { .. }) => {
                unknown(callee.at, "function", names.join("."))
            }
            _ => error,
        })?;
        let ways: Vec<_> = METHODS
            .iter()
            .filter(|way| way.name == name && way.parameters.first() == Some(&receiver.1))
            .collect();
        if ways.is_empty() {
            return Err(unknown(callee.at, "method", name));
        }
        let mut values = vec![receiver];
        values.extend(self.all(arguments)?);
        choose_way(callee.at, name, &ways, values)
    }

    fn all(&self, arguments: &[Raw]) -> Result<Vec<Typed>, ParseError> {
        arguments.iter().map(|raw| self.value(raw)).collect()
    }

    fn ifelse(&self, at: usize, arguments: &[Raw]) -> Result<Typed, ParseError> {
        let [condition, yes, no] = arguments else {
            return wrong(at, "ifelse() takes a condition and two values");
        };
        let condition = self.typed(condition, Type::Flag)?;
        let (yes, kind) = self.value(yes)?;
        let no = self.typed(no, kind)?;
        Ok((Node::Call(Function::IfElse, vec![condition, yes, no]), kind))
    }

    fn choose(&self, at: usize, arguments: &[Raw]) -> Result<Typed, ParseError> {
        let mut kind = None;
        let mut nodes = Vec::new();
        for argument in arguments {
            let RawKind::Call(callee, option) = &argument.kind else {
                return wrong(argument.at, "choose() takes option()s");
            };
            let ([condition, value], Some(["option"])) =
                (option.as_slice(), callee.dotted().as_deref())
            else {
                return wrong(argument.at, "expected option(condition, value)");
            };
            nodes.push(self.typed(condition, Type::Flag)?);
            let (node, found) = match kind {
                Some(kind) => (self.typed(value, kind)?, kind),
                None => self.value(value)?,
            };
            kind = Some(found);
            nodes.push(node);
        }
        match kind {
            Some(kind) => Ok((Node::Call(Function::Choose, nodes), kind)),
            None => wrong(at, "choose() takes at least one option()"),
        }
    }
}

/// Picks the signature that fits the arguments.
fn choose_way(
    at: usize,
    name: &str,
    ways: &[&Signature],
    arguments: Vec<Typed>,
) -> Result<Typed, ParseError> {
    let fits = |way: &&&Signature| {
        let mut wanted = way.parameters.iter();
        arguments.len() >= way.parameters.len()
            && arguments
                .iter()
                .all(|(_, kind)| wanted.next().or(way.rest.as_ref()) == Some(kind))
    };
    let Some(way) = ways.iter().find(fits) else {
        let given: Vec<_> = arguments.iter().map(|(_, kind)| kind.to_string()).collect();
        let given = given.join(", ");
        return wrong(at, format!("{name} cannot be called with ({given})"));
    };
    let nodes = arguments.into_iter().map(|(node, _)| node).collect();
    Ok((Node::Call(way.function, nodes), way.result))
}
