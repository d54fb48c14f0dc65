//! One list of pods for everybody who asks.
//!
//! A list is megabytes, and a node that starts brings hundreds of callers at once. So at most one
//! list is asked for at a time, and one that was asked for a moment ago is good enough.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::OnceCell;
use tokio::time::Instant;

use super::kubelet::{Kubelet, KubeletError};
use super::pods::{Pods, Sight};

/// How old a list may be for somebody who has not seen one, since it was asked for.
const FRESH: Duration = Duration::from_secs(1);

/// A list, or why there is none.
pub(super) type Outcome = Result<Arc<List>, Arc<KubeletError>>;

/// The pods of this node.
#[derive(Debug)]
pub(super) struct List {
    /// When the kubelet was asked.
    pub(super) asked: Instant,
    pods: Pods,
}

impl List {
    /// A list with this text, asked for just now.
    #[cfg(test)]
    pub(super) fn of(text: &str) -> Self {
        Self {
            asked: Instant::now(),
            pods: serde_json::from_str(text).unwrap(),
        }
    }

    pub(super) fn look(&self, pod: &str, container: &str) -> Sight {
        self.pods.look(pod, container)
    }
}

/// Asks for lists.
#[derive(Debug)]
pub(super) struct Lists {
    kubelet: Kubelet,
    latest: Mutex<Arc<Flight>>,
}

/// A request under way, or its outcome. Whoever waits for it drives it; if that one gives up, the
/// next one starts it again.
type Flight = OnceCell<(Instant, Outcome)>;

impl Lists {
    pub(super) fn new(kubelet: Kubelet) -> Self {
        Self {
            kubelet,
            latest: Mutex::default(),
        }
    }

    /// The node whose pods are listed.
    pub(super) fn node(&self) -> &str {
        self.kubelet.node()
    }

    /// A list that was asked for after the one of the moment `seen`, which did not help; or one that
    /// is fresh.
    pub(super) async fn after(&self, seen: Option<Instant>) -> Outcome {
        let flight = self.flight(seen);
        let (_, outcome) = flight
            .get_or_init(|| async {
                let asked = Instant::now();
                let listed = self.kubelet.pods().await;
                let outcome = listed
                    .map(|pods| Arc::new(List { asked, pods }))
                    .map_err(Arc::new);
                (asked, outcome)
            })
            .await;
        outcome.clone()
    }

    fn flight(&self, seen: Option<Instant>) -> Arc<Flight> {
        let now = Instant::now();
        let mut latest = self.latest.lock().unwrap_or_else(PoisonError::into_inner);
        let stale = latest.get().is_some_and(|(asked, _)| match seen {
            Some(seen) => *asked <= seen,
            None => *asked + FRESH <= now,
        });
        if stale {
            *latest = Arc::default();
        }
        Arc::clone(&latest)
    }
}
