//! When something issued is to be renewed, and from when on it is older than it should be.
//!
//! Both count from the moment at which it was asked for, by this machine's clock: clusters backdate
//! certificates by a minute, which would be a fifth of a five-minute life.

use std::time::{Duration, SystemTime};

/// When what was issued at `issued` is to be renewed: after `interval`, before [`fresh_until`] in
/// any case, and a little earlier by `random`, uniform in `[0, 1)`, so that agents started together
/// drift apart.
#[must_use]
pub fn due(
    issued: SystemTime,
    not_after: SystemTime,
    interval: Duration,
    random: f64,
) -> SystemTime {
    let wait = interval.min(two_thirds(issued, not_after));
    // The last twentieth is for the renewal itself.
    issued + wait.mul_f64(0.95 - 0.1 * random.clamp(0.0, 1.0))
}

/// Until when what was issued at `issued` is fresh: two thirds of its life.
#[must_use]
pub fn fresh_until(issued: SystemTime, not_after: SystemTime) -> SystemTime {
    issued + two_thirds(issued, not_after)
}

/// How long to wait at least before asking a cluster again that could not be reached for `failing`,
/// while what is held is fresh for another `slack`, at most the usual interval.
///
/// A hiccup is over within a minute. After that everybody who came due meanwhile is waiting, and a
/// cluster that is back would hear from all of them within one cap of the backoff; so they take
/// their time while they have it, and the busiest minute after an outage of ten is at most twice as
/// busy as any other (`app::tests::fleet` has the proof). There is time for several such waits before
/// anything is stale.
#[must_use]
pub fn patience(failing: Duration, slack: Duration, random: f64) -> Duration {
    let most = failing.saturating_mul(100).min(slack);
    most.mul_f64(0.25 + 0.6 * random.clamp(0.0, 1.0))
}

fn two_thirds(issued: SystemTime, not_after: SystemTime) -> Duration {
    not_after.duration_since(issued).unwrap_or_default() * 2 / 3
}

#[cfg(test)]
mod tests {
    use super::*;

    const MINUTE: Duration = Duration::from_mins(1);

    fn at(minutes: u32) -> SystemTime {
        SystemTime::UNIX_EPOCH + minutes * MINUTE
    }

    #[test]
    fn a_renewal_has_time_before_what_it_replaces_is_stale() {
        for life in [1, 5, 15, 60, 24 * 60] {
            let fresh = fresh_until(at(10), at(10 + life));
            for random in [0.0, 0.5, 1.0] {
                let due = due(at(10), at(10 + life), 20 * MINUTE, random);
                let room = fresh.duration_since(due).unwrap();
                assert!(room >= life * MINUTE / 30, "{life} min, {random}: {room:?}");
            }
        }
    }

    #[test]
    fn the_interval_counts_where_it_is_shorter() {
        assert_eq!(
            due(at(0), at(60), 20 * MINUTE, 0.0),
            at(0) + 19 * MINUTE,
            "the interval"
        );
        assert_eq!(
            due(at(0), at(15), 20 * MINUTE, 1.0),
            at(0) + 510 * Duration::from_secs(1),
            "two thirds of the life"
        );
    }

    #[test]
    fn patience_begins_small_and_never_outlasts_what_is_fresh() {
        let seconds = Duration::from_secs;
        for (failing, slack, random, expected) in [
            (seconds(0), seconds(1200), 0.5, seconds(0)),
            (seconds(1), seconds(1200), 0.0, seconds(25)),
            (seconds(1), seconds(1200), 1.0, seconds(85)),
            (seconds(60), seconds(1200), 0.0, seconds(300)),
            (seconds(600), seconds(1200), 1.0, seconds(1020)),
            (seconds(600), seconds(0), 1.0, seconds(0)),
        ] {
            let wait = patience(failing, slack, random);
            assert_eq!(wait, expected, "{failing:?} {slack:?} {random}");
        }
        assert_eq!(patience(Duration::MAX, seconds(4), 0.0), seconds(1));
    }

    #[test]
    fn what_is_over_already_is_due_at_once() {
        assert_eq!(due(at(10), at(5), 20 * MINUTE, 0.5), at(10));
        assert_eq!(fresh_until(at(10), at(5)), at(10));
    }
}
