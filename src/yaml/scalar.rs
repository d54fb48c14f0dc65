//! What a piece of source text is: the rules of `gopkg.in/yaml.v3`, which differ from YAML 1.2 in
//! that a boolean field also takes `yes`, `on` and the like, and from YAML 1.1 in that untyped
//! values do not.

use serde_json::Value as Json;

use super::{Node, Value};

/// `null`, `~` or nothing.
pub(super) fn is_null(text: &str) -> bool {
    matches!(text, "" | "~" | "null" | "Null" | "NULL")
}

/// The boolean that a boolean field reads from unquoted text.
pub(super) fn boolean(text: &str) -> Option<bool> {
    match text {
        "true" | "True" | "TRUE" | "y" | "Y" | "yes" | "Yes" | "YES" | "on" | "On" | "ON" => {
            Some(true)
        }
        "false" | "False" | "FALSE" | "n" | "N" | "no" | "No" | "NO" | "off" | "Off" | "OFF" => {
            Some(false)
        }
        _ => None,
    }
}

/// The boolean that untyped, unquoted text is.
fn core_boolean(text: &str) -> Option<bool> {
    match text {
        "true" | "True" | "TRUE" => Some(true),
        "false" | "False" | "FALSE" => Some(false),
        _ => None,
    }
}

/// A number in unquoted text.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Number {
    Signed(i64),
    Unsigned(u64),
    Float(f64),
}

/// The number that unquoted text is: decimal, `0x`, `0o`, `0b` and leading-zero octal integers with
/// `_` anywhere, decimal fractions and exponents.
pub(super) fn number(text: &str) -> Option<Number> {
    let first = text.bytes().next()?;
    if !(first.is_ascii_digit() || matches!(first, b'+' | b'-' | b'.')) {
        return None;
    }
    let plain = text.replace('_', "");
    let (negative, digits) = match plain.strip_prefix(['+', '-']) {
        Some(rest) => (plain.starts_with('-'), rest),
        None => (false, plain.as_str()),
    };
    if let Some(magnitude) = magnitude(digits) {
        if !negative {
            return Some(
                i64::try_from(magnitude).map_or(Number::Unsigned(magnitude), Number::Signed),
            );
        }
        if let Ok(value) = i64::try_from(-i128::from(magnitude)) {
            return Some(Number::Signed(value));
        }
    }
    let special = match plain.as_str() {
        ".inf" | ".Inf" | ".INF" | "+.inf" | "+.Inf" | "+.INF" => Some(f64::INFINITY),
        "-.inf" | "-.Inf" | "-.INF" => Some(f64::NEG_INFINITY),
        ".nan" | ".NaN" | ".NAN" => Some(f64::NAN),
        _ => None,
    };
    if special.is_some() {
        return special.map(Number::Float);
    }
    is_decimal(digits)
        .then(|| plain.parse().ok())
        .flatten()
        .map(Number::Float)
}

fn magnitude(digits: &str) -> Option<u64> {
    let with_base = |rest: &str, radix| {
        (!rest.is_empty() && rest.chars().all(|c| c.is_digit(radix)))
            .then(|| u64::from_str_radix(rest, radix).ok())
            .flatten()
    };
    for (prefix, radix) in [
        ("0x", 16),
        ("0X", 16),
        ("0o", 8),
        ("0O", 8),
        ("0b", 2),
        ("0B", 2),
    ] {
        if let Some(rest) = digits.strip_prefix(prefix) {
            return with_base(rest, radix);
        }
    }
    match digits.strip_prefix('0') {
        Some("") => Some(0),
        Some(rest) => with_base(rest, 8),
        None => with_base(digits, 10),
    }
}

/// `12`, `1.`, `.5`, `1.5e-3`, without sign.
fn is_decimal(text: &str) -> bool {
    let (mantissa, exponent) = match text.split_once(['e', 'E']) {
        Some((mantissa, exponent)) => (mantissa, Some(exponent)),
        None => (text, None),
    };
    let digits = |part: &str| !part.is_empty() && part.bytes().all(|b| b.is_ascii_digit());
    let mantissa_fits = match mantissa.split_once('.') {
        Some(("", fraction)) => digits(fraction),
        Some((whole, fraction)) => digits(whole) && (fraction.is_empty() || digits(fraction)),
        None => digits(mantissa),
    };
    mantissa_fits && exponent.is_none_or(|e| digits(e.strip_prefix(['+', '-']).unwrap_or(e)))
}

/// A date or time as `yaml.v3` recognises it in untyped text (`2006-1-2`, then an optional time).
fn is_timestamp(text: &str) -> bool {
    let mut parts = text.splitn(2, ['T', 't', ' ']);
    let Some(date) = parts.next() else {
        return false;
    };
    let mut fields = date.split('-');
    let (year, month, day) = (fields.next(), fields.next(), fields.next());
    let number = |part: Option<&str>, lengths: std::ops::RangeInclusive<usize>| {
        part.is_some_and(|p| lengths.contains(&p.len()) && p.bytes().all(|b| b.is_ascii_digit()))
    };
    if !(number(year, 4..=4)
        && number(month, 1..=2)
        && number(day, 1..=2)
        && fields.next().is_none())
    {
        return false;
    }
    match parts.next() {
        None => true,
        Some(time) => {
            let digits = time.trim_start().bytes().next();
            digits.is_some_and(|b| b.is_ascii_digit()) && time.matches(':').count() >= 2
        }
    }
}

