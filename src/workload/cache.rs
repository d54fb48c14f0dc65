//! Issued SVIDs, one entry per selector, life and set of attributes, renewed from one queue.
//!
//! [`Cache::run`] starts what is due and publishes each outcome to the entry's subscribers. Everything
//! else only looks at entries. Few requests are in flight at a time, users take [`Turns`], and first
//! SVIDs and renewals keep each other from none. What to do next is decided by `after`, a pure function. What an entry held stays on the
//! [`Shelf`] when the entry ends, for the same process to come back to.

use std::collections::{BTreeSet, HashMap};
use std::ops::Deref;
use std::pin::pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use tokio::sync::{Notify, watch};
use tokio::task::JoinSet;
use tokio::time::Instant;

use super::Bundles;
use super::issue::{self, IssueError, Issuer, Svid};
use super::memo::Memo;
use super::outcome::Failures;
use super::selector::Selector;
use super::shelf::{Holder, Mark, Shelf};
use super::turns::Turns;
use crate::attest::Attested;
use crate::backoff::Backoff;
use crate::clock::Clock;
use crate::crypto::{jitter, sha256};
use crate::renewal;

/// How long an entry outlives its last subscriber, for callers that connect anew each time.
const GRACE: Duration = Duration::from_secs(30);
/// How long a refusal answers for the cluster.
const REFUSAL_KEPT: Duration = Duration::from_secs(1);
/// Renewals after a change that concerns everybody spread over this time.
const SPREAD: Duration = Duration::from_secs(10);
/// The longest that a caller waits for fresh SVIDs while old ones from the shelf would do.
const WITH_FALLBACK: Duration = Duration::from_secs(2);
/// First and longest wait after a failure.
const BACKOFF: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(60));

/// What an entry's subscribers see.
#[derive(Debug, Clone, Default)]
pub enum State {
    /// Being issued for the first time.
    #[default]
    Pending,
    /// At least one SVID, in the cluster's order.
    Ready(Arc<Answer>),
    /// The cluster decided that there is none.
    Refused(Arc<str>),
    /// None is held and none can be had now.
    Unavailable(Arc<str>),
}

/// The SVIDs of one answer of the cluster.
#[derive(Debug)]
pub struct Answer {
    svids: Arc<[Svid]>,
    memo: Memo,
    /// The bundles that were looked at last, and whether the SVIDs lead to them.
    led: Mutex<Option<(Arc<Bundles>, bool)>>,
}

impl Answer {
    fn new(svids: Arc<[Svid]>) -> Arc<Self> {
        Arc::new(Self {
            svids,
            memo: Memo::default(),
            led: Mutex::default(),
        })
    }

    /// The message that everybody gets who waits for these SVIDs, made once for each state of the
    /// bundles and the revocation list.
    pub fn message(
        &self,
        bundles: &Arc<Bundles>,
        crl: Option<&Bytes>,
        make: impl FnOnce() -> Option<Bytes>,
    ) -> Option<Bytes> {
        self.memo.message(bundles, crl, make)
    }

    /// Whether each of them leads to the authorities of `bundles` (`X509-SVID.md` 5): nobody who has
    /// those alone could verify another one.
    pub fn lead_to(&self, bundles: &Arc<Bundles>) -> bool {
        let mut led = self.led.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((last, lead)) = led.as_ref()
            && Arc::ptr_eq(last, bundles)
        {
            return *lead;
        }
        let lead = self.svids.iter().all(|svid| issue::leads_to(svid, bundles));
        *led = Some((Arc::clone(bundles), lead));
        lead
    }
}

impl Deref for Answer {
    type Target = [Svid];

    fn deref(&self) -> &[Svid] {
        &self.svids
    }
}

impl State {
    /// Whether this is an answer at `now`. Expired SVIDs are none.
    pub fn is_answer(&self, now: SystemTime) -> bool {
        match self {
            Self::Pending => false,
            Self::Ready(svids) => not_after(svids) > now,
            Self::Refused(_) | Self::Unavailable(_) => true,
        }
    }
}

