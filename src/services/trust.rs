//! The trust bundles and the revocation list, followed once for the whole agent: however many
//! services look at them, the cluster has one reader.

use std::panic::AssertUnwindSafe;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use futures_util::FutureExt as _;
use tokio::sync::watch;
use tokio_util::task::AbortOnDropHandle;

use crate::clock::Clock;
use crate::identity::Handle;
use crate::workload::{Bundles, Crl, bundle, crl};

/// How long after a fault of its own the follower begins again.
const AGAIN: Duration = Duration::from_secs(10);

/// The place where services find them. Clones share it; following ends with the last clone.
#[derive(Debug, Clone, Default)]
pub struct Trust(Arc<Mutex<Option<Following>>>);

/// What is followed, and the task that does it.
#[derive(Debug)]
struct Following {
    feeds: Feeds,
    _task: AbortOnDropHandle<()>,
}

/// What a service sees.
#[derive(Debug, Clone)]
pub(super) struct Feeds {
    /// `None` until the bot has joined and the cluster was heard.
    pub(super) bundles: watch::Receiver<Option<Arc<Bundles>>>,
    /// Pending until then, and a moment longer.
    pub(super) revoked: watch::Receiver<Crl>,
}

impl Trust {
    /// Follows them as the bot itself from its first join on, if nobody did so far.
    pub(super) fn follow(&self, identity: &Handle, clock: &Clock) -> Feeds {
        let mut following = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let following = following.get_or_insert_with(|| {
            let (bundles, follow_bundles) = watch::channel(None);
            let (revoked, follow_revoked) = watch::channel(Crl::Pending);
            let (identity, clock) = (identity.clone(), clock.clone());
            let task = tokio::spawn(async move {
                let Some(own) = identity.ready().await else {
                    return;
                };
                let client = identity.client();
                outliving_panics(&clock, || async {
                    tokio::join!(
                        bundle::follow(client, own.cluster(), &clock, &bundles),
                        crl::follow(client, &clock, &revoked),
                    );
                })
                .await;
            });
            Following {
                feeds: Feeds {
                    bundles: follow_bundles,
                    revoked: follow_revoked,
                },
                _task: AbortOnDropHandle::new(task),
            }
        });
        following.feeds.clone()
    }
}

/// Does `work`, and begins it again if it panics: its readers are many, and none of them would notice
/// that nothing comes any more.
async fn outliving_panics<F: Future<Output = ()>>(clock: &Clock, work: impl Fn() -> F) {
    while AssertUnwindSafe(work()).catch_unwind().await.is_err() {
        tracing::error!(
            "Following the trust bundles and revocations ended in a fault of this program; beginning \
             again"
        );
        clock.sleep(AGAIN).await;
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};
    use std::time::SystemTime;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_panic_does_not_end_what_readers_wait_for() {
        let clock = Clock::simulated(SystemTime::UNIX_EPOCH);
        let (sender, receiver) = watch::channel(0);
        let attempts = AtomicU32::new(0);
        outliving_panics(&clock, || async {
            let attempt = attempts.fetch_add(1, Ordering::Relaxed) + 1;
            assert!(attempt > 2, "a fault on purpose");
            sender.send_replace(attempt);
        })
        .await;
        assert_eq!(*receiver.borrow(), 3);
        assert_eq!(clock.now(), SystemTime::UNIX_EPOCH + 2 * AGAIN);
    }
}
