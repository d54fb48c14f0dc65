//! Keeps one user of the machine, or one of a user's cgroups, from taking the service away from the
//! others.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::hash::Hash;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::crypto::sha256;
use crate::fsx::read_proc;

/// Of what a user may hold, the share that one cgroup may: containers often run as one user, and one of
/// them must leave something to the others.
const SHARE: (usize, usize) = (3, 4);
/// The part of a process's list of cgroups that is looked at, in bytes.
const MAX_CGROUPS: u64 = 16 * 1024;
/// Looks of one attestor at a time: for one cgroup, for one user, for all.
const RUNNING: [usize; 3] = [8, 32, 64];
/// Looks of one attestor for one user that run or wait.
const WAITING: usize = 512;

/// Whom something counts for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Owner {
    /// The user; `None` stands for all whose user is unknown.
    pub user: Option<u32>,
    /// The cgroup, as a digest of its path: as good as its name, whoever may make cgroups may have many.
    /// It is the caller's word, and good for no decision but this.
    pub cgroup: Option<u64>,
}

impl Owner {
    /// The owner of a process of this user.
    pub(super) fn of(pid: i32, user: u32) -> Self {
        Self {
            user: Some(user),
            cgroup: cgroup(pid),
        }
    }
}

/// A digest of the cgroups that a process is in.
fn cgroup(pid: i32) -> Option<u64> {
    let text = read_proc(format!("/proc/{pid}/cgroup"), MAX_CGROUPS).ok()?;
    sha256(&text)
        .first_chunk()
        .map(|digest| u64::from_le_bytes(*digest))
}

/// Counts what each owner holds, up to a maximum for each user.
#[derive(Debug, Clone)]
pub struct Limit {
    maximum: usize,
    held: Arc<Mutex<Held>>,
}

#[derive(Debug, Default)]
struct Held {
    users: HashMap<Option<u32>, usize>,
    cgroups: HashMap<Owner, usize>,
}

/// One held unit; given back when dropped.
#[derive(Debug)]
pub struct Permit {
    limit: Limit,
    owner: Owner,
}

impl Limit {
    /// Each user may hold `maximum` units, and one of its cgroups a part of them.
    #[must_use]
    pub fn new(maximum: usize) -> Self {
        Self {
            maximum,
            held: Arc::default(),
        }
    }

    /// Takes one unit; `None` if the user, or its cgroup, holds the maximum.
    pub fn take(&self, owner: Owner) -> Option<Permit> {
        let mut held = self.held();
        let share = (self.maximum * SHARE.0 / SHARE.1).max(1);
        if held.users.get(&owner.user).copied().unwrap_or_default() >= self.maximum
            || (owner.cgroup.is_some()
                && held.cgroups.get(&owner).copied().unwrap_or_default() >= share)
        {
            return None;
        }
        *held.users.entry(owner.user).or_default() += 1;
        if owner.cgroup.is_some() {
            *held.cgroups.entry(owner).or_default() += 1;
        }
        Some(Permit {
            limit: self.clone(),
            owner,
        })
    }

    fn held(&self) -> MutexGuard<'_, Held> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        let mut held = self.limit.held();
        give_back(&mut held.users, self.owner.user);
        if self.owner.cgroup.is_some() {
            give_back(&mut held.cgroups, self.owner);
        }
    }
}

/// One less; nothing is kept for owners that hold nothing.
fn give_back<K: Eq + Hash>(counts: &mut HashMap<K, usize>, key: K) {
    if let Entry::Occupied(mut entry) = counts.entry(key) {
        let count = entry.get_mut();
        *count = count.saturating_sub(1);
        if *count == 0 {
            entry.remove();
        }
    }
}

/// Lets so many looks of an attestor run at a time. Each owner waits in a queue of its own, so that in front of
/// everybody else's next one there are never more than it may have running.
#[derive(Debug, Clone)]
pub(super) struct Turns {
    places: Limit,
    all: Arc<Semaphore>,
    own: Arc<Mutex<HashMap<Owner, Arc<Semaphore>>>>,
}

/// The right to look, until it is dropped.
#[derive(Debug)]
pub(super) struct Turn {
    // In this order: a queue is removed when nobody is in it any more.
    _running: Vec<OwnedSemaphorePermit>,
    _queues: Vec<Queue>,
    _place: Permit,
}

/// Part in an owner's queue.
#[derive(Debug)]
struct Queue {
    turns: Turns,
    owner: Owner,
    semaphore: Option<Arc<Semaphore>>,
}

impl Turns {
    pub(super) fn new() -> Self {
        let [_, _, all] = RUNNING;
        Self {
            places: Limit::new(WAITING),
            all: Arc::new(Semaphore::new(all)),
            own: Arc::default(),
        }
    }

    /// Waits for a turn; `None` at once if too many of this owner's wait already.
    pub(super) async fn next(&self, owner: Owner) -> Option<Turn> {
        let place = self.places.take(owner)?;
        let [cgroup, user, _] = RUNNING;
        let whole = Owner {
            cgroup: None,
            ..owner
        };
        let mut queues = Vec::with_capacity(2);
        if owner.cgroup.is_some() {
            queues.push(self.queue(owner, cgroup));
        }
        queues.push(self.queue(whole, user));
        let mut running = Vec::with_capacity(3);
        for queue in &queues {
            running.push(queue.wait().await?);
        }
        running.push(Arc::clone(&self.all).acquire_owned().await.ok()?);
        Some(Turn {
            _running: running,
            _queues: queues,
            _place: place,
        })
    }

