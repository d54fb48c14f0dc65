//! From parser events to a tree, within limits that a hostile file cannot stretch.

use std::collections::{HashMap, HashSet};

use saphyr_parser::{Event, Marker, Parser, ScalarStyle, ScanError, StrInput, Tag};

use super::{Key, Node, Problem, Span, Value, scalar};

/// Longest text in bytes. The longest configuration in the field is a few hundred lines.
pub const MAX_TEXT: usize = 1 << 20;
/// Deepest nesting. The schema needs seven.
pub const MAX_DEPTH: usize = 64;
/// Most values in one text after aliases are expanded.
pub const MAX_NODES: usize = 100_000;
/// Most bytes of text after aliases are expanded.
const MAX_EXPANDED: usize = 4 * MAX_TEXT;

/// Reads the first document of `text`; text without one is [`Value::Null`].
///
/// # Errors
/// The first place where it is not YAML, has a key twice, or exceeds a limit.
pub fn parse(text: &str) -> Result<Node, Problem> {
    let mut composer = Composer::new(text)?;
    Ok(composer.document()?.unwrap_or(Node {
        span: Span { line: 1, column: 1 },
        value: Value::Null,
    }))
}

/// Reads every document of `text`; empty ones (`---` with nothing after it) are left out.
///
/// # Errors
/// As [`parse`]. The limits count over all documents.
pub fn parse_all(text: &str) -> Result<Vec<Node>, Problem> {
    let mut composer = Composer::new(text)?;
    let mut documents = Vec::new();
    while let Some(node) = composer.document()? {
        if node.value != Value::Null {
            documents.push(node);
        }
    }
    Ok(documents)
}

/// What a subtree weighs when an alias repeats it.
#[derive(Clone, Copy, Default)]
struct Weight {
    nodes: usize,
    bytes: usize,
    depth: usize,
}

struct Composer<'t> {
    parser: Parser<'t, StrInput<'t>>,
    anchors: HashMap<usize, (Node, Weight)>,
    nodes: usize,
    bytes: usize,
}

impl<'t> Composer<'t> {
    fn new(text: &'t str) -> Result<Self, Problem> {
        if text.len() > MAX_TEXT {
            return Err(Problem::error(
                None,
                format!("{} bytes of YAML", text.len()),
                Some(format!("at most {MAX_TEXT} bytes are read")),
            ));
        }
        Ok(Self {
            parser: Parser::new_from_str(text),
            anchors: HashMap::new(),
            nodes: 0,
            bytes: 0,
        })
    }

    fn next(&mut self) -> Result<(Event<'t>, Span), Problem> {
        match self.parser.next_event() {
            Some(Ok((event, span))) => Ok((event, place(&span.start))),
            Some(Err(error)) => Err(syntax(&error)),
            None => Ok((Event::StreamEnd, Span::default())),
        }
    }

    /// The next document, or `None` at the end of the text.
    fn document(&mut self) -> Result<Option<Node>, Problem> {
        loop {
            let (event, span) = self.next()?;
            match event {
                Event::StreamEnd => return Ok(None),
                Event::StreamStart
                | Event::DocumentStart(_)
                | Event::DocumentEnd
                | Event::Nothing => {}
                Event::Alias(_)
                | Event::Scalar(..)
                | Event::SequenceStart(..)
                | Event::SequenceEnd
                | Event::MappingStart(..)
                | Event::MappingEnd => {
                    let (node, _) = self.node(event, span, 1)?;
                    self.anchors.clear();
                    return Ok(Some(node));
                }
            }
        }
    }

