//! Reads one mapping key by key, with the type rules of the Go library, and knows at the end which
//! keys nobody asked for.

use std::time::Duration;

use super::scalar::{self, Number};
use super::{Key, Node, Problem, Problems, Severity, Span, Value, duration, nearest};
use crate::secret::Secret;

/// A mapping being read. Every reader returns `None` both for an absent key and for a value that
/// does not fit; the latter has then been reported.
#[derive(Debug)]
pub struct Fields<'a> {
    entries: &'a [(Key, Node)],
    span: Span,
    path: String,
    problems: &'a Problems,
    known: Vec<String>,
}

impl<'a> Fields<'a> {
    /// Reads `node`, which stands at `path` (empty for the whole file). Nothing (`key:`) is an
    /// empty mapping; any other value is reported and gives `None`.
    pub fn new(node: &'a Node, path: impl Into<String>, problems: &'a Problems) -> Option<Self> {
        let path = path.into();
        let entries: &[(Key, Node)] = match &node.value {
            Value::Mapping(entries) => entries,
            Value::Null => &[],
            Value::Scalar { .. } | Value::Sequence(_) => {
                problems.push(Problem {
                    severity: Severity::Error,
                    span: placed(node.span),
                    path,
                    message: format!("must be a mapping, not {}", node.kind()),
                    hint: Some("write `key: value` lines, indented below".to_owned()),
                });
                return None;
            }
        };
        Some(Self {
            entries,
            span: node.span,
            path,
            problems,
            known: Vec::new(),
        })
    }

    /// Where this mapping stands, as `services[0].selector`; empty for the whole file.
    pub fn path(&self) -> &str {
        &self.path
    }

    /// Where this mapping starts.
    pub fn span(&self) -> Span {
        self.span
    }