    fn queue(&self, owner: Owner, running: usize) -> Queue {
        let mut own = self.own.lock().unwrap_or_else(PoisonError::into_inner);
        let semaphore = own
            .entry(owner)
            .or_insert_with(|| Arc::new(Semaphore::new(running)));
        Queue {
            turns: self.clone(),
            owner,
            semaphore: Some(Arc::clone(semaphore)),
        }
    }
}

impl Queue {
    async fn wait(&self) -> Option<OwnedSemaphorePermit> {
        let semaphore = self.semaphore.as_ref()?;
        Arc::clone(semaphore).acquire_owned().await.ok()
    }
}

impl Drop for Queue {
    fn drop(&mut self) {
        self.semaphore = None;
        let own = &self.turns.own;
        let mut own = own.lock().unwrap_or_else(PoisonError::into_inner);
        if let Entry::Occupied(entry) = own.entry(self.owner)
            && Arc::strong_count(entry.get()) == 1
        {
            entry.remove();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use futures_util::future::join_all;
    use tokio::time::timeout;

    use super::*;

    fn user(user: u32) -> Owner {
        Owner {
            user: Some(user),
            cgroup: None,
        }
    }

    fn cgroup(user: u32, cgroup: u64) -> Owner {
        Owner {
            user: Some(user),
            cgroup: Some(cgroup),
        }
    }

    #[test]
    fn each_user_has_its_own_maximum() {
        let limit = Limit::new(2);
        let first = limit.take(user(1)).unwrap();
        let _second = limit.take(user(1)).unwrap();
        assert!(limit.take(user(1)).is_none());
        let other = limit.take(user(2));
        assert!(other.is_some());
        assert!(limit.take(Owner::default()).is_some());
        drop(first);
        assert!(limit.take(user(1)).is_some());
    }

    #[test]
    fn a_cgroup_leaves_something_to_the_others_of_its_user() {
        let limit = Limit::new(4);
        let greedy: Vec<_> = (0..4).map_while(|_| limit.take(cgroup(0, 1))).collect();
        assert_eq!(greedy.len(), 3);
        let other = limit.take(cgroup(0, 2));
        assert!(other.is_some());
        assert!(limit.take(cgroup(0, 3)).is_none(), "the user has all");
        assert!(limit.take(cgroup(7, 1)).is_some());
    }

    #[test]
    fn nothing_is_kept_for_owners_that_left() {
        let limit = Limit::new(1);
        for number in 0..1000 {
            drop(limit.take(cgroup(number, u64::from(number))));
        }
        let held = limit.held();
        assert!(held.users.is_empty() && held.cgroups.is_empty());
    }

    async fn has_turn(turns: &Turns, owner: Owner) -> Option<Turn> {
        timeout(Duration::from_secs(1), turns.next(owner))
            .await
            .ok()
            .flatten()
    }

    #[tokio::test(start_paused = true)]
    async fn who_floods_waits_alone() {
        let turns = Turns::new();
        let [per_cgroup, per_user, _] = RUNNING;
        let mut running = Vec::new();
        while let Some(turn) = has_turn(&turns, cgroup(1, 1)).await {
            running.push(turn);
        }
        assert_eq!(running.len(), per_cgroup);
        for group in 2.. {
            let before = running.len();
            while let Some(turn) = has_turn(&turns, cgroup(1, group)).await {
                running.push(turn);
            }
            if running.len() == before {
                break;
            }
        }
        assert_eq!(running.len(), per_user);
        assert!(has_turn(&turns, user(2)).await.is_some());
        running.pop();
        assert!(has_turn(&turns, cgroup(1, 99)).await.is_some());
        running.clear();
        assert!(turns.own.lock().unwrap().is_empty());
    }

    #[tokio::test(start_paused = true)]
    async fn who_has_no_cgroup_counts_for_its_user_alone() {
        let turns = Turns::new();
        let [_, per_user, _] = RUNNING;
        let all = join_all((0..per_user).map(|_| has_turn(&turns, user(1)))).await;
        assert!(all.iter().all(Option::is_some), "all at once");
        assert!(has_turn(&turns, user(1)).await.is_none());
    }

    #[tokio::test(start_paused = true)]
    async fn a_queue_has_an_end() {
        let turns = Turns::new();
        let mut waiting = tokio::task::JoinSet::new();
        let mut running = Vec::new();
        for number in 0..WAITING {
            let (turns, owner) = (turns.clone(), cgroup(1, number as u64));
            if running.len() < RUNNING[1] {
                running.push(turns.next(owner).await.unwrap());
            } else {
                waiting.spawn(async move { drop(turns.next(owner).await) });
            }
        }
        while turns.places.held().users[&Some(1)] < WAITING {
            tokio::task::yield_now().await;
        }
        let refused = timeout(Duration::from_secs(1), turns.next(cgroup(1, 0))).await;
        assert!(matches!(refused, Ok(None)), "it has to be told at once");
        assert!(has_turn(&turns, user(2)).await.is_some());
        // Who goes away while waiting leaves nothing behind.
        waiting.shutdown().await;
        running.clear();
        assert!(turns.own.lock().unwrap().is_empty());
        assert!(turns.places.held().users.is_empty());
    }
}