    fn node(
        &mut self,
        event: Event<'t>,
        span: Span,
        depth: usize,
    ) -> Result<(Node, Weight), Problem> {
        if depth > MAX_DEPTH {
            return Err(too_deep(span));
        }
        let (value, weight, anchor) = match event {
            Event::Alias(id) => return self.alias(id, span, depth),
            Event::Scalar(text, style, anchor, tag) => {
                let value = scalar_value(&text, style, tag.as_deref());
                let weight = Weight {
                    nodes: 1,
                    bytes: text.len(),
                    depth: 1,
                };
                self.count(weight.nodes, weight.bytes, span)?;
                (value, weight, anchor)
            }
            Event::SequenceStart(anchor, _) => {
                self.count(1, 0, span)?;
                let (value, weight) = self.sequence(depth)?;
                (value, weight, anchor)
            }
            Event::MappingStart(anchor, _) => {
                self.count(1, 0, span)?;
                let (value, weight) = self.mapping(depth)?;
                (value, weight, anchor)
            }
            Event::Nothing
            | Event::StreamStart
            | Event::StreamEnd
            | Event::DocumentStart(_)
            | Event::DocumentEnd
            | Event::SequenceEnd
            | Event::MappingEnd => {
                return Err(Problem::error(
                    Some(span),
                    "a value is missing here".to_owned(),
                    None,
                ));
            }
        };
        let node = Node { span, value };
        if anchor > 0 {
            self.anchors.insert(anchor, (node.clone(), weight));
        }
        Ok((node, weight))
    }

    fn alias(&mut self, id: usize, span: Span, depth: usize) -> Result<(Node, Weight), Problem> {
        let Some((node, weight)) = self.anchors.get(&id) else {
            return Err(Problem::error(
                Some(span),
                "an alias inside the value that it stands for".to_owned(),
                Some("write the value out".to_owned()),
            ));
        };
        let (nodes, bytes) = (weight.nodes, weight.bytes);
        if depth + weight.depth > MAX_DEPTH + 1 {
            return Err(too_deep(span));
        }
        if self.nodes + nodes > MAX_NODES || self.bytes + bytes > MAX_EXPANDED {
            return Err(too_many(span));
        }
        let found = (node.clone(), *weight);
        self.count(nodes, bytes, span)?;
        Ok(found)
    }

    fn sequence(&mut self, depth: usize) -> Result<(Value, Weight), Problem> {
        let mut items = Vec::new();
        let mut total = Weight {
            nodes: 1,
            bytes: 0,
            depth: 1,
        };
        loop {
            let (event, span) = self.next()?;
            if event == Event::SequenceEnd {
                return Ok((Value::Sequence(items), total));
            }
            let (item, weight) = self.node(event, span, depth + 1)?;
            total.add(weight);
            items.push(item);
        }
    }

    fn mapping(&mut self, depth: usize) -> Result<(Value, Weight), Problem> {
        let mut entries: Vec<(Key, Node)> = Vec::new();
        let mut merged: Vec<(Key, Node)> = Vec::new();
        let mut seen: HashMap<String, Span> = HashMap::new();
        let mut total = Weight {
            nodes: 1,
            bytes: 0,
            depth: 1,
        };
        loop {
            let (event, span) = self.next()?;
            if event == Event::MappingEnd {
                break;
            }
            let plain = matches!(event, Event::Scalar(_, ScalarStyle::Plain, _, _));
            let (key, weight) = self.node(event, span, depth + 1)?;
            total.add(weight);
            let text = match key.value {
                Value::Scalar { text, .. } => text,
                Value::Null => String::new(),
                Value::Sequence(_) | Value::Mapping(_) => {
                    return Err(Problem::error(
                        Some(span),
                        "a key must be text".to_owned(),
                        None,
                    ));
                }
            };
            if let Some(first) = seen.insert(text.clone(), span) {
                return Err(Problem::error(
                    Some(span),
                    format!("the key {text:?} stands here a second time"),
                    Some(format!("first at line {}", first.line)),
                ));
            }
            let (event, at) = self.next()?;
            let (node, weight) = self.node(event, at, depth + 1)?;
            total.add(weight);
            if plain && text == "<<" {
                merged = merge(node)?;
            } else {
                entries.push((Key { text, span }, node));
            }
        }
        let mut names: HashSet<String> = entries.iter().map(|(k, _)| k.text.clone()).collect();
        for (key, node) in merged {
            if names.insert(key.text.clone()) {
                entries.push((key, node));
            }
        }
        Ok((Value::Mapping(entries), total))
    }

