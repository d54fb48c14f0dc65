//! Streams whose every message is the whole state, sent anew with each change.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::StreamExt as _;
use futures_util::stream::{self, BoxStream};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tonic::{Response, Status};

use super::incoming::Caller;
use super::limits::Permit;
use crate::clock::Clock;
use crate::workload::{Bundles, Crl};

/// The longest a call waits for its first message, attestation aside.
pub(super) const PATIENCE: Duration = Duration::from_secs(10);

/// What one kind of stream adds to bundles and revocations.
pub(super) trait Content: Send + 'static {
    type Message: Send;
    /// Whether the message holds the revocation list: it is sent anew with the list, and the first
    /// waits for the list a moment.
    const REVOCATIONS: bool = true;
    /// Resolves when the content changed.
    fn changed(&mut self) -> impl Future<Output = ()> + Send;
    /// The message for the current state; `None` while there is none to send.
    fn message(
        &mut self,
        bundles: &Bundles,
        crl: Vec<Bytes>,
        clock: &Clock,
    ) -> Result<Option<Self::Message>, Box<Status>>;
    /// What is missing while [`Content::message`] gives none.
    fn missing(&self) -> &'static str;
}

/// A stream of messages, each the whole state.
pub(super) struct Feed<C> {
    pub(super) content: C,
    pub(super) bundles: watch::Receiver<Option<Arc<Bundles>>>,
    pub(super) crl: watch::Receiver<Crl>,
    pub(super) caller: Caller,
    pub(super) clock: Clock,
    pub(super) shutdown: CancellationToken,
    pub(super) _permit: Permit,
}

pub(super) type Messages<M> = BoxStream<'static, Result<M, Status>>;

impl<C: Content> Feed<C> {
    /// Waits a while for the first message, and gives the stream that begins with it.
    pub(super) async fn start(mut self) -> Result<Response<Messages<C::Message>>, Status> {
        let clock = self.clock.clone();
        let first = tokio::select! {
            first = self.first() => first?,
            () = clock.sleep(PATIENCE) => return Err(Status::unavailable(self.what_is_missing())),
        };
        let rest = stream::unfold(Some(self), |feed| async move {
            let mut feed = feed?;
            match feed.next().await {
                Some(Ok(message)) => Some((Ok(message), Some(feed))),
                Some(Err(status)) => Some((Err(*status), None)),
                None => None,
            }
        });
        let first = stream::once(async move { Ok(first) });
        Ok(Response::new(first.chain(rest).boxed()))
    }

    fn what_is_missing(&self) -> String {
        let missing = if self.bundles.borrow().is_none() {
            "the trust bundle: the agent is still joining, or cannot reach its cluster"
        } else {
            self.content.missing()
        };
        format!("not ready yet: waiting for {missing}")
    }

    async fn first(&mut self) -> Result<C::Message, Status> {
        loop {
            if let Some(message) = self.message().map_err(|status| *status)? {
                if !self.caller.is_alive() {
                    return Err(Status::aborted("the calling process has ended"));
                }
                return Ok(message);
            }
            self.change().await.map_err(|status| *status)?;
        }
    }

    /// The next message; `None` when the caller is gone.
    async fn next(&mut self) -> Option<Result<C::Message, Box<Status>>> {
        loop {
            let caller = self.caller.clone();
            tokio::select! {
                biased;
                () = caller.gone() => return None,
                changed = self.change() => if let Err(status) = changed {
                    return Some(Err(status));
                },
            }
            if let Some(message) = self.message().transpose() {
                return Some(message);
            }
        }
    }

    fn message(&mut self) -> Result<Option<C::Message>, Box<Status>> {
        let Some(bundles) = self.bundles.borrow_and_update().clone() else {
            return Ok(None);
        };
        let crl = match &*self.crl.borrow_and_update() {
            Crl::Pending if C::REVOCATIONS => return Ok(None),
            crl => crl.der().cloned().into_iter().collect(),
        };
        self.content.message(&bundles, crl, &self.clock)
    }

    /// Waits for any change.
    async fn change(&mut self) -> Result<(), Box<Status>> {
        let stopping = || Box::new(Status::unavailable("the agent is stopping"));
        tokio::select! {
            changed = self.bundles.changed() => changed.map_err(|_closed| stopping()),
            changed = self.crl.changed(), if C::REVOCATIONS => changed.map_err(|_closed| stopping()),
            () = self.content.changed() => Ok(()),
            () = self.shutdown.cancelled() => Err(stopping()),
        }
    }
}
