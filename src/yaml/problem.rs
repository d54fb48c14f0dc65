//! What is wrong with a file, collected so that one run shows all of it.

use std::cell::RefCell;
use std::fmt;

use super::Span;

/// Whether the file can be used in spite of the problem.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Severity {
    /// It cannot: the command ends with exit code 2.
    Error,
    /// It can: the line is logged and the command goes on.
    Warning,
}

/// One problem. Its texts never hold the value of a secret.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// Whether the file can still be used.
    pub severity: Severity,
    /// Where, unless the value did not come from a file.
    pub span: Option<Span>,
    /// The key path, as `services[0].destination.path`; empty for the file as a whole.
    pub path: String,
    /// The cause, with the value unless it is a secret.
    pub message: String,
    /// What to write instead.
    pub hint: Option<String>,
}

impl Problem {
    /// An error that has no key path.
    #[must_use]
    pub fn error(span: Option<Span>, message: String, hint: Option<String>) -> Self {
        Self {
            severity: Severity::Error,
            span,
            path: String::new(),
            message,
            hint,
        }
    }

    /// One line: `file:line:column: error: path: message (hint)`.
    #[must_use]
    pub fn render(&self, file: &str) -> String {
        match self.span {
            Some(span) => format!("{file}:{span}: {self}"),
            None => format!("{file}: {self}"),
        }
    }
}

/// Everything but the place: `error: path: message (hint)`.
impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self.severity {
            Severity::Error => "error: ",
            Severity::Warning => "warning: ",
        })?;
        if !self.path.is_empty() {
            write!(f, "{}: ", self.path)?;
        }
        f.write_str(&self.message)?;
        if let Some(hint) = &self.hint {
            write!(f, " ({hint})")?;
        }
        Ok(())
    }
}

/// Collects problems while a tree is read; shared by reference among all readers of one tree.
#[derive(Debug, Default)]
pub struct Problems {
    all: RefCell<Vec<Problem>>,
    strict: bool,
}

impl Problems {
    /// An empty collection.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// An empty collection for a file in which a key that nobody reads is an error.
    #[must_use]
    pub fn strict() -> Self {
        Self {
            strict: true,
            ..Self::default()
        }
    }

    /// Whether a key that nobody reads is an error.
    pub(super) fn is_strict(&self) -> bool {
        self.strict
    }

    /// Adds one.
    pub fn push(&self, problem: Problem) {
        self.all.borrow_mut().push(problem);
    }

    /// Whether the file cannot be used.
    pub fn has_errors(&self) -> bool {
        self.all
            .borrow()
            .iter()
            .any(|problem| problem.severity == Severity::Error)
    }

    /// All of them in the order of the file; those without a place come last.
    #[must_use]
    pub fn into_sorted(self) -> Vec<Problem> {
        let mut all = self.all.into_inner();
        all.sort_by_key(|problem| (problem.span.is_none(), problem.span));
        all
    }

    /// All of them, one line each.
    #[must_use]
    pub fn render(self, file: &str) -> String {
        self.into_sorted()
            .iter()
            .map(|problem| problem.render(file) + "\n")
            .collect()
    }
}

/// The candidate that `word` is probably a misspelling of.
#[must_use]
pub fn nearest<'c>(word: &str, candidates: impl IntoIterator<Item = &'c str>) -> Option<&'c str> {
    let lower = word.to_lowercase().replace('-', "_");
    candidates
        .into_iter()
        .map(|candidate| {
            let other = candidate.to_lowercase().replace('-', "_");
            (strsim::damerau_levenshtein(&lower, &other), candidate)
        })
        .filter(|(distance, candidate)| *distance <= (candidate.len().max(word.len()) / 3).max(1))
        .min_by_key(|(distance, _)| *distance)
        .map(|(_, candidate)| candidate)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sorted_and_rendered() {
        let problems = Problems::new();
        let at = |line| Some(Span { line, column: 3 });
        problems.push(Problem::error(None, "no place".into(), None));
        problems.push(Problem {
            severity: Severity::Warning,
            span: at(7),
            path: "services[0].nme".into(),
            message: "unknown key".into(),
            hint: Some("did you mean `name`?".into()),
        });
        assert!(problems.has_errors());
        problems.push(Problem::error(at(2), "first".into(), None));
        assert_eq!(
            problems.render("t.yaml"),
            "t.yaml:2:3: error: first\n\
             t.yaml:7:3: warning: services[0].nme: unknown key (did you mean `name`?)\n\
             t.yaml: error: no place\n"
        );
    }

    #[test]
    fn nearest_word() {
        let known = ["version", "services", "storage", "proxy_server"];
        assert_eq!(nearest("servces", known), Some("services"));
        assert_eq!(nearest("Version", known), Some("version"));
        assert_eq!(nearest("proxy-server", known), Some("proxy_server"));
        assert_eq!(nearest("zebra", known), None);
        assert_eq!(nearest("", known), None);
    }
}
