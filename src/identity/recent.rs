//! Answers that everyone who asks within the same moment shares: outputs are renewed together, and
//! what one of them learned of the cluster need not be asked again by the next.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime};

use crate::clock::Clock;

/// How long an answer is passed on. Long enough for outputs that are renewed together, too short
/// for anyone to notice.
const KEPT: Duration = Duration::from_secs(5);

/// The last answer to one question.
#[derive(Debug)]
pub(super) struct Recent<T> {
    held: tokio::sync::Mutex<Option<Answer<T>>>,
    failures: AtomicU64,
}

#[derive(Debug)]
struct Answer<T> {
    value: T,
    at: SystemTime,
    /// The count of reloads when it was asked for: after another one, it is old.
    reload: u64,
}

impl<T> Default for Recent<T> {
    fn default() -> Self {
        Self {
            held: tokio::sync::Mutex::default(),
            failures: AtomicU64::default(),
        }
    }
}

impl<T: Clone> Recent<T> {
    /// The answer of a moment ago, or else that of `ask`. One caller asks and the others wait for
    /// it; if it fails, they ask for themselves, all at once.
    pub(super) async fn get<E>(
        &self,
        clock: &Clock,
        reload: u64,
        ask: impl Future<Output = Result<T, E>>,
    ) -> Result<T, E> {
        let failures = self.failures.load(Ordering::Relaxed);
        let mut held = self.held.lock().await;
        if let Some(answer) = held.as_ref()
            && answer.reload == reload
            && clock
                .now()
                .duration_since(answer.at)
                .is_ok_and(|age| age < KEPT)
        {
            return Ok(answer.value.clone());
        }
        if self.failures.load(Ordering::Relaxed) != failures {
            drop(held);
            return ask.await;
        }
        let at = clock.now();
        match ask.await {
            Ok(value) => {
                *held = Some(Answer {
                    value: value.clone(),
                    at,
                    reload,
                });
                Ok(value)
            }
            Err(error) => {
                self.failures.fetch_add(1, Ordering::Relaxed);
                Err(error)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicU32;

    use super::*;

    struct Cluster {
        clock: Clock,
        recent: Recent<u32>,
        asked: AtomicU32,
    }

    impl Cluster {
        fn new() -> Self {
            Self {
                clock: Clock::simulated(SystemTime::UNIX_EPOCH),
                recent: Recent::default(),
                asked: AtomicU32::new(0),
            }
        }

        async fn ask(&self, reload: u64, works: bool) -> Result<u32, ()> {
            let ask = async {
                tokio::time::sleep(Duration::from_secs(1)).await;
                let count = self.asked.fetch_add(1, Ordering::Relaxed) + 1;
                if works { Ok(count) } else { Err(()) }
            };
            self.recent.get(&self.clock, reload, ask).await
        }
    }

    #[tokio::test(start_paused = true)]
    async fn who_asks_together_shares_an_answer_for_a_moment() {
        let cluster = Cluster::new();
        let together = (0..20).map(|_| cluster.ask(0, true));
        let answers = futures_util::future::join_all(together).await;
        assert!(answers.iter().all(|answer| *answer == Ok(1)), "{answers:?}");
        assert_eq!(cluster.ask(1, true).await, Ok(2), "after a reload");
        assert_eq!(cluster.ask(1, true).await, Ok(2));
        cluster.clock.sleep(KEPT).await;
        assert_eq!(cluster.ask(1, true).await, Ok(3), "after a moment");
    }

    #[tokio::test(start_paused = true)]
    async fn nobody_waits_for_more_than_one_failure_of_another() {
        let cluster = Cluster::new();
        let began = tokio::time::Instant::now();
        let together = (0..20).map(|_| cluster.ask(0, false));
        let answers = futures_util::future::join_all(together).await;
        assert!(answers.iter().all(Result::is_err));
        assert_eq!(began.elapsed(), Duration::from_secs(2));
        assert_eq!(cluster.ask(0, true).await, Ok(21), "failures are not kept");
    }
}