    fn count(&mut self, nodes: usize, bytes: usize, span: Span) -> Result<(), Problem> {
        self.nodes += nodes;
        self.bytes += bytes;
        if self.nodes > MAX_NODES || self.bytes > MAX_EXPANDED {
            return Err(too_many(span));
        }
        Ok(())
    }
}

impl Weight {
    fn add(&mut self, inner: Self) {
        self.nodes += inner.nodes;
        self.bytes += inner.bytes;
        self.depth = self.depth.max(inner.depth + 1);
    }
}

/// What `<<` brings in: a mapping, or a list of them in which the earlier wins.
fn merge(node: Node) -> Result<Vec<(Key, Node)>, Problem> {
    let span = node.span;
    let wrong = || {
        Problem::error(
            Some(span),
            "`<<` takes a mapping or a list of mappings".to_owned(),
            None,
        )
    };
    match node.value {
        Value::Mapping(entries) => Ok(entries),
        Value::Sequence(items) => {
            let mut all = Vec::new();
            for item in items {
                let Value::Mapping(entries) = item.value else {
                    return Err(wrong());
                };
                all.extend(entries);
            }
            Ok(all)
        }
        Value::Null | Value::Scalar { .. } => Err(wrong()),
    }
}

fn scalar_value(text: &str, style: ScalarStyle, tag: Option<&Tag>) -> Value {
    let core = tag
        .filter(|tag| tag.is_yaml_core_schema())
        .map(|tag| tag.suffix.as_str());
    let quoted = match core {
        Some("str" | "binary") => true,
        Some(_) => false,
        None => style != ScalarStyle::Plain,
    };
    if !quoted && scalar::is_null(text) {
        return Value::Null;
    }
    Value::Scalar {
        text: text.to_owned(),
        quoted,
    }
}

fn place(marker: &Marker) -> Span {
    Span {
        line: marker.line(),
        column: marker.col() + 1,
    }
}

fn syntax(error: &ScanError) -> Problem {
    Problem::error(
        Some(place(error.marker())),
        format!("not YAML: {}", error.info()),
        None,
    )
}

fn too_deep(span: Span) -> Problem {
    Problem::error(
        Some(span),
        "nested too deeply".to_owned(),
        Some(format!("at most {MAX_DEPTH} levels are read")),
    )
}

fn too_many(span: Span) -> Problem {
    Problem::error(
        Some(span),
        "too many values, aliases expanded".to_owned(),
        Some(format!("at most {MAX_NODES} values are read")),
    )
}

#[cfg(test)]
mod tests {
    use std::fmt::Write as _;

    use super::*;

