//! JWT-SVIDs while they are young: asked for again and again for the same audiences, a token is
//! handed out until half of its life is over.
//!
//! Nothing is renewed that nobody asks for. Who asks late waits for a fresh token; if the cluster
//! cannot be reached, the old one serves almost to its end. What to do for a caller is decided by
//! [`Slot::look`], a pure function. What was issued stays on the [`Shelf`] too, for the same process to
//! come back to when the agent was restarted.
//!
//! Whoever asks for ever more audiences takes neither the memory (`table.rs`) of others nor their turns.

mod table;

use std::collections::HashSet;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use tokio::runtime::Handle;
use tokio::sync::watch;
use tokio::time::Instant;

use self::table::Table;
use super::issue::IssueError;
use super::jwt::{JwtSvid, TokenIssuer};
use super::outcome::Failures;
use super::selector::Selector;
use super::shelf::{self, Holder, Mark, Shelf};
use super::turns::Turns;
use crate::attest::Attested;
use crate::backoff::Backoff;
use crate::clock::Clock;
use crate::crypto::{jitter, sha256};
use crate::pb::teleport::workloadidentity::v1::WorkloadAttrs;

/// Requests of one user that run or wait for their turn.
const WAITING: usize = 512;
/// How long tokens are kept for somebody who does not ask for them.
const IDLE: Duration = Duration::from_mins(10);
/// About what a slot takes besides texts, in bytes.
const OVERHEAD: usize = 512;
/// How long a failure answers for the cluster.
const FAILURE_KEPT: Duration = Duration::from_secs(1);
/// The longest that a caller waits for a fresh token while an old one would do.
const WITH_FALLBACK: Duration = Duration::from_secs(2);
/// First and longest wait between attempts while an old token would do.
const BACKOFF: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(60));
/// How much of a token's life a caller gets at least, as a part and at most.
const REST: (u32, Duration) = (10, Duration::from_mins(1));

/// The tokens of one answer. Immutable; share it with `Arc`.
#[derive(Debug)]
pub struct Issued {
    /// At least one, in the cluster's order; hints are unique.
    pub svids: Vec<JwtSvid>,
    /// How often all had been asked to renew when the cluster was asked.
    renewed: u64,
    /// Until when they are handed out while the cluster can be reached.
    fresh_until: SystemTime,
    /// Until when they are handed out at all.
    usable_until: SystemTime,
    message: OnceLock<Bytes>,
}

impl Issued {
    fn new(svids: Vec<JwtSvid>, asked: SystemTime, renewed: u64) -> Self {
        let end = svids.iter().map(|svid| svid.not_after).min();
        let end = end.unwrap_or(asked);
        let life = end.duration_since(asked).unwrap_or_default();
        Self {
            svids,
            renewed,
            fresh_until: asked + life / 2,
            usable_until: end - (life / REST.0).min(REST.1),
            message: OnceLock::new(),
        }
    }

    /// The message that everybody gets who asks for all of them, made once.
    pub fn message(&self, make: impl FnOnce(&[JwtSvid]) -> Bytes) -> Bytes {
        self.message.get_or_init(|| make(&self.svids)).clone()
    }
}

/// JWT-SVIDs of one service: one selector, one life. Cloning shares them.
#[derive(Debug, Clone)]
pub struct Tokens(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    issuer: Arc<dyn TokenIssuer>,
    selector: Selector,
    ttl: Duration,
    clock: Clock,
    turns: Turns,
    shelf: Shelf,
    /// Where requests are sent. Callers have runtimes of their own, which end: connections to the cluster
    /// are shared, and would end with that of whoever was first to use them.
    runtime: Handle,
    renewed: Mutex<Renewed>,
    table: Mutex<Table>,
    failures: Mutex<Failures>,
}

/// How often all were asked to renew, and when last. What is asked for counts, and no wall time is
/// compared: clocks are set back.
#[derive(Debug, Default, Clone, Copy)]
struct Renewed {
    times: u64,
    last: Option<SystemTime>,
}