/// How fresh the SVIDs of all callers together are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Freshness {
    /// Nobody uses any.
    Idle,
    /// The first of them should have been renewed by then.
    Until(SystemTime),
    /// Somebody has none because of this trouble, a refusal aside.
    Missing(Arc<str>),
}

impl Freshness {
    /// The worse of the two.
    fn and(self, other: Self) -> Self {
        match (self, other) {
            (Self::Missing(why), _) | (_, Self::Missing(why)) => Self::Missing(why),
            (Self::Until(one), Self::Until(other)) => Self::Until(one.min(other)),
            (Self::Until(one), Self::Idle) | (Self::Idle, Self::Until(one)) => Self::Until(one),
            (Self::Idle, Self::Idle) => Self::Idle,
        }
    }
}

/// What makes two requests the same. Attributes include the process ID, so that no two processes
/// share a private key.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Key {
    selector: Selector,
    ttl: Duration,
    attested: [u8; 32],
}

impl Key {
    /// The same, for what is kept across restarts.
    fn mark(&self) -> Mark {
        // Formatted for debugging, texts are quoted: no two selectors look the same.
        let what = format!("{:?} {:?} {:?}", self.selector, self.ttl, self.attested);
        sha256(what.as_bytes())
    }
}

/// Issued SVIDs, shared by all who ask for the same. Cloning shares the cache.
#[derive(Debug, Clone)]
pub struct Cache(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    issuer: Arc<dyn Issuer>,
    clock: Clock,
    interval: Duration,
    shelf: Shelf,
    /// For those who hold nothing. Whoever waits has a call open, and those are limited elsewhere.
    firsts: Turns,
    renewals: Turns,
    wake: Notify,
    table: Mutex<Table>,
}

#[derive(Debug, Default)]
struct Table {
    ids: HashMap<Key, u64>,
    entries: HashMap<u64, Entry>,
    /// When each entry that is not in flight wants attention.
    queue: BTreeSet<(SystemTime, u64)>,
    next_id: u64,
    failures: Failures,
    /// How often all were asked to renew. No time tells what was asked for since: clocks are set back.
    renewals: u64,
    /// When that was last, for what comes from the shelf and has only its time.
    renewed: Option<SystemTime>,
    /// When [`Cache::run`] looks at the queue by itself, unless it is woken before.
    planned: Option<SystemTime>,
}

#[derive(Debug)]
struct Entry {
    key: Key,
    attested: Arc<Attested>,
    state: watch::Sender<State>,
    /// Old SVIDs from the shelf, for when fresh ones cannot be had soon.
    fallback: Option<Arc<Answer>>,
    subscribers: usize,
    abandoned: Option<SystemTime>,
    /// No wall time: a clock that is set back prolongs no refusal and no outage.
    attempted: Option<Instant>,
    /// How often all had been asked to renew by then.
    renewals: u64,
    due: SystemTime,
    in_flight: bool,
    /// Why nothing is held, until the cluster answers.
    trouble: Option<Arc<str>>,
    backoff: Backoff,
}

impl Table {
    /// Puts an entry into the queue at the time when it next wants attention.
    fn enqueue(&mut self, id: u64) {
        let Some(entry) = self.entries.get(&id) else {
            return;
        };
        if entry.in_flight {
            return;
        }
        let at = entry.wanted_at();
        self.queue.insert((at, id));
    }

    fn dequeue(&mut self, id: u64) {
        if let Some(entry) = self.entries.get(&id) {
            self.queue.remove(&(entry.wanted_at(), id));
        }
    }

    /// Changes an entry and keeps the queue in step.
    fn update(&mut self, id: u64, change: impl FnOnce(&mut Entry)) {
        self.dequeue(id);
        if let Some(entry) = self.entries.get_mut(&id) {
            change(entry);
        }
        self.enqueue(id);
    }

