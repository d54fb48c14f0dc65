//! Many streams that stay open.

use std::path::Path;
use std::time::{Duration, Instant};

use tbot::pb::workload_api::X509svidResponse;
use tokio::task::JoinSet;
use tonic::Streaming;

use crate::caller::{Client, connect, fetch};

/// Streams of one connection.
const TOGETHER: usize = 500;
/// How long a renewal may take to reach everybody.
const PATIENCE: Duration = Duration::from_secs(60);

/// Open streams, each past its first message.
pub(crate) struct Held(Vec<(Client, Vec<Streaming<X509svidResponse>>)>);

pub(crate) async fn hold(socket: &Path, count: usize) -> Held {
    let mut held = Vec::new();
    for _ in 0..count / TOGETHER {
        let mut client = connect(socket).await.expect("a connection");
        let mut streams = Vec::new();
        for _ in 0..TOGETHER {
            streams.push(fetch(&mut client).await.expect("an SVID").1);
        }
        held.push((client, streams));
    }
    Held(held)
}

/// From the first stream that hears of what `trigger` sets off to the last.
pub(crate) async fn fan_out(held: Held, trigger: impl FnOnce()) -> Duration {
    let mut waiting: JoinSet<(Instant, Streaming<X509svidResponse>)> = JoinSet::new();
    let mut clients = Vec::new();
    for (client, streams) in held.0 {
        clients.push(client);
        for mut stream in streams {
            waiting.spawn(async move {
                let message = stream.message().await.expect("a stream");
                assert!(message.is_some(), "a stream ended");
                (Instant::now(), stream)
            });
        }
    }
    trigger();
    let heard = tokio::time::timeout(PATIENCE, waiting.join_all()).await;
    let heard = heard.expect("everybody hears of a renewal");
    let times = heard.iter().map(|(at, _)| *at);
    let first = times.clone().min().expect("streams");
    times.max().expect("streams") - first
}
