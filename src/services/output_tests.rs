//! The schedule as a table, and days of renewals in simulated time.

use std::sync::Mutex;

use super::*;
use crate::health::{Registry, Status};

const HOUR: Duration = Duration::from_hours(1);
const INTERVAL: Duration = Duration::from_mins(20);

fn t0() -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_secs(1_700_000_000)
}

fn seconds(from: SystemTime, to: SystemTime) -> u64 {
    to.duration_since(from).unwrap().as_secs()
}

#[test]
fn what_is_due_is_renewed_and_a_clock_set_back_does_not_stop_it() {
    let mut schedule = Schedule::new(t0(), INTERVAL);
    schedule.due = t0();
    for (case, now, step) in [
        ("at the point", t0(), Step::Renew),
        ("after it", t0() + HOUR, Step::Renew),
        ("before it", t0() - HOUR / 6, Step::Wait(t0())),
        ("a day before it", t0() - 24 * HOUR, Step::Renew),
    ] {
        assert_eq!(schedule.next(now), step, "{case}");
    }
}

#[test]
fn success_waits_for_the_interval_or_two_thirds_of_the_life() {
    for (life, random, expected) in [
        (HOUR, 0.0, 1140),
        (HOUR, 0.5, 1080),
        (HOUR, 1.0, 1020),
        (Duration::from_mins(15), 0.0, 570),
        (Duration::from_mins(15), 1.0, 510),
        (Duration::ZERO, 0.5, 1),
    ] {
        let mut schedule = Schedule::new(t0(), INTERVAL);
        schedule.succeeded(t0(), t0() + life, random);
        assert_eq!(seconds(t0(), schedule.due), expected, "{life:?} {random}");
        assert!(schedule.due <= fresh_until(t0(), t0() + life) || life.is_zero());
    }
}

#[test]
fn a_credential_that_is_written_again_is_due_when_it_was() {
    let mut schedule = Schedule::new(t0(), INTERVAL);
    let not_after = t0() + HOUR;
    let fresh = schedule.succeeded(t0(), not_after, 0.0);
    for minute in 1..19 {
        let now = t0() + minute * Duration::from_mins(1);
        schedule.changed(now, 0.5);
        assert_eq!(schedule.next(now), Step::Wait(now + AFTER_CHANGE / 2));
        let again = schedule.succeeded(now, not_after, 0.0);
        assert_eq!((seconds(t0(), schedule.due), again), (1140, fresh));
    }
    let now = t0() + INTERVAL;
    schedule.succeeded(now, now + HOUR, 0.0);
    assert_eq!(seconds(now, schedule.due), 1140, "another one");
}

#[test]
fn a_change_never_delays_and_does_not_hide_failures() {
    let mut schedule = Schedule::new(t0(), INTERVAL);
    schedule.changed(t0(), 1.0);
    assert_eq!(schedule.due, t0(), "due already");
    let ended: Vec<bool> = (0..5)
        .map(|_| {
            let ended = schedule.failed(t0(), 1.0);
            schedule.changed(t0(), 0.0);
            assert_eq!(schedule.due, t0());
            ended
        })
        .collect();
    assert_eq!(ended, [false, false, false, false, true]);
}

#[test]
fn a_round_has_five_attempts_and_rounds_get_rarer_up_to_the_interval() {
    let mut schedule = Schedule::new(t0(), INTERVAL);
    let mut waits = Vec::new();
    for _ in 0..7 {
        let round: Vec<u64> = (1..=5)
            .map(|attempt| {
                assert_eq!(schedule.failed(t0(), 1.0), attempt == 5);
                seconds(t0(), schedule.due)
            })
            .collect();
        assert_eq!(round[..4], [1, 2, 4, 8]);
        waits.push(round[4]);
    }
    assert_eq!(waits, [60, 120, 240, 480, 960, 1200, 1200]);
    schedule.succeeded(t0(), t0() + HOUR, 0.0);
    assert!(!schedule.failed(t0(), 1.0));
    assert_eq!(seconds(t0(), schedule.due), 1, "success starts over");
}

#[test]
fn a_reload_is_due_at_once_with_all_its_attempts() {
    let mut schedule = Schedule::new(t0(), INTERVAL);
    for _ in 0..3 {
        schedule.failed(t0(), 1.0);
    }
    schedule.reload(t0());
    assert_eq!(schedule.next(t0()), Step::Renew);
    let ended: Vec<bool> = (0..5).map(|_| schedule.failed(t0(), 1.0)).collect();
    assert_eq!(ended, [false, false, false, false, true]);
}

/// Fails while `broken`, and notes when it was tried. While `restless` it is out of date every
/// second, which the same credential mends.
struct Fake {
    clock: Clock,
    broken: Mutex<bool>,
    restless: Mutex<bool>,
    again: Mutex<bool>,
    not_after: Mutex<SystemTime>,
    tried: Mutex<Vec<(SystemTime, bool)>>,
}

