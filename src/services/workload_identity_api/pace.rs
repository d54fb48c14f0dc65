//! How a user's thread shares the processors with everything else on the machine.
//!
//! A thread that answers now and then goes before others: its callers wait for a moment of it, whatever keeps
//! the processors busy meanwhile, a flood by somebody else among it. One that always has something to do goes
//! with them, as what a user has the agent do is to cost the others no more than what the user does itself.
//!
//! So each thread has a budget of processor time for going before others, which fills up as time passes.

use std::cell::RefCell;
use std::time::Duration;

use rustix::process::{getpid, getpriority_process, setpriority_process};
use rustix::time::{ClockId, clock_gettime};
use tokio::time::Instant;

/// Of any so many parts of time, the budget grows by one.
const PARTS: u32 = 4;
/// The most that it comes to.
const MOST: Duration = Duration::from_millis(20);
/// How much it has to be, for a thread that had used it up to go before others again.
const ENOUGH: Duration = Duration::from_millis(10);
/// How often accounts are settled at most, as reading the clock of a thread is a system call.
const TICK: Duration = Duration::from_millis(1);

thread_local! {
    static PACE: RefCell<Option<Pace>> = const { RefCell::new(None) };
}

/// The nice value of this process, as whoever started it wanted it: that of its first thread.
fn usual() -> i32 {
    getpriority_process(Some(getpid())).unwrap_or_default()
}

/// The calling thread goes with others from now on. Threads begin with the priority of those that begin them.
pub(super) fn with_others() {
    // To go down needs no right.
    let _lowered = setpriority_process(None, usual());
}

/// The calling thread goes before others from now on, as far as its budget goes and if the process may do
/// that: `before` is the nice value for it, and a thread that may have it has it already.
pub(super) fn before_others(before: i32) {
    let may = getpriority_process(None).is_ok_and(|now| now <= before);
    let usual = usual();
    if may && before < usual {
        PACE.set(Some(Pace {
            budget: Budget::new(Instant::now(), used()),
            before,
            usual,
            goes_before: true,
        }));
    } else {
        with_others();
    }
}

/// The calling thread begins to wait for work, or goes on with it.
pub(super) fn turned() {
    with_pace(|pace| {
        let now = Instant::now();
        if now.duration_since(pace.budget.at) >= TICK {
            pace.settle(now);
        }
    });
}

/// The calling thread is at work, perhaps for long.
pub(super) fn worked() {
    with_pace(|pace| {
        if pace.goes_before {
            let now = Instant::now();
            if pace.budget.may_be_used_up(now) {
                pace.settle(now);
            }
        }
    });
}

/// The calling thread has more to do than it should have.
pub(super) fn crowded() {
    with_pace(|pace| {
        pace.budget.left = Duration::ZERO;
        pace.follow();
    });
}

fn with_pace(act: impl FnOnce(&mut Pace)) {
    PACE.with_borrow_mut(|pace| pace.as_mut().map(act));
}

/// The processor time that the calling thread has used.
fn used() -> Duration {
    Duration::try_from(clock_gettime(ClockId::ThreadCPUTime)).unwrap_or_default()
}

/// The pace of one thread.
#[derive(Debug)]
struct Pace {
    budget: Budget,
    /// The two nice values, and which of them the thread has.
    before: i32,
    usual: i32,
    goes_before: bool,
}

impl Pace {
    fn settle(&mut self, now: Instant) {
        self.budget.settle(now, used());
        self.follow();
    }

    /// Has the priority that goes with the budget.
    fn follow(&mut self) {
        let before = goes_before(self.goes_before, self.budget.left);
        if before != self.goes_before {
            self.goes_before = before;
            let nice = if before { self.before } else { self.usual };
            // The way back needs the right that the thread had when it began.
            let _changed = setpriority_process(None, nice);
        }
    }
}

/// Whether a thread that went before others, or did not, is to do so now.
fn goes_before(went: bool, left: Duration) -> bool {
    if went {
        !left.is_zero()
    } else {
        left >= ENOUGH
    }
}

/// Processor time for going before others.
#[derive(Debug)]
struct Budget {
    left: Duration,
    /// When that was, and how much the thread had used by then.
    at: Instant,
    used: Duration,
}

impl Budget {
    fn new(at: Instant, used: Duration) -> Self {
        Self {
            left: MOST,
            at,
            used,
        }
    }

    fn settle(&mut self, now: Instant, used: Duration) {
        let earned = now.duration_since(self.at) / PARTS;
        let spent = used.saturating_sub(self.used);
        self.left = (self.left + earned).min(MOST).saturating_sub(spent);
        (self.at, self.used) = (now, used);
    }

    /// Whether it could be used up by now. No thread uses more processor time than passes.
    fn may_be_used_up(&self, now: Instant) -> bool {
        now.duration_since(self.at) >= self.left
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn ms(number: u64) -> Duration {
        Duration::from_millis(number)
    }

    /// What is left after `rounds` in which a thread waits and then works, in ms.
    fn left_after(rounds: u32, waits: u64, works: u64) -> Duration {
        let (mut now, mut used) = (Instant::now(), ms(5));
        let mut budget = Budget::new(now, used);
        for _ in 0..rounds {
            now += ms(waits);
            budget.settle(now, used);
            now += ms(works);
            used += ms(works);
            budget.settle(now, used);
        }
        budget.left
    }

    #[test]
    fn a_quarter_of_the_time_is_had_for_ever() {
        assert!(left_after(1000, 3, 1) > ms(18));
        assert!(left_after(1000, 30, 10) >= ms(10));
    }

    #[test]
    fn more_is_had_for_a_while() {
        assert!(left_after(10, 1, 1) > ms(0));
        assert_eq!(left_after(100, 1, 1), ms(0));
        assert!(left_after(1, 0, 20) <= ms(5));
        assert_eq!(left_after(1, 0, 30), ms(0));
        assert_eq!(left_after(1, 1_000_000, 100), ms(0));
    }

    #[test]
    fn time_off_the_processor_is_not_spent() {
        let now = Instant::now();
        let mut budget = Budget::new(now, ms(0));
        assert!(!budget.may_be_used_up(now + ms(19)));
        assert!(budget.may_be_used_up(now + ms(20)));
        budget.settle(now + ms(20), ms(1));
        assert_eq!(budget.left, ms(19));
    }

    #[test]
    fn who_used_it_up_goes_with_others_until_there_is_enough_again() {
        for (went, left, goes) in [
            (true, MOST, true),
            (true, ms(1), true),
            (true, ms(0), false),
            (false, ms(0), false),
            (false, ms(9), false),
            (false, ENOUGH, true),
        ] {
            assert_eq!(goes_before(went, left), goes, "{went} {left:?}");
        }
    }
}
