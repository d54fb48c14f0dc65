//! The trust bundles and the revocation lists, followed once for the whole agent: however many
//! services look at them, the cluster has one reader.

use std::panic::AssertUnwindSafe;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use futures_util::FutureExt as _;
use tokio::sync::watch;
use tokio_util::task::AbortOnDropHandle;

use crate::clock::Clock;
use crate::identity::Handle;
use crate::workload::{Beside, Bundles, Crl, Shelf, bundle, crl};

/// How long after a fault of its own the follower begins again.
const AGAIN: Duration = Duration::from_secs(10);

/// The place where services find them. Clones share it; following ends with the last clone.
#[derive(Debug, Clone, Default)]
pub struct Trust {
    following: Arc<Mutex<Option<Following>>>,
    shelf: Shelf,
}

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
    /// Pending until then, and a moment longer; but if there were lists before the agent was started
    /// anew, those from the beginning.
    pub(super) revoked: watch::Receiver<Crl>,
}

/// What stands beside SVIDs in an answer: what the cluster says, and until it was heard for the first
/// time, the bundles of before the agent was started anew (the lists begin with those of then).
/// Clones each remember what they looked at.
#[derive(Debug, Clone)]
pub(super) struct View {
    heard: Feeds,
    before: Option<Arc<Bundles>>,
}

impl View {
    pub(super) fn new(heard: Feeds, before: Option<Beside>) -> Self {
        let before = before.map(|before| before.bundles);
        Self { heard, before }
    }

    /// The current state, which counts as looked at.
    pub(super) fn look(&mut self) -> (Option<Arc<Bundles>>, Crl) {
        let heard = self.heard.bundles.borrow_and_update().clone();
        let crl = self.heard.revoked.borrow_and_update().clone();
        (heard.or_else(|| self.before.clone()), crl)
    }

    /// The bundles, without looking.
    pub(super) fn bundles(&self) -> Option<Arc<Bundles>> {
        let heard = self.heard.bundles.borrow().clone();
        heard.or_else(|| self.before.clone())
    }

    /// Waits for something else than was looked at; of the list, only with `revocations`. An error
    /// means that the agent is stopping.
    pub(super) async fn changed(
        &mut self,
        revocations: bool,
    ) -> Result<(), watch::error::RecvError> {
        tokio::select! {
            changed = self.heard.bundles.changed() => changed,
            changed = self.heard.revoked.changed(), if revocations => changed,
        }
    }

    /// Tells `shelf` what the cluster says, for as long as it says anything.
    pub(super) async fn keep_on(mut self, shelf: &Shelf) {
        loop {
            let bundles = self.heard.bundles.borrow_and_update().clone();
            let crl = self.heard.revoked.borrow_and_update().clone();
            if let Some(bundles) = bundles
                && crl != Crl::Pending
            {
                shelf.tell(&bundles, &crl);
            }
            if self.changed(true).await.is_err() {
                return std::future::pending().await;
            }
        }
    }
}

impl Trust {
    /// Begins with the lists on `shelf`: what the cluster revoked stays revoked until it says otherwise,
    /// however long it takes to be heard after a restart.
    pub fn beside(shelf: Shelf) -> Self {
        Self {
            shelf,
            ..Self::default()
        }
    }

    /// Follows them as the bot itself from its first join on, if nobody did so far.
    pub(super) fn follow(&self, identity: &Handle, clock: &Clock) -> Feeds {
        let mut following = self
            .following
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let following = following.get_or_insert_with(|| {
            let (bundles, follow_bundles) = watch::channel(None);
            let known = self.shelf.lists().map_or(Crl::Pending, Crl::Signed);
            let (revoked, follow_revoked) = watch::channel(known);
            let (identity, clock) = (identity.clone(), clock.clone());
            let beside = follow_bundles.clone();
            let task = tokio::spawn(async move {
                let Some(own) = identity.ready().await else {
                    return;
                };
                let client = identity.client();
                outliving_panics(&clock, || async {
                    tokio::join!(
                        bundle::follow(client, own.cluster(), &clock, &bundles),
                        crl::follow(client, &clock, beside.clone(), &revoked),
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

    use bytes::Bytes;

    use super::*;
    use crate::workload::tests::{Authority, DOMAIN, message};

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

    fn bundles(authority: &Authority) -> Arc<Bundles> {
        Arc::new(Bundles::from_authority(&message(DOMAIN, &[authority])).unwrap())
    }

    #[test]
    fn the_bundles_of_before_stand_in_until_the_cluster_is_heard() {
        let [old, new] = ["old", "new"].map(|name| bundles(&Authority::new(name)));
        let list = Crl::Signed(Bytes::from_static(b"list"));
        let (told, heard) = watch::channel(None);
        let (listed, revoked) = watch::channel(list.clone());
        let before = Beside {
            bundles: Arc::clone(&old),
            crl: None,
        };
        let heard = Feeds {
            bundles: heard,
            revoked,
        };
        let mut view = View::new(heard.clone(), Some(before));
        let mut without = View::new(heard, None);
        assert_eq!(without.look(), (None, list.clone()));
        assert_eq!(view.look(), (Some(Arc::clone(&old)), list.clone()));
        assert_eq!(view.bundles(), Some(old));
        told.send_replace(Some(Arc::clone(&new)));
        assert_eq!(view.look(), (Some(Arc::clone(&new)), list));
        assert_eq!(view.bundles(), Some(new));
        listed.send_replace(Crl::None);
        assert_eq!(view.look().1, Crl::None, "the cluster took it away");
    }

    #[tokio::test(start_paused = true)]
    async fn lists_of_before_the_restart_are_there_at_once_and_kept_on() {
        let clock = Clock::simulated(SystemTime::UNIX_EPOCH);
        let identity = Handle::new(
            clock.clone(),
            Arc::new(crate::cluster::dial::Tcp),
            crate::cluster::client::Route::Direct("nowhere:3025".to_owned()),
            crate::cluster::trust::Trust::default(),
            false,
            watch::channel(None).1,
            watch::channel(None).1,
            watch::channel(0).1,
        );
        let fresh = Trust::default().follow(&identity, &clock);
        assert_eq!(*fresh.revoked.borrow(), Crl::Pending);

        let (old, new) = (
            bundles(&Authority::new("old")),
            bundles(&Authority::new("new")),
        );
        let list = Bytes::from_static(b"list");
        let shelf = Shelf::default();
        shelf.tell(&old, &Crl::Signed(list.clone()));
        let revoked = Trust::beside(shelf.clone())
            .follow(&identity, &clock)
            .revoked;
        assert_eq!(*revoked.borrow(), Crl::Signed(list.clone()));
        // Bundles are heard, and lists are not.
        let (_told, heard) = watch::channel(Some(new));
        let heard = Feeds {
            bundles: heard,
            revoked,
        };
        tokio::select! {
            () = View::new(heard, None).keep_on(&shelf) => unreachable!(),
            () = clock.sleep(AGAIN) => {}
        }
        assert_eq!(shelf.lists(), Some(list));
    }
}