impl Fake {
    fn issued(&self) -> SystemTime {
        *self.not_after.lock().unwrap() - HOUR
    }
}

#[async_trait]
impl Renew for Fake {
    async fn attempt(&self) -> anyhow::Result<SystemTime> {
        let broken = *self.broken.lock().unwrap();
        let now = self.clock.now();
        self.tried.lock().unwrap().push((now, !broken));
        anyhow::ensure!(!broken, "the disk is full");
        let mut not_after = self.not_after.lock().unwrap();
        // As outputs do: what may be due is not written again.
        let young = now < *not_after - HOUR + INTERVAL / 4 * 3;
        if !(std::mem::take(&mut *self.again.lock().unwrap()) && young) {
            *not_after = now + HOUR;
        }
        Ok(*not_after)
    }

    async fn changed(&self) {
        if !*self.restless.lock().unwrap() {
            return std::future::pending().await;
        }
        self.clock.sleep(Duration::from_secs(1)).await;
        *self.again.lock().unwrap() = true;
    }
}

struct World {
    clock: Clock,
    fake: Arc<Fake>,
    registry: Registry,
    reload: watch::Sender<u64>,
    shutdown: CancellationToken,
    running: tokio::task::JoinHandle<()>,
}

impl World {
    fn start(broken: bool) -> Self {
        let clock = Clock::simulated(t0());
        let registry = Registry::new(clock.clone());
        let (reload, reloads) = watch::channel(0);
        let shutdown = CancellationToken::new();
        let fake = Arc::new(Fake {
            clock: clock.clone(),
            broken: Mutex::new(broken),
            restless: Mutex::default(),
            again: Mutex::default(),
            not_after: Mutex::new(t0()),
            tried: Mutex::default(),
        });
        let driver = Driver {
            clock: clock.clone(),
            schedule: Schedule::new(t0(), INTERVAL),
            name: "out".into(),
            voice: Voice::new(registry.reporter("out")),
            metrics: Metrics::new(),
            reload: reloads,
            shutdown: shutdown.clone(),
        };
        let renew = Arc::clone(&fake);
        let running = tokio::spawn(async move { driver.run(renew.as_ref()).await });
        Self {
            clock,
            fake,
            registry,
            reload,
            shutdown,
            running,
        }
    }

    fn set_broken(&self, broken: bool) {
        *self.fake.broken.lock().unwrap() = broken;
    }

    fn tried(&self) -> Vec<(SystemTime, bool)> {
        self.fake.tried.lock().unwrap().clone()
    }

    fn status(&self) -> Status {
        self.registry.snapshot().services["out"].status
    }

    async fn stop(self) {
        self.shutdown.cancel();
        self.running.await.unwrap();
    }
}

#[tokio::test(start_paused = true)]
async fn a_week_of_renewals_is_never_stale() {
    let world = World::start(false);
    for _ in 0..7 * 24 * 6 {
        world.clock.sleep(Duration::from_mins(10)).await;
        assert_eq!(world.status(), Status::Healthy);
    }
    let tried = world.tried();
    for pair in tried.windows(2) {
        let wait = seconds(pair[0].0, pair[1].0);
        assert!((1020..=1140).contains(&wait), "{wait}");
    }
    assert!((530..=600).contains(&tried.len()), "{}", tried.len());
    world.stop().await;
}

#[tokio::test(start_paused = true)]
async fn an_outage_is_told_after_a_round_and_ends_by_itself() {
    let world = World::start(true);
    world.clock.sleep(Duration::from_secs(20)).await;
    assert_eq!(world.tried().len(), 5);
    assert_eq!(world.status(), Status::Unhealthy);
    let reason = world.registry.snapshot().services["out"].reason.clone();
    assert_eq!(reason.as_deref(), Some("the disk is full"));
    world.clock.sleep(5 * HOUR).await;
    assert!(
        world.tried().len() < 150,
        "courtesy: {}",
        world.tried().len()
    );
    world.set_broken(false);
    world.clock.sleep(INTERVAL).await;
    assert_eq!(world.status(), Status::Healthy);
    world.stop().await;
}

#[tokio::test(start_paused = true)]
async fn what_is_written_stays_healthy_until_it_is_too_old() {
    let world = World::start(false);
    world.clock.sleep(Duration::from_secs(1)).await;
    world.set_broken(true);
    world.clock.sleep(Duration::from_mins(16)).await;
    assert_eq!(world.status(), Status::Healthy, "not due yet");
    world.clock.sleep(Duration::from_mins(5)).await;
    assert_eq!(world.status(), Status::Unhealthy, "a whole round failed");
    world.stop().await;
}

