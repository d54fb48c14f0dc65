//! What every call on the socket draws on, whichever protocol it speaks.

use std::sync::Arc;
use std::time::Duration;

use http::Extensions;
use tokio_util::sync::CancellationToken;
use tonic::{Code, Status};

use super::incoming::Caller;
use crate::attest::{Attested, Attestors, Limit, Owner, Permit};
use crate::clock::Clock;
use crate::services::trust::View;
use crate::workload::{Cache, Memo, Selector, Subscription, Tokens};

/// Calls that one user may have open.
const CALLS_PER_USER: usize = 16_384;

/// Where answers come from, and who may ask.
#[derive(Debug)]
pub(super) struct Source {
    pub(super) cache: Cache,
    pub(super) tokens: Tokens,
    /// Bundles and revocations.
    pub(super) view: View,
    /// The messages that hold nothing but these, for all who ask for them.
    pub(super) x509_bundles: Memo,
    pub(super) jwt_bundles: Memo,
    pub(super) attestors: Attestors,
    pub(super) selector: Selector,
    pub(super) ttl: Duration,
    /// About how often callers are looked at again.
    pub(super) interval: Duration,
    pub(super) clock: Clock,
    pub(super) shutdown: CancellationToken,
    pub(super) calls: Limit,
    /// What is known about a caller whom the kernel cannot name.
    pub(super) nobody: Arc<Attested>,
}

impl Source {
    /// The limit of [`Source::calls`].
    pub(super) fn limit() -> Limit {
        Limit::new(CALLS_PER_USER)
    }

    /// Who calls, counted.
    pub(super) fn admit(&self, extensions: &Extensions) -> Result<(Caller, Permit), Box<Status>> {
        let caller = extensions.get::<Caller>().cloned();
        let caller = caller.unwrap_or(Caller::Unknown(Owner::default()));
        let permit = self.count(&caller)?;
        Ok((caller, permit))
    }

    /// Counts one more call of this caller's.
    pub(super) fn count(&self, caller: &Caller) -> Result<Permit, Box<Status>> {
        self.calls.take(caller.owner()).ok_or_else(|| {
            let problem = format!("this user has {CALLS_PER_USER} calls open: close some");
            Box::new(Status::unavailable(problem))
        })
    }

    /// What is known about the caller; nothing about one whom the kernel cannot name.
    pub(super) async fn attest(&self, caller: &Caller) -> Result<Arc<Attested>, Status> {
        match caller {
            Caller::Process(peer) => {
                // The connection looks at the caller before each write, so that two more looks would
                // be for nothing: a tenth of what a call on a warm connection takes.
                if let Some(known) = self.attestors.known(peer) {
                    return Ok(known);
                }
                let found = self.attestors.attest(peer).await;
                found.map_err(|gone| Status::aborted(gone.to_string()))
            }
            Caller::Unknown(_) => Ok(Arc::clone(&self.nobody)),
        }
    }

    /// Passes on an answer to this workload. Attestors hear of a refusal: what they
    /// remember may be out of date.
    pub(super) fn answered<T>(
        &self,
        answer: Result<T, Status>,
        attested: &Attested,
    ) -> Result<T, Status> {
        answer.inspect_err(|status| {
            if status.code() == Code::PermissionDenied {
                self.attestors.nothing_issued(attested.attributes());
            }
        })
    }

    /// What is known about a caller who was attested before. `None` if an attestor failed: what it had
    /// found before may still be so.
    pub(super) async fn attest_again(
        &self,
        caller: &Caller,
    ) -> Result<Option<Arc<Attested>>, Status> {
        match caller {
            // One of the streams of a process looks, the others see what it saw.
            Caller::Process(peer) => self
                .attestors
                .attest_again(peer, self.interval / 2)
                .await
                .map_err(|gone| Status::aborted(gone.to_string())),
            Caller::Unknown(_) => Ok(Some(Arc::clone(&self.nobody))),
        }
    }

    /// The X.509-SVIDs of this workload.
    pub(super) fn subscribe(&self, attested: &Arc<Attested>) -> Subscription {
        self.cache.subscribe(&self.selector, self.ttl, attested)
    }
}
