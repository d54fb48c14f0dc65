//! Streams of changes (`WatchEvents`), from the event that each begins with.

use std::time::Duration;

use futures_util::StreamExt as _;
use futures_util::stream::BoxStream;

use super::ClusterError;
use crate::pb::proto::{Event, Operation};

/// The longest wait for the first event.
const INIT: Duration = Duration::from_secs(30);

/// A stream of changes.
pub type Events = BoxStream<'static, Result<Event, ClusterError>>;

/// Why there are no more events.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum EventsError {
    /// The call failed.
    #[error(transparent)]
    Cluster(#[from] ClusterError),
    /// The stream ended.
    #[error("the cluster closed the stream of changes")]
    Closed,
    /// Something else came first, or nothing in time.
    #[error("the cluster's stream of changes does not begin as it should")]
    NoInit,
}

/// The stream that `opening` gives, after the event which says that from now on nothing is missed.
pub async fn begun(
    opening: impl Future<Output = Result<Events, ClusterError>>,
) -> Result<Events, EventsError> {
    let open = async {
        let mut events = opening.await?;
        match next(&mut events).await? {
            first if first.r#type == Operation::Init as i32 => Ok(events),
            _ => Err(EventsError::NoInit),
        }
    };
    tokio::time::timeout(INIT, open)
        .await
        .map_err(|_elapsed| EventsError::NoInit)?
}

/// The next event.
pub async fn next(events: &mut Events) -> Result<Event, EventsError> {
    Ok(events.next().await.ok_or(EventsError::Closed)??)
}