#[tokio::test(start_paused = true)]
async fn a_reload_renews_at_once_and_one_during_a_wait_is_not_lost() {
    let world = World::start(false);
    world.clock.sleep(Duration::from_mins(1)).await;
    assert_eq!(world.tried().len(), 1);
    for count in 2..5 {
        world.reload.send_modify(|count| *count += 1);
        world.clock.sleep(Duration::from_secs(1)).await;
        assert_eq!(world.tried().len(), count);
    }
    world.stop().await;
}

#[tokio::test(start_paused = true)]
async fn changes_without_an_end_do_not_starve_the_renewal() {
    let world = World::start(false);
    *world.fake.restless.lock().unwrap() = true;
    world.reload.send_modify(|count| *count += 1);
    for minute in 0..4 * 60 {
        world.clock.sleep(Duration::from_mins(1)).await;
        let age = seconds(world.fake.issued(), world.clock.now());
        assert!(age <= 1200 + 5, "minute {minute}: {age} s old");
        assert_eq!(world.status(), Status::Healthy);
    }
    let tried = world.tried().len();
    assert!((1000..=14_000).contains(&tried), "courtesy: {tried}");
    world.stop().await;
}

/// An output whose one file has the content that it is told.
#[derive(Debug)]
struct Told {
    place: Arc<dyn Destination>,
    content: Arc<Mutex<&'static str>>,
}

#[async_trait]
impl Output for Told {
    fn destination(&self) -> Arc<dyn Destination> {
        Arc::clone(&self.place)
    }

    async fn make(&self, context: &Context) -> anyhow::Result<Made> {
        let content = self.content.lock().unwrap().as_bytes().to_vec();
        Ok(Made {
            files: FileSet::from([("a".to_owned(), content.into())]),
            not_after: context.clock.now() + HOUR,
        })
    }
}

fn context(registry: &Registry, clock: &Clock) -> Context {
    let identity = crate::identity::Handle::new(
        clock.clone(),
        Arc::new(crate::cluster::dial::Tcp),
        crate::cluster::client::Route::Direct("nowhere:3025".to_owned()),
        crate::cluster::trust::Trust::default(),
        false,
        watch::channel(None).1,
        watch::channel(None).1,
        watch::channel(0).1,
    );
    Context {
        clock: clock.clone(),
        identity,
        sockets: crate::services::Sockets::default(),
        trust: crate::services::Trust::default(),
        shelf: crate::workload::Shelf::default(),
        lifetime: crate::services::Lifetime::default(),
        name: "out".into(),
        health: registry.reporter("out"),
        metrics: Metrics::new(),
        shutdown: CancellationToken::new(),
    }
}

#[tokio::test]
async fn hooks_are_told_of_writes_that_change_something() {
    let clock = Clock::simulated(t0());
    let registry = Registry::new(clock.clone());
    let content = Arc::new(Mutex::new("one"));
    let (written, changes) = watch::channel(0);
    let renewal = Renewal {
        output: Box::new(Told {
            place: crate::destination::from_uri("memory://").unwrap().build(),
            content: Arc::clone(&content),
        }),
        context: context(&registry, &clock),
        written: Some(written),
    };
    for (text, count) in [("one", 1), ("one", 1), ("two", 2), ("two", 2), ("one", 3)] {
        *content.lock().unwrap() = text;
        renewal.attempt().await.unwrap();
        assert_eq!(*changes.borrow(), count, "{text}");
    }
}

#[tokio::test]
async fn a_run_that_is_the_only_one_has_its_hooks_within() {
    let base = tempfile::tempdir().unwrap();
    let mark = base.path().join("mark");
    let place = crate::destination::from_uri("memory://").unwrap().build();
    for (program, fails) in [("touch", false), ("touch", false), ("false", true)] {
        let clock = Clock::simulated(t0());
        let registry = Registry::new(clock.clone());
        let content = if fails { "two" } else { "one" };
        let output = Box::new(Told {
            place: Arc::clone(&place),
            content: Arc::new(Mutex::new(content)),
        });
        let plan = reload::Plan {
            exec: vec![program.to_owned(), mark.to_str().unwrap().to_owned()],
            signal: None,
            systemd: None,
            timeout: Duration::from_secs(60),
        };
        let known = mark.exists();
        if known {
            std::fs::remove_file(&mark).unwrap();
        }
        let outcome = run_once(output, Some(plan), context(&registry, &clock)).await;
        assert_eq!(outcome.is_err(), fails);
        // The second time nothing changed, so that nothing ran.
        assert_eq!(mark.exists(), !known && !fails);
        let report = registry.snapshot().services["out"].clone();
        assert_eq!(report.status == Status::Unhealthy, fails);
        assert_eq!(
            report
                .reason
                .is_some_and(|why| why.starts_with("reload: exec: false")),
            fails
        );
    }
    let kept = place.read("a").await.unwrap().unwrap();
    assert_eq!(kept.expose(), b"two", "what was written stays");
}
