use std::collections::VecDeque;
use std::sync::{Arc, Mutex};

use async_trait::async_trait;
use bytes::Bytes;

use super::*;
use crate::attest::{Attested, Process};
use crate::clock::Clock;
use crate::pb::teleport::workloadidentity::v1::{WorkloadAttrs, WorkloadAttrsUnix};
use crate::workload::{
    Cache, Crl, Freshness, IssueError, Issuer, Selector, Shelf, State, Subscription, Svid,
};

const MINUTE: Duration = Duration::from_mins(1);

/// Issues for an hour at a time, unless told to fail.
#[derive(Debug)]
struct Fake {
    clock: Clock,
    /// What the next calls answer; afterwards everything succeeds.
    script: Mutex<VecDeque<IssueError>>,
    /// What every call answers, script aside.
    always: Mutex<Option<IssueError>>,
    calls: Mutex<Vec<SystemTime>>,
    delay: Mutex<Duration>,
    authority: Authority,
}

#[async_trait]
impl Issuer for Fake {
    async fn issue(
        &self,
        _selector: &Selector,
        _ttl: Duration,
        _attributes: &WorkloadAttrs,
    ) -> Result<Vec<Svid>, IssueError> {
        let now = self.clock.now();
        let serial = {
            let mut calls = self.calls.lock().unwrap();
            calls.push(now);
            calls.len().to_string()
        };
        let delay = *self.delay.lock().unwrap();
        tokio::time::sleep(delay).await;
        if let Some(error) = self.script.lock().unwrap().pop_front() {
            return Err(error);
        }
        if let Some(error) = self.always.lock().unwrap().clone() {
            return Err(error);
        }
        let key = PrivateKey::generate(KeyAlgorithm::EcdsaP256).unwrap();
        let id = "spiffe://example.org/a";
        Ok(vec![Svid {
            id: id.parse().unwrap(),
            chain: self.authority.leaf_at(&key, &[id], now).into(),
            key: Bytes::copy_from_slice(key.pkcs8_der().expose()),
            hint: String::new(),
            issued_at: now,
            not_after: now + HOUR,
            serial,
            name: "a".into(),
            revision: String::new(),
        }])
    }
}

struct World {
    fake: Arc<Fake>,
    cache: Cache,
    clock: Clock,
}

fn world() -> World {
    world_with(20 * MINUTE, Duration::from_millis(50))
}

fn world_with(interval: Duration, delay: Duration) -> World {
    let clock = Clock::simulated(start());
    let fake = Arc::new(Fake {
        clock: clock.clone(),
        script: Mutex::default(),
        always: Mutex::default(),
        calls: Mutex::default(),
        delay: Mutex::new(delay),
        authority: Authority::new(DOMAIN),
    });
    let shelf = Shelf::default();
    let bundles = Bundles::from_authority(&message(DOMAIN, &[&fake.authority]));
    shelf.tell(&Arc::new(bundles.unwrap()), &Crl::None);
    let issuer: Arc<dyn Issuer> = Arc::clone(&fake) as _;
    World {
        cache: Cache::beside(issuer, clock.clone(), interval, shelf),
        fake,
        clock,
    }
}

impl World {
    fn subscribe(&self, pid: i32) -> Subscription {
        self.subscribe_as(0, pid)
    }

    fn subscribe_as(&self, uid: u32, pid: i32) -> Subscription {
        self.subscribe_for(uid, pid, None)
    }

    /// For a process that the shelf knows again.
    fn subscribe_known(&self) -> Subscription {
        let pid = i32::try_from(std::process::id()).unwrap();
        self.subscribe_for(0, pid, Process::of(pid))
    }

    fn subscribe_for(&self, uid: u32, pid: i32, process: Option<Process>) -> Subscription {
        let attributes = WorkloadAttrs {
            unix: Some(WorkloadAttrsUnix {
                pid,
                uid,
                ..WorkloadAttrsUnix::default()
            }),
            ..WorkloadAttrs::default()
        };
        let selector = Selector::Name("a".into());
        let attested = Arc::new(Attested::new(attributes, process));
        self.cache.subscribe(&selector, HOUR, &attested)
    }

