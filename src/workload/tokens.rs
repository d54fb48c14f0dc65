//! JWT-SVIDs while they are young: asked for again and again for the same audiences, a token is
//! handed out until half of its life is over.
//!
//! Nothing is renewed that nobody asks for. Who asks late waits for a fresh token; if the cluster
//! cannot be reached, the old one serves almost to its end. What to do for a caller is decided by
//! [`Slot::look`], a pure function. What was issued stays on the [`Shelf`] too, for the same process to
//! come back to when the agent was restarted.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use tokio::sync::{Semaphore, watch};

use super::issue::IssueError;
use super::jwt::{JwtSvid, TokenIssuer};
use super::selector::Selector;
use super::shelf::{self, Holder, Mark, Shelf};
use crate::attest::Attested;
use crate::backoff::Backoff;
use crate::clock::Clock;
use crate::crypto::{jitter, sha256};

/// Requests in flight at a time.
const IN_FLIGHT: usize = 16;
/// How long tokens are kept for somebody who does not ask for them.
const IDLE: Duration = Duration::from_mins(10);
/// Audience sets that are kept for one workload.
const PER_WORKLOAD: usize = 64;
/// Workloads whose tokens are kept.
const WORKLOADS: usize = 4096;
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
    /// Until when they are handed out while the cluster can be reached.
    fresh_until: SystemTime,
    /// Until when they are handed out at all.
    usable_until: SystemTime,
    message: OnceLock<Bytes>,
}

impl Issued {
    fn new(svids: Vec<JwtSvid>, asked: SystemTime) -> Self {
        let end = svids.iter().map(|svid| svid.not_after).min();
        let end = end.unwrap_or(asked);
        let life = end.duration_since(asked).unwrap_or_default();
        Self {
            svids,
            fresh_until: asked + life / 2,
            usable_until: end - (life / REST.0).min(REST.1),
            message: OnceLock::new(),
        }
    }

