//! Answers of one kind that are kept, by who asked for what.

use std::collections::HashMap;
use std::time::SystemTime;

use super::Mark;
use crate::attest::Process;

/// Answers that are kept. Beyond that, the one that expires first makes room.
pub(super) const MAX: usize = 2048;
/// Answers that are kept for one process; of more, again the first to expire makes room.
const PER_PROCESS: usize = 16;

/// One answer of the cluster.
#[derive(Debug, Clone)]
pub(super) struct Kept<T> {
    /// Whom it was given to.
    pub(super) process: Process,
    /// When the first part of it expires.
    pub(super) not_after: SystemTime,
    /// What was given.
    pub(super) what: T,
}

impl<T> Kept<T> {
    fn is_over(&self, now: SystemTime) -> bool {
        self.not_after <= now || !self.process.is_running()
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
        Self(answers.into_iter().take(MAX).collect())
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
        let process = kept.process;
        if self.0.insert(mark, kept).is_some() {
            return;
        }
        let of_process = |other: &Kept<T>| other.process == process;
        if self.0.values().filter(|kept| of_process(kept)).count() > PER_PROCESS {
            self.drop_first(of_process);
        }
        if self.0.len() > MAX {
            self.drop_first(|_| true);
        }
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

    /// What has expired, and what was for processes that have ended. Takes a look at each process.
    pub(super) fn over(&self, now: SystemTime) -> Vec<Mark> {
        let over = self.0.iter().filter(|(_, kept)| kept.is_over(now));
        over.map(|(mark, _)| *mark).collect()
    }
}
