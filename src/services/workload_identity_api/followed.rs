//! The X.509-SVIDs of one caller, for as long as its stream is open.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;
use tonic::Status;

use super::incoming::Caller;
use super::source::Source;
use crate::attest::Attested;
use crate::crypto::jitter;
use crate::workload::{Bundles, State, Subscription};

/// What one caller may have. The caller is looked at again now and then; once it is something else,
/// it gets what that may have.
pub(super) struct Followed {
    source: Arc<Source>,
    caller: Caller,
    attested: Arc<Attested>,
    subscription: Subscription,
    /// When the caller is looked at again.
    look: Instant,
    /// Why nothing may be sent any more.
    ended: Option<Box<Status>>,
}

impl Followed {
    pub(super) fn new(source: Arc<Source>, caller: Caller, attested: Arc<Attested>) -> Self {
        Self {
            subscription: source.subscribe(&attested),
            look: soon(source.interval),
            source,
            caller,
            attested,
            ended: None,
        }
    }

    /// What is known about the caller.
    pub(super) fn attested(&self) -> &Attested {
        &self.attested
    }

    /// What is held now, to be sent beside `bundles`; this counts as looked at. An error ends the caller's
    /// stream.
    pub(super) fn state(&mut self, bundles: &Arc<Bundles>) -> Result<State, Box<Status>> {
        if let Some(ended) = self.ended.take() {
            return Err(ended);
        }
        Ok(match &*self.subscription.state().borrow_and_update() {
            // After a change of authorities, what they did not issue waits for its renewal.
            State::Ready(svids) if !svids.lead_to(bundles) => State::Pending,
            state => state.clone(),
        })
    }

    /// Resolves when something else is to be sent. May be dropped and called again at any time.
    pub(super) async fn changed(&mut self) {
        loop {
            let left = self.look.saturating_duration_since(Instant::now());
            let (source, caller) = (&self.source, &self.caller);
            // Attestors may take long over it. What was issued meanwhile does not wait for them.
            let look = async {
                source.clock.sleep(left).await;
                source.attest_again(caller).await
            };
            let looked = tokio::select! {
                changed = self.subscription.state().changed() => match changed {
                    Ok(()) => return,
                    Err(_closed) => std::future::pending().await,
                },
                looked = look => looked,
            };
            if self.is_another(looked) {
                return;
            }
        }
    }

    /// Takes up what another look at the caller told. Says whether something else is to be sent from now on.
    fn is_another(&mut self, looked: Result<Option<Arc<Attested>>, Status>) -> bool {
        let interval = self.source.interval;
        match looked {
            Ok(Some(attested)) => {
                self.look = soon(interval);
                if attested.digest() == self.attested.digest() {
                    return false;
                }
                tracing::info!(
                    pid = self.caller.pid(),
                    "The attributes of a caller have changed: it gets what it may have now"
                );
                self.subscription = self.source.subscribe(&attested);
                self.attested = attested;
                true
            }
            // Somebody who helps to attest is away. That says nothing about the caller.
            Ok(None) => {
                self.look = soon(interval / 4);
                false
            }
            Err(status) => {
                self.ended = Some(Box::new(status));
                true
            }
        }
    }
}

/// After about this time: callers that came together are not looked at together.
fn soon(interval: Duration) -> Instant {
    Instant::now() + interval.mul_f64(0.9 + 0.2 * jitter())
}
