//! Percent-encoding (RFC 3986).

/// Percent-encoded: everything but RFC 3986's unreserved characters.
pub(crate) fn encoded(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) {
            out.push(char::from(byte));
        } else {
            out.push_str(&format!("%{byte:02X}"));
        }
    }
    out
}

/// Resolves the `%xx` of URLs; `None` if an escape is malformed or the result is no text.
pub(crate) fn unescape(text: &str) -> Option<String> {
    let mut out = Vec::with_capacity(text.len());
    let mut bytes = text.bytes();
    while let Some(byte) = bytes.next() {
        if byte == b'%' {
            let pair = [bytes.next()?, bytes.next()?];
            let mut decoded = [0];
            hex::decode_to_slice(pair, &mut decoded).ok()?;
            out.extend(decoded);
        } else {
            out.push(byte);
        }
    }
    String::from_utf8(out).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn everything_but_unreserved_characters_is_encoded() {
        assert_eq!(encoded("a+/=~ü"), "a%2B%2F%3D~%C3%BC");
    }

    #[test]
    fn escapes_are_resolved_or_refused() {
        assert_eq!(unescape("a%2Fb%C3%BC+").as_deref(), Some("a/bü+"));
        for text in ["%", "%2", "%zz", "%ff"] {
            assert_eq!(unescape(text), None, "{text}");
        }
    }
}