    /// The collector that this reader reports to.
    pub fn problems(&self) -> &'a Problems {
        self.problems
    }

    /// The key path of `key` in this mapping.
    #[must_use]
    pub fn path_of(&self, key: &str) -> String {
        match (self.path.is_empty(), key.is_empty()) {
            (true, _) => key.to_owned(),
            (false, true) => self.path.clone(),
            (false, false) => format!("{}.{key}", self.path),
        }
    }

    /// All keys in file order, for mappings whose keys are the user's own (labels). They still
    /// count as unknown until they are read.
    pub fn keys(&self) -> Vec<&'a str> {
        self.entries
            .iter()
            .map(|(key, _)| key.text.as_str())
            .collect()
    }

    /// Whether `key` has a value (`key:` has none). Does not make the key known.
    pub fn has(&self, key: &str) -> bool {
        self.find(key)
            .is_some_and(|(_, node)| node.value != Value::Null)
    }

    /// The value under `key`, unless it is absent or nothing.
    pub fn node(&mut self, key: &str) -> Option<&'a Node> {
        self.known(key);
        self.find(key)
            .map(|(_, node)| node)
            .filter(|node| node.value != Value::Null)
    }

    /// Text. Any scalar is taken with the characters it has in the file, so `token: 00000000` and
    /// `user: 123` are text. Empty text is the same as an absent key, as it is upstream.
    pub fn string(&mut self, key: &str) -> Option<String> {
        let node = self.node(key)?;
        match &node.value {
            Value::Scalar { text, .. } => Some(text.clone()).filter(|text| !text.is_empty()),
            Value::Null | Value::Sequence(_) | Value::Mapping(_) => {
                self.mismatch(key, node, "text");
                None
            }
        }
    }

    /// As [`Fields::string`], for a value that must not appear in any output.
    pub fn secret_string(&mut self, key: &str) -> Option<Secret<String>> {
        self.string(key).map(Secret::new)
    }

    /// As [`Fields::string`], and its absence is an error.
    pub fn required(&mut self, key: &str) -> Option<String> {
        let reported = self.has(key) && self.find(key).is_some_and(|(_, n)| n.text().is_none());
        let value = self.string(key);
        if value.is_none() && !reported {
            self.error(key, format!("`{key}` is required"), None);
        }
        value
    }

    /// A boolean: unquoted `true`, `false`, or one of the words of YAML 1.1 (`yes`, `on`, …).
    pub fn bool(&mut self, key: &str) -> Option<bool> {
        let node = self.node(key)?;
        if let Value::Scalar {
            text,
            quoted: false,
        } = &node.value
            && let Some(value) = scalar::boolean(text)
        {
            return Some(value);
        }
        self.mismatch(key, node, "`true` or `false` without quotes");
        None
    }

    /// A whole number without quotes.
    pub fn integer(&mut self, key: &str) -> Option<i64> {
        let node = self.node(key)?;
        if let Value::Scalar {
            text,
            quoted: false,
        } = &node.value
        {
            match scalar::number(text) {
                Some(Number::Signed(value)) => return Some(value),
                #[expect(
                    clippy::cast_possible_truncation,
                    reason = "guarded: whole and exactly representable"
                )]
                Some(Number::Float(value)) if value.fract() == 0.0 && value.abs() < 9e15 => {
                    return Some(value as i64);
                }
                Some(Number::Float(_) | Number::Unsigned(_)) | None => {}
            }
        }
        self.mismatch(key, node, "a whole number without quotes");
        None
    }

    /// A duration as Go writes them. A number without a unit is refused, not taken for seconds;
    /// so is a negative one.
    pub fn duration(&mut self, key: &str) -> Option<Duration> {
        let node = self.node(key)?;
        let Value::Scalar { text, quoted } = &node.value else {
            self.mismatch(key, node, "a duration");
            return None;
        };
        let parsed = if !quoted && scalar::number(text).is_some() {
            Err(duration::DurationError::MissingUnit)
        } else {
            duration::parse(text)
        };
        match parsed {
            Ok(value) => Some(value),
            Err(error) => {
                self.error(
                    key,
                    format!("{text:?} is no duration: {error}"),
                    Some(duration::FORM),
                );
                None
            }
        }
    }

    /// A list of texts. A single text is refused, as upstream does.
    pub fn strings(&mut self, key: &str) -> Option<Vec<String>> {
        let items = self.list(key)?;
        let mut all = Vec::with_capacity(items.len());
        for (index, item) in items.iter().enumerate() {
            if let Some(text) = item.text() {
                all.push(text.to_owned());
            } else {
                self.mismatch(&format!("{key}[{index}]"), item, "text");
            }
        }
        Some(all)
    }

    /// The mapping under `key`; absent and nothing are `None`.
    pub fn section(&mut self, key: &str) -> Option<Self> {
        let node = self.node(key)?;
        Self::new(node, self.path_of(key), self.problems)
    }

    /// The items of the list under `key`; absent and nothing are `None`.
    pub fn list(&mut self, key: &str) -> Option<Vec<&'a Node>> {
        let node = self.node(key)?;
        match &node.value {
            Value::Sequence(items) => Some(items.iter().collect()),
            Value::Null | Value::Scalar { .. } | Value::Mapping(_) => {
                self.mismatch(key, node, "a list");
                None
            }
        }
    }

    /// The mappings of the list under `key`, each with its path (`selectors[0]`).
    pub fn sections(&mut self, key: &str) -> Option<Vec<Self>> {
        let items = self.list(key)?;
        let path = self.path_of(key);
        Some(
            items
                .into_iter()
                .enumerate()
                .filter_map(|(i, item)| Self::new(item, format!("{path}[{i}]"), self.problems))
                .collect(),
        )
    }

    /// A mapping from the user's own keys to texts, in file order.
    pub fn string_map(&mut self, key: &str) -> Option<Vec<(String, String)>> {
        let mut section = self.section(key)?;
        let mut all = Vec::new();
        for name in section.keys() {
            let text = section.string(name).unwrap_or_default();
            all.push((name.to_owned(), text));
        }
        Some(all)
    }

    /// Text that must be one of `allowed`.
    pub fn one_of(&mut self, key: &str, allowed: &[&str]) -> Option<String> {
        let text = self.string(key)?;
        if allowed.contains(&text.as_str()) {
            return Some(text);
        }
        let mut hint = format!("one of {}", list(allowed));
        if let Some(near) = nearest(&text, allowed.iter().copied()) {
            hint = format!("did you mean {near:?}? {hint}");
        }
        self.error(
            key,
            format!("{text:?} is not a value of `{key}`"),
            Some(&hint),
        );
        None
    }

    /// Reports that the `name` given under `key` is none of the kinds of `family` (a plural, as
    /// "join methods") that exist `here`. One that only exists `upstream` is refused by its name.
    pub fn unknown_kind(
        &self,
        key: &str,
        family: &str,
        name: &str,
        here: &[&str],
        upstream: &[&str],
    ) {
        let known = format!("the {family} here: {}", list(here));
        if upstream.contains(&name) {
            let message = format!("{name:?} is not among the {family} of this version yet");
            self.error(key, message, Some(&known));
            return;
        }
        let hint = match nearest(name, here.iter().chain(upstream).copied()) {
            Some(near) => format!("did you mean {near:?}? {known}"),
            None => known,
        };
        self.error(
            key,
            format!("unrecognized: {name:?} is not among the {family}"),
            Some(&hint),
        );
    }

    /// Reports an error at `key`: at its value, or at the mapping if the key is absent or empty.
    pub fn error(&self, key: &str, message: impl Into<String>, hint: Option<&str>) {
        self.report(Severity::Error, key, message.into(), hint);
    }

    /// Reports an error about the whole of the mapping.
    pub fn error_here(&self, message: impl Into<String>, hint: &str) {
        self.problems.push(Problem {
            severity: Severity::Error,
            span: (self.span().line > 0).then(|| self.span()),
            path: self.path().to_owned(),
            message: message.into(),
            hint: Some(hint.to_owned()),
        });
    }

    /// As [`Fields::error`], but the file can still be used.
    pub fn warn(&self, key: &str, message: impl Into<String>, hint: Option<&str>) {
        self.report(Severity::Warning, key, message.into(), hint);
    }

    /// Declares `key` known without reading it.
    pub fn ignore(&mut self, key: &str) {
        self.known(key);
    }

    /// Whether `key` has been read or declared known.
    pub fn is_known(&self, key: &str) -> bool {
        self.known.iter().any(|k| k == key)
    }

    /// Ends the reading: see [`Fields::warn_unknown`].
    pub fn finish(self) {
        self.warn_unknown();
    }

    /// Warns about every key that was not asked for: upstream ignores them, so they are no error.
    /// Where the file is read [strictly](Problems::strict), they are.
    pub fn warn_unknown(&self) {
        let (severity, message) = if self.problems.is_strict() {
            (Severity::Error, "unknown key")
        } else {
            (Severity::Warning, "unknown key, ignored")
        };
        for (key, _) in self.entries {
            if self.known.contains(&key.text) {
                continue;
            }
            let near = nearest(&key.text, self.known.iter().map(String::as_str));
            self.problems.push(Problem {
                severity,
                span: placed(key.span),
                path: self.path_of(&key.text),
                message: message.to_owned(),
                hint: near.map(|near| format!("did you mean `{near}`?")),
            });
        }
    }

    fn find(&self, key: &str) -> Option<&'a (Key, Node)> {
        self.entries.iter().find(|(k, _)| k.text == key)
    }

    fn known(&mut self, key: &str) {
        if !self.is_known(key) {
            self.known.push(key.to_owned());
        }
    }

    fn mismatch(&self, key: &str, node: &Node, wanted: &str) {
        self.problems.push(Problem {
            severity: Severity::Error,
            span: placed(node.span),
            path: self.path_of(key),
            message: match &node.value {
                // Any scalar is text to a field that may hold a secret, so none gets here.
                Value::Scalar { text, .. } => {
                    format!("must be {wanted}, not {} {text:?}", article(node.kind()))
                }
                Value::Null | Value::Sequence(_) | Value::Mapping(_) => {
                    format!("must be {wanted}, not {}", node.kind())
                }
            },
            hint: None,
        });
    }

    fn report(&self, severity: Severity, key: &str, message: String, hint: Option<&str>) {
        let span = self.find(key).map_or(self.span, |(_, node)| node.span);
        self.problems.push(Problem {
            severity,
            span: placed(span),
            path: self.path_of(key),
            message,
            hint: hint.map(str::to_owned),
        });
    }
}

