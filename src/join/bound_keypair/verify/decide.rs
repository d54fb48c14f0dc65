//! What a bot has to show to join with a token, and what its status is afterwards
//! (upstream `lib/join/boundkeypair/boundkeypair.go`). Nothing here touches anything.
//!
//! | bound key | bound instance | certificate | |
//! |---|---|---|---|
//! | no | | no | first join: the preregistered key, or the secret and a new key |
//! | no | | yes | refused |
//! | yes | no | | refused: half a status |
//! | yes | yes | yes | the bound key and the join state; the instance stays |
//! | yes | yes | no | recovery: the same, counted, with a new instance |
//!
//! Upstream takes a bot whose answer was lost for a copy. Here it gets the same answer again, if it
//! asks with the very key that the lost one was for, and has the join state from before it; or the one
//! that came with it, if the bot stopped between storing that and storing its certificate.

use std::time::SystemTime;

use super::record::{Mode, Spec, Status};
use crate::crypto::same;
use crate::refusal::Refusal;

/// What comes with a request.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Presented<'a> {
    /// The registration secret; empty if there is none.
    pub(crate) secret: &'a str,
    /// The instance of the certificate on whose connection the request came.
    pub(crate) instance: Option<&'a str>,
    /// The instance before the bound one, if the answer that made the bound one was lost.
    pub(crate) lost: Option<&'a str>,
}

/// What the bot has to prove first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum First<'a> {
    /// That it has the private half of this key.
    Key(&'a str),
    /// Nothing more: it makes a key, and proves to have that.
    NewKey,
}

/// How a join is counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// The first join; counts as a recovery, as upstream has it.
    First,
    /// A renewal over the bot's own connection.
    Renewal,
    /// The bot has no certificate any more.
    Recovery,
    /// The answer to this very request was given before and got lost: the same again, not counted.
    Again,
}

/// What is to be done before certificates are issued, in this order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Plan<'a> {
    /// What the bot has to prove first.
    pub(crate) first: First<'a>,
    /// What it is.
    pub(crate) kind: Kind,
    /// Told to whoever has proved to have the key, and to nobody else.
    pub(crate) then: Option<Refusal>,
    /// The statuses with one of which the join state has to agree; empty if none is wanted.
    pub(crate) states: Vec<Status>,
    /// Whether the key is to be replaced.
    pub(crate) rotate: bool,
}

/// Decides what a bot has to show.
///
/// # Errors
/// What can be refused without any proof.
pub(crate) fn plan<'a>(
    spec: &'a Spec,
    status: &'a Status,
    presented: Presented<'_>,
    now: SystemTime,
) -> Result<Plan<'a>, Refusal> {
    let spent = spec.mode == Mode::Standard && status.recovery_count >= spec.limit;
    let bound = !status.bound_public_key.is_empty();
    let (first, kind) = match (bound, presented.instance) {
        (false, Some(_)) => {
            return Err(Refusal::bad_parameter(
                "cannot perform first bound keypair join with existing credentials",
            ));
        }
        (false, None) if spent => {
            return Err(Refusal::denied("no recovery attempts remaining"));
        }
        (false, None) => (first(spec, status, presented.secret, now)?, Kind::First),
        (true, _) if status.bound_bot_instance_id.is_empty() => {
            return Err(Refusal::bad_parameter(
                "bad backend state, please recreate the join token",
            ));
        }
        (true, Some(_)) => (First::Key(&status.bound_public_key), Kind::Renewal),
        (true, None) if presented.lost.is_some() => {
            (First::Key(&status.bound_public_key), Kind::Again)
        }
        (true, None) => (First::Key(&status.bound_public_key), Kind::Recovery),
    };
    let spent = (kind == Kind::Recovery && spent).then(|| Refusal::denied("no rejoins remaining"));
    Ok(Plan {
        first,
        kind,
        then: spent,
        states: states(spec, status, kind, presented.lost),
        rotate: kind != Kind::Again && rotates(spec, status, now),
    })
}

/// The statuses whose join state a bot may have. One that never heard of its first join has none.
fn states(spec: &Spec, status: &Status, kind: Kind, lost: Option<&str>) -> Vec<Status> {
    if kind == Kind::First || spec.mode == Mode::Insecure || status.recovery_count == 0 {
        return Vec::new();
    }
    let mut states = vec![status.clone()];
    if kind == Kind::Again {
        let before = Status {
            recovery_count: status.recovery_count - 1,
            bound_bot_instance_id: lost.unwrap_or_default().to_owned(),
            ..status.clone()
        };
        if before.recovery_count == 0 {
            return Vec::new();
        }
        states.push(before);
    }
    states
}