    fn remove(&mut self, id: u64) {
        self.dequeue(id);
        if let Some(entry) = self.entries.remove(&id) {
            self.ids.remove(&entry.key);
        }
    }
}

impl Entry {
    fn wanted_at(&self) -> SystemTime {
        self.abandoned.map_or(self.due, |since| since + GRACE)
    }
}

/// One interest in an entry. The entry ends a while after its last subscription.
#[derive(Debug)]
pub struct Subscription {
    cache: Arc<Inner>,
    id: u64,
    state: watch::Receiver<State>,
}

impl Subscription {
    /// What is held now, and every change of it.
    pub fn state(&mut self) -> &mut watch::Receiver<State> {
        &mut self.state
    }
}

impl Drop for Subscription {
    fn drop(&mut self) {
        let now = self.cache.clock.now();
        let mut table = self.cache.table();
        table.update(self.id, |entry| {
            entry.subscribers = entry.subscribers.saturating_sub(1);
            if entry.subscribers == 0 {
                entry.abandoned = Some(now);
            }
        });
        self.cache.wake_if_due(&table);
    }
}

impl Inner {
    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// When the head of the queue wants attention, noted for [`Inner::wake_if_due`].
    fn plan(&self) -> Option<SystemTime> {
        let mut table = self.table();
        table.planned = table.queue.first().map(|(at, _)| *at);
        table.planned
    }

    /// Wakes [`Cache::run`] if it would sleep past the head of the queue. Most changes do not need
    /// it, and each wake is a switch of threads.
    fn wake_if_due(&self, table: &Table) {
        let head = table.queue.first().map(|(at, _)| *at);
        if head.is_some_and(|head| table.planned.is_none_or(|planned| head < planned)) {
            self.wake.notify_one();
        }
    }
}

type Outcome = Result<Vec<Svid>, IssueError>;

/// An entry that is to be issued.
struct Due {
    id: u64,
    key: Key,
    attested: Arc<Attested>,
    /// Whether something is held meanwhile.
    renewal: bool,
}

impl Cache {
    /// How fresh is what somebody uses or lately wanted to use.
    pub fn freshness(&self) -> Freshness {
        let table = self.0.table();
        let mut worst = Freshness::Idle;
        for entry in table.entries.values() {
            // A caller whose stream ended with an outage comes back; it is not forgotten meanwhile.
            let fresh = match (&entry.trouble, &*entry.state.borrow()) {
                (Some(why), _) => Freshness::Missing(Arc::clone(why)),
                (None, State::Ready(svids)) if entry.subscribers > 0 => {
                    Freshness::Until(renewal::fresh_until(issued_at(svids), not_after(svids)))
                }
                _ => Freshness::Idle,
            };
            worst = worst.and(fresh);
        }
        worst
    }

    /// A cache that renews what `issuer` issues after `interval` at the latest. Nothing happens
    /// before [`Cache::run`].
    pub fn new(issuer: Arc<dyn Issuer>, clock: Clock, interval: Duration) -> Self {
        Self::beside(issuer, clock, interval, Shelf::default())
    }

    /// The same, and what is on `shelf` serves whom it was issued to.
    pub fn beside(issuer: Arc<dyn Issuer>, clock: Clock, interval: Duration, shelf: Shelf) -> Self {
        Self(Arc::new(Inner {
            issuer,
            clock,
            interval,
            shelf,
            firsts: Turns::new(usize::MAX),
            renewals: Turns::new(usize::MAX),
            wake: Notify::new(),
            table: Mutex::new(Table::default()),
        }))
    }