/// What a person would call this text.
pub(super) fn kind(text: &str, quoted: bool) -> &'static str {
    if quoted {
        "text"
    } else if is_null(text) {
        "nothing"
    } else if core_boolean(text).is_some() {
        "a boolean"
    } else if number(text).is_some() {
        "a number"
    } else {
        "text"
    }
}

/// Whether unquoted `text` would come back as anything but the same text, now or under YAML 1.1.
pub(super) fn needs_quotes(text: &str) -> bool {
    is_null(text)
        || boolean(text).is_some()
        || number(text).is_some()
        || is_timestamp(text)
        || text == "<<"
        || is_base60(text)
}

/// `1:30`, which YAML 1.1 takes for a number.
fn is_base60(text: &str) -> bool {
    let digits = text.strip_prefix(['+', '-']).unwrap_or(text);
    let mut parts = digits.split(':');
    let whole = parts.next().unwrap_or_default();
    let numeric = |p: &str| p.bytes().all(|b| b.is_ascii_digit() || b == b'_');
    let mut count = 0;
    let rest_fits = parts.all(|part| {
        count += 1;
        let part = part.split('.').next().unwrap_or_default();
        (1..=2).contains(&part.len()) && part.bytes().all(|b| b.is_ascii_digit())
    });
    count > 0 && rest_fits && whole.starts_with(|c: char| c.is_ascii_digit()) && numeric(whole)
}

/// The tree as JSON with the types that `yaml.v3` gives to untyped values: `yes` is text, `010` is
/// eight, a date is its text. Infinite and undefined numbers, which JSON lacks, stay text.
#[must_use]
pub fn to_json(node: &Node) -> Json {
    match &node.value {
        Value::Null => Json::Null,
        Value::Scalar { text, quoted: true } => Json::String(text.clone()),
        Value::Scalar {
            text,
            quoted: false,
        } => {
            if let Some(value) = core_boolean(text) {
                return Json::Bool(value);
            }
            let number = match number(text) {
                Some(Number::Signed(value)) => Some(value.into()),
                Some(Number::Unsigned(value)) => Some(value.into()),
                Some(Number::Float(value)) => serde_json::Number::from_f64(value),
                None => None,
            };
            number.map_or_else(|| Json::String(text.clone()), Json::Number)
        }
        Value::Sequence(items) => Json::Array(items.iter().map(to_json).collect()),
        Value::Mapping(entries) => Json::Object(
            entries
                .iter()
                .map(|(key, node)| (key.text.clone(), to_json(node)))
                .collect(),
        ),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::yaml::parse;

    #[test]
    fn json_types() {
        let node = parse(
            "a: 1\nb: -0x1F\nc: 010\nd: 1_000\ne: 1.5\nf: yes\ng: true\nh: \"1\"\ni: ~\n\
             j: 111111111111\nk: 18446744073709551615\nl: 2026-01-02\nm: 1.0.0\nn: 09\n\
             o: [x, {y: z}]\np: 1e3\nq: .inf\nr: v1\ns: 099999999999999999999\nt: -1\nu: 0b101\n\
             v: '-'\nw: +\nx: 1e\n",
        )
        .unwrap();
        assert_eq!(
            to_json(&node),
            json!({
                "a": 1, "b": -31, "c": 8, "d": 1000, "e": 1.5, "f": "yes", "g": true, "h": "1",
                "i": null, "j": 111_111_111_111_i64, "k": u64::MAX, "l": "2026-01-02",
                "m": "1.0.0", "n": 9.0, "o": ["x", {"y": "z"}], "p": 1000.0, "q": ".inf",
                "r": "v1", "s": 99_999_999_999_999_999_999.0, "t": -1, "u": 5, "v": "-", "w": "+",
                "x": "1e",
            })
        );
    }

    #[test]
    fn text_that_needs_quotes() {
        for text in [
            "",
            "on",
            "n",
            "Yes",
            "1",
            "00000000",
            "0x1F",
            "1.5",
            "1e3",
            "true",
            "~",
            "null",
            "2026-01-02",
            "1:30",
            "<<",
            "2001-12-14t21:59:43.10-05:00",
            ".inf",
        ] {
            assert!(needs_quotes(text), "{text}");
        }
        for text in [
            "identity",
            "1h0m0s",
            "example.teleport.sh:443",
            "try-secure",
            "a:1",
            "1.0.0",
            "-",
            "v2",
            "2026-01",
            "tcp://127.0.0.1:1",
            "0b2",
        ] {
            assert!(!needs_quotes(text), "{text}");
        }
    }
}
