//! The one backoff of the program, and the tracker that keeps repeated failures out of the log.

use std::fmt::Display;
use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::time::Duration;

use tokio::time::Instant;

/// Exponential backoff with half jitter: the n-th wait lies in `[d/2, d]`, `d = min(cap, base·2ⁿ)`.
#[derive(Debug, Clone)]
pub struct Backoff {
    base: Duration,
    cap: Duration,
    failures: u32,
}

impl Backoff {
    /// A backoff that starts at `base` and never waits longer than `cap`.
    ///
    /// A `cap` below `base` is raised to `base`.
    #[must_use]
    pub fn new(base: Duration, cap: Duration) -> Self {
        Self {
            base,
            cap: cap.max(base),
            failures: 0,
        }
    }

    /// For streams of news that were lost. News can wait as long again as they were away, up to ten
    /// minutes: every agent of a fleet loses its streams in the same moment.
    #[must_use]
    pub fn of_streams() -> Self {
        Self::new(Duration::from_secs(1), Duration::from_mins(10))
    }

    /// The wait after one more failure. `random` is uniform in `[0, 1)`.
    pub fn next_wait(&mut self, random: f64) -> Duration {
        let full = self
            .base
            .saturating_mul(1_u32.checked_shl(self.failures).unwrap_or(u32::MAX))
            .min(self.cap);
        self.failures = self.failures.saturating_add(1).min(30);
        let half = full / 2;
        half + half.mul_f64(random.clamp(0.0, 1.0))
    }

    /// How many failures in a row were counted since the last [`Backoff::reset`].
    #[must_use]
    pub fn failures(&self) -> u32 {
        self.failures
    }

    /// Starts over after a success.
    pub fn reset(&mut self) {
        self.failures = 0;
    }
}

/// How loudly a failure is to be told: what is new in a row is news, the rest is noise.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Loudness {
    /// Worth a warning.
    Warn,
    /// Known already: debug level.
    Debug,
}

/// Counts failures in a row, so that a long outage does not flood the log.
///
/// Told are the first few of a row, each new reason, and once an hour that it still fails: who reads
/// the log of a day sees the trouble, and sees it change.
#[derive(Debug, Clone, Default)]
pub struct Repeated {
    failures: u32,
    warned: Option<Instant>,
    /// Digests of the reasons that were told since the last reminder.
    told: Vec<u64>,
}

impl Repeated {
    /// Failures of a row that are told as warnings, whatever their reason.
    const LOUD: u32 = 3;
    /// Reasons that are told between two reminders. A text that is another one each time, with a
    /// process ID for example, is told no more often than that.
    const REASONS: usize = 8;
    /// After this time without a warning, the next failure is one.
    const REMINDER: Duration = Duration::from_hours(1);

    /// Counts one more failure, which happened `now` for this `reason`, and says how to tell it.
    pub fn failed(&mut self, now: Instant, reason: impl Display) -> Loudness {
        self.failures = self.failures.saturating_add(1);
        let mut digest = DefaultHasher::new();
        reason.to_string().hash(&mut digest);
        let reason = digest.finish();
        let due = self
            .warned
            .is_none_or(|warned| now.duration_since(warned) >= Self::REMINDER);
        if due {
            self.told.clear();
        }
        let new = self.told.len() < Self::REASONS && !self.told.contains(&reason);
        if new {
            self.told.push(reason);
        }
        if new || due || self.failures <= Self::LOUD {
            self.warned = Some(now);
            Loudness::Warn
        } else {
            Loudness::Debug
        }
    }

    /// Ends the row. Returns the number of failures it had, if any: the recovery is news.
    pub fn recovered(&mut self) -> Option<u32> {
        let row = std::mem::take(self).failures;
        (row > 0).then_some(row)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_double_up_to_the_cap_and_jitter_stays_inside() {
        for random in [0.0, 0.5, 0.999_999] {
            let mut backoff = Backoff::new(Duration::from_secs(1), Duration::from_secs(60));
            for full in [1, 2, 4, 8, 16, 32, 60, 60, 60] {
                let wait = backoff.next_wait(random);
                let full = Duration::from_secs(full);
                assert!(wait >= full / 2 && wait <= full, "{wait:?} of {full:?}");
            }
            backoff.reset();
            assert!(backoff.next_wait(random) <= Duration::from_secs(1));
        }
    }

    #[test]
    fn a_long_row_of_failures_does_not_overflow() {
        let mut backoff = Backoff::new(Duration::from_secs(1), Duration::from_secs(60));
        for _ in 0..1000 {
            assert!(backoff.next_wait(1.0) <= Duration::from_secs(60));
        }
    }

    #[test]
    fn of_a_row_the_first_failures_are_loud() {
        let mut row = Repeated::default();
        let now = Instant::now();
        assert_eq!(row.recovered(), None);
        for _ in 0..3 {
            assert_eq!(row.failed(now, "down"), Loudness::Warn);
        }
        assert_eq!(row.failed(now, "down"), Loudness::Debug);
        assert_eq!(row.recovered(), Some(4));
        assert_eq!(row.failed(now, "down"), Loudness::Warn);
    }

    #[tokio::test(start_paused = true)]
    async fn what_changes_in_a_row_is_told_and_once_an_hour_that_it_lasts() {
        let mut row = Repeated::default();
        let mut loud = |reason: &str| row.failed(Instant::now(), reason) == Loudness::Warn;
        assert!((0..3).all(|_| loud("down")));
        assert!(!loud("down"));
        assert!(loud("refused"), "another reason");
        assert!(!loud("refused"));
        assert!(!loud("down"), "and back: told already");
        tokio::time::advance(Duration::from_mins(59)).await;
        assert!(!loud("down"));
        tokio::time::advance(Duration::from_mins(1)).await;
        assert!(loud("down"), "it lasts");
        assert!(!loud("down"));
        assert!(loud("refused"), "after a reminder, all is news again");
    }

    #[tokio::test(start_paused = true)]
    async fn reasons_that_never_repeat_do_not_flood() {
        let mut row = Repeated::default();
        let mut loud = 0;
        for second in 0..24 * 3600 {
            let reason = format!("process {second} is gone");
            loud += usize::from(row.failed(Instant::now(), reason) == Loudness::Warn);
            tokio::time::advance(Duration::from_secs(1)).await;
        }
        assert!(row.told.len() <= Repeated::REASONS);
        assert_eq!(loud, 24 * Repeated::REASONS);
    }
}
