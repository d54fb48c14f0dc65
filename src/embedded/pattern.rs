//! Patterns in roles: texts with `*`, and `^regular expressions$`.

use regex::RegexBuilder;

/// The largest compiled pattern, in bytes.
const MAX_COMPILED: usize = 64 * 1024;

/// Whether `text` is the pattern, fits its `*`, or its `^regular expression$`. `None` if that
/// cannot be told: the pattern is a template, or no regular expression.
///
/// What allows needs `Some(true)`. What denies must count `None` as a match, or a denial that
/// nobody understands would be none.
pub(super) fn fits(pattern: &str, text: &str) -> Option<bool> {
    if pattern == "*" || pattern == text {
        return Some(true);
    }
    if pattern.contains("{{") {
        return None;
    }
    let expression = if pattern.starts_with('^') && pattern.ends_with('$') {
        pattern.to_owned()
    } else if pattern.contains('*') {
        let parts: Vec<_> = pattern.split('*').map(regex::escape).collect();
        format!("^{}$", parts.join("(?s:.*)"))
    } else {
        return Some(false);
    };
    let compiled = RegexBuilder::new(&expression)
        .size_limit(MAX_COMPILED)
        .build();
    compiled.ok().map(|compiled| compiled.is_match(text))
}

/// Whether [`fits`] can tell of this pattern.
pub(super) fn is_clear(pattern: &str) -> bool {
    fits(pattern, "\0").is_some()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_match_or_do_not_or_cannot_be_told() {
        let (yes, no) = (Some(true), Some(false));
        for (pattern, text, expected) in [
            ("a", "a", yes),
            ("a", "b", no),
            ("*", "", yes),
            ("a-*", "a-1", yes),
            ("a-*", "b-1", no),
            ("*.x", "a\nb.x", yes),
            ("a.c", "abc", no),
            ("^a[0-9]$", "a1", yes),
            ("^a[0-9]$", "a", no),
            ("^a", "ab", no),
            ("^(a$", "a", None),
            ("{{internal.x}}", "x", None),
            ("^(a{1000}){1000}$", "a", None),
        ] {
            assert_eq!(fits(pattern, text), expected, "{pattern} {text}");
        }
        assert!(is_clear("a-*") && !is_clear("^[$"));
    }
}
