//! When to do what with the bot's own identity: pure decisions of state and time.
//!
//! `LIFECYCLE.md` beside this file tells the whole story.

use std::time::{Duration, SystemTime};

use crate::backoff::Backoff;
use crate::cluster::Disposition;
use crate::join::Renewal;
use crate::renewal;

/// The first wait after a failure.
pub(super) const FIRST_WAIT: Duration = Duration::from_secs(1);
/// The longest wait between attempts while the cluster cannot be reached and nothing fresh is held.
pub(super) const CAP: Duration = Duration::from_mins(1);
/// The longest wait after a refusal: the operator has to act, and a cluster should not be asked
/// every minute by every agent that it turned away.
const REFUSED_CAP: Duration = Duration::from_mins(5);

/// What is known of the identity that is held.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Held {
    /// Start of validity.
    pub not_before: SystemTime,
    /// End of validity.
    pub not_after: SystemTime,
    /// Whether its certificate may renew itself.
    pub renewable: bool,
    /// When it is to be renewed.
    pub renew_at: SystemTime,
    /// Until when it is fresh.
    pub fresh_until: SystemTime,
}

impl Held {
    fn is_valid(&self, now: SystemTime) -> bool {
        self.not_before <= now && now < self.not_after
    }
}

/// What to do next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// Join with the configured token, as nobody.
    Join,
    /// Renew as the identity that is held.
    Renew(Renewal),
    /// Nothing before this time.
    Wait(SystemTime),
}

/// What to do at `now` with what is held.
pub fn decide(now: SystemTime, held: Option<&Held>) -> Step {
    match held {
        None => Step::Join,
        Some(held) if !held.is_valid(now) => Step::Join,
        Some(held) if held.renew_at <= now => Step::Renew(if held.renewable {
            Renewal::Certificate
        } else {
            Renewal::Rejoin
        }),
        Some(held) => Step::Wait(held.renew_at),
    }
}

/// The attempts that failed since the last success.
#[derive(Debug)]
pub(crate) struct Failures {
    backoff: Backoff,
    since: Option<SystemTime>,
}

impl Failures {
    pub(crate) fn none() -> Self {
        Self {
            backoff: Backoff::new(FIRST_WAIT, CAP),
            since: None,
        }
    }

    /// Another attempt failed at `now`, while `held` is held, which is renewed every `interval`. Says
    /// how long to wait. Each `random` is uniform in `[0, 1)`.
    pub(crate) fn wait(
        &mut self,
        now: SystemTime,
        held: Option<&Held>,
        disposition: Disposition,
        interval: Duration,
        random: [f64; 2],
    ) -> Duration {
        let since = *self.since.get_or_insert(now);
        let least = match disposition {
            Disposition::Refused => REFUSED_CAP.mul_f64(0.5 + 0.5 * random[1]),
            Disposition::Retry | Disposition::Unsupported => {
                let failing = now.duration_since(since).unwrap_or_default();
                let slack = held.and_then(|held| held.fresh_until.duration_since(now).ok());
                let slack = slack.unwrap_or_default().min(interval);
                renewal::patience(failing, slack, random[1])
            }
        };
        self.backoff.next_wait(random[0]).max(least)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const START: SystemTime = SystemTime::UNIX_EPOCH;

    fn at(seconds: u64) -> SystemTime {
        START + Duration::from_secs(seconds)
    }

    fn held(renewable: bool) -> Held {
        Held {
            not_before: at(100),
            not_after: at(3700),
            renewable,
            renew_at: at(1300),
            fresh_until: at(2500),
        }
    }

    #[test]
    fn what_is_fresh_is_waited_with_and_what_is_not_is_asked_for() {
        let interval = Duration::from_mins(20);
        let day = Held {
            not_after: at(86_400),
            fresh_until: at(86_400),
            ..held(true)
        };
        let held = held(true);
        for (case, now, held, expected) in [
            ("at once", 1300, Some(&held), 1),
            ("a second later", 1301, Some(&held), 55),
            ("minutes later", 1900, Some(&held), 330),
            ("fresh for a day", 1900, Some(&day), 660),
            ("stale", 2600, Some(&held), 2),
            ("nothing held", 2600, None, 2),
        ] {
            let mut failures = Failures::none();
            let mut wait =
                |now| failures.wait(at(now), held, Disposition::Retry, interval, [1.0, 0.5]);
            let first = wait(1300).as_secs();
            let waited = if now == 1300 {
                first
            } else {
                wait(now).as_secs()
            };
            assert_eq!(waited, expected, "{case}");
        }
        let mut failures = Failures::none();
        let refused = failures.wait(at(1300), None, Disposition::Refused, interval, [0.5, 0.0]);
        assert_eq!(refused, REFUSED_CAP / 2);
    }

    #[test]
    fn every_state_has_one_step() {
        let rejoin = Step::Renew(Renewal::Rejoin);
        let certificate = Step::Renew(Renewal::Certificate);
        for (now, identity, step) in [
            (at(0), None, Step::Join),
            (at(50), Some(held(false)), Step::Join),
            (at(100), Some(held(false)), Step::Wait(at(1300))),
            (at(1299), Some(held(true)), Step::Wait(at(1300))),
            (at(1300), Some(held(false)), rejoin),
            (at(1300), Some(held(true)), certificate),
            (at(3699), Some(held(false)), rejoin),
            (at(3700), Some(held(false)), Step::Join),
            (at(9999), Some(held(true)), Step::Join),
        ] {
            assert_eq!(decide(now, identity.as_ref()), step, "at {now:?}");
        }
    }
}