    /// Takes part in the entry for this workload, and makes it if there is none.
    pub fn subscribe(
        &self,
        selector: &Selector,
        ttl: Duration,
        attested: &Arc<Attested>,
    ) -> Subscription {
        let key = Key {
            selector: selector.clone(),
            ttl,
            attested: attested.digest(),
        };
        let now = self.0.clock.now();
        let known = self.0.table().ids.contains_key(&key);
        // Checking what is on the shelf takes a while; others are not held up for it.
        let kept = match attested.process() {
            Some(_) if !known => self.0.shelf.get(&key.mark(), now),
            _ => None,
        };
        let mut table = self.0.table();
        let id = if let Some(id) = table.ids.get(&key) {
            *id
        } else {
            let id = table.next_id;
            table.next_id += 1;
            table.ids.insert(key.clone(), id);
            let mut entry = Entry::new(key, Arc::clone(attested), now);
            if let Some(svids) = kept {
                entry.begin_with(svids, now, self.0.interval, table.renewed);
            }
            table.entries.insert(id, entry);
            id
        };
        let mut state = None;
        table.update(id, |entry| {
            entry.subscribers += 1;
            entry.abandoned = None;
            entry.ask_again_if_stale(now);
            state = Some(entry.state.subscribe());
        });
        self.0.wake_if_due(&table);
        drop(table);
        Subscription {
            cache: Arc::clone(&self.0),
            id,
            state: state.unwrap_or_else(|| watch::channel(State::Pending).1),
        }
    }

    /// Renews every entry soon, spread over some seconds: the authority or the operator's wish
    /// changed. What is held stays in use meanwhile.
    pub fn renew_all(&self) {
        let now = self.0.clock.now();
        let mut table = self.0.table();
        table.renewals += 1;
        table.renewed = Some(now);
        let ids: Vec<u64> = table.entries.keys().copied().collect();
        for id in ids {
            table.update(id, |entry| {
                entry.due = entry.due.min(now + SPREAD.mul_f64(jitter()));
            });
        }
        self.0.wake_if_due(&table);
    }

    /// How many entries there are.
    pub fn len(&self) -> usize {
        self.0.table().entries.len()
    }

    /// Tells the time by `clock` from now on. Nobody may be subscribed.
    #[cfg(test)]
    pub(super) fn set_clock(&mut self, clock: Clock) {
        Arc::get_mut(&mut self.0).unwrap().clock = clock;
    }

    /// Whether there is no entry.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Issues and renews until the future is dropped.
    pub async fn run(&self) {
        let mut flights: JoinSet<(u64, Option<Outcome>)> = JoinSet::new();
        loop {
            let now = self.0.clock.now();
            while let Some(due) = self.take_due(now) {
                let cache = self.clone();
                flights.spawn(async move { (due.id, cache.fly(due).await) });
            }
            let next = self.0.plan();
            tokio::select! {
                () = self.0.wake.notified() => {}
                Some(ended) = flights.join_next() => {
                    // A task that panicked has no outcome; its entry is asked for again.
                    match ended {
                        Ok((id, outcome)) => self.finish(id, outcome),
                        Err(error) => {
                            tracing::error!(%error, "Issuing an SVID panicked");
                            self.release_lost();
                        }
                    }
                }
                () = self.0.clock.sleep_until(next.unwrap_or(now)), if next.is_some() => {}
            }
        }
    }

    /// Removes what nobody wants any more, and takes the next entry that is to be issued.
    fn take_due(&self, now: SystemTime) -> Option<Due> {
        let mut table = self.0.table();
        loop {
            let (at, id) = *table.queue.first()?;
            if at > now {
                return None;
            }
            table.queue.pop_first();
            let Some(entry) = table.entries.get_mut(&id) else {
                continue;
            };
            if entry.abandoned.is_some() {
                table.remove(id);
                continue;
            }
            entry.in_flight = true;
            return Some(Due {
                id,
                key: entry.key.clone(),
                attested: Arc::clone(&entry.attested),
                renewal: matches!(&*entry.state.borrow(), State::Ready(_)),
            });
        }
    }

