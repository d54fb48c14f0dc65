//! The grammar of Teleport's predicate language, without meaning: text to a syntax tree.
//!
//! It is that of Go expressions, cut down (upstream `lib/expression/parser.go`): `==`, `!=`,
//! `&&`, `||`, `!`, literals, dotted names, `m["key"]`, calls. What names and functions mean is
//! decided where the tree is used: rules and templates of workload identities, and filters of
//! lists. Size and depth are bounded here, for all of them.

mod lexer;
mod parser;

pub(crate) use parser::{Raw, RawKind};

/// The longest expression, in bytes.
pub const MAX_SOURCE: usize = 4096;
/// How deep an expression may nest.
pub const MAX_DEPTH: usize = 64;

/// Why a text is no expression.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ParseError {
    /// The text is longer than [`MAX_SOURCE`].
    #[error("the expression is longer than {MAX_SOURCE} bytes")]
    TooLong,
    /// Parentheses, calls or operators nest deeper than [`MAX_DEPTH`].
    #[error("the expression nests deeper than {MAX_DEPTH} levels")]
    TooDeep,
    /// The text does not follow the grammar.
    #[error("character {at} of the expression: {problem}")]
    Syntax {
        /// Character, from 1.
        at: usize,
        /// What is wrong there.
        problem: String,
    },
    /// No attribute or function has this name.
    #[error("character {at} of the expression: unknown {what} {name:?}")]
    Unknown {
        /// Character, from 1.
        at: usize,
        /// `attribute`, `function` or `method`.
        what: &'static str,
        /// The name.
        name: String,
    },
    /// A value is of another type than its place wants.
    #[error("character {at} of the expression: {problem}")]
    Type {
        /// Character, from 1.
        at: usize,
        /// What is wanted and what is there.
        problem: String,
    },
}

/// Reads all of `source`.
///
/// # Errors
/// [`ParseError::TooLong`], [`ParseError::TooDeep`] or [`ParseError::Syntax`].
pub(crate) fn parse(source: &str) -> Result<Raw, ParseError> {
    if source.len() > MAX_SOURCE {
        return Err(ParseError::TooLong);
    }
    parser::parse(lexer::tokens(source)?, source.chars().count())
}
