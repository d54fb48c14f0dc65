//! The authorities of each region, remembered for a while: instances often join in numbers, and then no
//! join waits for Oracle but the first.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use super::Region;

/// How long an answer of Oracle's is taken without asking again.
const FRESH: Duration = Duration::from_hours(1);

/// Certificates, DER, by region. There are no more of them than Oracle has regions.
#[derive(Debug, Default)]
pub struct KnownRoots(Mutex<HashMap<&'static str, Answer>>);

#[derive(Debug)]
struct Answer {
    roots: Vec<Vec<u8>>,
    at: SystemTime,
}

impl KnownRoots {
    /// What the region answered of late. A clock that was set back has it forgotten.
    pub(super) fn of(&self, region: Region, now: SystemTime) -> Option<Vec<Vec<u8>>> {
        let known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let answer = known.get(region.name)?;
        let age = now.duration_since(answer.at).ok()?;
        (age < FRESH).then(|| answer.roots.clone())
    }

    /// Remembers an answer in place of the one before it.
    pub(super) fn learn(&self, region: Region, roots: Vec<Vec<u8>>, now: SystemTime) {
        let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        known.insert(region.name, Answer { roots, at: now });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_counts_for_its_region_and_its_time() {
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(1_800_000_000);
        let [phoenix, frankfurt] = ["phx", "fra"].map(|name| Region::of(name).unwrap());
        let known = KnownRoots::default();
        assert_eq!(known.of(phoenix, now), None);
        known.learn(phoenix, vec![b"old".to_vec()], now - FRESH);
        assert_eq!(known.of(phoenix, now), None);
        known.learn(phoenix, vec![b"new".to_vec()], now);
        let new = Some(vec![b"new".to_vec()]);
        assert_eq!(known.of(phoenix, now), new);
        assert_eq!(known.of(phoenix, now + FRESH - Duration::from_secs(1)), new);
        assert_eq!(known.of(phoenix, now + FRESH), None);
        assert_eq!(known.of(phoenix, now - Duration::from_secs(1)), None);
        assert_eq!(known.of(frankfurt, now), None);
    }
}