    /// Gets an outcome for an entry, whose subscribers do not wait for long if there is a fallback.
    async fn fly(&self, due: Due) -> Option<Outcome> {
        let id = due.id;
        let mut asked = pin!(self.ask(due));
        tokio::select! {
            outcome = &mut asked => return outcome,
            () = self.0.clock.sleep(WITH_FALLBACK) => {}
        }
        if let Some(entry) = self.0.table().entries.get_mut(&id) {
            entry.fall_back();
        }
        asked.await
    }

    /// Asks the cluster when the user's turn has come; `None` if nobody wants it any more by then.
    async fn ask(&self, due: Due) -> Option<Outcome> {
        let Inner {
            firsts, renewals, ..
        } = &*self.0;
        let turns = if due.renewal { renewals } else { firsts };
        let _turn = turns.next(due.attested.user()).await?;
        {
            let mut table = self.0.table();
            let renewals = table.renewals;
            let entry = table.entries.get_mut(&due.id)?;
            if entry.abandoned.is_some() {
                return None;
            }
            entry.renewals = renewals;
            entry.attempted = Some(Instant::now());
        }
        let Key { selector, ttl, .. } = &due.key;
        let asked = self
            .0
            .issuer
            .issue(selector, *ttl, due.attested.attributes());
        Some(asked.await)
    }

    fn finish(&self, id: u64, outcome: Option<Outcome>) {
        let now = self.0.clock.now();
        let (interval, shelf) = (self.0.interval, &self.0.shelf);
        let mut table = self.0.table();
        let Some(outcome) = outcome else {
            return table.update(id, |entry| entry.in_flight = false);
        };
        let renewals = table.renewals;
        if let Some(entry) = table.entries.get(&id) {
            let attested = Arc::clone(&entry.attested);
            table.failures.tell(attested.attributes(), &outcome);
        }
        table.update(id, |entry| {
            entry.in_flight = false;
            match outcome {
                Ok(_) | Err(IssueError::Refused(_)) => entry.fallback = None,
                Err(IssueError::Unavailable(_) | IssueError::Answer(_)) => entry.fall_back(),
            }
            let held = entry.state.borrow().clone();
            let next = after(now, &held, outcome, interval, &mut entry.backoff, jitter());
            entry.due = next.due;
            if entry.renewals < renewals {
                // It was under way when all were to renew, and may be of the old authority.
                entry.due = entry.due.min(now + SPREAD.mul_f64(jitter()));
            }
            if let Some(state) = next.publish {
                if let Some(holder) = Holder::of(&entry.attested) {
                    match &state {
                        State::Ready(answer) => shelf.put(entry.key.mark(), holder, &answer.svids),
                        State::Refused(_) => shelf.withdraw(&entry.key.mark()),
                        State::Unavailable(_) | State::Pending => {}
                    }
                }
                entry.trouble = match &state {
                    State::Unavailable(why) => Some(Arc::clone(why)),
                    State::Ready(_) | State::Refused(_) | State::Pending => None,
                };
                entry.state.send_replace(state);
            }
        });
    }

    /// Makes every entry whose request vanished due again.
    fn release_lost(&self) {
        let now = self.0.clock.now();
        let mut table = self.0.table();
        let lost: Vec<u64> = table
            .entries
            .iter()
            .filter(|(_, entry)| entry.in_flight)
            .map(|(id, _)| *id)
            .collect();
        for id in lost {
            table.update(id, |entry| {
                entry.in_flight = false;
                entry.fall_back();
                entry.due = now + BACKOFF.1;
            });
        }
    }
}

impl Entry {
    fn new(key: Key, attested: Arc<Attested>, now: SystemTime) -> Self {
        Self {
            key,
            attested,
            state: watch::Sender::new(State::Pending),
            fallback: None,
            subscribers: 0,
            abandoned: None,
            attempted: None,
            renewals: 0,
            due: now,
            in_flight: false,
            trouble: None,
            backoff: Backoff::new(BACKOFF.0, BACKOFF.1),
        }
    }