    fn calls(&self) -> usize {
        self.fake.calls.lock().unwrap().len()
    }

    /// Runs `test` beside the cache.
    async fn run(&self, test: impl Future<Output = ()>) {
        tokio::select! {
            () = self.cache.run() => {}
            () = test => {}
        }
    }

    /// Sets the agent's clock back. Nobody may be subscribed.
    fn set_back(&mut self, by: Duration) {
        self.clock = Clock::simulated(self.clock.now() - by);
        self.cache.set_clock(self.clock.clone());
    }

    fn fail_with(&self, error: Option<IssueError>) {
        *self.fake.always.lock().unwrap() = error;
    }
}

/// The serial number of what is held, after waiting for an answer.
async fn serial(subscription: &mut Subscription, clock: &Clock) -> Result<String, String> {
    let state = subscription.state();
    let state = state
        .wait_for(|state| state.is_answer(clock.now()))
        .await
        .unwrap()
        .clone();
    told(&state)
}

fn told(state: &State) -> Result<String, String> {
    match state {
        State::Ready(svids) => Ok(svids[0].serial.clone()),
        State::Refused(why) => Err(format!("refused: {why}")),
        State::Unavailable(why) => Err(format!("unavailable: {why}")),
        State::Pending => Err("pending".into()),
    }
}

fn outage() -> IssueError {
    IssueError::Unavailable("down".into())
}

fn refusal() -> IssueError {
    IssueError::Refused("no rule".into())
}

