//! Time as a parameter: one source for "now" and for waiting, replaceable in tests.
//!
//! Certificates live in wall time, timers in monotonic time, and the two drift apart when a
//! machine sleeps or its clock is set. The system clock therefore never trusts one long timer:
//! it wakes at least every [`CHECK`] and looks at the wall again. The simulated clock derives the
//! wall from Tokio's paused time, so a test runs a year in milliseconds.

use std::time::{Duration, SystemTime};

use rustls::pki_types::UnixTime;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;
use tokio::time::Instant;

/// The longest a wait relies on monotonic time before the wall clock is read again.
const CHECK: Duration = Duration::from_secs(15);

/// A source of wall time and of waits that end at a wall time.
#[derive(Debug, Clone)]
pub struct Clock(Kind);

#[derive(Debug, Clone)]
enum Kind {
    System,
    Simulated { wall: SystemTime, origin: Instant },
}

impl Clock {
    /// The machine's own clock.
    #[must_use]
    pub fn system() -> Self {
        Self(Kind::System)
    }

    /// A clock that reads `wall` now and then follows Tokio's (pausable) time.
    #[must_use]
    pub fn simulated(wall: SystemTime) -> Self {
        Self(Kind::Simulated {
            wall,
            origin: Instant::now(),
        })
    }

    /// The current wall time.
    #[must_use]
    #[expect(
        clippy::disallowed_methods,
        reason = "this is the one place that reads the clock"
    )]
    pub fn now(&self) -> SystemTime {
        match self.0 {
            Kind::System => SystemTime::now(),
            Kind::Simulated { wall, origin } => wall + origin.elapsed(),
        }
    }

    /// Waits for `duration` of monotonic time.
    pub async fn sleep(&self, duration: Duration) {
        tokio::time::sleep(duration).await;
    }

    /// Waits until the wall clock reads `deadline`; returns at once if it is past.
    pub async fn sleep_until(&self, deadline: SystemTime) {
        while let Ok(left) = deadline.duration_since(self.now()) {
            if left.is_zero() {
                return;
            }
            let step = match self.0 {
                Kind::System => left.min(CHECK),
                Kind::Simulated { .. } => left,
            };
            tokio::time::sleep(step).await;
        }
    }
}

impl rustls::time_provider::TimeProvider for Clock {
    /// TLS judges certificates by the program's clock too.
    fn current_time(&self) -> Option<UnixTime> {
        let since = self.now().duration_since(SystemTime::UNIX_EPOCH).ok()?;
        Some(UnixTime::since_unix_epoch(since))
    }
}

/// A wall time as RFC 3339 in UTC with whole seconds, for logs and JSON.
#[must_use]
pub fn rfc3339(time: SystemTime) -> String {
    let time = OffsetDateTime::from(time);
    time.replace_nanosecond(0)
        .unwrap_or(time)
        .format(&Rfc3339)
        .unwrap_or_default()
}

/// A wall time as RFC 3339 in UTC to the nanosecond, for versions that have to differ.
#[must_use]
pub fn rfc3339_nanos(time: SystemTime) -> String {
    OffsetDateTime::from(time)
        .format(&Rfc3339)
        .unwrap_or_default()
}

/// Reads an RFC 3339 time with any offset; `None` if `text` is something else, or a time that is
/// outside of the years 0 to 9999 in UTC, which RFC 3339 cannot write.
#[must_use]
pub fn parse_rfc3339(text: &str) -> Option<SystemTime> {
    let time = OffsetDateTime::parse(text.trim(), &Rfc3339).ok()?;
    let utc = time.checked_to_offset(time::UtcOffset::UTC)?;
    (0..=9999).contains(&utc.year()).then(|| utc.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_simulated_year_passes_at_once() {
        let start = SystemTime::UNIX_EPOCH + Duration::from_secs(1_700_000_000);
        let year = Duration::from_secs(365 * 86_400);
        let clock = Clock::simulated(start);
        clock.sleep_until(start + year).await;
        assert!(clock.now() >= start + year);
        assert!(clock.now() < start + year + Duration::from_secs(1));
    }

    #[test]
    fn times_are_written_in_utc() {
        let time = SystemTime::UNIX_EPOCH + Duration::from_millis(1_700_000_000_250);
        assert_eq!(rfc3339(time), "2023-11-14T22:13:20Z");
    }

    #[tokio::test(start_paused = true)]
    async fn a_past_deadline_does_not_wait() {
        let clock = Clock::simulated(SystemTime::UNIX_EPOCH + Duration::from_secs(100));
        let before = clock.now();
        clock.sleep_until(SystemTime::UNIX_EPOCH).await;
        assert_eq!(clock.now(), before);
    }
}
