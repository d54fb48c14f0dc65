//! Answers of one kind that are kept, by who asked for what.

use std::collections::HashMap;
use std::time::SystemTime;

use super::Mark;
use crate::attest::{Attested, Process};
use crate::workload::turns::User;

/// Answers that are kept, and their size in bytes. Beyond that, whoever has most makes room with the
/// one that expires first.
pub(super) const MAX: usize = 2048;
pub(super) const BYTES: usize = 4 * 1024 * 1024;
/// Answers that are kept for one process; of more, again the first to expire makes room.
const PER_PROCESS: usize = 16;

/// Whom an answer was given to.
#[derive(Debug, Clone, Copy)]
pub(in crate::workload) struct Holder {
    pub(super) process: Process,
    /// Whose process that is.
    pub(super) user: User,
}

impl Holder {
    /// `None` if the process could not be told from others after a restart.
    pub(in crate::workload) fn of(attested: &Attested) -> Option<Self> {
        Some(Self {
            process: attested.process()?,
            user: attested.user(),
        })
    }
}

/// One answer of the cluster.
#[derive(Debug, Clone)]
pub(super) struct Kept<T> {
    pub(super) holder: Holder,
    /// About how many bytes it has.
    pub(super) bytes: usize,
    /// When the first part of it expires.
    pub(super) not_after: SystemTime,
    /// What was given.
    pub(super) what: T,
}

impl<T> Kept<T> {
    fn is_over(&self, now: SystemTime) -> bool {
        self.not_after <= now || !self.holder.process.is_running()
    }
}

/// The answers.
#[derive(Debug, Clone)]
pub(super) struct Row<T>(HashMap<Mark, Kept<T>>);

impl<T> Default for Row<T> {
    fn default() -> Self {
        Self(HashMap::new())
    }
}

impl<T> FromIterator<(Mark, Kept<T>)> for Row<T> {
    fn from_iter<I: IntoIterator<Item = (Mark, Kept<T>)>>(answers: I) -> Self {
        let mut row = Self::default();
        for (mark, kept) in answers {
            row.put(mark, kept);
        }
        row
    }
}

impl<T> Row<T> {
    pub(super) fn len(&self) -> usize {
        self.0.len()
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (&Mark, &Kept<T>)> {
        self.0.iter()
    }

    pub(super) fn get(&self, mark: &Mark) -> Option<&Kept<T>> {
        self.0.get(mark)
    }

    /// Whether anything of it has not expired.
    pub(super) fn is_used(&self, now: SystemTime) -> bool {
        self.0.values().any(|kept| kept.not_after > now)
    }

    pub(super) fn put(&mut self, mark: Mark, kept: Kept<T>) {
        let process = kept.holder.process;
        self.0.insert(mark, kept);
        let of_process = |other: &Kept<T>| other.holder.process == process;
        if self.0.values().filter(|kept| of_process(kept)).count() > PER_PROCESS {
            self.drop_first(of_process);
        }
        while self.0.len() > MAX || self.bytes() > BYTES {
            let largest = self.largest();
            self.drop_first(|kept| kept.holder.user == largest);
        }
    }

    fn bytes(&self) -> usize {
        self.0.values().map(|kept| kept.bytes).sum()
    }

    /// The user whose answers are the longest together.
    fn largest(&self) -> User {
        let mut users: HashMap<User, usize> = HashMap::new();
        for kept in self.0.values() {
            *users.entry(kept.holder.user).or_default() += kept.bytes;
        }
        let largest = users.into_iter().max_by_key(|(_, bytes)| *bytes);
        largest.and_then(|(user, _)| user)
    }

    /// Drops the first to expire of those that `may` go.
    fn drop_first(&mut self, may: impl Fn(&Kept<T>) -> bool) {
        let first = self.0.iter().filter(|(_, kept)| may(kept));
        let first = first.min_by_key(|(_, kept)| kept.not_after);
        if let Some(mark) = first.map(|(mark, _)| *mark) {
            self.0.remove(&mark);
        }
    }

    pub(super) fn remove(&mut self, mark: &Mark) -> bool {
        self.0.remove(mark).is_some()
    }

    /// Removes all that was given to the process of `holder`. Says whether that was anything.
    pub(super) fn remove_of(&mut self, holder: &Holder) -> bool {
        let before = self.0.len();
        self.0
            .retain(|_, kept| kept.holder.process != holder.process);
        self.0.len() < before
    }

    /// What has expired, and what was for processes that have ended. Takes a look at each process.
    pub(super) fn over(&self, now: SystemTime) -> Vec<Mark> {
        let over = self.0.iter().filter(|(_, kept)| kept.is_over(now));
        over.map(|(mark, _)| *mark).collect()
    }
}
