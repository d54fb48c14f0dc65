//! Who connected and was not heard yet: a line for each user, served in turn.
//!
//! The kernel keeps one queue for all who connect, first come first served. One user who connects
//! faster than it can be answered fills it, and everybody else waits behind, or is turned away
//! (`EAGAIN`). So that queue is emptied at once, and the order is made here.

use std::collections::hash_map::Entry;
use std::collections::{HashMap, VecDeque};

/// The longest that one user's line may be.
const WAITING: usize = 1024;

/// Who does not stand in a line any more.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Gone<T> {
    /// It did not wait.
    Left(T),
    /// It found the line full.
    Refused(T),
}

/// One line for each user; `None` stands for all whose user is unknown.
#[derive(Debug)]
pub(super) struct Lines<T> {
    lines: HashMap<Option<u32>, VecDeque<T>>,
    /// Every user with a line, the next one first.
    order: VecDeque<Option<u32>>,
}

impl<T> Default for Lines<T> {
    fn default() -> Self {
        Self {
            lines: HashMap::new(),
            order: VecDeque::new(),
        }
    }
}

impl<T> Lines<T> {
    pub(super) fn is_empty(&self) -> bool {
        self.order.is_empty()
    }

    /// Joins the user's line. Where that is full, the first in it makes room if it has `left`, and else
    /// the one who comes is sent away; whoever has to go comes back. Says whether the line is new.
    pub(super) fn join(
        &mut self,
        user: Option<u32>,
        who: T,
        left: impl FnOnce(&T) -> bool,
    ) -> Result<bool, Gone<T>> {
        let line = match self.lines.entry(user) {
            Entry::Occupied(line) => line.into_mut(),
            Entry::Vacant(place) => {
                self.order.push_back(user);
                place.insert(VecDeque::new())
            }
        };
        if line.len() < WAITING {
            line.push_back(who);
            return Ok(line.len() == 1);
        }
        match line.pop_front_if(|first| left(first)) {
            Some(first) => {
                line.push_back(who);
                Err(Gone::Left(first))
            }
            None => Err(Gone::Refused(who)),
        }
    }

    /// The first of the next user's line, of those users for whom `ready` gives something. That user
    /// comes last then.
    pub(super) fn next<R>(&mut self, ready: impl Fn(Option<u32>) -> Option<R>) -> Option<(T, R)> {
        let mut users = self.order.iter().enumerate();
        let (at, user, grant) =
            users.find_map(|(at, user)| ready(*user).map(|grant| (at, *user, grant)))?;
        self.order.remove(at);
        let Entry::Occupied(mut line) = self.lines.entry(user) else {
            return None;
        };
        let who = line.get_mut().pop_front();
        if line.get().is_empty() {
            line.remove();
        } else {
            self.order.push_back(user);
        }
        who.map(|who| (who, grant))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn join(
        lines: &mut Lines<&'static str>,
        user: u32,
        who: &'static str,
    ) -> Result<bool, Gone<&'static str>> {
        lines.join(Some(user), who, |first| *first == "left")
    }

    fn next(lines: &mut Lines<&'static str>) -> Option<&'static str> {
        lines.next(|_| Some(())).map(|(who, ())| who)
    }

    #[test]
    fn who_floods_waits_alone() {
        let mut lines = Lines::default();
        while join(&mut lines, 1, "flood").is_ok() {}
        assert_eq!(join(&mut lines, 1, "more"), Err(Gone::Refused("more")));
        assert_eq!(next(&mut lines), Some("flood"));
        assert_eq!(join(&mut lines, 2, "two"), Ok(true));
        lines.join(None, "unknown", |_| false).unwrap();
        // A place in front of the flood's second thousand, not behind it.
        let turns: Vec<_> = (0..4).map_while(|_| next(&mut lines)).collect();
        assert_eq!(turns, ["flood", "two", "unknown", "flood"]);
        assert_eq!(join(&mut lines, 1, "again"), Ok(false));
        let rest = std::iter::from_fn(|| next(&mut lines)).count();
        assert_eq!(rest, WAITING - 2);
        assert!(lines.is_empty() && lines.lines.is_empty(), "nothing stays");
    }

    #[test]
    fn who_left_makes_room() {
        let mut lines = Lines::default();
        join(&mut lines, 1, "left").unwrap();
        while join(&mut lines, 1, "waits").is_ok() {}
        // The last one of the loop took the place of who had left.
        assert_eq!(join(&mut lines, 1, "late"), Err(Gone::Refused("late")));
        let rest: Vec<_> = std::iter::from_fn(|| next(&mut lines)).collect();
        assert_eq!(rest, vec!["waits"; WAITING]);
    }

    #[test]
    fn each_line_keeps_its_order_and_users_take_turns() {
        let mut lines = Lines::default();
        for (user, name) in [(1, "a"), (1, "b"), (1, "c"), (2, "x"), (3, "y"), (2, "z")] {
            join(&mut lines, user, name).unwrap();
        }
        let order: Vec<_> = std::iter::from_fn(|| next(&mut lines)).collect();
        assert_eq!(order, ["a", "x", "y", "b", "z", "c"]);
    }

    #[test]
    fn who_has_enough_under_way_is_passed_over_and_not_forgotten() {
        let mut lines = Lines::default();
        for (user, name) in [(1, "a"), (2, "x"), (2, "y")] {
            join(&mut lines, user, name).unwrap();
        }
        let but_one = |user| (user != Some(1)).then_some(());
        assert_eq!(lines.next(but_one), Some(("x", ())));
        assert_eq!(lines.next(but_one), Some(("y", ())));
        assert_eq!(lines.next(but_one), None);
        assert!(!lines.is_empty());
        assert_eq!(next(&mut lines), Some("a"));
        assert_eq!(next(&mut lines), None);
    }
}
