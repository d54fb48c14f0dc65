//! The expressions of rules and templates: Teleport's predicate language over attributes.
//!
//! The grammar is in [`crate::expression`]; here names are attributes and functions.
//! An expression is checked when it is parsed: unknown attributes and functions and wrong types
//! are found when a resource is written, not when a workload asks.
//!
//! Evaluation is bounded: texts of [`MAX_TEXT`] bytes, sets of [`MAX_ELEMENTS`], regular
//! expressions that run in linear time.

mod check;
mod eval;
mod functions;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use time::OffsetDateTime;

use super::attrs::Attrs;
pub use crate::expression::ParseError;
use crate::expression::parse;
use check::Node;

/// The longest text that evaluation makes, in bytes.
pub const MAX_TEXT: usize = 16 * 1024;
/// The largest set or dictionary that evaluation makes.
pub const MAX_ELEMENTS: usize = 1024;

/// Why an expression has no value for these attributes.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum EvalError {
    /// The attribute was not sent; mostly an attestor that did not run.
    #[error("{0} is unset")]
    Unset(String),
    /// The map or trait has no such key.
    #[error("{path} has no key {key:?}")]
    MissingKey {
        /// The map.
        path: String,
        /// The key.
        key: String,
    },
    /// A template names a trait with several values.
    #[error("{path}[{key:?}] has {count} values, a template needs one")]
    ManyValues {
        /// The traits.
        path: String,
        /// The trait.
        key: String,
        /// How many.
        count: usize,
    },
    /// None of the options of `choose` applies.
    #[error("no option of choose() applies")]
    NoOption,
    /// A pattern of `regexp.replace` is no regular expression, or too large a one.
    #[error("{0:?} is not a usable regular expression")]
    Regexp(String),
    /// A text is not a time in RFC 3339.
    #[error("{0:?} is not a time in RFC 3339 form")]
    Time(String),
    /// A text is no e-mail address.
    #[error("{0:?} is not an e-mail address")]
    Email(String),
    /// A text or a set grew beyond [`MAX_TEXT`] or [`MAX_ELEMENTS`].
    #[error("the expression makes a value that is too large")]
    TooLarge,
    /// Sigstore policies are judged by Enterprise clusters only.
    #[error("sigstore policies are not supported by this cluster")]
    Policies,
    /// The checker let a wrong type through.
    #[error("a function was given values of a wrong type")]
    Types,
}

/// Where an expression stands; it decides which functions exist and what a trait is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// In a rule: traits are sets, empty strings are values.
    Rule,
    /// In a template: traits are single strings, empty attributes are errors.
    Template,
}

/// The type of a value.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Type {
    /// A string.
    Text,
    /// A boolean.
    Flag,
    /// A number.
    Integer,
    /// A set of strings.
    Set,
    /// Sets of strings by string.
    Dict,
    /// A point in time.
    Time,
    /// One entry of a dictionary to be.
    Pair,
}

impl fmt::Display for Type {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Text => "string",
            Self::Flag => "bool",
            Self::Integer => "integer",
            Self::Set => "set",
            Self::Dict => "dict",
            Self::Time => "time",
            Self::Pair => "pair",
        })
    }
}

/// A value of an expression.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Value {
    /// A string.
    Text(String),
    /// A boolean.
    Flag(bool),
    /// A number.
    Integer(i64),
    /// A set of strings.
    Set(BTreeSet<String>),
    /// Sets of strings by string.
    Dict(BTreeMap<String, BTreeSet<String>>),
    /// A point in time.
    Time(OffsetDateTime),
    /// One entry of a dictionary to be.
    Pair(String, BTreeSet<String>),
}

/// A parsed and checked expression.
#[derive(Debug, Clone, PartialEq)]
pub struct Expression {
    root: Node,
    kind: Type,
}

impl Expression {
    /// Parses and checks `source`.
    ///
    /// # Errors
    /// [`ParseError`].
    pub fn parse(source: &str, mode: Mode) -> Result<Self, ParseError> {
        let raw = parse(source)?;
        let (root, kind) = check::check(&raw, mode)?;
        Ok(Self { root, kind })
    }

    /// Parses an expression that must be a bool, as a rule's is.
    ///
    /// # Errors
    /// [`ParseError`].
    pub fn rule(source: &str) -> Result<Self, ParseError> {
        let expression = Self::parse(source, Mode::Rule)?;
        if expression.kind != Type::Flag {
            return Err(ParseError::Type {
                at: 1,
                problem: format!("a rule needs a bool, this is a {}", expression.kind),
            });
        }
        Ok(expression)
    }

    /// The type of its value.
    #[must_use]
    pub fn kind(&self) -> Type {
        self.kind
    }

    /// Its value for these attributes.
    ///
    /// # Errors
    /// [`EvalError`].
    pub fn evaluate(&self, attrs: &Attrs) -> Result<Value, EvalError> {
        eval::evaluate(&self.root, attrs)
    }
}

#[cfg(test)]
mod tests;
