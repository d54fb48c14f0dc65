//! Keys for SVIDs, some of them made ahead.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::issue::IssueError;
use crate::crypto::{KeyAlgorithm, PrivateKey};

/// How many keys are made ahead at most.
const MOST: usize = 4;

/// Gives fresh keys. Some of the algorithm that was asked for last are ready before they are needed:
/// an RSA key takes a tenth of a second and more. It is one more whenever somebody finds none ready, up
/// to [`MOST`], and none before the first is asked for.
#[derive(Debug, Clone, Default)]
pub(super) struct Keys(Arc<Mutex<Held>>);

#[derive(Debug, Default)]
struct Held {
    algorithm: Option<KeyAlgorithm>,
    ready: Vec<PrivateKey>,
    /// How many are to be ready.
    wanted: usize,
    /// Whether one is being made.
    filling: bool,
}

impl Keys {
    /// A key that nobody else has or will get. What has to be made is made off the async threads.
    pub(super) async fn take(&self, algorithm: KeyAlgorithm) -> Result<PrivateKey, IssueError> {
        let ready = self.held().take(algorithm);
        let key = match ready {
            Some(key) => key,
            None => made(algorithm).await?,
        };
        self.refill();
        Ok(key)
    }

    fn refill(&self) {
        {
            let mut held = self.held();
            if held.filling || held.missing().is_none() {
                return;
            }
        }
        let keys = self.clone();
        tokio::spawn(async move {
            loop {
                let missing = keys.held().missing();
                let Some(algorithm) = missing else {
                    return;
                };
                let made = made(algorithm).await;
                let mut held = keys.held();
                match made {
                    Ok(key) => held.put(key),
                    // So will the next one that is asked for, and that is told.
                    Err(_) => {
                        held.filling = false;
                        return;
                    }
                }
            }
        });
    }

    fn held(&self) -> MutexGuard<'_, Held> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Held {
    fn take(&mut self, algorithm: KeyAlgorithm) -> Option<PrivateKey> {
        if self.algorithm != Some(algorithm) {
            self.algorithm = Some(algorithm);
            self.ready.clear();
        }
        let key = self.ready.pop();
        if key.is_none() {
            self.wanted = (self.wanted + 1).min(MOST);
        }
        key
    }

    /// The algorithm of the key that is to be made now, if one is.
    fn missing(&mut self) -> Option<KeyAlgorithm> {
        self.filling = self.ready.len() < self.wanted;
        self.algorithm.filter(|_| self.filling)
    }

    fn put(&mut self, key: PrivateKey) {
        if self.algorithm == Some(key.algorithm()) {
            self.ready.push(key);
        }
    }
}

/// A fresh key, made off the async threads: RSA takes its time.
pub(super) async fn made(algorithm: KeyAlgorithm) -> Result<PrivateKey, IssueError> {
    tokio::task::spawn_blocking(move || PrivateKey::generate(algorithm))
        .await
        .map_err(|source| IssueError::Unavailable(source.to_string()))?
        .map_err(|source| IssueError::Unavailable(source.to_string()))
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    /// Waits for the keys that are being made ahead.
    async fn filled(keys: &Keys) {
        while keys.held().filling {
            tokio::task::yield_now().await;
        }
    }

    #[tokio::test]
    async fn one_is_ready_for_one_after_the_other_and_none_is_given_twice() {
        let keys = Keys::default();
        assert!(keys.held().ready.is_empty(), "nothing for nobody");
        let mut spkis = HashSet::new();
        for _ in 0..8 {
            let key = keys.take(KeyAlgorithm::EcdsaP256).await.unwrap();
            assert!(spkis.insert(key.public_spki()));
            filled(&keys).await;
            assert_eq!(keys.held().ready.len(), 1);
            assert!(!spkis.contains(&keys.held().ready[0].public_spki()));
        }
    }

    #[tokio::test]
    async fn a_burst_finds_some_ready_the_next_time() {
        let keys = Keys::default();
        for _ in 0..2 {
            let burst = (0..16).map(|_| keys.take(KeyAlgorithm::EcdsaP256));
            let taken = futures_util::future::join_all(burst).await;
            let spkis: HashSet<_> = taken
                .into_iter()
                .map(|key| key.unwrap().public_spki())
                .collect();
            assert_eq!(spkis.len(), 16);
            filled(&keys).await;
            assert_eq!(keys.held().ready.len(), MOST);
        }
    }

    #[tokio::test]
    async fn a_change_of_suite_leaves_no_key_of_the_old_one() {
        let keys = Keys::default();
        keys.take(KeyAlgorithm::EcdsaP256).await.unwrap();
        // Even if one of the old one is being made.
        let key = keys.take(KeyAlgorithm::Rsa2048).await.unwrap();
        assert_eq!(key.algorithm(), KeyAlgorithm::Rsa2048);
        filled(&keys).await;
        let held = keys.held();
        assert!(!held.ready.is_empty());
        let mut ready = held.ready.iter().map(PrivateKey::algorithm);
        assert!(ready.all(|algorithm| algorithm == KeyAlgorithm::Rsa2048));
    }
}