    fn text<'n>(node: &'n Node, path: &[&str]) -> Option<&'n str> {
        path.iter()
            .try_fold(node, |node, key| node.get(key))
            .and_then(Node::text)
    }

    #[test]
    fn keeps_places_and_source_text() {
        let node = parse("version: v2\nonboarding:\n  token: 00000000\n").unwrap();
        let token = node.get("onboarding").unwrap().get("token").unwrap();
        assert_eq!(
            token.span,
            Span {
                line: 3,
                column: 10
            }
        );
        assert_eq!(token.text(), Some("00000000"));
    }

    #[test]
    fn aliases_and_merges() {
        let node = parse(
            "base: &b {type: directory, path: /a}\n\
             one: {<<: *b, path: /b}\n\
             two: *b\n\
             three: {<<: [{path: /c}, *b]}\n\
             four: {'<<': x}\n",
        )
        .unwrap();
        assert_eq!(text(&node, &["one", "type"]), Some("directory"));
        assert_eq!(text(&node, &["one", "path"]), Some("/b"));
        assert_eq!(text(&node, &["two", "path"]), Some("/a"));
        assert_eq!(text(&node, &["three", "path"]), Some("/c"));
        assert_eq!(text(&node, &["four", "<<"]), Some("x"));
    }

    #[test]
    fn only_the_first_document() {
        assert_eq!(
            text(&parse("a: 1\n---\na: 2\n").unwrap(), &["a"]),
            Some("1")
        );
        assert_eq!(parse_all("a: 1\n---\n---\na: 2\n").unwrap().len(), 2);
        assert_eq!(parse("# nothing\n").unwrap().value, Value::Null);
        assert!(parse_all("").unwrap().is_empty());
    }

    #[test]
    fn null_in_its_spellings() {
        for source in ["a:", "a: ~", "a: null", "a: Null", "a: NULL", "a: !!null x"] {
            let node = parse(source).unwrap();
            let expected = source != "a: !!null x";
            assert_eq!(
                node.get("a").unwrap().value == Value::Null,
                expected,
                "{source}"
            );
        }
        assert_eq!(text(&parse("a: 'null'").unwrap(), &["a"]), Some("null"));
        assert_eq!(text(&parse("a: !!str null").unwrap(), &["a"]), Some("null"));
    }

    #[test]
    fn refuses_what_it_should() {
        let deep = format!("{}{}", "[".repeat(200), "]".repeat(200));
        let mut bomb = String::from("a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n");
        for i in 1..10 {
            let previous = vec![format!("*a{}", i - 1); 10].join(", ");
            writeln!(bomb, "a{i}: &a{i} [{previous}]").unwrap();
        }
        let long = format!(
            "a: &a {}\nb: [{}]\n",
            "x".repeat(500_000),
            "*a, ".repeat(20)
        );
        let tower = (1..70).fold(String::from("a0: &a0 [x]\n"), |mut all, i| {
            writeln!(all, "a{i}: &a{i} [*a{}]", i - 1).unwrap();
            all
        });
        for (source, part) in [
            ("a: 1\nb: 2\na: 3\n", "a second time"),
            ("a: [1\n", "not YAML"),
            ("a: *missing\n", "not YAML"),
            ("a: &a [*a]\n", "inside the value"),
            ("? [a]\n: b\n", "a key must be text"),
            ("a: {<<: text}\n", "`<<` takes a mapping"),
            (deep.as_str(), "nested too deeply"),
            (bomb.as_str(), "too many values"),
            (long.as_str(), "too many values"),
            (tower.as_str(), "nested too deeply"),
            (" ".repeat(MAX_TEXT + 1).as_str(), "bytes of YAML"),
        ] {
            let problem = parse(source).expect_err(part);
            assert!(
                problem.message.contains(part),
                "{}: {}",
                part,
                problem.message
            );
        }
    }

    #[test]
    fn the_limits_themselves_pass() {
        let deep = format!(
            "{}x{}",
            "[".repeat(MAX_DEPTH - 1),
            "]".repeat(MAX_DEPTH - 1)
        );
        parse(&deep).unwrap();
        parse(&" ".repeat(MAX_TEXT)).unwrap();
        let many = format!("[{}]", "x,".repeat(MAX_NODES - 1));
        parse(&many).unwrap();
    }

    #[test]
    fn arbitrary_bytes_never_panic() {
        let pieces = [
            "a", ":", " ", "\n", "-", "[", "]", "{", "}", "&a", "*a", "<<", "|", ">", "'", "\"",
            "#", "!", "\t", "?", "%", "---", "\u{feff}", "é",
        ];
        let mut state: u64 = 0x9E37_79B9_7F4A_7C15;
        for _ in 0..20_000 {
            let mut source = String::new();
            for _ in 0..12 {
                state = state
                    .wrapping_mul(6_364_136_223_846_793_005)
                    .wrapping_add(1);
                let index = usize::try_from(state >> 33).unwrap() % pieces.len();
                source.push_str(pieces[index]);
            }
            let _outcome = parse(&source).is_ok();
        }
    }
}
