//! The trust bundles and the revocation list, followed once for the whole agent: however many
//! services look at them, the cluster has one reader.

use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::watch;
use tokio_util::task::AbortOnDropHandle;

use crate::clock::Clock;
use crate::identity::Handle;
use crate::workload::{Bundles, Crl, bundle, crl};

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
                tokio::join!(
                    bundle::follow(client, own.cluster(), &clock, &bundles),
                    crl::follow(client, &clock, &revoked),
                );
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
