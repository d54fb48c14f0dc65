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
        (Duration::ZERO, 0.5, 0),
    ] {
        let mut schedule = Schedule::new(t0(), INTERVAL);
        schedule.succeeded(t0(), t0() + life, random);
        assert_eq!(seconds(t0(), schedule.due), expected, "{life:?} {random}");
        assert!(schedule.due <= fresh_until(t0(), t0() + life));
    }
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

/// Fails while `broken`, and notes when it was tried.
struct Fake {
    clock: Clock,
    broken: Mutex<bool>,
    tried: Mutex<Vec<(SystemTime, bool)>>,
}

#[async_trait]
impl Renew for Fake {
    async fn attempt(&self) -> anyhow::Result<SystemTime> {
        let broken = *self.broken.lock().unwrap();
        let now = self.clock.now();
        self.tried.lock().unwrap().push((now, !broken));
        anyhow::ensure!(!broken, "the disk is full");
        Ok(now + HOUR)
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
            tried: Mutex::default(),
        });
        let driver = Driver {
            clock: clock.clone(),
            schedule: Schedule::new(t0(), INTERVAL),
            name: "out".into(),
            health: registry.reporter("out"),
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
