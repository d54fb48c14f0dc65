//! Writes YAML character for character as `gopkg.in/yaml.v3` does with an indent of two: items
//! indented below their key, and quotes only where plain text would read back as something else.

use std::fmt::Write as _;

use super::{Key, Node, Value, scalar};

/// What is written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Tree {
    /// `null`
    Null,
    /// `true` or `false`
    Bool(bool),
    /// Text, quoted where it must be.
    Text(String),
    /// Characters written as they are: numbers.
    Raw(String),
    /// A list.
    List(Vec<Tree>),
    /// A mapping in this order.
    Map(Vec<(String, Tree)>),
}

impl Tree {
    /// Text.
    pub fn text(text: impl Into<String>) -> Self {
        Self::Text(text.into())
    }

    /// A list of texts.
    pub fn texts<T: Into<String>>(items: impl IntoIterator<Item = T>) -> Self {
        Self::List(items.into_iter().map(Self::text).collect())
    }

    /// A mapping without the entries that are `None`.
    pub fn map<'k>(entries: impl IntoIterator<Item = (&'k str, Option<Self>)>) -> Self {
        Self::Map(
            entries
                .into_iter()
                .filter_map(|(key, tree)| Some((key.to_owned(), tree?)))
                .collect(),
        )
    }
}

impl From<&Tree> for Node {
    /// The tree as if it had been read, without places.
    fn from(tree: &Tree) -> Self {
        Self::made(match tree {
            Tree::Null => Value::Null,
            Tree::Bool(value) => Value::Scalar {
                text: value.to_string(),
                quoted: false,
            },
            Tree::Text(text) => Value::Scalar {
                text: text.clone(),
                quoted: true,
            },
            Tree::Raw(text) => Value::Scalar {
                text: text.clone(),
                quoted: false,
            },
            Tree::List(items) => Value::Sequence(items.iter().map(Self::from).collect()),
            Tree::Map(entries) => Value::Mapping(
                entries
                    .iter()
                    .map(|(key, tree)| (Key::made(key), Self::from(tree)))
                    .collect(),
            ),
        })
    }
}

/// How documents look.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Style {
    /// As `yaml.v3` writes them: items of a list are indented below their key.
    V3,
    /// As `sigs.k8s.io/yaml` (`yaml.v2`) does: items stand below their key, and long text is broken.
    Kubernetes,
}

impl Style {
    /// Characters after which a line is broken at its next space.
    fn width(self) -> usize {
        match self {
            Self::V3 => usize::MAX,
            Self::Kubernetes => 80,
        }
    }

    /// How much deeper than its key `tree` stands.
    fn step(self, tree: &Tree) -> usize {
        match (self, tree) {
            (Self::Kubernetes, Tree::List(_)) => 0,
            _ => 2,
        }
    }
}

/// The document, ending in a newline.
#[must_use]
pub fn emit(tree: &Tree) -> String {
    document(tree, Style::V3)
}

/// The document as Kubernetes' own programs write it. The keys of its mappings have to be in order.
#[must_use]
pub fn emit_kubernetes(tree: &Tree) -> String {
    document(tree, Style::Kubernetes)
}

fn document(tree: &Tree, style: Style) -> String {
    let mut out = String::new();
    value(tree, 0, style, &mut out);
    if !out.ends_with('\n') {
        out.push('\n');
    }
    out
}

/// Writes `tree` where the line already holds `indent` characters or a list dash before it.
fn value(tree: &Tree, indent: usize, style: Style, out: &mut String) {
    match tree {
        Tree::List(items) if !items.is_empty() => {
            for (index, item) in items.iter().enumerate() {
                if index > 0 {
                    pad(indent, out);
                }
                out.push_str("- ");
                value(item, indent + 2, style, out);
                end_line(out);
            }
        }
        Tree::Map(entries) if !entries.is_empty() => {
            for (index, (key, entry)) in entries.iter().enumerate() {
                if index > 0 {
                    pad(indent, out);
                }
                out.push_str(&inline(key));
                out.push(':');
                let below = indent + style.step(entry);
                if is_block(entry) {
                    out.push('\n');
                    pad(below, out);
                } else {
                    out.push(' ');
                }
                value(entry, below, style, out);
                end_line(out);
            }
        }
        Tree::Null => out.push_str("null"),
        Tree::Bool(value) => out.push_str(if *value { "true" } else { "false" }),
        Tree::Text(text) => match literal(text, indent) {
            Some(block) => out.push_str(&block),
            None => fold(&inline(text), indent, style.width(), out),
        },
        Tree::Raw(text) => out.push_str(text),
        Tree::List(_) => out.push_str("[]"),
        Tree::Map(_) => out.push_str("{}"),
    }
}

