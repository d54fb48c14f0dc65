//! A thread for each user.
//!
//! What a user's callers cost, in whatever form it comes (connections, calls, frames, attestations), is
//! spent on that user's thread. So the kernel shares the processor among users here as it does among their
//! own processes: one who keeps a thread busy delays nobody whose thread sleeps.

use std::collections::HashMap;
use std::convert::Infallible;
use std::io;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::mpsc::error::TrySendError;
use tokio::sync::mpsc::{Receiver, Sender, channel};
use tokio::time::Instant;
use tokio_util::task::TaskTracker;

use super::door::{self, Arrived};
use super::gate::Gate;
use super::pace;
use super::server::Server;
use crate::attest::Peers;
use crate::backoff::{Loudness, Repeated};

/// Threads at a time. Users beyond share them.
const THREADS: usize = 64;
/// Those of one thread who connected and were not looked at yet.
const WAITING: usize = 1024;
/// With more than so many waiting, a thread rests for a while after it worked for a while. Whoever floods has
/// processes that take processor time too, and is not helped with more.
const CROWD: usize = 64;
const WORK: Duration = Duration::from_micros(500);
const REST: Duration = Duration::from_millis(1);
/// About how long a thread stays without a connection.
const QUIET: Duration = Duration::from_secs(30);
/// After a thread could not be had, the next try.
const RETRY: Duration = Duration::from_secs(1);
/// A thread's stack, in bytes.
const STACK: usize = 1024 * 1024;

/// The threads that run, by user. They end with the last of their connections once this is dropped.
#[derive(Debug)]
pub(super) struct Threads {
    server: Arc<Server>,
    lines: HashMap<Option<u32>, Sender<Arrived>>,
    /// Each thread has one: who holds the other end hears when all ended.
    running: Sender<Infallible>,
    /// When a thread could not be had, and how often in a row.
    refused: Option<Instant>,
    refusals: Repeated,
    gate: Gate,
}

impl Threads {
    /// None runs yet. Nothing is ever sent through `running`; it is closed with the last of them.
    pub(super) fn new(server: Arc<Server>, gate: Gate, running: Sender<Infallible>) -> Self {
        Self {
            server,
            lines: HashMap::new(),
            running,
            refused: None,
            refusals: Repeated::default(),
            gate,
        }
    }

    /// Gives a connection to its user's thread, and says whether a crowd waits for that. Hangs up where too many
    /// wait, and tells the gate who makes them.
    pub(super) fn admit(&mut self, mut arrived: Arrived) -> bool {
        let user = arrived.user();
        loop {
            let Some(line) = self.line(user) else {
                return false;
            };
            match line.try_send(arrived) {
                Ok(()) => {
                    let crowd = line.max_capacity() - line.capacity() > CROWD;
                    if let (true, Some(user)) = (crowd, user) {
                        self.gate.crowded(user);
                    }
                    return crowd;
                }
                Err(TrySendError::Full(_)) => {
                    let what = "Dropping connections of a user of whom too many wait";
                    self.server.dropping(user, what);
                    if let Some(user) = user {
                        self.gate.dropped(user);
                    }
                    return true;
                }
                // It ended since it was looked up.
                Err(TrySendError::Closed(back)) => arrived = back,
            }
        }
    }

    /// Where callers of this user wait; `None` if there is no thread, and none can be had.
    fn line(&mut self, user: Option<u32>) -> Option<&Sender<Arrived>> {
        let runs = |line: &Sender<Arrived>| !line.is_closed();
        if !self.lines.get(&user).is_some_and(runs) {
            self.lines.retain(|_, line| runs(line));
            let soon = self.refused.is_some_and(|at| at.elapsed() < RETRY);
            if self.lines.len() < THREADS && !soon {
                self.start(user);
            }
        }
        let rest = || self.lines.values().max_by_key(|line| line.capacity());
        self.lines.get(&user).or_else(rest)
    }

    /// Starts a thread for this user, if one can be had.
    fn start(&mut self, user: Option<u32>) {
        match start(&self.server, &self.running) {
            Ok(line) => {
                self.refused = None;
                self.refusals.recovered();
                self.lines.insert(user, line);
            }
            Err(source) => {
                let now = Instant::now();
                self.refused = Some(now);
                if let Loudness::Warn = self.refusals.failed(now, &source) {
                    tracing::warn!(%source, "Cannot start a thread for callers of another user");
                }
            }
        }
    }
}

/// Starts a thread; gives the line of those who wait for it.
fn start(server: &Arc<Server>, running: &Sender<Infallible>) -> io::Result<Sender<Arrived>> {
    let (line, arrivals) = channel(WAITING);
    let (server, running) = (Arc::clone(server), running.clone());
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .on_thread_park(pace::turned)
        .on_thread_unpark(pace::turned)
        // Those that open files and read them.
        .on_thread_start(pace::with_others)
        .build()?;
    std::thread::Builder::new()
        .name("tbot-callers".to_owned())
        .stack_size(STACK)
        .spawn(move || {
            pace::before_others(door::PRIORITY);
            runtime.block_on(serve(&server, arrivals));
            // What still runs is a look at a program's file that nobody waits for.
            runtime.shutdown_background();
            drop(running);
        })?;
    Ok(line)
}

/// Serves all who come, until nobody comes any more and the last connection is closed.
pub(super) async fn serve(server: &Arc<Server>, mut arrivals: Receiver<Arrived>) {
    let mut rested = Instant::now();
    let mut peers = Peers::default();
    let served = TaskTracker::new();
    let mut quiet = pin!(server.clock().sleep(QUIET));
    loop {
        tokio::select! {
            biased;
            () = server.gone() => return,
            arrived = arrivals.recv() => {
                let Some(arrived) = arrived else { break };
                if let Some(connection) = server.connection(arrived, &mut peers) {
                    served.spawn(Arc::clone(server).serve(connection));
                }
                // Who is served already has a turn between any two who come.
                tokio::task::yield_now().await;
                if arrivals.len() > CROWD {
                    pace::crowded();
                    if rested.elapsed() > WORK {
                        // All of the thread: it is this user's.
                        std::thread::sleep(REST);
                        rested = Instant::now();
                    }
                }
            }
            () = &mut quiet => {
                if served.is_empty() {
                    arrivals.close();
                }
                quiet.set(server.clock().sleep(QUIET));
            }
        }
    }
    served.close();
    tokio::select! {
        () = server.gone() => {}
        () = served.wait() => {}
    }
}
