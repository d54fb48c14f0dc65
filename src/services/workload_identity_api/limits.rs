//! Keeps one user of the machine from taking the service away from the others.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

/// Counts what each user holds, up to a maximum. `None` stands for all whose user is unknown.
#[derive(Debug, Clone)]
pub(super) struct Limit {
    maximum: usize,
    held: Arc<Mutex<HashMap<Option<u32>, usize>>>,
}

/// One held unit; given back when dropped.
#[derive(Debug)]
pub(super) struct Permit {
    limit: Limit,
    user: Option<u32>,
}

impl Limit {
    pub(super) fn new(maximum: usize) -> Self {
        Self {
            maximum,
            held: Arc::default(),
        }
    }

    /// Takes one unit for `user`; `None` if the user holds the maximum.
    pub(super) fn take(&self, user: Option<u32>) -> Option<Permit> {
        let mut held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        let count = held.entry(user).or_default();
        if *count >= self.maximum {
            return None;
        }
        *count += 1;
        Some(Permit {
            limit: self.clone(),
            user,
        })
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        let mut held = self
            .limit
            .held
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = held.get_mut(&self.user) {
            *count = count.saturating_sub(1);
            if *count == 0 {
                held.remove(&self.user);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_user_has_its_own_maximum() {
        let limit = Limit::new(2);
        let first = limit.take(Some(1)).unwrap();
        let _second = limit.take(Some(1)).unwrap();
        assert!(limit.take(Some(1)).is_none());
        let other = limit.take(Some(2));
        assert!(other.is_some());
        assert!(limit.take(None).is_some());
        drop(first);
        assert!(limit.take(Some(1)).is_some());
    }

    #[test]
    fn nothing_is_kept_for_users_that_left() {
        let limit = Limit::new(1);
        for user in 0..1000 {
            drop(limit.take(Some(user)));
        }
        assert!(limit.held.lock().unwrap().is_empty());
    }
}