/// One audience set of one workload.
#[derive(Debug)]
struct Slot {
    /// Sorted, each once.
    audiences: Vec<String>,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    used: SystemTime,
    held: Option<Arc<Issued>>,
    /// When the last request failed, and how. No wall time: a clock that is set back prolongs no failure.
    failed: Option<(Instant, IssueError)>,
    /// Not before then is the cluster asked again while `held` would do.
    retry: Instant,
    backoff: Backoff,
    /// The request that is under way. Whoever waits for its end has a receiver.
    flight: Weak<watch::Sender<()>>,
}

/// Who asks.
#[derive(Debug)]
struct Caller {
    came: Instant,
    /// Whether a request has ended that was begun since. Its answer is good enough, whatever came between:
    /// asking again and again would end with nobody's patience but the cluster's.
    heard: bool,
}

/// What a caller is told.
#[derive(Debug)]
enum Answer {
    Serve(Arc<Issued>),
    Fail(IssueError),
    /// A request is under way.
    Wait(Waiting),
    /// A request is to be sent. It is under way until the sender is dropped.
    Ask(Arc<watch::Sender<()>>, Waiting),
}

/// What a caller waits for.
#[derive(Debug)]
struct Waiting {
    /// Nothing is ever sent: it ends with the sender.
    flight: watch::Receiver<()>,
    /// With this, it is not waited for long.
    fallback: Option<Arc<Issued>>,
}

impl Tokens {
    /// Keeps what `issuer` issues by `selector` with a wished life of `ttl`; what is on `shelf` serves
    /// whom it was issued to. Must be called inside the runtime of the service.
    pub fn new(
        issuer: Arc<dyn TokenIssuer>,
        selector: Selector,
        ttl: Duration,
        clock: Clock,
        shelf: Shelf,
    ) -> Self {
        Self(Arc::new(Inner {
            issuer,
            selector,
            ttl,
            clock,
            turns: Turns::new(WAITING),
            shelf,
            runtime: Handle::current(),
            renewed: Mutex::default(),
            table: Mutex::default(),
            failures: Mutex::default(),
        }))
    }

    /// Tokens of this workload for exactly these audiences. May wait for as long as the cluster
    /// takes to answer.
    pub async fn get(
        &self,
        attested: &Arc<Attested>,
        mut audiences: Vec<String>,
    ) -> Result<Arc<Issued>, IssueError> {
        audiences.sort_unstable();
        audiences.dedup();
        let clock = &self.0.clock;
        let mut caller = Caller {
            came: Instant::now(),
            heard: false,
        };
        let known = self.0.table().get(attested, &audiences);
        let slot = match known {
            Some(slot) => slot,
            None => self.0.begin(attested, audiences, clock.now()),
        };
        // Whether the request that is under way was begun since; every one after the first was.
        let mut since = false;
        loop {
            let renewed = self.0.renewed().times;
            let mut waiting = match slot.look(clock.now(), renewed, &caller) {
                Answer::Serve(issued) => return Ok(issued),
                Answer::Fail(error) => return Err(error),
                Answer::Wait(waiting) => waiting,
                Answer::Ask(flying, waiting) => {
                    since = true;
                    self.ask(Arc::clone(attested), Arc::clone(&slot), flying);
                    waiting
                }
            };
            match waiting.fallback {
                None => {
                    let _ended = waiting.flight.changed().await;
                }
                Some(fallback) => tokio::select! {
                    _ended = waiting.flight.changed() => {}
                    () = clock.sleep(WITH_FALLBACK) => return Ok(fallback),
                },
            }
            caller.heard = since;
            since = true;
        }
    }

    /// Sends a request when the user's turn has come, if somebody still waits for it then. Once sent,
    /// it does not end with the caller who wanted it.
    fn ask(&self, attested: Arc<Attested>, slot: Arc<Slot>, flying: Arc<watch::Sender<()>>) {
        let inner = Arc::clone(&self.0);
        self.0.runtime.spawn(async move {
            let turn = tokio::select! {
                biased;
                () = flying.closed() => return,
                turn = inner.turns.next(attested.user()) => turn,
            };
            let asked = inner.clock.now();
            let renewed = inner.renewed().times;
            let outcome = match &turn {
                Some(_turn) => inner.issue(&attested, &slot.audiences).await,
                None => Err(IssueError::Unavailable(format!(
                    "this user waits for {WAITING} other JWT-SVIDs: try again"
                ))),
            };
            drop(turn);
            inner.tell(attested.attributes(), &outcome);
            inner.keep(&attested, &slot.audiences, asked, &outcome);
            slot.finish(outcome, asked, renewed);
            inner.table().weigh(&attested, &slot);
        });
    }

