//! Requests per second of callers that ask one thing after the other.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
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

/// The rate of callers who connect for each request, each a process of its own: an agent has to find out about
/// each of them.
pub(crate) fn measure_processes(socket: &Path, callers: usize) -> f64 {
    let program = std::env::current_exe().expect("this program");
    let caller = |_| {
        let mut command = Command::new(&program);
        let command = command.arg("--caller").arg(socket).stdout(Stdio::piped());
        command.spawn().expect("a caller")
    };
    let callers: Vec<_> = (0..callers).map(caller).collect();
    let rates = callers.into_iter().map(|caller| {
        let output = caller.wait_with_output().expect("an end");
        let text = String::from_utf8(output.stdout).expect("a text");
        text.trim().parse::<f64>().expect("a rate")
    });
    rates.sum()
}

/// One of those processes.
pub(crate) async fn be_a_caller(socket: &Path) {
    println!("{}", measure(socket, Ask::Cold, 1).await.rate);
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
