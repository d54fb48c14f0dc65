//! Hints tell the identities of one answer apart.

use std::collections::HashSet;

/// The longest hint, in bytes (`SPIFFE_Workload_API.md` 5.2.1).
const MAX: usize = 1024;

/// The hints of one answer so far.
#[derive(Debug, Default)]
pub(super) struct Hints(HashSet<String>);

impl Hints {
    /// `hint`, or nothing if it is too long or taken: hints are unique within a response
    /// (`SPIFFE_Workload_API.md` 5.2.1), and the first keeps it. `identity` names the resource that
    /// has it, for the log.
    pub(super) fn admit(&mut self, hint: String, identity: &str) -> String {
        if hint.is_empty() || (hint.len() <= MAX && self.0.insert(hint.clone())) {
            return hint;
        }
        tracing::warn!(
            workload_identity = identity,
            "Leaving out the hint: it is longer than 1024 bytes, or another identity has it"
        );
        String::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_keeps_it() {
        let mut hints = Hints::default();
        let [long, longest] = [MAX + 1, MAX].map(|length| "x".repeat(length));
        for (hint, kept) in [
            ("a", "a"),
            ("", ""),
            ("a", ""),
            ("b", "b"),
            ("", ""),
            (&long, ""),
            (&longest, &longest),
        ] {
            assert_eq!(hints.admit(hint.to_owned(), "n"), kept);
        }
    }
}
