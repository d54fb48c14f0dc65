//! The health of an output as one report: of what it writes, and of the hooks after that.

use std::sync::{Arc, Mutex, PoisonError};

use crate::health::Reporter;

/// What can fail for itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Part {
    /// Making and writing the files.
    Files,
    /// What is done after a write.
    Hooks,
}

/// The voice of an output. Clones share what is known.
#[derive(Debug, Clone)]
pub(super) struct Voice {
    reporter: Reporter,
    troubles: Arc<Mutex<Troubles>>,
}

#[derive(Debug, Default)]
struct Troubles {
    files: Option<String>,
    hooks: Option<String>,
}

impl Voice {
    pub(super) fn new(reporter: Reporter) -> Self {
        Self {
            reporter,
            troubles: Arc::default(),
        }
    }

    /// Reports how a part is, with what is known of the other: what mends one does not hide what
    /// still ails the other.
    pub(super) fn tell(&self, part: Part, trouble: Option<String>) {
        let mut troubles = self.troubles.lock().unwrap_or_else(PoisonError::into_inner);
        match part {
            Part::Files => troubles.files = trouble,
            Part::Hooks => troubles.hooks = trouble,
        }
        let all = [&troubles.files, &troubles.hooks];
        let all: Vec<&str> = all.into_iter().flatten().map(String::as_str).collect();
        if all.is_empty() {
            self.reporter.healthy();
        } else {
            self.reporter.unhealthy(all.join("; "));
        }
    }

    /// The reporter, for what concerns no part.
    pub(super) fn reporter(&self) -> &Reporter {
        &self.reporter
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock::Clock;
    use crate::health::Registry;

    #[test]
    fn each_part_is_mended_by_itself_only() {
        let registry = Registry::new(Clock::system());
        let voice = Voice::new(registry.reporter("x"));
        let trouble = |text: &str| Some(text.to_owned());
        for (part, told, expected) in [
            (Part::Files, None, None),
            (Part::Hooks, trouble("b"), Some("b")),
            (Part::Files, trouble("a"), Some("a; b")),
            (Part::Files, None, Some("b")),
            (Part::Files, trouble("a"), Some("a; b")),
            (Part::Hooks, None, Some("a")),
            (Part::Files, None, None),
        ] {
            voice.tell(part, told);
            let report = registry.snapshot().services["x"].clone();
            assert_eq!(report.reason.as_deref(), expected);
        }
    }
}