/// `a`, `b` and `c`, quoted, for hints.
fn list(allowed: &[&str]) -> String {
    let quoted: Vec<String> = allowed.iter().map(|word| format!("{word:?}")).collect();
    quoted.join(", ")
}

fn article(kind: &'static str) -> &'static str {
    match kind {
        "text" => "the text",
        "a number" => "the number",
        "a boolean" => "the boolean",
        other => other,
    }
}

/// Line 0 means that the value did not come from a file.
fn placed(span: Span) -> Option<Span> {
    (span.line > 0).then_some(span)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::yaml::parse;

    fn read<R>(source: &str, reader: impl FnOnce(&mut Fields<'_>) -> R) -> (R, String) {
        let node = parse(source).unwrap();
        let problems = Problems::new();
        let mut fields = Fields::new(&node, "", &problems).unwrap();
        let result = reader(&mut fields);
        fields.finish();
        (result, problems.render("t"))
    }

    #[test]
    fn text_keeps_its_characters() {
        let (values, problems) = read("a: 00000000\nb: true\nc: ''\nd:\ne: 1e3\n", |f| {
            ["a", "b", "c", "d", "e", "absent"].map(|key| f.string(key))
        });
        let expected = [
            Some("00000000"),
            Some("true"),
            None,
            None,
            Some("1e3"),
            None,
        ];
        assert_eq!(values, expected.map(|v| v.map(String::from)));
        assert_eq!(problems, "");
    }

    #[test]
    fn booleans() {
        let (values, problems) = read("a: on\nb: n\nc: \"true\"\nd: 1\n", |f| {
            ["a", "b", "c", "d"].map(|key| f.bool(key))
        });
        assert_eq!(values, [Some(true), Some(false), None, None]);
        assert_eq!(
            problems,
            "t:3:4: error: c: must be `true` or `false` without quotes, not the text \"true\"\n\
             t:4:4: error: d: must be `true` or `false` without quotes, not the number \"1\"\n"
        );
    }

    #[test]
    fn integers_and_durations() {
        let (values, problems) = read("a: -1\nb: 0x10\nc: \"1\"\nd: 1.5\ne: 1e3\n", |f| {
            ["a", "b", "c", "d", "e"].map(|key| f.integer(key))
        });
        assert_eq!(values, [Some(-1), Some(16), None, None, Some(1000)]);
        assert_eq!(problems.lines().count(), 2);
        let (values, problems) = read("a: 1h\nb: 3600\nc: \"0\"\nd: 0\ne: -1h\nf: [1h]\n", |f| {
            ["a", "b", "c", "d", "e", "f"].map(|key| f.duration(key))
        });
        assert_eq!(
            values,
            [
                Some(Duration::from_hours(1)),
                None,
                Some(Duration::ZERO),
                None,
                None,
                None
            ]
        );
        assert!(problems.contains("b: \"3600\" is no duration: the unit is missing (write it as"));
        assert_eq!(problems.lines().count(), 4);
    }

    #[test]
    fn lists_sections_and_maps() {
        let ((), problems) = read(
            "a: [x, 1]\nb: x\nc: {k: v}\nd: {k: [v]}\ne: text\nf: [{k: v}, x]\n",
            |f| {
                assert_eq!(f.strings("a"), Some(vec!["x".into(), "1".into()]));
                assert_eq!(f.strings("b"), None);
                assert_eq!(f.string_map("c"), Some(vec![("k".into(), "v".into())]));
                assert_eq!(f.string_map("d"), Some(vec![("k".into(), String::new())]));
                assert!(f.section("e").is_none());
                assert_eq!(f.sections("f").unwrap().len(), 1);
            },
        );
        assert_eq!(
            problems,
            "t:2:4: error: b: must be a list, not the text \"x\"\n\
             t:4:8: error: d.k: must be text, not a list\n\
             t:5:4: error: e: must be a mapping, not text (write `key: value` lines, indented below)\n\
             t:6:13: error: f[1]: must be a mapping, not text (write `key: value` lines, indented below)\n"
        );
    }

    #[test]
    fn required_and_one_of() {
        let ((), problems) = read("acls: requird\nlist: []\n", |f| {
            assert_eq!(f.required("path"), None);
            assert_eq!(f.required("list"), None);
            assert_eq!(f.one_of("acls", &["try", "required", "off"]), None);
        });
        assert_eq!(
            problems,
            "t:1:1: error: path: `path` is required\n\
             t:1:7: error: acls: \"requird\" is not a value of `acls` (did you mean \"required\"? \
             one of \"try\", \"required\", \"off\")\n\
             t:2:7: error: list: must be text, not a list\n"
        );
    }

    #[test]
    fn unknown_keys_warn_with_the_nearest() {
        let ((), problems) = read("servces: []\nzebra: 1\n", |f| {
            let _services = f.list("services");
        });
        assert_eq!(
            problems,
            "t:1:1: warning: servces: unknown key, ignored (did you mean `services`?)\n\
             t:2:1: warning: zebra: unknown key, ignored\n"
        );
    }

    #[test]
    fn secrets_stay_out_of_messages() {
        let (secret, _) = read("token: hunter2\n", |f| f.secret_string("token"));
        assert_eq!(secret.unwrap().expose(), "hunter2");
        let (_, problems) = read("token: [hunter2]\n", |f| f.secret_string("token").is_none());
        assert!(!problems.contains("hunter2"));
    }
}
