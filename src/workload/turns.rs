//! Requests to the cluster take turns, so that a user of the machine who wants many keeps only itself
//! waiting.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// A user of the machine; `None` stands for all whose user is unknown.
pub(super) type User = Option<u32>;

/// Requests that run at a time. A cluster answers one in some milliseconds; more would only queue
/// there.
const RUNNING: usize = 16;
/// Those of one user: however many it wants, the others find room.
const RUNNING_OF_USER: usize = 12;

/// Lets so many requests run at a time. Each user waits in a line of its own, so that in front of
/// everybody else's next one there are never more of it than it may have running.
#[derive(Debug, Clone)]
pub(super) struct Turns {
    /// How many of one user may run or wait.
    places: usize,
    all: Arc<Semaphore>,
    lines: Arc<Mutex<HashMap<User, Line>>>,
}

/// Those of one user.
#[derive(Debug)]
struct Line {
    running: Arc<Semaphore>,
    length: usize,
}

/// The right to ask, until it is dropped.
#[derive(Debug)]
pub(super) struct Turn {
    _running: [OwnedSemaphorePermit; 2],
    _place: Place,
}

/// Part in a user's line.
#[derive(Debug)]
struct Place {
    turns: Turns,
    user: User,
}

impl Turns {
    /// Turns for lines of at most so many places.
    pub(super) fn new(places: usize) -> Self {
        Self {
            places,
            all: Arc::new(Semaphore::new(RUNNING)),
            lines: Arc::default(),
        }
    }

    /// Waits for a turn; `None` at once if this user's line is full.
    pub(super) async fn next(&self, user: User) -> Option<Turn> {
        let (place, line) = self.join(user)?;
        // Who has come to the front of its line stands in the line of all.
        let own = line.acquire_owned().await.ok()?;
        let all = Arc::clone(&self.all).acquire_owned().await.ok()?;
        Some(Turn {
            _running: [own, all],
            _place: place,
        })
    }

    fn join(&self, user: User) -> Option<(Place, Arc<Semaphore>)> {
        let mut lines = self.lines();
        let line = lines.entry(user).or_insert_with(|| Line {
            running: Arc::new(Semaphore::new(RUNNING_OF_USER)),
            length: 0,
        });
        if line.length >= self.places {
            return None;
        }
        line.length += 1;
        let place = Place {
            turns: self.clone(),
            user,
        };
        Some((place, Arc::clone(&line.running)))
    }

    fn lines(&self) -> MutexGuard<'_, HashMap<User, Line>> {
        self.lines.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut lines = self.turns.lines();
        if let Some(line) = lines.get_mut(&self.user) {
            line.length = line.length.saturating_sub(1);
            if line.length == 0 {
                lines.remove(&self.user);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::task::JoinSet;
    use tokio::time::timeout;

    use super::*;

    async fn has_turn(turns: &Turns, user: u32) -> Option<Turn> {
        let turn = timeout(Duration::from_secs(1), turns.next(Some(user))).await;
        turn.ok().flatten()
    }

    #[tokio::test(start_paused = true)]
    async fn who_wants_many_waits_alone() {
        let turns = Turns::new(usize::MAX);
        let mut running = Vec::new();
        while let Some(turn) = has_turn(&turns, 1).await {
            running.push(turn);
        }
        assert_eq!(running.len(), RUNNING_OF_USER);
        let other = has_turn(&turns, 2).await;
        assert!(other.is_some());
        running.pop();
        assert!(has_turn(&turns, 1).await.is_some());
    }

    #[tokio::test(start_paused = true)]
    async fn of_two_who_want_many_neither_is_in_front_for_long() {
        let turns = Turns::new(usize::MAX);
        let mut flood = JoinSet::new();
        for number in 0..1000 {
            let turns = turns.clone();
            flood.spawn(async move {
                let _turn = turns.next(Some(number % 2)).await;
                tokio::time::sleep(Duration::from_secs(1)).await;
            });
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
        let waiting = turns.next(Some(2));
        let third = timeout(Duration::from_secs(2), waiting).await;
        assert!(third.is_ok_and(|turn| turn.is_some()));
    }

    #[tokio::test(start_paused = true)]
    async fn a_line_has_an_end_and_leaves_nothing_behind() {
        let turns = Turns::new(20);
        let mut waiting = JoinSet::new();
        for _ in 0..20 {
            let turns = turns.clone();
            waiting.spawn(async move {
                let _turn = turns.next(Some(1)).await;
                std::future::pending::<()>().await;
            });
        }
        while turns
            .lines()
            .get(&Some(1))
            .is_none_or(|line| line.length < 20)
        {
            tokio::task::yield_now().await;
        }
        let refused = timeout(Duration::from_secs(1), turns.next(Some(1))).await;
        assert!(matches!(refused, Ok(None)), "it has to be told at once");
        assert!(has_turn(&turns, 2).await.is_some());
        waiting.shutdown().await;
        assert!(turns.lines().is_empty());
    }
}