    /// Hands out nothing of what is held as long as the cluster can be asked: its keys or the
    /// operator's wish changed.
    pub fn renew_all(&self) {
        {
            let mut renewed = self.0.renewed();
            renewed.times += 1;
            renewed.last = Some(self.0.clock.now());
        }
        let now = Instant::now();
        for slot in self.0.table().slots() {
            slot.state().retry = now;
        }
    }

    /// Forgets what nobody asked for lately, and what was for processes that have ended, until the
    /// future is dropped.
    pub async fn run(&self) {
        let inner = &self.0;
        loop {
            inner.clock.sleep(IDLE / 10).await;
            let processes = inner.table().processes();
            // Looking at thousands of processes takes a while.
            let ended = tokio::task::spawn_blocking(|| {
                let processes = processes.into_iter();
                processes
                    .filter(|process| !process.is_running())
                    .collect::<HashSet<_>>()
            });
            let ended = ended.await.unwrap_or_default();
            let idle = inner.clock.now() - IDLE;
            inner.table().sweep(idle, &ended);
        }
    }

    /// How many audience sets of how many workloads are kept.
    #[cfg(test)]
    fn len(&self) -> (usize, usize) {
        self.0.table().len()
    }
}

impl Inner {
    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn renewed(&self) -> MutexGuard<'_, Renewed> {
        self.renewed.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A slot for what was not asked for lately, with what is on the shelf.
    fn begin(&self, attested: &Attested, audiences: Vec<String>, now: SystemTime) -> Arc<Slot> {
        // Checking what is there takes a while; others are not held up for it.
        let held = self.shelved(attested, &audiences, now);
        let slot = Slot::new(audiences, held, now);
        self.table().add(attested, slot)
    }

    /// What an earlier agent, or this one a while ago, was given for this process.
    fn shelved(
        &self,
        attested: &Attested,
        audiences: &[String],
        now: SystemTime,
    ) -> Option<Arc<Issued>> {
        attested.process()?;
        let mark = self.mark(attested, audiences);
        let kept = self.shelf.tokens(&mark, audiences, now)?;
        let Renewed { times, last } = *self.renewed();
        // Nothing but its time tells whether all were to renew since. A clock that was set back makes
        // this wrong at most once: what is then issued is counted.
        let outdated = last.is_some_and(|last| kept.asked < last);
        let renewed = times - u64::from(outdated);
        let issued = Issued::new(kept.svids.clone(), kept.asked, renewed);
        Some(Arc::new(issued))
    }

    /// Asks the cluster. An answer with nothing in it is a refusal.
    async fn issue(
        &self,
        attested: &Attested,
        audiences: &[String],
    ) -> Result<Vec<JwtSvid>, IssueError> {
        let (selector, attributes) = (&self.selector, attested.attributes());
        let asked = self.issuer.issue(selector, self.ttl, attributes, audiences);
        let svids = asked.await?;
        if svids.is_empty() {
            let why =
                "no workload identity with the selector's labels may be issued to this workload";
            return Err(IssueError::Refused(why.to_owned()));
        }
        Ok(svids)
    }

    /// Logs that nothing was issued; each JWT-SVID is logged where it is.
    fn tell(&self, attributes: &WorkloadAttrs, outcome: &Result<Vec<JwtSvid>, IssueError>) {
        let mut failures = self.failures.lock().unwrap_or_else(PoisonError::into_inner);
        match outcome {
            Ok(_) => failures.succeeded(attributes),
            Err(error) => failures.tell_failure(attributes, "jwt-svid", error),
        }
    }

