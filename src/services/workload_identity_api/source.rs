//! What every call on the socket draws on, whichever protocol it speaks.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tonic::{Code, Request, Status};

use super::feed::{Content, Feed};
use super::incoming::Caller;
use super::limits::{Limit, Permit};
use crate::attest::Attestors;
use crate::clock::Clock;
use crate::pb::teleport::workloadidentity::v1::WorkloadAttrs;
use crate::workload::{Bundles, Cache, Crl, JwtIssuer, Selector, Subscription};

/// Calls that one user may have open.
const CALLS_PER_USER: usize = 16_384;

/// Where answers come from, and who may ask.
#[derive(Debug)]
pub(super) struct Source {
    pub(super) cache: Cache,
    pub(super) jwt: JwtIssuer,
    pub(super) bundles: watch::Receiver<Option<Arc<Bundles>>>,
    pub(super) crl: watch::Receiver<Crl>,
    pub(super) attestors: Attestors,
    pub(super) selector: Selector,
    pub(super) ttl: Duration,
    pub(super) clock: Clock,
    pub(super) shutdown: CancellationToken,
    pub(super) calls: Limit,
}

impl Source {
    /// The limit of [`Source::calls`].
    pub(super) fn limit() -> Limit {
        Limit::new(CALLS_PER_USER)
    }

    /// Who calls, counted.
    pub(super) fn admit<T>(&self, request: &Request<T>) -> Result<(Caller, Permit), Box<Status>> {
        let caller = request
            .extensions()
            .get::<Caller>()
            .cloned()
            .unwrap_or(Caller::Unknown);
        let permit = self.calls.take(caller.user()).ok_or_else(|| {
            Status::unavailable(format!(
                "this user has {CALLS_PER_USER} calls open: close some"
            ))
        })?;
        Ok((caller, permit))
    }

    /// What is known about the caller; nothing about one whom the kernel cannot name.
    pub(super) async fn attributes(&self, caller: &Caller) -> Result<Arc<WorkloadAttrs>, Status> {
        match caller {
            Caller::Process(peer) => self
                .attestors
                .attest(peer)
                .await
                .map_err(|gone| Status::aborted(gone.to_string())),
            Caller::Unknown => Ok(Arc::default()),
        }
    }

    /// Passes on an answer to a workload with these attributes. Attestors hear of a refusal: what they
    /// remember may be out of date.
    pub(super) fn answered<T>(
        &self,
        answer: Result<T, Status>,
        attributes: &WorkloadAttrs,
    ) -> Result<T, Status> {
        answer.inspect_err(|status| {
            if status.code() == Code::PermissionDenied {
                self.attestors.nothing_issued(attributes);
            }
        })
    }

    /// The SVIDs for a workload with these attributes.
    pub(super) fn subscribe(&self, attributes: &WorkloadAttrs) -> Subscription {
        self.cache.subscribe(&self.selector, self.ttl, attributes)
    }

    /// A stream of `content` to `caller`.
    pub(super) fn feed<C: Content>(&self, content: C, caller: Caller, permit: Permit) -> Feed<C> {
        Feed {
            content,
            bundles: self.bundles.clone(),
            crl: self.crl.clone(),
            caller,
            clock: self.clock.clone(),
            shutdown: self.shutdown.clone(),
            _permit: permit,
        }
    }
}