/// What the first join is by. Every failure of a secret has the same text.
fn first<'a>(
    spec: &'a Spec,
    status: &Status,
    secret: &str,
    now: SystemTime,
) -> Result<First<'a>, Refusal> {
    if let Some(key) = &spec.initial_public_key {
        return Ok(First::Key(key));
    }
    if status.registration_secret.is_empty() {
        return Err(Refusal::bad_parameter(
            "either an initial public key or registration secret is required",
        ));
    }
    let late = spec.must_register_before.is_some_and(|until| now > until);
    // Compared also when it is too late: the time it takes tells nothing.
    let right = same(status.registration_secret.as_bytes(), secret.as_bytes());
    if late || !right {
        return Err(Refusal::denied("a valid registration secret is required"));
    }
    Ok(First::NewKey)
}

/// Whether a key that was made before `rotate_after` is still in use after it.
fn rotates(spec: &Spec, status: &Status, now: SystemTime) -> bool {
    spec.rotate_after.is_some_and(|after| {
        after <= now && status.last_rotated_at.is_none_or(|rotated| rotated < after)
    })
}

/// The status once everything is proved: `key` is the key from now on, which `rotated` says was made
/// because the token wanted a new one. The instance is known only when certificates are issued.
pub(crate) fn after(
    status: &Status,
    kind: Kind,
    key: &str,
    rotated: bool,
    now: SystemTime,
) -> Status {
    let mut next = status.clone();
    key.clone_into(&mut next.bound_public_key);
    if kind == Kind::First {
        next.registration_secret.clear();
    }
    if matches!(kind, Kind::First | Kind::Recovery) {
        next.recovery_count = next.recovery_count.saturating_add(1);
        next.last_recovered_at = Some(now);
    }
    if rotated {
        next.last_rotated_at = Some(now);
    }
    next
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    const DAY: Duration = Duration::from_hours(24);

    fn now() -> SystemTime {
        SystemTime::UNIX_EPOCH + 20_000 * DAY
    }

    fn spec(mode: Mode) -> Spec {
        Spec {
            initial_public_key: None,
            must_register_before: None,
            limit: 2,
            mode,
            rotate_after: None,
        }
    }

    fn fresh() -> Status {
        Status {
            registration_secret: "secret".to_owned(),
            ..Status::default()
        }
    }

    fn bound(count: u32) -> Status {
        Status {
            bound_public_key: "key".to_owned(),
            bound_bot_instance_id: "instance".to_owned(),
            recovery_count: count,
            ..Status::default()
        }
    }

    fn nobody(secret: &str) -> Presented<'_> {
        Presented {
            secret,
            instance: None,
            lost: None,
        }
    }

    const SOMEBODY: Presented<'static> = Presented {
        secret: "",
        instance: Some("instance"),
        lost: None,
    };

    #[test]
    fn the_first_join_is_by_the_secret_or_by_the_registered_key() {
        let (by_secret, status) = (spec(Mode::Standard), fresh());
        let made = plan(&by_secret, &status, nobody("secret"), now()).unwrap();
        assert_eq!(
            made,
            Plan {
                first: First::NewKey,
                kind: Kind::First,
                then: None,
                states: Vec::new(),
                rotate: false,
            }
        );
        for wrong in ["", "Secret", "secret ", "secre", "secrets"] {
            let refusal = plan(&by_secret, &status, nobody(wrong), now()).unwrap_err();
            assert_eq!(
                refusal,
                Refusal::denied("a valid registration secret is required")
            );
        }
        let by_key = Spec {
            initial_public_key: Some("ours".to_owned()),
            ..spec(Mode::Standard)
        };
        // A registered key goes before a secret.
        for status in [fresh(), Status::default()] {
            let made = plan(&by_key, &status, nobody(""), now()).unwrap();
            assert_eq!(made.first, First::Key("ours"));
            assert_eq!(made.kind, Kind::First);
        }
        let neither = Status::default();
        assert!(plan(&by_secret, &neither, nobody(""), now()).is_err());
    }

    #[test]
    fn a_secret_counts_until_its_time() {
        for (until, good) in [(now() - DAY, false), (now(), true), (now() + DAY, true)] {
            let spec = Spec {
                must_register_before: Some(until),
                ..spec(Mode::Standard)
            };
            let status = fresh();
            let made = plan(&spec, &status, nobody("secret"), now());
            assert_eq!(made.is_ok(), good, "{until:?}");
        }
    }

    #[test]
    fn a_certificate_is_for_a_bound_key_only() {
        let spec = spec(Mode::Standard);
        let refusal = plan(&spec, &fresh(), SOMEBODY, now()).unwrap_err();
        assert!(refusal.to_string().contains("existing credentials"));
        let half = Status {
            bound_bot_instance_id: String::new(),
            ..bound(1)
        };
        for presented in [SOMEBODY, nobody("secret")] {
            let refusal = plan(&spec, &half, presented, now()).unwrap_err();
            assert!(refusal.to_string().contains("recreate the join token"));
        }
    }

    #[test]
    fn recoveries_are_limited_and_states_verified_by_the_mode() {
        // mode, count, spent, state
        for (mode, count, spent, state) in [
            (Mode::Standard, 0, false, false),
            (Mode::Standard, 1, false, true),
            (Mode::Standard, 2, true, true),
            (Mode::Standard, 9, true, true),
            (Mode::Relaxed, 9, false, true),
            (Mode::Insecure, 9, false, false),
        ] {
            let (spec, status) = (spec(mode), bound(count));
            let lost = plan(&spec, &status, nobody("secret"), now()).unwrap();
            assert_eq!(
                lost.first,
                First::Key("key"),
                "no secret opens a bound token"
            );
            assert_eq!(lost.kind, Kind::Recovery);
            assert_eq!(lost.then.is_some(), spent, "{mode:?} {count}");
            let wanted: Vec<_> = state.then(|| status.clone()).into_iter().collect();
            assert_eq!(lost.states, wanted, "{mode:?} {count}");
            let renewed = plan(&spec, &status, SOMEBODY, now()).unwrap();
            assert_eq!(renewed.kind, Kind::Renewal);
            assert_eq!(renewed.then, None, "renewals are not counted");
            assert_eq!(renewed.states, wanted, "{mode:?} {count}");
        }
        let first = Status {
            recovery_count: 2,
            ..fresh()
        };
        let standard = spec(Mode::Standard);
        let refusal = plan(&standard, &first, nobody("secret"), now()).unwrap_err();
        assert_eq!(refusal, Refusal::denied("no recovery attempts remaining"));
        assert!(plan(&spec(Mode::Relaxed), &first, nobody("secret"), now()).is_ok());
    }

    #[test]
    fn a_lost_answer_is_given_again_without_being_counted() {
        let again = Presented {
            lost: Some("before"),
            ..nobody("")
        };
        for (mode, count, wanted) in [
            (Mode::Standard, 1, false),
            (Mode::Standard, 2, true),
            (Mode::Relaxed, 9, true),
            (Mode::Insecure, 2, false),
        ] {
            let spec = Spec {
                rotate_after: Some(now()),
                ..spec(mode)
            };
            let status = bound(count);
            let plan = plan(&spec, &status, again, now()).unwrap();
            assert_eq!(
                (plan.kind, plan.then),
                (Kind::Again, None),
                "{mode:?} {count}"
            );
            assert!(!plan.rotate, "the answer is the same");
            let states: Vec<_> = plan
                .states
                .iter()
                .map(|state| (state.bound_bot_instance_id.as_str(), state.recovery_count))
                .collect();
            // The state may have been stored without the certificate, or neither of them.
            let all = [("instance", count), ("before", count - 1)];
            let expected = if wanted { &all[..] } else { &[] };
            assert_eq!(states, expected, "{mode:?} {count}");
            let next = after(&status, Kind::Again, "key", false, now());
            assert_eq!(next, status);
        }
        // Neither a first join nor a renewal is such a one.
        let first = Presented {
            lost: Some(""),
            ..nobody("secret")
        };
        let (spec, status) = (spec(Mode::Standard), fresh());
        let made = plan(&spec, &status, first, now()).unwrap();
        assert_eq!(made.kind, Kind::First);
    }

    #[test]
    fn a_key_is_replaced_once_for_each_wish() {
        // rotate_after, last_rotated_at
        for (after, last, due) in [
            (None, None, false),
            (Some(now() + DAY), None, false),
            (Some(now()), None, true),
            (Some(now() - DAY), None, true),
            (Some(now() - DAY), Some(now() - 2 * DAY), true),
            (Some(now() - DAY), Some(now() - DAY), false),
            (Some(now() - DAY), Some(now()), false),
        ] {
            let spec = Spec {
                rotate_after: after,
                ..spec(Mode::Standard)
            };
            let status = Status {
                last_rotated_at: last,
                ..bound(1)
            };
            let plan = plan(&spec, &status, SOMEBODY, now()).unwrap();
            assert_eq!(plan.rotate, due, "{after:?} {last:?}");
        }
    }

    #[test]
    fn what_follows_from_a_join() {
        let first = after(&fresh(), Kind::First, "new", false, now());
        assert_eq!(
            first,
            Status {
                bound_public_key: "new".to_owned(),
                recovery_count: 1,
                last_recovered_at: Some(now()),
                ..Status::default()
            }
        );
        assert_eq!(
            after(&bound(1), Kind::Renewal, "key", false, now()),
            bound(1)
        );
        let rotated = after(&bound(1), Kind::Renewal, "next", true, now());
        assert_eq!(rotated.bound_public_key, "next");
        assert_eq!(rotated.last_rotated_at, Some(now()));
        assert_eq!(rotated.recovery_count, 1);
        assert_eq!(
            after(&bound(1), Kind::Recovery, "key", false, now()).recovery_count,
            2
        );
    }
}