    /// Puts an answer of the cluster on the shelf. A refusal takes away all that the workload has, here and
    /// there: the cluster decides by who asks, never by the audiences.
    fn keep(
        &self,
        attested: &Attested,
        audiences: &[String],
        asked: SystemTime,
        outcome: &Result<Vec<JwtSvid>, IssueError>,
    ) {
        let holder = Holder::of(attested);
        match (outcome, holder) {
            (Ok(svids), Some(holder)) => {
                let svids = svids.clone();
                let tokens = shelf::Tokens { asked, svids };
                let mark = self.mark(attested, audiences);
                self.shelf.put_tokens(mark, holder, tokens);
            }
            (Err(IssueError::Refused(_)), _) => {
                if let Some(holder) = holder {
                    self.shelf.withdraw_tokens_of(&holder);
                }
                self.table().withdraw(attested);
            }
            (Ok(_) | Err(IssueError::Unavailable(_) | IssueError::Answer(_)), _) => {}
        }
    }

    /// What makes two requests the same, for what is kept across restarts.
    fn mark(&self, attested: &Attested, audiences: &[String]) -> Mark {
        let who = attested.digest();
        // Formatted for debugging, texts are quoted: no two requests look the same.
        let what = format!("{:?} {:?} {who:?} {audiences:?}", self.selector, self.ttl);
        sha256(what.as_bytes())
    }
}

impl Slot {
    fn new(audiences: Vec<String>, held: Option<Arc<Issued>>, now: SystemTime) -> Self {
        Self {
            audiences,
            state: Mutex::new(State {
                used: now,
                held,
                failed: None,
                retry: Instant::now(),
                backoff: Backoff::new(BACKOFF.0, BACKOFF.1),
                flight: Weak::new(),
            }),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn used(&self) -> SystemTime {
        self.state().used
    }

    /// About how much memory it takes.
    fn bytes(&self) -> usize {
        let audiences: usize = self.audiences.iter().map(String::len).sum();
        let held = self.state().held.clone();
        let svids = held.iter().flat_map(|held| &held.svids);
        // The message that is made of them holds them again.
        let tokens: usize = svids.map(|svid| 2 * svid.token.len()).sum();
        OVERHEAD + audiences + tokens
    }

    /// Notes how a request ended that was sent at `asked`, when all had been asked to renew `renewed`
    /// times.
    fn finish(&self, outcome: Result<Vec<JwtSvid>, IssueError>, asked: SystemTime, renewed: u64) {
        let now = Instant::now();
        let mut state = self.state();
        match outcome {
            Ok(svids) => {
                state.held = Some(Arc::new(Issued::new(svids, asked, renewed)));
                state.failed = None;
                state.retry = now;
                state.backoff.reset();
            }
            Err(error) => {
                if matches!(error, IssueError::Refused(_)) {
                    state.held = None;
                }
                state.retry = now + state.backoff.next_wait(jitter());
                state.failed = Some((now, error));
            }
        }
    }

    /// What a caller is told at `now`, when all have been asked to renew `renewed` times.
    fn look(&self, now: SystemTime, renewed: u64, caller: &Caller) -> Answer {
        let mut state = self.state();
        state.used = now;
        let held = state.held.clone().filter(|held| now < held.usable_until);
        if let Some(held) = &held
            && (caller.heard
                || (renewed <= held.renewed && now < held.fresh_until)
                || Instant::now() < state.retry)
        {
            return Answer::Serve(Arc::clone(held));
        }
        let waiting = |flying: &watch::Sender<()>| Waiting {
            flight: flying.subscribe(),
            fallback: held.clone(),
        };
        if let Some(flying) = state.flight.upgrade() {
            return Answer::Wait(waiting(&flying));
        }
        if held.is_none()
            && let Some((at, error)) = &state.failed
            && (*at >= caller.came || at.elapsed() < FAILURE_KEPT)
        {
            return Answer::Fail(error.clone());
        }
        let flying = Arc::new(watch::Sender::new(()));
        state.flight = Arc::downgrade(&flying);
        let waiting = waiting(&flying);
        Answer::Ask(flying, waiting)
    }
}

#[cfg(test)]
#[path = "tokens_tests.rs"]
mod tests;