fn is_block(tree: &Tree) -> bool {
    match tree {
        Tree::List(items) => !items.is_empty(),
        Tree::Map(entries) => !entries.is_empty(),
        Tree::Null | Tree::Bool(_) | Tree::Text(_) | Tree::Raw(_) => false,
    }
}

fn pad(indent: usize, out: &mut String) {
    out.extend(std::iter::repeat_n(' ', indent));
}

fn end_line(out: &mut String) {
    if !out.ends_with('\n') {
        out.push('\n');
    }
}

/// Several lines as a `|` block, where that form can hold them.
fn literal(text: &str, indent: usize) -> Option<String> {
    if !text.contains('\n') || text.contains(|c: char| c != '\n' && !printable(c)) {
        return None;
    }
    if text.lines().any(|line| line.ends_with(' ')) || text.starts_with([' ', '\n']) {
        return None;
    }
    let body = text.trim_end_matches('\n');
    let mut block = String::from(match text.len() - body.len() {
        0 => "|-\n",
        1 => "|\n",
        _ => "|+\n",
    });
    for line in text.lines() {
        if !line.is_empty() {
            pad(indent.max(2), &mut block);
        }
        block.push_str(line);
        block.push('\n');
    }
    Some(block)
}

/// Writes a scalar, breaking it at single spaces where a line is longer than `width`. Escapes of
/// double quoted text could be cut, so that stays whole.
fn fold(scalar: &str, indent: usize, width: usize, out: &mut String) {
    let mut column = out.chars().rev().take_while(|c| *c != '\n').count();
    let content = scalar.trim_matches('\'');
    let inner = scalar.len() - scalar.trim_start_matches('\'').len();
    let inner = inner + 1..(inner + content.len()).saturating_sub(1);
    let whole = scalar.starts_with('"');
    let mut before = None;
    let mut rest = scalar.char_indices().peekable();
    while let Some((at, c)) = rest.next() {
        let single = before != Some(' ') && rest.peek().is_none_or(|(_, next)| *next != ' ');
        if c == ' ' && single && column > width && inner.contains(&at) && !whole {
            out.push('\n');
            pad(indent, out);
            column = indent;
        } else {
            out.push(c);
            column += 1;
        }
        before = Some(c);
    }
}

/// Text in one line: plain, else single quoted, else double quoted.
fn inline(text: &str) -> String {
    if scalar::needs_quotes(text) || text.contains(|c: char| !printable(c)) {
        return double_quoted(text);
    }
    if plain_is_safe(text) {
        return text.to_owned();
    }
    format!("'{}'", text.replace('\'', "''"))
}

/// Whether unquoted text would be taken for anything but one scalar.
fn plain_is_safe(text: &str) -> bool {
    if text.starts_with("---")
        || text.starts_with("...")
        || text.starts_with(' ')
        || text.ends_with(' ')
    {
        return false;
    }
    let mut before = None;
    let mut rest = text.chars().peekable();
    while let Some(c) = rest.next() {
        let ends = rest.peek().is_none_or(|next| *next == ' ');
        let indicator = match before {
            None => (matches!(c, '-' | '?' | ':') && ends) || ",[]{}&*!|>'\"%@`#".contains(c),
            Some(before) => (c == ':' && ends) || (c == '#' && before == ' '),
        };
        if indicator {
            return false;
        }
        before = Some(c);
    }
    true
}

fn printable(c: char) -> bool {
    !c.is_control() && !matches!(c, '\u{feff}' | '\u{2028}' | '\u{2029}')
}

