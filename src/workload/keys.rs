//! Keys for SVIDs, one of them made ahead.

use std::sync::{Arc, Mutex, PoisonError};

use super::issue::IssueError;
use crate::crypto::{KeyAlgorithm, PrivateKey};

/// Gives fresh keys. A key of the algorithm that was asked for last is ready before it is needed:
/// an RSA key takes a tenth of a second and more. Nothing is made before the first is asked for,
/// so never one that nobody uses.
#[derive(Debug, Clone, Default)]
pub(super) struct Keys(Arc<Mutex<Held>>);

#[derive(Debug, Default)]
struct Held {
    ready: Option<PrivateKey>,
    /// Whether one is being made.
    filling: bool,
}

impl Keys {
    /// A key that nobody else has or will get. What has to be made is made off the async threads.
    pub(super) async fn take(&self, algorithm: KeyAlgorithm) -> Result<PrivateKey, IssueError> {
        let ready = self.held().ready.take();
        let key = match ready.filter(|key| key.algorithm() == algorithm) {
            Some(key) => key,
            None => made(algorithm).await?,
        };
        self.refill(algorithm);
        Ok(key)
    }

    fn refill(&self, algorithm: KeyAlgorithm) {
        {
            let mut held = self.held();
            if held.filling || held.ready.is_some() {
                return;
            }
            held.filling = true;
        }
        let keys = self.clone();
        tokio::spawn(async move {
            // If it fails, so will the next one that is asked for, and that is told.
            let made = made(algorithm).await.ok();
            let mut held = keys.held();
            held.filling = false;
            held.ready = made;
        });
    }

    fn held(&self) -> std::sync::MutexGuard<'_, Held> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
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
    use super::*;

    /// Waits for the key that is being made ahead.
    async fn filled(keys: &Keys) {
        while keys.held().ready.is_none() {
            tokio::task::yield_now().await;
        }
    }

    #[tokio::test]
    async fn one_key_is_ready_and_none_is_given_twice() {
        let keys = Keys::default();
        assert!(keys.held().ready.is_none(), "nothing for nobody");
        let mut spkis = std::collections::HashSet::new();
        for _ in 0..8 {
            let key = keys.take(KeyAlgorithm::EcdsaP256).await.unwrap();
            assert!(spkis.insert(key.public_spki()));
        }
        filled(&keys).await;
        let ready = keys.held().ready.as_ref().unwrap().public_spki();
        let key = keys.take(KeyAlgorithm::EcdsaP256).await.unwrap();
        assert_eq!(key.public_spki(), ready);
    }

    #[tokio::test]
    async fn a_change_of_suite_leaves_no_key_of_the_old_one() {
        let keys = Keys::default();
        keys.take(KeyAlgorithm::EcdsaP256).await.unwrap();
        filled(&keys).await;
        let key = keys.take(KeyAlgorithm::Rsa2048).await.unwrap();
        assert_eq!(key.algorithm(), KeyAlgorithm::Rsa2048);
        filled(&keys).await;
        let ready = keys.held().ready.as_ref().map(PrivateKey::algorithm);
        assert_eq!(ready, Some(KeyAlgorithm::Rsa2048));
    }
}
