//! Points in time as resources and audit lines write them: RFC 3339, UTC, no needless zeros.

use std::time::SystemTime;

use time::{OffsetDateTime, UtcOffset, format_description::well_known::Rfc3339};

/// `time` as RFC 3339 in UTC, for example `2026-11-21T08:12:03.059546224Z`.
///
/// A time outside of the years 0 to 9999, which RFC 3339 cannot write, gives the empty string.
#[must_use]
pub fn rfc3339(time: SystemTime) -> String {
    OffsetDateTime::from(time)
        .format(&Rfc3339)
        .unwrap_or_default()
}

/// Reads an RFC 3339 time with any offset; `None` if `text` is something else.
#[must_use]
pub fn parse_rfc3339(text: &str) -> Option<SystemTime> {
    OffsetDateTime::parse(text.trim(), &Rfc3339)
        .ok()
        .map(|time| time.to_offset(UtcOffset::UTC).into())
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn writes_what_it_reads() {
        for text in [
            "2030-01-01T00:00:00Z",
            "2026-11-21T08:12:03.059546224Z",
            "1969-12-31T23:59:59.5Z",
        ] {
            assert_eq!(rfc3339(parse_rfc3339(text).unwrap()), text);
        }
        assert_eq!(
            parse_rfc3339("1970-01-01T01:00:00+01:00"),
            Some(SystemTime::UNIX_EPOCH)
        );
        assert_eq!(
            rfc3339(SystemTime::UNIX_EPOCH + Duration::from_millis(10)),
            "1970-01-01T00:00:00.01Z"
        );
    }

    #[test]
    fn refuses_what_is_no_time() {
        for text in ["", "tomorrow", "2030-01-01", "2030-13-01T00:00:00Z", "5m"] {
            assert_eq!(parse_rfc3339(text), None, "{text}");
        }
    }
}
