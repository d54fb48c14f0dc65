//! Whether a call may be made at all: a certificate of ours, still good, of a user who exists and
//! is not locked. Answers that last longer than a moment are judged all the time.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::sync::broadcast::error::RecvError;
use tokio_stream::Stream;
use tonic::Status;

use super::blocking;
use super::locks::{self, Targets};
use crate::embedded::ClusterState;
use crate::embedded::caller::{Caller, Listener, TlsIdentity};
use crate::refusal::Refusal;

/// The identity of a caller that may make authorised calls.
///
/// Reads the store: call it where waiting a few milliseconds is fine.
///
/// # Errors
/// Access denied, with the text of an 18.0 cluster.
pub fn authorize(state: &ClusterState, caller: &Caller) -> Result<TlsIdentity, Refusal> {
    let identity = caller
        .identity
        .as_ref()
        .filter(|_| matches!(caller.listener, Listener::Auth | Listener::Nodes))
        .ok_or_else(|| Refusal::denied("access denied: a client certificate is required"))?;
    // A connection may outlive the certificate it was opened with.
    if identity.expires < state.clock.now() {
        return Err(Refusal::denied(
            "access denied: the client certificate has expired",
        ));
    }
    state.store.transaction(|tx| {
        if identity.cluster != state.name || tx.get("user", &identity.user)?.is_none() {
            return Err(Refusal::denied("access denied"));
        }
        locks::check(
            tx,
            &Targets {
                user: &identity.user,
                roles: &identity.roles,
                bot_instance: &identity.bot_instance_id,
                join_token: identity.join_token(),
            },
        )
    })?;
    Ok(identity.clone())
}

/// Waits until `caller` may not make calls any more, and says why.
async fn refused(state: Arc<ClusterState>, caller: Caller) -> Refusal {
    // Certificates are good to the end of their last second.
    const MOMENT: Duration = Duration::from_secs(1);
    // From before the first look, so that nothing is missed in between.
    let mut changes = state.store.changes();
    let end = caller.identity.as_ref().map(|identity| identity.expires);
    loop {
        let (owned, who) = (Arc::clone(&state), caller.clone());
        if let Err(refusal) = blocking(move || authorize(&owned, &who)).await {
            return refusal;
        }
        let changed = async {
            loop {
                match changes.recv().await {
                    Ok(change) if !["lock", "user"].contains(&change.kind.as_str()) => {}
                    Ok(_) | Err(RecvError::Lagged(_)) => return,
                    Err(RecvError::Closed) => std::future::pending().await,
                }
            }
        };
        let expired = async {
            match end {
                Some(end) => state.clock.sleep_until(end + MOMENT).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            () = changed => {}
            () = expired => {}
        }
    }
}

/// A stream that ends with a refusal when its caller is locked, removed, or has a certificate that
/// expired.
pub struct WhileAllowed<T> {
    items: Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>,
    /// `None` once it has refused.
    refused: Option<Pin<Box<dyn Future<Output = Refusal> + Send>>>,
}

impl<T> std::fmt::Debug for WhileAllowed<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("WhileAllowed").finish_non_exhaustive()
    }
}

impl<T> WhileAllowed<T> {
    /// Passes on `items` as long as `caller` may make calls.
    pub fn new(
        state: &Arc<ClusterState>,
        caller: Caller,
        items: impl Stream<Item = Result<T, Status>> + Send + 'static,
    ) -> Self {
        Self {
            items: Box::pin(items),
            refused: Some(Box::pin(refused(Arc::clone(state), caller))),
        }
    }
}

impl<T> Stream for WhileAllowed<T> {
    type Item = Result<T, Status>;

    fn poll_next(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<T, Status>>> {
        let Some(refused) = &mut self.refused else {
            return Poll::Ready(None);
        };
        if let Poll::Ready(refusal) = refused.as_mut().poll(context) {
            self.refused = None;
            return Poll::Ready(Some(Err(refusal.into())));
        }
        self.items.as_mut().poll_next(context)
    }
}
