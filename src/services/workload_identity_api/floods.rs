//! Who floods the socket, and is to be barred from it for a moment.
//!
//! Many connections at once are no flood: after a restart of the agent, all processes of a user connect anew, and as
//! many as a user may hold come in one moment. A thousand wait for that user's thread, the others are dropped and come
//! again. It is a flood if more were dropped within a second than a user may hold. From then on, a crowd is
//! enough, until there was none for some time.

use std::collections::HashMap;
use std::time::Duration;

use tokio::time::Instant;

/// How many connections of a user have to be dropped, and within which time: as many as a user may hold.
pub(super) const DROPPED: u32 = 4096;
const WITHIN: Duration = Duration::from_secs(1);
/// For how long a user is barred at a time.
pub(super) const BARRED_FOR: Duration = Duration::from_millis(100);
/// For how long it is remembered that a user was barred.
const REMEMBERED: Duration = Duration::from_secs(10);
/// Users that are remembered at a time. An account with subordinate IDs is as many users as it likes.
const USERS: usize = 64;

/// What is to be done about a user.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Verdict {
    Nothing,
    /// The user is to be barred for [`BARRED_FOR`].
    Bar {
        /// It is not remembered that the user was barred before.
        first: bool,
    },
}

/// The users who flood, as far as they are remembered.
#[derive(Debug, Default)]
pub(super) struct Floods(HashMap<u32, Flood>);

#[derive(Debug)]
struct Flood {
    /// Connections dropped, and since when that is counted.
    dropped: u32,
    since: Instant,
    /// Until when the user is, or was, barred.
    until: Option<Instant>,
}

impl Flood {
    fn is_forgotten(&self, now: Instant) -> bool {
        let (last, kept) = match self.until {
            None => (self.since, WITHIN),
            Some(until) => (until, REMEMBERED),
        };
        now.saturating_duration_since(last) > kept
    }

    fn bar(&mut self, now: Instant) -> Verdict {
        // What comes meanwhile had connected before.
        if self.until.is_some_and(|until| now < until) {
            return Verdict::Nothing;
        }
        let before = self.until.replace(now + BARRED_FOR);
        Verdict::Bar {
            first: before.is_none(),
        }
    }
}

impl Floods {
    /// A connection of this user was dropped, as too many wait.
    pub(super) fn dropped(&mut self, user: u32, now: Instant) -> Verdict {
        if !self.0.contains_key(&user) && self.0.len() >= USERS {
            self.0.retain(|_, flood| !flood.is_forgotten(now));
            if self.0.len() >= USERS {
                return Verdict::Nothing;
            }
        }
        let new = || Flood {
            dropped: 0,
            since: now,
            until: None,
        };
        let flood = self.0.entry(user).or_insert_with(new);
        if flood.is_forgotten(now) {
            *flood = new();
        }
        if flood.until.is_none() {
            flood.dropped += 1;
            if flood.dropped < DROPPED {
                return Verdict::Nothing;
            }
        }
        flood.bar(now)
    }

    /// A connection of this user came to others that wait.
    pub(super) fn crowded(&mut self, user: u32, now: Instant) -> Verdict {
        match self.0.get_mut(&user) {
            Some(flood) if flood.until.is_some() && !flood.is_forgotten(now) => flood.bar(now),
            _ => Verdict::Nothing,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FIRST: Verdict = Verdict::Bar { first: true };
    const AGAIN: Verdict = Verdict::Bar { first: false };

    /// Drops that many connections of user 7, one at a time.
    fn drops(floods: &mut Floods, count: u32, now: Instant) -> Vec<Verdict> {
        (0..count).map(|_| floods.dropped(7, now)).collect()
    }

    #[test]
    fn as_many_as_a_user_may_hold_are_no_flood() {
        let (mut floods, start) = (Floods::default(), Instant::now());
        for second in 0..100 {
            let now = start + (WITHIN + Duration::from_millis(1)) * second;
            let verdicts = drops(&mut floods, 4095, now);
            assert!(verdicts.iter().all(|verdict| *verdict == Verdict::Nothing));
            assert_eq!(floods.crowded(7, now), Verdict::Nothing);
        }
    }

    #[test]
    fn who_floods_is_barred_once_at_a_time() {
        let (mut floods, start) = (Floods::default(), Instant::now());
        let verdicts = drops(&mut floods, 3 * DROPPED, start);
        let barred: Vec<_> = (0_u32..)
            .zip(&verdicts)
            .filter(|(_, verdict)| **verdict != Verdict::Nothing)
            .collect();
        assert_eq!(barred, [(DROPPED - 1, &FIRST)]);
        assert_eq!(floods.crowded(7, start), Verdict::Nothing, "barred already");
        assert_eq!(floods.crowded(8, start), Verdict::Nothing, "somebody else");
    }

    #[test]
    fn then_a_crowd_or_a_drop_is_enough_until_it_is_forgotten() {
        for act in [Floods::crowded, Floods::dropped] {
            let (mut floods, start) = (Floods::default(), Instant::now());
            drops(&mut floods, DROPPED, start);
            assert_eq!(act(&mut floods, 7, start + BARRED_FOR), AGAIN);
            let later = start + BARRED_FOR * 2 + REMEMBERED;
            assert_eq!(act(&mut floods, 7, later), AGAIN, "remembered");
            let later = later + BARRED_FOR + REMEMBERED + Duration::from_millis(1);
            assert_eq!(act(&mut floods, 7, later), Verdict::Nothing, "forgotten");
            let again = drops(&mut floods, DROPPED, later);
            assert!(again.contains(&FIRST), "news again");
        }
    }

    #[test]
    fn no_more_users_are_remembered_than_there_is_room_for() {
        let (mut floods, start) = (Floods::default(), Instant::now());
        for user in 0..10_000 {
            floods.dropped(user, start);
        }
        assert_eq!(floods.0.len(), USERS);
        let later = start + WITHIN + Duration::from_millis(1);
        floods.dropped(10_000, later);
        assert_eq!(floods.0.len(), 1);
    }
}
