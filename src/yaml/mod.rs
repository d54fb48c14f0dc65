//! YAML as a tree with positions, read by the rules of the Go library that `tbot.yaml` was
//! written for (`gopkg.in/yaml.v3`), and every mistake reported with its place.
//!
//! [`parse`] makes the tree, [`Fields`] reads one mapping of it, [`Problems`] collects what is
//! wrong so that one run shows all of it, [`emit`] writes the same dialect back.

mod compose;
pub mod duration;
pub mod emit;
mod fields;
mod problem;
mod scalar;

use std::fmt;

pub use compose::{MAX_DEPTH, MAX_NODES, MAX_TEXT, parse, parse_all};
pub use emit::Tree;
pub use fields::Fields;
pub use problem::{Problem, Problems, Severity, nearest};
pub use scalar::to_json;

/// A place in the text. Lines and columns count characters from 1; line 0 is "no place": the value
/// did not come from a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Default)]
pub struct Span {
    /// Line, from 1.
    pub line: usize,
    /// Column in characters, from 1.
    pub column: usize,
}

/// A value and where it starts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Node {
    /// Where the value starts.
    pub span: Span,
    /// The value.
    pub value: Value,
}

/// What a [`Node`] holds. Aliases and `<<` merges are already resolved.
#[derive(Clone, PartialEq, Eq)]
pub enum Value {
    /// `null`, `~` or nothing at all.
    Null,
    /// Text as it stands in the file; only its reader knows whether it is a number.
    Scalar {
        /// The source text without quotes, escapes resolved.
        text: String,
        /// Quoted, a block scalar or tagged `!!str`: never a number, boolean or null.
        quoted: bool,
    },
    /// A list.
    Sequence(Vec<Node>),
    /// A mapping in file order; keys are unique.
    Mapping(Vec<(Key, Node)>),
}

/// A key of a mapping.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Key {
    /// The key as text.
    pub text: String,
    /// Where it starts.
    pub span: Span,
}

impl Key {
    /// A key that did not come from a file.
    #[must_use]
    pub fn made(text: impl Into<String>) -> Self {
        Self {
            text: text.into(),
            span: Span::default(),
        }
    }
}

impl Node {
    /// A value that did not come from a file.
    #[must_use]
    pub fn made(value: Value) -> Self {
        Self {
            span: Span::default(),
            value,
        }
    }

    /// Text that did not come from a file, to be read as if it had been quoted there.
    #[must_use]
    pub fn made_text(text: impl Into<String>) -> Self {
        Self::made(Value::Scalar {
            text: text.into(),
            quoted: true,
        })
    }

    /// The value under `key`, if this is a mapping that has it.
    #[must_use]
    pub fn get(&self, key: &str) -> Option<&Self> {
        let Value::Mapping(entries) = &self.value else {
            return None;
        };
        entries
            .iter()
            .find(|(k, _)| k.text == key)
            .map(|(_, node)| node)
    }

    /// Puts `node` under the dotted path `path`, making mappings on the way where there is nothing
    /// else. What stood there is replaced.
    pub fn set(&mut self, path: &str, node: Self) {
        if self.value == Value::Null {
            self.value = Value::Mapping(Vec::new());
        }
        let Value::Mapping(entries) = &mut self.value else {
            return;
        };
        let (key, rest) = path.split_once('.').unwrap_or((path, ""));
        let index = entries
            .iter()
            .position(|(k, _)| k.text == key)
            .unwrap_or_else(|| {
                entries.push((Key::made(key), Self::made(Value::Null)));
                entries.len() - 1
            });
        if let Some((_, slot)) = entries.get_mut(index) {
            if rest.is_empty() {
                *slot = node;
            } else {
                slot.set(rest, node);
            }
        }
    }

    /// The text of a scalar.
    #[must_use]
    pub fn text(&self) -> Option<&str> {
        match &self.value {
            Value::Scalar { text, .. } => Some(text),
            Value::Null | Value::Sequence(_) | Value::Mapping(_) => None,
        }
    }

    /// What a person would call this value: "a list", "a mapping", "text", "nothing".
    #[must_use]
    pub fn kind(&self) -> &'static str {
        match &self.value {
            Value::Null => "nothing",
            Value::Scalar { text, quoted } => scalar::kind(text, *quoted),
            Value::Sequence(_) => "a list",
            Value::Mapping(_) => "a mapping",
        }
    }
}

/// Shows the shape only: any scalar may be a secret.
impl fmt::Debug for Value {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Null => f.write_str("Null"),
            Self::Scalar { quoted, .. } => write!(f, "Scalar {{ quoted: {quoted} }}"),
            Self::Sequence(items) => f.debug_list().entries(items).finish(),
            Self::Mapping(entries) => f
                .debug_map()
                .entries(entries.iter().map(|(k, v)| (&k.text, v)))
                .finish(),
        }
    }
}

impl fmt::Display for Span {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.line, self.column)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn debug_hides_every_scalar() {
        let node = parse("token: hunter2\nlist: [hunter2]\n").unwrap();
        assert!(!format!("{node:?}").contains("hunter2"));
        assert!(format!("{node:?}").contains("token"));
    }

    #[test]
    fn lookup_by_key() {
        let node = parse("a: {b: c}\n").unwrap();
        assert_eq!(
            node.get("a").and_then(|a| a.get("b")).and_then(Node::text),
            Some("c")
        );
        assert!(node.get("z").is_none());
        let mut made = Node::made(Value::Null);
        made.set("a.b", Node::made_text("c"));
        made.set("a.d", Node::made_text("e"));
        made.set("a.b", Node::made_text("f"));
        let a = made.get("a").unwrap();
        assert_eq!(a.get("b").and_then(Node::text), Some("f"));
        assert_eq!(a.get("d").and_then(Node::text), Some("e"));
    }
}
