//! Streams of changes (`WatchEvents`), from the event that each begins with.

use std::time::Duration;

use futures_util::stream::BoxStream;
use futures_util::{Stream, StreamExt as _};

use super::ClusterError;
use crate::pb::proto::{Event, Operation};

/// The longest wait for the first event.
const INIT: Duration = Duration::from_secs(30);

/// The time between two messages of a stream that are read. A cluster that changes has a few now and
/// then; one that sends without a pause is held back by flow control instead of keeping us busy.
const PACE: Duration = Duration::from_millis(20);

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
            first if first.r#type == Operation::Init as i32 => Ok(paced(events)),
            _ => Err(EventsError::NoInit),
        }
    };
    tokio::time::timeout(INIT, open)
        .await
        .map_err(|_elapsed| EventsError::NoInit)?
}

/// The same stream, read no faster than one message each [`PACE`].
pub(crate) fn paced<T: 'static>(
    stream: impl Stream<Item = T> + Send + 'static,
) -> BoxStream<'static, T> {
    tokio_stream::StreamExt::throttle(stream, PACE).boxed()
}

/// The next event.
pub async fn next(events: &mut Events) -> Result<Event, EventsError> {
    Ok(events.next().await.ok_or(EventsError::Closed)??)
}

#[cfg(test)]
mod tests {
    use futures_util::stream;

    use super::*;

    fn event(kind: Operation) -> Event {
        Event {
            r#type: kind.into(),
            ..Event::default()
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_flood_is_read_at_our_own_pace() {
        let flood = stream::once(async { Ok(event(Operation::Init)) })
            .chain(stream::repeat_with(|| Ok(event(Operation::Put))))
            .boxed();
        let mut events = begun(async { Ok(flood) }).await.unwrap();
        let mut count = 0;
        let read = async {
            loop {
                next(&mut events).await.unwrap();
                count += 1;
            }
        };
        let minute = tokio::time::timeout(Duration::from_secs(60), read);
        assert!(minute.await.is_err());
        assert!((2900..=3001).contains(&count), "{count}");
    }

    #[tokio::test(start_paused = true)]
    async fn a_stream_that_does_not_begin_is_given_up() {
        let silent = stream::pending().boxed();
        let began = tokio::time::Instant::now();
        let error = begun(async { Ok(silent) }).await.err().unwrap();
        assert!(matches!(error, EventsError::NoInit), "{error}");
        assert_eq!(began.elapsed(), INIT);
        let other = stream::repeat_with(|| Ok(event(Operation::Put))).boxed();
        let error = begun(async { Ok(other) }).await.err().unwrap();
        assert!(matches!(error, EventsError::NoInit), "{error}");
    }
}