    /// Serves what was issued earlier, renewed when it was to be renewed then, or at once if all
    /// were to renew since. What is not fresh any more waits for what the cluster says: who connects
    /// anew once an hour would always get the last minute of it.
    fn begin_with(
        &mut self,
        svids: Arc<[Svid]>,
        now: SystemTime,
        interval: Duration,
        renewed: Option<SystemTime>,
    ) {
        let issued = issued_at(&svids);
        if renewal::fresh_until(issued, not_after(&svids)) <= now {
            self.fallback = Some(Answer::new(svids));
            return;
        }
        if renewed.is_none_or(|renewed| renewed <= issued) {
            self.due = renewal::due(issued, not_after(&svids), interval, jitter());
        }
        self.state.send_replace(State::Ready(Answer::new(svids)));
    }

    /// Serves the old SVIDs if there are any.
    fn fall_back(&mut self) {
        if let Some(kept) = self.fallback.take() {
            self.state.send_replace(State::Ready(kept));
        }
    }

    /// A new subscriber is not turned away with an old refusal or an old outage, and does not wait for
    /// a time that the clock was set back from.
    fn ask_again_if_stale(&mut self, now: SystemTime) {
        let stale = match &*self.state.borrow() {
            State::Pending | State::Refused(_) | State::Unavailable(_) => self
                .attempted
                .is_none_or(|attempted| attempted.elapsed() >= REFUSAL_KEPT),
            State::Ready(svids) => not_after(svids) <= now,
        };
        if stale && !self.in_flight {
            self.due = self.due.min(now);
            self.state.send_if_modified(|state| {
                let told = !matches!(state, State::Pending);
                *state = State::Pending;
                told
            });
        }
    }
}

/// What follows from an outcome.
#[derive(Debug)]
struct Next {
    /// What subscribers are to see; `None` leaves what they see.
    publish: Option<State>,
    /// When to ask again.
    due: SystemTime,
}

/// Decides what follows when `outcome` arrives at `now` while `held` is what subscribers see.
fn after(
    now: SystemTime,
    held: &State,
    outcome: Outcome,
    interval: Duration,
    backoff: &mut Backoff,
    random: f64,
) -> Next {
    match outcome {
        Ok(svids) => {
            backoff.reset();
            let svids: Arc<[Svid]> = svids.into();
            let due = renewal::due(issued_at(&svids), not_after(&svids), interval, random)
                .max(now + BACKOFF.0);
            Next {
                publish: Some(State::Ready(Answer::new(svids))),
                due,
            }
        }
        Err(IssueError::Refused(why)) => Next {
            publish: Some(State::Refused(why.into())),
            due: now + backoff.next_wait(random),
        },
        Err(error @ (IssueError::Unavailable(_) | IssueError::Answer(_))) => {
            // About as long as the waits so far took together.
            let failing = BACKOFF.0 * ((1 << backoff.failures().min(16)) - 1);
            let wait = backoff.next_wait(random);
            match held {
                // The last good one stays, and its end is not slept through.
                State::Ready(svids) if not_after(svids) > now => {
                    let fresh = renewal::fresh_until(issued_at(svids), not_after(svids));
                    let slack = fresh.duration_since(now).unwrap_or_default();
                    let patience = renewal::patience(failing, slack.min(interval), random);
                    Next {
                        publish: None,
                        due: (now + wait.max(patience)).min(not_after(svids)),
                    }
                }
                _ => Next {
                    publish: Some(State::Unavailable(error.to_string().into())),
                    due: now + wait,
                },
            }
        }
    }
}

/// When they came; all of an answer come together.
fn issued_at(svids: &[Svid]) -> SystemTime {
    let issued = svids.iter().map(|svid| svid.issued_at);
    issued.min().unwrap_or(SystemTime::UNIX_EPOCH)
}

/// When the first of them expires.
fn not_after(svids: &[Svid]) -> SystemTime {
    let ends = svids.iter().map(|svid| svid.not_after);
    ends.min().unwrap_or(SystemTime::UNIX_EPOCH)
}
