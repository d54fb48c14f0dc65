//! When to do what with the bot's own identity: pure decisions of state and time.
//!
//! `LIFECYCLE.md` beside this file tells the whole story.

use std::time::{Duration, SystemTime};

use crate::cluster::Disposition;
use crate::join::Renewal;

/// The longest wait between attempts while the cluster refuses or cannot be reached.
const CAP: Duration = Duration::from_mins(1);
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

/// The cap of the backoff after a failure.
pub fn cap(disposition: Disposition) -> Duration {
    match disposition {
        Disposition::Retry => CAP,
        Disposition::Refused | Disposition::Unsupported => REFUSED_CAP,
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
        }
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
