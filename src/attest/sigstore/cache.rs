//! What was found out about images, each looked up once.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::OnceCell;
use tokio::time::Instant;

use super::discovery::Found;

/// Images that are remembered.
const REMEMBERED: usize = 64;
/// How long after a failure the same is still said.
const STALE: Duration = Duration::from_secs(30);

/// The images that were asked about last, by digest.
#[derive(Debug, Default)]
pub(super) struct Cache(Mutex<Vec<Arc<Entry>>>);

/// What was found out about one image.
#[derive(Debug)]
pub(super) struct Entry {
    digest: String,
    found: OnceCell<Found>,
    /// When it first did not lead to what a workload wanted.
    failed: OnceCell<Instant>,
}

impl Cache {
    /// The entry of an image, used last from now on. One that failed a while ago is made anew.
    pub(super) fn entry(&self, digest: &str) -> Arc<Entry> {
        let now = Instant::now();
        let mut entries = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let known = entries.iter().position(|entry| entry.digest == digest);
        let entry = known
            .map(|at| entries.remove(at))
            .filter(|entry| !entry.is_stale(now))
            .unwrap_or_else(|| {
                Arc::new(Entry {
                    digest: digest.to_owned(),
                    found: OnceCell::new(),
                    failed: OnceCell::new(),
                })
            });
        if entries.len() >= REMEMBERED {
            entries.remove(0);
        }
        entries.push(Arc::clone(&entry));
        entry
    }

    /// Tells that what is known of an image did not help, so that it is looked up again in a while.
    pub(super) fn mark(&self, digest: &str) {
        let entries = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(entry) = entries.iter().find(|entry| entry.digest == digest) {
            entry.mark();
        }
    }
}

impl Entry {
    /// What is known, or comes of `look`. Whoever else asks meanwhile waits for the same.
    pub(super) async fn get<F: Future<Output = Found>>(&self, look: impl FnOnce() -> F) -> Found {
        let found = self.found.get_or_init(look).await;
        if !found.complete {
            self.mark();
        }
        found.clone()
    }

    fn mark(&self) {
        // Only the first time counts.
        drop(self.failed.set(Instant::now()));
    }

    fn is_stale(&self, now: Instant) -> bool {
        self.failed
            .get()
            .is_some_and(|failed| *failed + STALE <= now)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pb::teleport::workloadidentity::v1::SigstoreVerificationPayload;

    /// How many payloads are said to be there, if looking finds `fresh`.
    async fn asked(cache: &Cache, digest: &str, fresh: usize, complete: bool) -> usize {
        let found = Found {
            payloads: vec![SigstoreVerificationPayload::default(); fresh],
            complete,
        };
        let entry = cache.entry(digest);
        entry.get(|| async { found }).await.payloads.len()
    }

    #[tokio::test(start_paused = true)]
    async fn what_was_found_stays_and_what_failed_goes() {
        let cache = Cache::default();
        assert_eq!(asked(&cache, "a", 1, true).await, 1);
        tokio::time::advance(STALE * 100).await;
        assert_eq!(asked(&cache, "a", 2, true).await, 1);
        cache.mark("a");
        cache.mark("unknown");
        tokio::time::advance(Duration::from_millis(29_999)).await;
        // A second mark does not make it live longer.
        cache.mark("a");
        assert_eq!(asked(&cache, "a", 3, true).await, 1);
        tokio::time::advance(Duration::from_millis(1)).await;
        assert_eq!(asked(&cache, "a", 4, true).await, 4);

        // What is known in part is looked up again after a while without being asked to.
        assert_eq!(asked(&cache, "b", 1, false).await, 1);
        assert_eq!(asked(&cache, "b", 2, true).await, 1);
        tokio::time::advance(STALE).await;
        assert_eq!(asked(&cache, "b", 2, true).await, 2);
    }

    #[tokio::test]
    async fn the_least_used_are_forgotten() {
        let cache = Cache::default();
        for number in 0..REMEMBERED {
            asked(&cache, &number.to_string(), number, true).await;
        }
        assert_eq!(asked(&cache, "0", 99, true).await, 0);
        asked(&cache, "new", 1, true).await;
        assert_eq!(asked(&cache, "0", 99, true).await, 0, "it was used");
        assert_eq!(asked(&cache, "1", 99, true).await, 99, "it was forgotten");
        assert_eq!(cache.0.lock().unwrap().len(), REMEMBERED);
    }
}
