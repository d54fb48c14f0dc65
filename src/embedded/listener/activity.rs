//! Whether calls are in flight on a connection, so that one without any can be closed.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use hyper::body::{Body, Frame, SizeHint};
use tokio::sync::watch;

/// Counts the calls of one connection; clones share the count.
#[derive(Debug, Clone)]
pub(super) struct Activity(Arc<watch::Sender<usize>>);

/// A call in flight; dropping it ends the call.
#[derive(Debug)]
pub(super) struct Call(Activity);

impl Activity {
    pub(super) fn new() -> Self {
        Self(Arc::new(watch::Sender::new(0)))
    }

    /// Counts a call.
    pub(super) fn begin(&self) -> Call {
        self.0.send_modify(|calls| *calls += 1);
        Call(self.clone())
    }

    /// Returns when no call has been in flight for `patience` without a break.
    pub(super) async fn idle(&self, patience: Duration) {
        let mut calls = self.0.subscribe();
        loop {
            let busy = *calls.borrow_and_update() > 0;
            // The sender is held here, so that waiting for it does not fail.
            if busy {
                drop(calls.changed().await);
            } else if tokio::time::timeout(patience, calls.changed())
                .await
                .is_err()
            {
                return;
            }
        }
    }
}

impl Drop for Call {
    fn drop(&mut self) {
        self.0
            .0
            .send_modify(|calls| *calls = calls.saturating_sub(1));
    }
}

/// The body of an answer: its call lasts until it is sent or given up.
#[derive(Debug)]
pub(super) struct Answer<B> {
    pub(super) body: B,
    pub(super) _call: Call,
}

impl<B: Body + Unpin> Body for Answer<B> {
    type Data = B::Data;
    type Error = B::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<B::Data>, B::Error>>> {
        Pin::new(&mut self.body).poll_frame(context)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

#[cfg(test)]
mod tests {
    use tokio::time::Instant;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn patience_begins_anew_after_each_call() {
        let activity = Activity::new();
        let begun = Instant::now();
        let calls = activity.clone();
        let caller = tokio::spawn(async move {
            tokio::time::sleep(Duration::from_secs(50)).await;
            let call = calls.begin();
            tokio::time::sleep(Duration::from_secs(1000)).await;
            drop(call);
        });
        activity.idle(Duration::from_secs(60)).await;
        assert_eq!(begun.elapsed().as_secs(), 50 + 1000 + 60);
        caller.await.unwrap();
    }
}