fn double_quoted(text: &str) -> String {
    let mut out = String::from("\"");
    for c in text.chars() {
        match c {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            '\0' => out.push_str("\\0"),
            '\u{7}' => out.push_str("\\a"),
            '\u{8}' => out.push_str("\\b"),
            '\u{b}' => out.push_str("\\v"),
            '\u{c}' => out.push_str("\\f"),
            '\u{1b}' => out.push_str("\\e"),
            '\u{85}' => out.push_str("\\N"),
            '\u{2028}' => out.push_str("\\L"),
            '\u{2029}' => out.push_str("\\P"),
            '\u{feff}' => out.push_str("\\uFEFF"),
            c if c.is_control() => {
                let _written = write!(out, "\\x{:02X}", u32::from(c));
            }
            c => out.push(c),
        }
    }
    out.push('"');
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::yaml::parse;

    #[test]
    fn block_style() {
        let tree = Tree::map([
            ("version", Some(Tree::text("v2"))),
            ("absent", None),
            (
                "services",
                Some(Tree::List(vec![Tree::map([
                    ("type", Some(Tree::text("identity"))),
                    (
                        "destination",
                        Some(Tree::map([("type", Some(Tree::text("memory")))])),
                    ),
                    ("ssh_config", Some(Tree::text("on"))),
                    ("roles", Some(Tree::texts(["a", "b"]))),
                    ("none", Some(Tree::List(vec![]))),
                    ("nested", Some(Tree::List(vec![Tree::texts(["x", "y"])]))),
                ])])),
            ),
            ("debug", Some(Tree::Bool(false))),
            ("number", Some(Tree::Raw("1073741824".into()))),
            ("nothing", Some(Tree::Null)),
            ("empty", Some(Tree::Map(vec![]))),
        ]);
        assert_eq!(
            emit(&tree),
            "version: v2\n\
             services:\n  - type: identity\n    destination:\n      type: memory\n    \
             ssh_config: \"on\"\n    roles:\n      - a\n      - b\n    none: []\n    nested:\n      \
             - - x\n        - \"y\"\n\
             debug: false\nnumber: 1073741824\nnothing: null\nempty: {}\n"
        );
    }

    #[test]
    fn kubernetes_style() {
        let word = "x".repeat(70);
        let tree = Tree::map([
            (
                "args",
                Some(Tree::texts(["a", "123", "--d=/a b: #c", "it's"])),
            ),
            ("data", Some(Tree::text("A".repeat(200)))),
            ("env", Some(Tree::Null)),
            (
                "long",
                Some(Tree::map([(
                    "plain",
                    Some(Tree::text(format!("{word} b c d e  f g"))),
                )])),
            ),
            (
                "list",
                Some(Tree::List(vec![Tree::map([(
                    "quoted",
                    Some(Tree::text(format!("{word}:  x yy z' "))),
                )])])),
            ),
            ("preferences", Some(Tree::Map(vec![]))),
        ]);
        // As sigs.k8s.io/yaml writes it, character for character.
        assert_eq!(
            emit_kubernetes(&tree),
            format!(
                "args:\n- a\n- \"123\"\n- '--d=/a b: #c'\n- it's\ndata: {}\nenv: null\n\
                 long:\n  plain: {word} b\n    c d e  f g\n\
                 list:\n- quoted: '{word}:  x\n    yy z'' '\npreferences: {{}}\n",
                "A".repeat(200)
            )
        );
    }

    #[test]
    fn quoting() {
        for (text, written) in [
            ("n", "\"n\""),
            ("00000000", "\"00000000\""),
            ("", "\"\""),
            ("a b", "a b"),
            ("tcp://127.0.0.1:1", "tcp://127.0.0.1:1"),
            ("a: b", "'a: b'"),
            ("a:", "'a:'"),
            ("a #b", "'a #b'"),
            ("a#b", "a#b"),
            ("*x", "'*x'"),
            ("- x", "'- x'"),
            ("-x", "-x"),
            ("it's", "it's"),
            ("'x'", "'''x'''"),
            (" x", "' x'"),
            ("a\tb", "\"a\\tb\""),
            ("a\u{1}b", "\"a\\x01b\""),
            ("{{.X}}", "'{{.X}}'"),
            ("sha256:ab", "sha256:ab"),
            ("日本", "日本"),
            ("2026-01-02", "\"2026-01-02\""),
            ("---", "'---'"),
        ] {
            assert_eq!(inline(text), written, "{text:?}");
        }
    }

    #[test]
    fn reads_back_as_written() {
        for text in [
            "a\nb",
            "a\nb\n",
            "a\n\nb\n\n",
            " a\nb",
            "a \nb",
            "\na",
            "x\n  y\n",
            "a\r\nb",
            "\u{85}",
            "\\",
            "?",
            "? a",
            ":",
            "%a",
            "~",
            "1_0",
        ] {
            let tree = Tree::Map(vec![
                ("k".into(), Tree::List(vec![Tree::text(text)])),
                ("z".into(), Tree::text(text)),
            ]);
            let written = emit(&tree);
            for written in [written, emit_kubernetes(&tree)] {
                let node = parse(&written).unwrap_or_else(|e| panic!("{text:?}: {e}\n{written}"));
                assert_eq!(node.get("z").and_then(Node::text), Some(text), "{written}");
            }
        }
    }
}
