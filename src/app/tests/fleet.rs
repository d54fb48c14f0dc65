//! A thousand agents and the cluster that serves them, as nothing but their timers: the schedules and
//! backoffs are the real ones, calls take no time. What is counted is what reaches the cluster.
//!
//! The measure is the busiest window, against the busiest window of the same length on an ordinary
//! day: ten seconds hold a few dozen calls, and an average would compare chance with expectation.
//! Certificates are one measure; their keys and signatures are the work. Streams of news are another,
//! because on an ordinary day nobody opens any.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::time::{Duration, SystemTime};

use super::super::rotation::{self, News};
use crate::backoff::Backoff;
use crate::cluster::Disposition;
use crate::identity::state::{self, Failures, Held, Step};
use crate::renewal;
use crate::services::Lifetime;
use crate::services::output::{Schedule, Step as Due};

const AGENTS: usize = 1000;
/// An ordinary time, by which the rest is judged.
const ORDINARY: Duration = Duration::from_hours(3);
const OUTAGE: Duration = Duration::from_mins(10);
const MINUTE: Duration = Duration::from_mins(1);

/// Calls of one renewal of the bot's identity: the suite, the certificates.
const OF_BOT: u32 = 2;
/// Calls of one identity output: role, suite, host authorities, certificates, and the lists of
/// authorities of three types.
const OF_OUTPUT: u32 = 7;
/// Calls that follow each of the streams an agent holds: rotations (with three lists), bundles (with
/// two), revocations.
const OF_STREAMS: [u32; 3] = [4, 3, 1];

/// Numbers that are the same in each run.
struct Random(u64);

impl Random {
    fn next(&mut self) -> f64 {
        // Knuth's MMIX constants; the upper bits are the good ones.
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        f64::from(u32::try_from(self.0 >> 32).unwrap()) / f64::from(u32::MAX)
    }
}

/// What an agent's timer is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Timer {
    Bot,
    Output,
    Stream(usize),
    Reload,
}

struct Agent {
    held: Held,
    failures: Failures,
    output: Schedule,
    streams: [Backoff; 3],
}

struct Fleet {
    now: SystemTime,
    lifetime: Lifetime,
    random: Random,
    agents: Vec<Agent>,
    /// Wakes, the earliest first. Those that were overtaken find nothing due.
    queue: BinaryHeap<Reverse<(SystemTime, usize, Timer)>>,
    reachable: bool,
    /// When each call for certificates reached the cluster.
    calls: Vec<SystemTime>,
    /// The same of streams that were opened again.
    opened: Vec<SystemTime>,
}

impl Fleet {
    /// Agents that were started one after the other within an interval, at an ordinary time.
    fn new(lifetime: Lifetime, seed: u64) -> Self {
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(1_800_000_000);
        let mut fleet = Self {
            now,
            lifetime,
            random: Random(seed),
            agents: Vec::new(),
            queue: BinaryHeap::new(),
            reachable: true,
            calls: Vec::new(),
            opened: Vec::new(),
        };
        for id in 0..AGENTS {
            let born = now + lifetime.interval.mul_f64(fleet.random.next());
            let held = Held {
                not_before: now,
                not_after: born + lifetime.ttl,
                renewable: true,
                renew_at: born,
                fresh_until: born + lifetime.ttl * 2 / 3,
            };
            fleet.agents.push(Agent {
                held,
                failures: Failures::none(),
                output: Schedule::new(born, lifetime.interval),
                streams: [(); 3].map(|()| Backoff::of_streams()),
            });
            fleet.wake(born, id, Timer::Bot);
            fleet.wake(born, id, Timer::Output);
        }
        // Until the start is forgotten.
        fleet.run(Duration::from_hours(6));
        fleet
    }

    fn wake(&mut self, at: SystemTime, id: usize, timer: Timer) {
        self.queue.push(Reverse((at, id, timer)));
    }

    fn run(&mut self, duration: Duration) {
        let end = self.now + duration;
        while let Some(Reverse((at, ..))) = self.queue.peek()
            && *at < end
            && let Some(Reverse((at, id, timer))) = self.queue.pop()
        {
            self.now = at.max(self.now);
            match timer {
                Timer::Bot => self.bot(id),
                Timer::Output => self.output(id),
                Timer::Stream(which) => self.stream(id, which),
                Timer::Reload => self.reload(id),
            }
        }
        self.now = end;
    }

    /// Whether the cluster answers; it has seen `count` calls then.
    fn call(&mut self, count: u32) -> bool {
        if self.reachable {
            self.calls.extend((0..count).map(|_| self.now));
        }
        self.reachable
    }