#[tokio::test(start_paused = true)]
async fn a_day_of_renewals() {
    for (interval, least, most) in [
        // By the interval, up to a tenth early.
        (20 * MINUTE, 72, 81),
        // By two thirds of the life, whatever the interval.
        (10 * HOUR, 36, 41),
    ] {
        let world = world_with(interval, Duration::from_millis(50));
        let mut subscription = world.subscribe(1);
        world
            .run(async {
                serial(&mut subscription, &world.clock).await.unwrap();
                let end = start() + 24 * HOUR;
                while world.clock.now() < end {
                    let state = subscription.state();
                    tokio::select! {
                        changed = state.changed() => changed.unwrap(),
                        () = world.clock.sleep_until(end) => break,
                    }
                    let State::Ready(svids) = state.borrow_and_update().clone() else {
                        panic!("nothing held");
                    };
                    assert!(svids[0].not_after > world.clock.now() + 59 * MINUTE);
                }
            })
            .await;
        let calls = world.fake.calls.lock().unwrap().clone();
        assert!(
            (least..=most).contains(&calls.len()),
            "{} calls",
            calls.len()
        );
        for pair in calls.windows(2) {
            let wait = pair[1].duration_since(pair[0]).unwrap();
            assert!(wait <= 40 * MINUTE + Duration::from_secs(1), "{wait:?}");
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_hundred_streams_of_one_process_cost_one_request() {
    let world = world();
    let mut all: Vec<Subscription> = (0..100).map(|_| world.subscribe(1)).collect();
    world
        .run(async {
            for subscription in &mut all {
                assert_eq!(serial(subscription, &world.clock).await, Ok("1".into()));
            }
            assert_eq!(world.calls(), 1);
            // A renewal reaches every one of them.
            for subscription in &mut all {
                subscription.state().changed().await.unwrap();
                assert_eq!(serial(subscription, &world.clock).await, Ok("2".into()));
            }
            assert_eq!(world.calls(), 2);
        })
        .await;
}

#[tokio::test(start_paused = true)]
async fn two_processes_never_share() {
    let world = world();
    let (mut one, mut two) = (world.subscribe(1), world.subscribe(2));
    world
        .run(async {
            let first = serial(&mut one, &world.clock).await.unwrap();
            let second = serial(&mut two, &world.clock).await.unwrap();
            assert_ne!(first, second);
        })
        .await;
    assert_eq!(world.cache.len(), 2);
}

#[tokio::test(start_paused = true)]
async fn the_last_good_one_stays_through_an_outage_until_it_expires() {
    let world = world();
    let mut subscription = world.subscribe(1);
    world
        .run(async {
            assert_eq!(
                serial(&mut subscription, &world.clock).await,
                Ok("1".into())
            );
            world.fail_with(Some(outage()));
            world.clock.sleep_until(start() + 59 * MINUTE).await;
            assert!(world.calls() > 30, "{} calls", world.calls());
            assert!(world.calls() < 100, "{} calls", world.calls());
            assert_eq!(told(&subscription.state().borrow()), Ok("1".into()));
            subscription.state().mark_unchanged();
            subscription.state().changed().await.unwrap();
            let late = world.clock.now().duration_since(start() + HOUR).unwrap();
            assert!(late < Duration::from_secs(2), "{late:?}");
            assert_eq!(
                told(&subscription.state().borrow()),
                Err("unavailable: down".into())
            );
            // And it comes back by itself.
            world.fail_with(None);
            subscription.state().changed().await.unwrap();
            assert!(told(&subscription.state().borrow()).is_ok());
        })
        .await;
}

#[tokio::test(start_paused = true)]
async fn an_outage_that_outlives_an_svid_is_no_good_health() {
    let world = world();
    assert_eq!(world.cache.freshness(), Freshness::Idle);
    let mut subscription = world.subscribe(1);
    let down = Freshness::Missing("down".into());
    world
        .run(async {
            serial(&mut subscription, &world.clock).await.unwrap();
            let fresh = world.cache.freshness();
            assert!(
                matches!(fresh, Freshness::Until(until) if until <= start() + 41 * MINUTE),
                "{fresh:?}"
            );
            world.fail_with(Some(outage()));
            world.clock.sleep_until(start() + 70 * MINUTE).await;
            assert_eq!(world.cache.freshness(), down);
            // The caller's stream ended with that. It is away for a moment, and asks again.
            drop(subscription);
            assert_eq!(world.cache.freshness(), down);
            let mut again = world.subscribe(1);
            assert_eq!(world.cache.freshness(), down, "while it is asked for again");
            assert!(serial(&mut again, &world.clock).await.is_err());

            world.fail_with(None);
            again.state().changed().await.unwrap();
            serial(&mut again, &world.clock).await.unwrap();
            assert!(matches!(world.cache.freshness(), Freshness::Until(_)));
            // A refusal is the cluster's decision, not this agent's trouble.
            world.fail_with(Some(refusal()));
            again.state().changed().await.unwrap();
            assert_eq!(world.cache.freshness(), Freshness::Idle);
        })
        .await;
}

#[tokio::test(start_paused = true)]
async fn an_unusable_answer_withdraws_nothing() {
    let world = world();
    let mut subscription = world.subscribe(1);
    world
        .run(async {
            assert_eq!(
                serial(&mut subscription, &world.clock).await,
                Ok("1".into())
            );
            world.fail_with(Some(IssueError::Answer("odd".into())));
            world.clock.sleep_until(start() + 50 * MINUTE).await;
            assert_eq!(told(&subscription.state().borrow()), Ok("1".into()));
        })
        .await;
}

#[tokio::test(start_paused = true)]
async fn a_refusal_withdraws_at_once() {
    let world = world();
    let mut subscription = world.subscribe(1);
    world
        .run(async {
            assert_eq!(
                serial(&mut subscription, &world.clock).await,
                Ok("1".into())
            );
            world.fail_with(Some(refusal()));
            subscription.state().changed().await.unwrap();
            assert!(world.clock.now() < start() + 21 * MINUTE);
            assert_eq!(
                told(&subscription.state().borrow()),
                Err("refused: no rule".into())
            );
        })
        .await;
}

#[tokio::test(start_paused = true)]
async fn a_new_caller_does_not_get_an_old_refusal() {
    let world = world();
    world.fake.script.lock().unwrap().push_back(refusal());
    let mut first = world.subscribe(1);
    world
        .run(async {
            assert_eq!(
                serial(&mut first, &world.clock).await,
                Err("refused: no rule".into())
            );
            // At once: the same answer, without a call.
            let mut at_once = world.subscribe(1);
            assert!(serial(&mut at_once, &world.clock).await.is_err());
            assert_eq!(world.calls(), 1);
            drop((first, at_once));
            tokio::time::sleep(2 * Duration::from_secs(1)).await;
            let mut later = world.subscribe(1);
            assert!(serial(&mut later, &world.clock).await.is_ok());
        })
        .await;
}

#[tokio::test(start_paused = true)]
async fn entries_end_a_while_after_their_last_subscriber() {
    let world = world();
    let mut subscription = world.subscribe(1);
    world
        .run(async {
            serial(&mut subscription, &world.clock).await.unwrap();
            drop(subscription);
            tokio::time::sleep(Duration::from_secs(20)).await;
            // Within the grace the same SVID is there again.
            let mut again = world.subscribe(1);
            assert_eq!(serial(&mut again, &world.clock).await, Ok("1".into()));
            drop(again);
            tokio::time::sleep(Duration::from_secs(40)).await;
            assert!(world.cache.is_empty());
            tokio::time::sleep(24 * HOUR).await;
            assert_eq!(world.calls(), 1);
        })
        .await;
}

#[tokio::test(start_paused = true)]
async fn what_is_old_comes_from_the_shelf_only_if_the_cluster_does_not_answer() {
    for (age, trouble, delay, expected, longest) in [
        (30, None, 0, "1", 0),
        (55, None, 1, "2", 1),
        (55, Some(outage()), 1, "1", 1),
        (55, Some(IssueError::Answer("odd".into())), 1, "1", 1),
        (55, None, 3, "1", 2),
    ] {
        let world = world();
        let mut first = world.subscribe_known();
        world
            .run(async {
                serial(&mut first, &world.clock).await.unwrap();
                drop(first);
                world.clock.sleep_until(start() + age * MINUTE).await;
                assert!(world.cache.is_empty());
                world.fail_with(trouble);
                *world.fake.delay.lock().unwrap() = Duration::from_secs(delay);
                let came = world.clock.now();
                let mut again = world.subscribe_known();
                let told = serial(&mut again, &world.clock).await;
                assert_eq!(told.as_deref(), Ok(expected), "{age} min, {delay} s");
                let waited = world.clock.now().duration_since(came).unwrap();
                assert!(
                    waited.as_secs() <= longest,
                    "{age} min, {delay} s: {waited:?}"
                );
                if delay == 3 {
                    again.state().changed().await.unwrap();
                    assert_eq!(serial(&mut again, &world.clock).await, Ok("2".into()));
                }
            })
            .await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_change_for_everybody_renews_everybody_soon() {
    let world = world();
    let mut all: Vec<Subscription> = (0..50).map(|pid| world.subscribe(pid)).collect();
    world
        .run(async {
            for subscription in &mut all {
                serial(subscription, &world.clock).await.unwrap();
                subscription.state().mark_unchanged();
            }
            let before = world.clock.now();
            world.cache.renew_all();
            for subscription in &mut all {
                subscription.state().changed().await.unwrap();
            }
            let took = world.clock.now().duration_since(before).unwrap();
            assert!(took < Duration::from_secs(11), "{took:?}");
            assert_eq!(world.calls(), 100);
        })
        .await;
}

#[tokio::test(start_paused = true)]
async fn an_answer_that_was_under_way_when_all_were_to_renew_is_renewed_too() {
    let world = world_with(20 * MINUTE, 30 * Duration::from_secs(1));
    let mut subscription = world.subscribe(1);
    world
        .run(async {
            world.clock.sleep(Duration::from_secs(5)).await;
            assert_eq!(world.calls(), 1);
            world.cache.renew_all();
            assert_eq!(
                serial(&mut subscription, &world.clock).await,
                Ok("1".into())
            );
            let answered = world.clock.now();
            subscription.state().mark_unchanged();
            subscription.state().changed().await.unwrap();
            let took = world.clock.now().duration_since(answered).unwrap();
            assert!(took < Duration::from_secs(41), "{took:?}");
            // And that is all.
            world.clock.sleep(15 * MINUTE).await;
            assert_eq!(world.calls(), 2);
        })
        .await;
}

#[tokio::test(start_paused = true)]
async fn what_is_issued_after_all_were_to_renew_is_new_whatever_the_clock_says() {
    let mut world = world();
    world.cache.renew_all();
    world.set_back(10 * MINUTE);
    let mut subscription = world.subscribe(1);
    world
        .run(async {
            serial(&mut subscription, &world.clock).await.unwrap();
            world.clock.sleep(5 * MINUTE).await;
            assert_eq!(world.calls(), 1);
        })
        .await;
}

#[tokio::test(start_paused = true)]
async fn a_clock_that_is_set_back_prolongs_neither_a_refusal_nor_a_wait() {
    let mut world = world();
    world.fake.script.lock().unwrap().push_back(refusal());
    let mut refused = world.subscribe(1);
    world
        .run(async {
            assert!(serial(&mut refused, &world.clock).await.is_err());
            drop(refused);
            drop(world.subscribe(2));
        })
        .await;
    world.set_back(10 * MINUTE);
    world
        .run(async {
            world.clock.sleep(Duration::from_secs(2)).await;
            for pid in [1, 2] {
                let mut again = world.subscribe(pid);
                let told = serial(&mut again, &world.clock);
                let told = tokio::time::timeout(Duration::from_secs(5), told).await;
                assert!(matches!(told, Ok(Ok(_))), "{pid}: {told:?}");
            }
        })
        .await;
}

#[tokio::test(start_paused = true)]
async fn requests_in_flight_are_few() {
    for (users, least) in [(1, 6), (4, 4)] {
        let world = world_with(20 * MINUTE, Duration::from_secs(1));
        let mut all: Vec<Subscription> = (0..64)
            .map(|pid: i32| world.subscribe_as(pid.unsigned_abs() % users, pid))
            .collect();
        world
            .run(async {
                for subscription in &mut all {
                    serial(subscription, &world.clock).await.unwrap();
                }
                // 64 requests of a second each: 16 at a time, of one user 12.
                let took = world.clock.now().duration_since(start()).unwrap();
                assert!(took >= Duration::from_secs(least), "{took:?}");
                assert!(took < Duration::from_secs(least + 1), "{took:?}");
            })
            .await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_users_flood_delays_no_first_svid_of_others_and_no_renewal() {
    let world = world_with(20 * MINUTE, Duration::from_secs(1));
    let (mut own, mut others) = (world.subscribe_as(1, 1), world.subscribe_as(2, 2));
    world
        .run(async {
            serial(&mut own, &world.clock).await.unwrap();
            serial(&mut others, &world.clock).await.unwrap();
            // Two minutes' work for the cluster, just before the two are to be renewed.
            world.clock.sleep_until(start() + 17 * MINUTE).await;
            own.state().mark_unchanged();
            others.state().mark_unchanged();
            let _flood: Vec<_> = (10..4000).map(|pid| world.subscribe_as(1, pid)).collect();
            world.clock.sleep(Duration::from_secs(1)).await;
            let before = world.clock.now();
            let mut first = world.subscribe_as(2, 3);
            serial(&mut first, &world.clock).await.unwrap();
            let took = world.clock.now().duration_since(before).unwrap();
            assert!(took < Duration::from_secs(2), "{took:?}");
            for held in [&mut own, &mut others] {
                held.state().changed().await.unwrap();
                assert!(world.clock.now() < start() + 20 * MINUTE + Duration::from_secs(2));
            }
        })
        .await;
}

#[tokio::test(start_paused = true)]
async fn what_nobody_waits_for_any_more_is_not_asked_for() {
    let world = world_with(20 * MINUTE, Duration::from_secs(1));
    let all: Vec<Subscription> = (0..100).map(|pid| world.subscribe(pid)).collect();
    world
        .run(async {
            world.clock.sleep(Duration::from_millis(100)).await;
            let under_way = world.calls();
            drop(all);
            let mut last = world.subscribe(99);
            serial(&mut last, &world.clock).await.unwrap();
            assert_eq!(world.calls(), under_way + 1);
            drop(last);
            world.clock.sleep(2 * MINUTE).await;
            assert_eq!(world.calls(), under_way + 1);
            assert!(world.cache.is_empty());
        })
        .await;
}
