//! Requests per second of callers that ask one thing after the other.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use tokio::task::JoinSet;

use crate::caller::{connect, fetch, fetch_jwt};

/// How long a rate is taken.
const SPAN: Duration = Duration::from_secs(2);

/// What a caller asks for.
#[derive(Clone, Copy)]
pub(crate) enum Ask {
    /// An X.509-SVID, on a connection that stays.
    Warm,
    /// An X.509-SVID, each on a new connection.
    Cold,
    /// A JWT-SVID for one and the same audience, on a connection that stays.
    Jwt,
}

/// A rate per second, and how long each request took.
pub(crate) struct Measured {
    pub(crate) rate: f64,
    pub(crate) times: Vec<Duration>,
}

pub(crate) async fn measure(socket: &Path, ask: Ask, callers: usize) -> Measured {
    let begun = Instant::now();
    let mut tasks: JoinSet<Vec<Duration>> = JoinSet::new();
    for _ in 0..callers {
        tasks.spawn(call(socket.to_owned(), ask, begun + SPAN));
    }
    let times: Vec<Duration> = tasks.join_all().await.into_iter().flatten().collect();
    let count = u32::try_from(times.len()).expect("few");
    Measured {
        rate: f64::from(count) / begun.elapsed().as_secs_f64(),
        times,
    }
}

async fn call(socket: PathBuf, ask: Ask, until: Instant) -> Vec<Duration> {
    let mut client = connect(&socket).await.expect("a connection");
    let mut times = Vec::new();
    while Instant::now() < until {
        let begun = Instant::now();
        if matches!(ask, Ask::Cold) {
            client = connect(&socket).await.expect("a connection");
        }
        match ask {
            Ask::Warm | Ask::Cold => drop(fetch(&mut client).await.expect("an SVID")),
            Ask::Jwt => drop(fetch_jwt(&mut client).await.expect("a JWT-SVID")),
        }
        times.push(begun.elapsed());
    }
    times
}
