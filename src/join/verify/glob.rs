//! Patterns of allow rules.

/// `*` is any run of characters, `?` exactly one, neither of them a line feed; all else is itself.
pub(crate) fn glob(pattern: &str, text: &str) -> bool {
    let (pattern, text): (Vec<char>, Vec<char>) =
        (pattern.chars().collect(), text.chars().collect());
    // `reached[i]`: the pattern so far matches the first `i` characters.
    let mut reached = vec![false; text.len() + 1];
    if let Some(first) = reached.first_mut() {
        *first = true;
    }
    for symbol in pattern {
        let mut next = vec![false; text.len() + 1];
        let mut run = false;
        for (at, slot) in next.iter_mut().enumerate() {
            let before = at.checked_sub(1);
            let character = before.and_then(|before| text.get(before));
            let from = before
                .and_then(|before| reached.get(before))
                .copied()
                .unwrap_or(false);
            *slot = match symbol {
                '*' => {
                    run = run && character != Some(&'\n');
                    run |= reached.get(at).copied().unwrap_or(false);
                    run
                }
                '?' => from && character != Some(&'\n'),
                literal => from && character == Some(&literal),
            };
        }
        reached = next;
    }
    reached.last().copied().unwrap_or(false)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn globs_know_two_wildcards_and_nothing_else() {
        for (pattern, text, matches) in [
            ("", "", true),
            ("*", "", true),
            ("*", "a/b:c", true),
            ("?", "", false),
            ("?", "a", true),
            ("?", "ä", true),
            ("a?c", "abc", true),
            ("a?c", "ac", false),
            ("a*c*e", "abcde", true),
            ("a*c*e", "abcd", false),
            ("abc", "abcd", false),
            ("abc", "xabc", false),
            ("a.c", "abc", false),
            ("A", "a", false),
            ("a*b", "a\nb", false),
            ("a?b", "a\nb", false),
            ("a\nb", "a\nb", true),
            ("*\n*", "a\nb", true),
            ("[ab]", "a", false),
        ] {
            assert_eq!(glob(pattern, text), matches, "{pattern:?} {text:?}");
        }
        // Nested stars must not take exponential time.
        assert!(!glob(&"*a".repeat(500), &"a".repeat(499)));
    }
}
