//! Durations as Go writes and reads them: `1h30m`, `90s`, `1.5h`, `1h0m0s`.

use std::fmt::Write as _;
use std::time::Duration;

/// Why a text is no duration.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum DurationError {
    /// Nothing there, no digits, or something that is neither digit nor unit.
    #[error("not a duration")]
    Malformed,
    /// A number without a unit: seconds are not assumed.
    #[error("the unit is missing")]
    MissingUnit,
    /// A unit other than `ns`, `us`, `ms`, `s`, `m`, `h`; days do not exist.
    #[error("unknown unit")]
    UnknownUnit,
    /// Below zero.
    #[error("negative")]
    Negative,
    /// More than 2^63 nanoseconds, 292 years.
    #[error("too long")]
    TooLong,
}

/// How to write one, for hints.
pub const FORM: &str = "write it as `1h30m`, `20m` or `90s`; units are h, m, s, ms, us, ns";

const UNITS: [(&str, u64); 8] = [
    ("ns", 1),
    ("us", 1_000),
    ("\u{b5}s", 1_000),
    ("\u{3bc}s", 1_000),
    ("ms", 1_000_000),
    ("s", 1_000_000_000),
    ("m", 60_000_000_000),
    ("h", 3_600_000_000_000),
];

/// Reads a duration. `0` needs no unit, everything else does.
///
/// # Errors
/// See [`DurationError`].
pub fn parse(text: &str) -> Result<Duration, DurationError> {
    let (negative, mut rest) = match text.strip_prefix('-') {
        Some(rest) => (true, rest),
        None => (false, text.strip_prefix('+').unwrap_or(text)),
    };
    if rest == "0" {
        return Ok(Duration::ZERO);
    }
    if rest.is_empty() {
        return Err(DurationError::Malformed);
    }
    let mut total: u64 = 0;
    while !rest.is_empty() {
        let number = rest
            .bytes()
            .take_while(|b| b.is_ascii_digit() || *b == b'.')
            .count();
        let (digits, tail) = rest
            .split_at_checked(number)
            .ok_or(DurationError::Malformed)?;
        let length = tail
            .find(|c: char| c.is_ascii_digit() || c == '.')
            .unwrap_or(tail.len());
        let (unit, tail) = tail
            .split_at_checked(length)
            .ok_or(DurationError::Malformed)?;
        let (whole, fraction) = digits.split_once('.').unwrap_or((digits, ""));
        if fraction.contains('.') || (whole.is_empty() && fraction.is_empty()) {
            return Err(DurationError::Malformed);
        }
        if unit.is_empty() {
            return Err(DurationError::MissingUnit);
        }
        let (_, scale) = *UNITS
            .iter()
            .find(|(name, _)| *name == unit)
            .ok_or(DurationError::UnknownUnit)?;
        let part = nanoseconds(whole, fraction, scale).ok_or(DurationError::TooLong)?;
        total = total
            .checked_add(part)
            .filter(|sum| i64::try_from(*sum).is_ok())
            .ok_or(DurationError::TooLong)?;
        rest = tail;
    }
    if negative && total > 0 {
        return Err(DurationError::Negative);
    }
    Ok(Duration::from_nanos(total))
}

fn nanoseconds(whole: &str, fraction: &str, scale: u64) -> Option<u64> {
    let whole: u64 = if whole.is_empty() {
        0
    } else {
        whole.parse().ok()?
    };
    let mut part = 0_u128;
    for (digit, step) in fraction.bytes().zip(1_u32..19) {
        // Summed before it is divided, so that 0.333h rounds once, downwards.
        part += u128::from(digit - b'0') * u128::from(scale) * 10_u128.pow(19 - step);
    }
    whole
        .checked_mul(scale)?
        .checked_add(u64::try_from(part / 10_u128.pow(19)).ok()?)
}

/// Writes a duration: `1h0m0s`, `20m0s`, `1.5s`, `250ms`, `0s`.
#[must_use]
pub fn format(duration: Duration) -> String {
    let nanos = duration.as_nanos();
    if nanos == 0 {
        return "0s".to_owned();
    }
    for (below, scale, unit) in [
        (1_000, 1, "ns"),
        (1_000_000, 1_000, "\u{b5}s"),
        (1_000_000_000, 1_000_000, "ms"),
    ] {
        if nanos < below {
            return decimal(nanos, scale) + unit;
        }
    }
    let second = 1_000_000_000;
    let (hours, minutes) = (nanos / (3600 * second), nanos / (60 * second) % 60);
    let mut text = String::new();
    if hours > 0 {
        let _written = write!(text, "{hours}h");
    }
    if hours > 0 || minutes > 0 {
        let _written = write!(text, "{minutes}m");
    }
    text + &decimal(nanos % (60 * second), second) + "s"
}

/// `value / scale` with as many decimals as it needs.
fn decimal(value: u128, scale: u128) -> String {
    let (whole, rest) = (value / scale, value % scale);
    if rest == 0 {
        return whole.to_string();
    }
    let width = scale.ilog10() as usize;
    let fraction = format!("{rest:0width$}");
    format!("{whole}.{}", fraction.trim_end_matches('0'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_and_writes() {
        for (text, nanos, printed) in [
            ("1h", 3_600_000_000_000, "1h0m0s"),
            ("20m", 1_200_000_000_000, "20m0s"),
            ("1h30m", 5_400_000_000_000, "1h30m0s"),
            ("90s", 90_000_000_000, "1m30s"),
            ("1.5h", 5_400_000_000_000, "1h30m0s"),
            ("+5s", 5_000_000_000, "5s"),
            ("0", 0, "0s"),
            ("-0s", 0, "0s"),
            ("1.5s", 1_500_000_000, "1.5s"),
            (".5s", 500_000_000, "500ms"),
            ("1.s", 1_000_000_000, "1s"),
            ("250ms", 250_000_000, "250ms"),
            ("1500us", 1_500_000, "1.5ms"),
            ("2\u{b5}s", 2_000, "2\u{b5}s"),
            ("3ns", 3, "3ns"),
            ("1h1ns", 3_600_000_000_001, "1h0m0.000000001s"),
            ("168h", 604_800_000_000_000, "168h0m0s"),
            ("0.1h", 360_000_000_000, "6m0s"),
        ] {
            let duration = parse(text).unwrap_or_else(|e| panic!("{text}: {e}"));
            assert_eq!(duration.as_nanos(), nanos, "{text}");
            assert_eq!(format(duration), printed, "{text}");
            assert_eq!(parse(printed), Ok(duration), "{printed}");
        }
    }

    #[test]
    fn refuses() {
        use DurationError as E;
        for (text, error) in [
            ("", E::Malformed),
            ("-", E::Malformed),
            ("h", E::Malformed),
            (".h", E::Malformed),
            ("1.2.3h", E::Malformed),
            ("3600", E::MissingUnit),
            ("1h30", E::MissingUnit),
            ("1d", E::UnknownUnit),
            ("1 h", E::UnknownUnit),
            ("1hour", E::UnknownUnit),
            ("-1h", E::Negative),
            ("3000000h", E::TooLong),
            ("99999999999999999999s", E::TooLong),
        ] {
            assert_eq!(parse(text), Err(error), "{text}");
        }
    }
}
