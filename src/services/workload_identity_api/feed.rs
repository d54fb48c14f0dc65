//! Streams whose every message is the whole state, sent anew with each change.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::StreamExt as _;
use futures_util::stream::{self, BoxStream};
use tonic::Status;

use super::incoming::Caller;
use super::source::Source;
use crate::attest::Permit;
use crate::services::trust::View;
use crate::workload::{Bundles, Crl};

/// The longest a call waits for its first message, attestation aside.
pub(super) const PATIENCE: Duration = Duration::from_secs(10);

/// What one kind of stream adds to bundles and revocations.
pub(super) trait Content: Send + 'static {
    /// Whether the message holds the revocation list: it is sent anew with the list, and the first
    /// waits for the list a moment.
    const REVOCATIONS: bool = true;
    /// Resolves when the content changed. May be dropped and called again at any time.
    fn changed(&mut self) -> impl Future<Output = ()> + Send;
    /// The message for the current state, encoded; `None` while there is none to send.
    fn packet(
        &mut self,
        source: &Source,
        bundles: &Arc<Bundles>,
        crl: Option<&Bytes>,
    ) -> Result<Option<Bytes>, Box<Status>>;
    /// What is missing while [`Content::packet`] gives none.
    fn missing(&self) -> &'static str;
}

/// A stream to one caller.
pub(super) struct Feed<C> {
    source: Arc<Source>,
    view: View,
    content: C,
    caller: Caller,
    /// What was sent last: nothing is said twice.
    sent: Bytes,
    _permit: Permit,
}

/// Encoded messages, then perhaps a status.
pub(super) type Packets = BoxStream<'static, Result<Bytes, Status>>;

impl<C: Content> Feed<C> {
    pub(super) fn new(source: Arc<Source>, content: C, caller: Caller, permit: Permit) -> Self {
        Self {
            view: source.view.clone(),
            source,
            content,
            caller,
            sent: Bytes::new(),
            _permit: permit,
        }
    }

    /// Waits a while for the first message, and gives the stream that begins with it.
    pub(super) async fn start(mut self) -> Result<Packets, Status> {
        let clock = self.source.clock.clone();
        // An answer that is there needs no timer.
        let first = tokio::select! {
            biased;
            first = self.first() => first.map_err(|status| *status)?,
            () = clock.sleep(PATIENCE) => return Err(Status::unavailable(self.what_is_missing())),
        };
        let rest = stream::unfold(Some(self), |feed| async move {
            let mut feed = feed?;
            match feed.next().await {
                Some(Ok(packet)) => Some((Ok(packet), Some(feed))),
                Some(Err(status)) => Some((Err(*status), None)),
                None => None,
            }
        });
        let first = stream::once(std::future::ready(Ok(first)));
        Ok(first.chain(rest).boxed())
    }

    fn what_is_missing(&self) -> String {
        let missing = if self.view.bundles().is_none() {
            "the trust bundle: the agent is still joining, or cannot reach its cluster"
        } else {
            self.content.missing()
        };
        format!("not ready yet: waiting for {missing}")
    }

    async fn first(&mut self) -> Result<Bytes, Box<Status>> {
        loop {
            if let Some(packet) = self.packet()? {
                return Ok(packet);
            }
            self.change().await?;
        }
    }

    /// The next message; `None` when the caller is gone.
    async fn next(&mut self) -> Option<Result<Bytes, Box<Status>>> {
        loop {
            let caller = self.caller.clone();
            tokio::select! {
                biased;
                () = caller.gone() => return None,
                changed = self.change() => if let Err(status) = changed {
                    return Some(Err(status));
                },
            }
            if let Some(packet) = self.packet().transpose() {
                return Some(packet);
            }
        }
    }

    /// The message for the current state; `None` if there is none, or it was sent.
    fn packet(&mut self) -> Result<Option<Bytes>, Box<Status>> {
        let (Some(bundles), crl) = self.view.look() else {
            return Ok(None);
        };
        if C::REVOCATIONS && crl == Crl::Pending {
            return Ok(None);
        }
        let packet = self.content.packet(&self.source, &bundles, crl.der())?;
        let Some(packet) = packet.filter(|packet| *packet != self.sent) else {
            return Ok(None);
        };
        self.sent = packet.clone();
        Ok(Some(packet))
    }

    /// Waits for any change.
    async fn change(&mut self) -> Result<(), Box<Status>> {
        let stopping = || Box::new(Status::unavailable("the agent is stopping"));
        tokio::select! {
            changed = self.view.changed(C::REVOCATIONS) => changed.map_err(|_closed| stopping()),
            () = self.content.changed() => Ok(()),
            () = self.source.shutdown.cancelled() => Err(stopping()),
        }
    }
}