    fn bot(&mut self, id: usize) {
        let now = self.now;
        if let Step::Wait(_) = state::decide(now, Some(&self.agents[id].held)) {
            return;
        }
        let answered = self.call(OF_BOT);
        let random = [self.random.next(), self.random.next()];
        let Lifetime { ttl, interval } = self.lifetime;
        let agent = &mut self.agents[id];
        let next = if answered {
            agent.failures = Failures::none();
            agent.held = Held {
                not_before: now,
                not_after: now + ttl,
                renewable: true,
                renew_at: renewal::due(now, now + ttl, interval, random[0]),
                fresh_until: renewal::fresh_until(now, now + ttl),
            };
            agent.held.renew_at
        } else {
            let held = Some(&agent.held);
            let wait = agent
                .failures
                .wait(now, held, Disposition::Retry, interval, random);
            now + wait
        };
        self.wake(next, id, Timer::Bot);
    }

    fn output(&mut self, id: usize) {
        let now = self.now;
        if let Due::Wait(_) = self.agents[id].output.next(now) {
            return;
        }
        let answered = self.call(OF_OUTPUT);
        let random = self.random.next();
        let schedule = &mut self.agents[id].output;
        if answered {
            schedule.succeeded(now, now + self.lifetime.ttl, random);
        } else {
            schedule.failed(now, random);
        }
        if let Due::Wait(until) = schedule.next(now) {
            self.wake(until, id, Timer::Output);
        }
    }

    fn stream(&mut self, id: usize, which: usize) {
        if self.reachable {
            let calls = (0..OF_STREAMS[which]).map(|_| self.now);
            self.opened.extend(calls);
            self.agents[id].streams[which].reset();
        } else {
            self.lost(id, which);
        }
    }

    fn lost(&mut self, id: usize, which: usize) {
        let random = self.random.next();
        let wait = self.agents[id].streams[which].next_wait(random);
        self.wake(self.now + wait, id, Timer::Stream(which));
    }

    fn reload(&mut self, id: usize) {
        let now = self.now;
        let agent = &mut self.agents[id];
        agent.held.renew_at = now;
        agent.output.reload(now);
        self.bot(id);
        self.output(id);
    }

    /// The cluster goes away, with every stream, and comes back.
    fn outage(&mut self) {
        self.reachable = false;
        for id in 0..AGENTS {
            for which in 0..OF_STREAMS.len() {
                self.lost(id, which);
            }
        }
        self.run(OUTAGE);
        self.reachable = true;
    }

    /// All agents hear of a phase of a rotation in the same moment.
    fn rotation(&mut self) {
        for id in 0..AGENTS {
            let random = self.random.next();
            let wait = rotation::spread(News::Step, self.lifetime.interval, random);
            self.wake(self.now + rotation::DEBOUNCE + wait, id, Timer::Reload);
        }
    }

    /// The busiest window of the next hours after `event`, in parts of the busiest of the hours before.
    fn busier_after(&mut self, event: fn(&mut Self), window: Duration) -> f64 {
        let begin = self.now;
        self.run(ORDINARY);
        let ordinary = peak(&self.calls, begin, window);
        event(self);
        let begin = self.now;
        self.run(ORDINARY);
        peak(&self.calls, begin, window) / ordinary
    }
}

/// The most calls of any window from `from` on.
fn peak(calls: &[SystemTime], from: SystemTime, window: Duration) -> f64 {
    let calls = &calls[calls.partition_point(|at| *at < from)..];
    let mut first = 0;
    let mut most = 0;
    for (last, at) in calls.iter().enumerate() {
        while calls[first] + window <= *at {
            first += 1;
        }
        most = most.max(last + 1 - first);
    }
    f64::from(u32::try_from(most).unwrap())
}

#[test]
fn a_thousand_agents_do_not_stampede() {
    for (name, event) in [
        ("an outage", Fleet::outage as fn(&mut Fleet)),
        ("a phase of a rotation", Fleet::rotation),
    ] {
        for window in [Duration::from_secs(10), MINUTE, 5 * MINUTE] {
            for seed in 1..=3 {
                let mut fleet = Fleet::new(Lifetime::default(), seed);
                let ratio = fleet.busier_after(event, window);
                assert!(
                    ratio <= 2.0,
                    "{name}, {window:?}, {seed}: {ratio:.2} times as busy"
                );
            }
        }
    }
}

#[test]
fn streams_come_back_spread_over_as_long_as_they_were_away() {
    for seed in 1..=3 {
        let mut fleet = Fleet::new(Lifetime::default(), seed);
        let all = f64::from(OF_STREAMS.iter().sum::<u32>()) * 1000.0;
        fleet.busier_after(Fleet::outage, MINUTE);
        let begin = fleet.now - ORDINARY;
        let most = peak(&fleet.opened, begin, MINUTE);
        assert!(most <= all / 4.0, "{most} calls in a minute");
        let last = *fleet.opened.last().unwrap();
        assert!(last <= begin + OUTAGE, "the last one came too late");
        let opened = fleet.opened.len();
        assert_eq!(
            f64::from(u32::try_from(opened).unwrap()).total_cmp(&all),
            std::cmp::Ordering::Equal
        );
    }
}
