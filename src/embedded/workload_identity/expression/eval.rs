//! A checked tree to a value.

use std::collections::{BTreeMap, BTreeSet};

use super::check::Node;
use super::functions::call;
use super::{EvalError, Type, Value};
use crate::embedded::workload_identity::attrs::{self, Attrs, Found};

pub(super) fn evaluate(node: &Node, attrs: &Attrs) -> Result<Value, EvalError> {
    match node {
        Node::Literal(value) => Ok(value.clone()),
        Node::Attribute { path, kind, filled } => attribute(path, *kind, *filled, attrs),
        Node::Label { path, key } => label(path, text(key, attrs)?, attrs),
        Node::Trait { path, key, single } => trait_value(path, text(key, attrs)?, *single, attrs),
        Node::Index(dict, key) => {
            let Value::Dict(mut dict) = evaluate(dict, attrs)? else {
                return Err(EvalError::Types);
            };
            let key = text(key, attrs)?;
            Ok(Value::Set(dict.remove(&key).unwrap_or_default()))
        }
        Node::Not(operand) => Ok(Value::Flag(!flag(operand, attrs)?)),
        Node::All(operands) => {
            for operand in operands {
                if !flag(operand, attrs)? {
                    return Ok(Value::Flag(false));
                }
            }
            Ok(Value::Flag(true))
        }
        Node::Any(operands) => {
            for operand in operands {
                if flag(operand, attrs)? {
                    return Ok(Value::Flag(true));
                }
            }
            Ok(Value::Flag(false))
        }
        Node::Equal {
            left,
            right,
            negated,
        } => {
            let equal = evaluate(left, attrs)? == evaluate(right, attrs)?;
            Ok(Value::Flag(equal != *negated))
        }
        // All arguments first: `&&` and `||` are the only guards there are.
        Node::Call(function, arguments) => {
            let arguments = arguments.iter().map(|node| evaluate(node, attrs));
            call(*function, &arguments.collect::<Result<Vec<_>, _>>()?)
        }
    }
}

fn flag(node: &Node, attrs: &Attrs) -> Result<bool, EvalError> {
    match evaluate(node, attrs)? {
        Value::Flag(flag) => Ok(flag),
        _ => Err(EvalError::Types),
    }
}

fn text(node: &Node, attrs: &Attrs) -> Result<String, EvalError> {
    match evaluate(node, attrs)? {
        Value::Text(text) => Ok(text),
        _ => Err(EvalError::Types),
    }
}

fn attribute(
    path: &[&'static str],
    kind: Type,
    filled: bool,
    attrs: &Attrs,
) -> Result<Value, EvalError> {
    let unset = || EvalError::Unset(path.join("."));
    let value = match attrs.find(path) {
        Found::Unset => return Err(unset()),
        Found::Zero => match kind {
            Type::Text => Value::Text(String::new()),
            Type::Flag => Value::Flag(false),
            Type::Integer => Value::Integer(0),
            Type::Dict => Value::Dict(BTreeMap::new()),
            Type::Set | Type::Time | Type::Pair => return Err(EvalError::Types),
        },
        Found::Value(value) => match value {
            attrs::Value::Text(text) => Value::Text(text.clone()),
            attrs::Value::Flag(flag) => Value::Flag(*flag),
            attrs::Value::Integer(number) => Value::Integer(*number),
            attrs::Value::Traits(traits) => Value::Dict(
                traits
                    .iter()
                    .map(|(key, values)| (key.clone(), values.iter().cloned().collect()))
                    .collect(),
            ),
            _ => return Err(EvalError::Types),
        },
    };
    if filled && value == Value::Text(String::new()) {
        return Err(unset());
    }
    Ok(value)
}

fn label(path: &[&'static str], key: String, attrs: &Attrs) -> Result<Value, EvalError> {
    let value = match attrs.find(path) {
        Found::Unset => return Err(EvalError::Unset(path.join("."))),
        Found::Value(attrs::Value::Map(map)) => map.get(&key).cloned(),
        Found::Zero | Found::Value(_) => None,
    };
    let path = path.join(".");
    value
        .map(Value::Text)
        .ok_or(EvalError::MissingKey { path, key })
}

fn trait_value(
    path: &[&'static str],
    key: String,
    single: bool,
    attrs: &Attrs,
) -> Result<Value, EvalError> {
    let values: BTreeSet<String> = match attrs.find(path) {
        Found::Unset => return Err(EvalError::Unset(path.join("."))),
        Found::Value(attrs::Value::Traits(traits)) => traits
            .get(&key)
            .map(|values| values.iter().cloned().collect())
            .unwrap_or_default(),
        Found::Zero | Found::Value(_) => BTreeSet::new(),
    };
    if !single {
        return Ok(Value::Set(values));
    }
    let path = path.join(".");
    let count = values.len();
    let mut values = values.into_iter();
    match (values.next(), values.next()) {
        (Some(value), None) => Ok(Value::Text(value)),
        (None, _) => Err(EvalError::MissingKey { path, key }),
        (Some(_), Some(_)) => Err(EvalError::ManyValues { path, key, count }),
    }
}