    /// The same, not to be handed out from `now` on while the cluster can be reached.
    fn stale_from(&self, now: SystemTime) -> Self {
        Self {
            svids: self.svids.clone(),
            fresh_until: self.fresh_until.min(now),
            usable_until: self.usable_until,
            message: self.message.clone(),
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
    flights: Semaphore,
    shelf: Shelf,
    /// When all were last asked to renew.
    renewed: Mutex<Option<SystemTime>>,
    /// By the digest of who asked.
    table: Mutex<HashMap<[u8; 32], Vec<Arc<Slot>>>>,
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
    failed: Option<(SystemTime, IssueError)>,
    /// Not before then is the cluster asked again while `held` would do.
    retry: SystemTime,
    backoff: Backoff,
    /// Closed when the request that is under way has ended.
    flight: Option<watch::Receiver<()>>,
}

/// What a caller is told.
#[derive(Debug)]
enum Answer {
    Serve(Arc<Issued>),
    Fail(IssueError),
    /// A request is under way. With a fallback, it is not waited for long.
    Wait(watch::Receiver<()>, Option<Arc<Issued>>),
    /// A request is to be sent. It counts as under way until the sender is dropped.
    Ask(watch::Sender<()>),
}

impl Tokens {
    /// Keeps what `issuer` issues by `selector` with a wished life of `ttl`; what is on `shelf` serves
    /// whom it was issued to.
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
            flights: Semaphore::new(IN_FLIGHT),
            shelf,
            renewed: Mutex::default(),
            table: Mutex::default(),
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
        let asked = clock.now();
        let slot = match self.0.known(&attested.digest(), &audiences) {
            Some(slot) => slot,
            None => self.0.begin(attested, audiences, asked),
        };
        loop {
            match slot.look(clock.now(), asked) {
                Answer::Serve(issued) => return Ok(issued),
                Answer::Fail(error) => return Err(error),
                Answer::Wait(mut flight, None) => {
                    // Nothing is ever sent: it ends with the sender.
                    let _ended = flight.changed().await;
                }
                Answer::Wait(mut flight, Some(fallback)) => {
                    tokio::select! {
                        _ended = flight.changed() => {}
                        () = clock.sleep(WITH_FALLBACK) => return Ok(fallback),
                    }
                }
                Answer::Ask(flying) => {
                    self.ask(Arc::clone(attested), Arc::clone(&slot), flying);
                }
            }
        }
    }

    /// Sends a request that does not end with the caller who wanted it first.
    fn ask(&self, attested: Arc<Attested>, slot: Arc<Slot>, flying: watch::Sender<()>) {
        let inner = Arc::clone(&self.0);
        tokio::spawn(async move {
            let permit = inner.flights.acquire().await;
            let asked = inner.clock.now();
            let outcome = inner
                .issuer
                .issue(
                    &inner.selector,
                    inner.ttl,
                    attested.attributes(),
                    &slot.audiences,
                )
                .await;
            drop(permit);
            let outcome = outcome.and_then(at_least_one);
            inner.keep(&attested, &slot.audiences, asked, &outcome);
            slot.finish(outcome, asked, inner.clock.now(), jitter());
            drop(flying);
        });
    }

    /// Hands out nothing of what is held as long as the cluster can be asked: its keys or the
    /// operator's wish changed.
    pub fn renew_all(&self) {
        let now = self.0.clock.now();
        *self.0.renewed() = Some(now);
        for slot in self.0.table().values().flatten() {
            let mut state = slot.state();
            state.retry = now;
            let held = state.held.take();
            state.held = held.map(|held| Arc::new(held.stale_from(now)));
        }
    }

    /// Forgets what nobody asked for lately, until the future is dropped.
    pub async fn run(&self) {
        loop {
            self.0.clock.sleep(IDLE / 10).await;
            self.0.sweep(self.0.clock.now());
        }
    }

    /// How many audience sets of how many workloads are kept.
    #[cfg(test)]
    fn len(&self) -> (usize, usize) {
        let table = self.0.table();
        (table.values().flatten().count(), table.len())
    }
}

impl Inner {
    fn table(&self) -> MutexGuard<'_, HashMap<[u8; 32], Vec<Arc<Slot>>>> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn renewed(&self) -> MutexGuard<'_, Option<SystemTime>> {
        self.renewed.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn known(&self, who: &[u8; 32], audiences: &[String]) -> Option<Arc<Slot>> {
        let table = self.table();
        let mut slots = table.get(who)?.iter();
        slots
            .find(|slot| slot.audiences == audiences)
            .map(Arc::clone)
    }

    /// A slot for what was not asked for lately, with what is on the shelf.
    fn begin(&self, attested: &Attested, audiences: Vec<String>, now: SystemTime) -> Arc<Slot> {
        // Checking what is there takes a while; others are not held up for it.
        let held = self.shelved(attested, &audiences, now);
        self.add(attested.digest(), Slot::new(audiences, held, now))
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
        let issued = Issued::new(kept.svids.clone(), kept.asked);
        let outdated = self.renewed().is_some_and(|renewed| kept.asked <= renewed);
        Some(Arc::new(if outdated {
            issued.stale_from(now)
        } else {
            issued
        }))
    }

    /// Puts an answer of the cluster on the shelf; a refusal takes away what is there.
    fn keep(
        &self,
        attested: &Attested,
        audiences: &[String],
        asked: SystemTime,
        outcome: &Result<Vec<JwtSvid>, IssueError>,
    ) {
        let Some(holder) = Holder::of(attested) else {
            return;
        };
        let mark = self.mark(attested, audiences);
        match outcome {
            Ok(svids) => {
                let svids = svids.clone();
                let tokens = shelf::Tokens { asked, svids };
                self.shelf.put_tokens(mark, holder, tokens);
            }
            Err(IssueError::Refused(_)) => self.shelf.withdraw_tokens(&mark),
            Err(IssueError::Unavailable(_) | IssueError::Answer(_)) => {}
        }
    }

    /// What makes two requests the same, for what is kept across restarts.
    fn mark(&self, attested: &Attested, audiences: &[String]) -> Mark {
        let who = attested.digest();
        // Formatted for debugging, texts are quoted: no two requests look the same.
        let what = format!("{:?} {:?} {who:?} {audiences:?}", self.selector, self.ttl);
        sha256(what.as_bytes())
    }

    /// Adds a slot, unless somebody else just did.
    fn add(&self, who: [u8; 32], slot: Slot) -> Arc<Slot> {
        let mut table = self.table();
        let same = |other: &&Arc<Slot>| other.audiences == slot.audiences;
        if let Some(slot) = table.get(&who).and_then(|slots| slots.iter().find(same)) {
            return Arc::clone(slot);
        }
        if table.len() >= WORKLOADS && !table.contains_key(&who) {
            // Whoever asked last longest ago asks the cluster again when it comes back.
            let idle = table.iter().min_by_key(|(_, slots)| last_use(slots));
            if let Some(who) = idle.map(|(who, _)| *who) {
                table.remove(&who);
            }
        }
        let slots = table.entry(who).or_default();
        if slots.len() >= PER_WORKLOAD {
            let idle = slots.iter().enumerate().min_by_key(|(_, slot)| slot.used());
            if let Some(at) = idle.map(|(at, _)| at) {
                slots.swap_remove(at);
            }
        }
        let slot = Arc::new(slot);
        slots.push(Arc::clone(&slot));
        slot
    }

    fn sweep(&self, now: SystemTime) {
        self.table().retain(|_, slots| {
            slots.retain(|slot| slot.used() + IDLE > now);
            !slots.is_empty()
        });
    }
}

fn last_use(slots: &[Arc<Slot>]) -> Option<SystemTime> {
    slots.iter().map(|slot| slot.used()).max()
}

impl Slot {
    fn new(audiences: Vec<String>, held: Option<Arc<Issued>>, now: SystemTime) -> Self {
        Self {
            audiences,
            state: Mutex::new(State {
                used: now,
                held,
                failed: None,
                retry: now,
                backoff: Backoff::new(BACKOFF.0, BACKOFF.1),
                flight: None,
            }),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn used(&self) -> SystemTime {
        self.state().used
    }

    /// What a caller who came at `asked` is told at `now`.
    fn look(&self, now: SystemTime, asked: SystemTime) -> Answer {
        let mut state = self.state();
        state.used = now;
        let held = state.held.clone().filter(|held| now < held.usable_until);
        if let Some(held) = &held
            && (now < held.fresh_until || now < state.retry)
        {
            return Answer::Serve(Arc::clone(held));
        }
        if let Some(flight) = &state.flight
            && flight.has_changed().is_ok()
        {
            return Answer::Wait(flight.clone(), held);
        }
        if held.is_none()
            && let Some((at, error)) = &state.failed
            && (*at >= asked || now < *at + FAILURE_KEPT)
        {
            return Answer::Fail(error.clone());
        }
        let (flying, flight) = watch::channel(());
        state.flight = Some(flight);
        Answer::Ask(flying)
    }

    fn finish(
        &self,
        outcome: Result<Vec<JwtSvid>, IssueError>,
        asked: SystemTime,
        now: SystemTime,
        random: f64,
    ) {
        let mut state = self.state();
        match outcome {
            Ok(svids) => {
                state.held = Some(Arc::new(Issued::new(svids, asked)));
                state.failed = None;
                state.retry = now;
                state.backoff.reset();
            }
            Err(error) => {
                if matches!(error, IssueError::Refused(_)) {
                    state.held = None;
                }
                tracing::debug!(%error, "No JWT-SVID was issued");
                state.retry = now + state.backoff.next_wait(random);
                state.failed = Some((now, error));
            }
        }
    }
}

/// An answer with nothing in it is a refusal.
fn at_least_one(svids: Vec<JwtSvid>) -> Result<Vec<JwtSvid>, IssueError> {
    if svids.is_empty() {
        let why = "no workload identity with the selector's labels may be issued to this workload";
        return Err(IssueError::Refused(why.to_owned()));
    }
    Ok(svids)
}

#[cfg(test)]
#[path = "tokens_tests.rs"]
mod tests;
