//! Points in time as resources and audit lines write them: RFC 3339, UTC, no needless zeros.

use std::time::{SystemTime, UNIX_EPOCH};

use time::{OffsetDateTime, format_description::well_known::Rfc3339};

pub use crate::clock::parse_rfc3339;

/// `time` as RFC 3339 in UTC, for example `2026-11-21T08:12:03.059546224Z`.
///
/// A time outside of the years 0 to 9999, which RFC 3339 cannot write, gives the empty string.
#[must_use]
pub fn rfc3339(time: SystemTime) -> String {
    utc(time)
        .and_then(|time| time.format(&Rfc3339).ok())
        .unwrap_or_default()
}

/// A time of a message; `None` unless it is one that [`rfc3339`] can write.
#[must_use]
pub fn from_wire(time: prost_types::Timestamp) -> Option<SystemTime> {
    let time = SystemTime::try_from(time).ok()?;
    (!rfc3339(time).is_empty()).then_some(time)
}

/// Conversions of `time` panic outside of the years that it knows; this one does not.
fn utc(time: SystemTime) -> Option<OffsetDateTime> {
    let nanos = match time.duration_since(UNIX_EPOCH) {
        Ok(after) => i128::try_from(after.as_nanos()).ok()?,
        Err(before) => -i128::try_from(before.duration().as_nanos()).ok()?,
    };
    OffsetDateTime::from_unix_timestamp_nanos(nanos).ok()
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
    fn times_beyond_the_calendar_are_none() {
        for text in ["9999-12-31T23:59:59-01:00", "0000-01-01T00:00:00+01:00"] {
            assert_eq!(parse_rfc3339(text), None, "{text}");
        }
        for seconds in [1_000_000_000_000, -1_000_000_000_000, i64::MAX, i64::MIN] {
            let time = prost_types::Timestamp { seconds, nanos: 0 };
            assert_eq!(from_wire(time), None, "{seconds}");
        }
        let far = SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000_000_000);
        assert_eq!(rfc3339(far), "");
    }

    #[test]
    fn refuses_what_is_no_time() {
        for text in ["", "tomorrow", "2030-01-01", "2030-13-01T00:00:00Z", "5m"] {
            assert_eq!(parse_rfc3339(text), None, "{text}");
        }
    }
}
